"""Thresholds: limits over streams of norms, what they remember, and what they refuse."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import trees
from limits import RULES

from optaxclip import threshold
from optaxclip.threshold.averages import root_mean_square


def limits(thresholds, norms):
    """The limits for a stream of norms, and the memory after it."""

    def step(memory, norm):
        limit, memory = thresholds.update(norm, memory)
        return memory, limit

    memory, found = jax.lax.scan(step, thresholds.init(norms[0]), norms)
    return found, memory


@pytest.mark.parametrize("shape", [(), (3,), (2, 1)])
def test_constant(shape):
    """A constant has the norm's shape and dtype, and no memory."""
    found, memory = limits(threshold.constant(np.float64(2.5)), jnp.ones((4, *shape)))

    np.testing.assert_array_equal(found, np.full((4, *shape), 2.5, np.float32))
    assert found.dtype == jnp.float32
    assert jax.tree.leaves(memory) == []


@pytest.mark.parametrize("shape", [(), (3,)])
def test_schedule(shape):
    """A schedule is read at steps 0, 1, 2, ..."""
    schedule = optax.piecewise_constant_schedule(10.0, {1: 0.1, 3: 0.5})

    with jax.numpy_dtype_promotion("standard"):  # Optax multiplies integers by floats
        found, memory = limits(threshold.constant(schedule), jnp.ones((5, *shape)))

    np.testing.assert_allclose(found.reshape(5, -1)[:, 0], [10.0, 1.0, 1.0, 0.5, 0.5])
    assert int(memory.step) == 5


def test_until():
    """The first threshold rules for so many steps, the other one after them."""
    first = threshold.constant(lambda step: 10.0 + step.astype(jnp.float32))
    then = threshold.constant(lambda step: 100.0 + step.astype(jnp.float32))

    found, _ = limits(threshold.until(2, first, then), jnp.ones(4))

    np.testing.assert_allclose(found, [10.0, 11.0, 102.0, 103.0])


def test_until_takes_a_traced_number_of_steps():
    """How many steps may be traced, for sweeps."""
    make = lambda n: threshold.until(n, threshold.constant(1.0), threshold.constant(2.0))

    found = jax.vmap(lambda n: limits(make(n), jnp.ones(4))[0])(jnp.array([1, 3]))

    np.testing.assert_array_equal(found, [[1, 2, 2, 2], [1, 1, 1, 2]])


def test_both_thresholds_learn_from_every_step():
    """The threshold whose turn comes later has learned in the meantime."""
    largest = threshold.Threshold(
        lambda norm: jnp.zeros(norm.shape),
        lambda norm, memory: (2 * memory, jnp.maximum(memory, norm)),
    )

    found, _ = limits(
        threshold.until(2, threshold.constant(1.0), largest), jnp.array([5.0, 3.0, 4.0])
    )

    np.testing.assert_array_equal(found, [1.0, 1.0, 10.0])


def test_clock_saturates():
    """A clock stays at the largest int32 instead of turning negative."""
    last = np.iinfo(np.int32).max
    schedule = threshold.constant(lambda step: step.astype(jnp.float32))

    _, memory = schedule.update(jnp.float32(1), threshold.Clock(jnp.int32(last)))

    assert int(memory.step) == last


def test_a_norm_at_the_boundary_is_not_above_it():
    """A norm equal to the quantile's estimate, or to mu + z* sigma, counts as below."""
    tracker = threshold.quantile(0.5, rate=0.2, initial=1.0, margin=0.0)
    outliers = threshold.zscore(1.0, warmup=2, mode="mean", start="mean", min_sigma=0.0)

    below, _ = limits(tracker, jnp.ones(2))
    at_boundary, _ = limits(outliers, jnp.float32([1.0, 3.0, 3.0]))  # mean 2, deviation 1

    np.testing.assert_allclose(below, np.exp([0.0, -0.1]), 1e-6)
    assert at_boundary[-1] == 3.0


def test_the_ceiling_wins_over_the_floor():
    """Where a traced floor is above the ceiling, the limit is the ceiling."""
    both = threshold.bounded(
        threshold.constant(1.0), min_norm=jnp.float32(3), max_norm=jnp.float32(2)
    )

    assert limits(both, jnp.ones(1))[0] == 2.0


