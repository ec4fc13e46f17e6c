"""Every published rule that sets its own limit, in its paper's setting, against its reference.

The files hold what reference code answered, mostly in float64, to streams of norms. Which numbers
are no such thing, and which are what a clip must not do, stands in the tables below.
"""

import functools
import json
import math
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optaxclip as oc
from optaxclip import measure, scale, threshold

GOLDEN = pathlib.Path(__file__).parent / "golden"
# A few dozen roundings to float32, of 6e-8 each. The 1e-8 that Paddle, Fira and AdaGN add to what
# they divide by is less.
FLOAT32 = 2e-6
# What torch's clip_grad_norm_ adds to a norm; it is taken back out of the numbers.
TORCH = 1e-6
# ZClip adds 1e-6 to sigma, which moves the limit of an outlier by less than z* 1e-6.
SIGMA = 1e-5
UNIT = np.array([0.5, -0.5, 0.5, 0.5])  # a gradient is this times its norm, exactly
LENGTH = 32  # all streams are continued to it, so that those in one setting share one program


def golden(file):
    """The cases of one file."""
    return json.loads((GOLDEN / f"{file}.json").read_text())["cases"]


def table(rows):
    """Rows of numbers in float64: "nan" and "inf" are read, and null, undefined, is NaN."""
    return np.array(rows, object).astype(np.float64)


def usable(norms):
    """Whether a norm is one that a statistic may learn."""
    return np.isfinite(norms) & (norms > 0)


def scanned(tx, grads):
    """The last state, and the updates and states of every step."""

    def step(state, grad):
        updates, state = tx.update(grad, state)
        return state, (updates, state)

    return jax.lax.scan(step, tx.init(jax.tree.map(lambda x: x[0], grads)), grads)


@functools.partial(jax.jit, static_argnums=(0, 1))
def compiled(make, static, traced, grads):
    """Updates and states of what `make` builds: one program for all values that are traced."""
    return scanned(make(**dict(static), **traced), grads)[1]


def run(make, settings, grads, traced=()):
    """The updates and states of every step, for a tree of gradients with the steps in front."""
    hashable = lambda x: tuple(x) if isinstance(x, list) else x
    static = tuple((k, hashable(v)) for k, v in sorted(settings.items()) if k not in traced)
    arrays = {k: jnp.float32(settings[k]) for k in traced if k in settings}
    return compiled(make, static, arrays, jax.tree.map(continued, grads))


def continued(x):
    """A stream in float32, and ones after it."""
    ones = np.ones((LENGTH - len(x), *x.shape[1:]), np.float32)
    return jnp.array(np.concatenate([x.astype(np.float32), ones]))


# ------------------------------------------------------------- rules that look at norms alone


def adagc(*, beta, T_start=None, start_clip_steps=None, convention=None, **settings):
    """AdaGC of the paper, or of Paddle, whose warm-up takes one step more than it says."""
    paper = convention is not None
    return oc.adagc(
        settings["lambda_rel" if paper else "clip_ratio"],
        decay=beta,
        warmup=T_start - 1 if paper else start_clip_steps + 1,
        max_norm=settings.get("lambda_abs", 1.0),
        convention="paper" if paper else "paddle",
        patience=math.inf,
    )


def autoclip(*, percentile):
    """AutoClip, which keeps all norms: more than there are here."""
    return oc.autoclip(percentile, window=LENGTH, patience=math.inf)


def growth():
    """Fira's limiter, whose factor is fixed."""
    return oc.clip_by_norm_growth(1.01)


def levanter(*, rolling_interval_length, sigma_factor):
    """Levanter's clip by the history of norms."""
    limit = threshold.sigma(
        sigma_factor,
        window=rolling_interval_length,
        feed="raw",
        min_history=rolling_interval_length // 2,
        start="mean",
        min_sigma=1e-6,  # an absolute floor there, which is the same for norms of mean 1
    )
    return oc.clip(measure.global_norm(), limit)


def olmo(*, max_grad_norm_ratio, betas):
    """OLMo's ratio to the running average of each leaf."""
    limit = threshold.ema_ratio(max_grad_norm_ratio, decay=max(betas), warmup=1)
    return oc.clip(measure.leaf_norm(), limit)


