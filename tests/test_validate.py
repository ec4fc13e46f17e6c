"""validate_state: every rule, no false alarm, what becomes of corrupted states, and repair."""

import functools
import importlib
import pkgutil
from collections import Counter
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import trees
from flax import nnx
from flax.training.train_state import TrainState
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from roster import EVERY

import optaxclip as oc
from optaxclip._clip import TOO_LARGE
from optaxclip._range import Range, _of_class
from optaxclip.record import start
from optaxclip.stable_adam import Moments
from optaxclip.validate import validate_state

LEARNS = [name for name, row in EVERY.items() if row.memory]


def _classes():
    """Every NamedTuple of the package that says of its fields what they may hold."""
    modules = [
        importlib.import_module(m.name) for m in pkgutil.walk_packages(oc.__path__, "optaxclip.")
    ]
    found = {x for m in modules for x in vars(m).values() if isinstance(x, type) and _of_class(x)}
    return {
        x.__name__: x for x in found if any(isinstance(r, Range) for r in _of_class(x).values())
    }


CLASSES = _classes()


def array(x):
    """Of float32 or int32, as a state has them."""
    return jnp.asarray(x, jnp.int32 if np.asarray(x).dtype.kind == "i" else jnp.float32)


def made(name, **values):
    """One of `CLASSES` with these values."""
    nested = lambda x: x if isinstance(x, tuple) else array(x)
    return CLASSES[name](**{k: nested(x) for k, x in values.items()})


FULL = made("Window", norms=[3.0, 2.0, 0.0], seen=2)
METRICS = {
    "norm": 2.0,
    "clipped_norm": 1.0,
    "limit": 1.0,
    "factor": 0.5,
    "clipped": 1.0,
    "steps": 9,
    "clipped_steps": 4,
    "nonfinite_steps": 3,
}
SOUND = {
    "Clock": {"step": 3},
    "EmaRatioMemory": {"average": [2.0, 3.0], "seen": [1, 4]},
    "GrowthMemory": {"previous": [2.0, 3.0]},
    "Metrics": METRICS,
    "MomentRatioMemory": {"mean": 2.0, "root": 3.0, "seen": 1},
    "Moments": {"mu": [2.0, -3.0], "nu": [4.0, 9.0], "seen": 2},
    "QuantileMemory": {"estimate": 2.0, "seen": 1},
    "RelearningMemory": {"all": (), "run": (), "length": 1},
    "SecondMomentMemory": {"root": [2.0, 3.0], "seen": [1, 4]},
    "Window": {"norms": [3.0, 2.0, 0.0], "seen": 2},
    "ZScoreMemory": {"first": FULL, "mean": 2.5, "deviation": 0.5},
}


def state_of(x):
    """A state that holds it, and where it is there."""
    if isinstance(x, Moments):
        return {"w": x}, "w"
    return (
        (oc.ClipState((), x), "metrics")
        if isinstance(x, oc.Metrics)
        else (oc.ClipState(x, None), "memory")
    )


def test_every_class_has_a_sample():
    """No class says what its fields may hold without a test of it here."""
    assert set(SOUND) == set(CLASSES)


@pytest.mark.parametrize("name", SOUND)
def test_every_range(name):
    """Each field is a problem when it is NaN, infinite or out of range, unless it may be that."""
    for field, said in _of_class(CLASSES[name]).items():
        if not isinstance(said, Range):
            continue
        sound = np.asarray(array(SOUND[name][field]))
        extremes = [-1, *([] if said.dtypes == ("int32",) else [np.nan, -np.inf, np.inf])]
        extremes += [] if said.high is None else [1.1 * said.high]
        assert all(value == np.inf or np.isnan(value) for value in said.also)
        for value in extremes:
            x = sound.copy()
            x.flat[-1] = value
            state, place = state_of(made(name, **SOUND[name] | {field: x}))

            found = validate_state(state)

            own = value in said.also or (
                np.isnan(value) and len(said.also) > 0 and np.isnan(said.also[-1])
            )
            legal = own or (value == -1 and said.low is None)
            expected = [] if legal else [f"{place}/{field}"]
            assert [p.place for p in found if "contradiction" not in p.found] == expected
            assert all(p.allowed == str(said) for p in found if "contradiction" not in p.found)
    assert validate_state(state_of(made(name, **SOUND[name]))[0]) == []


