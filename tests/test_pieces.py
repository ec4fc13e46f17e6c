"""One CPU lays small leaves together: fewer loops, no more memory, and numbers as right."""

import functools
import re

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import trees

import optaxclip as oc
from optaxclip import _device, _numbers
from optaxclip.measure import pieces
from optaxclip.measure.looks import in_range
from optaxclip.measure.norms import _groups

pytestmark = pytest.mark.skipif(
    jax.device_count() > 1, reason="without a mesh: make test has one device"
)
cpu = pytest.mark.skipif(_device.on_gpu(), reason="a GPU's programs are written in another way")


@cpu
@pytest.mark.parametrize(
    ("make", "dtype"),
    [
        (oc.clip_by_global_norm, jnp.float32),
        (oc.clip_by_global_norm, jnp.bfloat16),
        (oc.clip_by_norm, jnp.float32),
        (oc.clip_by_norm, jnp.bfloat16),
        (oc.clip_by_value, jnp.float32),
        (oc.clip_by_value, jnp.bfloat16),
    ],
)
def test_no_such_array_of_many_small_leaves(make, dtype):
    """Small leaves of many shapes are not laid together all at once, nor widened."""
    grads = {f"{i:03}": jnp.ones(4000 + i // 8, dtype) for i in range(120)}
    tx = make()
    compiled = jax.jit(tx.update).lower(grads, tx.init(grads)).compile()

    most = 0.4 * sum(x.nbytes for x in grads.values())
    assert compiled.memory_analysis().temp_size_in_bytes < most


def many(scale=1.0, dtype=jnp.float32):
    """Three pieces and more, of leaves of many shapes, and one too large for any."""
    shapes = [(3, 1000 + 7 * i) for i in range(30)] + [(), (0,), (5,), (2, 8192)]
    return {f"{i:02}": trees.normal(*s, seed=i).astype(dtype) * scale for i, s in enumerate(shapes)}


def exact(tree):
    return np.linalg.norm(
        np.concatenate([np.ravel(np.asarray(x, np.float64)) for x in tree.values()])
    )


@pytest.mark.parametrize("scale", [1.0, 1e-25, 1e-36, 1e25, 1e35])
@pytest.mark.parametrize("axis", [None, 0], ids=["alone", "vmap"])
def test_norm_in_pieces(scale, axis):
    """The norm of leaves in several pieces is right at any scale, and so is its derivative."""
    tree = many(np.float32(scale))
    measure = oc.measure.global_norm()

    def norm(tree):
        return in_range(measure, tree, None)

    def both(tree):
        return norm(tree), jax.grad(norm)(tree)

    if axis is None:
        found, slope = jax.jit(both)(tree)
    else:
        found, slope = jax.jit(jax.vmap(both))(jax.tree.map(lambda x: jnp.stack([x, 2 * x]), tree))
        assert np.isclose(found[1], 2 * exact(tree), rtol=4 * 2.0**-24)
        found, slope = found[0], jax.tree.map(lambda x: x[0], slope)

    assert np.isclose(found, exact(tree), rtol=4 * 2.0**-24)
    # An entry of the derivative is g / ||g||: two roundings more.
    for name, x in tree.items():
        expected = np.asarray(x, np.float64) / exact(tree)
        np.testing.assert_allclose(slope[name], expected, rtol=1e-6, atol=1e-30)


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("place", ["00", "29", "33"])
def test_what_is_not_finite_in_any_leaf(place, value):
    """It makes the norm not finite, and harms nothing once it is sanitized, in a piece or not."""
    tree = many()
    tree[place] = tree[place].at[0, 3].set(value)
    tx = oc.clip_by_global_norm()
    updates, state = jax.jit(tx.update)(tree, tx.init(tree))

    assert not np.isfinite(state.metrics.norm)
    assert not any(np.any(x) for x in updates.values())
    kept, state = jax.jit(oc.clip_by_global_norm(nonfinite="sanitize").update)(tree, state)
    clean = tree | {place: tree[place].at[0, 3].set(0)}
    assert np.isclose(exact(kept), 1, rtol=1e-6)
    assert np.isclose(state.metrics.norm, exact(clean), rtol=4 * 2.0**-24)


def test_pieces_of_several_dtypes():
    """Small leaves of different dtypes are in different pieces of one norm."""
    tree = many() | {f"b{i}": x for i, x in many(dtype=jnp.bfloat16).items()}

    with jax.enable_x64(True):
        for more in ({}, {"wide": jnp.full(7, 1e30, jnp.float64)}):
            norm = in_range(oc.measure.global_norm(), tree | more, None)
            assert norm.dtype == (jnp.float64 if more else jnp.float32)
            assert np.isclose(norm, exact(tree | more), rtol=4 * 2.0**-24)


@pytest.mark.parametrize("nonfinite", ["propagate", "sanitize"])
@pytest.mark.parametrize(
    "make",
    [oc.clip_by_norm, oc.clip_by_block_rms, oc.clip_by_average_norm, oc.adaptive_grad_clip],
)
def test_policies_agree_where_nothing_is_bad(make, nonfinite):
    """Bit for bit: every leaf of every dtype has its own norm, and its parameters'."""
    dtypes = [jnp.bfloat16, jnp.float32, jnp.float16]
    shapes = [(4, 4), (4, 4), (7,), (7,), (), (300, 200), (40, 25)]
    each = [(shape, dtype) for shape in shapes for dtype in dtypes]
    grads = [
        (10.0 ** (i % 4) * trees.normal(*shape, seed=i)).astype(dtype)
        for i, (shape, dtype) in enumerate(each)
    ]
    for tree in (grads, [x for x in grads if x.dtype == jnp.bfloat16]):
        params = [jnp.ones_like(x) for x in tree]
        found = []
        for policy in ("zero", nonfinite):
            tx = make(nonfinite=policy)
            found.append(jax.jit(tx.update)(tree, tx.init(params), params))
        jax.tree.map(np.testing.assert_array_equal, *found)


@cpu
def test_looking_again_has_few_operations():
    """Many small leaves add no loop each to the branch of the second look either."""
    tree = {str(i): jnp.ones((4, 4)) for i in range(320)}
    norm = lambda tree: in_range(oc.measure.global_norm(), tree, None)

    assert jax.jit(norm).lower(tree).compile().as_text().count(" fusion(") <= 40


# Leaves that are alike, enough for three pieces of each kind, and some that lie apart.
ALIKE = (
    [(1000,)] * 70
    + [(10, 10, 4, 3)] * 60
    + [(2, 8192), (7,), (0,), (), (), (40, 25), (3, 9000)]
    + [(64, 64)] * 5
)


def mixed(dtype=jnp.float32):
    return {f"{i:03}": trees.normal(*shape, seed=i).astype(dtype) for i, shape in enumerate(ALIKE)}


def units(x):
    """The axes over which unit_norm sums."""
    return tuple(range(x.ndim)) if x.ndim < 2 else (0, 1, 2) if x.ndim == 4 else (0,)


def whole(x):
    return tuple(range(x.ndim))


MEASURES = {
    "leaves": (oc.measure.leaf_norm(), whole, 2),
    "leaves, 1": (oc.measure.leaf_norm(1), whole, 1),
    "leaves, 3": (oc.measure.leaf_norm(3), whole, 3),
    "leaves, inf": (oc.measure.leaf_norm(np.inf), whole, np.inf),
    "units": (oc.measure.unit_norm(), units, 2),
    "units, 1": (oc.measure.unit_norm(ord=1), units, 1),
}


def exactly(tree, axes, p):
    """The norms in float64, as one vector in the order of the leaves."""
    found = []
    for x in tree.values():
        wide = np.abs(np.asarray(x, np.float64))
        if p == np.inf:
            found.append(np.max(wide, axes(x), initial=0))
        else:
            found.append(np.sum(wide**p, axes(x)) ** (1 / p))
    return np.concatenate([np.ravel(x) for x in found])


def flat(norms):
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(norms)])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("name", MEASURES)
def test_each_leaf_has_its_own_norm(name, dtype):
    """Norms of leaves and units that are measured together are those of each, in their order."""
    measure, axes, p = MEASURES[name]
    tree = mixed(dtype)
    found = jax.jit(lambda tree: in_range(measure, tree, None))(tree)

    # Of powers, those of float32 err by p units each.
    rtol = (4 if p in (1, 2, np.inf) else 32) * 2.0**-24
    np.testing.assert_allclose(flat(found), exactly(tree, axes, p), rtol=rtol)
    assert jax.tree.structure(found) == jax.tree.structure(measure.norms(tree, None))


