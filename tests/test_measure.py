"""Norms and their derivatives against naive float64 formulas, and how groups are formed."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import trees
from oracles import norm, tree_norm

import optaxclip as oc
from optaxclip import measure
from optaxclip.measure.arithmetic import p_norm
from optaxclip.measure.reductions import largest

ORDERS = [1, 1.5, 2, 3, np.inf]
FLOAT32 = 2e-6  # a few roundings of 2^-24

TREES = {
    "nonzero": trees.floats(),
    "one zero leaf": {**trees.floats(), "zero": jnp.zeros(3)},
    "complex": {"c": trees.normal(3).astype(jnp.complex64) * (1 + 2j), "r": trees.normal(2)},
    "zero size": {"none": jnp.zeros((0, 2)), "some": trees.normal(2, 2)},
    "scalar": jnp.float32(-3.0),
}


@pytest.mark.parametrize("tree", TREES.values(), ids=TREES)
@pytest.mark.parametrize("ord", ORDERS)
def test_tree_and_leaf_norms(tree, ord):
    """Tree and leaf norms are those of float64, whatever the order and the leaves."""
    wide = trees.float64(tree)

    whole = measure.global_norm(ord).norms(tree, None)
    leaves = measure.leaf_norm(ord).norms(tree, None)

    assert whole.shape == ()
    assert whole.dtype == leaves.dtype == jnp.float32
    assert whole == pytest.approx(tree_norm(wide, ord), rel=FLOAT32, abs=0)
    expected = [norm(x, ord).item() for x in jax.tree.leaves(wide)]
    np.testing.assert_allclose(leaves, expected, FLOAT32)


@pytest.mark.parametrize("tree", TREES.values(), ids=TREES)
def test_leaf_rms_and_leaf_mean(tree):
    """The root mean square is ||g|| / sqrt(n), and the average norm ||g|| / n."""
    leaves = jax.tree.leaves(trees.float64(tree))
    sizes = np.array([norm(x).item() for x in leaves])
    counts = np.array([max(x.size, 1) for x in leaves])

    np.testing.assert_allclose(
        measure.leaf_rms().norms(tree, None), sizes / np.sqrt(counts), FLOAT32
    )
    np.testing.assert_allclose(measure.leaf_mean().norms(tree, None), sizes / counts, FLOAT32)


@pytest.mark.parametrize("ord", ORDERS)
@pytest.mark.parametrize("x", [[3.0, -4.0, 1.0], [0.0, 0.0], [1.0, 0.0], []], ids=str)
def test_derivative_of_a_norm(ord, x):
    """The derivative of a norm is that of the formula, and some subgradient at zeros."""
    x = np.array(x)
    size = np.abs(x)
    total = norm(x, ord).item() if x.size else 0.0
    expected = np.zeros_like(x)
    if total and ord == np.inf:
        expected = np.sign(x) * (size == size.max())
    elif total:
        expected = np.sign(x) * (size / total) ** (ord - 1)
    if ord == 1:
        expected = np.sign(x)

    slope = jax.grad(lambda x: p_norm(x, ord).reshape(()))(jnp.float32(x))

    np.testing.assert_allclose(slope[x != 0], expected[x != 0], rtol=1e-5, atol=1e-6)
    assert (np.abs(slope) <= 1 + 1e-6).all()


@pytest.mark.parametrize("axes", [None, (1,), (0,)])
@pytest.mark.parametrize("bad", [np.nan, np.inf, 3e38, None])
def test_the_largest_of_many_entries(axes, bad):
    """Of a large leaf, NaN is the largest, and ties have equal shares of the derivative."""
    x = np.array(trees.normal(512, 300))
    x[[0, 0, 0, 400], [1, 2, 3, 5]] = 9.0
    if bad is not None:
        x[300, 200] = bad

    norms, back = jax.vjp(jax.jit(lambda x: p_norm(x, np.inf, axes)), x)

    expected = np.abs(x).max(axes, keepdims=True)
    np.testing.assert_array_equal(norms, expected)
    if bad is None:
        (slope,) = back(jnp.ones_like(norms))
        ties = np.abs(x) == expected
        share = np.sign(x) * ties / ties.sum(axes, keepdims=True)
        np.testing.assert_allclose(slope, share, rtol=1e-6)


def test_a_nan_with_a_sign_is_the_largest():
    """x86 makes such of inf x 0, and as an integer it is below all sizes."""
    x = np.ones(2**17, np.float32)
    x[7] = np.copysign(np.float32(np.nan), np.float32(-1))
    assert x.view(np.int32)[7] < 0
    assert jnp.isnan(jax.jit(lambda x: largest(x, None))(x)).all()


@pytest.mark.parametrize("shape", [(), (5,), (1, 8), (6, 3), (2, 3, 4), (2, 2, 3, 4), (2,) * 5])
def test_default_units_are_those_of_optax(shape):
    """unit_norm() reduces the axes that optax.transforms.unitwise_norm does, and stays small."""
    x = trees.normal(*shape)

    (units,) = measure.unit_norm().norms(x, None)

    assert units.ndim == x.ndim
    expected = optax.transforms.unitwise_norm(x)
    np.testing.assert_allclose(jnp.broadcast_to(units, x.shape), expected, FLOAT32)


@pytest.mark.parametrize(
    ("axis", "shape", "axes"),
    [
        (0, (3, 4), (0,)),
        (-1, (3, 4), (1,)),
        ((0, 1), (3, 4, 5), (0, 1)),
        (0, (7,), (0,)),
        ((0, 1, 2), (7,), (0,)),  # a bias has one unit, whatever the kernels have
        (1, (), ()),
        (lambda path, leaf: None, (3, 4), (0,)),
        (lambda path, leaf: (0, 1) if path == "kernel" else 1, (3, 4, 5), (0, 1)),
    ],
)
def test_units_of_a_given_axis(axis, shape, axes):
    """An axis rule says which axes make one unit."""
    x = {"kernel": trees.normal(*shape)}

    (units,) = measure.unit_norm(axis).norms(x, None)

    np.testing.assert_allclose(units, norm(trees.float64(x)["kernel"], axis=axes), FLOAT32)


def test_axes_that_a_leaf_lacks_are_named():
    """An axis out of range, or a rank that the default does not know, is an error with a path."""
    with pytest.raises(
        ValueError, match=r"axis 2 is out of range for, or twice in, leaf 'a/b' of \(2, 3\)"
    ):
        oc.adaptive_grad_clip(axis=2).init({"a": {"b": jnp.ones((2, 3))}})
    with pytest.raises(
        ValueError, match=r"ranks up to 5; leaf 'deep' has shape .* give axis a func"
    ):
        oc.adaptive_grad_clip().init({"deep": jnp.ones((2,) * 6)})
    with pytest.raises(ValueError, match="axis 3 is out of range for"):
        oc.adaptive_grad_clip(stacked=3).init({"w": jnp.ones((2, 3))})


def test_units_of_flax_modules():
    """One axis function gives Flax's dense, conv, embedding and attention kernels their units."""
    linen = pytest.importorskip("flax.linen")

    class Model(linen.Module):
        @linen.compact
        def __call__(self, tokens):
            x = linen.Embed(11, 8)(tokens)
            x = linen.Conv(6, (3,))(x)
            x = linen.MultiHeadDotProductAttention(num_heads=2, qkv_features=4)(x)
            return linen.Dense(5)(x)

    def axis(path, leaf):
        if path.endswith(("embedding", "query/kernel", "key/kernel", "value/kernel")):
            return 1 if path.endswith("embedding") else 0
        return tuple(range(leaf.ndim - 1)) if path.endswith("kernel") else None

    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        params = Model().init(jax.random.key(0), jnp.zeros((1, 7), jnp.int32))["params"]

    units = measure.unit_norm(axis).norms(params, None)

    leaves = measure.base.places(params)
    shapes = {path: u.shape for (path, _), u in zip(leaves, units, strict=True)}
    assert shapes["Embed_0/embedding"] == (11, 1)
    assert shapes["Conv_0/kernel"] == (1, 1, 6)
    assert shapes["MultiHeadDotProductAttention_0/query/kernel"] == (1, 2, 2)
    assert shapes["MultiHeadDotProductAttention_0/out/kernel"] == (1, 1, 6)
    assert shapes["Dense_0/kernel"] == (1, 5)
    assert shapes["Dense_0/bias"] == (1,)