LAWS = [
    ("EmaRatioMemory", {"seen": [1, 0]}, "average is 0 where seen is 0"),
    ("QuantileMemory", {"seen": 0}, "estimate is 0 where seen is 0"),
    ("SecondMomentMemory", {"seen": [1, 0]}, "root is 0 where seen is 0"),
    ("MomentRatioMemory", {"seen": 0}, "mean and root are 0 where seen is 0"),
    ("MomentRatioMemory", {"seen": 0, "mean": 0.0}, "mean and root are 0 where seen is 0"),
    ("Window", {"seen": 1}, "norms are > 0 up to seen, and 0 beyond"),
    ("Window", {"seen": 3}, "norms are > 0 up to seen, and 0 beyond"),
    ("Window", {"seen": 4, "norms": [3.0, 2.0, 1.0]}, "norms are > 0 up to seen, and 0 beyond"),
    (
        "ZScoreMemory",
        {"first": made("Window", norms=[0.0], seen=0)},
        "mean and deviation are 0 where none was seen",
    ),
    (
        "ZScoreMemory",
        {"first": FULL._replace(seen=array(1))},
        "norms are > 0 up to seen, and 0 beyond",
    ),
    ("Metrics", {"clipped_steps": 10}, "clipped_steps <= steps"),
    ("Metrics", {"nonfinite_steps": 10}, "nonfinite_steps <= steps"),
    ("Metrics", {"factor": np.nan}, "clipped_norm and factor are numbers where norm is finite"),
    (
        "Metrics",
        {"clipped_norm": np.nan},
        "clipped_norm and factor are numbers where norm is finite",
    ),
]


@pytest.mark.parametrize(("name", "values", "law"), LAWS)
def test_every_law(name, values, law):
    """Fields that are possible by themselves, and not together, are a problem."""
    state, _ = state_of(made(name, **SOUND[name] | values))

    assert [(p.found, p.allowed) for p in validate_state(state)] == [("a contradiction", law)]


def test_no_law_is_without_a_test():
    """Every law of every class is broken above."""
    laws = {
        law
        for name, cls in CLASSES.items()
        if hasattr(cls, "laws")
        for law in made(name, **SOUND[name]).laws()
    }
    assert laws == {law for _, _, law in LAWS}


def test_where_it_starts():
    """Metrics and memories start as they say; no bound is below what the engine learns."""
    for said, x in zip(_of_class(oc.Metrics).values(), start(), strict=True):
        assert said.start == x
    for cls in CLASSES.values():
        norms = [r for r in _of_class(cls).values() if isinstance(r, Range) and r.high]
        assert all(r.high >= TOO_LARGE for r in norms if cls is not oc.Metrics)
    for name in LEARNS:
        assert not any(
            np.any(x) for x in jax.tree.leaves(EVERY[name].make(record=False).init(tree()))
        )


def tree(**kwargs):
    """Gradients of a tiny model."""
    return {"w": trees.normal(3, 2, **kwargs), "b": trees.normal(4, **kwargs)}


# Usual norms, a bad entry, none, what float32 squares cannot hold, the smallest normal numbers, a
# new level that lasts.
STREAM = [1.0, 2.0, 1.0, np.nan, 1.5, np.inf, 0.0, 1e20, 1.0, 1.2e-38, 1e-42, -np.inf, 2.0, 1.0]
STREAM += [90.0] * 12 + [70.0, 80.0]


