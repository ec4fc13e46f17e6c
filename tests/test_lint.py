"""diagnose: orders that do not do what they look like are found, and right ones are left alone."""

import inspect
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx
from flax.training.train_state import TrainState
from optax import contrib
from roster import EVERY
from test_public import PUBLIC

import optaxclip
from optaxclip.lint import diagnose

pytestmark = pytest.mark.whole  # cheap, and each cell says something of its own

PARAMS = {"w": jnp.ones((3, 2)), "b": jnp.ones(2)}
LABELS = {"w": "a", "b": "b"}
MASK = {"w": True, "b": False}
CLIP, LEAVES, ENTRIES = (
    optaxclip.clip_by_global_norm(1.0),
    optaxclip.clip_by_norm(1.0),
    optaxclip.clip_by_value(1.0),
)
NORMALISER = optaxclip.normalize_by_global_norm(1.0)
ADAM, SGD = optax.adamw(1e-3), optax.sgd(0.1)
WARMUP = optax.linear_schedule(0.0, 1e-3, 10)


def steps(tx):
    return optax.MultiSteps(tx, 2).gradient_transformation()


def frozen(tx):
    return optax.partition({"a": tx, "b": optax.set_to_zero()}, LABELS)


def scaled(scale, limit=1.0):
    return optaxclip.clip(
        optaxclip.measure.global_norm(), optaxclip.threshold.constant(limit), scale
    )


def jitted(tx):
    return optax.GradientTransformation(jax.jit(tx.init), tx.update)


def wrapped(tx):
    def init(params):
        return tx.init(params)

    return tx._replace(init=init)


def own():
    return optax.GradientTransformation(lambda params: (), lambda grads, state, params: grads)


