"""So many times another limit."""

from __future__ import annotations

import jax

from optaxclip import _check
from optaxclip._numbers import as_like

from .base import Memory, Threshold


def multiple(threshold: Threshold, *, ratio: float | jax.Array) -> Threshold:
    """So many times the limit of another threshold: lambda tau_t.

    Args:
      threshold: what is multiplied; while it has no limit, being inf, there is none.
      ratio: lambda > 0, a number or a () array.

    Returns:
      A threshold that remembers what `threshold` does.

    Raises:
      TypeError, ValueError: if an argument is not such.

    Example:
      >>> import jax.numpy as jnp, optaxclip
      >>> t = optaxclip.threshold
      >>> twice = t.multiple(t.percentile(50.0, window=3, min_history=1), ratio=2.0)
      >>> memory = twice.init(jnp.float32(0))
      >>> for norm in [1.0, 3.0, 9.0]:
      ...     limit, memory = twice.update(jnp.float32(norm), memory)
      ...     print(limit)
      inf
      2.0
      4.0
    """
    _check.instance(Threshold, "threshold.growth(1.01)", threshold=threshold)
    _check.positive(ratio=ratio)

    def update(norm: jax.Array, memory: Memory) -> tuple[jax.Array, Memory]:
        limit, memory = threshold.update(norm, memory)
        return as_like(ratio, limit) * limit, memory

    return Threshold(threshold.init, update)
