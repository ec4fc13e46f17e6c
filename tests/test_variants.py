"""Every variant against its oracle, and against the golden numbers of the references."""

import json
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import trees
from oracles import VARIANTS, once, tree_norm

import optaxclip as oc

GOLDEN = pathlib.Path(__file__).parent / "golden"
# A float32 norm and factor, each right to a few 2^-24, against float64: well inside 2e-6.
FLOAT32 = 2e-6
EPS = {jnp.float32: FLOAT32, jnp.bfloat16: 2.0**-8, jnp.float16: 2.0**-11}

every_variant = pytest.mark.parametrize("row", VARIANTS.values(), ids=VARIANTS)


def golden(name):
    """The cases of one file; float() reads "nan" and "inf" where a test needs them."""
    return json.loads((GOLDEN / f"{name}.json").read_text())["cases"]


@every_variant
@pytest.mark.parametrize(
    ("dtype", "mode"), [(jnp.float32, "eager"), *((dtype, "jit") for dtype in EPS)], ids=str
)
def test_equals_its_oracle(row, dtype, mode):
    """A variant does what its equation says, in every dtype, eagerly and compiled."""
    grads = trees.floats(dtype=dtype)
    params = trees.floats(scale=0.5, seed=1, dtype=dtype)
    tx = row.make()
    update = jax.jit(tx.update) if mode == "jit" else tx.update

    updates, _ = update(grads, tx.init(params), params)

    expected = row.oracle(trees.float64(grads), trees.float64(params))
    # Rounding to float16 loses up to 2^-25 of what is below its normal numbers.
    trees.assert_close(trees.float64(updates), expected, EPS[dtype], atol=2.0**-25)


@every_variant
def test_scan_equals_steps_one_by_one(row):
    """A variant inside lax.scan gives what it gives step by step, state included."""
    tx = row.make()
    params = trees.floats(scale=0.5, seed=9)
    steps = [trees.floats(scale=10.0 ** (i - 2), seed=i) for i in range(4)]
    state, updates = tx.init(params), []
    for grads in steps:
        update, state = tx.update(grads, state, params)
        updates.append(update)

    def body(state, grads):
        update, state = tx.update(grads, state, params)
        return state, update

    stack = lambda *leaves: jnp.stack(leaves)
    final, scanned = jax.lax.scan(body, tx.init(params), jax.tree.map(stack, *steps))

    trees.assert_close(scanned, jax.tree.map(stack, *updates), FLOAT32)
    trees.assert_close(final, state, FLOAT32)


def test_golden_optax_basic():
    """Clips agree with Optax's numbers, and p-norms and leaf norms with the formulas."""
    case = golden("optax_basic_and_edges")["basic"]
    grads = jax.tree.map(jnp.float32, case["input"], is_leaf=lambda x: isinstance(x, list))
    expect = lambda name: jax.tree.map(
        np.float32, case[name], is_leaf=lambda x: isinstance(x, list)
    )

    trees.assert_close(once(oc.clip_by_value(1.5), grads)[0], expect("clip_1.5"), FLOAT32)
    updates, state = once(oc.clip_by_global_norm(2.0), grads)
    trees.assert_close(updates, expect("clip_by_global_norm_2"), FLOAT32)
    assert state.metrics.norm == pytest.approx(case["global_norm"], rel=FLOAT32, abs=0)
    updates, _ = once(oc.clip_by_block_rms(1.0), grads)
    trees.assert_close(updates, expect("clip_by_block_rms_1"), FLOAT32)

    for p, (norm, factor) in case["p_norm_scales_max2"].items():
        _, state = once(oc.clip_by_global_norm(2.0, ord=float(p)), grads)
        assert state.metrics.norm == pytest.approx(norm, rel=FLOAT32, abs=0)
        assert state.metrics.factor == pytest.approx(factor, rel=FLOAT32, abs=0)
    for leaf, (norm, factor) in case["block_l2_scales_max2"].items():
        _, state = once(oc.clip_by_norm(2.0), grads[leaf])
        assert state.metrics.norm == pytest.approx(norm, rel=FLOAT32, abs=0)
        assert state.metrics.factor == pytest.approx(factor, rel=FLOAT32, abs=0)
    for leaf, numbers in case["average_norm_tf_documented"].items():
        _, state = once(oc.clip_by_average_norm(0.5), grads[leaf])
        assert state.metrics.norm == pytest.approx(numbers["l2_over_n"], rel=FLOAT32, abs=0)
        assert state.metrics.factor == pytest.approx(numbers["scale_clip_half"], rel=FLOAT32, abs=0)
        _, state = once(oc.clip_by_block_rms(0.5), grads[leaf])
        assert state.metrics.norm == pytest.approx(
            numbers["l2_over_sqrt_n_rms"], rel=FLOAT32, abs=0
        )


