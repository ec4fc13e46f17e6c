"""Every argument of every adaptive variant has the documented default, and reaches its piece."""

import functools
import inspect
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import trees

import optaxclip as oc
from optaxclip import measure

TREE, LEAF = measure.global_norm(), measure.leaf_norm()

# The defaults that the papers, or their users, have.
DEFAULTS = {
    "clip_by_percentile": {"percentile": 95.0, "window": 1000},
    "auto_clip": {"max_norm": 1.0},
    "autoclip": {"percentile": 10.0, "window": 1000},
    "clip_by_quantile": {"quantile": 0.9, "rate": 0.05},
    "zclip": {"z_max": 2.5, "decay": 0.97, "warmup": 25, "mode": "reciprocal", "feed": "capped"},
    "clip_by_sigma": {"k": 3.0, "window": 128, "feed": "clipped"},
    "adagc": {"ratio": 1.05, "decay": 0.98, "warmup": 100, "max_norm": 1.0, "convention": "paper"},
    "clip_by_ema_ratio": {"ratio": 2.0, "decay": 0.95},
    "clip_by_norm_growth": {"max_growth": 1.01},
    "clip_by_second_moment": {"k": 3.0, "decay": 0.999},
    "clippy": {"relative": 0.5, "absolute": 0.01},
    "scale_by_stable_adam": {"b1": 0.9, "b2": 0.99, "eps": 1e-6, "max_rms": 1.0},
    "stabilize_gradients": {"decay": 0.6, "norm_decay": 0.999, "bias_correction": True},
}

# What needs another stream: a rise after 1000 norms in test_adaptive.py, and a test below.
ELSEWHERE = {"clip_by_percentile": {"patience"}, "clip_by_second_moment": {"patience"}}
BOUNDS = {"min_norm": 1e3, "max_norm": 0.5}
# For every argument, another value that must show in the updates of the stream below.
OTHERS = {
    "clip_by_percentile": {"percentile": 50.0, "window": 30, "min_history": 5},
    "auto_clip": {"max_norm": 0.5},
    "autoclip": {"percentile": 50.0, "window": 5, "patience": 3},
    "clip_by_quantile": {"quantile": 0.5, "rate": 0.5, "patience": 10},
    "zclip": {"z_max": 1.0, "decay": 0.5, "warmup": 5, "mode": "mean", "feed": "skip"}
    | {"patience": 60},
    "clip_by_sigma": {"k": 1.0, "window": 26, "feed": "raw", "min_history": 5, "patience": 60},
    "clip_by_ema_ratio": {"ratio": 1.2, "decay": 0.5, "warmup": 2, "patience": 10},
    "adagc": {"ratio": 1.5, "decay": 0.5, "warmup": 5, "max_norm": 0.1, "convention": "paddle"}
    | {"patience": 200, "min_norm": 1e3},
    "clip_by_norm_growth": {"max_growth": 1.5, "floor": 1.0, "patience": 5, "max_norm": 0.1},
    "clip_by_second_moment": {"k": 1.0, "decay": 0.5, "warmup": 2, "floor": 1e3, "feed": "raw"}
    | {"max_norm": 0.1},
    "clippy": {"relative": 0.01, "absolute": 1.0},
    "scale_by_stable_adam": {"b1": 0.5, "b2": 0.5, "eps": 0.5, "max_rms": 0.1},
    "stabilize_gradients": {"decay": 0.1, "norm_decay": 0.5, "bias_correction": False},
}
for name in ("clip_by_percentile", "autoclip", "clip_by_quantile", "zclip", "clip_by_sigma"):
    OTHERS[name] |= BOUNDS | {"measure": LEAF}
OTHERS["clip_by_ema_ratio"] |= BOUNDS
for name in OTHERS.keys() - {"scale_by_stable_adam", "auto_clip"}:
    OTHERS[name].setdefault("measure", TREE)
for values in OTHERS.values():
    values["nonfinite"] = "propagate"


