"""gradients of examples -> their average, with what is said of the examples."""

from __future__ import annotations

import functools
import math
import numbers
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from optaxclip import _check, scale
from optaxclip._check import _refuse, _shown
from optaxclip._clip import Scale, clip
from optaxclip._numbers import is_bad, part, real_dtype, widen
from optaxclip.measure import Measure, global_norm, stacked
from optaxclip.measure.base import places
from optaxclip.measure.looks import in_range
from optaxclip.record import ClipState
from optaxclip.threshold import constant

Tree = Any

WHOLE = global_norm()


class Examples(NamedTuple):
    """What is said of the examples."""

    norms: Tree  # (B,) float32, before clipping, or what the measure gives, with B in front; NaN
    #              for padding
    clipped: jax.Array  # () float32, share of all norms but padding's that are finite and were
    #                     clipped: by a factor < 1
    nonfinite: jax.Array  # () int32, examples but padding with a norm that is not finite


def per_example_clip(
    grads: Tree,
    *,
    max_norm: float | jax.Array,
    measure: Measure | None = None,
    rule: Scale = scale.rescale,
    axis: int = 0,
    padding: jax.Array | None = None,
) -> tuple[Tree, Examples]:
    """Clips the gradient of each example, then averages them.

    g = 1/B sum_i g_i min(1, C / ||g_i||)

    An example whose norm is not finite contributes zero and is counted; B counts it too, so that
    it gives the others no larger share. The average is taken in float32.

    Args:
      grads: a tree whose float leaves have an axis of length B, in any float dtype. Integer, bool
        and None leaves stay as they are. Of no examples, the average is zero.
      max_norm: C >= 0, a number or a () array; inf turns clipping off, 0 gives zeros.
      measure: which entries of an example share a norm; None: all. With `leaf_norm()` each layer
        has the limit C; with `leaf_rms()`, C / sqrt(D) for the D parameters of the model gives a
        layer of D_l of them the norm C sqrt(D_l / D). `measure.relative`, which needs the
        parameters, has none here: a ValueError.
      rule: norm, limit -> factor; `scale.skip` leaves outliers out.
      axis: that of the examples.
      padding: (B,) bool, examples that fill up the batch: they contribute zero and count nowhere.

    Returns:
      The average, with shapes without the axis and dtypes as in `grads`, and :class:`Examples`.

    Raises:
      TypeError, ValueError: if an argument is not such, or leaves differ in the length of the axis.

    Example:
      >>> import jax.numpy as jnp
      >>> grads = jnp.array([[3.0, 4.0], [0.0, 0.5], [0.0, 0.0], [jnp.nan, 0.0]])
      >>> mean, examples = per_example_clip(grads, max_norm=1.0)
      >>> print(mean, examples.norms, examples.nonfinite)
      [0.15  0.325] [5.  0.5 0.  nan] 1

    Reference:
      Abadi et al., Deep learning with differential privacy, arXiv:1607.00133, algorithm 1.

    Deviation from the paper: without its noise, and so without its privacy.
    """
    how = checked(max_norm, measure, rule)
    if not is_whole(axis):
        _refuse(TypeError, "axis", axis, "an int")
    floats, whole = part(grads)
    count = length("grads", floats, axis) if jax.tree.leaves(floats) else 0
    number = number_of(count, padding)
    floats = jax.tree.map(lambda g: jnp.moveaxis(g, axis, 0), floats)
    mean, norms = clipped_mean(floats, number, padding, **how)
    mean = jax.tree.map(lambda m, g: m.astype(g.dtype), mean, floats)
    return whole(mean), examples_of(norms, number, padding, **how)


def checked(max_norm: Any, measure: Measure | None, rule: Scale) -> dict[str, Any]:
    """What says how to clip."""
    _check.within(0, math.inf, max_norm=max_norm)
    if measure is not None:
        _check.instance(Measure, "measure.global_norm()", measure=measure)
    _check.function("scale.rescale", rule=rule)
    limit = max_norm if isinstance(max_norm, jax.Array) else float(max_norm)
    return {"max_norm": limit, "measure": WHOLE if measure is None else measure, "rule": rule}


