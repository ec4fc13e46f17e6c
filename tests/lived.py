"""States that a stream of good and bad gradients leaves in clippers of every kind."""

import functools
from typing import NamedTuple

import jax
import numpy as np
import optax
import trees
from roster import EVERY

import optaxclip as oc

LEARNS = [name for name, row in EVERY.items() if row.memory]

# Usual norms, a bad entry, none, what float32 squares cannot hold, the smallest normal numbers, a
# new level that lasts.
STREAM = [1.0, 2.0, 1.0, np.nan, 1.5, np.inf, 0.0, 1e20, 1.0, 1.2e-38, 1e-42, -np.inf, 2.0, 1.0]
STREAM += [90.0] * 12 + [70.0, 80.0]


def tree(**kwargs):
    """Gradients of a tiny model."""
    return {"w": trees.normal(3, 2, **kwargs), "b": trees.normal(4, **kwargs)}


def transformations():
    """Every variant before momentum, and other ways to hold a clipper."""
    zclip, growth = EVERY["zclip"].make, EVERY["clip_by_norm_growth"].make
    rest = {
        "propagate": optax.chain(
            zclip(nonfinite="propagate"), oc.clip_by_value(nonfinite="propagate")
        ),
        "normalize": oc.stabilize_gradients(nonfinite="propagate"),
        "sanitize": optax.chain(
            oc.scale_by_stable_adam(nonfinite="sanitize"), oc.clip_by_norm(nonfinite="sanitize")
        ),
        "no record": optax.chain(zclip(record=False), oc.clip_by_norm(record=False)),
        "patience": growth(patience=4, max_norm=optax.constant_schedule(99.0)),
        "masked": optax.masked(growth(), {"w": True, "b": False}),
        "partition": optax.partition({"a": oc.clip_by_norm(), "z": growth()}, {"w": "a", "b": "z"}),
        "accumulating": optax.MultiSteps(growth(), 2).gradient_transformation(),
        "injected": optax.inject_hyperparams(oc.clip_by_ema_ratio)(ratio=3.0),
    }
    return {name: optax.chain(row.make(), optax.trace(0.9)) for name, row in EVERY.items()} | rest


class Run(NamedTuple):
    """All transformations at once, which one program can step."""

    init: dict
    states: list  # after each step of `STREAM`
    step: object


@functools.cache
def run():
    """The states that a stream of good and bad gradients leaves."""
    txs, params = transformations(), tree(seed=1)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        init = {name: tx.init(params) for name, tx in txs.items()}
        step = jax.jit(lambda s, g: {n: tx.update(g, s[n], params)[1] for n, tx in txs.items()})
        states = [init]
        for i, scale in enumerate(STREAM):
            grads = jax.tree.map(lambda g, s=scale: g.at[0].multiply(s), tree(seed=i))
            if np.isfinite(scale):
                grads = jax.tree.map(lambda g, s=scale: g * s, tree(seed=i))
            states.append(step(states[-1], grads))
    return Run(init, states, step)


def replaced(state, i, x):
    """The state with another leaf at index i."""
    leaves, treedef = jax.tree.flatten(state)
    return treedef.unflatten([*leaves[:i], x, *leaves[i + 1 :]])