# ---------------------------------------------------------------------------------- memories

SCHEDULE = lambda step: 1.0 + step.astype(jnp.float32)
REMEMBERING = RULES | {
    "constant": lambda t: t.constant(SCHEDULE),
    "until": lambda t: t.until(5, t.constant(SCHEDULE), t.zscore(2.5, warmup=1)),
    "quantile from a number": lambda t: t.quantile(0.9, initial=np.float64(1)),
    "bounded by schedules": lambda t: t.bounded(
        t.percentile(95.0, window=30), min_norm=SCHEDULE, max_norm=SCHEDULE
    ),
    "relearning with a clock": lambda t: t.relearning(
        t.until(5, t.constant(1.0), t.sigma(np.float32(3), window=30))
    ),
}
every_rule = pytest.mark.parametrize("rule", REMEMBERING.values(), ids=REMEMBERING)
every_shape = pytest.mark.parametrize("shape", [(), (2, 3)], ids=str)


def is_clock(x):
    """Whether a part of a memory counts steps for all groups."""
    return isinstance(x, threshold.Clock)


def form(tree):
    """The structure of a tree and what its arrays are, their values apart."""
    leaves, treedef = jax.tree.flatten(tree)
    return treedef, [(x.shape, x.dtype, x.weak_type) for x in leaves]


@every_rule
@every_shape
@pytest.mark.parametrize("x64", [False, True])
def test_memory_keeps_its_form(rule, shape, x64):
    """A memory is strong float32 and int32, in the norm's shape, finite, the same at each step."""
    norm = jax.ShapeDtypeStruct(shape, jnp.float32)
    with jax.enable_x64(x64):
        rule = rule(threshold)
        memory = rule.init(norm)
        limit, after = jax.eval_shape(rule.update, norm, memory)

    assert form(after) == form(memory)
    assert form(limit)[1] == [(shape, jnp.float32, False)]
    assert {x.dtype for x in jax.tree.leaves(memory)} <= {jnp.dtype("float32"), jnp.dtype("int32")}
    assert not any(x.weak_type for x in jax.tree.leaves(memory))
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(memory))
    for x in jax.tree.leaves(memory, is_leaf=is_clock):
        assert x.step.shape == () if is_clock(x) else x.shape[x.ndim - len(shape) :] == shape


@every_rule
@every_shape
def test_memory_has_buffers_of_its_own(rule, shape):
    """No two arrays of a fresh memory share a buffer, nor does one with the norm."""
    norm = jnp.zeros(shape)
    memory = rule(threshold).init(norm)

    pointers = [x.unsafe_buffer_pointer() for x in jax.tree.leaves((norm, memory))]

    assert len(set(pointers)) == len(pointers)


# -------------------------------------------------------------------------------- relearning

FORGETFUL = {
    "growth": lambda t: t.growth(1.25),  # more than calm norms grow
    "ema_ratio": lambda t: t.ema_ratio(1.5, warmup=2),
    "zscore": lambda t: t.zscore(2.5, feed="clipped", warmup=2),
}
CALM, BURST, LEVEL = [1.0, 1.1, 0.9, 1.0], [9.0, 10.0, 11.0], [20.0, 21.0, 19.0, 20.0]


@pytest.mark.parametrize("inner", FORGETFUL.values(), ids=FORGETFUL)
def test_a_burst_shorter_than_the_patience_is_forgotten(inner):
    """After a burst, the limits and the memory are those of the inner threshold alone."""
    inner = inner(threshold)
    slow = threshold.relearning(inner, patience=len(BURST) + 1)
    norms = jnp.float32(CALM + BURST + CALM)

    found, memory = limits(slow, norms)

    trees.assert_same_bits((found, memory.all), limits(inner, norms))
    trees.assert_same_bits(memory.run, inner.init(norms[0]))
    assert int(memory.length) == 0


