"""numbers -> norm: how numbers are added up, in float32 at least whatever the leaf's dtype.

A float32 sum of squares is right only while the squares are neither flushed to zero nor beyond
the largest float. :func:`in_range` keeps it there for all normal numbers, 1.2e-38 to 3.4e38, as
long as their Euclidean norm is one too.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np

from optaxclip import _device
from optaxclip._numbers import is_known, largest, real_dtype, where_positive, widen

from . import shards
from .base import Axes, Measure, Tree
from .shards import Names

# A NumPy integer, because optax.inject_hyperparams turns Python numbers, defaults included, into
# traced arrays, and the order of a norm shapes the program.
EUCLIDEAN: Final[Any] = np.int64(2)

# A norm from here on has lost nothing that float32 could hold to squares that were flushed: those
# are below 2^-126 each, and a billion of them below 2^-36 of its own square.
LOW = 2.0**-30
# What gradients are multiplied by where a norm is below LOW, and where it came out as inf: the one
# brings squares of the smallest normal number, 2^-126, back into range, the other of the largest.
LIFT, DROP = 2.0**64, 2.0**-64

# A sum over so few entries, which lie so far apart, is one that the library XLA:CPU calls for sums
# is slow at: 24 x (181, 724) take it 24 ms (jax 0.10.2). It takes no complex numbers, and XLA's own
# loop over these takes 0.56. From 33 entries on, that loop is slow.
FEW, MANY = 32, 2**14


def p_norm(x: jax.Array, ord: float, axes: Axes | None = None, over: Names = ()) -> jax.Array:
    """The p-norm over `axes` (all of them if None), which stay with size 1.

    Its derivative is finite everywhere, at zero too, where that of a plain square root is not.

    Args:
      x: any shape, any float or complex dtype.
      ord: p >= 1, or inf.
      axes: the axes to reduce.
      over: the mesh axes over which what is reduced is split.

    Returns:
      float32, or float64 where x is float64 or complex128.
    """
    return root(joined(power_sum(x, ord, axes), ord, over), ord)


def power_sum(x: jax.Array, ord: float, axes: Axes | None = None) -> jax.Array:
    """What `root` makes a norm of: the sum of squares for p = 2, else the norm itself.

    Apart from `root`, so that the roots of many leaves are one operation on one vector.
    """
    x = widen(x)
    if ord == EUCLIDEAN:
        return _total(squared(x), axes)
    size = jnp.abs(x)
    if ord == 1:
        return jnp.sum(size, axes, keepdims=True)
    peak = largest(size, axes)
    if ord == math.inf:
        return peak
    raised, peak = _raised(size, peak, ord)
    return peak * _pth_root(jnp.sum(raised, axes, keepdims=True), ord)


def _total(x: jax.Array, axes: Axes | None) -> jax.Array:
    """The sum over axes, which stay with size 1."""
    add = functools.partial(jnp.sum, axis=axes, keepdims=True)
    if x.dtype != jnp.float32 or axes is None or len(axes) != 1:
        return add(x)
    few, many = x.shape[axes[0]], math.prod(x.shape[axes[0] + 1 :])
    known = is_known(few) and is_known(many)
    if not (known and 1 < few <= FEW and many > MANY):
        return add(x)

    def as_complex(x: jax.Array) -> jax.Array:
        return jnp.real(add(jax.lax.complex(x, jnp.zeros_like(x))))

    return jax.lax.platform_dependent(x, cpu=as_complex, default=add)


def square_sum(leaves: Sequence[jax.Array]) -> jax.Array:
    """The sum of the squares of leaves of one shape, as ()."""
    return jnp.sum(squares_of(leaves))


def squares_of(leaves: Sequence[jax.Array]) -> jax.Array:
    """The squares of leaves of one shape, added entry by entry."""
    return added([squared(widen(x)) for x in leaves])


def added(arrays: Sequence[jax.Array]) -> jax.Array:
    """Their sum, entry by entry, in pairs: a chain of sixteen would round sixteen times."""
    while len(arrays) > 1:
        odd = arrays[len(arrays) & ~1 :]
        arrays = [*map(jax.lax.add, arrays[::2], arrays[1::2]), *odd]
    return arrays[0]


def joined(sums: jax.Array, ord: float, over: Names) -> jax.Array:
    """The power sums of whole groups, of those of their shards, entry by entry."""
    if not over:
        return sums
    if ord in (1, EUCLIDEAN):
        return shards.total(sums, over)
    peak = shards.largest(sums, over)
    if ord == math.inf:
        return peak
    raised, peak = _raised(sums, peak, ord)
    return peak * _pth_root(shards.total(raised, over), ord)


def _raised(size: jax.Array, peak: jax.Array, ord: float) -> tuple[jax.Array, jax.Array]:
    """(size / peak)^p, and the peak that a norm made of these is in units of.

    Powers leave the float range early (1e10^4). The norm does not depend on the peak that is
    divided out and multiplied back: no derivative through it.
    """
    peak = jax.lax.stop_gradient(jnp.where((peak > 0) & jnp.isfinite(peak), peak, 1))
    return (size / peak) ** float(ord), peak


def _pth_root(total: jax.Array, ord: float) -> jax.Array:
    return where_positive(lambda safe: safe ** (1 / float(ord)), total)


def root(total: jax.Array, ord: float) -> jax.Array:
    """The norm, of the power sum."""
    return where_positive(jnp.sqrt, total) if ord == EUCLIDEAN else total


def in_range(measure: Measure, grads: Tree, params: Tree) -> Tree:
    """The norms of `measure`, right wherever they fit into float32.

    On a GPU they are of sums in float64, which the squares do not leave. Elsewhere that would cost:
    10 M entries on a CPU take 2.3 ms in place of 1.5.
    """
    if not measure.sums:
        return measure.norms(grads, params)
    doubles = any(real_dtype(g) == jnp.float64 for g in jax.tree.leaves(grads))
    if measure.wide and _device.on_gpu() and not doubles:
        return _in_float64(measure, grads, params)
    return _looked_at_again(measure, grads, params)


def _in_float64(measure: Measure, grads: Tree, params: Tree) -> Tree:
    """The norms as float32, of sums in float64, whether or not the program has it enabled.

    An H100 reads float32 as fast as it squares and adds float64. GPT-2's 124 M entries: a clip of
    units 0.94 of Optax's step. With float32 sums of the gradients as they are and times two powers
    of two 1.30, as XLA reads once for two sums of columns; by `lax.cond` more, for the host waits.
    """

    @jax.custom_jvp
    def norms(grads: Tree, params: Tree) -> Tree:
        with jax.enable_x64(True):  # noqa: FBT003 - it is JAX's own
            seen = jax.tree.map(functools.partial(_widened, wide=True), grads)
            found = measure.norms(seen, params)
            return jax.tree.map(lambda norm: norm.astype(jnp.float32), found)

    @norms.defjvp
    def _(primals: tuple[Tree, Tree], tangents: tuple[Tree, Tree]) -> tuple[Tree, Tree]:
        # JAX would take derivatives outside the context, where there is no float64; and no
        # transpose of a `lax.cond` that is in such a rule and vmapped.
        plain = functools.partial(_looked_at_again, measure, cond=_both)
        return norms(*primals), jax.jvp(plain, primals, tangents)[1]

    return norms(grads, params)


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
    wide = any(real_dtype(g) == jnp.float64 for g in jax.tree.leaves(grads))
    # Widened where it is used, because a branch takes its operands as arrays in memory.
    widened = functools.partial(_widened, wide=wide)

    def norms_of(fun: Callable[[jax.Array], jax.Array]) -> Tree:
        mapped = getattr(measure.norms, "mapped", None)
        return mapped(fun, grads) if mapped else measure.norms(jax.tree.map(fun, grads), params)

    # From XLA, which would make (c * power) * (c * power) of a leaf that is known to be c into
    # c^2 * power^2, and neither is in range: a parameter that is not used has gradients of 0.
    hidden = lambda g: widened(jax.lax.optimization_barrier(g))
    norms = norms_of(widened)
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
        if one:
            power = _power(leaves[0]).reshape(())
            found = norms_of(jax.jit(lambda g: _product(hidden(g), power)))
            return jax.tree.map(lambda old, new: _better(old, _quotient(new, power)), norms, found)
        if measure.apart:
            powers = jax.tree.map(_power, norms)
            spread = measure.spread(powers, grads)
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


def squared(x: jax.Array) -> jax.Array:
    """The square of each entry, of a complex one that of its modulus."""
    if jnp.iscomplexobj(x):  # real leaves never see .imag, which an Explicit mesh refuses
        return jnp.square(jnp.real(x)) + jnp.square(jnp.imag(x))
    return jnp.square(x)
