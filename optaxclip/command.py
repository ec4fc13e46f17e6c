"""file --> terminal: the command `optaxclip`, for norms that a training job has logged.

    optaxclip advise run.csv --plot advice.png      which limit to take, and the line of code for it
    optaxclip replay run.csv --with zclip,autoclip  what clippers would have done
    optaxclip variants                              all clippers, a sentence each

What is wrong with a file or an argument is one sentence, and the exit status 2.
"""

from __future__ import annotations

import argparse
import inspect
import math
import os
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import optax

from . import measure, plot, variants
from .advise import ABOVE, Advice, promise, recommend_threshold
from .logs import Run, read_run
from .replaying import Replay, replay
from .stable_adam import scale_by_stable_adam

COLUMNS = 80
CLIP_RATE, MOST = 0.05, 0.5  # share of steps, unless said otherwise; and the largest
MOVING = ("drifting", "two regimes")  # kinds of norms that no fixed limit fits for long
SHOWN_RATES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5)
WHOLE = "*"  # after what is not of the whole tree by default
OTHERS_SHOWN = 4  # runs that are not read
REPLAYED = "clip_by_global_norm,auto_clip,clip_by_percentile,zclip,autoclip"

VARIANTS: dict[str, Callable[..., optax.GradientTransformation]] = {
    **dict(inspect.getmembers(variants, inspect.isfunction)),
    "scale_by_stable_adam": scale_by_stable_adam,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
      argv: the words after its name; None: those of the command line.

    Returns:
      The exit status: 0, or 2 if a file or an argument is not what it should be.

    Example:
      >>> main(["advise", "missing.csv"])
      2
    """
    args = _arguments(argv)
    try:
        for line in args.lines(args):
            sys.stdout.write(f"{line}\n")
        sys.stdout.flush()
    except BrokenPipeError:  # who reads has read enough, such as `head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (OSError, ImportError, TypeError, ValueError) as error:
        sys.stderr.write(f"optaxclip: {error}\n")
        return 2
    return 0


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "optaxclip", description="What gradient clipping would do to norms that were logged."
    )
    commands = parser.add_subparsers(required=True, metavar="command")
    advise = _reading(commands, "advise", "which limit to take", _advise)
    advise.add_argument(
        "--clip-rate", type=float, metavar="SHARE",
        help=f"of the steps to be clipped ({CLIP_RATE:g}, or what so few norms allow)",
    )  # fmt: skip
    replaying = _reading(commands, "replay", "what clippers would have done", _replay)
    replaying.add_argument(
        "--with", dest="names", default=REPLAYED, metavar="NAMES",
        help="variants, with =threshold if wanted (%(default)s)",
    )  # fmt: skip
    listing = commands.add_parser("variants", help="all clippers, a sentence each")
    listing.set_defaults(lines=_variants)
    return parser.parse_args(argv)


def _reading(commands: Any, name: str, words: str, lines: Callable[..., Any]) -> Any:
    """A command that reads a log."""
    parser = commands.add_parser(name, help=words, description=words)
    parser.set_defaults(lines=lines)
    parser.add_argument("log", help="a CSV, JSONL or TensorBoard file, or a folder of the last")
    parser.add_argument("--column", help="with the norms before clipping (by its name)")
    parser.add_argument(
        "--where", action="append", default=[], type=_condition, metavar="COLUMN=VALUE",
        help="what rows must have; may be given several times",
    )  # fmt: skip
    parser.add_argument("--run", type=int, metavar="N", help="of several, from 1 (the longest)")
    parser.add_argument("--plot", metavar="FILE", help="write a picture, such as advice.png")
    return parser


def _condition(text: str) -> tuple[str, str]:
    column, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"must be COLUMN=VALUE; got {text!r}")
    return column, value


def _read(args: argparse.Namespace) -> Run:
    columns = [column for column, _ in args.where]
    if twice := [column for column in columns if columns.count(column) > 1]:
        raise ValueError(f"--where must name each column once; got {twice[0]!r} twice or more")
    return read_run(args.log, column=args.column, where=dict(args.where), run=args.run)


def _about(run: Run) -> Iterator[str]:
    """What was read, and what was not."""
    yield from _wrapped(f"{run.source}: {len(run.norms)} norms in the column {run.column!r}.")
    bad = int(np.sum(~np.isfinite(run.norms)))
    if bad:
        yield f"Not finite: {bad}."
    if len(run.labels) > 1:
        places = {f"--run {i}": label for i, label in enumerate(run.labels, 1)}
        others = [f"{i} ({label})" for i, label in places.items() if label != run.label]
        more = [f"and {len(others) - OTHERS_SHOWN} more"] if len(others) > OTHERS_SHOWN else []
        yield from _wrapped(
            f"They are of run {run.labels.index(run.label) + 1} of {len(run.labels)}: {run.label}. "
            f"Others are {', '.join(others[:OTHERS_SHOWN] + more)}."
        )
    elif run.label:
        yield f"They are of {run.label}."
    yield ""


# --------------------------------------------------------------------------------- advise


def _advise(args: argparse.Namespace) -> Iterator[str]:
    run = _read(args)
    usual = run.norms[np.isfinite(run.norms) & (run.norms > 0)]
    fewest = math.ceil(100 * ABOVE / usual.size) / 100  # the least rate that so many norms allow
    rate = min(max(CLIP_RATE, fewest), MOST) if args.clip_rate is None else args.clip_rate
    advice = recommend_threshold(run.norms, clip_rate=rate)
    yield from _about(run)
    yield f"Your threshold should be about {advice.limit:.3g}."
    yield f"It {promise(advice, clip_rate=rate, steps=run.norms.size)}."
    if args.clip_rate is None and rate > CLIP_RATE:
        yield f"(For {_percent(CLIP_RATE)}, it takes {ABOVE / CLIP_RATE:.0f} norms.)"
    yield ""
    yield from _wrapped(f"{advice.kind}: {advice.reason}")
    yield ""
    yield from _curve(advice, rate)
    yield ""
    yield from _code(usual, advice, rate)
    if args.plot:
        plot.recommendation(run, clip_rate=rate, path=args.plot)
        yield from ("", f"wrote {args.plot}")


def _code(usual: np.ndarray, advice: Advice, rate: float) -> Iterator[str]:
    """What to write into a program."""
    yield "In front of the optimizer:"
    yield f"    optax.chain(optaxclip.clip_by_global_norm({advice.limit:.5g}), optimizer)"
    if advice.kind in MOVING:
        # Before it has learned a limit, a percentile lets everything pass but for a ceiling.
        most = max(advice.limit, float(np.quantile(usual, 1 - rate)))
        percentile = f"{100 * (1 - rate):.3g}, max_norm={most:.5g}"
        yield "or, to follow the norms:"
        yield f"    optax.chain(optaxclip.clip_by_percentile({percentile}), optimizer)"


def _curve(advice: Advice, rate: float) -> Iterator[str]:
    """Which limit clips how often, as far as there are norms enough."""
    yield f"{'clips':>8}  {'limit':>10}"
    known = [*advice.curve.rates, rate]
    shown = {x for x in SHOWN_RATES if min(known) < x < max(known)} | {rate}
    for one in sorted(shown):
        at = np.interp(one, advice.curve.rates, advice.curve.limits)
        limit = advice.limit if one == rate else at
        yield f"{_percent(one):>8}  {limit:>10.5g}{'  <' if one == rate else ''}"


# --------------------------------------------------------------------------------- replay


def _replay(args: argparse.Namespace) -> Iterator[str]:
    run = _read(args)
    tried = dict(_replayed(run, text.strip()) for text in args.names.split(","))
    yield from _about(run)
    width = max(map(len, tried))
    yield f"{'':{width}}  {'steps':>8}  {'median':>9}  {'smallest':>9}  {'largest norm':>12}"
    yield f"{'':{width}}  {'clipped':>8}  {'limit':>9}  {'factor':>9}  {'after':>12}"
    finite = np.isfinite(run.norms)
    for name, did in tried.items():
        limits = did.limit[np.isfinite(did.limit)]
        median = f"{np.median(limits):.3g}" if limits.size else "none"
        yield (
            f"{name:{width}}  {_percent(did.clipped.mean()):>8}  {median:>9}  "
            f"{did.factor[finite].min():>9.3g}  {did.clipped_norm[finite].max():>12.3g}"
        )
    if any(name.endswith(WHOLE) for name in tried):
        yield f"{WHOLE} of leaves or entries by default; here of the whole tree, as the norms are"
    yield ""
    yield from _wrapped("A run that is clipped takes other steps, and then has other norms.")
    if args.plot:
        limits = {name: did.limit for name, did in tried.items()}
        plot.limits(run, limits, path=args.plot)
        yield from ("", f"wrote {args.plot}")


def _replayed(run: Run, text: str) -> tuple[str, Replay]:
    """What a variant would have done; by the norm of the whole tree, if it can."""
    name, equals, value = text.partition("=")
    if name not in VARIANTS:
        raise ValueError(f"no clipper {name!r}; it is one of {', '.join(VARIANTS)}")
    try:
        first = [float(value)] if equals else []
    except ValueError:
        raise ValueError(f"{text}: the threshold must be a number; got {value!r}") from None
    make = VARIANTS[name]
    try:
        clipper = make(*first)
        try:
            return text, replay(run.norms, clipper)
        except ValueError:
            if "measure" not in inspect.signature(make).parameters:
                raise
        return text + WHOLE, replay(run.norms, make(*first, measure=measure.global_norm()))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{text}: {error}") from None


# ------------------------------------------------------------------------------- variants


def _variants(args: argparse.Namespace) -> Iterator[str]:
    for name, make in VARIANTS.items():
        yield name
        sentence = (inspect.getdoc(make) or "").partition("\n\n")[0]
        yield from _wrapped(sentence, "    ")


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"


def _wrapped(words: str, indent: str = "") -> list[str]:
    """Lines that fit a terminal; file names stay whole, to be copied."""
    return textwrap.wrap(
        words, COLUMNS, initial_indent=indent, subsequent_indent=indent,
        break_long_words=False, break_on_hyphens=False,
    )  # fmt: skip
