"""matrix, limit -> clipped matrix, by matrix products alone: what runs fast on accelerators.

One primitive does it, the polar factor msign(X) = U V^T of X = U diag(sigma) V^T. It is the limit
of X <- a (3 X - a^2 X X^T X) / 2. Where singular values lie in [l, 1], a = sqrt(3 / (1 + l + l^2))
makes the least of them as large as a cubic can without raising any above 1, so that nothing
overshoots, and singular values below l stay below their neighbours. How many steps it takes follows
from l, which is a number and no matrix.

    soft: sigma / sqrt(1 + sigma^2 / c^2) is c times the first block of msign([X, c I]),
          whose singular values are at least c: l is known.
    hard: O = msign(X) as far as sigma >= c / 2, P = (I + sign(X O^T - c I)) / 2 projects on what is
          above c, and X - P (X - c O) has min(sigma, c).

Where sigma < c / 2 did not converge in O, X O^T - c I is negative all the same, P is 0, and what
is small stays as it is. Where sigma is so near to c that the sign did not converge, P is between 0
and 1, and the result between sigma and c.

That a follows from x -> a x (3 - a^2 x^2) / 2 being equal at l and at 1, on both sides of its
maximum, which is 1.

Reference: J. Chen, E. Chow, A stable scaling of Newton-Schulz for improving the sign function
computation of a Hermitian matrix, ANL/MCS-P5059-0114 (the idea of the scaling); N. J. Higham,
Functions of Matrices, 2008, chapter 5 (the sign and its iteration).
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

# The largest ratio of a bound to the limit that one pass of the hard clip takes: it errs by a few
# eps times the bound, which is to be little beside the limit.
RATIO = 8
# How near to c, in eps, singular values may lie without being told from it; they are moved by a
# tenth of that.
NEAR = 2**10


def product(x: jax.Array, y: jax.Array) -> jax.Array:
    """A matrix product in full precision, of stacks too."""
    return jnp.matmul(x, y, precision=jax.lax.Precision.HIGHEST)


def gram(x: jax.Array) -> jax.Array:
    """X X^T, which is small as X has no more rows than columns."""
    return product(x, x.mT)


def identity(x: jax.Array) -> jax.Array:
    """I of as many rows as X, for each matrix in the stack."""
    one = jnp.eye(x.shape[-2], dtype=x.dtype)
    return one.reshape((1,) * (x.ndim - 2) + one.shape)


def frobenius(x: jax.Array) -> jax.Array:
    """The root of the sum of squares, which is no less than the largest singular value."""
    return jnp.sqrt(jnp.sum(jnp.square(x), (-2, -1), keepdims=True))


def bound(x: jax.Array) -> jax.Array:
    """What the largest singular value is no larger than: at most rank^(1/4) times it."""
    # Squares of what is far from 1 would leave the range. The margin is for rounding.
    size = jnp.maximum(frobenius(x), jnp.finfo(x.dtype).tiny)
    return 1.0001 * size * jnp.sqrt(frobenius(gram(x / size)))


def polar(x: jax.Array, least: jax.Array) -> jax.Array:
    """msign(X) of singular values in [0, 1], converged from `least` on, of shape (..., 1, 1)."""
    eps = float(jnp.finfo(x.dtype).eps)

    def step(carry: Any) -> Any:
        x, low = carry
        a = jnp.sqrt(3 / (1 + low + jnp.square(low)))
        near = lambda g: a * (1.5 * identity(x) - 0.5 * jnp.square(a) * g)
        # That of the least; larger than 1 by rounding alone.
        low_after = jnp.minimum(a * low * (1.5 - 0.5 * jnp.square(a * low)), 1)
        return product(near(gram(x)), x), low_after

    return jax.lax.while_loop(lambda carry: jnp.any(carry[1] < 1 - 4 * eps), step, (x, least))[0]


def soft(x: jax.Array, c: jax.Array) -> jax.Array:
    """Sigma -> sigma / sqrt(1 + sigma^2 / c^2); c > 0, of shape (..., 1, 1)."""
    top = jnp.hypot(bound(x), c)
    block = jnp.concatenate([x / top, (c / top) * identity(x)], axis=-1)
    return c * polar(block, c / top)[..., : x.shape[-1]]


def hard(x: jax.Array, c: jax.Array) -> jax.Array:
    """Sigma -> min(sigma, c); c > 0, of shape (..., 1, 1). What is within has its bits."""

    def once(carry: Any) -> Any:
        x, todo = carry
        top = bound(x)
        now = jnp.maximum(c, top / RATIO)
        x = jnp.where(todo, _hard_once(x, now, top), x)
        return x, todo & (now > c)

    return jax.lax.while_loop(lambda carry: jnp.any(carry[1]), once, (x, frobenius(x) > c))[0]


def _hard_once(x: jax.Array, c: jax.Array, top: jax.Array) -> jax.Array:
    eye, eps = identity(x), float(jnp.finfo(x.dtype).eps)
    o = polar(x / top, jnp.minimum(c / (2 * top), 1))
    shifted = product(x, o.mT) - c * eye
    shifted = (shifted + shifted.mT) / 2
    largest = jnp.maximum(c, top - c)
    sign = polar(shifted / largest, jnp.minimum(NEAR * eps * c / largest, 1))
    p = (eye + sign) / 2
    # P has 1/2 at sigma = c: a smaller trace says that none is above.
    some = jnp.sum(jnp.where(eye > 0, p, 0), (-2, -1), keepdims=True) >= 0.5
    return jnp.where(some, x - product(p, x - c * o), x)
