"""The picture of the examples: losses above, and per clipper what it measured and clipped."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullLocator

History = dict[str, np.ndarray]  # by metric, one entry per step

WINDOW = 10  # steps averaged for the thick lines
# Okabe and Ito's colours, which the colour-blind can tell apart.
COLOURS = ["#000000", "#E69F00", "#56B4E9", "#009E73", "#CC79A7", "#0072B2", "#999999"]
TICK, LIMIT = "#D55E00", "#666666"


def draw(
    histories: dict[str, History], captions: dict[str, str], baseline: float, title: str, path: Path
) -> None:
    """Writes the picture.

    Args:
      histories: by run, `loss_bits`, `norm`, `limit` and `clipped` of every step.
      captions: by run, the heading of its row.
      baseline: a loss to compare with, that of guessing by letter frequency alone.
      title: of the whole picture.
      path: of the PNG file.
    """
    heights = [3.2, *[1.0] * len(histories)]
    figure = Figure((9, 0.9 * sum(heights) + 1.2), layout="constrained")
    top, *rows = figure.subplots(len(heights), sharex=True, height_ratios=heights)
    for i, (name, history) in enumerate(histories.items()):
        rows[i].sharey(rows[0])
        # The first ones are wider, so that of two equal runs both are seen.
        draw_loss(top, name, history, COLOURS[i % len(COLOURS)], width=max(5 - 1.5 * i, 1.5))
        draw_norm(rows[i], history, COLOURS[i % len(COLOURS)])
        rows[i].set_title(captions[name], loc="left", fontsize=10)
    top.axhline(baseline, color=LIMIT, linestyle=":", label="letter frequencies alone")
    top.set(title=title, ylabel="training loss\n(bits per character)", yscale="log")
    top.yaxis.set(major_locator=LogLocator(subs=(1, 2, 3, 5)), major_formatter="{x:g}")
    top.yaxis.set(minor_locator=NullLocator())
    rows[-1].set(xlabel="training step")
    top.legend(ncols=2)
    marks = [
        Line2D([], [], color=COLOURS[0], label="norm before clipping"),
        Line2D([], [], color=LIMIT, linestyle="--", label="limit"),
        Line2D([], [], color=TICK, linestyle="", marker="|", label="clipped step"),
    ]
    figure.legend(handles=marks, loc="outside lower center", ncols=3)
    figure.savefig(path, dpi=150)


def draw_loss(axes: Axes, name: str, history: History, colour: str, width: float) -> None:
    """The loss of every step, thin, and its running mean, thick, up to where it diverged."""
    loss = history["loss_bits"]
    window = min(WINDOW, len(loss))
    mean = np.convolve(loss, np.full(window, 1 / window), mode="valid")
    steps = np.arange(1, len(loss) + 1)
    axes.plot(steps, loss, color=colour, linewidth=0.5, alpha=0.4)
    label = name
    if not np.isfinite(loss).all():
        bad = int(np.isfinite(loss).argmin())
        label = f"{name}, diverged at step {bad + 1}"
        axes.plot(steps[max(bad - 1, 0)], loss[max(bad - 1, 0)], "X", color=colour, markersize=10)
    axes.plot(steps[window - 1 :], mean, color=colour, linewidth=width, label=label)


def draw_norm(axes: Axes, history: History, colour: str) -> None:
    """The measured norm, its limit if there is one, and a tick for every clipped step."""
    steps = np.arange(1, len(history["norm"]) + 1)
    limit = np.where(np.isfinite(history["limit"]), history["limit"], np.nan)
    axes.plot(steps, history["norm"], color=colour, linewidth=1)
    axes.plot(steps, limit, "--", color=LIMIT)
    clipped = steps[history["clipped"] > 0]
    axes.vlines(clipped, 0.0, 0.16, transform=axes.get_xaxis_transform(), color=TICK)
    axes.set(yscale="log", ylabel="gradient\nnorm")
