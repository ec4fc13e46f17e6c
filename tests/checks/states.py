"""What becomes of states and transformations: compiled, copied, stored, donated, compared."""

import copy
import pickle

import jax
import jax.export
import jax.numpy as jnp
import optax
import trees
from checks.runs import PARAMS, STREAM, at, clip_states, close, one_step, plain
from flax import serialization

from optaxclip.export import register_for_export


def pickled(row):
    """A pickled state has the bits of the state, and so has the next step."""
    _restored(row, pickle.loads(pickle.dumps(plain(row).warm)))  # noqa: S301 - our own bytes


def copied(row):
    """A deep copy of a state has its bits, and so has the next step."""
    _restored(row, copy.deepcopy(plain(row).warm))


def flax_bytes(row):
    """A state that Flax wrote and read has its bits, and so has the next step."""
    blank = row.make().init(PARAMS)
    _restored(row, serialization.from_bytes(blank, serialization.to_bytes(plain(row).warm)))


def avals(row):
    """The state has the same strong dtypes before and after a step, with and without x64."""
    tx = row.make()
    described = lambda tree: [(x.shape, x.dtype, x.weak_type) for x in jax.tree.leaves(tree)]
    found = []
    for x64 in (False, True):
        with jax.enable_x64(x64):
            state = jax.eval_shape(tx.init, PARAMS)
            _, after = jax.eval_shape(tx.update, PARAMS, state, PARAMS)
            found += [described(state), described(after), described(tx.init(PARAMS))]

    assert all(one == found[0] for one in found)
    assert {dtype for _, dtype, _ in found[0]} <= {jnp.dtype(jnp.float32), jnp.dtype(jnp.int32)}
    assert not any(weak for _, _, weak in found[0])


def donated(row):
    """Gradients and state can be donated, from the first state on."""
    tx = row.make()
    step = jax.jit(tx.update, donate_argnums=(0, 1))
    state = tx.init(PARAMS)
    for i in range(len(STREAM["bias"])):
        grads = at(STREAM, i)
        updates, state = step(grads, state, PARAMS)

    assert grads["bias"].is_deleted()
    close((updates, state), at((plain(row).updates, plain(row).states), -1))


def lowered(row):
    """A step that is compiled ahead of time is the jitted one, bit for bit."""
    p = plain(row)
    arguments = (p.grads, p.warm, PARAMS)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), arguments)

    compiled = jax.jit(row.make().update).lower(*shapes).compile()

    trees.assert_same_bits(compiled(*arguments), one_step(row)(*arguments))


def exported(row):
    """A step that was exported, serialized and read back is the jitted one, bit for bit."""
    p = plain(row)
    register_for_export(p.warm)
    arguments = (p.grads, p.warm, PARAMS)

    written = jax.export.export(jax.jit(row.make().update))(*arguments).serialize()
    read = jax.export.deserialize(written)

    trees.assert_same_bits(read.call(*arguments), one_step(row)(*arguments))


def map_params(row):
    """optax.tree.map_params pairs what it takes for copies of parameters with these, if any."""
    p = plain(row)

    def alike(x, param):
        assert x.shape == param.shape
        return x

    same = optax.tree.map_params(row.make(), alike, p.warm, PARAMS)

    trees.assert_same_bits(same, p.warm)


def tree_get(row):
    """optax.tree.get_all_with_path finds the metrics of a clip in a chain by their names."""
    state = optax.chain(row.make(), optax.sgd(0.1)).init(PARAMS)
    state = (plain(row).warm, *state[1:])

    norms = [x.metrics.norm for x in clip_states(state)]
    found = [x for _, x in optax.tree.get_all_with_path(state, "norm")]

    trees.assert_same_bits(found, norms)


def pickled_transformation(row):
    """A transformation can be pickled."""
    tx = pickle.loads(pickle.dumps(row.make()))  # noqa: S301 - our own bytes
    close(tx.update(plain(row).grads, plain(row).warm, PARAMS)[0], at(plain(row).updates, -1))


def equal_configurations(row):
    """Two transformations of one configuration are equal, so a jitted step takes either."""
    assert row.make() == row.make(), "not equal"
    assert hash(row.make()) == hash(row.make()), "not equal"


def _restored(row, state):
    p = plain(row)
    trees.assert_same_bits(state, p.warm)
    trees.assert_same_bits(
        one_step(row)(p.grads, state, PARAMS), one_step(row)(p.grads, p.warm, PARAMS)
    )
