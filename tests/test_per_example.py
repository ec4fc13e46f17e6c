"""Clipping each example's gradient: against golden numbers, NumPy, Optax and jax_privacy.

The golden files hold what reference code answered. Which of their numbers are bugs that must not
be here, and which are of what is not offered, stands where they are read.
"""

import contextlib
import json
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from kinds import assert_refused
from trees import assert_close, assert_same_bits, normal

from optaxclip import measure, scale
from optaxclip.per_example import clipped_value_and_grad, per_example_clip, update_max_norm

GOLDEN = pathlib.Path(__file__).parent / "golden"
# Some dozen roundings to float32, of 6e-8 each.
FLOAT32 = 2e-6
# Through a model, some 100 of them, with a digit lost in differences; and where entries of a mean
# cancel, as many of those of its terms, which are at most the limit of 1 over B.
MODEL = {"rtol": 1e-5, "atol": 1e-6}
NAN, INF = math.nan, math.inf


def golden(file):
    """The cases of one file, with "nan" and "inf" as numbers."""
    read = lambda x: float(x) if x in ("nan", "inf", "-inf") else x
    return jax.tree.map(read, json.loads((GOLDEN / f"{file}.json").read_text())["cases"])


DP = golden("dp_per_example")
# The gradients that the golden sums of Optax are of: four examples, two layers.
LAYERS = [
    jnp.array([[0.0, 0, 0], [0, 3, 4], [4, 0, 3], [3, 4, 0]]),
    jnp.array([[1.0, 0], [0, 0], [0, 12], [0, 0]]),
]
NORM_13 = {"a": jnp.array([[3.0, 4.0]]), "b": jnp.array([[0.0, 12.0]])}


def summed(grads, **how):
    """The sum of the clipped gradients, and how many norms were clipped."""
    mean, examples = per_example_clip(grads, **how)
    count = jax.tree.leaves(grads)[0].shape[0]
    groups = jax.tree.leaves(examples.norms)[0].size
    return jax.tree.map(lambda m: m * count, mean), round(float(examples.clipped) * groups)


# ---------------------------------------------------------------------- golden numbers


@pytest.mark.parametrize(
    ("case", "grads", "limit", "times"),
    [
        ("jaxprivacy_global_c6.5", NORM_13, 6.5, 1),
        ("jaxprivacy_global_c6.5_rescale", NORM_13, 6.5, 1 / 6.5),  # it divides by C, too
        ("jaxprivacy_c0", NORM_13, 0.0, 1),
        ("jaxprivacy_zero", {"a": jnp.zeros((1, 2))}, 1.0, 1),
    ],
)
def test_one_example_is_that_of_jax_privacy(case, grads, limit, times):
    """An example alone is clipped as jax_privacy's clip_pytree does it."""
    mean, examples = per_example_clip(grads, max_norm=limit)

    expected = jax.tree.map(np.float32, {k: np.array(x) for k, x in DP[case]["clipped"].items()})
    assert_close(jax.tree.map(lambda m: m * times, mean), expected, FLOAT32)
    np.testing.assert_allclose(examples.norms, [DP[case]["norm"]], FLOAT32)


def test_each_layer_is_that_of_jax_privacy():
    """Layers with limits of their own are one call each, and are clipped as it does it."""
    for name, limit in (("a", 2.5), ("b", 12.5)):
        mean, examples = per_example_clip(NORM_13[name], max_norm=limit)
        np.testing.assert_allclose(mean, DP["jaxprivacy_perlayer"]["clipped"][name], FLOAT32)
        np.testing.assert_allclose(examples.norms, [DP["jaxprivacy_perlayer"]["norm"][name]])


def test_unit_norm_at_limit_zero_is_normalize():
    """What jax_privacy makes of C = 0 with rescale_to_unit_norm is a scale of its own here."""
    mean, _ = per_example_clip(NORM_13, max_norm=1.0, rule=scale.normalize)

    np.testing.assert_allclose(mean["b"], DP["jaxprivacy_c0_rescale"]["clipped"]["b"], FLOAT32)


def test_global_sums_are_those_of_optax():
    """The sum over examples and the count of those clipped are Optax's, and so is the mean."""
    total, clipped = summed(LAYERS, max_norm=2.5)
    mean, _ = per_example_clip(LAYERS, max_norm=2.5)

    expected = DP["optax_per_example_global_2.5"]
    for actual, row in zip(total, expected["sum"], strict=True):
        np.testing.assert_allclose(actual, row, FLOAT32)
    assert clipped == expected["num_clipped"]
    for actual, row in zip(mean, DP["optax_dp_aggregate_nonoise"], strict=True):
        np.testing.assert_allclose(actual, row, FLOAT32)


@pytest.mark.parametrize(
    ("case", "rule", "limit"),
    [
        ("uniform", measure.leaf_norm, 2.5 / math.sqrt(2)),  # C / sqrt(K) of K layers
        ("nonuniform", measure.leaf_rms, 2.5 / math.sqrt(5)),  # C / sqrt(D) of D parameters
    ],
)
def test_layer_sums_are_those_of_optax(case, rule, limit):
    """Both of Optax's ways to share a limit between layers are a measure here."""
    total, clipped = summed(LAYERS, max_norm=limit, measure=rule())

    sums, counts = DP[f"optax_per_example_layer_{case}_2.5"]
    for actual, row in zip(total, sums, strict=True):
        np.testing.assert_allclose(actual, row, FLOAT32)
    assert clipped == sum(counts)


