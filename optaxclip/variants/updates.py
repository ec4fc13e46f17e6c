"""Clippers of final updates, which come last in a chain, after the learning rate."""

from __future__ import annotations

import math

import jax
import optax

from optaxclip._clip import clip
from optaxclip.measure import Measure, leaf_norm, relative_entries
from optaxclip.threshold import constant


def clippy(
    relative: float | jax.Array = 0.5,
    *,
    absolute: float | jax.Array = 0.01,
    measure: Measure | None = None,
    nonfinite: str = "zero",
    record: bool = True,
) -> optax.GradientTransformation:
    """Scales a leaf's update until no parameter changes by too large a share of itself.

    u = Delta min(1, min_i (lambda_rel |w_i| + lambda_abs) / |Delta_i|). For models that a few
    parameters can throw off, such as ranking models under Adagrad. It comes **last** in a chain,
    after the learning rate; `update` needs params. In the metrics, a norm is the largest
    |Delta_i| / (lambda_rel |w_i| + lambda_abs), and the limit is 1.

    Args:
      relative: lambda_rel >= 0, the largest change as a share of the parameter.
      absolute: lambda_abs > 0, what a parameter may always change by. A leaf with one parameter
        of 0 moves no faster than this: 1e-7, as in the authors' code, stops a fresh bias.
      measure: what the quotients are taken together by; None: the largest one of each leaf.
      nonfinite: policy for leaves whose largest quotient is not finite.
      record: whether to keep metrics.

    Returns:
      A transformation; shapes and dtypes of the updates are as they come in.

    Raises:
      TypeError, ValueError: if an argument is not such; ValueError at update without params.

    Example:
      >>> import jax.numpy as jnp, optax, optaxclip
      >>> tx = optax.chain(optax.sgd(0.1), optaxclip.clippy())
      >>> params = jnp.array([1.0, 0.1, 0.0])
      >>> state = tx.init(params)
      >>> for grads in [[-0.5, -0.2, 0.1], [-0.5, -2.0, 0.1]]:
      ...     updates, state = tx.update(jnp.array(grads), state, params)
      ...     print(updates.round(4))
      [ 0.05  0.02 -0.01]
      [ 0.015  0.06  -0.003]

    Reference:
      Tang et al., Improving training stability for multitask ranking models in recommender
      systems, arXiv:2302.09178, algorithm 1. The defaults are those of its users' ports; the
      authors' code has 0.1 and 1e-7.

    Deviation from the paper: without the term lambda_acc / sqrt(accumulator) of Adagrad's state.
    """
    together = leaf_norm(math.inf) if measure is None else measure
    quotients = relative_entries(together, relative, absolute)
    return clip(quotients, constant(1.0), nonfinite=nonfinite, record=record)
