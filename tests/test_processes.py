"""Two processes over loopback, 4 devices each: they clip as one, or say so."""

import contextlib
import os
import pathlib
import re
import socket
import subprocess
import sys
import time

import jax
import limits
import numpy as np
import optax
import oracles
import processes
import pytest
import roster
import trees
from jax.sharding import AxisType

import optaxclip as oc

PROGRAM = pathlib.Path(__file__).with_name("processes.py")


def run_both(folder, *variants, seconds=60):
    """What both processes saw, to the bit; where one fails or hangs, what both printed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        coordinator = f"127.0.0.1:{free.getsockname()[1]}"
    hostile = {"JAX_NUMPY_DTYPE_PROMOTION": "strict", "JAX_NUMPY_RANK_PROMOTION": "raise"}
    devices = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "4", "XLA_FLAGS": ""}
    env, command = os.environ | hostile | devices, [sys.executable, "-W", "error", PROGRAM]
    logs = [folder / f"{rank}.log" for rank in (0, 1)]
    with contextlib.ExitStack() as stack:
        jobs = []
        for rank, path in enumerate(logs):
            log = stack.enter_context(path.open("w"))
            arguments = [coordinator, str(rank), folder / f"{rank}.npz", *variants]
            job = subprocess.Popen([*command, *arguments], env=env, stdout=log, stderr=log)
            stack.callback(job.wait)
            stack.callback(job.kill)
            jobs.append(job)
        end = time.monotonic() + seconds
        while None in (codes := [job.poll() for job in jobs]) and not any(codes):
            if time.monotonic() > end:
                break
            time.sleep(0.05)
    printed = "\n".join(path.read_text() for path in logs)
    assert codes == [0, 0], f"exit codes {codes}, None for what had not ended\n{printed}"
    seen, other = (dict(np.load(folder / f"{rank}.npz")) for rank in (0, 1))
    assert seen.keys() == other.keys()
    different = [key for key in seen if trees.bits(seen[key]) != trees.bits(other[key])]
    assert not different
    return seen


def zscore_limits(norms):
    """The limit of `zclip` at each step, in float64; a norm out of range teaches nothing."""
    known, found = [], []
    for i, norm in enumerate(norms):
        found.append(limits.zscore(2.5, warmup=3)([*known, norm])[-1])
        if i != processes.BAD_STEP and norm < 2.0**64:
            known.append(norm)
    return found


def by_zscore(steps):
    """The updates of `zclip` at all steps."""
    norms = [oracles.tree_norm(grads) for grads in steps]
    return [
        {name: oracles.shrink(g, norm, limit) for name, g in grads.items()}
        for grads, norm, limit in zip(steps, norms, zscore_limits(norms), strict=True)
    ]


def by_unit(steps):
    """The updates of AGC at all steps."""
    agc = lambda g, p: oracles.agc(g, p, oracles.unit_axes(g), 0.5, 1e-3)
    return [jax.tree.map(agc, grads, trees.float64(processes.PARAMS)) for grads in steps]


def by_step(name):
    """The updates of a variant without memory at all steps."""
    return lambda steps: [oracles.VARIANTS[name].oracle(grads, None) for grads in steps]


# The steps of the stream in float64 -> what one process that holds the whole would make of them.
ORACLES = {
    "clip_by_global_norm": by_step("clip_by_global_norm"),
    "clip_by_norm": by_step("clip_by_norm"),
    "clip_by_value": by_step("clip_by_value"),
    "adaptive_grad_clip": by_unit,
    "zclip": by_zscore,
}


def zero_the_bad(groups, update):
    """Makes the group of the bad entry zero."""
    name, (row, column) = processes.BAD
    for leaf in update if groups == "tree" else [name]:
        update[leaf][{"unit": (slice(None), column), "entry": (row, column)}.get(groups, ...)] = 0


def test_two_processes_clip_as_one(tmp_path):
    """Updates, metrics and memories have the same bits on both hosts, and are the right ones."""
    seen = run_both(tmp_path, *ORACLES)

    # To NumPy, the bad entry is 0; what becomes of its group is said apart.
    steps = [jax.tree.map(np.nan_to_num, trees.float64(grads)) for grads in processes.stream()]
    for name, oracle in ORACLES.items():
        for i, update in enumerate(oracle(steps)):
            if i == processes.BAD_STEP:
                zero_the_bad(roster.EVERY[name].groups, update)
            got = {leaf: seen[f"{name}/{i}/updates/{leaf}"] for leaf in update}
            # A norm in float32 is right to a few 2^-24, and so is the factor.
            trees.assert_close(trees.float64(got), update, rtol=1e-6)
            assert trees.bits(seen[f"{name}/{i}/own"]) == trees.bits(got["whole"])
            counts = [int(seen[f"{name}/{i}/metrics/{k}"]) for k in ("steps", "nonfinite_steps")]
            assert counts == [i + 1, i >= processes.BAD_STEP]
        assert int(seen[f"{name}/{i}/metrics/clipped_steps"]) > 0
    memory = jax.tree.leaves(roster.EVERY["zclip"].make().init(processes.PARAMS).memory)
    # All but the clocks, which are int32 and count every step.
    learned = [k for k, x in enumerate(memory) if x.dtype == np.float32]
    assert learned
    before, after = (
        [trees.bits(seen[f"zclip/{i}/state/{k}"]) for k in learned]
        for i in (processes.BAD_STEP - 1, processes.BAD_STEP)
    )
    assert before == after


@pytest.mark.proof
def test_two_processes_clip_as_one_with_every_variant(tmp_path):
    """All variants give the same bits on both hosts, and what one process gives for the whole."""
    seen = run_both(tmp_path, *roster.EVERY, seconds=300)

    different = []
    for name, variant in roster.EVERY.items():
        tx = variant.make()
        step, state = jax.jit(tx.update), tx.init(processes.PARAMS)
        for i, grads in enumerate(processes.stream()):
            updates, state = step(grads, state, processes.PARAMS)
            whole = {"updates": updates, "state": dict(enumerate(jax.tree.leaves(state)))}
            for kind, tree in whole.items():
                for key, x in tree.items():
                    place = f"{name}/{i}/{kind}/{key}"
                    # Sums over shards are rounded differently, by a few 2^-24, and nine steps add
                    # that up.
                    if not np.allclose(seen[place], x, rtol=1e-5, atol=0, equal_nan=True):
                        different.append(place)
    assert not different, "\n".join(different)


# Those that take a maximum over devices, where XLA:CPU's all-reduce drops NaN.
LARGEST = {
    "clip_by_global_norm ord=inf": lambda: oc.clip_by_global_norm(1.0, ord=np.inf),
    "clip_by_norm ord=inf": lambda: oc.clip_by_norm(1.0, ord=np.inf),
    "clippy": oc.clippy,
    "the metrics of clip_by_value": oc.clip_by_value,
}


@pytest.mark.parametrize("case", LARGEST)
def test_a_nan_on_one_device_is_not_lost_to_a_maximum(case):
    """Where the largest entry is measured, a NaN that one device holds makes the norm a NaN."""
    mesh = jax.make_mesh((8,), ("hosts",), axis_types=(AxisType.Auto,))
    grads = processes.shard(mesh, processes.stream()[processes.BAD_STEP])
    tx = LARGEST[case]()

    updates, state = tx.update(grads, tx.init(grads), processes.shard(mesh, processes.PARAMS))

    assert not any(np.isnan(x).any() for x in jax.tree.leaves(updates))
    assert int(state.metrics.nonfinite_steps) == 1
    assert np.isnan(state.metrics.norm)


# How many all-reduces a step issues: one for all norms of a kind. The rest is in branches for norms
# out of range, which all devices enter or none, because they decide by what was reduced.
REDUCTIONS = {
    "global": (oc.clip_by_global_norm, 1),
    "leaf": (oc.clip_by_norm, 1),
    "learned": (oc.zclip, 1),
    "entry": (lambda: oc.clip_by_value(record=False), 0),
    # Norms of gradients and parameters together, and whether some are out of range.
    "unit": (lambda: oc.adaptive_grad_clip(record=False), 2),
    "two clips": (lambda: optax.chain(oc.clip_by_norm(), oc.clip_by_global_norm()), 2),
}


@pytest.mark.parametrize("case", REDUCTIONS)
def test_failure_7_the_collectives_of_a_step_have_one_order(case):
    """A step is one scheduled program, with one all-reduce per kind of norm and nothing gathered.

    Two hosts that issue two programs in different order exchange the numbers of one for those of
    the other. Over gloo there is no error: hosts that issued `clip_by_global_norm(1.0)`, another
    clip and `clip_by_global_norm(1.0, ord=inf)`, one forwards and one backwards, read norms of 3.05
    and 2.38 in place of 3.59, and of 2.95 and 4.70 in place of 0.98.

    Guaranteed, and tested here and above: every clip is one program, so there is nothing to be
    mixed up inside; all clips of a jitted step are one program together; each process compiles the
    same one; `optaxclip.metrics` issues none.

    What stays with the user: all hosts must issue the same programs in the same order. Jit the
    whole step. Call no update under an `if` that hosts decide differently, such as one on
    `jax.process_index()`, on time, or on an exception, and none from several threads.
    """
    make, count = REDUCTIONS[case]
    mesh = jax.make_mesh((8,), ("hosts",), axis_types=(AxisType.Auto,))
    grads = processes.shard(mesh, processes.PARAMS)
    tx = make()

    program = jax.jit(tx.update).lower(grads, tx.init(grads), grads).compile().as_text()

    # The instructions of a scheduled program are run in the order in which they are listed.
    assert "is_scheduled=true" in program.partition("\n")[0]
    entry = program[program.index("\nENTRY ") :]
    assert len(re.findall(r" all-reduce(?:-start)?\(", entry)) == count
    assert not re.search("all-gather|all-to-all|reduce-scatter|collective-permute", program)


def test_failure_7_an_eager_clip_is_one_program(caplog):
    """An eager update and the reading of its metrics run one program."""
    mesh = jax.make_mesh((8,), ("hosts",), axis_types=(AxisType.Auto,))
    # Shapes and a mesh of this file alone, so that no program was compiled before.
    grads = processes.shard(mesh, jax.tree.map(lambda x: np.tile(x, 5), processes.PARAMS))
    tx = oc.clip_by_global_norm(1.0)
    state = tx.init(grads)

    with jax.log_compiles(), caplog.at_level("WARNING", logger="jax"):
        _, state = tx.update(grads, state)
        oc.metrics(state)

    assert re.findall(r"Compiling (\S+) with", caplog.text) == ["jit(step)"]
