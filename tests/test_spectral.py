"""Spectral clipping: singular values against NumPy's in float64, and golden numbers."""

import functools
import itertools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import trees
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from kinds import LIMIT, assert_refused, refused

import optaxclip as oc
from optaxclip.spectral import clip_by_spectral_norm, newton_schulz
from optaxclip.spectral.matrices import layout
from optaxclip.spectral.power_iteration import estimate

GOLDEN = pathlib.Path(__file__).parent / "golden"
EPS = float(jnp.finfo(jnp.float32).eps)
FULL = [("hard", "newton_schulz"), ("soft", "newton_schulz"), ("hard", "svd"), ("soft", "svd")]
EVERY = [*FULL, ("hard", "power_iteration")]


def ways(pairs, *proof):
    """Tests of each kind and method; of some, and "svd", the yardstick, in `make proof`."""
    marks = lambda p: pytest.mark.proof if {"svd", *proof} & set(p) else ()
    rows = [pytest.param(*p, id="-".join(p), marks=marks(p)) for p in pairs]
    return pytest.mark.parametrize(("kind", "method"), rows)


full, every, hard = ways(FULL), ways(EVERY), ways(EVERY, "soft")
exactly = pytest.mark.parametrize(
    "method", ["newton_schulz", pytest.param("svd", marks=pytest.mark.proof)]
)
SIGMA = [20.0, 5.0, 2.0, 1.05, 0.5, 0.1]


def golden(file):
    """The cases of one file."""
    return json.loads((GOLDEN / f"{file}.json").read_text())["cases"]


def matrix(sigma, m, n, seed=0):
    """A matrix of these singular values, in float64."""
    rng = np.random.default_rng([seed, m, n])
    u = np.linalg.qr(rng.normal(size=(m, len(sigma))))[0]
    v = np.linalg.qr(rng.normal(size=(n, len(sigma))))[0]
    return (u * np.array(sigma)) @ v.T


def limited(sigma, c, kind):
    """What the clip is to make of singular values."""
    sigma = np.asarray(sigma, np.float64)
    return np.minimum(sigma, c) if kind == "hard" else sigma / np.sqrt(1 + (sigma / c) ** 2)


def exact(x, c, kind):
    """The clip of a matrix by the singular value decomposition, in float64."""
    u, sigma, vt = np.linalg.svd(trees.float64(x), full_matrices=False)
    return (u * limited(sigma, c, kind)) @ vt


def sizes(x):
    """Singular values, in float64."""
    return np.linalg.svd(trees.float64(x), compute_uv=False)


@functools.cache
def step(kind, method, nonfinite="zero"):
    """A compiled update of limit and gradients from a fresh state."""

    def run(c, grads):
        tx = clip_by_spectral_norm(c, kind=kind, method=method, nonfinite=nonfinite)
        return tx.update(grads, tx.init(grads))

    # Compiling takes most of the time here, and a third of it is LLVM's.
    return jax.jit(run, compiler_options={"xla_backend_optimization_level": 0})


def clip(x, c, kind="hard", method="newton_schulz"):
    """One matrix after the clip."""
    return step(kind, method)(jnp.float32(c), jnp.asarray(x, jnp.float32))[0]


@exactly
def test_hard_cap_agrees_with_emerging_optimizers(method):
    """Singular values come out as there, and nearer to the exact ones than 1e-5."""
    for name, case in golden("spectral_hardcap_newton_schulz").items():
        shape, beta = name.split("_beta")
        c, (m, n) = float(beta), map(int, shape.split("x"))
        found = sizes(clip(matrix(case["sigma_in"], m, n), c, "hard", method))
        np.testing.assert_allclose(found, case["exact"], rtol=20 * EPS, atol=20 * EPS)
        np.testing.assert_allclose(found, case["hardcap_sigma_out"], rtol=1e-5)


