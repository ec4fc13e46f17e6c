"""Gradient descent at the edge of a cliff, with and without clipping.

The network is one unit, x_t = w sigma(x_{t-1}) + b from x_0 = 0.5, and the loss asks that
sigma(x_50) be 0.7. So there are two parameters, and the loss is a landscape that can be drawn: two
plateaus with a cliff between them. Along its edge, towards small w, the cliff opens into a valley
where the loss is 0.

    python examples/cliff.py
    python examples/cliff.py --lr 0.1 --start 5.2 -2.55 --out out/other

It draws the paths from one start, without a clip and with the global norm clipped to 1. And it
prints from how many of 1000 starts, spread evenly over w from 3 to 7 and b from -5 to -1, the loss
is below 1e-4 after 1000 steps (seed 0):

    learning rate   no clip   limit 1   limit 0.1   limit 0.01   auto_clip
             0.03    30.4 %    37.8 %      28.3 %        6.7 %      33.8 %
              0.1    46.0 %    72.6 %      47.5 %       18.0 %      65.6 %
              0.3    60.4 %    96.7 %      59.6 %       38.3 %      93.1 %
                1    73.2 %   100.0 %     100.0 %       39.9 %     100.0 %
                3    89.1 %   100.0 %     100.0 %       40.6 %     100.0 %
               10    84.2 %    84.2 %     100.0 %       32.6 %      99.2 %

What to see: descent follows the edge, until one step lands on the wall, where the gradient is 44
and was 0.2. Unclipped, that step throws it off to where the loss is flat, and it stays there.
Clipped, it is a step of 0.3, and descent goes on into the valley.

What not to conclude: that a smaller limit is safer and so better. With a limit of 0.01, most starts
do not get there in 1000 steps, whatever the learning rate. And at a learning rate of 10, a limit of
1 saves no run: of those that are lost, half never see a gradient above 0.8. Limit and learning rate
belong together. `auto_clip`, whose limit of 1 falls to 1.5 times the usual norm, is at every rate
within 7 points of the best of these.

Source: Pascanu, Mikolov, Bengio, arXiv:1211.5063, section 2.3, draw this loss of this network. The
starts and the paths are our own.
"""

from __future__ import annotations

import argparse
import functools
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

import optaxclip

TIME, TARGET = 50, 0.7
LOW, HIGH = (3.0, -5.0), (7.0, -1.0)  # of the starts: w and b
REACHED = 1e-4  # a loss below it is in the valley
LRS = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
CLIPPERS = {
    "no clip": optaxclip.clip_by_global_norm(math.inf),
    "limit 1": optaxclip.clip_by_global_norm(1.0),
    "limit 0.1": optaxclip.clip_by_global_norm(0.1),
    "limit 0.01": optaxclip.clip_by_global_norm(0.01),
    "auto_clip": optaxclip.auto_clip(),
}

# Which paths are drawn, each with a colour of Okabe and Ito's and a line.
PATHS = {"no clip": ("#D55E00", "--"), "limit 1": ("#0072B2", "-")}


def loss_of(point: jax.Array) -> jax.Array:
    """The loss at a point (w, b)."""
    w, b = point

    def step(x: jax.Array, _: None) -> tuple[jax.Array, None]:
        return w * jax.nn.sigmoid(x) + b, None

    x, _ = jax.lax.scan(step, jnp.float32(0.5), length=TIME)
    return jnp.square(jax.nn.sigmoid(x) - TARGET)


