"""Mean plus so many deviations, both of the latest norms."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from optaxclip import _check
from optaxclip._numbers import as_like

from .base import Threshold
from .window import Window, empty, mean_and_deviation, median_and_deviation, pushed
from .zscore import STARTS

FEEDS = ("clipped", "raw")


def sigma(
    k: float | jax.Array,
    *,
    window: int = 128,
    feed: str = "clipped",
    min_history: int | jax.Array = 25,
    start: str = "median",
    min_sigma: float | jax.Array = 0.05,
) -> Threshold:
    """The mean of the latest norms plus k of their standard deviations.

    Args:
      k: >= 0.
      window: L >= 1, how many norms are kept: float32, L per group; static.
      feed: "clipped": norms enter as they leave, at most the limit. "raw": as they come, so that
        in a burst of spikes the first ones lift the limit over the others.
      min_history: how many norms there must be before there is a limit; until then it is inf.
      start: "median": the first `min_history` norms are then cut to k deviations above their
        median, estimated from medians, so that a spike among them does not set the scale.
        "mean": they stay as they are.
      min_sigma: >= 0, the least deviation in units of the mean, so that norms which hardly vary
        are not clipped for varying a little.

    Returns:
      A threshold that remembers a window of norms.

    Raises:
      TypeError, ValueError: if an argument is not such, or min_history > window.

    Example:
      >>> import jax.numpy as jnp, optaxclip
      >>> t = optaxclip.threshold.sigma(3.0, window=4, min_history=2)
      >>> memory = t.init(jnp.float32(0))
      >>> for norm in [1.0, 1.2, 10.0, 1.0]:
      ...     limit, memory = t.update(jnp.float32(norm), memory)
      ...     print(f"{limit:.4f}")
      inf
      inf
      1.4000
      1.6899

    Reference:
      Levanter's `clip_update_by_historical_norm` is feed="raw" with min_history = window // 2,
      start="mean" and min_sigma=0.
    """
    _check.number(k=k, min_sigma=min_sigma)
    _check.window(window=window)
    _check.choice(FEEDS, feed=feed)
    _check.choice(STARTS, start=start)
    _check.history(window, min_history=min_history)

    def boundary(middle: jax.Array, deviation: jax.Array) -> jax.Array:
        least = as_like(min_sigma, middle) * middle
        return middle + as_like(k, middle) * jnp.maximum(deviation, least)

    def update(norm: jax.Array, memory: Window) -> tuple[jax.Array, Window]:
        least = as_like(min_history, memory.seen)
        started = memory.seen >= least
        limit = jnp.where(started, boundary(*mean_and_deviation(memory)), jnp.inf)
        learned = pushed(memory, jnp.minimum(norm, limit) if feed == "clipped" else norm)
        if start == "median":
            starts = (learned.seen >= least) & ~started
            most = jnp.where(starts, boundary(*median_and_deviation(learned)), jnp.inf)
            learned = learned._replace(norms=jnp.minimum(learned.norms, most[None]))
        return limit, learned

    return Threshold(lambda norm: empty(window, norm), update)
