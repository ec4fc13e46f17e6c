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

LIMIT = (
    "a number >= 0, a () array or a schedule step -> value (inf turns clipping off, 0 gives zeros)"
)


def limit(**named: Any) -> None:
    """Accepts what can limit a norm: a number >= 0, inf included, a () array or a schedule."""
    for name, value in named.items():
        if not callable(value):
            _number(name, value, LIMIT, lambda x: x >= 0)


def positive(**named: Any) -> None:
    """Accepts a finite number > 0 or a () array."""
    for name, value in named.items():
        _number(name, value, "a finite number > 0 or a () array", lambda x: 0 < x < math.inf)


def order(**named: Any) -> None:
    """Accepts the order of a norm, which shapes the program and so cannot be traced."""
    allowed = "a real number >= 1 or inf"
    for name, value in named.items():
        if isinstance(value, jax.Array):
            _refuse(
                TypeError, name, value,
                f"{allowed}, not a JAX array; under optax.inject_hyperparams, list {name!r} in "
                "static_args",
            )  # fmt: skip
        _number(name, value, allowed, lambda x: x >= 1)


def steps(**named: Any) -> None:
    """Accepts a whole number of steps >= 1 or a () array."""
    for name, value in named.items():
        allowed = "a whole number of steps >= 1"
        if isinstance(value, float) and math.isfinite(value):
            _refuse(TypeError, name, value, allowed)
        _number(name, value, allowed, lambda x: 1 <= x < math.inf)


def choice(allowed: Collection[str], **named: Any) -> None:
    """Accepts one of a few words."""
    for name, value in named.items():
        if value not in allowed:
            _refuse(ValueError, name, value, "one of " + ", ".join(map(repr, allowed)))


def instance(kind: type, example: str, **named: Any) -> None:
    """Accepts a piece of the algebra, and shows how to make one."""
    for name, value in named.items():
        if not isinstance(value, kind):
            _refuse(TypeError, name, value, f"a {kind.__name__}, such as {example}")


def axes(**named: Any) -> None:
    """Accepts None, an axis, a tuple of axes or a function (path, leaf) -> axes."""
    for name, value in named.items():
        parts = value if isinstance(value, tuple) else (value,)
        whole = all(
            isinstance(part, numbers.Integral) and not isinstance(part, bool) for part in parts
        )
        if not (value is None or callable(value) or whole):
            allowed = "None, an int, a tuple of ints or a function (path, leaf) -> axes"
            _refuse(TypeError, name, value, allowed)


def _number(name: str, value: Any, allowed: str, holds: Callable[[Any], bool]) -> None:
    array = isinstance(value, (jax.Array, np.ndarray, np.generic))
    if not array and (isinstance(value, bool) or not isinstance(value, numbers.Real)):
        _refuse(TypeError, name, value, allowed)
    real = array and any(jnp.issubdtype(value.dtype, k) for k in (jnp.integer, jnp.floating))
    if array and not real:
        _refuse(TypeError, name, value, allowed)
    if array and value.shape != ():
        _refuse(ValueError, name, f"an array of shape {value.shape}", allowed)
    if not isinstance(value, jax.Array) and not holds(value):
        _refuse(ValueError, name, value, allowed)


def _refuse(error: type[Exception], name: str, value: Any, allowed: str) -> NoReturn:
    message = f"{name} must be {allowed}; got {value if isinstance(value, str) else repr(value)}"
    raise error(message)
