"""JAX's transformations and debugging modes around an update."""

import jax
import jax.numpy as jnp
import numpy as np
import trees
from checks.runs import (
    PARAMS,
    STREAM,
    alone,
    at,
    close,
    one_step,
    parameter,
    plain,
    scanned,
    with_threshold,
)


def eager(row):
    """A step outside jit is the jitted one."""
    p = plain(row)

    updates, state = row.make().update(p.grads, p.warm, PARAMS)

    close(updates, at(p.updates, -1))
    close(state, at(p.states, -1))


def jit(row):
    """Jitted steps compile once, for the first state and for later ones."""
    p, step = plain(row), one_step(row)
    compiled = step._cache_size()

    for state in (row.make().init(PARAMS), p.warm):
        step(p.grads, state, PARAMS)

    assert step._cache_size() == compiled


def scan(row):
    """The steps of a scan are the jitted ones."""
    close(alone(row)(PARAMS, STREAM), (plain(row).updates, plain(row).states))


def vmap(row):
    """An ensemble of models gives what each gives alone."""
    streams = [STREAM, jax.tree.map(lambda g: -3 * g, STREAM)]
    params = [PARAMS, jax.tree.map(lambda p: 2 * p, PARAMS)]
    stack = lambda *leaves: jnp.stack(leaves)

    together = jax.jit(jax.vmap(alone(row)))(
        jax.tree.map(stack, *params), jax.tree.map(stack, *streams)
    )

    for i in range(2):
        close(at(together, i), alone(row)(params[i], streams[i]))


def vmap_over_thresholds(row):
    """Each of several thresholds gives what it gives alone."""
    _, value = parameter(row)
    # A growth is at least 1; a ceiling of 1 matters only where it is far lower.
    other = 1.05 * value if value > 1 else 0.05 * value
    train = lambda value: scanned(with_threshold(row, value))(PARAMS, STREAM)[0]

    together = jax.jit(jax.vmap(train))(jnp.float32([value, other]))

    close(at(together, 0), plain(row).updates)
    close(at(together, 1), train(other))
    assert np.abs(together["bias"][0] - together["bias"][1]).max() > 0


