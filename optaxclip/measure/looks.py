"""measure -> norms that are right in all of float32.

Sums of squares in float32 leave its range long before norms do. :func:`in_range` keeps them right
for all normal numbers, 1.2e-38 to 3.4e38, as long as their Euclidean norm is one too: by a first
look and in rare steps a second, or by sums in float64 where these are as fast.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optaxclip import _device
from optaxclip._numbers import has_float64, is_known, opaque, widen

from . import pieces, shards
from .arithmetic import is_fast_in_float64, underived
from .base import Fun, Measure, Norms, Packing, Tree, packing_of

# A norm from here on has lost nothing that float32 could hold to squares that were flushed: those
# are below 2^-126 each, and a billion of them below 2^-36 of its own square.
LOW = 2.0**-30
# What gradients are multiplied by where a norm is below LOW, and where it came out as inf: the one
# brings squares of the smallest normal number, 2^-126, back into range, the other of the largest.
LIFT, DROP = 2.0**64, 2.0**-64
MANY_UNITS = 2**16  # of a leaf, whose bytes take longer than a kernel takes to start


def in_range(measure: Measure, grads: Tree, params: Tree) -> Tree:
    """The norms of `measure`, right wherever they fit into float32.

    On a GPU they are of sums in float64, which the squares do not leave, and on a CPU where these
    are fast: of whole leaves in one place.
    """
    found = packed_in_range(measure, grads, params)
    return found.unpacked(found.norms)


class Measured(NamedTuple):
    """Norms in range, packed or not."""

    norms: Tree
    unpacked: Callable[[Tree], Tree]  # norms -> norms as the measure has them
    spread: Callable[[Tree], Tree]  # factors that are as the norms -> a prefix tree of grads

    @classmethod
    def as_is(cls, measure: Measure, norms: Tree, grads: Tree) -> Measured:
        """Norms as the measure has them."""
        return cls(norms, lambda norms: norms, lambda factors: measure.spread(factors, grads))


def packed_in_range(measure: Measure, grads: Tree, params: Tree) -> Measured:
    """The norms of `in_range`, packed if the measure has a packing and it is in place."""
    packing = packing_of(measure)
    if packing is None or not _is_packed(packing, grads, params):
        return Measured.as_is(measure, _unpacked_in_range(measure, grads, params), grads)
    if packing.wide and is_fast_in_float64(grads) and not _device.on_gpu():
        norms = _packed_in_float64(packing, grads, params)
    elif not measure.sums:
        norms = packing.norms(grads, params, lambda g: g)
    elif _device.on_gpu() and not has_float64(grads):
        norms = _packed_on_gpu(packing, grads, params)
    else:
        norms = _packed_and_looked_at_again(packing, grads, params)
    return Measured(
        norms,
        lambda norms: packing.unpacked(norms, grads),
        lambda factors: packing.spread(factors, grads),
    )


def _is_packed(packing: Packing, grads: Tree, params: Tree) -> bool:
    if not packing.suits(grads, params):
        return False
    if _device.on_gpu():
        one_place = all(map(shards.is_in_one_place, jax.tree.leaves((grads, params))))
        return one_place and packing.suits_gpu(grads)
    return pieces.are_here((grads, params))


def _packed_on_gpu(packing: Packing, grads: Tree, params: Tree) -> Tree:
    """As `_in_float64`, packed."""
    plain = functools.partial(_packed_and_looked_at_again, packing, cond=_both)
    return _with_derivative(_wide(packing), plain)(grads, params)


def _wide(packing: Packing) -> Norms:
    """The norms as float32, of sums in float64, without a derivative."""
    widened = functools.partial(_widened, wide=True)
    return _of_float64(lambda grads, params: packing.norms(grads, params, widened))


def _packed_in_float64(packing: Packing, grads: Tree, params: Tree) -> Tree:
    """The norms as float32, of sums in float64.

    Nothing waits for a branch, and none is compiled. GPT-2's leaves, 10 M entries, SGD: a clip by
    leaf 0.91 of the step with two looks, by the norm of the tree 0.96, of float16 0.22, as XLA:CPU
    writes that out widened.
    """
    plain = functools.partial(_packed_and_looked_at_again, packing)

    def norms(grads: Tree, params: Tree) -> Tree:
        # What is exported may run elsewhere: on a TPU, float64 has the range of float32.
        found = jax.lax.platform_dependent(grads, params, cpu=_wide(packing), default=plain)
        return jax.tree.map(lambda norm: norm if norm.ndim else opaque(norm), found)

    return _with_derivative(norms, functools.partial(plain, cond=_both))(grads, params)


def _packed_and_looked_at_again(
    packing: Packing, grads: Tree, params: Tree, cond: Callable[..., Tree] = jax.lax.cond
) -> Tree:
    """As _looked_at_again, each norm of its own power."""
    widened, hidden = _widening(grads)
    norms = packing.norms(grads, params, widened)

    def look_again() -> Tree:
        product = jax.jit(lambda g, power: _product(hidden(g), power))
        powers = jax.tree.map(_power, norms)
        found = packing.norms(grads, params, product, powers)
        return jax.tree.map(_better, norms, jax.tree.map(_quotient, found, powers))

    out = [jnp.any(_is_small(norm) | _is_large(norm)) for norm in jax.tree.leaves(norms)]
    return cond(jnp.any(jnp.stack(out)), look_again, lambda: norms)


def _widening(grads: Tree) -> tuple[Fun, Fun]:
    """What widens leaves, and what does behind a barrier.

    From XLA, which would make (c * power) * (c * power) of a leaf that is known to be c into
    c^2 * power^2, and neither is in range: a parameter that is not used has gradients of 0.
    """
    wide = has_float64(grads)
    # Widened where it is used, because a branch takes its operands as arrays in memory.
    widened = functools.partial(_widened, wide=wide)
    return widened, lambda g: widened(jax.lax.optimization_barrier(g))


def _unpacked_in_range(measure: Measure, grads: Tree, params: Tree) -> Tree:
    if not measure.sums:
        return measure.norms(grads, params)
    if measure.wide and _device.on_gpu() and not has_float64(grads):
        return _in_float64(measure, grads, params)
    return _looked_at_again(measure, grads, params)


def _in_float64(measure: Measure, grads: Tree, params: Tree) -> Tree:
    """The norms as float32, of sums in float64.

    An H100 reads float32 as fast as it squares and adds float64. GPT-2's 124 M entries: a clip of
    units 0.94 of Optax's step. With float32 sums of the gradients as they are and times two powers
    of two 1.30, as XLA reads once for two sums of columns; by `lax.cond` more, for the host waits.
    """

    def norms(grads: Tree, params: Tree) -> Tree:
        return measure.norms(jax.tree.map(functools.partial(_widened, wide=True), grads), params)

    plain = functools.partial(_looked_at_again, measure, cond=_both)
    return _with_derivative(_of_float64(norms), plain)(grads, params)


def _of_float64(norms: Norms) -> Norms:
    """Norms as float32, whether or not the program has float64 enabled, which they are made of.

    Their derivative is to come from elsewhere, see `_with_derivative`.
    """

    def found(grads: Tree, params: Tree) -> Tree:
        with jax.enable_x64(True), underived():  # noqa: FBT003 - it is JAX's own
            return jax.tree.map(single, norms(grads, params))

    def single(norm: jax.Array) -> jax.Array:
        narrow = norm.astype(jnp.float32)
        # What follows reads float32 then: XLA would write float64, and read it for each use.
        many = is_known(norm.size) and norm.size >= MANY_UNITS
        return jax.lax.optimization_barrier(narrow) if many else narrow

    return found


def _with_derivative(norms: Norms, plain: Norms) -> Norms:
    """Norms with the derivative of others, which stand for the same.

    JAX would take one outside the context, where there is no float64; and takes no transpose of a
    `lax.cond` that is in such a rule and vmapped.
    """
    found = jax.custom_jvp(norms)

    @found.defjvp
    def _(primals: tuple[Tree, Tree], tangents: tuple[Tree, Tree]) -> tuple[Tree, Tree]:
        return found(*primals), jax.jvp(plain, primals, tangents)[1]

    return found


def _both(flag: jax.Array, then: Callable[[], Tree], other: Callable[[], Tree]) -> Tree:
    """As `lax.cond`, with both sides taken."""
    return jax.tree.map(functools.partial(jnp.where, flag), then(), other())


def _looked_at_again(
    measure: Measure, grads: Tree, params: Tree, cond: Callable[..., Tree] = jax.lax.cond
) -> Tree:
    """The norms, of sums in the dtype of the leaves, float32 at least.

    They are measured as they are, and once more times a power of two in a step where some are so
    small or so large, zero and inf included, that squares may have left the range.
    """
    widened, hidden = _widening(grads)
    norms = measure.norms(jax.tree.map(widened, grads), params)
    leaves = jax.tree.leaves(norms)
    if not leaves:
        return norms

    def times(powers: Tree, spread: Tree, product: Callable[..., Any]) -> Tree:
        """The norms of the gradients times powers of two, over these."""
        each = jax.tree.broadcast(spread, grads)
        # Traced and lowered once for all leaves of one shape.
        scaled = jax.tree.map(jax.jit(lambda g, p: product(hidden(g), p)), grads, each)
        return jax.tree.map(_quotient, measure.norms(scaled, params), powers)

    def look_again() -> Tree:
        # Of one norm for several shards, devices might choose different powers.
        one = len(leaves) == 1 and leaves[0].size == 1 and not shards.manual_axes()
        if one or measure.apart:
            powers = jax.tree.map(_power, norms)
            spread = _power(leaves[0]).reshape(()) if one else measure.spread(powers, grads)
            return jax.tree.map(_better, norms, times(powers, spread, _product))
        return functools.reduce(all_times, ((_is_small, LIFT), (_is_large, DROP)), norms)

    def all_times(found: Tree, round: tuple[Callable[[jax.Array], jax.Array], float]) -> Tree:
        is_such, power = round
        # Hidden from XLA, which would make (x * power) * (x * power) into (x * x) * power^2.
        unknown = jax.lax.optimization_barrier(jnp.float32(power))
        powers = jax.tree.map(lambda norm: unknown, norms)
        product = _lifted if power == LIFT else _product
        other = cond(some(is_such), lambda: times(powers, unknown, product), lambda: norms)
        chosen = lambda norm, old, new: jnp.where(is_such(norm), new, old)
        return jax.tree.map(chosen, norms, found, other)

    def some(is_such: Callable[[jax.Array], jax.Array]) -> jax.Array:
        # There may be collectives in a branch.
        return shards.anywhere(jnp.any(jnp.stack([jnp.any(is_such(norm)) for norm in leaves])))

    return cond(some(lambda n: _is_small(n) | _is_large(n)), look_again, lambda: norms)


def _product(g: jax.Array, power: jax.Array) -> jax.Array:
    return g * power.astype(g.dtype)


def _quotient(norm: jax.Array, power: jax.Array) -> jax.Array:
    return norm / power.astype(norm.dtype)


@jax.custom_jvp
def _lifted(g: jax.Array, power: jax.Array) -> jax.Array:
    """The product, where groups that are not looked at may become inf: with derivative 0 there.

    Their squares, which nobody takes, would make NaN of 0.
    """
    return _product(g, power)


@_lifted.defjvp
def _lifted_jvp(
    primals: tuple[jax.Array, jax.Array], tangents: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array]:
    value, moved = _lifted(*primals), _product(tangents[0], primals[1])
    return value, jnp.where(jnp.isfinite(value), moved, jnp.zeros_like(moved))


def _power(norm: jax.Array) -> jax.Array:
    return jnp.where(_is_small(norm), LIFT, jnp.where(_is_large(norm), DROP, 1))


def _better(norm: jax.Array, again: jax.Array) -> jax.Array:
    return jnp.where(_is_small(norm) | _is_large(norm), again, norm)


def _is_small(norm: jax.Array) -> jax.Array:
    return norm < LOW


def _is_large(norm: jax.Array) -> jax.Array:
    return ~jnp.isfinite(norm)


def _widened(g: jax.Array, *, wide: bool) -> jax.Array:
    """The gradient in float32, or in float64 if any leaf of the tree is."""
    if not wide:
        return widen(g)
    return g.astype(jnp.complex128 if jnp.iscomplexobj(g) else jnp.float64)
