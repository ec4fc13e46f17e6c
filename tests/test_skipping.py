"""Whole-step skipping: what is skipped leaves nothing behind, wherever it runs."""

import functools
import math
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
import trees
from flax import linen, nnx
from flax.training.train_state import TrainState
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from kinds import HUGE, NO_NUMBER, NO_SCALAR, assert_refused

import optaxclip as oc
from optaxclip.record import SkipMetrics
from optaxclip.skipping import SkipState, skip_step
from optaxclip.threshold.outlier import outlier

NAN, INF = math.nan, math.inf
PARAMS = {"kernel": trees.normal(8, 2), "bias": trees.normal(8)}
GRADS = {"kernel": trees.normal(8, 2, seed=1), "bias": trees.normal(8, seed=1)}
NORM = float(optax.tree.norm(GRADS))
FIXED = functools.partial(skip_step, norm=10 * NORM, loss=None)


@pytest.fixture(autouse=True)
def standard_promotion(hostile):
    """Optax's optimizers mix dtypes, and Flax ranks, themselves."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def adamw():
    """An optimizer that has moments, a count, a schedule and weight decay."""
    return optax.adamw(optax.cosine_decay_schedule(0.1, 1000))


def times(factor, grads=GRADS):
    """Gradients times a number, or all of that number if it is not finite."""
    return jax.tree.map(lambda g: g * jnp.asarray(factor, g.dtype), grads)


def steps(tx, factors, losses=None, params=PARAMS):
    """Parameters and states after each step, eagerly compiled once."""
    update, state, out = jax.jit(tx.update), tx.init(params), []
    for i, factor in enumerate(factors):
        extra = {} if losses is None else {"value": jnp.float32(losses[i])}
        updates, state = update(times(factor), state, params, **extra)
        params = optax.apply_updates(params, updates)
        out.append((params, state))
    return out


def skipped(out):
    """Which of the steps were skipped."""
    return [int(state.skip.metrics.skipped) for _, state in out]


def without_counters(state):
    """A state, but for what only counts or shows."""
    return state.skip.memory, state.inner


# ------------------------------------------------------------------ what a step leaves behind


def trained(tx, *streams):
    """Parameters and state after each stream of gradients and losses, ten steps in a program."""

    def step(carry, now):
        params, state = carry
        grads, loss = now
        updates, state = tx.update(grads, state, params, value=loss)
        return (optax.apply_updates(params, updates), state), None

    train = jax.jit(lambda carry, tens: jax.lax.scan(step, carry, tens)[0])
    for stream in streams:
        tens = jax.tree.map(lambda x: np.asarray(x).reshape(-1, 10, *x.shape[1:]), stream)
        carry = PARAMS, tx.init(PARAMS)
        for i in range(len(tens[1])):
            carry = train(carry, jax.tree.map(lambda x, i=i: x[i], tens))
        yield carry


def test_1000_steps_with_bad_ones_end_as_the_good_ones_alone():
    """Parameters, moments and histories are those of a run that never saw the bad 3 % of steps."""
    rng = np.random.default_rng(0)
    noise = np.exp(0.2 * rng.normal(size=1000)).astype(np.float32)
    stream = jax.tree.map(
        lambda g: g[None] * noise.reshape(-1, *[1] * g.ndim) + 0.1 * trees.normal(1000, *g.shape),
        GRADS,
    )
    losses = jnp.float32(2 + 0.1 * rng.normal(size=1000) - np.arange(1000) / 1000)
    late = 100 + rng.permutation(900)
    bad = {"nan": late[:10], "inf": [0, 1, 70], "huge": late[10:20], "loss": late[20:27]}
    broken = dict(stream)
    broken["kernel"] = broken["kernel"].at[bad["nan"], 3, 1].set(NAN)
    broken["bias"] = broken["bias"].at[np.array(bad["inf"]), 0].set(-INF)
    broken = jax.tree.map(lambda g: g.at[bad["huge"]].multiply(1000), broken)
    broken_losses = losses.at[bad["loss"][:3]].set(NAN).at[bad["loss"][3:]].set(40.0)
    good = np.setdiff1d(np.arange(1000), np.concatenate(list(bad.values())))
    tx = skip_step(adamw())

    stream, losses = jax.tree.map(lambda x: x[good], (stream, losses))
    seen = trained(tx, (broken, broken_losses), (stream, losses))
    (params, state), (expected, alone) = seen

    trees.assert_same_bits(params, expected)
    trees.assert_same_bits(without_counters(state), without_counters(alone))
    found, other = state.skip.metrics, alone.skip.metrics
    assert (found.steps, found.skipped_steps, found.nonfinite_steps) == (1000, 30, 16)
    assert (other.steps, other.skipped_steps, found.gave_way_steps) == (970, 0, 0)
    # The optimizer itself, in a program of its own, whose roundings Adam adds up.
    [(bare, bare_state)] = trained(optax.with_extra_args_support(adamw()), (stream, losses))
    trees.assert_close(params, bare, rtol=1e-3, atol=1e-4)
    assert optax.tree.get(state.inner[0], "count") == optax.tree.get(bare_state[0], "count") == 970


def test_a_skipped_step_changes_no_bit():
    """Zeros of both signs, the smallest normal numbers, NaN: parameters stay as they are."""
    kinds = {
        jnp.dtype(kind).name: [0.0, -0.0, 1.0, -jnp.finfo(kind).tiny, INF, NAN]
        for kind in (jnp.float32, jnp.bfloat16, jnp.float16)
    }
    parts = kinds["float32"]
    kinds["complex64"] = [complex(x, y) for x in parts for y in parts]
    params = {name: jnp.asarray(np.array(x), name) for name, x in kinds.items()}
    grads = jax.tree.map(lambda x: jnp.zeros_like(x).at[2].set(NAN), params)
    tx = skip_step(optax.trace(0.9))

    def step(params, state):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    _, before = tx.update(jax.tree.map(jnp.ones_like, params), tx.init(params), params)
    for run in (step, jax.jit(step)):
        after, state = run(params, before)
        trees.assert_same_bits(after, params)
        trees.assert_same_bits(state.inner, before.inner)


def test_the_norm_is_that_before_a_clip_inside_which_sees_no_skipped_step():
    """The clip inside counts the steps that are taken alone, and both are read by their places."""
    tx = FIXED(optax.chain(oc.clip_by_global_norm(0.5), optax.adam(0.1)))

    out = steps(tx, [1.0, NAN, 20.0, 1.0])

    found = {key: float(value) for key, value in oc.metrics(out[-1][1]).items()}
    assert found["skip/norm"] == found["inner/0/norm"] == pytest.approx(NORM, rel=1e-6)
    assert found["inner/0/clipped_norm"] == pytest.approx(0.5, rel=1e-6)
    assert (found["skip/steps"], found["inner/0/steps"]) == (4, 2)
    assert (found["skip/skipped_steps"], found["inner/0/nonfinite_steps"]) == (2, 0)
    assert skipped(out) == [0, 1, 1, 0]


def test_inner_states_of_any_kind_stay():
    """Random keys, masked nodes and what is no array are kept, or go on, as they are."""
    noise = optax.add_noise(0.1, 0.5, key=jax.random.key(0))
    masked = optax.masked(optax.trace(0.9), {"kernel": True, "bias": False})
    tx = FIXED(optax.chain(noise, masked, optax.scale_by_learning_rate(0.1)))

    out = steps(tx, [1.0, NAN, 1.0])
    alone = steps(tx, [1.0, 1.0])

    keyless = lambda tree: jax.tree.map(
        lambda x: jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x,
        tree,
    )
    trees.assert_same_bits(keyless(out[1][1].inner), keyless(out[0][1].inner))
    trees.assert_same_bits(keyless(out[2][1].inner), keyless(alone[1][1].inner))


def test_leaves_that_are_no_floats():
    """None, integers and float0 pass; an update of an integer is 0 in a skipped step."""
    other = np.zeros((2,), jax.dtypes.float0)
    grads = {"w": jnp.array([NAN]), "none": None, "n": jnp.arange(1, 3), "float0": other}
    tx = skip_step(optax.identity())

    updates, state = tx.update(grads, tx.init(grads))

    assert updates["float0"] is other
    assert updates["none"] is None
    np.testing.assert_array_equal(updates["n"], [0, 0])
    assert str(updates["w"]) == "[-0.]"
    tx = FIXED(optax.identity())
    for empty in ({}, (), {"n": jnp.arange(3)}):
        updates, state = tx.update(empty, tx.init(empty))
        trees.assert_same_bits(updates, empty)
        assert int(state.skip.metrics.skipped) == 0


# ------------------------------------------------------------------------------------- rules


def test_a_bad_loss_alone_skips():
    """Losses that are not finite or outliers skip steps of good gradients; low ones do not."""
    losses = [3.0, 2.9, 3.1, 3.0, NAN, 9.0, -9.0, INF, 3.0]
    out = steps(skip_step(optax.sgd(0.1), window=6), [1.0] * 9, losses)

    assert skipped(out) == [0, 0, 0, 0, 1, 1, 0, 1, 0]
    found = out[5][1].skip.metrics
    assert (found.loss, found.consecutive, found.nonfinite_steps) == (9.0, 2, 1)
    assert 3 < found.loss_limit < 9
    none = steps(skip_step(optax.sgd(0.1), window=6, loss=None), [1.0] * 9, losses)
    assert skipped(none) == [0, 0, 0, 0, 1, 0, 0, 1, 0]


def test_without_a_loss_norms_are_judged_alone():
    """Without `value`, the metrics show -inf for the loss, and its history stays as it is."""
    tx = skip_step(optax.sgd(0.1), window=2)
    out = steps(tx, [1.0, 1.0, 1.0, 100.0])

    assert skipped(out) == [0, 0, 0, 1]
    assert out[-1][1].skip.metrics.loss == -np.inf
    trees.assert_same_bits(out[-1][1].skip.memory.loss, tx.init(PARAMS).skip.memory.loss)


def test_the_loss_reaches_the_transformation_inside():
    """`value` and other extra arguments are passed on."""

    def update(updates, state, params=None, *, value, other):
        return times(value * other, updates), state

    tx = skip_step(optax.GradientTransformationExtraArgs(lambda params: (), update))
    updates, _ = tx.update(GRADS, tx.init(PARAMS), PARAMS, value=2.0, other=3.0)
    trees.assert_close(updates, times(6.0), rtol=1e-6)


LIMITS = {
    "number": (2 * NORM, [0, 1, 0, 1]),
    "array": (jnp.float32(2 * NORM), [0, 1, 0, 1]),
    "schedule": (lambda step: 2 * NORM + 1e3 * (step >= 2), [0, 1, 0, 0]),
    "threshold": (oc.threshold.growth(2.0), [0, 1, 0, 1]),
    "none": (None, [0, 0, 0, 0]),
    "inf": (INF, [0, 0, 0, 0]),
}


@pytest.mark.parametrize(("norm", "expected"), LIMITS.values(), ids=LIMITS)
def test_any_limit_is_a_rule(norm, expected):
    """A number, an array, a schedule that counts skipped steps, a threshold that learns of none."""
    assert skipped(steps(skip_step(optax.sgd(0.1), norm=norm), [1.0, 3.0, 1.0, 3.0])) == expected


@pytest.mark.parametrize("loss", [-1.0, lambda step: jnp.float32(-1.0)])
def test_limits_of_losses_may_be_negative(loss):
    """A log-likelihood of a density is a loss like others."""
    out = steps(skip_step(optax.sgd(0.1), norm=None, loss=loss), [1.0] * 3, [-1.5, -0.5, -1.0])
    assert skipped(out) == [0, 1, 0]


def test_one_group_above_its_limit_is_enough():
    """With a norm per leaf, a leaf that grows skips the whole step, and no leaf learns of it."""
    tx = skip_step(optax.sgd(0.1), window=4, measure=oc.measure.leaf_norm())
    state = tx.init(PARAMS)
    for factor in (1.0, 1.1, 0.9, 1.0, 30.0, 1.0):
        grads = {**GRADS, "bias": 0.01 * factor * GRADS["bias"]}
        updates, state = tx.update(grads, state, PARAMS)
        assert int(state.skip.metrics.skipped) == (factor == 30)
        assert bool(jnp.all(updates["kernel"] == 0)) == (factor == 30)
    assert state.skip.memory.norm.values.max() < 2 * NORM


def test_metrics_show_the_largest_norm_and_the_smallest_limit():
    """Of groups in several arrays, each with a limit of its own, the two extremes are shown."""
    tx = skip_step(
        optax.identity(), norm=oc.threshold.growth(2.0), measure=oc.measure.unit_norm(axis=1)
    )
    grads = {"a": jnp.array([[3.0, 4.0], [1.5, 2.0]]), "b": jnp.array([[6.0, 8.0], [0.3, 0.4]])}
    for tree in (grads, dict(zip("ab", reversed(grads.values()), strict=True))):
        state = tx.init(tree)
        for _ in range(2):
            _, state = tx.update(tree, state)
        found = state.skip.metrics
        assert found.norm == pytest.approx(10.0, rel=1e-6)
        assert found.limit == pytest.approx(1.0, rel=1e-6)


@pytest.mark.parametrize("rule", ["norm", "loss"])
def test_a_limit_that_is_nan_skips_and_teaches_nothing(rule):
    """Where k is traced and NaN for a step, it is skipped, and no history learns of it."""

    def make(k):
        judged_by = {"norm": None, "loss": None, rule: outlier(jnp.float32(k), window=4)}
        return skip_step(optax.identity(), **judged_by, history="all")

    good, bad = make(6.0), make(NAN)
    state = good.init(PARAMS)
    for loss in (1.0, 1.1, 0.9):
        _, state = good.update(times(loss), state, PARAMS, value=loss)
    _, after = bad.update(GRADS, state, PARAMS, value=1.0)

    assert (state.skip.metrics.skipped, after.skip.metrics.skipped) == (0, 1)
    trees.assert_same_bits(after.skip.memory[:2], state.skip.memory[:2])
    assert getattr(state.skip.memory, rule).seen == 3


def test_huge_losses_are_judged_and_not_learned():
    """A loss of 1e25 is taken while there is no limit, and skipped above one; none is learned."""
    losses = [1e25, 1.0, 1.1, -1e25, 0.9, 1.0, 1e25, 1.0, 9.0]
    out = steps(skip_step(optax.sgd(0.1), window=4, history="all"), [1.0] * 9, losses)

    assert skipped(out) == [0, 0, 0, 0, 0, 0, 1, 0, 1]
    assert [int(state.skip.memory.loss.seen) for _, state in out] == [0, 1, 2, 2, 3, 4, 4, 4, 4]
    assert jnp.abs(out[-2][1].skip.memory.loss.values).max() < 2


ORDERS = {
    "percentile": oc.threshold.percentile(90.0),
    "quantile": oc.threshold.quantile(0.9),
}


@functools.partial(jax.jit, static_argnums=0)
def found_skips(tx, norms, losses):
    """Which steps of a stream are skipped, and the last state."""

    def step(state, now):
        _, state = tx.update(now[0][None], state, value=now[1])
        return state, state.skip.metrics.skipped

    return jax.lax.scan(step, tx.init(jnp.ones(1)), (norms, losses))[::-1]


@pytest.mark.parametrize("rule", ORDERS.values(), ids=ORDERS)
def test_limits_below_many_values_learn_from_all(rule):
    """With history="all" the share above a quantile is skipped; else ever more, as is said."""
    norms = jnp.float32(np.exp(0.1 * np.random.default_rng(0).normal(size=500)))
    make = lambda history: skip_step(optax.identity(), norm=rule, loss=None, history=history)

    share, ratchet = (
        int(found_skips(make(history), norms, jnp.ones(500))[0].sum())
        for history in ("all", "valid")
    )

    # 3 deviations of a binomial, and what the rule takes to start.
    assert 0.05 * 500 < share < 0.15 * 500
    assert ratchet > 0.25 * 500


SIGNED = {
    "outlier": (outlier(6.0), []),
    "sigma": (oc.threshold.sigma(6.0), ["skip/memory/loss"]),
    "zscore": (oc.threshold.zscore(6.0), ["skip/memory/loss/first", "skip/memory/loss/mean"]),
}


@pytest.mark.parametrize(("rule", "faults"), SIGNED.values(), ids=SIGNED)
def test_thresholds_that_take_losses_of_any_sign(rule, faults):
    """Negative losses are judged as positive ones; only windows of norms are then reported."""
    noise = 0.05 * np.random.default_rng(0).normal(size=300)
    noise[200] = 1.0
    tx = skip_step(optax.identity(), norm=None, loss=rule)
    for middle in (1.0, 0.0, -1.0):
        found, state = found_skips(tx, jnp.ones(300), jnp.float32(middle + noise))
        assert np.flatnonzero(found).tolist() == [200]
    places = {problem.place.rsplit("/norms")[0] for problem in oc.validate_state(state)}
    assert sorted(places) == faults


@pytest.mark.parametrize("factor", [2.0**80, 0.0, 1e-33])
def test_norms_that_teach_nothing(factor):
    """Before there is a limit, a norm >= 2^64 is skipped; tiny ones are taken, and not learned."""
    out = steps(skip_step(optax.sgd(0.1)), [factor, 1.0])

    assert skipped(out) == [int(factor > 1), 0]
    assert out[-1][1].skip.memory.norm.seen == 1


# ---------------------------------------------------------------------------------- giving way


def test_a_lasting_rise_gives_way():
    """After max_consecutive steps above the limit, one is taken, and the rule begins anew."""
    factors = [1.0] * 6 + [50.0] * 9 + [1.0]
    out = steps(skip_step(optax.sgd(0.1), window=4, max_consecutive=3), factors)

    assert skipped(out) == [0] * 6 + [1] * 3 + [0] * 7
    found = [state.skip.metrics for _, state in out]
    assert [int(m.consecutive) for m in found[5:10]] == [0, 1, 2, 3, 0]
    assert [int(m.gave_way_steps) for m in found[8:]] == [0] + [1] * 7
    assert found[9].norm == pytest.approx(50 * NORM, rel=1e-6)
    assert np.isfinite(found[14].limit)


def test_what_is_not_finite_is_never_taken():
    """100 bad steps are skipped, and do not make an outlier after them a new level."""
    factors = [1.0] * 4 + [NAN, INF] * 50 + [50.0, NAN, 50.0, 50.0, 50.0]
    tx = skip_step(optax.adam(0.1), window=4, max_consecutive=3)
    out = steps(tx, factors)

    assert skipped(out) == [0] * 4 + [1] * 104 + [0]
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(out[-1][0]))
    assert int(out[103][1].skip.metrics.consecutive) == 100
    trees.assert_same_bits(out[103][0], out[3][0])


def test_a_fixed_limit_gives_way_to_one_step_at_a_time():
    """A limit that does not learn lets one in max_consecutive + 1 pass, or none for math.inf."""
    patient = [FIXED(optax.sgd(0.1), max_consecutive=most) for most in (2, INF, jnp.int32(2))]
    found = [skipped(steps(tx, [20.0] * 7)) for tx in patient]
    assert found == [[1, 1, 0, 1, 1, 0, 1], [1] * 7, [1, 1, 0, 1, 1, 0, 1]]


def test_only_the_rule_that_is_wrong_forgets():
    """When losses rise for good, norms are still judged by their past."""
    losses = [1.0, 1.1, 0.9, 1.0] + [50.0] * 6
    tx = skip_step(optax.sgd(0.1), window=4, max_consecutive=3)
    out = steps(tx, [1.0] * 9 + [100.0], losses)

    assert skipped(out) == [0] * 4 + [1] * 3 + [0] * 2 + [1]
    assert int(out[7][1].skip.memory.loss.seen) == 0
    assert int(out[7][1].skip.memory.norm.seen) == 4


def test_counters_stay_at_the_largest_integer():
    """No counter turns negative."""
    last = jnp.int32(2**31 - 1)
    tx = FIXED(optax.sgd(0.1))
    state = tx.init(PARAMS)
    full = dict.fromkeys(SkipMetrics._fields[5:], last)
    record = state.skip._replace(metrics=state.skip.metrics._replace(**full))
    _, state = tx.update(times(NAN), state._replace(skip=record), PARAMS)
    assert all(getattr(state.skip.metrics, field) == last for field in full)


# ------------------------------------------------------------------------- transformations of JAX

STREAM = (1.0, 1.2, NAN, 0.8, 1.0, 90.0, 1.1)
SHORT = functools.partial(skip_step, window=4)


@pytest.fixture(scope="module")
def jitted():
    """The steps of a stream, with a NaN and an outlier in it."""
    with jax.numpy_dtype_promotion("standard"):
        out = steps(SHORT(optax.adam(0.1)), STREAM)
    assert skipped(out) == [0, 0, 1, 0, 0, 1, 0]
    return out


def test_eager_and_scan_are_the_jitted_steps(jitted):
    """Outside jit and in a scan, the same steps are taken."""
    tx = SHORT(optax.adam(0.1))

    def step(carry, factor):
        params, state = carry
        updates, state = tx.update(times(factor), state, params)
        return (optax.apply_updates(params, updates), state), None

    start = (PARAMS, tx.init(PARAMS))
    scanned, _ = jax.lax.scan(step, start, jnp.float32(STREAM))
    eager = start
    for factor in STREAM:
        eager, _ = step(eager, factor)

    for found in (scanned, eager):
        trees.assert_close(found, jitted[-1], rtol=1e-5, atol=1e-6)


def test_one_compilation_and_donated_buffers():
    """The state has one type from init on, and gradients, parameters and state can be donated."""
    tx = SHORT(adamw())

    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    step = jax.jit(step, donate_argnums=(0, 1))
    params, state = jax.tree.map(jnp.copy, PARAMS), tx.init(PARAMS)
    kinds = [jax.typeof(x) for x in jax.tree.leaves(state)]
    for factor in STREAM:
        params, state = step(params, state, times(factor))

    assert step._cache_size() == 1
    assert [jax.typeof(x) for x in jax.tree.leaves(state)] == kinds
    assert not any(kind.weak_type for kind in kinds)
    assert int(state.skip.metrics.skipped_steps) == 2


def test_vmap_judges_each_model(jitted):
    """In an ensemble, one model skips and the others go on."""
    tx = SHORT(optax.adam(0.1))
    twice = lambda tree: jax.tree.map(lambda x: jnp.stack([x, x]), tree)
    state, params = jax.vmap(tx.init)(twice(PARAMS)), twice(PARAMS)
    update = jax.jit(jax.vmap(tx.update))
    for factor in STREAM:
        grads = jax.tree.map(lambda *x: jnp.stack(x), times(factor), times(1.0))
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)

    first, second = (jax.tree.map(lambda x, i=i: x[i], (params, state)) for i in (0, 1))
    trees.assert_close(first, jitted[-1], rtol=1e-5, atol=1e-6)
    assert int(second[1].skip.metrics.skipped_steps) == 0


@pytest.mark.parametrize("wrap", [lambda f: f, jax.checkpoint], ids=["plain", "remat"])
def test_derivatives_are_those_of_the_step_that_is_taken(wrap):
    """Through a taken step the derivative is that of the inner one, through a skipped one 0."""
    tx, inner = FIXED(optax.adam(0.1)), optax.adam(0.1)

    def moved(tx, factor):
        _, state = tx.update(GRADS, tx.init(PARAMS), PARAMS)
        grads = jax.tree.map(lambda g: g * factor, GRADS)
        return optax.tree.vdot(GRADS, tx.update(grads, state, PARAMS)[0])

    slopes = [jax.grad(wrap(functools.partial(moved, each))) for each in (tx, inner)]
    both = jax.jit(lambda x: [slope(x) for slope in slopes])

    np.testing.assert_allclose(*both(jnp.float32(0.7)), rtol=1e-4)
    assert both(jnp.float32(NAN))[0] == 0
    assert both(jnp.float32(100.0))[0] == 0
    assert np.isfinite(both(jnp.float32(0.0))[0])


@pytest.mark.parametrize("inner", [optax.scale_by_trust_ratio(), optax.scale_by_rms()])
def test_derivatives_by_the_parameters_are_those_of_no_step(inner):
    """Through a skipped step parameters pass as they are, whatever is singular inside at 0."""
    tx = skip_step(inner)

    def moved(params, bad):
        grads = times(jnp.where(bad, NAN, 1.0))
        updates, _ = tx.update(grads, tx.init(PARAMS), params)
        return optax.tree.sum(optax.apply_updates(params, updates))

    slope = jax.jit(jax.grad(moved))

    trees.assert_same_bits(slope(PARAMS, True), jax.tree.map(jnp.ones_like, PARAMS))
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(slope(PARAMS, False)))


def test_bad_traced_numbers_flip_no_sign():
    """Where k, a limit or max_consecutive is traced and bad, steps are skipped or taken as are."""

    @jax.jit
    def shares(bad):
        """What is left of the gradients, over the steps of a short stream."""
        made = [
            SHORT(optax.sgd(1.0), k=bad),
            skip_step(optax.sgd(1.0), norm=bad, loss=None),
            skip_step(optax.sgd(1.0), norm=None, loss=bad),
            SHORT(optax.sgd(1.0), max_consecutive=bad),
        ]

        def step(tx, state, factor):
            update, state = tx.update(times(factor), state, PARAMS, value=1.0)
            return state, update["bias"] / (-factor * GRADS["bias"])

        factors = jnp.float32([1.0, 1.1, 0.9, 1.5, 1.0])
        return [
            jax.lax.scan(functools.partial(step, tx), tx.init(PARAMS), factors)[1] for tx in made
        ]

    for bad in (NAN, -1.0, -INF):
        assert all(np.isin(np.round(share, 5), [0.0, 1.0]).all() for share in shares(bad))


# ----------------------------------------------------------------------------- wrappers, frameworks


def test_around_multi_steps_a_bad_microbatch_is_left_out():
    """The mean is that of the good microbatches, and the NaN does not stay in it."""
    inner = optax.MultiSteps(optax.sgd(1.0), 2).gradient_transformation()
    out = steps(FIXED(inner), [1.0, NAN, 3.0, 1.0])

    trees.assert_same_bits(out[1][1].inner, out[0][1].inner)
    expected = jax.tree.map(lambda p, g: p - 2 * g, PARAMS, GRADS)
    trees.assert_close(out[2][0], expected, rtol=1e-5, atol=1e-6)


def test_inside_multi_steps_the_mean_is_judged():
    """A step is one of the accumulated gradients, and the loss is that of the last microbatch."""
    tx = optax.MultiSteps(SHORT(optax.sgd(1.0)), 2).gradient_transformation()
    update, state = jax.jit(tx.update), tx.init(PARAMS)
    for factor in (1.0, 1.0, 1.1, 0.9, 80.0, 1.0, 1.0, 1.0):
        updates, state = update(times(factor), state, PARAMS, value=jnp.float32(1.0))

    found = oc.metrics(state)
    assert (int(found["steps"]), int(found["skipped_steps"]), int(found["skipped"])) == (4, 1, 0)
    trees.assert_close(updates, times(-1.0), rtol=1e-5, atol=1e-6)


def test_inject_hyperparams_around_and_inside():
    """k and max_consecutive may be injected, and injected schedules inside skip with the step."""
    around = optax.inject_hyperparams(skip_step)(optax.sgd(1.0), k=6.0, norm=10 * NORM)
    state = around.init(PARAMS)
    assert set(state.hyperparams) >= {"k", "norm", "max_consecutive"}
    inside = FIXED(optax.inject_hyperparams(optax.sgd)(lambda step: 1.0 + step))
    for tx in (around, inside):
        state = tx.init(PARAMS)
        for factor in (1.0, NAN, 20.0):
            updates, state = jax.jit(tx.update)(times(factor), state, PARAMS, value=1.0)
            assert bool(jnp.all(updates["bias"] == 0)) == (factor != 1)
    assert int(state.inner.count) == 1


def test_flax_train_state():
    """A Linen TrainState keeps its parameters in a skipped step; the loss reaches it by `value`."""
    model, x = linen.Dense(2), trees.normal(16, 4)
    params = model.init(jax.random.key(0), x)["params"]
    momentum = optax.sgd(0.1, momentum=0.9)
    tx = skip_step(optax.chain(oc.clip_by_global_norm(1.0), momentum), norm=100.0, loss=50.0)
    state = TrainState.create(apply_fn=model.apply, params=params, tx=tx)

    @jax.jit
    def step(state, scale):
        loss = lambda p: scale * jnp.mean(state.apply_fn({"params": p}, x) ** 2)
        value, grads = jax.value_and_grad(loss)(state.params)
        updates, opt_state = state.tx.update(grads, state.opt_state, state.params, value=value)
        return state.replace(params=optax.apply_updates(state.params, updates), opt_state=opt_state)

    first = step(state, 1.0)
    for scale in (NAN, 1e6):
        again = step(first, scale)
        trees.assert_same_bits(again.params, first.params)
        trees.assert_same_bits(again.opt_state.inner, first.opt_state.inner)
        assert int(oc.metrics(again)["skip/skipped"]) == 1
    default = TrainState.create(apply_fn=model.apply, params=params, tx=skip_step(momentum))
    bad = default.apply_gradients(grads=jax.tree.map(lambda p: p * NAN, params))
    trees.assert_same_bits(bad.params, params)


def test_nnx_optimizer():
    """An nnx.Optimizer takes the loss by `value`, and keeps the model in a skipped step."""
    model, x = nnx.Linear(4, 2, rngs=nnx.Rngs(0)), trees.normal(16, 4)
    optimizer = nnx.Optimizer(model, skip_step(adamw(), norm=100.0, loss=50.0), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, scale):
        loss, grads = nnx.value_and_grad(lambda m: scale * jnp.mean(m(x) ** 2))(model)
        optimizer.update(model, grads, value=loss)

    for scale in (1.0, NAN, 1e6, 1.0):
        before = jax.tree.map(jnp.copy, nnx.as_pure(nnx.state(model)))
        step(model, optimizer, scale)
        after = nnx.as_pure(nnx.state(model))
        same = all(
            trees.bits(a) == trees.bits(b)
            for a, b in zip(*map(jax.tree.leaves, (before, after)), strict=True)
        )
        assert same == (scale != 1.0)
    found = oc.metrics(optimizer)
    assert (int(found["steps"]), int(found["skipped_steps"])) == (4, 2)


def test_states_are_stored_and_restored(tmp_path, jitted):
    """Pickled, and by Orbax into the shape of a new state, a state has the bits that it had."""
    state, tx = jitted[-1][1], SHORT(optax.adam(0.1))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "state", jax.eval_shape(tx.init, PARAMS))
    trees.assert_same_bits(restored, state)
    trees.assert_same_bits(pickle.loads(pickle.dumps(state)), state)  # noqa: S301


def test_validate_state_knows_it(jitted):
    """A state of real steps has no problem; a broken one says where, and is repaired."""
    tx, state = SHORT(optax.adam(0.1)), jitted[-1][1]
    assert oc.validate_state(state) == oc.validate_state(state, like=tx.init(PARAMS)) == []
    record = state.skip
    losses = record.memory.loss._replace(values=record.memory.loss.values.at[1].set(NAN))
    memory = record.memory._replace(loss=losses, run=type(record.memory.run)(jnp.int32(-1)))
    shown = record.metrics._replace(skipped_steps=jnp.int32(99))
    broken = state._replace(skip=record._replace(memory=memory, metrics=shown))

    problems = oc.validate_state(broken)

    assert [problem.place for problem in problems] == [
        "skip/memory/loss/values",
        "skip/memory/run/length",
        "skip/metrics",
    ]
    mended = oc.validate_state(broken, repair=True)
    assert oc.validate_state(mended) == []
    trees.assert_same_bits(mended.skip.memory.norm, record.memory.norm)
    trees.assert_same_bits(mended.inner, state.inner)
    as_dict = {
        "memory": None,
        "metrics": dict(zip(SkipMetrics._fields, record.metrics, strict=True)),
    }
    assert oc.validate_state({"skip": as_dict, "inner": ()})[0].found == "a dict"


# ------------------------------------------------------------------------------------------ meshes


def placed(tree, mesh):
    """A tree split over the first axis of its leaves."""
    put = lambda x: jax.device_put(x, NamedSharding(mesh, PartitionSpec("x")))
    return jax.tree.map(put, tree)


def one_bad(grads):
    """A NaN in the entries that one device holds."""
    return {**grads, "bias": grads["bias"].at[5].set(NAN)}


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_on_a_mesh_all_devices_decide_alike(axis_type, jitted):
    """Sharded steps are those of one device, a NaN of one shard skips on all, states stay put."""
    mesh = jax.make_mesh((8,), ("x",), axis_types=(axis_type,))
    tx = SHORT(optax.adam(0.1))
    params = placed(PARAMS, mesh)
    state, update = tx.init(params), jax.jit(tx.update)
    where = [x.sharding for x in jax.tree.leaves(state.skip)]
    for factor in STREAM:
        grads = one_bad(times(1.0)) if math.isnan(factor) else times(factor)
        updates, state = update(placed(grads, mesh), state, params)
        params = optax.apply_updates(params, updates)

    assert int(state.skip.metrics.nonfinite_steps) == 1
    trees.assert_close(params, jitted[-1][0], rtol=1e-5, atol=1e-6)
    trees.assert_close(state.inner, jitted[-1][1].inner, rtol=1e-5, atol=1e-6)
    for x, sharding in zip(jax.tree.leaves(state.skip), where, strict=True):
        assert x.sharding.is_equivalent_to(sharding, x.ndim)
    # Adam's count begins on one device; the other state of skip_step is where it stays.
    tx = SHORT(optax.trace(0.9))
    update, state = jax.jit(tx.update), tx.init(params)
    for _ in range(2):
        _, state = update(params, state, params)
    assert update._cache_size() == 1


@pytest.mark.parametrize("tracked", [True, False])
def test_inside_shard_map_all_devices_decide_alike(tracked, jitted):
    """A NaN of one shard skips on all, with a collective inside; losses of shards are averaged."""
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    axis_name = None if tracked else "x"
    measure = oc.measure.global_norm(axis_name=axis_name)
    chain = optax.chain(oc.clip_by_global_norm(INF, axis_name=axis_name), optax.adam(0.1))
    tx = skip_step(chain, window=4, measure=measure, loss=3.0)
    split, whole = PartitionSpec("x"), PartitionSpec()
    like = lambda tree: jax.tree.map(
        lambda x: split if jnp.ndim(x) and x.shape[0] == 8 else whole, tree
    )

    state = tx.init(PARAMS)
    specs = SkipState(jax.tree.map(lambda x: whole, state.skip), like(state.inner))

    @jax.jit
    @functools.partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(split, specs, split, split),
        out_specs=(split, specs),
        check_vma=tracked,
    )
    def step(grads, state, params, losses):
        updates, state = tx.update(grads, state, params, value=losses[0])
        return optax.apply_updates(params, updates), state

    params, even = PARAMS, jnp.ones(8)
    for factor in STREAM:
        grads = one_bad(times(1.0)) if math.isnan(factor) else times(factor)
        params, state = step(grads, state, params, even)
    trees.assert_close(params, jitted[-1][0], rtol=1e-5, atol=1e-6)
    assert int(state.skip.metrics.skipped_steps) == 2

    for losses, mean, skips in ((even.at[0].set(9.0), 2, 0), (even.at[0].set(25.0), 4, 1)):
        _, after = step(times(1.0), state, params, losses)
        assert (after.skip.metrics.loss, after.skip.metrics.skipped) == (mean, skips)
    _, after = step(times(1.0), state, params, even.at[3].set(NAN))
    assert after.skip.metrics.skipped == 1


def test_groups_of_single_devices_skip_everywhere():
    """Where each device has norms of its own, one above its limit skips the step on all."""
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    tx = FIXED(optax.identity(), measure=oc.measure.leaf_norm(axis_name=()))
    split, whole = PartitionSpec("x"), PartitionSpec()

    @jax.jit
    @functools.partial(jax.shard_map, mesh=mesh, in_specs=split, out_specs=(split, whole))
    def step(grads):
        updates, state = tx.update(grads, tx.init(grads), grads)
        return updates, state.skip.metrics

    for bad, nonfinite in ((11 * NORM, 0), (NAN, 1)):
        updates, found = step({**GRADS, "bias": GRADS["bias"].at[5].set(bad)})
        assert (found.skipped, found.nonfinite_steps) == (1, nonfinite)
        assert not any(np.any(update) for update in jax.tree.leaves(updates))
    assert step(GRADS)[1].skipped == 0


# ------------------------------------------------------------------------------------- arguments

RULE = (
    ', "outlier", a Threshold, a number >= 0, a () array or a schedule step -> value (inf: no '
    "limit)"
)
BAD = {
    "inner must be a GradientTransformation, such as optax.adamw(1e-3); got 1": {"inner": 1},
    f"norm must be None{RULE}; got 'sigma'": {"norm": "sigma"},
    f"norm must be None{RULE}; got -1.0": {"norm": -1.0},
    f"norm must be None{RULE}; got True": {"norm": True},
    f"loss must be None{RULE.replace(' >= 0', '')}; got nan": {"loss": NAN},
    "window must be a whole number >= 1; got 0": {"window": 0},
    "k must be a finite number >= 0 or a () array; got inf": {"k": INF},
    "max_consecutive must be a whole number of steps >= 1, inf for never, or a () array; got 0": {
        "max_consecutive": 0
    },
    "history must be one of 'valid', 'all'; got 'none'": {"history": "none"},
    "measure must be a Measure, such as measure.global_norm(); got 'tree'": {"measure": "tree"},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_arguments_are_errors_at_construction(message):
    """An error names the argument, what is allowed, and the value."""
    with pytest.raises((TypeError, ValueError)) as caught:
        skip_step(**{"inner": optax.sgd(0.1)} | BAD[message])
    assert str(caught.value) == message


def test_bad_losses_are_errors():
    """A rule for losses that was asked for wants one, and a loss is a real scalar."""
    tx = skip_step(optax.sgd(0.1), loss=2.0)
    with pytest.raises(ValueError, match=r"call update\(grads, \.\.\., value=loss\)"):
        tx.update(GRADS, tx.init(PARAMS), PARAMS)
    state = tx.init(PARAMS)
    for bad in (*NO_NUMBER, *NO_SCALAR, HUGE):
        if bad.value is None:
            continue
        message = (
            f"value must be a loss, a real number or a () array; got {bad.shown or repr(bad.value)}"
        )
        assert_refused(
            lambda x=bad.value: tx.update(GRADS, state, PARAMS, value=x), bad.error, message
        )


def test_losses_of_every_type_are_float32():
    """Numbers of Python, NumPy and JAX are taken as they are; no integer wraps around."""
    tx = skip_step(optax.identity(), norm=None, loss=None)
    state = tx.init(PARAMS)
    update = lambda x: tx.update(GRADS, state, PARAMS, value=x)[1].skip.metrics.loss
    ones = (1, 1.0, np.float64(1), jnp.bfloat16(1), np.float16(1), np.array(1), jnp.uint8(1))
    large = (2**40, np.int64(2**40), np.uint64(2**40), 2.0**40)
    for value, loss in [*((x, 1) for x in ones), *((x, 2.0**40) for x in large)]:
        found = update(value)
        assert (found, found.dtype) == (loss, jnp.float32)
    assert update(np.uint32(2**32 - 1)) == 2.0**32
    for value in (1e39, np.float64(1e39), INF, np.float32(INF)):
        assert update(value) == INF
    assert np.isnan(update(NAN))
