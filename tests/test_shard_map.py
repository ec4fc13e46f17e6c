"""Clips inside shard_map and pmap, where each device sees its own shard of a leaf."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import trees
from jax.sharding import AxisType, PartitionSpec
from roster import EVERY

import optaxclip as oc
from optaxclip import measure
from optaxclip.measure.looks import in_range

P = PartitionSpec
SPECS = {"bias": P("x"), "dense": P("x", "y"), "attention": P(None, "y"), "conv": P()}
# Which of these axes split a unit: rows are summed, columns and the channels of a kernel are not.
UNITS = {"bias": "x", "dense": "x", "attention": (), "conv": ()}


def mesh():
    return jax.make_mesh((4, 2), ("x", "y"), axis_types=(AxisType.Auto,) * 2)


def split(path, leaf):
    """The axes that JAX would track, said by hand."""
    return tuple(name for name in SPECS[path] if name)


def units(path, leaf):
    return UNITS[path]


def steps(tx, grads):
    """Three steps of growing gradients, and what the last one was."""

    def step(state, scale):
        scaled = jax.tree.map(lambda g: g * scale, grads)
        updates, state = tx.update(scaled, state, grads)
        return state, updates

    # A scan, whose carry must vary over devices from the start as it does later.
    state, updates = jax.lax.scan(step, tx.init(grads), jnp.array([1.0, 2.0, 40.0]))
    return jax.tree.map(lambda u: u[-1], updates), oc.metrics(state)


@functools.cache
def whole(name):
    """The same steps where no array is split."""
    return jax.jit(functools.partial(steps, EVERY[name].make()))(trees.floats())


def mapped(tx, *, check_vma, out=None):
    """The steps inside shard_map. Metrics must be the same on all devices for the spec P()."""
    program = jax.shard_map(
        functools.partial(steps, tx),
        mesh=mesh(),
        in_specs=(SPECS,),
        out_specs=(SPECS, P()),
        check_vma=check_vma,
    )
    return jax.jit(program)(trees.floats())


def assert_as_whole(name, found):
    # Sums over shards are rounded differently, by a few 2^-24, and three steps add that up.
    trees.assert_close(found, whole(name), 1e-5, atol=1e-7)


@pytest.mark.parametrize("name", EVERY)
def test_tracked_axes_need_no_argument(name):
    """With check_vma, every leaf is summed over the axes it varies on, and no others."""
    given = {"axis_name": units} if EVERY[name].groups == "unit" else {}
    assert_as_whole(name, mapped(EVERY[name].make(**given), check_vma=True))


SAY_IT = [
    "clip_by_norm",
    "clip_by_global_norm",
    "clip_by_block_rms",
    "clip_by_average_norm",
    "normalize_by_global_norm",
    "adagc",
    "scale_by_stable_adam",
]


@pytest.mark.parametrize("name", SAY_IT)
def test_untracked_axes_are_said(name):
    """Without check_vma, axis_name says what each leaf is split over."""
    assert_as_whole(name, mapped(EVERY[name].make(axis_name=split), check_vma=False))


def test_a_leaf_that_is_the_same_everywhere_counts_once():
    """Names that are given for all leaves mean those of each that vary along them."""
    tx = oc.clip_by_global_norm(axis_name=("x", "y"))
    assert_as_whole("clip_by_global_norm", mapped(tx, check_vma=True))


MEASURES = {
    "global": functools.partial(measure.global_norm, 3),
    "leaf": functools.partial(measure.leaf_norm, 1),
    "label": lambda **k: measure.by_label(lambda path: path[0], measure.global_norm(2, **k)),
    "relative": lambda **k: measure.relative(measure.leaf_norm(np.inf, **k), 1e-3),
}


@pytest.mark.parametrize("tracked", [True, False])
@pytest.mark.parametrize("name", MEASURES)
def test_every_order_and_modifier(name, tracked):
    """Norms of any order are joined over shards, also inside modifiers."""
    limit = oc.threshold.constant(0.3)
    tx = oc.clip(MEASURES[name](), limit)
    expected = jax.jit(functools.partial(steps, tx))(trees.floats())
    said = tx if tracked else oc.clip(MEASURES[name](axis_name=split), limit)
    trees.assert_close(mapped(said, check_vma=tracked), expected, 1e-5, atol=1e-7)


def test_pmap_sums_what_is_split_and_counts_the_rest_once():
    """Inside pmap, with axis_name by leaf, the norm is that of the whole tree."""
    grads = {"split": trees.normal(8, 6), "same": trees.normal(5)}
    tx = oc.clip_by_global_norm(axis_name=lambda path, leaf: "d" if path == "split" else ())

    updates, metrics = jax.pmap(
        functools.partial(steps, tx), axis_name="d", in_axes=({"split": 0, "same": None},)
    )(grads)

    expected, found = steps(oc.clip_by_global_norm(), grads)
    trees.assert_close(updates["split"], expected["split"], 1e-6)
    for device in range(8):
        trees.assert_close(updates["same"][device], expected["same"], 1e-6)
        assert float(metrics["norm"][device]) == pytest.approx(float(found["norm"]), rel=1e-6)


@pytest.mark.parametrize("name", [n for n in EVERY if EVERY[n].groups in ("tree", "leaf")])
def test_left_out_where_it_is_needed_it_is_an_error(name):
    """A norm that JAX cannot know to be of the whole is never taken."""
    with pytest.raises(ValueError, match=r"leaf 'attention' is split: say it by axis_name=, as 'x"):
        mapped(EVERY[name].make(), check_vma=False)
    with pytest.raises(ValueError, match=r"inside pmap.*mapped axes \('d',\) leaf 'w' is split"):
        jax.pmap(functools.partial(steps, EVERY[name].make()), axis_name="d")(
            {"w": jnp.ones((8, 2))}
        )


@pytest.mark.parametrize("check_vma", [True, False])
def test_devices_take_one_branch(check_vma):
    """Where norms need a second look on some devices only, all take it, as they wait in it."""
    grads = {"rows": trees.normal(8, 3), "columns": trees.normal(5, 8)}
    grads["columns"] = grads["columns"].at[:, :2].multiply(1e-20)  # all that the first ones hold
    specs = {"rows": P("x"), "columns": P(None, "x")}
    over = lambda path, leaf: "x" if path == "rows" else ()
    tx = lambda **given: oc.clip(measure.unit_norm(0, **given), oc.threshold.constant(1e-3))

    clip = lambda grads: steps(tx(axis_name=over), grads)
    found, _ = jax.jit(
        jax.shard_map(
            clip, mesh=mesh(), in_specs=(specs,), out_specs=(specs, P()), check_vma=check_vma
        )
    )(grads)
    expected, _ = jax.jit(functools.partial(steps, tx()))(grads)
    trees.assert_close(found, expected, 1e-5)


def test_units_and_layers_that_are_split_need_it_said():
    """A shard may hold whole units, or whole layers, or parts of each."""
    message = r"leaf 'attention' is split over the mapped axes \('y',\), within its groups or betwe"
    with pytest.raises(ValueError, match=message):
        mapped(oc.adaptive_grad_clip(), check_vma=True)
    layers = measure.stacked(measure.leaf_norm(), lambda path, leaf: 0 if leaf.ndim == 3 else None)
    with pytest.raises(ValueError, match=message):
        mapped(oc.clip(layers, oc.threshold.constant(1.0)), check_vma=True)


def test_a_name_that_is_not_mapped_is_an_error():
    """A misspelled axis is reported with those there are."""
    message = r"axis_name must name axes that are mapped here, \('x', 'y'\); got 'z'"
    with pytest.raises(ValueError, match=message):
        mapped(oc.clip_by_global_norm(axis_name="z"), check_vma=True)


def test_where_nothing_is_mapped_arrays_are_whole():
    """The same clip, axis_name and all, runs outside too."""
    tx = oc.clip_by_global_norm(axis_name="x")
    found = jax.jit(functools.partial(steps, tx))(trees.floats())
    trees.assert_same_bits(found, whole("clip_by_global_norm"))


@pytest.mark.parametrize("name", EVERY)
def test_all_devices_agree_on_a_bad_entry(name):
    """A NaN in one shard is a bad step for its whole group, on every device."""
    given = {"axis_name": units} if EVERY[name].groups == "unit" else {}
    grads = trees.floats()
    bad = dict(grads, dense=grads["dense"].at[7, 3].set(jnp.nan))

    def step(tx, bad, grads):
        updates, state = tx.update(bad, tx.init(grads), grads)
        return updates, oc.metrics(state)

    expected = jax.jit(functools.partial(step, EVERY[name].make()))(bad, grads)
    found = jax.jit(
        jax.shard_map(
            functools.partial(step, EVERY[name].make(**given)),
            mesh=mesh(),
            in_specs=(SPECS, SPECS),
            out_specs=(SPECS, P()),
        )
    )(bad, grads)

    zeros = jax.tree.map(lambda f, e: np.array_equal(f == 0, e == 0), found, expected)
    assert all(jax.tree.leaves(zeros))
    counts = [int(x) for key, x in found[1].items() if key.endswith("nonfinite_steps")]
    assert max(counts) == 1


def inner(tree, other):
    products = jax.tree.map(lambda x, y: jnp.sum(x * y), tree, other)
    return sum(jax.tree.leaves(products))


def test_a_leaf_may_be_split_over_lanes_of_vmap():
    """A name that vmap gives an axis is summed over like one of a mesh."""
    grads = trees.normal(4, 6)
    tx = oc.clip_by_global_norm(axis_name="v")

    lanes = jax.vmap(lambda g: tx.update(g, tx.init(g))[0], axis_name="v")(grads)

    whole_tree = oc.clip_by_global_norm()
    trees.assert_close(lanes, whole_tree.update(grads, whole_tree.init(grads))[0], 1e-6)


def test_a_tracked_map_in_an_untracked_one_is_an_error_where_it_is_said():
    """JAX has forgotten the outer axis there; what a function says is not dropped, but refused."""
    tx = oc.clip_by_global_norm(axis_name=lambda path, leaf: ("x", "y"))
    clip = lambda grads: tx.update(grads, tx.init(grads))[0]
    inner = jax.shard_map(clip, in_specs=P(None, "y"), out_specs=P(None, "y"), axis_names={"y"})
    outer = jax.shard_map(
        inner, mesh=mesh(), in_specs=P("x"), out_specs=P("x"), axis_names={"x"}, check_vma=False
    )
    with pytest.raises(ValueError, match="psum can only accept"):
        jax.jit(outer)(trees.normal(8, 6))


@pytest.mark.parametrize("order", [2, np.inf])
def test_the_derivative_of_a_clip_is_that_of_the_whole(order):
    """Derivatives through norms are right across shards."""
    tx, direction = oc.clip_by_global_norm(ord=order), trees.floats(seed=1)
    grads = trees.floats()
    grads["dense"] = grads["dense"].at[0, 0].set(99.0).at[7, 3].set(99.0)  # two largest, in shards
    clipped = lambda grads: tx.update(grads, tx.init(grads))[0]
    split_clip = jax.shard_map(clipped, mesh=mesh(), in_specs=(SPECS,), out_specs=SPECS)

    def along(clip):
        products = lambda g: jax.tree.map(lambda u, d: jnp.sum(u * d), clip(g), direction)
        return jax.jit(jax.grad(lambda g: sum(jax.tree.leaves(products(g)))))

    found, expected = along(split_clip)(grads), along(clipped)(grads)

    # Entries cancel to a hundredth of the size of the terms that make them.
    trees.assert_close(found, expected, 1e-5, atol=1e-6)


@pytest.mark.parametrize(("gpu", "sums"), [(True, 1), (False, 3)])
def test_one_collective_for_leaves_that_are_split_alike(gpu, sums, monkeypatch):
    """The compiled clip sums all leaves over the same axes at once."""
    monkeypatch.setattr(oc._device, "on_gpu", lambda: gpu)
    grads = {str(i): trees.normal(8, i + 1) for i in range(5)}
    tx = oc.clip_by_global_norm()
    program = jax.shard_map(
        lambda g: tx.update(g, tx.init(g))[0], mesh=mesh(), in_specs=P("x"), out_specs=P("x")
    )
    text = jax.jit(program).lower(grads).as_text()
    # In float32, once as they are, and once in each of the branches that measure again.
    assert text.count("all_reduce") == sums


@pytest.mark.parametrize("said", ["x", None])
def test_tiny_norms_of_which_not_all_are_summed(said):
    """Where a leaf is said to be whole on each device, the others are still summed right."""
    axis_name = lambda path, leaf: () if path == "mine" else said
    norm = oc.measure.global_norm(axis_name=axis_name)
    grads = {"mine": jnp.array([0.0, 0.0, 0.0, 1.0]), "shared": jnp.full(4, 1e-12)}
    specs = {"mine": P("x"), "shared": P("x")}
    if said is None:
        grads["shared"], specs["shared"] = jnp.full(1, 1e-12), P()
    per_device = lambda g: in_range(norm, g, None)[None]
    program = jax.shard_map(per_device, mesh=mesh(), in_specs=(specs,), out_specs=P("x"))

    tiny = 2e-12 if said else 1e-12
    np.testing.assert_allclose(jax.jit(program)(grads), [tiny, tiny, tiny, 1.0], 1e-6)


@pytest.mark.parametrize("name", ["clip_by_global_norm", "clip_by_norm", "clip_by_value"])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_a_narrow_leaf_stays_the_same_everywhere(name, dtype):
    """JAX still knows of a leaf that is the same on all devices that it is, whatever its dtype."""
    grads = jax.tree.map(lambda g: g.astype(dtype), trees.floats())
    tx = EVERY[name].make()

    def update(grads):
        return tx.update(grads, tx.init(grads))[0]

    program = jax.shard_map(update, mesh=mesh(), in_specs=(SPECS,), out_specs=SPECS)
    found = jax.jit(program)(grads)
    # Norms may differ by a few 2^-24, so that entries round to the next number of their dtype.
    one = float(jnp.finfo(dtype).eps)
    trees.assert_close(found, jax.jit(update)(grads), one, atol=1e-7)
