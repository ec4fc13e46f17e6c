"""Which leaves are clipped, in which dtype one computes, and a division with a good derivative."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


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
