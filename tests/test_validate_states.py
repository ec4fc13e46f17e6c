"""validate_state: no false alarm on what steps leave, wherever and in whatever it is."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import trees
from flax import nnx
from flax.training.train_state import TrainState
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from lived import STREAM, replaced, run, tree
from roster import EVERY

import optaxclip as oc
from optaxclip import validate_state


def test_no_false_alarm():
    """What steps leave, on good and bad gradients, fresh and running, has no problem."""
    init, states, _ = run()
    assert len(states) == len(STREAM) + 1
    for state in states:
        assert validate_state(state) == []
    abstract = jax.eval_shape(lambda s: s, init)
    for like in (init, abstract):
        assert validate_state(states[-1], like=like) == []
        assert validate_state(states[-1], like=like, repair=True) is not None
    assert any(not np.isfinite(x) for x in jax.tree.leaves(states[4]["propagate"][0].metrics))


@pytest.mark.parametrize("make", [oc.zclip, oc.clip_by_second_moment])
def test_vmapped(make):
    """States of several models at once have no problem, and a NaN in one of them is found."""
    tx = make(warmup=2)
    stacked = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), tree())
    state = jax.vmap(tx.init)(stacked)
    step = jax.jit(jax.vmap(tx.update))
    for _ in range(3):
        _, state = step(stacked, state)
        assert validate_state(state) == []
    limit = state.metrics.limit.at[1].set(np.nan)

    (problem,) = validate_state(state._replace(metrics=state.metrics._replace(limit=limit)))

    assert problem.place == "metrics/limit"


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=lambda t: t.name)
def test_sharded(axis_type):
    """On a mesh, one bad entry on one device is found, and repair keeps the shardings."""
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(axis_type,) * 2)
    params = jax.device_put(trees.normal(8, 4), NamedSharding(mesh, PartitionSpec("x", "y")))
    tx = oc.clip_by_percentile(window=3, min_history=1, measure=oc.measure.element())
    step = jax.jit(tx.update)
    init = tx.init(params)
    _, state = step(params, init)
    leaves = jax.tree.leaves(state)
    i = next(i for i, x in enumerate(leaves) if x.ndim == 3)
    values = np.asarray(leaves[i]).copy()
    values[0, 5, 1] = np.nan
    bad = replaced(state, i, jax.device_put(values, leaves[i].sharding))

    assert validate_state(state) == validate_state(state, like=init) == []
    (problem,) = validate_state(bad)
    assert problem.found == "nan"
    for like in (None, init, jax.eval_shape(tx.init, params)):
        repaired = validate_state(bad, like=like, repair=True)
        step(params, repaired)
        assert step._cache_size() == 1


@pytest.mark.parametrize(
    ("field", "place"), [("deviation", "0/memory/threshold/all/deviation"), ("nu", "1/nu/bias")]
)
def test_what_holds_a_state(field, place):
    """In a TrainState and in an nnx.Optimizer, clippers are found and repaired."""
    params = {"bias": jnp.ones(2), "kernel": jnp.ones((2, 2))}
    with jax.numpy_dtype_promotion("standard"):
        tx = optax.chain(EVERY["zclip"].make(), oc.scale_by_stable_adam())
        train = TrainState.create(apply_fn=None, params=params, tx=tx)
        optimizer = nnx.Optimizer(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), tx, wrt=nnx.Param)
    for holder in (train, optimizer):
        assert validate_state(holder) == validate_state(holder, like=holder) == []
        leaves = jax.tree.leaves_with_path(holder)
        i = next(
            i for i, (path, _) in enumerate(leaves) if f".{field}" in jax.tree_util.keystr(path)
        )
        bad = replaced(holder, i, jnp.full_like(leaves[i][1], np.nan))

        (problem,) = validate_state(bad)
        repaired = validate_state(bad, repair=True)

        assert problem.place.startswith(f"opt_state/{place}")
        assert type(repaired) is type(holder)
        assert jax.tree.structure(repaired) == jax.tree.structure(holder)
        assert validate_state(repaired) == []
