"""How often a recurrent net blows up, by clipper and learning rate.

A plain tanh network reads two signs, then 29 time steps of noise, and is asked for the signs. It is
trained by SGD with momentum from 8 initialisations at 7 learning rates, with every clipper from the
same ones, in one program per clipper.

    python examples/exploding_rnn.py
    python examples/exploding_rnn.py --clippers none,auto,global_norm=0.1 --gain 1 --time 60
    python examples/exploding_rnn.py --seeds 20 --steps 1000 --out out/other

A run **diverges** if it ends at more than twice the loss of always saying 0, and **trains** if it
ends at less than a tenth of it. The first command prints this (seed 0, 300 steps); where there is
no number, it is the default, and `percentile` and `zclip` have a `max_norm` of 1:

                       runs that   runs that     all train at
    clipper              diverge       train   learning rates
    none                    55 %        27 %             none
    value=0.1               39 %        45 %    0.003 to 0.03
    norm=0.1                14 %        68 %      0.01 to 0.1
    global_norm=10          57 %        32 %            0.003
    global_norm=1           36 %        55 %    0.003 to 0.03
    global_norm=0.1          9 %        75 %      0.01 to 0.3
    global_norm=0.01         0 %        66 %         0.1 to 3
    percentile              36 %        55 %    0.003 to 0.03
    percentile=inf          54 %        32 %             0.01
    zclip                   36 %        55 %    0.003 to 0.03
    agc                      0 %        79 %      0.01 to 0.3
    auto                    36 %        55 %    0.003 to 0.03

What to see: clipping does allow larger learning rates. Without a clip, 88 % of the runs diverge at
0.1 and all of them above; and at no learning rate do all train, as some stall far up. With a global
norm of 1 all train from 0.003 to 0.03, with 0.1 from 0.01 to 0.3, with 0.01 from 0.1 to 3. So what
decides is the longest step, learning rate times limit: it may be 0.03. The limit of `agc`, relative
to the weights, is the only default that never diverges.

What does not help: a limit of 10, which is too large. A percentile of past norms alone, because
the norms explode together and the limit goes with them. Under a ceiling of 1, adaptive limits are
as good as that ceiling, no better: `percentile`, `zclip` and `auto` end as `global_norm=1` does,
behind `global_norm=0.1`, which had to be found.

What not to conclude: that the smaller the limit the better. Below a learning rate of 0.1, a limit
of 0.01 is too slow for 300 steps. Nor that clipping finds better parameters: half of the unclipped
runs at 0.01 end below 0.001, as low as any; but others stall at up to 0.8. Nor that it cures long
memories: with `--time 60` and none, agc, percentile=inf or a global norm of 1, 0.1 or 0.01, all
seeds train with the last one alone, at 0.3 and 1. With `--gain 1`, these six do much as above; and
with 20 seeds and 1000 steps, 55 % of the unclipped runs diverge again, 35 % with auto or a global
norm of 1, 4 % with 0.1, none with 0.01 and agc.
"""

from __future__ import annotations

import argparse
import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from _plots import draw_heat_map
from flax import linen as nn
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

import optaxclip

BATCH, HIDDEN, SIGNS = 16, 32, 2
NOISE = 0.1  # deviation of the inputs that are to be ignored
LAST = 20  # training steps whose mean loss is the loss at the end
DIVERGED, TRAINED = 2.0, 0.1  # ends above, ends below; to always say 0 costs 1, a sign's square

# By name, what makes a clipper, of the number behind the "=" if there is one.
CLIPPERS: dict[str, Callable[..., optax.GradientTransformation]] = {
    "none": optax.identity,
    "value": optaxclip.clip_by_value,
    "norm": optaxclip.clip_by_norm,
    "global_norm": optaxclip.clip_by_global_norm,
    "agc": optaxclip.adaptive_grad_clip,
    "percentile": lambda max_norm=1.0: optaxclip.clip_by_percentile(max_norm=max_norm),
    "zclip": lambda max_norm=1.0: optaxclip.zclip(max_norm=max_norm),
    "auto": optaxclip.auto_clip,
}
DEFAULT = (
    "none,value=0.1,norm=0.1,global_norm=10,global_norm=1,global_norm=0.1,global_norm=0.01,"
    "percentile,percentile=inf,zclip,agc,auto"
)