def test_golden_optax_edges():
    """Where Optax is right at the edges the numbers agree, and where it is not they are right."""
    edges = golden("optax_basic_and_edges")["edges"]
    value = lambda name: np.array([float(x) for x in edges[name]["a"]], np.float32)
    propagate = {"nonfinite": "propagate"}
    nan, inf = jnp.nan, jnp.inf

    same = [
        ("global_norm_max1_zero_grad", oc.clip_by_global_norm(1.0), [0, 0, 0]),
        ("block_rms_1_nan_inf", oc.clip_by_block_rms(1.0, **propagate), [nan, 1]),
    ]
    for name, tx, grads in same:
        updates, _ = once(tx, jnp.array(grads, jnp.float32))
        np.testing.assert_array_equal(updates, value(name), err_msg=name)
    for name, bad in [("global_norm_max1_nan", nan), ("global_norm_max1_inf", inf)]:
        grads = {"a": jnp.array([1.0, bad]), "b": jnp.array([1.0, 1.0])}
        updates, _ = once(oc.clip_by_global_norm(1.0, **propagate), grads)
        np.testing.assert_array_equal(updates["a"], value(name))
        np.testing.assert_array_equal(updates["b"], [float(x) for x in edges[name]["b"]])
    zero_param = {"a": jnp.array([[3.0], [4.0]])}
    updates, _ = once(oc.adaptive_grad_clip(), zero_param, {"a": jnp.zeros((2, 1))})
    np.testing.assert_allclose(
        updates["a"].ravel(), edges["adaptive_grad_clip_zero_params"]["a"], FLOAT32
    )

    # The other numbers of the file are dtypes, errors and wrappers: test_clip and test_wrappers.
    # Optax: NaN for zero gradients under max_norm 0, +-1 for +-inf, norms in the leaf dtype.
    assert edges["global_norm_max0_zero_grad"]["a"] == ["nan"] * 3
    np.testing.assert_array_equal(once(oc.clip_by_global_norm(0.0), jnp.zeros(3))[0], [0, 0, 0])
    assert edges["clip_1_nan_inf"]["a"] == ["nan", 1.0, -1.0]
    updates, _ = once(oc.clip_by_value(1.0, **propagate), jnp.array([nan, inf, -inf]))
    assert np.isnan(updates).all()
    right = [
        (jnp.full(4, 300, jnp.float16), edges["fp16_300x4_true_norm"]),
        ([jnp.ones(128, jnp.bfloat16)] * 1000, edges["bf16_1000_leaves_norm_true"]),
    ]
    for grads, norm in right:
        updates, state = once(oc.clip_by_global_norm(1.0), grads)
        assert state.metrics.norm == pytest.approx(norm, rel=FLOAT32, abs=0)
        assert state.metrics.factor == pytest.approx(1 / norm, rel=FLOAT32, abs=0)
        assert jax.tree.leaves(updates)[0].dtype == jax.tree.leaves(grads)[0].dtype
        # Optax makes 1.77 of 1000 bfloat16 leaves, and zeros of large float16 entries.
        assert tree_norm(trees.float64(updates)) == pytest.approx(1.0, rel=2.0**-8, abs=0)


@pytest.mark.parametrize("case", golden("torch_clip_grad_norm").items(), ids=lambda c: c[0])
def test_golden_torch(case):
    """clip_by_global_norm gives what torch gives, apart from the 1e-6 that torch adds."""
    _, numbers = case
    grads = [jnp.array([float(x) for x in leaf], jnp.float32) for leaf in numbers["grads"]]
    expected = [np.array([float(x) for x in leaf]) for leaf in numbers["out"]]
    norm, limit = float(numbers["total_norm"]), numbers["max_norm"]
    tx = oc.clip_by_global_norm(limit, ord=float(numbers["p"]), nonfinite="propagate")

    updates, state = once(tx, grads)

    assert state.metrics.norm == pytest.approx(norm, rel=FLOAT32, abs=0, nan_ok=True)
    # torch's factor is min(1, limit / (norm + 1e-6)): take that back out of its numbers.
    torch_factor = min(1, limit / (norm + 1e-6)) if norm and math.isfinite(norm) else 1
    factor = min(1, limit / norm) if norm and math.isfinite(norm) else 1
    for update, leaf in zip(updates, expected, strict=True):
        np.testing.assert_allclose(update, leaf * (factor / torch_factor), FLOAT32)


