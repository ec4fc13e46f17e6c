"""What a person reads: progress, tables and the targets at a glance; rich draws them if it can."""

from __future__ import annotations

import contextlib
import importlib
import shutil
import sys
from collections.abc import Callable, Iterator
from typing import Any

from _candidates import ADAPTIVE, DROP_INS, FIXED, OPTIMIZERS
from _trees import TREES

Row = dict[str, Any]

GROUP = ("tree", "parameters", "dtype", "optimizer", "devices")  # what rows of one run share
# Its metrics are one more read of the gradients, which Optax's clip does not do.
EXACT_DROP_INS = [c.name for c in DROP_INS if c.name != "optaxclip.clip_by_value"]
NOTHING = "-"
WIDTH = 180  # characters of the widest table
TREE_WIDE = [c.name for c in ADAPTIVE]


def rich(module: str) -> Any:
    """A module of rich, or None where it is not installed."""
    try:
        return importlib.import_module(f"rich.{module}")
    except ImportError:
        return None


@contextlib.contextmanager
def progress(total: int) -> Iterator[Callable[[str], None]]:
    """A bar on the terminal; what is yielded advances it by one, and says what comes."""
    bars, console = rich("progress"), rich("console")
    if bars is None or not sys.stderr.isatty():
        done = 0

        def tick(text: str) -> None:
            nonlocal done
            done += 1
            if sys.stderr.isatty():
                sys.stderr.write(f"\r{done}/{total} {text:60}")

        yield tick
        return
    columns = (
        bars.BarColumn(),
        bars.MofNCompleteColumn(),
        bars.TimeElapsedColumn(),
        bars.TextColumn("{task.description}"),
    )
    with bars.Progress(*columns, console=console.Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=total)
        yield lambda text: bar.update(task, advance=1, description=text)


def show(title: str, headings: list[str], lines: list[list[str]]) -> None:
    """Prints a table: the first column to the left, numbers to the right."""
    tables, console, box = rich("table"), rich("console"), rich("box")
    if tables is not None:
        style = {"box": box.SIMPLE_HEAD, "padding": (0, 1, 0, 0), "pad_edge": False}
        table = tables.Table(title=title, title_justify="left", **style)
        for i, heading in enumerate(headings):
            table.add_column(heading, justify="right" if i else "left", no_wrap=True)
        for line in lines:
            table.add_row(*(cell.replace("[", r"\[") for cell in line))
        # A line that is too long for the terminal is better than a number that is cut off.
        console.Console(width=max(WIDTH, shutil.get_terminal_size().columns)).print(table)
        return
    headings = [heading.replace("\n", " ") for heading in headings]
    widths = [max(map(len, column)) for column in zip(headings, *lines, strict=True)]
    print(f"\n{title}")
    for line in [headings, *lines]:
        cells = [f"{cell:>{w}}" for cell, w in zip(line[1:], widths[1:], strict=True)]
        print("  ".join([f"{line[0]:<{widths[0]}}", *cells]))


def number(value: float | None, digits: int = 2) -> str:
    """A number of so many digits behind the point, or a dash where there is none."""
    return NOTHING if value is None else f"{value:,.{digits}f}"


def median(value: Row | None) -> float | None:
    """Of a ratio, if there is one."""
    return value and value["median"]


def groups(rows: list[Row]) -> dict[tuple[Any, ...], dict[str, Row]]:
    """The rows of each run, by candidate."""
    found: dict[tuple[Any, ...], dict[str, Row]] = {}
    for row in rows:
        found.setdefault(tuple(row[key] for key in GROUP), {})[row["candidate"]] = row
    return found


def largest(rows: list[Row]) -> dict[tuple[Any, ...], dict[str, Row]]:
    """Of every tree and optimizer, in order, one run: float32 if there is one, then the largest."""
    every = groups(rows)
    rank = lambda group: (group[2] == "float32", -group[4], group[1])
    found: dict[tuple[str, str], tuple[Any, ...]] = {}
    for group in sorted(every, key=rank):
        found[group[0], group[3]] = group
    order = lambda group: ([*TREES].index(group[0]), [*OPTIMIZERS].index(group[3]))
    return {group: every[group] for group in sorted(found.values(), key=order)}


def heading(group: tuple[Any, ...]) -> str:
    """What a group is called."""
    tree, parameters, dtype, optimizer, devices = group
    several = f", {devices} devices" if devices > 1 else ""
    return f"{tree} {short(parameters)} {dtype}, {optimizer}{several}"


