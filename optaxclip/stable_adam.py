"""Adam with update clipping: what no chain after Adam can express.

    grads --> m, v --> direction m / sqrt(v) --clip by the RMS of g / sqrt(v)--> updates

The clip limits one tree by the norm of another, so it sits inside the preconditioner.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from . import _check
from ._clip import clip
from ._numbers import as_like, part, where_positive, widen
from ._place import beside, placeable
from ._range import Range, Steps
from .measure import Measure, leaf_rms
from .measure.arithmetic import squared
from .measure.looks import in_range
from .measure.shards import AxisName
from .record import ClipState
from .threshold import constant
from .threshold.averages import rate, weight

Tree = Any

REAL, COMPLEX = ("float32", "float64"), ("complex64", "complex128")


class Moments(NamedTuple):
    """The moments of a leaf, or of all, as Adam corrects them for having started from 0."""

    mu: Annotated[Tree, Range(dtypes=(*REAL, *COMPLEX), front=None, each=True)]
    nu: Annotated[Tree, Range(0, dtypes=REAL, front=None, each=True)]
    seen: Steps

    def laws(self) -> dict[str, bool]:
        """What ties the fields together, if they are of all leaves."""
        (mu, one), (nu, other) = map(jax.tree.flatten, self[:2])
        alike = one == other and list(map(jnp.shape, mu)) == list(map(jnp.shape, nu))
        return {
            "mu and nu have leaves of the same shapes": alike,
            "seen has a number for each leaf": jnp.shape(self.seen)[-1:] == (len(mu),),
        }


class StableAdamState(NamedTuple):
    """The state of `scale_by_stable_adam`."""

    mu: Tree  # like params, None for what is no float leaf; float32
    nu: Tree  # as mu, but real
    seen: jax.Array  # (leaves,) int32, gradients that each float leaf has learned
    clip: ClipState  # without memory; its metrics are of the RMS


def scale_by_stable_adam(
    b1: float | jax.Array = 0.9,
    b2: float | jax.Array = 0.99,
    eps: float | jax.Array = 1e-6,
    *,
    max_rms: float | jax.Array | Callable[[jax.Array], Any] = 1.0,
    axis_name: AxisName = None,
    nonfinite: str = "zero",
    record: bool = True,
) -> optax.GradientTransformation:
    """Adam's direction, shrunk leaf by leaf while the gradient is larger than its past.

    u = m / (sqrt(v) + eps) / max(1, RMS / d), RMS = sqrt(mean(g^2 / max(v, eps^2))), with moments
    that are corrected for bias and a v that knows g already. It takes the place of
    `optax.scale_by_adam`. A clip of m / sqrt(v) behind that one does not notice a spike: m knows
    only a tenth of it.

    Args:
      b1: decay of m, in [0, 1).
      b2: decay of v, in [0, 1).
      eps: > 0.
      max_rms: d >= 0, the largest root mean square of a leaf: a number, a () array or a schedule.
      axis_name: mesh axes that leaves are split over, where JAX does not track it, see
        :mod:`optaxclip.measure`.
      nonfinite: policy for leaves whose RMS is not finite; such a step leaves their moments alone.
      record: whether to keep metrics; a norm in them is an RMS.

    Returns:
      A transformation; the updates have the shapes and dtypes of the gradients. Its memory is
      that of Adam, in float32.

    Raises:
      TypeError, ValueError: if an argument is not such.

    Example:
      >>> import jax.numpy as jnp, optax, optaxclip
      >>> tx = optax.chain(optaxclip.scale_by_stable_adam(), optax.scale_by_learning_rate(1.0))
      >>> state = tx.init(jnp.zeros(2))
      >>> for grads in [[1.0, 0.1], [1.0, 0.1], [30.0, 0.1]]:
      ...     updates, state = tx.update(jnp.array(grads), state)
      >>> rms = optaxclip.metrics(state)["norm"]
      >>> print(f"{updates[0]:.3f} {updates[1]:.3f} {rms:.3f}")
      -0.477 -0.710 1.408

    Reference:
      Wortsman et al., Stable and low-precision training for large-scale vision-language models,
      arXiv:2304.13013, algorithm 2; with the defaults of optimi's StableAdamW (MIT).
    """
    _check.decay(b1=b1, b2=b2)
    _check.positive(eps=eps)
    _check.limit(max_rms=max_rms)
    # No square overflows: v knows g, so the quotient is at most 1 / sqrt(1 - b2).
    rms = leaf_rms(axis_name=axis_name)._replace(sums=False)

    def size(direction: Tree, surprise: Tree) -> Tree:
        """The RMS of g / sqrt(v), which comes in the place of the parameters."""
        # Under "sanitize", an entry that is bad in the one has been set to 0 in the other.
        gone = lambda d, s: jnp.where(jnp.isfinite(d) & ~jnp.isfinite(s), jnp.zeros_like(s), s)
        if nonfinite == "sanitize":  # elsewhere a second use, for which a GPU would write quotients
            surprise = jax.tree.map(gone, direction, surprise)
        return in_range(rms, surprise, None)

    measure = Measure(size, rms.spread, sums=False)
    limiter = clip(measure, constant(max_rms), nonfinite=nonfinite, record=record)

    def init(params: Tree) -> StableAdamState:
        floats, _ = part(params)
        place = beside(floats)
        blank = lambda x, dtype: place(jnp.zeros_like(x, dtype), x)
        leaves = jax.tree.map(placeable, floats)
        mu = jax.tree.map(lambda x: blank(x, _wide(x)), leaves)
        nu = jax.tree.map(lambda x: blank(x, jnp.finfo(_wide(x)).dtype), leaves)
        seen = place(jnp.zeros(len(jax.tree.leaves(floats)), jnp.int32))
        return StableAdamState(mu, nu, seen, limiter.init(params))

    @functools.partial(jax.jit, inline=True)
    def step(grads: Tree, state: StableAdamState) -> tuple[Tree, StableAdamState]:
        _check.alike(state.mu, "the params given to init", gradients=grads)
        wide = jax.tree.map(widen, grads)
        old = _by_leaf(state)
        learned = jax.tree.map(functools.partial(_learned, b1=b1, b2=b2), wide, old)
        surprise = jax.tree.map(lambda g, m: _surprise(g, m.nu, eps), wide, learned)
        if nonfinite == "sanitize":
            learns = jax.tree.map(jnp.isfinite, surprise)
        else:
            learns = rms.spread(jnp.isfinite(in_range(rms, surprise, None)), surprise)
        moments = jax.tree.map(_kept, learns, learned, old)
        # Of what is kept, or XLA:CPU copies the old moments, to read them when they are written.
        direction = jax.tree.map(lambda _, m: _direction(m.mu, m.nu, eps), grads, moments)
        if nonfinite == "sanitize":
            direction = jax.tree.map(
                lambda learns, d: jnp.where(learns, d, jnp.nan), learns, direction
            )
        updates, clip_state = limiter.update(direction, state.clip, surprise)
        updates = jax.tree.map(lambda g, u: u.astype(g.dtype), grads, updates)
        return updates, StableAdamState(*_by_field(moments), clip_state)

    def update(
        grads: Tree, state: StableAdamState, params: Tree = None
    ) -> tuple[Tree, StableAdamState]:
        floats, whole = part(grads)
        updates, state = step(floats, state)
        return whole(updates), state

    return optax.GradientTransformation(init, update)


def _wide(leaf: Any) -> Any:
    return jax.eval_shape(widen, leaf).dtype


def _by_leaf(state: StableAdamState) -> Tree:
    """`Moments` for every leaf; stored so, they would be nodes where frameworks expect arrays."""
    seen = jax.tree.unflatten(jax.tree.structure(state.mu), list(state.seen))
    return jax.tree.map(Moments, state.mu, state.nu, seen)


def _by_field(moments: Tree) -> tuple[Tree, Tree, jax.Array]:
    """The reverse."""
    is_leaf = lambda x: isinstance(x, Moments)
    mu, nu, seen = (
        jax.tree.map(operator.itemgetter(i), moments, is_leaf=is_leaf) for i in range(3)
    )
    return mu, nu, jnp.asarray(jax.tree.leaves(seen), jnp.int32)


def _learned(grad: jax.Array, old: Moments, *, b1: Any, b2: Any) -> Moments:
    seen = optax.safe_increment(old.seen)
    # A share that shrinks from 1 to 1 - b makes of the running average the bias-corrected one.
    mu_share, nu_share = (
        as_like(rate(b), old.nu) / weight(seen, b, old.nu.dtype) for b in (b1, b2)
    )
    mu = old.mu + mu_share.astype(old.mu.dtype) * (grad - old.mu)
    nu = old.nu + nu_share * (squared(grad) - old.nu)
    return Moments(mu, nu, seen)


def _surprise(grad: jax.Array, nu: jax.Array, eps: Any) -> jax.Array:
    """How large a gradient is for what it has been: g / max(sqrt(v), eps)."""
    root = _root(nu)
    return grad / jnp.maximum(root, as_like(eps, root)).astype(grad.dtype)


def _direction(mu: jax.Array, nu: jax.Array, eps: Any) -> jax.Array:
    """That of Adam: m / (sqrt(v) + eps)."""
    root = _root(nu)
    return mu / (root + as_like(eps, root)).astype(mu.dtype)


def _root(nu: jax.Array) -> jax.Array:
    """The root of a second moment; NaN, where a square overflowed."""
    # It would make both quotients 0, and its moments the ones to keep.
    root = where_positive(jnp.sqrt, nu)
    return jnp.where(jnp.isfinite(root), root, jnp.nan)


def _kept(learns: jax.Array, new: Moments, old: Moments) -> Moments:
    """The old moments where the gradient is not finite: of the leaf, or of its bad entries."""
    seen = new.seen if learns.shape else jnp.where(learns, new.seen, old.seen)
    return Moments(jnp.where(learns, new.mu, old.mu), jnp.where(learns, new.nu, old.nu), seen)
