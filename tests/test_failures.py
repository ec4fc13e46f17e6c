"""The failures that gradient clipping is known for, each shown absent, with its own numbers.

They were measured in other libraries; a number is how often, how long or by how much it went
wrong there. Every test runs over all clippers of the roster that can have the failure:

1. A norm summed in the dtype of the gradients. Only norms of a whole tree add up leaves.
2. Squares that overflow. `scale_by_stable_adam` has to square, as its v is a mean of squares: it
   drops such a step and counts it.
3. to 5. History. What has no memory cannot have these.
6. Explicit meshes. One clipper for each way to group here, all of them in the proof.
7. Programs that run in another order on another host: tests/test_processes.py.
8. Limits that flip signs. A number that is bad for one step is in tests/test_bad_input.py.
9. States that are restored wrong, and used. More of it is in tests/test_validate.py.
10. Sums over many elements. What takes one entry as a group sums nothing up.
11. Dtypes that drift.
12. A spike measured after it was clipped.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import trees
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from roster import EVERY, WARM
from streams import (
    BAD,
    DIRECTION,
    FLOAT32,
    INF,
    LEVEL,
    LIMITS,
    NAN,
    NUMBERS,
    SIGN,
    STEPS,
    called,
    noisy,
    run,
    spiked,
)

import optaxclip as oc
from optaxclip.validate import validate_state

every_variant = pytest.mark.parametrize("name", EVERY)
every_memory = pytest.mark.parametrize("name", [name for name, row in EVERY.items() if row.memory])


# ------------------------------------------------------------------- 1, 2: norms that are wrong


@pytest.mark.parametrize("name", [name for name, row in EVERY.items() if row.groups == "tree"])
@pytest.mark.parametrize("leaves", [512, pytest.param(1000, marks=pytest.mark.proof)])
def test_failure_1_norms_of_many_leaves_in_low_precision(name, leaves):
    """The norm of 512 equal bfloat16 leaves is right, not 29 % low, and that of 1000 not a half."""
    grads = [jnp.full(4, 0.5, jnp.bfloat16)] * leaves
    tx = EVERY[name].make()
    with jax.disable_jit():  # op by op: so many leaves take seconds to compile
        updates, state = tx.update(grads, tx.init(grads))

    metrics = oc.metrics(state)
    # Sums of so many float32 numbers: a few 2^-24.
    assert metrics["norm"] == pytest.approx(leaves**0.5, rel=1e-6, abs=0)
    left = np.linalg.norm(np.float64(jnp.stack(updates).astype(jnp.float32)))
    assert left == pytest.approx(metrics["clipped_norm"], rel=2.0**-8, abs=0)


@pytest.mark.parametrize("name", EVERY)
def test_failure_2_finite_gradients_that_become_zero(name):
    """A norm whose square overflows, 1e20 or 1000 in float16, is clipped and never zeroed."""
    steps, before = run(name, spiked((100, 1e20), (200, 1e3))), run(name, 1.0)

    is_adam = name == "scale_by_stable_adam"
    assert (np.sign(steps.updates[200]) == SIGN).all()
    if is_adam:
        assert steps.nonfinite[99:101].tolist() == [0, 1]
    else:  # next to 1e20, what float16 holds becomes 0
        assert (np.sign(steps.updates[100]) == SIGN)[FLOAT32].all()
        # Of AGC and Clippy, norms are relative. float16 entries are rounded, and stay below 6e4.
        measured = steps.norm[[100, 200]] / before.norm[[100, 200]]
        assert measured[1] == pytest.approx(1e3, rel=1e-3, abs=0)
        assert 0.9 <= measured[0] / 1e20 <= 1.001


@pytest.mark.parametrize("name", ["clip_by_norm", "clip_by_global_norm"])
def test_failure_2_finite_gradients_within_an_enormous_limit(name):
    """A norm of 1e20 under a limit of 2e20 is left alone."""
    steps = run(name, 1e20, max_norm=2e20)

    assert (steps.factor == 1).all()
    np.testing.assert_array_equal(steps.updates[0, :1], np.float32(1e20) * DIRECTION["b"])


# --------------------------------------------------------------------- 3, 4, 5: what history can do


@every_memory
def test_failure_3_a_bad_step_that_freezes_or_blinds(name):
    """After NaN or inf, 128 steps are as if it had not been: good ones pass, a spike does not."""
    when, spike = 150, 170
    norms = spiked((spike, 50 * LEVEL))
    without = run(name, np.append(np.delete(norms, when), LEVEL))

    for value in (NAN, INF, -INF):
        steps = run(name, norms, np.where(np.arange(STEPS) == when, value, 0))

        assert not steps.updates[when].any()
        after = slice(when + 1, when + 129)
        trees.assert_same_bits(steps.updates[after], without.updates[when : when + 128])
        assert steps.factor[spike] < 1
        if not EVERY[name].normalizes:
            assert np.linalg.norm(steps.updates[spike]) <= 4 * LEVEL
            assert np.flatnonzero(steps.factor[after] < 1).tolist() == [spike - when - 1]


@every_memory
def test_failure_4_a_rise_or_a_start_from_zero_that_is_never_learned(name):
    """A rise by 20 for ever, and 40 zeros at the start, do not stop what follows for 2000 steps."""
    rise = LEVEL * np.where(np.arange(STEPS) < 200, 1.0, 20.0)
    zeros = LEVEL * np.where(np.arange(STEPS) < 40, 0.0, 1.0)

    fixed = {"max_norm": np.inf} if name == "auto_clip" else {}  # whose default is below the rise
    risen, started = run(name, rise, **fixed), run(name, zeros)

    # When exactly is in test_adaptive.py; Fira's rule lets a rise by 20 through after 301 steps.
    for steps, passes in [(risen, 510), (started, 40)]:
        assert (np.sign(steps.updates[passes:]) == SIGN[None]).all()
        assert EVERY[name].normalizes or (steps.factor[passes:] == 1).all()


@every_memory
@pytest.mark.parametrize("deviation", [3e-4, 1e-5, 0.0])
def test_failure_5_norms_that_hardly_vary(name, deviation):
    """With a relative deviation of 3e-4 or less no variance turns NaN, and no step is lost."""
    norms = LEVEL * (1 + deviation * np.random.default_rng(0).normal(size=STEPS))

    steps = run(name, norms)

    assert np.isfinite(steps.updates).all()
    assert (np.sign(steps.updates) == SIGN[None]).all()
    if not EVERY[name].normalizes:
        # Clipped by what norms are apart, and by no more. A float16 entry moves by 2^-11.
        apart = np.ptp(norms) / LEVEL + 2.0**-11 if deviation else 0
        assert steps.factor.min() >= 1 - apart


# ----------------------------------------------------- 6: meshes whose axes have explicit types

GROUPED = {row.groups: name for name, row in reversed(EVERY.items())}.values()  # the first ones


@pytest.mark.parametrize("mode", ["eager", "jit"])
@pytest.mark.parametrize(
    "name", [x if x in GROUPED else pytest.param(x, marks=pytest.mark.proof) for x in EVERY]
)
def test_failure_6_explicit_meshes(name, mode):
    """On an Explicit mesh, which jax.make_mesh makes, clips work wrapped and without set_mesh."""
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Explicit,))
    put = lambda x, *axes: jax.device_put(x, NamedSharding(mesh, PartitionSpec(*axes)))
    grads = {"split": put(trees.normal(8, 4), "x"), "whole": put(trees.normal(5))}
    function, keywords, numbers = called(name)
    settings = {**keywords, **{key: x for key, x in numbers.items() if key != "max_rms"}}
    with jax.numpy_dtype_promotion("standard"):  # Optax relies on it
        injected = optax.inject_hyperparams(function, static_args=list(keywords))(**settings)
        tx = optax.chain(injected, optax.adam(1e-3))
        if mode == "jit":  # the branches of MultiSteps differ in type in eager mode
            tx = optax.MultiSteps(tx, 2).gradient_transformation()
        state, update = tx.init(grads), jax.jit(tx.update) if mode == "jit" else tx.update
        for _ in range(2):
            updates, state = update(grads, state, grads)

    assert updates["split"].sharding.is_equivalent_to(grads["split"].sharding, 2)
    assert all(np.isfinite(x).all() and np.any(x) for x in jax.tree.leaves(updates))


# ------------------------------------------------------- 8, 9: numbers that must not be used


@pytest.mark.parametrize("name", EVERY)
def test_failure_8_limits_that_flip_signs_are_refused(name):
    """A limit of -1 or NaN is an error and turns no gradient around."""
    function, keywords, numbers = called(name)
    for argument in numbers.keys() & LIMITS:
        for bad in BAD:
            message = rf"^{argument} must be a number >= 0, .*; got {bad}$"
            with pytest.raises(ValueError, match=message):
                function(**keywords, **{argument: bad})


@pytest.mark.parametrize(("name", "argument"), NUMBERS)
def test_failure_8_traced_numbers_flip_no_sign(name, argument):
    """A traced number of -1, NaN or -inf flips no sign and makes no NaN; as a limit, zeros."""
    for bad in BAD:
        steps = run(name, noisy(), **{argument: bad})

        assert np.isfinite(steps.updates).all()
        assert (steps.updates * SIGN >= 0).all()
        # adagc has this limit in its warm-up of two steps only; a floor below 0 is none.
        there = slice(0, 2) if (name, argument) == ("adagc", "max_norm") else slice(WARM, None)
        if argument in LIMITS and (argument != "min_norm" or math.isnan(bad)):
            assert not steps.updates[there].any()
            assert not (steps.limit[there] >= 0).any()


@every_variant
def test_failure_9_states_that_are_restored_wrong(name):
    """A state with NaN, a count of -5, another dtype or another shape does not pass for sound."""
    state = EVERY[name].make().init(DIRECTION)
    assert validate_state(state, like=state) == []

    leaves, treedef = jax.tree.flatten_with_path(state)
    for i, (path, x) in enumerate(leaves):
        wrong = [x.astype(jnp.bfloat16), jnp.zeros((*x.shape, 7), x.dtype)]
        if x.dtype == jnp.int32:
            wrong.append(jnp.full_like(x, -5))
        elif ".metrics" not in jax.tree_util.keystr(path):  # a norm may have been NaN
            wrong.append(jnp.full_like(x, NAN))
        for bad in wrong:
            broken = [bad if j == i else y for j, (_, y) in enumerate(leaves)]
            assert validate_state(treedef.unflatten(broken), like=state)


# ----------------------------------------------------------- 10, 11, 12: what is measured, and how

SUMS = {
    "global_norm": (oc.measure.global_norm(), 0.5),
    "leaf_norm": (oc.measure.leaf_norm(), 0.5),
    "unit_norm": (oc.measure.unit_norm(), 0.5),
    "leaf_rms": (oc.measure.leaf_rms(), 0),
    "leaf_mean": (oc.measure.leaf_mean(), -0.5),
    "order 1": (oc.measure.global_norm(1), 1),
}


@pytest.mark.parametrize("count", [10**7, pytest.param(10**8, marks=pytest.mark.proof)])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
def test_failure_10_norms_of_many_elements(dtype, count):
    """The norm of 1e7 or 1e8 equal entries is right to 5e-7, not 0.4 % or 5.6 % low."""
    grads = jnp.full(count, 0.1, dtype)
    entry = float(grads[0])
    for measure, power in SUMS.values():
        norm = jax.tree.leaves(jax.jit(measure.norms)(grads, None))[0]
        assert norm.item() == pytest.approx(entry * count**power, rel=5e-7, abs=0)


TYPES = {
    "np.float64": np.float64,
    "np.float32": np.float32,
    "np.array": np.array,
    "array": jnp.float32,
    "schedule": lambda x: lambda step: jnp.float32(x),
}


@every_variant
def test_failure_11_dtypes_that_drift(name):
    """Updates keep the dtypes of the gradients, whatever numbers and parameters are made of."""
    function, keywords, numbers = called(name)
    grads = {x: jnp.ones(2, x) for x in ("float32", "bfloat16", "float16")}
    params = jax.tree.map(lambda x: x.astype(jnp.float32), grads)
    dtypes = lambda tree: jax.tree.map(lambda x: (x.dtype, x.weak_type), tree)

    def updates(grads, numbers):
        tx = function(**keywords, **numbers)
        return tx.update(grads, tx.init(params), params)[0]

    for kind, as_type in TYPES.items():
        known = {x: v for x, v in numbers.items() if kind != "schedule" or x in LIMITS}
        typed = {x: as_type(v) for x, v in known.items()}
        assert dtypes(jax.eval_shape(lambda g, typed=typed: updates(g, typed), grads)) == dtypes(
            grads
        )
    traced = {x: jnp.float32(v) for x, v in numbers.items()}
    assert dtypes(jax.eval_shape(updates, grads, traced)) == dtypes(grads)
    with jax.enable_x64(True):
        wide = {x: np.float64(v) for x, v in numbers.items()}
        assert dtypes(jax.eval_shape(lambda g: updates(g, wide), grads)) == dtypes(grads)


@every_variant
def test_failure_12_a_spike_is_measured_before_it_is_clipped(name):
    """A norm that is 1000 times the one before is 1000 times as large in the metrics."""
    steps = run(name, spiked((300, 1000 * LEVEL)))

    if name == "scale_by_stable_adam":  # which measures g / sqrt(v), where v knows g
        assert steps.norm[300] > 9 * steps.norm[299]
    else:
        assert steps.norm[300] == pytest.approx(1000 * steps.norm[299], rel=1e-3, abs=0)
