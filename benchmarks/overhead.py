"""What a clipper adds to a training step: compile time, step time, memory, kernels.

Every candidate is a whole step: clip, optimizer, `apply_updates`; parameters and state are donated.
All of a group (a tree, a size, a dtype, an optimizer) run in turn, round after round in a new
order, so that a busy machine slows them alike; ratios are medians over rounds. The bare step and
Optax's clip run twice under two names: how far these are from 1 is the noise.

    python benchmarks/overhead.py
    python benchmarks/overhead.py --trees nfnet --sizes 1M,25M --variants all --dtype bfloat16
    python benchmarks/overhead.py --peers --json out/overhead.json --plot out/overhead.png
    python benchmarks/overhead.py --save     # into benchmarks/results, and then, into README.md:
    python benchmarks/overhead.py --readme
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
import sys
from pathlib import Path
from typing import Any

import jax

# Behind everything that is installed: a checkout is what to measure where there is no wheel.
ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))

import _plot  # noqa: E402
import _report  # noqa: E402
import _results  # noqa: E402
from _candidates import OPTIMIZERS, select  # noqa: E402
from _group import Group, How, run_group, turn  # noqa: E402
from _measure import WARMUP  # noqa: E402
from _trees import TREES, shapes_of  # noqa: E402

DTYPES = ("float32", "bfloat16")
MUON_ON_CPU = 10**6  # parameters: Newton and Schulz take seconds per step for more


def options(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line; a name that is not known is an error that lists what is."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--trees", default="gpt2,nfnet,scanned", help="with commas (%(default)s)")
    add("--sizes", default="10M", help="parameters: 1M, 1.5G, max for what fits (%(default)s)")
    add("--optimizers", default="sgd,adamw", help=f"of {', '.join(OPTIMIZERS)} (%(default)s)")
    add("--variants", default="drop-ins", help="all, drop-ins, adaptive or names (%(default)s)")
    add("--dtype", default="float32", help="float32, bfloat16 or both (%(default)s)")
    add("--peers", action="store_true", help="also a one-liner, smartclip and PyTorch")
    add("--devices", type=int, default=1, help="split the trees; a CPU pretends to be several")
    add("--rounds", type=int, default=100, help="that count (%(default)s)")
    add("--seconds", type=float, default=math.inf, help="of a group's rounds, at most")
    add("--compiles", type=int, default=1, help="of each step, for the median (%(default)s)")
    add("--no-eager", action="store_true", help="no calls outside jit, which compile all anew")
    add("--json", type=Path, help="write all numbers to this file")
    add("--plot", type=Path, help="draw the step times into this PNG file")
    add("--beside", type=Path, help="a file that runs share: all compile at once, and time in turn")
    add("--profile", type=Path, help="write a profiler trace of three steps of each candidate")
    add("--save", action="store_true", help="merge the numbers into the results of this device")
    add("--results", type=Path, default=ROOT / "benchmarks/results", help="where they are kept")
    add("--readme", nargs="?", type=Path, const=ROOT / "README.md", help="write their table, only")
    add("--quick", action="store_true", help="tiny trees and two rounds: does everything run?")
    args = parser.parse_args(arguments)
    if args.quick:
        args.sizes, args.rounds = "20k", 2
    try:
        args.trees = chosen(args.trees, TREES, "tree")
        args.optimizers = chosen(args.optimizers, OPTIMIZERS, "optimizer")
        args.dtype = chosen(args.dtype, DTYPES, "dtype")
        args.sizes = [parse_size(size) for size in args.sizes.split(",")]
        select(args.variants, "adamw", peers=args.peers)
    except ValueError as error:
        parser.error(str(error))
    if min(args.rounds, args.devices, args.compiles) < 1:
        parser.error("--rounds, --devices and --compiles must be at least 1")
    return args


def chosen(names: str, allowed: Any, what: str) -> list[str]:
    """The names in a list with commas."""
    for name in names.split(","):
        if name not in allowed:
            raise ValueError(f"no {what} {name!r}; choose from {', '.join(allowed)}")
    return names.split(",")


def parse_size(text: str) -> float:
    """A number of parameters such as 1M; infinity for max."""
    if text == "max":
        return math.inf
    try:
        size = float(text.rstrip("kMG")) * {"k": 1e3, "M": 1e6, "G": 1e9}.get(text[-1:], 1)
    except ValueError:
        size = math.nan
    if not 1 <= size < math.inf:
        raise ValueError(f"no size {text!r}; write 1000000, 1M, 1.5G or max")
    return size


def largest(optimizer: str, dtype: str, *, peers: bool) -> int:
    """How many parameters fit: with gradients, moments, and one clipped copy of the gradients."""
    memory = (jax.devices()[0].memory_stats() or {}).get("bytes_limit")
    memory = memory or 0.6 * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    arrays = 3 + {"sgd": 0, "adamw": 2, "muon": 4}[optimizer]
    size = 4 if dtype == "float32" else 2
    return int(0.8 * memory / size / arrays / (2 if peers else 1))


def groups_of(args: argparse.Namespace) -> list[Group]:
    """What is asked for, within what fits into memory."""
    found = []
    for tree, size, dtype, optimizer in itertools.product(
        args.trees, args.sizes, args.dtype, args.optimizers
    ):
        fits = largest(optimizer, dtype, peers=args.peers)
        if optimizer == "muon" and jax.default_backend() == "cpu":
            fits = min(fits, MUON_ON_CPU)
        if fits < size < math.inf:
            print(f"{tree}, {optimizer}, {dtype}: {fits:,} parameters, as {size:,.0f} are too many")
        shapes = shapes_of(tree, int(min(size, fits)))
        found.append(Group(tree, shapes, dtype, optimizer, args.devices))
    return [*{str(group): group for group in found}.values()]


def main() -> None:
    """Reads the options, measures, prints and writes."""
    args = options()
    if args.readme:
        sys.exit(_results.insert_table(args.results, args.readme))
    if args.devices > 1:
        pretend(args.devices)
    jax.config.update("jax_enable_compilation_cache", False)  # noqa: FBT003 - it is JAX's own
    device = _results.device(args.devices)
    print(_results.line(device))
    how = How(
        args.rounds, args.seconds, args.compiles, args.peers, not args.no_eager, args.profile,
        args.beside,
    )  # fmt: skip
    work = [(g, select(args.variants, g.optimizer, peers=args.peers)) for g in groups_of(args)]
    ticks = sum(len(c) + how.rounds + max(3, how.rounds // 3) + 2 * WARMUP for _, c in work)
    rows = []
    with _report.progress(ticks) as tick:
        for group, candidates in work:
            rows += run_group(group, candidates, how, tick)
    _report.report(rows)
    given = {name: str(value) for name, value in vars(args).items() if name != "results"}
    results = {**device, "arguments": given, "rows": rows}
    if args.json:
        _results.write(args.json, results)
    if args.save:
        with turn(args.beside, alone=True):
            print("saved:", _results.merge(args.results, results))
    if args.plot and (reason := _plot.draw(rows, _results.line(device), args.plot)):
        print(reason)


def pretend(devices: int) -> None:
    """Has a CPU be several devices; XLA reads this when JAX first needs one."""
    flags = os.environ.get("XLA_FLAGS", "").split()
    name = "--xla_force_host_platform_device_count"
    kept = [flag for flag in flags if not flag.startswith(name)]
    os.environ["XLA_FLAGS"] = " ".join([*kept, f"{name}={devices}"])
    if len(jax.devices()) < devices:
        sys.exit(f"--devices {devices}: there are {len(jax.devices())} here")


if __name__ == "__main__":
    main()
