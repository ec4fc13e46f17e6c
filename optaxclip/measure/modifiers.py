"""Measures made of measures: under labels, relative to the parameters, layer by layer."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from optaxclip import _check
from optaxclip._numbers import as_like, quotient, widen

from .base import (
    Axes,
    AxisRule,
    Fun,
    Measure,
    Tree,
    merge,
    packed_by,
    packing_of,
    places,
    resolve,
    split,
)
from .looks import in_range, packed_in_range
from .shards import STACK, behind_a_barrier


def by_label(labels: Tree, measure: Measure) -> Measure:
    """Measures the leaves under each label by themselves.

    Unlike clippers in `optax.partition`, this is one clip with one record, and says in its name
    that the norm is taken per label.

    Args:
      labels: a tree of strings that is a prefix of the gradients, or a function path -> string,
        with paths as "encoder/kernel".
      measure: what is measured under each label.

    Returns:
      A measure whose norms are a dict from label to the norms under it.

    Raises:
      TypeError: if `measure` is no Measure or a label is no string.
      ValueError: at init, if the labels are no prefix of the tree.

    Example:
      >>> import jax.numpy as jnp, optaxclip
      >>> m = optaxclip.measure
      >>> grads = {"encoder": jnp.array([3.0, 4.0]), "head": jnp.array([2.0])}
      >>> m.by_label(lambda path: path, m.global_norm()).norms(grads, None)
      {'encoder': Array(5., dtype=float32), 'head': Array(2., dtype=float32)}
    """
    _check.labels(labels=labels)
    _check.instance(Measure, "measure.global_norm()", measure=measure)

    def keys(grads: Tree) -> list[str]:
        if callable(labels):
            found = [labels(path) for path, _ in places(grads)]
        else:
            _check.prefix(grads, labels=labels)
            found = jax.tree.leaves(jax.tree.broadcast(labels, grads))
        for label in found:
            _check.instance(str, "'encoder'", label=label)
        return found

    def norms(grads: Tree, params: Tree) -> dict[str, Tree]:
        parts = split(grads, keys(grads))
        return {label: measure.norms(part, params) for label, part in parts.items()}

    def spread(factors: dict[str, Tree], grads: Tree) -> Tree:
        parts = split(grads, keys(grads))
        spreads = {label: measure.spread(factors[label], part) for label, part in parts.items()}
        return merge(spreads, grads, keys(grads))

    return Measure(norms, spread, measure.sums, wide=measure.wide)


def relative(measure: Measure, eps: float | jax.Array) -> Measure:
    """Measures gradients in units of the parameters: ||G|| / max(||W||, eps).

    Args:
      measure: how both are measured.
      eps: > 0, the norm below which parameters count as this large, so that those that start at
        zero can move.

    Returns:
      A measure with the norms of `measure`, divided; NaN where the parameters are not finite.

    Raises:
      TypeError, ValueError: if an argument is not such; at update, ValueError if it was called
        without params.

    Example:
      >>> import jax.numpy as jnp, optaxclip
      >>> ratio = optaxclip.measure.relative(optaxclip.measure.leaf_norm(), eps=1e-3)
      >>> ratio.norms(jnp.array([6.0, 8.0]), jnp.array([3.0, 4.0]))
      Array([2.], dtype=float32)

    Reference:
      Brock et al., arXiv:2102.06171, equation 3.
    """
    _check.instance(Measure, "measure.unit_norm()", measure=measure)
    _check.positive(eps=eps)

    # Each is brought into range by itself: their ratio says nothing of how large they are.
    def norms(grads: Tree, params: Tree) -> Tree:
        weights = in_range(measure, _weights(grads, params), None)
        return jax.tree.map(ratio, in_range(measure, grads, None), weights)

    def ratio(norm: jax.Array, weight: jax.Array) -> jax.Array:
        weight = jnp.maximum(weight.astype(norm.dtype), jnp.asarray(eps, norm.dtype))
        # Relative to weights that are lost, no gradient is small.
        return quotient(norm, jnp.where(jnp.isfinite(weight), weight, jnp.nan))

    def packed(grads: Tree, params: Tree, fun: Fun) -> Tree:
        del fun
        weights = packed_in_range(measure, _weights(grads, params), None).norms
        return jax.tree.map(ratio, packed_in_range(measure, grads, None).norms, weights)

    def suits(grads: Tree, params: Tree) -> bool:
        # Else they might be packed in different orders.
        dtypes = lambda tree: [x.dtype for x in jax.tree.leaves(tree)]
        return dtypes(grads) == dtypes(_weights(grads, params))

    packing = packing_of(measure)
    if packing:  # `packed` asks for both norms in range, so it is not to be asked in float64
        packed_by(norms, packing._replace(norms=packed, suits=suits, wide=False))
    return Measure(norms, measure.spread, sums=False)


def relative_entries(
    measure: Measure, relative: float | jax.Array, absolute: float | jax.Array
) -> Measure:
    """Measures every entry in units of its own parameter: ||g_i / (lambda |w_i| + delta)||.

    Args:
      measure: the norm of these quotients; with `leaf_norm(inf)`, the largest one of each leaf.
      relative: lambda >= 0, the unit as a share of the parameter.
      absolute: delta > 0, the unit of a parameter that is 0.

    Returns:
      A measure with the norms of `measure`; NaN where a parameter is not finite.

    Raises:
      TypeError, ValueError: if an argument is not such; at update, ValueError if it was called
        without params.

    Example:
      >>> import math, jax.numpy as jnp, optaxclip
      >>> m = optaxclip.measure
      >>> changes = m.relative_entries(m.leaf_norm(math.inf), 0.5, 0.01)
      >>> changes.norms(jnp.array([0.02, 0.51]), jnp.array([0.0, 1.0]))
      Array([2.], dtype=float32)

    Reference:
      Tang et al., Improving training stability for multitask ranking models in recommender
      systems (Clippy), arXiv:2302.09178.
    """
    _check.instance(Measure, "measure.leaf_norm()", measure=measure)
    _check.number(relative=relative)
    _check.positive(absolute=absolute)

    def norms(grads: Tree, params: Tree) -> Tree:
        weights = _weights(grads, params)
        return measure.norms(jax.tree.map(quotients, grads, weights), None)

    def quotients(grad: jax.Array, weight: jax.Array) -> jax.Array:
        size = jnp.abs(widen(grad))
        unit = as_like(relative, size) * jnp.abs(widen(weight)).astype(size.dtype)
        unit += as_like(absolute, size)
        # In units of more than float32 holds, no entry is above 1; of a bad parameter, all are bad.
        unit = jnp.minimum(unit, jnp.finfo(unit.dtype).max)
        return quotient(size, jnp.where(jnp.isfinite(weight), unit, jnp.nan))

    return Measure(norms, measure.spread, measure.sums)


def stacked(measure: Measure, axes: AxisRule) -> Measure:
    """Measures every layer of scan-stacked parameters as if it stood alone.

    `nn.scan`, `nnx.vmap` and most large models keep L equal layers as one leaf with an axis of
    length L. A leaf-wise or unit-wise norm over such a leaf mixes the layers.

    Args:
      measure: what is measured in each layer.
      axes: the stack axes: an int or a tuple for every leaf; None for no leaf; or a function
        (path, leaf) -> one of these, for trees in which only some leaves are stacked. The inner
        measure sees a layer without them: there, axis 0 of a kernel (L, in, out) is `in`.

    Returns:
      A measure whose norms are a dict: under "" the norms of the leaves that are not stacked;
      under the stack's lengths, as "12" or "12x8", those of the stacked ones, with these axes in
      front. Under `global_norm`, one group is layer i of all leaves with stacks of equal length;
      inside shard_map, of equal length there, so that all of these should be split alike.

    Raises:
      TypeError: if an argument is not such. ValueError: at init, if a leaf lacks a stack axis.

    Example:
      >>> import jax.numpy as jnp, optaxclip
      >>> m = optaxclip.measure
      >>> grads = {"layers": jnp.array([[3.0, 4.0], [6.0, 8.0]]), "out": jnp.ones(4)}
      >>> def axes(path, leaf):
      ...     return 0 if path.startswith("layers") else None
      >>> m.stacked(m.leaf_norm(), axes).norms(grads, None)
      {'': Array([2.], dtype=float32), '2': Array([[ 5.],
             [10.]], dtype=float32)}
    """
    _check.instance(Measure, "measure.leaf_norm()", measure=measure)
    _check.axes(axes=axes)

    def layout(grads: Tree) -> tuple[list[Axes], list[str]]:
        found = [resolve(axes, path, g) or () for path, g in places(grads)]
        lengths = [
            [str(g.shape[a]) for a in own]
            for own, g in zip(found, jax.tree.leaves(grads), strict=True)
        ]
        return found, ["x".join(own) for own in lengths]

    def layers(grads: Tree, tree: Tree) -> dict[str, Tree]:
        """The leaves of `tree` by the stack that `grads` has there, stack axes in front."""
        found, stacks = layout(grads)
        leaves, treedef = jax.tree.flatten(tree)
        front = [jnp.moveaxis(x, a, range(len(a))) for x, a in zip(leaves, found, strict=True)]
        return split(treedef.unflatten(front), stacks)

    def norms(grads: Tree, params: Tree) -> dict[str, Tree]:
        parts = layers(grads, grads)
        weights = dict.fromkeys(parts) if params is None else layers(grads, aligned(grads, params))
        return {
            stack: _each_layer(measure.norms, stack)(part, weights[stack])
            for stack, part in parts.items()
        }

    def spread(factors: dict[str, Tree], grads: Tree) -> Tree:
        parts = layers(grads, grads)
        for stack, part in parts.items():
            factor = _each_layer(measure.spread, stack)(factors[stack], part)
            parts[stack] = jax.tree.map(_fill_rank, jax.tree.broadcast(factor, part), part)
        found, stacks = layout(grads)
        leaves, treedef = jax.tree.flatten(merge(parts, grads, stacks))
        back = [jnp.moveaxis(f, range(len(a)), a) for f, a in zip(leaves, found, strict=True)]
        return treedef.unflatten(back)

    return Measure(norms, spread, measure.sums, wide=measure.wide)


def aligned(grads: Tree, params: Tree) -> Tree:
    """The parameters of the leaves that are measured; `grads` has None for the others."""
    is_none = lambda x: x is None
    return jax.tree.map(lambda g, p: None if g is None else p, grads, params, is_leaf=is_none)


def _weights(grads: Tree, params: Tree) -> Tree:
    """The parameters of the leaves that are measured, made sure that they were given."""
    if params is None and jax.tree.leaves(grads):
        message = "a relative norm needs the parameters: call update(grads, state, params)"
        raise ValueError(message)
    _check.alike(grads, "the gradients", params=params)
    weights = aligned(grads, params)
    if any(x.dtype.itemsize < 4 for x in jax.tree.leaves(weights)):
        # From XLA, which would widen once for the norm and for what adds the updates to them, and
        # write that to memory.
        weights = behind_a_barrier(weights)
    return weights


def _each_layer(fun: Callable[..., Tree], stack: str) -> Callable[..., Tree]:
    for _ in stack.split("x") if stack else ():
        fun = jax.vmap(fun, axis_name=STACK)
    return fun


def _fill_rank(factor: jax.Array, leaf: jax.Array) -> jax.Array:
    if factor.ndim == 0:
        return factor
    return factor.reshape(factor.shape + (1,) * (leaf.ndim - factor.ndim))
