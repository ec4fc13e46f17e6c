"""Every law on every variant and every structure, with fresh cases until the time is over.

A case is one drawn tree, with the steps before it, through one law on one variant; those that a
law does not speak about are not counted. A violation is shrunk and printed with what repeats it.

    python tests/fuzz.py --minutes 10
    python tests/fuzz.py --minutes 10 --seed 7 --workers 2
    python tests/fuzz.py --law bound --variant zclip --structure half
    python tests/fuzz.py --law bound --variant zclip --structure half --case 0,0,normal,0,0,1
"""

import argparse
import collections
import contextlib
import datetime as dt
import importlib.metadata
import multiprocessing
import os
import platform
import random
import secrets
import signal
import sys
import time

os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")

import hypothesis
import jax
from hypothesis import HealthCheck, Phase, Verbosity
from laws import LAWS
from rich.console import Console
from rich.table import Table
from runs import ALL
from strategies import STRUCTURES, Case, cases

PACKAGES = ("optaxclip", "jax", "optax", "hypothesis", "numpy")
QUIET = hypothesis.settings(
    database=None,
    deadline=None,
    report_multiple_bugs=False,
    suppress_health_check=list(HealthCheck),
    verbosity=Verbosity.quiet,
)
CONSOLE = Console(width=100, highlight=False)
LAST_WORDS = 20  # lines of an error that are worth reading


class TimeIsUp(BaseException):
    """Not an Exception, so that Hypothesis does not take it for a violation."""


def main():
    args = _arguments()
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    jax.config.update("jax_numpy_rank_promotion", "raise")
    if args.case is not None:
        return _repeat(args)
    seed = secrets.randbelow(2**32) if args.seed is None else args.seed
    CONSOLE.out(f"seed {seed}")
    start = time.monotonic()
    if args.workers == 1:
        found = [fuzz(args, seed)]
    else:
        with multiprocessing.get_context("spawn").Pool(args.workers) as pool:
            found = pool.starmap(fuzz, [(args, seed + i) for i in range(args.workers)])
    counts = sum((count for count, _ in found), collections.Counter())
    violations = [violation for _, own in found for violation in own]
    _print_table(counts, violations, seed, time.monotonic() - start)
    return 1 if violations else 0


def fuzz(args, seed):
    """The cases by law, and the violations, until the time is over."""
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    jax.config.update("jax_numpy_rank_promotion", "raise")
    chance, counts, violations = random.Random(seed), collections.Counter(), {}
    places = [
        (variant, structure)
        for variant in ALL
        for structure in STRUCTURES
        if args.variant in (None, variant) and args.structure in (None, structure)
    ]
    with contextlib.suppress(TimeIsUp), _time_limit(60 * args.minutes):
        while True:
            # All laws of one place together, for they share its program.
            for variant, structure in chance.sample(places, len(places)):
                for law in _laws_of(args, variant, structure):
                    if (law, variant) in violations:
                        continue  # one example of each is enough

                    def check(case, law=law, variant=variant, structure=structure):
                        LAWS[law].check(variant, structure, case)
                        counts[law] += 1

                    error = smallest(check, args.examples, chance.getrandbits(64))
                    if error is not None:
                        violations[law, variant] = (law, variant, structure, *error)
                        CONSOLE.out(_described(violations[law, variant]))
    return counts, list(violations.values())


def _laws_of(args, variant, structure):
    return [
        name
        for name, law in LAWS.items()
        if args.law in (None, name) and variant in law.variants and structure in law.structures
    ]


def smallest(check, examples, seed):
    """The smallest case that fails a check, and how it does; None if all pass."""
    last = None

    @hypothesis.seed(seed)
    @hypothesis.settings(QUIET, max_examples=examples, phases=[Phase.generate, Phase.shrink])
    @hypothesis.given(cases())
    def holds(case):
        nonlocal last
        last = case
        check(case)

    try:
        holds()
    except Exception as error:  # noqa: BLE001 what is raised beside AssertionError is news too
        return last, f"{type(error).__name__}: {error}"
    return None


@contextlib.contextmanager
def _time_limit(seconds):
    def stop(*_):
        raise TimeIsUp

    def unraisable(found):  # where Python cannot raise, as in a callback of the garbage collector
        if found.exc_type is not TimeIsUp:
            sys.__unraisablehook__(found)

    sys.unraisablehook = unraisable
    signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds, 1)  # every second from then on, for that reason
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def _described(violation):
    law, variant, structure, case, message = violation
    numbers = ",".join(map(str, case))
    lines = "\n    ".join(message.splitlines()[:LAST_WORDS])
    return (
        f"\n{law!r} does not hold for {variant} on {structure}: {case}\n    {lines}\n"
        f"repeat: python tests/fuzz.py --law {law!r} --variant {variant!r} "
        f"--structure {structure} --case={numbers}\n"
    )


def _repeat(args):
    @hypothesis.example(args.case)
    @hypothesis.settings(QUIET, phases=[Phase.explicit])
    @hypothesis.given(cases())
    def holds(case):
        LAWS[args.law].check(args.variant, args.structure, case)

    holds()
    CONSOLE.out("holds, or the law does not speak about it")
    return 0


def _print_table(counts, violations, seed, seconds):
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES)
    now = dt.datetime.now(dt.UTC)
    table = Table("law")
    table.add_column("cases", justify="right")
    table.add_column("violations", justify="right")
    broken = collections.Counter(law for law, *_ in violations)
    for law in LAWS:
        table.add_row(law, f"{counts[law]:,}", str(broken[law]), style="red" if broken[law] else "")
    CONSOLE.print(table)
    CONSOLE.out(f"{counts.total():,} cases in {seconds / 60:.1f} minutes, seed {seed}")
    CONSOLE.out(f"{now:%Y-%m-%d}, Python {platform.python_version()}, {versions}")


def _arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, help="by default a new one, which is printed")
    parser.add_argument("--workers", type=int, default=1, help="processes, each with its own seed")
    parser.add_argument("--examples", type=int, default=100, help="cases before the next law")
    parser.add_argument("--law", choices=LAWS)
    parser.add_argument("--variant", choices=ALL)
    parser.add_argument("--structure", choices=STRUCTURES)
    parser.add_argument("--case", type=_case, help="the numbers of one case, to repeat it")
    args = parser.parse_args()
    if args.case is not None and None in (args.law, args.variant, args.structure):
        parser.error("--case needs --law, --variant and --structure")
    return args


def _case(text):
    numbers = text.split(",")
    return Case(
        *(x if name == "kind" else int(x) for name, x in zip(Case._fields, numbers, strict=True))
    )


if __name__ == "__main__":
    sys.exit(main())
