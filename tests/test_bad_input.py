"""Bad arguments are errors at construction: every argument of every public function.

Each names the argument, what is allowed and the value. What only the trees can tell is in
test_check.py; what is known as late as a step runs, at the end and in test_failures.py under
failure 8. A new argument joins by one entry in `KINDS`.
"""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kinds import (
    AXES,
    AXIS_NAME,
    DDOF,
    DECAY,
    FLAG,
    FROM_0,
    GROWTH,
    HISTORY,
    LABELS,
    LIMIT,
    MASK,
    MATRIX,
    NUMBER,
    ORDER,
    PATIENCE,
    PERCENT,
    POLICY,
    POSITIVE,
    SCALE,
    SHARE,
    STEPS,
    WINDOW,
    assert_refused,
    choice,
    measure,
    optional,
    rule,
    threshold,
    transformation,
)
from roster import EVERY
from streams import BAD, NUMBERS, SIGN, called, noisy, run
from streams import STEPS as LENGTH

import optaxclip as oc

pytestmark = pytest.mark.whole  # cheap, and each cell says something of its own

# What takes arrays in the program, or a log: in the tests of these rooms.
APART = tuple(
    f"optaxclip.{x}"
    for x in ("advise", "cotangent", "lint", "observe", "per_example", "qk", "replaying")
)
ROOMS = {"": oc, "measure.": oc.measure, "threshold.": oc.threshold, "scale.": oc.scale}
PUBLIC = {
    prefix + name: value
    for prefix, room in ROOMS.items()
    for name, value in vars(room).items()
    if callable(value) and not inspect.isclass(value) and name[0] != "_"
    if value.__module__.startswith("optaxclip") and not value.__module__.startswith(APART)
}

SCALES = ("rescale", "strict", "skip", "normalize", "softsign", "rsqrt", "tanh")
VARIANTS = tuple(EVERY)
FOLLOWING, FEEDS = threshold("threshold.growth(1.01)"), ("capped", "clipped", "raw", "skip")
LEAFWISE = measure("measure.leaf_norm()")
UNKNOWN = None  # arrays in the program, made by the engine; a state: test_record.py

