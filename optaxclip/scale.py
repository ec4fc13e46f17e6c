"""norm, limit -> factor: what a group is multiplied by.

===========  ===========================  =====================================================
scale        factor where norm > limit    use it when
===========  ===========================  =====================================================
`rescale`    limit / norm                 always, unless one of these is wanted
`strict`     a hair below limit / norm    the bound must hold exactly, as in proofs and in tests
`skip`       0                            a step that is too large should be no step
`normalize`  limit / norm, everywhere     every step should have one length (this is no clip)
===========  ===========================  =====================================================

A scale is a function of two arrays of one shape and dtype. Your own may return anything: the
engine reads a factor that is NaN or negative as 0, so none can flip the sign of an update.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def rescale(norm: jax.Array, limit: jax.Array) -> jax.Array:
    """min(1, limit / norm): the norm becomes the limit, the direction stays.

    Args:
      norm: any shape, float.
      limit: as norm.

    Returns:
      As norm, in [0, 1]; 1 where norm <= limit, so for 0 <= 0 too.

    Example:
      >>> import jax.numpy as jnp, optaxclip
      >>> optaxclip.scale.rescale(jnp.array([0.5, 4.0]), jnp.array([1.0, 1.0]))
      Array([1.  , 0.25], dtype=float32)

    Reference:
      Pascanu, Mikolov, Bengio, arXiv:1211.5063, algorithm 1.
    """
    return _quotient(norm, limit, over=~(norm <= limit))


def skip(norm: jax.Array, limit: jax.Array) -> jax.Array:
    """1 where norm <= limit, else 0: too large a group gets a zero update.

    A zero update still decays the moments of an optimizer after the clip.

    Args:
      norm: any shape, float.
      limit: as norm.

    Returns:
      As norm, 0 or 1.

    Example:
      >>> import jax.numpy as jnp, optaxclip
      >>> optaxclip.scale.skip(jnp.array([0.5, 4.0]), jnp.array([1.0, 1.0]))
      Array([1., 0.], dtype=float32)
    """
    return (norm <= limit).astype(norm.dtype)


def normalize(norm: jax.Array, limit: jax.Array) -> jax.Array:
    """limit / norm: every group gets the norm `limit`, small ones too.

    Args:
      norm: any shape, float.
      limit: as norm.

    Returns:
      As norm, in [0, inf): it may exceed 1. 1 where norm is 0 or limit is inf.

    Example:
      >>> import jax.numpy as jnp, optaxclip
      >>> optaxclip.scale.normalize(jnp.array([0.5, 4.0]), jnp.array([1.0, 1.0]))
      Array([2.  , 0.25], dtype=float32)
    """
    return _quotient(norm, limit, over=(norm != 0) & (limit != jnp.inf))


class _Strict:
    """min(1, limit / norm), made so small that the norm is <= limit in exact arithmetic.

    A float32 norm is off by some 2e-7, so the result of `rescale` exceeds the limit about every
    other time, by as much. Here the factor is (1 - 2^-20) limit / norm, products are rounded
    towards zero to the leaf's dtype, and norms within 3e-7 below the limit count as above it. Clipping
    twice then gives the same bits as clipping once. This holds while the measured norm is right
    to 5 x 2^-24; the largest error seen in sums of up to 1e8 entries is 2.6e-7.

    Args:
      norm: any shape, float.
      limit: as norm.

    Returns:
      As norm, in [0, 1).

    Example:
      >>> import jax.numpy as jnp, optaxclip
      >>> tx = optaxclip.clip(
      ...     optaxclip.measure.global_norm(),
      ...     optaxclip.threshold.constant(1.0),
      ...     optaxclip.scale.strict,
      ... )
      >>> grads = jnp.array([1.0, 2.0, 3.0])
      >>> once, state = tx.update(grads, tx.init(grads))
      >>> twice, state = tx.update(once, state)
      >>> bool((once == twice).all())
      True
    """

    # In units of float32's rounding, 2^-24: a norm measured with an error of up to 5 is surely
    # within the limit if it is 5 below it, and lands there again, remeasured, if aimed 16 below.
    guard = 5 * 2.0**-24
    aim = 16 * 2.0**-24

    def __call__(self, norm: jax.Array, limit: jax.Array) -> jax.Array:
        over = ~(norm <= limit * (1 - self.guard))
        quotient = _quotient(norm, limit, over=~(norm <= limit))
        return jnp.where(over, quotient * (1 - self.aim), 1)

    def cast(self, x: jax.Array, dtype: jnp.dtype) -> jax.Array:
        """`x` in another dtype, rounded towards zero; the derivative is that of a plain cast."""
        near = x.astype(dtype)
        inner = jax.lax.stop_gradient(near)
        over = jnp.abs(inner.astype(x.dtype)) > jnp.abs(jax.lax.stop_gradient(x))
        step = jnp.nextafter(inner, jnp.zeros_like(inner)) - inner
        return near + jnp.where(over, step, jnp.zeros_like(step))


strict = _Strict()


def _quotient(norm: jax.Array, limit: jax.Array, *, over: jax.Array) -> jax.Array:
    """limit / norm where `over`, else 1; what is not chosen is finite, in its derivative too."""
    return jnp.where(over, jnp.where(over, limit, 1) / jnp.where(over, norm, 1), 1)
