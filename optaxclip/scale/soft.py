"""norm, limit -> factor: soft scales, without a kink at the limit.

`softsign`, `rsqrt` and `tanh` are clips: their factors fall from 1 as the norm grows. `automatic`
and `psac` are normalizers: their factors may be above 1. With :func:`optaxclip.measure.element`,
each entry x becomes c softsign(x / c) and so on, the function that gives the scale its name.

The first three are computed from the smaller one of n / c and c / n, which is at most 1, so that
nothing overflows and no digits are lost, in the derivative either.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from optaxclip import _check
from optaxclip._numbers import quotient as _quotient

from .hard import divided

_Scale = Callable[[jax.Array, jax.Array], jax.Array]


def softsign(norm: jax.Array, limit: jax.Array) -> jax.Array:
    """Shrinks smoothly, and most gently: c / (c + n).

    The result n c / (c + n) is below the limit c, half of it at n = c, and comes near it slowly:
    0.91 c at n = 10 c. Its slope is 1 at n = 0.

    Args:
      norm: n, any shape, float.
      limit: c, as norm.

    Returns:
      As norm, in [0, 1]; 1 where norm is 0.

    Example:
      >>> import jax.numpy as jnp, optaxclip
      >>> optaxclip.scale.softsign(jnp.array([0.0, 1.0, 4.0]), jnp.ones(3))
      Array([1. , 0.5, 0.2], dtype=float32)

    Reference:
      Zhang, Jin, Fang, Wang, Improved analysis of clipping algorithms for non-convex optimization,
      arXiv:2010.02519, whose code has this factor where the paper has min(1, c / n).
    """
    q, above = _ratio(norm, limit)
    return jnp.where(above, q, 1) / (1 + q)


def rsqrt(norm: jax.Array, limit: jax.Array) -> jax.Array:
    """Shrinks smoothly, as the pseudo-Huber loss does: 1 / sqrt(1 + (n / c)^2).

    The result is below the limit c, 0.71 c at n = c and 0.995 c at n = 10 c. Its slope is 1 at
    n = 0, and the factor differs from 1 by half of (n / c)^2 there.

    Args:
      norm: n, any shape, float.
      limit: c, as norm.

    Returns:
      As norm, in [0, 1]; 1 where norm is 0.

    Example:
      >>> import jax.numpy as jnp, optaxclip
      >>> optaxclip.scale.rsqrt(jnp.array([0.0, 0.75, 2.4]), jnp.ones(3))
      Array([1.       , 0.8      , 0.3846154], dtype=float32)

    Reference:
      Charbonnier et al., Deterministic edge-preserving regularization in computed imaging, IEEE
      Transactions on Image Processing 6(2), 1997: the derivative of sqrt(1 + x^2).
    """
    q, above = _ratio(norm, limit)
    return jnp.where(above, q, 1) / jnp.sqrt(1 + q * q)


def tanh(norm: jax.Array, limit: jax.Array) -> jax.Array:
    """Shrinks smoothly, and reaches the limit soonest, as the hyperbolic tangent does.

    The factor is (c / n) tanh(n / c). The result c tanh(n / c) is at most the limit c, 0.76 c at
    n = c and 0.995 c at n = 3 c. Its slope is 1 at n = 0, and the factor differs from 1 by a third
    of (n / c)^2 there.

    Args:
      norm: n, any shape, float.
      limit: c, as norm.

    Returns:
      As norm, in [0, 1]; 1 where norm is 0.

    Example:
      >>> import jax.numpy as jnp, optaxclip
      >>> optaxclip.scale.tanh(jnp.array([0.0, 1.0, 4.0]), jnp.ones(3))
      Array([1.       , 0.7615942, 0.2498323], dtype=float32)
    """
    q, above = _ratio(norm, limit)
    # Lambert's continued fraction of tanh(q) / q, which has no 0 / 0, and no differences to lose
    # digits in: of that quotient, JAX's derivative is 23 % off at q = 0.001 in float32, of this
    # 1e-7. Begun with 17, it is right to 4.4e-16 for q <= 1; with 15, to 8e-15.
    fraction = jnp.full_like(q, 17)
    for odd in range(15, 0, -2):
        fraction = odd + q * q / fraction
    # tanh(32) is 1, in float64 too.
    return jnp.where(above, q * jnp.tanh(1 / jnp.maximum(q, 1 / 32)), 1 / fraction)


def automatic(gamma: float | jax.Array = 0.01) -> _Scale:
    """Gives nearly every group the norm `limit`: c / (n + gamma), AUTO-S.

    The result n c / (n + gamma) is below c. Its slope is c / gamma at n = 0, 100 c as it is by
    default: this is no clip. Where gamma may be 0, AUTO-V, use `normalize`.

    Args:
      gamma: > 0, a norm, below which a group counts as small; a number or a () array.

    Returns:
      A scale: norm, limit -> factor, in [0, inf); 1 where limit is inf.

    Raises:
      TypeError, ValueError: if `gamma` is not such.

    Example:
      >>> import jax.numpy as jnp, optaxclip
      >>> scale = optaxclip.scale.automatic(gamma=1.0)
      >>> scale(jnp.array([0.0, 1.0, 4.0]), jnp.ones(3))
      Array([1. , 0.5, 0.2], dtype=float32)

    Reference:
      Bu, Wang, Zha, Karypis, Automatic clipping: differentially private deep learning made easier
      and stronger, arXiv:2206.07136, with its R for c. Nothing here makes an update private.
    """
    _check.positive(gamma=gamma)

    def factor(norm: jax.Array, limit: jax.Array) -> jax.Array:
        limit, small = _allowed(limit, gamma)
        return divided(limit, norm + small)

    return factor


def psac(r: float | jax.Array = 0.1) -> _Scale:
    """Gives large groups the norm `limit` and leaves small ones small: c / (n + r / (n + r)).

    The result is below c. Its slope is c at n = 0, whatever r is, and the factor is largest,
    c / (2 sqrt(r) - r), at n = sqrt(r) - r, if r < 1: this is no clip.

    Args:
      r: > 0; a number or a () array. Norms far below r keep their proportions.

    Returns:
      A scale: norm, limit -> factor, in [0, inf); 1 where limit is inf.

    Raises:
      TypeError, ValueError: if `r` is not such.

    Example:
      >>> import jax.numpy as jnp, optaxclip
      >>> scale = optaxclip.scale.psac(r=0.1)
      >>> scale(jnp.array([0.0, 0.1, 0.4]), jnp.ones(3))
      Array([1.       , 1.6666667, 1.6666667], dtype=float32)

    Reference:
      Xia et al., Differentially private learning with per-sample adaptive clipping,
      arXiv:2212.00328, with its C for c. Nothing here makes an update private.
    """
    _check.positive(r=r)

    def factor(norm: jax.Array, limit: jax.Array) -> jax.Array:
        limit, small = _allowed(limit, r)
        return divided(limit, norm + _quotient(small, norm + small))

    return factor


def _ratio(norm: jax.Array, limit: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The smaller one of n / c and c / n, 0 for 0 / 0, and whether that is c / n."""
    above = norm > limit
    under = jnp.where(above, norm, jnp.where(limit > 0, limit, 1))
    return _quotient(jnp.where(above, limit, norm), under), above


def _allowed(limit: jax.Array, value: float | jax.Array) -> tuple[jax.Array, jax.Array]:
    """The limit, which is 0 under a traced parameter that is none, and the parameter."""
    value = jnp.asarray(value, limit.dtype)
    good = (value > 0) & (value < jnp.inf)
    return jnp.where(good, limit, 0), jnp.where(good, value, 1)