@pytest.mark.parametrize("labels", [{"a": "x", "b": "y"}, lambda path: "xy"[path[0] == "b"]])
def test_by_label(labels):
    """Each label has a norm of its own; labels are a prefix tree or a function of the path."""
    grads = {"a": [jnp.array([3.0]), jnp.array([4.0])], "b": {"c": jnp.array([0.5]), "d": None}}
    tx = oc.clip(measure.by_label(labels, measure.global_norm()), oc.threshold.constant(1.0))

    updates, state = tx.update(grads, tx.init(grads))

    expected = {"a": [np.array([0.6]), np.array([0.8])], "b": {"c": np.array([0.5]), "d": None}}
    trees.assert_close(updates, expected, FLOAT32)
    assert state.metrics.clipped == 0.5


@pytest.mark.parametrize("axis", [np.int64(0), lambda path, leaf: np.int64(0)])
def test_numpy_integers_are_axes(axis):
    """An axis may be a NumPy integer; what an axis function returns is checked as well."""
    (units,) = measure.unit_norm(axis).norms({"w": jnp.ones((4, 3))}, None)

    assert units.shape == (1, 3)
    with pytest.raises(TypeError, match=r"the axis of leaf 'w' must be None, an int.*; got 'x'"):
        measure.unit_norm(lambda path, leaf: "x").norms({"w": jnp.ones((4, 3))}, None)


