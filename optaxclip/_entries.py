"""entries, a limit for each -> clipped entries, and what there is to record of them.

What `rescale` does to `measure.element()`, but by limits, not by factors.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from . import _device
from ._numbers import (
    TOO_LARGE,
    as_one,
    from_float,
    is_bad,
    maxima_and_counts,
    to_float,
    where,
    widen,
)
from .measure import pieces, rows

Tree = Any

NORMAL = np.int32(0x00800000)  # the bits of the smallest normal number
# Entries of a leaf that a GPU reads in a kernel of its own. XLA would have the one that updates the
# parameters reduce as well: of 400 M entries on an H200, AdamW took 1.2 (float32) and 1.5 times the
# bare step and one read, in place of 1.0 and 1.1.
ALONE = 2**20
BAD = np.int32(0x7F800000)  # the bits of inf; those of NaN are more, those of numbers are less


class Entries(NamedTuple):
    """One step of one leaf, entry by entry."""

    grad: jax.Array  # the leaf
    norm: jax.Array  # float32 or float64, |g| of every entry that counts
    finite: jax.Array  # bool, as norm, whether what came in was finite
    limit: jax.Array  # as norm, or () if it is uniform
    uniform: bool  # whether that is one limit for all entries of all leaves
    nonfinite: str  # the policy


def bounded(grads: Tree, limits: Tree, nonfinite: str) -> Tree:
    """What `rescale` makes of real entries that have a limit each.

    Not by a factor: XLA takes a quotient for expensive, and writes it to memory where it has two
    uses, as in Adam. clip_by_value and AdamW, 10 M entries: 28.8 ms by factors, 15.7 so.
    """

    @jax.jit  # traced and lowered once for all leaves of one shape
    def one(grad: jax.Array, limit: jax.Array) -> jax.Array:
        allowed = jnp.where(is_bad(limit), 0, limit)
        # Floats of 8 bits differ in what their bits mean.
        bound = _bounded_bits if grad.dtype.itemsize > 1 else _bounded
        return bound(grad, allowed, nonfinite)

    return jax.tree.map(one, grads, limits)


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def _bounded_bits(grad: jax.Array, allowed: jax.Array, nonfinite: str) -> jax.Array:
    """As `_bounded`, by what is the same in all sizes of floats: they are ordered as their bits.

    XLA:CPU flushes no integers and takes their minimum fast: of 10 M entries, SGD with Optax's clip
    takes 2.9 ms, with this one 2.9, and with selections of floats 3.2.
    """
    bits, minus = from_float(grad), from_float(jnp.asarray(-0.0, grad.dtype))
    most = from_float(jnp.asarray(jnp.inf, grad.dtype))
    sign, size = bits & minus, bits & ~minus
    least = jnp.minimum(size, from_float(allowed.astype(grad.dtype)) & ~minus)  # -0 is 0
    other = from_float(jnp.asarray(jnp.nan if nonfinite == "propagate" else 0, grad.dtype))
    return to_float(jnp.where(size < most, least | sign, other), grad.dtype)


@_bounded_bits.defjvp
def _bounded_bits_jvp(nonfinite: str, primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    value = _bounded_bits(*primals, nonfinite)
    plain = functools.partial(_bounded, nonfinite=nonfinite)
    return value, jax.jvp(plain, primals, tangents)[1]


def _bounded(grad: jax.Array, allowed: jax.Array, nonfinite: str) -> jax.Array:
    x, other = widen(grad), jnp.nan if nonfinite == "propagate" else 0
    size = jnp.abs(x)
    most = jnp.where(x < 0, -allowed, allowed)
    most = jnp.where(size < jnp.inf, most, jnp.full_like(x, other))
    kept = size <= jnp.minimum(allowed, jnp.finfo(x.dtype).max)
    return where(kept, grad, most.astype(grad.dtype))


def bounded_norms(norm: jax.Array, limit: jax.Array, nonfinite: str) -> tuple[jax.Array, jax.Array]:
    """The sizes of entries that have a limit each after `bounded`, and 1 / factor; both as norm."""
    # -0 is 0 too, and has no reciprocal below it.
    counts, allowed = jnp.isfinite(norm), jnp.where(is_bad(limit) | (limit == 0), 0, limit)
    # The reciprocal of a limit of 2^126 or more would be flushed to 0; and XLA, if it saw both
    # factors, would make one of them.
    if _device.on_gpu():  # which writes to memory what is behind a barrier
        unit = jnp.where((allowed > TOO_LARGE) & counts, 1 / TOO_LARGE, 1).astype(norm.dtype)
        above = norm * unit / (allowed * unit)
    else:
        unit = jnp.where(allowed > TOO_LARGE, 1 / TOO_LARGE, 1).astype(norm.dtype)
        above = jax.lax.optimization_barrier(norm * unit) * (1 / (allowed * unit))
    least = 1 + jnp.finfo(norm.dtype).eps  # what is above is not rounded to what is not
    excess = jnp.where(norm > allowed, jnp.maximum(above, least), 1)
    bad = norm if nonfinite == "propagate" else jnp.full_like(norm, jnp.inf)
    most = jnp.minimum(norm, allowed)
    clipped_norm = jnp.where(counts, most, jnp.nan if nonfinite == "propagate" else 0)
    return clipped_norm, jnp.where(counts, excess, bad)


def read_once(ones: Sequence[Entries]) -> tuple[jax.Array, ...]:
    """The largest norm before and after, limit and factor, how many are clipped, if any is bad.

    The largest entry, the largest finite one and how many are above the limit are all there is to
    know; by the factor of each, metrics of 10 M entries took 2.7 times as long.

    Args:
      ones: of float32, on one device, with one limit for all.

    Returns:
      () float32 each.
    """
    first = ones[0]
    limit, nonfinite = first.limit[(0,) * first.limit.ndim], first.nonfinite
    most, most_finite, clipped, bad = _extremes([one.grad for one in ones], limit)
    if nonfinite == "sanitize":
        most = most_finite
    last = most if nonfinite == "propagate" else most_finite
    clipped_norm, _ = bounded_norms(last, limit, nonfinite)
    _, excess = bounded_norms(most, limit, nonfinite)
    return most, clipped_norm, limit, 1 / excess, clipped, bad


@jax.custom_jvp
def _extremes(leaves: list[jax.Array], limit: jax.Array) -> tuple[jax.Array, ...]:
    """The largest size, the largest finite one, how many are above, whether any is bad."""
    allowed = _bits(jnp.where(is_bad(limit), 0, jnp.abs(limit)))  # -0 is none
    # Nothing is above inf; and what is below the normal numbers is not above 0, as XLA:CPU has it.
    allowed = jnp.clip(allowed, NORMAL - 1, BAD - 1)
    read = functools.partial(_read, allowed=allowed)
    on_gpu = _device.on_gpu()
    found = [read([x]) for x in _laid_together(leaves)] if on_gpu else pieces.each(leaves, read)
    most, turned, above = map(as_one, zip(*found, strict=True))
    most, least = jnp.max(most), jnp.maximum(jnp.max(turned), NORMAL) - NORMAL
    sizes = [jax.lax.bitcast_convert_type(x, jnp.float32) for x in (most, least)]
    # All may be more than int32 can count.
    return *sizes, *(jnp.sum(x.astype(jnp.float32)) for x in (above, most >= BAD))


def _read(leaves: Sequence[jax.Array], allowed: jax.Array) -> Sequence[jax.Array]:
    """Of each row: the largest size, the largest finite one turned, how many finite are above."""
    # As integers, which XLA:CPU may reorder, and so makes fast. With NORMAL added, those of inf and
    # NaN wrap around, below all others. In bfloat16 such operations, not memory, bound an H200: a
    # comparison and a selection more, and four results, took it 1.14 of the limit in place of 1.08.
    each, axes = zip(*map(_device.in_rows, leaves), strict=True)
    bits = [_bits(jnp.abs(widen(x))) for x in each]
    turned = [x + NORMAL for x in bits]
    most = [functools.reduce(jnp.maximum, sizes) for sizes in (bits, turned)]
    above = functools.reduce(jnp.add, [(x > allowed + NORMAL).astype(jnp.int32) for x in turned])
    return maxima_and_counts(most, [above], axes[0])


def _laid_together(leaves: list[jax.Array]) -> list[jax.Array]:
    """The leaves, but the small ones as one, since each kernel takes a GPU time to start."""
    small = [widen(leaf) for leaf in leaves if leaf.size <= rows.FEW]
    alone = lambda leaf: jax.lax.optimization_barrier(leaf) if leaf.size >= ALONE else leaf
    large = [alone(leaf) for leaf in leaves if leaf.size > rows.FEW]
    return [*large, *([as_one(small)] if small else [])]


@_extremes.defjvp
def _extremes_jvp(primals: Any, tangents: Any) -> tuple[Any, Any]:
    def largest(leaves: list[jax.Array]) -> jax.Array:
        sizes = [jnp.abs(widen(x)) for x in leaves]
        sizes = [jnp.where(jnp.isfinite(x), x, jnp.zeros_like(x)) for x in sizes]
        return jnp.max(jnp.stack([*map(jnp.max, sizes)]))

    value = _extremes(*primals)  # integers have no derivative
    within = jax.jvp(largest, (primals[0],), (tangents[0],))[1]
    whole = jnp.where(jnp.isfinite(value[0]), within, jnp.zeros_like(within))
    return value, (whole, within, *map(jnp.zeros_like, value[2:]))


def _bits(norm: jax.Array) -> jax.Array:
    """Sizes as integers, which are in the same order, NaN above inf."""
    return jax.lax.bitcast_convert_type(norm, jnp.int32)
