"""The guarantees of the engine: one test per row of the table in the docstring of `clip`."""

import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import trees
from oracles import VARIANTS, norm, once, tree_norm

import optaxclip as oc
from optaxclip._numbers import narrowed
from optaxclip.measure.looks import in_range
from optaxclip.threshold import Clock, Threshold

DTYPES = [jnp.float32, jnp.bfloat16, jnp.float16]
INF, NAN = jnp.inf, jnp.nan

every_variant = pytest.mark.parametrize("row", VARIANTS.values(), ids=VARIANTS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: d.__name__)

MEASURES = {
    "tree": oc.measure.global_norm(),
    "leaf": oc.measure.leaf_norm(),
    "unit": oc.measure.unit_norm(),
    "element": oc.measure.element(),
    "label": oc.measure.by_label(lambda path: path[0], oc.measure.global_norm()),
    "layer": oc.measure.stacked(oc.measure.global_norm(), lambda _, x: 0 if x.ndim == 4 else None),
}
every_measure = pytest.mark.parametrize("measure", MEASURES.values(), ids=MEASURES)


def learning():
    """A threshold that remembers all it is shown: a mean, a window and a clock."""

    def init(norm):
        return {
            "mean": jnp.zeros(norm.shape, jnp.float32),
            "recent": jnp.zeros((3, *norm.shape), jnp.float32),
            "seen": jnp.zeros(norm.shape, jnp.int32),
            "clock": Clock(jnp.zeros((), jnp.int32)),
        }

    def update(norm, memory):
        limit = jnp.where(memory["seen"] > 0, 2 * memory["mean"], jnp.inf)
        return limit, {
            "mean": 0.5 * memory["mean"] + 0.5 * norm,
            "recent": jnp.roll(memory["recent"], 1, axis=0).at[0].set(norm),
            "seen": memory["seen"] + 1,
            "clock": Clock(memory["clock"].step + 1),
        }

    return Threshold(init, update)


# -- finite norm <= limit: gradients bit for bit unchanged


@every_dtype
@every_measure
def test_below_the_limit_every_bit_stays(measure, dtype):
    """A group within its limit comes back as it was: subnormal numbers and -0.0 too."""
    tiny = jnp.finfo(dtype).smallest_subnormal
    grads = trees.floats(scale=0.1, dtype=dtype)
    grads["odd"] = jnp.array([tiny, -0.0, 0.0, -tiny], dtype)
    update = jax.jit(oc.clip(measure, oc.threshold.constant(100.0)).update)

    updates, state = update(grads, oc.clip(measure, oc.threshold.constant(100.0)).init(grads))

    trees.assert_same_bits(updates, grads)
    assert state.metrics.factor == 1


def test_at_the_limit_every_bit_stays():
    """A norm that equals its limit is within it."""
    grads = jnp.array([3.0, 4.0])

    updates, state = once(oc.clip_by_global_norm(5.0), grads)

    trees.assert_same_bits(updates, grads)
    assert state.metrics.clipped == 0


# -- finite norm > limit: norm of the result <= limit x (1 + a few eps of the leaf dtype)


@every_dtype
def test_above_the_limit_the_bound_holds(dtype):
    """The norm of the result, in float64, exceeds the limit by rounding at most."""
    update = jax.jit(lambda g, m: once(oc.clip_by_global_norm(m), g)[0])
    rng = np.random.default_rng(0)
    for case in range(100):
        grads = [
            trees.normal(257, dtype=dtype, seed=case, scale=4.0),
            trees.normal(5, 5, dtype=dtype, seed=case),
        ]
        limit = np.float32(10.0 ** rng.uniform(-1, 1))
        size = tree_norm(trees.float64(update(grads, limit)))
        # Each entry is off by half an eps, the factor by a few 2^-24.
        assert size <= limit * (1 + float(jnp.finfo(dtype).eps) / 2 + 2.0**-20)


def test_float64_is_clipped_in_float64():
    """With x64 on, a float64 leaf obeys the limit to a few eps of float64."""
    with jax.enable_x64(True):
        grads = {"wide": trees.normal(100, dtype=jnp.float64), "narrow": trees.normal(3)}

        updates, state = jax.jit(lambda g: once(oc.clip_by_global_norm(0.1), g))(grads)

        assert updates["wide"].dtype == jnp.float64
        assert updates["narrow"].dtype == jnp.float32
        wide = grads["wide"] * (0.1 / tree_norm(trees.float64(grads)))
        np.testing.assert_allclose(updates["wide"], wide, rtol=4 * 2.0**-52)
        assert {x.dtype for x in jax.tree.leaves(state)} == {
            jnp.dtype(jnp.float32),
            jnp.dtype(jnp.int32),
        }


@every_dtype
@pytest.mark.parametrize("measure", ["tree", "leaf"])
def test_strict_is_exact_and_idempotent(dtype, measure):
    """Under scale.strict the float64 norm is <= the limit, and clipping again changes no bit."""
    tx = lambda limit: oc.clip(MEASURES[measure], oc.threshold.constant(limit), oc.scale.strict)
    update = jax.jit(lambda g, m: once(tx(m), g)[0])
    rng = np.random.default_rng(1)
    lowest = {jnp.float32: 4e-6, jnp.bfloat16: 8e-3, jnp.float16: 2e-3}[dtype]
    for case in range(150):
        grads = [trees.normal(n, dtype=dtype, seed=case, scale=4.0) for n in (1, 8, 1000)]
        sizes = [tree_norm(trees.float64(g)) for g in grads]
        whole = tree_norm(trees.float64(grads))
        # Limits above, below, and within rounding of the norm, where a plain clip fails.
        limit = np.float32(whole * rng.choice([0.3, 1 - 1e-7, 1, 1 + 1e-7, 1 + 4e-7, 3]))

        clipped = update(grads, limit)
        again = update(clipped, limit)

        if measure == "tree":
            after = tree_norm(trees.float64(clipped))
            assert after <= limit
            assert after >= min(limit, whole) * (1 - lowest)
        else:
            for g, size in zip(clipped, sizes, strict=True):
                after = tree_norm(trees.float64(g))
                assert min(limit, size) * (1 - lowest) <= after <= min(limit, size * (1 + 1e-12))
        trees.assert_same_bits(again, clipped)


