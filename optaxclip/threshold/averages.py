"""Running averages of norms: right for a norm of any size, exact where it is constant."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from optaxclip._numbers import as_like, where_positive

# From LOW to HIGH, squares and what derivatives take of them stay far inside the range of float32.
# What is learned beyond, from 2^-100 to 2^64, is there times SHIFT or 1 / SHIFT, whose squares are
# in range as well: of a memory that XLA knows to be 0, it makes SHIFT^2 x 0^2.
LOW, HIGH, SHIFT = 2.0**-22, 2.0**40, 2.0**61


def rate(decay: Any) -> Any:
    """1 - decay, the weight of the new norm, before float32 rounds decay: 6e-5 off at 0.999.

    A traced decay may have been rounded to 1, as 0.999 is in bfloat16; then all norms count alike.
    """
    traced = isinstance(decay, jax.Array)
    return jnp.maximum(1 - decay, 2.0**-24) if traced else float(1 - decay)


def mean(old: jax.Array, new: jax.Array, decay: Any) -> jax.Array:
    """Decay x old + (1 - decay) x new."""
    return old + as_like(rate(decay), new) * (new - old)


def root_mean_square(old: jax.Array, new: jax.Array, decay: Any) -> jax.Array:
    """The root of decay x old^2 + (1 - decay) x new^2, whose squares stay in range.

    Those of norms leave that of float32 long before the norms do, so that these are multiplied by
    a power of two, which rounds nothing. Quotients by the larger of both would do as well; but
    XLA:CPU writes them to memory, an array each where every entry has a norm.
    """
    most = jnp.maximum(old, new)
    choice = lambda low, high: jnp.where(most < LOW, low, jnp.where(most > HIGH, high, 1))
    power = choice(SHIFT, 1 / SHIFT).astype(most.dtype)
    back = choice(1 / SHIFT, SHIFT).astype(most.dtype)
    total = mean(jnp.square(old * power), jnp.square(new * power), decay)
    return where_positive(jnp.sqrt, total) * back


def weight(seen: jax.Array, decay: Any, dtype: Any = jnp.float32) -> jax.Array:
    """1 - decay^t, what t averages from 0 on are divided by to correct their bias; 0 at t = 0."""
    log = jnp.log1p(-as_like(rate(decay), jnp.zeros((), dtype)))
    # Not 0 x -inf, which is NaN, where decay is 0.
    return jnp.where(seen > 0, -jnp.expm1(jnp.maximum(seen, 1).astype(dtype) * log), 0)
