"""Train steps compiled ahead of time, and written to be run elsewhere."""

import functools
import subprocess
import sys
from typing import NamedTuple

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import trees
from flax import linen

import optaxclip as oc
from optaxclip.export import register_for_export

MODEL = linen.Dense(2)
TX = optax.chain(oc.zclip(warmup=2), optax.adam(1e-2))
X, Y = trees.normal(16, 3, scale=3.0), trees.normal(16, 2, scale=30.0)


@jax.jit
def train_step(params, state, x, y):
    """One step of a Flax model under an adaptive clip and Adam."""
    # Flax and Adam mix dtypes and ranks themselves.
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        loss = lambda p: jnp.mean((MODEL.apply({"params": p}, x) - y) ** 2)
        updates, state = TX.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state


@functools.cache
def start():
    """The parameters and the state before the first step."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        params = MODEL.init(jax.random.key(0), X)["params"]
    return params, TX.init(params)


def after(step, steps=4):
    """Parameters and state after some steps, the third on 100 times as large targets."""
    carry = start()
    for i in range(steps):
        carry = step(*carry, X, Y * (100 if i == 2 else 1))
    return carry


def test_a_train_step_is_compiled_ahead_of_time():
    """Compiled from shapes alone, a train step gives the bits of the jitted one."""
    shapes = jax.eval_shape(lambda *arrays: arrays, *start(), X, Y)

    compiled = train_step.lower(*shapes).compile()

    trees.assert_same_bits(after(compiled), after(train_step))
    assert int(oc.metrics(after(compiled)[1])["clipped_steps"]) == 1
    with pytest.raises(TypeError, match=r"compiled with float32\[16,3\] and called with bfloat16"):
        compiled(*start(), X.astype(jnp.bfloat16), Y)


def test_a_train_step_is_exported():
    """Serialized for three platforms and any batch, it gives the same bits when read again."""
    register_for_export(start())
    batch = jax.export.symbolic_shape("n")
    x, y = (jax.ShapeDtypeStruct((*batch, a.shape[1]), a.dtype) for a in (X, Y))

    exporting = jax.export.export(train_step, platforms=("cpu", "cuda", "tpu"))
    written = exporting(*start(), x, y).serialize()
    read = jax.export.deserialize(written)

    trees.assert_same_bits(after(read.call), after(train_step))


def test_another_process_reads_it(tmp_path):
    """A process that has only the transformation can register its state, and run what it reads."""
    grads = jnp.array([3.0, 4.0])
    tx = oc.clip_by_norm(1.0)
    register_for_export(tx.init(grads))
    exported = jax.export.export(jax.jit(tx.update))(grads, tx.init(grads))
    (tmp_path / "step").write_bytes(exported.serialize())
    program = """
import pathlib, sys, jax, jax.export, jax.numpy as jnp, optaxclip
from optaxclip.export import register_for_export
grads = jnp.array([3.0, 4.0])
state = optaxclip.clip_by_norm(1.0).init(grads)
register_for_export(jax.eval_shape(lambda: state))
step = jax.export.deserialize(bytearray(pathlib.Path(sys.argv[1]).read_bytes()))
updates, state = step.call(grads, state)
print(updates, optaxclip.metrics(state)["norm"])
"""

    assert output_of(program, tmp_path / "step") == "[0.6 0.8] 5.0\n"


def test_registering_needs_no_flatbuffers():
    """Without the package that JAX writes with, states are registered nonetheless."""
    program = """
import sys
sys.modules["flatbuffers"] = None
import jax.numpy as jnp, optaxclip
from optaxclip.export import register_for_export
state = optaxclip.clip_by_norm(1.0).init(jnp.zeros(2))
print(register_for_export(state))
"""

    assert output_of(program) == "None\n"


def output_of(program, *arguments):
    """What a Python process prints."""
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments], check=True, capture_output=True, text=True
    )
    return done.stdout


class Mine(NamedTuple):
    """A state of one's own."""

    count: jax.Array


def serialized(state):
    """A function of a state, written."""
    return jax.export.export(jax.jit(lambda s: s))(state).serialize()


def test_states_of_ones_own_are_registered():
    """Any NamedTuple in a tree can be written once it is registered, however often that was."""
    inside = {"own": [Mine(jnp.zeros(()))], "none": None}
    with pytest.raises(ValueError, match="unregistered type"):
        serialized(inside)

    register_for_export(inside)
    register_for_export(inside)

    read = jax.export.deserialize(serialized(inside)).call(inside)
    trees.assert_same_bits(read, inside)


def test_other_registrations_stay():
    """A type keeps the name it has; a second type of one name is refused, as by JAX."""

    def defined():
        class Again(NamedTuple):
            count: jax.Array

        return Again(jnp.zeros(()))

    first, second, third = defined(), defined(), defined()
    jax.export.register_namedtuple_serialization(type(first), serialized_name="its own name")
    register_for_export(first)
    register_for_export(second)

    assert b"its own name" in serialized(first)
    with pytest.raises(ValueError, match="Duplicate serialization registration for serialized"):
        register_for_export(third)


@pytest.mark.whole  # each cell measures in a room of its own
@pytest.mark.parametrize(
    "make",
    [oc.clip_by_global_norm, oc.clip_by_norm, oc.clip_by_value, oc.adaptive_grad_clip],
)
def test_a_length_may_be_left_open(make):
    """A clip is written for gradients of any length, and right for each."""
    tx = make()
    clipped = lambda grads: tx.update(grads, tx.init(grads), grads)[0]
    (length,) = jax.export.symbolic_shape("length")
    shape = jax.ShapeDtypeStruct((length, 4), jnp.float32)
    written = jax.export.export(jax.jit(clipped))(shape)

    grads = trees.normal(5, 4, scale=9.0)
    trees.assert_close(written.call(grads), np.asarray(jax.jit(clipped)(grads)), 1e-6)
