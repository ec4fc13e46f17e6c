"""Clippers whose limit is a multiple of what the norm was: of its running average, or the last.

Norms that are 0, not finite or >= 1.8e19 are never learned. Every group of the measure has
numbers of its own, by default every leaf. To change a hyperparameter over time, use
`optax.inject_hyperparams`.
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

from .adaptive import NEVER, PATIENCE, SHORT_WARMUP, Patience, adaptive

CONVENTIONS = ("paper", "paddle")


class AdaGCState(NamedTuple):
    """The state of `adagc`."""

    tree: ClipState  # of the global limit of the warm-up
    leaf: ClipState


def clip_by_ema_ratio(
    ratio: float | jax.Array = 2.0,
    *,
    decay: float | jax.Array = 0.95,
    warmup: int | jax.Array = SHORT_WARMUP,
    patience: Patience = PATIENCE,
    measure: Measure | None = None,
    min_norm: Limit = 0.0,
    max_norm: Limit = math.inf,
    nonfinite: str = "zero",
    record: bool = True,
) -> optax.GradientTransformation:
    """Bounds the norm of every leaf by a multiple of its running average: tau = lambda gamma.

    gamma <- beta gamma + (1 - beta) min(n, tau). For layers that explode by themselves. With the
    default, a norm is clipped that is twice what is usual, and ordinary ones never. In a chain it
    comes first.

    Args:
      ratio: lambda >= 0.
      decay: beta, in [0, 1).
      warmup: how many norms there must be; the average starts from the smallest of them.
      patience: after so many norms in a row above the limit, these are a new level and no burst:
        the limit is learned from them alone. math.inf: never.
      measure: what a norm is of; None: each leaf.
      min_norm: the least limit, once there is one: a number, a () array or a schedule.
      max_norm: the largest limit, from the first step on, when there is no other yet; the same.
      nonfinite: policy for groups whose norm is not finite.
      record: whether to keep metrics.

    Returns:
      A transformation; shapes and dtypes of the updates are those of the gradients.

    Raises:
      TypeError, ValueError: if an argument is not such.

    Example:
      >>> import jax.numpy as jnp, optaxclip
      >>> tx = optaxclip.clip_by_ema_ratio(warmup=2)
      >>> state = tx.init(jnp.zeros(1))
      >>> for norm in [1.0, 1.1, 8.0]:
      ...     updates, state = tx.update(jnp.array([norm]), state)
      ...     print(updates)
      [1.]
      [1.1]
      [2.]

    Reference:
      OLMo's `max_grad_norm_ratio` (Apache-2.0); beta is the larger one of Adam's there.

    Deviation from OLMo, which is warmup=1 and patience=math.inf from its second step on: a spike
    in the first step sets the scale there, and a zero freezes the leaf.
    """
    return adaptive(
        measure,
        leaf_norm(),
        threshold.ema_ratio(ratio, decay=decay, warmup=warmup),
        patience=patience,
        warmup=warmup,
        min_norm=min_norm,
        max_norm=max_norm,
        nonfinite=nonfinite,
        record=record,
    )


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


def clip_by_norm_growth(
    max_growth: float | jax.Array = 1.01,
    *,
    floor: float | jax.Array = 0.0,
    patience: Patience = NEVER,
    measure: Measure | None = None,
    max_norm: Limit = math.inf,
    nonfinite: str = "zero",
    record: bool = True,
) -> optax.GradientTransformation:
    """Lets the norm of every leaf grow by a factor per step: tau = gamma min(n_{t-1}, tau_{t-1}).

    Meant for updates whose norm is smooth, behind an optimizer's preconditioner and before the
    learning rate; on raw gradients it clips most steps, noise being growth.

    Args:
      max_growth: gamma >= 1.
      floor: >= 0, the least limit, once there is one. Without it, a norm that was small for a
        step is held back for log(rise) / log(gamma) steps.
      patience: after so many norms in a row above the limit, the limit is learned from them
        alone, which lets a rise through after so many steps. math.inf: never.
      measure: what a norm is of; None: each leaf.
      max_norm: the largest limit, from the first step on: a number, a () array or a schedule.
      nonfinite: policy for groups whose norm is not finite.
      record: whether to keep metrics.

    Returns:
      A transformation; shapes and dtypes of the updates are those of the gradients.

    Raises:
      TypeError, ValueError: if an argument is not such.

    Example:
      >>> import jax.numpy as jnp, optaxclip
      >>> tx = optaxclip.clip_by_norm_growth()
      >>> state = tx.init(jnp.zeros(1))
      >>> for norm in [1.0, 5.0, 5.0, 0.5]:
      ...     updates, state = tx.update(jnp.array([norm]), state)
      ...     print(updates)
      [1.]
      [1.01]
      [1.0201]
      [0.5]

    Reference:
      Chen et al., Fira, arXiv:2410.01623 (norm-growth limiter), and its Apache-2.0 code.

    Deviation from Fira: no 1e-8 is added to the last norm, and a zero norm is not learned, which
    there starts the leaf again from 1e-8. By its nature the rule holds back any rise: one by 20 for
    301 steps, one by 1000 for 694.
    """
    return adaptive(
        measure,
        leaf_norm(),
        threshold.growth(max_growth, floor=floor),
        patience=patience,
        max_norm=max_norm,
        nonfinite=nonfinite,
        record=record,
    )
