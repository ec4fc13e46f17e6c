"""NumPy float64 transcriptions of the rules, and the table of variants under test.

A new variant joins every test that runs over `VARIANTS` by one row here.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

import optaxclip as oc


class Row(NamedTuple):
    """A variant, what it should do, and the part of Optax that it replaces."""

    make: Callable[..., optax.GradientTransformation]  # threshold (optional), keywords -> variant
    oracle: Callable[[Any, Any], Any]  # grads, params in float64 -> updates
    replaces: Callable[[], optax.GradientTransformation] | None = None
    normalizes: bool = False  # changes gradients below the limit too, by design


def norm(x, ord=2, axis=None):
    """||x||_p over the axes, which stay."""
    size = np.abs(x)
    peak = np.max(size, axis=axis, keepdims=True, initial=0)
    if ord == np.inf:
        return peak
    peak = np.where(peak > 0, peak, 1)  # in units of the peak no power overflows
    return peak * np.sum((size / peak) ** ord, axis=axis, keepdims=True) ** (1 / ord)


def shrink(x, size, limit):
    """X min(1, limit / size)."""
    return x * np.minimum(1, limit / np.where(size > 0, size, 1))


def tree_norm(grads, ord=2):
    """||G||_p of all leaves as one vector."""
    leaves = [np.ravel(x) for x in jax.tree.leaves(grads)]
    return norm(np.concatenate([*leaves, np.zeros(1)]), ord).item()


def unit_axes(x):
    """The axes that the NFNet code reduces."""
    if sum(n != 1 for n in x.shape) <= 1:
        return None
    return {2: 0, 3: 0, 4: (0, 1, 2), 5: (0, 1, 2, 3)}[x.ndim]


def agc(g, p, axis, clipping, eps):
    """Equation 3 of arXiv:2102.06171."""
    return shrink(g, norm(g, axis=axis), clipping * np.maximum(norm(p, axis=axis), eps))


def by_leaf(rule):
    """An oracle that looks at one leaf of gradients at a time."""
    return lambda grads, params: jax.tree.map(rule, grads)


def by_tree(ord):
    """An oracle that shrinks the tree to norm 1."""
    return lambda grads, params: jax.tree.map(
        lambda g: shrink(g, tree_norm(grads, ord), 1.0), grads
    )


VARIANTS = {
    "clip_by_value": Row(
        oc.clip_by_value,
        by_leaf(lambda g: shrink(g, np.abs(g), 1.0)),
        lambda: optax.clip(1.0),
    ),
    "clip_by_norm": Row(oc.clip_by_norm, by_leaf(lambda g: shrink(g, norm(g), 1.0))),
    "clip_by_norm ord=3": Row(
        lambda c=1.0, **k: oc.clip_by_norm(c, ord=3, **k),
        by_leaf(lambda g: shrink(g, norm(g, 3), 1.0)),
    ),
    "clip_by_global_norm": Row(
        oc.clip_by_global_norm, by_tree(2), lambda: optax.clip_by_global_norm(1.0)
    ),
    "clip_by_global_norm ord=1": Row(
        lambda c=1.0, **k: oc.clip_by_global_norm(c, ord=1, **k), by_tree(1)
    ),
    "clip_by_global_norm ord=inf": Row(
        lambda c=1.0, **k: oc.clip_by_global_norm(c, ord=float("inf"), **k), by_tree(np.inf)
    ),
    "clip_by_block_rms": Row(
        oc.clip_by_block_rms,
        by_leaf(lambda g: shrink(g, norm(g) / np.sqrt(max(g.size, 1)), 1.0)),
        lambda: optax.clip_by_block_rms(1.0),
    ),
    "clip_by_average_norm": Row(
        lambda c=0.1, **k: oc.clip_by_average_norm(c, **k),
        by_leaf(lambda g: shrink(g, norm(g) / max(g.size, 1), 0.1)),
    ),
    "adaptive_grad_clip": Row(
        oc.adaptive_grad_clip,
        lambda grads, params: jax.tree.map(
            lambda g, p: agc(g, p, unit_axes(g), 0.01, 1e-3), grads, params
        ),
        lambda: optax.adaptive_grad_clip(0.01),
    ),
    "adaptive_grad_clip per_tensor": Row(
        lambda c=0.3, **k: oc.adaptive_grad_clip(c, per_tensor=True, **k),
        lambda grads, params: jax.tree.map(lambda g, p: agc(g, p, None, 0.3, 1e-3), grads, params),
    ),
    "adaptive_grad_clip stacked": Row(
        lambda c=0.01, **k: oc.adaptive_grad_clip(
            c, stacked=lambda path, leaf: -1 if leaf.ndim == 4 else None, **k
        ),
        lambda grads, params: jax.tree.map(
            lambda g, p: agc(g, p, 0 if g.ndim == 4 else unit_axes(g), 0.01, 1e-3), grads, params
        ),
    ),
    "normalize_by_global_norm": Row(
        oc.normalize_by_global_norm,
        lambda grads, params: jax.tree.map(lambda g: g / (tree_norm(grads) or 1), grads),
        normalizes=True,
    ),
}


def once(tx, grads, params=None):
    """The updates and the state after one step, with the gradients as parameters by default."""
    params = grads if params is None else params
    return tx.update(grads, tx.init(params), params)
