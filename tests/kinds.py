"""What kinds of arguments there are: the values that each accepts, and those that it refuses."""

import math
from fractions import Fraction
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optaxclip as oc

NAN, INF = math.nan, math.inf
MOST = 2**31 - 1  # of int32


class Bad(NamedTuple):
    """A value that is refused."""

    value: Any
    error: type[Exception]
    allowed: str = ""  # in the words of the error, where these are not those of the kind
    shown: str = ""  # what the error shows of the value, where that is not all of it


class Kind(NamedTuple):
    """What an argument can be."""

    allowed: str  # in the words of the error
    good: tuple
    bad: tuple[Bad, ...]


def refused(error, *values, **named):
    """Values that are refused for one reason."""
    return tuple(Bad(value, error, **named) for value in values)


def assert_refused(call, error, message):
    """A call fails in exactly these words."""
    with pytest.raises(error) as caught:
        call()
    assert str(caught.value) == message


TREE = Bad({"w": np.full(5, 7.5)}, TypeError, shown="{'w': an array of shape (5,)}")
NO_NUMBER = (
    *refused(TypeError, "1", None, True, 1j, [1.0], (1.0,), {"a": 1.0}, Fraction(1, 2)),
    *refused(TypeError, np.True_, np.complex64(1), jnp.array(True), jnp.complex64(1)),
    Bad(np.array([True, False]), TypeError, shown="an array of shape (2,)"),
    TREE,
)
NO_SCALAR = tuple(
    Bad(x, ValueError, shown=f"an array of shape {x.shape}")
    for x in (np.ones(1), np.ones((2, 3)), jnp.ones(1), jnp.ones((2, 3)), jnp.ones(0))
)
NO_INT32 = refused(
    ValueError, 2**31, 2.0**31, allowed=f"a whole number <= {MOST}, as steps are int32"
)
HUGE = Bad(10**400, ValueError, shown="1" + "0" * 196 + "...")


def number(allowed, good, wrong):
    """A number or a () array; of an array of JAX, the value may be not known, and is not judged."""
    arrays = (np.array(good[0]), jnp.float32(good[0]), jnp.bfloat16(good[0]), jnp.float32(NAN))
    types = (np.float64(good[0]), np.float16(good[0]), *arrays, jnp.float32(-1))
    wrong = refused(ValueError, *wrong, NAN, -INF, np.float64(NAN), np.array(-INF))
    return Kind(allowed, (*good, *types), (*wrong, *NO_NUMBER, *NO_SCALAR))


def choice(*good):
    """One of a few values."""
    bad = refused(ValueError, "unknown", "", None, 1, 0.0, b"zero", [good[0]], np.True_)
    return Kind(
        "one of " + ", ".join(map(repr, good)), good, (*bad, TREE._replace(error=ValueError))
    )


def piece(kind, example, *good):
    """A piece of the algebra."""
    bad = refused(TypeError, None, 1.0, "tree", (), [good[0].__class__], oc.scale.rescale)
    return Kind(f"a {kind}, such as {example}", good, (*bad, TREE))


def measure(example):
    """A measure, with the one that the error shows."""
    return piece("Measure", example, oc.measure.global_norm(), oc.measure.element())


def threshold(example):
    """A threshold, with the one that the error shows."""
    return piece("Threshold", example, oc.threshold.constant(1.0), oc.threshold.zscore(2.5))


def transformation(example):
    """A transformation of Optax."""
    return piece("GradientTransformation", example, oc.clip_by_norm(1.0), optax.adam(1e-3))


def rule(sign):
    """What steps are skipped by."""
    allowed = (
        f'None, "outlier", a Threshold, a number{sign}, a () array or a schedule step -> value '
        "(inf: no limit)"
    )
    good = (None, "outlier", oc.threshold.constant(1.0), 1, 2.5, INF, optax.constant_schedule(1))
    known = refused(ValueError, "sigma", NAN, *([-1.0] if sign else []))
    return Kind(allowed, good, (*known, *refused(TypeError, True, 1j, [1.0], {"a": 1.0})))


def optional(kind):
    """The same, or None."""
    bad = tuple(bad for bad in kind.bad if bad.value is not None)
    return kind._replace(good=(*kind.good, None), bad=bad)


def static(kind, good):
    """The same, but no array of JAX, because it shapes the program."""
    allowed = (
        "a Python value, no JAX array (optax.inject_hyperparams makes one of a number unless "
        "'{argument}' is in its static_args)"
    )
    arrays = (
        Bad(jnp.int32(2), TypeError, allowed),
        Bad(jnp.arange(5), TypeError, allowed, "an array of shape (5,)"),
    )
    bad = tuple(bad for bad in kind.bad if not hasattr(bad.value, "at"))  # as JAX arrays have
    return Kind(kind.allowed, good, (*bad, *arrays))


