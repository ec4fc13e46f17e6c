"""What is kept of a run: files of numbers by device, and the table that README makes of them."""

from __future__ import annotations

import datetime as dt
import json
import platform
import re
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import _report
import jax
import jaxlib
from _candidates import DROP_INS, FIXED
from _measure import cores
from _report import NOTHING, median
from _torch import CLIP as TORCH_CLIP

import optaxclip

Row = dict[str, Any]

KEY = (*_report.GROUP, "candidate")
MARKERS = ("<!-- benchmarks -->", "<!-- /benchmarks -->")
OPTIMIZER_NAMES = {"sgd": "SGD", "adamw": "AdamW", "muon": "Muon"}
# The table has room for the drop-ins, and for what most people take.
MAIN = ("clip_by_norm", "clip_by_percentile[tree]", "zclip[tree]", "clip_by_sigma[tree]")
IN_TABLE = [c.name for c in DROP_INS] + [f"optaxclip.{name}" for name in MAIN]


def device(devices: int) -> Row:
    """What runs here: the device, its kind, and the versions of everything that matters."""
    first = jax.devices()[0]
    kind = f"cpu, {cores()} cores" if first.platform == "cpu" else first.device_kind
    return {
        "device": kind,
        "platform": first.platform,
        "machine": platform.machine(),
        "cores": cores(),
        "devices": devices,
        "jax": jax.__version__,
        "jaxlib": jaxlib.__version__,
        "optax": metadata.version("optax"),
        "optaxclip": optaxclip.__version__,
        "python": platform.python_version(),
        "date": dt.datetime.now(tz=dt.UTC).date().isoformat(),
    }


def line(device: Row) -> str:
    """The same, in one line."""
    names = ("jax", "optax", "optaxclip")
    versions = [f"{name} {device[name]}" for name in names]
    return ", ".join([device["device"], *versions, f"Python {device['python']}", device["date"]])


