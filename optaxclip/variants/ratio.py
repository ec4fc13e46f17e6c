"""Clippers whose limit is a multiple of what the norm was: of its running average, or the last.

Norms that are 0, not finite or >= 1.8e19 are never learned. Every group of the measure has
numbers of its own, by default every leaf. To change a hyperparameter over time, use
`optax.inject_hyperparams`.
"""

from __future__ import annotations

import math

import jax
import optax

from optaxclip import threshold
from optaxclip.measure import Measure, leaf_norm
from optaxclip.threshold.constant import Limit

from .adaptive import NEVER, PATIENCE, SHORT_WARMUP, Patience, adaptive


def clip_by_ema_ratio(
    ratio: float | jax.Array = 2.0,
    *,
    decay: float | jax.Array = 0.95,
    warmup: int | jax.Array = SHORT_WARMUP,
    patience: Patience = PATIENCE,
    measure: Measure | None = None,
    min_norm: Limit = 0.0,
    max_norm: Limit = math.inf,
    nonfinite: str = "zero",
    record: bool = True,
) -> optax.GradientTransformation:
    """Bounds the norm of every leaf by a multiple of its running average: tau = lambda gamma.

    gamma <- beta gamma + (1 - beta) min(n, tau). For layers that explode by themselves. With the
    default, a norm is clipped that is twice what is usual, and ordinary ones never. In a chain it
    comes first.

    Args:
      ratio: lambda >= 0.
      decay: beta, in [0, 1).
      warmup: how many norms there must be; the average starts from the smallest of them.
      patience: after so many norms in a row above the limit, these are a new level and no burst:
        the limit is learned from them alone. math.inf: never.
      measure: what a norm is of; None: each leaf.
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
      >>> tx = optaxclip.clip_by_ema_ratio(warmup=2)
      >>> state = tx.init(jnp.zeros(1))
      >>> for norm in [1.0, 1.1, 8.0]:
      ...     updates, state = tx.update(jnp.array([norm]), state)
      ...     print(updates)
      [1.]
      [1.1]
      [2.]

    Reference:
      OLMo's `max_grad_norm_ratio` (Apache-2.0); beta is the larger one of Adam's there.

    Deviation from OLMo, which is warmup=1 and patience=math.inf from its second step on: a spike
    in the first step sets the scale there, and a zero freezes the leaf.
    """
    return adaptive(
        measure,
        leaf_norm(),
        threshold.ema_ratio(ratio, decay=decay, warmup=warmup),
        patience=patience,
        warmup=warmup,
        min_norm=min_norm,
        max_norm=max_norm,
        nonfinite=nonfinite,
        record=record,
    )


def clip_by_norm_growth(
    max_growth: float | jax.Array = 1.01,
    *,
    floor: float | jax.Array = 0.0,
    patience: Patience = NEVER,
    measure: Measure | None = None,
    max_norm: Limit = math.inf,
    nonfinite: str = "zero",
    record: bool = True,
) -> optax.GradientTransformation:
    """Lets the norm of every leaf grow by a factor per step: tau = gamma min(n_{t-1}, tau_{t-1}).

    Meant for updates whose norm is smooth, behind an optimizer's preconditioner and before the
    learning rate; on raw gradients it clips most steps, noise being growth.

    Args:
      max_growth: gamma >= 1.
      floor: >= 0, the least limit, once there is one. Without it, a norm that was small for a
        step is held back for log(rise) / log(gamma) steps.
      patience: after so many norms in a row above the limit, the limit is learned from them
        alone, which lets a rise through after so many steps. math.inf: never.
      measure: what a norm is of; None: each leaf.
      max_norm: the largest limit, from the first step on: a number, a () array or a schedule.
      nonfinite: policy for groups whose norm is not finite.
      record: whether to keep metrics.

    Returns:
      A transformation; shapes and dtypes of the updates are those of the gradients.

    Raises:
      TypeError, ValueError: if an argument is not such.

    Example:
      >>> import jax.numpy as jnp, optaxclip
      >>> tx = optaxclip.clip_by_norm_growth()
      >>> state = tx.init(jnp.zeros(1))
      >>> for norm in [1.0, 5.0, 5.0, 0.5]:
      ...     updates, state = tx.update(jnp.array([norm]), state)
      ...     print(updates)
      [1.]
      [1.01]
      [1.0201]
      [0.5]

    Reference:
      Chen et al., Fira, arXiv:2410.01623 (norm-growth limiter), and its Apache-2.0 code.

    Deviation from Fira: no 1e-8 is added to the last norm, and a zero norm is not learned, which
    there starts the leaf again from 1e-8. By its nature the rule holds back any rise: one by 20 for
    301 steps, one by 1000 for 694.
    """
    return adaptive(
        measure,
        leaf_norm(),
        threshold.growth(max_growth, floor=floor),
        patience=patience,
        max_norm=max_norm,
        nonfinite=nonfinite,
        record=record,
    )
