"""A limit that is given: a number, an array or a schedule."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from optaxclip import _check

from .base import Memory, Threshold, started, ticked, uniform

Limit = float | jax.Array | Callable[[jax.Array], Any]


def constant(limit: Limit) -> Threshold:
    """The same limit at every step, or the one that a schedule gives for the step.

    Args:
      limit: a number >= 0, a () array, or a jittable schedule step -> value, where step is a ()
        int32 that starts at 0 and counts every update, those with non-finite norms too. inf
        turns clipping off, 0 gives zero updates.

    Returns:
      A threshold without memory; with a schedule, its memory is one `Clock`.

    Raises:
      TypeError, ValueError: if `limit` is not such.

    Example:
      >>> import jax.numpy as jnp, optax, optaxclip
      >>> warm = optaxclip.threshold.constant(optax.linear_schedule(10.0, 1.0, 9))
      >>> norm = jnp.float32(3.0)
      >>> memory = warm.init(norm)
      >>> for _ in range(3):
      ...     limit, memory = warm.update(norm, memory)
      ...     print(limit)
      10.0
      9.0
      8.0
    """
    _check.limit(limit=limit)
    if callable(limit):
        return _scheduled(limit)
    return Threshold(
        lambda norm: (),
        uniform(lambda norm, memory: (jnp.full_like(norm, limit), memory)),
    )


def _scheduled(schedule: Callable[[jax.Array], Any]) -> Threshold:
    def update(norm: jax.Array, memory: Memory) -> tuple[jax.Array, Memory]:
        limit = schedule(memory.step)
        _check.scheduled(limit)
        return jnp.full_like(norm, limit), ticked(memory)

    return Threshold(lambda norm: started(), uniform(update))
