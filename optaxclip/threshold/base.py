"""The pair that every threshold is."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optaxclip._numbers import leading
from optaxclip._range import Steps

Memory = Any


class Threshold(NamedTuple):
    """What is remembered of past norms, and the limit that follows from it."""

    init: Callable[[Any], Memory]  # norm (anything with shape and dtype) -> memory
    update: Callable[[jax.Array, Memory], tuple[jax.Array, Memory]]  # -> limit like norm, memory


Update = Callable[[jax.Array, Memory], tuple[jax.Array, Memory]]
_UNIFORM: weakref.WeakSet[Update] = weakref.WeakSet()


def uniform(update: Update) -> Update:
    """The same function, known as one that gives all norms the same limit, whatever they are."""
    _UNIFORM.add(update)
    return update


def is_uniform(threshold: Threshold) -> bool:
    """Whether one limit is for all norms."""
    return threshold.update in _UNIFORM


class Clock(NamedTuple):
    """Steps that were taken, good or bad: the one part of a memory that a bad norm moves on."""

    step: Steps  # () int32, calls of update so far; stays at its largest value


def zeros_for(norm: Any, dtype: Any = jnp.float32, *, length: int | None = None) -> jax.Array:
    """Zeros of the norm's shape and sharding, or `length` times that."""
    one = jnp.zeros_like(norm, dtype)
    return one if length is None else jnp.broadcast_to(one, (int(length), *norm.shape))


def started() -> Clock:
    """A clock at step 0."""
    return Clock(jnp.zeros((), jnp.int32))


def ticked(clock: Clock) -> Clock:
    """The clock one step later."""
    return Clock(optax.safe_increment(clock.step))


def choose(mask: jax.Array, new: Memory, old: Memory) -> Memory:
    """The one memory where the mask holds, the other elsewhere; a clock of the new one runs on."""

    def chosen(x: Any, y: Any) -> Any:
        if isinstance(x, Clock):
            return x
        return jnp.where(leading(mask, y), x.astype(y.dtype), y)

    return jax.tree.map(chosen, new, old, is_leaf=lambda x: isinstance(x, Clock))
