"""What the limits of the adaptive clippers do, side by side on one stream of gradient norms.

The norms scatter by 10 % around 1. Step 600 is ten times as large, steps 700 to 704 are too, step
800 is NaN, and from step 900 on all are twice as large. Every clipper has its default setting.

    python examples/thresholds.py --seed 0 --out out/thresholds

It prints a table and writes a picture of steps 500 to 1299. The columns of the table:

* quiet clipped: the share of steps 200 to 599, which are noise only, that is clipped at all;
* factor of the spike, of the first and the last of the burst: what the gradient is multiplied by;
* doubling passes: after how many steps 20 of the next 25 factors are at least 0.98, which says
  little of what clips more than that when quiet: see in the picture where the limit goes;
* changed by NaN: how many later steps have another limit or factor than without the NaN.

With seed 0, `clip_by_percentile`, `clip_by_quantile`, `zclip` and `clip_by_sigma` clip some quiet
steps, let the doubling pass within 22, and of a spike less than 0.15. `clip_by_ema_ratio` and
`clip_by_second_moment` clip no quiet step, let the doubling pass at once, and more of a spike.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import NullLocator
from PIL import Image
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

import optaxclip

STEPS, NOISE = 1300, 0.1  # how long the stream is, and the deviation of its log norms
SPIKE, BURST, BAD, RISE = 600, range(700, 705), 800, 900  # steps are counted from 0
STEADY = slice(200, 600)  # every clipper has its limit by then, and nothing has happened yet
PASSES, ENOUGH, OUT_OF = 0.98, 20, 25  # factors of at least 0.98, in 20 of the next 25 steps

NAMES = (
    "clip_by_global_norm", "clip_by_percentile", "autoclip", "clip_by_quantile", "zclip",
    "clip_by_sigma", "clip_by_ema_ratio", "adagc", "clip_by_norm_growth", "clip_by_second_moment",
    "stabilize_gradients",
)  # fmt: skip
NORMALIZER = NAMES[-1]
NOTES = {
    "clip_by_global_norm": "fixed, for comparison",
    "clip_by_second_moment": "limit per entry, times √4",
}
# Three of Okabe and Ito's colours, which the colour-blind can tell apart.
PASSED, CLIPPED, LIMIT, OUT = "#B5B5B5", "#D55E00", "#0072B2", "#009E73"


class Run(NamedTuple):
    """What one clipper did."""

    name: str
    limit: np.ndarray  # of the norm of the whole gradient, one per step; inf where there is none
    factor: np.ndarray  # what the gradient was multiplied by, one per step
    changed: int  # steps after the NaN that went otherwise than they would have without it

    @property
    def clipped(self) -> str:
        """Share of the steps that are clipped where the norms are only noisy."""
        return f"{100 * (self.factor[STEADY] < 1).mean():.1f} %"

    @property
    def waits(self) -> str:
        """After how many steps of the lasting rise most of the next ones pass."""
        passes = self.factor[RISE:] >= PASSES
        most = np.lib.stride_tricks.sliding_window_view(passes, OUT_OF).sum(-1) >= ENOUGH
        return str(most.argmax()) if most.any() else f">{len(most) - 1}"


def stream(seed: int) -> np.ndarray:
    """The norms: noise, a spike, a burst of spikes, a NaN, and a rise that lasts."""
    norms = np.random.default_rng(seed).lognormal(0, NOISE, STEPS)
    norms[[SPIKE, *BURST]] *= 10
    norms[BAD] = np.nan
    norms[RISE:] *= 2
    return norms.astype(np.float32)


def run(name: str, norms: np.ndarray) -> Run:
    """Sends the stream through a clipper, as gradients, and reads its metrics at every step."""
    tx = getattr(optaxclip, name)()
    unit = jnp.full(4, 0.5)  # a gradient of norm 1
    measured = 0.5 if name == "clip_by_second_moment" else 1.0  # of it

    def step(state: Any, norm: jax.Array) -> tuple[Any, jax.Array]:
        _, state = tx.update(norm * unit, state)
        metrics = optaxclip.metrics(state)
        # AdaGC's two clips have names in front; one of both lets everything pass.
        limits = [metrics[key] for key in metrics if key.endswith("limit")]
        factors = [metrics[key] for key in metrics if key.endswith("factor")]
        return state, jnp.stack([jnp.stack(limits).min() / measured, jnp.stack(factors).prod()])

    scan = jax.jit(lambda norms: jax.lax.scan(step, tx.init(unit), norms)[1].T)
    did = np.asarray(scan(norms))
    # Another norm at the end keeps the length, so that nothing is compiled anew.
    would = np.asarray(scan(np.append(np.delete(norms, BAD), norms[-1])))
    changed = (did[:, BAD + 1 :] != would[:, BAD:-1]).any(axis=0)
    return Run(name, *did, changed=int(changed.sum()))


def table(runs: list[Run]) -> Table:
    """The runs side by side."""
    out = Table("clipper", box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
    headings = ("quiet\nclipped", "factor,\nspike", "burst,\nfirst", "burst,\nlast")
    for heading in (*headings, "doubling\npasses", "changed\nby NaN"):
        out.add_column(heading, justify="right")
    for one in runs:
        factors = (f"{one.factor[i]:.3f}" for i in (SPIKE, BURST[0], BURST[-1]))
        clipped, waits = ("-", "-") if one.name == NORMALIZER else (one.clipped, one.waits)
        out.add_row(one.name, clipped, *factors, waits, str(one.changed))
    return out


def draw(runs: list[Run], norms: np.ndarray, seed: int, path: Path) -> None:
    """Writes the picture: the stream, and what each clipper makes of it."""
    figure = Figure((9.2, 8.2), layout="constrained")
    rows = figure.subplots(4, 3, sharex=True, sharey=True)
    draw_stream(rows[0, 0], norms)
    for axes, one in zip(rows.flat[1:], runs, strict=True):
        draw_run(axes, norms, one)
    rows[-1, 1].set_xlabel("step")
    figure.supylabel("gradient norm", fontsize=10)
    figure.suptitle(f"Ten clippers and a normaliser on one stream of gradient norms, seed {seed}")
    marks = [
        Line2D([], [], color=PASSED, linestyle="", marker=".", label="norm"),
        Line2D([], [], color=CLIPPED, linestyle="", marker=".", label="norm of a clipped step"),
        Line2D([], [], color=LIMIT, label="limit (gap: none)"),
        Line2D([], [], color=OUT, linestyle="--", label="norm that comes out"),
    ]
    figure.legend(handles=marks, loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path, dpi=175)
    with Image.open(path) as picture:  # a palette makes the file a third as large
        picture.convert("RGB").quantize(128).save(path, optimize=True)


def draw_stream(axes: Axes, norms: np.ndarray) -> None:
    """The norms, what happens to them, and the scales of all panels."""
    draw_norms(axes, norms, np.zeros(STEPS, bool))
    axes.set(yscale="log", yticks=(0.5, 1, 2, 5, 10, 20), ylim=(0.45, 20), xlim=(500, STEPS))
    axes.yaxis.set(major_formatter="{x:g}", minor_locator=NullLocator())
    axes.text(SPIKE, 11, "spike", ha="center", fontsize=8.5)
    axes.text(BURST[-1] + 15, 9, "burst of five", fontsize=8.5)
    axes.text(BAD + 20, 0.5, "NaN", color=CLIPPED, fontsize=8.5)
    axes.text(RISE + 20, 3.2, "doubling, for good", fontsize=8.5)
    axes.set_title("the stream", loc="left", fontsize=10)


def draw_run(axes: Axes, norms: np.ndarray, one: Run) -> None:
    """The norms, the limit, and the steps that are clipped; of the normaliser, what comes out."""
    words = f"clips {one.clipped} of quiet steps\ndoubling passes after {one.waits}"
    clipped, line, style = one.factor < 1, one.limit, {"color": LIMIT}
    if one.name == NORMALIZER:
        words = "no clip: any constant\nnorm comes out as 1"
        clipped, line = np.zeros(STEPS, bool), norms * one.factor
        style = {"color": OUT, "linestyle": "--"}
    draw_norms(axes, norms, clipped)
    axes.plot(line, **style, linewidth=1.2)
    corner = {"transform": axes.transAxes, "ha": "right", "fontsize": 8.5}
    axes.text(0.97, 0.95, words, va="top", **corner)
    axes.text(0.97, 0.05, NOTES.get(one.name, ""), va="bottom", **corner)
    axes.set_title(one.name, loc="left", fontsize=10, fontweight="bold")


def draw_norms(axes: Axes, norms: np.ndarray, clipped: np.ndarray) -> None:
    """A dot per step, a line per event, and a cross for the NaN."""
    for event in (SPIKE, BURST[0], BAD, RISE):
        axes.axvline(event, color="0.88", linewidth=0.8, zorder=0)
    for chosen, colour in ((~clipped, PASSED), (clipped, CLIPPED)):
        axes.plot(np.where(chosen, norms, np.nan), ".", color=colour, markersize=2)
    axes.plot(BAD, 0.04, "X", color=CLIPPED, transform=axes.get_xaxis_transform(), markersize=5)


def main() -> None:
    """Runs, shows, writes."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("out/thresholds"), help="folder")
    parser.add_argument("--seed", type=int, default=0, help="of the norms (%(default)s)")
    args, console = parser.parse_args(), Console()
    norms = stream(args.seed)
    runs = [run(name, norms) for name in NAMES]
    console.print(table(runs))
    args.out.mkdir(parents=True, exist_ok=True)
    picture = args.out / "thresholds.png"
    draw(runs, norms, args.seed, picture)
    console.print(f"wrote {picture}", soft_wrap=True)


if __name__ == "__main__":
    main()