def test_labels_that_fit_no_tree_are_an_error():
    """A label tree that is no prefix, and a label that is no string, are errors at init."""
    one = measure.global_norm()
    grads = {"a": jnp.ones(2), "b": jnp.ones(2)}

    with pytest.raises(ValueError, match="b"):
        oc.clip(measure.by_label({"a": "x"}, one), oc.threshold.constant(1.0)).init(grads)
    with pytest.raises(TypeError, match="label must be a str, such as 'encoder'; got 3"):
        oc.clip(measure.by_label(lambda path: 3, one), oc.threshold.constant(1.0)).init(grads)


def test_relative_norms():
    """Norms in units of the parameters have eps as their smallest unit, and skip missing leaves."""
    ratio = measure.relative(measure.leaf_norm(), 1e-3)
    grads = {"a": jnp.array([3.0, 4.0]), "b": jnp.array([1.0]), "c": None}
    params = {"a": jnp.array([0.6, 0.8]), "b": jnp.zeros(1), "c": jnp.ones(3)}

    np.testing.assert_allclose(ratio.norms(grads, params), [5.0, 1e3], FLOAT32)


STACKS = {"kernel": 0, "experts": (0, 1), "last": -1}
LAYERS = {
    "kernel": trees.normal(2, 4, 3, scale=5.0),
    "experts": trees.normal(2, 3, 5, scale=5.0),
    "last": trees.normal(4, 2, scale=5.0),
    "plain": trees.normal(4, 2, scale=5.0),
}


