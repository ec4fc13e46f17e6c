"""norms --> limit: what a fixed limit should be, and whether one will do.

:func:`recommend_threshold` looks at the norms of a run, logged or kept by `observe_norms`, on the
host and afterwards.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from . import _check, observe
from ._level import LATER, levels_of, levels_of_recent, spread_of
from .replaying import stream

# Norms above the limit that an advice rests on. Their number in other norms of the same kind is off
# by half or double in one case of 400 (Poisson numbers: 20 in place of 10).
ABOVE = 20
RATES = np.geomspace(0.001, 0.5, 28)  # of the curve


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

    tau = exp(q), q: the (1 - rate)-quantile of log ||G_t|| - level_t + level_ahead. The level is a
    constant, unless the medians of twenty parts of the run say otherwise: then it is a line, or
    one through the later half if that is bent, continued across a further tenth; or after a change
    for good, the later level. If the later one is more than a hundred times the earlier one, the
    run has diverged, and what counts are the norms before, however few. In the first quarter it
    takes 10,000 times, as the norms of the first steps may be tiny.

    Later norms of the same kind are above it from half to twice as often as asked if 20 norms of
    the run are: that takes 20 / rate norms, 400 for one step in twenty, and fails in one run of
    200. Norms that depend on those before count for less: it takes 20 bursts above the limit, or 20
    changes between two levels, however many steps these last; where logarithms of norms correlate
    by 0.97 with the one before, 22 % of runs of 2000 norms got a limit outside of that.

    Whether a level will move in another way than so far, no one can know. Of 4000 norms that
    scatter by 5 % to 30 %, with a level that is flat at first and begins to rise in the last third,
    18 to 4 times the 5 % asked for were above the limit; of a staircase of three levels no farther
    apart than the norms scatter, 0.4 times as many. Of the first 150 norms of a small language
    model (tests/data/char_lm.csv, without clipping), asked for 13 %, it clips none of the next 15
    and 2 % of the next 100.

    Args:
      norms: (n,) the norms of a run in their order, before clipping, or an optimizer state with
        `observe_norms` of one norm in it. A state does not know in which order the norms were, and
        so neither bursts nor regimes; it notices that the level has moved from the 64 latest norms,
        and then the limit is that of these alone, taken for lognormal: one such limit in seven is
        outside of half to twice the rate. What is not finite or 0 is left out.
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
        kind, residuals, levels = levels_of(logs)
        kind = kind or _shape(logs)
    else:
        kind, residuals, levels = levels_of_recent(logs, recent)
        kind = kind or _tail(logs)
    size = min(residuals.size, logs.size)  # what the advice rests on
    rates = RATES[RATES * size >= min(ABOVE, rate * size)]
    ahead = np.add.outer(levels, residuals)  # the level moves while these norms come
    limit, *others = np.exp(np.quantile(ahead, 1 - np.array([rate, *rates]))).tolist()
    return Advice(limit, Curve(np.array(others), rates), kind, REASONS[kind])


def promise(advice: Advice, *, clip_rate: float, steps: int) -> str:
    """What a limit does, for people.

    Args:
      advice: by :func:`recommend_threshold`.
      clip_rate: the share that it was asked for.
      steps: how many norms it was made of.

    Returns:
      Half a sentence.

    Example:
      >>> import numpy as np
      >>> promise(recommend_threshold(np.ones(400)), clip_rate=0.05, steps=400)
      'clips 5 % of the coming steps'
    """
    of = {
        "drifting": f"the next {steps // LATER} steps",
        "diverged": "the steps before the run diverged",
    }
    return f"clips {100 * clip_rate:.3g} % of {of.get(advice.kind, 'the coming steps')}"


def _logs(norms: Any) -> tuple[np.ndarray, np.ndarray | None]:
    """The logarithms of what counts; of a state, as its histogram has them, and the latest."""
    if not observe.holds_history(norms):
        return _log(stream(norms, ", or an optimizer state with observe_norms in it")), None
    history = observe.only_history(norms)
    total = int(history.bins.sum(dtype=np.int64))
    percents = (np.arange(total) + 0.5) / max(total, 1) * 100
    values = observe.percentiles(history.bins, history.largest, percents)
    return _log(values), _log(history.recent.astype(np.float64))


def _log(norms: np.ndarray) -> np.ndarray:
    return np.log(norms[np.isfinite(norms) & (norms > 0)])


def _shape(logs: np.ndarray) -> str:
    """What norms of one level are like."""
    large = logs > np.median(logs) + 4 * spread_of(logs)
    # In no order, a large norm would be as often behind another one as elsewhere.
    again = np.mean(large[1:][large[:-1]]) if large[:-1].sum() >= ABOVE else 0.0
    return "bursts" if again > 0.3 + large.mean() else _tail(logs)


def _tail(logs: np.ndarray) -> str:
    """By Hill's index of the upper twentieth: below 4, the norms have no fourth moment."""
    limit = np.quantile(logs, 0.95)
    above = logs[logs > limit] - limit
    return "heavy-tailed" if above.size and above.mean() > 1 / 4 else "steady"
