"""The picture of the training: losses above, and per clipper what it measured and clipped."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
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
