"""What each process of the job in test_processes.py runs: it clips, and writes down what it sees.

    python processes.py COORDINATOR RANK FILE VARIANT...

Each of two processes has 4 of 8 devices. Both know every array of the stream as a whole, but each
hands its devices their shards only.
"""

import hashlib
import sys

import jax
import numpy as np
import roster
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import optaxclip as oc

SPECS = {"rows": P("hosts"), "columns": P(None, "hosts"), "whole": P()}
BAD = ("rows", (6, 2))  # in a row of the second process; it has the rows from 4 on
# An ordinary stream, a spike, the bad step, squares that underflow and such that overflow, the end.
SCALES = (1.0, 1.2, 0.9, 1.1, 10.0, 1.0, 1e-25, 1e22, 1.0)
BAD_STEP = 5


def tree(*, scale, seed):
    """One tree of NumPy arrays: no JAX before the processes know of each other."""
    draw = np.random.default_rng(seed).normal
    shapes = {"rows": (8, 4), "columns": (4, 8), "whole": (3,)}
    return {name: np.float32(scale * draw(size=shape)) for name, shape in shapes.items()}


def stream():
    """The gradients of every step."""
    steps = [tree(scale=scale, seed=seed) for seed, scale in enumerate(SCALES)]
    name, index = BAD
    steps[BAD_STEP][name][index] = np.nan
    return steps


PARAMS = tree(scale=0.5, seed=99)


def shard(mesh, arrays):
    """Global arrays, of which each process makes what its devices hold."""
    sharding = {name: NamedSharding(mesh, spec) for name, spec in SPECS.items()}
    return {
        name: jax.make_array_from_callback(x.shape, sharding[name], x.__getitem__)
        for name, x in arrays.items()
    }


def main(coordinator, rank, path, *variants):
    """Runs these clippers through the stream."""
    jax.distributed.initialize(coordinator, 2, int(rank), initialization_timeout=30)
    assert (jax.device_count(), jax.local_device_count()) == (8, 4)
    mesh = jax.make_mesh((8,), ("hosts",), axis_types=(AxisType.Auto,))
    replicated = NamedSharding(mesh, P())
    gather = jax.jit(lambda x: x, out_shardings=replicated)
    params, steps, seen = shard(mesh, PARAMS), [shard(mesh, g) for g in stream()], {}
    for name in variants:
        tx = roster.EVERY[name].make()
        state = tx.init(params)
        step = jax.jit(tx.update).lower(steps[0], state, params).compile()
        seen[f"{name}/program"] = hashlib.sha256(step.as_text().encode()).hexdigest()
        for i, grads in enumerate(steps):
            updates, state = step(grads, state, params)
            here = f"{name}/{i}"
            # Made by this process: what is replicated is not sent.
            seen[f"{here}/own"] = updates["whole"].addressable_data(0)
            seen |= {f"{here}/metrics/{k}": x for k, x in oc.metrics(state).items()}
            updates, leaves = gather((updates, jax.tree.leaves(state)))
            seen |= {f"{here}/updates/{k}": x for k, x in updates.items()}
            seen |= {f"{here}/state/{k}": x for k, x in enumerate(leaves)}
    np.savez(path, **{key: np.asarray(x) for key, x in seen.items()})


if __name__ == "__main__":
    main(*sys.argv[1:])