@pytest.mark.parametrize("inner", FORGETFUL.values(), ids=FORGETFUL)
def test_a_new_level_is_all_that_is_remembered(inner):
    """After `patience` norms above the limit, it is as if the first of them had been the first."""
    inner = inner(threshold)
    slow = threshold.relearning(inner, patience=len(LEVEL))
    before, after = CALM + BURST + CALM, [*LEVEL, 20.0, 22.0, 18.0]

    found, memory = limits(slow, jnp.float32(before + after))

    expected, learned = limits(inner, jnp.float32(after))
    known = slice(len(LEVEL), None)
    trees.assert_same_bits(found[len(before) :][known], expected[known])
    trees.assert_same_bits(memory.all, learned)


def test_groups_relearn_by_themselves():
    """A group that has a new level forgets; its neighbour, which has a burst, does not."""
    slow = threshold.relearning(threshold.growth(1.01), patience=4)
    norms = jnp.float32([[1.0, 1.0], [9.0, 9.0], [9.0, 9.0], [9.0, 9.0], [9.0, 1.0], [9.0, 1.0]])

    found, memory = limits(slow, norms)

    np.testing.assert_allclose(found[-1], [1.01 * 9, 1.01], 1e-6)
    alone = [limits(slow, norms[:, i]) for i in (0, 1)]
    trees.assert_same_bits((found, memory), jax.tree.map(lambda *x: jnp.stack(x, -1), *alone))


def test_relearning_within_other_thresholds():
    """What is around a relearning threshold changes its limit but not what it learns."""
    slow = threshold.relearning(threshold.growth(1.01), patience=3)
    norms = jnp.float32(CALM + LEVEL + CALM)
    alone, memory = limits(slow, norms)

    late, late_memory = limits(threshold.until(6, threshold.constant(0.5), slow), norms)
    most, most_memory = limits(threshold.bounded(slow, max_norm=2.0), norms)

    np.testing.assert_array_equal(late, np.where(np.arange(len(norms)) < 6, 0.5, alone))
    np.testing.assert_array_equal(most, np.minimum(alone, 2.0))
    trees.assert_same_bits([late_memory.then, most_memory.threshold], [memory, memory])


def test_clocks_run_on_when_norms_are_learned_anew():
    """A schedule, and the step at which another threshold takes over, ignore relearning."""
    ceiling = threshold.bounded(threshold.growth(1.01), max_norm=SCHEDULE)
    opening = threshold.until(3, threshold.constant(1.0), threshold.growth(2.0))
    norms = jnp.full(7, 100.0)

    scheduled, _ = limits(threshold.relearning(threshold.constant(SCHEDULE), patience=2), norms)
    bounded, _ = limits(threshold.relearning(ceiling, patience=2), norms)
    later, memory = limits(threshold.relearning(opening, patience=2), norms)

    np.testing.assert_array_equal(scheduled, [1, 2, 3, 4, 5, 6, 7])
    np.testing.assert_array_equal(bounded, [1, 2, 3, 4, 5, 6, 7])
    np.testing.assert_array_equal(later, [1, 1, 1, 200, 200, 200, 200])
    assert [int(memory.all.clock.step), int(memory.run.clock.step)] == [7, 7]


@pytest.mark.parametrize("power", [-100, -60, -47, -30, -23, -22, -10, 0, 20, 39, 40, 43, 60, 63])
def test_mean_square_of_norms_of_any_size(power):
    """Right, with its derivative, for what is learned, and for a memory that XLA knows to be 0."""
    decay, x, zero = 0.75, jnp.float32(1.5 * 2.0**power), jnp.float32(0)
    mean = lambda old, new: root_mean_square(old, new, decay)

    first = jax.jit(lambda new: mean(zero, new))(x)
    last = jax.jit(lambda old: mean(old, zero))(x)
    slopes = jax.jit(jax.grad(mean, (0, 1)))(x, x)

    np.testing.assert_allclose(np.float64(first) / x, np.sqrt(0.25), rtol=1e-6)
    np.testing.assert_allclose(np.float64(last) / x, np.sqrt(0.75), rtol=1e-6)
    np.testing.assert_allclose(slopes, (0.75, 0.25), rtol=1e-6)
    assert mean(x, x) == x