@pytest.mark.parametrize("make", [oc.measure.leaf_norm, oc.measure.unit_norm])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_a_measure_by_itself_adds_up_wide_squares(make, dtype):
    """Of narrow leaves, small ones too: 300 squared is beyond float16."""
    tree = {"a": jnp.full(4, 300, dtype), "b": jnp.full(100, 1.01, dtype)}
    found = make().norms(tree, None)

    np.testing.assert_allclose(flat(found), exactly(tree, whole, 2), rtol=2.0**-20)


def test_units_of_sizes_that_are_not_known():
    """A clip by unit is exported for any shape."""
    a, b = jax.export.symbolic_shape("a, b")
    tx = oc.adaptive_grad_clip(0.1)
    known = {"w": jnp.full((3, 4), 5.0), "v": jnp.ones(4)}
    shapes = {"w": jax.ShapeDtypeStruct((a, b), jnp.float32)}
    shapes["v"] = jax.ShapeDtypeStruct((b,), jnp.float32)
    update = jax.jit(lambda grads, params: tx.update(grads, tx.init(params), params)[0])
    exported = jax.export.export(update)(shapes, shapes)

    for name, x in exported.call(known, known).items():
        np.testing.assert_allclose(x, 0.1 * known[name], rtol=1e-6)


@functools.cache  # compiled once for all tests
def in_range_of(name):
    return jax.jit(lambda tree: in_range(MEASURES[name][0], tree, None))


