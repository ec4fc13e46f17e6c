"""Clippers whose limit is a statistic of a window of past norms: percentiles, mean and deviation.

Norms that are 0, not finite or >= 1.8e19 are never learned. Every group of the measure has a
window of its own. In a chain they come first, before the optimizer. To change a hyperparameter
over time, use `optax.inject_hyperparams`.
"""

from __future__ import annotations

import math

import jax
import optax

from optaxclip import _check, threshold
from optaxclip.measure import Measure, global_norm
from optaxclip.threshold.constant import Limit

from .adaptive import (
    PATIENCE,
    SHORT_WINDOW,
    WARMUP,
    WINDOW,
    Patience,
    adaptive,
    patience_with,
)


def clip_by_percentile(
    percentile: float | jax.Array = 95.0,
    *,
    window: int = WINDOW,
    min_history: int | jax.Array | None = None,
    patience: Patience | None = None,
    measure: Measure | None = None,
    min_norm: Limit = 0.0,
    max_norm: Limit = math.inf,
    nonfinite: str = "zero",
    record: bool = True,
) -> optax.GradientTransformation:
    """Bounds the norm by a percentile of past norms: tau = percentile_p(n_{t-L}, ..., n_{t-1}).

    For runs whose norms vary by any amount: it clips the largest (100 - p) % of the steps and no
    others. A spike does not move it, and it needs no idea of how norms are distributed.

    Args:
      percentile: p, a number from 0 to 100 or a () array.
      window: L, how many norms are kept; static.
      min_history: how many norms there must be before there is a limit of them. None: 25, or
        the window if it is shorter.
      patience: after so many norms in a row above the limit, these are a new level and no burst:
        the limit is learned from them alone. None: 25,
        or more if p is so low that chance alone makes such runs. math.inf: never.
      measure: what a norm is of; None: the whole tree.
      min_norm: the least limit, once there is one: a number, a () array or a schedule.
      max_norm: the largest limit, from the first step on, when there is no other yet; the same.
      nonfinite: policy for groups whose norm is not finite.
      record: whether to keep metrics.

    Returns:
      A transformation; shapes and dtypes of the updates are those of the gradients.

    Raises:
      TypeError, ValueError: if an argument is not such.

    Example:
      >>> import jax.numpy as jnp, optaxclip
      >>> tx = optaxclip.clip_by_percentile(50.0, window=5, min_history=3)
      >>> state = tx.init(jnp.zeros(1))
      >>> for norm in [1.0, 2.0, 3.0, 8.0]:
      ...     updates, state = tx.update(jnp.array([norm]), state)
      ...     print(updates)
      [1.]
      [2.]
      [3.]
      [2.]

    Reference:
      TRELLIS (Xiang et al., arXiv:2412.01506), its training code: p = 95, L = 1000, the fixed
      limit as `max_norm`. After Seetharaman et al., AutoClip, arXiv:2007.14469.

    Deviation from TRELLIS, which is min_history=window and patience=math.inf: a limit from 25
    norms on, and the patience: a full window does not follow a lasting rise before (100 - p) % of
    it are new, 50 norms for p = 95 and 100 for p = 90.
    """
    min_history = _history(min_history, window)
    return adaptive(
        measure,
        global_norm(),
        threshold.percentile(percentile, window=window, min_history=min_history),
        patience=_patience(percentile, patience),
        warmup=min_history,
        min_norm=min_norm,
        max_norm=max_norm,
        nonfinite=nonfinite,
        record=record,
    )