def short(parameters: int) -> str:
    """A number of parameters, as people say it."""
    for unit, letter in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if parameters >= unit:
            return f"{parameters / unit:.3g}{letter}"
    return str(parameters)


HEADINGS = [
    "candidate", "lower\ns", "compile\ns", "step\nms", "/ bare", "p25-p75", "/ Optax's", "/ fixed",
    "/ limit", "eager\nms", "eager /\nOptax's", "temp\nMB", "kernels", "collec-\ntives", "GB/s",
    "/ copy",
]  # fmt: skip


def report(rows: list[Row]) -> None:
    """One table for each group, and the targets."""
    for group, members in groups(rows).items():
        first = next(iter(members.values()))
        title = (
            f"{heading(group)}: {first['leaves']} leaves, {first.get('rounds')} rounds, "
            f"noise ±{100 * first['noise']:.1f} %, copy {first['copy_gb_per_s']:.1f} GB/s, "
            f"read {first['read_gb_per_s']:.1f}"
        )
        good = [row for row in members.values() if "error" not in row]
        show(title, HEADINGS, [cells(row) for row in good])
        for row in members.values():
            if "error" in row:
                print(f"{row['candidate']}: {row['error']}")
    targets(rows)
    print(
        "/ bare, / Optax's, / fixed: medians over rounds of the step's time over that of the bare "
        "step,\nof the clipper it replaces, of clip_by_global_norm. / limit: over the bare step "
        "and one more read\nof the gradients, by the number of transfers; at the speed of reads: "
        "by the time that this takes.\ntemp: XLA's temporary buffers. kernels: outside branches, "
        "fusions included."
    )


def cells(row: Row) -> list[str]:
    """A row of the table."""
    spread = row["over_bare"]
    temp = row.get("temp_bytes")
    return [
        row["candidate"],
        number(row.get("lower_s")),
        number(row.get("compile_s")),
        number(row["step_ms"], 3),
        number(median(spread), 3),
        f"{spread['p25']:.3f}-{spread['p75']:.3f}",
        number(median(row.get("over_optax")), 3),
        number(median(row.get("over_fixed")), 3),
        number(row.get("over_limit"), 3),
        number(row.get("eager_ms"), 2),
        number(median(row.get("eager_over_optax"))),
        number(temp if temp is None else temp / 1e6),
        number(row.get("kernels"), 0),
        number(sum(row["collectives"].values()) if "collectives" in row else None, 0),
        number(row.get("gb_per_s"), 1),
        number(row.get("of_copy")),
    ]


TARGETS = [
    "targets; ! is missed", "noise", "worst drop-in\n/ Optax's <= 1",
    "global norm\n/ limit <= 1.05", "at the speed\nof reads", "worst adaptive\n/ fixed <= 1.02",
    "compile added\n/ Optax's", "eager\n/ Optax's", "temp added\n/ gradients",
]  # fmt: skip


def targets(rows: list[Row]) -> None:
    """What the package promises, a line for each group; ! where a target is missed beyond noise."""
    lines = [target_line(group, members) for group, members in groups(rows).items()]
    show("At a glance", TARGETS, lines)


def target_line(group: tuple[Any, ...], members: dict[str, Row]) -> list[str]:
    """The figures of one group."""
    noise = members["bare"]["noise"]
    fixed = members.get(FIXED, {})
    return [
        heading(group),
        f"±{100 * noise:.1f} %",
        worst(members, EXACT_DROP_INS, "over_optax", 1 + noise),
        marked(fixed.get("over_limit"), 1.05 + noise),
        number(fixed.get("over_limit_by_bandwidth"), 3),
        worst(members, TREE_WIDE, "over_fixed", 1.02 + noise),
        number(fixed.get("compile_added_over_optax")),
        number(median(fixed.get("eager_over_optax"))),
        marked(fixed.get("extra_temp"), 0.1),
    ]


def worst(members: dict[str, Row], names: list[str], key: str, most: float) -> str:
    """The largest ratio among some candidates, and whose it is."""
    found = {name: median(members[name].get(key)) for name in names if name in members}
    known = {name: value for name, value in found.items() if value is not None}
    if not known:
        return NOTHING
    name = max(known, key=lambda each: known[each])
    return f"{marked(known[name], most)} {name.removeprefix('optaxclip.')}"


def marked(value: float | None, most: float) -> str:
    """A number, with a ! if it is too large."""
    return number(value, 3) + ("!" if value is not None and value > most else "")
