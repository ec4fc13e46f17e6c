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
    """Bounds the global norm by 1, and by 1.5 times what is usual: tau = min(c, 1.5 median).

    For who does not want to choose. From the first step on the limit is 1, the usual default of
    `clip_by_global_norm`; from the second step on it is also at most 1.5 times the median of the
    latest 128 norms, so that a run whose norms are 0.1 is not left alone with a spike of 0.9. It
    is `bounded(multiple(percentile(50.0, window=128, min_history=1), ratio=1.5), max_norm=1.0)`, of
    :mod:`optaxclip.threshold`.

    What it ended at, and what the best fixed limit of a sweep did, with default settings of the
    programs in examples/:

    ===================================  ============  =============  ==========================
    program                              `auto_clip`   limit of 1     best fixed limit
    ===================================  ============  =============  ==========================
    char_lm, bits, lr 4, ten seeds       2.04          2.09           2.03 (0.2)
    char_lm, bits, lr 3, four seeds      2.02          2.01           2.00 (none)
    spiky_lm, bits                       3.110         3.110          3.109 (0.1, 0.3)
    spiky_lm, rise, losses x 0.03        +0.005        +0.159         -0.016 (0.01)
    norm_free_vision, errors, best lr    2.3 %         2.3 %          2.2 % (0.1)
    exploding_rnn, runs that diverge     36 %          36 %           0 % (0.01)
    cliff, starts that arrive, lr 0.3    93.1 %        96.7 %         96.7 % (1)
    cliff, starts that arrive, lr 10     99.2 %        84.2 %         100 % (0.1)
    ===================================  ============  =============  ==========================

    In both language models its loss is within 1 % of that with the best fixed limit. It knows norms
    and not the learning rate, and does not save what only a limit of 0.1 or 0.01 would:
    norm_free_vision from a rate of 1 on, exploding_rnn from 0.3 on. And where norms are above 1
    and harmless, its ceiling costs time: exploding_rnn at a rate of 0.003 ends at 0.0047, and at
    0.0023 without a clip. Tried and worse: no ceiling, or one that rises by 2 % per step
    (exploding_rnn: 48 to 55 % diverge), a higher percentile (char_lm, lr 4: 2.06 to 2.07), a limit
    that waits for 25 norms (2.075).

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
