"""cotangents -> cotangents: clips in the middle of the backward pass, placed inside the model.

    forward:  x ------------------------------> x, bit for bit
    backward: g <--clip by max_norm <-- norms -- g

An Optax transformation sees the gradient once it is whole. By then the backward pass through 200
time steps may have overflowed, or its last few steps have drowned all others. A clip inside the
model bounds what each step hands to the one before it:

=================================  ==============================================================
clip                               call
=================================  ==============================================================
by norm, all leaves together       `clip_cotangent(x, 1.0)`
by norm, each leaf for itself      `clip_cotangent(x, 1.0, measure=measure.leaf_norm())`
by value                           `clip_cotangent(x, 1.0, measure=measure.element())`
per token, x of (..., features)    `clip_cotangent(x, 1.0, measure=measure.unit_norm(axis=-1))`
without the k largest tokens       `drop_largest_cotangents(x, k)`
=================================  ==============================================================

The backward pass is :func:`optaxclip.clip` itself on the tree of cotangents, so its table of
guarantees holds here too. It keeps nothing for the next step: thresholds that learn have no place.

Where it is placed decides what is one clip. In the body of a `scan` it is one per time step. Under
`vmap`, of a tree that it maps, it is one per example; without, a batch has one norm, unless the
measure has one per token. Inside `shard_map`, norms are of the whole as :mod:`optaxclip.measure`
says. **Under `vmap` inside `shard_map`**, JAX does not tell examples that are split over devices
from shards of one, and the norm of each would be joined with those of other devices' examples:
there, give `measure=measure.global_norm(axis_name=())`.

Recomputation (`jax.checkpoint`) changes nothing. Gradients of gradients are those of the clipped
backward pass. Derivatives in forward mode (`jax.jvp`, `jax.jacfwd`) of the model are a TypeError,
as of every `jax.custom_vjp`; `jax.hessian`, which is forward over reverse, works. Outside
`jax.jit`, make a measure or a scale once: a new one is a new program.

The clipped gradient is in general not the gradient of any loss. A cotangent clip bounds; where it
acts often, it also biases.

What happened in a backward pass comes out as the gradient of a probe: see :func:`cotangent_probe`.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from . import _check
from ._check import _refuse
from ._clip import NONFINITE, Scale, clip
from ._numbers import part
from .measure import Measure, global_norm, unit_norm
from .measure.looks import in_range
from .measure.shards import gathered, varied, varying
from .record import ClipState, Metrics, start
from .scale import rescale, skip
from .threshold import Threshold, constant
from .threshold.base import Memory

Tree = Any

# One object each, so that eager calls share one compiled program.
TREE, TOKENS = global_norm(), unit_norm(axis=-1)


class CotangentMetrics(NamedTuple):
    """What a backward pass was: sums over its clips, so that they add up as gradients do."""

    norm: jax.Array  # () float32, largest norm before clipping; 0 where some norm is not finite
    clipped_norm: jax.Array  # () float32, largest norm after clipping; 0 where norm is
    clipped: jax.Array  # () float32, share of the groups that were clipped
    calls: jax.Array  # () float32, clips: 1 each
    clipped_calls: jax.Array  # () float32, clips in which some group was clipped
    nonfinite_calls: jax.Array  # () float32, clips in which some norm was not finite


class _Rule(NamedTuple):
    """All that is static in a clip; hashable."""

    measure: Measure
    k: int | None  # None: the limit is given
    scale: Scale
    nonfinite: str
    record: bool


def clip_cotangent(
    x: Tree,
    max_norm: float | jax.Array = 1.0,
    *,
    measure: Measure | None = None,
    scale: Scale = rescale,
    nonfinite: str = "zero",
    probe: CotangentMetrics | None = None,
) -> Tree:
    """Returns `x`, and clips the gradient that comes back to it.

    y = x, dL/dx = dL/dy min(1, c / ||dL/dy||). Between the time steps of a recurrent net, it bounds
    the gradient with respect to every state, and so that of the parameters.

    Args:
      x: any tree; leaves that are no floats pass by.
      max_norm: c >= 0, a number or a () array; inf measures only, 0 lets no gradient through. No
        gradient flows into it.
      measure: what shares one norm; None: all leaves of `x`, and inside `shard_map` of all their
        shards. `measure.global_norm(axis_name=())` where examples are split over devices and
        mapped by `vmap` there. `measure.relative`, which needs parameters, has none here: an error
        in the backward pass.
      scale: norm, limit -> factor, see :mod:`optaxclip.scale`. Numbers in it, as in
        `scale.automatic(0.1)`, are not traced.
      nonfinite: what becomes of a cotangent whose norm is inf or NaN, see :func:`optaxclip.clip`.
      probe: of :func:`cotangent_probe`; None: nothing is recorded.

    Returns:
      As `x`, the same bits; it adds nothing to a forward pass alone.

    Raises:
      TypeError, ValueError: if an argument is not such.

    Example:
      >>> import jax, jax.numpy as jnp, optaxclip
      >>> def final_state(x, max_norm):
      ...     def step(state, _):
      ...         return 3 * clip_cotangent(state, max_norm), None
      ...
      ...     return jax.lax.scan(step, x, length=40)[0]
      >>> print(*(f"{jax.grad(final_state)(1.0, c):.3g}" for c in (jnp.inf, 1.0)))
      1.22e+19 1

    Reference:
      Pascanu, Mikolov, Bengio, On the difficulty of training recurrent neural networks,
      arXiv:1211.5063, algorithm 1, for the rule.

    Deviation from the paper: there the rule is for the gradient of the parameters; here it is for
    those of activations, on the way, as in JAX's own example of `custom_vjp` (by value).
    """
    measure = TREE if measure is None else measure
    _check.within(0, math.inf, max_norm=max_norm)
    _check.limit(max_norm=max_norm)
    _check.instance(Measure, "measure.global_norm()", measure=measure)
    _check_scale(scale)
    _check.choice(NONFINITE, nonfinite=nonfinite)
    _check_probe(probe)
    floats, whole = part(x)
    rule = _Rule(measure, None, scale, nonfinite, probe is not None)
    return whole(_identity(rule, floats, max_norm, probe))


def drop_largest_cotangents(
    x: Tree,
    k: int = 4,
    *,
    measure: Measure | None = None,
    nonfinite: str = "zero",
    probe: CotangentMetrics | None = None,
) -> Tree:
    """Returns `x`, and drops the gradients of the k tokens that have the largest.

    y = x, dL/dx_i = 0 for the k tokens i with the largest ||dL/dy_i||, else dL/dy_i. For
    transformers, in which a few tokens can hold most of a bad gradient. Exactly k are dropped, or
    all if there are no more; of equal ones, those that come first.

    Args:
      x: any tree; each leaf (..., features) by itself. Leaves that are no floats pass by.
      k: >= 1, static; the default is axlearn's. For k in each row of a batch, `vmap` over rows.
      measure: what is one token; None: what shares all but its last axis (a vector is one token).
        Inside `shard_map`, which needs `measure.unit_norm(axis=-1, axis_name=...)` where `x` is
        split, each device drops k of its own tokens.
      nonfinite: what becomes of tokens whose norm is inf or NaN, see :func:`optaxclip.clip`. They
        are not among the k, so that they shield no large one; under "sanitize", what is left of
        them stays, however large.
      probe: of :func:`cotangent_probe`; None: nothing is recorded.

    Returns:
      As `x`, the same bits; it adds nothing to a forward pass alone.

    Raises:
      TypeError, ValueError: if an argument is not such.

    Example:
      >>> import jax, jax.numpy as jnp, optaxclip
      >>> grads = jnp.array([[1.0, 0.0], [3.0, 4.0], [0.6, 0.8], [0.0, 2.0]])
      >>> loss = lambda x: jnp.sum(drop_largest_cotangents(x, 2) * grads)
      >>> jax.grad(loss)(jnp.zeros((4, 2)))
      Array([[1. , 0. ],
             [0. , 0. ],
             [0.6, 0.8],
             [0. , 0. ]], dtype=float32)

    Reference:
      axlearn, `axlearn.common.gradient_monitor` (Apache-2.0).

    Deviation from axlearn: where tokens tie, its exact method drops all that equal the k-th
    largest, the whole gradient if all are equal, and its approximate one the last.
    """
    measure = TOKENS if measure is None else measure
    _check.window(k=k)
    _check.instance(Measure, "measure.unit_norm(axis=-1)", measure=measure)
    _check.choice(NONFINITE, nonfinite=nonfinite)
    _check_probe(probe)
    floats, whole = part(x)
    rule = _Rule(measure, int(k), skip, nonfinite, probe is not None)
    return whole(_identity(rule, floats, None, probe))


def cotangent_probe() -> CotangentMetrics:
    """Zeros, the gradient with respect to which is what the backward pass was.

    A probe is handed to the loss beside the parameters, and to the clip as `probe=`. Its gradient
    has nothing to do with the loss: the clip puts its metrics there. JAX adds up gradients, so

    * one probe for several clips gives their sums: a `scan` that closes over it, examples of a
      `vmap`, layers. Their mean norm is norm / (calls - nonfinite_calls): a clip in which some norm
      is not finite adds none, whatever becomes of it.
    * a probe per step gives a row per step, with its own norm: `jnp.zeros` of (steps,) in each
      field, as `xs` of a `scan`; or one probe for each layer.
    * inside `shard_map`, the clips that all devices do at one place are one call, of which the norm
      is the largest on any, also where each device clips examples of its own. Where JAX does not
      track what is split (check_vma=False, `pmap`), it is of the device's own clip, and a gradient
      that is taken outside adds up devices.

    A clip that no gradient comes back to leaves zeros, calls included.

    Returns:
      Six () float32 zeros.

    Example:
      >>> import jax, jax.numpy as jnp, optaxclip
      >>> def loss(x, probes):
      ...     def step(x, probe):
      ...         return 2 * clip_cotangent(x, 5.0, probe=probe), None
      ...
      ...     return jax.lax.scan(step, x, probes)[0]
      >>> probes = jax.tree.map(lambda x: jnp.zeros(4), cotangent_probe())
      >>> seen = jax.grad(loss, argnums=1)(1.0, probes)
      >>> print(seen.norm, seen.clipped_norm, seen.calls)
      [10. 8. 4. 2.] [5. 5. 4. 2.] [1. 1. 1. 1.]
    """
    return CotangentMetrics(*(jnp.zeros((), jnp.float32) for _ in CotangentMetrics._fields))


def _check_scale(scale: Scale) -> None:
    """Accepts a function of norms and limits alone, as the backward pass is another program."""
    _check.function("scale.rescale", scale=scale)
    if scale is rescale:
        return
    one = jax.ShapeDtypeStruct((), jnp.float32)
    if any(isinstance(x, jax.core.Tracer) for x in jax.make_jaxpr(scale)(one, one).consts):
        _refuse(TypeError, "scale", scale, "a function in which no number is traced")


def _check_probe(probe: CotangentMetrics | None) -> None:
    if probe is None:
        return
    _check.instance(CotangentMetrics, "cotangent_probe()", probe=probe)
    for name, x in zip(probe._fields, probe, strict=True):
        if jnp.shape(x) != () or jnp.result_type(x) != jnp.float32:
            got = jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x))
            allowed = "a () array of float32, as cotangent_probe() has it"
            _refuse(ValueError, f"probe.{name}", got, allowed)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _identity(rule: _Rule, tree: Tree, limit: Any, probe: CotangentMetrics | None) -> Tree:
    return tree


def _forward(
    rule: _Rule, tree: Tree, limit: Any, probe: CotangentMetrics | None
) -> tuple[Tree, Any]:
    return tree, (limit, probe)


def _backward(rule: _Rule, kept: Any, cotangents: Tree) -> tuple[Tree, None, Any]:
    limit, probe = kept
    cotangents, metrics = _clipped(rule, jax.lax.stop_gradient(limit), cotangents)
    # Inside shard_map, metrics that JAX tracks are the same on all devices; a probe need not be.
    return cotangents, None, jax.tree.map(lambda x, p: varied(x, varying(p)), metrics, probe)


_identity.defvjp(_forward, _backward)


@functools.partial(jax.jit, static_argnums=0, inline=True)
def _clipped(rule: _Rule, limit: Any, cotangents: Tree) -> tuple[Tree, CotangentMetrics | None]:
    """The engine, which has no memory here."""
    measure, norms = rule.measure, None
    threshold = constant(limit) if rule.k is None else _below_largest(rule.k)
    if rule.k is not None and rule.nonfinite == "sanitize":
        norms = in_range(measure, cotangents, None)
        measure = _without_bad(measure)
    tx = clip(measure, threshold, rule.scale, nonfinite=rule.nonfinite, record=rule.record)
    state = ClipState((), start() if rule.record else None)
    cotangents, state = tx.update(cotangents, state, norms)
    return cotangents, None if state.metrics is None else _to_add(state.metrics)


def _to_add(metrics: Metrics) -> CotangentMetrics:
    # Of a float64 norm, float32 may be inf.
    finite = (metrics.nonfinite_steps == 0) & jnp.isfinite(metrics.norm)
    or_0 = lambda x: jnp.where(finite, x, 0)
    count = lambda x: x.astype(jnp.float32)
    return CotangentMetrics(
        norm=or_0(metrics.norm),
        clipped_norm=or_0(metrics.clipped_norm),
        clipped=metrics.clipped,
        # Not 1: vmap adds up over its examples only what depends on them.
        calls=count(finite) + count(~finite),
        clipped_calls=count(metrics.clipped_steps),
        nonfinite_calls=count(~finite),
    )


def _without_bad(measure: Measure) -> Measure:
    """Of what is left of groups that were not finite, as their norms in place of params say, 0."""

    def norms(grads: Tree, before: Tree) -> Tree:
        # What is not finite is not yet sanitized, and to be counted.
        kept = lambda n, b: jnp.where(jnp.isfinite(b) | ~jnp.isfinite(n), n, 0)
        return jax.tree.map(kept, in_range(measure, grads, None), before)

    return measure._replace(norms=norms, sums=False)


def _below_largest(k: int) -> Threshold:
    """A limit of 0 for the k largest norms of an array, and none for the others."""

    def update(norm: jax.Array, memory: Memory) -> tuple[jax.Array, Memory]:
        flat = gathered(norm).reshape(-1)
        if not flat.size:
            return norm, memory
        least = jax.lax.top_k(flat, min(k, flat.size))[0][-1]
        above, equal = flat > least, flat == least
        # The first ones of those that tie, as many as are wanting.
        chosen = above | (equal & (jnp.cumsum(equal) <= k - jnp.sum(above)))
        limit = jnp.where(chosen, 0, jnp.inf).astype(norm.dtype).reshape(norm.shape)
        return _scattered(limit, norm), memory

    return Threshold(lambda norm: (), update)


def _scattered(x: jax.Array, like: jax.Array) -> jax.Array:
    """On devices as another one, which was gathered to compute it."""
    kind = jax.typeof(like).sharding
    return x if kind == jax.typeof(x).sharding else jax.sharding.reshard(x, kind)
