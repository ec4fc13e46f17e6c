"""One threshold for the first steps, another one after them."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optaxclip import _check
from optaxclip._numbers import as_like

from .base import Clock, Memory, Threshold, started, ticked


class UntilMemory(NamedTuple):
    """What both thresholds remember, and which step it is."""

    clock: Clock
    first: Memory
    then: Memory


def until(steps: int | jax.Array, first: Threshold, then: Threshold) -> Threshold:
    """The limit of `first` for so many steps, and that of `then` from there on.

    Both learn from every step, so that `then` knows the norms when its turn comes.

    Args:
      steps: >= 1, how many updates `first` is for.
      first: the threshold of steps 0 to steps - 1.
      then: the threshold of the steps after.

    Returns:
      A threshold that remembers what both do, and a `Clock`.

    Raises:
      TypeError, ValueError: if an argument is not such.

    Example:
      >>> import jax.numpy as jnp, optaxclip
      >>> t = optaxclip.threshold
      >>> tight_first = t.until(2, t.constant(0.1), t.constant(1.0))
      >>> norm = jnp.float32(3.0)
      >>> memory = tight_first.init(norm)
      >>> for _ in range(3):
      ...     limit, memory = tight_first.update(norm, memory)
      ...     print(limit)
      0.1
      0.1
      1.0
    """
    _check.steps(steps=steps)
    _check.instance(Threshold, "threshold.constant(1.0)", first=first, then=then)

    def init(norm: Any) -> UntilMemory:
        return UntilMemory(started(), first.init(norm), then.init(norm))

    def update(norm: jax.Array, memory: UntilMemory) -> tuple[jax.Array, UntilMemory]:
        early, first_memory = first.update(norm, memory.first)
        late, then_memory = then.update(norm, memory.then)
        limit = jnp.where(memory.clock.step < as_like(steps, memory.clock.step), early, late)
        return limit, UntilMemory(ticked(memory.clock), first_memory, then_memory)

    return Threshold(init, update)
