"""Clippers whose limit follows the norms with running averages, or one number that is moved.

Norms that are 0, not finite or >= 1.8e19 are never learned. Every group of the measure has
numbers of its own. In a chain they come first, before the optimizer. To change a hyperparameter
over time, use `optax.inject_hyperparams`.
"""

from __future__ import annotations

import math

import jax
import optax

from optaxclip import _check, threshold
from optaxclip.measure import Measure, element, global_norm
from optaxclip.threshold.constant import Limit

from .adaptive import (
    NEVER,
    PATIENCE,
    SHORT_WARMUP,
    WARMUP,
    Patience,
    adaptive,
    patience_with,
)


def clip_by_quantile(
    quantile: float | jax.Array = 0.9,
    *,
    rate: float | jax.Array = 0.05,
    patience: Patience | None = None,
    measure: Measure | None = None,
    min_norm: Limit = 0.0,
    max_norm: Limit = math.inf,
    nonfinite: str = "zero",
    record: bool = True,
) -> optax.GradientTransformation:
    """Bounds the norm by a running quantile of the norms: C <- C exp(-eta ([n <= C] - gamma)).

    What a percentile of a window does, with one number in place of 1000, so it is also for limits
    per unit or per coordinate. Until a new level is learned (`patience`), it moves by at most 5 %
    per step, whatever the norm is.

    Args:
      quantile: gamma, the share of norms below the limit, from 0 to 1.
      rate: eta > 0, how fast it moves.
      patience: after so many norms in a row above the limit, these are a new level and no burst:
        the limit is learned from them alone. None: 25,
        or more if gamma is so low that chance alone makes such runs. math.inf: never.
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
      >>> tx = optaxclip.clip_by_quantile()
      >>> state = tx.init(jnp.zeros(1))
      >>> for norm in 10 * [1.0] + [8.0, 8.0]:
      ...     updates, state = tx.update(jnp.array([norm]), state)
      >>> print(updates.round(4), optaxclip.metrics(state)["clipped_steps"])
      [1.0513] 2

    Reference:
      Andrew, Thakkar, McMahan, Ramaswamy, Differentially private learning with adaptive clipping,
      arXiv:1905.03871, section 2; gamma = 0.5 and eta = 0.2 there, from C = 0.1. No privacy here.

    Deviation from the paper, which is threshold.quantile(0.5, rate=0.2, initial=0.1, margin=0.0):
    it starts from the smallest of the first 10 norms, and the limit is half a per cent above the
    estimate, so that constant norms are not clipped; and the patience.
    """
    if patience is None:
        _check.within(0, 1, quantile=quantile)
        patience = patience_with(quantile)
    return adaptive(
        measure,
        global_norm(),
        threshold.quantile(quantile, rate=rate, warmup=SHORT_WARMUP),
        patience=patience,
        warmup=SHORT_WARMUP,
        min_norm=min_norm,
        max_norm=max_norm,
        nonfinite=nonfinite,
        record=record,
    )


