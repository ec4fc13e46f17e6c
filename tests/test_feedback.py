"""Error feedback: published numbers, the carry and its bound, bad steps, dtypes and wrappers."""

import functools
import json
import pathlib

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import trees
from flax.training import train_state
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from kinds import SHARE, assert_refused, number

import optaxclip as oc
from optaxclip._range import fields
from optaxclip.feedback import FeedbackState, clip_with_feedback
from optaxclip.skipping import skip_step

GOLDEN = pathlib.Path(__file__).parent / "golden" / "uclip_clip21.json"
EPS = 2.0**-23
INF, NAN = np.inf, np.nan
BOUND = number("a number from 0 to inf or a () array", (1, 0, 2.5, INF), (-1, -0.5))
UCLIP = {"max_carry": INF}  # as in the paper


def run(tx, stream, start=None):
    """The updates and carries of every step, and the last state."""
    state = tx.init(jax.tree.map(lambda x: x[0], stream)) if start is None else start

    def step(state, grads):
        updates, state = tx.update(grads, state, grads)
        return state, (updates, state.carry)

    state, (updates, carries) = jax.jit(lambda s, g: jax.lax.scan(step, s, g))(state, stream)
    return updates, carries, state


def column(*values, dtype=jnp.float32):
    """A stream of gradients with one entry."""
    return jnp.array(values, dtype)[:, None]


def uclip(stream, clip, *, decay=1.0, max_carry=INF):
    """U-Clip with a decay and a bound, in NumPy float64."""
    carry, updates, carries = np.zeros_like(stream[0]), [], []
    for grads in stream:
        u = clip(grads + carry)
        carry = decay * (grads + carry - u)
        carry = np.clip(carry, -max_carry * np.abs(u), max_carry * np.abs(u))
        updates.append(u)
        carries.append(carry)
    return np.array(updates), np.array(carries)


@pytest.mark.parametrize("wide", [False, True], ids=["float32", "float64"])
@pytest.mark.parametrize(
    ("case", "make"),
    [
        ("uclip_component_c1", oc.clip_by_value),
        ("uclip_persistent_above_c", oc.clip_by_value),
        ("uclip_norm_c1", oc.clip_by_global_norm),
        ("uclip_norm_c1", oc.clip_by_norm),
    ],
)
def test_golden_uclip(case, make, wide):
    """Without a bound, updates and carries are those of U-Clip."""
    rows = json.loads(GOLDEN.read_text())["cases"][case]
    expected = [np.array([row[key] for row in rows]) for key in ("u", "carry")]

    with jax.enable_x64(wide):
        grads = jnp.asarray([row["g"] for row in rows], jnp.result_type(float))
        found = run(clip_with_feedback(make(1.0), **UCLIP), grads)[:2]

    # Each step rounds sums of up to 5 a few times; the carry adds these up.
    eps = np.finfo(np.float64).eps if wide else EPS
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == (np.float64 if wide else np.float32)
        np.testing.assert_allclose(ours, theirs, 4 * eps, 5 * eps)


def test_updates_stay_within_the_limit_where_clip21_exceeds_it():
    """On the stream on which Clip21 makes updates of 1.5, the largest is the limit, 1."""
    rows = json.loads(GOLDEN.read_text())["cases"]["clip21_tau1_single_worker"]
    grads = jnp.array([row["g"] for row in rows], jnp.float32)

    updates = run(clip_with_feedback(oc.clip_by_value(1.0), **UCLIP), grads)[0]

    assert np.abs(updates).max() == 1


