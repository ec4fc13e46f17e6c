"""norms of a run --> their level: whether it moves, and what it will be. All are logarithms."""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np

BLOCKS = 20  # parts of a run that are compared
LATER = 10  # the advice for a run that drifts is for a further tenth of its length
MOMENTS = 20  # of that tenth, in which the level is another one
STILL = np.zeros(1)  # a level that stays as it was, and is still in the residuals
NORMAL = 1.349  # quartiles of normal numbers are so many standard deviations apart
MEDIAN = 1.2533  # a median of normal numbers scatters so much more than a mean
DIVERGED = math.log(100)  # a rise that no training comes back from, if it lasts
NORMAL_LOGS = np.array([NormalDist().inv_cdf((i + 0.5) / 4000) for i in range(4000)])


def spread_of(logs: np.ndarray) -> float:
    """A standard deviation, of the middle half, so that no spike moves it."""
    low, high = np.quantile(logs, (0.25, 0.75))
    return float(high - low) / NORMAL


def _healthy(medians: np.ndarray) -> int:
    """How many parts there are before the run diverged; all if it did not."""
    for i in range(1, BLOCKS):
        # Norms may be tiny for the first steps.
        rise = DIVERGED if i >= BLOCKS // 4 else 2 * DIVERGED
        lowest = medians[i:].min()
        if lowest > max(np.median(medians[:i]) + rise, medians[i - 1] + 1):  # it is here it rises
            return i
    return BLOCKS


def levels_of(logs: np.ndarray) -> tuple[str, np.ndarray, np.ndarray]:
    """What the level does, "" if nothing; norms without their level; what it will be, in turn."""
    if logs.size < 2 * BLOCKS:
        return "", logs, STILL
    parts = np.array_split(logs, BLOCKS)
    medians = np.array([np.median(part) for part in parts])
    if (healthy := _healthy(medians)) < BLOCKS:
        # A median may not tell that the end of the part before is of what came.
        _, residuals, levels = levels_of(logs[: round(max(healthy - 1, 0.5) * len(parts[-1]))])
        return "diverged", residuals, levels
    if _switches(logs) > 2:  # a change for good may look like two
        return "two regimes", logs, STILL
    return _fitted(parts, medians)


def _fitted(parts: list[np.ndarray], medians: np.ndarray) -> tuple[str, np.ndarray, np.ndarray]:
    """The same by the simplest that fits the medians: a constant, a line, a step, or none."""
    logs, half = np.concatenate(parts), BLOCKS // 2
    spread = float(np.median([spread_of(part) for part in parts]))
    # How much the medians of one level would scatter, and what of it is too little to matter.
    noise = MEDIAN * spread * math.sqrt(_persistence(parts) / len(parts[-1]))
    allowed = max(0.25 * spread, 2 * noise)
    fits = lambda medians, levels: np.std(medians - levels) <= allowed
    (line, slope), *halves = map(_line, (medians, medians[:half], medians[half:]))
    # The slope of noise, over k parts, scatters by noise sqrt(12 / k^3).
    moves = abs(slope) * BLOCKS > max(0.25 * spread, 4 * noise * math.sqrt(12 / BLOCKS))
    bent = abs(halves[0][1] - halves[1][1]) > 3 * noise * math.sqrt(2 * 12 / half**3)
    if moves and not bent and fits(medians, line):
        return "drifting", *_continued(logs, line, slope)
    if not moves and fits(medians, np.median(medians)):
        return "", logs, STILL
    when, step = _step(medians)
    if fits(medians, step) and abs(step[0] - step[-1]) > spread:
        return "two regimes", _after(parts, when), STILL
    late = parts[half:]  # the norms may have scattered in another way before
    if fits(medians[half:], halves[1][0]):
        return "drifting", *_continued(np.concatenate(late), *halves[1])
    return "drifting", np.concatenate([part - np.median(part) for part in late]), medians[-1:]


def _continued(logs: np.ndarray, line: np.ndarray, slope: float) -> tuple[np.ndarray, np.ndarray]:
    """Norms without a line through the parts that they are; and that line, across what comes."""
    places = (np.arange(logs.size) + 0.5) * len(line) / logs.size - 0.5  # 0: in the first's middle
    ahead = (np.arange(MOMENTS) + 0.5) / MOMENTS * BLOCKS / LATER
    return logs - (line[0] + slope * places), line[-1] + slope * (0.5 + ahead)


def levels_of_recent(logs: np.ndarray, recent: np.ndarray) -> tuple[str, np.ndarray, np.ndarray]:
    """The same where all that is known of the order is which norms came last."""
    level, now = np.median(logs), np.median(recent) if recent.size else np.median(logs)
    if now - level > DIVERGED:
        return "diverged", logs[logs < (level + now) / 2], STILL
    if abs(now - level) <= 4 * MEDIAN * spread_of(logs) / math.sqrt(max(recent.size, 1)):
        return "", logs, STILL
    # The histogram holds both levels, and what is between them. A spread of 64 logarithms without
    # their outliers is off by a tenth, and a rate of 5 % then by 1.5 %.
    spread = np.std(np.clip(recent, now - 3 * spread_of(recent), now + 3 * spread_of(recent)))
    return "drifting", spread * NORMAL_LOGS, np.array([now])


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
    apart = high - low > 3 * max(spread_of(logs[upper]), spread_of(logs[~upper]))
    if not (apart and 0.15 < upper.mean() < 0.85):
        return 0
    # By the majority of a few, as single norms cross over by chance.
    few = [part.mean() > 0.5 for part in np.array_split(upper, min(10 * BLOCKS, upper.size))]
    return int(np.sum(np.diff(few)))