@pytest.mark.parametrize("shape", [(128, 128), pytest.param((128, 512), marks=pytest.mark.proof)])
def test_normal_matrices_are_capped_nearer_than_by_the_reference(shape):
    """At the median of a square normal matrix, where theirs errs by 7e-3, the error is < 2e-5."""
    cases = golden("spectral_hardcap_accuracy")
    x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    for q in ("0.5", "0.9"):
        beta = np.quantile(sizes(x), float(q))
        y, right = trees.float64(clip(x, beta)), exact(x, beta, "hard")
        error = np.linalg.norm(y - right) / np.linalg.norm(right)
        assert error < max(2e-5, cases["{}x{}_q{}".format(*shape, q)]["rel_fro_err"] / 100)
        assert sizes(y)[0] <= beta * (1 + 1e-5)


def test_tiny_singular_values_are_not_inflated():
    """Beside 100, 0.001 stays 0.001 and 0 stays 0, where the reference makes 0.03 and 3e-6."""
    case = golden("spectral_hardcap_accuracy")["ill_conditioned"]
    assert case["sigma_out"][3] > 30 * case["sigma_in"][3]
    for method in ("newton_schulz", "svd"):
        found = sizes(clip(matrix(case["sigma_in"], 6, 6), 1, "hard", method))
        # Rounding of a matrix of norm 100.
        np.testing.assert_allclose(found, np.minimum(case["sigma_in"], 1), atol=100 * EPS)


def test_newton_schulz_does_not_overshoot():
    """No singular value exceeds c by 1e-4, where Jordan's coefficients make 5.11 of 20 at c = 1."""
    case = golden("spectral_caps_jax")["leloykun_hardcap_beta1"]
    assert max(case["with_jordan_ns5"]) > 5
    found = sizes(clip(matrix(case["sigma_in"], 6, 6), 1))
    np.testing.assert_allclose(found, case["exact"], rtol=1e-5)

    for top in (0.99999, 1.00001, 1.5, 1e2, 1e4, 1e6):
        x = matrix(np.geomspace(top, 1e-3, 48), 48, 48)
        assert sizes(clip(x, 1))[0] <= 1 + 1e-4
        assert sizes(clip(x, 1, "soft"))[0] <= 1 + 1e-5


def test_no_polynomial_leaves_its_range():
    """Singular values of 20 give neither NaN ("hard") nor 4.7e7 ("soft"), but what they should."""
    cases = golden("spectral_caps_jax")
    worst = cases[str(SIGMA)]
    assert worst["hard_cap"][0] == "nan"
    assert worst["soft_cap_a0_1"][0] > 1e7
    for name, case in cases.items():
        if "exact_min1" in case:
            x = matrix(case["sigma_in"], 6, 6)
            np.testing.assert_allclose(sizes(clip(x, 1)), case["exact_min1"], rtol=1e-5)
            np.testing.assert_allclose(sizes(clip(x, 1)), case["pure_svd"], rtol=1e-5)
            soft = limited(case["sigma_in"], 1, "soft")
            np.testing.assert_allclose(sizes(clip(x, 1, "soft")), soft, rtol=1e-5, err_msg=name)


@exactly
def test_soft_clip_agrees_with_spectra(method):
    """Singular values are the exact ones, and those of SPECTRA as far as its steps converged."""
    cases = golden("spectra_soft_clip")
    for name, case in cases.items():
        if "_ns20_f32" not in name:
            continue
        shape, c = name.split("_")[:2]
        m, n = map(int, shape.split("x"))
        found = sizes(clip(matrix(case["sigma_in"], m, n), float(c[1:]), "soft", method))
        np.testing.assert_allclose(found, case["exact"], rtol=20 * EPS, atol=20 * EPS)
        np.testing.assert_allclose(found, case["sigma_out"], rtol=1e-5)
    case = cases["6x6_c1.0_ns10_f32"]  # which is given whole
    found = clip(case["X"], 1, "soft", method)
    np.testing.assert_allclose(found, case["out"], atol=1e-4)
    assert not np.asarray(clip(np.zeros((4, 4)), 1, "soft", method)).any()