@pytest.mark.parametrize(
    "options", [{}, {"decay": 0.5}, {"max_carry": 2.0}, {"decay": 0.9, "max_carry": 0.5}]
)
def test_steps_are_those_of_the_equation(options):
    """On noisy gradients, steps with decay and bound are those of float64, entry by entry."""
    grads = trees.normal(40, 8, scale=2.0)
    clip = lambda x: np.clip(x, -1, 1)

    found = run(clip_with_feedback(oc.clip_by_value(1.0), **options), grads)[:2]

    expected = uclip(np.float64(grads), clip, **{"max_carry": 10.0, **options})
    for ours, theirs in zip(found, expected, strict=True):
        # 40 steps round sums of up to 16 a few times each.
        np.testing.assert_allclose(ours, theirs, 0, 40 * 16 * EPS)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_nothing_is_lost(dtype):
    """The sum of the updates is that of the gradients but for the last carry, narrow ones too."""
    grads = trees.normal(200, 8, scale=1.5, dtype=dtype)

    updates, carries, _ = run(clip_with_feedback(oc.clip_by_global_norm(3.0), **UCLIP), grads)

    assert (updates.dtype, carries.dtype) == (dtype, np.float32)
    total, paid = (np.sum(np.float64(x), 0) for x in (grads, updates))
    assert np.abs(total - paid).max() > 0.1
    norms = np.linalg.norm(np.float64(updates), axis=1)
    assert (norms <= 3 * (1 + 8 * float(jnp.finfo(dtype).eps))).all()
    # Rounded to bfloat16 and not carried, updates would be off by 8e-3 and more.
    np.testing.assert_allclose(paid + carries[-1], total, 0, 200 * np.abs(carries).max() * EPS)


@pytest.mark.parametrize(("dtype", "kept"), [(jnp.float16, False), (jnp.bfloat16, True)])
def test_what_rounds_to_no_update_is_not_carried(dtype, kept):
    """An entry of 1e-5 beside 1000 has a carry in bfloat16; in float16 its update is 0."""
    grads = jnp.array([[1000.0, 1e-5]] * 4, dtype)

    updates, carries, _ = run(clip_with_feedback(oc.clip_by_global_norm(1.0), **UCLIP), grads)

    assert bool((updates[:, 1] > 0).all()) == kept
    np.testing.assert_allclose(carries[-1, 1], kept * 4e-5, 0.01)
    np.testing.assert_allclose(carries[-1, 0], 3996, 1e-3)


def test_extra_arguments_reach_the_clipper():
    """A skip_step inside is given the loss, and functions pass, too, outside jit and in it."""

    def scaled(updates, state, params=None, *, value, times):
        return jax.tree.map(times, updates), state

    inner = optax.GradientTransformationExtraArgs(lambda params: (), scaled)
    tx = clip_with_feedback(skip_step(optax.chain(oc.clip_by_value(1.0), inner), loss=2.0))
    assert isinstance(tx, optax.GradientTransformationExtraArgs)
    half = lambda x: x / 2
    jitted = jax.jit(lambda grads, state, value: tx.update(grads, state, value=value, times=half))
    for update in (jitted, functools.partial(tx.update, times=half)):
        found, state = [], tx.init(jnp.ones(1))
        for value in (1.0, 3.0, 1.0):
            updates, state = update(jnp.array([3.0]), state, value=value)
            found.append((updates[0], state.carry[0]))
        np.testing.assert_array_equal(found, [(0.5, 2.5), (0, 2.5), (0.5, 5.0)])


def test_without_feedback_the_tail_is_lost():
    """Of rare large gradients, a clip keeps a part, and with feedback all is paid out in time."""
    grads = column(*([5.0, *[0.5] * 9] * 5))

    alone = run(clip_with_feedback(oc.clip_by_value(1.0), max_carry=0), grads)[0]
    fed = run(clip_with_feedback(oc.clip_by_value(1.0)), grads)[0]

    assert [alone.sum(), fed.sum(), grads.sum()] == [27.5, 47.5, 47.5]


def test_a_carry_without_bound_is_bounded():
    """Where gradients stay above the limit, the carry stops at `max_carry` times the update."""
    stream = column(*[2.0] * 30, *[0.0] * 15)

    updates, carries, _ = run(clip_with_feedback(oc.clip_by_value(1.0), max_carry=4.0), stream)
    endless = run(clip_with_feedback(oc.clip_by_value(1.0), **UCLIP), stream)[1]

    np.testing.assert_array_equal(carries[:5, 0], [1, 2, 3, 4, 4])
    np.testing.assert_array_equal(carries[29:, 0], [4, 3, 2, 1, *[0] * 12])
    np.testing.assert_array_equal(updates[30:, 0], [*[1] * 4, *[0] * 11])
    assert endless[29, 0] == 30


