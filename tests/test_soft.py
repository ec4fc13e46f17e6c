"""Soft scales: published numbers, float64 formulas, ends, derivatives, and the engine with them."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import trees
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from kinds import POSITIVE, assert_refused

import optaxclip as oc
from optaxclip import measure, scale, threshold

GOLDEN = pathlib.Path(__file__).parent / "golden"
# A ratio, a square, a sum, a root and a quotient, each rounded once, and half as much again.
ROUNDINGS = 8
FLOAT32, FLOAT64 = ROUNDINGS * 2.0**-24, ROUNDINGS * 2.0**-53
TINY = float(np.finfo(np.float32).tiny)

CLIPS = {"softsign": scale.softsign, "rsqrt": scale.rsqrt, "tanh": scale.tanh}
NORMALIZERS = {"automatic": scale.automatic(0.01), "psac": scale.psac(0.1)}
SOFT = CLIPS | NORMALIZERS
every_soft = pytest.mark.parametrize("name", SOFT)


def _tanh_over(r):
    return np.where(r < 1e-5, 1 - r * r / 3, np.tanh(r) / np.where(r == 0, 1, r))


# n, c -> factor, as in the papers.
FORMULAS = {
    "softsign": lambda n, c: c / (c + n),
    "rsqrt": lambda n, c: 1 / np.sqrt(1 + (n / c) ** 2),
    "tanh": lambda n, c: _tanh_over(n / c),
    "automatic": lambda n, c: c / (n + 0.01),
    "psac": lambda n, c: c / (n + 0.1 / (n + 0.1)),
}
# The derivatives of n x factor, by n.
SLOPES = {
    "softsign": lambda n, c: (c / (c + n)) ** 2,
    "rsqrt": lambda n, c: (1 + (n / c) ** 2) ** -1.5,
    "tanh": lambda n, c: 1 - np.tanh(n / c) ** 2,
    "automatic": lambda n, c: 0.01 * c / (n + 0.01) ** 2,
    "psac": lambda n, c: c * 0.1 * (2 * n + 0.1) / (n * (n + 0.1) + 0.1) ** 2,
}


def golden(file):
    """The cases of one file."""
    return json.loads((GOLDEN / f"{file}.json").read_text())["cases"]


def grid(*, of=(1e-30, 1e-8, 0.01, 0.3, 1.0, 1.7, 40.0, 1e6, 1e30)):
    """Norms against limits, none of them at an end."""
    return np.meshgrid(np.float64(of), np.float64(of))


def entrywise(rule, limit=1.0, **options):
    """A clip of each entry."""
    return oc.clip(measure.element(), threshold.constant(limit), rule, **options)


def updated(tx, grads):
    """What becomes of gradients in a first step."""
    return tx.update(grads, tx.init(grads), grads)[0]


def together(groups, grads, limit=1.0, rules=SOFT):
    """What becomes of gradients under every rule, out of one program."""
    txs = {name: oc.clip(groups, threshold.constant(limit), rule) for name, rule in rules.items()}
    return jax.jit(lambda grads: {name: updated(tx, grads) for name, tx in txs.items()})(grads)


def factors(rule, norms, limit):
    """The factors of norms under one limit, in the dtype that is on."""
    norms = jnp.asarray(norms, jnp.result_type(float))
    return np.asarray(rule(norms, jnp.full_like(norms, limit)), np.float64)


@pytest.mark.parametrize("wide", [False, True], ids=["float32", "float64"])
def test_golden_factors_of_norms(wide):
    """Every formula of the table of norms is one of the scales, under limit 1."""
    cases = golden("soft_clip_formulas")
    ours = {
        "hard min(1,c/n)": scale.rescale,
        "smooth c/(c+n)": scale.softsign,
        "rsqrt 1/sqrt(1+(n/c)^2)": scale.rsqrt,
        "tanh c*tanh(n/c)/n": scale.tanh,
        "normalised c/(n+gamma) gamma=.01": scale.automatic(0.01),
        "torch min(1,c/(n+1e-6))": scale.rescale,
        "zhang clipped gd min(1, c/n)": scale.rescale,
    }
    assert cases["norm_scale_c1"].keys() == ours.keys()

    for name, expected in cases["norm_scale_c1"].items():
        with jax.enable_x64(wide):
            found = factors(ours[name], cases["n"], 1.0)
        exact = 1e-6 if name.startswith("torch") else FLOAT64 if wide else FLOAT32
        np.testing.assert_allclose(found, expected, exact, err_msg=name)


@pytest.mark.parametrize("wide", [False, True], ids=["float32", "float64"])
def test_golden_curves_of_entries(wide):
    """Entry by entry, a scale is the curve that it is named for; three others are not offered."""
    cases = golden("soft_clip_formulas")
    ours = {
        "hard": scale.rescale,
        "huber_weight(=hard)": scale.rescale,
        "tanh": scale.tanh,
        "rsqrt": scale.rsqrt,
        "pseudo_huber_weight_same_as_rsqrt": scale.rsqrt,
        "softsign": scale.softsign,
    }
    # The first two are near tanh and rsqrt, the last has no bound.
    others = {"arctan", "erf", "log1p_sign"}
    assert cases["elementwise_c1"].keys() == ours.keys() | others

    for name, rule in ours.items():
        with jax.enable_x64(wide):
            x = jnp.asarray(cases["x"], jnp.result_type(float))
            found = np.asarray(updated(entrywise(rule), x), np.float64)
        exact = FLOAT64 if wide else FLOAT32
        np.testing.assert_allclose(found, cases["elementwise_c1"][name], exact, err_msg=name)


def test_golden_heavyball():
    """HeavyBall's softsign is `automatic`, its norm and RMS clips are ours; companders are not."""
    cases = golden("heavyball_soft")
    x = np.array(cases.pop("x"))

    twice = updated(entrywise(scale.automatic(gamma=1.0), 2.0), jnp.asarray(x, jnp.float32))
    np.testing.assert_allclose(twice, cases.pop("softsign_2x_over_1p_absx"), FLOAT32)
    for name, tx in {
        "l2_clip_1": oc.clip_by_global_norm(1.0),
        "rmsnorm_clip_1": oc.clip_by_block_rms(1.0),
    }.items():
        for grads, expected in cases.pop(name).items():
            found = updated(tx, jnp.array(json.loads(grads), jnp.float32))
            np.testing.assert_allclose(found, expected, FLOAT32)
    assert cases.keys() == {
        *("mu_law_mu127", "a_law_A87.6"),  # companders: they enlarge what is small
        "trust_region_lerp0.9_scale1.5",  # passes its own scale
        "heavyball_agc_pertensor_0.01",  # of gradients that are not recorded
    }


