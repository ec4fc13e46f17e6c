"""Advice is right on streams where the right answer is known; a replay does what a clipper does."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optaxclip as oc
from optaxclip.advise import ABOVE, LATER, promise, recommend_threshold
from optaxclip.observe import NormHistory, observe_norms
from optaxclip.replaying import replay

NAN, INF = np.nan, np.inf
SEEDS = 100
HELD_OUT = 20_000  # later norms, of which a rate of 1 % is known to within 15 % (two deviations)
SCATTER = 0.3  # of the logarithms of ordinary norms


def ordinary(rng, n):
    return np.exp(SCATTER * rng.normal(size=n))


def student(rng, n):
    return np.abs(rng.standard_t(3, size=n))


def pareto(rng, n):
    return 1 + rng.pareto(2, size=n)


def bursts(rng, n):
    """Bursts of ten steps, ten times as large, of which 5 % of the steps are part."""
    within = np.convolve(rng.random(n) < 0.005, np.ones(10))[:n] > 0
    return ordinary(rng, n) * np.where(within, 10, 1)


def alternating(rng, n):
    """Two levels, one four times the other, which change after 100 steps on average."""
    return ordinary(rng, n) * np.where(np.cumsum(rng.random(n) < 0.01) % 2, 4, 1)


def persistent(rng, n):
    """Norms whose logarithms correlate by 0.9 with the one before: a level that only seems so."""
    logs, noise = np.zeros(n), np.sqrt(1 - 0.9**2) * rng.normal(size=n)
    for i in range(1, n):
        logs[i] = 0.9 * logs[i - 1] + noise[i]
    return np.exp(SCATTER * logs)


def assert_within_twofold(advices, rates, share_above):
    """Every limit clips from half to twice as often as it should."""
    found = np.array([[share_above(i, a.limit) for a in row] for i, row in enumerate(advices)])
    ratio = found / np.array(rates)
    assert ((ratio >= 0.5) & (ratio <= 2)).all(), f"{ratio.min(0)} to {ratio.max(0)}"


def kinds(advices):
    return [row[-1].kind for row in advices]


STEADY, OTHERS = (0.01, 0.05, 0.1), (0.02, 0.05, 0.1)
STREAMS = {
    "lognormal": (ordinary, 4000, STEADY, "steady"),
    "student": (student, 4000, STEADY, "heavy-tailed"),
    "pareto": (pareto, 4000, STEADY, "heavy-tailed"),
    "bursts": (bursts, 10_000, OTHERS, "bursts"),
    "two regimes": (alternating, 10_000, OTHERS, "two regimes"),
    "persistent": (persistent, 10_000, OTHERS, "steady"),
}


@pytest.mark.parametrize("name", STREAMS)
def test_held_out(name):
    """Over 100 seeds and three rates, later norms are clipped from half to twice as often."""
    make, n, rates, kind = STREAMS[name]
    streams = [make(np.random.default_rng(seed), n + HELD_OUT) for seed in range(SEEDS)]

    advices = [[recommend_threshold(x[:n], clip_rate=rate) for rate in rates] for x in streams]

    assert_within_twofold(advices, rates, lambda i, limit: np.mean(streams[i][n:] > limit))
    assert kinds(advices).count(kind) >= 0.97 * SEEDS


def test_held_out_few():
    """As few norms as are accepted are enough: 20 / rate of them."""
    for rate in (0.01, 0.05, 0.2):
        n = round(ABOVE / rate)
        streams = [ordinary(np.random.default_rng(seed), n + HELD_OUT) for seed in range(SEEDS)]
        ratio = [
            np.mean(x[n:] > recommend_threshold(x[:n], clip_rate=rate).limit) / rate
            for x in streams
        ]
        # 1 in 400, for each side, is what is said of them.
        assert np.mean((np.array(ratio) >= 0.5) & (np.array(ratio) <= 2)) >= 0.97


LEVELS = {
    "rising": (lambda t: 1.5 * t, STEADY),
    "falling": (lambda t: -t, STEADY),
    "hardly rising": (lambda t: 0.15 * t, STEADY),
    "slowing down": (lambda t: -0.5 * np.log1p(8 * t), OTHERS),  # of 1 %, 2.02 times in one seed
}


@pytest.mark.parametrize("name", LEVELS)
def test_drift(name):
    """Of a level that moves, the limit is right for a further tenth, which the reason says."""
    level, rates = LEVELS[name]
    n, ahead = 4000, 4000 // LATER
    time, later = np.arange(n) / n, np.arange(n, n + ahead) / n

    def share(i, limit):
        rng = np.random.default_rng([1, i])
        return np.mean([ordinary(rng, ahead) * np.exp(level(later)) > limit for _ in range(50)])

    streams = [
        ordinary(np.random.default_rng(seed), n) * np.exp(level(time)) for seed in range(SEEDS)
    ]
    advices = [[recommend_threshold(x, clip_rate=rate) for rate in rates] for x in streams]

    assert_within_twofold(advices, rates, share)
    assert kinds(advices) == ["drifting"] * SEEDS
    assert "near future" in advices[0][0].reason


def test_promise():
    """What is said of the coming steps is of those that the limit is for."""
    norms = ordinary(np.random.default_rng(0), 1000)
    time = np.arange(1000) / 1000
    for level, kind, words in (
        (0, "steady", "the coming steps"),
        (time, "drifting", "the next 100 steps"),
        (50 * (time > 0.6), "diverged", "the steps before the run diverged"),
    ):
        advice = recommend_threshold(norms * np.exp(level), clip_rate=0.1)
        assert advice.kind == kind
        assert promise(advice, clip_rate=0.1, steps=1000) == f"clips 10 % of {words}"


@pytest.mark.parametrize("slope", [1.5, 3.0])
@pytest.mark.parametrize("scatter", [0.05, 0.1])
def test_drift_of_norms_that_scatter_little(scatter, slope):
    """Where the level moves by more than the norms scatter, its way ahead is part of the rate."""
    n, ahead = 4000, 4000 // LATER
    level, later = slope * np.arange(n) / n, slope * np.arange(n, n + ahead) / n
    noise = lambda seed: scatter * np.random.default_rng(seed).normal(size=n)
    advices = [
        [recommend_threshold(np.exp(noise(seed) + level), clip_rate=rate) for rate in OTHERS]
        for seed in range(SEEDS)
    ]

    fresh = scatter * np.random.default_rng(SEEDS).normal(size=(50, ahead)) + later
    assert_within_twofold(advices, OTHERS, lambda i, limit: np.mean(fresh > np.log(limit)))


def test_scatter_of_the_later_half():
    """Of a bent level, norms that scattered more in the earlier half do not make the limit."""
    n, rates = 4000, (0.05, 0.1)
    time, later = np.arange(n) / n, np.arange(n, n + n // LATER) / n
    scatter, level = np.where(time < 0.5, 0.6, 0.3), lambda t: -0.5 * np.log1p(8 * t)
    noise = [np.random.default_rng(seed).normal(size=n) for seed in range(SEEDS)]
    norms = [np.exp(scatter * x + level(time)) for x in noise]
    advices = [[recommend_threshold(x, clip_rate=rate) for rate in rates] for x in norms]

    fresh = 0.3 * np.random.default_rng(SEEDS).normal(size=(50, later.size)) + level(later)
    assert_within_twofold(advices, rates, lambda i, limit: np.mean(fresh > np.log(limit)))
    assert kinds(advices) == ["drifting"] * SEEDS
    # Half of the norms: the curve ends where 20 of these are above a limit.
    assert min(advices[0][0].curve.rates) >= ABOVE / (n / 2)


def test_step():
    """Of a level that has changed for good, somewhere, the limit is that of the later one."""
    n = 4000

    def made(seed):
        rng = np.random.default_rng(seed)
        change = rng.integers(n // 5, n - n // 5)
        return ordinary(rng, n + HELD_OUT) * np.where(np.arange(n + HELD_OUT) < change, 1, 4)

    streams = [made(seed) for seed in range(SEEDS)]
    advices = [[recommend_threshold(x[:n], clip_rate=rate) for rate in STEADY] for x in streams]

    assert_within_twofold(advices, STEADY, lambda i, limit: np.mean(streams[i][n:] > limit))
    assert kinds(advices) == ["two regimes"] * SEEDS


@functools.cache
def observed():
    """A compiled run of an observer over 4000 norms."""
    tx = optax.chain(observe_norms(), oc.clip_by_global_norm(1.0))

    def step(state, norm):
        return tx.update({"w": norm}, state)[1], None

    init = tx.init({"w": jnp.float32(0)})
    return jax.jit(lambda norms: jax.lax.scan(step, init, norms)[0])


@pytest.mark.parametrize("make", [ordinary, student, pareto], ids=lambda f: f.__name__)
def test_from_a_state(make):
    """From the histogram of an observer, the limit is as right as from the norms themselves."""
    n = 4000
    streams = [make(np.random.default_rng(seed), n + HELD_OUT) for seed in range(SEEDS)]
    states = [jax.device_get(observed()(jnp.asarray(x[:n], jnp.float32))) for x in streams]

    advices = [[recommend_threshold(s, clip_rate=rate) for rate in STEADY] for s in states]

    assert_within_twofold(advices, STEADY, lambda i, limit: np.mean(streams[i][n:] > limit))
    assert set(kinds(advices)) == {"steady" if make is ordinary else "heavy-tailed"}


@pytest.mark.parametrize("times", [0.25, 2.0, 4.0])
@pytest.mark.parametrize("start", [2400, 3600, 3900])
def test_a_state_that_moves(start, times):
    """The latest 64 norms show that a level has moved, and the limit is made of these."""
    n, rates = 4000, (0.05, 0.1)
    level = np.where(np.arange(n + HELD_OUT) < start, 1, times)
    streams = [level * ordinary(np.random.default_rng(i), n + HELD_OUT) for i in range(SEEDS)]
    states = [jax.device_get(observed()(jnp.asarray(x[:n], jnp.float32))) for x in streams]

    advices = [[recommend_threshold(s, clip_rate=rate) for rate in rates] for s in states]

    ratio = np.array(
        [
            [np.mean(x[n:] > a.limit) / rate for a, rate in zip(row, rates, strict=True)]
            for x, row in zip(streams, advices, strict=True)
        ]
    )
    # Of 64 norms, no quantile is known better: one run in ten is outside of the twofold band.
    assert np.mean((ratio >= 0.5) & (ratio <= 2)) >= 0.85
    assert np.median(ratio, axis=0) == pytest.approx(1, rel=0.15)
    assert kinds(advices) == ["drifting"] * SEEDS


def blown_up(norms, how):
    """Norms that do not come back from 60 % of the run on, or from 95 % on."""
    time = np.arange(norms.size) / norms.size
    if how == "at once":
        return norms * np.where(time < 0.6, 1, 1e20)
    return norms * np.exp(np.clip(time - 0.9, 0, None) * 400)


@pytest.mark.parametrize("how", ["at once", "growing"])
def test_a_run_that_diverges(how):
    """The limit is that of the norms before, from a log and from a state."""
    norms = [ordinary(np.random.default_rng(seed), 4000) for seed in range(SEEDS)]

    advices = [[recommend_threshold(blown_up(x, how), clip_rate=r) for r in STEADY] for x in norms]

    fresh = ordinary(np.random.default_rng(SEEDS), HELD_OUT)
    assert_within_twofold(advices, STEADY, lambda i, limit: np.mean(fresh > limit))
    assert kinds(advices) == ["diverged"] * SEEDS
    state = observed()(jnp.asarray(blown_up(norms[0], "at once"), jnp.float32))
    advice = recommend_threshold(state)
    assert advice.kind == "diverged"
    assert 0.025 <= np.mean(fresh > advice.limit) <= 0.1


@pytest.mark.parametrize("start", [0.03, 0.05, 0.08, 0.12, 0.55, 0.58])
@pytest.mark.parametrize("how", ["at once", "growing"])
def test_when_a_run_diverged(start, how):
    """Wherever that was, no norm after it makes the limit, though it may begin within a part."""
    n, seeds, rates = 4000, 20, np.array([0.1, 0.2])
    since = np.clip(np.arange(n) - round(start * n) + 1, 0, None)
    rise = 1e6 * (since > 0) if how == "at once" else np.exp(np.minimum(0.2 * since, 40)) - 1
    norms = [(1 + rise) * ordinary(np.random.default_rng(seed), n) for seed in range(seeds)]
    advices = [[recommend_threshold(x, clip_rate=rate) for rate in rates] for x in norms]

    fresh = ordinary(np.random.default_rng(SEEDS), HELD_OUT)
    ratio = np.array([[np.mean(fresh > a.limit) for a in row] for row in advices]) / rates
    # Binomial numbers, of half of the norms before at least: four deviations of their median.
    within = 4 * 1.25 * np.sqrt((1 - rates) / (rates * start * n / 2) / seeds)
    assert (np.abs(np.median(ratio, 0) - 1) < within).all()
    assert kinds(advices) == ["diverged"] * seeds


@pytest.mark.parametrize("share", [0.05, 0.1, 0.18])
def test_a_run_whose_first_norms_are_tiny_has_not_diverged(share):
    """Norms a thousandth as large for some steps, and then sane ones, are a start."""
    norms = ordinary(np.random.default_rng(0), 4000)
    advice = recommend_threshold(norms * np.where(np.arange(4000) < share * 4000, 1e-3, 1))
    assert advice.kind == "two regimes"
    assert advice.limit == pytest.approx(np.exp(1.645 * SCATTER), rel=0.1)


def test_a_run_of_few_norms_that_diverges():
    """As few norms as are accepted are enough for a limit, and nothing warns."""
    for start in (2, 10, 30):
        norms = ordinary(np.random.default_rng(0), 40) * np.where(np.arange(40) < start, 1, 1e9)
        advice = recommend_threshold(norms, clip_rate=0.5)
        assert advice.kind == "diverged"
        assert advice.limit == pytest.approx(1, rel=3 * SCATTER)


def test_a_run_that_spikes_has_not_diverged():
    """One norm of 1e20, or norms that are NaN from some step on, are no other level."""
    norms = ordinary(np.random.default_rng(0), 1000)
    spiked = norms * np.where(np.arange(1000) == 700, 1e20, 1)
    for bad in (spiked, np.r_[norms[:600], [NAN] * 400]):
        advice = recommend_threshold(bad)
        assert advice.kind in {"steady", "heavy-tailed"}  # of which one norm may make the other
        assert advice.limit == pytest.approx(np.exp(1.645 * SCATTER), rel=0.1)


def test_few_norms_of_two_levels():
    """Fewer norms than there are parts to count changes in are no warning."""
    rng = np.random.default_rng(0)
    for n in (40, 100, 199):
        norms = ordinary(rng, n) * np.where(np.arange(n) // 5 % 2, 20, 1)
        assert recommend_threshold(norms, clip_rate=0.5).limit > 0


def test_curve():
    """The curve falls from limit to limit, goes through the advice, and ends where norms do."""
    norms = ordinary(np.random.default_rng(0), 4000)

    advice = recommend_threshold(norms, clip_rate=0.1)

    limits, rates = advice.curve
    assert (np.diff(limits) <= 0).all()
    assert (np.diff(rates) > 0).all()
    assert rates[0] * norms.size >= ABOVE
    found = [np.mean(norms > limit) for limit in limits]
    np.testing.assert_allclose(found, rates, atol=1 / norms.size)
    assert np.exp(np.interp(np.log(0.1), np.log(rates), np.log(limits))) == pytest.approx(
        advice.limit, rel=0.01
    )


def test_bad_norms_are_left_out():
    """What is not finite, and 0, change nothing; any sequence or array will do."""
    norms = ordinary(np.random.default_rng(0), 400)
    expected = recommend_threshold(norms)
    more = [0.0, NAN, *norms.tolist(), INF, 0.0, NAN]

    for given in (more, tuple(more), np.array(more), jnp.array(more)):
        assert recommend_threshold(given).limit == pytest.approx(expected.limit, rel=1e-6)


def test_constant_norms():
    """Of a constant norm, the limit is that norm."""
    advice = recommend_threshold(np.full(400, 2.5))
    assert (advice.limit, advice.kind) == (pytest.approx(2.5), "steady")


@pytest.mark.parametrize(
    ("norms", "rate", "error", "words"),
    [
        ([1.0] * 399, 0.05, ValueError, "takes 400 norms that are finite and above 0"),
        ([NAN] * 400, 0.05, ValueError, "got 0"),
        ([1.0] * 400, 0, ValueError, "clip_rate must be > 0"),
        ([1.0] * 400, 0.6, ValueError, "clip_rate must be a number from 0 to 0.5"),
        ([1.0] * 400, NAN, ValueError, "clip_rate must be"),
        ([1.0] * 400, "0.1", TypeError, "clip_rate must be"),
        ([1.0] * 399 + [-1.0], 0.05, ValueError, "real numbers >= 0.*got -1"),
        (np.ones((20, 20)), 0.05, ValueError, "got an array of shape"),
        ("norms", 0.05, TypeError, "got str"),
        (None, 0.05, TypeError, "got NoneType"),
        (["1.0"] * 400, 0.05, TypeError, "got list"),
        ([[1.0], [1.0, 2.0]], 0.05, TypeError, "got list"),
        (optax.adam(0.1).init(jnp.ones(2)), 0.05, TypeError, "or an optimizer state"),
        (observe_norms().init(jnp.ones(2)), 0.05, ValueError, "takes 400 norms.*got 0"),
        (
            observe_norms(oc.measure.leaf_norm()).init([jnp.ones(2)] * 2),
            0.05,
            ValueError,
            "must keep one, that of the tree; this one has 2 at 'memory'",
        ),
    ],
)
def test_refused(norms, rate, error, words):
    """What no advice can be made of is refused in words."""
    with pytest.raises(error, match=words):
        recommend_threshold(norms, clip_rate=rate)


STREAM = [0.5, 2.0, 0.0, NAN, 40.0, INF, 1.0, *np.linspace(0.5, 3, 30), 40.0]
CLIPPERS = {
    "clip_by_global_norm": oc.clip_by_global_norm,
    "normalize_by_global_norm": oc.normalize_by_global_norm,
    "clip_by_percentile": lambda: oc.clip_by_percentile(window=8, min_history=2),
    "autoclip": lambda: oc.autoclip(window=8),
    "clip_by_quantile": oc.clip_by_quantile,
    "zclip": lambda: oc.zclip(warmup=3),
    "clip_by_sigma": lambda: oc.clip_by_sigma(window=8, min_history=2),
    "clip_by_ema_ratio": lambda: oc.clip_by_ema_ratio(warmup=2, measure=oc.measure.global_norm()),
    "in a chain": lambda: optax.chain(oc.clip_by_global_norm(1.0), optax.scale(0.5)),
    "propagate": lambda: oc.clip_by_global_norm(nonfinite="propagate"),
    "order inf": lambda: oc.clip_by_global_norm(ord=INF),
    "order inf, propagate": lambda: oc.clip_by_global_norm(ord=INF, nonfinite="propagate"),
}


@pytest.mark.parametrize("name", CLIPPERS)
def test_replay(name):
    """A replay is what the clipper does to a tree of several leaves with these norms, by steps."""
    tx, direction = CLIPPERS[name](), {"a": jnp.array([0.6, -0.48]), "b": jnp.array([0.64])}
    direction = jax.tree.map(lambda x: x / (0.64 if "order" in name else 1), direction)
    step, state = jax.jit(tx.update), tx.init(direction)

    done = replay(STREAM, tx)

    for i, norm in enumerate(STREAM):
        grads = jax.tree.map(lambda x, n=norm: x * np.float32(n), direction)
        _, state = step(grads, state, direction)
        now = oc.metrics(state)
        for field in ("limit", "factor", "clipped_norm"):
            # The norm of a tree is a sum, which is rounded a few times.
            np.testing.assert_allclose(getattr(done, field)[i], now[field], 1e-5, 1e-6)
        assert done.clipped[i] == (now["clipped"] > 0)
    assert done.clipped.dtype == bool
    assert done.limit.shape == (len(STREAM),)


def test_replay_of_a_fixed_limit():
    """Of a fixed limit, a replay is min(norm, limit), and zero for what is not finite."""
    done = replay(STREAM, oc.clip_by_global_norm(1.5))

    finite = np.isfinite(STREAM)
    expected = np.where(finite, np.minimum(STREAM, 1.5), 0)
    np.testing.assert_allclose(done.clipped_norm, expected, 2e-7)
    assert done.clipped.tolist() == (finite & (np.array(STREAM) > 1.5)).tolist()
    assert replay([], oc.clip_by_global_norm(1.5)).limit.shape == (0,)


def test_replay_of_a_norm_beyond_float32():
    """It is inf there, without a warning."""
    assert replay([1e39, 1.0], oc.clip_by_global_norm(1.5)).factor.tolist() == [0, 1]


@pytest.mark.parametrize(
    ("norms", "clipper", "error", "words"),
    [
        ([1.0], oc.clip_by_norm(nonfinite="propagate"), ValueError, "clipper must have one norm"),
        ([1.0], oc.clip_by_norm(), ValueError, "clipper must have one norm"),
        ([1.0], oc.clip_by_value(), ValueError, "clipper must have one norm"),
        ([1.0], oc.adaptive_grad_clip(), ValueError, "clipper must have one norm"),
        ([1.0], oc.clip_by_global_norm(record=False), ValueError, "got no metrics"),
        (
            [1.0],
            optax.chain(oc.zclip(), oc.autoclip()),
            ValueError,
            "one clip.*got those of 0/norm",
        ),
        ([1.0], oc.skip_step(optax.sgd(0.1)), ValueError, "one clip"),
        ([1.0], optax.sgd(0.1), ValueError, "no clip of optaxclip"),
        ([1.0], 1.0, TypeError, "clipper must be a GradientTransformation"),
        ([-1.0], oc.zclip(), ValueError, "real numbers >= 0.*got -1"),
        (None, oc.zclip(), TypeError, "got NoneType"),
    ],
)
def test_replay_refused(norms, clipper, error, words):
    """What cannot be replayed on one norm per step is refused in words."""
    with pytest.raises(error, match=words):
        replay(norms, clipper)


def test_advice_holds_in_a_replay():
    """Replayed with the advised limit, the share of clipped steps is the one that was asked."""
    norms = ordinary(np.random.default_rng(0), 4000)
    done = replay(norms, oc.clip_by_global_norm(recommend_threshold(norms).limit))
    assert np.mean(done.clipped) == pytest.approx(0.05, abs=0.001)


def test_history_is_one():
    """An observer's history by itself is a state too."""
    state = observed()(jnp.asarray(ordinary(np.random.default_rng(0), 4000), jnp.float32))
    assert isinstance(state[0].memory, NormHistory)
    assert recommend_threshold(state[0].memory).limit == recommend_threshold(state).limit