class Net(nn.Module):
    """A plain tanh network that reads a sequence and answers at its end."""

    gain: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """(time, batch, SIGNS) -> (batch, SIGNS)."""
        recurrent = nn.initializers.variance_scaling(self.gain**2, "fan_in", "normal")
        cell = nn.SimpleCell(HIDDEN, recurrent_kernel_init=recurrent)
        state, _ = nn.RNN(cell, time_major=True, return_carry=True)(x)
        return nn.Dense(SIGNS)(state)


def batch(time: int, key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Signs at the first time step and noise ever after; the signs are what is asked for."""
    sign_key, noise_key = jax.random.split(key)
    signs = jax.random.rademacher(sign_key, (BATCH, SIGNS), dtype=jnp.float32)
    noise = NOISE * jax.random.normal(noise_key, (time - 1, BATCH, SIGNS))
    return jnp.concatenate([signs[None], noise]), signs


@functools.partial(jax.jit, static_argnums=(0, 1))
def begin(net: Net, time: int, keys: jax.Array) -> Any:
    """What training starts from, one per key: the same for every clipper and learning rate."""
    return jax.vmap(lambda key: net.init(key, batch(time, key)[0]))(keys)


class Job(NamedTuple):
    """What all runs of a program share."""

    net: Net
    time: int
    steps: int


def train(
    job: Job, clip: optax.GradientTransformation, lr: jax.Array, params: Any, key: jax.Array
) -> jax.Array:
    """One run: the loss at every step."""
    tx = optax.chain(clip, optax.sgd(lr, momentum=0.9))

    def loss_of(params: Any, data: tuple[jax.Array, jax.Array]) -> jax.Array:
        return jnp.mean(jnp.square(job.net.apply(params, data[0]) - data[1]))

    def step(carry: Any, key: jax.Array) -> tuple[Any, jax.Array]:
        params, opt_state = carry
        loss, grads = jax.value_and_grad(loss_of)(params, batch(job.time, key))
        updates, opt_state = tx.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), loss

    return jax.lax.scan(step, (params, tx.init(params)), jax.random.split(key, job.steps))[1]


def losses_at_end(job: Job, name: str, lrs: jax.Array, keys: jax.Array) -> np.ndarray:
    """The loss at the end of all runs with a clipper: (learning rates, seeds), inf for NaN."""
    one = functools.partial(train, job, parse_clipper(name))
    by_seed = jax.vmap(one, in_axes=(None, 0, 0))
    by_lr = jax.jit(jax.vmap(by_seed, in_axes=(0, None, None)))
    losses = by_lr(lrs, begin(job.net, job.time, keys), keys)
    # In float64, because losses near the largest of float32 have no mean in it.
    means = np.asarray(losses[..., -LAST:], np.float64).mean(axis=-1)
    return np.where(np.isnan(means), np.inf, means)


def number(loss: float) -> str:
    """Two digits of what says something."""
    if not math.isfinite(loss):
        return "inf"
    return "<.001" if loss < 1e-3 else ">99" if loss > 99 else f"{loss:#.2g}".rstrip(".")


def summary(results: dict[str, np.ndarray], lrs: list[float]) -> Table:
    """A row per clipper."""
    out = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
    out.add_column("clipper", no_wrap=True)
    for heading in ("runs that\ndiverge", "runs that\ntrain", "all train at\nlearning rates",
                    "lowest\nmedian loss", "at\nrate"):  # fmt: skip
        out.add_column(heading, justify="right")
    for name, losses in results.items():
        rows = zip(lrs, losses, strict=True)
        all_train = [f"{lr:g}" for lr, row in rows if (row < TRAINED).all()]
        medians = np.median(losses, axis=1)
        out.add_row(
            name,
            f"{100 * (losses > DIVERGED).mean():.0f} %",
            f"{100 * (losses < TRAINED).mean():.0f} %",
            " to ".join(dict.fromkeys(all_train[:1] + all_train[-1:])) or "none",
            number(medians.min()),
            f"{lrs[medians.argmin()]:g}",
        )
    return out


def details(results: dict[str, np.ndarray], lrs: list[float]) -> Table:
    """The loss at the end by learning rate: median, lowest and highest of the seeds."""
    out = Table("learning rate", box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for lr in lrs:
        out.add_column(f"{lr:g}", justify="right")
    for name, losses in results.items():
        for word, of in ((name, np.median), ("  lowest", np.min), ("  highest", np.max)):
            out.add_row(word, *map(number, of(losses, axis=1)))
    return out


def draw(results: dict[str, np.ndarray], lrs: list[float], title: str, path: Path) -> None:
    """Writes the picture: the share of runs that diverge on the left, the loss on the right."""
    all_losses = np.stack(list(results.values()))
    shares = (all_losses > DIVERGED).mean(axis=-1)
    medians = np.median(all_losses, axis=-1)
    figure = Figure((9.2, 1.7 + 0.32 * len(results)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    percent = [[f"{100 * share:.0f}" for share in row] for row in shares]
    draw_heat_map(left, shares, Normalize(0, 1.3), percent)
    left.set_title("runs that diverge, in %", loc="left", fontsize=10)
    words = [[number(loss) for loss in row] for row in medians]
    draw_heat_map(right, np.clip(medians, 1e-3, 10), LogNorm(1e-3, 30), words)
    right.set_title("loss at the end, median", loc="left", fontsize=10)
    for axes in (left, right):
        axes.set_xticks(range(len(lrs)), [f"{lr:g}" for lr in lrs])
        axes.set_xlabel("learning rate")
    left.set_yticks(range(len(results)), list(results))
    figure.suptitle(title, fontsize=11)
    figure.savefig(path, dpi=150)


def parse_clipper(text: str) -> optax.GradientTransformation:
    """The clipper of a name, or of name=number."""
    name, _, number = text.partition("=")
    if name not in CLIPPERS:
        raise ValueError(f"no clipper {name!r}; choose from {', '.join(CLIPPERS)}")
    try:
        return CLIPPERS[name](*([float(number)] if number else []))
    except TypeError:
        raise ValueError(f"{name} takes no number; got {text!r}") from None


def clipper_list(text: str) -> list[str]:
    """The argument of --clippers, checked."""
    names = list(dict.fromkeys(text.split(",")))
    for name in names:
        try:
            parse_clipper(name)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None
    return names


def number_list(text: str) -> list[float]:
    """The argument of --lrs, in order."""
    return sorted({float(word) for word in text.split(",")})


def arguments() -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--seeds", type=int, default=8, help="how many (%(default)s)")
    parser.add_argument("--steps", type=int, default=300, help="of training (%(default)s)")
    parser.add_argument("--time", type=int, default=30, help="steps to remember (%(default)s)")
    parser.add_argument("--gain", type=float, default=1.5, help="of recurrence (%(default)s)")
    parser.add_argument(
        "--lrs", type=number_list, default="0.003,0.01,0.03,0.1,0.3,1,3", help="(%(default)s)"
    )
    parser.add_argument(
        "--clippers", type=clipper_list, default=DEFAULT,
        help=f"out of {', '.join(CLIPPERS)}, with =number if wanted (%(default)s)",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, default=Path("out/exploding_rnn"), help="folder")
    args = parser.parse_args()
    if min(args.seeds, args.steps, args.time) < 1:
        parser.error("--seeds, --steps and --time must be at least 1")
    return args


def main() -> None:
    """Trains, shows, writes."""
    args, console = arguments(), Console()
    job = Job(Net(args.gain), args.time, args.steps)
    keys, lrs = jax.random.split(jax.random.key(0), args.seeds), jnp.array(args.lrs)
    columns = (
        TextColumn("{task.description:>16}"), BarColumn(), MofNCompleteColumn(),
        TextColumn("clippers"), TimeElapsedColumn(),
    )  # fmt: skip
    results = {}
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=len(args.clippers))
        for name in args.clippers:
            progress.update(task, description=name)
            results[name] = losses_at_end(job, name, lrs, keys)
            progress.advance(task)
    console.print(summary(results, args.lrs), "", details(results, args.lrs))
    args.out.mkdir(parents=True, exist_ok=True)
    picture = args.out / "exploding_rnn.png"
    title = f"Tanh RNN that recalls the first of {args.time} inputs, {args.seeds} seeds"
    draw(results, args.lrs, title, picture)
    console.print(f"wrote {picture}", soft_wrap=True)


if __name__ == "__main__":
    main()