RULES = {
    "abadi_fastdp_eps1e6": (scale.rescale, 2e-6),  # it adds 1e-6 to the norm
    "auto_s_gamma0_01": (scale.automatic(0.01), FLOAT32),
    "auto_v": (scale.normalize, FLOAT32),
    "psac_r0_1": (scale.psac(0.1), FLOAT32),
    "global_drop": (scale.skip, FLOAT32),
}


@pytest.mark.parametrize("name", RULES)
def test_rules_have_the_published_factors(name):
    """Every rule multiplies an example by the factor of its paper, from norm 0.001 to 100."""
    rule, tolerance = RULES[name]
    for row in DP["per_example_factor_tables_R1"][1:]:  # of norm 0 there is nothing to multiply
        mean, _ = per_example_clip(jnp.array([[row["norm"]]]), max_norm=1.0, rule=rule)
        np.testing.assert_allclose(mean, [row["norm"] * row[name]], tolerance)


def test_limits_of_opacus():
    """The limit follows the shares that opacus' AdaClip saw, without its noise."""
    for row in DP["opacus_adaclip_noise0_q0.5_lr0.2"]:
        below = round(4 * row["unclipped_frac"])
        norms = row["C"] * jnp.array([0.5] * below + [2.0] * (4 - below))
        np.testing.assert_allclose(update_max_norm(row["C"], norms), row["C_next"], FLOAT32)


@pytest.mark.parametrize(
    "case", ["single_stream_q0.5_lr0.2", "single_stream_q0.95_lr0.2", "batch4_q0.5_lr0.2"]
)
def test_limits_of_tensorflow_privacy(case):
    """Clip, then update: all limits and factors are those of the geometric rule.

    The fourth case of the file adds in place of multiplying, which is not offered.
    """
    rows = golden("quantile_geometric")[case]
    limit = jnp.float32(rows["init"])
    for row in rows["steps"]:
        np.testing.assert_allclose(limit, row["threshold_used"], FLOAT32)
        norms = jnp.array(row["norms"])
        mean, examples = per_example_clip(jnp.diag(norms), max_norm=limit)
        count = len(row["norms"])
        np.testing.assert_allclose(mean * count, norms * jnp.array(row["scales"]), FLOAT32)
        limit = update_max_norm(
            limit, examples.norms, quantile=rows["target_quantile"], rate=rows["lr"]
        )
        np.testing.assert_allclose(limit, row["threshold_next"], FLOAT32)


# ------------------------------------------------------- bugs of others, which are not here


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_a_bad_example_does_not_poison_the_sum(bad):
    """It contributes zero and is counted, where Optax's sum is NaN."""
    grads = jnp.array([[bad, 0.0, 0.0], [0.0, 3.0, 4.0]])

    mean, examples = per_example_clip(grads, max_norm=1.0)

    poisoned, count = DP["optax_per_example_nan"]
    assert np.isnan(poisoned[0][0])
    np.testing.assert_allclose(mean, [0.0, *(x / 2 for x in poisoned[0][1:])], FLOAT32)
    assert examples.nonfinite == 1
    assert examples.clipped == count / 2
    assert np.isnan(DP["jaxprivacy_nan"]["clipped"]["a"][0])  # as the engine's default does not
    assert np.isnan(DP["jaxprivacy_inf"]["clipped"]["a"][0])


def test_limit_zero_gives_zeros_and_no_nan():
    """C = 0 gives zeros, for zero gradients too, in the value and in the derivative."""
    grads = {"a": jnp.array([[3.0, 4.0], [0.0, 0.0]])}

    def squares(grads, limit):
        return jnp.sum(per_example_clip(grads, max_norm=limit)[0]["a"] ** 2)

    mean, examples = per_example_clip(grads, max_norm=0.0)
    assert_same_bits(mean, {"a": jnp.zeros(2)})
    assert examples.clipped == 0.5
    for derivative in jax.tree.leaves(jax.grad(squares, (0, 1))(grads, jnp.float32(0))):
        assert np.isfinite(derivative).all()


def test_limit_inf_leaves_all_alone():
    """C = inf is the plain mean, where jax_privacy's rescale to unit norm gives zeros."""
    mean, examples = per_example_clip(NORM_13, max_norm=INF)

    assert_same_bits(mean, jax.tree.map(lambda g: g[0], NORM_13))
    assert examples.clipped == 0
    assert not np.any(DP["jaxprivacy_cinf_rescale"]["clipped"]["b"])


def test_a_norm_that_is_not_finite_does_not_raise_the_limit():
    """A NaN, which compares as not below, and padding teach the quantile nothing."""
    norms = jnp.array([0.5, 2.0])
    bad = jnp.array([0.5, NAN, 2.0, INF, NAN])

    assert update_max_norm(1.0, bad) == update_max_norm(1.0, norms) == 1.0
    assert update_max_norm(1.0, jnp.array([0.5, NAN])) < 1
    for limit in (1.0, 0.1, 3e-9):
        assert_same_bits(update_max_norm(limit, jnp.array([NAN, INF])), jnp.float32(limit))


# ------------------------------------------------------------------ against other code


def ragged(count=8, **kwargs):
    """Gradients of examples, from very small to very large ones."""
    sizes = jnp.logspace(-2, 2, count)
    shapes = {"bias": (3,), "kernel": (4, 3), "scalar": ()}
    return {
        name: normal(count, *shape, **kwargs) * sizes.reshape(-1, *(1 for _ in shape))
        for name, shape in shapes.items()
    }