def quantile(*, init, target_quantile, lr, geometric):
    """The quantile that is followed by factors."""
    assert geometric
    limit = threshold.quantile(target_quantile, rate=lr, initial=init, margin=0.0)
    return oc.clip(measure.global_norm(), limit)


def stabilizer(*, gamma1, gamma2, bias_correction):
    """GradientStabilizer on the whole tree."""
    ratio = threshold.moment_ratio(gamma1, gamma2, bias_correction=bias_correction)
    return oc.clip(measure.global_norm(), ratio, scale.normalize)


def trellis(*, max_norm, clip_percentile, buffer_size):
    """TRELLIS's clipper, which has no limit of its own before its buffer is full."""
    return oc.clip_by_percentile(
        clip_percentile,
        window=buffer_size,
        min_history=buffer_size,
        patience=math.inf,
        max_norm=max_norm,
    )


# The defaults of its authors' code, which the file leaves out.
ZCLIP = {
    "warmup_steps": 25,
    "alpha": 0.97,
    "z_thresh": 2.5,
    "mode": "zscore",
    "clip_option": "adaptive_scaling",
    "skip_update_on_spike": False,
    "max_grad_norm": 1.0,
}


def zclip(*, warmup_steps, alpha, z_thresh, mode, clip_option, skip_update_on_spike, max_grad_norm):
    """ZClip, with the arguments of its authors' code."""
    modes = {"adaptive_scaling": "reciprocal", "mean": "mean", "percentile": "sigma"}
    limit = threshold.zscore(
        z_thresh,
        decay=alpha,
        warmup=warmup_steps,
        mode=modes[clip_option if mode == "zscore" else mode],
        feed="skip" if skip_update_on_spike else "clipped",
        start="mean",
        min_sigma=0.0,
    )
    return oc.clip(measure.global_norm(), threshold.bounded(limit, max_norm=max_grad_norm))


class Rule(NamedTuple):
    """How a rule is made of the settings in its file, and what its reference kept."""

    make: Callable[..., optax.GradientTransformation]
    statistics: dict[str, Callable[[Any], Any]]  # column of the file -> the same, of our states
    defaults: dict[str, Any] | None = None
    traced: tuple[str, ...] = ()  # settings that need no program of their own
    eps: float = 0.0  # what the reference adds to a norm before it divides by it
    unkept: int = 0  # rows before the reference remembers anything
    close: float = FLOAT32


RULES = {
    "adagc": Rule(
        adagc,
        {"gamma": lambda s: s.leaf.memory.threshold.threshold.average},
        traced=("clip_ratio", "beta"),
    ),
    "autoclip": Rule(
        autoclip,
        {"threshold": lambda s: s.metrics.limit},
        traced=("percentile",),
        eps=TORCH,
        close=5e-6,  # the place between two norms, such as 10 and 50, is off by 1e-6
    ),
    "gradient_stabilizer": Rule(
        stabilizer,
        {
            "rho": lambda s: s.metrics.limit,
            "m": lambda s: s.memory.mean,
            "v": lambda s: np.square(s.memory.root),
        },
    ),
    "levanter_clip_historical": Rule(levanter, {}),
    "norm_growth_limiter": Rule(growth, {"state": lambda s: s.memory.threshold.previous}),
    "olmo_max_grad_norm_ratio": Rule(
        olmo, {"exp_avg": lambda s: s.memory.average}, eps=TORCH, unkept=1
    ),
    "quantile_geometric": Rule(
        quantile,
        {
            "threshold_used": lambda s: s.metrics.limit,
            "threshold_next": lambda s: s.memory.estimate,
        },
        traced=("target_quantile",),
    ),
    "trellis_percentile": Rule(
        trellis,
        {"max_norm_next": lambda s: s.metrics.limit[1:]},
        traced=("max_norm", "clip_percentile"),
        eps=TORCH,
    ),
    "zclip": Rule(
        zclip,
        {
            "mean": lambda s: s.memory.threshold.mean,
            "var": lambda s: np.square(s.memory.threshold.deviation),
        },
        defaults=ZCLIP,
        traced=("alpha", "z_thresh", "max_grad_norm"),
        eps=TORCH,
        close=SIGMA,
    ),
}

