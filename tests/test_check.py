"""Bad arguments: errors at construction that name the argument, its value and what is allowed."""

from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optaxclip as oc
from optaxclip import measure, scale, threshold

THRESHOLDS = {
    "max_value": oc.clip_by_value,
    "max_norm": oc.clip_by_global_norm,
    "max_norm ": oc.clip_by_norm,
    "max_norm  ": oc.clip_by_average_norm,
    "threshold": oc.clip_by_block_rms,
    "clipping": oc.adaptive_grad_clip,
    "norm": oc.normalize_by_global_norm,
    "limit": threshold.constant,
}
ALLOWED = (
    r"must be a number >= 0, a \(\) array or a schedule step -> value "
    r"\(inf turns clipping off, 0 gives zeros\)"
)


@pytest.mark.parametrize(("name", "make"), THRESHOLDS.items())
@pytest.mark.parametrize(
    ("value", "error", "shown"),
    [
        (-1.0, ValueError, "-1.0"),
        (float("nan"), ValueError, "nan"),
        (-float("inf"), ValueError, "-inf"),
        (np.float32(-2), ValueError, r"np.float32\(-2.0\)"),
        (np.array([1.0]), ValueError, r"an array of shape \(1,\)"),
        (jnp.ones((2, 3)), ValueError, r"an array of shape \(2, 3\)"),
        ("1", TypeError, "'1'"),
        (True, TypeError, "True"),
        (np.True_, TypeError, r"np.True_"),
        (None, TypeError, "None"),
        (1j, TypeError, "1j"),
        (np.complex64(1), TypeError, "np.complex64"),
        (jnp.array(True), TypeError, "Array"),
        ([1.0], TypeError, r"\[1.0\]"),
        ({"a": 1.0}, TypeError, "{'a': 1.0}"),
    ],
    ids=str,
)
def test_bad_thresholds(name, make, value, error, shown):
    """A threshold that is no number >= 0, () array or schedule is refused in so many words."""
    with pytest.raises(error, match=f"^{name.strip()} {ALLOWED}; got {shown}"):
        make(value)


@pytest.mark.parametrize("make", THRESHOLDS.values())
@pytest.mark.parametrize(
    "value",
    [0, 0.0, 1, float("inf"), np.float64(1), np.int32(1), np.array(1.0), jnp.float32(1)],
    ids=repr,
)
def test_good_thresholds(make, value):
    """Numbers >= 0, inf included, and () arrays of any real dtype are accepted."""
    assert callable(make(value).update)
    assert callable(make(optax.constant_schedule(1.0)).update)
    assert jax.vmap(lambda v: make(v).update and v)(jnp.ones(2)).shape == (2,)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: measure.global_norm(0.5),
            ValueError,
            "ord must be a real number >= 1 or inf; got 0",
        ),
        (lambda: oc.clip_by_norm(ord=float("nan")), ValueError, "ord must be .*; got nan"),
        (lambda: oc.clip_by_norm(ord="2"), TypeError, "ord must be .*; got '2'"),
        (
            lambda: measure.leaf_norm(jnp.int32(2)),
            TypeError,
            "ord must be .*'ord' is in its static",
        ),
        (
            lambda: measure.unit_norm("0"),
            TypeError,
            "axis must be None, an int, a tuple of ints or",
        ),
        (lambda: measure.unit_norm(True), TypeError, "axis must be .*; got True"),
        (lambda: measure.unit_norm((0, 1.0)), TypeError, r"axis must be .*; got \(0, 1.0\)"),
        (
            lambda: oc.adaptive_grad_clip(per_tensor=True, axis=0),
            ValueError,
            "axis must be None with per_tensor=True; got 0",
        ),
        (
            lambda: oc.adaptive_grad_clip(eps=0.0),
            ValueError,
            "eps must be a finite number >= 1.2e-38 or",
        ),
        (lambda: oc.adaptive_grad_clip(eps="x"), TypeError, "eps must be .*; got 'x'"),
        (lambda: oc.adaptive_grad_clip(stacked="0"), TypeError, "stacked must be .*; got '0'"),
        (
            lambda: measure.by_label("a", measure.global_norm),
            TypeError,
            r"measure must be a Measure, such as measure.global_norm\(\); got <function",
        ),
        (lambda: measure.relative(None, 1.0), TypeError, "measure must be a Measure"),
        (lambda: threshold.until(0, None, None), ValueError, "steps must be a whole number of"),
        (lambda: threshold.until(1.5, None, None), ValueError, "steps must be .*; got 1.5"),
        (lambda: oc.clip_by_norm(Fraction(1, 2)), TypeError, "max_norm must be .*; got Fraction"),
        (
            lambda: threshold.until(1, 1.0, threshold.constant(1.0)),
            TypeError,
            r"first must be a Threshold, such as threshold.constant\(1.0\); got 1.0",
        ),
        (lambda: oc.clip(measure.global_norm, threshold.constant(1.0)), TypeError, "measure must"),
        (lambda: oc.clip(measure.global_norm(), 1.0), TypeError, "threshold must be a Threshold"),
        (
            lambda: oc.clip(measure.global_norm(), threshold.constant(1.0), "rescale"),
            TypeError,
            "scale must be a function, such as scale.rescale; got 'rescale'",
        ),
        (
            lambda: oc.clip_by_value(nonfinite="ignore"),
            ValueError,
            "nonfinite must be one of 'zero', 'propagate', 'sanitize'; got 'ignore'",
        ),
        (
            lambda: measure.unit_norm(jnp.int32(0)),
            TypeError,
            "axis must be .*'axis' is in its static",
        ),
        (
            lambda: oc.adaptive_grad_clip(per_tensor="no"),
            ValueError,
            "per_tensor must be one of True",
        ),
        (
            lambda: oc.adaptive_grad_clip(mask="head"),
            TypeError,
            "mask must be None, a tree of bools",
        ),
        (lambda: oc.clip_by_value(nonfinite=None), ValueError, "nonfinite must be one of"),
        (
            lambda: oc.clip_by_value(record="no"),
            ValueError,
            "record must be one of True, False; got 'no'",
        ),
    ],
)
def test_other_bad_arguments(call, error, message):
    """Every other argument of a public function is refused in so many words."""
    with pytest.raises(error, match=message):
        call()


def test_arguments_after_the_first_are_keywords():
    """Only the threshold is positional, so that no later argument can shift into its place."""
    with pytest.raises(TypeError, match="positional"):
        oc.clip_by_global_norm(1.0, 2)
    with pytest.raises(TypeError, match="positional"):
        oc.adaptive_grad_clip(0.01, 1e-3)


def test_scales_are_public():
    """The namespace of scales holds the four of them."""
    assert all(callable(getattr(scale, n)) for n in ("rescale", "strict", "skip", "normalize"))
