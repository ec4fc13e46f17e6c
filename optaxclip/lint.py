"""transformation -> findings: what is composed in an order that does not do what it looks like.

    tx --closures--> stages, with those before and around each --rules--> findings

A chain tells nobody that a clip in it comes too late. Order, nesting and limits are read here from
how the transformation was made, not guessed from what it does. Nothing runs but schedules, and what
`optax.inject_hyperparams` was given to make a transformation with.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from ._check import _refuse
from ._stages import SEQUENCES, Stage, stages

# A limit of norms of the one is a limit of those of the next ones, too.
COARSE_TO_FINE = ("global_norm", "leaf_norm", "element")
# What Adafactor and Clippy measure of updates.
OF_UPDATES = {"leaf_rms", "relative_entries"}
SKIPPERS = {"optaxclip.skip_step", "optax.apply_if_finite"}


class Finding(NamedTuple):
    """One thing in a transformation that does not do what it looks like."""

    where: str  # the place in chains and partitions: "1", "0/1", "encoder/0"; "" if it is all
    what: str  # what is there
    why: str  # what comes of it
    mend: str  # what to do

    def __str__(self) -> str:
        """In one sentence."""
        sentence = f"{self.what}, {self.why}: {self.mend}"
        return f"{self.where}: {sentence}" if self.where else sentence


def diagnose(tx: Any) -> list[Finding]:
    r"""Finds clips in a transformation that do not do what they look like.

    These are gradient clips behind an optimizer, a learning rate or weight decay; clips of updates
    in front of an optimizer; a global norm in several parts of an `optax.partition`, in an
    `optax.masked`, or of what is frozen behind it; a clip in front of `optax.MultiSteps` or
    `optax.apply_every`; limits that never bind; a `skip_step` or
    `optax.apply_if_finite` that is not around the chain; and `optax.zero_nans` behind a clip.
    Clips are those of this package and of Optax.

    It reads how Optax and this package made the transformation, and runs nothing but schedules and
    the factories in `optax.inject_hyperparams`. So it does not see what a function does that is
    neither's, nor gradients: a limit that is merely too high has
    no finding. Whether a finding is a fault is yours to say; a clip of the momentum, for one, may
    be meant.

    Args:
      tx: any transformation, or what holds one: an `optax.MultiSteps`, a Flax `TrainState`, an
        `nnx.Optimizer`.

    Returns:
      The findings in the order of the chain, empty if there are none. Each prints as one sentence.

    Raises:
      TypeError: if `tx` is not such.

    Example:
      >>> import optax, optaxclip
      >>> clip, adam = optaxclip.clip_by_global_norm(1.0), optax.adam(1e-3)
      >>> print(*optaxclip.diagnose(optax.chain(adam, clip)), sep="\n")
      1: the clip by global_norm comes after optax.scale_by_adam (0/0), which has divided the size
      of the gradients out: put the clip in front of it
      >>> optaxclip.diagnose(optax.chain(clip, adam))
      []
    """
    held = getattr(tx, "tx", tx)
    if not (hasattr(held, "init") and hasattr(held, "update")):
        allowed = "a transformation such as optax.adamw(1e-3), or a TrainState or nnx.Optimizer"
        _refuse(TypeError, "tx", tx, allowed)
    every = stages(held)
    return [finding for stage in every for rule in RULES for finding in rule(stage, every)]


def _late(clip: Stage, every: Sequence[Stage]) -> Iterator[Finding]:
    """A clip of gradients that come changed."""
    if not (clip.is_clip and clip.shrinks) or clip.grows or clip.measure in OF_UPDATES:
        return
    optimizer = next((x for x in clip.before if x.is_optimizer), None)
    rate = next((x for x in clip.before if x.is_learning_rate), None)
    decay = next((x for x in clip.before if x.name == "optax.add_decayed_weights"), None)
    mend = "put the clip in front of it"
    if optimizer:
        adds = optimizer.name in {"optax.trace", "optax.ema"}
        why = "adds past gradients" if adds else "has divided the size of the gradients out"
        yield _finding(clip, f"comes after {optimizer}", f"which {why}", mend)
    elif rate:
        why = "so its limit is one of steps and not of gradients"
        yield _finding(clip, f"comes after the learning rate, {rate}", why, mend)
    elif decay:
        why = "so its norm is that of the gradients with the decayed weights added"
        yield _finding(clip, f"comes after {decay}", why, mend)


def _early(clip: Stage, every: Sequence[Stage]) -> Iterator[Finding]:
    """A clip of updates that sees gradients."""
    if not (clip.grows or clip.measure == "relative_entries"):
        return
    after = [x for x in every if clip in x.before]
    optimizer = next((x for x in after if x.is_optimizer), None)
    rate = next((x for x in after if x.is_learning_rate), None)
    if clip.grows and optimizer and not any(x.is_optimizer for x in clip.before):
        why = "and clips most of the noise of raw gradients, which is growth"
        yield _finding(clip, f"comes before {optimizer}", why, "put the clip behind it")
    elif not clip.grows and (optimizer or rate):
        why = "so what it limits relative to the parameters is not their change"
        yield _finding(clip, f"comes before {optimizer or rate}", why, "put the clip last")


def _apart(stage: Stage, every: Sequence[Stage]) -> Iterator[Finding]:
    """A global norm that is one of a part."""
    inside = [x for x in every if stage in x.around and _is_global(x)]
    if stage.name == "optax.partition":
        parts = [x for x in every if x.around[-1:] == (stage,)]
        clipped = [x for x in parts if any(x is y or x in y.around for y in inside)]
        if len(clipped) > 1:
            labels = ", ".join(x.place.removeprefix(stage.place).strip("/") for x in clipped)
            what = f"has clips by a global norm in {len(clipped)} parts ({labels})"
            once = "once, in front, and in an optax.masked without what is frozen"
            mend = f"clip {once if any(map(_freezes, every)) else 'once, in front'}"
            mend += ", or say that it is meant with measure.by_label"
            yield _finding(stage, what, "each of which has a norm of its own", mend)
    elif stage.name == "optax.masked" and not any(map(_freezes, every)):
        for clip in inside:
            why = "so what the mask leaves out is not in the norm, and passes unclipped"
            mend = "clip outside of the mask, unless all else is frozen"
            yield _finding(clip, f"is inside of {stage}", why, mend)


def _frozen(clip: Stage, every: Sequence[Stage]) -> Iterator[Finding]:
    """A global norm of parameters that are frozen behind it, too."""
    if not _is_global(clip) or any(x.name == "optax.masked" for x in clip.around):
        return
    frozen = (x for x in every if _freezes(x) and clip in x.before and _is_in_part(x, clip))
    if zero := next(frozen, None):
        why = "so the gradients of what is frozen are in its norm"
        mend = "put the clip into an optax.masked that leaves these out"
        yield _finding(clip, f"comes before {zero}", why, mend)


def _is_in_part(x: Stage, clip: Stage) -> bool:
    """Whether something is given a part of what a clip is given."""
    own = set(x.around).difference(clip.around)
    return any(outer.name in {"optax.partition", "optax.masked"} for outer in own)


def _each_microbatch(clip: Stage, every: Sequence[Stage]) -> Iterator[Finding]:
    """A clip in front of MultiSteps. Inside of it is right: there it is given the mean."""
    after = [outer for x in every if clip in x.before for outer in (*x.around, x)]
    why = "so it clips each microbatch and not their mean"
    steps = next((x for x in after if x.name == "optax.MultiSteps"), None)
    if clip.is_clip and steps and steps not in clip.around:
        yield _finding(clip, f"comes before {steps}", why, "put the clip inside")
    steps = next((x for x in after if x.name == "optax.apply_every"), None)
    if clip.is_clip and steps:
        mend = "use optax.MultiSteps, with the clip inside"
        yield _finding(clip, f"comes before {steps}", why, mend)


def _idle(clip: Stage, every: Sequence[Stage]) -> Iterator[Finding]:
    """A clip that never clips."""
    if not clip.is_clip or clip.limit is None:
        return
    if clip.limit == math.inf:
        mend = "give it a limit, or use observe_norms to look only"
        yield _finding(clip, "has the limit inf", "so it never clips", mend)
        return
    for other in itertools.takewhile(lambda x: x.is_clip, reversed(clip.before)):
        if _bounds(other, clip):
            what = f"has the limit {clip.limit:g} behind {other} with {other.limit:g}"
            yield _finding(clip, what, "so it never clips", "leave one of them out")
            return


def _bounds(first: Stage, clip: Stage) -> bool:
    """Whether what comes out of the first clip is within the limit of the other one."""
    if first.limit is None or clip.limit is None or first.limit > clip.limit:
        return False
    if not (first.shrinks and clip.is_hard):
        return False
    if any(outer.name not in SEQUENCES and outer not in clip.around for outer in first.around):
        return False  # it may not be given all leaves, or all steps
    if first.measure == clip.measure:
        return first.measure in (*COARSE_TO_FINE, "leaf_rms", "leaf_mean") and first.ord == clip.ord
    if not {first.measure, clip.measure} <= set(COARSE_TO_FINE):
        return False
    finer = COARSE_TO_FINE.index(first.measure) < COARSE_TO_FINE.index(clip.measure)
    return finer and (clip.measure == "element" or first.ord == clip.ord)


def _within(skipper: Stage, every: Sequence[Stage]) -> Iterator[Finding]:
    """What leaves out bad steps, and is not around all that they would reach."""
    if skipper.name not in SKIPPERS:
        return
    mend = "put it around the whole chain"
    if clip := next((x for x in skipper.before if x.is_clip and _hides(x, skipper)), None):
        yield _finding(skipper, f"comes after {clip}", "which hides bad steps from it", mend)
    inside = [x for x in every if skipper in x.around]
    after = [x for x in every if skipper not in x.around and set(x.before) & set(inside)]
    if optimizer := next((x for x in after if x.is_optimizer), None):
        why = "which takes a step that was left out for one with a gradient of 0"
        yield _finding(skipper, f"comes before {optimizer}", why, mend)


def _hides(clip: Stage, skipper: Stage) -> bool:
    """Whether a clip lets no step through that is bad to what would leave it out."""
    return skipper.name == "optaxclip.skip_step" or clip.nonfinite in {"zero", "sanitize"}


def _spread(zero: Stage, every: Sequence[Stage]) -> Iterator[Finding]:
    """optax.zero_nans behind a clip that has made all of a group NaN."""
    if zero.name != "optax.zero_nans":
        return
    clip = next((x for x in zero.before if x.is_clip and x.measure != "element"), None)
    if clip and clip.nonfinite == "propagate":
        why = "which makes all that shares a norm with a NaN one"
        yield _finding(zero, f"comes after {clip}", why, "put it in front of the clip")
    elif clip and clip.nonfinite and _sees_all_of(clip, zero):
        yield _finding(zero, f"comes after {clip}", "which leaves no NaN", "leave it out")


def _sees_all_of(clip: Stage, zero: Stage) -> bool:
    """Whether a clip is right in front of what zeroes NaN, and of the same leaves."""
    return clip.around == zero.around and zero.before[-1] is clip


def _is_global(x: Stage) -> bool:
    return x.is_clip and x.shrinks and x.measure == "global_norm"


def _freezes(x: Stage) -> bool:
    return x.name == "optax.set_to_zero"


def _finding(stage: Stage, what: str, why: str, mend: str) -> Finding:
    return Finding(stage.place, f"{stage.title} {what}", why, mend)


RULES = (_late, _early, _apart, _frozen, _each_microbatch, _idle, _within, _spread)
