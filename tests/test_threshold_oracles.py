"""Thresholds against their oracles: 300 norms, all arguments, all sizes, all shapes."""

import functools

import jax
import jax.numpy as jnp
import limits as oracle
import numpy as np
import pytest
from limits import RULES

from optaxclip import threshold
from optaxclip.threshold.feed import FEEDS
from optaxclip.threshold.zscore import MODES

STEPS = 300
RTOL = 5e-6  # measured: 1e-6
# What amplifies rounding. A quantile multiplies itself 300 times by the same exp, which float32 has
# to one unit of 2^-23; measured: 1.4e-5. A percentile's place among 300 norms is rounded by up to
# 1.5e-5 of the distance to the next one, which in a burst is as large as the limit; measured: 1e-5.
RTOLS = {"quantile": STEPS * 2.0**-23, "percentile": 2e-5}

CASES = [
    *RULES.values(),
    lambda t: t.percentile(10.0, window=50, min_history=1, with_current=True),
    lambda t: t.percentile(90.0, window=40, min_history=40, with_current=True),
    lambda t: t.percentile(50.0, window=20, min_history=20),
    lambda t: t.percentile(0.0, window=1, min_history=1),
    lambda t: t.percentile(100.0, window=30),
    lambda t: t.quantile(0.5, rate=0.2, initial=0.1, margin=0.0),
    lambda t: t.quantile(0.75, rate=0.1, warmup=3, margin=0.5),
    lambda t: t.quantile(0.0),
    lambda t: t.quantile(1.0),
    *(lambda t, m=m, f=f: t.zscore(2.5, mode=m, feed=f) for m in MODES for f in FEEDS),
    lambda t: t.zscore(2.5, start="mean"),
    lambda t: t.zscore(2.5, decay=0.9, warmup=6, feed="clipped", start="mean", min_sigma=0.0),
    lambda t: t.zscore(2.0, decay=0.0, warmup=1, min_sigma=0.2),
    lambda t: t.sigma(3.0, feed="raw"),
    lambda t: t.sigma(3.0, start="mean"),
    lambda t: t.sigma(3.0, window=64, feed="raw", min_history=32, start="mean", min_sigma=0.0),
    lambda t: t.sigma(2.0, window=8, min_history=8, min_sigma=0.5),
    lambda t: t.ema_ratio(1.05, decay=0.98, warmup=100),
    lambda t: t.ema_ratio(1.5, decay=0.0, warmup=1),
    lambda t: t.growth(1.0),
    lambda t: t.growth(1.5, floor=2.0),
    lambda t: t.second_moment(3.0, feed="clipped"),
    lambda t: t.second_moment(3.0, feed="raw"),
    lambda t: t.second_moment(30.0, decay=0.99, warmup=1, floor=15.0),
    lambda t: t.second_moment(2.0, decay=0.0, warmup=1),
    lambda t: t.second_moment(3.0, decay=0.9, warmup=150),
    lambda t: t.moment_ratio(bias_correction=False),
    lambda t: t.moment_ratio(0.9, 0.99),
    lambda t: t.moment_ratio(0.0, 0.5),
    lambda t: t.bounded(t.ema_ratio(2.0)),
    lambda t: t.bounded(t.relearning(t.growth(1.01), patience=6), max_norm=2.0),
    lambda t: t.relearning(t.bounded(t.growth(1.01), max_norm=2.0), patience=6),
    # That of auto_clip.
    lambda t: t.bounded(
        t.multiple(t.percentile(50.0, window=128, min_history=1), ratio=1.5), max_norm=1.0
    ),
    lambda t: t.relearning(t.growth(1.01), patience=1),
    lambda t: t.relearning(t.growth(1.01), patience=5),
    lambda t: t.relearning(t.growth(1.01), patience=6),
    lambda t: t.relearning(t.relearning(t.growth(1.01)), patience=4),
    lambda t: t.relearning(t.zscore(2.5, feed="clipped"), patience=20),
    lambda t: t.relearning(t.ema_ratio(1.5, warmup=4), patience=5),
    lambda t: t.relearning(t.quantile(0.9), patience=3),
    lambda t: t.relearning(t.percentile(95.0), patience=6),
    lambda t: t.relearning(t.sigma(3.0, min_history=3), patience=5),
]


class Spelled:
    """Stands for t in a case and writes it out, as the name of its test."""

    def __getattr__(self, name):
        def call(*args, **options):
            arguments = [*map(str, args), *(f"{key}={value}" for key, value in options.items())]
            return f"{name}({', '.join(arguments)})"

        return call


def stream(seed=0):
    """Norms as in training that drift by 2, with each kind of event that a rule must survive."""
    norms = np.exp(0.2 * np.random.default_rng(seed).normal(size=STEPS))
    norms[5] *= 10  # in every warm-up
    norms[60] *= 30
    norms[90:95] *= 10
    norms[120:] *= 3
    norms[200:] /= 5
    return np.float32(norms * np.linspace(1, 2, STEPS))


def check(found, expected, name):
    """Limits are those of the oracle, as closely as the rule allows."""
    rtol = max([RTOL, *(rtol for rule, rtol in RTOLS.items() if rule in name)])
    np.testing.assert_allclose(found, expected, rtol, err_msg=name)


def run(rules, norms):
    """The limits of several thresholds for one stream, each with its last memory: one program."""

    def step(memories, norm):
        pairs = [rule.update(norm, memory) for rule, memory in zip(rules, memories, strict=True)]
        limits, memories = zip(*pairs, strict=True)
        return memories, limits

    memories, limits = jax.lax.scan(step, tuple(rule.init(norms[0]) for rule in rules), norms)
    return list(zip(limits, memories, strict=True))


