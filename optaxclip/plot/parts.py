"""The parts of a picture: axes, the norms of a run, and marks for what happened."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from optaxclip.logs import Run
from optaxclip.logs.reading import MEMORY

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PathLike = str | os.PathLike[str]

WIDTH, DPI = 8.0, 200  # inches, and pixels of each: twice as many as a README shows
# Okabe and Ito's colours, which the colour-blind can tell apart. Marks and dashes differ too.
NORM, CLIPPED, LIMIT, BAD = "0.45", "#D55E00", "#0072B2", "black"
COLOURS = (LIMIT, CLIPPED, BAD, "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
FAR = 100  # times the largest limit or the median, above which norms are drawn at the edge
EDGE = 0.96  # of the height of a panel
DENSE = 2000  # norms, of which a line would be a block


def title(run: Run) -> str:
    """Which run of which file."""
    source = "" if run.source == MEMORY else Path(run.source).name
    return ": ".join(filter(None, (source, run.label)))


def figure(height: float) -> Figure:
    """An empty picture, so many inches high."""
    try:
        from matplotlib.figure import Figure  # noqa: PLC0415  (an extra)
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "a picture takes Matplotlib: pip install 'optaxclip[plot]'"
        ) from None
    return Figure((WIDTH, height), layout="constrained")


def written(figure: Figure, path: PathLike | None) -> Figure:
    """The picture, in its file too."""
    if path is not None:
        if not Path(path).suffix:
            raise ValueError(
                f"path must end in what format it has, such as .png; got {str(path)!r}"
            )
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=DPI)
    return figure


def draw_norms(axes: Axes, run: Run, limit: np.ndarray | None) -> None:
    """The norms that are finite, those that are too large at the upper edge."""
    sizes = run.norms
    usual = sizes[np.isfinite(sizes) & (sizes > 0)]
    limits = np.empty(0) if limit is None else limit[np.isfinite(limit)]
    most = FAR * max(np.max(limits, initial=0.0), np.median(usual))
    far = np.isfinite(sizes) & (sizes > most)
    inside = np.concatenate([usual[usual <= most], limits[limits > 0]])
    log_axis(axes, "y", max(inside.min(), inside.max() / 1e6), inside.max())
    shown = np.where(np.isfinite(sizes) & ~far, sizes, np.nan)
    draw_sizes(axes, run.steps, shown, style="-", color=NORM, label="norm")
    if far.any():
        label = f"norm too large to show, up to {sizes[far].max():.1e}"
        _at_edge(axes, run.steps[far], "^", label)
    axes.set_ylabel("gradient norm")


def draw_sizes(
    axes: Axes, steps: np.ndarray, sizes: np.ndarray, *, style: str, color: str, label: str
) -> None:
    """Norms as a line or as marks; as dots, where there are too many to tell apart."""
    dense = len(steps) > DENSE
    style, width = (".", 1.5) if dense else (style, 4)
    axes.plot(steps, sizes, style, color=color, markersize=width, linewidth=0.9, label=label)


def draw_events(axes: Axes, run: Run, *, bad_only: bool = False) -> None:
    """The steps that were not finite; and those that were clipped or skipped."""
    for name, height in () if bad_only else (("clipped", 0.04), ("skipped", 0.12)):
        share = run.beside(name)
        if share is not None and (share > 0).any():
            own = share > 0
            label = f"{name} step ({100 * np.mean(own):.2g} %)"
            mark, color = ("|", CLIPPED) if name == "clipped" else ("s", BAD)
            style = {"color": color, "fillstyle": "none", "markersize": 7, "label": label}
            _across(axes, run.steps[own], height, mark, **style)
    bad = ~np.isfinite(run.norms)
    if bad.any():
        _at_edge(axes, run.steps[bad], "X", "norm not finite")


def _at_edge(axes: Axes, steps: np.ndarray, mark: str, label: str) -> None:
    _across(axes, steps, EDGE, mark, color=BAD, markersize=6, label=label)


def _across(axes: Axes, steps: np.ndarray, height: float, mark: str, **style: Any) -> None:
    """Marks at one height of the panel."""
    heights, place = np.full(len(steps), height), axes.get_xaxis_transform()
    axes.plot(steps, heights, mark, transform=place, linestyle="", **style)


def log_axis(axes: Axes, name: str, low: float, high: float) -> None:
    """A logarithmic axis with room for both, and with labels that do not collide."""
    from matplotlib.ticker import LogLocator, NullLocator  # noqa: PLC0415  (an extra)

    middle = np.sqrt(low * high)
    wide = max(np.sqrt(high / low) * 1.25, 2.0)
    axes.set(**{f"{name}scale": "log", f"{name}lim": (middle / wide, middle * wide)})
    subs = (1, 2, 5) if wide**2 < 300 else (1,)
    axis = axes.xaxis if name == "x" else axes.yaxis
    axis.set(
        major_locator=LogLocator(subs=subs), minor_locator=NullLocator(), major_formatter="{x:g}"
    )