# Cases that are not norms, step by step, under a rule that is here.
NO_STREAM = {
    ("adagc", "paper_step_change_x2"): "a stream told in words, which has a test of its own",
    ("gradient_stabilizer", "bound_rho_bar_0.6_0.999"): "a bound, which has a test of its own",
    ("gradient_stabilizer", "bound_rho_bar_0.7_0.9"): "a bound, which has a test of its own",
    ("quantile_geometric", "batch4_q0.5_lr0.2"): "learns from the norms of a batch at once",
    ("quantile_geometric", "batch4_q0.9_lr0.2_arith"): "the same, in steps that are added",
    ("zclip", "clip_factor_0.7"): "multiplies the whole limit, mean included: no counterpart here",
}

# Cases whose numbers, from the bad norm on, are what a clip must not do, and what that is.
POISONED = {
    ("adagc", "paddle_nan"): "gamma is NaN: the leaf is never clipped again",
    ("autoclip", "inf_in_history_p50"): "the inf counts as a norm above the median",
    ("autoclip", "inf_in_history_p95"): "the percentile is NaN, and so is every update",
    ("autoclip", "nan_in_history_p50"): "the percentile is NaN, and so is every update",
    ("autoclip", "zeros_p50"): "the median is 0: zero updates until half of the norms are new",
    ("levanter_clip_historical", "nan"): "mean and deviation are NaN: nothing is clipped",
    ("norm_growth_limiter", "inf"): "the previous norm is NaN, and so is every update",
    ("norm_growth_limiter", "nan"): "the previous norm is NaN, and so is every update",
    ("norm_growth_limiter", "zero_first"): "the previous norm is 0: begins again from 1e-8",
    ("norm_growth_limiter", "zero_mid"): "the previous norm is 0: begins again from 1e-8",
    ("olmo_max_grad_norm_ratio", "nan"): "the average is NaN, and so is every update",
    ("olmo_max_grad_norm_ratio", "zero_first_deadlock"): "the average is 0: zero updates for ever",
    ("zclip", "inf_after_warmup"): "the inf counts as a norm equal to the mean",
    ("zclip", "inf_after_warmup_max1"): "the inf counts as a norm equal to the mean",
    ("zclip", "nan_after_warmup"): "the mean is NaN: never clips again",
    ("zclip", "nan_in_warmup"): "the mean is NaN: never clips",
    ("zclip", "zeros"): "the mean is 0: zero updates for ever",
}

# The same for a leaf without gradients while the global limit of the warm-up holds.
FROZEN = {
    ("adagc", "paddle_zero_leaf_in_warmup_deadlock"): "gamma is 0: zero updates for ever",
    ("adagc", "paper_zero_leaf_deadlock"): "gamma is 0: zero updates for ever",
}

STREAMS = {
    (file, name): case
    for file in RULES
    for name, case in golden(file).items()
    if (file, name) not in NO_STREAM
}


class Stream(NamedTuple):
    """One case, whichever way its file is written."""

    rule: Rule
    settings: dict[str, Any]
    norms: np.ndarray  # (steps, leaves)
    theirs: dict[str, np.ndarray]  # "factor" and statistics of the reference, as norms

    def ours(self, norms):
        """What the rule says to some norms here; the factor of a bad norm is the update itself."""
        grads = [column[:, None] * UNIT for column in norms.T]
        updates, states = run(self.rule.make, self.settings, grads, self.rule.traced)
        sizes = np.stack(updates, axis=1)[: len(norms)] @ UNIT
        found = {"factor": np.divide(sizes, norms, out=sizes, where=usable(norms))}
        for column, find in self.rule.statistics.items():
            values = np.asarray(find(states), np.float64)
            found[column] = values.reshape(-1, norms.shape[1])[: len(norms)]
        return found


def stream(key):
    """Reads a case."""
    rule, case = RULES[key[0]], STREAMS[key]
    case = {"steps": case} if isinstance(case, list) else case
    told = {k: v for k, v in case.items() if k not in ("steps", "norms", "config")}
    settings = (rule.defaults or {}) | told | case.get("config", {})
    settings = {k: math.inf if v is None else v for k, v in settings.items()}  # None: no limit
    rows = [leaves(row) for row in case["steps"]][rule.unkept :]
    column = lambda name: table([[leaf.get(name) for leaf in row] for row in rows])
    norms, factors = column("norm_in"), column("scale")
    # min(1, limit / (norm + eps)) becomes min(1, limit / norm).
    exact = factors * (1 + rule.eps / np.where(usable(norms), norms, 1))
    theirs = {"factor": np.where(factors < 1, np.minimum(exact, 1), factors)}
    theirs |= {name: column(name) for name in rule.statistics}
    return Stream(rule, settings, norms, theirs)


