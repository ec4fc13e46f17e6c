"""validate_state with repair=True: what is broken begins anew, all else keeps its bits."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import trees
from lived import LEARNS, STREAM, run, tree

import optaxclip as oc
from optaxclip import validate_state

# One field of each memory, and of metrics and clocks.
SPOILED = {
    *("average", "estimate", "length", "mean", "mu", "norms", "previous", "root"),
    *("step", "steps"),
}


def broken(state):
    """The state with NaN and negative counts in the fields that are named above."""

    def spoiled(path, x):
        names = {getattr(key, "name", None) for key in path}
        bad = -3 if x.dtype == jnp.int32 else jnp.nan
        return jnp.full_like(x, bad) if names & SPOILED else x

    return jax.tree.map_with_path(spoiled, state)


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


def test_moments_are_repaired_as_one():
    """Adam's moments begin anew together, with their counts, and apart from the metrics."""
    tx = oc.scale_by_stable_adam()
    init = tx.init(tree())
    state = jax.jit(tx.update)(tree(), init)[1]
    lost = state._replace(nu={**state.nu, "w": -state.nu["w"]})
    metrics = state.clip.metrics._replace(steps=jnp.int32(-1))
    miscounted = state._replace(clip=state.clip._replace(metrics=metrics))

    assert [p.place for p in validate_state(lost)] == ["nu/w"]
    trees.assert_same_bits(validate_state(lost, repair=True), init._replace(clip=state.clip))
    assert [p.place for p in validate_state(miscounted)] == ["clip/metrics/steps"]
    trees.assert_same_bits(validate_state(miscounted, repair=True), state._replace(clip=init.clip))
    with pytest.raises(ValueError, match=r"pass like=tx\.init\(params\)"):
        validate_state(state._replace(seen=state.seen[:1]), repair=True)


def test_what_only_like_can_tell():
    """A quantile that starts at a number does so again, and lost containers come back."""
    tx = optax.chain(
        oc.clip(oc.measure.global_norm(), oc.threshold.quantile(0.5, initial=3.0)), optax.adam(0.1)
    )
    init = tx.init(tree())
    clip, adam = init
    bad = clip._replace(memory=clip.memory._replace(estimate=jnp.float32(np.nan)))
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