def oracle(grads, limit):
    """The mean of g_i min(1, C / ||g_i||) in float64, and the norms."""
    wide = jax.tree.map(lambda g: np.asarray(g, np.float64), grads)
    rows = np.concatenate([g.reshape(g.shape[0], -1) for g in jax.tree.leaves(wide)], 1)
    norms = np.linalg.norm(rows, axis=1)
    factors = np.minimum(1, limit / norms)
    return jax.tree.map(lambda g: np.tensordot(factors, g, 1) / len(norms), wide), norms


@pytest.mark.parametrize("limit", [0.3, 1, 30.0, np.float64(2), jnp.float32(2)])
def test_the_mean_is_the_equation(limit):
    """Mean, norms and share are those of a float64 transcription."""
    grads = ragged()
    mean, examples = per_example_clip(grads, max_norm=limit)
    expected, norms = oracle(grads, float(limit))

    assert_close(mean, expected, rtol=0, atol=FLOAT32 * float(limit))
    np.testing.assert_allclose(examples.norms, norms, FLOAT32)
    assert examples.clipped == np.mean(norms > float(limit))
    assert examples.nonfinite == 0


def test_equal_to_optax():
    """Sum and count are those of optax.per_example_global_norm_clip and its layer-wise form."""
    grads, limit = jax.tree.leaves(ragged()), 0.3
    total, clipped = summed(grads, max_norm=limit)
    expected, count = optax.per_example_global_norm_clip(grads, limit)
    assert_close(total, expected, **MODEL)
    assert clipped == count

    each = {True: (measure.leaf_norm(), 3), False: (measure.leaf_rms(), 16)}
    for uniform, (groups, parts) in each.items():
        total, clipped = summed(grads, max_norm=limit / math.sqrt(parts), measure=groups)
        expected, counts = optax.per_example_layer_norm_clip(grads, limit, uniform=uniform)
        assert_close(total, expected, **MODEL)
        assert clipped == sum(counts)


# A model whose gradients are small and can be written down: a linear one with a square loss.
def loss(params, x, y):
    """Half the squared error of one example."""
    return 0.5 * jnp.sum((x @ params["kernel"] + params["bias"] - y) ** 2)


def problem(count=12, bad=()):
    """Parameters and examples, one far off; and those that are bad."""
    params = {"kernel": normal(4, 3), "bias": normal(3)}
    x, y = normal(count, 4, seed=1), normal(count, 3, seed=2).at[5].mul(100)
    for i in bad:
        y = y.at[i].set(NAN)
    return params, x, y


def by_hand(params, x, y):
    """Losses and gradients of each example, in NumPy float64."""
    kernel, bias, x, y = (np.asarray(a, np.float64) for a in (*params.values(), x, y))
    kernel, bias = (kernel, bias) if kernel.ndim == 2 else (bias, kernel)
    error = x @ kernel + bias - y
    grads = {"kernel": x[:, :, None] * error[:, None, :], "bias": error}
    return 0.5 * np.sum(error**2, 1), grads


@pytest.mark.parametrize("size", [None, 1, 4])
def test_losses_and_gradients_are_those_by_hand(size):
    """Losses, mean and norms are those of the equations, whatever the microbatch, in order."""
    params, x, y = problem()
    step = clipped_value_and_grad(loss, max_norm=2.0, batch_argnums=(1, 2), microbatch_size=size)

    losses, grads, examples = jax.jit(step)(params, x, y)

    expected, each = by_hand(params, x, y)
    mean, norms = oracle(each, 2.0)
    np.testing.assert_allclose(losses, expected, MODEL["rtol"])
    np.testing.assert_allclose(examples.norms, norms, MODEL["rtol"])
    assert_close(grads, mean, rtol=0, atol=MODEL["rtol"] * 2.0)  # the limit
    np.testing.assert_allclose(examples.clipped, np.mean(norms > 2), FLOAT32)


CLIPPED_GRAD = golden("jax_privacy_clipped_grad")


@pytest.mark.parametrize("case", sorted(CLIPPED_GRAD.keys() - {"inputs"}))
def test_gradients_are_those_of_jax_privacy(case):
    """What both do is the same: clipped sums over B, microbatches, a NaN and padding."""
    row = CLIPPED_GRAD[case]
    given = CLIPPED_GRAD["inputs"]
    kernel, bias, x, y = (jnp.array(given[name]) for name in ("kernel", "bias", "x", "y"))
    step = clipped_value_and_grad(
        loss,
        max_norm=row["limit"],
        batch_argnums=(1, 2),
        microbatch_size=row["microbatch_size"],
    )
    losses, grads, examples = jax.jit(step)(
        {"kernel": kernel, "bias": bias}, x, y, padding=jnp.array(given["padding"])
    )

    # Both are in float32, with some 30 roundings of 6e-8 in norms of 15 terms, sums of 10 and the
    # factor; and what is subtracted in x kernel + bias - y may be three times what is left.
    close = 100 * 6e-8
    largest = min(row["limit"], np.nanmax(row["norms"][:10]))
    for name, expected in row["grads"].items():
        np.testing.assert_allclose(grads[name], expected, rtol=close, atol=close * largest / 10)
    np.testing.assert_allclose(losses, row["values"], close)
    # It measures padding too.
    np.testing.assert_allclose(examples.norms[:10], row["norms"][:10], close)
    assert np.isnan(examples.norms[10:]).all()
    assert examples.nonfinite == 1


# ------------------------------------------------------------------------- guarantees


def test_no_example_moves_the_mean_by_more_than_its_share():
    """Whatever one example is, the mean moves by no more than 2 C / B."""
    grads = ragged()
    first, _ = per_example_clip(grads, max_norm=1.0)
    for value in (1e30, -1e30, 1e-30, 0.0, NAN, INF):
        other = jax.tree.map(lambda g, value=value: g.at[3].set(value), grads)
        second, _ = per_example_clip(other, max_norm=1.0)
        moved = optax.tree.norm(jax.tree.map(jnp.subtract, first, second))
        assert moved <= 2 / 8 * (1 + FLOAT32)