def leaves(row):
    """What a row says of each leaf."""
    if "norms" in row:
        (norm,), (factor,) = row["norms"], row["scales"]
        return [row | {"norm_in": norm, "scale": factor}]
    return row if isinstance(row, list) else row.get("leaves", [row])


@pytest.mark.parametrize("key", STREAMS, ids="-".join)
def test_equals_the_reference(key):
    """A rule gives the factors and statistics of its reference, up to a norm that poisons that."""
    case = stream(key)
    good = usable(case.norms)
    sound = np.logical_and.accumulate(good) if key in POISONED else good
    sound = sound & good.all(axis=0) if key in FROZEN else sound

    ours = case.ours(case.norms)

    assert sound.any() or not good[0].all()
    assert not np.isnan(case.theirs["factor"][sound]).any()
    for column, theirs in case.theirs.items():
        known = sound & ~np.isnan(theirs)
        np.testing.assert_allclose(
            ours[column][known], theirs[known], case.rule.close, err_msg=column
        )
    assert not ours["factor"][~good].any()


@pytest.mark.parametrize("key", POISONED, ids="-".join)
def test_a_bad_norm_leaves_no_trace(key):
    """After a norm of 0, inf or NaN a rule is what it is without, and its reference is not."""
    case = stream(key)
    good = usable(case.norms)
    (leaf,) = np.flatnonzero(~good.all(axis=0))
    kept = good[:, leaf]
    after = ~np.logical_and.accumulate(kept)[kept]

    ours = case.ours(case.norms)
    without = case.ours(case.norms[kept])

    assert after.any()
    poisoned = np.zeros_like(after)
    for column, theirs in case.theirs.items():
        found = ours[column][kept, leaf]
        np.testing.assert_array_equal(found, without[column][:, leaf], column)
        poisoned |= ~np.isclose(theirs[kept, leaf], found, case.rule.close, 0)
    assert poisoned[after].any()


@pytest.mark.parametrize("key", FROZEN, ids="-".join)
def test_a_leaf_without_gradients_warms_up_later(key):
    """The first norms of a leaf pass and set its scale whenever they come."""
    case = stream(key)
    later = usable(case.norms[:, 0])

    ours = case.ours(case.norms)

    np.testing.assert_array_equal(ours["factor"][later, 0], [1, 1, 1])
    np.testing.assert_array_equal(ours["gamma"][later, 0], [1, 1, 1])
    np.testing.assert_array_equal(case.theirs["factor"][later, 0], [0, 0, 0])


@pytest.mark.parametrize("gammas", [(0.6, 0.999), (0.7, 0.9)], ids=str)
def test_stabilizer_stays_below_its_bound(gammas):
    """Norms that rise by gamma_2 / gamma_1 per step reach the largest ratio that there is."""
    bound = golden("gradient_stabilizer")["bound_rho_bar_{}_{}".format(*gammas)]
    settings = {"gamma1": gammas[0], "gamma2": gammas[1], "bias_correction": False}
    norms = (gammas[1] / gammas[0]) ** np.arange(LENGTH)

    _, states = run(stabilizer, settings, norms[:, None] * UNIT)

    # The bound is a geometric series of (gamma_1^2 / gamma_2)^n, less than 1e-8 beyond LENGTH.
    assert states.metrics.limit.max() == pytest.approx(bound, rel=FLOAT32, abs=0)


# ---------------------------------------------------------- streams of thousands of norms


@functools.partial(jax.jit, static_argnums=0)
def histories(tx, norms):
    """The factors for norms of shape (streams, steps), and what each stream left behind."""

    def one(norms):
        state, (updates, _) = scanned(tx, norms)
        return updates / norms, state

    return jax.vmap(one)(norms.astype(jnp.float32))


def test_adagc_after_a_rise_by_two():
    """AdaGC clips 645 norms of 2 after norms of 1, because it learns what it clipped."""
    case = golden("adagc")["paper_step_change_x2"]
    norms = np.concatenate([np.full(10, 1.0), np.full(1500, 2.0)])

    factors, _ = histories(adagc(**case["config"]), norms[None])

    (clipped,) = np.nonzero(factors[0] < 1)
    assert len(clipped) == case["steps_clipped"]
    assert clipped[-1] + 1 == case["first_unclipped_step_index"]


