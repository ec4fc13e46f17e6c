"""What the clippers that set their own limit have in common: bounds, patience, and one engine."""

from __future__ import annotations

import functools
import math
from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optaxclip import _check
from optaxclip._clip import clip
from optaxclip.measure import Measure
from optaxclip.threshold import Threshold, bounded, relearning
from optaxclip.threshold.constant import Limit

Patience = float | jax.Array

# How long a burst may be, in steps, before it counts as a new level: as many as a limit needs.
PATIENCE = 25
# Sizes of memories. NumPy integers, because optax.inject_hyperparams turns Python numbers, defaults
# included, into traced arrays, and these shape the program.
WINDOW: Final[Any] = np.int64(1000)
SHORT_WINDOW: Final[Any] = np.int64(128)
WARMUP: Final[Any] = np.int64(25)
NEVER: Final[Any] = np.float32(np.inf)  # traced, this patience would cost the memory of one
SHORT_WARMUP: Final[Any] = np.int64(10)  # where a few will do, the smallest one being taken

# How often chance may make a run of norms above a quantile that long: once in so many steps.
RARE = 1e9


def adaptive(
    measure: Measure | None,
    default: Measure,
    threshold: Threshold,
    *,
    patience: Patience,
    warmup: int | jax.Array = 1,
    min_norm: Limit = 0.0,
    max_norm: Limit = math.inf,
    nonfinite: str,
    record: bool,
) -> optax.GradientTransformation:
    """A clip whose limit follows the norms, learns anew when it must, and stays within bounds.

    It is never so impatient that the new level would be left without a limit: `warmup` is how many
    norms the threshold needs for one.
    """
    _check.patience(patience=patience)
    if isinstance(patience, jax.Array) or patience != math.inf:
        known = not any(isinstance(x, jax.Array) for x in (patience, warmup))
        int32 = functools.partial(jnp.asarray, dtype=jnp.int32)
        longer = max(patience, warmup) if known else jnp.maximum(int32(patience), int32(warmup))
        threshold = relearning(threshold, patience=longer)
    threshold = bounded(threshold, min_norm=min_norm, max_norm=max_norm)
    measure = default if measure is None else measure
    return clip(measure, threshold, nonfinite=nonfinite, record=record)


def patience_with(share: Any) -> Patience:
    """PATIENCE, or more if chance alone makes runs that long, a share of the norms being below."""
    if isinstance(share, jax.Array):
        runs = -math.log(RARE) / jnp.log1p(-jnp.clip(share, 0, 1))
        # 1e9 for a share of 0, of which every norm is above: never, as good as.
        return jnp.maximum(PATIENCE, jnp.minimum(jnp.ceil(runs), RARE)).astype(jnp.int32)
    if share <= 0 or share >= 1:
        return math.inf if share <= 0 else PATIENCE
    return max(PATIENCE, min(math.ceil(-math.log(RARE) / math.log1p(-share)), int(RARE)))