# The kind of every argument by its name, and where it is of another kind than elsewhere.
KINDS = {
    **dict.fromkeys(("max_value", "max_norm", "min_norm", "clipping", "max_rms", "limit"), LIMIT),
    **dict.fromkeys(("relative", "k", "z_max", "ratio", "floor", "min_sigma"), NUMBER),
    **dict.fromkeys(("decay", "norm_decay", "b1", "b2"), DECAY),
    **dict.fromkeys(("eps", "absolute", "rate", "gamma", "r"), POSITIVE),
    **dict.fromkeys(("record", "per_tensor", "bias_correction", "with_current", "repair"), FLAG),
    **dict.fromkeys(("axis", "axes", "stacked"), AXES),
    **dict.fromkeys(("warmup", "steps"), STEPS),
    **dict.fromkeys(("first", "then"), threshold("threshold.constant(1.0)")),
    **dict.fromkeys(("threshold", "other"), FOLLOWING),
    "initial": optional(POSITIVE),
    "margin": optional(NUMBER),
    "max_growth": GROWTH,
    "percentile": PERCENT,
    "quantile": SHARE,
    "window": WINDOW,
    "min_history": optional(HISTORY),
    "patience": PATIENCE,
    "ord": ORDER,
    "axis_name": AXIS_NAME,
    "mask": MASK,
    "labels": LABELS,
    "measure": measure("measure.global_norm()"),
    "scale": SCALE,
    "nonfinite": POLICY,
    "feed": choice(*FEEDS),
    "mode": choice("reciprocal", "mean", "sigma"),
    "start": choice("median", "mean"),
    "convention": choice("paper", "paddle"),
    "history": choice("valid", "all"),
    "max_consecutive": PATIENCE,
    "ddof": DDOF,
    "kind": choice("hard", "soft"),
    "method": choice("newton_schulz", "svd", "power_iteration"),
    "max_carry": FROM_0,
    "clipper": transformation("clip_by_global_norm(1.0)"),
    "inner": transformation("optax.adamw(1e-3)"),
}
ELSEWHERE = {
    **{(name, "measure"): optional(KINDS["measure"]) for name in VARIANTS},
    **{(f"scale.{name}", x): UNKNOWN for name in SCALES for x in ("norm", "limit")},
    ("metrics", "opt_state"): UNKNOWN,
    ("register_for_export", "opt_state"): UNKNOWN,
    ("validate_state", "opt_state"): UNKNOWN,
    ("validate_state", "like"): UNKNOWN,
    ("clip", "threshold"): KINDS["then"],
    ("clip_by_block_rms", "threshold"): LIMIT,
    ("normalize_by_global_norm", "norm"): LIMIT,
    ("clippy", "measure"): optional(LEAFWISE),
    ("measure.relative", "measure"): measure("measure.unit_norm()"),
    ("measure.relative_entries", "measure"): LEAFWISE,
    ("measure.stacked", "measure"): LEAFWISE,
    **{(name, "warmup"): WINDOW for name in ("zclip", "threshold.zscore")},
    **{(f"threshold.{name}", "min_history"): HISTORY for name in ("percentile", "sigma")},
    **{
        (name, "patience"): optional(PATIENCE)
        for name in ("clip_by_percentile", "autoclip", "clip_by_quantile")
    },
    ("threshold.relearning", "patience"): STEPS,
    ("threshold.multiple", "ratio"): POSITIVE,
    ("skip_step", "measure"): optional(KINDS["measure"]),
    ("skip_step", "norm"): rule(" >= 0"),
    ("skip_step", "loss"): rule(""),
    ("clip_with_feedback", "decay"): SHARE,
    ("clip_by_spectral_norm", "axes"): MATRIX,
    **{(name, "feed"): choice(*FEEDS[1:3]) for name in ("clip_by_sigma", "threshold.sigma")},
    **{
        (name, "feed"): choice(*FEEDS[:3])
        for name in ("clip_by_second_moment", "threshold.second_moment")
    },
}
PAIRS = [(name, x) for name in PUBLIC for x in inspect.signature(PUBLIC[name]).parameters]
ONE, OTHER, TREE = oc.threshold.constant(1.0), oc.threshold.growth(1.5), oc.measure.global_norm()
# What has no default, or one that does not go with all that is good for another argument.
GIVEN = {
    "clip": {"measure": TREE, "threshold": ONE},
    "clip_with_feedback": {"clipper": oc.clip_by_norm()},
    "skip_step": {"inner": oc.clip_by_norm()},
    "validate_state": {"opt_state": oc.clip_by_value().init(())},
    "measure.by_label": {"labels": "all", "measure": TREE},
    "measure.relative": {"measure": TREE, "eps": 1e-3},
    "measure.relative_entries": {"measure": TREE, "relative": 0.5, "absolute": 0.1},
    "measure.stacked": {"measure": TREE, "axes": 0},
    "threshold.constant": {"limit": 1.0},
    "threshold.percentile": {"percentile": 95.0, "min_history": 1},
    "threshold.quantile": {"quantile": 0.9},
    "threshold.zscore": {"z_max": 2.5},
    "threshold.sigma": {"k": 3.0, "min_history": 1},
    "threshold.ema_ratio": {"ratio": 2.0},
    "threshold.growth": {"max_growth": 1.5},
    "threshold.second_moment": {"k": 3.0},
    "threshold.bounded": {"threshold": ONE},
    "threshold.fallback": {"threshold": OTHER, "other": ONE},
    "threshold.relearning": {"threshold": OTHER},
    "threshold.multiple": {"threshold": OTHER, "ratio": 1.5},
    "threshold.until": {"steps": 3, "first": ONE, "then": OTHER},
}
JUDGED = [pair for pair in PAIRS if ELSEWHERE.get(pair, pair)]
every_argument = pytest.mark.parametrize(
    ("function", "argument"), JUDGED, ids=map("-".join, JUDGED)
)


