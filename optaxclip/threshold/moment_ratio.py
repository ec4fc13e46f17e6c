"""The mean of the norms over their root mean square: how steady they are."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optaxclip import _check

from . import averages
from .base import Threshold, zeros_for


class MomentRatioMemory(NamedTuple):
    """Running first and second moment of the norms, and how much of each is history."""

    mean: jax.Array  # as the norm, float32, m
    root: jax.Array  # as the norm, float32, sqrt(v)
    mean_weight: jax.Array  # as the norm, float32, 1 - gamma_1^t
    root_weight: jax.Array  # as the norm, float32, 1 - gamma_2^t


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
      A threshold that remembers four numbers.

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
        return MomentRatioMemory(*(zeros_for(norm) for _ in range(4)))

    def update(norm: jax.Array, memory: MomentRatioMemory) -> tuple[jax.Array, MomentRatioMemory]:
        learned = MomentRatioMemory(
            averages.mean(memory.mean, norm, decay),
            averages.root_mean_square(memory.root, norm, norm_decay),
            averages.weight(memory.mean_weight, decay),
            averages.weight(memory.root_weight, norm_decay),
        )
        positive = learned.root > 0
        ratio = learned.mean / jnp.where(positive, learned.root, 1)
        if bias_correction:
            ratio *= jnp.sqrt(learned.root_weight) / learned.mean_weight
        return jnp.where(positive, ratio, 1), learned

    return Threshold(init, update)
