"""What all checks share: one stream of gradients, and what a variant alone makes of it.

The gradients are those of a linear model, so that frameworks can compute them too. All but the
last are small, so that every variant has a limit by then, and changes the last.
"""

import contextlib
import functools
import inspect
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import trees
from roster import WARM

import optaxclip as oc

# A limit is learned from 11 norms, each right to a few 2^-24, and deviations magnify that.
TOLERANCE = {"rtol": 2e-5, "atol": 1e-6}

SIZES = np.float32([*np.linspace(0.08, 0.12, WARM), 5.0])  # of the gradients, step by step
INPUTS = trees.normal(len(SIZES), 4, 3, seed=1)
SLOPES = trees.normal(len(SIZES), 4, 2, seed=2) * SIZES[:, None, None]  # loss = sum(slopes x model)
PARAMS = {"kernel": trees.normal(3, 2), "bias": trees.normal(2)}
STREAM = {
    "kernel": jnp.einsum("tni,tno->tio", INPUTS, SLOPES),
    "bias": jnp.sum(SLOPES, axis=1),
}


class Plain(NamedTuple):
    """What a variant makes of the stream: updates and states have the steps in front."""

    updates: dict
    states: tuple
    warm: tuple  # the state before the last step
    grads: dict  # of the last step


def at(tree, step):
    """One step out of many."""
    return jax.tree.map(lambda x: x[step], tree)


def scanned(tx, **extra):
    """A compiled function of parameters and gradients that gives all updates and states."""
    tx = optax.with_extra_args_support(tx)

    @jax.jit
    def run(params, grads):
        def step(state, grad):
            updates, state = tx.update(grad, state, params, **extra)
            return state, (updates, state)

        return jax.lax.scan(step, tx.init(params), grads)[1]

    return run


@functools.cache
def alone(row):
    """The variant by itself, compiled."""
    return scanned(row.make())


@functools.cache
def one_step(row):
    """Its update, compiled."""
    return jax.jit(row.make().update)


@functools.cache
def plain(row):
    """What its steps make of the stream; the last gradients would not pass unchanged."""
    steps = [({}, row.make().init(PARAMS))]
    for i in range(len(SIZES)):
        grads = at(STREAM, i)
        steps.append(one_step(row)(grads, steps[-1][1], PARAMS))
    updates, states = jax.tree.map(lambda *x: np.stack(x), *steps[1:])
    for update, grad in zip(jax.tree.leaves(at(updates, -1)), jax.tree.leaves(grads), strict=True):
        assert np.abs(update - grad).max() > 0.1
    return Plain(updates, states, steps[-2][1], grads)


def close(actual, expected):
    """Two trees agree as closely as two programs for the same formula do."""
    trees.assert_close(actual, expected, **TOLERANCE)


def parameter(row):
    """The name of the threshold of a variant, and its value in the roster."""
    make, given = getattr(row.make, "func", row.make), getattr(row.make, "args", ())
    parameters = inspect.signature(make).parameters
    name = "max_rms" if "max_rms" in parameters else next(iter(parameters))  # StableAdam's is last
    return name, given[0] if given else parameters[name].default


def with_threshold(row, value):
    """The variant of the roster with another threshold."""
    name, _ = parameter(row)
    make = row.make
    return getattr(make, "func", make)(**{name: value, **getattr(make, "keywords", {})})


def clip_states(state):
    """Every state of a clip in what wraps it."""
    is_clip = lambda x: isinstance(x, oc.ClipState)
    return [x for x in jax.tree.leaves(state, is_leaf=is_clip) if is_clip(x)]


@contextlib.contextmanager
def loose():
    """Parts of Optax and Flax mix dtypes and ranks themselves."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield
