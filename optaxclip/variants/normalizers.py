"""What gives gradients a norm, enlarging small ones too: no clips, though made of the same parts.

The factor in their metrics may exceed 1. In a chain they come first, before the optimizer.
"""

from __future__ import annotations

import jax
import optax

from optaxclip import _check, threshold
from optaxclip import measure as measures
from optaxclip._clip import clip
from optaxclip.measure import Measure
from optaxclip.measure.shards import AxisName
from optaxclip.scale import normalize
from optaxclip.threshold.constant import Limit


def normalize_by_global_norm(
    norm: Limit = 1.0,
    *,
    axis_name: AxisName = None,
    nonfinite: str = "zero",
    record: bool = True,
) -> optax.GradientTransformation:
    """Gives the whole tree one norm: U = c G / ||G||_2, small gradients enlarged too.

    A normaliser, no clip: the factor in the metrics may exceed 1.

    Args:
      norm: c >= 0, the norm of every update; inf leaves gradients as they are.
      axis_name: mesh axes that leaves are split over, where JAX does not track it, see
        :mod:`optaxclip.measure`.
      nonfinite: policy for a tree whose norm is not finite.
      record: whether to keep metrics.

    Returns:
      A transformation; shapes and dtypes of the updates are those of the gradients. Zero
      gradients stay zero.

    Raises:
      TypeError, ValueError: if an argument is not such.

    Example:
      >>> import jax.numpy as jnp, optaxclip
      >>> tx = optaxclip.normalize_by_global_norm()
      >>> grads = jnp.array([0.03, 0.04])
      >>> tx.update(grads, tx.init(grads))[0]
      Array([0.6, 0.8], dtype=float32)

    Deviation from `optax.normalize_by_update_norm`: no eps is added to the norm.
    """
    _check.limit(norm=norm)
    return clip(
        measures.global_norm(axis_name=axis_name),
        threshold.constant(norm),
        normalize,
        nonfinite=nonfinite,
        record=record,
    )


def stabilize_gradients(
    decay: float | jax.Array = 0.6,
    norm_decay: float | jax.Array = 0.999,
    *,
    bias_correction: bool = True,
    measure: Measure | None = None,
    nonfinite: str = "zero",
    record: bool = True,
) -> optax.GradientTransformation:
    """Gives every leaf the norm m / sqrt(v), of the moments of its norms: u = (g / n) m / sqrt(v).

    m <- gamma_1 m + (1 - gamma_1) n, v <- gamma_2 v + (1 - gamma_2) n^2. A normaliser: at a
    constant norm every update has norm 1, whatever that norm is, so the learning rate must be
    tuned anew. A spike leaves at most as large as 15.8 such updates, however large it was.

    Args:
      decay: gamma_1, in [0, 1).
      norm_decay: gamma_2, in [0, 1).
      bias_correction: whether m and v are corrected for having started from 0. The paper does
        not, and its first updates have norm 12.6, falling over some 1000 steps.
      measure: what a norm is of; None: each leaf.
      nonfinite: policy for groups whose norm is not finite.
      record: whether to keep metrics; `limit` is m / sqrt(v).

    Returns:
      A transformation; shapes and dtypes of the updates are those of the gradients. Zero
      gradients stay zero and are not learned.

    Raises:
      TypeError, ValueError: if an argument is not such.

    Example:
      >>> import jax.numpy as jnp, optaxclip
      >>> tx = optaxclip.stabilize_gradients()
      >>> state = tx.init(jnp.zeros(1))
      >>> for norm in [7.0, 7.0, 70.0]:
      ...     updates, state = tx.update(jnp.array([norm]), state)
      ...     print(updates.round(3))
      [1.]
      [1.]
      [0.959]

    Reference:
      GradientStabilizer, arXiv:2502.17055v3, algorithm 1. Stable-SPAM's AdaGN (v1) is decay=0.7,
      norm_decay=0.9 with bias correction.

    Deviation from the paper: the bias correction, and zero norms, which divide by zero there.
    """
    return clip(
        measures.leaf_norm() if measure is None else measure,
        threshold.moment_ratio(decay, norm_decay, bias_correction=bias_correction),
        normalize,
        nonfinite=nonfinite,
        record=record,
    )