def transformations():
    """Every variant before momentum, and other ways to hold a clipper."""
    zclip, growth = EVERY["zclip"].make, EVERY["clip_by_norm_growth"].make
    rest = {
        "propagate": optax.chain(
            zclip(nonfinite="propagate"), oc.clip_by_value(nonfinite="propagate")
        ),
        "normalize": oc.stabilize_gradients(nonfinite="propagate"),
        "sanitize": optax.chain(
            oc.scale_by_stable_adam(nonfinite="sanitize"), oc.clip_by_norm(nonfinite="sanitize")
        ),
        "no record": optax.chain(zclip(record=False), oc.clip_by_norm(record=False)),
        "patience": growth(patience=4, max_norm=optax.constant_schedule(99.0)),
        "masked": optax.masked(growth(), {"w": True, "b": False}),
        "partition": optax.partition({"a": zclip(), "z": growth()}, {"w": "a", "b": "z"}),
        "accumulating": optax.MultiSteps(zclip(), 2).gradient_transformation(),
        "injected": optax.inject_hyperparams(oc.clip_by_ema_ratio)(ratio=3.0),
    }
    return {name: optax.chain(row.make(), optax.trace(0.9)) for name, row in EVERY.items()} | rest


class Run(NamedTuple):
    """All transformations at once, which one program can step."""

    init: dict
    states: list  # after each step of `STREAM`
    step: object


@functools.cache
def run():
    """The states that a stream of good and bad gradients leaves."""
    txs, params = transformations(), tree(seed=1)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        init = {name: tx.init(params) for name, tx in txs.items()}
        step = jax.jit(lambda s, g: {n: tx.update(g, s[n], params)[1] for n, tx in txs.items()})
        states = [init]
        for i, scale in enumerate(STREAM):
            grads = jax.tree.map(lambda g, s=scale: g.at[0].multiply(s), tree(seed=i))
            if np.isfinite(scale):
                grads = jax.tree.map(lambda g, s=scale: g * s, tree(seed=i))
            states.append(step(states[-1], grads))
    return Run(init, states, step)


def test_no_false_alarm():
    """What steps leave, on good and bad gradients, fresh and running, has no problem."""
    init, states, _ = run()
    assert len(states) == len(STREAM) + 1
    for state in states:
        assert validate_state(state) == []
    abstract = jax.eval_shape(lambda s: s, init)
    for like in (init, abstract):
        assert validate_state(states[-1], like=like) == []
        assert validate_state(states[-1], like=like, repair=True) is not None
    assert any(not np.isfinite(x) for x in jax.tree.leaves(states[4]["propagate"][0].metrics))


def as_norm(x):
    """What a norm that was learned, or an average of such, can be."""
    return np.all((x >= 0) & (x <= 2 * TOO_LARGE))


def possible_metrics(*fields):
    """What metrics can be: NaN where a step was bad."""
    norm, clipped_norm, limit, factor, clipped, steps, clipped_steps, bad = fields
    wild = not np.isfinite(norm)
    sizes = [x >= 0 or (wild and np.isnan(x)) for x in (norm, clipped_norm, factor)]
    counts = 0 <= clipped_steps <= steps and 0 <= bad <= steps
    return all(sizes) and factor != np.inf and limit >= 0 and 0 <= clipped <= 1 + 2**-10 and counts


