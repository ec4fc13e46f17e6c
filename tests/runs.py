"""Variants run on drawn trees: one compiled program for all cases of a structure.

A program takes the steps before, which are learned, and `BATCH` steps from there, which are not.
"""

import contextlib
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import trees
from oracles import norm, tree_norm, unit_axes
from roster import BEYOND, EVERY, Variant
from strategies import OTHERS

import optaxclip as oc
from optaxclip._numbers import TOO_LARGE

BATCH = 2  # how many steps a law can compare at once
SMALLEST = 2.0**-126  # the smallest normal number of float32
KEPT = 64  # programs kept for further cases, which is all of them in a test run

# Variants with a limit in units of gradients, or of parameters: they are made under limit c.
LIMITED = {
    "clip_by_value": oc.clip_by_value,
    "clip_by_norm": oc.clip_by_norm,
    "clip_by_global_norm": oc.clip_by_global_norm,
    "clip_by_block_rms": oc.clip_by_block_rms,
    "clip_by_average_norm": oc.clip_by_average_norm,
    "adaptive_grad_clip": oc.adaptive_grad_clip,
    "clippy": lambda c, **options: oc.clippy(c / 2, absolute=c / 100, **options),
    "normalize_by_global_norm": oc.normalize_by_global_norm,
    "auto_clip": oc.auto_clip,
    "adagc": lambda c, **options: EVERY["adagc"].make(max_norm=c, **options),
}


def _strict(measure, groups):
    make = lambda c=1.0, **o: oc.clip(measure, oc.threshold.constant(c), oc.scale.strict, **o)
    return Variant(make, groups)


STRICT = {
    "strict global_norm": _strict(oc.measure.global_norm(), "tree"),
    "strict leaf_norm": _strict(oc.measure.leaf_norm(), "leaf"),
    "strict unit_norm": _strict(oc.measure.unit_norm(), "unit"),
    "strict element": _strict(oc.measure.element(), "entry"),
}
ALL = EVERY | STRICT | BEYOND
LIMITED |= {name: row.make for name, row in (STRICT | BEYOND).items()}

# Group by group, what the memory of a variant allows: its equation, in float64.
LEARNED = {
    "clip_by_ema_ratio": lambda state: _ema_ratio(state.memory.threshold.all, 2.0),
    "clip_by_norm_growth": lambda state: _growth(state.memory.threshold),
    "clip_by_second_moment": lambda state: [_moment(m.threshold) for m in state.memory],
    "adagc": lambda state: _ema_ratio(state.leaf.memory.threshold.all.threshold, 1.05),
}


class Outcome(NamedTuple):
    """What a program gives."""

    updates: list  # per step of the batch, the leaves that are clipped
    others: list  # and those that are not
    metrics: list
    state: Any  # before the batch


def run(name, structure, drawn, batch, *, policy="zero", limits=None, masked=None):
    """The steps of `batch` one by one, each with what was learned before the first of them."""
    limit = limit_of(name, drawn)
    limits = [limit] * len(batch) if limits is None else limits
    padded = [*batch, *[batch[-1]] * (BATCH - len(batch))]
    stream = drawn.stream if ALL[name].memory else {k: x[:0] for k, x in drawn.stream.items()}
    steps = {k: np.concatenate([stream[k], [g[k] for g in padded]]) for k in stream}
    before = len(next(iter(stream.values())))
    every_limit = np.array([limit] * before + [*limits, *[limits[-1]] * BATCH][:BATCH], np.float32)
    learns = np.arange(before + BATCH) < before
    others = {
        k: None if x is None else jax.tree.map(lambda x: np.array([x] * (before + BATCH)), x)
        for k, x in OTHERS.get(structure, {}).items()
    }
    params = drawn.params | OTHERS.get(structure, {})
    with wide(structure):
        state, (updates, metrics) = program(name, structure, policy, masked)(
            steps | others, every_limit, learns, params
        )
    updates, metrics = jax.tree.map(np.asarray, (updates, metrics))
    at = lambda tree, i: jax.tree.map(lambda x: x[i], tree)
    found = [at(updates, before + i) for i in range(len(batch))]
    return Outcome(
        [{k: x[k] for k in stream} for x in found],
        [{k: x[k] for k in others} for x in found],
        [at(metrics, before + i) for i in range(len(batch))],
        state,
    )


