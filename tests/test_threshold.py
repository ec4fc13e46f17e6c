"""Thresholds: limits over streams of norms, and what they remember."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from optaxclip import threshold


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
