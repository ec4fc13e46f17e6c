"""The compatibility matrix: every check on every variant.

    python tests/matrix.py              prints the whole table, and writes out/compatibility.md
    python tests/matrix.py zclip adagc  of these variants only

A cell is "ok", or "no: " and the reason, which stands in the table below with the error that such
a cell must raise. Where a cell is neither, the program ends with 1. A check joins by a function
with one line of docstring in a file of checks/, and one row here.
"""

import argparse
import pathlib
import pickle
import re
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from typing import NamedTuple

import jax
from checks import frameworks, leaves, states, transformations, wrappers
from rich import box
from rich.console import Console
from rich.table import Table
from roster import BEYOND, EVERY

WIDTH = 110  # of the table
OUT = pathlib.Path(__file__).resolve().parents[1] / "out" / "compatibility.md"

ROWS = EVERY | BEYOND
OF_PARAMS = [name for name, row in EVERY.items() if row.params]
UNITS = [name for name, row in EVERY.items() if row.groups == "unit"]
LEARNING = [name for name, row in EVERY.items() if row.memory]
FIXED = [name for name, row in EVERY.items() if not row.memory]


class No(NamedTuple):
    """Why a variant does not pass a check, and what it raises then."""

    why: str
    error: type[Exception] | tuple[type[Exception], ...]
    says: str  # to be found in the message
    variants: tuple[str, ...] = tuple(ROWS)


class Check(NamedTuple):
    """One row."""

    run: Callable[..., None]  # a row of the roster -> None, or an error
    no: tuple[No, ...] = ()
    compiles: bool = True  # a program of its own; else what all checks share

    @property
    def name(self):
        """As it is called in its file."""
        return self.run.__name__

    def refusal(self, variant):
        """The reason not to pass, if there is one."""
        return next((no for no in self.no if variant in no.variants), None)


def shared(run, *no):
    """A check that compiles nothing but what others have compiled."""
    return Check(run, no, compiles=False)


def own(run, *no):
    """A check that compiles a program of its own."""
    return Check(run, no)


CLOSURES = "a transformation is two closures, as all of Optax's are"
SPECTRAL = [name for name, row in BEYOND.items() if row.groups == "matrix"]
SCHEDULED = [*LEARNING, "clippy"]
SCHEDULED.remove("scale_by_stable_adam")
SCHEDULED.remove("auto_clip")  # whose first number is a limit

SECTIONS = {
    "transformations": [
        own(transformations.eager),
        shared(transformations.jit),
        own(transformations.scan),
        own(transformations.vmap),
        own(transformations.vmap_over_thresholds),
        own(transformations.derivatives),
        own(transformations.derivatives_at_zero),
        own(transformations.cond),
        own(transformations.remat),
        shared(transformations.eval_shape),
        shared(transformations.promotion),
        own(transformations.disable_jit),
        own(transformations.debug_nans),
        shared(
            transformations.debug_infs,
            No("a limit of inf says that there is none, or none yet", FloatingPointError, "inf"),
        ),
        own(transformations.checking_leaks),
        shared(transformations.transfer_guard),
        own(transformations.transfer_guard_eager),
    ],
    "Optax": [
        own(wrappers.chain),
        own(wrappers.named_chain),
        own(wrappers.masked),
        own(wrappers.partition),
        own(wrappers.multi_steps),
        own(wrappers.multi_steps_that_skip),
        own(wrappers.apply_if_finite),
        own(wrappers.conditionally_transform),
        own(wrappers.inject_hyperparams),
        own(wrappers.inject_hyperparams_mixed),
        own(wrappers.injected_schedule),
        own(wrappers.flatten),
        own(wrappers.schedule_free),
        own(wrappers.mechanize),
        own(wrappers.reduce_on_plateau),
        own(wrappers.muon),
        own(wrappers.muon_partition),
        own(wrappers.lookahead),
        own(wrappers.sam),
    ],
    "frameworks": [
        own(frameworks.linen_train_state),
        own(frameworks.nnx_optimizer),
        own(frameworks.equinox_filtered),
        own(frameworks.haiku),
    ],
    "leaves and thresholds": [
        own(leaves.float8_e4m3fn),
        own(leaves.float8_e5m2),
        own(leaves.float16),
        own(leaves.bfloat16),
        own(leaves.bfloat16_of_float32),
        own(leaves.mixed_dtypes),
        own(leaves.float64),
        own(leaves.complex64),
        own(leaves.no_floats),
        own(leaves.float0),
        own(leaves.zero_size),
        own(leaves.scalar),
        own(leaves.python_float),
        own(leaves.empty_tree),
        own(
            leaves.rank_six,
            No("above rank 5 say with axis= what a unit is", ValueError, "ranks up to 5", UNITS),
            No("and with axes= what a matrix is", ValueError, "ranks up to 5", SPECTRAL),
        ),
        own(leaves.threshold_types),
        own(leaves.traced_threshold),
        own(
            leaves.schedule,
            No("put the schedule into inject_hyperparams", TypeError, "must be a", SCHEDULED),
        ),
        own(
            leaves.without_params,
            No("norms relative to parameters", ValueError, r"call update\(grads, ", OF_PARAMS),
        ),
    ],
    "state": [
        shared(states.pickled),
        shared(states.copied),
        shared(states.flax_bytes),
        shared(states.avals),
        own(states.donated),
        own(states.lowered),
        own(states.exported),
        shared(
            states.map_params,
            No(
                "Optax finds no parameters in a list of memories, one per leaf",
                ValueError,
                "different types",
                ["clip_by_second_moment", "clip_by_spectral_norm[power_iteration]"],
            ),
        ),
        shared(
            states.tree_get,
            No("it has a norm of its own, and so two are found", AssertionError, "", ["skip_step"]),
        ),
        shared(
            states.pickled_transformation,
            No(CLOSURES, (AttributeError, pickle.PicklingError), "local object"),
        ),
        shared(states.equal_configurations, No(CLOSURES, AssertionError, "not equal")),
    ],
}
CHECKS = {check.name: check for section in SECTIONS.values() for check in section}


