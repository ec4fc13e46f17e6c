"""Sharded gradients on eight virtual devices: results, shardings, compilations."""

import contextlib
import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import trees
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from oracles import VARIANTS, once
from roster import BEYOND, EVERY

import optaxclip as oc
from optaxclip import measure

SPECS = {
    "bias": PartitionSpec("x"),
    "dense": PartitionSpec("x", "y"),
    "attention": PartitionSpec(None, "y", None),
    "conv": PartitionSpec(),
}
SHAPES = {1: (1, 1), 2: (1, 2), 4: (4, 1), 8: (4, 2)}  # devices along x and y
TWICE = ("clip_by_second_moment", "scale_by_stable_adam")
NAMES = [*EVERY, *BEYOND, "adaptive_grad_clip stacked", "adaptive_grad_clip per_tensor"]


def make(name):
    return (VARIANTS | EVERY | BEYOND)[name].make()


def sharded(tree, mesh):
    """The leaves on the mesh: split along axis 0, both, axis 1, and not at all."""
    return {k: jax.device_put(x, NamedSharding(mesh, SPECS[k])) for k, x in tree.items()}


def mesh_of(axis_type, devices=8):
    shape = SHAPES[devices]
    return jax.make_mesh(
        shape, ("x", "y"), axis_types=(axis_type,) * 2, devices=jax.devices()[:devices]
    )


def whole():
    """Gradients in which one leaf is chosen bit by bit where it fits the limit."""
    tree = trees.floats()
    return tree | {"dense": tree["dense"].astype(jnp.bfloat16)}


@functools.cache
def unsharded(name):
    """Three steps on one device."""
    tx, grads = make(name), whole()
    step, state = jax.jit(tx.update), tx.init(grads)
    for _ in range(3):
        updates, state = step(grads, state, grads)
    return updates


def check(name, axis_type, mode, devices):
    """On a mesh, under set_mesh or not, results and shardings are those one would want."""
    mesh = mesh_of(axis_type, devices)
    grads = sharded(whole(), mesh)

    for is_set in (False, True):
        # jax.set_mesh sets the mesh when it is called, not only when it is entered.
        with jax.set_mesh(mesh) if is_set else contextlib.nullcontext():
            tx = make(name)
            step = jax.jit(tx.update) if mode == "jit" else tx.update
            state = first = tx.init(grads)
            abstract = tx.init(jax.eval_shape(lambda g: g, grads))
            chex.assert_trees_all_equal_shapes_and_dtypes(abstract, first)
            for _ in range(3):
                updates, state = step(grads, state, grads)

        # Sums over shards are rounded differently, by a few 2^-24, which some twenty products of
        # matrices add up; bfloat16 by an ulp of its own.
        close = 2e-5 if name == "clip_by_spectral_norm" else 1e-6
        for leaf, update in updates.items():
            rtol = 2.0**-7 if update.dtype == jnp.bfloat16 else close
            expected = trees.float64(unsharded(name)[leaf])
            trees.assert_close(trees.float64(update), expected, rtol=rtol, atol=1e-9)
            assert update.sharding.is_equivalent_to(grads[leaf].sharding, update.ndim)
        for before, after in zip(jax.tree.leaves(first), jax.tree.leaves(state), strict=True):
            assert before.sharding.is_equivalent_to(after.sharding, before.ndim)
        if mode == "jit" and devices > 1:  # one device can be spelled in too many ways
            # A fault that is known: over an axis of one device, a sharding of entries is spelled
            # one way before the first step on an Auto mesh, and another one after.
            known = axis_type == AxisType.Auto and 1 in SHAPES[devices] and name in TWICE
            assert step._cache_size() == (2 if known else 1)


both_types = pytest.mark.parametrize(
    "axis_type", [AxisType.Auto, AxisType.Explicit], ids=lambda t: t.name
)
# An eager call runs the same compiled step, so one variant per kind of norm does there; so does it
# for Auto meshes, which refuse nothing that Explicit ones allow.
KINDS = ["clip_by_value", "clip_by_global_norm", "adaptive_grad_clip stacked", "zclip"]
CASES = [(AxisType.Explicit, "jit", name) for name in NAMES]
CASES += [(AxisType.Auto, "jit", name) for name in KINDS]
CASES += [(AxisType.Explicit, "eager", name) for name in KINDS]
EIGHT = [pytest.param(*case, id=f"{case[0].name}-{case[1]}-{case[2]}") for case in CASES]


