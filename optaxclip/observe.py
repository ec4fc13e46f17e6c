"""gradients --measure--> norms --> histogram: what norms are like, before a limit is chosen.

:func:`observe_norms` goes anywhere in a chain, changes nothing, and keeps on the device how often
there were norms of each size. :func:`norm_summary` reads that, on the host, whenever a person asks;
:func:`optaxclip.advise.recommend_threshold` makes a limit of it.

The bins are fixed, four for each factor of two from 2^-40 to 2^60; the outermost ones also count
what is outside. A percentile is read within a bin, and so is off by less than 2^(1/4) - 1 = 19 %,
whatever the norms are like. Quantiles of the normal distribution are interpolated there, not ranks,
as logarithms of norms are roughly normal. So of 4000 norms that scatter by 5 % to 100 %, the 95th
percentile is off by 2.5 % at most, and from 0.6 to 1.8 times the 5 % that should be are above it.
With half as many bins, it is 0 to 2.5 times as many.
"""

from __future__ import annotations

import functools
import statistics
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from . import _check
from ._numbers import part
from ._place import abstract_norms, beside
from ._range import Count, Range, named, plain
from ._summary import increment_if
from .measure import Measure, global_norm
from .measure.looks import in_range
from .record import ClipState

Tree = Any

LOW, HIGH, PER_OCTAVE = -40, 60, 4  # of the logarithm to base 2; see the module
BINS = (HIGH - LOW) * PER_OCTAVE
RECENT = 64  # of the latest norms, each kept as it was

Counts = Annotated[jax.Array, Range(0, dtypes=("int32",), front=1)]
Sizes = Annotated[jax.Array, Range(0, also=(np.inf, np.nan), front=1)]
Finite = Annotated[jax.Array, Range(0)]


class NormHistory(NamedTuple):
    """What is kept of one array of norms; every count stays at its largest value."""

    bins: Counts  # (BINS, *norm) int32, how many norms were of each size
    recent: Sizes  # (RECENT, *norm) float32, the latest norms, the last one last; 0 before
    largest: Finite  # as norm, float32, the largest that was finite
    zeros: Count  # as norm, int32, norms that were 0
    nonfinite: Count  # as norm, int32, norms that were inf or NaN

    def laws(self) -> dict[str, jax.Array]:
        """What ties the fields together."""
        law = "largest is 0 where all bins are, and only there"
        axis = _axis(self.bins, self.recent)
        if axis is None or np.delete(self.bins.shape, axis).tolist() != [*self.largest.shape]:
            return {law: jnp.zeros((), bool)}
        return {law: jnp.all((self.largest > 0) == jnp.any(self.bins > 0, axis))}


class NormSummary(NamedTuple):
    """What the norms so far were like, on the host; percentiles are of those > 0 and finite."""

    count: Any  # int64, norms so far, of any kind
    median: Any  # float64, NaN if there is none
    p90: Any  # float64
    p95: Any  # float64
    p99: Any  # float64
    max: Any  # float64, exact; 0 if there is none
    nonfinite: Any  # int32, how many were inf or NaN
    zeros: Any  # int32, how many were 0
    recent: Any  # (at most 64, *norm) float32, the latest, the last one last, each as it was


