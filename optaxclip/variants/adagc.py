"""AdaGC: a limit for the whole tree at first, then one per leaf, which follows its norm.

Both clips are of the norms of the leaves, as if these were the gradients, and each leaf is
multiplied once by what has become of its norm: one read of the gradients, and no clipped tree in
between.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optaxclip import _check, threshold
from optaxclip._clip import clip
from optaxclip._numbers import TOO_LARGE, part
from optaxclip.measure import Measure, global_norm, leaf_norm
from optaxclip.measure.looks import in_range
from optaxclip.measure.shards import AxisName
from optaxclip.record import ClipState
from optaxclip.threshold import Threshold
from optaxclip.threshold.constant import Limit

from .adaptive import Patience, adaptive

CONVENTIONS = ("paper", "paddle")


class AdaGCState(NamedTuple):
    """The state of `adagc`."""

    tree: ClipState  # of the global limit of the warm-up
    leaf: ClipState


def adagc(
    ratio: float | jax.Array = 1.05,
    *,
    decay: float | jax.Array = 0.98,
    warmup: int | jax.Array = 100,
    max_norm: Limit = 1.0,
    convention: str = "paper",
    patience: Patience = 100,
    measure: Measure | None = None,
    min_norm: Limit = 0.0,
    axis_name: AxisName = None,
    nonfinite: str = "zero",
    record: bool = True,
) -> optax.GradientTransformation:
    """Bounds the norm of every leaf by its running average, after a warm-up with a global limit.

    First, for T steps: G <- G min(1, lambda_abs / ||G||), and gamma_i = min_t ||g_i||. Then
    g_i <- g_i min(1, lambda_rel gamma_i / ||g_i||), gamma_i <- beta gamma_i + (1 - beta) ||g_i||
    with the clipped g_i. Half of ordinary steps are clipped a little: it also smooths. In a chain
    it comes first. Metrics are named "tree/norm" and "leaf/norm", there being two clips. Both clip
    the norms of the leaves, and each leaf is multiplied once; with nonfinite="sanitize", or a
    measure of your own, they clip the gradients one after the other.

    Args:
      ratio: lambda_rel >= 0.
      decay: beta, in [0, 1).
      warmup: T, steps of the global limit and norms that each leaf starts from.
      max_norm: lambda_abs, the global limit of the warm-up: a number, a () array or a schedule.
      convention: "paper": gamma starts from norms after the global clip. "paddle": from norms
        before it, as the authors' code has it, with ratio 1.04, decay 0.99 and 101 steps.
      patience: after so many norms in a row above the limit, these are a new level and no burst:
        the limit is learned from them alone. math.inf:
        never, as in the paper.
      measure: what a norm is of after the warm-up; None: each leaf.
      min_norm: the least limit after the warm-up: a number, a () array or a schedule.
      axis_name: mesh axes that leaves are split over, where JAX does not track it, see
        :mod:`optaxclip.measure`.
      nonfinite: policy for groups whose norm is not finite: of both clips, so that in the order of
        the paper one bad leaf makes a bad tree, after the warm-up too.
      record: whether to keep metrics.

    Returns:
      A transformation; shapes and dtypes of the updates are those of the gradients.

    Raises:
      TypeError, ValueError: if an argument is not such.

    Example:
      >>> import jax.numpy as jnp, optaxclip
      >>> tx = optaxclip.adagc(warmup=2)
      >>> state = tx.init(jnp.zeros(1))
      >>> for norm in [4.0, 0.8, 8.0]:
      ...     updates, state = tx.update(jnp.array([norm]), state)
      ...     print(updates)
      [1.]
      [0.8]
      [0.84]

    Reference:
      Wang et al., AdaGC, arXiv:2502.11034, algorithm 1.

    Deviation from the paper: a zero norm is not learned (there it freezes the leaf for ever), and
    the patience: without it gamma grows by 0.1 % per step, so that a rise by 2 is clipped for 645
    steps and one by 20 for some 2950; with it both for 100.
    """
    _check.choice(CONVENTIONS, convention=convention)
    _check.limit(max_norm=max_norm)
    _check.steps(warmup=warmup)
    off, fixed = threshold.constant(math.inf), threshold.constant(max_norm)
    early = threshold.until(warmup, _wary(fixed), off)
    own = threshold.ema_ratio(ratio, decay=decay, warmup=warmup)

    def clips(whole: Measure, parts: Measure) -> dict[str, optax.GradientTransformation]:
        tree = clip(whole, early, nonfinite=nonfinite, record=record)
        leaf = adaptive(
            None,
            parts,
            # A leaf that saw zeros or NaN is not done with its warm-up when the global one ends.
            threshold.fallback(own, threshold.until(warmup, off, fixed)),
            patience=patience,
            warmup=warmup,
            min_norm=min_norm,
            nonfinite=nonfinite,
            record=record,
        )
        # Which one is first decides what gamma learns in the warm-up.
        both = {"tree": tree, "leaf": leaf}
        return both if convention == "paper" else dict(reversed(both.items()))

    leaves = leaf_norm(axis_name=axis_name)
    of_grads = clips(global_norm(axis_name=axis_name), leaves if measure is None else measure)
    of_norms = clips(global_norm(axis_name=()), _EACH)  # which are whole everywhere

    def init(params: Any) -> AdaGCState:
        return AdaGCState(of_grads["tree"].init(params), of_grads["leaf"].init(params))

    def update(grads: Any, state: AdaGCState, params: Any = None) -> tuple[Any, AdaGCState]:
        # "sanitize" changes norms entry by entry, and not all measures grow with a factor.
        if measure is not None or nonfinite == "sanitize":
            return _in_a_row(of_grads, grads, state, params)
        floats, whole = part(grads)
        updates, state = once(floats, state)
        return whole(updates), state

    @functools.partial(jax.jit, inline=True)
    def once(grads: Any, state: AdaGCState) -> tuple[Any, AdaGCState]:
        """Clips the norms of the leaves, and then every leaf to what has become of its own."""
        norms = in_range(leaves, grads, None)
        clipped, states = norms, {}
        for name, each in of_norms.items():
            before = clipped
            clipped, states[name] = each.update(before, getattr(state, name))
            if name == "tree":  # one factor for all, also for leaves of zeros
                shared = jnp.max(_quotients(clipped, before), where=before > 0, initial=0)
        factors = jnp.where((norms == 0) & jnp.any(norms > 0), shared, _quotients(clipped, norms))
        known = leaves._replace(norms=lambda grads, params: norms, sums=False)
        product = clip(known, off, lambda norm, limit: factors, nonfinite=nonfinite, record=False)
        return product.update(grads, ClipState((), None))[0], AdaGCState(**states)

    return optax.GradientTransformation(init, update)


# Each number as a norm of its own: how norms are clipped as if they were gradients.
_EACH = Measure(lambda norms, params: norms, lambda factors, norms: factors, sums=False)


def _quotients(clipped: jax.Array, norms: jax.Array) -> jax.Array:
    """What norms have been multiplied by: 1 where they are as they were, be that 0."""
    same = clipped == norms
    return jnp.where(same, 1, clipped / jnp.where(same, 1, norms))


def _in_a_row(
    clips: dict[str, optax.GradientTransformation], grads: Any, state: AdaGCState, params: Any
) -> tuple[Any, AdaGCState]:
    """The gradients after both clips, each of which measures what the one before has made."""
    states = {}
    for name, each in clips.items():
        grads, states[name] = each.update(grads, getattr(state, name), params)
    return grads, AdaGCState(**states)


def _wary(limited: Threshold) -> Threshold:
    """A limit that drops a norm above it which no memory learns.

    Cut to norm 1, a leaf of 1e20 would leave the others with norms of 1e-20 to learn.
    """

    def update(norm: jax.Array, memory: Any) -> tuple[jax.Array, Any]:
        limit, memory = limited.update(norm, memory)
        return jnp.where((norm >= TOO_LARGE) & (norm > limit), 0, limit), memory

    return Threshold(limited.init, update)
