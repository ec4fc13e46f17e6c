"""From one device to many hosts: a sharded transformer, clipped, saved, restored, continued.

A small decoder-only transformer learns to read the reference of the Python language, which ships
with Python. Parameters, gradients and optimizer state are sharded over the devices (FSDP), and so
is the batch. The clipper stands in front of AdamW as it would on one device: under `jit`, norms
are those of the whole gradients, wherever their parts live.

    python examples/fsdp.py                              # the GPUs or TPUs here, or 8 virtual CPUs
    python examples/fsdp.py --clipper adagc --mesh 2x4   # replicas x shards
    python examples/fsdp.py --restore-mesh 2x4           # goes on with another layout
    python examples/fsdp.py --processes 2                # as on two hosts, but all on this machine
    srun python examples/fsdp.py --cluster               # on every host of a real cluster

Half of the way it saves a checkpoint, and at the end goes back there and trains the second half
once more: on the same mesh with the same numbers bit for bit, the clipper's among them, on another
one with sums in another order. No `if` depends on the host but for what is printed, because all
hosts must run the same programs in the same order.
"""

from __future__ import annotations

import argparse
import functools
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from _text import read_text
from flax import linen as nn
from flax.training.train_state import TrainState
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import optaxclip

LAYERS, WIDTH, HEADS = 2, 128, 4
VOCABULARY = 128  # more than the text has, but a number that can be divided
STREAMS, CHUNK = 4, 64  # texts per device, and characters of each
WHOLE = 1024  # smaller arrays stay whole on every device: not worth a message each
BATCH = P(("data", "fsdp"))  # every device reads texts of its own
Batches = list[tuple[int, np.ndarray]]  # step, (texts, CHUNK + 1) int32
COLUMNS = ("loss", "norm", "clipped_norm", "limit", "clipped", "clipped_steps")


class Transformer(nn.Module):
    """Characters to logits of the next one."""

    @nn.compact
    def __call__(self, characters: jax.Array) -> jax.Array:
        """From (streams, time) to (streams, time, VOCABULARY)."""
        # Activations stay where their texts are, so it is parameters that travel.
        stay = functools.partial(jax.lax.with_sharding_constraint, shardings=BATCH)
        mask = nn.make_causal_mask(characters)
        x = stay(nn.Embed(VOCABULARY, WIDTH)(characters))
        x = stay(x + nn.Embed(CHUNK, WIDTH)(jnp.arange(CHUNK)))
        for _ in range(LAYERS):
            x = stay(x + nn.MultiHeadDotProductAttention(HEADS)(nn.LayerNorm()(x), mask=mask))
            hidden = stay(nn.gelu(nn.Dense(4 * WIDTH)(nn.LayerNorm()(x))))
            x = stay(x + nn.Dense(WIDTH)(hidden))
        return stay(nn.Dense(VOCABULARY)(nn.LayerNorm()(x)))


def train_step(state: TrainState, batch: jax.Array) -> tuple[TrainState, dict[str, jax.Array]]:
    """One step, and what to know about it. Nothing in it is about devices."""

    def loss_of(params: Any) -> jax.Array:
        logits = state.apply_fn(params, batch[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch[:, 1:]).mean()

    loss, grads = jax.value_and_grad(loss_of)(state.params)
    state = state.apply_gradients(grads=grads)
    return state, {"loss": loss, **optaxclip.metrics(state.opt_state)}


def shardings(state: TrainState) -> TrainState:
    """Where each array of a state is, or will be."""
    return jax.tree.map(lambda x: x.sharding, state)


def layout(shape: tuple[int, int], make: Any) -> TrainState:
    """Shapes, dtypes and shardings of the state on a mesh of replicas x shards, no numbers yet."""
    # Auto: XLA finds out what must be sent where. On an Explicit mesh, the default of make_mesh,
    # the code says it for each product of sharded arrays, and the layers of Flax do not.
    mesh = jax.make_mesh(shape, ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)
    jax.set_mesh(mesh)

    def placed(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        """Cut along the longest axis that can be cut; so moments are cut as their parameters."""
        axes = [axis for axis, n in enumerate(x.shape) if n % shape[1] == 0 and x.size >= WHOLE]
        cut = max(axes, key=lambda axis: x.shape[axis], default=None)
        spec = P(*("fsdp" if axis == cut else None for axis in range(x.ndim)))
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))

    return jax.tree.map(placed, jax.eval_shape(make))


def say(*words: Any) -> None:
    """Prints on one host only."""
    if jax.process_index() == 0:
        print(*words, flush=True)


