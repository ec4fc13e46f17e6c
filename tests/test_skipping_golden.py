"""The skip rules of OLMo-core, MaxText and Levanter, in numbers, and that their bugs are absent."""

import functools
import json
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optaxclip as oc
from optaxclip.skipping import skip_step
from optaxclip.threshold.outlier import outlier

GOLDEN = pathlib.Path(__file__).parent / "golden"
LENGTH = 8  # of the windows of the golden runs
STEPS = 300
EPS = float(np.finfo(np.float32).eps)


def _published(window, history, **options):
    rule = outlier(6.0, window=window, min_history=history, start="mean", **options)
    rules = {"norm": rule, "loss": rule, "history": "all", "max_consecutive": math.inf}
    return skip_step(optax.identity(), **rules)


RULES = {
    # OLMo-core and MaxText, whose counts include the current step.
    "olmo": lambda: _published(LENGTH, LENGTH // 2 - 1, min_sigma=0.0),
    "olmo of 128": lambda: _published(128, 63, min_sigma=0.0),
    "levanter": lambda: _published(LENGTH, LENGTH // 2, min_sigma=1e-6, ddof=0),
    "ours": lambda: skip_step(optax.identity()),
    "ours, short": lambda: skip_step(optax.identity(), window=LENGTH),
    "from the mean": lambda: skip_step(optax.identity(), norm=outlier(start="mean")),
}


@functools.cache
def program(name):
    """All steps of a stream under one of the rules."""
    return scanned(RULES[name]())


def scanned(tx):
    """A compiled function of norms and losses that gives the metrics of every step."""

    def step(state, now):
        norm, loss = now
        _, state = tx.update(norm[None], state, value=loss)
        return state, state.skip.metrics

    start = tx.init(jnp.zeros(1))
    return jax.jit(lambda stream: jax.lax.scan(step, start, stream)[1])


def run(rule, norms, losses=None):
    """The metrics of steps of these norms and losses, each an array."""
    losses = np.ones(len(norms)) if losses is None else losses
    # All streams are of one length, so that those under one rule share a program.
    stream = [np.pad(np.float32(x), (0, STEPS - len(x)), "edge") for x in (norms, losses)]
    run = program(rule) if isinstance(rule, str) else scanned(rule)
    return jax.tree.map(lambda x: np.asarray(x)[: len(norms)], run(stream))


def golden(name, case):
    """The rows of a golden run: norms, losses and what was skipped."""
    steps = json.loads((GOLDEN / f"{name}.json").read_text())["cases"][case]["steps"]
    skipped = [row.get("skipped", row.get("step_factor") == 0) for row in steps]
    return *([float(row[x]) for row in steps] for x in ("grad_norm", "loss")), np.array(skipped)


CASES = [
    ("olmo", "olmocore_skip_step", "loss_spike"),
    ("olmo", "olmocore_skip_step", "grad_spike_repeat"),
    ("olmo", "olmocore_skip_step", "early_spike_before_half_window"),
    ("levanter", "levanter_skipstep", "loss_spike"),
    ("levanter", "levanter_skipstep", "grad_spike_repeat"),
    ("levanter", "levanter_skipstep", "early_spike"),
    ("levanter", "levanter_skipstep", "constant_history_std0"),
]


@pytest.mark.parametrize(("rule", "name", "case"), CASES)
def test_golden(rule, name, case):
    """With the settings of a published rule, the same steps are skipped."""
    norms, losses, skipped = golden(name, case)

    assert run(rule, norms, losses).skipped.tolist() == skipped.tolist()


def oracle(values, window, k, *, history, ddof, floor, enters):
    """The rule in float64: the limit of every step, inf where there is none."""
    past, limits = [], []
    for value in values:
        latest = np.array(past[-window:])
        limit = math.inf
        if len(latest) >= history:
            limit = latest.mean() + k * max(latest.std(ddof=ddof), floor * abs(latest.mean()))
        limits.append(limit)
        if enters(value > limit):
            past.append(value)
    return np.array(limits)


@pytest.mark.parametrize("ddof", [0, 1])
@pytest.mark.parametrize("history", ["valid", "all"])
def test_limits_are_those_of_the_formula(ddof, history):
    """Limits of losses of either sign are mean + k sigma in float64, to rounding."""
    rule = outlier(4.0, window=32, min_history=10, start="mean", min_sigma=0.05, ddof=ddof)
    options = {"history": history, "max_consecutive": math.inf}
    compiled = scanned(skip_step(optax.identity(), norm=None, loss=rule, **options))
    rng = np.random.default_rng(0)
    skipped = 0
    for shift in (0.0, -3.0, 50.0, -300.0):  # the floor holds for the last
        spread = rng.choice([1.0, 20.0], STEPS, p=[0.95, 0.05])
        losses = np.float32(shift + rng.normal(size=STEPS) * spread)
        found = compiled([np.ones(STEPS, np.float32), losses])

        enters = lambda skipped: history == "all" or not skipped
        expected = oracle(losses, 32, 4.0, history=10, ddof=ddof, floor=0.05, enters=enters)
        # Sums of 32 losses, in units of the largest.
        scale = 32 * EPS * (1 + np.abs(losses).max())
        np.testing.assert_allclose(found.loss_limit, expected, rtol=0, atol=scale)
        skipped += found.skipped.sum()
    assert skipped > 9


def masking():
    """The stream of the golden trace: norms of N(1, 0.05), from step 128 on every fifth is 10."""
    rng = np.random.default_rng(0)
    tail = np.full((12, 5), 10.0)
    norms = rng.normal(1, 0.05, size=128)
    tail[:, 1:] = rng.normal(1, 0.05, size=(12, 4))
    return np.r_[norms, tail.ravel()]


def test_golden_masking_of_spikes_that_are_learned():
    """With history="all", limits walk up as in the trace, until the fifth same spike passes."""
    trace = json.loads((GOLDEN / "skip_step_masking.json").read_text())["cases"]["trace"]

    found = run("olmo of 128", masking())

    spikes = slice(128, None, 5)
    assert found.skipped[spikes].tolist() == [row[2] for row in trace]
    expected = [row[1] for row in trace]
    # The trace has no more spikes than it shows; sums of 128 norms up to 10.
    np.testing.assert_allclose(found.limit[spikes], expected, rtol=128 * EPS)


def test_identical_spikes_do_not_mask_themselves():
    """By default no spike enters the history, so that the twelfth is skipped as the first was."""
    found = run("ours", masking())

    assert found.skipped[128::5].all()
    assert found.skipped.sum() == len(found.skipped[128::5])
    assert found.limit.max(where=np.isfinite(found.limit), initial=0) < 2


@pytest.mark.parametrize("rule", ["olmo", "levanter", "ours, short"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["norm", "loss"])
def test_one_nan_does_not_poison_a_window(rule, bad, where):
    """A bad norm or loss is skipped, and none after it, whatever enters the history."""
    norms, losses, published = golden("olmocore_skip_step", "nan_loss_poison")
    assert published.sum() == 9
    losses = [2.8 if math.isnan(x) else x for x in losses]
    (norms if where == "norm" else losses)[10] = bad

    found = run(rule, norms, losses)

    assert found.skipped.tolist() == [0] * 10 + [1] + [0] * 10
    assert found.nonfinite_steps[-1] == 1


@pytest.mark.parametrize("rule", ["olmo", "ours, short"])
def test_a_constant_history_skips_no_rounding(rule):
    """After losses without any deviation, one that is larger by a rounding is taken."""
    norms, losses, published = golden("olmocore_skip_step", "constant_history_std0")
    assert published.sum() == 1

    assert not run(rule, norms, losses).skipped.any()


def test_a_first_norm_of_25_does_not_lock():
    """Norms that begin at 25, or rise there, are not skipped for ever, as by an average from 1."""
    assert not run("ours", np.full(200, 25.0)).skipped.any()
    assert not run("ours", np.zeros(200)).skipped.any()
    found = run("ours", np.r_[np.ones(100), np.full(200, 25.0)])
    assert found.skipped.sum() == found.skipped[100:125].sum() == 25


@pytest.mark.parametrize("value", [1.0, 0.1, 3.3e-5, 0.0, -0.7])
def test_constant_values_do_not_lock(value):
    """Where sigma is 0, no value equal to all before it is above the limit."""
    norms = np.full(300, abs(value))
    for rule in ("ours", "olmo", "levanter"):
        assert not run(rule, norms, np.full(300, value)).skipped.any()


def test_a_spike_among_the_first_does_not_set_the_scale():
    """A spike before there is a limit is taken, but cut in the history; with "mean" it is not."""
    norms = np.exp(0.05 * np.random.default_rng(1).normal(size=120))
    norms[10] = 1000.0
    norms[70:120:10] = 20.0

    found = run("ours", norms)
    assert found.skipped.sum() == 5
    assert found.limit[64] < 2
    assert run("from the mean", norms).skipped.sum() == 0


@pytest.mark.parametrize("size", [1e-30, 1e-15, 1e15, 1e18])
def test_sizes_do_not_matter(size):
    """Norms and losses of any size are judged alike."""
    rng = np.random.default_rng(2)
    norms = np.exp(0.1 * rng.normal(size=200))
    norms[[100, 150]] = 9.0
    expected = run("ours", norms, -norms).skipped

    found = run("ours", size * norms, -size * norms).skipped

    assert expected.sum() == 2
    np.testing.assert_array_equal(found, expected)


def test_outlier_is_a_threshold_of_groups():
    """In a clip, each group has a window of its own, and validate_state knows it."""
    tx = oc.clip(oc.measure.leaf_norm(), outlier(3.0, window=6, min_history=2))
    grads = {"a": jnp.array([1.0]), "b": jnp.array([10.0])}
    state = tx.init(grads)
    for factor in (1.0, 1.1, 0.9, 5.0):
        updates, state = tx.update(jax.tree.map(lambda g, f=factor: g * f, grads), state)

    past = np.array([1.0, 1.1, 0.9])
    limit = past.mean() + 3 * past.std(ddof=1)
    np.testing.assert_allclose([updates["a"][0], updates["b"][0] / 10], limit, rtol=16 * EPS)
    assert oc.validate_state(state, like=tx.init(grads)) == []