@pytest.mark.parametrize("spike", [1e3, 1e30, 1e37])
def test_a_spike_is_owed_for_max_carry_steps_at_most(spike):
    """However large a spike is, what it leaves is gone after `max_carry` steps."""
    stream = column(0.0, spike, *[0.0] * 6)

    updates, carries, _ = run(clip_with_feedback(oc.clip_by_value(1.0), max_carry=3.0), stream)

    np.testing.assert_allclose(updates[:, 0], [0, 1, 1, 1, 1, 0, 0, 0], 2 * EPS)
    np.testing.assert_allclose(carries[:, 0], [0, 3, 2, 1, 0, 0, 0, 0], 2 * EPS, 4 * EPS)


@pytest.mark.parametrize("make", [oc.clip_by_global_norm, oc.clip_by_norm, oc.clip_by_value])
def test_the_bound_is_that_of_every_group(make):
    """The carry of a group that stays above its limit is `max_carry` times its update."""
    limit, stream = 0.1, jax.tree.map(lambda x: jnp.stack([x] * 6), trees.floats())

    updates, carries, _ = run(clip_with_feedback(make(limit), max_carry=2.5), stream)

    for name, grads in stream.items():
        update, carry = np.float64(updates[name][-1]), np.float64(carries[name][-1])
        # After six steps, what is above a sixth of its limit would owe more than one update.
        above = (
            np.abs(grads[-1]) > 4 * limit
            if make is oc.clip_by_value
            else np.full(carry.shape, fill_value=True)
        )
        assert above.sum() > 0.8 * above.size
        np.testing.assert_allclose(carry[above], 2.5 * update[above], 16 * EPS)
        assert (np.abs(carry) <= 2.5 * np.abs(update) * (1 + 4 * EPS)).all()


def test_a_settled_debt_is_gone():
    """A gradient that undoes the carry exactly leaves none, and gives no update."""
    updates, carries, _ = run(clip_with_feedback(oc.clip_by_value(1.0)), column(3.0, -2.0, 0.5))

    np.testing.assert_array_equal(updates[:, 0], [1, 0, 0.5])
    np.testing.assert_array_equal(carries[:, 0], [2, 0, 0])


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("policy", ["zero", "propagate", "sanitize"])
def test_no_nan_in_the_carry(policy, bad):
    """A bad step leaves the carry as it was where it gives no update, and never makes it bad."""
    stream = jnp.array([[3.0, 4.0], [bad, 0.5], [0.5, 0.5], [0.5, 0.5]])
    tx = clip_with_feedback(oc.clip_by_global_norm(1.0, nonfinite=policy))

    updates, carries, state = run(tx, stream)

    assert np.isfinite(carries).all()
    kept = slice(0, 1) if policy == "sanitize" else slice(None)
    trees.assert_same_bits(carries[1][kept], carries[0][kept])
    assert np.isfinite(updates[2:]).all()
    assert oc.metrics(state)["nonfinite_steps"] == 1
    if policy == "zero":
        np.testing.assert_array_equal(updates[1], 0)
    if policy == "sanitize":  # the good entry has been paid for
        np.testing.assert_allclose(updates[1] + carries[1], [carries[0][0], 3.7], 4 * EPS)


def test_a_clip_that_is_not_ours_is_guarded_too():
    """Around optax.clip_by_global_norm, which makes NaN of all, the carry stays as it was."""
    stream = jnp.array([[3.0, 4.0], [NAN, 0.5], [0.3, 0.4]])

    updates, carries, _ = run(clip_with_feedback(optax.clip_by_global_norm(1.0)), stream)

    np.testing.assert_allclose(carries, [[2.4, 3.2]] * 2 + [[2.1, 2.8]], 4 * EPS)
    np.testing.assert_allclose(updates[2], [0.6, 0.8], 4 * EPS)


def test_skipped_steps_and_a_limit_of_zero_add_nothing():
    """What gives no update is not owed: else a skipped gradient would come back for ever."""
    skip = oc.clip(oc.measure.global_norm(), oc.threshold.constant(1.0), oc.scale.skip)
    schedule = oc.clip_by_value(lambda step: jnp.where(step == 1, 0.0, 1.0))

    skipped, none, _ = run(clip_with_feedback(skip), column(5.0, 0.5, 5.0, 0.5))
    paused, kept, _ = run(clip_with_feedback(schedule), column(3.0, 0.5, 0.0, 0.0, 0.0))

    np.testing.assert_array_equal(skipped[:, 0], [0, 0.5, 0, 0.5])
    assert not none.any()
    np.testing.assert_array_equal(paused[:, 0], [1, 0, 1, 1, 0])
    np.testing.assert_array_equal(kept[:, 0], [2, 2, 1, 0, 0])