def train(state: TrainState, batches: Batches, every: int) -> tuple[TrainState, list[Any]]:
    """The state after these batches, and the metrics of each step, which every host can read."""
    step = jax.jit(train_step, out_shardings=(shardings(state), P()), donate_argnums=0)
    where, rows = NamedSharding(jax.sharding.get_mesh(), BATCH), []
    for i, batch in batches:
        # Asks for the rows of this host's devices only; here every host has the whole text.
        rows_here = jax.make_array_from_callback(batch.shape, where, batch.__getitem__)
        state, metrics = step(state, rows_here)
        rows.append(metrics)
        if i % every == 0:  # of several clips in a chain, AdaGC's two, those of the last one
            last = {key.rpartition("/")[-1]: value for key, value in metrics.items()}
            say(f"{i:>5}", *(f"{last[name]:>13.6g}" for name in COLUMNS))
    return state, jax.device_get(rows)


def arguments() -> argparse.Namespace:
    """The options of the command line."""
    shape = lambda text: tuple(map(int, text.split("x")))
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("--steps", type=int, default=60, help="training steps (%(default)s)")
    add("--clipper", default="autoclip", help="of gradients: its name or name=threshold")
    add("--mesh", type=shape, help="replicas x shards (1 x all devices)")
    add("--restore-mesh", type=shape, help="of the second run (as --mesh)")
    add("--out", type=Path, default=Path("out/fsdp"), help="folder for all hosts")
    add("--cpu-devices", type=int, default=8, help="virtual ones, of all processes (%(default)s)")
    add("--processes", type=int, default=1, help="how many to start here, on the CPU")
    add("--join", nargs=2, help="host:port of process 0, and which process this is: starts none")
    add("--cluster", action="store_true", help="this is one process of many, as the cluster says")
    return parser.parse_args()


def start_all(processes: int) -> int:
    """Starts this program that many times, and ends all of them if one fails."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        coordinator = f"127.0.0.1:{free.getsockname()[1]}"
    command = [sys.executable, *sys.argv, "--join", coordinator]
    jobs = [subprocess.Popen([*command, str(i)]) for i in range(processes)]  # noqa: S603
    try:
        while None in (codes := [job.poll() for job in jobs]) and not any(codes):
            time.sleep(0.1)
    finally:
        for job in jobs:
            job.kill()
    return next(filter(None, codes), 0)


def main() -> int:
    """Trains, saves, restores and compares."""
    args = arguments()
    if args.processes > 1 and not args.join:
        return start_all(args.processes)
    if args.join:
        jax.config.update("jax_platforms", "cpu")
        jax.distributed.initialize(args.join[0], args.processes, int(args.join[1]))
    elif args.cluster:
        jax.distributed.initialize()  # the cluster says who and where
    jax.config.update("jax_num_cpu_devices", args.cpu_devices // args.processes)

    streams = STREAMS * jax.device_count()
    texts = read_text(streams=streams, chunk=CHUNK).train
    assert texts.max() < VOCABULARY
    batches = [(i, texts[i % len(texts)]) for i in range(args.steps)]
    before, after = batches[: args.steps // 2], batches[args.steps // 2 :]
    every, shape = max(args.steps // 12, 1), args.mesh or (1, jax.device_count())
    name, _, threshold = args.clipper.partition("=")
    clip = getattr(optaxclip, name)(*[float(threshold)] if threshold else [])
    model, tx = Transformer(), optax.chain(clip, optax.adamw(3e-3))

    def make() -> TrainState:
        params = model.init(jax.random.key(0), jnp.zeros((streams, CHUNK), jnp.int32))
        state = TrainState.create(apply_fn=model.apply, params=params, tx=tx)
        # Flax counts from a Python 0, which is no array yet; restored, it would be another program.
        return state.replace(step=jnp.zeros((), jnp.int32))

    plan = layout(shape, make)
    # Each part is made where it belongs: nothing is ever whole on one device.
    state = jax.jit(make, out_shardings=shardings(plan))()
    say(f"{jax.device_count()} devices of {jax.process_count()} processes, mesh {shape}")
    size = sum(x.nbytes for x in jax.tree.leaves(state))
    own = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(state))
    say(f"the state has {size:,} bytes; each device holds {own:,}\n")
    say(" step", *(f"{name:>13}" for name in COLUMNS))

    state, _ = train(state, before, every)
    with ocp.StandardCheckpointer() as checkpointer:
        path = args.out.resolve() / "checkpoint"
        checkpointer.save(path, state, force=True)
        checkpointer.wait_until_finished()
        say("saved")
        state, rows = train(state, after, every)
        if args.restore_mesh:
            plan = layout(args.restore_mesh, make)
        restored = checkpointer.restore(path, plan)
    say(f"restored on mesh {args.restore_mesh or shape}")
    state, again = train(restored, after, every)
    apart = max(abs(a["loss"] / b["loss"] - 1) for a, b in zip(again, rows, strict=True))
    same = "numbers, bit for bit" if again == rows else f"losses, but for {apart:.1e} of them"
    say(f"the second run had the same {same}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
