"""Sharded gradients on eight virtual devices: results, shardings, compilations."""

import contextlib
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import trees
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from oracles import VARIANTS, once

import optaxclip as oc
from optaxclip import measure

SPECS = {
    "bias": PartitionSpec("x"),
    "dense": PartitionSpec("x", "y"),
    "attention": PartitionSpec(None, "y", None),
    "conv": PartitionSpec(),
}


# An eager call runs the same compiled step, so one variant per kind of norm does there.
EAGER = ["clip_by_value", "clip_by_global_norm", "adaptive_grad_clip stacked"]
CASES = [("jit", name) for name in VARIANTS if "ord=" not in name] + [("eager", n) for n in EAGER]


@pytest.mark.parametrize(("mode", "variant"), CASES)
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=lambda t: t.name)
def test_sharded_equals_unsharded(variant, axis_type, mode):
    """On a mesh, under set_mesh or not, results and shardings are those one would want."""
    row = VARIANTS[variant]
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(axis_type, axis_type))
    whole = trees.floats()
    whole["dense"] = whole["dense"].astype(
        jnp.bfloat16
    )  # chosen bit by bit where it fits the limit
    grads = {name: jax.device_put(g, NamedSharding(mesh, SPECS[name])) for name, g in whole.items()}
    expected, _ = once(row.make(), whole)

    for is_set in (False, True):
        # jax.set_mesh sets the mesh when it is called, not only when it is entered.
        with jax.set_mesh(mesh) if is_set else contextlib.nullcontext():
            tx = row.make()
            step = jax.jit(tx.update) if mode == "jit" else tx.update
            state = first = tx.init(grads)
            abstract = tx.init(jax.eval_shape(lambda g: g, grads))
            chex.assert_trees_all_equal_shapes_and_dtypes(abstract, first)
            for _ in range(3):
                updates, state = step(grads, state, grads)

        # Sums over shards are rounded differently, by a few 2^-24; bfloat16 by an ulp of its own.
        for name, update in updates.items():
            rtol = 2.0**-7 if update.dtype == jnp.bfloat16 else 2e-6
            trees.assert_close(trees.float64(update), trees.float64(expected[name]), rtol=rtol)
        for name, update in updates.items():
            assert update.sharding.is_equivalent_to(grads[name].sharding, update.ndim)
        for before, after in zip(jax.tree.leaves(first), jax.tree.leaves(state), strict=True):
            assert before.sharding.is_equivalent_to(after.sharding, 0)
        if mode == "jit":
            assert step._cache_size() == 1


# One memory of each shape: per tree, leaf, unit, stacked layer and coordinate, rings among them.
LAYERS = measure.stacked(measure.leaf_norm(), lambda path, leaf: 0 if leaf.ndim > 1 else None)
MEMORIES = {
    "tree": oc.zclip,
    "leaf": oc.adagc,
    "unit": functools.partial(
        oc.clip_by_percentile, window=9, min_history=2, measure=measure.unit_norm()
    ),
    "layer": functools.partial(oc.clip_by_sigma, window=9, min_history=2, measure=LAYERS),
    "coordinate": functools.partial(oc.clip_by_second_moment, warmup=1, patience=3),
    "moments": oc.scale_by_stable_adam,
}


@pytest.mark.parametrize("memory", MEMORIES)
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=lambda t: t.name)
def test_memories_are_sharded_like_what_they_remember(memory, axis_type):
    """Memories live where their norms do from init on, learn the same, and compile once."""
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(axis_type, axis_type))
    leaves = lambda **kw: {k: x for k, x in trees.floats(**kw).items() if k in ("bias", "dense")}
    stream = [leaves(scale=scale, seed=i) for i, scale in enumerate([1, 2, 1, 9, 9, 9, 9])]
    params = leaves(scale=0.5)
    shard = lambda tree: {
        name: jax.device_put(x, NamedSharding(mesh, SPECS[name])) for name, x in tree.items()
    }
    tx = MEMORIES[memory]()
    step = jax.jit(tx.update)
    expected = tx.init(params)
    for grads in stream:
        expected_updates, expected = step(grads, expected, params)

    state = first = tx.init(shard(params))
    for grads in stream:
        updates, state = step(shard(grads), state, shard(params))

    for before, after in zip(jax.tree.leaves(first), jax.tree.leaves(state), strict=True):
        assert before.sharding.is_equivalent_to(after.sharding, before.ndim)
    assert step._cache_size() == 2  # one program for the whole tree, one for the sharded one
    # Sums over shards are rounded differently, by a few 2^-24, and seven steps add that up.
    trees.assert_close(updates, expected_updates, 1e-5, atol=1e-6)
    trees.assert_close(state, expected, 1e-5, atol=1e-6)
    sharded = [x for x in jax.tree.leaves(state) if not x.sharding.is_fully_replicated]
    assert bool(sharded) == (memory not in {"tree", "leaf"})


def test_a_nan_on_one_device_is_seen_by_all():
    """One bad entry on one device makes the whole tree a bad step."""
    mesh = jax.make_mesh((8,), ("x",))
    values = np.ones((16, 4), np.float32)
    values[13, 2] = np.nan
    grads = {
        "w": jax.device_put(values, NamedSharding(mesh, PartitionSpec("x"))),
        "b": jax.device_put(jnp.ones(8), NamedSharding(mesh, PartitionSpec("x"))),
    }

    updates, state = once(VARIANTS["clip_by_global_norm"].make(), grads)

    assert not any(np.any(np.asarray(x)) for x in jax.tree.leaves(updates))
    assert int(state.metrics.nonfinite_steps) == 1


@pytest.mark.parametrize("variant", ["clip_by_global_norm", "clip_by_norm", "clip_by_block_rms"])
def test_no_leaf_is_gathered(variant):
    """The compiled program of a sharded clip holds all-reduces, and no all-gather."""
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(AxisType.Auto,) * 2)
    grads = {
        name: jax.device_put(g, NamedSharding(mesh, SPECS[name]))
        for name, g in trees.floats().items()
    }
    tx = VARIANTS[variant].make()

    program = jax.jit(tx.update).lower(grads, tx.init(grads), grads).compile().as_text()

    assert "all-gather" not in program
    assert "all-reduce" in program