# Whether fields can be so, in NumPy.
POSSIBLE = {
    "Metrics": possible_metrics,
    "Clock": lambda step: step >= 0,
    "EmaRatioMemory": lambda mean, n: as_norm(mean) and np.all((n > 0) | (n == 0) & (mean == 0)),
    "GrowthMemory": as_norm,
    "MomentRatioMemory": lambda mean, root, n: (
        as_norm(mean) and as_norm(root) and np.all((n > 0) | (n == 0) & (mean == 0) & (root == 0))
    ),
    "Moments": lambda mu, nu, n: np.isfinite([mu, nu]).all() and np.all(nu >= 0) and n >= 0,
    "QuantileMemory": lambda x, n: (
        np.all(np.isfinite(x) & (x >= 0)) and np.all((n > 0) | (n == 0) & (x == 0))
    ),
    "RelearningMemory": lambda _, __, n: np.all(n >= 0),
    "SecondMomentMemory": lambda root, n: (
        as_norm(root) and np.all((n > 0) | (n == 0) & (root == 0))
    ),
    "Window": lambda x, n: (
        np.all((x >= 0) & (x <= TOO_LARGE) & (n >= 0) & (n <= len(x)))
        and np.array_equal(np.arange(len(x)).reshape(-1, *(1,) * n.ndim) < n, x > 0)
    ),
    "ZScoreMemory": lambda first, mean, deviation: (
        as_norm(mean)
        and as_norm(deviation)
        and np.all((first.seen > 0) | (mean == 0) & (deviation == 0))
    ),
}


def possible(node):
    """Whether all fields of all NamedTuples in a state can be so."""
    if not isinstance(node, tuple | list | dict):
        return True
    fields = node.values() if isinstance(node, dict) else node
    return bool(POSSIBLE.get(type(node).__name__, lambda *_: True)(*fields)) and all(
        map(possible, fields)
    )


def read(x):
    """As the device compares it: XLA:CPU takes subnormal numbers for 0."""
    x = np.asarray(x)
    return np.where(np.abs(x) < np.finfo(np.float32).tiny, 0, x) if x.dtype == np.float32 else x


def is_signed(state, i):
    """Whether a leaf may hold negative numbers: the first moments of Adam do."""
    return "mu" in jax.tree_util.keystr(jax.tree.leaves_with_path(state)[i][0])


def replaced(state, i, x):
    """The state with another leaf at index i."""
    leaves, treedef = jax.tree.flatten(state)
    return treedef.unflatten([*leaves[:i], x, *leaves[i + 1 :]])


# Of single flipped bits, how many are found, as the docstring of `validate_state` has it.
SHARES = {"sign": 0.91, "exponent": 0.09, "mantissa": 0.06, "integer": 0.48}


def flipped(rng, x, kind):
    """The array with one bit of one entry flipped."""
    y = np.asarray(x).copy()
    bit = {"sign": 31, "exponent": rng.integers(23, 31), "mantissa": rng.integers(23)}.get(
        kind, rng.integers(32)
    )
    y.reshape(-1).view(np.uint32)[rng.integers(y.size)] ^= np.uint32(1) << np.uint32(bit)
    return jnp.asarray(y)


def test_flipped_bits():
    """A flipped bit is found if and only if what it leaves is impossible."""
    rng = np.random.default_rng(0)
    found, tried = Counter(), Counter()
    for trial in range(1000):
        kind = list(SHARES)[trial % 4]
        name = LEARNS[rng.integers(len(LEARNS))]
        clip = run().states[-1][name][0]
        leaves = jax.tree.leaves(clip)
        dtype = jnp.int32 if kind == "integer" else jnp.float32
        i = rng.choice([i for i, x in enumerate(leaves) if x.dtype == dtype])
        state = replaced(clip, i, flipped(rng, leaves[i], kind))

        detected = validate_state(state) != []
        changed = jax.tree.leaves(state)[i] != leaves[i]  # 0 has two signs
        hurts = changed.any() and not is_signed(clip, i)

        assert detected == (not possible(jax.tree.map(read, state)))
        tried[kind] += 1
        found[kind] += detected
        assert detected or kind != "sign" or not hurts
    for kind, share in SHARES.items():
        # Two deviations of a share of 250.
        assert found[kind] / tried[kind] == pytest.approx(share, abs=0.06)


def dropped_entry(x):
    """One entry less, or one axis more."""
    return x[..., :-1] if x.ndim else x[None]


