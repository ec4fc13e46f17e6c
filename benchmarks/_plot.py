"""The picture of step times: ours and Optax's, between the step without a clip and the limit."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import _report

Row = dict[str, Any]

PEERS = {"one-liner": ("x", "one-liner"), "torch.clip_grad_norm_": ("+", "PyTorch / its own step")}
TICKS = (1, 1.5, 2, 3, 5, 10, 20, 50)


MISSING = "no picture: matplotlib is not installed"


def matplotlib() -> Any:
    """Its module of figures, or None where it is not installed."""
    try:
        return importlib.import_module("matplotlib.figure")
    except ImportError:
        return None


def draw(rows: list[Row], subtitle: str, path: Path) -> str | None:
    """Writes the picture of the largest tree of each kind.

    Args:
      rows: of `_group.run_group`.
      subtitle: where the numbers are from.
      path: of the PNG file.

    Returns:
      Why there is none, if there is none.
    """
    figures = matplotlib()
    if figures is None:
        return MISSING
    groups = _report.largest(rows)
    trees = [*dict.fromkeys(group[0] for group in groups)]
    optimizers = [*dict.fromkeys(group[3] for group in groups)]
    names = [*dict.fromkeys(n for members in groups.values() for n in drawn(members))]
    if not names:
        return "no picture: no variant was measured"
    height = len(optimizers) * (0.9 + 0.27 * len(names)) + 1.1
    figure = figures.Figure((9, height), layout="constrained")
    figure.suptitle(
        "Time of a training step with a clipper, over the step without: left is faster\n",
        fontsize=12,
        fontweight="bold",
    )
    figure.text(0.5, 1 - 0.36 / height, subtitle, ha="center", va="top", fontsize=8)
    grid = figure.subplots(len(optimizers), len(trees), squeeze=False, sharex=True, sharey=True)
    for group, members in groups.items():
        axes = grid[optimizers.index(group[3]), trees.index(group[0])]
        axes.set_title(_report.heading(group), fontsize=9)
        panel(axes, members, names)
    legend(figure, grid)
    save(figure, path)
    return None


def legend(figure: Any, grid: Any) -> None:
    """Names what is in any of the axes, once."""
    pairs = [zip(*axes.get_legend_handles_labels(), strict=True) for axes in grid.flat]
    named = {label: handle for pair in pairs for handle, label in pair}
    style = {"loc": "outside lower center", "ncols": 3, "fontsize": 9, "frameon": False}
    figure.legend(named.values(), named.keys(), **style)


def save(figure: Any, path: Path) -> None:
    """Writes a picture, 1800 pixels wide."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=200)


def drawn(members: dict[str, Row]) -> list[str]:
    """The variants of a group that have numbers."""
    return [n for n, row in members.items() if n.startswith("optaxclip.") and "error" not in row]


def panel(axes: Any, members: dict[str, Row], names: list[str]) -> None:
    """One tree with one optimizer: a line for each variant."""
    axes.set(xscale="log", ylim=(len(names) - 0.5, -0.5))
    axes.set_yticks(range(len(names)), [n.removeprefix("optaxclip.") for n in names], fontsize=9)
    axes.set_xticks(TICKS, [f"{tick:g}x" for tick in TICKS], fontsize=8)
    axes.minorticks_off()
    axes.grid(axis="x", color="0.9")
    axes.set_axisbelow(True)
    bare = members["bare"]
    limit = bare["limit_by_transfers_ms"] / bare["step_ms"]
    if members["bare"]["optimizer"] == "muon":
        limit = bare["limit_by_bandwidth_ms"] / bare["step_ms"]
    axes.axvline(1, color="black", linewidth=1, label="step without")
    axes.axvline(
        limit,
        color="black",
        linewidth=1,
        linestyle="--",
        label="and one more read of the gradients",
    )
    for y, name in enumerate(names):
        row = members.get(name, {})
        ours = _report.median(row.get("over_bare"))
        twin = members.get(row.get("twin") or "", {}).get("over_bare")
        if ours is None:
            continue
        if twin:
            axes.plot([ours, twin["median"]], [y, y], color="0.6", linewidth=1.5, zorder=1)
            axes.plot(twin["median"], y, "o", mfc="white", mec="black", ms=8, label="Optax")
        axes.plot(ours, y, "o", color="black", ms=5, label="optaxclip")
        if name == "optaxclip.clip_by_global_norm":
            for peer, (marker, label) in PEERS.items():
                if value := members.get(peer, {}).get("over_bare"):
                    axes.plot(value["median"], y, marker, color="black", ms=7, label=label)


