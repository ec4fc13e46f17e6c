"""arguments -> errors at construction: each names the argument, its value and what is allowed.

Only Python and NumPy values are judged by value. A JAX array may be traced, so it is judged by
shape and dtype alone; the engine makes sure that a bad one never flips the sign of an update.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Collection
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np

MOST_STEPS = 2**31 - 1  # steps are counted in int32


def limit(**named: Any) -> None:
    """Accepts what can limit a norm: a number >= 0, inf included, a () array or a schedule."""
    allowed = (
        "a number >= 0, a () array or a schedule step -> value "
        "(inf turns clipping off, 0 gives zeros)"
    )
    for name, value in named.items():
        if not callable(value):
            _number(name, value, allowed, lambda x: x >= 0)


def positive(**named: Any) -> None:
    """Accepts a finite number > 0 that float32 holds, or a () array."""
    tiny = float(np.finfo(np.float32).tiny)
    most = float(np.finfo(np.float32).max)
    allowed = f"a finite number >= {tiny:.2g} or a () array"
    for name, value in named.items():
        _number(name, value, allowed, lambda x: tiny <= x <= most)


def number(*, at_least: float = 0, **named: Any) -> None:
    """Accepts a finite number that float32 holds and that is not too small, or a () array."""
    most = float(np.finfo(np.float32).max)
    for name, value in named.items():
        allowed = f"a finite number >= {at_least} or a () array"
        _number(name, value, allowed, lambda x: at_least <= x <= most)


def within(low: float, high: float, **named: Any) -> None:
    """Accepts a number between two bounds, both included, or a () array."""
    for name, value in named.items():
        allowed = f"a number from {low} to {high} or a () array"
        _number(name, value, allowed, lambda x: low <= x <= high)


def decay(**named: Any) -> None:
    """Accepts what a running average keeps of itself in a step."""
    for name, value in named.items():
        _number(name, value, "a number in [0, 1) or a () array", lambda x: 0 <= x < 1)


def window(**named: Any) -> None:
    """Accepts how many norms are kept."""
    for name, value in named.items():
        _static(name, value)
        allowed = "a whole number >= 1"
        if not isinstance(value, numbers.Integral):
            _refuse(TypeError, name, repr(value), allowed)
        _number(name, value, allowed, lambda x: x >= 1)  # and no bool


def order_of_bounds(**named: Any) -> None:
    """Accepts a lower and an upper limit in this order, as far as both are known."""
    (low_name, low), (high_name, high) = named.items()
    known = not any(callable(x) or isinstance(x, jax.Array) for x in (low, high))
    if known and low > high:
        _refuse(ValueError, low_name, repr(low), f"at most {high_name}, which is {high!r}")


def history(window: int, **named: Any) -> None:
    """Accepts how many norms there must be, out of as many as are kept."""
    steps(**named)
    for name, value in named.items():
        if not isinstance(value, jax.Array) and value > window:
            _refuse(ValueError, name, repr(value), f"at most the window, {window}")


def order(**named: Any) -> None:
    """Accepts the order of a norm."""
    for name, value in named.items():
        _static(name, value)
        _number(name, value, "a real number >= 1 or inf", lambda x: x >= 1)


def axes(**named: Any) -> None:
    """Accepts None, an axis, a tuple of axes or a function (path, leaf) -> axes."""
    for name, value in named.items():
        _static(name, value)
        parts = value if isinstance(value, tuple) else (value,)
        whole = all(
            isinstance(part, numbers.Integral) and not isinstance(part, bool) for part in parts
        )
        if not (value is None or callable(value) or whole):
            allowed = "None, an int, a tuple of ints or a function (path, leaf) -> axes"
            _refuse(TypeError, name, repr(value), allowed)


def steps(**named: Any) -> None:
    """Accepts a whole number of steps >= 1 or a () array."""
    for name, value in named.items():
        allowed = "a whole number of steps >= 1 or a () array"
        _number(name, value, allowed, lambda x: 1 <= x <= MOST_STEPS and x == int(x))


def patience(**named: Any) -> None:
    """Accepts what `steps` does, and inf for never."""
    for name, value in named.items():
        if not (isinstance(value, float | np.floating) and value == math.inf):
            steps(**{name: value})


def choice(allowed: Collection[Any], **named: Any) -> None:
    """Accepts one of a few values."""
    for name, value in named.items():
        if not any(type(value) is type(one) and value == one for one in allowed):
            _refuse(ValueError, name, repr(value), "one of " + ", ".join(map(repr, allowed)))


def mask(**named: Any) -> None:
    """Accepts None, a tree of bools or a function params -> tree."""
    for name, value in named.items():
        leaves = [] if callable(value) else jax.tree.leaves(value)
        if not all(isinstance(leaf, bool | np.bool_) for leaf in leaves):
            _refuse(TypeError, name, repr(value), "None, a tree of bools or a function of params")


def instance(kind: type, example: str, **named: Any) -> None:
    """Accepts a piece of the algebra, and shows how to make one."""
    for name, value in named.items():
        if not isinstance(value, kind):
            _refuse(TypeError, name, repr(value), f"a {kind.__name__}, such as {example}")


def function(example: str, **named: Any) -> None:
    """Accepts a function, and shows one."""
    for name, value in named.items():
        if not callable(value):
            _refuse(TypeError, name, repr(value), f"a function, such as {example}")


def _static(name: str, value: Any) -> None:
    """Refuses arrays for what shapes the program and so cannot be traced."""
    if isinstance(value, jax.Array):
        allowed = (
            f"a Python value, no JAX array (optax.inject_hyperparams makes one of a number unless "
            f"{name!r} is in its static_args)"
        )
        _refuse(TypeError, name, repr(value), allowed)


def _number(name: str, value: Any, allowed: str, holds: Callable[[Any], bool]) -> None:
    array = isinstance(value, (jax.Array, np.ndarray, np.generic))
    if array:
        real = any(jnp.issubdtype(value.dtype, kind) for kind in (jnp.integer, jnp.floating))
    else:
        real = isinstance(value, int | float) and not isinstance(value, bool)
    if not real:
        _refuse(TypeError, name, repr(value), allowed)
    if array and value.shape != ():
        _refuse(ValueError, name, f"an array of shape {value.shape}", allowed)
    if not isinstance(value, jax.Array) and not holds(float(value)):
        _refuse(ValueError, name, repr(value), allowed)


def _refuse(error: type[Exception], name: str, shown: str, allowed: str) -> NoReturn:
    raise error(f"{name} must be {allowed}; got {shown}")