RIGHT = {
    "clip, Adam": optax.chain(CLIP, ADAM),
    "names": optax.named_chain(("clip", CLIP), ("adam", ADAM)),
    "nested": optax.chain(optax.chain(CLIP), optax.chain(ADAM)),
    "loss scale": optax.chain(optax.scale(1 / 1024), CLIP, ADAM),
    "ascent": optax.chain(optax.scale(-1.0), CLIP, ADAM),
    "decay later": optax.chain(CLIP, optax.add_decayed_weights(1e-4), SGD),
    "zero_nans first": optax.chain(optax.zero_nans(), optax.clip_by_global_norm(1.0), ADAM),
    "zero_nans behind entries": optax.chain(optax.clip(1.0), optax.zero_nans(), ADAM),
    "zero_nans behind a part": optax.chain(optax.masked(LEAVES, MASK), optax.zero_nans(), ADAM),
    "zero_nans behind a mask": optax.chain(
        optaxclip.adaptive_grad_clip(mask=MASK), optax.zero_nans(), ADAM
    ),
    "zero_nans behind one of two": optax.chain(
        optax.partition({"a": LEAVES, "b": optax.identity()}, LABELS), optax.zero_nans(), ADAM
    ),
    "zero_nans behind one's own": optax.chain(CLIP, own(), optax.zero_nans(), ADAM),
    "apply_every, then a clip": optax.chain(optax.apply_every(2), CLIP, SGD),
    "watched": optax.chain(
        optax.monitor({"ema": optax.measure_with_ema(optax.tree.norm, 0.9)}), CLIP, ADAM
    ),
    "observed": optax.chain(optaxclip.observe_norms(), CLIP, ADAM),
    "of the same size": optax.chain(
        optax.scale_by_optimistic_gradient(),
        optax.scale_by_param_block_norm(),
        optax.scale_by_param_block_rms(),
        optax.scale_by_backtracking_linesearch(2),
        optax.scale_by_zoom_linesearch(2),
        CLIP,
    ),
    "partition behind": optax.chain(CLIP, optax.partition({"a": ADAM, "b": SGD}, LABELS)),
    "partition by leaves": optax.partition({"a": LEAVES, "b": LEAVES}, LABELS),
    "one part": optax.partition({"a": optax.chain(CLIP, ADAM), "b": SGD}, LABELS),
    "frozen": frozen(optax.chain(CLIP, ADAM)),
    "masked and frozen": optax.chain(
        optax.masked(optax.chain(CLIP, ADAM), MASK),
        optax.masked(optax.set_to_zero(), {"w": False, "b": True}),
    ),
    "masked, then frozen": optax.chain(optax.masked(CLIP, MASK), frozen(SGD)),
    "frozen, then a clip": optax.chain(
        optax.masked(optax.set_to_zero(), {"w": False, "b": True}), CLIP, ADAM
    ),
    "all is frozen": optax.chain(CLIP, optax.set_to_zero()),
    "a part is frozen at its end": optax.partition(
        {"a": optax.chain(CLIP, SGD, optax.set_to_zero()), "b": SGD}, LABELS
    ),
    "leaves before frozen ones": optax.chain(LEAVES, frozen(SGD)),
    "AGC with a mask": optax.chain(optaxclip.adaptive_grad_clip(mask=MASK), SGD),
    "in MultiSteps": steps(optax.chain(CLIP, ADAM)),
    "MultiSteps itself": optax.MultiSteps(optax.chain(CLIP, ADAM), 2),
    "around MultiSteps": optaxclip.skip_step(steps(optax.chain(CLIP, ADAM))),
    "skip_step": optaxclip.skip_step(optax.chain(CLIP, ADAM)),
    "skip_step, then the rate": optax.chain(
        optaxclip.skip_step(optax.chain(CLIP, optax.scale_by_adam())), optax.scale(-1e-3)
    ),
    "apply_if_finite": optax.apply_if_finite(optax.chain(CLIP, ADAM), 3),
    "NaN passes": optax.chain(optax.clip_by_global_norm(1.0), optax.apply_if_finite(ADAM, 3)),
    "NaN passes, ours": optax.chain(
        optaxclip.clip_by_global_norm(1.0, nonfinite="propagate"), optax.apply_if_finite(ADAM, 3)
    ),
    "Adafactor": optax.chain(CLIP, optax.adafactor(1e-3)),
    "RMS of updates": optax.chain(ADAM, optaxclip.clip_by_block_rms(1.0)),
    "clippy": optax.chain(CLIP, ADAM, optaxclip.clippy()),
    "growth of updates": optax.chain(ADAM, optaxclip.clip_by_norm_growth()),
    "growth between": optax.chain(
        optax.scale_by_adam(), optaxclip.clip_by_norm_growth(), optax.scale_by_trust_ratio()
    ),
    "tighter": optax.chain(CLIP, optaxclip.clip_by_value(0.1), ADAM),
    "finer first": optax.chain(ENTRIES, optaxclip.clip_by_global_norm(2.0), ADAM),
    "other order": optax.chain(optaxclip.clip_by_global_norm(1.0, ord=math.inf), CLIP, ADAM),
    "only some leaves": optax.chain(optax.masked(LEAVES, MASK), optaxclip.clip_by_norm(2.0), ADAM),
    "then normalised": optax.chain(CLIP, optaxclip.normalize_by_global_norm(2.0), SGD),
    "normalised by parts": optax.partition(dict.fromkeys("ab", NORMALISER), LABELS),
    "normalised behind": optax.chain(ADAM, NORMALISER),
    "normalised, then clipped": optax.chain(scaled(optaxclip.scale.automatic), CLIP, SGD),
    "soft": optax.chain(CLIP, scaled(optaxclip.scale.tanh, 2.0), ADAM),
    "scale of one's own": optax.chain(
        scaled(lambda norm, limit: 3 * limit / norm), optaxclip.clip_by_global_norm(2.0)
    ),
    "may change": optax.inject_hyperparams(optaxclip.clip_by_global_norm)(max_norm=math.inf),
    "schedule": optax.chain(optaxclip.clip_by_global_norm(lambda step: jnp.inf), ADAM),
    "injected": optax.chain(CLIP, optax.inject_hyperparams(optax.adamw)(WARMUP)),
    "feedback": optax.chain(optaxclip.clip_with_feedback(LEAVES), SGD),
    "lookahead": optax.lookahead(optax.chain(CLIP, SGD), 5, 0.5),
    "schedule_free": contrib.schedule_free(optax.chain(CLIP, SGD), 0.1),
    "muon": optax.chain(CLIP, contrib.muon(0.1)),
    "sam": contrib.sam(optax.chain(CLIP, SGD), optax.chain(contrib.normalize(), SGD)),
    "flat": optax.flatten(optax.chain(CLIP, ADAM)),
}


