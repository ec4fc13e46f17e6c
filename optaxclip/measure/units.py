"""The measure of units: which axes of a leaf are summed over; one norm for each of the rest."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from optaxclip import _check, _device
from optaxclip._numbers import apart

from . import pieces, rows
from .arithmetic import EUCLIDEAN, WIDE, p_norm, root
from .base import (
    Axes,
    AxisRule,
    Fun,
    Measure,
    Packing,
    Tree,
    kept,
    like_leaves,
    packed_by,
    places,
    resolve,
)
from .bundles import Bundle
from .shards import AxisName, split_over


def unit_norm(
    axis: AxisRule = None, ord: float = EUCLIDEAN, *, axis_name: AxisName = None
) -> Measure:
    """One norm for each unit of a leaf: the weights into one output neuron or filter.

    Args:
      axis: the axes that are summed over. None: Optax's default, which is the whole leaf if it
        has at most one axis longer than 1, axis 0 at rank 2 and 3, and all axes but the last at
        rank 4 and 5. An int or a tuple: these axes, at every leaf of rank >= 2; a leaf of rank 0
        or 1 is one unit. A function (path, leaf) -> one of these, asked at rank >= 2, for trees
        in which kernels of one rank mean different things; path is as "encoder/kernel".
      ord: p, a real number >= 1 or inf; static.
      axis_name: the mesh axes that units are split over, see the module; () where every shard
        holds whole units. None only does where a leaf is one unit, or is not split.

    Returns:
      A measure whose norms are a list with one array per float leaf, of the leaf's rank, where
      the summed axes have size 1.

    Raises:
      TypeError, ValueError: if an argument is not one of these; at init, if a leaf lacks the
        axis, or has rank > 5 and `axis` is None.

    Example:
      Flax keeps an embedding as (vocabulary, features), a 1-D convolution as (width, in, out)
      and an attention output as (heads, head_dim, features):

      >>> import jax.numpy as jnp, optaxclip
      >>> def axis(path, leaf):
      ...     if path.endswith("embedding"):
      ...         return 1
      ...     if "Conv" in path or path.endswith("out/kernel"):
      ...         return tuple(range(leaf.ndim - 1))
      ...     return None
      >>> grads = {"Conv_0": {"kernel": jnp.ones((3, 3, 2))}, "embedding": jnp.ones((3, 4))}
      >>> optaxclip.measure.unit_norm(axis).norms(grads, None)
      [Array([[[3., 3.]]], dtype=float32), Array([[2.],
             [2.],
             [2.]], dtype=float32)]

    Reference:
      Brock et al., High-performance large-scale image recognition without normalization,
      arXiv:2102.06171, section 4 (there: unit i of W is a row; here, as in Optax and in the
      authors' code, kernels end in their output axis).
    """
    _check.axes(axis=axis)
    _check.order(ord=ord)
    _check.axis_name(axis_name=axis_name)

    def parts(grads: Tree) -> tuple[list[Bundle], list[Axes]]:
        axes = [_unit_axes(axis, path, g) for path, g in places(grads)]
        return [
            Bundle([g], split_over(axis_name, path, g, group=len(over) == g.ndim))
            for (path, g), over in zip(places(grads), axes, strict=True)
        ], axes

    def norms(grads: Tree, params: Tree) -> list[jax.Array]:
        del params
        found: dict[int, jax.Array] = {}
        whole: dict[int, Bundle] = {}
        for i, (part, axes) in enumerate(zip(*parts(grads), strict=True)):
            g = part.leaves[0]
            if len(axes) == g.ndim and rows.are_worth(part):
                whole[i] = part
            else:
                found[i] = p_norm(g, ord, axes, part.over)
        if whole:
            of_leaves = root(rows.sums_of_leaves([*whole.values()], ord), ord)
            for (i, part), norm in zip(whole.items(), jnp.unstack(of_leaves), strict=True):
                found[i] = norm.reshape((1,) * part.leaves[0].ndim)
        return [found[i] for i in sorted(found)]

    def packed(grads: Tree, params: Tree, fun: Fun, *own: jax.Array) -> jax.Array:
        del params
        return root(_room().power_sums(*parts(grads), ord, fun, own), ord)

    def unpacked(norms: jax.Array, grads: Tree) -> list[jax.Array]:
        ones, axes = parts(grads)
        order = _room().order(ones, axes)
        shapes = [kept(one.leaves[0], over) for one, over in zip(ones, axes, strict=True)]
        each = apart(norms, [math.prod(shapes[i]) for i in order])
        found = dict(zip(order, each, strict=True))
        return [found[i].reshape(shape) for i, shape in enumerate(shapes)]

    def spread(factors: jax.Array, grads: Tree) -> Tree:
        return like_leaves(unpacked(factors, grads), grads)

    suits_gpu = lambda grads: ord in WIDE and rows.suit(*parts(grads))
    packed_by(norms, Packing(packed, unpacked, spread, suits_gpu=suits_gpu))
    return Measure(norms, like_leaves, sums=ord != math.inf, apart=True, wide=ord in WIDE)


def _room() -> Any:
    """Where the leaves of one device are laid together."""
    return rows if _device.on_gpu() else pieces


def _unit_axes(rule: AxisRule, path: str, leaf: jax.Array) -> Axes:
    whole = tuple(range(leaf.ndim))
    if leaf.ndim <= 1:
        return whole
    axes = resolve(rule, path, leaf)
    if axes is not None:
        return axes
    if sum(n != 1 for n in leaf.shape) <= 1:
        return whole
    by_rank = {2: (0,), 3: (0,), 4: (0, 1, 2), 5: (0, 1, 2, 3)}
    if leaf.ndim not in by_rank:
        message = (
            f"axis=None knows ranks up to 5; leaf {path!r} has shape {leaf.shape}: "
            "give axis a function (path, leaf) -> axes"
        )
        raise ValueError(message)
    return by_rank[leaf.ndim]