# What makes of a leaf what no state has.
CORRUPT = {
    "NaN": lambda rng, x: jnp.asarray(
        np.where(np.arange(x.size).reshape(x.shape) == rng.integers(x.size), np.float32(np.nan), x)
    ),
    "negative count": lambda rng, x: jnp.full_like(x, -rng.integers(1, 2**31)),
    "shape": lambda rng, x: dropped_entry(x),
    "narrow": lambda rng, x: x.astype(jnp.bfloat16),
    "wide": lambda rng, x: np.asarray(x, np.float64),
    "other kind": lambda rng, x: x.astype(jnp.int32 if x.dtype == jnp.float32 else jnp.float32),
    "weak": lambda rng, x: jnp.full(x.shape, x.reshape(-1)[0].item()),
    "missing": lambda rng, x: None,
    "string": lambda rng, x: "?",
}


def kinds(node):
    """The classes of NamedTuples in a state."""
    if not isinstance(node, tuple | list | dict):
        return []
    inside = [
        kind for x in (node.values() if isinstance(node, dict) else node) for kind in kinds(x)
    ]
    return [type(node), *inside] if hasattr(node, "_fields") else inside


def without_class(rng, clip):
    """The state with dicts in place of one class of NamedTuples."""
    kind = kinds(clip)[rng.integers(len(kinds(clip)))]
    is_one = lambda x: type(x) is kind
    return jax.tree.map(lambda x: x._asdict() if is_one(x) else x, clip, is_leaf=is_one)


def corrupted(rng, clip, kind):
    """The state with one thing wrong."""
    if kind == "dict":
        return without_class(rng, clip)
    nodes = [(jax.tree_util.keystr(path), x) for path, x in jax.tree.leaves_with_path(clip)]
    # After a bad step, the norm that is shown is NaN.
    fits = {
        "NaN": lambda path, x: x.dtype == jnp.float32 and "metrics.norm" not in path,
        "negative count": lambda path, x: x.dtype == jnp.int32,
    }.get(kind, lambda *_: True)
    i = rng.choice([i for i, node in enumerate(nodes) if fits(*node)])
    return replaced(clip, i, CORRUPT[kind](rng, nodes[i][1]))


def test_random_corruptions():
    """All of 1000 are found with `like`; without it, all but shapes and containers that may be."""
    rng = np.random.default_rng(1)
    missed = Counter()
    for trial in range(1000):
        kind = [*CORRUPT, "dict"][trial % (len(CORRUPT) + 1)]
        name = LEARNS[rng.integers(len(LEARNS))]
        state = corrupted(rng, run().states[-1][name][0], kind)

        assert validate_state(state, like=run().init[name][0]) != []

        missed[kind] += validate_state(state) == []
    assert {kind for kind in missed if missed[kind]} <= {"shape", "dict"}
    # A memory of one array can have any shape; what is no NamedTuple may be a threshold's own.
    assert missed["shape"] < 0.1 * 100
    assert missed["dict"] < 0.8 * 100


def broken(state):
    """The state with a NaN in every memory, a negative count in all metrics, and lost clocks."""
    bad = {"Metrics": "steps", "EmaRatioMemory": "seen", "Clock": "step", "Window": "norms"}
    first = lambda x: bad.get(
        type(x).__name__, x._fields[0] if type(x).__name__ in CLASSES else None
    )
    spoil = lambda x: jnp.full_like(x, -3 if x.dtype == jnp.int32 else np.nan)

    def walked(x):
        if not isinstance(x, tuple | list | dict):
            return x
        if isinstance(x, dict):
            return {k: walked(v) for k, v in x.items()}
        if not hasattr(x, "_fields"):
            return type(x)(map(walked, x))
        new = type(x)(*map(walked, x))
        name = first(x)
        return (
            new._replace(**{name: spoil(getattr(x, name))})
            if isinstance(getattr(x, name or "", None), jax.Array)
            else new
        )

    return walked(state)


