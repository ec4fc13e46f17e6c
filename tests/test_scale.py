"""Scales: factors at, below and above the limit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optaxclip import scale

STRICT = 1 - 50 * 2.0**-24
NORMS = jnp.array([0.0, 0.5, 1.0, 1.0000001, 4.0, 1e30])


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        (scale.rescale, [1, 1, 1, 1 / 1.0000001, 0.25, 1e-30]),
        (scale.skip, [1, 1, 1, 0, 0, 0]),
        (scale.normalize, [1, 2, 1, 1 / 1.0000001, 0.25, 1e-30]),
        (scale.strict, [1, 1, *(STRICT * np.array([1, 1 / 1.0000001, 0.25, 1e-30]))]),
    ],
)
def test_factors_under_limit_one(rule, expected):
    """Each scale gives the factor of its table, exactly 1 where nothing is to be done."""
    factor = rule(NORMS, jnp.ones_like(NORMS))

    np.testing.assert_allclose(factor, expected, rtol=2 * 2.0**-24)
    exact = np.array(expected) == 1
    np.testing.assert_array_equal(np.asarray(factor)[exact], 1)


@pytest.mark.parametrize("rule", [scale.rescale, scale.skip, scale.normalize, scale.strict])
def test_factors_at_the_ends(rule):
    """Limit 0 gives 0 to every norm but 0, and limit inf gives 1."""
    ones = jnp.ones_like(NORMS)

    np.testing.assert_array_equal(rule(NORMS, 0 * ones), NORMS == 0)
    np.testing.assert_array_equal(rule(NORMS, jnp.inf * ones), ones)


def test_normalize_has_a_derivative_where_the_quotient_overflows():
    """A norm of 2e-38 under a limit of 1e10 has a finite factor, and slopes that are numbers."""
    factor, slopes = jax.value_and_grad(scale.normalize, argnums=(0, 1))(
        *map(jnp.float32, (2e-38, 1e10))
    )

    assert np.isfinite(factor)
    assert factor > 1e38
    np.testing.assert_array_equal(slopes, (0, 0))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float8_e4m3fn])
def test_strict_rounds_towards_zero(dtype):
    """The cast of `strict` never rounds up, is the nearest below, and has the slope of a cast."""
    rng = np.random.default_rng(0)
    # Down to where the dtype has but a few numbers left.
    least = float(jnp.finfo(dtype).smallest_normal)
    sizes = np.concatenate([np.ones(1000), np.exp2(rng.uniform(-6, 2, 1000)) * least])
    x = jnp.asarray(rng.normal(size=2000) * sizes, jnp.float32)
    x = x[np.abs(x) >= np.finfo(np.float32).smallest_normal]  # XLA flushes what is smaller

    low = scale.strict.cast(x, dtype)

    wide, exact = np.asarray(low, np.float64), np.asarray(x, np.float64)
    assert (np.abs(wide) <= np.abs(exact)).all()
    away = jnp.where(x > 0, jnp.full_like(low, 400), jnp.full_like(low, -400))
    above = np.asarray(jnp.nextafter(low, away), np.float64)
    assert (np.abs(above) > np.abs(exact)).all()
    slope = jax.grad(lambda x: jnp.sum(scale.strict.cast(x, dtype).astype(jnp.float32)))(x)
    np.testing.assert_array_equal(slope, 1)
