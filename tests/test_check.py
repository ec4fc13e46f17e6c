"""Bad trees are errors at init or at the first trace, with the key path where there is one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kinds import assert_refused
from roster import EVERY

import optaxclip as oc

pytestmark = pytest.mark.whole  # cheap, and each cell says something of its own

ONE = oc.threshold.constant(1.0)
PARAMS = {"body": {"w": jnp.ones((3, 2)), "b": jnp.ones(2)}, "head": jnp.ones(4)}
UNLIKE = [  # with the key path that an error must name
    ({"body": {"w": 0, "z": 0}, "head": 0}, r"\['body'\]"),
    ({"body": 0, "head": {"w": 0}}, r"\['head'\]"),
    ({"body": 0}, "head"),
    ({"body": 0, "head": 0, "tail": 0}, "tail"),
]
every_unlike = pytest.mark.parametrize(("tree", "path"), UNLIKE, ids=str)


@every_unlike
def test_labels_and_masks_must_be_a_prefix_of_the_tree(tree, path):
    """At init, labels or a mask of another structure are refused with the key path."""
    labels, mask = jax.tree.map(lambda _: "a", tree), jax.tree.map(lambda _: True, tree)
    clip = oc.clip(oc.measure.by_label(labels, oc.measure.global_norm()), ONE)
    for tx, name in [
        (clip, "labels"),
        (oc.adaptive_grad_clip(mask=mask), "mask"),
        (oc.adaptive_grad_clip(mask=lambda params: mask), "mask"),
    ]:
        with pytest.raises(
            ValueError, match=rf"(?s)^{name} must be a prefix of the tree; .*{path}"
        ):
            tx.init(PARAMS)


def test_labels_and_masks_may_be_a_shorter_prefix():
    """One label, or one bool, stands for all leaves below it."""
    clip = oc.clip(oc.measure.by_label({"body": "a", "head": "b"}, oc.measure.leaf_norm()), ONE)
    for tx in (clip, oc.adaptive_grad_clip(mask={"body": True, "head": False})):
        assert jax.tree.leaves(tx.init(PARAMS))


@pytest.mark.parametrize("made", ["head", {"body": 1, "head": 1}], ids=str)
def test_what_a_mask_function_makes_is_judged(made):
    """A function that gives labels for bools would clip all leaves, each label being true."""
    tx = oc.adaptive_grad_clip(mask=lambda params: made)

    message = f"mask must be None, a tree of bools or a function of params; got {made!r}"
    assert_refused(lambda: tx.init(PARAMS), TypeError, message)


RELATIVE = {name: row for name, row in EVERY.items() if row.params}


@pytest.mark.parametrize("name", RELATIVE)
def test_missing_params_are_named_at_the_first_trace(name):
    """What needs the parameters and is called without says how to call it."""
    tx = RELATIVE[name].make()
    message = "a relative norm needs the parameters: call update(grads, state, params)"
    for update in (tx.update, jax.jit(tx.update)):
        assert_refused(lambda update=update: update(PARAMS, tx.init(PARAMS)), ValueError, message)


@pytest.mark.parametrize("name", [*RELATIVE, "stacked"])
def test_params_unlike_the_gradients_are_refused(name):
    """Parameters of other shapes or without a leaf are no weights of these gradients."""
    stacked = lambda path, leaf: 0 if leaf.ndim == 2 else None
    tx = oc.adaptive_grad_clip(stacked=stacked) if name == "stacked" else RELATIVE[name].make()
    body = PARAMS["body"]
    for params, got in [
        ({**PARAMS, "body": {**body, "w": jnp.ones((5, 2))}}, "'body/w', (3, 2); got (5, 2)"),
        ({**PARAMS, "body": {"w": body["w"]}}, "'body/b', (2,); got none"),
        ({**PARAMS, "body": jnp.ones(2)}, "'body/b', (2,); got none"),
    ]:
        message = f"params must have the leaves of the gradients; at {got}"
        call = lambda params=params: tx.update(PARAMS, tx.init(PARAMS), params)
        assert_refused(call, ValueError, message)


def test_gradients_unlike_the_moments_are_refused():
    """Gradients of other shapes than the params given to init have no moments."""
    tx = oc.scale_by_stable_adam()
    for name, got in [
        ("body", "'body/w', (3, 2); got (2, 3)"),
        ("none", "'body/b', (2,); got none"),
    ]:
        other = {"body": {"w": jnp.ones((2, 3)), "b": jnp.ones(2)}, "none": {"w": jnp.ones((3, 2))}}
        grads = {**PARAMS, "body": other[name]}
        message = f"gradients must have the leaves of the params given to init; at {got}"
        assert_refused(lambda grads=grads: tx.update(grads, tx.init(PARAMS)), ValueError, message)


@pytest.mark.parametrize("name", [n for n, row in EVERY.items() if row.memory])
def test_gradients_with_another_leaf_are_refused(name):
    """Where a memory belongs to leaves or entries, a leaf more or less is an error at the trace."""
    row = EVERY[name]
    tx = row.make()
    state = jax.eval_shape(tx.init, PARAMS)
    for grads in ({**PARAMS, "tail": jnp.ones(3)}, {"body": PARAMS["body"]}):
        if row.groups == "tree":  # whose norm is one number for any tree
            assert jax.eval_shape(tx.update, grads, state)
        else:
            with pytest.raises(ValueError, match=r"params given to init|key path"):
                jax.eval_shape(tx.update, grads, state)


@pytest.mark.parametrize(
    ("value", "error", "shown"),
    [
        (np.ones(1), ValueError, "an array of shape (1,)"),
        (jnp.ones(3), ValueError, "an array of shape (3,)"),  # as many as there are leaves
        ("1", TypeError, "'1'"),
        (None, TypeError, "None"),
        (True, TypeError, "True"),
        (1j, TypeError, "1j"),
    ],
    ids=str,
)
def test_schedules_must_give_numbers(value, error, shown):
    """What a schedule gives is no number or () array: an error at the trace."""
    tx = oc.clip_by_norm(lambda step: value)

    message = f"the value of a schedule must be a number or a () array; got {shown}"
    assert_refused(lambda: jax.eval_shape(tx.update, PARAMS, tx.init(PARAMS)), error, message)
