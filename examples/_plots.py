"""The pictures of the examples."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullFormatter, NullLocator

History = dict[str, np.ndarray]  # by metric, one entry per step

WINDOW = 10  # steps averaged for the curves of the losses
# Okabe and Ito's colours, which the colour-blind can tell apart.
COLOURS = ["#000000", "#E69F00", "#56B4E9", "#009E73", "#CC79A7", "#0072B2", "#999999"]
TICK, LIMIT = "#D55E00", "#666666"


class Curves(NamedTuple):
    """One clipper in the picture."""

    name: str
    caption: str  # of its row
    histories: list[History]  # one per seed: `loss_bits`, `norm`, `limit` and `clipped`


def draw(columns: dict[str, list[Curves]], baseline: float, title: str, path: Path) -> None:
    """Writes the picture.

    Args:
      columns: by heading, the clippers below it; all share the axes of the losses.
      baseline: a loss to compare with, that of guessing by letter frequency alone.
      title: of the whole picture.
      path: of the PNG file.
    """
    heights = [3.2, *[1.0] * max(map(len, columns.values()))]
    figure = Figure((3 + 6 * len(columns), 0.9 * sum(heights) + 1.2), layout="constrained")
    figure.suptitle(title)
    grid = figure.subplots(
        len(heights), len(columns), sharex=True, squeeze=False, height_ratios=heights
    )
    for (top, *rows), (heading, clippers) in zip(grid.T, columns.items(), strict=True):
        top.sharey(grid[0, 0])
        for i, (curves, axes) in enumerate(zip(clippers, rows, strict=False)):
            # The first ones are wider, so that of two equal runs both are seen.
            draw_loss(top, curves, COLOURS[i % len(COLOURS)], width=max(4 - i, 1))
            draw_norm(axes, curves.histories[0], COLOURS[i % len(COLOURS)])
            axes.set_title(curves.caption, loc="left", fontsize=10)
        for axes in rows[len(clippers) :]:
            axes.remove()
        rows[len(clippers) - 1].tick_params(labelbottom=True)
        rows[len(clippers) - 1].set(xlabel="training step")
        top.axhline(baseline, color=LIMIT, linestyle=":", label="letter frequencies alone")
        top.set(title=heading, ylabel="training loss\n(bits per character)", yscale="log")
        top.yaxis.set(major_locator=LogLocator(subs=(1, 2, 3, 5)), major_formatter="{x:g}")
        top.yaxis.set(minor_locator=NullLocator())
        top.legend(ncols=3, fontsize=9)
    grid[0, 0].set_ylim(top=1.6 * grid[0, 0].get_ylim()[1])  # room for the legends
    marks = [
        Line2D([], [], color=COLOURS[0], label="largest norm before clipping"),
        Line2D([], [], color=LIMIT, linestyle="--", label="smallest limit"),
        Line2D([], [], color=TICK, linestyle="", marker="|", label="clipped step"),
    ]
    figure.legend(handles=marks, loc="outside lower center", ncols=3)
    figure.savefig(path, dpi=150)


def draw_loss(axes: Axes, curves: Curves, colour: str, width: float) -> None:
    """The running mean of the loss, a line per seed, up to where it diverged."""
    for i, history in enumerate(curves.histories):
        loss = history["loss_bits"]
        window = min(WINDOW, len(loss))
        mean = np.convolve(loss, np.full(window, 1 / window), mode="valid")
        label = None if i else curves.name
        steps = np.arange(window, len(loss) + 1)
        axes.plot(steps, mean, color=colour, linewidth=width, alpha=0.8, label=label)
        if not np.isfinite(loss).all():
            last = max(int(np.isfinite(loss).argmin()) - 1, 0)
            axes.plot(last + 1, loss[last], "X", color=colour, markersize=10)


def draw_norm(axes: Axes, history: History, colour: str) -> None:
    """The measured norm, its limit if there is one, and a tick for every clipped step."""
    steps = np.arange(1, len(history["norm"]) + 1)
    limit = np.where(np.isfinite(history["limit"]), history["limit"], np.nan)
    axes.plot(steps, history["norm"], color=colour, linewidth=1)
    axes.plot(steps, limit, "--", color=LIMIT)
    clipped = steps[history["clipped"] > 0]
    axes.vlines(clipped, 0.0, 0.16, transform=axes.get_xaxis_transform(), color=TICK)
    axes.set(yscale="log", ylabel="norm")
    axes.yaxis.set(minor_formatter=NullFormatter())  # where there are few decades, labels collide


# Colour (of Okabe and Ito's) and marker, by kind of clipper.
LOOKS = {"fixed limit": ("#D55E00", "s"), "adaptive": ("#0072B2", "o"), "other": ("#000000", "D")}


class Ranked(NamedTuple):
    """One clipper in a ranking."""

    name: str
    kind: str  # a key of LOOKS
    bits: np.ndarray  # (seeds,) validation loss in bits per character; not finite if diverged
    rise: np.ndarray  # (seeds,) of it, over what it is to be compared with
    changed: list[float]  # shares of the garbage, x 1000 and good steps that were changed


def percent(x: float) -> str:
    """0.051 as 5, less than 0.5 % but not nothing as <1, and NaN as -."""
    if np.isnan(x):
        return "-"
    return "<1" if 0 < x < 0.005 else f"{100 * x:.0f}"


def draw_ranking(rows: list[Ranked], title: str, path: Path) -> None:
    """Writes the picture: rises on the left, on the right what was changed."""
    figure = Figure((9.2, 1.6 + 0.29 * len(rows)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(3, 1))
    draw_rises(left, rows)
    draw_changed(right, rows)
    left.set(yticks=range(len(rows)), yticklabels=[row.name for row in rows])
    figure.suptitle(title, fontsize=11)
    figure.savefig(path, dpi=150)


def draw_rises(axes: Axes, rows: list[Ranked]) -> None:
    """A tick per seed, a line over their range, and a mark for their mean."""
    known = set()
    for y, row in enumerate(rows):
        colour, marker = LOOKS[row.kind]
        diverged = (~np.isfinite(row.bits)).sum()
        if diverged:
            words, place = f"{diverged} of {len(row.bits)} diverged", axes.get_yaxis_transform()
            axes.text(0.98, y, words, ha="right", va="center", transform=place, fontsize=9)
            continue
        label = None if row.kind in known else row.kind
        known.add(row.kind)
        axes.hlines(y, row.rise.min(), row.rise.max(), color=colour, linewidth=1.5)
        axes.plot(row.rise, [y] * len(row.rise), "|", color=colour, markersize=8)
        axes.plot(row.rise.mean(), y, marker, color=colour, markersize=7, label=label)
    axes.axvline(0, color="0.5", linewidth=0.8)
    # Linear about 0, where the good ones are, and logarithmic where the others are.
    axes.set_xscale("symlog", linthresh=0.1, linscale=1.5)
    ticks = [-0.1, -0.05, 0, 0.05, 0.1, 0.3, 1, 3]
    axes.set(xticks=ticks, xticklabels=[f"{tick:g}" for tick in ticks])
    axes.set_xlabel("loss above that of clean batches, unclipped (bits per character)")
    axes.grid(axis="y", color="0.92")
    axes.set_axisbelow(True)
    axes.legend(fontsize=9, loc="lower left")


def draw_changed(axes: Axes, rows: list[Ranked]) -> None:
    """Numbers on grey: the more was changed, the darker."""
    shares = np.array([row.changed for row in rows])
    axes.imshow(shares, cmap="Greys", vmin=0, vmax=2, aspect="auto")  # so that text stays readable
    for (y, x), value in np.ndenumerate(shares):
        axes.text(x, y, percent(value), ha="center", va="center", fontsize=9)
    axes.set(xticks=range(3), xticklabels=("garbage", "x 1000", "good"))
    axes.tick_params(left=False, bottom=False)
    axes.set_xlabel("steps changed, %")


def draw_errors(
    rows: dict[str, np.ndarray], columns: list[str], label: str, title: str, path: Path
) -> None:
    """Writes a table as a picture: the more errors, the darker; the best of each row is bold.

    Args:
      rows: by name, an error in percent for each column.
      columns: their names.
      label: what the columns are.
      title: of the picture.
      path: of the PNG file.
    """
    errors = np.stack(list(rows.values()))
    figure = Figure(
        (max(1.8 + 0.9 * len(columns), 5), 1.4 + 0.36 * len(rows)), layout="constrained"
    )
    axes = figure.subplots()
    axes.imshow(np.maximum(errors, 1), cmap="Greys", norm=LogNorm(1, 100), aspect="auto")
    for (y, x), error in np.ndenumerate(errors):
        weight = "bold" if error == errors[y].min() else "normal"
        colour = "white" if error > 10 else "black"  # 10: the middle of the scale
        axes.text(x, y, f"{error:.1f}", ha="center", va="center", color=colour, weight=weight)
    axes.set(xticks=range(len(columns)), xticklabels=columns, xlabel=label)
    axes.set(yticks=range(len(rows)), yticklabels=list(rows))
    axes.set_title(title, fontsize=11)
    figure.savefig(path, dpi=150)


def draw_heat_map(axes: Axes, values: np.ndarray, norm: Normalize, words: list[list[str]]) -> None:
    """A heat map, white to dark, with what each cell says written into it."""
    axes.imshow(values, cmap="Blues", norm=norm, aspect="auto")
    for (i, j), value in np.ndenumerate(values):
        colour = "white" if norm(value) > 0.6 else "black"
        axes.text(j, i, words[i][j], ha="center", va="center", fontsize=9, color=colour)
    axes.tick_params(length=0)
