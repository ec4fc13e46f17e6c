"""transformation -> stages: what it is made of, in which order, read and not run.

Optax makes transformations of functions that close over their parts. What is read of a function is
its name, the name of the function that made it, and what it closes over.

What neither Optax nor this package has made is a closed box: the transformations that its update
function closes over are found, and nothing is known of how they follow each other.
"""

from __future__ import annotations

import contextlib
import inspect
import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import optax

from .scale import rescale, rsqrt, skip, softsign, strict, tanh
from .threshold import Threshold

CLIPS = {
    # What the groups of Optax's are called in this package.
    "optax.clip": "element",
    "optax.clip_by_global_norm": "global_norm",
    "optax.clip_by_block_rms": "leaf_rms",
    "optax.adaptive_grad_clip": "relative",
    "optaxclip.clip": "",  # which says it itself
    "optaxclip.adagc": "leaf_norm",
    "optaxclip.clip_by_spectral_norm": "spectral_norm",
}
LIMITS = ("max_norm", "max_delta", "threshold", "clipping")  # as the arguments of Optax's are named
# All that is called scale_by_..., and besides:
OPTIMIZERS = {
    "trace", "ema", "normalize_by_update_norm", "normalize", "momo", "momo_adam", "prodigy",
    "dadapt_adamw",
}  # fmt: skip
# Called scale_by_..., but what comes out is as large as what goes in.
KEEP_SIZE = {
    "scale_by_schedule", "scale_by_optimistic_gradient", "scale_by_backtracking_linesearch",
    "scale_by_zoom_linesearch", "scale_by_param_block_norm", "scale_by_param_block_rms",
}  # fmt: skip
HARD, SOFT = (rescale, strict, skip), (softsign, rsqrt, tanh)  # scales that make clips
SEQUENCES = {"optax.chain", "optax.named_chain"}
WATCHERS = {"optax.monitor"}  # what its parts do, the gradients do not go through


@dataclass(frozen=True, eq=False)  # two stages that look alike are two nonetheless
class Stage:
    """A transformation at its place in the composition."""

    place: str  # in chains and partitions: "1", "0/1", "encoder/0"; "" if it is all
    name: str  # what made it: "optax.scale_by_adam"
    update: Any  # the function that is read
    held: Mapping[str, Any]  # what this closes over
    before: tuple[Stage, ...]  # what its gradients have been through, each without parts
    around: tuple[Stage, ...]  # what it is a part of, from the outside in

    def __str__(self) -> str:
        """As in "optax.scale_by_adam (0/1)"."""
        return f"{self.title} ({self.place})" if self.place else self.title

    @property
    def title(self) -> str:
        """What it is, without its place."""
        if self.name != "optaxclip.clip":
            return self.name
        return f"the {'clip' if self.shrinks else 'scaling'} by {self.measure}"

    @property
    def is_clip(self) -> bool:
        return self.name in CLIPS

    @property
    def is_optimizer(self) -> bool:
        """Whether what comes out says little about the size of this gradient."""
        library, _, maker = self.name.partition(".")
        scales = maker.startswith("scale_by_") and maker not in KEEP_SIZE
        return library in {"optax", "optaxclip"} and (scales or maker in OPTIMIZERS)

    @property
    def is_learning_rate(self) -> bool:
        """Whether it makes a step of a direction, which in Optax turns the sign."""
        step_size = self.held.get("step_size")
        if self.name == "optax.scale_by_schedule":
            with contextlib.suppress(Exception):  # a schedule of the user's may want anything
                step_size = self.held["step_size_fn"](1)
        is_scale = self.name in {"optax.scale", "optax.scale_by_schedule"}
        number = _number(step_size) if is_scale else None
        # -0.0 is that of a warm-up, and -1.0 leaves norms as they are.
        return number is not None and math.copysign(1, number) < 0 and number != -1

    @property
    def measure(self) -> str:
        """What a clip measures, by the name of what made the measure."""
        if self.name != "optaxclip.clip":
            return CLIPS.get(self.name, "")
        norms = self.held["measure"].norms
        if _maker(norms) == "_per_entry":
            return "leaf_mean" if _held(norms).get("power") == 1 else "leaf_rms"
        return _maker(norms)

    @property
    def ord(self) -> Any:
        """The order of a clip's norm."""
        if self.name == "optaxclip.clip":
            return _held(self.held["measure"].norms).get("ord", 2)
        return 2

    @property
    def limit(self) -> float | None:
        """The limit of a clip, if it is one number for ever."""
        if any(outer.name == "optax.inject_hyperparams" for outer in self.around):
            return None
        if self.name == "optaxclip.clip":
            update = self.held["threshold"].update
            return _number(_held(update).get("limit")) if _maker(update) == "constant" else None
        return next((_number(self.held[key]) for key in LIMITS if key in self.held), None)

    @property
    def nonfinite(self) -> str | None:
        """What a clip does with norms that are not finite, if that can be read."""
        return "propagate" if self.name.startswith("optax.") else self.held.get("nonfinite")

    @property
    def grows(self) -> bool:
        """Whether the limit of a clip is a little more than the last norm."""
        return self.name == "optaxclip.clip" and "growth" in _makers(self.held["threshold"].update)

    @property
    def is_hard(self) -> bool:
        """Whether a clip leaves a norm up to its limit alone."""
        return any(self.held.get("scale", rescale) is scale for scale in HARD)

    @property
    def shrinks(self) -> bool:
        """Whether a clip makes norms smaller, as normalisers do not."""
        return self.is_hard or any(self.held["scale"] is scale for scale in SOFT)