def test_while_nothing_is_carried_the_clipper_is_alone():
    """Without a carry the updates and the state are bit for bit those of the clipper."""
    clipper, grads = oc.clip_by_global_norm(1.0), trees.mixed()
    grads |= {"small": jnp.array([1e-40, -0.0, 1e-30]), "half": jnp.array([6e-8], jnp.float16)}
    for options in ({}, {"max_carry": 0}):
        tx = clip_with_feedback(clipper, **options)
        state = tx.init(grads)
        alone, expected = clipper.update(grads, clipper.init(grads))

        updates, after = tx.update(grads, state)

        trees.assert_same_bits(updates, alone)
        trees.assert_same_bits(after.clip, expected)
        assert updates["integer"] is grads["integer"]
    assert not any(np.any(x) for x in jax.tree.leaves(after.carry))


def test_low_precision_leaves_keep_what_is_too_small_for_them():
    """A carry that a bfloat16 or float16 sum would round away is in float32, and is paid out."""
    for dtype in (jnp.bfloat16, jnp.float16):
        tx = clip_with_feedback(oc.clip_by_value(1.0), **UCLIP)
        grads = jnp.concatenate([column(*[1.0078125] * 64, dtype=dtype), column(0.5, dtype=dtype)])

        updates, carries, _ = run(tx, grads)

        assert carries.dtype == np.float32
        np.testing.assert_array_equal(carries[:-1, 0], 0.0078125 * np.arange(1, 65))
        assert updates[-1, 0] == 1
        assert carries[-1, 0] == 0.0


def test_a_sum_that_is_too_large_for_its_dtype_leaves_the_gradient():
    """Where g + D would be inf, the clipper sees g, and the step is no bad one."""
    for dtype, most in ((jnp.float16, 6e4), (jnp.float32, 3e38)):
        tx = clip_with_feedback(oc.clip_by_value(most / 2), **UCLIP)

        updates, carries, state = run(tx, column(*[most] * 6, dtype=dtype))

        np.testing.assert_allclose(np.float64(updates), most / 2, 2.0**-10)
        assert np.isfinite(carries).all()
        assert oc.metrics(state)["nonfinite_steps"] == 0


def test_complex_leaves_are_carried_with_their_phase():
    """A complex leaf is carried as a real one that is turned."""
    turn, grads = np.complex64(0.6 + 0.8j), trees.normal(8, 5, scale=2.0)
    tx = clip_with_feedback(oc.clip_by_value(1.0), decay=0.9, max_carry=2.0)

    real, turned = run(tx, grads), run(tx, grads.astype(jnp.complex64) * turn)

    assert turned[1].dtype == np.complex64
    for ours, theirs in zip(turned[:2], real[:2], strict=True):
        np.testing.assert_allclose(ours, np.asarray(theirs) * turn, 0, 64 * EPS)


def test_threshold_learns_from_norms_with_the_carry():
    """An adaptive clipper sees norms of g + D, and its memory stays finite over bad steps."""
    tx = clip_with_feedback(oc.zclip(warmup=3))
    sizes = jnp.array([1.0, 1.1, 0.9, 1.0, 30.0, NAN, 1.0, 0.0, 1.0, INF, 1.0])

    updates, carries, state = run(tx, sizes[:, None] * jnp.array([[0.6, 0.8]]))

    assert all(np.isfinite(x).all() for x in (updates[-1], carries))
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(state.clip.memory))
    seen = sizes[-1] * np.array([0.6, 0.8]) + np.float64(carries[-2])
    np.testing.assert_allclose(oc.metrics(state)["norm"], np.linalg.norm(seen), 16 * EPS)
    assert np.linalg.norm(carries[-2]) > 0.1
    assert np.linalg.norm(carries[4]) <= 10 * np.linalg.norm(updates[4]) * (1 + 16 * EPS)


