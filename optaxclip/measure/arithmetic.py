"""numbers -> norm: the one file that adds numbers up, in float32 whatever the leaf's dtype.

A float32 sum of squares is right only while the squares are neither flushed to zero nor beyond
the largest float. :func:`in_range` keeps it there for entries from 2^-103 (1e-31) on, as long as
their Euclidean norm is below the largest float, 3.4e38.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np

from .base import Axes, Measure, Tree

# A NumPy integer, because optax.inject_hyperparams turns Python numbers, defaults included, into
# traced arrays, and the order of a norm shapes the program.
EUCLIDEAN: Final[Any] = np.int64(2)

# Squares of 2^40 x stay normal numbers down to x = 2^-103, so tiny gradients need no second look;
# zero norms (dead units, unused embedding rows) would ask for one at every step otherwise.
LIFT = 2.0**40
# Norms above 2^24 make that sum overflow: they are measured again in this unit, in which every norm
# that float32 can hold is right.
DROP = 2.0**-64


def is_float(x: Any) -> bool:
    """Whether a leaf is clipped: real or complex floats are; integers, bool and float0 are not."""
    dtype = getattr(x, "dtype", None)
    return isinstance(x, float | complex) if dtype is None else jnp.issubdtype(dtype, jnp.inexact)


def widen(x: jax.Array) -> jax.Array:
    """`x` in the dtype that computes with it: float32 at least; float64 and complex stay."""
    return x if x.dtype.itemsize >= np.dtype(np.float32).itemsize else x.astype(jnp.float32)


def real_dtype(x: jax.Array) -> Any:
    """The dtype of `x`, or of its parts if it is complex."""
    return jnp.finfo(x.dtype).dtype


def p_norm(x: jax.Array, ord: float, axes: Axes | None = None) -> jax.Array:
    """The p-norm over `axes` (all of them if None), which stay with size 1.

    Its derivative is finite everywhere, at zero too, where that of a plain square root is not.

    Args:
      x: any shape, any float or complex dtype.
      ord: p >= 1, or inf.
      axes: the axes to reduce.

    Returns:
      float32, or float64 where x is float64 or complex128.
    """
    return root(power_sum(x, ord, axes), ord)


def power_sum(x: jax.Array, ord: float, axes: Axes | None = None) -> jax.Array:
    """What `root` makes a norm of: the sum of squares for p = 2, else the norm itself.

    Apart from `root`, so that the roots of many leaves are one operation on one vector.
    """
    x = widen(x)
    if ord == EUCLIDEAN:
        return jnp.sum(_square(x), axes, keepdims=True)
    size = jnp.abs(x)
    if ord == 1:
        return jnp.sum(size, axes, keepdims=True)
    peak = jnp.max(size, axes, keepdims=True, initial=0)
    if ord == math.inf:
        return peak
    # Powers leave the float range early (1e10^4), so sum those of size/peak. The norm does not
    # depend on the peak that is divided out and multiplied back: no derivative through it.
    peak = jax.lax.stop_gradient(jnp.where((peak > 0) & jnp.isfinite(peak), peak, 1))
    total = jnp.sum((size / peak) ** float(ord), axes, keepdims=True)
    return peak * _where_positive(lambda safe: safe ** (1 / float(ord)), total)


def root(total: jax.Array, ord: float) -> jax.Array:
    """The norm, of the power sum."""
    return _where_positive(jnp.sqrt, total) if ord == EUCLIDEAN else total


def in_range(measure: Measure, grads: Tree, params: Tree) -> Tree:
    """The norms of `measure`, right wherever they fit into float32.

    The first pass measures 2^40 g and is enough for norms below 2^24. Only in a step where it gave
    inf or NaN somewhere does a second pass measure 2^-64 g.
    """
    if not measure.sums:
        return measure.norms(grads, params)

    wide = any(real_dtype(g) == jnp.float64 for g in jax.tree.leaves(grads))

    def at(power: float) -> Tree:
        # Hidden from XLA, which would make (x * 2^40) * (x * 2^40) into (x * x) * 2^80.
        unit = jax.lax.optimization_barrier(jnp.float32(power))
        norms = measure.norms(jax.tree.map(lambda g: _times(g, unit, wide=wide), grads), params)
        return jax.tree.map(lambda norm: norm / unit.astype(norm.dtype), norms)

    def again(norms: Tree) -> Tree:
        return jax.tree.map(lambda n, m: jnp.where(jnp.isfinite(n), n, m), norms, at(DROP))

    norms = at(LIFT)
    fits = [jnp.all(jnp.isfinite(norm)) for norm in jax.tree.leaves(norms)]
    if not fits:
        return norms
    return jax.lax.cond(jnp.all(jnp.stack(fits)), lambda norms: norms, again, norms)


def _times(g: jax.Array, unit: jax.Array, *, wide: bool) -> jax.Array:
    """The gradient times a power of two, in float64 or complex128 if any leaf of the tree is."""
    x = widen(g)
    if wide:
        x = x.astype(jnp.complex128 if jnp.iscomplexobj(x) else jnp.float64)
    return x * unit.astype(x.dtype)


def _square(x: jax.Array) -> jax.Array:
    if jnp.iscomplexobj(x):  # real leaves never see .imag, which an Explicit mesh refuses
        return jnp.square(jnp.real(x)) + jnp.square(jnp.imag(x))
    return jnp.square(x)


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


def _where_positive(fun: Callable[[jax.Array], jax.Array], x: jax.Array) -> jax.Array:
    """fun(x), with derivative 0 instead of infinity at 0; NaN stays NaN."""
    positive = x > 0
    return jnp.where(positive, fun(jnp.where(positive, x, 1)), x)
