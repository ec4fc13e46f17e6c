"""norms, limits, factors -> metrics: what a person reads, and how to find it.

A clip keeps its metrics in its own state, on the device, because Optax has no other way out of a
chain. :func:`metrics` finds them in whatever the optimizer state is wrapped in.

They are of the whole tree on any mesh, with one exception: where JAX does not track what is split
(`pmap`, `shard_map` with check_vma=False), those of units, layers and entries are of the device's
shard.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from . import _device
from ._numbers import is_known
from ._range import Count, Range
from .measure import shards

Tree = Any

SMALL = 2**12  # norms of a leaf that are packed with others, as of its units; not of its entries

# A norm that is not finite is what a bad step had.
Size = Annotated[jax.Array, Range(0, also=(np.inf, np.nan))]
Limit = Annotated[jax.Array, Range(0, also=(np.inf,), start=np.inf)]
Factor = Annotated[jax.Array, Range(0, also=(np.nan,), start=1)]
Loss = Annotated[jax.Array, Range(also=(np.inf, -np.inf, np.nan), start=-np.inf)]
LossLimit = Annotated[jax.Array, Range(also=(np.inf,), start=np.inf)]
# Above 1 by what float32 makes of numbers beyond 2^24 that are counted in it.
Share = Annotated[jax.Array, Range(0, 1 + 2.0**-10)]


class Metrics(NamedTuple):
    """What the last step was, and how many there were; never needed by the next step.

    The most common misreading is "clipping does not work, the logged norm is above the limit":
    `norm` is what came in, `clipped_norm` what went out.
    """

    norm: Size  # () float32, largest norm before clipping; not finite in a bad step, unless
    #                  nonfinite="sanitize", under which it is the norm without the bad entries
    clipped_norm: Size  # () float32, largest norm after clipping
    limit: Limit  # () float32, smallest limit; inf where there is none
    factor: Factor  # () float32, smallest factor
    clipped: Share  # () float32, share of all groups that have a finite norm and factor < 1
    steps: Count  # () int32, steps so far; as all counters, stays at its largest value
    clipped_steps: Count  # () int32, steps so far in which some group was clipped
    nonfinite_steps: Count  # () int32, steps so far in which some norm was not finite

    def laws(self) -> dict[str, jax.Array]:
        """What ties the fields together."""
        finite = jnp.isfinite(self.norm)
        return {
            "clipped_steps <= steps": self.clipped_steps <= self.steps,
            "nonfinite_steps <= steps": self.nonfinite_steps <= self.steps,
            "clipped_norm and factor are numbers where norm is finite": ~finite
            | ~jnp.isnan(self.clipped_norm + self.factor),
        }


class ClipState(NamedTuple):
    """The state of a clip."""

    memory: Tree  # what the threshold needs next, one memory per array of norms; () if nothing
    metrics: Metrics | None  # what a person reads; None with record=False


class SkipMetrics(NamedTuple):
    """What the last step of a `skip_step` was, and how many there were."""

    norm: Size  # () float32, largest norm, before anything inside changes the gradients
    limit: Limit  # () float32, smallest limit of a norm; inf where there is none
    loss: Loss  # () float32; -inf where none was given, as NaN would stop jax_debug_nans
    loss_limit: LossLimit  # () float32, inf where there is none
    skipped: Count  # () int32, 1 if this step was skipped, 0 if it was taken
    consecutive: Count  # () int32, steps skipped in a row, up to this one
    steps: Count  # () int32, steps so far; as all counters, stays at its largest value
    skipped_steps: Count  # () int32, steps so far that were skipped
    nonfinite_steps: Count  # () int32, those of them in which a norm or the loss was not finite
    gave_way_steps: Count  # () int32, steps so far that were taken for all that was above a limit

    def laws(self) -> dict[str, jax.Array]:
        """What ties the fields together."""
        return {
            "skipped_steps <= steps": self.skipped_steps <= self.steps,
            "nonfinite_steps <= skipped_steps": self.nonfinite_steps <= self.skipped_steps,
            "gave_way_steps <= steps": self.gave_way_steps <= self.steps,
            "skipped is 1 where consecutive > 0, else 0": self.skipped
            == (self.consecutive > 0).astype(jnp.int32),
        }


class SkipRecord(NamedTuple):
    """What a `skip_step` keeps of its own."""

    memory: Tree  # what its thresholds need next
    metrics: SkipMetrics  # what a person reads


class Groups(NamedTuple):
    """One step, group by group: arrays of one shape."""

    norm: jax.Array  # float32 or float64, before clipping
    clipped_norm: jax.Array  # as norm, after clipping
    limit: jax.Array  # as norm
    factor: jax.Array | None  # as norm; None if there is an excess
    finite: jax.Array  # bool, whether the norm of what came in was finite
    excess: jax.Array | None = None  # as norm, >= 1, 1 / factor as far as it is no quotient


def start() -> Metrics:
    """The metrics before the first step, each in a buffer of its own so that it can be donated."""
    reals = [jnp.full((), x, jnp.float32) for x in (0, 0, np.inf, 1, 0)]
    return Metrics(*reals, *(jnp.zeros((), jnp.int32) for _ in range(3)))


class _Summary(NamedTuple):
    """What the metrics need of one array of groups: float32 each, one number, or one per row."""

    norm: jax.Array  # largest
    clipped_norm: jax.Array  # largest
    limit: jax.Array  # smallest
    factor: jax.Array  # smallest
    clipped: jax.Array  # how many are
    bad: jax.Array  # how many had a norm that was not finite


def observe(before: Metrics, groups: list[Groups]) -> Metrics:
    """The metrics after one more step."""
    parts = [_summary(g) for g in _packed(groups) if g.norm.size]
    nothing = _Summary(*(jnp.full((), x, jnp.float32) for x in (0, 0, np.inf, 1, 0, 0)))
    each = _Summary(*map(_end_to_end, zip(*(parts or [nothing]), strict=True)))
    count, bad = jnp.sum(each.clipped), jnp.sum(each.bad)
    size = max(sum(g.norm.size * shards.count(shards.varying(g.norm)) for g in groups), 1)
    in_place = lambda old, new: _in_place(old, new, before.steps)
    return Metrics(
        norm=in_place(before.norm, jnp.max(each.norm)),
        clipped_norm=in_place(before.clipped_norm, jnp.max(each.clipped_norm)),
        limit=in_place(before.limit, jnp.min(each.limit)),
        factor=in_place(before.factor, jnp.min(each.factor)),
        clipped=in_place(before.clipped, count / jnp.float32(size)),
        steps=optax.safe_increment(before.steps),
        clipped_steps=_increment_if(count > 0, before.clipped_steps),
        nonfinite_steps=_increment_if(bad > 0, before.nonfinite_steps),
    )


def _in_place(old: jax.Array, new: jax.Array, steps: jax.Array) -> jax.Array:
    """The new number, in the buffer of the old one where the state is donated.

    JAX drops arguments that are not read, and what is written to a new address in every step has a
    GPU's driver change its graph of kernels: 2.27 ms a step of GPT-2's 148 leaves on an H100, and
    1.66 so. XLA does not know that no count is negative.
    """
    return jnp.where(steps < 0, old, new)


def _end_to_end(parts: Sequence[jax.Array]) -> jax.Array:
    return jnp.concatenate([jnp.ravel(x) for x in parts])


def _packed(groups: list[Groups]) -> list[Groups]:
    """The same groups in fewer arrays: those of small ones behind each other, on one device.

    The maxima and sums of each array are loops of their own: of adaptive_grad_clip on 300 leaves,
    metrics take 11 s to compile apart, and 1.5 packed.
    """
    small = [
        g
        for g in groups
        if (g.factor is not None or _device.on_gpu())
        and (shards.layout(g.norm), g.norm.dtype) == ((), jnp.float32)
        and is_known(g.norm.size)
        and g.norm.size <= SMALL
    ]
    if len(small) < 2:
        return groups

    def packed(field: str) -> Any:
        parts = [getattr(g, field) for g in small]
        if parts[0] is None:
            return None
        alike = [jnp.broadcast_to(x, g.norm.shape) for x, g in zip(parts, small, strict=True)]
        # Without the barrier, XLA would fuse what makes a part into the loop over all.
        return jax.lax.optimization_barrier(_end_to_end(alike))

    one = Groups(*map(packed, Groups._fields))
    rest = [g for g in groups if not any(g is other for other in small)]
    return [one, *rest]


def _summary(g: Groups) -> _Summary:
    alike = lambda x: jnp.broadcast_to(x.astype(g.norm.dtype), g.norm.shape)
    # The smallest factor is that of the largest of these.
    order = -alike(g.factor) if g.excess is None else g.excess
    clipped = jnp.isfinite(g.norm) & (order > (-1 if g.excess is None else 1))
    sizes = (g.norm, alike(g.clipped_norm), -alike(g.limit), order)
    masks = (clipped, ~g.finite)
    one_device = shards.layout(g.norm) == () and g.norm.dtype == jnp.float32
    if one_device and is_known(g.norm.size) and 1 < g.norm.size < 2**31:  # for int32 to count
        found = _in_one_read(sizes, masks)
    else:
        found = (*map(_most, sizes), *map(_total, masks))
    norm, clipped_norm, limit, last, *counts = found
    return _Summary(norm, clipped_norm, -limit, -last if g.excess is None else 1 / last, *counts)


def _axes(x: jax.Array) -> tuple[int, ...]:
    return _device.row_axes(x.shape) if _device.on_gpu() else tuple(range(x.ndim))


@jax.custom_jvp
def _in_one_read(
    sizes: tuple[jax.Array, ...], masks: tuple[jax.Array, ...]
) -> tuple[jax.Array, ...]:
    """The maximum of each of the sizes and the count of each of the masks, on one device.

    All in one reduction, and of integers, which XLA:CPU may reorder and so makes fast: the metrics
    of 10 M entries take 1.3 times as long as their sum of squares, and one after the other 20 to 35
    times. Over the devices of a mesh, XLA would gather what it cannot add up. On a GPU, they are
    those of each row.
    """
    axes = _axes(sizes[0])
    most = len(sizes)
    arrays = [*map(shards.in_order, sizes), *(mask.astype(jnp.int32) for mask in masks)]
    start = [np.int32(np.iinfo(np.int32).min)] * most + [np.int32(0)] * len(masks)

    def join(a: Sequence[jax.Array], b: Sequence[jax.Array]) -> list[jax.Array]:
        return [*map(jax.lax.max, a[:most], b[:most]), *map(jax.lax.add, a[most:], b[most:])]

    found = jax.lax.reduce(arrays, start, join, axes)
    return (*map(shards.in_order, found[:most]), *(x.astype(jnp.float32) for x in found[most:]))


@_in_one_read.defjvp
def _in_one_read_jvp(primals: Any, tangents: Any) -> tuple[tuple[jax.Array, ...], Any]:
    value = _in_one_read(*primals)  # integers have no derivative, a plain maximum has
    each = zip(primals[0], tangents[0], strict=True)
    of_rows = functools.partial(jnp.max, axis=_axes(primals[0][0]))
    moved = [jax.jvp(of_rows, (x,), (dx,))[1] for x, dx in each]
    return value, (*moved, *map(jnp.zeros_like, value[len(moved) :]))


def metrics(opt_state: Tree) -> dict[str, jax.Array]:
    """The metrics of every clip and `skip_step` in an optimizer state, ready for a logger.

    Args:
      opt_state: the state of any composition of Optax transformations, or what holds one: a Flax
        `TrainState`, an `nnx.Optimizer`. Concrete or traced; nothing waits for the device.

    Returns:
      The fields of :class:`Metrics`, or of :class:`SkipMetrics`, by name, each as the state holds
      it, which is () unless the state is vmapped. Where there are several, names have the place of
      each in front: "0/norm" and "1/norm" in a chain, "encoder/norm" in a partition or a named
      chain, "skip/norm" and "inner/0/norm" of a `skip_step` around a chain. Clips with
      record=False are left out.

    Raises:
      ValueError: if there is no clip of this package in it.

    Example:
      >>> import jax.numpy as jnp, optax, optaxclip
      >>> tx = optax.chain(optaxclip.clip_by_global_norm(1.0), optax.sgd(0.1))
      >>> params = jnp.array([3.0, 4.0])
      >>> updates, opt_state = tx.update(params, tx.init(params))
      >>> read = optaxclip.metrics(opt_state)
      >>> print(read["norm"], read["clipped_norm"], read["factor"], read["clipped_steps"])
      5.0 1.0 0.2 1
    """
    is_clip = lambda x: isinstance(x, ClipState | SkipRecord)
    nodes, _ = jax.tree.flatten_with_path(opt_state, is_leaf=is_clip)
    clips = [(path, node.metrics) for path, node in nodes if is_clip(node)]
    if not clips:
        message = (
            "no clip of optaxclip in this state: pass the optimizer state that holds it, "
            "or the TrainState or nnx.Optimizer (not its nnx.state)"
        )
        raise ValueError(message)
    clips = [(path, record) for path, record in clips if record is not None]
    names = _names([path for path, _ in clips])
    return {
        # nnx.Optimizer wraps each array in a node of its own, which has one leaf.
        name + field: jax.tree.leaves(getattr(record, field))[0]
        for name, (_, record) in zip(names, clips, strict=True)
        for field in record._fields
    }


def _names(paths: list[tuple[Any, ...]]) -> list[str]:
    """A short name for each path: chain positions and keys, attributes only where needed."""
    if len(paths) <= 1:
        return [""] * len(paths)
    attribute = jax.tree_util.GetAttrKey
    short = [tuple(key for key in path if not isinstance(key, attribute)) for path in paths]
    # A name is no start of another one, as that of a skip_step would be of those in its chain.
    within = any(b[: len(a)] == a for a, b in itertools.permutations(short, 2))
    chosen = _from_where_they_part(paths if within else short)
    return [jax.tree_util.keystr(p, simple=True, separator="/") + "/" for p in chosen]


def _from_where_they_part(paths: list[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    """The paths from where they part."""
    while len({path[:1] for path in paths}) == 1:
        paths = [path[1:] for path in paths]
    return paths


def _total(mask: jax.Array) -> jax.Array:
    # float32, because a tree can have more entries than int32 can count.
    return shards.total(jnp.sum(mask.astype(jnp.float32)), shards.varying(mask))


def _most(x: jax.Array) -> jax.Array:
    """The maximum, as () float32; NaN if there is one, on a mesh too."""
    most = jnp.max(x)
    # See _numbers.largest; but these may be negative.
    bad = jnp.isnan(jnp.sum(jnp.square(x)))
    found = jnp.where(bad, jnp.full_like(most, jnp.nan), most).astype(jnp.float32)
    return shards.largest(found, shards.varying(found))


def _increment_if(happened: jax.Array, count: jax.Array) -> jax.Array:
    return jnp.where(happened, optax.safe_increment(count), count)
