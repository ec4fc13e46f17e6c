"""The pair that every measure is, and the places of a tree that groups are named by."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax

from optaxclip import _check

Tree = Any
Axes = tuple[int, ...]
Norms = Callable[[Tree, Tree], Tree]
Fun = Callable[..., jax.Array]
AxisRule = int | Axes | Callable[[str, jax.Array], int | Axes | None] | None


class Packing(NamedTuple):
    """How one device measures many leaves, with few loops to compile: norms are few arrays.

    Leaves may be laid together first, so what is to be done to their entries is done after that.
    """

    # grads, params, fun, *own -> norms of fun(leaf, *its own), where fun is entry by entry and 0 of
    # 0, and what is its own is like the norms. Where a measure does not sum, fun does nothing.
    norms: Callable[..., Tree]
    unpacked: Callable[[Any, Tree], Tree]  # norms, grads -> norms as the measure has them
    spread: Callable[[Any, Tree], Tree]  # as that of the measure, of what is packed
    suits: Callable[[Tree, Tree], bool] = lambda grads, params: True
    # Whether a GPU packs it, too: fewer kernels, for norms that are written and read once more.
    suits_gpu: Callable[[Tree], bool] = lambda grads: False
    wide: bool = False  # its sums are of whole leaves, and may be of float64


_PACKINGS: weakref.WeakKeyDictionary[Norms, Packing] = weakref.WeakKeyDictionary()


def packed_by(norms: Norms, packing: Packing) -> None:
    """Lets the norms of a measure be packed so; others in their place, by `_replace`, are not."""
    _PACKINGS[norms] = packing


def packing_of(measure: Measure) -> Packing | None:
    """How a measure is packed."""
    return _PACKINGS.get(measure.norms)


class Measure(NamedTuple):
    """How gradients are grouped, and how large each group is."""

    norms: Norms  # grads, params -> norms, a small pytree of float32
    spread: Callable[[Tree, Tree], Tree]  # factors, grads -> factors, a prefix tree of grads
    sums: bool = True  # the engine keeps the sums in it in range; False: no need
    apart: bool = False  # each norm is of its own entries alone, and has an array of their leaf
    entries: bool = False  # a norm is the size of one entry, so that a limit can take its place
    wide: bool = False  # its sums may be of float64, where the program itself has none


def places(tree: Tree) -> list[tuple[str, jax.Array]]:
    """Every leaf with its path, as "encoder/kernel"."""
    leaves, _ = jax.tree.flatten_with_path(tree)
    return [(jax.tree_util.keystr(path, simple=True, separator="/"), x) for path, x in leaves]


def resolve(rule: AxisRule, path: str, leaf: jax.Array) -> Axes | None:
    """What an axis rule says of one leaf: axes counted from 0, or None where it leaves it open."""
    chosen = rule(path, leaf) if callable(rule) else rule
    if chosen is None:
        return None
    _check.axes(**{f"the axis of leaf {path!r}": chosen})
    axes = chosen if isinstance(chosen, tuple) else (chosen,)
    counted = tuple(a % leaf.ndim for a in axes if -leaf.ndim <= a < leaf.ndim)
    if len(set(counted)) < len(axes):
        message = f"axis {chosen} is out of range for, or twice in, leaf {path!r} of {leaf.shape}"
        raise ValueError(message)
    return counted


def kept(leaf: jax.Array, axes: Axes) -> list[int]:
    """The shape of what is left of a leaf that is reduced over axes, which stay with size 1."""
    return [1 if a in axes else n for a, n in enumerate(leaf.shape)]


def like_leaves(factors: list[jax.Array], grads: Tree) -> Tree:
    """How factors that are a list with one array per leaf are spread."""
    return jax.tree.structure(grads).unflatten(factors)


def split(tree: Tree, keys: Sequence[str]) -> dict[str, Tree]:
    """The tree once per key, with None for the leaves under other keys; paths stay the same."""
    leaves, treedef = jax.tree.flatten(tree)
    return {
        key: treedef.unflatten(
            [x if own == key else None for x, own in zip(leaves, keys, strict=True)]
        )
        for key in sorted(set(keys))
    }


def merge(parts: dict[str, Tree], tree: Tree, keys: Sequence[str]) -> Tree:
    """One value per leaf of `tree`, out of a prefix tree for each part that `split` made."""
    values: dict[str, Iterator[Any]] = {
        key: iter(jax.tree.leaves(jax.tree.broadcast(parts[key], part)))
        for key, part in split(tree, keys).items()
    }
    return jax.tree.structure(tree).unflatten([next(values[key]) for key in keys])
