"""The pictures, each one call."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from optaxclip import _check, observe
from optaxclip.advise import Advice, promise, recommend_threshold
from optaxclip.logs import Run, read_run

from . import parts

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DASHES = ("--", (0, (9, 1.5)), "-.", ":", (0, (5, 3)), (0, (1, 3)), (0, (8, 2, 1, 2, 1, 2)))
PERCENTILES = {50: ":", 90: "-.", 95: (0, (6, 2)), 99: "-"}  # and how their lines are dashed


def norms(
    log: Any,
    *,
    column: str | None = None,
    where: Mapping[str, Any] | None = None,
    path: parts.PathLike | None = None,
) -> Figure:
    """Draws the norm of every step and its limit, and the factor below.

    Steps that were clipped, were skipped or had no finite norm are marked. What the log does not
    have is left out.

    Args:
      log: of one run, a sequence of dicts as `optaxclip.metrics` gives one per step; a dict of
        columns; a sequence of norms; a path; see :func:`optaxclip.logs.read_run`.
      column: the one with the norms; limits, factors and so on are taken from the same place, as
        "0/limit" for "0/norm". None: see `read_run`.
      where: by column, the value that rows must have.
      path: of the picture, whose ending says what format it has. None: it is not written.

    Returns:
      A `matplotlib.figure.Figure`.

    Raises:
      ModuleNotFoundError: if Matplotlib is not installed.
      FileNotFoundError, TypeError, ValueError: as `read_run`.

    Example:
      >>> log = [{"norm": n, "limit": 1.0, "factor": min(1, 1 / n)} for n in (0.5, 2.0, 0.7)]
      >>> [axes.get_ylabel() for axes in norms(log).axes]
      ['gradient norm', 'factor']
    """
    run = _run(log, column, where)
    factor, limit = run.beside("factor"), run.beside("limit")
    figure = parts.figure(3.2 if factor is None else 4.4)
    heights = (3,) if factor is None else (3, 1)
    top, *below = figure.subplots(
        len(heights), sharex=True, squeeze=False, height_ratios=heights
    )[:, 0]  # fmt: skip
    parts.draw_norms(top, run, limit)
    if limit is not None and np.isfinite(limit).any():
        shown = np.where(np.isfinite(limit), limit, np.nan)
        top.plot(run.steps, shown, "--", color=parts.LIMIT, linewidth=1.5, label="limit")
    parts.draw_events(top, run)
    if factor is not None:
        (axes,) = below
        axes.axhline(1, color="0.85", linewidth=0.8, zorder=0)
        axes.plot(run.steps, factor, color=parts.NORM, linewidth=0.9)
        largest = np.max(factor[np.isfinite(factor)], initial=1.0)
        axes.set(ylabel="factor", ylim=(0, 1.1 * largest))
    figure.axes[-1].set_xlabel("step")
    top.set_title(parts.title(run), loc="left", fontsize=10)
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    return parts.written(figure, path)


def histogram(
    norms: Any,
    *,
    advice: Advice | None = None,
    path: parts.PathLike | None = None,
) -> Figure:
    """Draws how often there were norms of each size, with percentiles.

    Of norms, the last bar holds all above a hundred times the median too, and the first one all
    below a hundredth. The percentiles are of the norms as they are.

    Args:
      norms: (n,) norms, or what else :func:`optaxclip.logs.read_run` reads; or an optimizer state
        with `observe_norms` of one norm in it, whose bins are drawn as they are. What is not finite
        or 0 is left out.
      advice: by `recommend_threshold`, whose limit is drawn. None: none is.
      path: of the picture, whose ending says what format it has. None: it is not written.

    Returns:
      A `matplotlib.figure.Figure`.

    Raises:
      ModuleNotFoundError: if Matplotlib is not installed.
      FileNotFoundError, TypeError, ValueError: as `read_run`; or if a state keeps several norms.

    Example:
      >>> figure = histogram([0.5, 1.0, 1.0, 2.0])
      >>> [text.get_text() for text in figure.legends[0].get_texts()][0]
      'median 1'
    """
    edges, counts, values = _binned(norms)
    figure = parts.figure(3.4)
    axes = figure.subplots()
    axes.stairs(counts, edges, fill=True, color="0.8")
    axes.stairs(counts, edges, color="0.5", linewidth=0.8)
    parts.log_axis(axes, "x", edges[0], edges[-1])
    for (percent, dashes), value in zip(PERCENTILES.items(), values, strict=True):
        name = "median" if percent == 50 else f"{percent}th percentile"
        label = f"{name} {value:.3g}"
        axes.axvline(value, color="black", linestyle=dashes, linewidth=1.2, label=label)
    if advice is not None:
        _check.instance(Advice, "recommend_threshold(norms)", advice=advice)
        label = f"advised limit {advice.limit:.3g}"
        axes.axvline(advice.limit, color=parts.LIMIT, linewidth=3, alpha=0.8, label=label)
    axes.set(xlabel="gradient norm", ylabel="steps")
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    return parts.written(figure, path)


def recommendation(
    log: Any,
    *,
    clip_rate: float = 0.05,
    column: str | None = None,
    where: Mapping[str, Any] | None = None,
    path: parts.PathLike | None = None,
) -> Figure:
    """Draws the norms with the limit that `recommend_threshold` advises, and how often others clip.

    Args:
      log: see :func:`norms`.
      clip_rate: share of the steps to be clipped, > 0 and <= 0.5.
      column: see :func:`norms`.
      where: see :func:`norms`.
      path: of the picture, whose ending says what format it has. None: it is not written.

    Returns:
      A `matplotlib.figure.Figure`.

    Raises:
      ModuleNotFoundError: if Matplotlib is not installed.
      FileNotFoundError, TypeError, ValueError: as :func:`norms` and `recommend_threshold`.

    Example:
      >>> import numpy as np
      >>> logged = np.exp(0.3 * np.random.default_rng(0).normal(size=2000))
      >>> print(recommendation(logged).get_suptitle())
      A limit of 1.62 clips 5 % of the coming steps
    """
    run = _run(log, column, where)
    advice = recommend_threshold(run.norms, clip_rate=clip_rate)
    limit, percent = advice.limit, 100 * clip_rate
    figure = parts.figure(4.0)
    words = promise(advice, clip_rate=clip_rate, steps=run.norms.size)
    figure.suptitle(f"A limit of {limit:.3g} {words}")
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(2.4, 1))
    parts.draw_norms(left, run, np.array([limit]))
    high = np.where(run.norms > limit, run.norms, np.nan)
    above = {"style": "^", "color": parts.CLIPPED, "label": "norm above the limit"}
    parts.draw_sizes(left, run.steps, high, **above)
    parts.draw_events(left, run, bad_only=True)
    left.set_xlabel("step")
    words = " ".join(filter(None, (parts.title(run), f"({advice.kind})")))
    left.set_title(words, loc="left", fontsize=10)
    rates = np.append(100 * advice.curve.rates, percent)
    order = np.argsort(rates)
    limits = np.append(advice.curve.limits, limit)
    right.plot(rates[order], limits[order], color="black", linewidth=1.2)
    right.plot(percent, limit, "o", color=parts.LIMIT, markersize=8)
    right.set_xlabel("steps clipped (%)")
    right.set_title("how often others clip", loc="left", fontsize=10)
    parts.log_axis(right, "x", rates.min(), rates.max())
    for axes, label in ((left, f"advised limit {limit:.3g}"), (right, None)):
        axes.axhline(limit, color=parts.LIMIT, linestyle="--", linewidth=1.5, label=label)
    figure.legend(loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    return parts.written(figure, path)


def limits(
    log: Any,
    limits: Mapping[str, Any],
    *,
    column: str | None = None,
    where: Mapping[str, Any] | None = None,
    path: parts.PathLike | None = None,
) -> Figure:
    """Draws the norms and the limits of several clippers, as `optaxclip.replay` has found them.

    Args:
      log: see :func:`norms`.
      limits: by name, (n,) limits, one for each norm; inf where there is none.
      column: see :func:`norms`.
      where: see :func:`norms`.
      path: of the picture, whose ending says what format it has. None: it is not written.

    Returns:
      A `matplotlib.figure.Figure`.

    Raises:
      ModuleNotFoundError: if Matplotlib is not installed.
      FileNotFoundError, TypeError: as :func:`norms`.
      ValueError: as :func:`norms`; or if there are not as many limits as norms.

    Example:
      >>> import optaxclip
      >>> logged = [1.0, 1.2, 5.0, 1.1]
      >>> fixed = optaxclip.replay(logged, optaxclip.clip_by_global_norm(2.0))
      >>> figure = limits(logged, {"fixed": fixed.limit})
      >>> [text.get_text() for text in figure.legends[0].get_texts()]
      ['norm', 'fixed']
    """
    run = _run(log, column, where)
    found = {name: np.asarray(limit, np.float64) for name, limit in limits.items()}
    for name, limit in found.items():
        if limit.shape != run.norms.shape:
            raise ValueError(
                f"limits must be {len(run.norms)}, one for each norm; got {limit.shape} of {name!r}"
            )
    figure = parts.figure(4.0)
    axes = figure.subplots()
    parts.draw_norms(axes, run, np.concatenate([*found.values(), []]))
    for i, (name, limit) in enumerate(found.items()):
        shown = np.where(np.isfinite(limit), limit, np.nan)
        color, dashes = parts.COLOURS[i % len(parts.COLOURS)], DASHES[i % len(DASHES)]
        axes.plot(run.steps, shown, color=color, linestyle=dashes, linewidth=1.5, label=name)
    parts.draw_events(axes, run, bad_only=True)
    axes.set_xlabel("step")
    axes.set_title(parts.title(run), loc="left", fontsize=10)
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    return parts.written(figure, path)


def _run(log: Any, column: str | None, where: Mapping[str, Any] | None) -> Run:
    return log if isinstance(log, Run) else read_run(log, column=column, where=where)


def _binned(norms: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Edges, how many norms are between them, and the percentiles."""
    percents = list(PERCENTILES)
    is_state = not isinstance(norms, str | os.PathLike) and observe.holds_history(norms)
    if not is_state:
        sizes = _run(norms, None, None).norms
        sizes = sizes[np.isfinite(sizes) & (sizes > 0)]
        far = np.log2(parts.FAR)
        logs = np.log2(sizes)
        logs = np.clip(logs, np.median(logs) - far, np.median(logs) + far)
        counts, edges = np.histogram(logs, bins=int(np.clip(np.sqrt(len(logs)), 10, 60)))
        return 2.0**edges, counts, np.percentile(sizes, percents)
    history = observe.only_history(norms)
    bins, largest = history.bins, history.largest
    if not bins.any():
        raise ValueError("a state of norms must have seen a norm that is finite and above 0")
    first, last = np.flatnonzero(bins)[[0, -1]] + [0, 1]
    edges = 2.0 ** (observe.LOW + np.arange(first, last + 1) / observe.PER_OCTAVE)
    return edges, bins[first:last], observe.percentiles(bins, largest, percents)
