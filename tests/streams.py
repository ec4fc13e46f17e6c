"""Every variant over streams of norms, with numbers that change at any step: one program each."""

import functools
import inspect
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from roster import EVERY

import optaxclip as oc

NAN, INF = math.nan, math.inf
STEPS = 2200
LEVEL = 0.5  # of ordinary norms, below all fixed limits but that of the average norm
# Of norm 1. The float16 entries stay where float16 has numbers, whatever the norm is.
DIRECTION = {
    "w": np.float32([0.6, 0.0, -0.6]),
    "b": np.float32([0.1**0.5]),
    "h": np.float16([0.3, -0.3]),
}
FLOAT32 = [0, 3, 4, 5]  # where b and w are among all entries
SIGN = np.sign(np.concatenate([np.float32(x) for x in jax.tree.leaves(DIRECTION)]))
# Arguments that are limits, which may be schedules.
LIMITS = {"max_value", "max_norm", "min_norm", "threshold", "clipping", "norm", "max_rms"}


class Steps(NamedTuple):
    """What a clipper did, one row per step."""

    updates: np.ndarray  # all entries
    norm: np.ndarray  # of the metrics; of two clips, those of the first
    limit: np.ndarray  # of two clips, the smaller one, NaN if one is
    factor: np.ndarray  # as limit
    nonfinite: np.ndarray  # steps so far


def called(name):
    """The function of a variant, the keywords in its row, and its numbers that may change."""
    make = EVERY[name].make
    function, keywords = getattr(make, "func", make), getattr(make, "keywords", {})
    parameters = inspect.signature(function).parameters
    numbers = {
        x: parameters[x].default for x in ("min_norm", "max_norm", "max_rms") if x in parameters
    }
    first = next(iter(parameters))
    if name != "scale_by_stable_adam":  # whose first argument is a decay
        numbers[first] = next(iter(getattr(make, "args", ())), parameters[first].default)
    return function, keywords, numbers


BAD = (-1.0, NAN, -INF)
NUMBERS = [(name, x) for name in EVERY for x in called(name)[2]]


@functools.cache
def program(name):
    """One clipper over a stream, its limits and first arguments traced and new at every step."""
    function, keywords, _ = called(name)

    def step(state, now):
        numbers, norm, bad = now
        grads = jax.tree.map(lambda x: x * jnp.minimum(norm, 6e4).astype(x.dtype), DIRECTION)
        grads |= {key: norm * DIRECTION[key] for key in ("w", "b")}
        grads = jax.tree.map(lambda x: jnp.where(bad == 0, x, bad.astype(x.dtype)), grads)
        updates, state = function(**keywords, **numbers).update(grads, state, DIRECTION)
        read = oc.metrics(state)
        least = lambda field: functools.reduce(
            jnp.minimum, [x for k, x in read.items() if k.endswith(field)]
        )
        flat = jnp.concatenate([x.astype(jnp.float32) for x in jax.tree.leaves(updates)])
        norm, bad_steps = (
            next(x for k, x in read.items() if k.endswith(f)) for f in ("norm", "nonfinite_steps")
        )
        return state, Steps(flat, norm, least("limit"), least("factor"), bad_steps)

    start = function(**keywords).init(DIRECTION)
    return jax.jit(lambda stream: jax.lax.scan(step, start, stream)[1])


def run(name, norms, bad=0.0, **numbers):
    """The steps of one clipper over norms, bad entries (0 for none) and changing numbers."""
    every = lambda x: np.broadcast_to(np.float32(x), STEPS)
    numbers = {key: every(value) for key, value in {**called(name)[2], **numbers}.items()}
    return jax.tree.map(np.asarray, program(name)((numbers, every(norms), every(bad))))


def noisy():
    """Norms that vary by 5 %."""
    return LEVEL * np.exp(0.05 * np.random.default_rng(0).normal(size=STEPS))


def spiked(*spikes):
    """Constant norms, with others at some steps."""
    norms = np.full(STEPS, LEVEL, np.float32)
    for when, size in spikes:
        norms[when] = size
    return norms
