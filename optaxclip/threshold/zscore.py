"""Mean plus so many deviations, both running averages."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optaxclip import _check
from optaxclip._numbers import as_like, leading
from optaxclip._range import Norm

from . import averages
from .base import Threshold, zeros_for
from .feed import FEEDS, fed
from .window import Window, empty, mean_and_deviation, median_and_deviation, pushed

MODES = ("reciprocal", "mean", "sigma")
STARTS = ("median", "mean")


class ZScoreMemory(NamedTuple):
    """Running mean and deviation, and the first norms that they start from."""

    first: Window  # the norms of the warm-up
    mean: Norm  # as the norm, float32, mu
    deviation: Norm  # as the norm, float32, sigma

    def laws(self) -> dict[str, jax.Array]:
        """What ties the fields together."""
        nothing = (self.mean == 0) & (self.deviation == 0)
        return {"mean and deviation are 0 where none was seen": (self.first.seen > 0) | nothing}


def zscore(
    z_max: float | jax.Array,
    *,
    decay: float | jax.Array = 0.97,
    warmup: int = 25,
    mode: str = "reciprocal",
    feed: str = "capped",
    start: str = "median",
    min_sigma: float | jax.Array = 0.05,
) -> Threshold:
    """Norms more than z* deviations above their mean are too large: z = (n - mu) / sigma > z*.

    mu <- a mu + (1 - a) n', sigma^2 <- a sigma^2 + (1 - a) (n' - mu)^2 with the new mu, where n'
    is what `feed` makes of n.

    Args:
      z_max: z* >= 0.
      decay: a, in [0, 1).
      warmup: how many norms mu and sigma start from; until then the limit is inf; static.
      mode: what a norm above mu + z* sigma is limited to. "reciprocal": mu + (z*^2 / z) sigma, so
        the more it is above, the less is left. "mean": mu. "sigma": mu + z* sigma.
      feed: "capped": n' = min(n, mu + z* sigma). "clipped": n' = min(n, limit), the paper; a rise
        by more than about a half that lasts is then clipped for ever. "raw": n' = n; a burst
        raises its own limit. "skip": a norm above is not learned; a lasting rise is never.
      start: "median": mu and sigma start from the median of the first norms and of the distances
        from it, so that a spike among them does not set the scale. "mean": the paper.
      min_sigma: >= 0, the least sigma in units of mu, so that norms which hardly vary are not
        clipped for varying a little. The paper: 0.

    Returns:
      A threshold that remembers mu, sigma and `warmup` norms.

    Raises:
      TypeError, ValueError: if an argument is not such.

    Example:
      >>> import jax.numpy as jnp, optaxclip
      >>> z = optaxclip.threshold.zscore(2.5, warmup=3, mode="sigma")
      >>> memory = z.init(jnp.float32(0))
      >>> for norm in [1.0, 0.9, 1.1, 1.0, 10.0]:
      ...     limit, memory = z.update(jnp.float32(norm), memory)
      ...     print(f"{limit:.4f}")
      inf
      inf
      inf
      1.3707
      1.3650

    Reference:
      Kumar et al., ZClip, arXiv:2504.02507, equations 3 to 7.
    """
    _check.number(z_max=z_max)
    _check.decay(decay=decay)
    _check.window(warmup=warmup)
    _check.choice(MODES, mode=mode)
    _check.choice(FEEDS, feed=feed)
    _check.choice(STARTS, start=start)
    _check.number(min_sigma=min_sigma)
    starting = median_and_deviation if start == "median" else mean_and_deviation

    def init(norm: Any) -> ZScoreMemory:
        return ZScoreMemory(empty(warmup, norm), zeros_for(norm), zeros_for(norm))

    def update(norm: jax.Array, memory: ZScoreMemory) -> tuple[jax.Array, ZScoreMemory]:
        first, mean, deviation = memory
        spread = as_like(z_max, norm) * jnp.maximum(deviation, as_like(min_sigma, norm) * mean)
        cap = mean + spread
        over = norm > cap
        limit = jnp.where(over, _lowered(mode, norm, mean, spread), cap)

        n = fed(feed, norm, limit=limit, cap=cap)
        next_mean = averages.mean(mean, n, decay)
        next_deviation = averages.root_mean_square(deviation, jnp.abs(n - next_mean), decay)
        if feed == "skip":
            next_mean = jnp.where(over, mean, next_mean)
            next_deviation = jnp.where(over, deviation, next_deviation)

        started = first.seen >= as_like(warmup, first.seen)
        grown = pushed(first, norm)
        first = jax.tree.map(
            lambda new, old: jnp.where(leading(started, new), old, new), grown, first
        )
        start_mean, start_deviation = starting(first)
        learned = ZScoreMemory(
            first,
            jnp.where(started, next_mean, start_mean),
            jnp.where(started, next_deviation, start_deviation),
        )
        return jnp.where(started, limit, jnp.inf), learned

    return Threshold(init, update)


def _lowered(mode: str, norm: jax.Array, mean: jax.Array, spread: jax.Array) -> jax.Array:
    """The limit of a norm above mean + spread."""
    if mode == "sigma":
        return mean + spread
    if mode == "mean":
        return mean
    distance = jnp.where(norm > mean, norm - mean, 1)
    return mean + spread * (spread / distance)