def is_whole(value: Any) -> bool:
    """Whether it is a whole number, such as an axis."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def length(name: str, tree: Tree, axis: int) -> int:
    """How many examples there are."""
    shapes = {path: jnp.shape(x) for path, x in places(tree)}
    lengths = {path: s[axis] if -len(s) <= axis < len(s) else None for path, s in shapes.items()}
    found = set(lengths.values())
    count = found.pop() if len(found) == 1 else None
    if count is None:
        raise ValueError(
            f"the leaves of {name} must have one length, that of the examples, along axis {axis}; "
            f"got {_shown(lengths)}"
        )
    return count


def number_of(count: int, padding: Any) -> jax.Array:
    """B, () float32, of so many examples, some of which may be padding."""
    if padding is None:
        return jnp.float32(count)
    is_mask = isinstance(padding, (jax.Array, np.ndarray)) and padding.dtype == bool
    if not is_mask or padding.shape != (count,):
        error = ValueError if is_mask else TypeError
        _refuse(error, "padding", padding, f"None or a bool array of shape ({count},)")
    return jnp.sum(~padding, dtype=jnp.float32)


# One program for eager calls too, for which all branches would else be compiled at each.
@functools.partial(jax.jit, static_argnames=("measure", "rule"), inline=True)
def clipped_mean(
    grads: Tree,
    number: jax.Array,
    padding: jax.Array | None,
    *,
    max_norm: float | jax.Array,
    measure: Measure,
    rule: Scale,
) -> tuple[Tree, Tree]:
    """The sum of the clipped gradients over B, in float32; and the norms, NaN for padding."""
    each = stacked(measure, 0)  # in which one look at all norms says whether to measure again
    norms = in_range(each, grads, None)
    if padding is not None:
        norms = jax.tree.map(lambda n: jnp.where(_like(padding, n), jnp.nan, n), norms)
    measured = Measure(lambda grads, norms: norms, each.spread, sums=False)
    tx = clip(measured, constant(max_norm), rule, record=False)
    clipped, _ = tx.update(grads, ClipState((), None), norms)

    def add(g: jax.Array) -> jax.Array:
        g = widen(g)
        share = 1 / jnp.maximum(number, 1).astype(real_dtype(g))
        return jnp.sum(g * share.astype(g.dtype), axis=0)  # times first: no sum overflows

    # All leaves have as many examples, and so are one stack; or there are none.
    found = next(iter(norms.values()), jnp.zeros(0, jnp.float32))
    return jax.tree.map(add, clipped), found


def examples_of(
    norms: Tree,
    number: jax.Array,
    padding: jax.Array | None,
    *,
    max_norm: float | jax.Array,
    measure: Measure,
    rule: Scale,
) -> Examples:
    """What is said of the examples, by their norms."""

    def is_clipped(norm: jax.Array) -> jax.Array:
        limit = jnp.full_like(norm, max_norm)
        limit = jnp.where(is_bad(limit), 0, limit)  # as the engine takes it
        ok = jnp.isfinite(norm)
        return ok & (rule(jnp.where(ok, norm, 1), limit) < 1)

    leaves = jax.tree.leaves(norms)
    groups = sum(math.prod(n.shape[1:]) for n in leaves)
    clipped = jnp.stack([jnp.sum(is_clipped(n), dtype=jnp.float32) for n in leaves])
    bad = [jnp.any(~jnp.isfinite(n), range(1, n.ndim)) for n in leaves]
    some = jnp.any(jnp.stack(bad), 0)
    some = some if padding is None else some & ~padding
    return Examples(
        norms,
        jnp.sum(clipped) / (jnp.maximum(number, 1) * groups),
        jnp.sum(some, dtype=jnp.int32),
    )


def _like(padding: jax.Array, norm: jax.Array) -> jax.Array:
    return padding.reshape(padding.shape + (1,) * (norm.ndim - 1))