@pytest.mark.parametrize("wide", [False, True], ids=["float32", "float64"])
def test_golden_factors_of_per_example_clipping(wide):
    """AUTO-S, AUTO-V, PSAC and the drop of all that is too large are four of the scales."""
    rows = golden("dp_per_example")["per_example_factor_tables_R1"]
    norms = [row["norm"] for row in rows]
    ours = {
        "auto_s_gamma0_01": scale.automatic(gamma=0.01),
        "auto_v": scale.normalize,
        "psac_r0_1": scale.psac(r=0.1),
        "global_drop": scale.skip,
        "abadi_fastdp_eps1e6": scale.rescale,
    }

    for name, rule in ours.items():
        with jax.enable_x64(wide):
            found = factors(rule, norms, 1.0)
        expected = [row[name] for row in rows]
        if name == "auto_v":  # 1 / 0
            assert expected[0] is None
            expected[0] = 1
        exact = 1e-6 if name.startswith("abadi") else FLOAT64 if wide else FLOAT32
        np.testing.assert_allclose(found, expected, exact, err_msg=name)


@every_soft
def test_factors_are_those_of_the_formula_at_any_ratio(name):
    """From 1e-60 to 1e60 times the limit, a float32 factor is the float64 one, rounded."""
    n, c = grid()

    with jax.numpy_dtype_promotion("strict"):
        found = SOFT[name](jnp.asarray(n, jnp.float32), jnp.asarray(c, jnp.float32))

    n, c = np.float64(np.float32(n)), np.float64(np.float32(c))
    np.testing.assert_allclose(found, FORMULAS[name](n, c), FLOAT32, TINY)