@pytest.mark.parametrize("scale", [1e-36, 1e-25, 1e25, 1e35, np.inf, np.nan])
@pytest.mark.parametrize("place", ["000", "001", "032", "069", "100", "130", "139"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["leaves", "units"])
def test_one_leaf_out_of_range_is_the_only_one(name, dtype, place, scale):
    """Where one leaf is very small, very large or bad, its norm is right, and no other differs."""
    _, axes, p = MEASURES[name]
    tree = mixed(dtype)
    norms = in_range_of(name)
    before = flat(norms(tree))
    tree[place] *= jnp.asarray(scale, dtype)
    found, expected = flat(norms(tree)), exactly(tree, axes, p)

    if np.isfinite(scale):
        np.testing.assert_allclose(found, expected, rtol=4 * 2.0**-24)
    else:
        assert np.array_equal(np.isfinite(found), np.isfinite(expected))
        assert not np.all(np.isfinite(found))
    names = [np.full(exactly({k: x}, axes, p).size, k) for k, x in tree.items()]
    others = np.concatenate(names) != place
    np.testing.assert_array_equal(found[others], before[others])


@pytest.mark.parametrize("by", [whole, units], ids=["leaf", "unit"])
def test_each_of_many_leaves_has_its_own_factor(by):
    """Of more leaves than a GPU clips by what lies in places that XLA knows."""
    shapes = [(5,), (4, 3), (2, 2, 3), (1500,)] * 80
    grads = {f"{i:03}": trees.normal(*shape, seed=i) * (1 + i) for i, shape in enumerate(shapes)}
    params = {name: trees.normal(*x.shape, seed=999) for name, x in grads.items()}
    tx = oc.clip_by_norm() if by is whole else oc.adaptive_grad_clip(0.5)
    updates, _ = jax.jit(tx.update)(grads, tx.init(params), params)

    assert len(grads) > _numbers.MANY_PARTS
    for name, g in grads.items():
        wide = np.asarray(g, np.float64)
        size = lambda x: np.sqrt(np.sum(np.square(np.asarray(x, np.float64)), by(x), keepdims=True))
        limit = 1.0 if by is whole else 0.5 * np.maximum(size(params[name]), 1e-3)
        expected = wide * np.minimum(1, limit / size(wide))
        np.testing.assert_allclose(updates[name], expected, rtol=1e-6, err_msg=name)


@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e30])
@pytest.mark.parametrize("name", ["leaves", "units"])
def test_derivative_of_norms_that_are_taken_together(name, scale):
    """It is g / ||g|| for every leaf and unit, at any scale."""
    measure, axes, _ = MEASURES[name]
    # Few units for their entries, which a GPU takes together.
    shapes = [(1000,)] * 5 + [(200, 4)] * 10 + [(10, 10, 4, 3)] * 10 + [(), (0,), (0, 3)]
    tree = {f"{i:02}": trees.normal(*shape, seed=i) for i, shape in enumerate(shapes)}
    tree = jax.tree.map(lambda x: x * np.float32(scale), tree)
    total = lambda tree: sum(map(jnp.sum, jax.tree.leaves(in_range(measure, tree, None))))
    slope = jax.jit(jax.grad(total))(tree)
    for key, x in tree.items():
        wide = np.asarray(x, np.float64)
        expected = wide / np.sqrt(np.sum(np.square(wide), axes(x), keepdims=True))
        np.testing.assert_allclose(slope[key], expected, rtol=1e-6, atol=1e-30)


