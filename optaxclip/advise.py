"""norms --> limit: what a fixed limit should be, and whether one will do.

:func:`recommend_threshold` looks at the norms of a run, logged or kept by `observe_norms`, on the
host and afterwards.
"""

from __future__ import annotations

import math
from statistics import NormalDist
from typing import Any, NamedTuple

import jax
import numpy as np

from . import _check, observe
from .replaying import stream

Tree = Any

# Norms above the limit that an advice rests on. Their number in other norms of the same kind is off
# by half or double in one case of 400 (Poisson numbers: 20 in place of 10).
ABOVE = 20
BLOCKS = 20  # parts of a run that are compared
LATER = 10  # the advice for a run that drifts is for a further tenth of its length
RATES = np.geomspace(0.001, 0.5, 28)  # of the curve
NORMAL = 1.349  # quartiles of normal numbers are so many standard deviations apart
MEDIAN = 1.2533  # a median of normal numbers scatters so much more than a mean
DIVERGED = math.log(100)  # a rise that no training comes back from, if it lasts
NORMAL_LOGS = np.array([NormalDist().inv_cdf((i + 0.5) / 4000) for i in range(4000)])


class Curve(NamedTuple):
    """Which limit clips how often."""

    limits: np.ndarray  # (n,) float64, falling
    rates: np.ndarray  # (n,) float64, share of steps that each clips, rising


class Advice(NamedTuple):
    """What limit to take, and what to think of it."""

    limit: float  # the norm above which a share `clip_rate` of steps is
    curve: Curve  # the same for other rates, as far as there are norms enough
    kind: str  # steady, heavy-tailed, bursts, two regimes, drifting, diverged
    reason: str  # one or two sentences for people


REASONS = {
    "steady": "The norms keep their level and have no long tail: a fixed limit fits.",
    "heavy-tailed": "The norms keep their level, but some are many times as large: a fixed limit "
    "fits, and what it clips, it clips hard.",
    "bursts": "Large norms come in bursts, and between them the level is kept: a fixed limit fits; "
    "a percentile of a short window would rise in a burst.",
    "two regimes": "The norms have two levels: a fixed limit clips one of them nearly always or "
    "the other one never, so take a clipper that follows the norms, such as clip_by_percentile "
    "with a max_norm.",
    "drifting": "The level of the norms moves, so no fixed limit clips at this rate for long: take "
    "a clipper that follows the norms, such as clip_by_percentile with a max_norm. The limit is "
    "for the near future, a tenth as many steps as there were.",
    "diverged": "The norms rose more than a hundredfold and did not come back: the run diverged. "
    "The limit is that of the norms before, for a run that is clipped from its start.",
}


def recommend_threshold(norms: Any, *, clip_rate: float = 0.05) -> Advice:
    r"""Finds the limit that a given share of the coming steps will be above.

    tau = exp(level + q), q: the (1 - rate)-quantile of log ||G_t|| - level_t. The level is a
    constant, unless the medians of twenty parts of the run say otherwise: then it is a line, or
    one through the later half if that is bent, continued to the middle of a further tenth; or after
    a change for good, the later level. If the later one is more than a hundred times the earlier
    one, the run has diverged, and what counts are the norms before, however few.

    Later norms of the same kind are above it from half to twice as often as asked if 20 norms of
    the run are: that takes 20 / rate norms, 400 for one step in twenty, and fails in one run of
    200. Norms that depend on those before count for less: it takes 20 bursts above the limit, or 20
    changes between two levels, however many steps these last. Whether a level will move in another
    way than so far, no one can know.

    Args:
      norms: (n,) the norms of a run in their order, before clipping, or an optimizer state with
        `observe_norms` of one norm in it. A state does not know in which order the norms were, and
        so neither bursts nor regimes; it notices that the level has moved from the 64 latest norms.
        What is not finite or 0 is left out.
      clip_rate: share of the steps to be clipped, > 0 and <= 0.5.

    Returns:
      An :class:`Advice`.

    Raises:
      TypeError: if `norms` is neither, or `clip_rate` is no number.
      ValueError: if `clip_rate` is out of range, a norm is negative, there are fewer than
        20 / clip_rate norms, or a state keeps more than one norm.

    Example:
      >>> import numpy as np
      >>> norms = np.exp(0.3 * np.random.default_rng(0).normal(size=2000))
      >>> advice = recommend_threshold(norms, clip_rate=0.05)
      >>> print(f"{advice.limit:.2f}", advice.kind)
      1.62 steady
      >>> print(f"{np.mean(norms > advice.limit):.3f}")
      0.050
    """
    _check.within(0, 0.5, clip_rate=clip_rate)
    if clip_rate == 0:
        raise ValueError("clip_rate must be > 0: no limit is sure never to clip; got 0")
    rate = float(clip_rate)
    logs, recent = _logs(norms)
    fewest = math.ceil(ABOVE / rate)
    if logs.size < fewest:
        raise ValueError(
            f"a clip_rate of {rate:g} takes {fewest} norms that are finite and above 0, "
            f"{ABOVE} of them above the limit; got {logs.size}"
        )
    if recent is None:
        kind, residuals, level = _levels(logs)
        kind = kind or _shape(logs)
    else:
        kind, residuals, level = _levels_of_recent(logs, recent)
        kind = kind or _tail(logs)
    rates = RATES[RATES * logs.size >= min(ABOVE, rate * logs.size)]
    curve = Curve(np.exp(level + np.quantile(residuals, 1 - rates)), rates)
    return Advice(
        float(np.exp(level + np.quantile(residuals, 1 - rate))), curve, kind, REASONS[kind]
    )


