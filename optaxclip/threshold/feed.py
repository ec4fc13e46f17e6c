"""What a statistic of norms learns from a norm above the limit."""

from __future__ import annotations

import jax
import jax.numpy as jnp

FEEDS = ("capped", "clipped", "raw", "skip")


def fed(feed: str, norm: jax.Array, *, limit: jax.Array, cap: jax.Array) -> jax.Array:
    """The norm as a statistic takes it in.

    "capped": at most `cap`, the boundary above which a norm is clipped, so a spike counts little,
    yet a lasting rise moves the boundary at every step. "clipped": at most `limit`, what it is
    clipped to, which may be far below that boundary, and then a lasting rise is never learned.
    "raw" and "skip": as it is (the latter only below the boundary, for the caller to see to).
    """
    if feed == "capped":
        return jnp.minimum(norm, cap)
    return jnp.minimum(norm, limit) if feed == "clipped" else norm