def observe_norms(measure: Measure | None = None) -> optax.GradientTransformation:
    """Keeps a histogram of norms, and passes the gradients on as they are.

    bins[floor(4 (log2 ||G|| + 40))] += 1. Nothing waits for the device. In front of a clipper by
    the same measure, the norm is measured once.

    Args:
      measure: what norms are of; None: `measure.global_norm()`. Each group has a histogram of its
        own, 1.9 kB, so this is for labels and leaves, not for entries.

    Returns:
      A transformation whose updates are the gradients themselves. Its state is a
      :class:`ClipState` without metrics, and its memory a :class:`NormHistory` for each array of
      norms, so that all that finds, checks and repairs the state of a clip does so with this one.

    Raises:
      TypeError: if `measure` is no Measure.

    Example:
      >>> import jax.numpy as jnp, optax, optaxclip
      >>> tx = optax.chain(observe_norms(), optaxclip.clip_by_global_norm(1.0))
      >>> params = jnp.zeros(2)
      >>> state = tx.init(params)
      >>> for size in [1.0, 2.0, 3.0, 4.0, jnp.nan]:
      ...     updates, state = tx.update(size * jnp.array([1.0, 0.0]), state)
      >>> seen = norm_summary(state)
      >>> print(seen.count, seen.nonfinite, f"{seen.max:.1f}", seen.recent)
      5 1 4.0 [ 1.  2.  3.  4. nan]
    """
    measure = global_norm() if measure is None else measure
    _check.instance(Measure, "measure.global_norm()", measure=measure)

    def init(params: Tree) -> ClipState:
        floats, _ = part(params)
        place = beside(floats)
        norms = abstract_norms(measure, floats)
        memory = jax.tree.map(lambda norm: place(_blank(norm), norm), norms)
        return ClipState(memory if jax.tree.leaves(memory) else (), None)

    # One program for eager calls too, as in `clip`.
    @functools.partial(jax.jit, inline=True)
    def step(grads: Tree, state: ClipState, params: Tree) -> ClipState:
        # A histogram has no derivative, and that of a logarithm is infinite at 0.
        norms, treedef = jax.tree.flatten(in_range(measure, jax.lax.stop_gradient(grads), params))
        if not jax.tree.leaves(state.memory):
            return state
        try:
            histories = treedef.flatten_up_to(state.memory)
        except ValueError:
            message = "these gradients have other float leaves than the params given to init"
            raise ValueError(message) from None
        pairs = zip(histories, norms, strict=True)
        return ClipState(treedef.unflatten([_learned(*pair) for pair in pairs]), None)

    def update(grads: Tree, state: ClipState, params: Tree = None) -> tuple[Tree, ClipState]:
        own = None if params is None else part(params)[0]
        return grads, step(part(grads)[0], state, own)

    return optax.GradientTransformation(init, update)


def norm_summary(opt_state: Tree) -> NormSummary | dict[str, NormSummary]:
    """What the norms so far were like, read from the state of `observe_norms`.

    Args:
      opt_state: the state of any composition of Optax transformations, or what holds one: a Flax
        `TrainState`, an `nnx.Optimizer`. Concrete: this waits for the device.

    Returns:
      A :class:`NormSummary` in NumPy numbers, or arrays in the shape of the norms: of leaves, a
      vector in their order. If there are several arrays of norms, as of labels or of two
      observers, a dict of summaries by their place in the state.

    Raises:
      ValueError: if there is no observer in it.

    Example:
      >>> import jax.numpy as jnp, optaxclip
      >>> labels = optaxclip.measure.by_label(
      ...     {"w": "dense", "b": "bias"}, optaxclip.measure.leaf_norm()
      ... )
      >>> tx = observe_norms(labels)
      >>> grads = {"w": jnp.array([3.0, 4.0]), "b": jnp.array([0.5])}
      >>> _, state = tx.update(grads, tx.init(grads))
      >>> {place: summary.max.item() for place, summary in norm_summary(state).items()}
      {'memory/bias': 0.5, 'memory/dense': 5.0}
    """
    found = {place: _summary(history) for place, history in histories(opt_state).items()}
    return next(iter(found.values())) if len(found) == 1 else found


def histories(opt_state: Tree) -> dict[str, Any]:
    """What every observer in a state keeps, as NumPy arrays, by place.

    Args:
      opt_state: as for :func:`norm_summary`.

    Returns:
      A dict, in which the axis of bins, and that of recent norms, comes first.

    Raises:
      ValueError: if there is no observer in it.
    """
    found = {named("", path): _read(plain(x)) for path, x in _found(opt_state)}
    if not found:
        raise ValueError(
            "no observe_norms in this state: pass the optimizer state that holds it, "
            "or the TrainState or nnx.Optimizer (not its nnx.state)"
        )
    return found


def holds_history(tree: Tree) -> bool:
    """Whether there is an observer's memory in it, as in the state of one."""
    return bool(_found(tree))


def only_history(opt_state: Tree) -> Any:
    """What a state keeps of its one norm, without axes of that; a ValueError if it keeps more."""
    found = histories(opt_state)
    sizes = {place: history.largest.size for place, history in found.items()}
    if list(sizes.values()) != [1]:
        held = ", ".join(f"{n} at {place!r}" for place, n in sizes.items())
        raise ValueError(f"a state of norms must keep one, that of the tree; this one has {held}")
    history = next(iter(found.values()))
    return jax.tree.map(lambda x: x.reshape(x.shape[: x.ndim - history.largest.ndim]), history)


