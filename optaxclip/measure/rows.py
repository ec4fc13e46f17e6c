"""leaves -> rows -> sums: how a GPU adds up, where every kernel takes microseconds to start.

There, XLA makes two kernels of the sum of a leaf, one of the sums of its rows. So rows come first,
of large leaves; those of all leaves lie end to end, or those of leaves of one shape beside each
other, and are added up together. Units, where they are few, are one array as well, so that their
limits and factors are one kernel. On an H100, a step of SGD on GPT-2's 148 leaves is 216 kernels
with the norm of the tree, in place of 274; with that of every leaf 96 in place of 326. (Counted
while FEW was 2**13, the latter with three sums in float32; for an H200 they are 218 and 105 now.)
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from optaxclip import _device
from optaxclip._numbers import apart, as_one, of_one_dtype, widen

from . import bundles
from .arithmetic import EUCLIDEAN, power_sum, squared, squares_of
from .base import Axes, Fun, kept
from .bundles import Bundle
from .shards import in_a_stack, is_in_one_place

UNIT = 64  # entries that there are for each norm, at least, where norms are laid together
FEW = 2**10  # entries of a leaf that is laid beside others as it is: bytes that are written


def are_worth(part: Bundle) -> bool:
    """Whether the rows of a leaf may lie beside those of others: it is on one device, a GPU."""
    return _device.on_gpu() and bundles.may_lie_beside(part)


def total(parts: list[Bundle]) -> jax.Array:
    """The sum of the squares of all leaves."""
    here = [part for part in parts if are_worth(part)]
    rest = [part for part in parts if not are_worth(part)]
    of_rest = jnp.sum(bundles.sums(bundles.together(rest), EUCLIDEAN))
    if not here:
        return of_rest
    few = [part.leaves[0] for part in here if _are_few(part)]
    large = bundles.together([part for part in here if not _are_few(part)])
    found = [_rows(part.leaves) for part in large]
    found += [jnp.sum(squared(as_one(of_one_dtype(few)))).reshape(1)] if few else []
    found += [of_rest.reshape(1)] if rest else []
    return jnp.sum(as_one(of_one_dtype(found)))


def sums_of_leaves(parts: list[Bundle], ord: float) -> jax.Array:
    """The power sum of every leaf, as one vector in their order."""
    groups: dict[Hashable, list[int]] = {}
    for i, part in enumerate(parts):
        if ord == EUCLIDEAN and are_worth(part):
            groups.setdefault((part.leaves[0].shape, part.leaves[0].dtype), []).append(i)
    if not groups:
        return bundles.sums(parts, ord)
    here = [i for group in groups.values() for i in group]
    rest = sorted({*range(len(parts))} - {*here})
    found = [_sums([parts[i] for i in group]) for group in groups.values()]
    found += [bundles.sums([parts[i] for i in rest], ord)] if rest else []
    order = np.argsort([*here, *rest])
    each = as_one(of_one_dtype(found))
    return each.at[order].get(unique_indices=True, mode="promise_in_bounds")


def _sums(alike: list[Bundle]) -> jax.Array:
    """The sum of the squares of each of some leaves of one shape."""
    if _are_few(alike[0]):
        whole = as_one([widen(part.leaves[0]) for part in alike])
        return jnp.sum(squared(whole).reshape(len(alike), -1), 1)
    return jnp.sum(jnp.stack([_rows(part.leaves) for part in alike]), 1)


def order(parts: Sequence[Bundle], axes: Sequence[Axes]) -> list[int]:
    """The places of leaves in the order of `power_sums`: first those of many units."""
    return sorted(range(len(parts)), key=lambda i: _is_whole(parts[i], axes[i]))


def power_sums(
    parts: Sequence[Bundle],
    axes: Sequence[Axes],
    ord: float,
    fun: Fun,
    own: Sequence[jax.Array],
) -> jax.Array:
    """The power sums of fun(leaf, *its own) over its axes, all behind each other.

    As :func:`.pieces.power_sums`, but in the order of `order`; p is 1 or 2.
    """
    shapes = [kept(part.leaves[0], over) for part, over in zip(parts, axes, strict=True)]
    places = order(parts, axes)
    each = [apart(x, [math.prod(shapes[i]) for i in places]) for x in own]
    found: list[jax.Array] = []
    whole: list[Bundle] = []
    for i, *mine in zip(places, *each, strict=True):
        x = fun(parts[i].leaves[0], *(m.reshape(shapes[i]) for m in mine))
        if _is_whole(parts[i], axes[i]):
            whole.append(Bundle([x], ()))
        else:
            found.append(power_sum(x, ord, axes[i]))
    found += [sums_of_leaves(whole, ord)] if whole else []
    return as_one(of_one_dtype(found))


def suit(parts: Sequence[Bundle], axes: Sequence[Axes]) -> bool:
    """Whether the units of all leaves may be one array: there are few of them for the entries."""
    leaves = [part.leaves[0] for part in parts]
    if in_a_stack() or any(part.over for part in parts) or not all(map(is_in_one_place, leaves)):
        return False
    units = sum(math.prod(kept(x, over)) for x, over in zip(leaves, axes, strict=True))
    return 0 < units * UNIT <= sum(x.size for x in leaves)


def _is_whole(part: Bundle, axes: Axes) -> bool:
    return len(axes) == part.leaves[0].ndim


def _are_few(part: Bundle) -> bool:
    """Whether the entries of a leaf are laid beside others as they are.

    Squared where they lie: as a part of what lays them down, the squares of 450 leaves took 5.3 s
    to compile in place of 0.7.
    """
    leaf = part.leaves[0]
    return leaf.size <= FEW and not jnp.iscomplexobj(leaf)


def _rows(leaves: Sequence[jax.Array]) -> jax.Array:
    """Numbers whose sum is that of the squares of leaves of one shape, as a vector."""
    squares = squares_of(leaves)
    if squares.size > FEW:
        squares = jnp.sum(*_device.in_rows(squares))
    return squares.reshape(-1)
