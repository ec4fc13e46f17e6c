"""A threshold between a floor and a ceiling."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optaxclip import _check

from .base import Memory, Threshold
from .constant import Limit, constant


class BoundedMemory(NamedTuple):
    """What the threshold remembers, and a `Clock` for each bound that is a schedule."""

    threshold: Memory
    min_norm: Memory
    max_norm: Memory


def bounded(
    threshold: Threshold, *, min_norm: Limit = 0.0, max_norm: Limit = float("inf")
) -> Threshold:
    """The limit of another threshold, at least `min_norm` and at most `max_norm`.

    The other one learns as if there were no bounds. While it has no limit yet, `max_norm` is it.

    Args:
      threshold: what is bounded.
      min_norm: a number >= 0, a () array or a schedule; 0 is none.
      max_norm: the same; inf is none. It wins over `min_norm`.

    Returns:
      A threshold that remembers what `threshold` does, and the step if a bound is a schedule.

    Raises:
      TypeError, ValueError: if an argument is not such, or min_norm > max_norm.

    Example:
      >>> import jax.numpy as jnp, optaxclip
      >>> t = optaxclip.threshold
      >>> capped = t.bounded(t.growth(2.0), max_norm=3.0)
      >>> memory = capped.init(jnp.float32(0))
      >>> for norm in [1.0, 9.0, 9.0]:
      ...     limit, memory = capped.update(jnp.float32(norm), memory)
      ...     print(limit)
      3.0
      2.0
      3.0
    """
    _check.instance(Threshold, "threshold.growth(1.01)", threshold=threshold)
    _check.limit(min_norm=min_norm, max_norm=max_norm)
    _check.order_of_bounds(min_norm=min_norm, max_norm=max_norm)
    floor, ceiling = constant(min_norm), constant(max_norm)

    def init(norm: Any) -> BoundedMemory:
        return BoundedMemory(threshold.init(norm), floor.init(norm), ceiling.init(norm))

    def update(norm: jax.Array, memory: BoundedMemory) -> tuple[jax.Array, BoundedMemory]:
        limit, inner = threshold.update(norm, memory.threshold)
        least, floor_memory = floor.update(norm, memory.min_norm)
        most, ceiling_memory = ceiling.update(norm, memory.max_norm)
        limit = jnp.minimum(jnp.maximum(limit, least), most)
        return limit, BoundedMemory(inner, floor_memory, ceiling_memory)

    return Threshold(init, update)
