"""norms --clipper--> limits, factors: what a clipper would have done to the norms of a run."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from . import _check
from .record import Metrics, metrics

Tree = Any


class Replay(NamedTuple):
    """What a clipper would have done, step by step, with a norm each."""

    limit: np.ndarray  # (n,) float32, inf where there was none
    factor: np.ndarray  # (n,) float32
    clipped_norm: np.ndarray  # (n,) float32, what the norm became
    clipped: np.ndarray  # (n,) bool, whether the norm was finite and the factor below 1


def replay(norms: Any, clipper: optax.GradientTransformation) -> Replay:
    """What a clipper would have done to a run of norms.

    It runs the clipper itself on a tree of one scalar that has this norm, in one `lax.scan`. The
    norms of a run that was clipped in another way would have been other ones.

    Args:
      norms: (n,) in their order, before clipping; inf and NaN included.
      clipper: a clip with metrics, and one norm for the whole tree that depends on all entries.

    Returns:
      A :class:`Replay` of NumPy arrays.

    Raises:
      TypeError: if an argument is not such.
      ValueError: if a norm is negative, or `clipper` has several norms (of leaves, units, entries
        or the parameters too), several clips or none, or no metrics.

    Example:
      >>> import jax.numpy as jnp, optaxclip
      >>> done = replay([0.5, 2.0, jnp.nan, 4.0], optaxclip.clip_by_global_norm(1.0))
      >>> print(done.factor, done.clipped_norm, done.clipped)
      [1.   0.5  0.   0.25] [0.5 1.  0.  1. ] [False  True False  True]
    """
    _check.instance(
        optax.GradientTransformation, "optaxclip.clip_by_global_norm()", clipper=clipper
    )
    with np.errstate(over="ignore"):  # what float32 cannot hold is inf
        sizes = stream(norms).astype(np.float32)
    _has_one_norm(clipper)
    params = {"norm": jnp.ones((), jnp.float32)}

    def step(state: Tree, norm: jax.Array) -> tuple[Tree, tuple[jax.Array, ...]]:
        _, state = clipper.update({"norm": norm}, state, params)
        now = Metrics(**metrics(state))
        return state, (now.limit, now.factor, now.clipped_norm, now.clipped > 0)

    run = jax.jit(functools.partial(jax.lax.scan, step))
    return Replay(*map(np.asarray, run(clipper.init(params), jnp.asarray(sizes))[1]))


def _has_one_norm(clipper: optax.GradientTransformation) -> None:
    """Refuses a clipper of which a tree of one scalar would not be a fair sample."""
    found = []
    for size in (3.0, 4.0):
        grads = {"a": jnp.float32(size), "b": jnp.float32(4)}
        params = jax.tree.map(jnp.ones_like, grads)
        _, state = clipper.update(grads, clipper.init(params), params)
        read = metrics(state)
        if set(read) != set(Metrics._fields):
            got = "no metrics" if not read else "those of " + ", ".join(read)
            raise ValueError(f"clipper must be one clip, with record=True; got {got}")
        found.append(float(read["norm"]))
    # The largest of several norms does not know of the other ones, and neither does one norm of
    # order inf: but this is NaN where an entry is, and lets no other one pass.
    grads = {"a": jnp.float32(3), "b": jnp.float32(jnp.nan)}
    updates, _ = clipper.update(grads, clipper.init(params), params)
    if found[0] == found[1] and jnp.isfinite(updates["a"]) and updates["a"] != 0:
        raise ValueError(
            "clipper must have one norm, that of all entries of the tree, such as by "
            "measure=measure.global_norm(); this one has several, of leaves, units or entries"
        )


def stream(norms: Any, other: str = "") -> np.ndarray:
    """The norms as float64, judged."""
    allowed = f"norms must be a sequence of real numbers >= 0, inf and NaN included{other}"
    try:
        found = np.asarray(norms)
    except ValueError:  # a ragged one
        raise TypeError(f"{allowed}; got {type(norms).__name__}") from None
    if not any(jnp.issubdtype(found.dtype, kind) for kind in (jnp.integer, jnp.floating)):
        raise TypeError(f"{allowed}; got {type(norms).__name__}")
    if found.ndim != 1:
        raise ValueError(f"{allowed}; got an array of shape {found.shape}")
    found = found.astype(np.float64)
    if np.any(found < 0):
        raise ValueError(f"{allowed}; got {found[found < 0][0]:g}")
    return found
