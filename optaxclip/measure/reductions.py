"""numbers -> their sum or the largest, in the way that is fast where the program runs.

XLA:CPU calls a library for most reductions. That is slow at columns, and at sums in float64, and
takes what is reduced as an array in memory; loops of XLA's own do not.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optaxclip import _device
from optaxclip._numbers import is_known, maxima_and_counts

from . import shards
from .base import Axes

# A sum over so few entries, which lie so far apart, is one that the library XLA:CPU calls for sums
# is slow at: 24 x (181, 724) take it 24 ms (jax 0.10.2). It takes no complex numbers, and XLA's own
# loop over these takes 0.56. From 33 entries on, that loop is slow.
FEW, MANY = 32, 2**14

# What is large enough for parts of it to be added first, entry by entry. And how many there are of
# columns, if these are longer than FEW.
LEAST, PARTS = 2**15, 8

UNSIGNED = np.int32(0x7FFFFFFF)  # all bits of a float32 but its sign


def total(
    x: jax.Array, axes: Axes | None, after: jax.Array | None = None, *, rare: bool = False
) -> jax.Array:
    """The sum over axes, which stay with size 1."""
    here = _device.on_cpu() and shards.is_in_one_place(x)
    if here and x.dtype == jnp.float64:
        return _by_rows(x, range(x.ndim) if axes is None else axes, after)
    if here and not rare and axes and _have_parts(x, axes) and not shards.in_a_stack():
        return _by_parts(x, axes, after)
    return _at_once(x, axes)


def _at_once(x: jax.Array, axes: Axes | None) -> jax.Array:
    """The sum over axes, which stay with size 1, as XLA takes it."""
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


def _have_parts(x: jax.Array, axes: Axes) -> bool:
    """Whether a sum is of columns of more than FEW entries, or of whatever lies like these."""
    leading = tuple(axes) == tuple(range(len(axes))) and len(axes) < x.ndim
    return leading and x.size >= LEAST and math.prod(x.shape[: len(axes)]) > FEW


def _by_parts(x: jax.Array, axes: Axes, after: jax.Array | None) -> jax.Array:
    """The sum over the first axes, which stay with size 1: first of eighths, entry by entry.

    That is a loop of XLA's own, which writes an eighth; the library that XLA:CPU calls for sums is
    slower at columns. Of squares of gpt2's matrices, 10 M entries: 4.2 -> 2.4 ms, of bfloat16 2.6
    -> 1.8 (jax 0.12: 3.2 -> 2.6, 2.3 -> 2.1); four parts 2.9, six 2.6, twelve 3.0 ms.
    """
    shape = x.shape[len(axes) :]
    rows = x.reshape(-1, *shape)
    length = rows.shape[0] // PARTS
    part = lambda i: jax.lax.slice_in_dim(rows, i * length, (i + 1) * length)
    sums = added([part(i) for i in range(PARTS)])
    # Selected, which the library cannot do, or it would take the additions too.
    always = jnp.full(sums.shape, _zero(after) == 0)
    sums = _at_once(jax.lax.select(always, sums, jnp.zeros_like(sums)), (0,))
    if PARTS * length < rows.shape[0]:
        sums += _at_once(rows[PARTS * length :], (0,))
    return sums.reshape(*[1] * len(axes), *shape)


def _by_rows(x: jax.Array, axes: Sequence[int], after: jax.Array | None) -> jax.Array:
    """The sum of float64 numbers over axes, which stay with size 1, of an array in one place.

    Halves of rows of large arrays are added first, entry by entry in the same loop, which waits for
    each of its sums: `clip_by_block_rms` over Optax's, SGD, leaves of 3 to 12 M entries: 1.07 to
    1.12 -> 0.97 to 0.99 (AdamW 1.04 -> 1.01; noise 0.03), and so with quarters. Of 0.07 to 0.3 M
    it is within noise.
    """
    if not _are_last(axes, x.ndim):
        return jnp.sum(x, axes, keepdims=True)
    rows, shape = _rows(x, axes)
    if len(axes) == x.ndim and x.size >= LEAST and rows.shape[1] % 2 == 0:
        rows = added(jnp.split(rows, 2, axis=1))
    each = _sums_of_rows(rows, _zero(after))
    return (each if each.size == math.prod(shape) else jnp.sum(each)).reshape(shape)


def _are_last(axes: Sequence[int], ndim: int) -> bool:
    return tuple(axes) == tuple(range(ndim - len(axes), ndim))


def _rows(x: jax.Array, axes: Sequence[int]) -> tuple[jax.Array, tuple[int, ...]]:
    """As (rows, columns), a row being what is reduced over the last axes, or of all a part."""
    shape = x.shape[: x.ndim - len(axes)]
    rows = math.prod(shape) if shape else _device.rows_for_cores(x.size)
    return x.reshape(rows, x.size // max(rows, 1)), (*shape, *[1] * len(axes))


def _zero(after: jax.Array | None) -> jax.Array:
    """An integer of which XLA does not know that it is 0: no size is negative.

    What it is needed for cannot begin before these sizes are there.
    """
    if after is None:
        return jax.lax.optimization_barrier(jnp.int32(0))
    return jnp.any(after < 0).astype(jnp.int32)


@jax.custom_jvp
def _sums_of_rows(x: jax.Array, zero: jax.Array) -> jax.Array:
    """The sum of each row, in a loop of XLA's own: there is an integer beside the sum.

    The library that XLA:CPU calls for sums has none such, and takes twice as long: 10 M entries
    2.5 ms in place of 1.2, and 1.3 where they are float32.

    Args:
      x: float64, (rows, columns).
      zero: as `_zero`, which says what the sum waits for; if XLA knew it and `x`, it would work out
        the sum while compiling, 1000 x 1000 in 3 s.
    """
    add = lambda a, b: (a[0] + b[0], a[1] + b[1])
    start = (np.float64(0), np.int32(0))
    both = jax.lax.reduce((x, jnp.full(x.shape, zero)), start, add, (1,))
    return jax.lax.optimization_barrier(tuple(both))[0]  # or XLA would drop the integers


@_sums_of_rows.defjvp
def _sums_of_rows_jvp(
    primals: tuple[jax.Array, jax.Array], tangents: tuple[jax.Array, Any]
) -> tuple[jax.Array, jax.Array]:
    return _sums_of_rows(*primals), jnp.sum(tangents[0], axis=1)


def largest(x: jax.Array, axes: Axes | None, after: jax.Array | None = None) -> jax.Array:
    """The largest of sizes, >= 0, over axes, which stay with size 1; NaN if there is one.

    XLA:CPU calls a library for maxima of floats, too, and for the sum that finds a NaN; where they
    are worked out, as quotients are, they are written to memory for these.
    """
    axes = tuple(range(x.ndim)) if axes is None else axes
    here = _device.on_cpu() and shards.is_in_one_place(x) and x.size >= _device.LARGE
    if not here or x.dtype != jnp.float32 or not _are_last(axes, x.ndim):
        return _largest_at_once(x, axes)
    return _largest_by_rows(x, _zero(after), axes)


def _largest_at_once(x: jax.Array, axes: Axes | None) -> jax.Array:
    """As `largest`, as XLA takes it.

    Where XLA takes the maximum of floats over the devices of a mesh, it drops NaN: on eight CPU
    devices, the maximum of a leaf with a NaN in one shard was finite on all of them. A sum keeps
    it, and one of squares is NaN in no other case. (Of 10 M entries, max takes 1.3 ms, this 1.9, a
    sum of `x` 10, any(isnan(x)) 50 and a maximum of their bits as integers, alone in its loop, 15.)
    """
    most = jnp.max(x, axes, keepdims=True, initial=0)  # 0 of no entries
    bad = jnp.isnan(jnp.sum(jnp.square(x), axes, keepdims=True))
    return jnp.where(bad, jnp.full_like(most, jnp.nan), most)


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def _largest_by_rows(x: jax.Array, zero: jax.Array, axes: Axes) -> jax.Array:
    """As `largest`, over the last axes, in a loop of XLA's own.

    It is of integers, which are in the order of the sizes, NaN above inf, but for a sign that NaN
    may have. There is a count beside it, or XLA would write them to memory, too, and take maxima of
    maxima.

    Args:
      x: float32, >= 0.
      zero: as of `_sums_of_rows`.
      axes: the last ones.
    """
    rows, shape = _rows(x, axes)
    bits = jax.lax.bitcast_convert_type(rows, jnp.int32) & UNSIGNED
    both = maxima_and_counts([bits], [bits > zero], (1,))
    each = jax.lax.bitcast_convert_type(jax.lax.optimization_barrier(both)[0], x.dtype)
    return (each if each.size == math.prod(shape) else jnp.max(each)).reshape(shape)


@_largest_by_rows.defjvp
def _largest_by_rows_jvp(
    axes: Axes, primals: tuple[jax.Array, jax.Array], tangents: tuple[jax.Array, Any]
) -> tuple[jax.Array, jax.Array]:
    plain = functools.partial(_largest_at_once, axes=axes)  # whose derivative is shared by all ties
    return _largest_by_rows(*primals, axes), jax.jvp(plain, primals[:1], tangents[:1])[1]


def added(arrays: Sequence[jax.Array]) -> jax.Array:
    """Their sum, entry by entry, in pairs: a chain of sixteen would round sixteen times."""
    while len(arrays) > 1:
        odd = arrays[len(arrays) & ~1 :]
        arrays = [*map(jax.lax.add, arrays[::2], arrays[1::2]), *odd]
    return arrays[0]
