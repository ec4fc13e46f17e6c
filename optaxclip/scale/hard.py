"""norm, limit -> factor: hard scales, which leave a norm below the limit as it is.

`normalize` is the one exception. See :mod:`optaxclip.scale` for all of them.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from optaxclip._numbers import quotient as _quotient


def rescale(norm: jax.Array, limit: jax.Array) -> jax.Array:
    """Shrinks to the limit: min(1, limit / norm). The direction stays.

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
    return _divide(norm, limit, over=~(norm <= limit))


def skip(norm: jax.Array, limit: jax.Array) -> jax.Array:
    """Drops what is too large: 1 where norm <= limit, else 0.

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
    """Gives every group the norm `limit`, small ones too: limit / norm.

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
    return jnp.where(norm == 0, 1, divided(limit, norm))


class _Strict:
    """Shrinks to just below the limit, so that norm <= limit holds in exact arithmetic.

    A float32 norm is off by some 1e-7, so the result of `rescale` exceeds the limit about every
    other time, by as much. Here the factor is (1 - 3.0e-6) limit / norm, products are rounded
    towards zero to the leaf's dtype, and a norm that is less than 9.5e-7 below the limit counts
    as above it. Clipping twice then gives the bits of clipping once. All this holds while a
    measured norm is right to 16 x 2^-24 = 9.5e-7; the largest error seen is 13.5 x 2^-24, in a
    1-norm of equal entries.

    Args:
      norm: any shape, float.
      limit: as norm.

    Returns:
      As norm, in [0, 1].

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

    # In units of float32's rounding, 2^-24: a norm measured with an error of up to 16 is surely
    # within the limit if it is 16 below it, and is so again, measured anew, if aimed 50 below.
    guard = 16 * 2.0**-24
    aim = 50 * 2.0**-24

    def __call__(self, norm: jax.Array, limit: jax.Array) -> jax.Array:
        return _divide(norm, limit * (1 - self.aim), over=~(norm <= limit * (1 - self.guard)))

    def cast(self, x: jax.Array, dtype: jnp.dtype) -> jax.Array:
        """`x` in another dtype, rounded towards zero; the derivative is that of a plain cast."""
        return _towards_zero(x, dtype)


strict = _Strict()


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _towards_zero(x: jax.Array, dtype: jnp.dtype) -> jax.Array:
    # What the narrow dtype cannot hold is cut off in the bits of the wide one. Not found by a cast
    # there and back: on a GPU, XLA takes that for no cast at all.
    wide, narrow = jnp.finfo(x.dtype), jnp.finfo(dtype)
    integer = jnp.dtype(f"int{wide.bits}")
    bits = jax.lax.bitcast_convert_type(x, integer)
    mask = jnp.asarray(-1 << (wide.nmant - narrow.nmant), integer)
    cut = jax.lax.bitcast_convert_type(bits & mask, x.dtype)
    # Below its smallest normal number, it holds multiples of its smallest one.
    least = float(narrow.smallest_subnormal)
    if float(narrow.smallest_normal) > float(wide.smallest_normal):
        small = jnp.abs(x) < float(narrow.smallest_normal)
        cut = jnp.where(small, jnp.trunc(x / least) * least, cut)
    most = float(narrow.max)
    within = jnp.clip(cut, -most, most)
    return jnp.where(jnp.isfinite(x), within, x).astype(dtype)


@_towards_zero.defjvp
def _towards_zero_jvp(
    dtype: jnp.dtype, primals: tuple[jax.Array], tangents: tuple[jax.Array]
) -> tuple[jax.Array, jax.Array]:
    return _towards_zero(primals[0], dtype), tangents[0].astype(dtype)


def divided(limit: jax.Array, under: jax.Array) -> jax.Array:
    """The quotient; 1 for a limit of inf, and finite where it would overflow: inf x 0 is NaN."""
    most = jnp.finfo(limit.dtype).max / 2
    fits = limit < most * under
    found = _quotient(jnp.where(fits, limit, 1), jnp.where(fits, under, 1))
    return jnp.where(limit == jnp.inf, 1, jnp.where(fits, found, most))


def _divide(norm: jax.Array, limit: jax.Array, *, over: jax.Array) -> jax.Array:
    """Divides where `over`, else gives 1: never by 0, in the derivative either."""
    return _quotient(jnp.where(over, limit, 1), jnp.where(over, norm, 1))