@functools.lru_cache(maxsize=KEPT)
def program(name, structure, policy="zero", masked=None):
    """The compiled steps of a variant, under `optax.masked` without one leaf if that is named."""

    @jax.jit
    def steps(grads, limits, learns, params):
        def step(state, inputs):
            grads, limit, learn = inputs
            updates, after = make(name, policy, masked, limit).update(grads, state, params)
            keep = lambda new, old: jnp.where(learn, new, old)
            return jax.tree.map(keep, after, state), (updates, oc.metrics(after))

        init = make(name, policy, masked, 1.0).init
        return jax.lax.scan(step, init(params), (grads, limits, learns))

    return steps


@functools.lru_cache(maxsize=KEPT)
def vmapped(name, structure):
    """The steps of a batch at once, from one state."""

    def step(grads, limit, state, params):
        return make(name, "zero", None, limit).update(grads, state, params)[0]

    return jax.jit(jax.vmap(step, in_axes=(0, 0, None, None)))


def make(name, policy, masked, limit):
    """A variant under a limit, where it has one."""
    if name in LIMITED:
        tx = LIMITED[name](limit, nonfinite=policy)
    else:
        tx = EVERY[name].make(nonfinite=policy)
    return tx if masked is None else optax.masked(tx, lambda p: {k: k != masked for k in p})


def wide(structure):
    """The context that a structure needs."""
    return jax.enable_x64(True) if structure.startswith("double") else contextlib.nullcontext()


def limit_of(name, drawn):
    """The limit that is of the size of the norms of a variant."""
    if ALL[name].normalizes:  # it would enlarge float16 beyond its range
        return min(drawn.limit, np.float32(2.0**14))
    if name == "clippy":  # which divides by it
        return np.clip(drawn.share, np.float32(2.0**-8), np.float32(2.0**8))
    return drawn.share if ALL[name].params else drawn.limit


def sizes(name, tree, params):
    """The float64 norm of every group, in shapes that broadcast to the leaves."""
    x, w = trees.float64(tree), trees.float64(params)
    groups = ALL[name].groups
    if name == "clippy":
        return {k: np.max(np.abs(x[k]) / (np.abs(w[k]) / 2 + 0.01), initial=0) for k in x}
    if groups == "tree":
        return dict.fromkeys(x, tree_norm(x))
    if groups == "entry":
        return {k: np.abs(x[k]) for k in x}
    if groups == "unit":
        size = {k: norm(x[k], axis=unit_axes(x[k])) for k in x}
        if name != "adaptive_grad_clip":
            return size
        return {k: size[k] / np.maximum(norm(w[k], axis=unit_axes(w[k])), 1e-3) for k in x}
    power = {"clip_by_block_rms": 0.5, "clip_by_average_norm": 1.0}.get(name, 0.0)
    return {k: norm(x[k]) / max(x[k].size, 1) ** power for k in x}


def tiny(x):
    """Up to what an entry may be off, beside its rounding: float32 may flush what is subnormal."""
    return max(SMALLEST, float(jnp.finfo(x.dtype).smallest_subnormal))


def lost(name, drawn):
    """How large a group is all of whose entries are `tiny`."""
    return sizes(name, {k: np.full(x.shape, tiny(x)) for k, x in drawn.grads.items()}, drawn.params)


def limits(name, before, limit, outcome, i=0):
    """The limit of every group in step i, as `sizes`; `before` are the sizes that came in."""
    if not ALL[name].memory:
        return dict.fromkeys(before, np.float64(limit))
    if ALL[name].groups == "tree":
        return dict.fromkeys(before, np.float64(outcome.metrics[i]["limit"]))
    learned = dict(zip(sorted(before), LEARNED[name](outcome.state), strict=True))
    if name == "adagc":  # a leaf that has no limit yet has the global one
        learned = {k: np.where(np.isinf(x), limit, x) for k, x in learned.items()}
    # Norms from 2^64 on are never learned, nor let through for lack of a limit.
    none = lambda size, allowed: (size >= TOO_LARGE) & (allowed >= TOO_LARGE)
    return {k: np.where(none(before[k], learned[k]), 0, learned[k]) for k in before}


def _ema_ratio(memory, ratio):
    average = np.float64(memory.average)
    return np.where(np.asarray(memory.seen) >= 2, ratio * average, np.inf)


def _growth(memory):
    previous = np.float64(memory.previous)
    return np.where(previous > 0, 1.01 * previous, np.inf)


def _moment(memory):
    seen = np.asarray(memory.seen)
    weight = 1 - 0.999 ** np.maximum(seen, 1).astype(np.float64)
    return np.where(seen >= 2, 3 * np.float64(memory.root) / np.sqrt(weight), np.inf)