def test_derivatives_are_numbers():
    """Derivatives through two steps are numbers at 0, at the limit, above it and in bad steps."""
    tx = clip_with_feedback(oc.clip_by_value(1.0))

    def total(first, options):
        tx = clip_with_feedback(oc.clip_by_value(1.0), **options)
        state = tx.init(first)
        one, state = tx.update(first, state)
        two, state = tx.update(first, state)
        return jnp.sum(one) + jnp.sum(two) + jnp.sum(state.carry)

    at = jnp.array([0.0, 1.0, -1.0, 3.0, 1e-40, 1e30])
    options = {"decay": jnp.float32(0.9), "max_carry": jnp.float32(2.0)}
    slope, by = jax.jit(jax.grad(total, (0, 1)))(at, options)
    bad = jax.grad(total)(at.at[3].set(NAN), options)

    assert not np.isnan(slope).any()
    assert not np.isnan(jax.tree.leaves(by)).any()
    assert not np.isnan(np.delete(bad, 3)).any()
    np.testing.assert_allclose(slope[0], 2.0, EPS)  # two updates, and no carry
    assert tx.init(at).carry.shape == (6,)


def test_bad_arguments_are_refused():
    """What is no clipper, no share or no bound is refused in so many words, and others are not."""
    clipper = oc.clip_by_value(1.0)
    allowed = "a GradientTransformation, such as clip_by_global_norm(1.0)"
    for bad in (None, 1.0, oc.clip_by_value, (), "clip"):
        message = f"clipper must be {allowed}; got {bad!r}"
        assert_refused(lambda bad=bad: clip_with_feedback(bad), TypeError, message)
    for name, kind in {"decay": SHARE, "max_carry": BOUND}.items():
        for bad in kind.bad:
            message = f"{name} must be {kind.allowed}; got {bad.shown or repr(bad.value)}"
            call = lambda bad=bad, name=name: clip_with_feedback(clipper, **{name: bad.value})
            assert_refused(call, bad.error, message)
        for good in kind.good:
            assert clip_with_feedback(clipper, **{name: good})


def test_traced_arguments_that_are_bad_keep_nothing():
    """A traced decay or bound that is none leaves no carry, and so flips no sign."""
    stream = column(3.0, 3.0, 0.5)

    def carried(name, value):
        tx = clip_with_feedback(oc.clip_by_value(1.0), **{name: value})
        state = tx.init(stream[0])
        for grads in stream:
            updates, state = tx.update(grads, state)
        return updates[0], state.carry[0]

    for name, values in {"decay": [-1.0, 1.5, NAN, INF], "max_carry": [-1.0, NAN, -INF]}.items():
        updates, carries = jax.vmap(lambda x, name=name: carried(name, x))(jnp.array(values))
        np.testing.assert_array_equal(updates, 0.5)
        np.testing.assert_array_equal(carries, 0)


def test_other_leaves_than_those_of_init_are_an_error():
    """Gradients of another shape than the parameters are refused with both."""
    tx = clip_with_feedback(oc.clip_by_value(1.0))
    with pytest.raises(ValueError, match=r"gradients must have the leaves of the params given"):
        tx.update({"w": jnp.ones(3)}, tx.init({"w": jnp.ones(2)}))


def test_the_state_is_the_same_from_init_on():
    """Tree, dtypes and shapes of the state stay, of abstract parameters too, and it has ranges."""
    grads = trees.mixed()
    tx = clip_with_feedback(oc.clip_by_quantile(0.9))
    state = tx.init(grads)
    abstract = jax.eval_shape(tx.init, {k: x for k, x in grads.items() if k != "float0"})

    after = tx.update(grads, state)[1]

    assert isinstance(after, FeedbackState)
    chex.assert_trees_all_equal_shapes_and_dtypes(state, after)
    assert jax.tree.structure(after) == jax.tree.structure(state)
    assert not any(x.weak_type for x in jax.tree.leaves(after))
    assert after.carry["bfloat16"].dtype == np.float32
    assert after.carry["integer"] is None
    assert len(jax.tree.leaves(abstract)) == len(jax.tree.leaves(state))
    said = {f.place: f.allowed for f in fields("", after) if f.place.startswith("carry")}
    assert len(said) == len(jax.tree.leaves(after.carry))
    assert all("float32" in allowed.dtypes for allowed in said.values())