@pytest.mark.parametrize("ord", [1, 2, 3, INF])
def test_strict_is_exact_for_equal_entries(ord):
    """Where float32 sums are at their worst, in sums of equal entries, strict still holds."""
    strict = lambda m: oc.clip(oc.measure.leaf_norm(ord), oc.threshold.constant(m), oc.scale.strict)
    update = jax.jit(lambda g, m: once(strict(m), g)[0])
    rng = np.random.default_rng(2)
    for _ in range(200):
        grads = [jnp.full(n, rng.uniform(0.1, 10), jnp.float32) for n in (129, 1023)]
        limit = np.float32(rng.uniform(0.1, 300))

        clipped = update(grads, limit)

        for g, whole in zip(clipped, grads, strict=True):
            after, before = (norm(trees.float64(x), ord).item() for x in (g, whole))
            assert min(limit, before) * (1 - 4e-6) <= after <= limit
        trees.assert_same_bits(update(clipped, limit), clipped)


# -- 0 norm; limit 0; limit inf; 0 and 0: unchanged; zeros; unchanged; zeros


@every_variant
def test_zero_gradients_stay_zero(row):
    """Zero gradients give zeros under any limit, never NaN."""
    zeros = jax.tree.map(jnp.zeros_like, trees.floats())
    update = jax.jit(lambda limit: once(row.make(limit), zeros, trees.floats(seed=2)))

    for limit in (0.0, 1.0, INF):
        updates, state = update(limit)
        trees.assert_same_bits(updates, zeros)
        assert np.isfinite(state.metrics.factor)


@every_dtype
@every_measure
def test_zero_gradients_stay_zero_in_every_dtype(measure, dtype):
    """Zeros have norm 0, also where they are measured again times 2^64, which is inf in float16."""
    zeros = jax.tree.map(jnp.zeros_like, trees.floats(dtype=dtype))

    updates, state = once(oc.clip(measure, oc.threshold.constant(1.0)), zeros)

    trees.assert_same_bits(updates, zeros)
    assert state.metrics.norm == 0


@every_variant
def test_limit_zero_gives_zeros_and_limit_inf_nothing(row):
    """Limit 0 gives a zero update, and inf leaves every bit."""
    grads = trees.floats()

    none, _ = once(row.make(0.0), grads)
    same, _ = once(row.make(INF), grads)

    assert all(not np.any(x) for x in jax.tree.leaves(none))
    trees.assert_same_bits(same, grads)


@every_variant
def test_derivatives_through_the_update_are_finite(row):
    """Gradients and JVPs through the update are finite, with respect to the limit too."""
    params = trees.floats(seed=2)

    @jax.jit
    def derivatives(grads, limit):
        def loss(grads, limit):
            updates, _ = once(row.make(limit), grads, params)
            return sum(jnp.sum(x) for x in jax.tree.leaves(updates))

        ones = jax.tree.map(jnp.ones_like, grads)
        tangent = jax.jvp(lambda g: loss(g, limit), (grads,), (ones,))[1]
        return jax.grad(loss, argnums=(0, 1))(grads, limit), tangent

    for zero_leaves in ([], ["dense"], list(params)):
        grads = trees.floats()
        grads.update({name: jnp.zeros_like(grads[name]) for name in zero_leaves})
        for limit in (0.0, 1.0, INF):
            chex.assert_tree_all_finite(derivatives(grads, jnp.float32(limit)))


@pytest.mark.parametrize("measure", [oc.measure.leaf_norm(), oc.measure.leaf_rms()])
def test_derivatives_beside_a_leaf_of_another_size_are_finite(measure):
    """A leaf of 0 or of 1e-30, which is measured again, makes no NaN of one of 1e25."""
    tx = oc.clip(measure, oc.threshold.constant(1.0))
    grads = {str(x): jnp.full(2, x, jnp.float32) for x in (0.0, 1e-30, 1.0, 1e25)}
    grads["complex"] = jnp.full(2, 1e25 + 1e24j, jnp.complex64)

    total = lambda grads: sum(jnp.sum(jnp.abs(x)) for x in jax.tree.leaves(once(tx, grads)[0]))

    chex.assert_tree_all_finite(jax.grad(total)(grads))


def test_derivative_through_the_update_is_right():
    """The derivative of a clipped update is that of c g / ||g||, by finite differences."""
    grads = {"a": trees.normal(3), "b": trees.normal(4)}
    loss = lambda g: sum(
        jnp.sum(x**3) for x in jax.tree.leaves(once(oc.clip_by_global_norm(), g)[0])
    )

    # Of float32 values near 1, central differences over 0.02 are right to some 1e-3.
    chex.assert_trees_all_close(
        jax.grad(loss)(grads), _finite_differences(loss, grads), rtol=1e-2, atol=1e-3
    )


@pytest.mark.parametrize("ord", [2, 3])
def test_derivatives_are_right_at_every_scale(ord):
    """The Jacobian of a clip does not depend on the scale of gradient and limit together."""
    grads, size = np.array([3.0, 4.0]), norm(np.array([3.0, 4.0]), ord).item()
    update = lambda g, m: once(oc.clip_by_global_norm(m, ord=ord), g)[0]
    jacobians = [jax.jit(jax.jacrev(update)), jax.jit(jax.jacfwd(update))]
    direction = (grads / size) ** (ord - 1)  # the derivative of the norm

    for scale in (1e-30, 1e-25, 1e-20, 1.0, 1e12, 1e20, 1e26, 1e30, 1e36):
        for part in (0.0, 0.2):
            expected = part * (np.eye(2) - np.outer(grads, direction) / size)
            for jacobian in jacobians:
                found = jacobian(jnp.float32(grads * scale), jnp.float32(part * size * scale))
                np.testing.assert_allclose(found, expected, atol=1e-6)


