"""What the rooms share: which leaves are clipped, in which dtype one computes, exact choices."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from . import _device

Tree = Any

# What no memory learns, as it learns no inf and no 0: from here on, the square of a norm overflows
# float32; and a share of one that is smaller is flushed to 0, above which all norms then are.
TOO_LARGE, TOO_SMALL = 2.0**64, 2.0**-100
MANY_PARTS = 2**8  # of a vector, of leaves that a GPU then clips in a kernel each


def is_float(x: Any) -> bool:
    """Whether a leaf is clipped: real or complex floats are; integers, bool and float0 are not."""
    dtype = getattr(x, "dtype", None)
    return isinstance(x, float | complex) if dtype is None else _is_inexact(dtype)


@functools.cache  # of 148 leaves, an eager update takes 0.086 of the time of Optax's, else 0.100
def _is_inexact(dtype: Any) -> bool:
    return bool(jnp.issubdtype(dtype, jnp.inexact))


def part(tree: Tree) -> tuple[Tree, Callable[[Tree], Tree]]:
    """The tree with None for all but its floats, and what puts the others back."""
    if all(map(is_float, jax.tree.leaves(tree))):
        return tree, lambda floats: floats
    leaves, treedef = jax.tree.flatten(tree, is_leaf=lambda x: x is None)

    def whole(floats: Tree) -> Tree:
        pairs = zip(leaves, treedef.flatten_up_to(floats), strict=True)
        return treedef.unflatten([new if is_float(old) else old for old, new in pairs])

    return treedef.unflatten([x if is_float(x) else None for x in leaves]), whole


def is_known(size: Any) -> bool:
    """Whether a length or size is a number: jax.export may leave it open."""
    return isinstance(size, int)


def widen(x: jax.Array) -> jax.Array:
    """`x` in the dtype that computes with it: float32 at least; float64 and complex stay."""
    return x if x.dtype.itemsize >= np.dtype(np.float32).itemsize else x.astype(jnp.float32)


def real_dtype(x: jax.Array) -> Any:
    """The dtype of `x`, or of its parts if it is complex."""
    return jnp.finfo(x.dtype).dtype


def has_float64(tree: Tree) -> bool:
    """Whether a leaf is float64 or complex128."""
    return any(real_dtype(x) == jnp.float64 for x in jax.tree.leaves(tree))


def sanitized(x: jax.Array) -> jax.Array:
    """`x` with 0 in place of inf and NaN."""
    return where(jnp.isfinite(x), x, jnp.zeros_like(x))


def is_bad(limit: jax.Array) -> jax.Array:
    """Whether a limit allows nothing."""
    # Not ~(limit >= 0): where XLA sees that nothing but NaN could make it true, as it does in
    # jnp.maximum(limit, 0) >= 0, it takes it for false.
    return jnp.isnan(limit) | (limit < 0)


def where(mask: jax.Array, x: jax.Array, y: jax.Array) -> jax.Array:
    """`jnp.where`, bit for bit: XLA:CPU may choose narrow floats as float32, and flush them."""
    return _where_bits(mask, x, y) if _is_narrow(x.dtype) else _where(mask, x, y)


def _where(mask: jax.Array, x: jax.Array, y: jax.Array) -> jax.Array:
    # Of 1200 leaves, jnp.where is traced and compiled in 2.0 s, this in 1.6.
    return jax.lax.select(mask, x, y) if mask.ndim == 0 else jnp.where(mask, x, y)


@jax.custom_jvp
def _where_bits(mask: jax.Array, x: jax.Array, y: jax.Array) -> jax.Array:
    return to_float(_where(mask, from_float(x), from_float(y)), x.dtype)


@_where_bits.defjvp
def _where_bits_jvp(
    primals: tuple[jax.Array, ...], tangents: tuple[jax.Array, ...]
) -> tuple[jax.Array, jax.Array]:
    return _where_bits(*primals), _where(primals[0], tangents[1], tangents[2])


def maxima_and_counts(
    sizes: Sequence[jax.Array], masks: Sequence[jax.Array], axes: Sequence[int]
) -> list[jax.Array]:
    """The maximum of int32 arrays and the count of masks, in one reduction."""
    most = len(sizes)

    def join(a: Sequence[jax.Array], b: Sequence[jax.Array]) -> list[jax.Array]:
        return [*map(jax.lax.max, a[:most], b[:most]), *map(jax.lax.add, a[most:], b[most:])]

    start = [np.int32(np.iinfo(np.int32).min)] * most + [np.int32(0)] * len(masks)
    return list(jax.lax.reduce([*sizes, *(m.astype(jnp.int32) for m in masks)], start, join, axes))


def of_one_dtype(arrays: Sequence[jax.Array]) -> list[jax.Array]:
    """All as float64 if any is, else as float32."""
    dtype = jnp.float64 if any(x.dtype == jnp.float64 for x in arrays) else jnp.float32
    return [x.astype(dtype) for x in arrays]


def end_to_end(arrays: Sequence[jax.Array]) -> jax.Array:
    """All entries of arrays of one dtype, as one vector."""
    return jnp.concatenate([x if x.ndim == 1 else jnp.ravel(x) for x in arrays])


def as_one(arrays: Sequence[jax.Array]) -> jax.Array:
    """The same, written as one array: XLA would reduce each of them by itself."""
    return jax.lax.optimization_barrier(end_to_end(arrays))


def apart(vector: jax.Array, sizes: Sequence[int]) -> list[jax.Array]:
    """A vector in parts of these sizes, each by itself.

    XLA compiles each loop that it can tell from the others, so that places it does not know are
    faster to compile: a clip of 1200 leaves by their norms on a CPU in 7 s in place of 22, and for
    a GPU in 16 in place of 47. A GPU finds so many parts beforehand, dozens in one kernel; it clips
    few small leaves in one kernel, where it knows their places.
    """
    ends = np.cumsum([0, *sizes]).tolist()
    of = lambda places: [
        jax.lax.dynamic_slice(vector, (at,), (size,))
        for at, size in zip(places, sizes, strict=True)
    ]
    one = jax.lax.optimization_barrier(jnp.uint32(1))
    if _device.on_cpu():
        # The second of two numbers, as XLA writes single ones into the loops.
        places = [jnp.asarray([ends[-1], at], jnp.uint32) for at in ends[:-1]]
        return of([jax.lax.dynamic_slice(place, (one,), (1,)).reshape(()) for place in places])
    if _device.on_gpu() and len(sizes) >= MANY_PARTS:
        return list(jax.lax.optimization_barrier(of([one + np.uint32(at) - 1 for at in ends[:-1]])))
    return [vector[a:b] for a, b in itertools.pairwise(ends)]


def unstacked(vector: jax.Array) -> list[jax.Array]:
    """Every entry of a vector as a () array, see `apart`."""
    return [x.reshape(()) for x in apart(vector, [1] * len(vector))]


def opaque(x: jax.Array) -> jax.Array:
    """A number from an operation that XLA fuses with nothing, or every loop would work it out anew.

    A clip of 1200 leaves by the norm of all compiles in 2.1 s so, else in 4.8.
    """
    return jax.lax.sort(jnp.stack([x, x]))[0]


def _is_narrow(dtype: Any) -> bool:
    """Whether it is a float that XLA:CPU computes as float32; 4 bits cannot be cast to integers."""
    return jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits in (8, 16)


def any_narrow(tree: Any) -> bool:
    """Whether a leaf has entries of less than 32 bits."""
    return any(x.dtype.itemsize < 4 for x in jax.tree.leaves(tree))


def from_float(x: jax.Array) -> jax.Array:
    """Its bits, as unsigned integers."""
    return jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{jnp.finfo(x.dtype).bits}"))


def to_float(bits: jax.Array, dtype: Any) -> jax.Array:
    """What has these bits."""
    return jax.lax.bitcast_convert_type(bits, dtype)


def narrowed(x: jax.Array, dtype: Any) -> jax.Array:
    """`x` in a dtype that may be narrower, rounded to the nearest.

    A NaN stays one if the lower half of its bits is 0, as that of what arithmetic makes; of others,
    as a user's array may hold, some would become inf or 0.

    XLA:CPU casts to bfloat16 once, and writes that to memory if it is used twice, as by Adam. What
    is rounded by bits is worked out for each use: a step with Adam and `clip_by_global_norm`, of
    10 M entries, needs no memory in place of 20 MB, and 1.15 to 1.19 of the bare one's time in
    place of 1.11 to 1.17 (Optax: 40 MB, 1.8 to 2.2).
    """
    by_bits = x.dtype == jnp.float32 and dtype == jnp.bfloat16 and _device.on_cpu()
    return _nearest_bfloat16(x) if by_bits else x.astype(dtype)


@jax.custom_jvp
def _nearest_bfloat16(x: jax.Array) -> jax.Array:
    bits = from_float(x)
    # Half of the last bit that is kept, less one where that is 0, as a tie goes to the even one.
    # The sum is inf for what is beyond the largest number.
    kept = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return to_float(kept.astype(jnp.uint16), jnp.bfloat16)


@_nearest_bfloat16.defjvp
def _nearest_bfloat16_jvp(
    primals: tuple[jax.Array], tangents: tuple[jax.Array]
) -> tuple[jax.Array, jax.Array]:
    return _nearest_bfloat16(*primals), tangents[0].astype(jnp.bfloat16)


def where_positive(fun: Callable[[jax.Array], jax.Array], x: jax.Array) -> jax.Array:
    """fun(x), with derivative 0 instead of infinity at 0; NaN stays NaN."""
    positive = x > 0
    return jnp.where(positive, fun(jnp.where(positive, x, 1)), x)


def leading(mask: jax.Array, x: jax.Array) -> jax.Array:
    """A mask of groups, with axes in front for those that `x` has there."""
    return mask.reshape((1,) * (x.ndim - mask.ndim) + mask.shape)


def as_like(value: Any, x: jax.Array) -> Any:
    """A hyperparameter in the dtype of `x`, unless it is a Python number that adapts by itself."""
    adapts = not hasattr(value, "dtype") and jnp.issubdtype(x.dtype, jnp.inexact)
    return value if adapts else jnp.asarray(value, x.dtype)


@jax.custom_jvp
def quotient(over: jax.Array, under: jax.Array) -> jax.Array:
    """Divides, with a derivative that is right where under^2, which JAX divides by, is not."""
    return over / under


@quotient.defjvp
def _quotient_jvp(
    primals: tuple[jax.Array, jax.Array], tangents: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array]:
    over, under = primals
    value = quotient(over, under)
    return value, (tangents[0] - value * tangents[1]) / under
