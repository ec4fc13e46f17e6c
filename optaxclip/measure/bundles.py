"""leaves -> bundles: leaves that are alike, whose squares are added up in one loop.

XLA makes a loop of every sum. The squares of up to sixteen leaves of one shape, added entry by
entry before they are summed, are one loop for all of them, without a copy: of 960 leaves of 64
entries, XLA:CPU takes the norm in 0.51 ms in place of 1.35, and of 1200 leaves it compiles it in
0.7 s in place of 1.0. On one CPU device, :mod:`.pieces` take the place of those of the smallest
leaves; where squares are float64, large leaves are in bundles, too, of up to four. Metrics of
entries compare those of a bundle in the same way.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optaxclip import _device
from optaxclip._numbers import is_known, of_one_dtype, real_dtype

from .arithmetic import EUCLIDEAN, joined, power_sum, square_sum
from .base import Tree, places
from .shards import AxisName, Names, is_in_one_place, layout, split_over

MOST = 16  # leaves in a bundle; of 8 to 32, the fastest
# Entries of a leaf: by sums in float32, 480 leaves of 4096 take 0.79 ms in bundles and 0.93 alone,
# 240 of 16384 take 1.43 and 0.93.
SMALL = 2**13
# Larger leaves in a bundle, where a CPU adds up float64: 240 of 16384 take 2.3 ms in bundles and
# 3.0 alone, 150 of 34,848 2.7 and 3.2, 16 of 2^20 4.5 and 5.2; with sixteen 2.6, 3.9 and 6.8. (On
# a busy machine.)
MOST_LARGE = 4


class Bundle(NamedTuple):
    """Leaves that are read together, entry by entry."""

    leaves: list[jax.Array]
    over: Names  # the mapped axes over which each of them is split


def single(tree: Tree, axis_name: AxisName) -> list[Bundle]:
    """Every leaf by itself, in the order of the tree."""
    return [Bundle([g], split_over(axis_name, path, g)) for path, g in places(tree)]


def together(ones: list[Bundle]) -> list[Bundle]:
    """All leaves, those bundled that may be."""
    groups: dict[Hashable, list[Bundle]] = {}
    for i, bundle in enumerate(ones):
        key = _key(bundle.leaves[0])
        groups.setdefault(i if key is None else (*key, bundle.over), []).append(bundle)
    return [
        Bundle([each.leaves[0] for each in part], part[0].over)
        for group in groups.values()
        for part in alike(group, _most(group))
    ]


def may_lie_beside(part: Bundle) -> bool:
    """Whether a leaf may be laid beside others: all are on one device, and it has entries."""
    leaf = part.leaves[0]
    return not part.over and is_in_one_place(leaf) and leaf.size > 0


def sums(parts: list[Bundle], ord: float) -> jax.Array:
    """The power sum of every bundle, as one vector."""

    @jax.jit  # traced once for all leaves of one shape
    def squares(leaves: list[jax.Array]) -> jax.Array:
        return square_sum(leaves)

    each = [
        squares(part.leaves) if ord == EUCLIDEAN else power_sum(part.leaves[0], ord)
        for part in parts
    ]
    found = [x.reshape(()) for x in of_one_dtype(each)]
    # One collective for all that are split over the same axes.
    for names in sorted({part.over for part in parts} - {()}):
        those = [i for i, part in enumerate(parts) if part.over == names]
        whole = jnp.unstack(joined(jnp.stack([found[i] for i in those]), ord, names))
        for i, x in zip(those, whole, strict=True):
            found[i] = x
    # Without the barrier, XLA makes one chain of additions of this vector and its sum, and fuses
    # every loop over a leaf into it, so that no two are equal and each is compiled: 3.3 s for 1200
    # leaves, and 1.0 s with it.
    return jax.lax.optimization_barrier(jnp.stack(found)) if found else jnp.zeros(0, jnp.float32)


def _most(group: list[Bundle]) -> int:
    """How many leaves that are alike may be in a bundle; the size of one alone may be unknown."""
    return MOST if len(group) == 1 or group[0].leaves[0].size <= SMALL else MOST_LARGE


def _key(leaf: jax.Array) -> tuple[Any, ...] | None:
    """What leaves must have in common to be added entry by entry; None for one that stays alone."""
    where = layout(leaf)
    may_be_large = _device.on_cpu() and real_dtype(leaf) == jnp.float64
    if where is None or not is_known(leaf.size) or not (leaf.size <= SMALL or may_be_large):
        return None
    return leaf.shape, leaf.dtype, where


def alike(group: Sequence[Any], most: int) -> list[Sequence[Any]]:
    """Parts of one length if possible: loops that are equal are compiled once."""
    fewest = -(-len(group) // most)
    count = next((n for n in range(fewest, 2 * fewest + 1) if len(group) % n == 0), fewest)
    length = -(-len(group) // count)
    return [group[i : i + length] for i in range(0, len(group), length)]
