"""Training loops of the frameworks around a clip, on a real model whose gradients are known."""

import functools

import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
import optax
from checks.runs import INPUTS, PARAMS, SLOPES, STREAM, clip_states, close, loose
from flax import linen, nnx
from flax.training.train_state import TrainState

import optaxclip as oc

RATE = 0.1


@functools.cache
def by_hand(row):
    """Parameters and clip states after training without any framework."""
    tx = optimizer(row)

    @jax.jit
    def train():
        def step(carry, grads):
            params, state = carry
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (PARAMS, tx.init(PARAMS)), STREAM)[0]

    params, state = train()
    return params, clip_states(state)


def optimizer(row):
    """SGD behind the clip."""
    return optax.chain(row.make(), optax.sgd(RATE))


def linen_train_state(row):
    """A Flax Linen TrainState trains as by hand."""
    model = linen.Dense(2)
    start = TrainState.create(apply_fn=model.apply, params=PARAMS, tx=optimizer(row))

    def step(state, batch):
        x, slope = batch
        loss = lambda params: jnp.sum(state.apply_fn({"params": params}, x) * slope)
        return state.apply_gradients(grads=jax.grad(loss)(state.params)), None

    with loose():
        state, _ = jax.jit(lambda s: jax.lax.scan(step, s, (INPUTS, SLOPES)))(start)

    close((state.params, clip_states(state)), by_hand(row))
    assert set(oc.metrics(state)) == set(oc.metrics(state.opt_state))


def nnx_optimizer(row):
    """An nnx.Optimizer trains as by hand."""
    with loose():
        model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
        nnx.update(model, {name: nnx.Param(p) for name, p in PARAMS.items()})
        optimizer_ = nnx.Optimizer(model, optimizer(row), wrt=nnx.Param)

        @nnx.jit
        def step(model, optimizer_, x, slope):
            optimizer_.update(model, nnx.grad(lambda m: jnp.sum(m(x) * slope))(model))

        for x, slope in zip(INPUTS, SLOPES, strict=True):
            step(model, optimizer_, x, slope)

    params, clips = by_hand(row)
    close({"kernel": model.kernel[...], "bias": model.bias[...]}, params)
    found = clip_states(nnx.as_pure(optimizer_.opt_state))
    close(jax.tree.leaves(found), jax.tree.leaves(clips))


def equinox_filtered(row):
    """A filtered Equinox model, None for what is no parameter, trains as by hand."""

    class Linear(eqx.Module):
        bias: jax.Array
        kernel: jax.Array
        activation: object = jnp.asarray  # a function is no parameter
        width: int = 2

        def __call__(self, x):
            return self.activation(x @ self.kernel + self.bias[None])

    model, tx = Linear(**PARAMS), optimizer(row)
    state = tx.init(eqx.filter(model, eqx.is_inexact_array))

    @eqx.filter_jit
    def step(model, state, x, slope):
        grads = eqx.filter_grad(lambda m: jnp.sum(m(x) * slope))(model)
        updates, state = tx.update(grads, state, eqx.filter(model, eqx.is_inexact_array))
        return eqx.apply_updates(model, updates), state

    for x, slope in zip(INPUTS, SLOPES, strict=True):
        model, state = step(model, state, x, slope)

    params, clips = by_hand(row)
    close({"kernel": model.kernel, "bias": model.bias}, params)
    close(jax.tree.leaves(clip_states(state)), jax.tree.leaves(clips))
    assert model.width == 2


def haiku(row):
    """A transformed Haiku model trains as by hand."""
    model = hk.without_apply_rng(hk.transform(lambda x: hk.Linear(2, name="dense")(x)))  # noqa: PLW0108
    tx = optimizer(row)
    params = {"dense": {"w": PARAMS["kernel"], "b": PARAMS["bias"]}}

    def step(carry, batch):
        params, state = carry
        x, slope = batch
        grads = jax.grad(lambda p: jnp.sum(model.apply(p, x) * slope))(params)
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    with loose():
        init = model.init(jax.random.key(0), INPUTS[0])
        assert jax.tree.structure(init) == jax.tree.structure(params)
        (params, state), _ = jax.jit(lambda c: jax.lax.scan(step, c, (INPUTS, SLOPES)))(
            (params, tx.init(params))
        )

    expected, clips = by_hand(row)
    close({"kernel": params["dense"]["w"], "bias": params["dense"]["b"]}, expected)
    close(jax.tree.leaves(clip_states(state)), jax.tree.leaves(clips))