def write(path: Path, results: Row) -> None:
    """Writes numbers, readably."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n")


def merge(folder: Path, results: Row) -> Path:
    """Puts the rows into the file of this device, in the place of what they measure anew."""
    slug = re.sub(r"[^a-z0-9]+", "-", results["device"].lower()).strip("-")
    path = folder / f"{slug}-{results['jax']}.json"
    rows = json.loads(path.read_text())["rows"] if path.exists() else []
    by_key = {tuple(row[key] for key in KEY): row for row in [*rows, *results["rows"]]}
    write(path, {**results, "rows": [*by_key.values()]})
    return path


def insert_table(folder: Path, page: Path) -> str | None:
    """Writes the table of all results between the two markers of a page.

    Args:
      folder: of the results, a file for each device and version of JAX.
      page: Markdown, with the lines of `MARKERS`.

    Returns:
      What is missing, if something is.
    """
    paths = sorted(folder.glob("*.json"))
    if not paths:
        return f"no results in {folder}: run with --save first"
    text = page.read_text()
    before, opening, rest = text.partition(MARKERS[0])
    _, closing, after = rest.partition(MARKERS[1])
    if not (opening and closing):
        return f"{page} has no lines {MARKERS[0]} and {MARKERS[1]}: the table goes between them"
    tables = [markdown(json.loads(path.read_text())) for path in paths]
    page.write_text("\n".join([before + opening, *tables, closing + after]))
    return None


def markdown(results: Row) -> str:
    """The tables of one device, one for each dtype, float32 first."""
    by_dtype: dict[str, list[Row]] = {}
    for row in results["rows"]:
        by_dtype.setdefault(row["dtype"], []).append(row)
    order = sorted(by_dtype, key=lambda dtype: dtype != "float32")
    return "\n".join(table({**results, "rows": by_dtype[dtype]}) for dtype in order)


def table(results: Row) -> str:
    """A table of one dtype: the trees and optimizers in columns, the variants in rows."""
    groups = _report.largest(results["rows"])
    heads = [f"{tree}, {OPTIMIZER_NAMES[optimizer]}" for tree, *_, optimizer, _ in groups]
    heads = ["variant", *heads, "compile", "eager"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for name in IN_TABLE:
        cells = [step_cell(members.get(name, {})) for members in groups.values()]
        if any(cell != NOTHING for cell in cells):
            compiling = only(groups, name, "nfnet", lambda row: row.get("compile_added_over_optax"))
            eager = only(groups, name, "gpt2", lambda row: median(row.get("eager_over_optax")))
            label = f"`{name.removeprefix('optaxclip.')}`"
            lines.append(f"| {' | '.join([label, *cells, compiling, eager])} |")
    below = [*at_speed_of_reads(groups), *beside_torch(groups)]
    return "\n".join(["", caption(results, groups), "", *lines, *below, ""])


def caption(results: Row, groups: dict[tuple[Any, ...], dict[str, Row]]) -> str:
    """What was measured, where and when."""
    rows = [row for members in groups.values() for row in members.values()]
    dates = sorted({row["date"] for row in rows})
    when = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    sizes = {row["tree"]: f"{row['tree']} {row['leaves']} leaves" for row in rows}
    parameters = sorted({row["parameters"] for row in rows})
    span = [*dict.fromkeys(_report.short(n) for n in (parameters[0], parameters[-1]))]
    noise = sorted(100 * row["noise"] for row in rows)
    return (
        f"**{results['device']}**, jax {results['jax']}, optax {results['optax']}, optaxclip "
        f"{results['optaxclip']}, Python {results['python']}, {when}; {' to '.join(span)} "
        f"parameters, {', '.join(sorted({row['dtype'] for row in rows}))} "
        f"({', '.join(sizes.values())}); noise ±{noise[0]:.1f} to {noise[-1]:.1f} %:"
    )


def at_speed_of_reads(groups: dict[tuple[Any, ...], dict[str, Row]]) -> list[str]:
    """How far the norm of the tree is from the limit, where reads are slower than copies."""
    rows = [members[FIXED] for members in groups.values() if FIXED in members]
    slower = [row for row in rows if row["read_gb_per_s"] < row["copy_gb_per_s"]]
    if not slower:
        return []
    over = ", ".join(_report.number(row["over_limit_by_bandwidth"]) for row in slower)
    read, copy = (
        f"{min(speeds):.0f} to {max(speeds):.0f}"
        for speeds in ([row[f"{kind}_gb_per_s"] for row in slower] for kind in ("read", "copy"))
    )
    line = (
        f"This device reads {read} GB/s (with all cores, by a BLAS), and copies in place {copy}. "
        f"Over the bare step and one more read at that speed, "
        f"`{FIXED.removeprefix('optaxclip.')}` takes {over}."
    )
    return ["", line]


def beside_torch(groups: dict[tuple[Any, ...], dict[str, Row]]) -> list[str]:
    """What the norm of the tree makes of the bare step here and in PyTorch, where that ran."""
    ran = [m for m in groups.values() if "over_bare" in m.get(TORCH_CLIP, {}) and FIXED in m]
    if not ran:
        return []
    torch, own = (
        ", ".join(_report.number(median(m[name]["over_bare"])) for m in ran)
        for name in (TORCH_CLIP, FIXED)
    )
    places = ", ".join(f"{m[FIXED]['tree']} {OPTIMIZER_NAMES[m[FIXED]['optimizer']]}" for m in ran)
    line = (
        f"Over its bare step with a fused optimizer, PyTorch's `clip_grad_norm_` (foreach) takes "
        f"{torch}; `{FIXED.removeprefix('optaxclip.')}` over its own {own} ({places})."
    )
    return ["", line]


def step_cell(row: Row) -> str:
    """Step time over Optax's, and over the limit."""
    if "over_bare" not in row:
        return NOTHING
    beside = _report.number(median(row.get("over_optax")))
    return f"{beside} · {row['over_limit']:.2f}"


def only(groups: Any, name: str, tree: str, read: Callable[[Row], float | None]) -> str:
    """A number of one tree; the first optimizer's, as it is nearly that of the others."""
    found = [read(m[name]) for group, m in groups.items() if group[0] == tree and name in m]
    return _report.number(found[0]) if found else NOTHING