# Float32 holds the squares of neither: those of 1e-30 are 0, and the largest spike of the stream
# times 5e17 is just below 2^64, from where on squares are inf.
SIZES = (1.0, 1e-30, 5e17)


@functools.cache
def sized():
    """A stream of each size, side by side, and what every case makes of them."""
    norms = np.stack([np.float32(size * np.float64(stream())) for size in SIZES], axis=1)
    return np.float64(norms), jax.jit(lambda x: run([case(threshold) for case in CASES], x))(norms)


@pytest.mark.parametrize("which", range(len(SIZES)), ids=[f"{size:g}" for size in SIZES])
@pytest.mark.parametrize("i", range(len(CASES)), ids=[case(Spelled()) for case in CASES])
def test_equals_its_oracle(i, which):
    """A threshold does what its equation says at every step, for norms of any size."""
    norms, found = sized()
    limits, memory = found[i]

    expected = CASES[i](oracle)(norms[:, which])

    check(limits[:, which], expected, CASES[i](Spelled()))
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(memory))


def test_every_threshold_has_an_oracle():
    """What the package offers is in the table, except for what is in no need of an oracle."""
    public = {name for name in vars(threshold) if callable(getattr(threshold, name))}

    # That of `outlier`, which learns what `skip_step` takes, is in test_skipping_golden.py.
    assert public - set(RULES) == {"Clock", "Threshold", "constant", "outlier", "until"}


def test_thresholds_are_elementwise():
    """Several groups, of any shape, have the limits that each of them has alone."""
    rules = [rule(threshold) for rule in RULES.values()]
    limits = jax.jit(lambda norms: [limit for limit, _ in run(rules, norms)])
    # Rolled, so that no two groups are in a warm-up, a burst or a rise at the same time.
    groups = np.stack([np.roll(stream(g), 70 * g) for g in range(4)], axis=1)

    alone = [np.stack(limit, axis=1) for limit in zip(*map(limits, groups.T), strict=True)]

    for shape, some in [((3,), groups[:, :3]), ((2, 1, 2), groups)]:
        together = limits(some.reshape(STEPS, *shape))
        for name, found, each in zip(RULES, together, alone, strict=True):
            expected = each[:, : some.shape[1]].reshape(STEPS, *shape)
            np.testing.assert_allclose(found, expected, 1e-6, err_msg=name)


# Values that float32 holds exactly, so that the oracle has the same.
DECAYS = np.float32([0.9375, 0.96875])
TRACED = [
    (lambda t, x: t.percentile(x), np.float32([50, 95])),
    (lambda t, x: t.percentile(95.0, min_history=x), np.int32([5, 30])),
    (lambda t, x: t.quantile(x), np.float32([0.5, 0.875])),
    (lambda t, x: t.quantile(0.9, rate=x), np.float32([0.0625, 0.25])),
    (lambda t, x: t.quantile(0.9, warmup=x), np.int32([2, 20])),
    (lambda t, x: t.quantile(0.9, margin=x), np.float32([0, 0.5])),
    (lambda t, x: t.quantile(0.9, initial=x), np.float32([0.5, 2])),
    (lambda t, x: t.zscore(x), np.float32([2, 3])),
    (lambda t, x: t.zscore(2.5, decay=x), DECAYS),
    (lambda t, x: t.zscore(2.5, min_sigma=x), np.float32([0, 0.25])),
    (lambda t, x: t.sigma(x), np.float32([2, 3])),
    (lambda t, x: t.sigma(3.0, min_history=x), np.int32([3, 30])),
    (lambda t, x: t.sigma(3.0, min_sigma=x), np.float32([0, 0.25])),
    (lambda t, x: t.ema_ratio(x), np.float32([1.5, 2])),
    (lambda t, x: t.ema_ratio(2.0, decay=x), DECAYS),
    (lambda t, x: t.ema_ratio(2.0, warmup=x), np.int32([1, 30])),
    (lambda t, x: t.growth(x), np.float32([1.0625, 2])),
    (lambda t, x: t.multiple(t.growth(1.5), ratio=x), np.float32([0.5, 2])),
    (lambda t, x: t.growth(1.5, floor=x), np.float32([0, 2])),
    (lambda t, x: t.second_moment(x), np.float32([2, 3])),
    (lambda t, x: t.second_moment(3.0, decay=x), DECAYS),
    (lambda t, x: t.second_moment(3.0, warmup=x), np.int32([1, 30])),
    (lambda t, x: t.second_moment(3.0, floor=x), np.float32([0, 4])),
    (lambda t, x: t.moment_ratio(x), DECAYS),
    (lambda t, x: t.moment_ratio(0.6, x), DECAYS),
    (lambda t, x: t.bounded(t.growth(1.5), min_norm=x), np.float32([1, 2])),
    (lambda t, x: t.bounded(t.growth(1.5), max_norm=x), np.float32([1, 2])),
    (lambda t, x: t.relearning(t.growth(1.01), patience=x), np.int32([4, 6])),
    (lambda t, x: t.relearning(t.growth(x), patience=6), np.float32([1.0625, 2])),
]


def test_arguments_may_be_traced():
    """Each number may be traced: vmap over its values gives what each of them gives by itself."""
    norms = stream()

    @jax.jit
    @jax.vmap
    def swept(values):
        rules = [make(threshold, x) for (make, _), x in zip(TRACED, values, strict=True)]
        return [limit for limit, _ in run(rules, jnp.asarray(norms))]

    for (make, values), found in zip(TRACED, swept([x for _, x in TRACED]), strict=True):
        expected = [make(oracle, x)(np.float64(norms)) for x in values.tolist()]
        check(found, expected, make(Spelled(), values))
