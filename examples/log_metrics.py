"""A clipper's metrics in CSV, TensorBoard and Weights & Biases, without waiting at each step.

    python examples/log_metrics.py --to csv,tensorboard,wandb --every 20 --out out/log_metrics

Trains a small regression for 100 steps and writes the loss and `optaxclip.metrics` of every step.
The train step returns them as arrays on the device, which cost nothing until they are fetched; the
loop fetches those of `--every` steps at once, so that the device waits for the host that much less
often. Names have "clip/" in front, by which TensorBoard and W&B sort their plots. What is not
installed is imported only when it is asked for.

    csv           metrics.csv, a row per step
    tensorboard   an event file, by tensorboardX: tensorboard --logdir out/log_metrics
    wandb         an offline run, which sends nothing: wandb sync --sync-all, in out/log_metrics

The writers of CLU and of Flax have methods like these, and need TensorFlow: for theirs, call
`writer.write_scalars(step, values)` and `writer.scalar(name, value, step)`.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import importlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import optax

import optaxclip

STEPS = 100
Values = dict[str, float]
Write = Callable[[int, Values], object]


@contextlib.contextmanager
def csv_writer(out: Path) -> Iterator[Write]:
    """Rows of a CSV file, with the names of the first one as its head."""
    with (out / "metrics.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, fieldnames=[])

        def write(step: int, values: Values) -> None:
            if not table.fieldnames:
                table.fieldnames = ["step", *values]
                table.writeheader()
            table.writerow({"step": step, **values})

        yield write


@contextlib.contextmanager
def tensorboard_writer(out: Path) -> Iterator[Write]:
    """Scalars of an event file."""
    tensorboardX = importlib.import_module("tensorboardX")
    with tensorboardX.SummaryWriter(str(out)) as writer:

        def write(step: int, values: Values) -> None:
            for name, value in values.items():
                writer.add_scalar(name, value, step)

        yield write


@contextlib.contextmanager
def wandb_writer(out: Path) -> Iterator[Write]:
    """The history of an offline run."""
    # Without this, wandb 0.31 calls home about itself, offline too; it is read at import.
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    wandb = importlib.import_module("wandb")
    with wandb.init(project="optaxclip", dir=out, mode="offline") as run:
        yield lambda step, values: run.log(values, step=step)


WRITERS = {"csv": csv_writer, "tensorboard": tensorboard_writer, "wandb": wandb_writer}
PACKAGES = {"tensorboard": "tensorboardX", "wandb": "wandb"}


def train(writers: list[Write], every: int) -> None:
    """Hands the loss and the metrics of every step to the writers, `every` steps at a time."""
    x = jax.random.normal(jax.random.key(0), (64, 8))
    y = x @ jnp.arange(8.0)
    tx = optax.chain(optaxclip.clip_by_global_norm(1.5), optax.sgd(0.1))
    params = jnp.zeros(8)
    opt_state = tx.init(params)

    @jax.jit
    def train_step(
        params: jax.Array, opt_state: optax.OptState
    ) -> tuple[jax.Array, optax.OptState, dict[str, jax.Array]]:
        loss, grads = jax.value_and_grad(lambda w: jnp.mean((x @ w - y) ** 2))(params)
        updates, opt_state = tx.update(grads, opt_state, params)
        read = {f"clip/{name}": value for name, value in optaxclip.metrics(opt_state).items()}
        return optax.apply_updates(params, updates), opt_state, {"loss": loss, **read}

    held = []  # on the device, one dict per step
    for step in range(1, STEPS + 1):
        params, opt_state, log = train_step(params, opt_state)
        held.append(log)
        if len(held) == every or step == STEPS:
            rows = jax.device_get(held)  # the one place that waits
            for number, values in enumerate(rows, step - len(rows) + 1):
                for write in writers:
                    write(number, {name: value.item() for name, value in values.items()})
            held.clear()


def main() -> None:
    """Opens the writers, trains, and says what there is to look at."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--to", default="csv", help=f"any of {','.join(WRITERS)}")
    parser.add_argument("--every", type=int, default=20, help="steps between two fetches")
    parser.add_argument("--out", type=Path, default=Path("out/log_metrics"))
    options = parser.parse_args()
    names = options.to.split(",")
    for name in names:
        if name not in WRITERS:
            parser.error(f"no writer {name!r}; choose from {', '.join(WRITERS)}")
    if options.every < 1:
        parser.error(f"--every must be at least 1; got {options.every}")
    options.out.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        writers = []
        for name in names:
            try:
                writers.append(stack.enter_context(WRITERS[name](options.out)))
            except ModuleNotFoundError:
                parser.error(f"--to {name} needs a package: pip install {PACKAGES[name]}")
        train(writers, options.every)
    print(f"{STEPS} steps written to {options.out}")


if __name__ == "__main__":
    main()