@pytest.mark.parametrize("case", golden("agc").items(), ids=lambda c: c[0])
def test_golden_agc(case):
    """adaptive_grad_clip gives what the authors' code gives, at every rank."""
    _, numbers = case
    grad, param = jnp.float32(numbers["grad"]), jnp.float32(numbers["param"])

    updates, _ = once(oc.adaptive_grad_clip(), grad, param)

    np.testing.assert_allclose(updates, np.float32(numbers["nfnets_out"]), FLOAT32)


@pytest.mark.parametrize("case", golden("agc_dreamerv3")["clip0.3"], ids=str)
def test_golden_agc_dreamerv3(case):
    """per_tensor=True with clipping=0.3 is DreamerV3's clip, non-finite gradients included."""
    read = lambda key: np.array(
        [[float(x) for x in row] if isinstance(row, list) else float(row) for row in case[key]],
        np.float32,
    )
    tx = oc.adaptive_grad_clip(0.3, per_tensor=True, nonfinite="propagate")

    updates, _ = once(tx, jnp.array(read("grad")), jnp.array(read("param")))

    np.testing.assert_allclose(updates, read("out"), FLOAT32)


def test_golden_agc_stacked_and_embedding():
    """stacked= clips each layer as if alone, and axis= gives an embedding its rows."""
    case = golden("agc_scan_and_embedding")
    grad, param = jnp.float32(case["grad"]), jnp.float32(case["scan_stacked_param"])

    apart, _ = once(oc.adaptive_grad_clip(stacked=0), grad, param)
    mixed, _ = once(oc.adaptive_grad_clip(), grad, param)

    np.testing.assert_allclose(apart, np.float32(case["correct_per_layer_vmap"]), FLOAT32)
    np.testing.assert_allclose(mixed, np.float32(case["optax_default_on_stacked"]), FLOAT32)

    grad, param = jnp.float32(case["embedding_grad"]), jnp.float32(case["embedding_param"])
    rows, _ = once(oc.adaptive_grad_clip(axis=lambda path, leaf: 1), grad, param)
    columns, _ = once(oc.adaptive_grad_clip(), grad, param)

    np.testing.assert_allclose(rows, np.float32(case["row_axis1"]), FLOAT32)
    np.testing.assert_allclose(columns, np.float32(case["optax_default_axis0"]), FLOAT32)


def test_agc_leaves_out_what_the_mask_says():
    """A mask, as a tree or as a function of the parameters, leaves the last layer alone."""
    grads = {"body": jnp.array([3.0, 4.0]), "head": jnp.array([3.0, 4.0])}
    masks = [{"body": True, "head": False}, lambda p: {k: k != "head" for k in p}]

    for mask in masks:
        updates, state = once(oc.adaptive_grad_clip(0.1, mask=mask), grads)
        np.testing.assert_allclose(updates["body"], [0.3, 0.4], FLOAT32)
        trees.assert_same_bits(updates["head"], grads["head"])
        assert oc.metrics(state)["clipped"] == 1


def test_agc_without_params_says_so():
    """A forgotten params argument is a clear ValueError."""
    tx = oc.adaptive_grad_clip()
    grads = jnp.ones(3)

    with pytest.raises(ValueError, match=r"call update\(grads, state, params\)"):
        tx.update(grads, tx.init(grads))


@pytest.mark.parametrize("row", [row for row in VARIANTS.values() if row.replaces])
def test_replaces_optax_in_a_training_run(row):
    """Twenty steps of momentum after the clip end where they end after Optax's, to 2e-6."""
    params = {"w": trees.normal(8, 4), "b": trees.normal(4, seed=3)}
    inputs = trees.normal(20, 16, 8, scale=4.0)

    def train(clip):
        tx = optax.chain(clip, optax.sgd(0.05, momentum=0.9))

        def step(carry, x):
            params, state = carry
            loss = lambda p: jnp.mean(jnp.square(jnp.tanh(x @ p["w"] + p["b"][None]) - 0.5))
            updates, state = tx.update(jax.grad(loss)(params), state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, tx.init(params)), inputs)[0][0]

    trees.assert_close(
        train(row.make()), train(row.replaces()), FLOAT32, atol=1e-7
    )  # params near 0
