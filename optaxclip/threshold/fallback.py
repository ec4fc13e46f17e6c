"""A threshold for as long as another one has no limit."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optaxclip import _check

from .base import Memory, Threshold


class FallbackMemory(NamedTuple):
    """What both thresholds remember."""

    threshold: Memory
    other: Memory


def fallback(threshold: Threshold, other: Threshold) -> Threshold:
    """The limit of `threshold`, or that of `other` while it has none, being inf.

    Args:
      threshold: the one whose limit counts.
      other: what holds in its warm-up, group by group.

    Returns:
      A threshold that remembers what both do.

    Raises:
      TypeError: if an argument is not such.

    Example:
      >>> import jax.numpy as jnp, optaxclip
      >>> t = optaxclip.threshold
      >>> guarded = t.fallback(t.growth(2.0), t.constant(5.0))
      >>> memory = guarded.init(jnp.float32(0))
      >>> for norm in [9.0, 9.0]:
      ...     limit, memory = guarded.update(jnp.float32(norm), memory)
      ...     print(limit)
      5.0
      18.0
    """
    _check.instance(Threshold, "threshold.growth(1.01)", threshold=threshold, other=other)

    def init(norm: Any) -> FallbackMemory:
        return FallbackMemory(threshold.init(norm), other.init(norm))

    def update(norm: jax.Array, memory: FallbackMemory) -> tuple[jax.Array, FallbackMemory]:
        limit, learned = threshold.update(norm, memory.threshold)
        instead, other_learned = other.update(norm, memory.other)
        limit = jnp.where(limit == jnp.inf, instead, limit)
        return limit, FallbackMemory(learned, other_learned)

    return Threshold(init, update)
