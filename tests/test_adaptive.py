"""The common table: what every clipper that sets its own limit must survive.

A new one joins by one row of `ADAPTIVE`. `rise` is after how many steps it passes a constant norm
that has risen by 20, and by 1000, for ever: measured here, repeated in its docstring where it is
more than the patience.
"""

import functools
import inspect
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import trees

import optaxclip as oc

STEPS = 2000
NOISE = 0.2  # of log norms, as in the measurements that the rules were found wanting with
SOON, LATER = 50, 300  # steps within which a rise by 20, by 1000, must be learned


class Adaptive(NamedTuple):
    """An adaptive clipper in its default setting, and what it cannot do by its nature."""

    make: Callable[..., optax.GradientTransformation]
    warm: int = 25  # steps after which it has a limit
    rise: tuple[int, int] = (25, 25)
    noisy: bool = True  # passes at least half of the steps where norms vary by NOISE
    why: str = ""  # if it does not, or learns a rise later than it should
    first_spike: str = ""  # why a spike among the first norms raises the limit for a while
    normalizes: str = ""  # why nothing is said of what it clips


def uncapped(max_norm=math.inf, *, nonfinite="zero"):
    """auto_clip without its fixed limit, which the others do not have either."""
    return oc.auto_clip(max_norm, nonfinite=nonfinite)


ADAPTIVE = {
    "clip_by_percentile": Adaptive(oc.clip_by_percentile),
    "auto_clip": Adaptive(
        uncapped,
        warm=1,
        rise=(65, 65),
        why="a rise is learned once it is half of 128 norms",
    ),
    "autoclip": Adaptive(
        oc.autoclip,
        warm=1,
        rise=(197, 197),
        noisy=False,
        why="the 10th percentile is below nine norms in ten: it normalises by design",
    ),
    "clip_by_quantile": Adaptive(oc.clip_by_quantile, warm=10),
    "zclip": Adaptive(oc.zclip),
    "zclip mode=mean": Adaptive(functools.partial(oc.zclip, mode="mean")),
    "zclip mode=sigma": Adaptive(functools.partial(oc.zclip, mode="sigma")),
    "zclip feed=clipped": Adaptive(functools.partial(oc.zclip, feed="clipped")),
    "zclip feed=skip": Adaptive(functools.partial(oc.zclip, feed="skip")),
    "clip_by_sigma": Adaptive(oc.clip_by_sigma),
    "clip_by_ema_ratio": Adaptive(oc.clip_by_ema_ratio, warm=10),
    "adagc": Adaptive(
        oc.adagc,
        warm=100,
        rise=(100, 100),
        noisy=False,
        why="its limit is 5 % above an average of clipped norms, which grows by 0.1 % per step",
    ),
    "clip_by_norm_growth": Adaptive(
        oc.clip_by_norm_growth,
        warm=1,
        rise=(301, 694),
        noisy=False,
        why="1 % per step is the rule, for noise and for any rise",
    ),
    "clip_by_second_moment": Adaptive(
        oc.clip_by_second_moment,
        warm=20,
        rise=(84, 144),
        why="an average over 1000 steps",
        first_spike="a first gradient may have any size, and counts as much as those that follow",
    ),
    "stabilize_gradients": Adaptive(
        oc.stabilize_gradients, normalizes="it gives every update a norm of its own choosing"
    ),
    "scale_by_stable_adam": Adaptive(
        oc.scale_by_stable_adam,
        normalizes="its direction has one size, and it clips any gradient above its own average",
    ),
}

every_row = pytest.mark.parametrize("name", ADAPTIVE)
every_variant = pytest.mark.parametrize("name", [name for name in ADAPTIVE if "=" not in name])
every_clip = pytest.mark.parametrize(
    "name", [name for name, row in ADAPTIVE.items() if not row.normalizes]
)

LEVEL = 0.5  # below AdaGC's fixed limit of 1 for the warm-up
DIRECTION = {"w": np.array([0.6, 0.0, -0.6], np.float32), "b": np.float32([0.52915026])}


def grads_of(norm):
    """Gradients of that norm, in two leaves with a zero among their entries."""
    return jax.tree.map(lambda x: norm * x, DIRECTION)