def test_derivative_with_respect_to_parameters():
    """AGC's derivative with respect to the weights is finite and right for large gradients."""
    grads = jnp.array([3e9, 4e9])
    update = lambda p: once(oc.adaptive_grad_clip(0.5), grads, p)[0]

    # u = 0.5 ||p|| g / ||g||, so du/dp = 0.5 (g / ||g||) (p / ||p||)^T
    jacobian = jax.jacrev(update)(jnp.array([4.0, 3.0]))

    np.testing.assert_allclose(jacobian, 0.5 * np.outer([0.6, 0.8], [0.8, 0.6]), rtol=1e-5)


# -- norm not finite: the policy decides; the memory is as if the step had not been


@every_measure
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_policy_zero(measure, bad):
    """By default a group with a bad entry gives zeros, and the others are clipped as ever."""
    good = trees.floats()
    grads = {**good, "bias": good["bias"].at[3].set(bad)}
    tx = oc.clip(measure, oc.threshold.constant(1.0))

    updates, state = once(tx, grads)
    expected, _ = once(tx, good)

    chex.assert_tree_all_finite(updates)
    lost = np.zeros(8, bool)
    lost[3 if measure is MEASURES["element"] else slice(None)] = True
    assert not np.any(updates["bias"][lost])
    if measure is MEASURES["tree"] or measure is MEASURES["layer"]:
        assert not np.any(updates["dense"])  # the bad entry is in the group of these leaves too
    else:
        trees.assert_same_bits(updates["dense"], expected["dense"])
    assert int(state.metrics.nonfinite_steps) == 1


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_policy_propagate(bad):
    """nonfinite="propagate" lets the bad entry through, visibly."""
    grads = {"a": jnp.array([3.0, bad]), "b": jnp.array([4.0])}

    updates, state = once(oc.clip_by_norm(nonfinite="propagate"), grads)

    assert np.isnan(updates["a"][1])
    np.testing.assert_allclose(updates["b"], [1.0])
    assert int(state.metrics.nonfinite_steps) == 1
    assert not np.isfinite(state.metrics.clipped_norm)


@every_measure
def test_policy_sanitize(measure):
    """nonfinite="sanitize" treats what is left as if the bad entries had been zero."""
    good = trees.floats()
    tx = lambda limit, policy: oc.clip(measure, oc.threshold.constant(limit), nonfinite=policy)
    zero, sanitize = (
        jax.jit(lambda g, m, policy=policy: once(tx(m, policy), g))
        for policy in ("zero", "sanitize")
    )

    for limit in (1.0, 1000.0, INF):
        expected, _ = zero({**good, "bias": good["bias"].at[3].set(0.0)}, limit)
        for bad in (NAN, INF, -INF):
            updates, state = sanitize({**good, "bias": good["bias"].at[3].set(bad)}, limit)
            trees.assert_close(updates, expected, rtol=1e-6)
            assert int(state.metrics.nonfinite_steps) == 1
            assert np.isfinite(state.metrics.norm)


@every_measure
@pytest.mark.parametrize("policy", ["zero", "propagate", "sanitize"])
def test_memory_never_sees_a_bad_step(measure, policy):
    """After bad steps the memory is bit for bit that of a run without them, clocks apart."""
    tx = oc.clip(measure, learning(), nonfinite=policy)
    update = jax.jit(tx.update)
    stream = [trees.floats(seed=i) for i in range(5)]
    is_clock = lambda x: isinstance(x, Clock)

    def run(steps, spoiled=()):
        state = tx.init(stream[0])
        for i in steps:
            bad = jax.tree.map(lambda g: jnp.full_like(g, NAN), stream[i])
            _, state = update(bad if i in spoiled else stream[i], state)
        leaves = jax.tree.leaves(state.memory, is_leaf=is_clock)
        clocks = {int(x.step) for x in leaves if is_clock(x)}
        return [x for x in leaves if not is_clock(x)], clocks, state.metrics

    for bad_steps in [(0,), (1,), (0, 3), (4,)]:
        memory, clocks, metrics = run(range(5), spoiled=bad_steps)
        never, _, _ = run([i for i in range(5) if i not in bad_steps])

        trees.assert_same_bits(memory, never)
        assert clocks == {5}
        assert int(metrics.nonfinite_steps) == len(bad_steps)


def test_a_threshold_is_never_shown_a_bad_norm():
    """What a threshold makes of the norm of this step is made of 0 where that is not finite."""
    eager = Threshold(lambda norm: (), lambda norm, memory: (norm + 2.0, memory))

    _, state = once(oc.clip(oc.measure.leaf_norm(), eager), [jnp.array([NAN]), jnp.array([1.0])])

    assert state.metrics.limit == 2.0


def test_one_bad_leaf_freezes_its_own_memory_only():
    """Per leaf, the memory of a bad leaf stays and that of a good leaf learns."""
    tx = oc.clip(oc.measure.leaf_norm(), learning())
    grads = {"bad": jnp.array([NAN]), "good": jnp.array([2.0])}

    _, state = once(tx, grads)

    np.testing.assert_array_equal(state.memory["seen"], [0, 1])
    np.testing.assert_array_equal(state.memory["recent"][0], [0.0, 2.0])


def test_bad_steps_for_ever_leave_the_state_finite():
    """1000 steps of which 1 % are bad leave a finite memory and true counters."""
    tx = oc.clip(oc.measure.leaf_norm(), learning())
    norms = jnp.where(jnp.arange(1000) % 100 == 7, NAN, jnp.ones(1000))

    def body(state, norm):
        updates, state = tx.update([jnp.ones(3) * norm], state)
        return state, updates

    state, updates = jax.lax.scan(body, tx.init([jnp.ones(3)]), norms)

    chex.assert_tree_all_finite((state.memory, updates))
    assert (int(state.metrics.steps), int(state.metrics.nonfinite_steps)) == (1000, 10)


