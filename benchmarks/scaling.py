"""How the cost of a clip grows: with leaves, parameters, the length of a window, devices.

    python benchmarks/scaling.py
    python benchmarks/scaling.py --sweeps leaves --leaves 10,100,1000 --plot out/scaling.png

Steps of SGD, with clip_by_global_norm of this package, with Optax's, and without. Every sweep
changes one number; the table has the cost at each, and two slopes: the cost of one more (a straight
line through all), and the power of the number that the cost grows with (1 is proportional).
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

# Behind everything that is installed: a checkout is what to measure where there is no wheel.
sys.path.append(str(Path(__file__).resolve().parent.parent))

import _report
import _results
from _candidates import BARE, OPTAX, VARIANTS, Candidate, ours
from _measure import Job, World, interleaved, mesh_of
from _plot import draw_sweeps
from _trees import Shapes, many, shapes_of
from overhead import largest, parse_size, pretend

import optaxclip

Row = dict[str, Any]

FIXED = VARIANTS["clip_by_global_norm"]
PLAIN = [BARE, OPTAX["optax.clip_by_global_norm"], FIXED]


class Sweep(NamedTuple):
    """One number that grows, and what else the steps have."""

    numbers: str  # the default of its option
    quick: str
    unit: str  # what one more of it is
    costs: tuple[str, ...]  # keys of the rows


SWEEPS = {
    "leaves": Sweep("10,30,100,300,1000,3000", "2,4", "leaf", ("compile_s", "step_ms")),
    "parameters": Sweep("100k,1M,10M,100M,1G", "1k,4k", "parameter", ("step_ms",)),
    "window": Sweep("30,100,300,1000,3000,10000", "8,16", "norm", ("step_ms",)),
    "devices": Sweep("1,2,4,8", "1,2", "device", ("step_ms",)),
}
MANY, ALL_DEVICES = 3 * 10**6, 10**7  # parameters of the sweeps over leaves and over devices


def windowed(length: int) -> list[Candidate]:
    """The limits that remember so many norms, beside one that remembers none."""
    make = functools.partial
    return [
        BARE,
        FIXED,
        ours("clip_by_percentile", make(optaxclip.clip_by_percentile, window=length)),
        ours("clip_by_sigma", make(optaxclip.clip_by_sigma, window=length)),
        ours("zclip", make(optaxclip.zclip, warmup=length)),
    ]


def measure(
    sweep: str, number: int, shapes: Shapes, candidates: list[Candidate], rounds: int
) -> list[Row]:
    """The costs of each candidate at one number."""
    world = World(shapes, "float32", "sgd", mesh_of(number if sweep == "devices" else 1))
    jobs = [Job(candidate, world) for candidate in candidates]
    jobs[0].compile()  # the first of all pays for what JAX loads lazily
    for job in jobs:
        job.compile()
        job.sample(1)
    times = interleaved(jobs, rounds, 60.0, lambda text: None)
    return [
        {
            "sweep": sweep,
            "at": number,
            "candidate": job.name,
            "compile_s": job.lowering[-1] + job.compiling[-1],
            "step_ms": 1e3 * statistics.median(times[job.name]),
            "collectives": job.analysis()["collectives"],
        }
        for job in jobs
    ]


def run(sweep: str, number: int, args: argparse.Namespace) -> list[Row]:
    """Measures a sweep at one number."""
    small = 1000 if args.quick else MANY
    if sweep == "leaves":
        return measure(sweep, number, many(number, small), PLAIN, args.rounds)
    if sweep == "window":
        return measure(sweep, number, many(4, 1000), windowed(number), args.rounds)
    if sweep == "devices":
        shapes = shapes_of("gpt2", 20_000 if args.quick else ALL_DEVICES)
        return measure(sweep, number, shapes, PLAIN, args.rounds)
    return measure(sweep, number, shapes_of("gpt2", number), PLAIN, args.rounds)


def apart(args: argparse.Namespace) -> list[Row]:
    """The sweep over devices, in a process of its own: a CPU that is several is another machine."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "devices.json"
        numbers = ",".join(map(str, args.devices))
        command = [sys.executable, *(f"-W{w}" for w in sys.warnoptions), __file__]
        command += ["--sweeps", "devices", "--devices", numbers, "--json", str(path)]
        command += ["--rounds", str(args.rounds), *(["--quick"] if args.quick else []), "--child"]
        subprocess.run(command, check=True)  # noqa: S603 - this file
        return json.loads(path.read_text())["rows"]