@functools.cache
def compiled(name):
    """The steps of one clipper over a stream, some of which are left out."""
    tx = ADAPTIVE[name].make()

    def step(state, now):
        norm, bad, there = now
        grads = jax.tree.map(lambda x: jnp.where(bad == 0, x, bad), grads_of(norm))
        updates, after = tx.update(grads, state)
        factor = functools.reduce(jnp.minimum, factors(after))
        kept = jax.tree.map(lambda new, old: jnp.where(there, new, old), after, state)
        finite = jnp.all(jnp.isfinite(jnp.concatenate(jax.tree.leaves(updates))))
        return kept, (factor, finite)

    return jax.jit(lambda stream: jax.lax.scan(step, tx.init(grads_of(1.0)), stream))


def factors(state):
    """The factor of every clip in a state."""
    return [x for key, x in oc.metrics(state).items() if key.endswith("factor")]


def run(name, norms, bad=None, *, without=()):
    """The state after a stream of norms, and per step the smallest factor."""
    norms = np.float32(norms)
    bad = np.zeros_like(norms) if bad is None else np.float32(bad)
    there = np.ones(len(norms), bool)
    there[list(without)] = False
    state, (factor, finite) = compiled(name)((norms, bad, there))
    return state, np.asarray(factor), np.asarray(finite)


def noisy(*, seed=0):
    """Norms as they are in training: lognormal about a level."""
    return LEVEL * np.exp(NOISE * np.random.default_rng(seed).normal(size=STEPS))


def learned(state):
    """All memories in a state, without what counts steps."""
    counters = (oc.Metrics, oc.threshold.Clock)
    is_counter = lambda x: isinstance(x, counters)
    return [x for x in jax.tree.leaves(state, is_leaf=is_counter) if not is_counter(x)]


def first_pass(factor):
    """The first step from which on all pass."""
    return int(np.flatnonzero(np.append(1, factor < 1)).max())


@every_row
def test_a_bad_step_never_happened(name):
    """NaN, inf and 1e20 leave no bit in any memory, as first step, in the warm-up or later."""
    norms = noisy()[:160]
    for when in (0, 5, 150):
        expected, *_ = run(name, norms, without=[when])
        for value in (np.nan, np.inf, -np.inf, 1e20):
            bad = np.zeros(160)
            bad[when] = value
            state, _, finite = run(name, norms, bad)
            trees.assert_same_bits(learned(state), learned(expected))
            assert finite.all()


@every_clip
def test_a_rise_by_20_passes_within_50_steps(name):
    """At least half of the steps pass from 50 steps after a lasting rise by 20 on."""
    check_rise(name, 20.0, SOON, 0)


@every_clip
def test_a_rise_by_1000_passes_within_300_steps(name):
    """At least half of the steps pass from 300 steps after a lasting rise by 1000 on."""
    check_rise(name, 1000.0, LATER, 1)


def check_rise(name, times, within, which):
    """A constant norm passes when the row says so; of varying ones at least half by then."""
    row, start = ADAPTIVE[name], 1100  # windows are full
    rise = np.where(np.arange(STEPS) < start, 1, times)

    _, factor, _ = run(name, LEVEL * rise)
    assert first_pass(factor[start:]) == row.rise[which]
    assert row.rise[which] <= within or row.why

    _, factor, _ = run(name, noisy() * rise)
    after = start + max(within, row.rise[which])
    share = np.mean(factor[after : after + SOON] >= 1)
    assert share >= 0.5 if row.noisy else row.why


@every_clip
def test_a_new_level_has_a_limit_at_once(name):
    """A spike right after a rise by 20 was learned is cut to a tenth or less."""
    start = 1100
    norms = LEVEL * np.where(np.arange(STEPS) < start, 1.0, 20.0)
    when = start + ADAPTIVE[name].rise[0] + 1
    norms[when] *= 100

    _, factor, _ = run(name, norms)

    assert factor[when] <= 0.1


@every_clip
def test_sixty_zeros_cost_at_most_one_step(name):
    """Zero gradients in between do not make the limit of what follows smaller."""
    norms = np.full(STEPS, LEVEL)
    norms[400:460] = 0

    _, factor, _ = run(name, norms)

    assert np.sum(factor < 1) <= 1


