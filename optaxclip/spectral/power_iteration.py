"""matrix, vector -> largest singular value, vector: a few products with vectors.

u <- X X^T u, normalised, turns towards the singular vector of the largest singular value, and the
vector of the last step is a good start where gradients resemble the last ones. A spike in a new
direction does not: it may be orthogonal to that vector, so that no iteration would ever find it.
Therefore there are two starts, the other one being the largest column of X, and the better wins.

The estimate rho = ||X^T u||^2 is never above sigma_max^2. The residual r = ||X X^T u - rho u|| says
how far it may be below: X X^T has an eigenvalue in [rho - r, rho + r]. If that is the largest, as
it is once u has turned, sigma_max <= sqrt(rho + r). Before, u mixes vectors of several singular
values, whose squares have mean rho and standard deviation r, and the largest is seldom above
rho + 2 r, which is what is taken. It is no proof; sigma_max <= ||X||_F is, and always holds.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from optaxclip._numbers import where_positive

from .newton_schulz import frobenius, product


class Estimate(NamedTuple):
    """What is known of the largest singular value; shapes (..., 1, 1), but (..., m) of vector."""

    low: jax.Array  # no larger than it, and of the derivative that it has
    high: jax.Array  # no smaller than it, if `low` is near it
    vector: jax.Array  # of length 1, where to begin next time; 0 for a zero matrix


def estimate(x: jax.Array, vector: jax.Array, iterations: int) -> Estimate:
    """The largest singular value of X (..., m, n), m <= n, begun from vector (..., m)."""
    fixed = jax.lax.stop_gradient(x)
    lengths = jnp.sum(jnp.square(fixed), -2)
    column = jnp.take_along_axis(fixed, jnp.argmax(lengths, -1)[..., None, None], -1)
    both = jnp.concatenate([jax.lax.stop_gradient(vector)[..., None].astype(x.dtype), column], -1)
    for _ in range(iterations):
        both = product(fixed, product(fixed.mT, _unit(both)))
    both = _unit(both)
    sizes = jnp.sum(jnp.square(product(fixed.mT, both)), -2, keepdims=True)
    # By a margin: where both have turned to one vector, rounding is not to choose between them.
    second = sizes[..., 1:] > 1.01 * sizes[..., :1]
    u = jnp.where(second, both[..., 1:], both[..., :1])

    along = jnp.sum(jnp.square(product(x.mT, u)), (-2, -1), keepdims=True)
    low = where_positive(jnp.sqrt, along)
    rho = jnp.square(low)
    turned = product(fixed, product(fixed.mT, u))
    residual = frobenius(turned - rho * u)
    high = jnp.minimum(jnp.sqrt(rho + 2 * residual), frobenius(fixed))
    # What the residual adds is no function of X that one could derive.
    high = low * jax.lax.stop_gradient(jnp.where(low > 0, high / jnp.where(low > 0, low, 1), 1))
    return Estimate(low, high, _unit(turned)[..., 0])


def _unit(columns: jax.Array) -> jax.Array:
    """Columns of length 1, and 0 where they are 0."""
    length = jnp.sqrt(jnp.sum(jnp.square(columns), -2, keepdims=True))
    return columns / jnp.where(length > 0, length, 1)
