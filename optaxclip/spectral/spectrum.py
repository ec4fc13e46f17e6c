"""matrices, limits -> clipped matrices, norms: what a kind of clip does to singular values.

X = U diag(sigma) V^T becomes U diag(f(sigma)) V^T, with f(sigma) = min(sigma, c) or
sigma / sqrt(1 + sigma^2 / c^2), by whichever method. The derivative is the exact one, by SVD, for
every method: finite at 0, at equal singular values and at sigma = c, and no iteration is stored.

With Z = U^T dX V, its symmetric part S and its skew part K, the derivative is, in the basis of U
and V, Q * S + R * K, entry by entry: Q_ij = (f_i - f_j) / (sigma_i - sigma_j), as of a symmetric
matrix, and R_ij = (f_i + f_j) / (sigma_i + sigma_j), as dX = W X with skew W turns f(X) with X; and
what of dX lies outside V is as with a column of sigma = 0, so it is times f_i / sigma_i.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from . import newton_schulz
from .newton_schulz import product
from .power_iteration import estimate

# Of power iteration without a start, for metrics alone: each is two readings of the matrix.
READINGS = 8


@functools.partial(jax.custom_jvp, nondiff_argnums=(2, 3))
def clipped(x: jax.Array, c: jax.Array, kind: str, method: str) -> tuple[jax.Array, jax.Array]:
    """Matrices (..., m, n), m <= n, with singular values limited by c > 0, and the largest before.

    Limits and norms are of shape (..., 1, 1). By Newton-Schulz, the norm is an estimate from below.
    """
    if method == "svd":
        u, sigma, vt = jnp.linalg.svd(x, full_matrices=False)
        y = product(u * _limited(sigma, c, kind)[0][..., None, :], vt)
        norm = sigma[..., :1, None]
        # What is within has its bits: of "hard", all; of "soft", what it moves by no eps.
        within = norm <= c if kind == "hard" else jnp.square(norm / c) < jnp.finfo(x.dtype).eps
        return jnp.where(within, x, y), norm
    norm = estimate(x, jnp.zeros_like(x[..., 0]), READINGS).low
    if kind == "hard":
        y = newton_schulz.hard(x, c)
        changed = jnp.any(y != x, (-2, -1), keepdims=True)
        above = c * (1 + jnp.finfo(x.dtype).eps)
        # Not every estimate from below would say so.
        return y, jnp.where(changed, jnp.maximum(norm, above), jnp.minimum(norm, c))
    within = jnp.square(newton_schulz.frobenius(x) / c) < jnp.finfo(x.dtype).eps
    return jnp.where(within, x, newton_schulz.soft(x, c)), norm


@clipped.defjvp
def _clipped_jvp(kind: str, method: str, primals: Any, tangents: Any) -> Any:
    x, c = primals
    dx, dc = tangents
    u, sigma, vt = jnp.linalg.svd(x, full_matrices=False)
    value, by_limit = _limited(sigma, c, kind)
    slope, mean = _quotients(sigma, value, c, kind)
    left = product(u.mT, dx)
    z = product(left, vt.mT)
    inner = slope * (z + z.mT) / 2 + mean * (z - z.mT) / 2 + by_limit[..., None, :] * _eye(z) * dc
    outside = _ratio(value, sigma)[..., None] * (left - product(z, vt))
    dy = product(u, product(inner, vt) + outside)
    return clipped(x, c, kind, method), (dy, z[..., :1, :1])


def _limited(sigma: jax.Array, c: jax.Array, kind: str) -> tuple[jax.Array, jax.Array]:
    """Singular values (..., m) after the clip, and their derivatives by the limit."""
    c = c[..., 0]
    if kind == "hard":
        return jnp.minimum(sigma, c), (sigma > c).astype(sigma.dtype)
    cosine = c / jnp.hypot(sigma, c)
    return sigma * cosine, jnp.power(sigma / jnp.hypot(sigma, c), 3)


def _quotients(
    sigma: jax.Array, value: jax.Array, c: jax.Array, kind: str
) -> tuple[jax.Array, jax.Array]:
    """(f_i - f_j) / (sigma_i - sigma_j) and (f_i + f_j) / (sigma_i + sigma_j), without 0 / 0."""
    one, other = sigma[..., :, None], sigma[..., None, :]
    mean = _ratio(value[..., :, None] + value[..., None, :], one + other)
    if kind == "soft":
        # With cosines k = c / hypot(sigma, c), a - b cancels from numerator and denominator.
        k = c[..., 0] / jnp.hypot(sigma, c[..., 0])
        k, k_ = k[..., :, None], k[..., None, :]
        under = one * k + other * k_
        return _ratio((one + other) * jnp.square(k * k_), under), mean
    above, below = jnp.maximum(one, other), jnp.minimum(one, other)
    mixed = _ratio(c - below, above - below)
    return jnp.where(above <= c, 1, jnp.where(below >= c, 0, mixed)), mean


def _ratio(over: jax.Array, under: jax.Array) -> jax.Array:
    """The quotient, and where it would be 0 / 0 its limit, 1."""
    some = under > 0
    return jnp.where(some, over / jnp.where(some, under, 1), 1)


def _eye(z: jax.Array) -> jax.Array:
    return newton_schulz.identity(z)