def test_soft_clip_is_converged():
    """0.5 becomes 0.447 at c = 1, where five steps of the reference make 0.181."""
    case = golden("spectra_soft_clip")["6x6_c1.0_ns5_f32"]
    assert case["sigma_out"][4] < 0.41 * case["exact"][4]
    found = sizes(clip(matrix(case["sigma_in"], 6, 6), 1, "soft"))
    np.testing.assert_allclose(found, case["exact"], rtol=20 * EPS, atol=20 * EPS)


@hard
def test_bfloat16_is_computed_in_float32(kind, method):
    """bfloat16 errs by its own rounding of the result alone, 0.4 %, not by 1 to 6 %."""
    case = golden("spectra_soft_clip")["6x6_c1.0_ns10_bf16"]
    assert abs(case["sigma_out"][5] / case["exact"][5] - 1) > 0.05
    x = jnp.asarray(matrix(case["sigma_in"], 6, 6), jnp.bfloat16)
    low, _ = step(kind, method)(jnp.float32(1), x)
    wide, _ = step(kind, method)(jnp.float32(1), x.astype(jnp.float32))
    assert low.dtype == jnp.bfloat16
    trees.assert_same_bits(low, wide.astype(jnp.bfloat16))


@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_vectors_are_clipped_without_a_jump(kind):
    """A vector is a matrix of one column, on both sides of c, where SPECTRA falls to 0.707."""
    case = golden("spectra_soft_clip")["vector_discontinuity"]
    assert case["norm just above c"] < 0.71 < case["norm<=c"]
    run = step(kind, "newton_schulz")
    for norm in (0.0, 0.5, 1 - 1e-6, 1.0, 1 + 1e-6, 5.0):
        v = np.float32([0.6, 0.8]) * np.float32(norm)
        size = np.linalg.norm(v.astype(np.float64))
        leaves = [jnp.asarray(v.reshape(shape)) for shape in ((2,), (2, 1), (1, 2))]
        for y in map(trees.float64, run(jnp.float32(1), leaves)[0]):
            np.testing.assert_allclose(np.linalg.norm(y), limited(size, 1, kind), rtol=4 * EPS)


SHAPES = [(48, 48), (96, 24)]


@full
def test_every_condition_and_shape_is_near_the_exact_clip(kind, method):
    """At c = sigma_max / 3, results err by less than 2e-5 c, whatever the condition."""
    for condition, (m, n) in itertools.product((1e0, 1e2, 1e4, 1e6), SHAPES):
        x = matrix(3 * np.geomspace(1, 1 / condition, min(m, n)), m, n).astype(np.float32)
        y = trees.float64(clip(x, 1, kind, method))
        assert np.linalg.norm(y - exact(x, 1, kind), 2) < 2e-5
        assert sizes(y)[0] <= limited(sizes(x)[0], 1, kind) * (1 + 1e-5)


@full
def test_spikes_are_bounded(kind, method):
    """A matrix 1e2 to 1e8 times above c comes out at c, to 1e-4."""
    for ratio in (1e2, 1e4, 1e8):
        x = matrix(ratio * np.geomspace(1, 1e-9, 48), 48, 48)
        assert sizes(clip(x, 1, kind, method))[0] <= 1 + 1e-4


@pytest.mark.parametrize("method", ["newton_schulz", "svd", "power_iteration"])
def test_what_is_within_has_its_bits(method):
    """Matrices with sigma_max <= c come back bit for bit, though ||X||_F is above c."""
    for seed in range(3):
        x = jnp.asarray(0.99 * matrix(np.linspace(1, 0.5, 6), 6, 10, seed), jnp.float32)
        c = 1 if method != "power_iteration" else 1.1  # which overestimates a little
        trees.assert_same_bits(clip(x, c, "hard", method), x)