def derivatives(row):
    """Forward and reverse derivatives are those of finite differences, parameters included."""
    p, tx = plain(row), row.make()
    weights, slopes, turns = (
        {"kernel": trees.normal(3, 2, seed=seed), "bias": trees.normal(2, seed=seed)}
        for seed in (3, 4, 5)
    )

    def total(t):
        grads = jax.tree.map(lambda g, d: g + t * d, p.grads, slopes)
        params = jax.tree.map(lambda x, d: x + 0.05 * t * d, PARAMS, turns)
        updates, _ = tx.update(grads, p.warm, params)
        return sum(jax.tree.leaves(jax.tree.map(lambda u, w: jnp.sum(u * w), updates, weights)))

    @jax.jit
    def slope(t, step):
        differences = (total(t + step) - total(t - step)) / (2 * step)
        return jax.jvp(total, (t,), (jnp.ones_like(t),))[1], jax.grad(total)(t), differences

    forward, reverse, differences = slope(jnp.float32(0), jnp.float32(0.05))

    # Entries of 10 with a change of 0.05: rounding errs by 2^-24 / 0.005, the cubic term by less.
    size = sum(float(jnp.sum(jnp.abs(w))) for w in jax.tree.leaves(weights))
    np.testing.assert_allclose(forward, reverse, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(forward, differences, rtol=1e-3, atol=2e-4 * size)


def derivatives_at_zero(row):
    """Derivatives by gradients and parameters are finite where some or all gradients are 0."""
    p, tx = plain(row), row.make()

    def total(grads, params, state):
        updates, _ = tx.update(grads, state, params)
        return sum(jnp.sum(x) for x in jax.tree.leaves(updates))

    @jax.jit
    def slopes(grads, state):
        ones = jax.tree.map(jnp.ones_like, grads)
        tangent = jax.jvp(lambda g: total(g, PARAMS, state), (grads,), (ones,))[1]
        return tangent, jax.grad(total, argnums=(0, 1))(grads, PARAMS, state)

    zeros = jax.tree.map(jnp.zeros_like, p.grads)
    for grads in (zeros, {**p.grads, "bias": zeros["bias"]}):
        for state in (p.warm, tx.init(PARAMS)):
            assert all(np.isfinite(x).all() for x in jax.tree.leaves(slopes(grads, state)))


def cond(row):
    """A branch of lax.cond clips; the other one leaves gradients and state alone."""
    p, tx = plain(row), row.make()

    @jax.jit
    def step(flag):
        clip = lambda: tx.update(p.grads, p.warm, PARAMS)
        return jax.lax.cond(flag, clip, lambda: (p.grads, p.warm))

    close(step(True), (at(p.updates, -1), at(p.states, -1)))
    trees.assert_same_bits(step(False), (p.grads, p.warm))


def remat(row):
    """Under jax.checkpoint the derivative through an update is the same."""
    p, tx = plain(row), row.make()

    def total(grads, params):
        updates, _ = tx.update(grads, p.warm, params)
        return sum(jax.tree.leaves(jax.tree.map(lambda u, g: jnp.sum(u * g), updates, grads)))

    slopes = lambda fun: jax.grad(fun, argnums=(0, 1))(p.grads, PARAMS)
    again, once = jax.jit(lambda: (slopes(jax.checkpoint(total)), slopes(total)))()

    close(again, once)
    assert any(np.any(x) for x in jax.tree.leaves(once))


def eval_shape(row):
    """Abstract evaluation gives the shapes and dtypes that a step has."""
    p, tx = plain(row), row.make()

    state = jax.eval_shape(tx.init, PARAMS)
    abstract = jax.eval_shape(tx.update, p.grads, state, PARAMS)

    described = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
    assert described(state) == described(p.warm)
    assert described(abstract) == described((at(p.updates, -1), at(p.states, -1)))


def promotion(row):
    """Nothing is promoted: a tree of every kind of leaf is traced under the strictest rules."""
    grads = {name: leaf for name, leaf in trees.mixed().items() if name != "float0"}
    tx = row.make()

    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        updates = jax.eval_shape(lambda g: tx.update(g, tx.init(g), g)[0], grads)

    described = lambda tree: jax.tree.map(lambda x: (jnp.shape(x), jnp.result_type(x)), tree)
    assert described(updates) == described(grads)


def disable_jit(row):
    """Without jit, a step is the same."""
    p = plain(row)

    with jax.disable_jit():
        updates, state = row.make().update(p.grads, p.warm, PARAMS)

    close(updates, at(p.updates, -1))
    close(state, at(p.states, -1))


def debug_nans(row):
    """No NaN or inf is made on the way, eagerly and jitted, from zeros and from a spike."""
    p = plain(row)
    zeros = jax.tree.map(jnp.zeros_like, p.grads)
    expected, _ = one_step(row)(zeros, p.warm, PARAMS)

    with jax.debug_nans(True):
        tx = row.make()
        tx.init(zeros)
        for update in (tx.update, jax.jit(tx.update)):
            close(update(zeros, p.warm, PARAMS)[0], expected)
            close(update(p.grads, p.warm, PARAMS)[0], at(p.updates, -1))


def debug_infs(row):
    """No inf is made on the way."""
    p = plain(row)

    with jax.debug_infs(True):
        tx = row.make()
        tx.init(PARAMS)
        close(jax.jit(tx.update)(p.grads, p.warm, PARAMS)[0], at(p.updates, -1))


def checking_leaks(row):
    """No tracer outlives its trace."""
    p = plain(row)

    with jax.checking_leaks():
        close(jax.jit(row.make().update)(p.grads, p.warm, PARAMS)[0], at(p.updates, -1))


def transfer_guard(row):
    """A jitted step moves nothing between host and device, not even constants."""
    p, step = plain(row), one_step(row)
    step(p.grads, p.warm, PARAMS)  # compiled before

    with jax.transfer_guard("disallow"):
        updates, _ = step(p.grads, p.warm, PARAMS)

    close(updates, at(p.updates, -1))


def transfer_guard_eager(row):
    """A step outside jit moves nothing between host and device either."""
    p, tx = plain(row), row.make()

    with jax.transfer_guard("disallow"):
        updates, _ = tx.update(p.grads, p.warm, PARAMS)

    close(updates, at(p.updates, -1))