@every_clip
def test_forty_zeros_at_the_start_cost_at_most_one_step(name):
    """Zero gradients at the start set no limit for what follows."""
    norms = np.full(STEPS, LEVEL)
    norms[:40] = 0

    _, factor, _ = run(name, norms)

    assert np.sum(factor < 1) <= 1


@every_clip
def test_a_constant_norm_is_never_clipped(name):
    """None of 2000 steps of one norm is clipped."""
    _, factor, _ = run(name, np.full(STEPS, LEVEL))

    assert np.sum(factor < 1) == 0


@every_row
def test_one_bad_step_in_a_hundred_leaves_the_state_finite(name):
    """With 1 % of NaN, inf, -inf and 1e20 among 2000 steps, state and updates stay finite."""
    random = np.random.default_rng(1)
    bad = np.where(
        random.random(STEPS) < 0.01, random.choice([np.nan, np.inf, -np.inf, 1e20], STEPS), 0
    )

    state, _, finite = run(name, noisy(), bad)

    assert all(np.isfinite(x).all() for x in learned(state))
    assert finite.all()


@every_clip
def test_a_fall_by_1000_clips_nothing(name):
    """Norms that become a thousandth are below any limit, and do not blow a memory up."""
    norms = LEVEL * np.where(np.arange(STEPS) < 1100, 1, 1e-3)

    state, factor, _ = run(name, norms)

    assert (factor == 1).all()
    assert all(np.isfinite(x).all() for x in learned(state))


@every_clip
@pytest.mark.parametrize("when", [0, 3])
def test_a_spike_among_the_first_norms_does_not_set_the_scale(name, when):
    """After a first or fourth norm that is 100 times too large, one of 20 times is cut to 4."""
    norms = noisy()
    norms[when] *= 100
    later = ADAPTIVE[name].warm + 30
    norms[later] = 20 * LEVEL

    _, factor, _ = run(name, norms)

    assert (factor[later] <= 4 / 20) == (not ADAPTIVE[name].first_spike)


# ------------------------------------------------------------------ compiled, mapped, precise


def one_by_one(update, state, norms):
    """The updates and the state of a stream, one call per step."""
    updates = []
    for norm in norms:
        update_now, state = update(grads_of(norm), state)
        updates.append(update_now)
    return jax.tree.map(lambda *x: jnp.stack(x), *updates), state


@every_variant
def test_init_may_be_traced(name):
    """A state that is made inside jit is the one that is made outside."""
    tx = ADAPTIVE[name].make()

    trees.assert_same_bits(jax.jit(tx.init)(grads_of(1.0)), tx.init(grads_of(1.0)))


@every_variant
def test_eager_jit_and_scan_agree_and_compile_once(name):
    """Forty steps give the same eagerly, compiled (once) and in a scan."""
    tx = ADAPTIVE[name].make()
    norms = jnp.float32(noisy()[:40]).at[30].set(10)
    state = tx.init(grads_of(1.0))

    def step(state, norm):
        updates, state = tx.update(grads_of(norm), state)
        return state, updates

    update = jax.jit(tx.update)
    stepped = one_by_one(update, state, norms)
    final, updates = jax.lax.scan(step, state, norms)

    assert update._cache_size() == 1
    trees.assert_close((updates, final), stepped, 2e-5, atol=1e-6)
    trees.assert_close(
        one_by_one(tx.update, state, norms[:5]),
        one_by_one(update, state, norms[:5]),
        2e-5,
        atol=1e-6,
    )


@every_variant
def test_vmap_over_seeds_and_hyperparameters(name):
    """A batch of streams, each with its own threshold, gives what each stream gives alone."""
    make = ADAPTIVE[name].make
    first = next(iter(inspect.signature(make).parameters.values())).default
    values = jnp.float32([first, first * 1.05])
    streams = jnp.float32([noisy(seed=1)[:120], noisy(seed=2)[:120]])

    def train(value, norms):
        tx = make(value)

        def step(state, norm):
            updates, state = tx.update(grads_of(norm), state)
            return state, updates

        return jax.lax.scan(step, tx.init(grads_of(1.0)), norms)[1]

    together = jax.jit(jax.vmap(train))(values, streams)

    train = jax.jit(train)
    alone = [train(value, norms) for value, norms in zip(values, streams, strict=True)]
    trees.assert_close(together, jax.tree.map(lambda *x: jnp.stack(x), *alone), 2e-5, atol=1e-6)


