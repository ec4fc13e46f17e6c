"""A little more than the previous norm."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from optaxclip import _check
from optaxclip._numbers import as_like
from optaxclip._range import Norm

from .base import Threshold, zeros_for


class GrowthMemory(NamedTuple):
    """What the last norm became."""

    previous: Norm  # as the norm, float32, after clipping; 0 before the first


def growth(max_growth: float | jax.Array, *, floor: float | jax.Array = 0.0) -> Threshold:
    """A norm may grow by a factor per step: tau_t = gamma min(n_{t-1}, tau_{t-1}).

    A rise takes log(rise) / log(gamma) steps, whether it is a spike or lasts: 301 steps for x20 at
    1.01. So does the way back from a dip, which is what `floor` is for.

    Args:
      max_growth: gamma >= 1.
      floor: >= 0, what the limit is at least, once there is one.

    Returns:
      A threshold that remembers one number.

    Raises:
      TypeError, ValueError: if an argument is not such.

    Example:
      >>> import jax.numpy as jnp, optaxclip
      >>> t = optaxclip.threshold.growth(1.5)
      >>> memory = t.init(jnp.float32(0))
      >>> for norm in [1.0, 8.0, 8.0]:
      ...     limit, memory = t.update(jnp.float32(norm), memory)
      ...     print(limit)
      inf
      1.5
      2.25

    Reference:
      Chen et al., Fira, arXiv:2410.01623, section 4.3 (norm-growth limiter).
    """
    _check.number(at_least=1, max_growth=max_growth)
    _check.number(floor=floor)

    def update(norm: jax.Array, memory: GrowthMemory) -> tuple[jax.Array, GrowthMemory]:
        grown = jnp.maximum(as_like(max_growth, norm) * memory.previous, as_like(floor, norm))
        limit = jnp.where(memory.previous > 0, grown, jnp.inf)
        return limit, GrowthMemory(jnp.minimum(norm, limit))

    return Threshold(lambda norm: GrowthMemory(zeros_for(norm)), update)