def test_norms_are_right_where_squares_are_not():
    """Norms of 1e-25, 1 and 1e25 in one batch are each measured right, and clipped."""
    grads = jnp.array([[3e-25, 4e-25], [0.6, 0.8], [3e25, 4e25]])

    mean, examples = per_example_clip(grads, max_norm=0.5)

    np.testing.assert_allclose(examples.norms, [5e-25, 1, 5e25], FLOAT32)
    np.testing.assert_allclose(mean, np.array([0.3 + 0.3, 0.4 + 0.4]) / 3, FLOAT32)


def test_the_sum_does_not_overflow():
    """The mean of large gradients that are not clipped is finite, in float16 and float32."""
    for dtype, value in ((jnp.float32, 3e38), (jnp.float16, 6e4), (jnp.bfloat16, 3e38)):
        grads = jnp.full((8, 1), value, dtype)
        mean, _ = per_example_clip(grads, max_norm=INF)
        np.testing.assert_allclose(mean.astype(jnp.float32), grads[0].astype(jnp.float32), FLOAT32)


def test_low_precision_is_summed_in_float32():
    """The mean of 1024 bfloat16 ones is 1, in one sum and in 1024, which would stop at 1/2."""
    whole, _ = per_example_clip(jnp.ones((1024, 2), jnp.bfloat16), max_norm=10.0)
    step = clipped_value_and_grad(lambda w, x: jnp.sum(w) * x, max_norm=10.0, microbatch_size=1)
    _, one_by_one, _ = jax.jit(step)(jnp.zeros(2, jnp.bfloat16), jnp.ones(1024, jnp.bfloat16))

    assert_same_bits(whole, jnp.ones(2, jnp.bfloat16))
    assert_same_bits(one_by_one, whole)


def test_float64_stays():
    """With float64 leaves, norms and mean are float64, to its precision."""
    with jax.enable_x64(True):
        grads = jnp.asarray(np.random.default_rng(0).normal(size=(3, 5)))
        mean, examples = per_example_clip(grads, max_norm=1.0)
        expected, norms = oracle(grads, 1.0)

        assert mean.dtype == examples.norms.dtype == jnp.float64
        np.testing.assert_allclose(mean, expected, 1e-14)
        np.testing.assert_allclose(examples.norms, norms, 1e-14)


def test_other_leaves_pass_through():
    """None, integer and bool leaves stay; complex ones count by their modulus."""
    grads = {"n": None, "i": jnp.arange(3), "b": jnp.array([True]), "c": jnp.array([[3 + 4j]])}

    mean, examples = per_example_clip(grads, max_norm=1.0)

    np.testing.assert_allclose(mean.pop("c"), [0.6 + 0.8j], FLOAT32)
    assert examples.norms == 5
    assert_same_bits(mean, {"n": None, "i": grads["i"], "b": grads["b"]})


def test_any_axis_may_be_that_of_examples():
    """axis=-1 gives what axis=0 does of the moved axis."""
    grads = normal(5, 3, 4)
    moved = jnp.moveaxis(grads, 0, -1)

    assert_same_bits(
        per_example_clip(moved, max_norm=1.0, axis=-1), per_example_clip(grads, max_norm=1.0)
    )


@pytest.mark.parametrize("junk", [0.0, 7.0, NAN])
def test_padding_counts_nowhere(junk):
    """A padded batch gives the mean, share and count of the batch without padding."""
    grads = ragged(6)
    grads["bias"] = grads["bias"].at[0, 0].set(NAN)
    padded = jax.tree.map(lambda g: jnp.concatenate([g, jnp.full_like(g[:2], junk)]), grads)

    mean, examples = per_example_clip(padded, max_norm=1.0, padding=jnp.arange(8) >= 6)

    expected, others = per_example_clip(grads, max_norm=1.0)
    assert_close(mean, expected, rtol=FLOAT32, atol=FLOAT32 / 6)  # of 1 / B
    np.testing.assert_array_equal(examples.norms[:6], others.norms)
    assert np.isnan(examples.norms[6:]).all()
    np.testing.assert_allclose(examples[1:], others[1:], FLOAT32)


def test_nothing_but_padding_gives_zeros():
    """A batch of padding alone is a mean of zero."""
    mean, examples = per_example_clip(
        jnp.ones((2, 3)), max_norm=1.0, padding=jnp.array([True, True])
    )

    assert_same_bits(mean, jnp.zeros(3))
    assert (examples.clipped, examples.nonfinite) == (0, 0)


@pytest.mark.parametrize("size", [None, 2])
def test_no_examples_give_zeros(size):
    """An empty batch is a mean of zero, as one of padding alone, with no norms."""
    mean, examples = per_example_clip({"a": jnp.ones((0, 3))}, max_norm=1.0)
    step = clipped_value_and_grad(jnp.vdot, max_norm=1.0, microbatch_size=size)
    losses, grads, others = step(jnp.ones(3), jnp.ones((0, 3)))

    assert losses.shape == (0,)
    for found, said in ((mean["a"], examples), (grads, others)):
        assert_same_bits(found, jnp.zeros(3))
        assert_same_bits(said.norms, jnp.zeros(0))
        assert (said.clipped, said.nonfinite) == (0, 0)