STEPS, LAST, SEEDS = 3600, 1000, 5  # how many norms, how many of them are judged, streams per case
SHIFT = 600  # the step from which norms are higher for ever

# The rules of the file, in its words and in ours.
LOCKS = {
    "zscore_adaptive_scaling(default)": {"mode": "reciprocal", "feed": "clipped"},
    "zscore_mean": {"mode": "mean", "feed": "clipped"},
    "percentile": {"mode": "sigma", "feed": "clipped"},
    "adaptive_scaling_but_EMA_fed_min(n,mu+z*sigma)": {"mode": "reciprocal", "feed": "capped"},
}
BURSTS = {"reference": "zscore_adaptive_scaling(default)", "capped_feed": list(LOCKS)[-1]}


def lognormal(seed):
    """The noise that both files name: the bits of NumPy's default generator."""
    return np.random.default_rng(seed).lognormal(0, 0.1, STEPS)


def with_bursts():
    """One spike of 10, a burst of 5 and one of 20."""
    norms = lognormal(0)
    for spikes in (slice(600, 601), slice(700, 705), slice(800, 820)):
        norms[spikes] *= 10
    return norms


def rise(name):
    """What the norms of a case are multiplied by, step by step."""
    factors = np.ones(STEPS)
    if " step x" in name:
        factors[SHIFT:] = float(name.rpartition("x")[2])
        return factors
    steps = int(name.rpartition(" ")[2])  # "default ramp x2 over ..."
    factors[SHIFT : SHIFT + steps] = np.linspace(1, 2, steps)
    factors[SHIFT + steps :] = 2
    return factors


def cases_of(rule):
    """The cases of one rule; ramps are told of the default alone."""
    names = (f"{rule} step x", "default ramp" if "(default)" in rule else f"{rule} step x")
    return {k: v for k, v in golden("zclip_level_shift_lock").items() if k.startswith(names)}


@functools.cache
def long_runs(rule):
    """Factors and last sigma of ZClip's rule: the stream with bursts first, then every case's."""
    norms = [with_bursts()]
    norms += [lognormal(seed) * rise(name) for name in cases_of(rule) for seed in range(SEEDS)]
    limit = threshold.zscore(2.5, start="mean", min_sigma=0.0, **LOCKS[rule])
    factors, state = histories(oc.clip(measure.global_norm(), limit), np.stack(norms))
    return np.asarray(factors, np.float64), np.asarray(state.memory.deviation)


@pytest.mark.parametrize("name", BURSTS)
def test_zclip_in_bursts(name):
    """Spikes in bursts are cut as by ZClip, and as was computed for a capped feed."""
    case = golden("zclip_capped_feed_spikes")[name]
    theirs = [case["spike"], *case["burst5"], *case["burst20_first_last"]]

    factors = long_runs(BURSTS[name])[0][0]

    np.testing.assert_allclose(factors[[600, *range(700, 705), 800, 819]], theirs, SIGMA)
    mean = case["mean_scale_50_after_burst20"]
    assert factors[820:870].mean() == pytest.approx(mean, rel=SIGMA, abs=0)


@pytest.mark.parametrize("rule", LOCKS)
def test_zclip_after_a_lasting_rise(rule):
    """Rises that ZClip clips for ever are those of its reference; under a capped feed, none is."""
    factors, sigmas = long_runs(rule)
    cases = cases_of(rule)

    factors = factors[1:, -LAST:].reshape(len(cases), SEEDS, LAST)
    clipped = factors < 0.999  # as they were counted
    for i, case in enumerate(cases.values()):
        assert (clipped[i].mean(axis=1) > 0.9).sum() == case["locked_of_5_seeds"]
        assert clipped[i].mean() == pytest.approx(case["mean_frac_clipped_last_1000"], abs=1e-9)
        assert factors[i].mean() == pytest.approx(case["mean_scale_last_1000"], rel=SIGMA, abs=0)
        if "sigma_last" in case:
            # Locked, sigma shrinks at every step by a factor that is rounded to float32.
            close = STEPS * 2.0**-24 if case["locked_of_5_seeds"] else SIGMA
            sigma = sigmas[1:].reshape(len(cases), SEEDS)[i]
            np.testing.assert_allclose(sigma, case["sigma_last"], close)