def loops(make, count):
    """How many loops there are to compile, two that differ in their names alone being one."""
    tree = {f"{i:03}": jnp.ones((16, 8)) for i in range(count)}
    tx = make()
    text = jax.jit(tx.update).lower(tree, tx.init(tree), tree).compile().as_text()
    bodies = re.findall(r"^%\S*fused_computation\S* \(.*?^}", text, re.MULTILINE | re.DOTALL)
    alike = set()
    for body in bodies:
        names: dict[str, str] = {}
        place = lambda match, names=names: names.setdefault(match[0], f"%{len(names)}")
        bare = re.sub(r"metadata=\{[^}]*\}", "", body.split("\n", 1)[1])
        alike.add(re.sub(r"%[\w.\-]+", place, bare))
    return len(alike)


@cpu
@pytest.mark.parametrize(
    "make",
    [oc.clip_by_norm, oc.clip_by_block_rms, oc.adaptive_grad_clip, oc.clip_by_value, oc.adagc],
)
def test_leaves_that_are_alike_add_no_loops(make):
    """What is compiled for 24 leaves of one shape is compiled for 120, but for longer vectors."""
    assert loops(make, 120) <= loops(make, 24) + 5


def test_parameters_are_not_widened_for_the_step_and_their_norm():
    """A clip relative to the parameters has no wide copy of them, in a step that adds updates."""
    params = {str(i): jnp.ones((256, 256), jnp.bfloat16) for i in range(6)}
    tx = oc.adaptive_grad_clip(per_tensor=True)

    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    lowered = jax.jit(step, donate_argnums=(0, 1)).lower(params, tx.init(params), params)
    most = 0.4 * sum(x.nbytes for x in params.values())
    assert lowered.compile().memory_analysis().temp_size_in_bytes < most


def test_runs_are_of_leaves_that_are_alike():
    """No more than a piece has room for, and each leaf once."""
    tree = mixed()
    parts = [pieces.Bundle([x], ()) for x in tree.values()]
    found = pieces.runs(parts, [units(x) for x in tree.values()])

    assert sorted(i for run in found for i in run) == [*range(len(parts))]
    for run in found:
        sizes = {parts[i].leaves[0].size for i in run}
        assert len(sizes) == 1
        assert len(run) == 1 or len(run) * sizes.pop() <= pieces.PIECE
    assert max(map(len, found)) > 10