@pytest.mark.parametrize("tree", [{}, {"a": None, "i": jnp.arange(3)}])
def test_no_gradients_are_accepted(tree):
    """A tree without floats comes back, and has no norms."""
    mean, examples = per_example_clip(tree, max_norm=1.0)

    assert_same_bits(mean, tree)
    assert examples.norms.shape == (0,)
    assert (examples.clipped, examples.nonfinite) == (0, 0)


def test_groups_of_an_example_are_bad_by_themselves():
    """With a norm per leaf, a bad leaf of an example is zero there, and the others stay."""
    grads = {"a": jnp.array([[NAN], [2.0]]), "b": jnp.array([[3.0], [0.5]])}

    mean, examples = per_example_clip(grads, max_norm=1.0, measure=measure.leaf_norm())

    assert_close(mean, {"a": jnp.array([0.5]), "b": jnp.array([0.75])}, FLOAT32)
    assert examples.nonfinite == 1
    assert examples.clipped == 2 / 4
    assert examples.norms.shape == (2, 2)


@pytest.mark.parametrize("bad", [-1.0, NAN, -INF])
def test_a_bad_traced_limit_flips_no_sign(bad):
    """A traced limit that is negative or NaN gives zeros, and all count as clipped."""
    clip = lambda limit: per_example_clip(jnp.ones((2, 3)), max_norm=limit)
    for limit in (lambda c: c, lambda c: jnp.maximum(c, 0)):  # from which XLA reasons that it is 0
        mean, examples = jax.jit(lambda c, limit=limit: clip(limit(c)))(bad)
        assert_same_bits(mean, jnp.zeros(3))
        assert examples.clipped == 1


def test_the_rule_may_be_traced():
    """A scale of a traced hyperparameter works in microbatches, under jit and grad."""
    params, x, y = problem()

    def first(gamma):
        step = clipped_value_and_grad(
            loss,
            max_norm=1.0,
            rule=scale.automatic(gamma),
            batch_argnums=(1, 2),
            microbatch_size=4,
        )
        return step(params, x, y)[1]["bias"][0]

    value, slope = jax.jit(jax.value_and_grad(first))(jnp.float32(0.5))
    step, first = 1e-2, jax.jit(first)
    around = (first(0.5 + step) - first(0.5 - step)) / (2 * step)
    np.testing.assert_allclose(value, first(0.5), MODEL["rtol"])
    np.testing.assert_allclose(slope, around, 1e-2)  # of which 1e-2 squared is the step's part


# ----------------------------------------------------------------- value and gradient


def test_conventions_of_value_and_grad():
    """has_aux, a tuple of argnums and unbatched arguments are as jax.value_and_grad has them."""
    params, x, y = problem()

    def with_aux(x, kernel, bias, y, factor):
        one = factor * loss({"kernel": kernel, "bias": bias}, x, y)
        return one, {"twice": 2 * one, "x": x}

    step = clipped_value_and_grad(
        with_aux,
        max_norm=INF,
        argnums=(1, 2),
        batch_argnums=(0, 3),
        has_aux=True,
        microbatch_size=6,
    )
    (losses, aux), grads, _ = jax.jit(step)(x, params["kernel"], params["bias"], y, 2.0)

    mean = lambda p: 2 * jnp.mean(jax.vmap(loss, (None, 0, 0))(p, x, y))
    expected = jax.grad(mean)(params)
    # One label is 100 times as large, so that two digits of what the others add are lost.
    assert_close(grads, (expected["kernel"], expected["bias"]), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(aux["twice"], 2 * losses)
    np.testing.assert_array_equal(aux["x"], x)


def test_keywords_go_to_the_loss():
    """Other keyword arguments reach the function as they are, the same for all examples."""
    params, x, y = problem()
    scaled = lambda p, x, y, *, factor: factor[0] * loss(p, x, y)
    step = clipped_value_and_grad(scaled, max_norm=2.0, batch_argnums=(1, 2), microbatch_size=4)
    plain = clipped_value_and_grad(
        lambda p, x, y: 3 * loss(p, x, y), max_norm=2.0, batch_argnums=(1, 2), microbatch_size=4
    )

    found = jax.jit(step)(params, x, y, factor=jnp.array([3.0, 5.0]))

    assert_close(found, jax.jit(plain)(params, x, y), FLOAT32, atol=FLOAT32)


def test_batches_may_be_trees_of_anything():
    """Tokens, random keys and NumPy arrays are examples as well as floats are."""
    keys = jax.random.split(jax.random.key(0), 6)
    batch = {"tokens": np.arange(6) % 4, "key": keys}

    def noisy(table, example):
        noise = jax.random.normal(example["key"], (3,))
        return jnp.sum(table[example["tokens"]] * noise)

    step = lambda size: clipped_value_and_grad(noisy, max_norm=1.0, microbatch_size=size)
    runs = [jax.jit(step(size))(jnp.ones((4, 3)), batch) for size in (None, 2)]
    assert_close(*runs, rtol=FLOAT32, atol=FLOAT32 / 6)  # of 1 / B


def test_gradients_keep_dtypes():
    """bfloat16 parameters have bfloat16 gradients, summed in float32 over microbatches."""
    params, x, y = problem()
    low = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)
    wide = lambda p, x, y: loss(jax.tree.map(lambda a: a.astype(jnp.float32), p), x, y)
    step = clipped_value_and_grad(wide, max_norm=1.0, batch_argnums=(1, 2), microbatch_size=2)

    _, grads, examples = jax.jit(step)(low, x, y)

    assert jax.tree.map(jnp.result_type, grads) == jax.tree.map(jnp.result_type, low)
    assert examples.norms.dtype == jnp.float32