# ------------------------------------------------- rules that look at coordinates or parameters


def spam(*, theta, grad_accu_steps):
    """SPAM's clip, whose v is not divided by 1 - beta^t, and which passes its first steps."""
    # expm1, because in float32 the difference 1 - 0.999^t is off by 6e-5, as is the decay itself.
    unseen = lambda step: -jnp.expm1(step.astype(jnp.float32) * math.log(0.999))
    make = optax.inject_hyperparams(
        oc.clip_by_second_moment, static_args=("decay", "patience", "warmup")
    )
    return make(
        lambda step: jnp.sqrt(theta * unseen(step)),
        decay=0.999,
        warmup=grad_accu_steps - 1,
        feed="clipped",
        patience=math.inf,
    )


class Spam(NamedTuple):
    """One case of SPAM, up to its first reset of moments, which is no clip."""

    theta: float
    grads: np.ndarray  # (steps, coordinates), and so the others
    theirs: np.ndarray
    their_v: np.ndarray  # before the step
    ours: np.ndarray
    our_v: np.ndarray  # after it


def spam_case(name):
    """Reads a case and runs it."""
    case = golden("spam")[name]
    config = case["config"]
    rows = case["steps"][: config["DeltaT"] - 1]
    column = lambda name: table([row[name] or [0.0] * 3 for row in rows])
    grads = column("grad_in")
    settings = {"theta": config["threshold"], "grad_accu_steps": config["grad_accu_steps"]}
    with jax.numpy_dtype_promotion("standard"):  # inject_hyperparams needs it
        updates, states = run(spam, settings, grads, traced=("theta",))
    (memory,) = states.inner_state.memory
    return Spam(
        config["threshold"],
        grads,
        column("grad_clipped"),
        column("v_prev"),
        np.asarray(updates)[: len(rows)],
        np.square(np.asarray(memory.threshold.root, np.float64))[: len(rows)],
    )


@pytest.mark.parametrize("name", golden("spam"))
def test_spam(name):
    """Coordinates are clipped, and their v is, as by SPAM, up to one that poisons it."""
    case = spam_case(name)
    sound = np.logical_and.accumulate(usable(np.abs(case.grads)))

    np.testing.assert_allclose(case.ours[sound], case.theirs[sound], FLOAT32)
    np.testing.assert_allclose(case.our_v[:-1][sound[:-1]], case.their_v[1:][sound[:-1]], FLOAT32)


def test_spam_after_a_nan():
    """A coordinate that was NaN is limited by what it was before; in SPAM it has no limit left."""
    case = spam_case("nan")
    bad = 5  # the step of the NaN, in the first of the coordinates
    # In the step of the NaN nothing is learned, but k = sqrt(theta (1 - 0.999^t)) goes on.
    v = case.their_v[bad, 0] * (1 - 0.999 ** (bad + 1)) / (1 - 0.999**bad)

    assert np.isnan(case.grads[bad, 0])
    assert case.ours[bad, 0] == 0
    assert case.ours[bad + 1, 0] == pytest.approx(math.sqrt(case.theta * v), rel=FLOAT32, abs=0)
    assert case.theirs[bad + 1, 0] == case.grads[bad + 1, 0]


def test_spam_after_zeros():
    """The first gradient of a coordinate passes; in SPAM the coordinate stays 0."""
    case = spam_case("first_nonzero_coordinate_after_zero_history")
    (first,) = np.flatnonzero(case.grads[:, 1])

    assert case.ours[first, 1] == np.float32(case.grads[first, 1])
    assert case.theirs[first, 1] == 0


ADAGN = [
    name
    for name in golden("stable_spam")
    if name != "total_T10"  # its gamma_1 changes with the step
]


def adagn(*, gamma1, gamma2):
    """The second half of Stable-SPAM, for one leaf."""
    return oc.stabilize_gradients(gamma1, gamma2)


