"""optimizer state -> problems: what in it no step can have left, and the state without that.

What a field may hold is written beside the field, as a `Range`; what ties fields together is the
method `laws` of their class. A new threshold says so in its own file, and is checked.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, overload

import jax
import jax.numpy as jnp

from . import _check
from ._range import ANYTHING, Field, Range, fields, is_part, joined, named, plain, tied
from .record import ClipState, Metrics, SkipMetrics, SkipRecord
from .stable_adam import Moments, StableAdamState
from .threshold import Clock

Tree = Any


class Problem(NamedTuple):
    """What is wrong at one place of a state."""

    place: str  # the path to the field: "0/memory/threshold/average"
    found: str
    allowed: str

    def __str__(self) -> str:
        """In one line."""
        return f"{self.place}: {self.found}; allowed: {self.allowed}"


class _Part(NamedTuple):
    """What is right or wrong as one: a memory, a clock, the metrics of a clip."""

    place: str
    now: Tree
    start: Tree  # the same in `like`; None without it


@overload
def validate_state(
    opt_state: Tree, *, like: Tree = None, repair: Literal[False] = False
) -> list[Problem]: ...
@overload
def validate_state(opt_state: Tree, *, like: Tree = None, repair: Literal[True]) -> Tree: ...
def validate_state(opt_state: Tree, *, like: Tree = None, repair: bool = False) -> Any:
    r"""Finds what no step can have left in the state of a clipper, such as a bad restore.

    These are lost containers and arrays, other dtypes (weak ones too) and shapes, numbers out of
    range (NaN, negative counts and averages), and fields that contradict each other. It waits for
    the device, outside of jit; where there are several processes, each has to call it.

    It cannot find a number that is wrong and yet possible, for which only a checksum would do. Of
    single flipped bits in states of all variants after 28 steps, it finds those of signs (91 %,
    the rest in zeros and in moments that have a sign), of exponents (9 %) and mantissas (6 %) if
    these leave the range or what must be 0, and of counts (48 %).

    Args:
      opt_state: the state of any composition of Optax transformations, or what holds one: a Flax
        `TrainState`, an `nnx.Optimizer`.
      like: the same as it starts, `tx.init(params)` or its `jax.eval_shape`. Without it, there is
        no telling which containers and shapes are right, but that the fields of one memory must
        agree, and that a clip is no dict, as a restore without a target makes of it.
      repair: whether to return the state, with every memory, clock and metrics that has a problem
        as it starts, and all else, the moments of the optimizer too, as it is. The moments of
        `scale_by_stable_adam`, of all leaves with their counts, are one memory. Without a concrete
        `like`, a memory starts from zeros, as all do but `threshold.quantile` with `initial`.

    Returns:
      A list of problems, empty if there are none: their `place`, what was `found`, and what is
      `allowed`. With `repair=True`, a state that has none.

    Raises:
      TypeError, ValueError: if an argument is not such, or there is no clip of this package in
        the state, or nothing but `like` can tell how to repair it, or not even that.

    Example:
      >>> import jax.numpy as jnp, optax, optaxclip
      >>> tx = optax.chain(optaxclip.clip_by_global_norm(1.0), optax.adam(0.1))
      >>> clip, adam = tx.init(jnp.zeros(3))
      >>> broken = clip._replace(metrics=clip.metrics._replace(steps=jnp.int32(-5)))
      >>> print(*optaxclip.validate_state((broken, adam)), sep="\n")
      0/metrics/steps: -5; allowed: finite int32 >= 0
      >>> optaxclip.validate_state(optaxclip.validate_state((broken, adam), repair=True))
      []
    """
    _check.choice((True, False), repair=repair)
    known = opt_state if like is None else like
    nodes, treedef = jax.tree.flatten_with_path(known, is_leaf=_is_clipper)
    if not any(_is_clipper(node) for _, node in nodes):
        raise ValueError(
            "no clip of optaxclip in this state: pass the optimizer state that holds it, "
            "or the TrainState or nnx.Optimizer (not its nnx.state)"
        )
    try:
        found = treedef.flatten_up_to(opt_state)
    except ValueError:
        if repair:
            message = "only clippers are repaired; outside of them, too, the state is not `like`"
            raise ValueError(message) from None
        return _differences(_Part("", opt_state, like))

    clippers = [i for i, (_, node) in enumerate(nodes) if _is_clipper(node)]
    parted = [
        _parts(_Part(named("", nodes[i][0]), found[i], None if like is None else nodes[i][1]))
        for i in clippers
    ]
    problems = _problems([part for parts, _ in parted for part in parts])
    if not repair:
        return [problem for each in problems for problem in each]
    each = iter(problems)
    for i, (parts, whole) in zip(clippers, parted, strict=True):
        found[i] = whole([_repaired(part, next(each)) for part in parts])
    return treedef.unflatten(found)


def _is_clipper(x: Any) -> bool:
    return isinstance(x, ClipState | SkipRecord | StableAdamState) or _was_clipper(x)


def _was_clipper(x: Any) -> bool:
    """Whether a restore without a target has made a dict of it."""
    if not isinstance(x, dict):
        return False
    if set(x) == set(StableAdamState._fields):  # parameters may have such names, too
        return _is_clipper(x["clip"])
    if set(x) != set(ClipState._fields):  # those of SkipRecord, too
        return False
    metrics = x["metrics"]
    fields = set(metrics) if isinstance(metrics, dict) else set()
    known = [set(Metrics._fields), set(SkipMetrics._fields)]
    return isinstance(metrics, Metrics | SkipMetrics | None) or fields in known


def _parts(clipper: _Part) -> tuple[list[_Part], Callable[[list[Tree]], Tree]]:
    """The parts of a clipper, and what joins them; one, if they are not told apart."""
    place, now, start = clipper
    as_one = [clipper], lambda parts: parts[0]
    known = now if start is None else start
    if _was_clipper(now):
        return as_one
    if isinstance(now, StableAdamState) and isinstance(known, StableAdamState):
        begun = (None, None) if start is None else (Moments(*start[:3]), start.clip)
        moments = _Part(place, Moments(*now[:3]), begun[0])
        others, whole = _parts(_Part(joined(place, "clip"), now.clip, begun[1]))
        return [moments, *others], lambda parts: StableAdamState(
            parts[0].mu, parts[0].nu, parts[0].seen, whole(parts[1:])
        )
    nodes, treedef = jax.tree.flatten_with_path(known, is_leaf=is_part)
    try:
        found = treedef.flatten_up_to(now)
    except ValueError:
        return as_one
    starts = [None if start is None else node for _, node in nodes]
    places = [named(place, path) for path, _ in nodes]
    return list(map(_Part, places, found, starts)), treedef.unflatten


def _problems(parts: list[_Part]) -> list[list[Problem]]:
    """Those of every part: of its arrays, or if these are as they should be, of the numbers."""
    misfits = [_misfits(part) for part in parts]
    pairs = zip(parts, misfits, strict=True)
    verdicts = [None if wrong else _judged(plain(part.now)) for part, wrong in pairs]

    def of(part: _Part, verdict: Any) -> list[Problem]:
        wrong = [
            Problem(joined(part.place, place), "nan" if nan else f"{x:.6g}", allowed)
            for (place, allowed), (wrong, nan, x) in verdict[0].items()
            if wrong
        ]
        return wrong or [
            Problem(joined(part.place, place), "a contradiction", law)
            for (place, law), holds in verdict[1].items()
            if not holds
        ]

    triples = zip(parts, misfits, verdicts, strict=True)
    return [wrong or of(part, verdict) for part, wrong, verdict in triples]


def _judged(part: Tree) -> tuple[dict[Any, Any], dict[Any, Any]]:
    """By place and range: whether some number is not in it, and which; by place and law: if so."""
    # A program per range, not one for all: that would be compiled anew for every model. Each is
    # waited for: many at once over the devices of one CPU wait for each other's threads, and die.
    ranges = {
        (f.place, str(f.allowed)): jax.device_get(_outside(f.allowed, f.x))
        for f in fields("", part)
    }
    return ranges, jax.device_get(_lawful(part)) if any(tied("", part)) else {}


@functools.partial(jax.jit, static_argnums=0)
def _outside(allowed: Range, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    wrong = ~allowed.holds(x)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        x = jnp.abs(x) if jnp.iscomplexobj(x) else x.astype(jnp.int32)
    nan = jnp.isnan(x)  # which the maximum of several devices may lose
    most = jnp.where(wrong & ~nan, x, -(2**31)).max(initial=-(2**31))
    return wrong.any(), (wrong & nan).any(), most


@jax.jit
def _lawful(part: Tree) -> dict[Any, jax.Array]:
    laws = [(place, node.laws()) for place, node in tied("", part)]
    return {(place, law): jnp.all(holds[law]) for place, holds in laws for law in holds}


def _misfits(part: _Part) -> list[Problem]:
    """What is wrong with containers, dtypes and shapes, which is known without the numbers."""
    place, now, start = part
    if start is not None and jax.tree.structure(now) != jax.tree.structure(start):
        return _differences(part)
    if _was_clipper(now):
        return [Problem(place, "a dict", "what a restore with tx.init(params) as its target gives")]
    held = list(fields(place, plain(now)))
    if start is not None:
        pairs = zip(held, jax.tree.leaves(start), strict=True)
        return [Problem(f.place, _kind(f.x), _kind(s)) for f, s in pairs if _kind(f.x) != _kind(s)]
    wrong = [Problem(f.place, _kind(f.x), str(f.allowed)) for f in held if not _is_typed(f)]
    return wrong or _unlike(place, held)


def _is_typed(field: Field) -> bool:
    x, allowed = field.x, field.allowed
    listed = isinstance(allowed, Range) and _kind(x).split()[0] in allowed.dtypes
    return listed and x.dtype == jax.dtypes.canonicalize_dtype(x.dtype)  # as JAX would have it


def _unlike(place: str, held: list[Field]) -> list[Problem]:
    """Whether the arrays of a memory have one shape, but for an axis of the latest norms."""
    plain, longer = ({f.x.shape for f in held if f.allowed.front == n} for n in (0, 1))
    shorter = [{x[:i] + x[i + 1 :] for i in range(len(x))} for x in longer]
    if len(plain) <= 1 and all(plain <= shapes for shapes in shorter):
        return []
    found = ", ".join(f"{f.place.removeprefix(f'{place}/')} {f.x.shape}" for f in held)
    return [Problem(place, found, "one shape, with one more axis for the latest norms")]


def _kind(x: Any) -> str:
    """Dtype and shape, or what it is if it is no array."""
    weak = "weak " if getattr(x, "weak_type", False) else ""
    return f"{weak}{x.dtype} {x.shape}" if hasattr(x, "dtype") else type(x).__name__


def _differences(part: _Part) -> list[Problem]:
    """Which leaves are in one structure alone."""
    place, now, start = part
    paths = [jax.tree.leaves_with_path(tree) for tree in (now, start)]
    ours, due = ({named(place, path): _kind(x) for path, x in leaves} for leaves in paths)
    lost = [Problem(name, "nothing", due[name]) for name in due if name not in ours]
    more = [Problem(name, ours[name], "nothing") for name in ours if name not in due]
    other = Problem(place, "containers of other types", "what tx.init(params) gives")
    return [*lost, *more] or [other]


def _repaired(part: _Part, problems: list[Problem]) -> Tree:
    """The part as it starts, if it has a problem, but for the clocks in it that have none."""
    place, now, start = part
    if not problems:
        return now
    lost = start is not None and jax.tree.structure(now) != jax.tree.structure(start)
    leaves, treedef = jax.tree.flatten(start if lost else now)
    held = list(fields(place, plain(start if lost else now)))
    starts = [None] * len(leaves) if start is None else jax.tree.leaves(start)
    wrong = {problem.place for problem in problems}
    if len(held) == len(leaves) and not _was_clipper(now if start is None else start):
        keeps = lambda field: field.owner is Clock and field.place not in wrong and not lost
        triples = zip(held, leaves, starts, strict=True)
        new = treedef.unflatten([x if keeps(f) else _begun(f, x, s) for f, x, s in triples])
        if not any(_problems([part._replace(now=new)])):
            return new
    raise ValueError(f"to repair this, pass like=tx.init(params): {problems[0]}")


def _begun(field: Field, x: Any, start: Any) -> Any:
    """An array as it starts, which is what `like` has, if it is no jax.ShapeDtypeStruct."""
    allowed = field.allowed
    if start is not None and not isinstance(start, jax.ShapeDtypeStruct):
        return start
    if allowed is ANYTHING or not isinstance(allowed, Range):
        raise ValueError(f"to repair {field.place}, pass like=tx.init(params): it says no start")
    model = x if start is None else start
    dtype = str(getattr(model, "dtype", None))
    dtype = dtype if dtype in allowed.dtypes else allowed.dtypes[0]
    if jnp.shape(x) == jnp.shape(model) and isinstance(x, jax.Array):
        return jnp.full_like(x, allowed.start, dtype)  # where it is
    sharding = getattr(model, "sharding", None)
    return jnp.full(jnp.shape(model), allowed.start, dtype, device=sharding)
