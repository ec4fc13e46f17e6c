"""A threshold of your own, in ten lines: a geometric mean of past norms.

A threshold is a pair, as an Optax transformation is. `init(norm)` gives the memory before the first
step; `update(norm, memory)` gives the limit, from past norms only, and the memory that has learned
this norm. What is in the memory has the shape of the norm, and so the same lines are right for one
norm of the whole tree and for a norm per leaf.

    python examples/write_a_threshold.py

It fits a small network to a sine, once with the threshold on the global norm and once on the norm
of each leaf, and prints what the clip did. At step 60 the targets of the batch are 100 times too
large, at step 80 they are NaN.

What to see: neither step leaves a trace in the loss, nor in the limit. The first is clipped, and
`update` itself says that a clipped norm is learned as what it became. The second is not in the ten
lines at all: `optaxclip.clip` makes a zero update of it, and throws away what was learned. It does
the same where the norm is 0, whose logarithm would stay in the mean for ever.

What not to conclude: that this is a good threshold. The package has been measured with its own, see
`optaxclip.threshold`; this one shows what it takes to try an idea.
"""

from __future__ import annotations

import argparse
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

import optaxclip

STEPS, TOO_LARGE, BAD = 100, 60, 80
SHOWN = (0, 1, 2, 10, TOO_LARGE - 1, TOO_LARGE, TOO_LARGE + 1, BAD - 1, BAD, BAD + 1, STEPS - 1)


class GeometricMemory(NamedTuple):
    """Sums over past steps, which count less and less."""

    logs: jax.Array  # as the norm, float32, of the logarithm of what norms became
    weights: jax.Array  # as the norm, float32; 0 before the first norm


def geometric_mean(ratio: float, decay: float) -> optaxclip.threshold.Threshold:
    """The limit is `ratio` times the geometric mean of past norms, each clipped as it was."""

    def init(norm: Any) -> GeometricMemory:
        zeros = jnp.zeros_like(norm, jnp.float32)
        return GeometricMemory(logs=zeros, weights=zeros)

    def update(norm: jax.Array, memory: GeometricMemory) -> tuple[jax.Array, GeometricMemory]:
        mean = jnp.exp(memory.logs / jnp.maximum(memory.weights, 1 - decay))
        limit = jnp.where(memory.weights > 0, ratio * mean, jnp.inf)
        logs = decay * memory.logs + (1 - decay) * jnp.log(jnp.minimum(norm, limit))
        return limit, GeometricMemory(logs, decay * memory.weights + (1 - decay))

    return optaxclip.threshold.Threshold(init, update)


def train(measure: optaxclip.measure.Measure) -> dict[str, jax.Array]:
    """Fits the network, and returns the metrics of every step."""
    net = nn.Sequential([nn.Dense(32), nn.tanh, nn.Dense(1)])
    clip = optaxclip.clip(measure, geometric_mean(ratio=1.5, decay=0.9))
    tx = optax.chain(clip, optax.adam(1e-2))
    x = jnp.linspace(-1, 4, 64)[:, None]
    params = net.init(jax.random.key(0), x)

    def step(carry: Any, size: jax.Array) -> tuple[Any, dict[str, jax.Array]]:
        params, opt_state = carry

        def loss_of(params: Any, size: jax.Array) -> jax.Array:
            return jnp.mean(jnp.square(net.apply(params, x) - size * jnp.sin(x)))

        updates, opt_state = tx.update(jax.grad(loss_of)(params, size), opt_state, params)
        params = optax.apply_updates(params, updates)
        return (params, opt_state), optaxclip.metrics(opt_state) | {"loss": loss_of(params, 1.0)}

    sizes = jnp.ones(STEPS).at[TOO_LARGE].set(100.0).at[BAD].set(jnp.nan)
    return jax.lax.scan(step, (params, tx.init(params)), sizes)[1]


def table(title: str, history: dict[str, jax.Array]) -> Table:
    """What happened at some of the steps."""
    columns = ("norm", "limit", "clipped_norm", "clipped", "nonfinite_steps", "loss")
    out = Table("step", title=title, box=SIMPLE_HEAD, show_edge=False, title_justify="left")
    for column in columns:
        out.add_column(column.replace("_", " "), justify="right")
    for step in SHOWN:
        out.add_row(str(step), *(f"{history[column][step]:.3g}" for column in columns))
    return out


def main() -> None:
    """Trains twice, shows."""
    argparse.ArgumentParser(description=__doc__.partition("\n")[0]).parse_args()
    console = Console()
    console.print(table("one limit for all", train(optaxclip.measure.global_norm())), "")
    console.print(table("a limit per leaf", train(optaxclip.measure.leaf_norm())))
    console.print("Of the leaves: largest norm, smallest limit, share that was clipped.")


if __name__ == "__main__":
    main()