# What XLA:CPU has a loop of its own for, see _sums_of_rows.
OWN_SUM = r"\(f64\[\d+\]\S*, s32\[\d+\]\S*\) reduce\("


COLUMNS = {  # some with rows beyond eight equal parts, of which a few make columns again
    (33, 1000): 0,
    (40, 30000): 0,
    (47, 17000): 0,
    (16391, 2): 0,
    (770, 51): None,
    (33, 2, 500): 0,
    (3, 3, 40, 91): None,
    (200, 0): 0,
    (7, 20, 300): (0, 1),
}


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e30])
def test_columns_of_large_leaves_are_added_up_part_by_part(dtype, scale):
    """Right at any scale, each column with every entry, and its derivative g / ||g||."""
    tree = [(scale * trees.normal(*shape, seed=1)).astype(dtype) for shape in COLUMNS]
    measure = oc.measure.unit_norm(lambda path, leaf: COLUMNS[leaf.shape])
    found = jax.jit(functools.partial(in_range, measure, params=None))(tree)
    total = lambda tree: sum(map(jnp.sum, in_range(measure, tree, None)))
    slopes = jax.jit(jax.grad(total))(tree)
    for norm, x, slope, axes in zip(found, tree, slopes, COLUMNS.values(), strict=True):
        over = tuple(range(x.ndim - 1)) if axes is None else axes
        wide = np.asarray(x, np.float64)
        expected = np.sqrt(np.sum(np.square(wide), over, keepdims=True))
        np.testing.assert_allclose(norm, expected, rtol=1e-6)
        close = 1e-6 if dtype == jnp.float32 else 2**-7  # slopes have the dtype of the leaf
        np.testing.assert_allclose(
            np.asarray(slope, np.float64), wide / expected, rtol=close, atol=1e-30
        )


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
@pytest.mark.parametrize("row", [0, 400, 800])
def test_a_bad_entry_is_of_its_column_alone(bad, row):
    """In each of the parts, and in the rows beyond them."""
    grads = trees.normal(801, 64, seed=2).at[row, 5].set(bad)
    (norm,) = jax.jit(functools.partial(in_range, oc.measure.unit_norm(0), params=None))(grads)
    assert np.argwhere(~np.isfinite(np.ravel(norm))).tolist() == [[5]]


@cpu
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_parts_of_columns_share_their_memory(dtype):
    """There is one eighth of a leaf at a time, of gradients and parameters each."""
    grads = {str(i): jnp.ones((300, 200 + i), dtype) for i in range(20)}
    tx = oc.adaptive_grad_clip()
    compiled = jax.jit(tx.update).lower(grads, tx.init(grads), grads).compile()

    wide = 4 * max(x.size for x in grads.values())  # bytes in float32
    norms = 4 * sum(x.shape[1] for x in grads.values())
    assert compiled.memory_analysis().temp_size_in_bytes < 2 * wide / 8 + 8 * norms


WHOLE = {"tree": oc.measure.global_norm(), "leaves": oc.measure.leaf_norm()}


@cpu
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float16])
@pytest.mark.parametrize("name", WHOLE)
def test_one_look_is_enough_for_sums_in_float64(name, dtype):
    """There is no branch to wait for, and no wide copy of a leaf."""
    grads = {str(i): jnp.ones((300, 500 + i), dtype) for i in range(4)}
    tx = oc.clip(WHOLE[name], oc.threshold.constant(1.0))
    compiled = jax.jit(tx.update).lower(grads, tx.init(grads)).compile()

    assert re.search(OWN_SUM, compiled.as_text())
    assert "conditional(" not in compiled.as_text()
    least = min(x.nbytes for x in grads.values())
    assert compiled.memory_analysis().temp_size_in_bytes < 0.1 * least