def test_donation_and_one_compilation():
    """A step takes its state's buffers, and the first and later states share one program."""
    tx = clip_with_feedback(oc.clip_by_global_norm(1.0))
    grads = {"w": trees.normal(4, 3), "b": trees.normal(3)}
    step = jax.jit(tx.update, donate_argnums=1)

    state = tx.init(grads)
    for _ in range(3):
        before, (_, state) = state, step(grads, state)
        assert all(x.is_deleted() for x in before.carry.values())

    assert step._cache_size() == 1


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_sharded_leaves(axis_type):
    """On a mesh the carry is sharded as its leaf from init on, and the steps are as without one."""
    mesh = jax.make_mesh((8,), ("x",), axis_types=(axis_type,))
    grads = {"w": trees.normal(8, 4), "b": trees.normal(8, dtype=jnp.bfloat16)}
    put = jax.device_put(grads, NamedSharding(mesh, PartitionSpec("x")))
    tx = clip_with_feedback(oc.clip_by_global_norm(1.0))
    step = jax.jit(tx.update)

    def steps(grads):
        state = tx.init(grads)
        for k, x in grads.items():
            assert state.carry[k].sharding.is_equivalent_to(x.sharding, x.ndim)
        for _ in range(3):
            updates, state = step(grads, state)
        return updates, state

    updates, state = steps(put)

    assert step._cache_size() == 1
    expected = steps(grads)
    trees.assert_close(updates["w"], expected[0]["w"], 16 * EPS)
    trees.assert_close(state.carry["w"], expected[1].carry["w"], 16 * EPS)
    assert state.carry["b"].sharding.spec == PartitionSpec("x")


def test_inside_shard_map():
    """Inside shard_map, with carries that vary over devices, a scan gives what jit gives."""
    mesh = jax.make_mesh((8,), ("x",))
    grads = trees.normal(8, 4, scale=2.0)
    tx = clip_with_feedback(oc.clip_by_global_norm(1.0))
    steps = lambda grads: run(tx, jnp.stack([grads] * 3))[0]
    spec = PartitionSpec("x", None)

    found = jax.jit(
        jax.shard_map(steps, mesh=mesh, in_specs=spec, out_specs=PartitionSpec(None, "x", None))
    )(jax.device_put(grads, NamedSharding(mesh, spec)))

    np.testing.assert_allclose(found, steps(grads), 16 * EPS)


def test_inside_wrappers_of_optax_and_flax():
    """It works in MultiSteps, masked, inject_hyperparams and a TrainState, and is found there."""
    params = {"w": jnp.array([0.5]), "b": jnp.array([0.5])}
    make = lambda max_carry: clip_with_feedback(oc.clip_by_norm(1.0), max_carry=max_carry)
    sgd = lambda tx: optax.chain(tx, optax.sgd(1.0))
    wrapped = {
        "multi": optax.MultiSteps(sgd(make(2.0)), 2).gradient_transformation(),
        "masked": sgd(optax.masked(make(2.0), {"w": True, "b": False})),
        "injected": sgd(optax.inject_hyperparams(make)(max_carry=2.0)),
    }
    moved = {"multi": [0, -1, 0, -1], "masked": [-1, -1, -1, 0], "injected": [-1, -1, -1, 0]}
    streams = {"multi": [8.0, 8.0, 0.0, 0.0], "masked": [8.0, 0, 0, 0], "injected": [8.0, 0, 0, 0]}

    for name, tx in wrapped.items():
        # MultiSteps promotes a counter.
        with jax.numpy_dtype_promotion("standard"):
            state, step = tx.init(params), jax.jit(tx.update)
            for size, move in zip(streams[name], moved[name], strict=True):
                grads = jax.tree.map(lambda x, size=size: 2 * size * x, params)
                updates, state = step(grads, state, params)
                assert updates["w"] == move
        assert "clipped_norm" in oc.metrics(state)
    train = train_state.TrainState.create(apply_fn=None, params=params, tx=sgd(make(2.0)))
    for grads in (params, jax.tree.map(lambda x: 16 * x, params), params):
        train = train.apply_gradients(grads=grads)
    np.testing.assert_array_equal(train.params["w"], [0.5 - 0.5 - 1 - 1])
    assert oc.metrics(train)["clipped_steps"] == 2
