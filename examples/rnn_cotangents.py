"""A recurrent net of 200 time steps whose backward pass explodes, with and without a clip in it.

A tanh network follows a running average of its input. Its recurrent matrix starts as 1.7 times an
orthogonal one and its inputs are small, so that states hardly saturate at first, and a gradient
grows at most steps on its way back. The same network is trained by SGD with momentum, from the same
seeds, in four ways: as it is; with the gradient of the parameters clipped to a global norm of 1;
with `clip_cotangent` between time steps, which clips the gradient with respect to each state to a
norm of 0.1; with both.

    python examples/rnn_cotangents.py
    python examples/rnn_cotangents.py --radius 2 --seeds 3 --out out/other

It prints a table and writes a picture. On the left of it, the norm of the gradient with respect to
the state, step by step, before clipping, in the first backward pass: read as the gradient of a
probe per time step. On the right, the loss. In the table, norms are those of the first training
step, the largest of all seeds.

What to see: without a clip, the first norms are some 10^4 times the limit, and training stalls
barely below what predicting 0 costs, 0.46. With the global norm clipped, it hardly begins: the
gradient is that of the first time steps, and all that is said of later ones is lost in it. With
cotangents clipped, each time step has its say.

What not to conclude: that a global norm cannot do it. With a learning rate of 0.03 it does, and as
well. Here is the mean loss of the last ten steps, median of seeds 0 to 2, by learning rate:

    clipped                       0.001   0.003    0.01    0.03     0.1
    nothing                        0.41    0.39    0.39    0.39    0.36
    global norm to 1               1.03    1.03    0.89    0.03    0.24
    global norm to 0.1             1.03    1.02    1.01    1.01    0.97
    cotangents to 0.1              0.10    0.06    0.02    0.03     NaN
    cotangents to 0.01             0.11    0.05    0.03    0.03    0.04
    cotangents to 0.1, norm to 1   0.36    0.14    0.07    0.06    0.13
    cotangents to 0.01, norm to 1  0.11    0.05    0.03    0.03    0.03

What cotangent clipping buys here is the range of settings that train, not the best of them. And a
bound on the gradient by each state is none on the step: at a learning rate of 0.1, all three runs
with cotangents to 0.1 end at NaN.
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
from flax import linen as nn
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

import optaxclip
from optaxclip.cotangent import CotangentMetrics, clip_cotangent, cotangent_probe

TIME, BATCH, INPUTS, HIDDEN = 200, 16, 4, 64
KEEP = 0.9  # what the running average keeps of itself in a time step
# The mean over time of the square of three times the average.
LOSS_OF_0 = 9 * np.mean(np.cumsum(((1 - KEEP) * KEEP ** np.arange(TIME)) ** 2))
BLOCK = 25  # training steps per call of the compiled program


class Way(NamedTuple):
    """How to train, by which clips, and how it is drawn."""

    colour: str  # of Okabe and Ito's, which the colour-blind can tell apart
    line: str  # for who sees no colours
    cotangents: bool = False
    parameters: bool = False


WAYS = {
    "nothing": Way("#999999", ":"),
    "global norm": Way("#D55E00", "-.", parameters=True),
    "cotangents": Way("#0072B2", "-", cotangents=True),
    "both": Way("#000000", "--", cotangents=True, parameters=True),
}


# ------------------------------------------------------------------------------ the training


class Cell(nn.Module):
    """One time step: h_t = tanh(W h_{t-1} + U x_t), with a clip on the way back."""

    radius: float

    @nn.compact
    def __call__(
        self, state: jax.Array, inputs: tuple[jax.Array, Any], max_norm: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """From (batch, hidden) and a step's inputs and probe to the next state, twice."""
        x, probe = inputs
        dense = functools.partial(nn.Dense, HIDDEN, use_bias=False)
        recurrent = nn.initializers.orthogonal(self.radius)
        x = dense(kernel_init=nn.initializers.normal(0.2), name="input")(x)
        state = dense(kernel_init=recurrent, name="recurrent")(state)
        # All that comes back to this state, from the output here and from later ones, passes it.
        state = clip_cotangent(nn.tanh(state + x), max_norm, probe=probe)
        return state, state