def test_a_bad_loss_is_counted_and_shown():
    """A NaN in one example leaves the others' gradients, and its own loss as it is."""
    params, x, y = problem(bad=[2])
    step = clipped_value_and_grad(loss, max_norm=1.0, batch_argnums=(1, 2), microbatch_size=4)

    losses, grads, examples = jax.jit(step)(params, x, y)

    _, each = by_hand(params, np.delete(x, 2, 0), np.delete(y, 2, 0))
    mean, _ = oracle(each, 1.0)
    assert_close(grads, jax.tree.map(lambda m: m * 11 / 12, mean), rtol=0, atol=MODEL["atol"])
    assert np.flatnonzero(np.isnan(losses)) == [2]
    assert examples.nonfinite == 1


def test_training_with_wrong_labels():
    """With a tenth of the labels wrong by 1000, the clip finds the line and the mean does not."""
    x = normal(40, 1)
    y = (2 * x[:, 0]).at[::10].add(1000)
    square = lambda w, x, y: 0.5 * (w @ x - y) ** 2
    step = clipped_value_and_grad(square, max_norm=0.1, batch_argnums=(1, 2))

    def descend(w, _):
        return w - 0.3 * step(w, x, y)[1], None

    w, _ = jax.lax.scan(descend, jnp.zeros(1), None, 300)
    plain = jnp.sum(x[:, 0] * y) / jnp.sum(x**2)
    assert abs(w[0] - 2) < 0.2
    assert abs(plain - 2) > 5


def temporary_bytes(count, size, width=256):
    """What XLA allocates for the gradients of a batch."""
    deep = lambda w, x: jnp.sum(jnp.tanh(jnp.tanh(x @ w[0]) @ w[1]) ** 2)
    step = clipped_value_and_grad(deep, max_norm=1.0, microbatch_size=size)
    weights = [jax.ShapeDtypeStruct((width, width), jnp.float32)] * 2
    x = jax.ShapeDtypeStruct((count, width), jnp.float32)
    return jax.jit(step).lower(weights, x).compile().memory_analysis().temp_size_in_bytes


def test_memory_is_that_of_a_microbatch():
    """At microbatches of 4, 16 times the examples take no more memory; all at once take it all.

    That is three times the gradients of a microbatch: XLA:CPU keeps them as they come, clipped, and
    times a power of two, for the second look at their norms.
    """
    small, large, whole = (temporary_bytes(*case) for case in ((16, 4), (256, 4), (256, None)))

    gradients = 4 * 2 * 256 * 256 * 4  # bytes, of a microbatch
    assert large - small < 240 * 4 * 4  # of an example, no more than four numbers stay
    assert small < 3.1 * gradients
    assert whole > 64 * large * 0.9


# ------------------------------------------------------------------- transformations


def test_one_program_for_all_limits():
    """A limit that is traced compiles once, and its state is one strong float32."""
    params, x, y = problem()
    traces = []

    @jax.jit
    def step(limit, params):
        traces.append(limit)
        value = clipped_value_and_grad(loss, max_norm=limit, batch_argnums=(1, 2))
        _, grads, examples = value(params, x, y)
        return update_max_norm(limit, examples.norms), grads

    limit = update_max_norm(1.0, jnp.ones(1))
    for _ in range(3):
        limit, _ = step(limit, params)
    assert len(traces) == 1
    assert (limit.dtype, limit.weak_type, limit.shape) == (jnp.float32, False, ())


def test_vmap_and_remat():
    """A vmap over models is a loop over them; remat and eager calls change nothing."""
    params, x, y = problem()
    many = jax.tree.map(lambda p: jnp.stack([p, 2 * p]), params)
    step = clipped_value_and_grad(loss, max_norm=1.0, batch_argnums=(1, 2), microbatch_size=3)

    found = jax.jit(jax.vmap(step, (0, None, None)))(many, x, y)
    again = jax.jit(jax.checkpoint(step))(params, x, y)

    eager = step(params, x, y)
    assert_close(jax.tree.map(lambda a: a[0], found), eager, **MODEL)
    assert_close(again, eager, **MODEL)


@pytest.mark.parametrize(
    ("kind", "inside", "size"),
    [
        (AxisType.Auto, False, 8),
        (AxisType.Explicit, True, 8),
        (AxisType.Explicit, True, None),
        (AxisType.Explicit, False, 8),
    ],
)
def test_on_meshes(kind, inside, size):
    """With examples and parameters split over devices, all is as on one device."""
    mesh = jax.make_mesh((4, 2), ("data", "model"), (kind, kind))
    params, x, y = problem(16)
    params = {"kernel": normal(4, 4), "bias": normal(4)}
    y = jnp.pad(y, ((0, 0), (0, 1)))
    step = clipped_value_and_grad(loss, max_norm=1.0, batch_argnums=(1, 2), microbatch_size=size)
    expected = jax.jit(step)(params, x, y)

    put = lambda tree, *spec: jax.device_put(tree, NamedSharding(mesh, P(*spec)))
    args = put(params, "model"), put(x, "data"), put(y, "data")
    with jax.set_mesh(mesh) if inside else contextlib.nullcontext():
        found = jax.jit(step)(*args)

    assert_close(found, expected, **MODEL)


