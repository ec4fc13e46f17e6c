"""Clippers whose limit is given.

Their threshold is a number >= 0, a () array or an Optax schedule of the step; inf turns clipping
off and still measures.
"""

from __future__ import annotations

from typing import Any

import jax
import optax

from optaxclip import _check, measure
from optaxclip._clip import clip
from optaxclip.measure.arithmetic import EUCLIDEAN
from optaxclip.measure.base import AxisRule
from optaxclip.measure.shards import AxisName
from optaxclip.threshold import constant
from optaxclip.threshold.constant import Limit


def clip_by_value(
    max_value: Limit = 1.0, *, nonfinite: str = "zero", record: bool = True
) -> optax.GradientTransformation:
    """Bounds every coordinate: u_i = g_i min(1, c / |g_i|).

    It changes the direction of the step. Replaces `optax.clip`.

    Args:
      max_value: c >= 0, the largest absolute value (of a complex entry: the modulus).
      nonfinite: policy for entries that are inf or NaN.
      record: whether to keep metrics; here they cost one more read of the gradients.

    Returns:
      A transformation; shapes and dtypes of the updates are those of the gradients.

    Raises:
      TypeError, ValueError: if an argument is not such.

    Example:
      >>> import jax.numpy as jnp, optaxclip
      >>> tx = optaxclip.clip_by_value(1.0)
      >>> grads = jnp.array([0.5, -3.0])
      >>> tx.update(grads, tx.init(grads))[0]
      Array([ 0.5, -1. ], dtype=float32)

    Deviation from `optax.clip`: +-inf becomes 0, not +-c ("propagate" makes it NaN).
    """
    _check.limit(max_value=max_value)
    return clip(measure.element(), constant(max_value), nonfinite=nonfinite, record=record)


def clip_by_norm(
    max_norm: Limit = 1.0,
    *,
    ord: float = EUCLIDEAN,
    axis_name: AxisName = None,
    nonfinite: str = "zero",
    record: bool = True,
) -> optax.GradientTransformation:
    """Bounds the norm of every leaf by itself: u = g min(1, c / ||g||_p).

    Keras calls it `clipnorm`, TensorFlow `clip_by_norm`. One exploding layer does not shrink the
    others; the direction of the whole step changes.

    Args:
      max_norm: c >= 0, the largest norm of a leaf.
      ord: p, a real number >= 1 or inf; static.
      axis_name: mesh axes that leaves are split over, where JAX does not track it, see
        :mod:`optaxclip.measure`.
      nonfinite: policy for leaves whose norm is not finite.
      record: whether to keep metrics.

    Returns:
      A transformation; shapes and dtypes of the updates are those of the gradients.

    Raises:
      TypeError, ValueError: if an argument is not such.

    Example:
      >>> import jax.numpy as jnp, optaxclip
      >>> tx = optaxclip.clip_by_norm(1.0)
      >>> grads = {"w": jnp.array([3.0, 4.0]), "b": jnp.array([0.5])}
      >>> tx.update(grads, tx.init(grads))[0]
      {'b': Array([0.5], dtype=float32), 'w': Array([0.6, 0.8], dtype=float32)}
    """
    _check.limit(max_norm=max_norm)
    norms = measure.leaf_norm(ord, axis_name=axis_name)
    return clip(norms, constant(max_norm), nonfinite=nonfinite, record=record)


def clip_by_global_norm(
    max_norm: Limit = 1.0,
    *,
    ord: float = EUCLIDEAN,
    axis_name: AxisName = None,
    nonfinite: str = "zero",
    record: bool = True,
) -> optax.GradientTransformation:
    """Bounds the norm of the whole tree: U = G min(1, c / ||G||_p).

    The default choice: the step keeps its direction. Replaces `optax.clip_by_global_norm`.

    Args:
      max_norm: c >= 0, the largest norm of the tree.
      ord: p, a real number >= 1 or inf; static.
      axis_name: mesh axes that leaves are split over, where JAX does not track it, see
        :mod:`optaxclip.measure`.
      nonfinite: policy for a tree whose norm is not finite.
      record: whether to keep metrics.

    Returns:
      A transformation; shapes and dtypes of the updates are those of the gradients.

    Raises:
      TypeError, ValueError: if an argument is not such.

    Example:
      >>> import jax.numpy as jnp, optaxclip
      >>> tx = optaxclip.clip_by_global_norm(1.0)
      >>> grads = {"w": jnp.array([3.0, 0.0]), "b": jnp.array([4.0])}
      >>> tx.update(grads, tx.init(grads))[0]
      {'b': Array([0.8], dtype=float32), 'w': Array([0.6, 0. ], dtype=float32)}

    Reference:
      Pascanu, Mikolov, Bengio, On the difficulty of training recurrent neural networks,
      arXiv:1211.5063, algorithm 1.
    """
    _check.limit(max_norm=max_norm)
    norm = measure.global_norm(ord, axis_name=axis_name)
    return clip(norm, constant(max_norm), nonfinite=nonfinite, record=record)


