"""Dtypes, kinds of leaves, shapes of trees, and types of thresholds."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import trees
from checks.runs import (
    PARAMS,
    STREAM,
    TOLERANCE,
    alone,
    at,
    clip_states,
    close,
    one_step,
    parameter,
    plain,
    scanned,
    with_threshold,
)

TURN = np.complex64(0.6 + 0.8j)  # of modulus 1


def float8_e4m3fn(row):
    """float8 gradients of float8 parameters come back as float8, clipped in float32."""
    _rounded(row, jnp.float8_e4m3fn)


def float8_e5m2(row):
    """float8 gradients of the wider range come back as such, clipped in float32."""
    _rounded(row, jnp.float8_e5m2)


def float16(row):
    """float16 gradients of float16 parameters come back as float16, clipped in float32."""
    _rounded(row, jnp.float16)


def bfloat16(row):
    """bfloat16 gradients of bfloat16 parameters come back as such, clipped in float32."""
    _rounded(row, jnp.bfloat16)


def bfloat16_of_float32(row):
    """bfloat16 gradients stay so if their parameters are float32."""
    _rounded(row, jnp.bfloat16, of=jnp.float32)


def float64(row):
    """With x64, float64 gradients come back as float64, of the values of float32 ones."""
    with jax.enable_x64(True):
        wide = lambda tree: jax.tree.map(lambda x: x.astype(jnp.float64), tree)
        updates, states = scanned(row.make())(wide(PARAMS), wide(STREAM))

    assert {u.dtype for u in jax.tree.leaves(updates)} == {np.dtype(np.float64)}
    close(updates, plain(row).updates)
    close(states, plain(row).states)


def complex64(row):
    """Complex gradients are clipped by their modulus, and keep their phase."""
    turned = lambda tree: jax.tree.map(lambda x: x.astype(jnp.complex64) * TURN, tree)

    updates, _ = scanned(row.make())(turned(PARAMS), turned(STREAM))

    assert {u.dtype for u in jax.tree.leaves(updates)} == {np.dtype(np.complex64)}
    close(updates, turned(plain(row).updates))


def mixed_dtypes(row):
    """float32 and bfloat16 leaves of one tree are measured together, and keep their dtypes."""
    exact = lambda tree: {**tree, "bias": tree["bias"].astype(jnp.bfloat16)}
    wide = lambda tree: jax.tree.map(lambda x: x.astype(jnp.float32), exact(tree))

    updates, _ = scanned(row.make())(exact(PARAMS), exact(STREAM))
    expected, _ = alone(row)(wide(PARAMS), wide(STREAM))

    close({"kernel": updates["kernel"]}, {"kernel": expected["kernel"]})
    assert updates["bias"].dtype == jnp.bfloat16
    np.testing.assert_allclose(trees.float64(updates["bias"]), expected["bias"], rtol=2.0**-8)


def no_floats(row):
    """Integers, bools and None pass through untouched and uncounted."""
    others = {"count": jnp.arange(3), "flag": jnp.array([True, False])}
    many = jax.tree.map(lambda x: jnp.broadcast_to(x, (len(STREAM["bias"]), *x.shape)), others)

    updates, states = scanned(row.make())(
        {**PARAMS, **others, "none": None}, {**STREAM, **many, "none": None}
    )

    for name in others:
        trees.assert_same_bits(updates.pop(name), many[name])
    assert updates.pop("none") is None
    metrics = [[clip.metrics for clip in clip_states(s)] for s in (states, plain(row).states)]
    close((updates, metrics[0]), (plain(row).updates, metrics[1]))


def float0(row):
    """The float0 gradient of an integer parameter passes through, uncounted."""
    tx, params = row.make(), {**PARAMS, "z": jnp.arange(2)}
    other, state = np.zeros((2,), jax.dtypes.float0), tx.init(params)

    for i in range(len(STREAM["bias"])):  # float0 cannot enter jit
        updates, state = tx.update({**at(STREAM, i), "z": other}, state, params)

    assert updates.pop("z") is other
    close(updates, at(plain(row).updates, -1))


def zero_size(row):
    """A leaf without entries, which comes back, changes nothing for the others."""
    nothing = lambda *shape: {"nothing": jnp.zeros((*shape, 0, 3))}

    updates, _ = scanned(row.make())(
        {**PARAMS, **nothing()}, {**STREAM, **nothing(len(STREAM["bias"]))}
    )

    assert updates.pop("nothing").shape == (len(STREAM["bias"]), 0, 3)
    close(updates, plain(row).updates)


def scalar(row):
    """A scalar leaf is clipped as a vector of one entry."""
    params, stream = {"s": PARAMS["bias"][:1]}, {"s": STREAM["bias"][:, :1]}
    expected, _ = scanned(row.make())(params, stream)

    updates, _ = scanned(row.make())(at(params, 0), {"s": stream["s"][:, 0]})

    close(updates, {"s": expected["s"][:, 0]})


def python_float(row):
    """A Python float among the gradients is clipped as the scalar array that it stands for."""
    tx, grads = row.make(), {"s": 7.5, "bias": at(STREAM["bias"], -1)}
    arrays = {**grads, "s": jnp.float32(7.5)}

    for given in (grads, arrays):
        state = tx.init(given)
        for _ in range(12):  # until there is a limit
            _, state = tx.update({**given, "bias": 0.1 * given["bias"]}, state, given)
        updates, _ = tx.update(given, state, given)
        if given is grads:
            first = updates

    assert jnp.result_type(first["s"]) == jnp.float32
    close(first, updates)


def empty_tree(row):
    """A tree without leaves is no error, and stays as it is."""
    tx = row.make()
    for tree in ({}, None, ()):
        updates, _ = tx.update(tree, tx.init(tree), tree)
        trees.assert_same_bits(updates, tree)


def rank_six(row):
    """Axes of length 1 in front change nothing."""
    raised = lambda tree, lead=0: jax.tree.map(
        lambda x: x.reshape(*x.shape[:lead], *([1] * (6 - x.ndim + lead)), *x.shape[lead:]), tree
    )

    updates, _ = scanned(row.make())(raised(PARAMS), raised(STREAM, 1))

    close(updates, raised(plain(row).updates, 1))


def threshold_types(row):
    """A threshold as Python, NumPy or JAX number is one threshold, and changes no dtype."""
    p, (_, value) = plain(row), parameter(row)
    kinds = [float, np.float32, np.float64, np.array, jnp.float32, jnp.asarray]
    low = jax.tree.map(lambda g: g.astype(jnp.bfloat16), p.grads)

    for grads in (p.grads, low):

        @jax.jit
        def all_kinds(grads):
            return [with_threshold(row, k(value)).update(grads, p.warm, PARAMS)[0] for k in kinds]

        expected, _ = one_step(row)(grads, p.warm, PARAMS)
        for updates in all_kinds(grads):
            assert updates["bias"].dtype == grads["bias"].dtype
            eps = float(jnp.finfo(grads["bias"].dtype).eps)
            trees.assert_close(trees.float64(updates), trees.float64(expected), max(2e-5, eps))

    with jax.enable_x64(True):
        for threshold in (np.float64(value), jnp.float64(value)):
            update = with_threshold(row, threshold).update
            updates, _ = jax.eval_shape(update, p.grads, p.warm, PARAMS)
            assert updates["bias"].dtype == jnp.float32


def traced_threshold(row):
    """A threshold may be an argument of the jitted step, weak, strong, NumPy or float64."""
    p, (_, value) = plain(row), parameter(row)
    low = jax.tree.map(lambda g: g.astype(jnp.bfloat16), p.grads)
    step = jax.jit(lambda m, g: with_threshold(row, m).update(g, p.warm, PARAMS)[0])

    for grads in (p.grads, low):
        expected, _ = one_step(row)(grads, p.warm, PARAMS)
        for threshold in (float(value), np.float32(value), jnp.float32(value)):
            updates = step(threshold, grads)
            assert updates["bias"].dtype == grads["bias"].dtype
            eps = float(jnp.finfo(grads["bias"].dtype).eps)
            trees.assert_close(trees.float64(updates), trees.float64(expected), max(2e-5, eps))


def schedule(row):
    """A threshold may be an Optax schedule."""
    _, value = parameter(row)
    tx = with_threshold(row, optax.constant_schedule(value))

    updates, _ = scanned(tx)(PARAMS, STREAM)

    close(updates, plain(row).updates)


def without_params(row):
    """Where the parameters do not matter, update works without them."""
    p = plain(row)

    updates, state = row.make().update(p.grads, p.warm)

    close((updates, state), at((p.updates, p.states), -1))


def _rounded(row, dtype, of=None):
    """Gradients rounded to a dtype are clipped as in float32, and rounded once more."""
    low = jax.tree.map(lambda g: g.astype(dtype), STREAM)
    params = jax.tree.map(lambda p: p.astype(of or dtype), PARAMS)
    wide = lambda tree: jax.tree.map(lambda x: x.astype(jnp.float32), tree)

    updates, _ = scanned(row.make())(params, low)
    expected, _ = alone(row)(wide(params), wide(low))

    assert {u.dtype for u in jax.tree.leaves(updates)} == {jnp.dtype(dtype)}
    info = jnp.finfo(dtype)
    # Half an eps of rounding, and as much for a tie that falls to the other side.
    rtol, atol = float(info.eps) + TOLERANCE["rtol"], float(info.smallest_subnormal)
    trees.assert_close(trees.float64(updates), trees.float64(expected), rtol, atol)