@cpu
@pytest.mark.parametrize("value", [0.0, 1.0, 1e30])
def test_what_is_known_is_not_added_up_while_compiling(value):
    """Which took XLA 3 s for the gradient of a parameter of 1000 x 1000 that is not used."""

    def norm(x):
        known = jnp.full((300, 300), value, jnp.float32)
        return in_range(oc.measure.global_norm(), [x, known], None)

    compiled = jax.jit(norm).lower(jnp.ones(3)).compile()
    assert len(re.findall(OWN_SUM, compiled.as_text())) == 2
    assert np.isclose(compiled(jnp.full(3, value)), value * np.sqrt(90_003), rtol=2 * 2.0**-24)


@cpu
@pytest.mark.parametrize("make", [oc.clip_by_block_rms, oc.clip_by_average_norm])
def test_a_norm_beyond_float32_is_not_finite_whatever_it_is_divided_by(make):
    """As on a mesh; and so its derivative is that of a zero update."""
    grads = jnp.full(4096, 2e37)  # of norm 1.3e39
    tx = make(1.0)
    update = jax.jit(lambda grads: tx.update(grads, tx.init(grads)))
    (updates, state), (moved, _) = jax.jvp(update, (grads,), (grads,))

    assert not np.any(updates)
    assert state.metrics.nonfinite_steps == 1
    assert not np.any(moved)


# Large ones in rows, of which the number of entries is divisible by 64, by 2 and by nothing; and
# one of so many rows that a GPU takes four as one.
LARGE = [(512, 512), (7, 5, 3754), (131_101,), (3, 0, 5), (), (8196, 128)]


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("vmapped", [False, True])
def test_large_leaves_in_rows(scale, p, vmapped):
    """Norms of leaves that are added up in float64 are right at any scale; so is the derivative."""
    tree = {str(i): trees.normal(*shape, seed=i) for i, shape in enumerate(LARGE)}
    tree = jax.tree.map(lambda x: x * np.float32(scale), tree)

    def both(tree):
        norms = lambda tree: in_range(oc.measure.leaf_norm(p), tree, None)
        return norms(tree), jax.grad(lambda tree: jnp.sum(norms(tree)))(tree)

    if vmapped:
        twice = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), tree)
        found, slope = jax.tree.map(lambda x: x[0], jax.jit(jax.vmap(both))(twice))
    else:
        found, slope = jax.jit(both)(tree)

    np.testing.assert_allclose(found, exactly(tree, whole, p), rtol=2 * 2.0**-24)
    for name, x in tree.items():
        wide = np.asarray(x, np.float64)
        size = np.linalg.norm(wide.reshape(-1))
        expected = np.sign(wide) if p == 1 else wide / size
        np.testing.assert_allclose(slope[name], expected, rtol=1e-6, atol=1e-7)


