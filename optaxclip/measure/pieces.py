"""small leaves -> pieces -> sum: how a CPU adds up many leaves with few loops to compile.

Small leaves are laid end to end, some 32,000 entries at a time, into memory that stays in the cache
and is used again for the next piece. Of 1200 leaves with 1 M entries, the norm then takes a third
less time to compile than with :mod:`.bundles`, and as long to run.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from optaxclip import _device
from optaxclip._numbers import end_to_end, is_known, of_one_dtype

from . import bundles
from .arithmetic import EUCLIDEAN, added, square_sum
from .bundles import SMALL, Bundle
from .shards import layout

# Entries. 480 leaves of 4096 take 1.93 ms in such pieces, 2.8 in twice as large ones, 2.3 in half
# as large ones and 1.87 in bundles.
PIECE = 2**15


def total(parts: list[Bundle], fun: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """The sum of the squares of fun(leaf) over all leaves.

    Args:
      parts: one leaf each.
      fun: entry by entry, from and to any shape.
    """
    apart, small = [], dict[Any, list[jax.Array]]()
    for part in parts:
        leaf = part.leaves[0]
        if _is_worth(part):
            small.setdefault(leaf.dtype, []).append(leaf)
        else:
            apart.append(part._replace(leaves=[fun(leaf)]))
    sums = [_total_in_pieces(leaves, fun) for leaves in small.values()]
    sums.append(jnp.sum(bundles.sums(bundles.together(apart), EUCLIDEAN)))
    return added(of_one_dtype(sums))


def _is_worth(part: Bundle) -> bool:
    """Whether a leaf may lie beside others: it is small, and all are on one device, a CPU."""
    leaf = part.leaves[0]
    alone = not part.over and layout(leaf) == () and is_known(leaf.size)
    return _device.on_cpu() and alone and leaf.size <= SMALL


def _total_in_pieces(leaves: list[jax.Array], fun: Callable[[jax.Array], jax.Array]) -> jax.Array:
    pieces = _pieces(leaves)
    # Of one length, as equal loops are compiled once.
    length = PIECE if len(pieces) > 1 else sum(leaf.size for leaf in leaves) + 1
    found: list[jax.Array] = []
    for piece in pieces:
        rest = jnp.full(length - sum(leaf.size for leaf in piece), _zero(found), piece[0].dtype)
        found.append(square_sum([fun(end_to_end([*piece, rest]))]))
    return added(found)


def _zero(found: list[jax.Array]) -> Any:
    """Zero, or NaN if that was found before: XLA does not know which, and so finds that first.

    Else it makes memory for all pieces at once.
    """
    return jax.lax.stop_gradient(jnp.minimum(found[-1], 0)) if found else 0


def _pieces(leaves: list[jax.Array]) -> list[list[jax.Array]]:
    """Leaves in runs of less than PIECE entries."""
    pieces: list[list[jax.Array]] = []
    size = PIECE
    for leaf in leaves:
        if size + leaf.size >= PIECE:
            pieces.append([])
            size = 0
        pieces[-1].append(leaf)
        size += leaf.size
    return pieces
