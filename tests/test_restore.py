"""States that leave the program and come back: Orbax, Flax's bytes, other meshes, donation."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
import trees
from flax import serialization
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from roster import EVERY

import optaxclip as oc
from optaxclip.validate import validate_state

P = PartitionSpec
SPECS = {
    "eight": {"w": P("x"), "b": P("x")},
    "four by two": {"w": P(None, "y"), "b": P("y")},
    "one": {"w": P(), "b": P()},
}
SHAPES = {"eight": ((8,), ("x",)), "four by two": ((4, 2), ("x", "y")), "one": ((1,), ("x",))}

ALL = {name: row.make() for name, row in EVERY.items()}
# Those whose state holds more than metrics, and one of the others.
NAMES = [name for name, row in EVERY.items() if row.memory or name == "clip_by_norm"]
TXS = {name: optax.chain(ALL[name], optax.adam(0.1)) for name in NAMES}
STEPS = 5  # after which limits stand


def tree(seed, scale=3.0):
    """Gradients of a model with a sharded and a small leaf."""
    return {"w": trees.normal(8, 4, seed=seed, scale=scale), "b": trees.normal(8, seed=seed)}


def mesh(place):
    """One of the meshes."""
    shape, axes = SHAPES[place]
    return Mesh(np.array(jax.devices()[: np.prod(shape)]).reshape(shape), axes)


def put(tree, place):
    """The tree on one of the meshes."""
    sharding = lambda name: NamedSharding(mesh(place), SPECS[place][name])
    return {name: jax.device_put(x, sharding(name)) for name, x in tree.items()}


def placed(states, place):
    """The states on one of the meshes: clips begin there, the count of Optax's Adam does not."""
    everywhere = NamedSharding(mesh(place), P())
    assert all(x.committed for clip, _ in states.values() for x in jax.tree.leaves(clip))
    return jax.tree.map(lambda x: x if x.committed else jax.device_put(x, everywhere), states)


@pytest.fixture(autouse=True)
def _standard_promotion(hostile):
    """Adam mixes dtypes itself."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def init(params, txs=TXS):
    """The states of several transformations at once."""
    return {name: tx.init(params) for name, tx in txs.items()}


def update(grads, states, params, txs=TXS):
    """A step of each, from gradients of its own."""
    return {name: tx.update(grads[name], states[name], params) for name, tx in txs.items()}


def states_of(updated):
    """What `update` gives, but for the updates."""
    return {name: state for name, (_, state) in updated.items()}


STEP = jax.jit(lambda grads, states, params: update(dict.fromkeys(TXS, grads), states, params))


class Saved(NamedTuple):
    """A checkpoint, and the run that went on without it."""

    path: object
    states: dict
    after: dict  # updates and states one step later


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The states of all variants, trained on a mesh of eight devices, in one checkpoint."""
    params = put(tree(99, 0.5), "eight")
    states = placed(init(params), "eight")
    for seed in range(STEPS):
        states = states_of(STEP(put(tree(seed), "eight"), states, params))
    path = tmp_path_factory.mktemp("checkpoint") / "states"
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, states)
    return Saved(path, states, STEP(put(tree(STEPS), "eight"), states, params))


def restored(path, *target):
    """What Orbax makes of the checkpoint."""
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(path, *target)


@pytest.mark.parametrize("place", SPECS)
def test_restored_runs_go_on(saved, place):
    """Restored onto a mesh, all states have their bits, and one step later those of the run."""
    params = put(tree(99, 0.5), place)
    fresh = placed(init(params), place)

    states = restored(saved.path, fresh)

    trees.assert_same_bits(states, saved.states)
    for x, target in zip(jax.tree.leaves(states), jax.tree.leaves(fresh), strict=True):
        assert x.sharding.is_equivalent_to(target.sharding, x.ndim)
    assert validate_state(states) == validate_state(states, like=fresh) == []
    compiled = STEP._cache_size()
    after = STEP(put(tree(STEPS), place), states, params)
    if place == "eight":
        assert STEP._cache_size() == compiled
        trees.assert_same_bits(after, saved.after)
    else:
        # Sums over other shards are rounded differently, by a few 2^-24.
        trees.assert_close(after, saved.after, rtol=1e-6, atol=1e-6)


