"""Optax's wrappers around a clip, and a clip in front of what wraps optimizers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import trees
from checks.runs import (
    PARAMS,
    SIZES,
    STREAM,
    alone,
    at,
    clip_states,
    close,
    loose,
    one_step,
    parameter,
    plain,
    scanned,
)

CLIPPED = {"kernel": True, "bias": False}
# Arguments that shape the program, which inject_hyperparams would make arrays.
STATIC = {"window", "min_history", "warmup"}


def chain(row):
    """Between transformations that do nothing, a clip gives the same bits."""
    tx = optax.chain(optax.identity(), row.make(), optax.identity())

    updates, states = scanned(tx)(PARAMS, STREAM)

    trees.assert_same_bits((updates, states[1]), alone(row)(PARAMS, STREAM))


def named_chain(row):
    """In a named chain it gives the same bits, and is found by its name."""
    tx = optax.named_chain(("clip", row.make()), ("last", optax.identity()))

    updates, states = scanned(tx)(PARAMS, STREAM)

    trees.assert_same_bits((updates, states["clip"]), alone(row)(PARAMS, STREAM))


def masked(row):
    """A masked clip does to the masked leaves what it does to a tree of them alone."""
    updates, _ = scanned(optax.masked(row.make(), CLIPPED))(PARAMS, STREAM)

    close({"kernel": updates["kernel"]}, _of(row, "kernel"))
    trees.assert_same_bits(updates["bias"], STREAM["bias"])


def partition(row):
    """Each part of a partition has a clip of its own, as if it were the whole tree."""
    tx = optax.partition(
        {"matrix": row.make(), "vector": row.make()}, {"kernel": "matrix", "bias": "vector"}
    )

    updates, _ = scanned(tx)(PARAMS, STREAM)

    close(updates, {**_of(row, "kernel"), **_of(row, "bias")})


def multi_steps(row):
    """Inside MultiSteps the mean of the microbatches is clipped, once."""
    halves = jax.tree.map(
        lambda g: jnp.stack([0.5 * g, 1.5 * g], 1).reshape(-1, *g.shape[1:]), STREAM
    )

    with loose():
        run = scanned(optax.MultiSteps(row.make(), 2).gradient_transformation())
        updates, states = run(PARAMS, halves)

    close(at(updates, slice(1, None, 2)), plain(row).updates)
    assert not any(np.any(x) for x in jax.tree.leaves(at(updates, slice(0, None, 2))))
    close(at(clip_states(states)[0], -1), at(clip_states(plain(row).states)[0], -1))


def multi_steps_that_skip(row):
    """A microbatch that MultiSteps skips for a NaN is never seen by the clip."""
    spoiled = jax.tree.map(
        lambda g: jnp.stack([jnp.full_like(g, jnp.nan), g], 1).reshape(-1, *g.shape[1:]), STREAM
    )
    tx = optax.MultiSteps(row.make(), 1, should_skip_update_fn=optax.skip_not_finite)

    with loose():
        updates, states = scanned(tx.gradient_transformation())(PARAMS, spoiled)

    close(at(updates, slice(1, None, 2)), plain(row).updates)
    assert not any(np.any(x) for x in jax.tree.leaves(at(updates, slice(0, None, 2))))
    assert int(clip_states(states)[0].metrics.nonfinite_steps[-1]) == 0


def apply_if_finite(row):
    """A step that apply_if_finite rejects is none for the clip."""
    spoiled = jax.tree.map(
        lambda g: jnp.concatenate([g[:5], jnp.full_like(g[:1], jnp.nan), g[5:]]), STREAM
    )

    updates, states = scanned(optax.apply_if_finite(row.make(), 3))(PARAMS, spoiled)

    good = np.arange(len(updates["bias"])) != 5
    close(at(updates, good), plain(row).updates)
    assert not any(np.any(x[5]) for x in jax.tree.leaves(updates))
    close(at(states.inner_state, -1), at(plain(row).states, -1))


def conditionally_transform(row):
    """On the steps that are chosen it clips as if there were no others."""
    twice = jax.tree.map(lambda g: jnp.repeat(g, 2, axis=0), STREAM)
    tx = optax.conditionally_transform(row.make(), lambda step, **_: step % 2 == 1)

    updates, _ = scanned(tx)(PARAMS, twice)

    close(at(updates, slice(1, None, 2)), plain(row).updates)
    trees.assert_same_bits(at(updates, slice(0, None, 2)), STREAM)


def inject_hyperparams(row):
    """With its hyperparameters in the state it gives what it gives with them in the program."""
    with loose():
        updates, states = scanned(_injected(row))(PARAMS, STREAM)

    close(updates, plain(row).updates)
    name, value = parameter(row)
    np.testing.assert_allclose(states.hyperparams[name], value, rtol=1e-6)


def injected_schedule(row):
    """A hyperparameter that is injected may follow a schedule."""
    name, value = parameter(row)

    with loose():
        tx = _injected(row, **{name: optax.linear_schedule(value / 2, value, len(SIZES) - 1)})
        updates, states = scanned(tx)(PARAMS, STREAM)

    expected = jnp.linspace(value / 2, value, len(SIZES))
    np.testing.assert_allclose(states.hyperparams[name], expected, rtol=1e-6)
    last, _ = one_step(row)(at(STREAM, -1), at(states.inner_state, -2), PARAMS)
    close(at(updates, -1), last)


def inject_hyperparams_mixed(row):
    """Injected hyperparameters change no dtype of a tree with bfloat16 and float32 leaves."""
    halved = lambda tree: {"bias": tree["bias"].astype(jnp.bfloat16), "kernel": tree["kernel"]}
    exact = lambda tree: jax.tree.map(lambda x: x.astype(jnp.float32), halved(tree))

    with loose():
        tx = _injected(row, hyperparam_dtype=jnp.float32)
        updates, _ = scanned(tx)(halved(PARAMS), halved(STREAM))
        own_dtype, _ = jax.eval_shape(scanned(_injected(row)), halved(PARAMS), halved(STREAM))

    dtypes = {"bias": jnp.bfloat16, "kernel": jnp.float32}
    for tree in (updates, own_dtype):
        assert {name: u.dtype for name, u in tree.items()} == dtypes
    expected, _ = alone(row)(exact(PARAMS), exact(STREAM))
    close({"kernel": updates["kernel"]}, {"kernel": expected["kernel"]})
    np.testing.assert_allclose(trees.float64(updates["bias"]), expected["bias"], rtol=2.0**-8)


def flatten(row):
    """Inside optax.flatten it sees one vector, and clips that."""
    vector = lambda tree, axis: jnp.concatenate(
        [x.reshape(*x.shape[:axis], -1) for x in jax.tree.leaves(tree)], axis
    )

    updates, _ = scanned(optax.flatten(row.make()))(PARAMS, STREAM)

    expected, _ = alone(row)(vector(PARAMS, 0), vector(STREAM, 1))
    close(vector(updates, 1), expected)


def schedule_free(row):
    """schedule_free around clip and optimizer is schedule_free fed with clipped gradients."""
    _equals_clipped_before(row, _schedule_free)


def mechanize(row):
    """mechanize around clip and optimizer is mechanize fed with clipped gradients."""
    _equals_clipped_before(row, _mechanize)


def reduce_on_plateau(row):
    """A chain that ends with reduce_on_plateau gets the loss past the clip."""
    _equals_clipped_before(row, _reduce_on_plateau, value=np.float32(1))


def muon(row):
    """A clip before Muon, which takes matrices apart from vectors, is one of the whole tree."""
    _equals_clipped_before(row, _muon)


def muon_partition(row):
    """A clip in each part of a partition into Muon and Adam does what it does before them."""
    clipped = {**_of(row, "kernel"), **_of(row, "bias")}

    with loose():
        updates, _ = scanned(_muon_and_adam(row.make()))(PARAMS, STREAM)
        expected, _ = _unclipped(_muon_and_adam)(PARAMS, clipped)

    close(updates, expected)


def lookahead(row):
    """In lookahead the fast steps between two synchronizations are clipped as alone."""
    pair = lambda tree: optax.LookaheadParams(tree, tree)
    tx = optax.lookahead(optax.chain(row.make(), optax.scale(-1.0)), 50, 0.5)

    @jax.jit
    def run():
        def step(state, grad):
            updates, state = tx.update(grad, state, pair(PARAMS))
            return state, updates.fast

        return jax.lax.scan(step, tx.init(pair(PARAMS)), STREAM)[1]

    with loose():
        updates = run()

    close(updates, jax.tree.map(jnp.negative, plain(row).updates))


def sam(row):
    """In SAM the gradients at the perturbed parameters are clipped as if there were no others."""
    twice = jax.tree.map(lambda g: jnp.repeat(g, 2, axis=0), STREAM)
    clipped = jax.tree.map(lambda g, u: g.at[1::2].set(u), twice, plain(row).updates)

    with loose():
        updates, _ = scanned(_sam(row.make()))(PARAMS, twice)
        expected, _ = _unclipped(_sam)(PARAMS, clipped)

    close(updates, expected)


def _of(row, name):
    """The updates of a tree of one leaf."""
    return alone(row)({name: PARAMS[name]}, {name: STREAM[name]})[0]


def _injected(row, hyperparam_dtype=None, **others):
    make, (name, value) = row.make, parameter(row)
    fun, given = getattr(make, "func", make), getattr(make, "keywords", {})
    inject = functools.partial(optax.inject_hyperparams, hyperparam_dtype=hyperparam_dtype)
    return inject(fun, static_args=STATIC & given.keys())(**{name: value, **given, **others})


def _equals_clipped_before(row, wrap, **extra):
    with loose():
        updates, states = scanned(wrap(row.make()), **extra)(PARAMS, STREAM)
        expected, _ = _unclipped(wrap, **extra)(PARAMS, plain(row).updates)
    close(updates, expected)
    for clip in clip_states(states):
        assert int(clip.metrics.steps[-1]) == len(STREAM["bias"])


@functools.cache
def _unclipped(wrap, **extra):
    """The same for all variants."""
    return scanned(wrap(optax.identity()), **extra)


def _sgd(clip):
    return optax.chain(clip, optax.sgd(0.1))


def _schedule_free(clip):
    return optax.contrib.schedule_free(_sgd(clip), 0.1)


def _mechanize(clip):
    return optax.contrib.mechanize(_sgd(clip))


def _reduce_on_plateau(clip):
    return optax.chain(_sgd(clip), optax.contrib.reduce_on_plateau(patience=2))


def _sam(clip):
    return optax.contrib.sam(_sgd(clip), optax.sgd(0.01))


def _muon(clip):
    return optax.chain(clip, optax.contrib.muon(0.1))


def _muon_and_adam(clip):
    """Muon for the kernel, Adam for the bias, each behind a clip of its own."""
    dimensions = optax.contrib.MuonDimensionNumbers()
    of_part = lambda part: jax.tree.map(lambda _: dimensions, part)
    rules = {
        "muon": optax.contrib.scale_by_muon(weight_dimension_numbers=of_part),
        "adam": optax.scale_by_adam(),
    }
    labels = {"kernel": "muon", "bias": "adam"}
    return optax.partition({name: optax.chain(clip, rule) for name, rule in rules.items()}, labels)
