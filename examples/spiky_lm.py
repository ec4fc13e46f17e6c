"""Clippers compared on a small transformer, some of whose batches are corrupted.

A causal transformer of one layer learns English by AdamW with a warm-up and a cosine decay. A few
of its batches, by default 3 % of them, from the first step on, are of three kinds in equal shares:

* garbage: characters drawn at random, as of a binary file among the texts;
* x 1000: a good batch whose loss is 1000 times too large, as by a mean over a nearly empty mask;
* NaN: a good batch whose loss is NaN, as by an overflow in low precision.

Every clipper has its default setting, and starts from the same parameters and sees the same
batches, seed by seed. Against them: `global_norm` at fixed limits, from much too small to much too
large; `finite`, which only drops gradients that are not finite; `none`; and `skip_step`.

    python examples/spiky_lm.py
    python examples/spiky_lm.py --loss-scale 0.03 --clippers auto,adagc,quantile,global_norm=1
    python examples/spiky_lm.py --full --out out/full

It prints a table, sorted, and writes it as a picture. `rise` is the validation loss in bits per
character over that of the same seed without corruption and without clipping, mean and worst of the
seeds; `changed` are the shares of the steps that the clipper shrank or dropped. With the defaults,
300 steps and seeds 0 to 2, and with Python 3.11 and jax 0.10.2:

                       validation          rise       changed, %: garbage  x 1000  good
    skip_and_auto      3.106 (3.06-3.16)   -0.020  +0.014             100     100    16
    global_norm=0.3    3.109 (3.07-3.17)   -0.016  +0.024             100     100   100
    global_norm=0.1    3.109 (3.07-3.17)   -0.016  +0.024             100     100   100
    global_norm=1      3.110 (3.06-3.16)   -0.015  +0.020             100     100    15
    auto               3.110 (3.06-3.16)   -0.015  +0.020             100     100    15
    global_norm=3      3.121 (3.10-3.14)   -0.005  -0.002              12     100     2
    adagc              3.128 (3.09-3.18)   +0.002  +0.035             100     100    78
    global_norm=10     3.184 (3.17-3.20)   +0.058  +0.071               0     100     0
    quantile           3.371 (3.11-3.89)   +0.245  +0.750              88      80     4
    zclip              3.373 (3.11-3.89)   +0.247  +0.750              62      80     1
    ema_ratio          3.374 (3.11-3.89)   +0.248  +0.748             100      80     3
    sigma              3.378 (3.11-3.89)   +0.252  +0.749              38      80     1
    percentile         3.378 (3.12-3.89)   +0.252  +0.749              12      80     0
    autoclip           3.384 (3.11-3.92)   +0.258  +0.774             100      80    77
    skip_step          3.797 (3.64-3.89)   +0.671  +0.764              38      40     0
    finite             4.557 (3.89-5.54)   +1.431  +2.404               0       0     0
    none               3 of 3 diverged                                  0       0     0
    none, clean        3.126 (3.10-3.14)

What to see: what a limit does in the first steps decides. In seed 0 the very first batch is one
times 1000, and whoever learns the limit from the first 10 or 25 norms lets it into AdamW's second
moments, which do not forget it in 300 steps. On the other two seeds all adaptive clippers end
within 0.02 of clean, unclipped training. `skip_step` waits for 64 steps: put a clip inside of it.

What not to conclude: that a small limit is always right. AdamW divides the scale of gradients out
again, so every fixed limit below all norms is the same clipper, and none costs anything here. Ranks
that differ by less than 0.02 are noise. And that a limit of 1 is one for all: healthy norms happen
to be about 0.8 here, and `auto` has that limit. With `--loss-scale 0.03` all norms are 0.03 times
as large, and the mean rises are, for the same seeds:

    global_norm=0.01   -0.016      auto               +0.005
    global_norm=0.03   -0.015      adagc              +0.134
    global_norm=0.1    +0.002      quantile           +0.245, as before
    global_norm=1      +0.159

With `--full`, 800 steps and five seeds, three of which have a batch times 1000 in their first dozen
steps, the mean rises over 2.610 are: `skip_and_auto` -0.003, `adagc` +0.007, `global_norm=1` and
`auto` +0.012, smaller limits +0.015, `autoclip` +0.021, 3 +0.052, 10 +0.256, `quantile` and
`ema_ratio` +0.320, `zclip`, `sigma` and `percentile` about +0.49, `skip_step` +0.538.
"""

from __future__ import annotations

import argparse
import functools
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from _clippers import parse_clippers
from _plots import Ranked, draw_ranking, percent
from _text import Text, read_text
from flax import linen as nn
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