@every_soft
def test_float64_factors(name):
    """float64 norms have float64 factors."""
    n, c = grid(of=(1e-60, 1e-3, 0.02, 0.3, 0.99, 1.0, 1.01, 1.7, 5.0, 40.0, 1e60))

    with jax.enable_x64(True):
        found = SOFT[name](jnp.asarray(n), jnp.asarray(c))

    assert found.dtype == np.float64
    # NumPy's own tanh(r) / r is right to the same few roundings.
    np.testing.assert_allclose(found, FORMULAS[name](n, c), 2 * FLOAT64)


@every_soft
def test_slopes_are_those_of_the_formula_at_any_ratio(name):
    """The derivative of n x factor is right from far below the limit to far above it."""
    n, c = grid(of=(1e-12, 1e-8, 0.01, 0.3, 1.0, 1.7, 40.0, 1e6))
    result = lambda n, c: n * SOFT[name](n, c)

    slope = jax.vmap(jax.grad(result))(*(jnp.asarray(x.ravel(), jnp.float32) for x in (n, c)))

    expected, factor = (f[name](n, c).ravel() for f in (SLOPES, FORMULAS))
    # It is factor + n factor', which cancels above the limit; JAX's slope of tanh is 1 - tanh^2.
    rounding = 2 * FLOAT32 * (expected + factor) + (2.0**-22 if name == "tanh" else 0)
    assert (np.abs(slope - expected) <= rounding).all()


@every_soft
def test_factors_at_the_ends(name):
    """Limit 0 gives 0 to every norm but 0, limit inf gives 1, and so does norm 0 to a clip."""
    norms = jnp.array([0.0, TINY, 0.5, 1.0, 4.0, 1e30, 3e38])
    ones = jnp.ones_like(norms)

    at_0, at_inf = SOFT[name](norms, 0 * ones), SOFT[name](norms, jnp.inf * ones)

    np.testing.assert_array_equal(at_0[1:], 0)
    np.testing.assert_array_equal(at_inf, 1)
    of_0 = SOFT[name](0 * ones, jnp.array([TINY, 1e-3, 0.5, 1.0, 4.0, 1e30, 3e38]))
    assert jnp.isfinite(of_0).all()
    if name in CLIPS:
        np.testing.assert_array_equal(of_0, 1)
        assert at_0[0] == 1  # as 0 <= 0 is


@every_soft
def test_a_norm_of_zero_is_no_0_by_0(name):
    """At norm 0, the factor and both its derivatives are numbers, whatever the limit."""
    each = [0.0, 1e-45, TINY, 1e-10, 1.0, 1e10, 3e38, np.inf]
    n, c = (jnp.asarray(x.ravel(), jnp.float32) for x in np.meshgrid(each[:-1], each))

    value, (by_n, by_c) = jax.jit(jax.vmap(jax.value_and_grad(SOFT[name], (0, 1))))(n, c)

    assert jnp.isfinite(value).all()
    for derivative in (by_n, by_c):
        assert not jnp.isnan(derivative).any()


@every_soft
def test_results_rise_with_the_norm_up_to_the_limit(name):
    """The result n x factor never falls as n grows, and is at most the limit."""
    n = np.float32(10.0 ** np.linspace(-37, 33, 4001))
    for limit in (1e-3, 1.0, 1e4):
        result = n.astype(np.float64) * factors(SOFT[name], n, limit)

        assert (result <= limit * (1 + FLOAT32)).all()
        assert result[-1] >= limit * (1 - FLOAT32)
        assert (result[1:] >= result[:-1] * (1 - FLOAT32)).all()


@pytest.mark.parametrize("name", CLIPS)
def test_clips_never_enlarge_and_leave_the_smallest_alone(name):
    """The factor of a soft clip is in [0, 1], falls as the norm grows, and is 1 far below."""
    n = 10.0 ** np.linspace(-37, 38, 4001)

    factor = factors(SOFT[name], n, 1.0)

    assert ((factor >= 0) & (factor <= 1)).all()
    assert (factor[1:] <= factor[:-1] * (1 + FLOAT32)).all()
    np.testing.assert_array_equal(factor[n < 2.0**-26], 1)
    assert factor[np.searchsorted(n, 0.1)] < 1


