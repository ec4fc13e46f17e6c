"""observe_norms changes nothing and counts right; norm_summary reads it as NumPy would."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import trees
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import optaxclip as oc
from optaxclip.observe import (
    BINS,
    LOW,
    PER_OCTAVE,
    RECENT,
    NormHistory,
    NormSummary,
    norm_summary,
    observe_norms,
)
from optaxclip.record import ClipState

EIGHT = pytest.mark.skipif(jax.device_count() < 8, reason="needs eight devices")

NAN, INF = np.nan, np.inf
GRADS = {"w": jnp.array([[3.0, 0.0], [0.0, 0.0]]), "b": jnp.array([4.0])}
P = PartitionSpec


def scanned(tx, norms, grads=GRADS):
    """The state after a stream of norms: multiples of gradients of norm 5."""

    def step(state, size):
        scaled = jax.tree.map(lambda g: g / 5 * size, grads)
        return tx.update(scaled, state, grads)[1], None

    run = jax.jit(lambda norms: jax.lax.scan(step, tx.init(grads), norms)[0])
    return run(jnp.asarray(norms, jnp.float32))


def of_numpy(norms):
    """The bins of norms, by their equation in float64."""
    bins = np.floor((np.log2(np.float64(norms)) - LOW) * PER_OCTAVE)
    return np.bincount(np.clip(bins, 0, BINS - 1).astype(int), minlength=BINS)


def lognormal(scatter, seed=0, n=4000):
    return np.exp(scatter * np.random.default_rng(seed).normal(size=n)).astype(np.float32)


def test_updates_are_the_gradients():
    """Every kind of leaf comes out as the object that went in."""
    tree = trees.mixed()
    tx = observe_norms()

    updates, _ = tx.update(tree, tx.init(tree))

    assert all(a is b for a, b in zip(*map(jax.tree.leaves, (updates, tree)), strict=True))


def test_counts_are_those_of_numpy():
    """Bins, largest, zeros, bad norms and the latest ones are what NumPy counts in float64."""
    norms = np.concatenate([lognormal(2.0), [0, NAN, INF, 0, NAN], lognormal(1.0, 1, 70)])

    memory = scanned(observe_norms(), norms).memory

    good = norms[np.isfinite(norms) & (norms > 0)]
    # A norm at an edge may be rounded into the bin beside it: of these, none lies so.
    np.testing.assert_array_equal(memory.bins, of_numpy(good))
    assert (memory.zeros, memory.nonfinite) == (2, 3)
    np.testing.assert_allclose(memory.largest, good.max(), 4e-7)
    np.testing.assert_allclose(memory.recent, norms[-RECENT:], 4e-7)


@pytest.mark.parametrize(
    ("size", "bin"), [(1e-20, 0), (1e-37, 0), (1e25, BINS - 1), (3e38, BINS - 1)]
)
def test_outside_of_the_bins(size, bin):
    """What no bin is for counts in the outermost one, measured right beyond float32 squares."""
    memory = scanned(observe_norms(), [size]).memory

    assert memory.bins[bin] == memory.bins.sum() == 1
    np.testing.assert_allclose(memory.largest, size, 4e-7)


@pytest.mark.parametrize("scatter", [0.05, 0.1, 0.3, 1.0])
@pytest.mark.parametrize("seed", range(20))
def test_percentiles(scatter, seed):
    """The 95th percentile is off by 2.5 % at most, and 0.6 to 1.8 times 5 % of norms above it."""
    rng = np.random.default_rng(seed)
    norms = lognormal(scatter, seed) * np.float32(np.exp(rng.uniform(0, 3)))
    history = NormHistory(
        of_numpy(norms), np.zeros(RECENT, np.float32), norms.max(), np.int32(0), np.int32(0)
    )

    found = norm_summary(history)

    assert found.p95 == pytest.approx(np.quantile(norms, 0.95), rel=0.025)
    assert 0.6 < np.mean(norms > found.p95) / 0.05 < 1.8
    within = 2 ** (1 / PER_OCTAVE) - 1
    each = [(found.median, 0.5), (found.p90, 0.9), (found.p99, 0.99)]
    assert all(x == pytest.approx(np.quantile(norms, q), rel=within) for x, q in each)
    assert found.median <= found.p90 <= found.p95 <= found.p99 <= found.max == norms.max()


def test_percentiles_between_two_levels():
    """Between two levels far apart there is no percentile: each is within a bin of a norm."""
    norms = np.repeat(np.float32([1.1, 1000.0]), [940, 60])
    memory = scanned(observe_norms(), norms)

    found = norm_summary(memory)

    assert found.p90 == pytest.approx(1.1, rel=0.19)
    assert found.p95 == pytest.approx(1000, rel=0.19)
    assert found.p99 <= found.max


def test_summary():
    """A summary has the counts, the maximum, and the latest norms as they were, in order."""
    grads = {"w": jnp.array([3.0, 4.0])}  # without a 0, which would make NaN of inf
    found = norm_summary(scanned(observe_norms(), [1, 2, 0, NAN, INF, 3], grads))

    assert isinstance(found, NormSummary)
    assert (found.count, found.nonfinite, found.zeros) == (6, 2, 1)
    assert found.max == pytest.approx(3.0)
    np.testing.assert_allclose(found.recent, [1, 2, 0, NAN, INF, 3], 4e-7)


def test_summary_of_nothing():
    """Before the first norm, and after zeros alone, percentiles are NaN and nothing warns."""
    for norms in ([], [0.0, 0.0]):
        found = norm_summary(scanned(observe_norms(), norms))
        assert np.isnan([found.median, found.p90, found.p95, found.p99]).all()
        assert (found.count, found.zeros, found.max) == (len(norms), len(norms), 0)
        assert found.recent.shape == (len(norms),)


def test_each_leaf_and_label():
    """Leaves have a histogram each, in one array; labels have one each, by name."""
    leaf = norm_summary(scanned(observe_norms(oc.measure.leaf_norm()), [5.0, 10.0]))
    np.testing.assert_allclose(leaf.max, [8.0, 6.0], 4e-7)  # "b" comes before "w"
    assert leaf.count.tolist() == [2, 2]
    assert leaf.recent.shape == (2, 2)

    labels = oc.measure.by_label({"w": "dense", "b": "bias"}, oc.measure.global_norm())
    label = norm_summary(scanned(observe_norms(labels), [5.0]))
    assert {k: float(v.max) for k, v in label.items()} == pytest.approx(
        {"memory/bias": 4.0, "memory/dense": 3.0}
    )


WRAPPERS = {
    "chain": lambda tx: optax.chain(tx, oc.clip_by_global_norm(1.0), optax.adam(0.1)),
    "named_chain": lambda tx: optax.named_chain(("see", tx), ("sgd", optax.sgd(0.1))),
    "masked": lambda tx: optax.masked(tx, {"w": True, "b": True}),
    "MultiSteps": lambda tx: optax.MultiSteps(tx, 1).gradient_transformation(),
    "apply_if_finite": lambda tx: optax.apply_if_finite(tx, 3),
    "skip_step": lambda tx: oc.skip_step(optax.chain(tx)),
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_found_in_wrappers(wrap):
    """It counts, and is found, in whatever wraps it."""
    with jax.numpy_dtype_promotion("standard"):  # optax.adam mixes dtypes
        found = norm_summary(scanned(wrap(observe_norms()), [5.0, 10.0]))

    assert found.count == 2
    assert found.max == pytest.approx(10.0)


def test_several_observers():
    """Two observers in a chain are two summaries, by their places."""
    tx = optax.chain(observe_norms(), oc.clip_by_global_norm(1.0), observe_norms())

    found = norm_summary(scanned(tx, [5.0]))

    assert {k: float(v.max) for k, v in found.items()} == pytest.approx(
        {"0/memory": 5.0, "2/memory": 1.0}
    )


def test_no_observer():
    """A state without an observer is refused in words."""
    with pytest.raises(ValueError, match="no observe_norms in this state"):
        norm_summary(oc.clip_by_global_norm(1.0).init(GRADS))
    with pytest.raises(TypeError, match=r"measure must be a Measure, such as measure.global_norm"):
        observe_norms(1.0)


def test_other_gradients():
    """Gradients with other leaves than the params of init are refused in words."""
    tx = observe_norms(oc.measure.unit_norm())
    with pytest.raises(ValueError, match="other float leaves than the params given to init"):
        tx.update({"w": GRADS["w"]}, tx.init(GRADS))


@pytest.mark.parametrize("empty", [{}, None, {"step": jnp.arange(3)}])
def test_nothing_to_measure(empty):
    """A tree without floats has a norm of 0, and leaves none of its parts changed."""
    tx = observe_norms()
    updates, state = tx.update(empty, tx.init(empty))

    assert updates is empty
    assert state.memory.zeros == 1


def test_state_keeps_its_kind():
    """Tree, shapes, dtypes and weak types are those of init, also abstract, eager and in jit."""
    tx = observe_norms(oc.measure.leaf_norm())
    init = tx.init(GRADS)
    kinds = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype, x.weak_type), tree)
    assert isinstance(init, ClipState)
    assert kinds(jax.eval_shape(tx.init, GRADS)) == kinds(init)
    for update in (tx.update, jax.jit(tx.update)):
        assert kinds(update(GRADS, init)[1]) == kinds(init)


def test_one_program_and_donation():
    """Donated states and later steps need no second program."""
    tx = optax.chain(observe_norms(), oc.clip_by_global_norm(1.0))
    step = jax.jit(tx.update, donate_argnums=1)
    state = tx.init(GRADS)
    for _ in range(3):
        _, state = step(GRADS, state)

    assert step._cache_size() == 1
    assert norm_summary(state).count == 3


def test_counts_saturate():
    """Counts stay at the largest int32 instead of turning negative."""
    tx = observe_norms()
    state = tx.init(GRADS)
    most = np.iinfo(np.int32).max
    full = jax.tree.map(lambda x: jnp.full_like(x, most) if x.dtype == jnp.int32 else x, state)
    for size in (1.0, 0.0, NAN):
        _, full = tx.update(jax.tree.map(lambda g, s=size: g * s, GRADS), full)

    ints = [x for x in jax.tree.leaves(full) if x.dtype == jnp.int32]
    assert all((x == most).all() for x in ints)


def test_vmap():
    """Several models at once have a history each, valid and summed up by model."""
    tx = observe_norms()
    sizes = jnp.array([1.0, 2.0, 0.0])
    stacked = jax.tree.map(lambda g: jnp.stack([g / 5 * s for s in sizes]), GRADS)
    _, state = jax.vmap(tx.update)(stacked, jax.vmap(tx.init)(stacked))

    assert oc.validate_state(state) == []
    found = norm_summary(state)
    np.testing.assert_allclose(found.max, [1, 2, 0], 4e-7)
    assert found.count.tolist() == [1, 1, 1]


@pytest.mark.parametrize("models", [RECENT, BINS])
@pytest.mark.parametrize("measure", [oc.measure.global_norm(), oc.measure.leaf_norm()])
def test_vmap_over_as_many_models_as_there_are_bins(models, measure):
    """The axis of bins is told from that of models where they are of one length."""
    tx, sizes = observe_norms(measure), jnp.arange(1.0, models + 1)
    state, update = jax.vmap(tx.init)({"w": sizes}), jax.vmap(tx.update)
    for times in (1, 2, 4):
        _, state = update({"w": times * sizes}, state)

    found = norm_summary(state)
    assert found.count.ravel().tolist() == [3] * models
    np.testing.assert_array_equal(found.max.ravel(), 4 * sizes)
    np.testing.assert_array_equal(found.recent.reshape(3, -1), np.outer([1, 2, 4], sizes))
    np.testing.assert_allclose(found.median.ravel(), 2 * sizes, rtol=0.19)  # a bin is as wide
    assert oc.validate_state(state) == []
    broken = state._replace(memory=state.memory._replace(largest=0 * state.memory.largest))
    assert [problem.place for problem in oc.validate_state(broken)] == ["memory"]


def test_a_history_that_is_none():
    """Arrays of other shapes are refused in words, and found by validate_state."""
    memory = observe_norms().init(GRADS).memory
    for bins in (memory.bins[1:], memory.bins[None], memory.recent.astype(jnp.int32)):
        with pytest.raises(ValueError, match=r"bins and recent must differ in one axis.*got"):
            norm_summary(memory._replace(bins=bins))
        assert oc.validate_state(ClipState(memory._replace(bins=bins), None))


@pytest.mark.parametrize("size", [0.0, 1.0])
def test_derivative(size):
    """The derivative through the updates is that of the identity, and of the state 0, at 0 too."""
    tx = observe_norms()

    def loss(g):
        updates, state = tx.update({"w": g}, tx.init({"w": g}))
        return jnp.sum(updates["w"]) + state.memory.largest

    assert jax.grad(loss)(jnp.full(3, size)).tolist() == [1, 1, 1]


@EIGHT
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=lambda t: t.name)
@pytest.mark.parametrize(
    "measure", [oc.measure.global_norm(), oc.measure.leaf_norm(), oc.measure.unit_norm(0)]
)
def test_mesh(axis_type, measure):
    """On a mesh the state starts sharded as it stays, and counts in one program as on a device."""
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(axis_type,) * 2)
    whole = {"w": trees.normal(8, 4)}
    split = jax.device_put(whole, NamedSharding(mesh, P("x", "y")))
    tx = observe_norms(measure)
    step = jax.jit(tx.update)
    state = tx.init(split)
    for _ in range(3):
        before, (_, state) = state, step(split, state)

    assert step._cache_size() == 1
    same = jax.tree.map(lambda a, b: a.sharding.is_equivalent_to(b.sharding, a.ndim), before, state)
    assert all(jax.tree.leaves(same))
    alone = tx.init(whole)
    for _ in range(3):
        _, alone = tx.update(whole, alone)
    trees.assert_close(jax.device_get(state), jax.device_get(alone), 4e-7)
    assert oc.validate_state(state) == []


@EIGHT
def test_shard_map():
    """Inside shard_map, a scan counts the norm of the whole tree, the same on every device."""
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    tx = observe_norms()
    program = jax.shard_map(
        lambda g: scanned(tx, [5.0, 10.0], {"w": g}), mesh=mesh, in_specs=P("x"), out_specs=P()
    )

    found = norm_summary(jax.jit(program)(jnp.full(16, 5 / 4)))

    np.testing.assert_allclose(found.recent, [5, 10], 4e-7)
    assert found.count == 2


BREAKS = {
    "bins": lambda m: m._replace(bins=-m.bins),
    "largest": lambda m: m._replace(largest=jnp.float32(NAN)),
    "recent": lambda m: m._replace(recent=-m.recent),
    "zeros": lambda m: m._replace(zeros=jnp.int32(-1)),
    "nonfinite": lambda m: m._replace(nonfinite=m.nonfinite.astype(jnp.float32)),
    "": lambda m: m._replace(largest=jnp.float32(0)),
}


@pytest.mark.parametrize("field", BREAKS)
def test_validated(field):
    """validate_state finds what no step can have left, and repairs it."""
    state = scanned(observe_norms(), [1.0, 2.0, 0.0, NAN])
    assert oc.validate_state(state) == []

    broken = state._replace(memory=BREAKS[field](state.memory))

    (problem,) = oc.validate_state(broken)
    assert problem.place == f"memory/{field}".rstrip("/")
    assert oc.validate_state(oc.validate_state(broken, repair=True)) == []


def reductions(tx):
    """How many sums, and how many branches, a compiled step has."""
    grads = trees.floats()
    program = jax.jit(lambda g, s: tx.update(g, s, g)).lower(grads, tx.init(grads)).compile()
    text = program.as_text()
    return len(re.findall(r" reduce\(", text)), len(re.findall(r" conditional\(", text))


def test_the_norm_is_shared():
    """In front of a clipper by the same norm, no sum and no branch is added to the program."""
    another = optax.chain(observe_norms(oc.measure.leaf_norm()), oc.clip_by_global_norm())
    assert reductions(another)[0] > reductions(oc.clip_by_global_norm())[0]
    clips = {oc.measure.global_norm: oc.clip_by_global_norm, oc.measure.leaf_norm: oc.clip_by_norm}
    for measure, make in clips.items():
        both = optax.chain(observe_norms(measure()), make(1.0))
        assert reductions(both) == reductions(make(1.0))