@pytest.mark.parametrize("known", ["nothing", "start", "shapes"])
def test_repair(known):
    """Broken clippers begin anew, all else keeps its bits, and no step is compiled again."""
    init, states, step = run()
    state = states[-1]
    like = {"nothing": None, "start": init, "shapes": jax.eval_shape(lambda s: s, init)}[known]
    compiled = step._cache_size()

    bad = broken(state)
    repaired = validate_state(bad, like=like, repair=True)

    assert len(validate_state(bad)) > 50
    assert validate_state(repaired) == validate_state(repaired, like=init) == []
    for name in LEARNS:
        trees.assert_same_bits(repaired[name], (init[name][0], state[name][1]))
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        after = step(repaired, tree())
    assert step._cache_size() == compiled
    assert validate_state(after) == []


def test_only_what_is_broken_is_repaired():
    """A NaN in one memory leaves the clock in it, other memories and the metrics as they are."""
    tree_state, leaf_state = run().states[-1]["adagc"][0]
    memory = leaf_state.memory.threshold
    bad = memory.all.threshold._replace(average=memory.all.threshold.average * np.nan)
    memory = memory._replace(all=memory.all._replace(threshold=bad))
    state = (tree_state, leaf_state._replace(memory=leaf_state.memory._replace(threshold=memory)))

    (problem,) = validate_state(state)
    first, second = validate_state(state, repair=True)

    assert str(problem) == (
        "1/memory/threshold/all/threshold/average: nan; allowed: finite float32 >= 0 <= 3.689e+19"
    )
    trees.assert_same_bits((first, second.metrics), (tree_state, leaf_state.metrics))
    assert second.memory.threshold.all.other.clock.step == len(STREAM)
    assert not np.any(second.memory.threshold.all.threshold.seen)


def test_what_only_like_can_tell():
    """A quantile that starts at a number does so again, and lost containers come back."""
    tx = optax.chain(
        oc.clip(oc.measure.global_norm(), oc.threshold.quantile(0.5, initial=3.0)), optax.adam(0.1)
    )
    init = tx.init(tree())
    clip, adam = init
    bad = clip._replace(memory=clip.memory._replace(estimate=array(np.nan)))
    assert validate_state((bad, adam), like=init, repair=True)[0].memory.estimate == 3
    assert validate_state((bad, adam), repair=True)[0].memory.estimate == 0

    for lost in (clip._replace(memory=()), clip._asdict(), None, clip._replace(metrics=None)):
        assert validate_state((lost, adam), like=init) != []
        trees.assert_same_bits(validate_state((lost, adam), like=init, repair=True), init)
    assert [p.place for p in validate_state((clip._asdict(), adam))] == ["0"]
    with pytest.raises(ValueError, match=r"pass like=tx\.init\(params\)"):
        validate_state((clip._asdict(), adam), repair=True)
    wide = clip._replace(memory=clip.memory._replace(seen=jnp.zeros((2,), jnp.int32)))
    assert [p.found for p in validate_state((wide, adam))] == ["estimate (), seen (2,)"]
    with pytest.raises(ValueError, match=r"pass like=tx\.init\(params\)"):
        validate_state((wide, adam), repair=True)


def test_other_places_than_like():
    """A state that is another one outside of its clippers is told apart, and not repaired."""
    tx, other = (optax.chain(oc.clip_by_norm(), o) for o in (optax.adam(0.1), optax.sgd(0.1)))
    state, like = tx.init(tree()), other.init(tree())

    assert {p.allowed for p in validate_state(state, like=like)} == {"nothing"}
    assert {p.found for p in validate_state(like, like=state)} == {"nothing"}
    with pytest.raises(ValueError, match="only clippers are repaired"):
        validate_state(state, like=like, repair=True)