import optaxclip

BATCH, TIME, WIDTH, HEADS = 8, 32, 64, 4
WARMUP = 0.05  # share of the steps over which the learning rate rises
GOOD, GARBAGE, LARGE, NAN = range(4)  # kinds of batches
LOSS_SCALE = np.float32([1, 1, 1000, np.nan])  # by kind of batch

Optimizer = optax.GradientTransformation
Maker = Callable[..., Optimizer]  # of the optimizer inside and, if it is given, a threshold


def first(clip: Callable[..., Optimizer], *fixed: float, **options: Any) -> Maker:
    """The clipper before the optimizer: it sees only what that lets through."""
    return lambda inner, *threshold: optax.chain(clip(*fixed, *threshold, **options), inner)


CLIPPERS: dict[str, Maker] = {
    "none": first(optaxclip.clip_by_global_norm, math.inf, nonfinite="propagate"),
    "finite": first(optaxclip.clip_by_global_norm, math.inf),
    "global_norm": first(optaxclip.clip_by_global_norm),
    "auto": first(optaxclip.auto_clip),
    "percentile": first(optaxclip.clip_by_percentile),
    "autoclip": first(optaxclip.autoclip),
    "quantile": first(optaxclip.clip_by_quantile),
    "zclip": first(optaxclip.zclip),
    "sigma": first(optaxclip.clip_by_sigma),
    "ema_ratio": first(optaxclip.clip_by_ema_ratio),
    "adagc": first(optaxclip.adagc),
    "norm_growth": first(optaxclip.clip_by_norm_growth),
    "second_moment": first(optaxclip.clip_by_second_moment),
    "normalize": first(optaxclip.normalize_by_global_norm),
    "skip_step": lambda inner, k=6.0: optaxclip.skip_step(inner, k=k),
    "skip_and_auto": lambda inner, k=6.0: optaxclip.skip_step(
        optax.chain(optaxclip.auto_clip(), inner), k=k
    ),
}
QUICK = (
    "none,finite,global_norm=0.1,global_norm=0.3,global_norm=1,global_norm=3,global_norm=10,auto,"
    "percentile,autoclip,quantile,zclip,sigma,ema_ratio,adagc,skip_step,skip_and_auto"
)
ALL = (
    f"{QUICK},global_norm=0.01,global_norm=0.03,global_norm=30,norm_growth,second_moment,normalize"
)

OTHERS = ("none", "finite", "skip_step", "skip_and_auto", "normalize")


# ---------------------------------------------------------------------------------- the data


class Batches(NamedTuple):
    """What one seed trains on, step by step."""

    characters: np.ndarray  # (steps, batch, time + 1) int32
    kind: np.ndarray  # (steps,) int, GOOD and so on


def batches(text: Text, steps: int, rate: float, seed: int) -> Batches:
    """Chunks of the text in random order, some of them corrupted; good ones are so at any rate."""
    rng = np.random.default_rng(seed)
    characters = text.train[rng.integers(len(text.train), size=steps)]
    bad, which = rng.random(steps) < rate, rng.integers(GARBAGE, NAN + 1, size=steps)
    garbage = rng.integers(text.vocabulary, size=characters.shape, dtype=np.int32)
    kind = np.where(bad, which, GOOD)
    return Batches(np.where((kind == GARBAGE)[:, None, None], garbage, characters), kind)


# ------------------------------------------------------------------------------ the training


class Transformer(nn.Module):
    """Characters to logits of the next one: one causal layer, normalised before each part."""

    vocabulary: int

    @nn.compact
    def __call__(self, characters: jax.Array) -> jax.Array:
        """From (batch, time) to (batch, time, vocabulary)."""
        place = self.param("place", nn.initializers.normal(0.02), (TIME, WIDTH))
        x = nn.Embed(self.vocabulary, WIDTH)(characters) + place
        x += nn.MultiHeadDotProductAttention(HEADS)(
            nn.LayerNorm()(x), mask=nn.make_causal_mask(characters)
        )
        x += nn.Dense(WIDTH)(nn.gelu(nn.Dense(4 * WIDTH)(nn.LayerNorm()(x))))
        return nn.Dense(self.vocabulary)(nn.LayerNorm()(x))


