"""A threshold that learns anew when what it limits is no burst but a new level."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optaxclip import _check
from optaxclip._numbers import as_like
from optaxclip._range import Count

from .base import Memory, Threshold, choose, zeros_for


class RelearningMemory(NamedTuple):
    """What the threshold remembers, and what it would if the present run were all it knew."""

    all: Memory  # of every norm
    run: Memory  # of the latest norms in a row that were above the limit
    length: Count  # as the norm, int32, how many those are


def relearning(threshold: Threshold, *, patience: float | jax.Array = 25) -> Threshold:
    """Forgets what came before a run of norms that were all above the limit.

    After `patience` norms in a row above the limit, the limit is the one that `threshold` learns
    from these norms alone. So no rise, of any size and by any feed, is clipped for ever, and no
    burst shorter than that is taken for one. Each group does so by itself. One norm below the
    limit ends a run: norms that are large nine times in ten are left to what `threshold` learns.

    Args:
      threshold: what learns.
      patience: a whole number >= 1, how long a burst may be. With fewer norms than `threshold`
        needs for a limit, the new level has none for a while.

    Returns:
      A threshold that remembers twice what `threshold` does, and a count.

    Raises:
      TypeError, ValueError: if an argument is not such.

    Example:
      >>> import jax.numpy as jnp, optaxclip
      >>> t = optaxclip.threshold
      >>> slow = t.relearning(t.growth(1.01), patience=3)
      >>> memory = slow.init(jnp.float32(0))
      >>> for norm in [1.0, 8.0, 8.0, 8.0, 8.0]:
      ...     limit, memory = slow.update(jnp.float32(norm), memory)
      ...     print(f"{limit:.4f}")
      inf
      1.0100
      1.0201
      1.0303
      8.0800
    """
    _check.instance(Threshold, "threshold.growth(1.01)", threshold=threshold)
    _check.steps(patience=patience)

    def init(norm: Any) -> RelearningMemory:
        nothing = zeros_for(norm, jnp.int32)
        return RelearningMemory(threshold.init(norm), threshold.init(norm), nothing)

    def update(norm: jax.Array, memory: RelearningMemory) -> tuple[jax.Array, RelearningMemory]:
        limit, everything = threshold.update(norm, memory.all)
        _, run = threshold.update(norm, memory.run)
        over = norm > limit
        length = jnp.where(over, memory.length + 1, 0)
        level = length >= as_like(patience, length)
        everything = choose(level, run, everything)
        run = choose(over & ~level, run, threshold.init(norm))
        return limit, RelearningMemory(everything, run, jnp.where(level, 0, length))

    return Threshold(init, update)