def _logs(norms: Any) -> tuple[np.ndarray, np.ndarray | None]:
    """The logarithms of what counts; of a state, as its histogram has them, and the latest."""
    if not _holds_history(norms):
        return _log(stream(norms, ", or an optimizer state with observe_norms in it")), None
    found = observe.histories(norms)
    sizes = {place: history.largest.size for place, history in found.items()}
    if list(sizes.values()) != [1]:
        held = ", ".join(f"{n} at {place!r}" for place, n in sizes.items())
        raise ValueError(f"a state of norms must keep one, that of the tree; this one has {held}")
    (history,) = found.values()
    total = int(history.bins.sum(dtype=np.int64))
    percents = (np.arange(total) + 0.5) / max(total, 1) * 100
    bins, largest = history.bins.reshape(-1), history.largest.reshape(())
    values = observe.percentiles(bins, largest, percents)
    return _log(values), _log(history.recent.reshape(-1).astype(np.float64))


def _holds_history(tree: Tree) -> bool:
    is_history = lambda x: isinstance(x, observe.NormHistory)
    return any(map(is_history, jax.tree.leaves(tree, is_leaf=is_history)))


def _log(norms: np.ndarray) -> np.ndarray:
    return np.log(norms[np.isfinite(norms) & (norms > 0)])


def _spread(logs: np.ndarray) -> float:
    """A standard deviation, of the middle half, so that no spike moves it."""
    low, high = np.quantile(logs, (0.25, 0.75))
    return float(high - low) / NORMAL