def slopes(rows: list[Row], cost: str) -> tuple[float, float]:
    """The cost of one more, and the power that the cost grows with."""
    at, costs = np.array([(row["at"], row[cost]) for row in rows], float).T
    if len(at) < 2:
        return float("nan"), float("nan")
    return float(np.polyfit(at, costs, 1)[0]), float(np.polyfit(np.log(at), np.log(costs), 1)[0])


def summary(rows: list[Row]) -> list[Row]:
    """A line for each sweep, cost and candidate: the costs, and their slopes."""
    lines = []
    for sweep, kind in SWEEPS.items():
        members = [row for row in rows if row["sweep"] == sweep]
        for cost in kind.costs:
            for name in dict.fromkeys(row["candidate"] for row in members):
                own = [row for row in members if row["candidate"] == name]
                each, power = slopes(own, cost)
                line = {"sweep": sweep, "cost": cost, "candidate": name, "points": own}
                lines.append({**line, "per_unit": each, "power": power})
    return lines


def report(lines: list[Row]) -> None:
    """A table for each sweep and cost."""
    for sweep, cost in dict.fromkeys((line["sweep"], line["cost"]) for line in lines):
        own = [line for line in lines if (line["sweep"], line["cost"]) == (sweep, cost)]
        numbers = [_report.short(point["at"]) for point in own[0]["points"]]
        unit = "s" if cost == "compile_s" else "ms"
        headings = ["candidate", *numbers, f"{unit} per\n{SWEEPS[sweep].unit}", "power"]
        table = [
            [
                line["candidate"],
                *(_report.number(point[cost], 3) for point in line["points"]),
                f"{line['per_unit']:.2e}",
                _report.number(line["power"]),
            ]
            for line in own
        ]
        what = "lowering and compiling, s" if cost == "compile_s" else "step, ms"
        _report.show(f"{what}, against {sweep}", headings, table)


def options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sweeps", default=",".join(SWEEPS), help="(%(default)s)")
    for name, sweep in SWEEPS.items():
        parser.add_argument(f"--{name}", help=f"({sweep.numbers})")
    parser.add_argument("--rounds", type=int, default=20, help="that count (%(default)s)")
    parser.add_argument("--json", type=Path, help="write all numbers to this file")
    parser.add_argument("--plot", type=Path, help="draw them into this PNG file")
    parser.add_argument("--quick", action="store_true", help="two small numbers each, two rounds")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.sweeps = args.sweeps.split(",")
    if unknown := [name for name in args.sweeps if name not in SWEEPS]:
        parser.error(f"no sweep {unknown[0]!r}; choose from {', '.join(SWEEPS)}")
    for name, sweep in SWEEPS.items():
        text = getattr(args, name) or (sweep.quick if args.quick else sweep.numbers)
        try:
            setattr(args, name, [int(parse_size(number)) for number in text.split(",")])
        except (ValueError, OverflowError):
            parser.error(f"--{name} {text}: write numbers such as {sweep.numbers}")
    if args.quick:
        args.rounds = 2
    return args


def main() -> None:
    """Reads the options, measures, prints and writes."""
    args = options()
    if args.child:
        pretend(max(args.devices))
    jax.config.update("jax_enable_compilation_cache", False)  # noqa: FBT003 - it is JAX's own
    work = [
        (sweep, number)
        for sweep in args.sweeps
        if sweep != "devices" or args.child
        for number in getattr(args, sweep)
        if sweep != "parameters" or number <= largest("sgd", "float32", peers=False)
    ]
    rows: list[Row] = []
    with _report.progress(len(work)) as tick:
        for sweep, number in work:
            tick(f"{sweep}: {number:,}")
            rows += run(sweep, number, args)
    if "devices" in args.sweeps and not args.child:
        rows += apart(args)
    device = _results.device(1)
    lines = summary(rows)
    if args.json:
        short = [{k: v for k, v in line.items() if k != "points"} for line in lines]
        _results.write(args.json, {**device, "slopes": short, "rows": rows})
    if args.child:
        return
    print(_results.line(device))
    report(lines)
    if args.plot and (reason := draw_sweeps(lines, _results.line(device), args.plot)):
        print(reason)


if __name__ == "__main__":
    main()