@pytest.mark.parametrize("name", RIGHT)
def test_what_is_right_has_no_finding(name):
    """A chain in the right order, in whatever wrapper, is left alone."""
    assert diagnose(RIGHT[name]) == []


AFTER = "the clip by {} comes after optax.scale_by_adam ({})"
DIVIDED = "which has divided the size of the gradients out"
IN_FRONT = "put the clip in front of it"
STEPS = "so its limit is one of steps and not of gradients"
DECAYED = "so its norm is that of the gradients with the decayed weights added"
FROZEN = "so the gradients of what is frozen are in its norm"
LEAVE = "put the clip into an optax.masked that leaves these out"
MASKED_ONCE = "once, in front, and in an optax.masked without what is frozen"
EACH = "so it clips each microbatch and not their mean"
NEVER, ONE = "so it never clips", "leave one of them out"
HIDES, AROUND = "which hides bad steps from it", "put it around the whole chain"

# The transformation, and where, what, why and mend of its finding.
WRONG = {
    "Adam, clip": (
        optax.chain(ADAM, CLIP), "1", AFTER.format("global_norm", "0/0"), DIVIDED, IN_FRONT,
    ),
    "Adam, Optax's clip": (
        optax.chain(ADAM, optax.clip_by_global_norm(1.0)), "1",
        "optax.clip_by_global_norm comes after optax.scale_by_adam (0/0)", DIVIDED, IN_FRONT,
    ),
    "jitted init": (
        jitted(optax.chain(optax.inject_hyperparams(optax.sgd)(WARMUP, momentum=0.9), CLIP)), "1",
        "the clip by global_norm comes after optax.trace (0/0)", "which adds past gradients",
        IN_FRONT,
    ),
    "wrapped init": (
        wrapped(optax.chain(ADAM, CLIP)), "1",
        AFTER.format("global_norm", "0/0"), DIVIDED, IN_FRONT,
    ),
    "no record": (
        optax.chain(ADAM, optaxclip.clip_by_value(1.0, record=False)), "1",
        AFTER.format("element", "0/0"), DIVIDED, IN_FRONT,
    ),
    "names": (
        optax.named_chain(("adam", ADAM), ("agc", optaxclip.adaptive_grad_clip())), "agc",
        AFTER.format("relative", "adam/0"), DIVIDED, IN_FRONT,
    ),
    "in MultiSteps": (
        steps(optax.chain(ADAM, optaxclip.zclip())), "1",
        AFTER.format("global_norm", "0/0"), DIVIDED, IN_FRONT,
    ),
    "injected": (
        optax.chain(optax.inject_hyperparams(optax.adam)(WARMUP), optaxclip.adagc()), "1",
        "optaxclip.adagc comes after optax.scale_by_adam (0/0)", DIVIDED, IN_FRONT,
    ),
    "injected momentum": (
        optax.chain(optax.inject_hyperparams(optax.sgd)(WARMUP, momentum=0.9), CLIP), "1",
        "the clip by global_norm comes after optax.trace (0/0)", "which adds past gradients",
        IN_FRONT,
    ),
    "stable Adam": (
        optax.chain(optaxclip.scale_by_stable_adam(), CLIP, optax.scale(-1e-3)), "1",
        "the clip by global_norm comes after optaxclip.scale_by_stable_adam (0)", DIVIDED, IN_FRONT,
    ),
    "momentum": (
        optax.chain(optax.sgd(0.1, momentum=0.9), CLIP), "1",
        "the clip by global_norm comes after optax.trace (0/0)", "which adds past gradients",
        IN_FRONT,
    ),
    "learning rate": (
        optax.chain(SGD, CLIP), "1",
        "the clip by global_norm comes after the learning rate, optax.scale (0/1)", STEPS, IN_FRONT,
    ),
    "schedule": (
        optax.chain(optax.sgd(WARMUP), LEAVES), "1",
        "the clip by leaf_norm comes after the learning rate, optax.scale_by_schedule (0/1)",
        STEPS, IN_FRONT,
    ),
    "warm-up": (
        optax.chain(optax.inject_hyperparams(optax.sgd)(WARMUP), CLIP), "1",
        "the clip by global_norm comes after the learning rate, optax.scale (0/1)", STEPS, IN_FRONT,
    ),
    "weight decay": (
        optax.chain(optax.add_decayed_weights(1e-4), CLIP, SGD), "1",
        "the clip by global_norm comes after optax.add_decayed_weights (0)", DECAYED, IN_FRONT,
    ),
    "clippy first": (
        optax.chain(optaxclip.clippy(), SGD), "0",
        "the clip by relative_entries comes before optax.scale (1/1)",
        "so what it limits relative to the parameters is not their change", "put the clip last",
    ),
    "growth first": (
        optax.chain(optaxclip.clip_by_norm_growth(), ADAM), "0",
        "the clip by leaf_norm comes before optax.scale_by_adam (1/0)",
        "and clips most of the noise of raw gradients, which is growth", "put the clip behind it",
    ),
    "partition": (
        optax.chain(optax.partition({"a": CLIP, "b": optax.chain(CLIP)}, LABELS), ADAM), "0",
        "optax.partition has clips by a global norm in 2 parts (a, b)",
        "each of which has a norm of its own",
        "clip once, in front, or say that it is meant with measure.by_label",
    ),
    "labels with a slash": (
        optax.chain(
            optax.partition({"net/w": CLIP, "net/b": CLIP}, {"w": "net/w", "b": "net/b"}), ADAM
        ), "0",
        "optax.partition has clips by a global norm in 2 parts (net/w, net/b)",
        "each of which has a norm of its own",
        "clip once, in front, or say that it is meant with measure.by_label",
    ),
    "parts, and a frozen one": (
        optax.chain(
            optax.partition({"a": CLIP, "b": CLIP, "c": optax.set_to_zero()}, LABELS), ADAM
        ), "0",
        "optax.partition has clips by a global norm in 2 parts (a, b)",
        "each of which has a norm of its own",
        f"clip {MASKED_ONCE}, or say that it is meant with measure.by_label",
    ),
    "frozen behind": (
        optax.chain(CLIP, frozen(SGD)), "0",
        "the clip by global_norm comes before optax.set_to_zero (1/b)", FROZEN, LEAVE,
    ),
    "frozen in a chain": (
        optax.chain(
            CLIP, optax.partition({"a": SGD, "b": optax.chain(optax.set_to_zero())}, LABELS)
        ), "0",
        "the clip by global_norm comes before optax.set_to_zero (1/b/0)", FROZEN, LEAVE,
    ),
    "frozen by a mask": (
        optax.chain(optax.clip_by_global_norm(1.0), SGD, optax.masked(optax.set_to_zero(), MASK)),
        "0", "optax.clip_by_global_norm comes before optax.set_to_zero (2)", FROZEN, LEAVE,
    ),
    "masked": (
        optax.chain(optax.masked(CLIP, MASK), ADAM), "0",
        "the clip by global_norm is inside of optax.masked (0)",
        "so what the mask leaves out is not in the norm, and passes unclipped",
        "clip outside of the mask, unless all else is frozen",
    ),
    "microbatches": (
        optax.chain(CLIP, steps(ADAM)), "0",
        "the clip by global_norm comes before optax.MultiSteps (1)",
        EACH, "put the clip inside",
    ),
    "apply_every": (
        optax.chain(CLIP, SGD, optax.apply_every(2)), "0",
        "the clip by global_norm comes before optax.apply_every (2)", EACH,
        "use optax.MultiSteps, with the clip inside",
    ),
    "inf": (
        optax.chain(optaxclip.clip_by_global_norm(math.inf), ADAM), "0",
        "the clip by global_norm has the limit inf", NEVER,
        "give it a limit, or use observe_norms to look only",
    ),
    "finer behind": (
        optax.chain(CLIP, optaxclip.clip_by_value(2.0), ADAM), "1",
        "the clip by element has the limit 2 behind the clip by global_norm (0) with 1", NEVER, ONE,
    ),
    "twice": (
        optax.chain(optax.clip_by_global_norm(1.0), CLIP, ADAM), "1",
        "the clip by global_norm has the limit 1 behind optax.clip_by_global_norm (0) with 1",
        NEVER, ONE,
    ),
    "strict behind": (
        optax.chain(CLIP, scaled(optaxclip.scale.strict, 2.0)), "1",
        "the clip by global_norm has the limit 2 behind the clip by global_norm (0) with 1",
        NEVER, ONE,
    ),
    "soft, then hard": (
        optax.chain(scaled(optaxclip.scale.rsqrt), optax.clip_by_global_norm(2.0)), "1",
        "optax.clip_by_global_norm has the limit 2 behind the clip by global_norm (0) with 1",
        NEVER, ONE,
    ),
    "third": (
        optax.chain(CLIP, optax.chain(optax.clip(0.5)), optax.clip_by_global_norm(2.0)),
        "2", "optax.clip_by_global_norm has the limit 2 behind the clip by global_norm (0) with 1",
        NEVER, ONE,
    ),
    "skip_step behind": (
        optax.chain(CLIP, optaxclip.skip_step(ADAM)), "1",
        "optaxclip.skip_step comes after the clip by global_norm (0)", HIDES, AROUND,
    ),
    "skip_step in front": (
        optax.chain(optaxclip.skip_step(CLIP), ADAM), "0",
        "optaxclip.skip_step comes before optax.scale_by_adam (1/0)",
        "which takes a step that was left out for one with a gradient of 0", AROUND,
    ),
    "apply_if_finite behind": (
        optax.chain(CLIP, optax.apply_if_finite(ADAM, 3)), "1",
        "optax.apply_if_finite comes after the clip by global_norm (0)", HIDES, AROUND,
    ),
    "zero_nans behind": (
        optax.chain(optax.clip_by_global_norm(1.0), optax.zero_nans(), ADAM), "1",
        "optax.zero_nans comes after optax.clip_by_global_norm (0)",
        "which makes all that shares a norm with a NaN one", "put it in front of the clip",
    ),
    "zero_nans for nothing": (
        optax.chain(CLIP, optax.zero_nans(), ADAM), "1",
        "optax.zero_nans comes after the clip by global_norm (0)",
        "which leaves no NaN", "leave it out",
    ),
    "zero_nans behind a normaliser": (
        optax.chain(NORMALISER, optax.zero_nans(), ADAM), "1",
        "optax.zero_nans comes after the scaling by global_norm (0)",
        "which leaves no NaN", "leave it out",
    ),
    "a normaliser of nothing": (
        optax.chain(scaled(optaxclip.scale.psac, math.inf), ADAM), "0",
        "the scaling by global_norm has the limit inf", NEVER,
        "give it a limit, or use observe_norms to look only",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_has_its_finding_and_no_other(name):
    """A wrong order prints as one sentence: where and what it is, what comes of it, what to do."""
    tx, where, what, why, mend = WRONG[name]
    assert diagnose(tx) == [(where, what, why, mend)]
    assert str(*diagnose(tx)) == f"{where}: {what}, {why}: {mend}"


def test_the_whole_transformation_has_no_place():
    """What is not in a chain is named alone."""
    (finding,) = diagnose(optax.masked(CLIP, MASK))
    assert str(finding).startswith("the clip by global_norm is inside of optax.masked, so ")


WARN = {"noisy_sgd", "optimistic_adam"}  # that they are about to change or go


def made(module):
    """What every function of a module makes, if it makes a transformation of a learning rate."""
    for name in sorted(vars(module)):
        function = getattr(module, name)
        parameters = inspect.signature(function).parameters if inspect.isfunction(function) else ()
        if "learning_rate" in parameters:
            wants = {p.name for p in parameters.values() if p.default is p.empty}
            if wants <= {"learning_rate"} and name not in WARN:
                yield name, function(0.1)


OPTIMIZERS = dict([*made(optax), *made(contrib)])


def test_the_optimizers_are_many():
    """The next test is one of all optimizers that Optax has."""
    assert {"adam", "adafactor", "lion", "sgd", "muon", "ademamix", "lars"} <= OPTIMIZERS.keys()
    assert len(OPTIMIZERS) > 35


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_of_optax(name):
    """No optimizer has a finding of its own, nor behind a clip, and each has one before a clip."""
    tx = OPTIMIZERS[name]
    assert diagnose(tx) == diagnose(optax.chain(CLIP, tx)) == []
    (finding,) = diagnose(optax.chain(tx, CLIP))
    assert (finding.where, finding.what.split(" optax.")[0]) in {
        ("1", "the clip by global_norm comes after"),
        ("1", "the clip by global_norm comes after the learning rate,"),
    }


# What is given updates, or is wrapped around the optimizer.
NOT_IN_FRONT = {"clippy", "clip_by_norm_growth", "skip_step"}
BEHIND = {
    "clip_by_block_rms", "clippy", "clip_by_norm_growth", "scale_by_stable_adam",
    "normalize_by_global_norm", "stabilize_gradients",
}  # fmt: skip


@pytest.mark.parametrize("name", EVERY)
def test_every_variant(name):
    """A variant belongs in front of the optimizer, but for those that belong behind it."""
    tx = EVERY[name].make()
    assert diagnose(tx) == []
    assert (diagnose(optax.chain(tx, ADAM)) == []) is (name not in NOT_IN_FRONT)
    assert (diagnose(optax.chain(ADAM, tx)) == []) is (name in BEHIND)


SCALES = [x for x in PUBLIC if x.startswith("optaxclip.scale.") and callable(PUBLIC[x])]


@pytest.mark.parametrize("name", SCALES)
def test_every_scale(name):
    """A clip with any scale belongs in front of the optimizer, what normalises may be behind it."""
    tx = scaled(PUBLIC[name])
    assert diagnose(optax.chain(tx, ADAM)) == []
    normalises = name.rpartition(".")[-1] in {"normalize", "automatic", "psac"}
    assert (diagnose(optax.chain(ADAM, tx)) == []) is normalises


def test_what_holds_a_transformation():
    """A TrainState and an nnx.Optimizer are read as the transformation that they hold."""
    model, tx = linen.Dense(2), optax.chain(ADAM, CLIP)
    params = model.init(jax.random.key(0), jnp.ones((1, 3)))
    state = TrainState.create(apply_fn=model.apply, params=params, tx=tx)
    net = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(net, tx, wrt=nnx.Param)
    assert diagnose(state) == diagnose(optimizer) == diagnose(tx) != []


@pytest.mark.parametrize("value", [None, 1.0, "adam", {}, CLIP.init(PARAMS)])
def test_no_transformation(value):
    """Anything else is refused by name, with what is allowed."""
    with pytest.raises(TypeError, match=r"^tx must be a transformation such as optax.adamw"):
        diagnose(value)


def test_closed_boxes():
    """A transformation of one's own is no reason for a finding; what it closes over is read."""

    def boxed(inner):
        def update(grads, state, params=None, **extra):
            raise AssertionError("nothing runs")

        return optax.GradientTransformationExtraArgs(inner.init, update)

    def around(inner):
        def update(grads, state, params=None):
            return inner.update(grads, state, params)

        return optax.GradientTransformation(inner.init, jax.jit(update))

    def itself():
        def update(grads, state, params=None):
            return (tx, grads), state

        tx = optax.GradientTransformation(CLIP.init, update)
        return tx

    assert diagnose(optax.chain(boxed(CLIP), CLIP, ADAM)) == []
    assert diagnose(optax.chain(around(optax.identity()), CLIP, itself(), ADAM)) == []
    assert [f.where for f in diagnose(around(optax.chain(ADAM, CLIP)))] == ["1"]


def test_what_contains_itself():
    """A dict or list that contains itself is read once, with what else is in it."""
    loop = {"wrong": optax.chain(ADAM, CLIP), "list": []}
    loop["itself"] = loop
    loop["list"].extend([loop, loop["list"]])

    def update(grads, state, params=None):
        return loop, state

    (finding,) = diagnose(optax.GradientTransformation(CLIP.init, update))
    assert finding.where == "wrong/1"


def test_multi_steps_is_as_the_findings_say():
    """A clip in optax.MultiSteps measures the mean of microbatches, one outside measures each."""
    microbatches = [np.array([6.0, 0.0]), np.array([0.0, 8.0])]
    inside, outside = steps(optax.chain(CLIP, SGD)), optax.chain(CLIP, steps(SGD))
    norms = []
    for tx in (inside, outside):
        state = tx.init(jnp.zeros(2))
        for grads in microbatches:
            with jax.numpy_dtype_promotion("standard"):  # MultiSteps divides by a count
                _, state = tx.update(jnp.asarray(grads, jnp.float32), state)
        norms.append(float(optaxclip.metrics(state)["norm"]))
    assert norms == [np.linalg.norm(np.mean(microbatches, axis=0)), 8.0]  # 5 and 8