def descend(
    steps: int, clip: optax.GradientTransformation, lr: jax.Array, start: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradient descent: the points (steps, 2), and the losses and gradient norms at them."""
    tx = optax.chain(clip, optax.sgd(lr))

    def step(carry: Any, _: None) -> tuple[Any, Any]:
        point, opt_state = carry
        loss, grads = jax.value_and_grad(loss_of)(point)
        updates, opt_state = tx.update(grads, opt_state)
        norm = optaxclip.metrics(opt_state)["norm"]
        return (optax.apply_updates(point, updates), opt_state), (point, loss, norm)

    return jax.lax.scan(step, (start, tx.init(start)), length=steps)[1]


@functools.partial(jax.jit, static_argnums=0)
def losses_at_end(steps: int, lr: jax.Array, starts: jax.Array) -> dict[str, jax.Array]:
    """What descent from every start comes to, by clipper: (starts,) each."""
    end = lambda clip, start: descend(steps, clip, lr, start)[1][-1]
    return {name: jax.vmap(functools.partial(end, clip))(starts) for name, clip in CLIPPERS.items()}


def table(losses: dict[float, dict[str, np.ndarray]]) -> Table:
    """The share of the starts from which the valley is reached."""
    out = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
    out.add_column("learning rate", justify="right")
    for name in CLIPPERS:
        out.add_column(name, justify="right")
    for lr, by_clipper in losses.items():
        shares = [np.mean(by_clipper[name] < REACHED) for name in CLIPPERS]
        out.add_row(f"{lr:g}", *(f"{100 * share:.1f} %" for share in shares))
    return out


def draw(args: argparse.Namespace, path: Path) -> None:
    """Writes the picture: on the left the paths in the landscape, on the right their losses."""
    figure = Figure((9.2, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1.3, 1))
    start, one = jnp.array(args.start), jax.jit(descend, static_argnums=(0, 1))
    draw_surface(left, args.start)
    for name, (colour, line) in PATHS.items():
        points, losses, norms = map(np.asarray, one(args.steps, CLIPPERS[name], args.lr, start))
        style = {"color": colour, "linestyle": line, "linewidth": 1.8}
        label = f"{name}: ends at w = {points[-1, 0]:.1f}, b = {points[-1, 1]:.1f}"
        left.plot(*points.T, color="white", linewidth=4)  # an edge, which shows on every grey
        left.plot(*points.T, **style, marker=".", markersize=4, label=label)
        left.plot(*points[-1], "X", color=colour, markersize=9, markeredgecolor="black")
        label = f"{name}: largest gradient {norms.max():.0f}"
        right.plot(losses, color=colour, linestyle=line, linewidth=1.2, label=label)
    left.plot(*start, "o", color="white", markeredgecolor="black", markersize=8)
    beside = {"xytext": (8, 0), "textcoords": "offset points", "va": "center"}
    left.annotate("start", args.start, **beside, color="white")
    left.legend(loc="upper right", fontsize=8.5, framealpha=1)
    right.set(xlabel="step", yscale="log", xlim=(0, args.steps))
    right.set_title("loss along the paths", loc="left", fontsize=10)
    right.legend(frameon=False, fontsize=8.5)
    figure.suptitle(f"Gradient descent on one recurrent unit, learning rate {args.lr:g}")
    figure.savefig(path, dpi=130)


def draw_surface(axes: Axes, start: tuple[float, float]) -> None:
    """The loss around the start, in shades of grey."""
    w = np.linspace(start[0] - 1.8, start[0] + 1.2, 500)
    b = np.linspace(start[1] - 0.8, start[1] + 2.6, 500)
    grid = jnp.stack(jnp.meshgrid(w, b), axis=-1)
    losses = jax.jit(jax.vmap(jax.vmap(loss_of)))(grid)
    shades = axes.pcolormesh(
        w, b, losses, cmap="Greys", norm=LogNorm(1e-4, 2, clip=True), rasterized=True
    )
    axes.figure.colorbar(shades, ax=axes, pad=0.01)
    axes.set(xlabel="w", ylabel="b", xlim=(w[0], w[-1]), ylim=(b[0], b[-1]))
    axes.set_title("the loss: light is low", loc="left", fontsize=10)


def arguments() -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--starts", type=int, default=1000, help="how many (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the starts (%(default)s)")
    parser.add_argument("--steps", type=int, default=1000, help="of descent (%(default)s)")
    parser.add_argument("--lr", type=float, default=0.3, help="of the picture (%(default)s)")
    parser.add_argument(
        "--start", type=float, nargs=2, default=(5.257, -3.056), metavar=("W", "B"),
        help="of the picture (%(default)s)",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, default=Path("out/cliff"), help="folder")
    args = parser.parse_args()
    if args.starts < 1 or args.steps < 1:
        parser.error("--starts and --steps must be at least 1")
    return args


def main() -> None:
    """Descends, shows, writes."""
    args, console = arguments(), Console()
    low, high = jnp.array(LOW), jnp.array(HIGH)
    starts = jax.random.uniform(
        jax.random.key(args.seed), (args.starts, 2), minval=low, maxval=high
    )
    columns = (
        BarColumn(), MofNCompleteColumn(), TextColumn("learning rates"), TimeElapsedColumn(),
    )  # fmt: skip
    losses = {}
    with Progress(*columns, console=console) as progress:
        for lr in progress.track(LRS):
            losses[lr] = jax.device_get(losses_at_end(args.steps, lr, starts))
    console.print(table(losses))
    args.out.mkdir(parents=True, exist_ok=True)
    picture = args.out / "cliff.png"
    draw(args, picture)
    console.print(f"wrote {picture}", soft_wrap=True)


if __name__ == "__main__":
    main()
