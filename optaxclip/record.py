"""norms, limits, factors -> metrics: what a person reads, and how to find it.

A clip keeps its metrics in its own state, on the device, because Optax has no other way out of a
chain. :func:`metrics` finds them in whatever the optimizer state is wrapped in.

They are of the whole tree on any mesh, with one exception: where JAX does not track what is split
(`pmap`, `shard_map` with check_vma=False), those of units, layers and entries are of the device's
shard.
"""

from __future__ import annotations

import itertools
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ._range import Count, Range

Tree = Any

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


def start() -> Metrics:
    """The metrics before the first step, each in a buffer of its own so that it can be donated."""
    reals = [jnp.full((), x, jnp.float32) for x in (0, 0, np.inf, 1, 0)]
    return Metrics(*reals, *(jnp.zeros((), jnp.int32) for _ in range(3)))


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