@pytest.mark.parametrize(("axis_type", "mode", "name"), EIGHT)
def test_sharded_equals_unsharded(axis_type, mode, name):
    """Eight devices give the updates of one, in place, and compile once."""
    check(name, axis_type, mode, devices=8)


@pytest.mark.proof
@both_types
@pytest.mark.parametrize("devices", SHAPES)
@pytest.mark.parametrize("mode", ["jit", "eager"])
@pytest.mark.parametrize("name", NAMES)
def test_any_mesh_equals_none(axis_type, devices, mode, name):
    """So do one, two and four, on either kind of mesh, eager or compiled."""
    check(name, axis_type, mode, devices)


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
@both_types
def test_memories_are_sharded_like_what_they_remember(memory, axis_type):
    """Memories live where their norms do from init on, learn the same, and compile once."""
    mesh = mesh_of(axis_type)
    leaves = lambda **kw: {k: x for k, x in trees.floats(**kw).items() if k in ("bias", "dense")}
    stream = [leaves(scale=scale, seed=i) for i, scale in enumerate([1, 2, 1, 9, 9, 9, 9])]
    params = leaves(scale=0.5)
    shard = functools.partial(sharded, mesh=mesh)
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
    split = [x for x in jax.tree.leaves(state) if not x.sharding.is_fully_replicated]
    assert bool(split) == (memory not in {"tree", "leaf"})


@pytest.mark.parametrize("name", EVERY)
def test_a_nan_on_one_device_is_seen_by_all(name):
    """One bad entry on one device makes a bad step of its whole group, on all devices."""
    grads = whole()
    grads["dense"] = grads["dense"].at[7, 3].set(jnp.nan)
    step = lambda g, p: once(make(name), g, p)

    expected, _ = jax.jit(step)(grads, whole())
    mesh = mesh_of(AxisType.Auto)
    updates, state = jax.jit(step)(sharded(grads, mesh), sharded(whole(), mesh))

    for leaf, update in updates.items():
        np.testing.assert_array_equal(np.asarray(update) == 0, np.asarray(expected[leaf]) == 0)
    found = oc.metrics(state)
    assert max(int(x) for key, x in found.items() if key.endswith("nonfinite_steps")) == 1
    assert not all(jnp.isfinite(x) for key, x in found.items() if key.endswith("norm"))


def test_metrics_keep_a_nan_of_one_device():
    """With "propagate", the factor of a bad unit shows in the metrics, wherever the unit is."""
    grads = whole() | {"dense": trees.normal(8, 4).at[:, 3].set(jnp.nan)}
    tx = oc.adaptive_grad_clip(nonfinite="propagate")
    step = jax.jit(lambda g: tx.update(g, tx.init(g), g)[1].metrics)
    for found in (step(grads), step(sharded(grads, mesh_of(AxisType.Auto)))):
        assert np.isnan([found.norm, found.clipped_norm, found.factor]).all()


COLLECTIVES = re.compile(r"(all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)\(")


def collectives(program):
    """The collectives of a compiled program, apart those in a branch that is rarely taken."""
    found = {True: [], False: []}
    for line in program.splitlines():
        if match := COLLECTIVES.search(line):
            found["/cond/branch_" in line].append(match[1])
    return found


@pytest.mark.parametrize("name", EVERY)
def test_one_all_reduce_per_norm_and_no_gathering(name):
    """A step sums all leaves of a sharded tree at once; so does the rare one that measures anew."""
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    spec = lambda g: PartitionSpec("x") if g.shape[0] == 8 else PartitionSpec()
    grads = {k: jax.device_put(g, NamedSharding(mesh, spec(g))) for k, g in trees.floats().items()}
    # A maximum also needs a sum, which keeps NaN.
    norms = {"clip_by_value": 0, "clip_by_second_moment": 0, "clippy": 2}.get(name, 1)
    # Maxima and counts where norms stay sharded; here, units do not.
    metrics = 2 if name in ("clip_by_value", "clip_by_second_moment") else 0

    for record in (False, True):
        tx = EVERY[name].make(record=record)
        step = jax.jit(tx.update).lower(grads, tx.init(grads), grads).compile()
        found = collectives(step.as_text())
        assert found[False] == ["all-reduce"] * (norms + record * metrics)
        assert set(found[True]) <= {"all-reduce"}