@hard
def test_any_scale_is_as_good_as_1(kind, method):
    """2^k X at limit 2^k c gives 2^k times the same, bit for bit, from 2^-90 to 2^100."""
    x = jnp.asarray(matrix(SIGMA, 6, 6), jnp.float32)
    run = step(kind, method)
    expected = run(jnp.float32(1), x)[0]
    for k in (-90, -20, 30, 100):
        power = jnp.float32(2.0**k)
        trees.assert_same_bits(run(power, x * power)[0], expected * power)
    half = (x * 2.0**-10).astype(jnp.float16)  # squares of its entries are no float16
    found, _ = run(jnp.float32(2.0**-10), half)
    np.testing.assert_allclose(trees.float64(found) * 2**10, expected, atol=2e-3)


@every
def test_zeros_and_limits_of_0_and_inf(kind, method):
    """Zeros stay zeros, c = 0 gives zeros, c = inf the same bits; a bad limit flips no sign."""
    x, run = jnp.asarray(matrix(SIGMA, 6, 6), jnp.float32), step(kind, method)
    assert not np.asarray(run(jnp.float32(1), 0 * x)[0]).any()
    trees.assert_same_bits(run(jnp.float32(np.inf), x)[0], x)
    for c in (0, -1, np.nan):
        assert not np.asarray(run(jnp.float32(c), x)[0]).any()


@ways(EVERY, "soft", "newton_schulz")
def test_bad_entries(kind, method):
    """The policy decides for the matrix of a stack that has a bad entry, and for no other."""
    good = jnp.asarray([matrix(SIGMA, 6, 6, seed) for seed in range(3)], jnp.float32)
    bad = good.at[1, 2, 3].set(jnp.nan).at[2, 0, 0].set(jnp.inf)
    one = jnp.float32(1)
    plain = functools.partial(step(kind, method, "zero"), one)
    expected = plain(good)[0]
    for policy in ("zero", "propagate", "sanitize"):
        updates, state = step(kind, method, policy)(one, bad)
        trees.assert_same_bits(updates[0], expected[0])
        if policy == "sanitize":
            clean = jnp.where(jnp.isfinite(bad), bad, 0)
            trees.assert_same_bits(updates, plain(clean)[0])
        else:
            assert (updates[1:] == 0).all() if policy == "zero" else jnp.isnan(updates[1:]).all()
        assert int(state.metrics.nonfinite_steps) == 1
        assert oc.validate_state(state) == []


@full
def test_derivatives_are_those_of_finite_differences(kind, method):
    """Forward and reverse derivatives by matrix and limit agree with differences in float64."""
    x, dx, w = (matrix(SIGMA, 6, 9, seed) for seed in range(3))
    h = 1e-5
    total = lambda t: np.sum(exact(x + 0.1 * t * dx, 1.2 + 0.1 * t, kind) * w)
    differences = (total(h) - total(-h)) / (2 * h)
    x, dx, w = (jnp.asarray(a, jnp.float32) for a in (x, dx, w))

    def total32(t):
        tx = clip_by_spectral_norm(1.2 + 0.1 * t, kind=kind, method=method, record=False)
        return jnp.sum(tx.update(x + 0.1 * t * dx, tx.init(x))[0] * w)

    both = jax.jit(lambda t: (jax.jvp(total32, (t,), (t + 1,))[1], jax.grad(total32)(t)))
    np.testing.assert_allclose(both(jnp.float32(0)), [differences] * 2, rtol=2e-4)


@hard
def test_derivatives_are_finite_where_formulas_are_0_by_0(kind, method):
    """At zeros, equal singular values, singular values of c and of 0, derivatives are finite."""
    tx = clip_by_spectral_norm(1.0, kind=kind, method=method, record=False)
    run = jax.jit(jax.grad(lambda x: jnp.sum(tx.update(x, tx.init(x))[0])))
    for x in (np.zeros((6, 6)), np.eye(6), 2 * np.eye(6), np.diag([2.0, 1, 1, 0.5, 0, 0])):
        assert np.isfinite(run(jnp.asarray(x, jnp.float32))).all()