def large_and_small(dtype=jnp.float32):
    """Groups of four, one, five (none of these long) and three, with small leaves between."""
    sizes = {f"{i:02}": pieces.GROUP // 4 + 1000 * (i % 7) for i in range(4)}
    sizes |= {"04": pieces.GROUP + 8, "05": pieces.GROUP}
    sizes |= {f"{i:02}": pieces.GROUP // 5 + 1000 * (i % 7 + 1) for i in range(6, 16)}
    sizes |= {f"{i:02}": pieces.GROUP // 2 - 1000 * (i % 3) for i in range(16, 20)}
    sizes |= {f"{i:02}, small": 10 + i % 3 for i in range(0, 20, 3)}
    return {
        name: (trees.normal(sizes[name], seed=i) * (1 + i % 5)).astype(dtype)
        for i, name in enumerate(sorted(sizes))
    }


OF_LARGE = {
    "norm": (oc.measure.leaf_norm(), 100.0),
    "rms": (oc.measure.leaf_rms(), 2.0),
    "relative": (oc.measure.relative(oc.measure.leaf_norm(), eps=1e-3), 2.0),
}


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", OF_LARGE)
def test_large_leaves_are_clipped_by_their_own_norms(name, dtype):
    """Each leaf by its own, wherever it is in the tree, and so are others where one is bad."""
    measure, limit = OF_LARGE[name]
    tree = large_and_small(dtype)
    tree["03"] = tree["03"].at[5].set(jnp.nan)
    tree["05"] *= jnp.asarray(1e-30, dtype)
    tree["06, small"] *= jnp.asarray(1e25, dtype)
    params = jax.tree.map(jnp.ones_like, tree)
    tx = oc.clip(measure, oc.threshold.constant(limit))
    updates, state = jax.jit(tx.update)(tree, tx.init(params), params)

    assert state.metrics.nonfinite_steps == 1
    for key, x in tree.items():
        wide = np.asarray(x, np.float64)
        unit = 1 if name == "norm" else np.sqrt(wide.size)
        factor = min(1, limit * unit / np.linalg.norm(wide))
        expected = np.zeros_like(wide) if key == "03" else wide * factor
        rtol = 1e-6 if dtype == jnp.float32 else 2.0**-8
        np.testing.assert_allclose(np.asarray(updates[key], np.float64), expected, rtol=rtol)


@cpu
def test_a_group_of_leaves_waits_for_no_later_one():
    """What they become is known before the next group is read, and the last one is last."""
    tree = large_and_small()
    tx = oc.clip_by_norm()
    state = tx.init(tree)

    def bytes_for(name):
        compiled = jax.jit(lambda tree: tx.update(tree, state)[0][name]).lower(tree).compile()
        return compiled.cost_analysis()["bytes accessed"]

    large = sorted(k for k, x in tree.items() if x.size > pieces.SMALL)
    parts = [pieces.Bundle([x], ()) for _, x in sorted(tree.items())]
    assert [len(group) for group in pieces.in_turn(parts)] == [7, 4, 1, 1, 5, 5, 3, 1]
    first, last = tree[large[0]].nbytes, sum(tree[name].nbytes for name in large)
    # Itself three times, and three that are in its group.
    assert bytes_for(large[0]) < 7 * first
    assert bytes_for(large[-1]) > last


def test_groups_of_leaves_are_few_and_have_each_leaf_once():
    """Small leaves in the first, and in the others enough, in the order of the tree."""
    random = np.random.default_rng(0)
    for most in (2**12, 2**19, 2**21, 2**26):
        sizes = random.integers(1, most, 200)
        parts = [pieces.Bundle([jax.ShapeDtypeStruct((n,), jnp.float32)], ()) for n in sizes]
        small = [i for i, n in enumerate(sizes) if n <= pieces.SMALL]
        groups = pieces.in_turn(parts)

        assert sorted(i for group in groups for i in group) == list(range(200))
        assert groups[: 1 if small else 0] == ([small] if small else [])
        others = groups[1 if small else 0 :]
        assert len(others) <= pieces.MOST + 1
        assert [i for group in others for i in group] == sorted(i for g in others for i in g)
        assert all(sizes[group].sum() >= pieces.GROUP for group in others[:-1])


@cpu
@pytest.mark.parametrize(
    ("dtype", "p", "most"),
    [
        (jnp.float32, 2, pieces.TINY),
        (jnp.bfloat16, 2, pieces.SMALL),
        (jnp.float32, np.inf, pieces.SMALL),
    ],
)
def test_only_leaves_that_lie_together_wait_for_each_other(dtype, p, most):
    """They are the first group; and of those that look twice, which is one branch, all are one."""
    sizes = [2**11, 2**12, 2**13, 2**14] * 2
    groups = _groups([jnp.ones(n, dtype) for n in sizes], p, None)

    first = {sizes[i] for i in groups[0].order}
    assert max(first) == (2**14 if dtype == jnp.bfloat16 else most)
    assert {group.small for group in groups} == {most}
    assert sorted(i for group in groups for i in group.order) == [*range(8)]


def test_a_norm_of_float64_leaves_has_a_derivative():
    """Where a program has float64 enabled, its sums are of rows, too."""
    with jax.enable_x64(True):
        x = jnp.asarray(np.random.default_rng(0).normal(size=(512, 512)))
        norm = lambda x: in_range(oc.measure.leaf_norm(), x, None)[0]
        size = np.linalg.norm(x.reshape(-1))
        np.testing.assert_allclose(norm(x), size, rtol=1e-14)
        np.testing.assert_allclose(jax.grad(norm)(x), x / size, rtol=1e-13)


@pytest.mark.parametrize("p", [2, np.inf])
def test_norms_of_leaves_of_several_dtypes_have_one(p):
    """Of a large leaf, whose norm is an array of its own, and small ones."""
    with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"):
        tree = {"a": jnp.full(3, 2.0), "b": jnp.full(pieces.LONG, 1, jnp.float32)}
        tx = oc.clip(oc.measure.leaf_norm(p), oc.threshold.constant(0.5))
        found = in_range(oc.measure.leaf_norm(p), tree, None)
        updates, _ = jax.jit(tx.update)(tree, tx.init(tree))

    assert found.dtype == jnp.float64
    np.testing.assert_allclose(found, exactly(tree, whole, p), rtol=2.0**-23)
    np.testing.assert_allclose(exactly(updates, whole, p), 0.5, rtol=2.0**-23)


@cpu
def test_what_is_exported_to_a_tpu_has_no_float64():
    """Its float64 has the range of float32: what is traced on a CPU for it has two looks."""
    grads = {"a": jnp.ones((8, 8)), "b": jnp.ones(8)}
    for make in (oc.clip_by_global_norm, oc.clip_by_norm):
        tx = make()
        traced = jax.jit(tx.update).trace(grads, tx.init(grads))
        for platform, wide in (("tpu", False), ("cpu", True)):
            text = traced.lower(lowering_platforms=(platform,)).as_text()
            assert ("f64" in text) == wide
            assert (f"{2.0**64:.8E}" in text) != wide  # what the second look multiplies by


def test_parameters_of_another_dtype_are_those_of_the_same_leaf():
    """A norm relative to the parameters is right where their dtypes are not those of gradients."""
    grads = {name: trees.normal(4, 3, seed=i) for i, name in enumerate("abc")}
    params = {
        "a": jnp.full((4, 3), 1, jnp.bfloat16),
        "b": jnp.full((4, 3), 10, jnp.float32),
        "c": jnp.full((4, 3), 100, jnp.bfloat16),
    }
    tx = oc.adaptive_grad_clip(0.02)
    updates, _ = jax.jit(tx.update)(grads, tx.init(params), params)

    for name, x in grads.items():
        size = np.linalg.norm(np.asarray(x, np.float64), axis=0)
        most = 0.02 * np.linalg.norm(np.asarray(params[name], np.float64), axis=0)
        found = np.linalg.norm(np.asarray(updates[name], np.float64), axis=0)
        np.testing.assert_allclose(found, np.minimum(size, most), rtol=1e-5)


def test_norms_in_place_of_those_of_a_measure_are_taken():
    """What stands in a measure for its norms has no packing that was made for them."""
    leaves = oc.measure.leaf_norm()
    other = leaves._replace(norms=lambda grads, params: 100 * leaves.norms(grads, params))
    grads = {"a": jnp.ones(4), "b": jnp.ones(4)}
    tx = oc.clip(other, oc.threshold.constant(1.0))
    _, state = tx.update(grads, tx.init(grads))

    assert state.metrics.norm == 200


@pytest.mark.parametrize("measure", [oc.measure.leaf_norm(), oc.measure.unit_norm()])
def test_a_scale_of_ones_own_sees_norms_as_the_measure_has_them(measure):
    """Leaf by leaf, or in the order of the leaves."""
    seen = []

    def scale(norm, limit):
        seen.append(norm.shape)
        return jnp.minimum(1, limit / norm)

    shapes = {"a": (3,), "b": (2,), "c": (3,), "d": (2, 2)}
    grads = {name: trees.normal(*shape) for name, shape in shapes.items()}
    tx = oc.clip(measure, oc.threshold.constant(1.0), scale)
    jax.jit(tx.update)(grads, tx.init(grads))

    assert seen == [norm.shape for norm in jax.tree.leaves(measure.norms(grads, None))]
