"""Mean plus so many deviations of the latest values, which may have any sign: losses, too."""

from __future__ import annotations

from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp

from optaxclip import _check
from optaxclip._numbers import as_like
from optaxclip._range import Count, Range

from .base import Threshold, zeros_for
from .window import Window, _there, mean_and_deviation, median_and_deviation, pushed
from .zscore import STARTS


class History(NamedTuple):
    """The latest values of every group."""

    # (length, *shape of the value) float32, latest first; 0 where none was yet
    values: Annotated[jax.Array, Range(front=1)]
    seen: Count  # as the value, int32, how many there are; at most the length


def outlier(
    k: float | jax.Array = 6.0,
    *,
    window: int = 128,
    min_history: int | jax.Array | None = None,
    start: str = "median",
    min_sigma: float | jax.Array = 0.01,
    ddof: int = 1,
) -> Threshold:
    """The mean of the latest values plus k of their standard deviations: tau = mu + k sigma.

    Unlike `sigma`, it takes values as they come, of any sign and 0 too, so that it is one for
    losses. It is meant for values that someone else has judged, as `skip_step` does.

    Args:
      k: >= 0.
      window: L >= 1, how many values are kept: float32, L per group; static.
      min_history: how many values there must be before there is a limit; until then it is inf.
        None: half the window, but at least 2.
      start: "median": the first `min_history` values are then cut to k deviations above their
        median, estimated from medians, so that a spike among them does not set the scale.
        "mean": they stay as they are.
      min_sigma: >= 0, the least deviation in units of |mu|, so that values which hardly vary are
        no outliers for varying a little. While there is no deviation at all, there is no limit.
      ddof: 0 or 1, deviations are divided by n - ddof; static.

    Returns:
      A threshold that remembers a window of values.

    Raises:
      TypeError, ValueError: if an argument is not such, or min_history > window.

    Example:
      >>> import jax.numpy as jnp, optaxclip
      >>> rule = optaxclip.threshold.outlier(6.0, window=4, min_history=2)
      >>> memory = rule.init(jnp.float32(0))
      >>> for loss in [-1.0, -1.2, -1.1, -1.0]:
      ...     limit, memory = rule.update(jnp.float32(loss), memory)
      ...     print(f"{limit:.4f}")
      inf
      inf
      -0.2515
      -0.5000

    Reference:
      OLMo-core's `SkipStepOptimizer` and MaxText's `skip_step_on_spikes` (Apache-2.0): k = 6,
      L = 128, min_history = max(2, L // 2) - 1, start="mean", min_sigma=0. Levanter's `skipstep`
      (Apache-2.0): min_history = max(2, L // 2), start="mean", ddof=0, and a least deviation of
      1e-6, which is absolute there.

    Deviation from these: without any deviation there is no limit, where OLMo-core and MaxText have
    the mean, and so skip what is above it by a rounding.
    """
    _check.number(k=k, min_sigma=min_sigma)
    _check.window(window=window)
    if min_history is None:
        min_history = min(max(2, window // 2), window)
    _check.history(window, min_history=min_history)
    _check.choice(STARTS, start=start)
    _check.choice((0, 1), ddof=ddof)

    def boundary(middle: jax.Array, deviation: jax.Array) -> jax.Array:
        spread = jnp.maximum(deviation, as_like(min_sigma, middle) * jnp.abs(middle))
        # Not only where spread > 0: one that is traced and bad must show.
        return jnp.where(spread == 0, jnp.inf, middle + as_like(k, middle) * spread)

    def update(value: jax.Array, memory: History) -> tuple[jax.Array, History]:
        least = as_like(min_history, memory.seen)
        started = memory.seen >= least
        past = Window(*memory)
        limit = jnp.where(started, boundary(*mean_and_deviation(past, ddof)), jnp.inf)
        learned = pushed(past, value)
        if start == "median":
            starts = (learned.seen >= least) & ~started
            most = jnp.where(starts, boundary(*median_and_deviation(learned)), jnp.inf)
            cut = jnp.minimum(learned.norms, most[None])
            learned = learned._replace(norms=jnp.where(_there(learned), cut, 0))
        return limit, History(*learned)

    def init(value: Any) -> History:
        return History(zeros_for(value, length=window), zeros_for(value, jnp.int32))

    return Threshold(init, update)
