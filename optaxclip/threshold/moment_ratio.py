"""The mean of the norms over their root mean square: how steady they are."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optaxclip import _check
from optaxclip._range import Count, Norm

from . import averages
from .base import Threshold, zeros_for


class MomentRatioMemory(NamedTuple):
    """Running first and second moment of the norms, and how many are in them."""

    mean: Norm  # as the norm, float32, m
    root: Norm  # as the norm, float32, sqrt(v)
    seen: Count  # as the norm, int32, t, norms learned

    def laws(self) -> dict[str, jax.Array]:
        """What ties the fields together."""
        nothing = (self.mean == 0) & (self.root == 0)
        return {"mean and root are 0 where seen is 0": (self.seen > 0) | nothing}


def moment_ratio(
    decay: float | jax.Array = 0.6,
    norm_decay: float | jax.Array = 0.999,
    *,
    bias_correction: bool = True,
) -> Threshold:
    """The ratio of two moments of the norms, this one included: rho_t = m_t / sqrt(v_t).

    m_t = gamma_1 m_{t-1} + (1 - gamma_1) n_t, v_t = gamma_2 v_{t-1} + (1 - gamma_2) n_t^2. It is 1
    for constant norms, whatever their size, and meant for `scale.normalize`.

    Args:
      decay: gamma_1, in [0, 1).
      norm_decay: gamma_2, in [0, 1).
      bias_correction: whether m and v are divided by 1 - gamma^t. Without, as in the paper, the
        first ratio is (1 - gamma_1) / sqrt(1 - gamma_2) = 12.6, and falls to 1 over
        1 / (1 - gamma_2) steps.

    Returns:
      A threshold that remembers three numbers.

    Raises:
      TypeError, ValueError: if an argument is not such.

    Example:
      >>> import jax.numpy as jnp, optaxclip
      >>> t = optaxclip.threshold.moment_ratio()
      >>> memory = t.init(jnp.float32(0))
      >>> for norm in [7.0, 7.0, 70.0]:
      ...     limit, memory = t.update(jnp.float32(norm), memory)
      ...     print(f"{limit:.3f}")
      1.000
      1.000
      0.959

    Reference:
      GradientStabilizer, arXiv:2502.17055v3, algorithm 1.
    """
    _check.decay(decay=decay, norm_decay=norm_decay)
    _check.choice((True, False), bias_correction=bias_correction)

    def init(norm: Any) -> MomentRatioMemory:
        return MomentRatioMemory(zeros_for(norm), zeros_for(norm), zeros_for(norm, jnp.int32))

    def update(norm: jax.Array, memory: MomentRatioMemory) -> tuple[jax.Array, MomentRatioMemory]:
        learned = MomentRatioMemory(
            averages.mean(memory.mean, norm, decay),
            averages.root_mean_square(memory.root, norm, norm_decay),
            optax.safe_increment(memory.seen),
        )
        positive = learned.root > 0
        ratio = learned.mean / jnp.where(positive, learned.root, 1)
        if bias_correction:
            weight = functools.partial(averages.weight, learned.seen, dtype=norm.dtype)
            ratio *= jnp.sqrt(weight(norm_decay)) / weight(decay)
        return jnp.where(positive, ratio, 1), learned

    return Threshold(init, update)