@every_measure
@pytest.mark.parametrize("scale", ["rescale", "skip", "normalize", "strict"])
def test_propagate_swallows_nothing(measure, scale):
    """Whatever the scale, a bad entry stays visible where it was under "propagate"."""
    rule = getattr(oc.scale, scale)
    tx = oc.clip(measure, oc.threshold.constant(1.0), rule, nonfinite="propagate")
    update = jax.jit(lambda g: once(tx, g)[0])
    grads = trees.floats()

    for bad in (NAN, INF):
        updates = update({**grads, "bias": grads["bias"].at[3].set(bad)})
        assert np.isnan(updates["bias"][3])


def test_a_norm_too_large_for_a_memory_does_not_enter_it():
    """A float64 norm above float32's range is not remembered as inf, nor as anything."""
    with jax.enable_x64(True):
        tx = oc.clip(oc.measure.leaf_norm(), learning())
        grads = [jnp.array([1e39], jnp.float64), jnp.array([2.0], jnp.float64)]

        _, state = once(tx, grads)
        updates, after = tx.update([grads[0], 2 * grads[1]], state)

        np.testing.assert_array_equal(after.memory["seen"], [0, 2])
        chex.assert_tree_all_finite(after.memory)
        chex.assert_trees_all_equal_shapes_and_dtypes(after, state)
        assert after.memory["mean"].dtype == jnp.float32
        np.testing.assert_allclose(updates[1], 2.0)  # twice the mean of 1 that was learned


# -- entries are bounded by their bits


def edges(dtype):
    """Both signs of what is at an edge of a dtype, and of what is not finite."""
    info = jnp.finfo(dtype)
    sizes = [0, info.smallest_subnormal, info.tiny, 0.3, 1, 1 + float(info.eps), 3, info.max]
    sizes = np.array([*map(float, sizes), np.inf, np.nan])
    return np.concatenate([sizes, -sizes]).astype(dtype)


@pytest.mark.parametrize("nonfinite", ["zero", "propagate", "sanitize"])
@pytest.mark.parametrize("limit", [-0.0, 0.0, 1e-40, 0.3, 1.0, 1.001, 1e5, 3e38, np.inf])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64", "float8_e5m2"])
def test_entries_at_the_edges_of_a_dtype(dtype, limit, nonfinite):
    """An entry within the limit keeps its bits, subnormal ones too; others become the limit."""
    with jax.enable_x64(dtype == "float64"):
        entries = edges(jnp.dtype(dtype))
        tx = oc.clip_by_value(limit, nonfinite=nonfinite, record=False)
        found = np.asarray(jax.jit(tx.update)(jnp.asarray(entries), tx.init(entries))[0])

        assert found.dtype == entries.dtype
        bits = np.dtype(f"uint{8 * entries.dtype.itemsize}")
        wide = entries.astype(np.float64)
        good = np.isfinite(wide)
        bound = np.dtype("float64" if dtype == "float64" else "float32").type(limit)
        with np.errstate(over="ignore"):  # no float16 is as large
            cast = bound.astype(entries.dtype).astype(np.float64)
        kept = good & (np.abs(wide) <= bound)
        np.testing.assert_array_equal(found.view(bits)[kept], entries.view(bits)[kept])
        clipped = found[good & ~kept].astype(np.float64)
        np.testing.assert_array_equal(clipped, np.copysign(cast, wide[good & ~kept]))
        other = np.nan if nonfinite == "propagate" else 0
        np.testing.assert_array_equal(found[~good].astype(np.float64), other)


def test_derivative_of_bounded_entries():
    """1 within the limit and 0 beyond; by the limit, the sign of what is beyond; never NaN."""
    entries = jnp.array([0.5, -0.5, 3.0, -3.0, jnp.inf, jnp.nan])

    def clipped(entries, limit):
        tx = oc.clip_by_value(limit, record=False)
        return tx.update(entries, tx.init(entries))[0]

    by_entry, by_limit = jax.jacfwd(clipped, (0, 1))(entries, 1.0)
    np.testing.assert_array_equal(by_entry, np.diag([1.0, 1, 0, 0, 0, 0]))
    np.testing.assert_array_equal(by_limit, [0.0, 0, 1, -1, 0, 0])
    backward = jax.jacrev(clipped, (0, 1))(entries, 1.0)
    np.testing.assert_array_equal(backward[0], by_entry)
    np.testing.assert_array_equal(backward[1], by_limit)


# -- norm from 1.2e-38 to 3.4e38: measured right in any dtype


@pytest.mark.parametrize("ord", [1, 2, 3, 10, INF])
def test_float32_range(ord):
    """Entries from 1e-36 to 3e36 are measured and clipped as any other, under every order."""
    rng = np.random.default_rng(0)
    whole = jax.jit(lambda g, m: once(oc.clip_by_global_norm(m, ord=ord), g))
    leafwise = jax.jit(lambda g: once(oc.clip_by_norm(ord=ord), g)[1].metrics.norm)

    for size in (1e-36, 1e-30, 1e-25, 1e-15, 1.0, 1e10, 1e15, 1e20, 1e30, 3e36):
        entries = rng.uniform(0.2, 2, 50) * rng.choice([-1, 1], 50)
        grads = {"a": jnp.float32(entries * size), "b": jnp.float32(size)}
        wide = trees.float64(grads)
        expected = tree_norm(wide, ord)

        updates, state = whole(grads, np.float32(expected / 2))

        assert state.metrics.norm == pytest.approx(expected, rel=1e-6, abs=0)
        assert tree_norm(trees.float64(updates), ord) == pytest.approx(
            expected / 2, rel=1e-6, abs=0
        )
        largest = max(norm(x, ord).item() for x in jax.tree.leaves(wide))
        assert leafwise(grads) == pytest.approx(largest, rel=1e-6, abs=0)