def zclip(
    z_max: float | jax.Array = 2.5,
    *,
    decay: float | jax.Array = 0.97,
    warmup: int = WARMUP,
    mode: str = "reciprocal",
    feed: str = "capped",
    patience: Patience = PATIENCE,
    measure: Measure | None = None,
    min_norm: Limit = 0.0,
    max_norm: Limit = math.inf,
    nonfinite: str = "zero",
    record: bool = True,
) -> optax.GradientTransformation:
    """Bounds norms that are outliers by their z-score: z = (n - mu) / sigma > z*.

    Such a norm becomes mu + (z*^2 / z) sigma; mu and sigma are running averages. For language
    models with rare spikes: a spike leaves as an ordinary norm. It remembers 57 numbers per group,
    sorted at each step; for a limit per unit or entry, `clip_by_quantile` is made.

    Args:
      z_max: z* >= 0.
      decay: of the running averages, in [0, 1).
      warmup: how many norms they start from, without a limit of theirs until then; static.
      mode: "reciprocal"; "mean": an outlier becomes mu; "sigma": it becomes mu + z* sigma.
      feed: what mu and sigma learn of an outlier: "capped": mu + z* sigma; "clipped": what it
        becomes; "raw": itself; "skip": nothing.
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
      >>> tx = optaxclip.zclip(warmup=3)
      >>> state = tx.init(jnp.zeros(1))
      >>> for norm in [1.0, 0.9, 1.1, 10.0]:
      ...     updates, state = tx.update(jnp.array([norm]), state)
      ...     print(updates.round(4))
      [1.]
      [0.9]
      [1.1]
      [1.0153]

    Reference:
      Kumar et al., ZClip: adaptive spike mitigation for LLM pre-training, arXiv:2504.02507.

    Deviation from the paper, which is threshold.zscore(2.5, feed="clipped", start="mean",
    min_sigma=0.0): fed with what outliers become, it clips every step for ever after a rise by
    two or more that lasts; started from the mean, it lets one spike among the first norms set the
    scale; without a least sigma it clips norms that vary by a hair. And the patience.
    """
    return adaptive(
        measure,
        global_norm(),
        threshold.zscore(z_max, decay=decay, warmup=warmup, mode=mode, feed=feed),
        patience=patience,
        warmup=warmup,
        min_norm=min_norm,
        max_norm=max_norm,
        nonfinite=nonfinite,
        record=record,
    )


def clip_by_second_moment(
    k: float | jax.Array = 3.0,
    *,
    decay: float | jax.Array = 0.999,
    warmup: int | jax.Array = 20,
    floor: float | jax.Array = 0.0,
    feed: str = "capped",
    patience: Patience = NEVER,
    measure: Measure | None = None,
    max_norm: Limit = math.inf,
    nonfinite: str = "zero",
    record: bool = True,
) -> optax.GradientTransformation:
    """Bounds every coordinate by its own history: |g_i| <= k sqrt(v_i / (1 - beta^t)).

    For spikes in single coordinates, which a norm does not see. It changes the direction of the
    step. v is what Adam's second moment would be; here two float32 arrays like the parameters.

    Args:
      k: how many root mean squares of its past a coordinate may have, >= 0.
      decay: beta, in [0, 1).
      warmup: how many gradients other than 0 a coordinate must have had before it has a limit.
      floor: >= 0, the least limit, once there is one.
      feed: what v learns of a gradient above the limit: "capped": at most max(k, 10) root mean
        squares; "clipped": what it becomes, the papers; "raw": itself.
      patience: after so many gradients in a row above the limit, these are a new level: the limit
        is learned from them alone. It costs three more arrays like the parameters. math.inf:
        never.
      measure: what a norm is of; None: each coordinate.
      max_norm: the largest limit, from the first step on: a number, a () array or a schedule.
      nonfinite: policy for coordinates that are inf or NaN.
      record: whether to keep metrics; here they cost one more read of the gradients.

    Returns:
      A transformation; shapes and dtypes of the updates are those of the gradients.

    Raises:
      TypeError, ValueError: if an argument is not such.

    Example:
      >>> import jax.numpy as jnp, optaxclip
      >>> tx = optaxclip.clip_by_second_moment(warmup=2)
      >>> state = tx.init(jnp.zeros(2))
      >>> for grads in [[1.0, 0.0], [-1.0, 0.0], [50.0, 2.0]]:
      ...     updates, state = tx.update(jnp.array(grads), state)
      >>> print(updates.round(4))
      [3. 2.]

    Reference:
      AdamWClip (2026), k = 3 with a floor of 1e-10; SPAM (Huang et al., arXiv:2501.06842,
      section 4), k = sqrt(5000), there without 1 - beta^t.

    Deviation from both: zero gradients are not learned and a coordinate without history has no
    limit, so that rare rows of an embedding are never frozen; "capped" instead of "clipped". After
    a lasting rise by 20 it clips for 84 steps, after one by 1000 for 144.
    """
    return adaptive(
        measure,
        element(),
        threshold.second_moment(k, decay=decay, warmup=warmup, floor=floor, feed=feed),
        patience=patience,
        warmup=warmup,
        max_norm=max_norm,
        nonfinite=nonfinite,
        record=record,
    )
