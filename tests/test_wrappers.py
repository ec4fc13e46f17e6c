"""What wrappers and frameworks are for, beside the values of matrix.py: metrics and checkpoints."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
import trees
from flax import linen, nnx
from flax.training.train_state import TrainState
from oracles import VARIANTS, once

import optaxclip as oc

X, Y = trees.normal(16, 4, scale=3.0), trees.normal(16, 2, scale=30.0)


@pytest.fixture
def standard_promotion():
    """Flax, and parts of Optax, mix dtypes and ranks themselves."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def test_masked_equals_the_subset():
    """With options that look at axes and paths too, masked leaves are clipped as alone."""
    row, grads = VARIANTS["adaptive_grad_clip stacked"], trees.floats()
    mask = {leaf: leaf in ("conv", "bias") for leaf in grads}
    subset = {leaf: grads[leaf] for leaf in ("conv", "bias")}

    updates, _ = once(optax.masked(row.make(), mask), grads)
    expected, _ = once(row.make(), subset)

    for leaf, g in grads.items():
        trees.assert_same_bits(updates[leaf], expected.get(leaf, g))


@pytest.mark.parametrize("make", [oc.clip_by_global_norm, oc.adaptive_grad_clip])
@pytest.mark.usefixtures("standard_promotion")
def test_inject_hyperparams_in_bfloat16(make):
    """In a bfloat16 model, where Optax makes the threshold a bfloat16, it clips nearly alike."""
    grads = trees.floats(dtype=jnp.bfloat16)
    injected = optax.inject_hyperparams(make)()

    updates, expected = jax.jit(lambda g: [once(tx, g)[0] for tx in (injected, make())])(grads)

    # One rounding of the threshold, one of the result.
    trees.assert_close(trees.float64(updates), trees.float64(expected), rtol=2 * 2.0**-8)


@pytest.mark.usefixtures("standard_promotion")
def test_inject_hyperparams_of_a_static_argument():
    """An argument that shapes the program is named in static_args, or the error says so."""
    grads = trees.floats()

    with pytest.raises(TypeError, match="'axis' is in its static_args"):
        optax.inject_hyperparams(oc.adaptive_grad_clip)(axis=0).init(grads)
    tx = optax.inject_hyperparams(oc.adaptive_grad_clip, static_args=("axis",))(axis=0)

    trees.assert_close(once(tx, grads)[0], once(oc.adaptive_grad_clip(axis=0), grads)[0], rtol=2e-6)


def test_apply_if_finite_skips_before_the_clip_sees():
    """Around a clip, apply_if_finite keeps a bad step from it, and from the optimizer."""
    tx = optax.apply_if_finite(optax.chain(oc.clip_by_global_norm(), optax.sgd(1.0)), 3)

    updates, state = once(tx, jnp.array([1.0, jnp.nan]))

    np.testing.assert_array_equal(updates, [0.0, 0.0])
    assert int(state.total_notfinite) == 1
    assert int(oc.metrics(state)["steps"]) == 0


@pytest.mark.usefixtures("standard_promotion")
def test_flax_train_state():
    """A Linen TrainState trains with a clip, and its metrics are read from it."""
    model = linen.Dense(2)
    tx = optax.chain(oc.clip_by_global_norm(1.0), optax.adamw(1e-2))
    state = TrainState.create(
        apply_fn=model.apply, params=model.init(jax.random.key(0), X)["params"], tx=tx
    )

    @jax.jit
    def step(state):
        loss = lambda p: jnp.mean((state.apply_fn({"params": p}, X) - Y) ** 2)
        return state.apply_gradients(grads=jax.grad(loss)(state.params))

    for _ in range(3):
        state = step(state)

    found = oc.metrics(state)
    assert int(found["steps"]) == int(found["clipped_steps"]) == 3
    assert found["norm"] > 1
    assert found["clipped_norm"] == pytest.approx(1.0, rel=1e-6, abs=0)
    assert oc.metrics(state.opt_state) == found


@pytest.mark.usefixtures("standard_promotion")
def test_nnx_optimizer():
    """An nnx.Optimizer trains with a clip, and its metrics are read from it, unwrapped."""
    model = nnx.Linear(4, 2, rngs=nnx.Rngs(0))
    tx = optax.chain(oc.clip_by_norm(1.0), oc.adaptive_grad_clip(), optax.adamw(1e-2))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        grads = nnx.grad(lambda m: jnp.mean((m(X) - Y) ** 2))(model)
        optimizer.update(model, grads)
        return oc.metrics(optimizer)

    inside = [step(model, optimizer) for _ in range(3)][-1]
    found = oc.metrics(optimizer)

    assert int(found["0/steps"]) == int(found["0/clipped_steps"]) == 3
    assert found["0/norm"] > 1
    with pytest.raises(ValueError, match=r"not its nnx\.state"):
        oc.metrics(nnx.state(optimizer))
    assert all(type(x) is type(jnp.zeros(())) for x in found.values())
    assert {k: v.item() for k, v in found.items()} == {k: v.item() for k, v in inside.items()}


@pytest.mark.usefixtures("standard_promotion")
def test_orbax_restores_the_state(tmp_path):
    """A state restored by Orbax has the bits of the one saved, and the next step is the same."""
    tx = optax.chain(
        oc.clip_by_global_norm(optax.constant_schedule(1.0)),
        oc.clip(
            oc.measure.unit_norm(),
            oc.threshold.until(3, oc.threshold.constant(0.1), oc.threshold.constant(1.0)),
            record=False,
        ),
        optax.adam(1e-2),
    )
    grads = trees.floats()
    _, state = once(tx, grads)

    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "state", jax.eval_shape(tx.init, grads))

    trees.assert_same_bits(restored, state)
    step = jax.jit(tx.update)
    trees.assert_same_bits(step(grads, restored, grads), step(grads, state, grads))