@pytest.mark.parametrize("eps", [1e-3, 1e-6, 1e-12])
@pytest.mark.parametrize("size", [1e-3, 1.0, 1e6, 1e20])
def test_relative_norms_at_every_scale(eps, size):
    """AGC holds its bound however small eps and weights, and however large gradients are."""
    grads, zeros = jnp.full((64, 4), size), jnp.zeros((64, 4))

    updates, state = once(oc.adaptive_grad_clip(0.01, eps=eps), grads, zeros)

    assert norm(trees.float64(updates), axis=0)[0, 0] == pytest.approx(0.01 * eps, rel=1e-6, abs=0)
    assert state.metrics.norm == pytest.approx(8 * size / eps, rel=1e-6, abs=0)


def test_relative_norms_of_enormous_and_lost_weights():
    """Weights of 1e20 are measured right; a unit with an infinite weight is a bad unit."""
    grads, weights = jnp.full((4, 1), 1e25), jnp.full((4, 1), 1e20)

    updates, state = once(oc.adaptive_grad_clip(0.01), grads, weights)

    np.testing.assert_allclose(updates, 0.01 * weights, rtol=1e-6)
    assert state.metrics.norm == pytest.approx(1e5, rel=1e-6, abs=0)
    updates, state = once(oc.adaptive_grad_clip(0.01), grads, weights.at[0].set(INF))
    assert not np.any(updates)
    assert int(state.metrics.nonfinite_steps) == 1


def test_normalize_stays_finite():
    """A factor that would leave float32's range is its largest number, and zeros stay zeros."""
    updates, _ = once(oc.normalize_by_global_norm(1e8), jnp.array([1e-31, 0.0]))

    assert np.isfinite(updates).all()
    assert updates[1] == 0


@pytest.mark.parametrize(
    ("entry", "count", "limit"), [(300.0, 1, 1.0), (1e-4, 10**6, 0.01), (6e-8, 100, 1e-7)]
)
def test_float16_range(entry, count, limit):
    """float16 gradients whose squares overflow or vanish in float16 are clipped right."""
    grads = jnp.full(count, entry, jnp.float16)
    expected = tree_norm(trees.float64(grads))

    updates, state = once(oc.clip_by_global_norm(limit), grads)

    assert state.metrics.norm == pytest.approx(expected, rel=1e-6, abs=0)
    # A result below float16's normal numbers is rounded to a multiple of 2^-24.
    tolerance = 2.0**-11 + 2.0**-25 * np.sqrt(count) / limit
    assert tree_norm(trees.float64(updates)) == pytest.approx(limit, rel=tolerance, abs=0)


def test_norm_of_many_entries():
    """A float32 norm of 1e7 equal entries is right to 3e-7."""
    _, state = once(oc.clip_by_global_norm(), jnp.full(10**7, 0.1))

    assert state.metrics.norm == pytest.approx(float(np.float32(0.1)) * 10**3.5, rel=3e-7, abs=0)


# -- None, empty, zero-size, scalar, complex leaves: accepted; others pass through


@every_variant
@pytest.mark.parametrize("mode", ["eager", "jit"])
def test_every_kind_of_leaf(row, mode):
    """Structure, shapes and dtypes survive every kind of leaf; what is no float is untouched."""
    grads = trees.mixed()
    float0 = grads.pop("float0")
    tx = row.make()
    update = tx.update
    if mode == "jit":  # float0 cannot enter a jitted function
        update = jax.jit(tx.update)
    else:
        grads["float0"] = float0

    updates, state = update(grads, tx.init(grads), grads)

    assert jax.tree.structure(updates) == jax.tree.structure(grads)
    for new, old in zip(jax.tree.leaves(updates), jax.tree.leaves(grads), strict=True):
        assert jnp.shape(new) == jnp.shape(old)
        assert jnp.result_type(new) == jnp.result_type(old)
    for name in ("integer", "bool"):
        trees.assert_same_bits(updates[name], grads[name])
    if mode == "eager":
        assert updates["float0"] is float0
    assert np.isfinite(state.metrics.norm)


@every_variant
@pytest.mark.parametrize("grads", [{}, None, (), {"i": jnp.arange(3)}, jnp.zeros((0, 3))], ids=str)
def test_trees_without_entries(row, grads):
    """A tree without a single float entry is no error, and clips nothing."""
    updates, state = once(row.make(), grads)

    trees.assert_same_bits(updates, grads)
    assert state.metrics.clipped == 0


def test_complex_leaves_keep_their_phase():
    """A complex leaf counts with its modulus and is shrunk, not turned."""
    grads = jnp.array([3 + 4j, 0 + 12j], jnp.complex64)

    whole, state = once(oc.clip_by_global_norm(1.3), grads)
    entries, _ = once(oc.clip_by_value(1.0), grads)

    assert state.metrics.norm == pytest.approx(13.0, rel=1e-6, abs=0)
    np.testing.assert_allclose(whole, np.array(grads) / 10, rtol=1e-6)
    np.testing.assert_allclose(entries, [0.6 + 0.8j, 1j], rtol=1e-6)


@pytest.mark.parametrize("policy", ["zero", "sanitize"])
def test_complex_infinities_leave_no_nan(policy):
    """An infinite complex entry becomes zero, in both of its parts."""
    grads = jnp.array([complex(INF, 1.0), 3 + 4j], jnp.complex64)

    updates, _ = once(oc.clip_by_global_norm(1.0, nonfinite=policy), grads)

    expected = [0, 0.6 + 0.8j] if policy == "sanitize" else [0, 0]
    np.testing.assert_allclose(updates, expected, rtol=1e-6)


def test_a_tiny_and_an_enormous_leaf_in_one_tree():
    """Leaves from both ends of the range, and a zero one, are each measured right, in one step."""
    sizes = [1e-30, 1e30, 0.0, 1.0, 1e-6]
    grads = [jnp.array([3.0, 4.0]) * size for size in sizes]

    norms = jax.jit(lambda g: in_range(oc.measure.leaf_norm(), g, None))(grads)

    np.testing.assert_allclose(norms, 5 * np.array(sizes), rtol=1e-6)


