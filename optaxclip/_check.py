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

MOST_INT = 2**31 - 1  # of int32, in which steps are counted
MOST_SHOWN = 200  # characters of a value in an error: a whole tree of parameters is no help


def limit(**named: Any) -> None:
    """Accepts what can limit a norm: a number >= 0, inf included, a () array or a schedule."""
    allowed = (
        "a number >= 0, a () array or a schedule step -> value "
        "(inf turns clipping off, 0 gives zeros)"
    )
    for name, value in named.items():
        if not callable(value):
            _number(name, value, allowed, lambda x: x >= 0)
            _no_long_integer(name, value)


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
            _refuse(TypeError, name, value, allowed)
        _number(name, value, allowed, lambda x: x >= 1)  # and no bool
        _countable(name, value)


def order_of_bounds(**named: Any) -> None:
    """Accepts a lower and an upper limit in this order, as far as both are known."""
    (low_name, low), (high_name, high) = named.items()
    known = not any(callable(x) or isinstance(x, jax.Array) for x in (low, high))
    if known and low > high:
        _refuse(ValueError, low_name, low, f"at most {high_name}, which is {high!r}")


def history(window: int, **named: Any) -> None:
    """Accepts how many norms there must be, out of as many as are kept."""
    steps(**named)
    for name, value in named.items():
        if not isinstance(value, jax.Array) and value > window:
            _refuse(ValueError, name, value, f"at most the window, {window}")


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
            _refuse(TypeError, name, value, allowed)


def steps(**named: Any) -> None:
    """Accepts a whole number of steps >= 1 or a () array."""
    for name, value in named.items():
        allowed = "a whole number of steps >= 1 or a () array"
        _number(name, value, allowed, lambda x: x >= 1 and x.is_integer())
        _countable(name, value)


def patience(**named: Any) -> None:
    """Accepts what `steps` does, and inf for never."""
    for name, value in named.items():
        allowed = "a whole number of steps >= 1, inf for never, or a () array"
        _number(name, value, allowed, lambda x: x == math.inf or (x >= 1 and x.is_integer()))
        if isinstance(value, jax.Array) or value != math.inf:
            _countable(name, value)


def choice(allowed: Collection[Any], **named: Any) -> None:
    """Accepts one of a few values."""
    for name, value in named.items():
        if not any(type(value) is type(one) and value == one for one in allowed):
            _refuse(ValueError, name, value, "one of " + ", ".join(map(repr, allowed)))


def axis_name(**named: Any) -> None:
    """Accepts names of mesh axes, or a function that gives them leaf by leaf."""
    allowed = "a name, a tuple of names, a function (path, leaf) -> one of these, or None"
    for name, value in named.items():
        names = value if isinstance(value, tuple) else (value,)
        if not (value is None or callable(value) or all(isinstance(x, str) for x in names)):
            _refuse(TypeError, name, value, allowed)


def mask(**named: Any) -> None:
    """Accepts None, a tree of bools or a function params -> tree."""
    for name, value in named.items():
        leaves = [] if callable(value) else jax.tree.leaves(value)
        if not all(isinstance(leaf, bool | np.bool_) for leaf in leaves):
            _refuse(TypeError, name, value, "None, a tree of bools or a function of params")


def masking(value: Any) -> Callable[[Any], Any]:
    """The mask as a function of the tree, which judges it once there is a tree to judge it by."""

    def judged(tree: Any) -> Any:
        found = value(tree) if callable(value) else value
        mask(mask=found)
        prefix(tree, mask=found)
        return found

    return judged


def labels(**named: Any) -> None:
    """Accepts a tree of strings or a function path -> string."""
    for name, value in named.items():
        leaves = [] if callable(value) else jax.tree.leaves(value, is_leaf=lambda x: x is None)
        if not all(isinstance(leaf, str) for leaf in leaves):
            _refuse(TypeError, name, value, "a tree of strings or a function path -> string")


def prefix(tree: Any, **named: Any) -> None:
    """Accepts a tree that is a prefix of another one."""
    for name, value in named.items():
        try:
            jax.tree.broadcast(value, tree)
        except ValueError as error:
            raise ValueError(f"{name} must be a prefix of the tree; {error}") from None