def outcome(check, variant):
    """What the cell says; an error if that is not so."""
    no = check.refusal(variant)
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        try:
            check.run(ROWS[variant])
        except Exception as error:
            if no and isinstance(error, no.error) and re.search(no.says, str(error)):
                return f"no: {no.why}"
            raise
    if no:
        raise AssertionError(f"it works now: take the reason {no.why!r} out of the table")
    return "ok"


# The variants that try what compiles in every run: those of a section share programs.
QUICK = {
    "transformations": ("clip_by_global_norm", "clip_by_quantile"),
    "Optax": ("clip_by_norm", "clip_by_norm_growth"),
    "frameworks": ("adaptive_grad_clip", "scale_by_stable_adam"),
    "leaves and thresholds": ("clip_by_value", "clip_by_norm_growth"),
    "state": ("adaptive_grad_clip", "scale_by_stable_adam"),
}


def quick():
    """Cells for every run: all that are cheap, and of the others two each."""
    cells = {
        (check.name, variant)
        for title, section in SECTIONS.items()
        for check in section
        for variant in ROWS
        if not check.compiles or check.refusal(variant) or variant in QUICK[title]
    }
    # Variant by variant, because programs are shared within one.
    return [(name, variant) for variant in ROWS for name in CHECKS if (name, variant) in cells]


def table(cells, variants):
    """All cells as a table for people, with the reasons below it."""
    reasons = sorted({text for text in cells.values() if text != "ok"})
    shown = {"ok": "[green]ok", **{text: f"[red]{i}" for i, text in enumerate(reasons, 1)}}
    out = Table(title=f"{len(cells)} cells", header_style="", box=box.SIMPLE, padding=(0, 1, 0, 0))
    out.add_column("check", no_wrap=True)
    for variant in variants:
        out.add_column("\n".join(variant), vertical="bottom", justify="center")
    for section in SECTIONS.values():
        for check in section:
            out.add_row(check.name, *(shown[cells[check.name, variant]] for variant in variants))
        out.add_section()
    return out, [f"{i}  {text}" for i, text in enumerate(reasons, 1)]


def markdown(cells, variants):
    """The same as Markdown, with the sentence that a check states, and whole cells."""
    lines = ["| check | " + " | ".join(variants) + " |", "|---" * (len(variants) + 1) + "|"]
    for name, check in CHECKS.items():
        row = [f"`{name}`: {check.run.__doc__}", *(cells[name, variant] for variant in variants)]
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines) + "\n"


def main():
    """Runs every check on the variants that are named, or on all."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("variants", nargs="*", metavar="variant", help="such as zclip; or all")
    variants = parser.parse_args().variants or list(ROWS)
    if unknown := set(variants) - ROWS.keys():
        parser.error(f"no variant {', '.join(sorted(unknown))}; there are {', '.join(ROWS)}")
    warnings.simplefilter("error")
    console, begin, cells = Console(), time.perf_counter(), {}
    console.width = max(console.width, WIDTH)
    with console.status("") as status:
        for variant in variants:
            for name, check in CHECKS.items():
                status.update(f"{variant}: {name}")
                try:
                    cells[name, variant] = outcome(check, variant)
                except Exception as error:  # noqa: BLE001 - that is a cell, too
                    console.print_exception() if console.is_terminal else traceback.print_exc()
                    cells[name, variant] = f"failed: {type(error).__name__}"
    out, reasons = table(cells, variants)
    console.print(out, *reasons, sep="\n")
    console.print(f"{time.perf_counter() - begin:.0f} s")
    OUT.parent.mkdir(exist_ok=True)
    OUT.write_text(markdown(cells, variants), encoding="utf-8")
    return any(text.startswith("failed") for text in cells.values())


if __name__ == "__main__":
    sys.exit(main())
