"""one step, group by group -> metrics: the largest norm, the smallest limit, how many clipped."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from . import _device
from ._entries import Entries, bounded_norms, read_once
from ._numbers import as_one, end_to_end, maxima_and_counts
from .measure import shards
from .record import Metrics

SMALL = 2**12  # norms of a leaf that are packed with others, as of its units
SEVERAL = 2  # arrays, whose maxima take a GPU more kernels apart than laid end to end


class Groups(NamedTuple):
    """One step, group by group: arrays of one shape."""

    norm: jax.Array  # float32 or float64, before clipping
    clipped_norm: jax.Array  # as norm, after clipping
    limit: jax.Array  # as norm
    factor: jax.Array | None  # as norm; None if there is an excess
    finite: jax.Array  # bool, whether the norm of what came in was finite
    excess: jax.Array | None = None  # as norm, >= 1, 1 / factor as far as it is no quotient

    @classmethod
    def of(cls, entries: Entries) -> Groups:
        """Each entry as a group."""
        _, norm, finite, limit, _, nonfinite = entries
        clipped_norm, excess = bounded_norms(norm, limit, nonfinite)
        return cls(norm, clipped_norm, limit, None, finite, excess)


class _Summary(NamedTuple):
    """What the metrics need of some groups: float32 each, one number or a vector of them."""

    norm: jax.Array  # largest
    clipped_norm: jax.Array  # largest
    limit: jax.Array  # smallest
    factor: jax.Array  # smallest
    clipped: jax.Array  # how many are
    bad: jax.Array  # how many had a norm that was not finite, or whether any had


class _Reducible(NamedTuple):
    """What of an array of groups is to be reduced."""

    sizes: tuple[jax.Array, ...]  # as the norm, to their maxima
    masks: tuple[jax.Array, ...]  # bool, to their counts


def observe(before: Metrics, groups: Sequence[Groups | Entries]) -> Metrics:
    """The metrics after one more step."""
    parts = _summaries(_packed(groups))
    nothing = _Summary(*(jnp.full((), x, jnp.float32) for x in (0, 0, jnp.inf, 1, 0, 0)))
    each = _Summary(*map(_joined, zip(*(parts or [nothing]), strict=True)))
    count, bad = jnp.sum(each.clipped), jnp.sum(each.bad)
    size = max(sum(g.norm.size * shards.count(shards.varying(g.norm)) for g in groups), 1)
    kept = lambda old, new: in_place(old, new, before.steps)
    return Metrics(
        norm=kept(before.norm, maximum(each.norm)),
        clipped_norm=kept(before.clipped_norm, maximum(each.clipped_norm)),
        limit=kept(before.limit, -maximum(-each.limit)),
        factor=kept(before.factor, -maximum(-each.factor)),
        clipped=kept(before.clipped, count / jnp.float32(size)),
        steps=optax.safe_increment(before.steps),
        clipped_steps=increment_if(count > 0, before.clipped_steps),
        nonfinite_steps=increment_if(bad > 0, before.nonfinite_steps),
    )


def in_place(old: jax.Array, new: jax.Array, steps: jax.Array) -> jax.Array:
    """The new number, in the buffer of the old one where the state is donated.

    JAX drops arguments that are not read, and what is written to a new address in every step has a
    GPU's driver change its graph of kernels: 2.27 ms a step of GPT-2's 148 leaves on an H100, and
    1.66 so. XLA does not know that no count is negative.
    """
    return jnp.where(steps < 0, old, new)


def _packed(groups: Sequence[Groups | Entries]) -> list[Groups | list[Entries]]:
    """The same groups in fewer arrays: those of small ones behind each other, on one device.

    The maxima and sums of each array are loops of their own: of adaptive_grad_clip on 300 leaves,
    metrics take 11 s to compile apart, and 1.5 packed. Entries that are read once are together.
    """
    found: list[Groups | list[Entries]] = []
    small: list[Groups] = []
    once: list[Entries] = []
    for g in groups:
        if not g.norm.size:
            continue
        if isinstance(g, Entries) and g.uniform and _is_one(g.norm):
            once.append(g)
            continue
        own = g if isinstance(g, Groups) else Groups.of(g)
        few = isinstance(g, Groups) and _is_one(g.norm) and g.norm.size <= SMALL
        (small if few else found).append(own)
    return [*found, *_together(small), *([once] if once else [])]


def _is_one(norm: jax.Array) -> bool:
    """Whether it is float32, on one device, and counts of it are in range of int32."""
    return shards.is_in_one_place(norm) and norm.dtype == jnp.float32 and norm.size < 2**31


def _together(small: list[Groups]) -> list[Groups]:
    if len(small) < 2:
        return small

    def packed(field: str) -> Any:
        parts = [getattr(g, field) for g in small]
        if parts[0] is None:
            return None
        alike = [jnp.broadcast_to(x, g.norm.shape) for x, g in zip(parts, small, strict=True)]
        # Without the barrier, XLA would fuse what makes a part into the loop over all.
        return as_one(alike)

    return [Groups(*map(packed, Groups._fields))]


def _joined(arrays: Sequence[jax.Array]) -> jax.Array:
    # Of several, a GPU would reduce each by itself.
    join = as_one if _device.on_gpu() and len(arrays) > SEVERAL else end_to_end
    return join(arrays)


def _summaries(parts: Sequence[Groups | list[Entries]]) -> list[_Summary]:
    """What the metrics need: of each array, or of all together that are read at once."""
    found: list[_Summary] = []
    at_once: dict[bool, list[_Reducible]] = {}
    for g in parts:
        if isinstance(g, list):
            found.append(_Summary(*read_once(g)))
        elif _is_one(g.norm) and g.norm.size > 1:
            at_once.setdefault(g.factor is None, []).append(_reducible(g))
        else:
            own = _reducible(g)
            most = map(maximum, own.sizes)
            found.append(_summary(most, map(_total, own.masks), inverse=g.factor is None))
    for inverse, several in at_once.items():
        found.append(_summary(*_in_one_read(*zip(*several, strict=True)), inverse=inverse))
    return found


def _reducible(g: Groups) -> _Reducible:
    alike = lambda x: jnp.broadcast_to(x.astype(g.norm.dtype), g.norm.shape)
    # The smallest factor is that of the largest of these.
    order = -alike(g.factor) if g.excess is None else g.excess
    clipped = jnp.isfinite(g.norm) & (order > (-1 if g.excess is None else 1))
    return _Reducible((g.norm, alike(g.clipped_norm), -alike(g.limit), order), (clipped, ~g.finite))


def _summary(most: Iterable[jax.Array], counts: Iterable[jax.Array], *, inverse: bool) -> _Summary:
    norm, clipped_norm, limit, order = most
    return _Summary(norm, clipped_norm, -limit, 1 / order if inverse else -order, *counts)


@jax.custom_jvp
def _in_one_read(
    sizes: Sequence[tuple[jax.Array, ...]], masks: Sequence[tuple[jax.Array, ...]]
) -> tuple[list[jax.Array], list[jax.Array]]:
    """The maximum of each of the sizes and the count of each of the masks, on one device.

    All of an array in one reduction, and of integers, which XLA:CPU may reorder and so makes fast:
    the metrics of 10 M entries take 1.3 times as long as their sum of squares, and one after the
    other 20 to 35 times. Over the devices of a mesh, XLA would gather what it cannot add up. On a
    GPU, they are those of each row. They are floats again when those of all arrays are end to end.
    """

    @jax.jit  # traced and lowered once for all arrays of one shape
    def read(own: Sequence[jax.Array], mine: Sequence[jax.Array]) -> list[jax.Array]:
        return maxima_and_counts(
            list(map(shards.in_order, own)), mine, _device.axes_first(own[0].shape)
        )

    each = [*map(_joined, zip(*map(read, sizes, masks), strict=True))]
    most = len(sizes[0])
    return [*map(shards.in_order, each[:most])], [x.astype(jnp.float32) for x in each[most:]]


@_in_one_read.defjvp
def _in_one_read_jvp(primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> tuple[Any, Any]:
    most, counts = _in_one_read(*primals)  # integers have no derivative, a plain maximum has

    def moved(sizes: tuple[jax.Array, ...], dots: tuple[jax.Array, ...]) -> list[jax.Array]:
        of_rows = functools.partial(jnp.max, axis=_device.axes_first(sizes[0].shape))
        return [jax.jvp(of_rows, (x,), (dx,))[1] for x, dx in zip(sizes, dots, strict=True)]

    each = map(_joined, zip(*map(moved, primals[0], tangents[0]), strict=True))
    return (most, counts), ([*each], [*map(jnp.zeros_like, counts)])


def _total(mask: jax.Array) -> jax.Array:
    # float32, because a tree can have more entries than int32 can count.
    return shards.total(jnp.sum(mask.astype(jnp.float32)), shards.varying(mask))


def maximum(x: jax.Array) -> jax.Array:
    """The maximum, as () float32; NaN if there is one, on a mesh too."""
    most = jnp.max(x)
    # See _numbers.largest; but these may be negative. And of more than 4096 numbers, the maximum
    # that XLA:CPU finds is never NaN.
    total = jax.lax.stop_gradient(jnp.sum(jnp.square(x)))
    found = jnp.where(jnp.isnan(total), total, most).astype(jnp.float32)
    return shards.largest(found, shards.varying(found))


def increment_if(happened: jax.Array, count: jax.Array) -> jax.Array:
    return jnp.where(happened, optax.safe_increment(count), count)