def autoclip(
    percentile: float | jax.Array = 10.0,
    *,
    window: int = WINDOW,
    patience: Patience | None = None,
    measure: Measure | None = None,
    min_norm: Limit = 0.0,
    max_norm: Limit = math.inf,
    nonfinite: str = "zero",
    record: bool = True,
) -> optax.GradientTransformation:
    """Bounds the norm by a low percentile of all norms, this one included.

    tau = percentile_p(n_{t-L+1}, ..., n_t). With the recommended p = 10 it clips nine steps in ten,
    so it normalises by design: steps have nearly one length, that of small gradients.

    Args:
      percentile: p, a number from 0 to 100 or a () array.
      window: L, how many norms are kept; static.
      patience: after so many norms in a row above the limit, these are a new level and no burst:
        the limit is learned from them alone. None: as
        many as chance makes once in 1e9 steps, 197 for p = 10. math.inf: never.
      measure: what a norm is of; None: the whole tree.
      min_norm: the least limit, once there is one: a number, a () array or a schedule.
      max_norm: the largest limit, from the first step on, when there is no other yet; the same.
      nonfinite: policy for groups whose norm is not finite.
      record: whether to keep metrics.

    Returns:
      A transformation; shapes and dtypes of the updates are those of the gradients.

    Raises:
      TypeError, ValueError: if an argument is not such.

    Example:
      >>> import jax.numpy as jnp, optaxclip
      >>> tx = optaxclip.autoclip()
      >>> state = tx.init(jnp.zeros(1))
      >>> for norm in [1.0, 2.0, 0.5, 10.0]:
      ...     updates, state = tx.update(jnp.array([norm]), state)
      ...     print(updates)
      [1.]
      [1.1]
      [0.5]
      [0.65]

    Reference:
      Seetharaman, Wichern, Pardo, Le Roux, AutoClip, arXiv:2007.14469, algorithm 1.

    Deviation from the paper, which keeps all norms: the latest 1000, and the patience. Norms that
    are 0 or not finite are left out; in the authors' code one NaN stays for ever.
    """
    return adaptive(
        measure,
        global_norm(),
        threshold.percentile(percentile, window=window, min_history=1, with_current=True),
        patience=_patience(percentile, patience),
        min_norm=min_norm,
        max_norm=max_norm,
        nonfinite=nonfinite,
        record=record,
    )


def clip_by_sigma(
    k: float | jax.Array = 3.0,
    *,
    window: int = SHORT_WINDOW,
    feed: str = "clipped",
    min_history: int | jax.Array | None = None,
    patience: Patience = PATIENCE,
    measure: Measure | None = None,
    min_norm: Limit = 0.0,
    max_norm: Limit = math.inf,
    nonfinite: str = "zero",
    record: bool = True,
) -> optax.GradientTransformation:
    """Bounds the norm by mean and deviation of the latest norms: tau = mean + k sigma.

    For runs whose norms scatter around a level: it clips outliers only, about 0.5 % of the steps
    where a window percentile clips 5 %.

    Args:
      k: how many standard deviations above the mean, >= 0.
      window: L, how many norms are kept; static.
      feed: "clipped": norms enter the window as they leave. "raw": as they come; the first spike
        of a burst then lifts the limit over the others.
      min_history: how many norms there must be before there is a limit of them. None: 25, or
        the window if it is shorter.
      patience: after so many norms in a row above the limit, these are a new level and no burst:
        the limit is learned from them alone. math.inf: never.
      measure: what a norm is of; None: the whole tree.
      min_norm: the least limit, once there is one: a number, a () array or a schedule.
      max_norm: the largest limit, from the first step on, when there is no other yet; the same.
      nonfinite: policy for groups whose norm is not finite.
      record: whether to keep metrics.

    Returns:
      A transformation; shapes and dtypes of the updates are those of the gradients.

    Raises:
      TypeError, ValueError: if an argument is not such.

    Example:
      >>> import jax.numpy as jnp, optaxclip
      >>> tx = optaxclip.clip_by_sigma(2.0, min_history=3)
      >>> state = tx.init(jnp.zeros(1))
      >>> for norm in [1.0, 1.1, 0.9, 8.0]:
      ...     updates, state = tx.update(jnp.array([norm]), state)
      ...     print(updates.round(3))
      [1.]
      [1.1]
      [0.9]
      [1.163]

    Reference:
      Levanter's `clip_update_by_historical_norm` (Apache-2.0): k = 3, L = 128.

    Deviation from Levanter, which is threshold.sigma(3.0, feed="raw", min_history=64,
    start="mean", min_sigma=0.0) but for the 1e-6 that sigma is at least there; and the patience.
    """
    min_history = _history(min_history, window)
    return adaptive(
        measure,
        global_norm(),
        threshold.sigma(k, window=window, feed=feed, min_history=min_history),
        patience=patience,
        warmup=min_history,
        min_norm=min_norm,
        max_norm=max_norm,
        nonfinite=nonfinite,
        record=record,
    )


def _history(min_history: int | jax.Array | None, window: int) -> int | jax.Array:
    if min_history is not None:
        return min_history
    _check.window(window=window)
    return min(WARMUP, window)


def _patience(percentile: float | jax.Array, patience: Patience | None) -> Patience:
    if patience is not None:
        return patience
    _check.within(0, 100, percentile=percentile)
    return patience_with(percentile / 100)