def test_gradients_that_fit_no_memory_are_named():
    """A leaf that appears or goes away is an error where a memory depends on it, else is none."""
    params = {"a": jnp.ones(2), "b": jnp.ones(3)}
    grads = {"a": jnp.ones(2), "b": None}
    for measure in MEASURES.values():
        tx = oc.clip(measure, oc.threshold.constant(1.0))
        updates, _ = tx.update(grads, tx.init(params))
        assert updates["b"] is None

    tx = oc.clip(oc.measure.unit_norm(), learning())
    with pytest.raises(ValueError, match="other float leaves than the params given to init"):
        tx.update(grads, tx.init(params))


def test_a_memory_of_another_shape_is_refused():
    """A threshold whose memory cannot be kept per group is refused at init, with a way out."""
    counting = Threshold(lambda norm: jnp.zeros(()), lambda norm, n: (norm, n + 1))

    with pytest.raises(ValueError, match=r"the shape of the norms, \(1,\).*A Clock counts steps"):
        oc.clip(oc.measure.leaf_norm(), counting).init([jnp.ones(2)])


# -- structure, shape, dtype of updates: preserved for every type of threshold

LIMITS = {
    "int": 1,
    "float": 1.0,
    "np.float64": np.float64(1.0),
    "np.float32": np.float32(1.0),
    "np.array": np.array(1.0),
    "strong": jnp.array(1.0, jnp.float32),
    "weak": jnp.asarray(1.0),
    "bfloat16": jnp.array(1.0, jnp.bfloat16),
    "integer array": jnp.array(1),
    "schedule": optax.constant_schedule(1.0),
}


@every_variant
@every_dtype
@pytest.mark.parametrize("limit", LIMITS.values(), ids=LIMITS)
def test_dtypes_survive_every_type_of_limit(row, dtype, limit):
    """The updates have the dtype of the gradients, whatever the threshold is made of."""
    grads = {"w": trees.normal(4, 3, dtype=dtype), "b": trees.normal(3, dtype=jnp.bfloat16)}
    tx = row.make(limit)

    updates = jax.eval_shape(lambda g: once(tx, g)[0], grads)

    chex.assert_trees_all_equal_shapes_and_dtypes(updates, grads)
    assert not any(x.weak_type for x in jax.tree.leaves(updates))


@pytest.mark.parametrize("limit", LIMITS.values(), ids=LIMITS)
def test_every_type_of_limit_clips_alike(limit):
    """All ways of writing the threshold 1 clip to 1, traced ones included."""
    grads = jnp.array([3.0, 4.0])

    updates, _ = once(oc.clip_by_global_norm(limit), grads)
    np.testing.assert_allclose(updates, [0.6, 0.8], rtol=1e-6)

    if not callable(limit):
        traced = jax.jit(lambda m: once(oc.clip_by_global_norm(m), grads)[0])
        np.testing.assert_allclose(traced(limit), [0.6, 0.8], rtol=1e-6)


# -- state: same pytree, dtypes and sharding from init on; donation; one compilation


@every_variant
@every_dtype
def test_state_keeps_structure_and_dtypes(row, dtype):
    """The state has one structure, strong dtypes and shapes from init on, abstract params too."""
    params = trees.floats(dtype=dtype)
    tx = row.make()

    state = tx.init(params)
    abstract = jax.eval_shape(tx.init, params)
    structs = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    from_abstract = tx.init(structs)
    _, after = jax.eval_shape(tx.update, params, state, params)

    for other in (abstract, from_abstract, after):
        chex.assert_trees_all_equal_shapes_and_dtypes(state, other)
    for x in jax.tree.leaves((state, after)):
        assert not x.weak_type
        assert x.dtype in (jnp.float32, jnp.int32)
    trees.assert_same_bits(from_abstract, state)


@every_variant
def test_one_compilation(row):
    """Five jitted steps compile once."""
    tx = row.make()
    grads = trees.floats()
    step = jax.jit(chex.assert_max_traces(lambda g, s: tx.update(g, s, g)[1], n=1))
    state = tx.init(grads)

    for _ in range(5):
        state = step(grads, state)

    assert step._cache_size() == 1
    assert int(state.metrics.steps) == 5
    chex.clear_trace_counter()


def test_one_compilation_on_a_device_that_was_chosen():
    """Parameters that were put on some device take the state there, so the step compiles once."""
    tx = oc.clip_by_norm()
    grads = jax.device_put(trees.floats(), jax.devices()[-1])
    step = jax.jit(tx.update)
    state = tx.init(grads)

    for _ in range(3):
        _, state = step(grads, state)

    assert step._cache_size() == 1


def test_buffers_can_be_donated():
    """No two parts of a fresh state share a buffer, so gradients and state can be donated."""
    tx = oc.clip(oc.measure.leaf_norm(), learning())
    grads = trees.floats()
    state = tx.init(grads)
    pointers = [x.unsafe_buffer_pointer() for x in jax.tree.leaves(state)]
    step = jax.jit(tx.update, donate_argnums=(0, 1))

    for _ in range(3):
        grads, state = step(grads, state)

    assert len(set(pointers)) == len(pointers)
    assert int(state.metrics.steps) == 3


def test_state_does_not_alias_parameters():
    """The buffers of a fresh state are none of the parameters'."""
    params = [jnp.zeros(()), jnp.zeros((1,))]
    state = oc.clip(oc.measure.leaf_norm(), learning()).init(params)

    own = {x.unsafe_buffer_pointer() for x in jax.tree.leaves(state)}

    assert own.isdisjoint({x.unsafe_buffer_pointer() for x in params})


# -- limit traced and negative or NaN: zeros, never a flipped sign


