"""A percentile of the latest norms."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from optaxclip import _check
from optaxclip._numbers import as_like

from .base import Threshold
from .window import Window, empty, pushed, quantile


def percentile(
    percentile: float | jax.Array,
    *,
    window: int = 1000,
    min_history: int | jax.Array = 25,
    with_current: bool = False,
) -> Threshold:
    """The p-th percentile of the latest norms: tau_t = percentile_p(n_{t-L}, ..., n_{t-1}).

    Norms enter as they are, so the limit follows a lasting change as soon as (100 - p) % of the
    window are new norms, and a spike moves it hardly.

    Args:
      percentile: p, a number from 0 to 100 or a () array; interpolated linearly.
      window: L >= 1, how many norms are kept: float32, L per group; static.
      min_history: how many norms there must be before there is a limit; until then it is inf.
        From 25 on, one spike among the first norms does not reach the 95th percentile.
      with_current: whether the norm that is to be limited already counts (AutoClip).

    Returns:
      A threshold that remembers a window of norms.

    Raises:
      TypeError, ValueError: if an argument is not such, or min_history > window.

    Example:
      >>> import jax.numpy as jnp, optaxclip
      >>> median = optaxclip.threshold.percentile(50.0, window=3, min_history=3)
      >>> memory = median.init(jnp.float32(0))
      >>> for norm in [1.0, 2.0, 9.0, 2.0]:
      ...     limit, memory = median.update(jnp.float32(norm), memory)
      ...     print(limit)
      inf
      inf
      inf
      2.0

    Reference:
      Seetharaman, Wichern, Pardo, Le Roux, AutoClip, arXiv:2007.14469. Past norms only, and none
      before the window is full: TRELLIS (Xiang et al., arXiv:2412.01506), its training code.
    """
    _check.within(0, 100, percentile=percentile)
    _check.window(window=window)
    _check.history(window, min_history=min_history)
    _check.choice((True, False), with_current=with_current)

    def update(norm: jax.Array, memory: Window) -> tuple[jax.Array, Window]:
        learned = pushed(memory, norm)
        known = learned if with_current else memory
        share: Any = as_like(percentile, norm) / 100
        started = known.seen >= as_like(min_history, known.seen)
        return jnp.where(started, quantile(known, share), jnp.inf), learned

    return Threshold(lambda norm: empty(window, norm), update)
