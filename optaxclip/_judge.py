"""grads, loss, memory -> whether to skip the step, memory: the rules of `skip_step`.

    grads --measure--> norms --threshold--> limits --+
    loss ---------------------threshold--> limit ----+--> skip?

A threshold learns from a step only after all have judged it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ._memory import blank, each_memory, limited, stays_finite
from ._numbers import TOO_LARGE, as_like
from ._place import abstract_norms, beside
from ._range import Steps
from ._summary import in_place, increment_if, maximum
from .measure import Measure, shards
from .measure.looks import in_range
from .measure.shards import _is_tracked
from .record import SkipMetrics, SkipRecord
from .threshold import Threshold
from .threshold.base import choose

Tree = Any


class Run(NamedTuple):
    """What may turn out to be a new level."""

    length: Steps  # () int32, skipped steps since the last one taken, but for those not finite


class SkipMemory(NamedTuple):
    """What the rules need next."""

    norm: Tree  # of the norms, one memory per array of them; () if nothing
    loss: Tree  # of the loss
    run: Run


class Judge(NamedTuple):
    """What a step is judged by."""

    measure: Measure
    norm: Threshold
    loss: Threshold
    max_consecutive: float | jax.Array
    learns_all: bool  # whether the thresholds learn from skipped steps, too


class _Group(NamedTuple):
    """The norms of one array, or the loss."""

    size: jax.Array
    finite: jax.Array  # bool, as size
    limit: jax.Array  # as size
    above: jax.Array  # bool, as size, whether it is finite and above its limit
    before: Tree  # the memory
    learned: Tree  # the memory with this one
    blank: Tree  # the memory before the first step


class _Verdict(NamedTuple):
    """() bool each, the same on all devices."""

    skip: jax.Array
    nonfinite: jax.Array
    gives_way: jax.Array


def start(judge: Judge, params: Tree) -> SkipRecord:
    """What is known before the first step, beside the parameters."""
    place = beside(params)
    norms = abstract_norms(judge.measure, params)
    norm = jax.tree.map(lambda norm: place(blank(judge.norm, norm), norm), norms)
    if not jax.tree.leaves(norm):
        norm = ()  # so that nothing ties later gradients to these parameters
    loss = judge.loss.init(jax.ShapeDtypeStruct((), jnp.float32))
    memory = SkipMemory(norm, place(loss), place(Run(jnp.zeros((), jnp.int32))))
    return SkipRecord(memory, place(_no_metrics()))


def judged(
    judge: Judge, grads: Tree, record: SkipRecord, params: Tree, loss: jax.Array | None
) -> tuple[jax.Array, SkipRecord]:
    """Whether to skip the step, as () bool, and what is known after it."""
    memory, metrics = record
    measured, treedef = jax.tree.flatten(in_range(judge.measure, grads, params))
    own = each_memory(memory.norm, treedef, measured, judge.norm)
    pairs = zip(measured, own, strict=True)
    norms = [_group(limited, judge.norm, norm, before) for norm, before in pairs]
    losses = []
    if loss is not None:
        losses = [_group(_loss_limited, judge.loss, _over_devices(loss), memory.loss)]

    nonfinite = _anywhere([~group.finite for group in (*norms, *losses)])
    above = _anywhere([group.above for group in (*norms, *losses)]) & ~nonfinite
    patience = as_like(judge.max_consecutive, metrics.norm)
    gives_way = above & (memory.run.length.astype(jnp.float32) >= patience)
    verdict = _Verdict(nonfinite | (above & ~gives_way), nonfinite, gives_way)

    run = jnp.where(verdict.skip, increment_if(above, memory.run.length), 0)
    after = lambda groups: [_after(g, verdict, learns_all=judge.learns_all) for g in groups]
    norm_memory = treedef.unflatten(after(norms)) if jax.tree.leaves(memory.norm) else ()
    loss_memory = after(losses)[0] if losses else memory.loss
    learned = SkipMemory(norm_memory, loss_memory, Run(run))
    return verdict.skip, SkipRecord(learned, _observed(metrics, norms, losses, verdict))


def _over_devices(loss: jax.Array) -> jax.Array:
    """The mean over the devices whose losses may differ, so that they remember one."""
    mapped = shards.manual_axes()
    names = shards.varying(loss) if all(map(_is_tracked, mapped)) else mapped
    return jax.lax.pmean(loss, names) if names else loss


def _group(limited: Callable[..., Any], rule: Threshold, size: jax.Array, memory: Tree) -> _Group:
    finite = jnp.isfinite(size)
    limit, learned = limited(rule, size, finite, memory)
    above = finite & ((size > limit) | jnp.isnan(limit))  # a bad limit allows nothing
    return _Group(size, finite, limit, above, memory, learned, rule.init(size))


def _loss_limited(
    rule: Threshold, loss: jax.Array, finite: jax.Array, memory: Tree
) -> tuple[jax.Array, Tree]:
    """As `limited` does for norms, but 0 and less are losses like others."""
    limit, learned = rule.update(jnp.where(finite, loss, 0), memory)
    telling = finite & (jnp.abs(loss) < TOO_LARGE) & ~jnp.isnan(limit)
    telling &= stays_finite(learned, memory, loss.ndim)
    return limit, choose(telling, learned, memory)


def _after(group: _Group, verdict: _Verdict, *, learns_all: bool) -> Tree:
    """The memory after the step."""
    enters = jnp.ones_like(verdict.skip) if learns_all else ~verdict.skip
    kept = choose(enters, group.learned, group.before)
    return choose(~(verdict.gives_way & group.above), kept, group.blank)


def _anywhere(flags: list[jax.Array]) -> jax.Array:
    """Whether any is set, on any device."""
    return shards.anywhere(jnp.any(jnp.stack([jnp.any(flag) for flag in flags])))


def _no_metrics() -> SkipMetrics:
    reals = [jnp.full((), x, jnp.float32) for x in (0, np.inf, -np.inf, np.inf)]
    return SkipMetrics(*reals, *(jnp.zeros((), jnp.int32) for _ in range(6)))


def _observed(
    before: SkipMetrics, norms: list[_Group], losses: list[_Group], verdict: _Verdict
) -> SkipMetrics:
    """The metrics after one more step."""
    skip, nonfinite, gives_way = verdict
    sizes = _no_metrics()
    there = [group for group in norms if group.size.size]
    if there:
        most = lambda arrays: maximum(jnp.stack(list(map(maximum, arrays))))
        largest, least = most([g.size for g in there]), -most([-g.limit for g in there])
        sizes = sizes._replace(norm=largest, limit=least)
    for group in losses:
        sizes = sizes._replace(loss=group.size, loss_limit=group.limit)
    sizes = sizes._replace(
        skipped=skip.astype(jnp.int32),
        consecutive=jnp.where(skip, optax.safe_increment(before.consecutive), 0),
        steps=optax.safe_increment(before.steps),
        skipped_steps=increment_if(skip, before.skipped_steps),
        nonfinite_steps=increment_if(nonfinite, before.nonfinite_steps),
        gave_way_steps=increment_if(gives_way, before.gave_way_steps),
    )
    unread = ("norm", "limit", "loss", "loss_limit", "skipped")
    kept = {n: in_place(getattr(before, n), getattr(sizes, n), before.steps) for n in unread}
    return sizes._replace(**kept)