def stages(tx: Any) -> list[Stage]:
    """Every stage of a transformation, each in front of its parts."""
    return list(_stages(tx, "", (), ()))


def _stages(
    tx: Any, place: str, before: tuple[Stage, ...], around: tuple[Stage, ...]
) -> Iterator[Stage]:
    update = inspect.unwrap(getattr(tx, "update", tx))
    name, held = _name(update), _held(update)
    if name == "optax.with_extra_args_support" and "tx" in held:
        yield from _stages(held["tx"], place, before, around)
        return
    if name == "optax.inject_hyperparams":
        held |= {"inner": _injected(tx, held)}
    if name == "optaxclip.clip":
        held = _held(inspect.unwrap(held["step"]))
    stage = Stage(place, name, update, held, before, around)
    yield stage
    if stage.is_clip or name in WATCHERS or any(update == outer.update for outer in around):
        return
    for key, part in _parts(tx, name, held):
        within = f"{place}/{key}".strip("/")
        found = list(_stages(part, within, before, (*around, stage)))
        yield from found
        if name in SEQUENCES:
            before += tuple(x for x in found if not any(x in other.around for other in found))


def _parts(tx: Any, name: str, held: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The transformations that one is made of, and what tells them apart."""
    if name == "optax.chain" and "update_fns" in held:
        # A function around `init`, such as jit's, may hide those of the parts.
        inits = _held(inspect.unwrap(tx.init)).get("init_fns", ())
        pairs = itertools.zip_longest(inits, held["update_fns"])
        yield from ((str(i), optax.GradientTransformation(*pair)) for i, pair in enumerate(pairs))
    elif name == "optax.named_chain" and "transforms" in held:
        yield from held["transforms"]
    else:
        yield from _transformations(list(held.values()))


def _transformations(value: Any, within: tuple[Any, ...] = ()) -> Iterator[tuple[str, Any]]:
    """Those in lists and dicts, with the keys of the dicts."""
    if isinstance(value, optax.GradientTransformation | optax.MultiSteps):
        yield "", value
        return
    if not isinstance(value, dict | list | tuple) or any(value is outer for outer in within):
        return
    pairs = value.items() if isinstance(value, dict) else (("", part) for part in value)
    for key, part in pairs:
        found = _transformations(part, (*within, value))
        yield from ((f"{key}/{rest}".strip("/"), tx) for rest, tx in found)


def _injected(tx: Any, held: Mapping[str, Any]) -> Any:
    """What optax.inject_hyperparams makes at each step, as it is at the first one."""
    scheduled = {key: f.schedule_fn for key, f in held.get("sched_hps", {}).items()}
    # A factory of the user's may do, and refuse, anything.
    with contextlib.suppress(Exception):
        values = {key: schedule(0) for key, schedule in scheduled.items()}
        numbers = _held(inspect.unwrap(tx.init)).get("numeric_hps", {})
        return held["inner_factory"](**held.get("other_hps", {}), **numbers, **values)
    return None


def _name(function: Any) -> str:
    """The library, and the outermost function or class there that a function is from."""
    library = str(getattr(function, "__module__", "")).partition(".")[0]
    return f"{library}.{_maker(function)}"


def _maker(function: Any) -> str:
    return getattr(function, "__qualname__", type(function).__qualname__).partition(".")[0]


def _held(function: Any) -> dict[str, Any]:
    """What a function closes over, or the object has that a method is of, by name."""
    owner = getattr(function, "__self__", None)
    if hasattr(owner, "__dict__"):  # as an optax.MultiSteps
        return dict(vars(owner))
    names = getattr(getattr(function, "__code__", None), "co_freevars", ())
    held = {}
    for name, cell in zip(names, getattr(function, "__closure__", None) or (), strict=True):
        with contextlib.suppress(ValueError):  # a cell may be empty
            held[name] = cell.cell_contents
    return held


def _makers(function: Any) -> set[str]:
    """What made a threshold's update, and those of the thresholds that it closes over."""
    inner = [x.update for x in _held(function).values() if isinstance(x, Threshold)]
    return {_maker(function)}.union(*map(_makers, inner))


def _number(value: Any) -> float | None:
    """A number, if it is one whose value is known here."""
    if isinstance(value, jax.core.Tracer):
        return None
    with contextlib.suppress(TypeError, ValueError, RuntimeError):
        return float(value)
    return None
