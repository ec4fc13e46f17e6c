"""The latest norms, one window per group, and their statistics, which take any sign."""

from __future__ import annotations

from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp

from optaxclip._numbers import as_like, where_positive
from optaxclip._range import Count, Range

from .base import zeros_for

# The median of |x - median| of normal numbers is their standard deviation times 0.6745.
NORMAL = 1.4826


class Window(NamedTuple):
    """The latest norms of every group."""

    # (length, *shape of the norm) float32, latest first; 0 where none was yet
    norms: Annotated[jax.Array, Range(0, 2.0**64, front=1)]
    seen: Count  # as the norm, int32, how many there are; at most the length

    def laws(self) -> dict[str, jax.Array]:
        """What ties the fields together."""
        return {"norms are > 0 up to seen, and 0 beyond": _filled(self)}


def empty(length: int, norm: Any) -> Window:
    """A window without norms."""
    return Window(zeros_for(norm, length=length), zeros_for(norm, jnp.int32))


def pushed(window: Window, norm: jax.Array) -> Window:
    """The window with one more norm, and without its oldest one if it was full."""
    norms = jnp.concatenate([norm[None], window.norms[:-1]])
    return Window(norms, jnp.minimum(window.seen + 1, norms.shape[0]))


def mean_and_deviation(window: Window, ddof: int = 0) -> tuple[jax.Array, jax.Array]:
    """The mean and the standard deviation (divided by n - ddof) of each group; 0 without norms."""
    norms, count = window.norms, jnp.maximum(window.seen, 1).astype(window.norms.dtype)
    # Squares of norms leave the range of float32, those of shares of the largest do not.
    unit = jnp.max(jnp.abs(norms), axis=0)
    unit = jnp.where(unit >= jnp.finfo(norms.dtype).tiny, unit, 1)
    shares = norms / unit[None]
    mean = jnp.sum(shares, axis=0) / count
    apart = jnp.where(_there(window), shares - mean[None], 0)
    variance = jnp.sum(jnp.square(apart), axis=0) / jnp.maximum(count - ddof, 1)
    return unit * mean, unit * where_positive(jnp.sqrt, variance)


def median_and_deviation(window: Window) -> tuple[jax.Array, jax.Array]:
    """What mean and standard deviation estimate, from medians: a few spikes do not move them."""
    median = quantile(window, 0.5)
    apart = window._replace(norms=jnp.abs(window.norms - median[None]))
    return median, NORMAL * quantile(apart, 0.5)


def quantile(window: Window, q: Any) -> jax.Array:
    """The q-quantile of each group, interpolated linearly as NumPy's default; 0 without norms."""
    most = jnp.finfo(window.norms.dtype).max  # not inf: inf - inf is NaN where there are no norms
    norms = jnp.sort(jnp.where(_there(window), window.norms, most), axis=0)
    last = jnp.maximum(window.seen - 1, 0)
    place = as_like(q, norms) * last.astype(norms.dtype)
    below = jnp.floor(place)
    index = below.astype(jnp.int32)
    low, high = (_at(norms, i) for i in (index, jnp.minimum(index + 1, last)))
    between = low + (place - below) * (high - low)
    return jnp.where(window.seen > 0, between, 0)


def _filled(window: Window) -> jax.Array:
    """Whether the norms are those that `seen` counts, along any axis: `vmap` puts more in front."""
    there, seen, fits = window.norms > 0, window.seen, jnp.zeros((), bool)
    for axis, length in enumerate(there.shape):
        if there.shape[:axis] + there.shape[axis + 1 :] == seen.shape:
            places = jax.lax.broadcasted_iota(jnp.int32, there.shape, axis)
            within = (seen >= 0) & (seen <= length)
            fits |= jnp.all((places < jnp.expand_dims(seen, axis)) == there) & jnp.all(within)
    return fits


def _there(window: Window) -> jax.Array:
    return _places(window.norms) < window.seen[None]


def _at(norms: jax.Array, index: jax.Array) -> jax.Array:
    # Not a gather, which an Explicit mesh would want to be told the sharding of.
    return jnp.sum(jnp.where(_places(norms) == index[None], norms, 0), axis=0)


def _places(norms: jax.Array) -> jax.Array:
    places = jnp.arange(norms.shape[0], dtype=jnp.int32)
    return places.reshape(-1, *(1,) * (norms.ndim - 1))