def test_a_restore_without_a_target(saved):
    """Orbax then gives dicts in place of NamedTuples: each clipper is named, and none repaired."""
    states = restored(saved.path)
    params = tree(99, 0.5)

    assert type(states["zclip"][0]) is dict
    found = validate_state(states)
    assert {p.place.split("/")[0] for p in found} == set(TXS)
    assert all(p.found == "a dict" for p in found)
    # Every leaf is there, under its name.
    assert [p.found for p in validate_state(states, like=init(params))] == [
        "containers of other types"
    ]
    with pytest.raises(ValueError, match=r"pass like=tx\.init\(params\)"):
        validate_state(states, repair=True)
    with pytest.raises(ValueError, match="only clippers are repaired"):
        validate_state(states, like=init(params), repair=True)


def test_a_restore_into_other_dtypes(saved):
    """Orbax casts to the dtypes of its target, whatever is lost; each of them is a problem."""
    fresh = init(tree(99, 0.5))
    narrow = lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16, sharding=x.sharding)
    targets = {name: (jax.tree.map(narrow, clip), rest) for name, (clip, rest) in fresh.items()}

    states = restored(saved.path, targets)

    assert states["zclip"][0].metrics.steps.dtype == jnp.bfloat16
    found = validate_state(states)
    assert len(found) == sum(len(jax.tree.leaves(clip)) for clip, _ in fresh.values())
    assert all(p.found.startswith("bfloat16") for p in found)
    mended = validate_state(states, like=fresh, repair=True)
    trees.assert_same_bits(mended, {n: (fresh[n][0], states[n][1]) for n in fresh})


def test_a_restore_into_other_shapes(tmp_path):
    """Orbax refuses a target of other shapes."""
    tx = oc.clip_by_norm_growth(record=False)  # one array
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", tx.init(tree(0)))

    with pytest.raises(ValueError, match="not compatible with the stored shape"):
        restored(tmp_path / "state", tx.init({"w": jnp.zeros(3)}))


def test_flax_bytes(saved):
    """Through bytes and back, all states have their bits; a shape of other bytes is a problem."""
    params = tree(99, 0.5)
    fresh = init(params)

    states = serialization.from_bytes(fresh, serialization.to_bytes(saved.states))

    trees.assert_same_bits(states, saved.states)
    assert validate_state(states) == validate_state(states, like=fresh) == []
    other = init({"w": params["w"], "b": trees.normal(5)})
    states = serialization.from_bytes(other, serialization.to_bytes(saved.states))
    assert states["clip_by_second_moment"][0].memory[0].threshold.root.shape == (8,)
    found = {p.place.split("/")[0] for p in validate_state(states, like=other)}
    assert found == {"clip_by_second_moment", "scale_by_stable_adam"}


def test_donation():
    """With gradients and states donated, all variants step in place, to the same bits."""
    params = tree(99, 0.5)
    grads = lambda seed: {name: tree(seed) for name in ALL}
    kept, given = init(params, ALL), init(params, ALL)
    args = (grads(0), kept, params)
    step = functools.partial(update, txs=ALL)
    plain = jax.jit(step).lower(*args).compile()
    donating = jax.jit(step, donate_argnums=(0, 1)).lower(*args).compile()

    for seed in range(3):
        expected = plain(grads(seed), kept, params)
        updated = donating(grads(seed), given, params)
        trees.assert_same_bits(updated, expected)
        kept, given = states_of(expected), states_of(updated)

    size = sum(x.nbytes for x in jax.tree.leaves((grads(0), given)))
    assert donating.memory_analysis().alias_size_in_bytes == size