@every_variant
@pytest.mark.parametrize("x64", [False, True])
def test_state_dtypes_do_not_change(name, x64):
    """Memories are float32 and int32 from init on, in low precision and with x64."""
    with jax.enable_x64(x64):
        tx = ADAPTIVE[name].make()
        kinds = {"w": jnp.bfloat16, "b": jnp.float64 if x64 else jnp.float16}
        grads = {key: x.astype(kinds[key]) for key, x in grads_of(1.0).items()}
        before = tx.init(grads)

        updates, after = jax.jit(tx.update)(grads, before)

        assert {key: x.dtype for key, x in updates.items()} == kinds
        described = lambda tree: [(x.dtype, x.shape, x.weak_type) for x in jax.tree.leaves(tree)]
        assert described(before) == described(after)
        assert not any(x.weak_type for x in jax.tree.leaves(before))
        # The moments of a float64 leaf are float64, as Adam's are.
        wide = {jnp.dtype("float64")} if x64 and name == "scale_by_stable_adam" else set()
        memories = {jnp.dtype("float32"), jnp.dtype("int32")} | wide
        assert {x.dtype for x in learned(before)} <= memories


@every_variant
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=str)
def test_injected_hyperparameters(name, dtype):
    """optax.inject_hyperparams changes nothing, and a decay that bfloat16 rounds to 1 no sense."""
    make = ADAPTIVE[name].make
    norms = jnp.full(40, LEVEL)

    def last(tx):
        def step(state, norm):
            grads = jax.tree.map(lambda x: x.astype(dtype), grads_of(norm))
            updates, state = tx.update(grads, state, grads)
            return state, updates

        state = tx.init(jax.tree.map(lambda x: x.astype(dtype), grads_of(1.0)))
        return jax.tree.map(lambda x: x[-1], jax.lax.scan(step, state, norms)[1])

    plain = jax.jit(functools.partial(last, make()))()
    injected = jax.jit(functools.partial(last, optax.inject_hyperparams(make)()))()

    # Averages of a constant norm are that norm, whatever their decay is rounded to.
    tolerance = 1e-5 if dtype == jnp.float32 else 2.0**-7
    trees.assert_close(trees.float64(injected), trees.float64(plain), tolerance)


@every_variant
def test_derivatives_are_finite(name):
    """Derivatives through forty updates are finite, by the norms and by the threshold."""
    make = ADAPTIVE[name].make
    first = next(iter(inspect.signature(make).parameters.values())).default
    norms = jnp.full(40, LEVEL).at[35].set(10 * LEVEL)  # deviations of 0, then a spike

    def total(value, size):
        tx = make(value)

        def step(state, norm):
            updates, state = tx.update(grads_of(size * norm), state)
            return state, sum(jnp.sum(jnp.abs(x)) for x in jax.tree.leaves(updates))

        return jnp.sum(jax.lax.scan(step, tx.init(grads_of(1.0)), norms)[1])

    slopes = jax.jit(jax.grad(total, argnums=(0, 1)))(jnp.float32(first), jnp.float32(1))

    assert np.isfinite(slopes).all()


@every_clip
def test_sanitized_gradients_have_the_limit_of_a_good_step(name):
    """With nonfinite="sanitize", a bad entry changes no limit, and teaches nothing."""
    norms = jnp.float32(noisy()[:140])
    tx = ADAPTIVE[name].make(nonfinite="sanitize")
    good = grads_of(20 * LEVEL)
    bad = {
        **good,
        "w": jnp.asarray(good["w"]).at[1].set(jnp.nan),
    }  # a zero entry, so the norm is the same

    def step(state, norm):
        return tx.update(grads_of(norm), state)[1], None

    state = jax.jit(lambda: jax.lax.scan(step, tx.init(grads_of(1.0)), norms)[0])()
    update = jax.jit(tx.update)
    (expected, _), (updates, after) = update(good, state), update(bad, state)

    trees.assert_same_bits(updates, expected)
    assert sum(int(x) for k, x in oc.metrics(after).items() if "nonfinite" in k) >= 1