@pytest.mark.parametrize("inner", ["leaf_norm", "unit_norm", "leaf_rms", "element"])
def test_stacked_equals_layer_by_layer(inner):
    """A stacked clip gives each layer what it would get as a leaf of its own."""
    inner = getattr(measure, inner)()
    stacked = measure.stacked(inner, lambda path, leaf: STACKS.get(path))
    tx = oc.clip(stacked, oc.threshold.constant(1.0))
    alone = oc.clip(inner, oc.threshold.constant(1.0))
    one = lambda x: alone.update(x, alone.init(x))[0]

    updates, _ = jax.jit(tx.update)(LAYERS, tx.init(LAYERS))

    experts = LAYERS["experts"]
    expected = {
        "kernel": jnp.stack([one(x) for x in LAYERS["kernel"]]),
        "experts": jnp.stack([jnp.stack([one(x) for x in layer]) for layer in experts]),
        "last": jnp.stack([one(x) for x in LAYERS["last"].T], axis=-1),
        "plain": one(LAYERS["plain"]),
    }
    trees.assert_close(updates, jax.tree.map(np.asarray, expected), FLOAT32)


def test_stacked_global_norm_is_one_norm_per_layer():
    """Over stacked leaves of one length, a tree's norm becomes the norms of its layers."""
    grads = {"w": trees.normal(3, 4, 2), "b": trees.normal(3, 4), "head": trees.normal(5)}
    axes = lambda path, leaf: None if path == "head" else 0

    norms = measure.stacked(measure.global_norm(), axes).norms(grads, None)

    wide = trees.float64(grads)
    layers = [tree_norm([wide["w"][i], wide["b"][i]]) for i in range(3)]
    np.testing.assert_allclose(norms["3"], layers, FLOAT32)
    assert norms[""] == pytest.approx(tree_norm([wide["head"]]), rel=FLOAT32, abs=0)


def test_modifiers_compose():
    """Labels, stacks and units relative to the parameters go together, in either order."""
    params = jax.tree.map(lambda x: 0.1 * x, LAYERS)
    axes = lambda path, leaf: STACKS.get(path)
    label = lambda path: "stack" if path in STACKS else "rest"
    orders = [
        measure.stacked(measure.by_label(label, measure.leaf_norm()), axes),
        measure.by_label(label, measure.stacked(measure.leaf_norm(), axes)),
        measure.stacked(measure.leaf_norm(), axes),
    ]

    results = []
    for group in orders:
        tx = oc.clip(measure.relative(group, 1e-3), oc.threshold.constant(2.0))
        results.append(tx.update(LAYERS, tx.init(params), params)[0])

    trees.assert_close(results[0], jax.tree.map(np.asarray, results[2]), FLOAT32)
    trees.assert_close(results[1], jax.tree.map(np.asarray, results[2]), FLOAT32)
    # Every gradient has 10 times the norm of its parameters: all shrink to a fifth.
    trees.assert_close(results[2], jax.tree.map(lambda x: np.asarray(x) * 0.2, LAYERS), FLOAT32)


def test_a_measure_of_your_own():
    """A pair of functions is a measure, and has all the guarantees."""
    own = measure.Measure(
        norms=lambda grads, params: jnp.max(jnp.stack([jnp.max(jnp.abs(g)) for g in grads])),
        spread=lambda factors, grads: factors,
    )
    tx = oc.clip(own, oc.threshold.constant(1.0))
    grads = [jnp.array([1e25, 5e24]), jnp.array([0.0])]

    updates, _ = tx.update(grads, tx.init(grads))

    np.testing.assert_allclose(updates[0], [1.0, 0.5], FLOAT32)


def test_a_measure_whose_groups_share_entries():
    """The second look scales all gradients alike, as a norm of one's own may be of them all."""
    own = measure.Measure(
        norms=lambda grads, params: [
            jnp.abs(grads[0]) + jnp.float32(1e-12) * jnp.abs(grads[1]),
            jnp.abs(grads[1]),
        ],
        spread=lambda factors, grads: factors,
    )
    tx = oc.clip(own, oc.threshold.constant(1.5e-12))
    grads = [jnp.array([1e-12]), jnp.array([1.0])]

    updates, _ = tx.update(grads, tx.init(grads))

    np.testing.assert_allclose(updates[0], [0.75e-12], 4 * FLOAT32)
