"""The engine, which touches gradients: measure -> threshold -> scale or bound -> record."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from . import _check, _device
from ._entries import Entries, bounded
from ._memory import blank, each_memory, limited
from ._numbers import any_narrow, is_bad, narrowed, part, sanitized, where, widen
from ._place import abstract_norms, beside
from ._summary import Groups, observe
from .measure import Measure
from .measure.looks import Measured, packed_in_range
from .measure.shards import behind_a_barrier
from .record import ClipState, start
from .scale import rescale
from .threshold import Threshold
from .threshold.base import is_uniform

Tree = Any
Scale = Callable[[jax.Array, jax.Array], jax.Array]

NONFINITE = ("zero", "propagate", "sanitize")


def clip(
    measure: Measure,
    threshold: Threshold,
    scale: Scale = rescale,
    *,
    nonfinite: str = "zero",
    record: bool = True,
) -> optax.GradientTransformation:
    """Multiplies every group of gradients by scale(norm, limit).

    ======================================  ======================================================
    case                                    result
    ======================================  ======================================================
    finite norm <= limit, as measured       gradients bit for bit unchanged, by a hard scale
    finite norm > limit                     norm of the result <= limit x (1 + a few eps of the
                                            leaf dtype); with `scale.strict` <= limit exactly, and
                                            clipping twice gives the bits of clipping once (its
                                            docstring says down from where it counts as above)
    norm 0; limit 0; limit inf; 0 and 0     unchanged; zeros; unchanged; zeros: never NaN, in the
                                            derivative through the update neither
    norm not finite                         `nonfinite` decides for the group
    norm < 2^-100, >= 2^64, not finite;     the memory of the group is bit for bit as if the step
    limit negative or NaN                   had not been, clocks apart
    norm from 1.2e-38 to 3.4e38             measured right in any dtype (of float64 leaves to 1e170)
    None, empty, zero-size, scalar,         accepted; integer, bool and float0 leaves pass through
    complex leaves                          untouched and uncounted
    structure, shape, dtype, sharding       preserved, whatever the type of the threshold
    state                                   the same tree, dtypes (float32, int32) and sharding
                                            from init on; one compilation; no shared buffers
    limit traced and negative or NaN        zeros: never a flipped sign; the metrics show it
    norm and limit >= 2^64, memory          zeros: what has no past yet is no licence
    ======================================  ======================================================

    Soft scales and normalizers change what is within the limit, see :mod:`optaxclip.scale`.

    Two limits of float32 remain. A leaf whose Euclidean norm is above 3.4e38 counts as not finite.
    A factor below 1.2e-38, say limit 1 over norm 1e38, is flushed to zero, and so is the update;
    but a real entry that `rescale` bounds by itself becomes its limit.

    A zero update is not a skipped step: the moments of an Adam after the clip still decay.

    Args:
      measure: grads, params -> norms.
      threshold: norm, memory -> limit, memory.
      scale: norm, limit -> factor; may have a method `cast(x, dtype)` that rounds to the dtype of
        a leaf.
      nonfinite: what becomes of a group whose norm is inf or NaN. "zero": a zero update.
        "propagate": NaN stays NaN, as in Optax. "sanitize": bad entries become zero, the others
        are measured and clipped without them.
      record: whether the state keeps :class:`Metrics`. Only with `measure.element()` do they need
        another pass over the gradients.

    Returns:
      A transformation whose state is a :class:`ClipState`.

    Raises:
      TypeError, ValueError: at construction, if an argument is not such.

    Example:
      >>> import jax.numpy as jnp, optaxclip as oc
      >>> tx = oc.clip(oc.measure.leaf_norm(), oc.threshold.constant(1.0), oc.scale.skip)
      >>> grads = {"a": jnp.array([3.0, 4.0]), "b": jnp.array([0.5])}
      >>> updates, state = tx.update(grads, tx.init(grads))
      >>> updates
      {'a': Array([0., 0.], dtype=float32), 'b': Array([0.5], dtype=float32)}
    """
    _check.instance(Measure, "measure.global_norm()", measure=measure)
    _check.instance(Threshold, "threshold.constant(1.0)", threshold=threshold)
    _check.function("scale.rescale", scale=scale)
    _check.choice(NONFINITE, nonfinite=nonfinite)
    _check.choice((True, False), record=record)

    def init(params: Tree) -> ClipState:
        floats, _ = part(params)
        norms = abstract_norms(measure, floats)
        place = beside(floats)
        memory = jax.tree.map(lambda norm: place(blank(threshold, norm), norm), norms)
        if not jax.tree.leaves(memory):
            memory = ()  # so that nothing ties later gradients to these parameters
        return ClipState(memory, place(start()) if record else None)

    # One program for eager calls too, in which `lax.cond` would be compiled anew at each step.
    @functools.partial(jax.jit, inline=True)
    def step(grads: Tree, state: ClipState, params: Tree) -> tuple[Tree, ClipState]:
        measured, finite = _measured(measure, grads, params, nonfinite)
        uniform = is_uniform(threshold)
        # A memory is kept as the measure has norms; what else sees them may expect them so.
        if not (uniform and _is_entrywise(scale)) or jax.tree.leaves(state.memory):
            finite = measured.unpacked(finite)
            measured = measured.as_is(measure, measured.unpacked(measured.norms), grads)
        norms, treedef = jax.tree.flatten(measured.norms)
        memories = each_memory(state.memory, treedef, norms, threshold)
        limits: list[jax.Array] = []
        entries: list[Entries] = []
        scaled: list[Groups] = []
        real = not any(map(jnp.iscomplexobj, jax.tree.leaves(grads)))
        bounds = measure.entries and scale is rescale and real
        leaves = jax.tree.leaves(grads)
        for i, (norm, ok) in enumerate(zip(norms, jax.tree.leaves(finite), strict=True)):
            # One limit for all entries is one number.
            shown = jnp.zeros((), norm.dtype) if bounds and uniform else norm
            limit, memories[i] = limited(threshold, shown, ok, memories[i])
            limits.append(limit)
            if bounds:
                entries.append(Entries(leaves[i], norm, ok, limit, uniform, nonfinite))
            else:
                scaled.append(_scaled(scale, norm, ok, limit, nonfinite))
        spread = lambda parts: measured.spread(treedef.unflatten(parts))
        if bounds:
            updates = bounded(grads, spread(limits), nonfinite)
        else:
            factors = spread([group.factor for group in scaled])
            counts = spread([jnp.isfinite(group.norm) for group in scaled])
            updates = _multiplied(grads, factors, counts, scale, nonfinite)
        metrics = None if state.metrics is None else observe(state.metrics, entries or scaled)
        memory = treedef.unflatten(memories) if jax.tree.leaves(state.memory) else ()
        return updates, ClipState(memory, metrics)

    def update(grads: Tree, state: ClipState, params: Tree = None) -> tuple[Tree, ClipState]:
        floats, whole = part(grads)
        updates, state = step(floats, state, None if params is None else part(params)[0])
        return whole(updates), state

    return optax.GradientTransformation(init, update)


def _is_entrywise(scale: Scale) -> bool:
    """Whether it is known to look at each norm by itself, as those of this package."""
    return (getattr(scale, "__module__", None) or "").startswith("optaxclip.scale.")


def _measured(measure: Measure, grads: Tree, params: Tree, nonfinite: str) -> tuple[Measured, Tree]:
    """The norms that count under the policy, and whether those of `grads` itself are finite.

    Both packed, if that is how they are measured.
    """
    found = packed_in_range(measure, grads, params)
    finite = jax.tree.map(jnp.isfinite, found.norms)
    if nonfinite == "sanitize":
        # From XLA:CPU, which would sanitize once for norm and update, and write that to memory. Of
        # narrow floats, it writes what is sanitized for the norm in any case.
        twice = _device.on_cpu() and not any_narrow(grads)
        hidden = behind_a_barrier(grads) if twice else grads
        clean = jax.tree.map(sanitized, hidden)
        found = found._replace(norms=packed_in_range(measure, clean, params).norms)
    return found, finite


def _scaled(
    scale: Scale, norm: jax.Array, finite: jax.Array, limit: jax.Array, nonfinite: str
) -> Groups:
    """The factors, and the rest of what the record needs."""
    counts = jnp.isfinite(norm)  # under "sanitize", of what is left without the bad entries
    allowed = jnp.where(is_bad(limit), 0, limit)
    if nonfinite == "propagate":
        # A norm of inf or NaN has the factor that limit / norm would have.
        factor = jnp.where(counts, scale(norm, allowed), 1 / jnp.where(counts, 1, norm))
        return Groups(norm, norm * factor, limit, factor, finite)
    # A group that does not count vanishes, whatever a scale makes of norm 1 and limit 0.
    norm_or_1 = jnp.where(counts, norm, 1)
    factor = scale(norm_or_1, jnp.where(counts, allowed, 0))
    factor = jnp.where(counts, factor, jnp.zeros_like(factor))
    return Groups(norm, norm_or_1 * factor, limit, factor, finite)


def _multiplied(grads: Tree, factors: Tree, counts: Tree, scale: Scale, nonfinite: str) -> Tree:
    # What is propagated may be any NaN, and not all would come through `narrowed`.
    plain = jax.lax.convert_element_type if nonfinite == "propagate" else narrowed
    cast = getattr(scale, "cast", plain)

    @jax.jit  # traced and lowered once for all leaves of one shape
    def multiplied(
        grad: jax.Array, hidden: jax.Array, factor: jax.Array, counts: jax.Array, is_1: jax.Array
    ) -> jax.Array:
        # Where each entry has a factor of its own, XLA would write them all to memory if they were
        # used twice. Elsewhere, a mask of the entries would cost a sixth of a step, and one number
        # per group says which count.
        single = factor.shape == grad.shape and grad.size > 1
        if nonfinite == "sanitize" or (nonfinite == "zero" and single):
            grad, hidden = sanitized(grad), sanitized(hidden)
        x = widen(hidden)
        # One number for the leaf is spread once, for the product and for where that does not count.
        spread = jax.lax.full_like(x, factor) if factor.ndim == 0 else factor.astype(x.dtype)
        y = x * spread
        if nonfinite == "zero" and not single:
            y = where(counts, y, spread)  # 0, and 0 x inf is NaN
        rounded = y if y.dtype == grad.dtype else cast(y, grad.dtype)
        # Not y alone: XLA:CPU flushes subnormal numbers in a multiplication by 1. An entry of 0 is
        # the same whatever its factor, but where that is above 1, its derivative is not.
        same = (y == x) & ((x != 0) | (factor <= 1)) if single else is_1
        return where(same, grad, rounded)

    each = functools.partial(jax.tree.broadcast, full_tree=grads)
    is_1 = jax.tree.map(lambda factor: factor == 1, factors)
    hidden = grads
    if any_narrow(grads):
        # From XLA, which would widen once for norm and product, and write that to memory. What is
        # unchanged is not taken from there: in a loop, jax 0.12 flushes bfloat16 on its way.
        hidden = behind_a_barrier(grads)
    return jax.tree.map(multiplied, grads, hidden, each(factors), each(counts), each(is_1))
