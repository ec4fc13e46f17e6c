"""validate_state: what every field of a state may hold, what ties it to others, and errors."""

import importlib
import pkgutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import trees
from lived import LEARNS, tree
from roster import EVERY

import optaxclip as oc
from optaxclip import validate_state
from optaxclip._numbers import TOO_LARGE
from optaxclip._range import Range, _of_class
from optaxclip.observe import BINS, RECENT
from optaxclip.record import SkipMetrics, SkipRecord, start
from optaxclip.spectral.clip import Vectors
from optaxclip.stable_adam import Moments, StableAdamState

pytestmark = pytest.mark.whole  # cheap, and each cell says something of its own


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
SKIP_METRICS = {
    "norm": 2.0,
    "limit": 1.0,
    "loss": -3.0,
    "loss_limit": -2.0,
    "skipped": 1,
    "consecutive": 2,
    "steps": 9,
    "skipped_steps": 4,
    "nonfinite_steps": 3,
    "gave_way_steps": 1,
}
SOUND = {
    "Clock": {"step": 3},
    "EmaRatioMemory": {"average": [2.0, 3.0], "seen": [1, 4]},
    "FeedbackState": {"carry": [2.0, -3.0], "clip": ()},
    "GrowthMemory": {"previous": [2.0, 3.0]},
    "History": {"values": [3.0, -2.0, 0.0], "seen": 2},
    "Metrics": METRICS,
    "NormHistory": {
        "bins": [0] * (BINS - 1) + [2],
        "recent": [0.0] * (RECENT - 1) + [2.0],
        "largest": 2.0,
        "zeros": 0,
        "nonfinite": 0,
    },
    "MomentRatioMemory": {"mean": 2.0, "root": 3.0, "seen": 1},
    "Moments": {"mu": [2.0, -3.0], "nu": [4.0, 9.0], "seen": [2]},
    "QuantileMemory": {"estimate": 2.0, "seen": 1},
    "RelearningMemory": {"all": (), "run": (), "length": 1},
    "Run": {"length": 1},
    "SecondMomentMemory": {"root": [2.0, 3.0], "seen": [1, 4]},
    "SkipMetrics": SKIP_METRICS,
    "Vectors": {"unit": [0.6, -0.8]},
    "Window": {"norms": [3.0, 2.0, 0.0], "seen": 2},
    "ZScoreMemory": {"first": FULL, "mean": 2.5, "deviation": 0.5},
}


def state_of(x):
    """A state that holds it, and where it is there."""
    if isinstance(x, Moments):
        return {"w": StableAdamState(*x, clip=oc.ClipState((), None))}, "w"
    if isinstance(x, oc.Metrics):
        return oc.ClipState((), x), "metrics"
    if isinstance(x, SkipMetrics):
        return SkipRecord((), x), "metrics"
    return oc.ClipState(x, None), "memory"


def test_every_class_has_a_sample():
    """No class says what its fields may hold without a test of it here."""
    assert set(SOUND) == set(CLASSES)


@pytest.mark.parametrize("name", SOUND)
def test_every_range(name):
    """Each field is a problem when it is NaN, infinite or out of range, unless it may be that."""
    for field, said in _of_class(CLASSES[name]).items():
        if not isinstance(said, Range):
            continue
        extremes = [-1, *([] if said.dtypes == ("int32",) else [np.nan, -np.inf, np.inf])]
        extremes += [] if said.high is None else [1.1 * said.high]
        for value in extremes:
            x = np.array(array(SOUND[name][field]))
            x.flat[-1] = value
            state, place = state_of(made(name, **SOUND[name] | {field: x}))

            found = [p for p in validate_state(state) if p.found != "a contradiction"]

            legal = str(value) in map(str, said.also) or (
                value == -1 and (said.low is None or said.low < -1)
            )
            expected = [] if legal else [(f"{place}/{field}", str(said))]
            assert [(p.place, p.allowed) for p in found] == expected
    assert validate_state(state_of(made(name, **SOUND[name]))[0]) == []


LAWS = [
    ("EmaRatioMemory", {"seen": [1, 0]}, "average is 0 where seen is 0"),
    ("Moments", {"nu": [4.0]}, "mu and nu have leaves of the same shapes"),
    ("Moments", {"seen": [2, 2]}, "seen has a number for each leaf"),
    ("NormHistory", {"largest": 0.0}, "largest is 0 where all bins are, and only there"),
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
    ("SkipMetrics", {"steps": 3}, "skipped_steps <= steps"),
    ("SkipMetrics", {"nonfinite_steps": 5}, "nonfinite_steps <= skipped_steps"),
    ("SkipMetrics", {"gave_way_steps": 10}, "gave_way_steps <= steps"),
    ("SkipMetrics", {"consecutive": 0}, "skipped is 1 where consecutive > 0, else 0"),
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
        # Of which shares and parts of unit vectors are none.
        assert all(r.high >= TOO_LARGE for r in norms if cls not in (oc.Metrics, Vectors))
    for name in LEARNS:
        assert not any(
            np.any(x) for x in jax.tree.leaves(EVERY[name].make(record=False).init(tree()))
        )


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
        validate_state(oc.clip_by_norm().init(tree()), repair="yes")