def percentiles(bins: np.ndarray, largest: np.ndarray, percents: Any) -> np.ndarray:
    """What a histogram says of percentiles.

    Args:
      bins: (BINS, ...), counts.
      largest: (...), above which no percentile is.
      percents: (percentiles,), from 0 to 100.

    Returns:
      (percentiles, ...) float64, NaN where all counts are 0.
    """
    edges = LOW + np.arange(BINS + 1) / PER_OCTAVE
    percents = np.asarray(percents, np.float64)
    rows = []
    for counts in bins.reshape(BINS, -1).T.astype(np.float64):
        rows.append(np.full(percents.shape, np.nan))
        if held := np.flatnonzero(counts).tolist():
            # Only bins that hold something, so that what is between two far apart is not a norm.
            ranks = np.concatenate([[0], np.cumsum(counts[held])]) / counts.sum()
            own = np.clip(np.searchsorted(ranks, percents / 100), 1, len(held)) - 1
            least = 0.5 / counts.sum()
            z, z_own = (_normal(np.clip(x, least, 1 - least)) for x in (ranks, percents / 100))
            width = np.maximum(z[own + 1] - z[own], np.finfo(np.float64).tiny)
            share = np.clip((z_own - z[own]) / width, 0, 1)
            rows[-1] = 2.0 ** (edges[held][own] + share / PER_OCTAVE)
    found = np.stack(rows, 1) if rows else np.zeros((len(percents), 0))
    return np.minimum(found.reshape(-1, *largest.shape), largest.astype(np.float64))


def _normal(ranks: np.ndarray) -> np.ndarray:
    """The quantiles of the normal distribution."""
    return np.array([statistics.NormalDist().inv_cdf(rank) for rank in ranks.tolist()])


def _blank(norm: jax.ShapeDtypeStruct) -> NormHistory:
    """The history before the first norm, each array of it in a buffer of its own."""
    one = lambda dtype: jnp.zeros_like(norm, dtype)
    more = lambda n, dtype: jnp.broadcast_to(one(dtype), (n, *norm.shape))
    return NormHistory(
        more(BINS, jnp.int32),
        more(RECENT, jnp.float32),
        *map(one, (jnp.float32, jnp.int32, jnp.int32)),
    )


def _learned(old: NormHistory, norm: jax.Array) -> NormHistory:
    """The history with one more norm."""
    size = norm.astype(jnp.float32)
    finite = jnp.isfinite(size)
    counts = finite & (size > 0)
    place = (jnp.log2(jnp.where(counts, size, 1)) - LOW) * PER_OCTAVE
    own = jnp.clip(place, 0, BINS - 1).astype(jnp.int32)
    # Not a scatter, which an Explicit mesh wants to be told the sharding of.
    each = jax.lax.broadcasted_iota(jnp.int32, old.bins.shape, 0)
    hit = (each == own[None]) & counts[None]
    return NormHistory(
        bins=increment_if(hit, old.bins),
        recent=jnp.concatenate([old.recent[1:], size[None]]),
        largest=jnp.where(counts, jnp.maximum(old.largest, size), old.largest),
        zeros=increment_if(size == 0, old.zeros),
        nonfinite=increment_if(~finite, old.nonfinite),
    )


def _found(tree: Tree) -> list[tuple[Any, NormHistory]]:
    is_history = lambda x: isinstance(x, NormHistory)
    nodes = jax.tree.leaves_with_path(tree, is_leaf=is_history)
    return [(path, x) for path, x in nodes if is_history(x)]


def _read(history: NormHistory) -> Any:
    """The history on the host; of a vmapped one, the axes of bins and recent norms moved ahead."""
    read: Any = jax.tree.map(np.asarray, jax.device_get(history))
    axis = _axis(read.bins, read.recent)
    if axis is None:
        shapes = f"{read.bins.shape} and {read.recent.shape}"
        raise ValueError(f"bins and recent must differ in one axis, which they add; got {shapes}")
    ahead = lambda x: np.moveaxis(x, axis, 0)
    return read._replace(bins=ahead(read.bins), recent=ahead(read.recent))


def _axis(bins: Any, recent: Any) -> int | None:
    """The axis that these add to a norm, in which alone they differ: vmap puts more in front."""
    pairs = enumerate(zip(bins.shape, recent.shape, strict=False))
    found = [i for i, sizes in pairs if sizes == (BINS, RECENT)]
    return found[0] if len(found) == 1 and bins.ndim == recent.ndim else None


def _summary(history: Any) -> NormSummary:
    count = history.bins.sum(0, dtype=np.int64) + history.zeros + history.nonfinite
    median, p90, p95, p99 = percentiles(history.bins, history.largest, (50, 90, 95, 99))
    kept = min(int(count.max(initial=0)), RECENT)
    recent = history.recent[RECENT - kept :]
    largest = history.largest.astype(np.float64)
    return NormSummary(
        count, median, p90, p95, p99, largest, history.nonfinite, history.zeros, recent
    )