@pytest.mark.parametrize("convention", ["paper", "paddle"])
def test_adagc_has_a_limit_after_a_warm_up_with_zeros(convention):
    """A leaf whose warm-up lasts longer than the global one is limited by max_norm meanwhile."""
    tx = oc.adagc(convention=convention)
    norms = jnp.full(106, LEVEL).at[:40].set(0).at[105].set(1e6)

    def step(state, norm):
        updates, state = tx.update({"w": norm[None]}, state)
        return state, updates["w"][0]

    _, out = jax.lax.scan(step, tx.init({"w": jnp.zeros(1)}), norms)

    assert float(out[105]) == pytest.approx(1.0, rel=1e-6, abs=0)


def test_stable_adam_takes_schedules_and_complex_leaves():
    """A schedule for max_rms is read at every step, on any tree; complex leaves have moduli."""
    schedule = lambda step: 1.0 - 0.5 * step.astype(jnp.float32)
    tx = oc.scale_by_stable_adam(max_rms=schedule)
    grads = {"real": jnp.ones(3), "complex": jnp.full(2, 3 + 4j, jnp.complex64)}
    state = tx.init(grads)

    for share in (1.0, 0.5):
        updates, state = tx.update(grads, state)
        # Constant gradients: m / sqrt(v) is g / |g|, but for eps = 1e-6.
        np.testing.assert_allclose(updates["real"], np.full(3, share), 2e-6)
        np.testing.assert_allclose(updates["complex"], np.full(2, share * (0.6 + 0.8j)), 2e-6)


def test_stable_adam_sanitizes_by_entry():
    """With nonfinite="sanitize", moments of bad entries stay, the others learn, and it counts."""
    tx = oc.scale_by_stable_adam(nonfinite="sanitize")
    state = tx.init(jnp.ones(2))
    _, before = tx.update(jnp.ones(2), state)

    updates, after = tx.update(jnp.array([2.0, jnp.nan]), before)

    assert np.isfinite(updates).all()
    assert updates[1] == 0
    assert after.nu[1] == before.nu[1]
    assert after.nu[0] > before.nu[0]
    assert int(after.clip.metrics.nonfinite_steps) == 1


def test_a_constant_float64_norm_is_never_clipped():
    """A limit that is remembered in float32 does not clip the float64 norm it was learned from."""
    with jax.enable_x64(True):
        for make in (oc.clip_by_percentile, oc.autoclip):
            tx = make()
            step = lambda state, norm: tx.update(norm[None], state)[::-1]  # noqa: B023
            norms = jnp.full(60, 0.7, jnp.float64)
            _, out = jax.lax.scan(step, tx.init(jnp.zeros(1, jnp.float64)), norms)
            np.testing.assert_array_equal(out[:, 0], norms)


def test_gradients_of_another_tree_are_refused():
    """A memory of one leaf does not silently become one of three."""
    tx = oc.clip_by_ema_ratio()
    state = tx.init({"a": jnp.ones(3)})

    with pytest.raises(ValueError, match="norms of shape"):
        tx.update({"a": jnp.ones(3), "b": jnp.ones(3), "c": jnp.ones(3)}, state)


def test_a_short_window_has_a_limit_when_it_is_full():
    """min_history need not be given with a window below its default."""
    assert oc.clip_by_percentile(window=20).init(jnp.ones(1)).memory
    assert oc.clip_by_sigma(window=16).init(jnp.ones(1)).memory


def test_a_leaf_of_zeros_has_the_factor_of_its_tree():
    """In AdaGC's warm-up, every leaf has the derivative of the tree's clip, zeros included."""
    tx = oc.adagc()
    grads = {"zero": jnp.zeros(3), "other": jnp.array([3.0, 4.0])}
    state = tx.init(grads)
    of_zero = lambda x: jnp.sum(tx.update(grads | {"zero": x}, state)[0]["zero"])
    np.testing.assert_allclose(jax.grad(of_zero)(grads["zero"]), 1 / 5, rtol=1e-6)