def test_leaves_are_matrices_stacks_and_kernels():
    """Rank 2 is a matrix, rank 3 a stack, rank 4 a kernel of (height x width x in, out)."""
    tree = {k: v for k, v in trees.floats().items() if k != "bias"}
    updates, _ = step("hard", "svd")(jnp.float32(1), tree)
    for name, x in tree.items():
        parts = x if x.ndim == 3 else x.reshape(1, -1, x.shape[-1])
        found = updates[name].reshape(parts.shape)
        for part, y in zip(parts, found, strict=True):
            np.testing.assert_allclose(y, exact(part, 1, "hard"), atol=1e-5)


def test_axes_say_what_a_matrix_is():
    """A pair, Muon's dimension numbers and a function of the path mean these axes."""
    x = trees.normal(4, 5, 3)
    by_hand = lambda y: y.transpose(1, 0, 2)
    tx = clip_by_spectral_norm(1.0, method="svd", axes=(0, 2))
    updates, _ = tx.update({"w": x}, tx.init({"w": x}))
    for part, y in zip(by_hand(x), by_hand(updates["w"]), strict=True):
        np.testing.assert_allclose(y, exact(part, 1, "hard"), atol=1e-5)
    numbers = optax.contrib.MuonDimensionNumbers
    rules = [(0, 2), ((0,), -1), numbers(0, 2), lambda path, leaf: (0, 2) if path == "w" else None]
    assert {layout(rule, None, "w", x) for rule in rules} == {((1,), (0,), (2,), (4, 5, 3))}
    assert layout(rules[-1], None, "v", x) == layout(None, None, "v", x)
    tx = clip_by_spectral_norm(1.0, method="svd", axes=((0, 1), 2))
    y = tx.update(x, tx.init(x))[0]
    np.testing.assert_allclose(y.reshape(20, 3), exact(x.reshape(20, 3), 1, "hard"), atol=1e-5)


def test_every_kind_of_leaf_is_accepted():
    """Complex matrices are clipped, integers, bools and None pass, dtypes and shapes stay."""
    tree = trees.mixed() | {"turned": trees.normal(3, 4).astype(jnp.complex64) * (1 + 2j)}
    tx = clip_by_spectral_norm(1.0, method="power_iteration")
    updates, _ = tx.update(tree, tx.init(tree))
    assert jax.tree.structure(updates) == jax.tree.structure(tree)
    for name in ("integer", "bool", "no_entries"):
        trees.assert_same_bits(updates[name], tree[name])
    shapes = lambda t: [(jnp.shape(x), jnp.result_type(x)) for x in jax.tree.leaves(t)]
    assert shapes({**updates, "float0": 0}) == shapes({**tree, "float0": 0})
    assert 0.9 < sizes(updates["turned"])[0] <= 1 + 1e-5
    right = exact(tree["turned"], 1, "hard")
    found, _ = step("hard", "svd")(jnp.float32(1), tree["turned"])
    np.testing.assert_allclose(found, right, atol=1e-5)


@pytest.mark.parametrize("method", ["newton_schulz", "power_iteration"])
def test_leaves_of_one_shape_are_clipped_as_if_alone(method):
    """Each has its own norm, bits, policy and vector, whatever stands beside it."""
    names = ("large", "small", "bad", "turned", "large again")
    tops = (5.0, 0.3, 2.0, 3.0, 7.0)
    tree = {
        name: jnp.asarray(matrix(np.linspace(top, top / 9, 6), 6, 10, seed), jnp.float32)
        for seed, (name, top) in enumerate(zip(names, tops, strict=True))
    }
    tree["bad"] = tree["bad"].at[0, 0].set(jnp.nan)
    tree["turned"] = tree["turned"].T
    tx = clip_by_spectral_norm(1.0, method=method)
    run, state = jax.jit(tx.update), tx.init(tree)
    updates, state = run(tree, state)
    updates, state = run(tree, state)
    units = state.memory.vectors.unit if state.memory else [None] * 5
    for (name, x), unit in zip(sorted(tree.items()), units, strict=True):
        alone = tx.init(x if name != "turned" else x.T)
        for _ in range(2):
            y, alone = run(x if name != "turned" else x.T, alone)
        y = y if name != "turned" else y.T
        np.testing.assert_allclose(updates[name], y, rtol=0, atol=50 * EPS)
        if unit is not None:
            np.testing.assert_allclose(unit, alone.memory.vectors.unit[0], atol=50 * EPS)
    trees.assert_same_bits(updates["small"], tree["small"])
    assert not np.asarray(updates["bad"]).any()
    assert float(oc.metrics(state)["clipped"]) == np.float32(0.6)
    np.testing.assert_allclose(oc.metrics(state)["clipped_norm"], 1, rtol=1e-6)


