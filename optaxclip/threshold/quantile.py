"""A quantile of the norms, followed with one number."""

from __future__ import annotations

from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp

from optaxclip import _check
from optaxclip._numbers import as_like
from optaxclip._range import Count, Range

from .base import Threshold, zeros_for


class QuantileMemory(NamedTuple):
    """The estimate, and whether there is one."""

    estimate: Annotated[jax.Array, Range(0)]  # as the norm, float32
    seen: Count  # as the norm, int32, norms learned; stays at `warmup`

    def laws(self) -> dict[str, jax.Array]:
        """What ties the fields together."""
        return {"estimate is 0 where seen is 0": (self.seen > 0) | (self.estimate == 0)}


def quantile(
    quantile: float | jax.Array,
    *,
    rate: float | jax.Array = 0.05,
    initial: float | jax.Array | None = None,
    warmup: int | jax.Array = 10,
    margin: float | jax.Array | None = None,
) -> Threshold:
    """The gamma-quantile of the norms: C_{t+1} = C_t exp(-eta (b_t - gamma)), b_t = [n_t <= C_t].

    A norm above the estimate raises it by the factor exp(eta gamma), one below lowers it by
    exp(-eta (1 - gamma)); it rests where a share gamma of the norms is below. How far above a
    norm is does not matter, so spikes are harmless.

    Args:
      quantile: gamma, a number from 0 to 1 or a () array.
      rate: eta > 0.
      initial: C_0 > 0. None: the smallest of the first `warmup` norms, because the estimate rises
        faster than it falls, and the first norm may be a spike.
      warmup: without `initial`, how many norms there must be before there is a limit.
      margin: the limit is C (1 + margin). None: one step down, exp(eta (1 - gamma)), so that the
        estimate's own steps around a constant norm do not clip it. The paper: 0.

    Returns:
      A threshold that remembers one number and a count.

    Raises:
      TypeError, ValueError: if an argument is not such.

    Example:
      >>> import jax.numpy as jnp, optaxclip
      >>> tracker = optaxclip.threshold.quantile(0.5, rate=0.2, initial=1.0, margin=0.0)
      >>> memory = tracker.init(jnp.float32(0))
      >>> for norm in [9.0, 9.0, 0.5]:
      ...     limit, memory = tracker.update(jnp.float32(norm), memory)
      ...     print(f"{limit:.4f}")
      1.0000
      1.1052
      1.2214

    Reference:
      Andrew, Thakkar, McMahan, Ramaswamy, Differentially private learning with adaptive clipping,
      arXiv:1905.03871, section 2. No claim of privacy is made here.
    """
    _check.within(0, 1, quantile=quantile)
    _check.positive(rate=rate)
    _check.steps(warmup=warmup)
    if initial is not None:
        _check.positive(initial=initial)
    if margin is not None:
        _check.number(margin=margin)

    def init(norm: Any) -> QuantileMemory:
        nothing = QuantileMemory(zeros_for(norm), zeros_for(norm, jnp.int32))
        if initial is None:
            return nothing
        estimate = nothing.estimate + as_like(initial, nothing.estimate)
        return QuantileMemory(estimate, nothing.seen + as_like(warmup, nothing.seen))

    def update(norm: jax.Array, memory: QuantileMemory) -> tuple[jax.Array, QuantileMemory]:
        gamma, eta = as_like(quantile, norm), as_like(rate, norm)
        estimate, count = memory
        below = (norm <= estimate).astype(norm.dtype)
        moved = estimate * jnp.exp(-eta * (below - gamma))
        smallest = jnp.where(count > 0, jnp.minimum(estimate, norm), norm)
        started = count >= as_like(warmup, count)
        # A few eps more than one step, which rounding would else make a clip by 1e-7.
        above = jnp.exp(eta * (1 - gamma)) + 1e-6 if margin is None else 1 + as_like(margin, norm)
        limit = jnp.where(started, estimate * above, jnp.inf)
        learned = jnp.where(started, moved, smallest)
        return limit, QuantileMemory(learned, jnp.minimum(count + 1, as_like(warmup, count)))

    return Threshold(init, update)