_ARRAY = " or a () array"
LIMIT = number(
    "a number >= 0, a () array or a schedule step -> value (inf turns clipping off, 0 gives zeros)",
    (1, 0, 0.0, 2.5, INF, 1e-45, 2.0**40, np.int32(1), np.float32(INF), optax.constant_schedule(1)),
    (-1, -1.0, -1e-45, np.float32(-2), np.array(-1.0)),
)
LIMIT = LIMIT._replace(
    bad=(
        *LIMIT.bad,
        HUGE,
        *refused(ValueError, 2**31, np.array(2**40), allowed=f"a float where it is above {MOST}"),
    )
)
NUMBER = number(f"a finite number >= 0{_ARRAY}", (1, 0, 2.5), (-1.0, INF, 1e39))
GROWTH = number(f"a finite number >= 1{_ARRAY}", (1, 1.5), (0.75, 0, -2.0, INF))
FROM_0 = number(f"a number from 0 to inf{_ARRAY}", (1, 0, 2.5, INF), (-1, -0.5))
POSITIVE = number(f"a finite number >= 1.2e-38{_ARRAY}", (1, 1e-6), (0, 0.0, -1.0, 1e-39, INF))
DECAY = number(f"a number in [0, 1){_ARRAY}", (0, 0.75, 0.9999), (1, 1.0, 1.5, -0.5, INF))
PERCENT = number(f"a number from 0 to 100{_ARRAY}", (1, 0, 100.0), (-1, 100.5, INF))
SHARE = number(f"a number from 0 to 1{_ARRAY}", (1, 0, 0.5), (-0.5, 1.5, INF))
HISTORY = number(f"a whole number of steps >= 1{_ARRAY}", (1, 20.0), (0, -3, 2.5, INF))
STEPS = HISTORY._replace(good=(*HISTORY.good, MOST), bad=(*HISTORY.bad, *NO_INT32, HUGE))
PATIENCE = number(
    f"a whole number of steps >= 1, inf for never,{_ARRAY}",
    (1, 20.0, MOST, INF, np.float32(INF), np.array(INF)),
    (0, -3, 2.5),
)
PATIENCE = PATIENCE._replace(bad=(*PATIENCE.bad, *NO_INT32))
WINDOW = Kind(
    "a whole number >= 1",
    (),
    (
        *refused(ValueError, 0, -1, np.int64(0)),
        NO_INT32[0],
        HUGE,
        *refused(TypeError, 2.0, 1.5, NAN, INF, np.float32(2), np.array(2)),
        *(bad._replace(error=TypeError) for bad in NO_SCALAR),
        *NO_NUMBER,
    ),
)
WINDOW = static(WINDOW, (1, 30, np.int64(30)))
ORDER = number("a real number >= 1 or inf", (2,), (0, 0.5, -1, 0.999))
ORDER = static(ORDER, (1, 1.0, 2, 2.5, INF, np.int64(2), np.float32(INF)))
AXES = Kind(
    "None, an int, a tuple of ints or a function (path, leaf) -> axes",
    (),
    (
        *refused(TypeError, "0", True, 1.0, 1j, NAN, [0], (0, 1.0), (0, True), {"w": 0}),
        TREE,
        Bad(np.arange(2), TypeError, shown="an array of shape (2,)"),
    ),
)
AXES = static(AXES, (None, 0, -1, (), (0, 1), np.int64(0), lambda path, leaf: 0))
PAIR = "a pair (rows, columns), each an axis or a tuple of axes"
MATRIX = Kind(
    f"None, {PAIR}, or a function (path, leaf) -> these",
    (None, (0, 1), ((0, 1), -1), lambda path, leaf: (0, 1)),
    refused(TypeError, 1, "01", (0,), (0, 1, 2), (0, 1.0), (True, 0), [0, 1], {"w": 0}),
)
MASK = Kind(
    "None, a tree of bools or a function of params",
    (None, True, {"w": False}, [np.True_], lambda params: True),
    (*refused(TypeError, "head", 1, 0.0, {"w": 1}, {"w": "yes"}, [True, "no"]), TREE),
)
LABELS = Kind(
    "a tree of strings or a function path -> string",
    ("all", {"w": "a", "b": "b"}, [], lambda path: path),
    (*refused(TypeError, None, 3, True, b"all", {"w": 1}, {"w": None}), TREE),
)
SCALE = Kind(
    "a function, such as scale.rescale",
    (oc.scale.rescale, oc.scale.strict, lambda norm, limit: norm),
    (*refused(TypeError, None, "rescale", 1.0, True, (oc.scale.rescale,)), TREE),
)
POLICY = choice("zero", "propagate", "sanitize")
DDOF = Kind("one of 0, 1", (0, 1), refused(ValueError, 2, -1, None, 0.5, "1", [0], NAN))
FLAG = choice(True, False)
AXIS_NAME = Kind(
    "a name, a tuple of names, a function (path, leaf) -> one of these, or None",
    (None, "x", (), ("x", "y"), lambda path, leaf: "x"),
    (
        *refused(TypeError, 0, True, 1.0, b"x", ["x"], ("x", 0), {"w": "x"}),
        TREE,
        Bad(np.arange(2), TypeError, shown="an array of shape (2,)"),
    ),
)