def alike(tree: Any, of: str, **named: Any) -> None:
    """Accepts a tree that has a leaf of the same shape for every leaf of another one."""
    for name, value in named.items():
        found = _shapes(value)
        for path, shape in _shapes(tree).items():
            if found.get(path) != shape:
                got = found.get(path, "none")
                message = f"{name} must have the leaves of {of}; at {path!r}, {shape}; got {got}"
                raise ValueError(message)


def instance(kind: type, example: str, **named: Any) -> None:
    """Accepts a piece of the algebra, and shows how to make one."""
    for name, value in named.items():
        if not isinstance(value, kind):
            _refuse(TypeError, name, value, f"a {kind.__name__}, such as {example}")


def function(example: str, **named: Any) -> None:
    """Accepts a function, and shows one."""
    for name, value in named.items():
        if not callable(value):
            _refuse(TypeError, name, value, f"a function, such as {example}")


def scheduled(value: Any) -> None:
    """Accepts what a schedule may give; how large it is, the engine sees to."""
    array = isinstance(value, (jax.Array, np.ndarray))
    if array and value.shape != ():
        _refuse(ValueError, "the value of a schedule", value, "a number or a () array")
    if not _is_real(value):
        _refuse(TypeError, "the value of a schedule", value, "a number or a () array")


def _shapes(tree: Any) -> dict[str, Any]:
    leaves, _ = jax.tree.flatten_with_path(tree)
    keystr = jax.tree_util.keystr
    return {keystr(path, simple=True, separator="/"): jnp.shape(x) for path, x in leaves}


def _static(name: str, value: Any) -> None:
    """Refuses arrays for what shapes the program and so cannot be traced."""
    if isinstance(value, jax.Array):
        allowed = (
            f"a Python value, no JAX array (optax.inject_hyperparams makes one of a number unless "
            f"{name!r} is in its static_args)"
        )
        _refuse(TypeError, name, value, allowed)


def _number(name: str, value: Any, allowed: str, holds: Callable[[float], bool]) -> None:
    if not _is_real(value):
        _refuse(TypeError, name, value, allowed)
    if np.shape(value) != ():
        _refuse(ValueError, name, value, allowed)
    if isinstance(value, jax.Array):
        return
    try:
        number = float(value)
    except OverflowError:  # an int above 1.8e308 is no number that a limit could be
        number = math.nan
    if not holds(number):
        _refuse(ValueError, name, value, allowed)


def _is_real(value: Any) -> bool:
    """Whether JAX takes it as a real number, or as an array of them."""
    if isinstance(value, (jax.Array, np.ndarray, np.generic)):
        # Longer floats than float64 are no dtype of JAX.
        kinds = (jnp.integer, jnp.floating)
        return value.dtype.itemsize <= 8 and any(jnp.issubdtype(value.dtype, k) for k in kinds)
    return isinstance(value, int | float) and not isinstance(value, bool)


def _countable(name: str, value: Any) -> None:
    if not isinstance(value, jax.Array) and float(value) > MOST_INT:
        _refuse(ValueError, name, value, f"a whole number <= {MOST_INT}, as steps are int32")


def _no_long_integer(name: str, value: Any) -> None:
    # JAX makes int32 of a NumPy integer before float32, and wraps it around: 2^40 would be 0.
    kind = getattr(getattr(value, "dtype", None), "kind", "i" if isinstance(value, int) else "f")
    if kind in "iu" and not isinstance(value, jax.Array) and float(value) > MOST_INT:
        _refuse(ValueError, name, value, f"a float where it is above {MOST_INT}")


def _refuse(error: type[Exception], name: str, value: Any, allowed: str) -> NoReturn:
    raise error(f"{name} must be {allowed}; got {_shown(value)}")


def _shown(value: Any) -> str:
    """A value in an error: no contents of arrays with more than one entry, and no long story."""
    if isinstance(value, (jax.Array, np.ndarray)) and value.shape != ():
        return f"an array of shape {value.shape}"
    leaves, treedef = jax.tree.flatten(value)
    if treedef.num_nodes > 1:  # a tree, of parameters perhaps
        value = treedef.unflatten([_Shown(_shown(leaf)) for leaf in leaves])
    text = repr(value)
    return text if len(text) <= MOST_SHOWN else text[: MOST_SHOWN - 3] + "..."


class _Shown(str):
    """Text that is shown without quotes."""

    __slots__ = ()
    __repr__ = str.__str__