@every_variant
def test_a_bad_traced_limit_never_flips_a_sign(row):
    """A limit that turns out negative or NaN gives zeros, and the metrics show it."""
    grads = trees.floats()
    update = jax.jit(lambda m: once(row.make(m), grads))

    for bad in (-1.0, NAN, -INF):
        updates, state = update(bad)
        assert all(not np.any(x) for x in jax.tree.leaves(updates))
        assert not float(state.metrics.limit) >= 0


# -- what holds beside the table


def test_skip_drops_what_is_too_large():
    """scale.skip makes a group above its limit zero and leaves the others."""
    tx = oc.clip(oc.measure.leaf_norm(), oc.threshold.constant(1.0), oc.scale.skip)
    grads = {"large": jnp.array([3.0, 4.0]), "small": jnp.array([0.3])}

    updates, _ = once(tx, grads)

    np.testing.assert_array_equal(updates["large"], [0.0, 0.0])
    trees.assert_same_bits(updates["small"], grads["small"])


def test_vmap_over_thresholds_and_seeds():
    """A vmapped clip gives each lane what it would get alone, bad lanes included."""
    limits = jnp.array([0.5, 1.0, 2.0])
    grads = jnp.stack([trees.normal(6, scale=3.0), jnp.full(6, NAN), jnp.full(6, 1e25)])
    single = lambda m, g: once(oc.clip_by_global_norm(m), g)

    updates, state = jax.vmap(single)(limits, grads)

    for i in range(3):
        alone, own = single(limits[i], grads[i])
        np.testing.assert_allclose(updates[i], alone, rtol=1e-6)
        trees.assert_close(jax.tree.map(lambda x, i=i: x[i], state), own, rtol=1e-6)


@pytest.mark.parametrize("name", ["clip_by_value", "clip_by_global_norm", "adaptive_grad_clip"])
def test_disabled_jit_and_debugging_flags(name):
    """A clip runs without jit, with tracer leaks checked and with NaN debugging."""
    row = VARIANTS[name]
    grads = {"w": trees.normal(3, 2), "zero": jnp.zeros(3)}
    expected, _ = once(row.make(), grads)

    with jax.disable_jit():
        plain, _ = once(row.make(), grads)
    with jax.checking_leaks():
        checked, _ = jax.jit(lambda g: once(row.make(), g))(grads)
    with jax.debug_nans(True):
        finite, _ = once(row.make(), grads)

    for updates in (plain, checked, finite):
        trees.assert_close(updates, expected, rtol=1e-6)


def _finite_differences(fun, tree, step=1e-2):
    leaves, treedef = jax.tree.flatten(tree)
    slopes = []
    for i, leaf in enumerate(leaves):
        slope = np.zeros(leaf.shape, np.float32)
        for j in range(leaf.size):
            moved = [
                fun(treedef.unflatten([*leaves[:i], leaf.at[j].add(s), *leaves[i + 1 :]]))
                for s in (step, -step)
            ]
            slope[j] = (moved[0] - moved[1]) / (2 * step)
        slopes.append(jnp.asarray(slope))
    return treedef.unflatten(slopes)


def test_the_derivative_by_a_limit_of_zero_is_right():
    """Gradients that a limit of 0 makes zeros still grow with the limit, by their direction."""
    grads = jnp.array([3.0, 4.0])
    total = lambda limit: jnp.sum(once(oc.clip_by_global_norm(limit), grads)[0])

    assert jax.grad(total)(jnp.float32(0)) == pytest.approx(1.4, rel=1e-6, abs=0)


def test_a_memory_may_be_one_array():
    """A threshold of one's own need not wrap its memory."""
    last = Threshold(
        lambda norm: jnp.zeros(norm.shape),
        lambda norm, memory: (jnp.where(memory > 0, memory, jnp.inf), norm),
    )
    tx = oc.clip(oc.measure.global_norm(), last)
    _, state = once(tx, jnp.array([3.0, 4.0]))

    updates, _ = tx.update(jnp.array([6.0, 8.0]), state)

    np.testing.assert_allclose(updates, [3.0, 4.0], 1e-6)


@pytest.mark.parametrize("bound", [jnp.abs, jnp.square, lambda x: jnp.maximum(x, 0.0)])
def test_a_nan_that_looks_positive_allows_nothing(bound):
    """A limit of NaN gives zeros also where XLA can tell that it is not negative."""
    tx = oc.clip_by_global_norm(lambda step: bound(jnp.where(step > 1, jnp.nan, 1.0)))
    grads = jnp.array([3.0, 4.0])
    state = tx.init(grads)
    for _ in range(3):
        updates, state = tx.update(grads, state)
    np.testing.assert_array_equal(updates, [0.0, 0.0])
    assert np.isnan(oc.metrics(state)["limit"])


def test_a_threshold_is_asked_about_every_leaf():
    """Of leaves that are alike, too: one of one's own may count them."""
    limits = iter([1.0, 2.0, 3.0])
    mine = Threshold(lambda norm: (), lambda norm, memory: (norm * 0 + next(limits), memory))
    grads = {"a": jnp.full(3, 5.0), "b": jnp.full((2, 2), 5.0), "c": jnp.full(3, 5.0)}

    updates, _ = once(oc.clip(oc.measure.element(), mine), grads)

    assert [float(x.reshape(-1)[0]) for x in jax.tree.leaves(updates)] == [1, 2, 3]


def test_a_threshold_may_begin_with_inf():
    """A memory that holds inf for what is not there yet learns."""
    latest = oc.threshold.Threshold(
        lambda norm: jnp.full((3, *norm.shape), jnp.inf),
        lambda norm, memory: (memory.max(0), jnp.concatenate([norm[None], memory[:-1]])),
    )
    tx = oc.clip(oc.measure.global_norm(), latest)
    state = tx.init(jnp.ones(1))
    for _ in range(3):
        _, state = tx.update(jnp.ones(1), state)
    np.testing.assert_array_equal(tx.update(jnp.full(1, 9.0), state)[0], [1.0])