def test_metrics_say_what_it_did():
    """The norm is sigma_max before, the clipped norm what f makes of it; steps count."""
    x = jnp.asarray(matrix(SIGMA, 6, 6), jnp.float32)
    for kind, method in EVERY:
        grads = {"w": x, "b": jnp.float32([0.3, 0.4])} if method == "svd" else x
        _, state = step(kind, method)(jnp.float32(1), grads)
        read = oc.metrics(state)
        np.testing.assert_allclose(read["norm"], 20, rtol=1e-4)
        np.testing.assert_allclose(read["clipped_norm"], limited(20, 1, kind), rtol=1e-4)
        np.testing.assert_allclose(read["factor"], limited(20, 1, kind) / 20, rtol=1e-4)
        assert float(read["clipped"]) == (0.5 if (kind, method) == ("hard", "svd") else 1)
        assert int(read["steps"]) == int(read["clipped_steps"]) == 1
    assert clip_by_spectral_norm(1.0, record=False).init(x).metrics is None


@functools.cache
def warmed():
    """Updates by power iteration of a stream, from whatever vectors the state has."""
    tx = clip_by_spectral_norm(1.0, method="power_iteration")
    return tx, jax.jit(lambda xs, s: jax.lax.scan(lambda s, x: tx.update(x, s)[::-1], s, xs))


def test_power_iteration_keeps_the_bound_on_streams():
    """Norms stay below 1.05 c for noise, whose spectrum is flat, and are never far below."""
    tx, run = warmed()
    rng = np.random.default_rng(0)
    noise = rng.normal(size=(100, 64, 96)).astype(np.float32)
    drift = [noise[0]]
    for new in noise[1:]:
        drift.append(np.float32(0.9) * drift[-1] + np.float32(0.436) * new)
    for stream in (noise, np.stack(drift)):
        state, updates = run(jnp.asarray(stream), tx.init(jnp.asarray(stream[0])))
        tops = np.array([sizes(u)[0] for u in updates])
        assert tops.max() <= 1.05
        assert tops.min() >= 0.9
        assert oc.validate_state(state) == []


def test_power_iteration_finds_a_spike_in_a_new_direction():
    """A spike that is orthogonal to all that the vector knows is clipped to c in its first step."""
    tx, run = warmed()
    calm = np.zeros((64, 96), np.float32)
    calm[0, 0] = 0.5
    spike = calm.copy()
    spike[1:, 1:] = 1e3 * matrix([1.0], 63, 95)
    stream = jnp.asarray(np.stack([calm] * 20 + [spike] + [calm] * 79))
    _, updates = run(stream, tx.init(stream[0]))
    trees.assert_same_bits(updates[:20], stream[:20])
    np.testing.assert_allclose(sizes(updates[20])[0], 1, rtol=1e-5)
    trees.assert_same_bits(updates[21:], stream[21:])


def test_bad_and_zero_steps_leave_the_vector():
    """Power iteration begins where it was after a step that had nothing to teach."""
    x = jnp.asarray(matrix(SIGMA, 6, 6), jnp.float32)
    tx = clip_by_spectral_norm(1.0, method="power_iteration", record=False)
    run = jax.jit(tx.update)
    _, after = run(x, tx.init(x))
    for nothing in (x.at[0, 0].set(jnp.nan), 0 * x):
        trees.assert_same_bits(run(nothing, after)[1], after)