def loss_of(net: Transformer, params: Any, characters: jax.Array) -> jax.Array:
    """The mean cross entropy in nats per character."""
    logits = net.apply(params, characters[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(logits, characters[:, 1:]).mean()


@functools.partial(jax.jit, static_argnames="net")
def begin(net: Transformer, seeds: jax.Array) -> Any:
    """Parameters of all seeds, stacked."""
    one = lambda seed: net.init(jax.random.key(seed), jnp.zeros((1, TIME), jnp.int32))
    return jax.vmap(one)(seeds)


# A program of its own, so that it is compiled once, and not for every clipper.
@functools.partial(jax.jit, static_argnames="net")
def gradients(
    net: Transformer, params: Any, characters: jax.Array, scale: jax.Array
) -> tuple[jax.Array, Any]:
    """The losses and gradients of all seeds."""

    def scaled(params: Any, characters: jax.Array, scale: jax.Array) -> jax.Array:
        return scale * loss_of(net, params, characters)

    return jax.vmap(jax.value_and_grad(scaled))(params, characters, scale)


class Training(NamedTuple):
    """How to train: hashable, so that what is compiled can depend on it."""

    make: Maker
    lr: float
    steps: int
    loss_scale: float = 1.0

    def optimizer(self, threshold: Any) -> optax.GradientTransformationExtraArgs:
        """AdamW with its clipper, which has its default threshold if that is None."""
        warmup = max(int(WARMUP * self.steps), 1)
        schedule = optax.warmup_cosine_decay_schedule(0.0, self.lr, warmup, self.steps)
        tx = self.make(optax.adamw(schedule), *([] if threshold is None else [threshold]))
        return optax.with_extra_args_support(tx)


# The threshold is traced, so that all of a clipper's are one program.
@functools.partial(jax.jit, static_argnames="training")
def begin_optimizer(training: Training, threshold: Any, params: Any) -> Any:
    """The optimizer states of all seeds."""
    return jax.vmap(training.optimizer(threshold).init)(params)


@functools.partial(jax.jit, static_argnames="training")
def update(
    training: Training, threshold: Any, state: Any, grads: Any, loss: jax.Array
) -> tuple[Any, jax.Array]:
    """One step of all seeds: parameters and optimizer states, and whether the clipper acted."""
    tx = training.optimizer(threshold)

    def one(state: Any, grads: Any, loss: jax.Array) -> tuple[Any, jax.Array]:
        params, opt_state = state
        updates, opt_state = tx.update(grads, opt_state, params, value=loss)
        metrics = optaxclip.metrics(opt_state)
        # AdaGC is two clips, "tree/clipped" and "leaf/clipped".
        did = [metrics[key] > 0 for key in metrics if key.endswith(("clipped", "skipped"))]
        return (optax.apply_updates(params, updates), opt_state), jnp.stack(did).any()

    return jax.vmap(one)(state, grads, loss)


@functools.partial(jax.jit, static_argnames="net")
def validate(net: Transformer, params: Any, characters: jax.Array) -> jax.Array:
    """The losses of all seeds in bits per character on text that was not trained on."""
    return jax.vmap(lambda params: loss_of(net, params, characters))(params) / math.log(2)


class Run(NamedTuple):
    """What one clipper did, with all seeds."""

    bits: np.ndarray  # (seeds,) validation loss in bits per character
    changed: np.ndarray  # (seeds, steps) bool, whether the step was shrunk or dropped


def train(
    training: Training, threshold: float | None, data: list[Batches], text: Text,
    advance: Callable[[], Any],
) -> Run:  # fmt: skip
    """Trains a model per seed, all at once."""
    net = Transformer(text.vocabulary)
    characters, kind = (np.stack(field, axis=1) for field in zip(*data, strict=True))
    params = begin(net, jnp.arange(len(data)))
    scale = training.loss_scale * LOSS_SCALE[kind]
    state, changed = (params, begin_optimizer(training, threshold, params)), []
    for step in range(training.steps):
        loss, grads = gradients(net, state[0], characters[step], scale[step])
        state, did = update(training, threshold, state, grads, loss)
        changed.append(did)
        advance()
    bits = validate(net, state[0], text.valid.reshape(-1, TIME + 1))
    return Run(np.asarray(bits), np.stack(changed, axis=1))


# ------------------------------------------------------------------------------- the results


def kind_of(name: str) -> str:
    """How the picture shows the clipper."""
    if name.startswith("global_norm"):
        return "fixed limit"
    return "other" if name in OTHERS else "adaptive"


def ranked(results: dict[str, Run], clean: Run, data: list[Batches]) -> list[Ranked]:
    """The best first; what is not finite last."""
    kind, rows = np.stack([one.kind for one in data]), []
    for name, run in results.items():
        shares = [share(run.changed[kind == k]) for k in (GARBAGE, LARGE, GOOD)]
        rows.append(Ranked(name, kind_of(name), run.bits, run.bits - clean.bits, shares))
    return sorted(rows, key=lambda row: np.nan_to_num(row.bits.mean(), nan=math.inf))


def share(changed: np.ndarray) -> float:
    """The share that is true; NaN of none."""
    return float(changed.mean()) if changed.size else math.nan


def table(rows: list[Ranked], clean: Run) -> Table:
    """The clippers side by side, the best first."""
    out = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, collapse_padding=True)
    out.add_column("clipper", no_wrap=True)
    headings = ("validation\nbits/char", "mean\nrise", "worst\nrise")
    headings += ("changed %\ngarbage", "\nx 1000", "\ngood")
    for heading in headings:
        out.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        rises = (f"{x:+.3f}" if np.isfinite(x) else "" for x in (row.rise.mean(), row.rise.max()))
        out.add_row(row.name, spread(row.bits), *rises, *map(percent, row.changed))
    out.add_section()
    out.add_row("none, clean", spread(clean.bits))
    return out


def spread(bits: np.ndarray) -> str:
    """The mean over the seeds, and the range."""
    if not np.isfinite(bits).all():
        return f"{(~np.isfinite(bits)).sum()} of {len(bits)} diverged"
    return f"{bits.mean():.3f} ({bits.min():.2f}-{bits.max():.2f})"


# ------------------------------------------------------------------------------- the program


def clipper_list(text: str) -> dict[str, tuple[Maker, float | None]]:
    """The argument of --clippers, checked: how to make each, and its threshold if it has one."""
    made = lambda make, threshold: Training(make, 1.0, 2).optimizer(threshold)
    return parse_clippers(text, CLIPPERS, made)


def arguments() -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--steps", type=int, default=300, help="of training (%(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="how many (%(default)s)")
    parser.add_argument("--lr", type=float, default=5e-3, help="learning rate (%(default)s)")
    parser.add_argument(
        "--rate", type=float, default=0.03, help="share of corrupted batches (%(default)s)"
    )
    parser.add_argument(
        "--loss-scale", type=float, default=1.0, help="a factor for all losses (%(default)s)"
    )
    parser.add_argument("--out", type=Path, default=Path("out/spiky_lm"), help="folder")
    parser.add_argument(
        "--clippers", type=clipper_list, default=QUICK,
        help=f"out of {', '.join(CLIPPERS)}, each with =threshold if wanted (%(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--full", action="store_true", help="all clippers, 5 seeds and 800 steps, if not given"
    )
    if parser.parse_args().full:
        parser.set_defaults(clippers=ALL, seeds=5, steps=800)
    args = parser.parse_args()
    if args.steps < 2 or args.seeds < 1 or not 0 <= args.rate <= 1:
        parser.error("--steps must be at least 2, --seeds at least 1, and --rate from 0 to 1")
    return args


def main() -> None:
    """Trains, shows, writes."""
    args, console = arguments(), Console()
    text = read_text(streams=BATCH, chunk=TIME)
    console.print(text.about, highlight=False)
    data = [batches(text, args.steps, args.rate, seed) for seed in range(args.seeds)]
    good = [batches(text, args.steps, 0.0, seed) for seed in range(args.seeds)]
    columns = (
        TextColumn("{task.description:>16}"), BarColumn(), MofNCompleteColumn(),
        TextColumn("steps"), TimeElapsedColumn(),
    )  # fmt: skip
    how_to = functools.partial(Training, lr=args.lr, steps=args.steps, loss_scale=args.loss_scale)
    with Progress(*columns, console=console) as progress, ThreadPoolExecutor(2) as pool:

        def run(label: str, make: Maker, threshold: float | None, data: list[Batches]) -> Run:
            task = progress.add_task(label, total=args.steps)
            advance = functools.partial(progress.advance, task)
            return train(how_to(make), threshold, data, text, advance)

        # Two at a time: one waits for its compiler while the other trains.
        clean = pool.submit(run, "none, clean", CLIPPERS["none"], None, good)
        jobs = {name: pool.submit(run, name, *how, data) for name, how in args.clippers.items()}
        results = {name: job.result() for name, job in jobs.items()}
    rows = ranked(results, clean.result(), data)
    console.print(table(rows, clean.result()))
    args.out.mkdir(parents=True, exist_ok=True)
    picture = args.out / "spiky_lm.png"
    title = f"A transformer by AdamW, {100 * args.rate:g} % of the batches corrupted: "
    draw_ranking(rows, title + f"mean and range of {args.seeds} seeds, {args.steps} steps", picture)
    console.print(f"wrote {picture}", soft_wrap=True)


if __name__ == "__main__":
    main()
