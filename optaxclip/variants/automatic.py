"""The clipper for who does not want to choose one."""

from __future__ import annotations

import math

import optax

from optaxclip import threshold
from optaxclip.measure import global_norm
from optaxclip.threshold.constant import Limit

from .adaptive import SHORT_WINDOW, adaptive


def auto_clip(
    max_norm: Limit = 1.0, *, nonfinite: str = "zero", record: bool = True
) -> optax.GradientTransformation:
    """Bounds the global norm by what is usual, and by 1: tau = min(c, 1.5 median(n_{t-L} ...)).

    For who does not want to choose. From the first step on the limit is 1, the usual default of
    `clip_by_global_norm`; from the second step on it is also at most 1.5 times the median of the
    latest 128 norms, so that a run whose norms are 0.1 is not left alone with a spike of 0.9. It
    is a line of pieces: `bounded(multiple(percentile(50), ratio=1.5), max_norm=1)`.

    Args:
      max_norm: c, a number >= 0, a () array or a schedule. Where healthy norms are above 1, which
        the metrics show, this is a clip to 1 in every step: the default loss functions are means,
        and sums want more. math.inf: none, and then the first step is not limited.
      nonfinite: policy for steps whose norm is not finite.
      record: whether to keep metrics.

    Returns:
      A transformation; shapes and dtypes of the updates are those of the gradients.

    Raises:
      TypeError, ValueError: if an argument is not such.

    Example:
      >>> import jax.numpy as jnp, optaxclip
      >>> tx = optaxclip.auto_clip()
      >>> state = tx.init(jnp.zeros(1))
      >>> for norm in [8.0, 0.2, 0.1, 0.1, 8.0]:
      ...     updates, state = tx.update(jnp.array([norm]), state)
      ...     print(updates)
      [1.]
      [0.2]
      [0.1]
      [0.1]
      [0.225]
    """
    usual = threshold.percentile(50.0, window=SHORT_WINDOW, min_history=1)
    return adaptive(
        None,
        global_norm(),
        threshold.multiple(usual, ratio=1.5),
        patience=math.inf,  # a lasting rise is half of the window after 64 steps
        max_norm=max_norm,
        nonfinite=nonfinite,
        record=record,
    )