def stream():
    """Gradients of two leaves that vary by themselves, with spikes, a rise and a NaN."""
    random = np.random.default_rng(0)
    norms = np.exp(0.2 * random.normal(size=(240, 2)))
    norms[3] *= 30
    norms[[60, 130]] *= 20
    norms[70:110] *= 4
    norms[125:] *= 40
    norms[150:153, 0] *= 9
    grads = {"w": np.outer(norms[:, 0], [0.6, 0.8]), "b": norms[:, 1:]}
    grads["w"][20, 0] = grads["w"][170, 0] = np.nan
    return {key: jnp.float32(x) for key, x in grads.items()}


@functools.cache
def updates(name, **arguments):
    """What a variant makes of the stream."""
    tx = getattr(oc, name)(**arguments)
    params = {"w": jnp.float32([1.0, -2.0]), "b": jnp.float32([0.5])}

    def step(state, grads):
        out, state = tx.update(grads, state, params)
        return state, out

    return jax.jit(lambda grads: jax.lax.scan(step, tx.init(params), grads)[1])(stream())


@pytest.mark.parametrize("name", DEFAULTS)
def test_defaults_are_those_of_the_papers(name):
    """A default is changed on purpose only."""
    parameters = inspect.signature(getattr(oc, name)).parameters

    assert {key: parameters[key].default for key in DEFAULTS[name]} == DEFAULTS[name]


@pytest.mark.parametrize("name", OTHERS)
def test_every_argument_matters(name):
    """Another value of any argument shows in the updates; the table knows all but axis_name."""
    arguments = set(inspect.signature(getattr(oc, name)).parameters)
    assert set(OTHERS[name]) | ELSEWHERE.get(name, set()) | {"record"} == arguments - {"axis_name"}

    default = [trees.bits(x) for x in updates(name).values()]
    without_effect = [
        argument
        for argument, value in OTHERS[name].items()
        if [trees.bits(x) for x in updates(name, **{argument: value}).values()] == default
    ]
    assert without_effect == []


@pytest.mark.parametrize("name", OTHERS)
def test_record_can_be_left_out(name):
    """With record=False there are no metrics, and the updates are the same."""
    tx = getattr(oc, name)(record=False)
    state = tx.init({"w": jnp.ones(2)})

    assert oc.metrics(state) == {}
    trees.assert_same_bits(updates(name, record=False), updates(name))


def test_patience_with_coordinates_lets_a_rise_through_in_time():
    """clip_by_second_moment passes a rise by 20 after its patience, if it is given one."""
    norms = jnp.ones(1200).at[1100:].set(20)
    for patience, passes in [(30, True), (math.inf, False)]:
        tx = oc.clip_by_second_moment(patience=patience)
        step = lambda state, norm, tx=tx: tx.update(norm[None], state)[::-1]
        _, out = jax.lax.scan(step, tx.init(jnp.ones(1)), norms)
        assert (float(out[1131, 0]) == 20) == passes


def test_impatience_does_not_leave_a_new_level_without_a_limit():
    """A patience shorter than the warm-up is as long as that."""
    norms = np.r_[np.ones(60), np.full(40, 20.0)]
    norms[75] = 1e4
    for tx in (oc.zclip(patience=3), oc.clip_by_percentile(patience=3)):
        state = tx.init(jnp.ones(1))
        step = lambda state, norm, tx=tx: tx.update(norm[None], state)[::-1]
        _, out = jax.lax.scan(step, state, jnp.float32(norms))
        assert float(out[75, 0]) < 100


@pytest.mark.parametrize(
    "name", sorted(set(DEFAULTS) - {"auto_clip", "clippy", "stabilize_gradients"})
)
def test_a_first_norm_of_1e20_is_no_update(name):
    """Where there is no limit yet, a norm whose square overflows is dropped."""
    tx = getattr(oc, name)()
    grads = {"w": jnp.float32([1e20, 1e20])}

    out, _ = tx.update(grads, tx.init(grads), grads)

    assert not np.any(out["w"])
    assert math.isfinite(float(jnp.sum(out["w"])))