def make(function, **arguments):
    """What a function makes of these and otherwise good arguments."""
    return PUBLIC[function](**GIVEN.get(function, {}) | arguments)


def kind_of(function, argument):
    """What an argument can be."""
    return ELSEWHERE.get((function, argument)) or KINDS[argument]


def test_every_argument_of_every_public_function_is_in_the_table():
    """A new argument must say of which kind it is, and one that is gone must leave the table."""
    unknown = [pair for pair in PAIRS if pair not in ELSEWHERE and pair[1] not in KINDS]

    assert unknown == []
    assert {pair for pair in ELSEWHERE if pair[1] != "measure"} <= set(PAIRS)
    assert set(KINDS) <= {argument for _, argument in PAIRS}


@every_argument
def test_bad_values_are_refused_at_construction(function, argument):
    """A bad value is refused in so many words: the argument, what is allowed, the value."""
    kind = kind_of(function, argument)
    for bad in kind.bad:
        allowed = (bad.allowed or kind.allowed).format(argument=argument)
        message = f"{argument} must be {allowed}; got {bad.shown or repr(bad.value)}"
        assert_refused(lambda bad=bad: make(function, **{argument: bad.value}), bad.error, message)


@every_argument
def test_good_values_are_accepted_up_to_the_edges(function, argument):
    """What an argument can be is not refused: both ends, and Python, NumPy and JAX numbers."""
    good = kind_of(function, argument).good
    for value in good:
        assert make(function, **{argument: value}) is not None
    if any(isinstance(value, jax.Array) for value in good):
        traced = jax.ShapeDtypeStruct((), jnp.float32)
        jax.eval_shape(lambda x: x if make(function, **{argument: x}) else None, traced)


@every_argument
def test_errors_hold_no_contents_of_arrays(function, argument):
    """Of a large array or tree in the wrong place, an error shows shapes, and not more."""
    tree = {f"layer{i}": np.full((3, 3), 7.5) for i in range(100)}
    for value in (np.full(1000, 7.5), jnp.full((2, 2), 7.5), tree, list(tree.values())):
        with pytest.raises((TypeError, ValueError)) as caught:
            make(function, **{argument: value})
        assert "7.5" not in str(caught.value)
        assert len(str(caught.value)) < 500


CONTRADICTIONS = {
    "min_history must be at most the window, 8; got 9": lambda: oc.threshold.percentile(
        95.0, window=8, min_history=9
    ),
    "min_history must be at most the window, 24; got 25": lambda: oc.clip_by_sigma(
        window=24, min_history=25
    ),
    "min_norm must be at most max_norm, which is np.float32(1.0); got 2.0": lambda: oc.zclip(
        min_norm=2.0, max_norm=np.float32(1)
    ),
    "axis must be None with per_tensor=True; got 0": lambda: oc.adaptive_grad_clip(
        per_tensor=True, axis=0
    ),
}


@pytest.mark.parametrize("message", CONTRADICTIONS)
def test_arguments_that_contradict_each_other(message):
    """Two arguments that are good each by itself may not be together."""
    assert_refused(CONTRADICTIONS[message], ValueError, message)


@pytest.mark.skipif(np.dtype(np.longdouble).itemsize == 8, reason="no longer float here")
def test_longer_floats_are_refused():
    """What JAX has no dtype for is no number."""
    with pytest.raises(TypeError, match=r"^max_norm must be .*; got np.longdouble\('1.0'\)$"):
        oc.clip_by_norm(np.longdouble(1))


# The first argument, which memories learn by; a bad limit or bound is not learned.
@pytest.mark.parametrize("pair", NUMBERS, ids="-".join)
def test_one_bad_number_does_no_lasting_harm(pair):
    """Where a schedule gives NaN, -inf or -1 at one step, all is as ever 20 steps later."""
    name, argument = pair
    good = called(name)[2][argument]
    for bad in BAD:
        steps = run(name, noisy(), **{argument: np.where(np.arange(LENGTH) == 100, bad, good)})

        assert np.isfinite(steps.updates).all()
        assert (np.sign(steps.updates[120:]) == SIGN).all()
