"""limit, kind, method -> transformation: the one file here that touches gradients."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optaxclip import _check
from optaxclip._clip import NONFINITE
from optaxclip._numbers import has_float64, part
from optaxclip._place import beside
from optaxclip._range import Range
from optaxclip._summary import observe
from optaxclip.measure.base import places
from optaxclip.measure.shards import AxisName
from optaxclip.record import ClipState, start
from optaxclip.threshold import constant

from .leaf import How, clip_leaf
from .matrices import Layout, MatrixRule, check_axes, layout

Tree = Any

KINDS = ("hard", "soft")
METHODS = ("newton_schulz", "svd", "power_iteration")


class Vectors(NamedTuple):
    """Where power iteration begins."""

    # A list, with a unit vector (*stack, rows) for each leaf of matrices, None for vectors; 0
    # before the first step. Of length 1 up to rounding.
    unit: Annotated[Tree, Range(-1.001, 1.001, ("float32",), front=None, each=True)]


class Memory(NamedTuple):
    """What a spectral clip must remember."""

    limit: Tree  # a Clock, if the limit is a schedule; else ()
    vectors: Vectors | None  # of method "power_iteration"


def clip_by_spectral_norm(
    max_norm: float | jax.Array | Callable[[jax.Array], Any] = 1.0,
    *,
    kind: str = "hard",
    method: str = "newton_schulz",
    axes: MatrixRule = None,
    axis_name: AxisName = None,
    nonfinite: str = "zero",
    record: bool = True,
) -> optax.GradientTransformation:
    r"""Limits the singular values of every matrix.

    X = U diag(sigma) V^T becomes U diag(f(sigma)) V^T. "hard": f(sigma) = min(sigma, c), the
    nearest matrix of spectral norm c. "soft": f(sigma) = sigma / sqrt(1 + sigma^2 / c^2), which is
    (I + X X^T / c^2)^(-1/2) X. A vector is a matrix of one column: v min(1, c / ||v||), or
    v / sqrt(1 + ||v||^2 / c^2), without a jump.

    ==================  ========================================================================
    method              what it does, and how near it comes (benchmarks/spectral.md), in float32
    ==================  ========================================================================
    "newton_schulz"     matrix products alone. Nothing to measure where ||X||_F <= c ("hard").
    "svd"               by `jnp.linalg.svd`, the yardstick; slow on accelerators.
    "power_iteration"   X min(1, c / sigma_max): the whole matrix is scaled, by a few products
                        with vectors; kind "hard" only. Keeps a unit vector per matrix. Where a
                        spectrum is flat, as that of noise, sigma_max is estimated to a few
                        percent, and where a spike stands out, to rounding.
    ==================  ========================================================================

    Matrices within the limit, as measured, come back bit for bit under "hard"; zeros are zeros;
    neither values nor derivatives are NaN. Matrices are computed with in float32 (float64 stays)
    and scaled by a power of two first, so 1e20 and 1e-25 are as good as 1. What a matrix of
    sigma_max far above c has below eps sigma_max is rounding, by every method.

    Args:
      max_norm: c >= 0: a number, a () array or a schedule step -> value.
      kind: "hard" or "soft".
      method: "newton_schulz", "svd" or "power_iteration".
      axes: which axes are a matrix. None: both of a leaf of rank 2; the last two of rank 3, which
        is a stack of matrices, as of scanned layers; all but the last, and the last, of a
        convolution kernel of rank 4 or 5. A leaf with at most one axis longer than 1 is a vector.
        A pair (rows, columns), each an axis or a tuple of them, such as
        `optax.contrib.MuonDimensionNumbers`: these, at every leaf of rank >= 2, and the others
        stack matrices. A function (path, leaf) -> one of these, asked at rank >= 2.
      axis_name: () inside `shard_map` where every shard holds whole matrices; None only does
        where a leaf is not split. On a mesh under `jit`, matrices are gathered, stacks are not.
      nonfinite: policy for matrices with an entry that is not finite: "zero", "propagate" (all
        of the matrix is NaN) or "sanitize".
      record: whether to keep metrics. A norm in them is sigma_max: by "svd" itself, by
        "newton_schulz" an estimate from below, to a few percent where the spectrum is flat.

    Returns:
      A transformation; shapes and dtypes of the updates are as they come in. Integers, bools and
      None pass through. Its state is a `ClipState`.

    Raises:
      TypeError, ValueError: at construction, if an argument is not such, or the method has no
        such kind; at init or update, if a leaf lacks an axis or has rank > 5 and `axes` is None.

    Example:
      >>> import jax.numpy as jnp, optaxclip
      >>> tx = optaxclip.clip_by_spectral_norm(1.0)
      >>> grads = {"kernel": jnp.diag(jnp.array([5.0, 0.5])), "bias": jnp.array([3.0, 4.0])}
      >>> updates, state = tx.update(grads, tx.init(grads))
      >>> print(updates["kernel"].round(4), updates["bias"].round(4))
      [[1.  0. ]
       [0.  0.5]] [0.6 0.8]
      >>> print(optaxclip.metrics(state)["norm"])
      5.0

      As in SPECTRA, behind an optimizer and before the learning rate, times
      alpha = sqrt(max(1, m / n)) for kernels of n inputs and m outputs:

      >>> import optax
      >>> def alpha(updates, params=None):
      ...     scaled = lambda u: u * max(1, u.shape[-1] / u.shape[-2]) ** 0.5 if u.ndim > 1 else u
      ...     return jax.tree.map(scaled, updates)
      >>> tx = optax.chain(
      ...     optax.scale_by_adam(),
      ...     optaxclip.clip_by_spectral_norm(10.0, kind="soft"),
      ...     optax.stateless(alpha),
      ...     optax.scale_by_learning_rate(1e-3),
      ... )

    Reference:
      Soft, and the recipe: X. Jiang, A. Semenov, S. U. Stich, "Enhancing LLM Training via Spectral
      Clipping" (SPECTRA), arXiv:2603.14315. Hard, by matrix signs: F. L. Cesista, "Fast,
      Numerically Stable, and Auto-Differentiable Spectral Clipping via Newton-Schulz Iteration",
      2025. See :mod:`optaxclip.spectral.newton_schulz` for the form used here.

    Deviations from SPECTRA: converged, not cut off after 10 steps (0.5 became 0.181 after 5), in
    float32 (bfloat16 errs by 1 to 6 %), and vectors without the jump from c to 0.71 c at c.
    Deviation from the other: tiny singular values are kept (0.001 became 0.03).
    """
    _check.limit(max_norm=max_norm)
    _check.choice(KINDS, kind=kind)
    _check.choice(METHODS, method=method)
    if method == "power_iteration" and kind != "hard":
        raise ValueError(f"kind must be 'hard' with method='power_iteration'; got {kind!r}")
    check_axes(axes=axes)
    _check.axis_name(axis_name=axis_name)
    _check.choice(NONFINITE, nonfinite=nonfinite)
    _check.choice((True, False), record=record)
    threshold, how = constant(max_norm), How(kind, method, nonfinite)
    warm = method == "power_iteration"

    def init(params: Tree) -> ClipState:
        floats, _ = part(params)
        place = beside(floats)
        limit = threshold.init(jnp.float32(0))
        vectors = None
        if warm:
            leaves = [(path, _array(x)) for path, x in places(floats)]
            vectors = Vectors([_blank(layout(axes, axis_name, *leaf), leaf[1]) for leaf in leaves])
        memory = Memory(limit, vectors) if jax.tree.leaves((limit, vectors)) else ()
        return ClipState(place(memory), place(start()) if record else None)

    # One program for eager calls too.
    @functools.partial(jax.jit, inline=True)
    def step(grads: Tree, state: ClipState) -> tuple[Tree, ClipState]:
        leaves, treedef = jax.tree.flatten(grads)
        memory = state.memory or Memory((), None)
        wide = has_float64(leaves)
        like = jnp.zeros((), jnp.float64 if wide else jnp.float32)
        limit, clock = threshold.update(like, memory.limit)
        old = _vectors(memory, len(leaves))
        layouts = [layout(axes, axis_name, *leaf) for leaf in places(grads)]
        found = [
            clip_leaf(how, grad, own, limit, vector)
            for grad, own, vector in zip(leaves, layouts, old, strict=True)
        ]
        vectors = Vectors([v for _, _, v in found]) if warm else None
        new = Memory(clock, vectors) if jax.tree.leaves(state.memory) else state.memory
        groups = [groups for _, groups, _ in found]
        metrics = None if state.metrics is None else observe(state.metrics, groups)
        return treedef.unflatten([u for u, _, _ in found]), ClipState(new, metrics)

    def update(grads: Tree, state: ClipState, params: Tree = None) -> tuple[Tree, ClipState]:
        del params
        floats, whole = part(grads)
        updates, state = step(floats, state)
        return whole(updates), state

    return optax.GradientTransformation(init, update)


def _array(x: Any) -> Any:
    return x if hasattr(x, "shape") else jnp.asarray(x)


def _blank(own: Layout, leaf: Any) -> jax.Array | None:
    """A vector of power iteration before the first step."""
    if own.least <= 1:
        return None
    rows = own.least * (2 if jnp.iscomplexobj(leaf) else 1)
    return jnp.zeros((*(leaf.shape[a] for a in own.stack), rows), jnp.float32)


def _vectors(memory: Memory, count: int) -> list[jax.Array | None]:
    if memory.vectors is None:
        return [None] * count
    vectors: list[jax.Array | None] = memory.vectors.unit
    if len(vectors) != count:
        raise ValueError("these gradients have other float leaves than the params given to init")
    return vectors