def test_power_iteration_never_estimates_above_the_largest():
    """The lower estimate of noise is below sigma_max, and warm vectors bring it nearer."""
    run = jax.jit(lambda x, v: estimate(x, v, 4))
    x = trees.normal(64, 96)
    vector, lows = jnp.zeros(64), []
    for _ in range(6):
        found = run(x, vector)
        vector = found.vector
        lows.append(found.low.item() / sizes(x)[0])
        assert found.low <= found.high
    assert max(lows) <= 1 + 1e-6
    assert lows[-1] > lows[0]


def test_polar_factor_never_leaves_the_unit_ball():
    """Singular values in [0, 1] stay there at each l, and reach 1 from l on."""
    sigma = np.geomspace(1, 1e-6, 32)
    run = jax.jit(newton_schulz.polar)
    for least in (1.0, 0.1, 1e-3, 1e-6):
        y = run(
            jnp.asarray(matrix(sigma, 32, 32), jnp.float32), jnp.full((1, 1), least, jnp.float32)
        )
        found = sizes(y)
        assert found[0] <= 1 + 20 * EPS
        np.testing.assert_allclose(found[sigma >= 1.1 * least], 1, atol=20 * EPS)


def test_a_schedule_and_an_injected_limit():
    """The limit may be a schedule, whose clock is in the state, or a hyperparameter."""
    x = jnp.asarray(matrix(SIGMA, 6, 6), jnp.float32)
    for method in ("svd", "power_iteration"):
        tx = clip_by_spectral_norm(optax.linear_schedule(3.0, 1.0, 2), method=method)
        state = tx.init(x)
        for c in (3, 2, 1, 1):
            y, state = jax.jit(tx.update)(x, state)
            np.testing.assert_allclose(sizes(y)[0], c, rtol=1e-4)
        assert oc.validate_state(state, like=tx.init(x)) == []
    make = optax.inject_hyperparams(clip_by_spectral_norm, static_args=("axes", "axis_name"))
    tx = make(2.0, method="svd")
    y, _ = tx.update(x, tx.init(x))
    np.testing.assert_allclose(sizes(y)[0], 2, rtol=1e-5)


def test_before_and_after_muon():
    """In a chain it limits gradients that Muon takes, and the updates that Muon gives."""
    params = {"w": trees.normal(8, 12), "b": trees.normal(12)}
    grads = {
        "w": jnp.asarray(matrix(np.geomspace(50, 0.1, 8), 8, 12), jnp.float32),
        "b": params["b"],
    }
    before = optax.chain(clip_by_spectral_norm(1.0), optax.contrib.muon(0.1))
    after = optax.chain(optax.contrib.muon(0.1), clip_by_spectral_norm(0.05))
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        for tx in (before, after):
            updates, state = jax.jit(tx.update)(grads, tx.init(params), params)
            assert all(np.isfinite(u).all() for u in jax.tree.leaves(updates))
            assert int(oc.metrics(state)["clipped_steps"]) == 1
    assert sizes(updates["w"])[0] <= 0.05 * (1 + 1e-5)


@pytest.mark.parametrize(
    ("method", "axis_type"),
    [
        ("newton_schulz", AxisType.Explicit),
        ("power_iteration", AxisType.Auto),
        pytest.param("newton_schulz", AxisType.Auto, marks=pytest.mark.proof),
        pytest.param("power_iteration", AxisType.Explicit, marks=pytest.mark.proof),
    ],
)
def test_sharded_matrices(method, axis_type):
    """Eight devices give what one gives, in place, and compile one program for all steps."""
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(axis_type,) * 2)
    tree = {"w": trees.normal(8, 12), "other": trees.normal(8, 12), "stack": trees.normal(4, 6, 8)}
    specs = {
        "w": PartitionSpec("x", "y"),
        "other": PartitionSpec(None, "x"),
        "stack": PartitionSpec("x", None, "y"),
    }
    grads = {k: jax.device_put(v, NamedSharding(mesh, specs[k])) for k, v in tree.items()}
    tx = clip_by_spectral_norm(1.0, method=method)
    run, state, plain = jax.jit(tx.update), tx.init(grads), tx.init(tree)
    alone = jax.jit(clip_by_spectral_norm(1.0, method=method).update)
    for _ in range(2):
        updates, state = run(grads, state)
        expected, plain = alone(tree, plain)
    assert run._cache_size() == 1
    for name, update in updates.items():
        assert update.sharding.is_equivalent_to(grads[name].sharding, update.ndim)
        np.testing.assert_allclose(update, expected[name], atol=1e-5)


