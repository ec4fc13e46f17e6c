"""Leaves that are alike are summed in one loop; big temporary arrays are not made."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import trees
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import optaxclip as oc
from optaxclip.measure import bundles
from optaxclip.measure.arithmetic import square_sum
from optaxclip.measure.looks import in_range

ONE = pytest.mark.skipif(jax.device_count() > 1, reason="without a mesh: make test has one device")
# XLA:CPU of jax 0.12 writes some products that are used twice to memory, which jax 0.10's does not.
LATER = jax.__version_info__ >= (0, 12)


def on(axis_type, specs, devices=1):
    """Leaves of 64 x 8 on a mesh, sharded as their specs say."""
    mesh = jax.make_mesh(
        (devices,), ("x",), axis_types=(axis_type,), devices=jax.devices()[:devices]
    )
    place = lambda i, spec: jax.device_put(trees.normal(64, 8, seed=i), NamedSharding(mesh, spec))
    return {str(i): place(i, spec) for i, spec in enumerate(specs)}


def lengths(tree):
    return sorted(len(part.leaves) for part in bundles.together(bundles.single(tree, None)))


WHOLE, ROWS, COLUMNS = PartitionSpec(), PartitionSpec("x"), PartitionSpec(None, "x")


@pytest.mark.parametrize(
    ("leaves", "expected"), [(3, [3]), (16, [16]), (17, [8, 9]), (40, [10] * 4)]
)
def test_bundles_are_of_one_length_if_they_can(leaves, expected):
    """No bundle has more than sixteen leaves, and equal ones are compiled once."""
    assert lengths(on(AxisType.Explicit, [WHOLE] * leaves)) == expected


def test_what_is_not_alike_is_apart():
    """Leaves of another shape or dtype are in no bundle with others, nor are large float32 ones."""
    tree = on(AxisType.Explicit, [WHOLE] * 2)
    tree["bfloat16"] = tree["0"].astype(jnp.bfloat16)
    tree["flat"] = tree["0"].reshape(-1)
    tree |= {f"big {i}": jnp.tile(tree["0"], (32, 1)) for i in range(2)}

    assert lengths(tree) == [1, 1, 1, 1, 2]


@ONE
def test_large_leaves_are_in_small_bundles_if_their_squares_are_float64():
    """There one loop over up to four is faster; of float32 it is slower, and each is alone."""
    tree = {str(i): jnp.ones((128, 128)) for i in range(9)}
    with jax.enable_x64(True):
        wide = {k: x.astype(jnp.float64) for k, x in tree.items()}

    assert lengths(tree) == [1] * 9
    assert lengths(wide) == [3, 3, 3]


@ONE
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float16, jnp.complex64])
def test_the_norm_of_large_bundles_sees_each_of_their_leaves(dtype):
    """With four, three and one leaf in bundles, each counts, and is seen where it is not finite."""
    shapes = [(96, 97)] * 7 + [(97, 96)] + [(50, 51)] * 5
    turn = 0.6 + 0.8j if dtype == jnp.complex64 else 1  # or complex entries would be real
    turned = lambda x: x.astype(dtype) * jnp.asarray(turn, dtype)
    tree = {str(i): turned(trees.normal(*s, seed=i)) for i, s in enumerate(shapes)}
    norm = jax.jit(lambda tree: in_range(oc.measure.global_norm(), tree, None))
    whole = np.concatenate([np.ravel(x) for x in tree.values()]).astype(np.complex128)

    assert np.isclose(norm(tree), np.linalg.norm(whole), rtol=4 * 2.0**-24)
    for name, x in tree.items():
        assert np.isnan(norm(tree | {name: x.at[-1, -1].set(jnp.nan)})), name


def lays_together(fun, tree):
    """Whether all entries of the tree are written behind each other."""
    size, text = sum(x.size for x in tree.values()), jax.jit(fun).lower(tree).as_text()
    laid = re.findall(r"stablehlo\.concatenate.*-> tensor<(\d+)x", text)
    return any(int(n) in (size, size + 1) for n in laid)


@ONE
@pytest.mark.parametrize(
    ("dtype", "size", "laid"),
    [(jnp.float32, 2**11, True), (jnp.float32, 2**12, False), (jnp.bfloat16, 2**12, True)],
)
@pytest.mark.parametrize("measure", [oc.measure.global_norm, oc.measure.leaf_norm])
def test_only_tiny_leaves_are_laid_together_for_sums_in_float64(measure, dtype, size, laid):
    """Of larger ones such a piece takes twice as long and more; bfloat16 has other sums."""
    tree = {str(i): jnp.ones(size, dtype) for i in range(8)}
    norms = lambda tree: in_range(measure(), tree, None)

    assert lays_together(norms, tree) == laid
    assert np.isclose(np.linalg.norm(norms(tree)), np.sqrt(8 * size), rtol=2 * 2.0**-24)


@ONE
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(("size", "laid"), [(2**11, True), (2**12, False)])
def test_only_metrics_of_tiny_leaves_are_of_what_is_laid_together(dtype, size, laid):
    """Of others that are alike, one loop reads up to sixteen, where they are."""
    tx = oc.clip_by_value()
    step = lambda tree: tx.update(tree, tx.init(tree))

    def tree(leaves):
        return {str(i): jnp.ones(size, dtype) for i in range(leaves)}

    def reductions(leaves):
        return jax.jit(step).lower(tree(leaves)).as_text().count("stablehlo.reduce(")

    assert lays_together(step, tree(8)) == laid
    assert reductions(8) == reductions(16) < reductions(17)


@pytest.mark.skipif(jax.device_count() < 8, reason="needs eight devices")
@pytest.mark.parametrize(
    ("axis_type", "expected"), [(AxisType.Explicit, [2, 2, 2]), (AxisType.Auto, [1] * 6)]
)
def test_leaves_that_lie_elsewhere_are_apart(axis_type, expected):
    """On a mesh, only leaves that are known to be split alike are added, where they are."""
    tree = on(axis_type, [WHOLE, ROWS, COLUMNS] * 2, devices=8)
    norms = jax.jit(lambda tree: oc.measure.global_norm().norms(tree, None))

    assert lengths(tree) == expected
    assert "all-gather" not in norms.lower(tree).compile().as_text()
    whole = np.concatenate([np.ravel(x) for x in tree.values()]).astype(np.float64)
    assert np.isclose(norms(tree), np.linalg.norm(whole), rtol=4 * 2.0**-24)


def test_squares_are_added_in_pairs():
    """A sum of 15 equal squares is rounded less often than one after the other."""
    value = np.float32(1.8872055)  # added in a chain, its squares are off by 4.2 units
    exact = 15 * float(value * value)

    # Four roundings at most, each of a part of the sum: of 20,000 values, 1.5 units at most.
    assert abs(float(square_sum([jnp.full((1,), value)] * 15)) / exact - 1) <= 2 * 2.0**-24


@ONE
def test_one_loop_for_many_leaves():
    """Of 320 small leaves, the norm takes a tenth as many kernels."""
    tree = {str(i): jnp.ones((4, 4)) for i in range(320)}
    norm = lambda tree: oc.measure.global_norm().norms(tree, None)

    assert lengths(tree) == [16] * 20
    assert jax.jit(norm).lower(tree).compile().as_text().count(" fusion(") <= 32


@ONE
def test_metrics_of_many_leaves_are_taken_together():
    """What the record adds to a clip of units does not grow with the number of leaves."""

    def reductions(leaves, **options):
        tree = {str(i): jnp.ones((4, 4)) for i in range(leaves)}
        tx = oc.adaptive_grad_clip(**options)
        lowered = jax.jit(tx.update).lower(tree, tx.init(tree), tree)
        return lowered.as_text().count("stablehlo.reduce(")

    few, many = (reductions(n) - reductions(n, record=False) for n in (2, 40))
    assert few == many


TREE = {str(i): (256, 512) for i in range(6)} | {"bias": (512,)}


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(
    "make",
    [
        oc.clip_by_global_norm,
        oc.clip_by_norm,
        lambda: oc.clip_by_value(record=False),
        pytest.param(oc.clip_by_value, marks=ONE),
        oc.adaptive_grad_clip,
        oc.zclip,
    ],
    ids=["global_norm", "norm", "value without metrics", "value", "adaptive_grad_clip", "zclip"],
)
def test_no_array_of_the_size_of_the_gradients(make, dtype):
    """A clip has no temporary array as large as the gradients, whatever their dtype."""
    grads = {name: jnp.ones(shape, dtype) for name, shape in TREE.items()}
    tx = make()
    compiled = jax.jit(tx.update).lower(grads, tx.init(grads), grads).compile()

    total = sum(x.nbytes for x in grads.values())
    # A broadcast float32 for the second look, as large as one leaf of six, may be there.
    assert compiled.memory_analysis().temp_size_in_bytes < 0.4 * total


def temporary(tx, dtype):
    """What a step needs in memory while it runs, as a share of the parameters in float32."""
    params = {name: jnp.ones(shape, dtype) for name, shape in TREE.items()}

    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    with jax.numpy_dtype_promotion("standard"):  # Optax promotes
        lowered = jax.jit(step, donate_argnums=(0, 1)).lower(params, tx.init(params), params)
    size = lowered.compile().memory_analysis().temp_size_in_bytes
    return size / sum(4 * x.size for x in params.values())


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, pytest.param(jnp.float16, marks=ONE)])
def test_adam_reads_clipped_entries_twice_without_an_array_of_them(dtype):
    """In a step with Adam, a clip needs no array more than Adam does."""
    bare = temporary(optax.adamw(1e-3), dtype)
    clips = [oc.clip_by_value(record=False), oc.clip_by_global_norm(), oc.clip_by_norm()]
    for clip in [*clips, oc.adagc()]:  # of its two clips, the second sees no clipped tree
        more = temporary(optax.chain(clip, optax.adamw(1e-3)), dtype) - bare
        # A broadcast number for the second look, float32, as large as one leaf of six, is all.
        assert more < 0.2


@ONE
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_stable_adam_writes_no_quotients(dtype):
    """Of its moments, there are none beside those that it keeps: of its arrays, only one is more.

    That is Adam's direction, or a new moment, as XLA:CPU makes a loop per result.
    """
    tx = optax.chain(oc.scale_by_stable_adam(), optax.scale_by_learning_rate(1e-3))
    assert temporary(tx, dtype) < 1.2


@ONE
def test_adam_reads_sanitized_entries_without_an_array_of_them():
    """What is sanitized for the norm is so once more for the update."""
    clip = oc.clip_by_global_norm(nonfinite="sanitize")
    more = temporary(optax.chain(clip, optax.adamw(1e-3)), jnp.float32)
    assert more - temporary(optax.adamw(1e-3), jnp.float32) < 0.01


@ONE
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_clippy_writes_no_quotients(dtype):
    """The largest of them is found where they are worked out."""
    written = 0.5 if LATER and dtype == jnp.bfloat16 else 0  # the bfloat16 updates that SGD makes
    assert temporary(optax.chain(optax.sgd(0.1), oc.clippy()), dtype) < written + 0.01


@ONE
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_second_moment_per_entry_has_no_quotients(dtype):
    """Its memory is copied, as each array is a loop on a CPU, and what makes v unbiased is dear."""
    metrics = 4 / 3 if LATER else 0  # the norms once more, and roots of two leaves beside them
    assert temporary(oc.clip_by_second_moment(record=False), dtype) < 3.01
    assert temporary(oc.clip_by_second_moment(), dtype) < 3.01 + metrics
