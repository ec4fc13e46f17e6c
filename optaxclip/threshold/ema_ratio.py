"""A multiple of the running average of the norms."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optaxclip import _check
from optaxclip._numbers import as_like
from optaxclip._range import Count, Norm

from . import averages
from .base import Threshold, zeros_for


class EmaRatioMemory(NamedTuple):
    """The running average, and how far the warm-up is."""

    average: Norm  # as the norm, float32, gamma
    seen: Count  # as the norm, int32, norms learned; stays at `warmup`

    def laws(self) -> dict[str, jax.Array]:
        """What ties the fields together."""
        return {"average is 0 where seen is 0": (self.seen > 0) | (self.average == 0)}


def ema_ratio(
    ratio: float | jax.Array,
    *,
    decay: float | jax.Array = 0.95,
    warmup: int | jax.Array = 10,
) -> Threshold:
    """So many times the running average of clipped norms: tau_t = lambda gamma_{t-1}.

    gamma_t = beta gamma_{t-1} + (1 - beta) min(n_t, tau_t). In the warm-up there is no limit, and
    gamma_t = min(gamma_{t-1}, n_t), so that a spike does not set the scale. A lasting rise is
    followed by the factor beta + (1 - beta) lambda per step: 1.05 with ratio 2 and decay 0.95, but
    1.001 with AdaGC's 1.05 and 0.98.

    Args:
      ratio: lambda >= 0; below 1 the average shrinks for ever.
      decay: beta, in [0, 1).
      warmup: how many norms the average starts from.

    Returns:
      A threshold that remembers one number and a count.

    Raises:
      TypeError, ValueError: if an argument is not such.

    Example:
      >>> import jax.numpy as jnp, optaxclip
      >>> t = optaxclip.threshold.ema_ratio(2.0, decay=0.9, warmup=1)
      >>> memory = t.init(jnp.float32(0))
      >>> for norm in [1.0, 5.0, 1.0]:
      ...     limit, memory = t.update(jnp.float32(norm), memory)
      ...     print(f"{limit:.2f}")
      inf
      2.00
      2.20

    Reference:
      Wang et al., AdaGC, arXiv:2502.11034, algorithm 1. OLMo's `max_grad_norm_ratio` is this rule
      with warmup=1, from its second step on (it does not keep the first norm).
    """
    _check.number(ratio=ratio)
    _check.decay(decay=decay)
    _check.steps(warmup=warmup)

    def init(norm: Any) -> EmaRatioMemory:
        return EmaRatioMemory(zeros_for(norm), zeros_for(norm, jnp.int32))

    def update(norm: jax.Array, memory: EmaRatioMemory) -> tuple[jax.Array, EmaRatioMemory]:
        average, count = memory
        limit = as_like(ratio, norm) * average
        followed = averages.mean(average, jnp.minimum(norm, limit), decay)
        smallest = jnp.where(count > 0, jnp.minimum(average, norm), norm)
        started = count >= as_like(warmup, count)
        learned = jnp.where(started, followed, smallest)
        memory = EmaRatioMemory(learned, jnp.minimum(count + 1, as_like(warmup, count)))
        return jnp.where(started, limit, jnp.inf), memory

    return Threshold(init, update)