@pytest.mark.parametrize("name", ADAGN)
def test_stable_spam_adagn(name):
    """Gradients are normalised as by AdaGN, and after a bad norm as if it had not been."""
    case = golden("stable_spam")[name]
    settings = {"gamma1": 0.7, "gamma2": 0.9}
    settings |= {k: v for k, v in case["config"].items() if k in settings}
    column = lambda name: table([row[name] for row in case["steps"]])
    grads, m, v = (column(name) for name in ("grad_after_adaclip", "m_norm", "v_norm"))
    steps = np.arange(1, len(grads) + 1)
    good = usable(np.linalg.norm(grads, axis=1))
    sound = np.logical_and.accumulate(good)
    # After a reset of Adam's moments, from the second step on, its factor is off: it then corrects
    # m and v, which go on, by the steps since the reset.
    right = sound & (np.cumsum(column("counter") != steps) < 2)
    mean, square = m / (1 - settings["gamma1"] ** steps), v / (1 - settings["gamma2"] ** steps)

    updates, states = run(adagn, settings, grads)

    updates = np.asarray(updates)[: len(grads)]
    theirs = column("grad_after_adagn")
    np.testing.assert_allclose(updates[right], theirs[right], FLOAT32)
    for found, expected in (
        (states.memory.mean[: len(grads), 0], m),
        (states.memory.root[: len(grads), 0] ** 2, v),
        (np.linalg.norm(updates, axis=1) * np.sqrt(square), mean),
    ):
        np.testing.assert_allclose(found[sound], expected[sound], FLOAT32)
    assert not updates[~good].any()
    later = good & ~sound
    # In these, norms are all alike before and after, so that the ratio of their moments is 1.
    np.testing.assert_allclose(updates[later], np.tile([0.6, -0.8, 0], (later.sum(), 1)), FLOAT32)
    assert not np.isclose(theirs[later], updates[later], FLOAT32)[:, :2].any()


def test_stableadamw():
    """Updates, the RMS that limits them and the factor are those of optimi's StableAdamW."""
    rows = golden("stableadamw")["run"]
    column = lambda name: table([row[name] for row in rows])
    settings = {"b1": 0.9, "b2": 0.99, "eps": 1e-6}

    updates, states = run(oc.scale_by_stable_adam, settings, column("g"))

    metrics = states.clip.metrics
    # At lr = 1 a parameter changes by minus the update.
    for found, name in (
        (-updates, "delta"),
        (metrics.norm, "rms_g_over_sqrtv"),
        (metrics.factor, "lr_scale"),
    ):
        np.testing.assert_allclose(found[: len(rows)], column(name), FLOAT32)


# Rows that are not of this rule, or that do not say what they are of.
NO_CLIPPY = {
    ("tfrs_unit_tests", 5): "two references, the second one being for Adagrad's accumulator",
    ("tfrs_test_single_step_clip", 0): "the settings are not in the file",
}
# lambda_abs must be positive here, or a parameter of 0 could never move.
TINY = 1e-30


def clippy_rows():
    """By name and row: the update, the parameters, both lambdas and the factor."""
    found = {}
    for name, rows in golden("clippy").items():
        accumulator, w = np.full(2, 0.01), np.array([1.0, 2.0])  # of Adagrad, before the first row
        for i, row in enumerate(rows):
            if (name, i) in NO_CLIPPY:
                continue
            if "update" in row:
                (params,), (relative,) = row["param"], row["rel"]
                update, lambdas = table(row["update"]), (relative, row["abs"] or TINY)
            else:
                now = row["acc"] if name.endswith("standard_acc") else accumulator
                update = -0.1 * np.array(row["g"]) / np.sqrt(np.array(now) + 1e-7)
                params, lambdas = w, (0.5, 0.01)
                accumulator, w = np.array(row["acc"]), np.array(row["w"])
            params = np.broadcast_to(params, update.shape)
            found[name, i] = (update, params, *lambdas), float(row["scale"])
    return found


CLIPPY = clippy_rows()


@jax.jit
def clippy(update, params, relative, absolute):
    """The update after one step of Clippy."""
    tx = oc.clippy(relative, absolute=absolute)
    return tx.update(update, tx.init(params), params)[0]


@pytest.mark.parametrize("key", CLIPPY, ids=lambda key: "{}-{}".format(*key))
def test_clippy(key):
    """Updates are scaled as by Clippy, Adagrad's included; one that is not finite becomes 0."""
    (update, params, *lambdas), factor = CLIPPY[key]
    expected = factor * update if np.isfinite(update).all() else np.zeros_like(update)

    updates = clippy(*(jnp.asarray(x, jnp.float32) for x in (update, params, *lambdas)))

    np.testing.assert_allclose(updates, expected, FLOAT32, 2 * TINY)