def test_a_threshold_of_ones_own():
    """A memory that declares nothing has to be finite, and only `like` knows how it starts."""
    own = oc.threshold.Threshold(
        lambda norm: {"mean": jnp.ones_like(norm)}, lambda norm, m: (2 * m["mean"], m)
    )
    tx = oc.clip(oc.measure.leaf_norm(), own)
    init = tx.init(tree())
    bad = init._replace(memory={"mean": jnp.array([1.0, np.nan])})

    assert validate_state(init) == []
    assert [p.place for p in validate_state(bad)] == ["memory/mean"]
    assert [p.found for p in validate_state(init._replace(memory={"mean": 1.0}))] == ["float"]
    with pytest.raises(ValueError, match=r"pass like=tx\.init\(params\)"):
        validate_state(bad, repair=True)
    trees.assert_same_bits(validate_state(bad, like=init, repair=True), init)


def test_errors():
    """A state without a clipper, and a `repair` that is no bool, are errors."""
    with pytest.raises(ValueError, match="no clip of optaxclip in this state"):
        validate_state(optax.adam(0.1).init(tree()))
    with pytest.raises(ValueError, match="repair"):
        validate_state(run().init, repair="yes")


@pytest.mark.parametrize("make", [oc.zclip, oc.clip_by_second_moment])
def test_vmapped(make):
    """States of several models at once have no problem, and a NaN in one of them is found."""
    tx = make(warmup=2)
    stacked = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), tree())
    state = jax.vmap(tx.init)(stacked)
    step = jax.jit(jax.vmap(tx.update))
    for _ in range(3):
        _, state = step(stacked, state)
        assert validate_state(state) == []
    limit = state.metrics.limit.at[1].set(np.nan)

    (problem,) = validate_state(state._replace(metrics=state.metrics._replace(limit=limit)))

    assert problem.place == "metrics/limit"


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=lambda t: t.name)
def test_sharded(axis_type):
    """On a mesh, one bad entry on one device is found, and repair keeps the shardings."""
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(axis_type,) * 2)
    params = jax.device_put(trees.normal(8, 4), NamedSharding(mesh, PartitionSpec("x", "y")))
    tx = oc.clip_by_percentile(window=3, min_history=1, measure=oc.measure.element())
    step = jax.jit(tx.update)
    init = tx.init(params)
    _, state = step(params, init)
    leaves = jax.tree.leaves(state)
    i = next(i for i, x in enumerate(leaves) if x.ndim == 3)
    values = np.asarray(leaves[i]).copy()
    values[0, 5, 1] = np.nan
    bad = replaced(state, i, jax.device_put(values, leaves[i].sharding))

    assert validate_state(state) == validate_state(state, like=init) == []
    (problem,) = validate_state(bad)
    assert problem.found == "nan"
    for like in (None, init, jax.eval_shape(tx.init, params)):
        repaired = validate_state(bad, like=like, repair=True)
        step(params, repaired)
        assert step._cache_size() == 1


def test_what_holds_a_state():
    """In a TrainState and in an nnx.Optimizer, clippers are found and repaired."""
    with jax.numpy_dtype_promotion("standard"):
        tx = optax.chain(EVERY["zclip"].make(), optax.adam(0.1))
        train = TrainState.create(apply_fn=None, params=tree(), tx=tx)
        optimizer = nnx.Optimizer(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), tx, wrt=nnx.Param)
    for holder in (train, optimizer):
        assert validate_state(holder) == validate_state(holder, like=holder) == []
        leaves = jax.tree.leaves_with_path(holder)
        i = next(
            i for i, (path, _) in enumerate(leaves) if "deviation" in jax.tree_util.keystr(path)
        )
        bad = replaced(holder, i, array(np.nan))

        (problem,) = validate_state(bad)
        repaired = validate_state(bad, repair=True)

        assert problem.place.startswith("opt_state/0/memory/")
        assert type(repaired) is type(holder)
        assert jax.tree.structure(repaired) == jax.tree.structure(holder)
        assert validate_state(repaired) == []