@pytest.mark.parametrize(("tracked", "size"), [(True, 2), (True, None), (False, 2)])
def test_inside_shard_map(tracked, size):
    """Each device has the mean of its own examples, and pmean makes it that of all."""
    mesh = jax.make_mesh((4,), ("data",))
    params, x, y = problem(16)
    how = {"max_norm": 1.0, "batch_argnums": (1, 2)}
    losses, grads, examples = jax.jit(clipped_value_and_grad(loss, **how))(params, x, y)
    local = clipped_value_and_grad(
        loss, measure=measure.global_norm(axis_name=()), microbatch_size=size, **how
    )

    def body(params, x, y):
        losses, grads, examples = local(params, x, y)
        mean = jax.lax.pmean((grads, examples.clipped), "data")
        over = None if tracked else "data"
        limit = update_max_norm(1.0, examples.norms, axis_name=over)
        return losses, *mean, examples.norms, limit

    put = lambda tree, *spec: jax.device_put(tree, NamedSharding(mesh, P(*spec)))
    mapped = jax.shard_map(
        body,
        mesh=mesh,
        in_specs=(P(), P("data"), P("data")),
        out_specs=(P("data"), P(), P(), P("data"), P()),
        check_vma=tracked,
    )
    *found, limit = jax.jit(mapped)(put(params), put(x, "data"), put(y, "data"))

    assert_close(found, [losses, grads, examples.clipped, examples.norms], **MODEL)
    np.testing.assert_allclose(limit, update_max_norm(1.0, examples.norms), FLOAT32)


@pytest.mark.parametrize("mapped", ["shard_map", "pmap"])
def test_where_nothing_is_tracked_the_limit_must_be_told(mapped):
    """With `axis_name`, all devices have the limit of all norms; without, it is an error."""
    norms = jnp.array([0.1, 0.2, 0.3, 0.4, 5.0, 6.0, 7.0, 8.0]).reshape(4, 2)

    def limits(axis_name):
        inside = lambda n: update_max_norm(1.0, n, quantile=0.3, axis_name=axis_name).reshape(1)
        if mapped == "pmap":
            return jax.pmap(inside, axis_name="x")(norms)
        mesh = jax.make_mesh((4,), ("x",), (AxisType.Auto,))
        how = {"mesh": mesh, "in_specs": P("x"), "out_specs": P("x"), "check_vma": False}
        return jax.jit(jax.shard_map(inside, **how))(norms)

    expected = update_max_norm(1.0, norms, quantile=0.3)
    np.testing.assert_array_equal(limits("x").ravel(), jnp.full(4, expected))
    own = [update_max_norm(1.0, n, quantile=0.3) for n in norms]
    np.testing.assert_allclose(limits(()).ravel(), own, FLOAT32)
    with pytest.raises(ValueError, match="say it by axis_name="):
        limits(None)


@pytest.mark.parametrize("size", [1, 2, 6])
def test_a_microbatch_is_of_all_devices_of_an_explicit_mesh(size):
    """One that they do not share alike is an error that names it."""
    mesh = jax.make_mesh((4,), ("data",))
    x = jax.device_put(normal(12, 3), NamedSharding(mesh, P("data")))
    step = clipped_value_and_grad(jnp.vdot, max_norm=1.0, microbatch_size=size)

    message = (
        "microbatch_size must be a multiple of the devices of an Explicit mesh that examples are "
        f"split over, 4; got {size}"
    )
    assert_refused(lambda: step(jnp.ones(3), x), ValueError, message)


def test_inside_shard_map_the_measure_must_be_told():
    """Whether a leaf varies by examples or by shards, JAX cannot know, so it is an error."""
    mesh = jax.make_mesh((4,), ("data",))
    clip = lambda g: per_example_clip(g, max_norm=1.0)[0]
    mapped = jax.shard_map(clip, mesh=mesh, in_specs=P("data"), out_specs=P("data"))

    with pytest.raises(ValueError, match="say it by axis_name="):
        mapped(jax.device_put(jnp.ones((8, 3)), NamedSharding(mesh, P("data"))))


# ---------------------------------------------------------------------- adaptive limit


@pytest.mark.parametrize("quantile", [0.2, 0.5, 0.9])
@pytest.mark.parametrize("start", [1e-6, 1.0, 1e6])
def test_the_limit_finds_the_quantile(quantile, start):
    """From anywhere, the limit comes to the quantile of the norms and stays there."""
    norms = jnp.asarray(np.random.default_rng(0).lognormal(0, 0.5, 4000), jnp.float32)
    step = lambda limit, _: (update_max_norm(limit, norms, quantile=quantile), None)

    limit, _ = jax.lax.scan(step, jnp.float32(start), None, 1000)

    # It circles around it by 0.2 times the share of a few of the 4000 norms.
    np.testing.assert_allclose(limit, np.quantile(norms, quantile), 0.01)


@pytest.mark.parametrize("limit", [0.0, -1.0, NAN, INF, -INF, 1e-38, 3e38])
@pytest.mark.parametrize("norm", [0.0, 1.0, 3e38, NAN, INF])
def test_the_limit_stays_finite_and_positive(limit, norm):
    """Whatever a traced limit and the norms are, the next limit is a usable one."""
    for rate in (0.2, 3e38):
        found = update_max_norm(jnp.float32(limit), jnp.full(4, norm), rate=rate)
        assert 2.0**-100 <= found <= 2.0**64


def test_a_norm_at_the_limit_is_below():
    """What is not clipped counts as below, so that a constant norm is not left above."""
    assert update_max_norm(1.0, jnp.ones(3)) < 1


def test_norms_may_be_a_tree():
    """Those of a measure with several norms per example count alike, NumPy's and lists too."""
    parts = {"a": np.array([0.5, 4.0]), "b": [jnp.array([[2.0], [NAN]]), 8.0]}
    flat = jnp.array([0.5, 4.0, 2.0, NAN, 8.0])
    for limit in (1.0, 3.0, 5.0):
        # Of the same counts, in the same operations.
        assert_same_bits(update_max_norm(limit, parts), update_max_norm(limit, flat))
    assert_same_bits(update_max_norm(2.0, {}), jnp.float32(2))

    units = per_example_clip(ragged(), max_norm=1.0, measure=measure.unit_norm())[1].norms
    assert update_max_norm(1.0, units) == update_max_norm(
        1.0, jnp.concatenate([n.ravel() for n in jax.tree.leaves(units)])
    )