@pytest.mark.parametrize("gpu", [False, True])
@pytest.mark.parametrize("measure", ["tree", "leaf", "unit"])
def test_derivatives_of_a_mapped_clip(measure, gpu, monkeypatch):
    """Reverse mode through a vmapped clip is what it is one by one, at any scale and for zeros."""
    monkeypatch.setattr(oc._device, "on_gpu", lambda: gpu)
    measures = {"tree": oc.measure.global_norm, "leaf": oc.measure.leaf_norm}
    norm = (measures | {"unit": oc.measure.unit_norm})[measure]()
    rows = trees.normal(4, 3, 5) * jnp.float32([1, 1e-30, 1e25, 0]).reshape(4, 1, 1)
    limits = jnp.float32([0.5, 1e-31, 1e24, 1.0])

    def loss(grads, limit):
        tx = oc.clip(norm, oc.threshold.constant(limit))
        return jnp.sum(jnp.sin(once(tx, {"a": grads, "b": grads[0]})[0]["a"] / limit))

    found = jax.grad(lambda rows: jnp.sum(jax.vmap(loss)(rows, limits)))(rows)
    expected = jnp.stack([jax.grad(loss)(g, m) for g, m in zip(rows, limits, strict=True)])

    scale = limits.reshape(4, 1, 1)
    np.testing.assert_allclose(found * scale, expected * scale, 1e-5, 1e-6)


@pytest.mark.parametrize("value", [0.0, 1e-30, 1e30])
@pytest.mark.parametrize("entry", [1e-25, 1e25])
@pytest.mark.parametrize("size", [5, 9000])
@pytest.mark.parametrize("shape", [(), (2,)], ids=["alone", "vmap"])
def test_gradients_that_are_known_while_compiling(value, entry, size, shape):
    """A leaf that XLA knows, as the zeros of a parameter that is not used, is one like others."""
    known = np.float64(np.float32(value))
    other = np.float64(np.float32(entry))
    exact = {"tree": math.hypot(known * size**0.5, other * 3**0.5), "leaf": known * size**0.5}

    def norms(entries):
        grads = {"known": jnp.full(size, value), "other": entries}
        tree = in_range(oc.measure.global_norm(), grads, None)
        leaf = in_range(oc.measure.leaf_norm(), grads, None)[0]
        return {"tree": tree, "leaf": leaf}

    run = jax.jit(jax.vmap(norms) if shape else norms)
    found = run(jnp.full((*shape, 3), entry))
    for name, seen in found.items():
        np.testing.assert_allclose(seen, exact[name], rtol=4 * 2.0**-24, err_msg=name)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(
    "other", [None, jnp.full(9000, 1e-25), jnp.full(3, 1e-25), jnp.zeros((3, 300, 300))]
)
def test_leaves_without_entries_beside_small_norms(dtype, other):
    """A leaf without entries leaves the norm as it is, however small that is."""
    grads = {"empty": jnp.zeros(0, dtype)} | ({} if other is None else {"other": other})
    tx = oc.clip_by_global_norm()
    updates, state = tx.update(grads, tx.init(grads))

    exact = 0.0 if other is None else np.linalg.norm(np.asarray(other, np.float64).ravel())
    np.testing.assert_allclose(state.metrics.norm, exact, rtol=4 * 2.0**-24)
    assert state.metrics.nonfinite_steps == 0
    chex.assert_trees_all_equal(updates, grads)


@pytest.mark.parametrize("norm", [0.0, 1e-25])
def test_propagate_has_a_derivative_at_small_norms(norm):
    """The factor of a norm that is not finite, which is 1 / norm, is in no derivative of others."""
    tx = oc.clip_by_global_norm(nonfinite="propagate")
    grads = jnp.full(4, norm / 2)
    slope = jax.grad(lambda g: jnp.sum(tx.update(g, tx.init(g))[0]))(grads)

    assert np.array_equal(slope, np.ones(4))


def test_groups_that_do_not_count_vanish_whatever_a_scale_says():
    """A scale of one's own that is not 0 at limit 0 has no say in what is not finite."""
    tx = oc.clip(
        oc.measure.leaf_norm(), oc.threshold.constant(1.0), lambda norm, limit: 0 * norm + 2
    )
    grads = {"bad": jnp.array([jnp.nan, 1.0]), "good": jnp.ones(2)}
    updates, _ = jax.jit(tx.update)(grads, tx.init(grads))

    chex.assert_trees_all_equal(updates, {"bad": jnp.zeros(2), "good": jnp.full(2, 2.0)})


def test_products_are_rounded_to_the_nearest_bfloat16():
    """As NumPy casts: ties to even, to inf from half of a step beyond the largest; slope 1."""
    upper = np.arange(2**16, dtype=np.uint32) << 16
    bits = np.concatenate([upper + low for low in (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF)])
    x = bits.view(np.float32)
    x = x[~np.isnan(x)]
    rounded = jax.jit(lambda x: narrowed(x, jnp.bfloat16))(x)
    with np.errstate(over="ignore"):
        expected = x.astype(jnp.bfloat16)
    np.testing.assert_array_equal(np.asarray(rounded).view(np.uint16), expected.view(np.uint16))

    slope = jax.grad(lambda x: jnp.sum(narrowed(x, jnp.bfloat16).astype(jnp.float32)))(x[:100])
    np.testing.assert_array_equal(slope, 1)


@every_dtype
@pytest.mark.parametrize("value", [NAN, INF])
def test_what_a_scale_of_ones_own_makes_bad_stays_bad(dtype, value):
    """A factor that is NaN or inf is seen in the updates, whatever rounds them."""
    tx = oc.clip(
        oc.measure.leaf_norm(), oc.threshold.constant(1.0), lambda norm, limit: 0 * norm + value
    )
    grads = jnp.array([3.0, -4.0], dtype)
    updates, _ = tx.update(grads, tx.init(grads))
    np.testing.assert_array_equal(np.asarray(updates, np.float64), [value, -value])
