"""memory -> limits, and the memory as the next step finds it: what a threshold is asked for."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from ._numbers import TOO_LARGE, TOO_SMALL, is_bad
from .threshold import Clock, Threshold
from .threshold.base import choose

Tree = Any


def blank(threshold: Threshold, norm: jax.ShapeDtypeStruct) -> Tree:
    """The memory before the first step, made sure that it can be kept group by group."""
    memory = threshold.init(norm)
    for x in jax.tree.leaves(memory, is_leaf=_is_clock):
        if not _is_clock(x) and x.shape[max(x.ndim - len(norm.shape), 0) :] != norm.shape:
            raise ValueError(
                f"an array in the memory of a threshold must have the shape of the norms, "
                f"{norm.shape}, with any axes in front; got {x.shape}. A Clock counts steps."
            )
    return memory


def each_memory(
    memory: Tree, treedef: Any, norms: list[jax.Array], threshold: Threshold
) -> list[Tree]:
    """One memory per array of norms."""
    if not jax.tree.leaves(memory):
        return [threshold.init(norm) for norm in norms]
    try:
        memories: list[Tree] = treedef.flatten_up_to(memory)
    except ValueError:
        message = "these gradients have other float leaves than the params given to init"
        raise ValueError(message) from None
    for norm, own in zip(norms, memories, strict=True):
        for x in jax.tree.leaves(own, is_leaf=_is_clock):
            if not _is_clock(x) and x.shape[x.ndim - norm.ndim :] != norm.shape:
                raise ValueError(
                    f"these gradients have norms of shape {norm.shape}, those of the params given "
                    f"to init had {x.shape[x.ndim - norm.ndim :]}"
                )
    return memories


def _is_clock(x: Any) -> bool:
    return isinstance(x, Clock)


def limited(
    threshold: Threshold, norm: jax.Array, finite: jax.Array, memory: Tree
) -> tuple[jax.Array, Tree]:
    """The limit, and the memory as it was wherever the norm teaches nothing."""
    if not _remembers_norms(memory):
        limit, memory = threshold.update(jnp.where(jnp.isfinite(norm), norm, 0), memory)
        return limit.astype(norm.dtype), memory
    size = norm.astype(jnp.float32)  # as all memories are
    telling = finite & (size >= TOO_SMALL) & (size < TOO_LARGE)
    shown = jnp.where(jnp.isfinite(size), jnp.minimum(size, TOO_LARGE), 0)
    limit, learned = threshold.update(shown, memory)
    # A hyperparameter that is traced and bad for a step must not be for ever.
    telling &= ~is_bad(limit)
    telling &= stays_finite(learned, memory, norm.ndim)
    # Where there is no limit yet, for lack of a past, that is no licence for such a norm.
    limit = jnp.where((size >= TOO_LARGE) & (limit >= TOO_LARGE), 0, limit)
    # A float64 norm is not above a limit for what rounding it took away.
    wide = limit.astype(norm.dtype)
    wide = jnp.where(size <= limit, jnp.maximum(wide, norm), wide)
    return wide, choose(telling, learned, memory)


def stays_finite(learned: Tree, memory: Tree, ndim: int) -> jax.Array:
    """Group by group, whether nothing in a memory has become inf or NaN."""
    finite = jnp.ones((), bool)
    both = (jax.tree.leaves(m, is_leaf=_is_clock) for m in (learned, memory))
    for new, old in zip(*both, strict=True):
        if not _is_clock(new):  # a threshold of one's own may begin with inf
            finite &= jnp.all(jnp.isfinite(new) | ~jnp.isfinite(old), range(new.ndim - ndim))
    return finite


def _remembers_norms(memory: Tree) -> bool:
    return not all(map(_is_clock, jax.tree.leaves(memory, is_leaf=_is_clock)))
