"""The measures proper: what is one group, and which norm it has."""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from optaxclip import _check
from optaxclip._numbers import widen

from . import bundles, rows
from .arithmetic import EUCLIDEAN, p_norm, power_sum, root
from .base import Axes, AxisRule, Measure, Tree, places, resolve
from .bundles import Bundle
from .shards import AxisName, count, split_over

# The orders whose sums may be of float64: powers of other ones are dear there.
WIDE = (1, 2)


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
        # The norm of a tree is the norm of its leaves' norms.
        leaves = bundles.sums(bundles.single(grads, axis_name), ord)
        return root(power_sum(leaves, ord).reshape(()), ord)

    class Euclidean:
        """The same for p = 2, for which leaves may be laid together first, see Measure."""

        def __call__(self, grads: Tree, params: Tree) -> jax.Array:
            del params
            return self.mapped(lambda leaf: leaf, grads)

        def mapped(self, fun: Callable[[jax.Array], jax.Array], grads: Tree) -> jax.Array:
            return root(rows.total(bundles.single(grads, axis_name), fun), EUCLIDEAN)

    spread = lambda factors, grads: factors
    found = Euclidean() if ord == EUCLIDEAN else norms
    return Measure(found, spread, sums=ord != math.inf, wide=ord in WIDE)


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

    def norms(grads: Tree, params: Tree) -> list[jax.Array]:
        del params
        found: dict[int, jax.Array] = {}
        whole: dict[int, Bundle] = {}
        for i, (path, g) in enumerate(places(grads)):
            axes = _unit_axes(axis, path, g)
            over = split_over(axis_name, path, g, group=len(axes) == g.ndim)
            part = Bundle([g], over)
            if len(axes) == g.ndim and rows.are_worth(part):
                whole[i] = part
            else:
                found[i] = p_norm(g, ord, axes, over)
        if whole:
            of_leaves = root(rows.sums_of_leaves([*whole.values()], ord), ord)
            for (i, part), norm in zip(whole.items(), jnp.unstack(of_leaves), strict=True):
                found[i] = norm.reshape((1,) * part.leaves[0].ndim)
        return [found[i] for i in sorted(found)]

    return Measure(norms, _like_leaves, sums=ord != math.inf, apart=True, wide=ord in WIDE)


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

    return Measure(norms, _like_leaves, sums=False, entries=True)


def _per_entry(power: float, axis_name: AxisName) -> Measure:
    """The Euclidean norm of each leaf over the number of its entries to some power."""
    leafwise = leaf_norm(axis_name=axis_name)

    def entries(path: str, g: jax.Array) -> int:
        return max(g.size, 1) * count(split_over(axis_name, path, g))

    def norms(grads: Tree, params: Tree) -> jax.Array:
        counts = [entries(path, g) ** power for path, g in places(grads)]
        sizes = leafwise.norms(grads, params)
        return sizes / jnp.asarray(counts, sizes.dtype)

    return Measure(norms, leafwise.spread, wide=True)


def _one_per_leaf(factors: jax.Array, grads: Tree) -> Tree:
    return jax.tree.structure(grads).unflatten(jnp.unstack(factors))


def _like_leaves(factors: list[jax.Array], grads: Tree) -> Tree:
    return jax.tree.structure(grads).unflatten(factors)


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
