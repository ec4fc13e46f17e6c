"""norms of examples -> the limit of the next step."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from optaxclip import _check
from optaxclip._numbers import TOO_LARGE, TOO_SMALL
from optaxclip.measure.base import places
from optaxclip.measure.shards import AxisName, split_over, total


def update_max_norm(
    max_norm: float | jax.Array,
    norms: Any,
    *,
    quantile: float | jax.Array = 0.5,
    rate: float | jax.Array = 0.2,
    axis_name: AxisName = None,
) -> jax.Array:
    """The limit of the next step, on its way to a quantile of the norms.

    b = mean_i 1[||g_i|| <= C],    C <- C exp(-eta (b - gamma))

    C is what the norms were clipped with: call it after the clip, and keep what it returns beside
    the optimizer state. Norms that are not finite, as those of padding, do not count; where none
    is finite, C stays. Inside `jax.shard_map`, norms count on all devices that they vary over.
    Where there are several per example, all are counted alike.

    Args:
      max_norm: C > 0. Whatever a traced one is, the next is from 2^-100 to 2^64.
      norms: `Examples.norms`, an array of any shape, float, or a tree of such.
      quantile: gamma, in [0, 1], the share of examples that is not clipped in the end.
      rate: eta > 0; C moves by a factor of up to exp(eta) in a step.
      axis_name: of the devices that have other examples, where JAX does not track it: in `pmap`,
        or `jax.shard_map` with check_vma=False; () for a limit of each device's own. A function
        (path, norm) -> names; None: those that JAX tracks.

    Returns:
      () float32.

    Raises:
      TypeError, ValueError: if an argument is not such; ValueError if None leaves it open.

    Example:
      >>> import jax.numpy as jnp
      >>> norms = jnp.array([0.5, 1.0, 2.0, 4.0])
      >>> print(f"{update_max_norm(0.1, norms):.4f} {update_max_norm(1.5, norms):.4f}")
      0.1105 1.5000

    Reference:
      Andrew, Thakkar, McMahan, Ramaswamy, Differentially private learning with adaptive clipping,
      arXiv:1905.03871, section 2.

    Deviation from the paper: the share b has no noise, so that nothing is private.
    """
    _check.positive(max_norm=max_norm, rate=rate)
    _check.within(0, 1, quantile=quantile)
    _check.axis_name(axis_name=axis_name)
    current, gamma, eta = (jnp.asarray(x, jnp.float32) for x in (max_norm, quantile, rate))
    number = number_below = jnp.float32(0)
    for path, norm in places(norms):
        counts = jnp.isfinite(norm)
        below = counts & (norm <= current.astype(jnp.result_type(norm)))
        over = split_over(axis_name, path, norm)
        number += total(jnp.sum(counts, dtype=jnp.float32), over)
        number_below += total(jnp.sum(below, dtype=jnp.float32), over)
    moved = current * jnp.exp(-eta * (number_below / jnp.maximum(number, 1) - gamma))
    moved = jnp.where((number > 0) & ~jnp.isnan(moved), moved, current)
    # Of which no factor is flushed to 0, nor any square beyond float32.
    return jnp.clip(jnp.where(moved > 0, moved, TOO_SMALL), TOO_SMALL, TOO_LARGE)
