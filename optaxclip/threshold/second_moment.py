"""So many root mean squares of the past."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optaxclip import _check
from optaxclip._numbers import as_like
from optaxclip._range import Count, Norm

from . import averages
from .base import Threshold, zeros_for

FEEDS = ("capped", "clipped", "raw")
CAP = 10  # deviations; see `feed`


class SecondMomentMemory(NamedTuple):
    """The root of the running mean square, and how many norms are in it."""

    root: Norm  # as the norm, float32, sqrt(v), which starts from 0 and is biased to it
    seen: Count  # as the norm, int32, t, norms learned

    def laws(self) -> dict[str, jax.Array]:
        """What ties the fields together."""
        return {"root is 0 where seen is 0": (self.seen > 0) | (self.root == 0)}


def second_moment(
    k: float | jax.Array,
    *,
    decay: float | jax.Array = 0.999,
    warmup: int | jax.Array = 20,
    floor: float | jax.Array = 0.0,
    feed: str = "capped",
) -> Threshold:
    """So many root mean squares: tau_t = max(k sqrt(v_{t-1} / (1 - beta^{t-1})), floor).

    v_t = beta v_{t-1} + (1 - beta) n'_t^2, where n' is what `feed` makes of n. With
    `measure.element()`, this is k deviations of each coordinate's own history, as Adam keeps it;
    t counts the gradients other than 0, and a coordinate without any has no limit.

    Args:
      k: >= 0.
      decay: beta, in [0, 1).
      warmup: how many norms there must be before there is a limit; until then it is inf.
      floor: >= 0, what the limit is at least.
      feed: "capped": n' = min(n, max(tau, 10 sqrt(v^))). At decay 0.999 and t >> 1000, no spike
        lifts sqrt(v) by more than 4.8 %, and every step of a rise beyond 10 of them does.
        "clipped": n' = min(n, tau), the papers; with k = 3, 0.4 % per step. "raw": n' = n.

    Returns:
      A threshold that remembers two numbers.

    Raises:
      TypeError, ValueError: if an argument is not such.

    Example:
      >>> import jax.numpy as jnp, optaxclip
      >>> t = optaxclip.threshold.second_moment(3.0, warmup=2)
      >>> memory = t.init(jnp.float32(0))
      >>> for norm in [1.0, 1.0, 50.0]:
      ...     limit, memory = t.update(jnp.float32(norm), memory)
      ...     print(f"{limit:.3f}")
      inf
      inf
      3.000

    Reference:
      AdamWClip (2026) has k = 3. SPAM (Huang et al., arXiv:2501.06842, section 4) has
      k = sqrt(5000) and does not divide by 1 - beta^t. Both feed clipped norms.
    """
    _check.number(k=k, floor=floor)
    _check.decay(decay=decay)
    _check.steps(warmup=warmup)
    _check.choice(FEEDS, feed=feed)

    def init(norm: Any) -> SecondMomentMemory:
        return SecondMomentMemory(zeros_for(norm), zeros_for(norm, jnp.int32))

    def update(norm: jax.Array, memory: SecondMomentMemory) -> tuple[jax.Array, SecondMomentMemory]:
        known = memory.seen > 0
        weight = averages.weight(memory.seen, decay, norm.dtype)
        deviation = memory.root * jax.lax.rsqrt(jnp.where(known, weight, 1))
        allowed = jnp.maximum(as_like(k, norm) * deviation, as_like(floor, norm))
        limit = jnp.where(memory.seen >= as_like(warmup, memory.seen), allowed, jnp.inf)
        n = norm
        if feed == "clipped":
            n = jnp.minimum(norm, limit)
        elif feed == "capped":
            cap = jnp.maximum(allowed, CAP * deviation)
            n = jnp.where(known, jnp.minimum(norm, cap), norm)
        learned = SecondMomentMemory(
            averages.root_mean_square(memory.root, n, decay),
            optax.safe_increment(memory.seen),
        )
        return limit, learned

    return Threshold(init, update)
