"""numbers -> norm: how numbers are added up, in float32 at least whatever the leaf's dtype.

A float32 sum of squares is right only while the squares are neither flushed to zero nor beyond
the largest float: see :mod:`.looks`.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np

from optaxclip import _device
from optaxclip._numbers import is_known, largest, real_dtype, where_positive, widen

from . import shards
from .base import Axes
from .shards import Names

# A NumPy integer, because optax.inject_hyperparams turns Python numbers, defaults included, into
# traced arrays, and the order of a norm shapes the program.
EUCLIDEAN: Final[Any] = np.int64(2)

# The orders whose sums may be of float64: powers of other ones are dear there.
WIDE = (1, 2)

_UNDERIVED = contextvars.ContextVar("underived", default=False)

# A sum over so few entries, which lie so far apart, is one that the library XLA:CPU calls for sums
# is slow at: 24 x (181, 724) take it 24 ms (jax 0.10.2). It takes no complex numbers, and XLA's own
# loop over these takes 0.56. From 33 entries on, that loop is slow.
FEW, MANY = 32, 2**14

# Columns of a leaf of at least so many entries are added up in so many parts, if they are longer
# than FEW.
LEAST, PARTS = 2**15, 8


def is_fast_in_float64(tree: Any) -> bool:
    """Whether one CPU adds up whole leaves in float64 as fast as in float32."""
    # Of bfloat16, a step takes 1.1 to 1.2 times that with two looks.
    fast = (jnp.float32, jnp.float16)
    return all(real_dtype(x) in fast for x in jax.tree.leaves(tree))


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


def power_sum(
    x: jax.Array,
    ord: float,
    axes: Axes | None = None,
    after: jax.Array | None = None,
    *,
    rare: bool = False,
) -> jax.Array:
    """What `root` makes a norm of: the sum of squares for p = 2, else the norm itself.

    Apart from `root`, so that the roots of many leaves are one operation on one vector.

    Args:
      x: any shape, any float or complex dtype.
      ord: p.
      axes: as of `p_norm`.
      after: sizes to be there before what is added up in a loop of XLA's own.
      rare: whether few steps take it, so that no loop is compiled to be faster.
    """
    x = widen(x)
    if ord == EUCLIDEAN:
        return _total(squared(x), axes, after, rare=rare)
    size = jnp.abs(x)
    if ord == 1:
        return _total(size, axes, after, rare=rare)
    peak = largest(size, axes)
    if ord == math.inf:
        return peak
    raised, peak = _raised(size, peak, ord)
    return peak * _pth_root(jnp.sum(raised, axes, keepdims=True), ord)


def _total(
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
    """The sum of float64 numbers over axes, which stay with size 1, of an array in one place."""
    shape = x.shape[: x.ndim - len(axes)]
    if tuple(axes) != tuple(range(len(shape), x.ndim)):
        return jnp.sum(x, axes, keepdims=True)
    rows = math.prod(shape) if shape else _device.rows_for_cores(x.size)
    each = _sums_of_rows(x.reshape(rows, x.size // max(rows, 1)), _zero(after))
    return (each if shape else jnp.sum(each)).reshape(*shape, *[1] * len(axes))


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


def square_sum(leaves: Sequence[jax.Array]) -> jax.Array:
    """The sum of the squares of leaves of one shape, as ()."""
    return _total(squares_of(leaves), None).reshape(())


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


@contextlib.contextmanager
def underived() -> Iterator[None]:
    """What is traced here has its derivative from elsewhere, and `root` need not have one at 0.

    A `jax.custom_jvp` around the root would do as well, but for reverse mode through a vmapped
    `lax.cond`, in which JAX 0.10.2 gives it zeros of the wrong shape.
    """
    token = _UNDERIVED.set(True)
    try:
        yield
    finally:
        _UNDERIVED.reset(token)


def root(total: jax.Array, ord: float) -> jax.Array:
    """The norm, of the power sum."""
    if ord != EUCLIDEAN:
        return total
    # With its selections, XLA writes sums of units to memory on a GPU, and roots of them again.
    return jnp.sqrt(total) if _UNDERIVED.get() else where_positive(jnp.sqrt, total)


def squared(x: jax.Array) -> jax.Array:
    """The square of each entry, of a complex one that of its modulus."""
    if jnp.iscomplexobj(x):  # real leaves never see .imag, which an Explicit mesh refuses
        return jnp.square(jnp.real(x)) + jnp.square(jnp.imag(x))
    return jnp.square(x)
