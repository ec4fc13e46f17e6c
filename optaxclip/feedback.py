"""clipper -> clipper with error feedback: what is clipped is carried to later steps.

    grads --+--> g + D --clipper--> updates u
            |      |                  |
          carry D  +-- g + D - u <----+
            |             |
            +--- bounded -+

A clip of noisy gradients is biased: what a skewed distribution has in its long tail is cut. With
error feedback it is only late: the sum of the updates is that of the gradients, but for the last
carry, as long as that stays within its bound.

It is no means against spikes that are errors. Such a spike is paid out, too: after it, up to
`max_carry` steps point to where it pointed.
"""

from __future__ import annotations

import functools
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from . import _check
from ._numbers import part, real_dtype, where, widen
from ._place import beside, placeable
from ._range import Range
from .scale import rescale

Tree = Any


class FeedbackState(NamedTuple):
    """The state of `clip_with_feedback`."""

    # like params, None for what is no float leaf; float32
    carry: Annotated[
        Tree, Range(dtypes=("float32", "float64", "complex64", "complex128"), front=None, each=True)
    ]
    clip: Tree  # the state of the clipper


def clip_with_feedback(
    clipper: optax.GradientTransformation,
    *,
    decay: float | jax.Array = 1.0,
    max_carry: float | jax.Array = 10.0,
) -> optax.GradientTransformationExtraArgs:
    """Clips the gradient plus what earlier steps clipped off: U-Clip.

    u = clip(g + D), D' = decay (g + D - u), bounded entry by entry by |D'| <= max_carry |u|. A clip
    by groups multiplies all entries of a group by one factor, so the bound on entries is that on
    the norm of each group, in units of what the group may be updated by in a step.

    Where a step gives an entry no update, because it is bad (with nonfinite="zero" or "sanitize"),
    skipped, or under a limit of 0, the carry of that entry stays as it was: nothing of it has been
    paid, and nothing is added. So it does where g + D - u is inf or NaN. An update that rounds to 0
    in the dtype of its leaf counts as none, too: the gradient of such an entry is lost. In float16
    that is an update below 3e-8, as of 1e-5 beside 1000 under a limit of 1; in float32 and bfloat16
    one below 1.2e-38.

    Args:
      clipper: a clip of this package or another transformation, which gives updates in the dtypes
        of what it sees. It is given all extra arguments. Its threshold sees norms of g + D. Around
        a normalizer, which may enlarge, this makes little sense.
      decay: share of the carry that is kept, from 0 to 1.
      max_carry: >= 0, how many times the update that is made the carry may be; about as many steps
        go on after the gradients have gone. inf: no bound, as in the paper; 0: no feedback.

    Returns:
      A transformation whose state is a :class:`FeedbackState`; its carry takes the memory of the
      parameters in float32. The shapes and dtypes of the updates are those of the gradients, and
      while nothing is carried, the updates are bit for bit those of the clipper. What rounding to a
      low precision takes from them is carried, too.

    Raises:
      TypeError, ValueError: if an argument is not such.

    Example:
      >>> import jax.numpy as jnp, optaxclip
      >>> tx = optaxclip.clip_with_feedback(optaxclip.clip_by_global_norm(1.0))
      >>> state = tx.init(jnp.zeros(1))
      >>> for grads in [[0.5], [3.0], [0.5], [0.5], [0.0], [0.0]]:
      ...     updates, state = tx.update(jnp.array(grads), state)
      ...     print(updates, state.carry)
      [0.5] [0.]
      [1.] [2.]
      [1.] [1.5]
      [1.] [1.]
      [1.] [0.]
      [0.] [0.]

    Reference:
      Elesedy, Hutter, U-Clip: on-average unbiased stochastic gradient clipping, arXiv:2302.02971,
      algorithm 1.

    Deviations from the paper: the bound and the decay, because gradients that stay above the limit
    make the carry grow for ever; and what is said above of steps without an update.
    """
    example = "clip_by_global_norm(1.0)"
    _check.instance(optax.GradientTransformation, example, clipper=clipper)
    _check.within(0, 1, decay=decay)
    _check.within(0, jnp.inf, max_carry=max_carry)
    inside = optax.with_extra_args_support(clipper)

    def init(params: Tree) -> FeedbackState:
        floats, _ = part(params)
        place = beside(floats)

        def blank(x: Any) -> jax.Array:
            x = placeable(x)
            return place(jnp.zeros_like(x, jax.eval_shape(widen, x).dtype), x)

        return FeedbackState(jax.tree.map(blank, floats), inside.init(floats))

    # Programs of their own for eager calls, without the clipper: extra arguments may be no arrays.
    @functools.partial(jax.jit, inline=True)
    def before(grads: Tree, carry: Tree) -> Tree:
        _check.alike(carry, "the params given to init", gradients=grads)
        return jax.tree.map(_with_carry, grads, carry)

    @functools.partial(jax.jit, inline=True)
    def after(grads: Tree, carry: Tree, updates: Tree) -> Tree:
        left = functools.partial(_left, decay=decay, max_carry=max_carry)
        return jax.tree.map(left, grads, carry, updates)

    def update(
        grads: Tree, state: FeedbackState, params: Tree = None, **extra: Any
    ) -> tuple[Tree, FeedbackState]:
        floats, whole = part(grads)
        own = None if params is None else part(params)[0]
        seen = before(floats, state.carry)
        updates, clip_state = inside.update(seen, state.clip, own, **extra)
        carry = after(floats, state.carry, updates)
        return whole(updates), FeedbackState(carry, clip_state)

    return optax.GradientTransformationExtraArgs(init, update)


def _with_carry(grad: jax.Array, carry: jax.Array) -> jax.Array:
    """The sum in the dtype of the gradient, so that the clipper keeps all that it promises."""
    total = (widen(grad) + carry).astype(grad.dtype)
    # g alone where nothing is owed, bit for bit, and where the sum is too large for its dtype.
    return where((carry != 0) & jnp.isfinite(total), total, grad)


def _left(
    grad: jax.Array, carry: jax.Array, update: jax.Array, *, decay: Any, max_carry: Any
) -> jax.Array:
    """The next carry of one leaf."""
    total, update = widen(grad) + carry, widen(update)
    paid = ((update != 0) | (total == 0)) & jnp.isfinite(total - update)
    share, most = (jnp.asarray(x, real_dtype(carry)) for x in (decay, max_carry))
    # A traced number that is none keeps nothing.
    share = jnp.where((share >= 0) & (share <= 1), share, 0).astype(carry.dtype)
    most = jnp.where(most >= 0, jnp.minimum(most, jnp.finfo(most.dtype).max), 0)  # inf x 0 is NaN
    rest = share * jnp.where(paid, total - update, 0)
    bound = most * jnp.abs(jnp.where(paid, update, 0))
    rest = rest * rescale(jnp.abs(rest), bound).astype(carry.dtype)
    return jnp.where(paid, rest, carry)
