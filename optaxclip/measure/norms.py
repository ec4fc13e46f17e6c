"""The measures proper: the tree, a leaf or an entry is one group, and has a norm."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from optaxclip import _check
from optaxclip._numbers import has_float64, of_one_dtype, unstacked, widen

from . import bundles, pieces, rows
from .arithmetic import EUCLIDEAN, WIDE, is_fast_in_float64, power_sum, root
from .base import Axes, Fun, Measure, Packing, Tree, like_leaves, packed_by, places
from .bundles import Bundle
from .shards import AxisName, count, split_over


def global_norm(ord: float = EUCLIDEAN, *, axis_name: AxisName = None) -> Measure:
    """One norm for the whole tree: ||G||_p = (sum_i |g_i|^p)^(1/p).

    Args:
      ord: p, a real number >= 1 or inf; static.
      axis_name: the mesh axes that leaves are split over, see the module; None: those that JAX
        tracks.

    Returns:
      A measure whose norms are one () array.

    Raises:
      TypeError, ValueError: if an argument is not such.

    Example:
      >>> import jax.numpy as jnp, optaxclip
      >>> grads = {"w": jnp.array([3.0, 0.0]), "b": jnp.array([4.0])}
      >>> optaxclip.measure.global_norm().norms(grads, None)
      Array(5., dtype=float32)

    Reference:
      Pascanu, Mikolov, Bengio, On the difficulty of training recurrent neural networks,
      arXiv:1211.5063, algorithm 1.
    """
    _check.order(ord=ord)
    _check.axis_name(axis_name=axis_name)

    def norms(grads: Tree, params: Tree) -> jax.Array:
        del params
        parts = bundles.single(grads, axis_name)
        if ord == EUCLIDEAN:
            return root(rows.total(parts), ord)
        # The norm of a tree is the norm of its leaves' norms.
        return root(power_sum(bundles.sums(parts, ord), ord).reshape(()), ord)

    def packed(grads: Tree, params: Tree, fun: Fun, *own: jax.Array) -> jax.Array:
        del params
        parts = bundles.single(grads, axis_name)
        return root(pieces.total(parts, lambda leaf: fun(leaf, *own)), EUCLIDEAN)

    spread = lambda factors, grads: factors
    if ord == EUCLIDEAN:
        packed_by(norms, Packing(packed, lambda norms, grads: norms, spread, wide=True))
    return Measure(norms, spread, sums=ord != math.inf, wide=ord in WIDE)


def leaf_norm(ord: float = EUCLIDEAN, *, axis_name: AxisName = None) -> Measure:
    """One norm for each leaf.

    Args:
      ord: p, a real number >= 1 or inf; static.
      axis_name: the mesh axes that leaves are split over, see the module; None: those that JAX
        tracks.

    Returns:
      A measure whose norms are one vector with an entry per float leaf, so that a threshold on
      all of them is one kernel.

    Raises:
      TypeError, ValueError: if an argument is not such.

    Example:
      >>> import jax.numpy as jnp, optaxclip
      >>> grads = {"w": jnp.array([3.0, 4.0]), "b": jnp.array([4.0])}
      >>> optaxclip.measure.leaf_norm().norms(grads, None)
      Array([4., 5.], dtype=float32)
    """
    _check.order(ord=ord)
    _check.axis_name(axis_name=axis_name)

    def norms(grads: Tree, params: Tree) -> jax.Array:
        del params
        return root(rows.sums_of_leaves(bundles.single(grads, axis_name), ord), ord)

    packed_by(norms, _of_leaves(ord, axis_name))
    return Measure(norms, _one_per_leaf, sums=ord != math.inf, wide=ord in WIDE)


def leaf_rms(*, axis_name: AxisName = None) -> Measure:
    """One root mean square for each leaf: RMS(g) = ||g||_2 / sqrt(n).

    Args:
      axis_name: the mesh axes that leaves are split over, see the module; None: those that JAX
        tracks.

    Returns:
      A measure whose norms are one vector with an entry per float leaf; 0 for a zero-size leaf.

    Raises:
      TypeError: if `axis_name` is not such.

    Example:
      >>> import jax.numpy as jnp, optaxclip
      >>> optaxclip.measure.leaf_rms().norms(jnp.array([3.0, 4.0, 0.0, 0.0]), None)
      Array([2.5], dtype=float32)

    Reference:
      Shazeer, Stern, Adafactor, arXiv:1804.04235, section 6 (update clipping).
    """
    return _per_entry(0.5, axis_name)


def leaf_mean(*, axis_name: AxisName = None) -> Measure:
    """One average norm for each leaf: ||g||_2 / n, TensorFlow's `clip_by_average_norm`.

    Args:
      axis_name: the mesh axes that leaves are split over, see the module; None: those that JAX
        tracks.

    Returns:
      A measure whose norms are one vector with an entry per float leaf; 0 for a zero-size leaf.

    Raises:
      TypeError: if `axis_name` is not such.

    Example:
      >>> import jax.numpy as jnp, optaxclip
      >>> optaxclip.measure.leaf_mean().norms(jnp.array([3.0, 4.0, 0.0, 0.0]), None)
      Array([1.25], dtype=float32)
    """
    return _per_entry(1.0, axis_name)


def element() -> Measure:
    """One norm for each coordinate: |g_i|.

    Returns:
      A measure whose norms are a list with one array per float leaf, of the leaf's shape. XLA
      fuses them into the clip; metrics over them cost one more read of the gradients.

    Example:
      >>> import jax.numpy as jnp, optaxclip
      >>> optaxclip.measure.element().norms(jnp.array([3.0, -4.0]), None)
      [Array([3., 4.], dtype=float32)]
    """

    def norms(grads: Tree, params: Tree) -> list[jax.Array]:
        del params
        return [jnp.abs(widen(g)) for g in jax.tree.leaves(grads)]

    return Measure(norms, like_leaves, sums=False, entries=True)


def _per_entry(power: float, axis_name: AxisName) -> Measure:
    """The Euclidean norm of each leaf over the number of its entries to some power."""
    leafwise = leaf_norm(axis_name=axis_name)

    def entries(path: str, g: jax.Array) -> int:
        return max(g.size, 1) * count(split_over(axis_name, path, g))

    def counts(grads: Tree) -> np.ndarray:
        return np.array([entries(path, g) for path, g in places(grads)])

    def norms(grads: Tree, params: Tree) -> jax.Array:
        sizes = leafwise.norms(grads, params)
        return sizes / jnp.asarray(counts(grads) ** power, sizes.dtype)

    packed_by(norms, _of_leaves(EUCLIDEAN, axis_name, lambda grads: counts(grads) ** power))
    return Measure(norms, leafwise.spread, wide=True)


def _of_leaves(
    ord: float, axis_name: AxisName, counts: Callable[[Tree], np.ndarray] | None = None
) -> Packing:
    """The packing of one norm per leaf, over what is counted there."""
    groups = lambda grads: _groups(grads, ord, axis_name)

    def norms(grads: Tree, params: Tree, fun: Fun, *own: list[jax.Array]) -> list[jax.Array]:
        del params
        plan = groups(grads)
        each = zip(*own, strict=True) if own else [()] * len(plan)
        found: list[jax.Array] = []
        last = None
        for (_, parts, axes, small), mine in zip(plan, each, strict=True):
            sums = pieces.power_sums(parts, axes, ord, fun, mine, after=last, small=small)
            found.append(root(sums, ord))
            # Else all that are added up in float64 would be read before any is clipped.
            last = pieces.awaited(found[-1], parts)
        found = of_one_dtype(found)
        if counts is None:
            return found
        if not has_float64(grads):
            # Where this is beyond its range, a norm is not finite, whatever it is divided by.
            found = [sizes.astype(jnp.float32) for sizes in found]
        under = counts(grads)
        return [
            sizes / jnp.asarray(under[order], sizes.dtype)
            for sizes, (order, *_) in zip(found, plan, strict=True)
        ]

    def back(grads: Tree) -> np.ndarray:
        return np.argsort(np.concatenate([order for order, *_ in groups(grads)]))

    def unpacked(norms: list[jax.Array], grads: Tree) -> jax.Array:
        norm = jnp.concatenate(norms)
        return norm.at[back(grads)].get(unique_indices=True, mode="promise_in_bounds")

    def spread(factors: list[jax.Array], grads: Tree) -> Tree:
        found = [x for vector in factors for x in unstacked(vector)]
        return like_leaves([found[i] for i in back(grads)], grads)

    return Packing(norms, unpacked, spread, wide=ord in WIDE)


class _Group(NamedTuple):
    """Leaves that are measured together."""

    order: np.ndarray  # their places in the tree, as their norms are behind each other
    parts: list[Bundle]
    axes: list[Axes]
    small: int  # entries, at most, of those that lie beside others


def _groups(grads: Tree, ord: float, axis_name: AxisName) -> list[_Group]:
    parts = bundles.single(grads, axis_name)
    axes = [tuple(range(part.leaves[0].ndim)) for part in parts]
    wide = ord in WIDE and is_fast_in_float64(grads)
    small = pieces.longest(wide=wide)
    # After a second look, which is one branch, all would wait for all nevertheless.
    looks_once = ord == math.inf or wide
    found = []
    for group in pieces.in_turn(parts, small) if looks_once else [range(len(parts))]:
        some, over = [parts[i] for i in group], [axes[i] for i in group]
        order = np.array(group, int)[pieces.order(some, over, small)]
        found.append(_Group(order, some, over, small))
    return found


def _one_per_leaf(factors: jax.Array, grads: Tree) -> Tree:
    return jax.tree.structure(grads).unflatten(unstacked(factors))