def test_soft_clips_at_the_limit_are_as_the_documentation_says():
    """A norm at the limit becomes 0.5, 0.71 and 0.76 of it; a hard clip is above all of them."""
    at, far = ([factors(rule, [n], 1.0)[0] * n for rule in CLIPS.values()] for n in (1, 10))

    np.testing.assert_allclose(at, [0.5, 0.5**0.5, np.tanh(1)], FLOAT32)
    np.testing.assert_allclose(far, [10 / 11, 10 / 101**0.5, 1], 1e-6)


def test_entries_keep_sign_and_phase():
    """A soft clip of entries is odd, and turns no complex number."""
    x = trees.normal(64, scale=3.0)
    turn = np.complex64(0.6 + 0.8j)
    grads = {"up": x, "down": -x, "turned": x.astype(jnp.complex64) * turn}

    for found in together(measure.element(), grads).values():
        np.testing.assert_array_equal(found["down"], -found["up"])
        assert (np.sign(found["up"]) == np.sign(x)).all()
        np.testing.assert_allclose(found["turned"], np.asarray(found["up"]) * turn, 2 * FLOAT32)


MEASURES = {
    "global_norm": measure.global_norm(),
    "leaf_norm": measure.leaf_norm(),
    "unit_norm": measure.unit_norm(),
    "element": measure.element(),
}
THRESHOLDS = {
    "constant": threshold.constant(1.0),
    "zscore": threshold.zscore(2.5, warmup=2),
}


@pytest.mark.parametrize(
    ("groups", "kind"),
    [
        *((groups, "constant") for groups in MEASURES),
        ("global_norm", "zscore"),
        *(pytest.param(x, "zscore", marks=pytest.mark.proof) for x in MEASURES if x[0] != "g"),
    ],
)
def test_every_measure_and_threshold(groups, kind):
    """With every measure and threshold, updates and memory are finite, whatever comes in."""
    txs = {n: oc.clip(MEASURES[groups], THRESHOLDS[kind], rule) for n, rule in SOFT.items()}
    base = {"w": trees.normal(4, 3), "b": trees.normal(3, dtype=jnp.bfloat16)}
    sizes = [1.0, 2.0, 1.5, 0.0, 1e-30, 1e30, 1.0, np.nan, np.inf, 1.0]
    stream = jax.tree.map(lambda x: jnp.stack([x * jnp.asarray(s, x.dtype) for s in sizes]), base)

    def step(states, grads):
        each = {name: tx.update(grads, states[name]) for name, tx in txs.items()}
        states = {name: state for name, (_, state) in each.items()}
        return states, ({name: updates for name, (updates, _) in each.items()}, states)

    start = {name: tx.init(base) for name, tx in txs.items()}
    _, (updates, states) = jax.jit(lambda s, g: jax.lax.scan(step, s, g))(start, stream)

    for name in SOFT:
        for x in jax.tree.leaves((updates[name], states[name].memory)):
            assert np.isfinite(np.asarray(x, np.float64)).all()
        assert updates[name]["b"].dtype == jnp.bfloat16
        assert np.any(updates[name]["w"][-1])


@pytest.mark.parametrize("groups", ["global_norm", "element"])
def test_the_update_at_zero_has_the_slope_of_the_table(groups):
    """The derivative through the update at 0 is the factor there: 1, c / gamma or c."""
    at = {"w": jnp.zeros((2, 3)), "b": jnp.zeros(3)}
    along = {"w": jnp.zeros((2, 3)), "b": jnp.array([1.0, -2.0, 0.0])}

    _, slopes = jax.jvp(lambda g: together(MEASURES[groups], g, 2.0, SOFT), (at,), (along,))

    for name, slope in slopes.items():
        expected = {"automatic": 2 / 0.01, "psac": 2.0}.get(name, 1.0)
        np.testing.assert_allclose(slope["b"], expected * along["b"], FLOAT32)
        np.testing.assert_array_equal(slope["w"], 0)


def test_derivatives_through_the_update():
    """Entry by entry, the derivative through the update is that of the curve."""
    x = trees.normal(40, scale=2.0)

    _, slopes = jax.jvp(lambda x: together(measure.element(), x), (x,), (jnp.ones_like(x),))

    for name, slope in slopes.items():
        expected, factor = (f[name](np.abs(np.float64(x)), 1.0) for f in (SLOPES, FORMULAS))
        assert (np.abs(slope - expected) <= 2 * FLOAT32 * (expected + factor)).all()


