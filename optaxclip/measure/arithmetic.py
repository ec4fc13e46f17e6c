"""numbers -> norm: how numbers are added up, in float32 at least whatever the leaf's dtype.

A float32 sum of squares is right only while the squares are neither flushed to zero nor beyond
the largest float: see :mod:`.looks`.
"""

from __future__ import annotations

import contextlib
import contextvars
import math
from collections.abc import Iterator, Sequence
from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np

from optaxclip._numbers import real_dtype, where_positive, widen

from . import reductions, shards
from .base import Axes
from .shards import Names

# A NumPy integer, because optax.inject_hyperparams turns Python numbers, defaults included, into
# traced arrays, and the order of a norm shapes the program.
EUCLIDEAN: Final[Any] = np.int64(2)

# The orders whose sums may be of float64: powers of other ones are dear there.
WIDE = (1, 2)

_UNDERIVED = contextvars.ContextVar("underived", default=False)


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
        return reductions.total(squared(x), axes, after, rare=rare)
    size = jnp.abs(x)
    if ord == 1:
        return reductions.total(size, axes, after, rare=rare)
    peak = reductions.largest(size, axes, after)
    if ord == math.inf:
        return peak
    raised, peak = _raised(size, peak, ord)
    return peak * _pth_root(jnp.sum(raised, axes, keepdims=True), ord)


def square_sum(leaves: Sequence[jax.Array]) -> jax.Array:
    """The sum of the squares of leaves of one shape, as ()."""
    return reductions.total(squares_of(leaves), None).reshape(())


def squares_of(leaves: Sequence[jax.Array]) -> jax.Array:
    """The squares of leaves of one shape, added entry by entry."""
    return reductions.added([squared(widen(x)) for x in leaves])


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