class Net(nn.Module):
    """(time, batch, inputs) -> (time, batch)."""

    radius: float

    @nn.compact
    def __call__(self, x: jax.Array, max_norm: jax.Array, probes: CotangentMetrics) -> jax.Array:
        """The prediction at each time step; `probes` has a row for each."""
        cells = nn.scan(
            Cell,
            variable_broadcast="params",
            split_rngs={"params": False},
            in_axes=(0, nn.broadcast),
        )
        start = jnp.zeros((x.shape[1], HIDDEN))
        _, states = cells(self.radius)(start, (x, probes), max_norm)
        return nn.Dense(1, use_bias=False)(states)[..., 0]


def batch(key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Noise, and three times the running average of its first channel."""
    x = jax.random.normal(key, (TIME, BATCH, INPUTS))

    def average(mean: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        mean = KEEP * mean + (1 - KEEP) * x
        return mean, mean

    _, means = jax.lax.scan(average, jnp.zeros(BATCH), x[..., 0])
    return x, 3 * means


def loss_of(
    net: Net, params: Any, probes: CotangentMetrics, max_norm: jax.Array, data: Any
) -> jax.Array:
    """The mean squared error over all time steps."""
    x, means = data
    return jnp.mean(jnp.square(net.apply(params, x, max_norm, probes) - means))


def probes_for(steps: int) -> CotangentMetrics:
    """A probe per time step."""
    return jax.tree.map(lambda x: jnp.zeros((steps, *x.shape)), cotangent_probe())


def optimizer(lr: float, global_norm: jax.Array) -> optax.GradientTransformation:
    """SGD with momentum behind a clip, which may be off, and then only measures."""
    clip = optaxclip.clip_by_global_norm(global_norm, nonfinite="propagate")
    return optax.chain(clip, optax.sgd(lr, momentum=0.9))


def begin(net: Net, lr: float, key: jax.Array) -> Any:
    """Parameters and optimizer state; of a key only, so the same for every way."""
    params = net.init(key, jnp.zeros((2, 1, INPUTS)), jnp.inf, probes_for(2))
    return params, optimizer(lr, jnp.inf).init(params)


def train_step(
    net: Net, lr: float, limits: tuple[jax.Array, jax.Array], carry: Any, key: jax.Array
) -> tuple[Any, dict[str, jax.Array]]:
    """One step on fresh data, and what happened in it."""
    (params, opt_state), (max_norm, global_norm) = carry, limits
    grads_of = jax.value_and_grad(functools.partial(loss_of, net), argnums=(0, 1))
    loss, (grads, seen) = grads_of(params, probes_for(TIME), max_norm, batch(key))
    updates, opt_state = optimizer(lr, global_norm).update(grads, opt_state, params)
    metrics = {"loss": loss, "norm": optaxclip.metrics(opt_state)["norm"]}
    metrics |= {"cotangents": seen.norm, "after": seen.clipped_norm}
    return (optax.apply_updates(params, updates), opt_state), metrics


@functools.partial(jax.jit, static_argnums=(0, 1))
def train_block(
    net: Net, lr: float, limits: tuple[jax.Array, jax.Array], carry: Any, keys: jax.Array
) -> tuple[Any, dict[str, jax.Array]]:
    """Several steps of all seeds at once; keys are (seeds, steps)."""

    def one(carry: Any, keys: jax.Array) -> tuple[Any, dict[str, jax.Array]]:
        return jax.lax.scan(functools.partial(train_step, net, lr, limits), carry, keys)

    return jax.vmap(one)(carry, keys)


def train(way: Way, args: argparse.Namespace, advance: Callable[..., Any]) -> dict[str, np.ndarray]:
    """The history of all seeds, by metric: (seeds, steps) and, of cotangents, (..., time)."""
    net = Net(args.radius)
    limits = (
        jnp.float32(args.max_norm if way.cotangents else math.inf),
        jnp.float32(args.global_norm if way.parameters else math.inf),
    )
    roots = jax.vmap(jax.random.key)(jnp.arange(args.seeds))
    keys = jax.vmap(lambda root: jax.random.split(root, args.steps + 1))(roots)
    carry = jax.jit(jax.vmap(functools.partial(begin, net, args.lr)))(keys[:, 0])
    blocks = []
    for first in range(1, args.steps + 1, BLOCK):
        some = keys[:, first : first + BLOCK]
        carry, metrics = train_block(net, args.lr, limits, carry, some)
        blocks.append(jax.device_get(metrics))
        advance(advance=some.shape[1])
    return {key: np.concatenate([block[key] for block in blocks], axis=1) for key in blocks[0]}


# ------------------------------------------------------------------------------- the results


def final(history: dict[str, np.ndarray]) -> np.ndarray:
    """The mean loss of the last ten steps, one per seed."""
    return history["loss"][:, -10:].mean(axis=1)


def spread(losses: np.ndarray) -> str:
    """The median over the seeds, and the range."""
    return f"{np.median(losses):.3f} ({losses.min():.3f}-{losses.max():.3f})"


def table(results: dict[str, dict[str, np.ndarray]]) -> Table:
    """The ways side by side: the largest norms of the first step, and what became of the loss."""
    out = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
    out.add_column("clipped", no_wrap=True)
    for heading in ("cotangent norm", "gradient norm", "loss at the end"):
        out.add_column(heading, justify="right", no_wrap=True)
    for name, history in results.items():
        norms = (history[key][:, 0].max() for key in ("cotangents", "norm"))
        out.add_row(name, *(f"{norm:.2g}" for norm in norms), spread(final(history)))
    return out


def draw(results: dict[str, dict[str, np.ndarray]], args: argparse.Namespace, path: Path) -> None:
    """Writes the picture: the backward pass on the left, the training on the right."""
    figure = Figure((9.2, 3.9), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, label in (("nothing", "nothing clipped"), ("cotangents", "clipped at each step")):
        time = np.arange(1, TIME + 1)
        draw_range(left, time, results[name]["cotangents"][:, 0], WAYS[name], label)
    left.axhline(args.max_norm, color="0.5", linewidth=0.8)
    left.annotate("limit", (TIME, args.max_norm), ha="right", va="bottom", fontsize=9)
    left.set(xlabel="time step (the backward pass goes left)", yscale="log", xlim=(1, TIME))
    left.set_title("norm of the gradient by state, before clipping", loc="left", fontsize=10)
    for name, history in results.items():
        steps = np.arange(1, args.steps + 1)
        draw_range(right, steps, history["loss"], WAYS[name], name)
    right.axhline(LOSS_OF_0, color="0.5", linewidth=0.8)
    right.annotate("predicting 0", (args.steps, LOSS_OF_0), ha="right", va="bottom", fontsize=9)
    right.set(xlabel="training step", yscale="log", xlim=(1, args.steps))
    right.set_title("training loss", loc="left", fontsize=10)
    left.legend(frameon=False, fontsize=9)
    right.set_ylim(bottom=0.01)  # room for the legend
    right.legend(frameon=False, fontsize=9, title="clipped", loc="lower center", ncols=2)
    figure.suptitle(
        f"RNN of {TIME} time steps, recurrent matrix of radius {args.radius:g}: "
        f"median and range of {args.seeds} seeds"
    )
    figure.savefig(path, dpi=150)


def draw_range(axes: Axes, x: np.ndarray, y: np.ndarray, way: Way, label: str) -> None:
    """The median over the seeds, in the band of all."""
    axes.plot(x, np.median(y, axis=0), way.line, color=way.colour, label=label, linewidth=1.8)
    axes.fill_between(x, y.min(axis=0), y.max(axis=0), color=way.colour, alpha=0.2, linewidth=0)


def main() -> None:
    """Trains, shows, writes."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=200, help="of training (%(default)s)")
    parser.add_argument("--seeds", type=int, default=5, help="how many (%(default)s)")
    parser.add_argument("--lr", type=float, default=0.01, help="learning rate (%(default)s)")
    parser.add_argument("--radius", type=float, default=1.7, help="of the matrix (%(default)s)")
    parser.add_argument("--max-norm", type=float, default=0.1, help="of cotangents (%(default)s)")
    parser.add_argument("--global-norm", type=float, default=1.0, help="of gradients (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("out/rnn_cotangents"), help="folder")
    args, console = parser.parse_args(), Console()
    columns = (
        TextColumn("{task.description:>12}"), BarColumn(), MofNCompleteColumn(),
        TextColumn("steps"), TimeElapsedColumn(),
    )  # fmt: skip
    results = {}
    with Progress(*columns, console=console) as progress:
        for name, way in WAYS.items():
            task = progress.add_task(name, total=args.steps)
            results[name] = train(way, args, functools.partial(progress.update, task))
    console.print(table(results))
    args.out.mkdir(parents=True, exist_ok=True)
    picture = args.out / "rnn_cotangents.png"
    draw(results, args, picture)
    console.print(f"wrote {picture}", soft_wrap=True)


if __name__ == "__main__":
    main()