@pytest.mark.parametrize("groups", ["global_norm", "element"])
def test_limit_zero_and_inf_through_the_engine(groups):
    """Limit 0 gives zeros, and limit inf the bits that came in."""
    grads = {"w": trees.normal(4, 3), "b": jnp.array([0.0, -0.0, 1e-40, 3.0])}

    none, off = (together(MEASURES[groups], grads, c) for c in (0, np.inf))

    for name in SOFT:
        trees.assert_same_bits(off[name], grads)
        assert not any(np.any(x) for x in jax.tree.leaves(none[name]))


def test_narrow_leaves_are_rounded_once():
    """A bfloat16 or float16 leaf becomes what float32 makes of it, rounded."""
    grads = [trees.normal(200, scale=3.0, dtype=dtype) for dtype in (jnp.bfloat16, jnp.float16)]

    for name, found in together(measure.leaf_norm(), grads).items():
        for x, update in zip(grads, found, strict=True):
            exact = np.float64(x) * FORMULAS[name](np.linalg.norm(np.float64(x)), 1.0)
            half_ulp = float(jnp.finfo(x.dtype).eps) / 2
            assert update.dtype == x.dtype
            np.testing.assert_allclose(
                np.float64(update), exact, half_ulp * (1 + 2.0**-8), 2.0**-25
            )


def test_metrics_count_what_a_soft_clip_shrinks():
    """Under a soft clip, all groups count as clipped but those far below the limit."""
    grads = {"a": jnp.array([3.0, 4.0]), "b": jnp.array([0.5]), "c": jnp.array([1e-9])}
    tx = oc.clip(measure.leaf_norm(), threshold.constant(1.0), scale.softsign)

    read = oc.metrics(tx.update(grads, tx.init(grads))[1])

    assert read["clipped"] == np.float32(2 / 3)
    assert read["clipped_steps"] == 1
    np.testing.assert_allclose(read["factor"], 1 / 6, FLOAT32)
    np.testing.assert_allclose(read["clipped_norm"], 5 / 6, FLOAT32)


@pytest.mark.parametrize(("factory", "argument"), [("automatic", "gamma"), ("psac", "r")])
def test_parameters_are_judged_at_construction(factory, argument):
    """What is no number > 0 is refused in so many words, and what is one is not."""
    make = getattr(scale, factory)
    for bad in POSITIVE.bad:
        message = f"{argument} must be {bad.allowed or POSITIVE.allowed}; "
        message += f"got {bad.shown or repr(bad.value)}"
        assert_refused(lambda bad=bad: make(**{argument: bad.value}), bad.error, message)
    for good in POSITIVE.good:
        assert make(good)(jnp.ones(2), jnp.ones(2)).shape == (2,)


@pytest.mark.parametrize("make", [scale.automatic, scale.psac])
def test_a_bad_traced_parameter_gives_zeros(make):
    """A traced parameter that is negative, 0 or not finite gives zeros, and never flips a sign."""
    x = jnp.array([-3.0, 0.0, 0.5])
    tx = lambda value: oc.clip(measure.leaf_norm(), threshold.constant(1.0), make(value))

    bad = jnp.array([-1.0, 0.0, np.nan, np.inf, -np.inf])
    found = jax.jit(jax.vmap(lambda value: updated(tx(value), x)))(bad)

    np.testing.assert_array_equal(found, 0)
    good = jax.vmap(lambda value: updated(tx(value), x))(jnp.array([0.5, 2.0]))
    for value, update in zip((0.5, 2.0), good, strict=True):
        np.testing.assert_allclose(update, updated(tx(value), x), FLOAT32)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_sharded_leaves(axis_type):
    """On a mesh of eight devices, results are as without one, and sharded as the gradients."""
    mesh = jax.make_mesh((8,), ("x",), axis_types=(axis_type,))
    x = trees.normal(8, 4)
    grads = jax.device_put(x, NamedSharding(mesh, PartitionSpec("x", None)))
    wide = np.float64(x)

    for groups, norm in {"global_norm": np.linalg.norm(wide), "element": np.abs(wide)}.items():
        for name, found in together(MEASURES[groups], grads).items():
            np.testing.assert_allclose(found, wide * FORMULAS[name](norm, 1.0), 2 * FLOAT32)
            assert found.sharding.spec[0] == "x"