def _healthy(parts: list[np.ndarray], medians: np.ndarray) -> int:
    """How many parts there are before the run diverged; all if it did not."""
    for i in range(BLOCKS // 4, BLOCKS):
        if medians[i:].min() > np.median(medians[:i]) + DIVERGED:
            return i
    return len(parts)


def _levels(logs: np.ndarray) -> tuple[str, np.ndarray, float]:
    """What the level does, "" if nothing; what is left of the norms without it; what it will be."""
    parts = np.array_split(logs, BLOCKS)
    medians = np.array([np.median(part) for part in parts])
    if (healthy := _healthy(parts, medians)) < len(parts):
        # A median may not tell that the end of the part before is of what came.
        _, residuals, level = _levels(np.concatenate(parts[: healthy - 1]))
        return "diverged", residuals, level
    spread = float(np.median([_spread(part) for part in parts]))
    # How much the medians of one level would scatter, and what of it is too little to matter.
    noise = MEDIAN * spread * math.sqrt(_persistence(parts) / len(parts[-1]))
    allowed = max(0.25 * spread, 2 * noise)
    fits = lambda medians, levels: np.std(medians - levels) <= allowed
    if _switches(logs) > 2:  # a change for good may look like two
        return "two regimes", logs, 0.0
    half = BLOCKS // 2
    (line, slope), *halves = map(_line, (medians, medians[:half], medians[half:]))
    # The slope of noise, over k parts, scatters by noise sqrt(12 / k^3).
    moves = abs(slope) * BLOCKS > max(0.25 * spread, 4 * noise * math.sqrt(12 / BLOCKS))
    bent = abs(halves[0][1] - halves[1][1]) > 3 * noise * math.sqrt(2 * 12 / half**3)
    places = (np.arange(logs.size) + 0.5) / logs.size * BLOCKS - 0.5
    if moves and not bent and fits(medians, line):
        return "drifting", logs - np.interp(places, np.arange(BLOCKS), line), _ahead(medians)
    if not moves and fits(medians, np.median(medians)):
        return "", logs, 0.0
    when, step = _step(medians)
    if fits(medians, step) and abs(step[0] - step[-1]) > spread:
        return "two regimes", _after(parts, when), 0.0
    smooth = fits(medians[half:], halves[1][0])
    ahead = _ahead(medians[half:]) if smooth else float(medians[-1])
    return "drifting", logs - np.interp(places, np.arange(BLOCKS), medians), ahead


def _levels_of_recent(logs: np.ndarray, recent: np.ndarray) -> tuple[str, np.ndarray, float]:
    """The same where all that is known of the order is which norms came last."""
    level, now = np.median(logs), np.median(recent) if recent.size else np.median(logs)
    if now - level > DIVERGED:
        return "diverged", logs[logs < (level + now) / 2], 0.0
    if abs(now - level) <= 4 * MEDIAN * _spread(logs) / math.sqrt(max(recent.size, 1)):
        return "", logs, 0.0
    # The histogram holds both levels, and what is between them. A spread of 64 logarithms without
    # their outliers is off by a tenth, and a rate of 5 % then by 1.5 %.
    spread = np.std(np.clip(recent, now - 3 * _spread(recent), now + 3 * _spread(recent)))
    return "drifting", spread * NORMAL_LOGS, float(now)


def _persistence(parts: list[np.ndarray]) -> float:
    """How many norms are worth one that depends on no other: (1 + rho) / (1 - rho)."""
    signs = [np.sign(part - np.median(part)) for part in parts]
    alike = np.mean([np.mean(s[1:] * s[:-1]) for s in signs])
    # Of normal numbers, signs correlate by 2 / pi arcsin(rho), and no spike is felt in them.
    rho = math.sin(math.pi / 2 * float(np.clip(alike, 0, 0.95)))
    return (1 + rho) / (1 - rho)


def _line(medians: np.ndarray) -> tuple[np.ndarray, float]:
    """The line of Theil and Sen: the median of the slopes between all pairs."""
    first, second = np.triu_indices(len(medians), 1)
    slope = float(np.median((medians[second] - medians[first]) / (second - first)))
    rise = slope * np.arange(len(medians))
    return np.median(medians - rise) + rise, slope


def _ahead(medians: np.ndarray) -> float:
    """The level in the middle of a further tenth of the run."""
    line, slope = _line(medians)
    return float(line[-1] + slope * (0.5 + BLOCKS / LATER / 2))


def _after(parts: list[np.ndarray], when: int) -> np.ndarray:
    """The norms of the level after a change in one part, and those before it moved there."""
    # A median may not tell that a few norms of its part are of the other level.
    late = np.concatenate(parts[min(when + 2, BLOCKS - 1) :])
    if when < 2:
        return late
    early = np.concatenate(parts[: when - 1])
    return np.concatenate([early - np.median(early) + np.median(late), late])


def _step(medians: np.ndarray) -> tuple[int, np.ndarray]:
    """The part in which one level gives way to another, and the levels."""
    index = np.arange(len(medians))
    tried = [
        np.select([index < i, index > i], [medians[:i].mean(), medians[i + 1 :].mean()], medians)
        for i in index[1:-1]
    ]
    best = int(np.argmin([np.square(medians - levels).sum() for levels in tried]))
    return best + 1, tried[best]


def _switches(logs: np.ndarray) -> int:
    """How often two levels change places, each with a good share of the norms; 0 if not two."""
    low, high = np.quantile(logs, (0.1, 0.9))
    if low == high:
        return 0
    for _ in range(20):
        upper = logs > (low + high) / 2
        low, high = np.median(logs[~upper]), np.median(logs[upper])
    apart = high - low > 3 * max(_spread(logs[upper]), _spread(logs[~upper]))
    if not (apart and 0.15 < upper.mean() < 0.85):
        return 0
    # By the majority of a few, as single norms cross over by chance.
    few = [part.mean() > 0.5 for part in np.array_split(upper, min(10 * BLOCKS, upper.size))]
    return int(np.sum(np.diff(few)))


def _shape(logs: np.ndarray) -> str:
    """What norms of one level are like."""
    large = logs > np.median(logs) + 4 * _spread(logs)
    # In no order, a large norm would be as often behind another one as elsewhere.
    again = np.mean(large[1:][large[:-1]]) if large[:-1].sum() >= ABOVE else 0.0
    return "bursts" if again > 0.3 + large.mean() else _tail(logs)


def _tail(logs: np.ndarray) -> str:
    """By Hill's index of the upper twentieth: below 4, the norms have no fourth moment."""
    limit = np.quantile(logs, 0.95)
    above = logs[logs > limit] - limit
    return "heavy-tailed" if above.size and above.mean() > 1 / 4 else "steady"