def test_hyperparameters_of_the_limit_may_be_bad():
    """A traced rate or quantile of NaN leaves the limit where it is."""
    for bad in ({"rate": jnp.float32(NAN)}, {"quantile": jnp.float32(NAN)}):
        assert update_max_norm(0.75, jnp.ones(3), **bad) == 0.75


# --------------------------------------------------------------------------- arguments


ONE = jnp.ones((4, 2))
LENGTHS = "the leaves of grads must have one length, that of the examples, along axis 0; got "
DIVIDES = (
    "microbatch_size must divide the number of examples, 4; got 3. Fill the batch up, and say by "
    "padding= which examples do"
)
NAMES = "a name, a tuple of names, a function (path, leaf) -> one of these, or None"
POSITIONS = "an int >= 0 or a tuple of different ones"
GIVEN = "argnums and batch_argnums must be arguments that are given by position; got {}, and so no "
ERRORS = [
    (lambda: per_example_clip({"a": ONE, "b": ONE[:3]}, max_norm=1.0), ValueError,
     LENGTHS + "{'a': 4, 'b': 3}"),
    (lambda: per_example_clip({"a": ONE, "b": jnp.ones(())}, max_norm=1.0), ValueError,
     LENGTHS + "{'a': 4, 'b': None}"),
    (lambda: per_example_clip(ONE, max_norm=1.0,
                              measure=measure.relative(measure.leaf_norm(), eps=1e-3)), ValueError,
     "a relative norm needs the parameters: call update(grads, state, params)"),
    (lambda: clipped_value_and_grad(jnp.vdot, max_norm=1.0)(ONE), TypeError,
     GIVEN.format(1) + "argument 1"),
    (lambda: clipped_value_and_grad(jnp.vdot, max_norm=1.0, argnums=2)(ONE, ONE), TypeError,
     GIVEN.format(2) + "argument 2"),
    (lambda: clipped_value_and_grad(loss, max_norm=1.0, argnums=(0, 0)), ValueError,
     f"argnums must be {POSITIONS}; got (0, 0)"),
    (lambda: clipped_value_and_grad(loss, max_norm=1.0, batch_argnums=(1, 1)), ValueError,
     f"batch_argnums must be {POSITIONS}; got (1, 1)"),
    (lambda: update_max_norm(1.0, ONE, axis_name=1), TypeError,
     f"axis_name must be {NAMES}; got 1"),
    (lambda: per_example_clip(ONE, max_norm=-1.0), ValueError,
     "max_norm must be a number from 0 to inf or a () array; got -1.0"),
    (lambda: per_example_clip(ONE, max_norm="1"), TypeError,
     "max_norm must be a number from 0 to inf or a () array; got '1'"),
    (lambda: per_example_clip(ONE, max_norm=1.0, measure=1), TypeError,
     "measure must be a Measure, such as measure.global_norm(); got 1"),
    (lambda: per_example_clip(ONE, max_norm=1.0, rule="skip"), TypeError,
     "rule must be a function, such as scale.rescale; got 'skip'"),
    (lambda: per_example_clip(ONE, max_norm=1.0, axis=True), TypeError,
     "axis must be an int; got True"),
    (lambda: per_example_clip(ONE, max_norm=1.0, padding=[True] * 4), TypeError,
     "padding must be None or a bool array of shape (4,); got [True, True, True, True]"),
    (lambda: per_example_clip(ONE, max_norm=1.0, padding=jnp.zeros(3, bool)), ValueError,
     "padding must be None or a bool array of shape (4,); got an array of shape (3,)"),
    (lambda: clipped_value_and_grad(loss, max_norm=1.0, argnums=-1), ValueError,
     f"argnums must be {POSITIONS}; got -1"),
    (lambda: clipped_value_and_grad(loss, max_norm=1.0, batch_argnums="x"), TypeError,
     f"batch_argnums must be {POSITIONS}; got 'x'"),
    (lambda: clipped_value_and_grad(loss, max_norm=1.0, batch_argnums=(0, 1)), ValueError,
     "batch_argnums must be others than argnums, 0; got (0, 1)"),
    (lambda: clipped_value_and_grad(loss, max_norm=1.0, has_aux=1), ValueError,
     "has_aux must be one of True, False; got 1"),
    (lambda: clipped_value_and_grad(loss, max_norm=1.0, microbatch_size=0), ValueError,
     "microbatch_size must be a whole number >= 1; got 0"),
    (lambda: clipped_value_and_grad(jnp.sum, max_norm=1.0, argnums=1, batch_argnums=0,
                                    microbatch_size=3)(ONE, ONE), ValueError,
     DIVIDES),
    (lambda: update_max_norm(0.0, ONE), ValueError,
     "max_norm must be a finite number >= 1.2e-38 or a () array; got 0.0"),
    (lambda: update_max_norm(1.0, ONE, quantile=2), ValueError,
     "quantile must be a number from 0 to 1 or a () array; got 2"),
    (lambda: update_max_norm(1.0, ONE, rate=0), ValueError,
     "rate must be a finite number >= 1.2e-38 or a () array; got 0"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "error", "message"), ERRORS)
def test_bad_arguments_are_named(call, error, message):
    """An error names the argument, its value and what is allowed."""
    assert_refused(call, error, message)