AXES = {
    ("leaves", "compile_s"): ("leaves, 3M parameters in all", "lowering and compiling, s"),
    ("leaves", "step_ms"): ("leaves, 3M parameters in all", "step, ms"),
    ("parameters", "step_ms"): ("parameters in 148 leaves", "step, ms"),
    ("window", "step_ms"): ("norms remembered, 1000 parameters", "step, ms"),
    ("devices", "step_ms"): ("devices, 10M parameters", "step, ms"),
}
LINES = {
    "bare": ("-", "", "0.6"),
    "optax.clip_by_global_norm": ("--", "o", "black"),
    "optaxclip.clip_by_global_norm": ("-", "o", "black"),
    "optaxclip.clip_by_percentile": (":", "s", "black"),
    "optaxclip.clip_by_sigma": (":", "^", "black"),
    "optaxclip.zclip": (":", "D", "black"),
}


def draw_sweeps(lines: list[Row], subtitle: str, path: Path) -> str | None:
    """Writes the picture of how costs grow.

    Args:
      lines: of `scaling.summary`.
      subtitle: where the numbers are from.
      path: of the PNG file.

    Returns:
      Why there is none, if there is none.
    """
    figures = matplotlib()
    if figures is None:
        return MISSING
    figure = figures.Figure((9, 6.4), layout="constrained")
    figure.suptitle("What a clip costs as things grow", fontsize=12, fontweight="bold")
    grid = figure.subplots(2, 3)
    found = [key for key in AXES if any((x["sweep"], x["cost"]) == key for x in lines)]
    for axes, (sweep, cost) in zip(grid.flat, found, strict=False):
        own = [line for line in lines if (line["sweep"], line["cost"]) == (sweep, cost)]
        for line in own:
            curve(axes, line)
        across, up = AXES[sweep, cost]
        axes.set(xscale="log", yscale="log")
        axes.set_xlabel(across, fontsize=9)
        axes.set_title(up, fontsize=9)
        axes.tick_params(labelsize=8)
        plain_ticks(axes, [point["at"] for point in own[0]["points"]])
        axes.grid(color="0.9")
    for axes in grid.flat[len(found) :]:
        axes.axis("off")
    grid.flat[-1].text(0, 0, subtitle.replace(", ", "\n"), fontsize=8)
    legend(figure, grid)
    save(figure, path)
    return None


def plain_ticks(axes: Any, at: list[int]) -> None:
    """Numbers as people write them, where something was measured."""
    ticker = importlib.import_module("matplotlib.ticker")
    axes.set_xticks(at, [_report.short(number) for number in at])
    axes.yaxis.set(
        major_locator=ticker.LogLocator(subs=(1, 2, 5)),
        major_formatter="{x:g}",
        minor_locator=ticker.NullLocator(),
    )
    axes.xaxis.set(minor_locator=ticker.NullLocator())


def curve(axes: Any, line: Row) -> None:
    """The costs of one candidate, and the power that they grow with."""
    style, marker, colour = LINES[line["candidate"]]
    at = [point["at"] for point in line["points"]]
    costs = [point[line["cost"]] for point in line["points"]]
    fill = "white" if line["candidate"].startswith("optax.") else colour
    axes.plot(
        at, costs, style, marker=marker, color=colour, mfc=fill, ms=5, label=line["candidate"]
    )