def test_inside_shard_map_split_matrices_are_refused():
    """JAX cannot know whether a shard holds whole matrices: axis_name=() says that it does."""
    mesh = jax.make_mesh((4,), ("x",), devices=jax.devices()[:4])
    stack = jnp.asarray([matrix(SIGMA, 6, 6, seed) for seed in range(4)], jnp.float32)
    spec = PartitionSpec("x")

    def run(axis_name):
        def inner(x):
            tx = clip_by_spectral_norm(1.0, axis_name=axis_name, record=False)
            return tx.update(x, tx.init(x))[0]

        split = jax.device_put(stack, NamedSharding(mesh, spec))
        return jax.jit(jax.shard_map(inner, mesh=mesh, in_specs=spec, out_specs=spec))(split)

    np.testing.assert_allclose(run(()), [exact(x, 1, "hard") for x in stack], atol=1e-5)
    with pytest.raises(ValueError, match="say it by axis_name="):
        run(None)
    with pytest.raises(ValueError, match="are split over the mapped axes"):
        run("x")


def test_bad_arguments_are_errors_at_construction():
    """Each error names the argument, its value and what is allowed."""
    for bad in LIMIT.bad:
        message = (
            f"max_norm must be {bad.allowed or LIMIT.allowed}; got {bad.shown or repr(bad.value)}"
        )
        assert_refused(lambda bad=bad: clip_by_spectral_norm(bad.value), bad.error, message)
    choices = {
        "kind": "'hard', 'soft'",
        "method": "'newton_schulz', 'svd', 'power_iteration'",
        "nonfinite": "'zero', 'propagate', 'sanitize'",
        "record": "True, False",
    }
    for name, allowed in choices.items():
        message = f"{name} must be one of {allowed}; got 'x'"
        assert_refused(lambda name=name: clip_by_spectral_norm(**{name: "x"}), ValueError, message)
    assert_refused(
        lambda: clip_by_spectral_norm(kind="soft", method="power_iteration"),
        ValueError,
        "kind must be 'hard' with method='power_iteration'; got 'soft'",
    )
    allowed = (
        "None, a pair (rows, columns), each an axis or a tuple of axes, or a function "
        "(path, leaf) -> these"
    )
    for bad in refused(TypeError, 0, "x", (0,), (0, 1, 2), (0, True), (0, 1.0), [0, 1], {"w": 0}):
        message = f"axes must be {allowed}; got {bad.value!r}"
        assert_refused(lambda bad=bad: clip_by_spectral_norm(axes=bad.value), bad.error, message)


def test_leaves_that_have_no_such_matrix():
    """Axes out of range, twice, or not known at rank 6 are errors that name the leaf."""
    init = lambda x, axes: clip_by_spectral_norm(axes=axes).init({"w": x}) and None
    run = lambda x, axes: clip_by_spectral_norm(axes=axes).update(
        {"w": x}, clip_by_spectral_norm(axes=axes, method="svd").init({"w": x})
    )
    assert init(jnp.ones((2, 2)), None) is None
    for axes in ((0, 2), (1, -1), ((0, 1), 1)):
        with pytest.raises(
            ValueError, match=r"out of range for, or twice in, leaf 'w' of \(2, 2\)"
        ):
            run(jnp.ones((2, 2)), axes)
    with pytest.raises(ValueError, match="axes=None knows ranks up to 5; leaf 'w'"):
        run(jnp.ones((2,) * 6), None)
    with pytest.raises(TypeError, match="the axes of leaf 'w' must be a pair"):
        run(jnp.ones((2, 2)), lambda path, leaf: 0)