def clip_by_block_rms(
    threshold: Limit = 1.0,
    *,
    axis_name: AxisName = None,
    nonfinite: str = "zero",
    record: bool = True,
) -> optax.GradientTransformation:
    """Bounds the root mean square of every leaf: u = g / max(1, RMS(g) / d).

    Adafactor's update clipping: meant for updates, after an optimizer's preconditioner. Replaces
    `optax.clip_by_block_rms`.

    Args:
      threshold: d >= 0, the largest root mean square of a leaf.
      axis_name: mesh axes that leaves are split over, where JAX does not track it, see
        :mod:`optaxclip.measure`.
      nonfinite: policy for leaves whose norm is not finite.
      record: whether to keep metrics.

    Returns:
      A transformation; shapes and dtypes of the updates are those of the gradients.

    Raises:
      TypeError, ValueError: if an argument is not such.

    Example:
      >>> import jax.numpy as jnp, optaxclip
      >>> tx = optaxclip.clip_by_block_rms(1.0)
      >>> grads = jnp.array([2.0, -2.0])
      >>> tx.update(grads, tx.init(grads))[0]
      Array([ 1., -1.], dtype=float32)

    Reference:
      Shazeer, Stern, Adafactor: adaptive learning rates with sublinear memory cost,
      arXiv:1804.04235, section 6.
    """
    _check.limit(threshold=threshold)
    norms = measure.leaf_rms(axis_name=axis_name)
    return clip(norms, constant(threshold), nonfinite=nonfinite, record=record)


def clip_by_average_norm(
    max_norm: Limit = 1.0,
    *,
    axis_name: AxisName = None,
    nonfinite: str = "zero",
    record: bool = True,
) -> optax.GradientTransformation:
    """Bounds the average norm of every leaf: u = g min(1, c / (||g||_2 / n)).

    TensorFlow's rule of that name; n is the number of entries of the leaf, and this is not the
    root mean square.

    Args:
      max_norm: c >= 0, the largest average norm of a leaf.
      axis_name: mesh axes that leaves are split over, where JAX does not track it, see
        :mod:`optaxclip.measure`.
      nonfinite: policy for leaves whose norm is not finite.
      record: whether to keep metrics.

    Returns:
      A transformation; shapes and dtypes of the updates are those of the gradients.

    Raises:
      TypeError, ValueError: if an argument is not such.

    Example:
      >>> import jax.numpy as jnp, optaxclip
      >>> tx = optaxclip.clip_by_average_norm(0.5)
      >>> grads = jnp.array([3.0, -4.0])
      >>> tx.update(grads, tx.init(grads))[0]
      Array([ 0.6, -0.8], dtype=float32)
    """
    _check.limit(max_norm=max_norm)
    norms = measure.leaf_mean(axis_name=axis_name)
    return clip(norms, constant(max_norm), nonfinite=nonfinite, record=record)


def adaptive_grad_clip(
    clipping: Limit = 0.01,
    *,
    eps: float | jax.Array = 1e-3,
    axis: AxisRule = None,
    per_tensor: bool = False,
    stacked: AxisRule = None,
    mask: Any = None,
    axis_name: AxisName = None,
    nonfinite: str = "zero",
    record: bool = True,
) -> optax.GradientTransformation:
    """Bounds every unit's gradient relative to its weights (AGC).

    G_i <- lambda max(||W_i||, eps) / ||G_i|| G_i   if ||G_i|| > lambda max(||W_i||, eps),

    a constant limit lambda on the relative norm ||G_i|| / max(||W_i||, eps), which is what the
    metrics show. Meant for networks without normalisation layers. Replaces
    `optax.adaptive_grad_clip`; `update` needs params.

    Args:
      clipping: lambda >= 0, the largest relative norm.
      eps: > 0, the norm as which smaller weights count.
      axis: the axes of a leaf that make one unit, see :func:`optaxclip.measure.unit_norm`. None:
        Optax's.
      per_tensor: whether a leaf is one unit. DreamerV3's form, with clipping=0.3.
      stacked: the axes of a leaf along which layers are stacked, see
        :func:`optaxclip.measure.stacked`; `axis` then counts the axes that remain.
      mask: which leaves are clipped, as a tree of bools or a function params -> tree. The paper
        leaves the last layer out. (`optax.inject_hyperparams` wants functions in static_args.)
      axis_name: mesh axes that units are split over, inside `pmap` and `shard_map`, see
        :func:`optaxclip.measure.unit_norm`.
      nonfinite: policy for units whose relative norm is not finite.
      record: whether to keep metrics.

    Returns:
      A transformation; shapes and dtypes of the updates are those of the gradients.

    Raises:
      TypeError, ValueError: if an argument is not such; ValueError at update without params.

    Example:
      >>> import jax.numpy as jnp, optaxclip
      >>> tx = optaxclip.adaptive_grad_clip(0.1)
      >>> weights = jnp.array([[3.0, 0.0], [4.0, 1.0]])
      >>> grads = jnp.array([[6.0, 0.0], [8.0, 0.05]])
      >>> tx.update(grads, tx.init(weights), weights)[0]
      Array([[0.3 , 0.  ],
             [0.4 , 0.05]], dtype=float32)

    Reference:
      Brock, De, Smith, Simonyan, High-performance large-scale image recognition without
      normalization, arXiv:2102.06171, equation 3. Per tensor: Hafner et al., Mastering diverse
      control tasks through world models, Nature 2025 (DreamerV3).

    Deviation from the paper: none; the authors' floor of 1e-6 under ||G_i|| is not needed here.
    """
    _check.limit(clipping=clipping)
    _check.axes(axis=axis, stacked=stacked)
    _check.choice((True, False), per_tensor=per_tensor)
    _check.mask(mask=mask)
    if per_tensor and axis is not None:
        message = f"axis must be None with per_tensor=True; got {axis!r}"
        raise ValueError(message)
    if per_tensor:
        units = measure.leaf_norm(axis_name=axis_name)
    else:
        units = measure.unit_norm(axis, axis_name=axis_name)
    if stacked is not None:
        units = measure.stacked(units, stacked)
    ratio = measure.relative(units, eps)
    tx = clip(ratio, constant(clipping), nonfinite=nonfinite, record=record)
    return tx if mask is None else optax.masked(tx, _check.masking(mask))
