"""Clips of cotangents, inside the model: what comes back, what is recorded, and where it works."""

import functools
import json
import math
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import trees
from flax import linen as nn
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from kinds import POLICY, SCALE, WINDOW, assert_refused, measure, number, optional
from oracles import norm, shrink, tree_norm

from optaxclip import measure as measures
from optaxclip import scale
from optaxclip.cotangent import (
    CotangentMetrics,
    _clipped,
    clip_cotangent,
    cotangent_probe,
    drop_largest_cotangents,
)

EIGHT = pytest.mark.skipif(jax.device_count() < 8, reason="needs eight devices")

P = PartitionSpec
GOLDEN = pathlib.Path(__file__).parent / "golden" / "axlearn_topk_token_grad.json"
TOKENS = measures.unit_norm(axis=-1)
INF, NAN = math.inf, math.nan
# float32 sums of up to 64 squares and a root, of 6e-8 each.
FLOAT32 = 1e-6


def backward(function, grads):
    """What comes out of the backward pass of a function of zeros, of what comes into it."""
    return jax.vjp(function, jax.tree.map(jnp.zeros_like, grads))[1](grads)[0]


def clipped(grads, *args, **kwargs):
    return backward(lambda x: clip_cotangent(x, *args, **kwargs), grads)


def dropped(grads, *args, **kwargs):
    return backward(lambda x: drop_largest_cotangents(x, *args, **kwargs), grads)


def probed(function, grads, probe=None):
    """The same of a function of a probe too, and what that has seen."""
    probe = cotangent_probe() if probe is None else probe
    return jax.vjp(function, jax.tree.map(jnp.zeros_like, grads), probe)[1](grads)


# ------------------------------------------------------------------------------- the identity


def test_forward_it_is_the_identity():
    """Any tree comes out as it went in: the same arrays, the same leaves of other kinds."""
    tree = trees.mixed() | {"key": jax.random.key(0)}
    for function in (clip_cotangent, drop_largest_cotangents):
        found = function(tree)
        assert jax.tree.structure(found) == jax.tree.structure(tree)
        for name in tree.keys() - {"python", "empty"}:
            assert found[name] is tree[name]
        assert found["python"] == tree["python"]


@pytest.mark.parametrize("function", [clip_cotangent, drop_largest_cotangents])
def test_forward_it_adds_no_operation(function):
    """The program of a forward pass has the operations of the model without the clip."""

    def operations(between):
        model = lambda x, probe: jnp.sin(between(3 * x, probe))
        text = jax.jit(model).lower(jnp.ones((4, 3)), cotangent_probe()).as_text()
        return re.findall(r"= (?!stablehlo.constant)(\S+)", text)

    found = operations(lambda x, probe: function(x, 2, probe=probe))
    assert found == operations(lambda x, probe: x)
    assert "stablehlo.sine" in found


# --------------------------------------------------------------------------------- the clips


BY = {
    "norm": (None, lambda tree: {k: shrink(g, tree_norm(tree), 0.7) for k, g in tree.items()}),
    "3-norm": (
        measures.global_norm(3),
        lambda tree: {k: shrink(g, tree_norm(tree, 3), 0.7) for k, g in tree.items()},
    ),
    "leaf": (
        measures.leaf_norm(),
        lambda tree: {k: shrink(g, norm(g), 0.7) for k, g in tree.items()},
    ),
    "value": (measures.element(), lambda tree: {k: np.clip(g, -0.7, 0.7) for k, g in tree.items()}),
    "token": (
        TOKENS,
        lambda tree: {k: shrink(g, norm(g, axis=-1), 0.7) for k, g in tree.items()},
    ),
    "head": (
        measures.unit_norm(axis=(0, -1)),
        lambda tree: {
            k: shrink(g, norm(g, axis=(0, -1) if g.ndim > 1 else None), 0.7)
            for k, g in tree.items()
        },
    ),
}


@pytest.mark.parametrize("by", BY)
def test_what_comes_back_is_clipped(by):
    """By norm, by value, by token or by any axes, it is what NumPy makes of it in float64."""
    grads = trees.floats(scale=1.0)
    rule, oracle = BY[by]

    found = jax.jit(functools.partial(clipped, max_norm=0.7, measure=rule))(grads)

    expected = oracle(trees.float64(grads))
    trees.assert_close(trees.float64(found), expected, FLOAT32)
    changed = [np.any(np.asarray(found[k]) != np.asarray(grads[k])) for k in grads]
    assert all(changed)


def test_below_the_limit_nothing_changes():
    """A cotangent within the limit comes out bit for bit."""
    grads = trees.mixed()
    grads = {k: grads[k] for k in ("float32", "bfloat16", "float16", "complex", "scalar")}
    trees.assert_same_bits(clipped(grads, 100.0), grads)
    trees.assert_same_bits(clipped(grads, INF), grads)


def test_strict_bounds_hold_exactly():
    """With `scale.strict`, the float64 norm of every token is at most the limit."""
    grads = trees.normal(500, 7, scale=9.0)
    found = clipped(grads, 0.1, measure=TOKENS, scale=scale.strict)
    assert norm(trees.float64(found), axis=-1).max() <= np.float64(np.float32(0.1))


DTYPES = {"bfloat16": 2.0**-7, "float16": 2.0**-10, "float32": 2.0**-22, "complex64": 2.0**-22}


@pytest.mark.parametrize("size", [1.0, 6e4])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype(dtype, size):
    """Norms are measured in float32, also where the squares leave the dtype; dtypes stay."""
    grads = jnp.full((300,), size, dtype)

    found = clipped(grads, 0.5)

    assert found.dtype == grads.dtype
    # By two roundings: that of the factor, and that to the dtype.
    np.testing.assert_allclose(trees.float64(found), 0.5 / math.sqrt(300), rtol=DTYPES[dtype])


def test_float64():
    """float64 cotangents are clipped in float64, and a probe of them is float32."""
    with jax.enable_x64(True):
        grads = jnp.asarray(np.random.default_rng(0).normal(size=50))
        found, seen = probed(lambda x, probe: clip_cotangent(x, 0.5, probe=probe), grads)
        assert found.dtype == jnp.float64
        np.testing.assert_allclose(
            np.asarray(found), shrink(np.asarray(grads), norm(np.asarray(grads)), 0.5), rtol=1e-14
        )
    assert {x.dtype for x in seen} == {np.dtype(np.float32)}


def test_huge_and_tiny_cotangents():
    """Squares that leave float32 do not: the norm is still right."""
    for size in (1e30, 1e-30):
        found = clipped(jnp.full((4,), size), size)
        np.testing.assert_allclose(np.asarray(found), size / 2, rtol=FLOAT32)


def test_integers_pass():
    """Integer and bool leaves are neither clipped nor counted; their cotangents are float0."""
    x = {"a": jnp.ones(2), "i": jnp.arange(3), "b": jnp.array([True]), "none": None}
    loss = lambda x: jnp.sum(clip_cotangent(x)["a"] * 5)

    found = jax.grad(loss, allow_int=True)(x)

    np.testing.assert_allclose(np.asarray(found["a"]), math.sqrt(0.5), rtol=FLOAT32)
    assert found["i"].dtype == found["b"].dtype == jax.dtypes.float0
    assert clip_cotangent({"i": 3, "none": None}) == {"i": 3, "none": None}


BAD = np.array([[3.0, 4.0], [NAN, 1.0], [INF, 1.0], [0.0, 0.0]], np.float32)
TREATED = {  # by whole tree, and by token
    "zero": (np.zeros((4, 2)), [[0.6, 0.8], [0, 0], [0, 0], [0, 0]]),
    "propagate": (np.full((4, 2), NAN), [[0.6, 0.8], [NAN, NAN], [NAN, 0], [0, 0]]),
    "sanitize": (
        np.array([[3, 4], [0, 1], [0, 1], [0, 0]]) / math.sqrt(27),
        [[0.6, 0.8], [0, 1], [0, 1], [0, 0]],
    ),
}


@pytest.mark.parametrize("policy", TREATED)
def test_bad_cotangents(policy):
    """NaN and inf are what the policy makes of them, for a whole tree and token by token."""
    whole, tokens = TREATED[policy]
    found = clipped(jnp.array(BAD), 1.0, nonfinite=policy)
    if policy == "propagate":
        assert np.isnan(np.asarray(found)[1:3]).any(axis=1).all()
    else:
        np.testing.assert_allclose(np.asarray(found), whole, rtol=FLOAT32)
    found = clipped(jnp.array(BAD), 1.0, measure=TOKENS, nonfinite=policy)
    np.testing.assert_allclose(np.asarray(found), tokens, rtol=FLOAT32)


# ------------------------------------------------------------------------------ the max_norm


def test_a_limit_of_any_kind():
    """A number of Python, NumPy or JAX, traced or not, is one limit; dtypes do not change."""
    grads = trees.normal(7, 3, dtype=jnp.bfloat16)
    expected = clipped(grads, 2.0)
    for limit in (2, np.float64(2), jnp.bfloat16(2), jnp.int32(2)):
        trees.assert_same_bits(clipped(grads, limit), expected)
    trees.assert_same_bits(jax.jit(clipped)(grads, jnp.float32(2)), expected)


@pytest.mark.parametrize("limit", [0.0, -0.0, -1.0, NAN, -INF])
def test_a_bad_traced_limit_flips_no_sign(limit):
    """What is known too late to be refused lets nothing through, and neither does 0."""
    found = jax.jit(clipped)(trees.floats(), jnp.float32(limit))
    assert all(not np.any(np.asarray(g)) for g in jax.tree.leaves(found))


def test_no_gradient_flows_into_the_limit():
    """It is 0, and NaN nowhere: also in the second derivative, and where cotangents are 0."""

    def first(c, g):
        return jax.grad(lambda x, c: jnp.vdot(clip_cotangent(x, c), g), argnums=(0, 1))(g, c)

    second = jax.jit(jax.grad(lambda c, g: jnp.sum(first(c, g)[0] ** 2), argnums=(0, 1)))
    for g in (jnp.zeros(3), jnp.ones(3)):
        for limit in (0.0, 1.0, INF):
            limit_back, back = second(limit, g)
            assert limit_back == 0.0
            assert np.isfinite(back).all()
    assert first(1.0, jnp.ones(3))[1] == 0.0


# ------------------------------------------------------------------------------- derivatives


TRACES = {
    "jit": jax.jit,
    "vmap": lambda f: lambda gamma: jax.vmap(f)(gamma[None]),
    "grad": jax.grad,
    "scan": lambda f: lambda gamma: jax.lax.scan(lambda c, g: (c, f(g)), 0, gamma[None])[1],
    "checkpoint": jax.checkpoint,
}


@pytest.mark.parametrize("trace", TRACES)
def test_numbers_in_a_scale_are_known(trace):
    """A traced one is refused in the forward pass, whatever traces it."""

    def slope(gamma):
        clip = lambda x: clip_cotangent(x, 1.0, scale=scale.automatic(gamma))
        return jnp.sum(backward(clip, jnp.ones(2)))

    with pytest.raises(TypeError, match="scale must be a function in which no number is traced"):
        jax.jit(TRACES[trace](slope))(jnp.float32(0.1))


def test_known_numbers_in_a_scale_work_anywhere():
    """A Python number, or an array that is there, is in the program of a scan or checkpoint too."""
    for gamma in (0.1, jnp.float32(0.1)):
        clip = functools.partial(clip_cotangent, max_norm=1.0, scale=scale.automatic(gamma))
        step = jax.checkpoint(lambda x, _, clip=clip: (clip(x), None))
        final = lambda x, step=step: jnp.sum(jax.lax.scan(step, x, length=2)[0])
        found = jax.jit(jax.grad(final))(jnp.zeros(1))
        # Of a gradient of 1, twice: n / (n + 0.1), in five float32 roundings each time.
        np.testing.assert_allclose(found, 1 / 1.1 / (1 / 1.1 + 0.1), rtol=10 * 6e-8)


def test_gradients_of_gradients():
    """They are those of the clipped backward pass: of c v / ||v|| with v = 3 x^2."""
    x = np.array([0.5, -1.0, 2.0], np.float32)
    loss = lambda x: jnp.sum(clip_cotangent(x, 0.5) ** 3)
    v, dv, size = 3 * x**2, np.diag(6 * x), np.linalg.norm(3 * x**2)
    expected = 0.5 * (dv / size - np.outer(v, v @ dv) / size**3)
    for second in (jax.jacrev(jax.grad(loss)), jax.hessian(loss)):
        np.testing.assert_allclose(jax.jit(second)(x), expected, atol=FLOAT32)


def test_forward_mode_is_refused():
    """A derivative in forward mode would not be clipped, and so is an error."""
    for function in (clip_cotangent, drop_largest_cotangents):
        with pytest.raises(TypeError, match="forward-mode"):
            jax.jvp(function, (jnp.ones(2),), (jnp.ones(2),))


# --------------------------------------------------------------------------- the time steps


def numpy_rnn(W, x, limit):
    """Backpropagation through time of sum(h_T) in float64: the norms per step, and dL/dW."""
    states = [np.zeros(W.shape[0])]
    for row in x:
        states.append(np.tanh(states[-1] @ W + row))
    back, grad, norms = np.ones(W.shape[0]), np.zeros_like(W), []
    for h, after in zip(states[-2::-1], states[:0:-1], strict=True):
        norms.append(np.linalg.norm(back))
        back = back * min(1, limit / norms[-1])
        inner = back * (1 - after**2)
        grad += np.outer(h, inner)
        back = W @ inner
    return np.array(norms[::-1]), grad


def rnn_loss(W, probes, x, limit, *, wrap=lambda body: body):
    """The same in JAX, with a probe per step, or one for all if it is ()."""
    per_step = probes.norm.ndim == 1

    def body(h, inputs):
        row, probe = inputs if per_step else (inputs, probes)
        return clip_cotangent(jnp.tanh(h @ W + row), limit, probe=probe), None

    xs = (x, probes) if per_step else x
    return jnp.sum(jax.lax.scan(wrap(body), jnp.zeros(W.shape[0]), xs)[0])


@functools.cache
def rnn(steps, radius=2.0, width=32):
    """A recurrent matrix of that spectral radius, and inputs for it."""
    rng = np.random.default_rng(0)
    W = radius * np.linalg.qr(rng.normal(size=(width, width)))[0]
    return W, rng.normal(size=(steps, width)) * 0.3


def rows(steps):
    return jax.tree.map(lambda x: jnp.zeros(steps), cotangent_probe())


def test_200_time_steps_are_bounded():
    """Where backpropagation explodes, every gradient between steps keeps to the limit."""
    W, x = (jnp.asarray(a, jnp.float32) for a in rnn(200))
    grad = jax.jit(jax.grad(rnn_loss, argnums=(0, 1)))

    found, seen = grad(W, rows(200), x, 0.5)
    free, explodes = grad(W, rows(200), x, INF)

    assert explodes.norm.max() > 1e6
    assert np.linalg.norm(free) > 1e6
    assert seen.clipped_norm.max() <= 0.5 * (1 + FLOAT32)
    # What comes into a step is that times the norm of the matrix; into the last one, all ones.
    # In a product with 32 terms, which are rounded some 100 times.
    assert seen.norm[:-1].max() <= 0.5 * 2.0 * (1 + 1e-5)
    # dL/dW is a sum of 200 products of a state, with entries up to 1, and such a gradient.
    assert 0 < np.linalg.norm(found) <= 200 * 0.5 * 2.0 * math.sqrt(32)
    np.testing.assert_array_equal(seen.calls, 1)


def test_time_steps_are_those_of_numpy():
    """Norms step by step, and the gradient, are those of backpropagation in float64."""
    W, x = rnn(40)
    norms, grad = numpy_rnn(W, x, 0.5)
    probes = rows(40)

    with jax.enable_x64(True):
        found, seen = jax.jit(jax.grad(rnn_loss, argnums=(0, 1)))(W, probes, x, 0.5)

    assert 0 < (norms > 0.5).sum() < 40
    np.testing.assert_allclose(found, grad, rtol=1e-8, atol=1e-10)
    np.testing.assert_allclose(seen.norm, norms, rtol=2.0**-23)
    np.testing.assert_array_equal(seen.clipped_calls, norms > 0.5)


def test_recomputation_changes_nothing():
    """Under `jax.checkpoint`, of a step or of all, gradients and metrics are the same."""
    W, x = (jnp.asarray(a, jnp.float32) for a in rnn(20))

    def grad(wrap, outer):
        loss = outer(lambda W, probes: rnn_loss(W, probes, x, 0.5, wrap=wrap))
        return jax.jit(jax.grad(loss, argnums=(0, 1)))(W, rows(20))

    plain = lambda function: function
    expected = grad(plain, plain)
    for found in (grad(jax.checkpoint, plain), grad(plain, jax.checkpoint)):
        # XLA may add in another order, in 20 steps of 32 terms each.
        trees.assert_close(found, expected, 1e-5, atol=1e-5)


def test_one_probe_for_a_scan_adds_up():
    """A probe that a scan closes over holds the sums of what a probe per step holds."""
    W, x = (jnp.asarray(a, jnp.float32) for a in rnn(20))
    grad = jax.jit(jax.grad(rnn_loss, argnums=1))

    single, each = grad(W, cotangent_probe(), x, 0.5), grad(W, rows(20), x, 0.5)

    assert single.calls == 20.0
    assert 0 < single.clipped_calls < 20
    trees.assert_close(single, jax.tree.map(jnp.sum, each), 20 * FLOAT32)


class Cell(nn.RNNCellBase):
    """A cell of Linen that clips what comes back to its carry."""

    @nn.compact
    def __call__(self, carry, x):
        carry, y = nn.SimpleCell(5, recurrent_kernel_init=nn.initializers.orthogonal(3.0))(carry, x)
        return clip_cotangent(carry, 0.01), y

    @nn.nowrap
    def initialize_carry(self, rng, input_shape):
        return jnp.zeros((*input_shape[:-1], 5))

    @property
    def num_feature_axes(self):
        return 1


def test_linen_rnn():
    """In `nn.RNN`, the gradient of the first input is bounded by the limit of the carry."""
    model = nn.RNN(Cell())
    x = trees.normal(2, 50, 3, scale=1e-3)
    params = jax.jit(model.init)(jax.random.key(0), x)

    back = jax.jit(jax.grad(lambda x: jnp.sum(model.apply(params, x)[:, -1])))(x)

    kernel = np.asarray(params["params"]["cell"]["SimpleCell_0"]["i"]["kernel"])
    assert 0 < np.linalg.norm(back[:, 0]) <= 0.01 * 3.0 * np.linalg.norm(kernel, 2)


def test_nnx_scan():
    """In `nnx.scan`, too."""
    layer = nnx.Linear(4, 4, use_bias=False, rngs=nnx.Rngs(0))
    layer.kernel[...] = 2 * jnp.eye(4)

    @nnx.grad
    def grad(layer):
        step = nnx.scan(
            lambda x, layer: clip_cotangent(layer(x), 1.0),
            length=30,
            in_axes=(nnx.Carry, None),
            out_axes=nnx.Carry,
        )
        return jnp.sum(step(jnp.full((4,), 2.0**-30), layer))

    # The states double from 2^-30 to 1/2 before the last step; each is met by 1/2 in each entry.
    np.testing.assert_allclose(grad(layer).kernel[...], 0.5, rtol=FLOAT32)


# -------------------------------------------------------------------------------- the probes


def test_a_probe_of_one_clip():
    """It holds the norms before and after, the share of clipped groups and three counts."""
    grads = jnp.array([[3.0, 4.0], [0.3, 0.4], [6.0, 8.0], [0.0, 0.0]])
    function = lambda x, probe: clip_cotangent(x, 1.0, measure=TOKENS, probe=probe)

    found, seen = probed(function, grads)

    trees.assert_same_bits(found, clipped(grads, 1.0, measure=TOKENS))
    assert tuple(map(float, seen)) == pytest.approx((10, 1, 0.5, 1, 1, 0), rel=FLOAT32)
    assert isinstance(seen, CotangentMetrics)


@pytest.mark.parametrize("policy", TREATED)
def test_a_bad_step_does_not_spoil_the_sums(policy):
    """A norm that is not finite is counted, and not added: the others' sum is left."""
    good = jnp.array([3.0, 4.0])
    function = lambda x, probe: [clip_cotangent(g, 1.0, nonfinite=policy, probe=probe) for g in x]

    _, seen = probed(function, [good, jnp.array([NAN, 0.0]), 2 * good])

    assert tuple(map(float, seen)) == pytest.approx((15, 2, 2, 3, 2, 1), rel=FLOAT32)


MEANS = {
    "whole tree, sanitize": (None, "sanitize", jnp.array([NAN, 3.0])),
    "tokens, zero": (TOKENS, "zero", jnp.array([[NAN, 0.0], [7.0, 0.0]])),
    "tokens, propagate": (TOKENS, "propagate", jnp.array([[INF, 0.0], [7.0, 0.0]])),
}


@pytest.mark.parametrize("case", MEANS)
def test_the_mean_norm_is_of_finite_calls(case):
    """Where something of a call is left by the policy, it is in none of the sums of norms."""
    rule, policy, bad = MEANS[case]
    clip = functools.partial(clip_cotangent, measure=rule, nonfinite=policy)

    _, seen = probed(
        lambda x, probe: [clip(g, 1.0, probe=probe) for g in x], [bad, jnp.array([[0.0, 4.0]])]
    )

    assert (seen.calls, seen.nonfinite_calls) == (2, 1)
    mean = seen.norm / (seen.calls - seen.nonfinite_calls)
    np.testing.assert_allclose((mean, seen.clipped_norm), (4, 1), rtol=FLOAT32)


def test_a_float64_norm_beyond_float32_is_not_finite():
    """In a probe, which is float32; the gradient is clipped as it should be."""
    with jax.enable_x64(True):
        grads = jnp.array([1e60, 0.0])
        found, seen = probed(lambda x, probe: clip_cotangent(x, 1.0, probe=probe), grads)
        np.testing.assert_allclose(found, [1, 0], rtol=1e-15)
    assert (seen.norm, seen.calls, seen.nonfinite_calls) == (0, 1, 1)


def test_a_tree_that_is_shared_by_examples_is_one_clip():
    """Under vmap, the gradients of what it does not map are added up first."""
    grads = jnp.array([[3.0, 0.0], [0.0, 4.0]])

    def function(w, probe):
        return jax.vmap(lambda _: clip_cotangent(w, 1.0, probe=probe))(jnp.zeros(2))

    found, seen = jax.vjp(function, jnp.zeros(2), cotangent_probe())[1](grads)

    np.testing.assert_allclose(found, [0.6, 0.8], rtol=FLOAT32)
    assert (seen.norm, seen.calls) == (5, 1)


def test_a_probe_adds_up_over_examples():
    """Under vmap, every example is a call of its own, and clipped by its own norm."""
    grads = trees.normal(6, 5)
    loss = lambda x, probe, g: jnp.vdot(clip_cotangent(x, 0.5, probe=probe), g)
    mean = lambda x, probe: jnp.sum(jax.vmap(loss, (0, None, 0))(x, probe, grads))

    found, seen = jax.grad(mean, argnums=(0, 1))(jnp.zeros((6, 5)), cotangent_probe())

    sizes = norm(trees.float64(grads), axis=1)
    trees.assert_close(trees.float64(found), shrink(trees.float64(grads), sizes, 0.5), FLOAT32)
    expected = (sizes.sum(), 3, 6, 6, 6, 0)
    assert tuple(map(float, seen)) == pytest.approx(expected, rel=FLOAT32)


def test_a_clip_that_nothing_comes_back_to():
    """Its probe stays at zero, calls included."""
    seen = jax.grad(lambda probe: 0 * clip_cotangent(1, probe=probe) + 1.0)(cotangent_probe())
    assert not any(seen)


# --------------------------------------------------------------------- the largest are dropped


def test_axlearns_numbers():
    """Of tokens of norm 1, 5, 1 and 2, the second and the last are dropped, as axlearn does."""
    cases = json.loads(GOLDEN.read_text())["cases"]
    grads = jnp.array([[[1.0, 0.0], [3.0, 4.0]], [[0.6, 0.8], [0.0, 2.0]]])
    for method in ("approx", "topk", "sort"):
        np.testing.assert_array_equal(
            np.asarray(dropped(grads, 2)), np.asarray(cases[method]["clipped"], np.float32)
        )
        assert np.asarray(norm(grads, axis=-1)).ravel()[cases[method]["ids"]].tolist() == [5, 2]


def test_ties_do_not_drop_everything():
    """Of four equal tokens the first is dropped, where axlearn's exact method drops all."""
    case = json.loads(GOLDEN.read_text())["cases"]["tie_topk"]
    grads = jnp.ones((1, 4, 2))

    for k in (1, 3, 5):
        found = np.asarray(dropped(grads, k))
        assert (found[0] == 0).all(axis=1).tolist() == [i < k for i in range(4)]

    assert not np.any(case["clipped"])  # the fault of the reference


def drop_oracle(grads, k):
    """A stable sort by norm."""
    flat = grads.reshape(-1, grads.shape[-1]).copy()
    flat[np.argsort(-np.linalg.norm(flat, axis=-1), kind="stable")[:k]] = 0
    return flat.reshape(grads.shape)


@pytest.mark.parametrize("k", [1, 3, 17, 40, 99])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_largest_are_dropped(k, dtype):
    """It is what a stable sort makes of it, with ties and zeros; the rest is the same bits."""
    signs = np.random.default_rng(k).choice([-1, 1], (4, 10, 3))
    grads = signs * np.random.default_rng(k + 1).integers(0, 4, (4, 10, 1))

    found = jax.jit(functools.partial(dropped, k=k))(jnp.asarray(grads, dtype))

    expected = jnp.asarray(drop_oracle(grads, k), dtype)
    np.testing.assert_array_equal(np.asarray(found), np.asarray(expected))


def test_each_leaf_has_its_own_largest():
    """Of a tree, k tokens of every leaf are dropped; a vector is one token."""
    grads = {"a": trees.normal(3, 4), "b": trees.normal(2, 3, 4), "c": trees.normal(5)}
    found = dropped(grads, 2)
    for name in "ab":
        np.testing.assert_array_equal(found[name], drop_oracle(np.asarray(grads[name]), 2))
    assert not np.any(found["c"])
    assert dropped({"none": jnp.zeros((0, 3))}, 2)["none"].shape == (0, 3)


def test_k_in_each_row():
    """Under vmap, k are dropped from each row of a batch."""
    grads = trees.normal(5, 7, 3)
    rows_of = jax.vmap(lambda x: drop_largest_cotangents(x, 2))
    expected = np.stack([drop_oracle(np.asarray(row), 2) for row in grads])
    np.testing.assert_array_equal(backward(rows_of, grads), expected)


@pytest.mark.parametrize("policy", TREATED)
def test_bad_tokens_shield_no_large_one(policy):
    """Tokens that are not finite go by the policy, and are not among the k."""
    found = np.asarray(dropped(jnp.array(BAD), 1, nonfinite=policy))
    expected = {
        "zero": np.zeros((4, 2)),
        "propagate": [[0, 0], [NAN, NAN], [NAN, 0], [0, 0]],
        "sanitize": [[0, 0], [0, 1], [0, 1], [0, 0]],
    }
    np.testing.assert_array_equal(found, expected[policy])


def test_what_is_left_of_a_bad_token_shields_no_large_one():
    """Under "sanitize", the largest of the finite ones is dropped, not the larger remainder."""
    grads = jnp.array([[NAN, 100.0], [5.0, 0.0], [1.0, 1.0]])

    drop = lambda x, probe: drop_largest_cotangents(x, 1, nonfinite="sanitize", probe=probe)
    found, seen = probed(drop, grads)

    np.testing.assert_array_equal(found, [[0, 100], [0, 0], [1, 1]])
    assert tuple(map(float, seen)) == pytest.approx((0, 0, 1 / 3, 1, 1, 1), rel=FLOAT32)


def test_a_probe_of_dropped_tokens():
    """It holds the largest norm before and after, and the share of tokens that was dropped."""
    grads = jnp.array([[1.0, 0.0], [3.0, 4.0], [0.6, 0.8], [0.0, 2.0]])
    _, seen = probed(lambda x, probe: drop_largest_cotangents(x, 2, probe=probe), grads)
    assert tuple(map(float, seen)) == pytest.approx((5, 1, 0.5, 1, 1, 0), rel=FLOAT32)


# -------------------------------------------------------------------------------- the meshes


def mesh_of(kind):
    return jax.make_mesh((4, 2), ("x", "y"), axis_types=(kind,) * 2)


MODES = {
    "norm": functools.partial(clip_cotangent, max_norm=1.0),
    "token": functools.partial(clip_cotangent, max_norm=1.0, measure=TOKENS),
    "value": functools.partial(clip_cotangent, max_norm=0.5, measure=measures.element()),
    "drop": functools.partial(drop_largest_cotangents, k=5),
}


@EIGHT
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("kind", "spec"),
    [
        (AxisType.Auto, P("x", "y")),
        (AxisType.Explicit, P("x", "y")),
        (AxisType.Explicit, P("x", None, "y")),
    ],
    ids=str,
)
def test_sharded_is_unsharded(mode, kind, spec):
    """Eight devices give the gradient and the metrics of one, sharded as the activations."""
    function = lambda x, probe: MODES[mode](x, probe=probe)
    grads = trees.normal(8, 8, 6)
    expected = probed(function, grads)
    mesh = mesh_of(kind)
    on_mesh = functools.partial(jax.device_put, device=NamedSharding(mesh, spec))

    @jax.jit
    def step(x, probe, g):
        return jax.grad(lambda x, probe: jnp.sum(function(x, probe) * g), argnums=(0, 1))(x, probe)

    with jax.set_mesh(mesh):
        found = step(on_mesh(jnp.zeros_like(grads)), cotangent_probe(), on_mesh(grads))
        eager = probed(function, on_mesh(grads)) if mode == "drop" else found
    for some in (found, eager):
        trees.assert_close(some, expected, FLOAT32)
        assert some[0].sharding.is_equivalent_to(NamedSharding(mesh, spec), 3)


@EIGHT
def test_inside_shard_map_the_norm_is_of_the_whole():
    """It is summed over exactly the axes that a leaf varies on; a probe counts one call."""
    grads = {"split": trees.normal(8, 6), "both": trees.normal(8, 4), "same": trees.normal(5)}
    specs = {"split": P("x"), "both": P("x", "y"), "same": P()}
    function = lambda x, probe: clip_cotangent(x, 0.5, probe=probe)

    mapped = jax.shard_map(
        functools.partial(probed, function),
        mesh=mesh_of(AxisType.Auto),
        in_specs=(specs, P()),
        out_specs=(specs, P()),
    )
    found = jax.jit(mapped)(grads, cotangent_probe())

    trees.assert_close(found, probed(function, grads), FLOAT32)


@EIGHT
def test_around_shard_map_it_is_the_same():
    """So it is where the gradient is taken outside of it, of a loss that is summed inside."""
    grads = trees.normal(8, 6)

    def loss(x, probe, g):
        return jax.lax.psum(jnp.vdot(clip_cotangent(x, 0.5, probe=probe), g), "x")

    mapped = jax.shard_map(
        loss, mesh=mesh_of(AxisType.Auto), in_specs=(P("x"), P(), P("x")), out_specs=P()
    )
    grad = jax.jit(jax.grad(mapped, argnums=(0, 1)))
    found = grad(jnp.zeros_like(grads), cotangent_probe(), grads)

    expected = probed(lambda x, probe: clip_cotangent(x, 0.5, probe=probe), grads)
    trees.assert_close(found, expected, FLOAT32)


@EIGHT
def test_tokens_inside_shard_map():
    """Tokens are whole on a device if `axis_name` says so; of the largest, each drops its own."""
    grads = trees.normal(8, 3, 6)
    whole = measures.unit_norm(axis=-1, axis_name=())

    def mapped(function):
        inside = jax.shard_map(
            function, mesh=mesh_of(AxisType.Auto), in_specs=P("x"), out_specs=P("x")
        )
        return jax.jit(inside)(grads)

    found = mapped(lambda g: clipped(g, 1.0, measure=whole))
    trees.assert_close(found, clipped(grads, 1.0, measure=TOKENS), FLOAT32)
    found = mapped(lambda g: dropped(g, 2, measure=whole))
    expected = np.concatenate(
        [drop_oracle(np.asarray(grads[i : i + 2]), 2) for i in range(0, 8, 2)]
    )
    np.testing.assert_array_equal(found, expected)
    with pytest.raises(ValueError, match="axis_name="):
        mapped(lambda g: dropped(g, 2))


@EIGHT
def test_examples_inside_shard_map():
    """With `axis_name=()`, those that each device maps have norms of their own.

    A probe counts those at one place on all devices as one call, with the largest norm.
    """
    grads = trees.normal(8, 5)
    whole = measures.global_norm(axis_name=())

    def function(x, probe):
        return jax.vmap(lambda x: clip_cotangent(x, 0.5, measure=whole, probe=probe))(x)

    mapped = jax.shard_map(
        functools.partial(probed, function),
        mesh=mesh_of(AxisType.Auto),
        in_specs=(P("x"), P()),
        out_specs=(P("x"), P()),
    )
    found, seen = jax.jit(mapped)(grads, cotangent_probe())

    trees.assert_close(found, probed(function, grads)[0], FLOAT32)
    sizes = norm(trees.float64(grads), axis=1).reshape(4, 2)  # devices, places
    assert seen.calls == 2
    np.testing.assert_allclose(seen.norm, sizes.max(0).sum(), rtol=FLOAT32)


@EIGHT
def test_a_probe_where_nothing_is_tracked():
    """With check_vma=False, it is of the device's own clip, and added up from outside."""
    grads = trees.normal(8, 6)
    whole = measures.unit_norm(axis=-1, axis_name=())
    function = lambda x, probe: clip_cotangent(x, 0.5, measure=whole, probe=probe)
    over = functools.partial(
        jax.shard_map, mesh=jax.make_mesh((4,), ("x",), (AxisType.Auto,)), check_vma=False
    )

    def inside(g):
        return jax.tree.map(lambda x: x.reshape(1), probed(function, g)[1])

    def loss(x, probe, g):
        return jax.lax.psum(jnp.vdot(function(x, probe), g), "x")

    own = jax.jit(over(inside, in_specs=P("x"), out_specs=P("x")))(grads)
    from_outside = jax.grad(over(loss, in_specs=(P("x"), P(), P("x")), out_specs=P()), argnums=1)
    seen = jax.jit(from_outside)(jnp.zeros_like(grads), cotangent_probe(), grads)

    sizes = norm(trees.float64(grads), axis=1).reshape(4, 2)
    np.testing.assert_allclose(own.norm, sizes.max(1), rtol=FLOAT32)
    assert own.calls.tolist() == [1] * 4
    assert seen.calls == 4


@EIGHT
def test_a_probe_per_device():
    """A probe that is split over devices has the metrics of the whole on each."""
    grads = trees.normal(8, 6)
    function = lambda x, probe: clip_cotangent(x, 0.5, probe=probe)

    def inside(g, probes):  # a probe is (), so each device takes its own row out
        found, seen = probed(function, g, jax.tree.map(lambda x: x.reshape(()), probes))
        return found, jax.tree.map(lambda x: x.reshape(1), seen)

    mapped = jax.shard_map(inside, mesh=mesh_of(AxisType.Auto), in_specs=P("x"), out_specs=P("x"))
    _, seen = jax.jit(mapped)(grads, rows(4))

    one = probed(function, grads)[1]
    trees.assert_close(seen, jax.tree.map(lambda x: jnp.full(4, x), one), FLOAT32)


def test_eager_calls_share_a_program():
    """Outside jit, a second backward pass with another limit compiles nothing."""
    grads = trees.normal(7, 3)
    for limit in (0.5, 0.25, 2.0):
        clipped(grads, limit)
        dropped(grads, 3)
        if limit == 0.5:
            size = _clipped._cache_size()
    assert _clipped._cache_size() == size


# ----------------------------------------------------------------------------- the arguments


MAX_NORM = number(
    "a number from 0 to inf or a () array", (1, 0, 0.0, 2.5, INF, 2.0**40), (-1, -1e-45)
)
ARGUMENTS = {
    (clip_cotangent, "max_norm"): MAX_NORM,
    (clip_cotangent, "measure"): optional(measure("measure.global_norm()")),
    (clip_cotangent, "scale"): SCALE,
    (clip_cotangent, "nonfinite"): POLICY,
    (drop_largest_cotangents, "k"): WINDOW,
    (drop_largest_cotangents, "measure"): optional(measure("measure.unit_norm(axis=-1)")),
    (drop_largest_cotangents, "nonfinite"): POLICY,
}
each_argument = pytest.mark.parametrize(
    ("function", "argument"), ARGUMENTS, ids=lambda x: getattr(x, "__name__", x)
)


@each_argument
def test_bad_arguments_are_refused_in_the_forward_pass(function, argument):
    """The error names the argument, what is allowed and the value, and waits for no gradient."""
    kind = ARGUMENTS[function, argument]
    for bad in kind.bad:
        allowed = (bad.allowed or kind.allowed).format(argument=argument)
        message = f"{argument} must be {allowed}; got {bad.shown or repr(bad.value)}"
        call = lambda bad=bad: function(jnp.ones(2), **{argument: bad.value})
        assert_refused(call, bad.error, message)


@each_argument
def test_good_arguments_are_accepted(function, argument):
    """Up to the edges, in a backward pass too."""
    for value in ARGUMENTS[function, argument].good:
        call = lambda x, value=value: function(x, **{argument: value})
        assert np.all(np.isfinite(backward(call, jnp.ones((2, 3)))))


@pytest.mark.parametrize("function", [clip_cotangent, drop_largest_cotangents])
def test_a_probe_is_a_probe(function):
    """Anything else is refused."""
    for bad in (1.0, (), [0.0] * 6, cotangent_probe):
        with pytest.raises(
            TypeError, match=r"probe must be a CotangentMetrics, such as cotangent_"
        ):
            function(jnp.ones(2), probe=bad)
    for bad, shown in (
        (jnp.zeros(3), "ShapeDtypeStruct(shape=(3,), dtype=float32)"),
        (jnp.zeros((), jnp.bfloat16), "ShapeDtypeStruct(shape=(), dtype=bfloat16)"),
    ):
        probe = cotangent_probe()._replace(calls=bad)
        message = (
            f"probe.calls must be a () array of float32, as cotangent_probe() has it; got {shown}"
        )
        assert_refused(lambda probe=probe: function(jnp.ones(2), probe=probe), ValueError, message)


def test_what_has_no_meaning_here():
    """A schedule has no step here, a relative norm no parameters, and 2^31 no int32."""
    with pytest.raises(TypeError, match="max_norm must be a number from 0 to inf"):
        clip_cotangent(jnp.ones(2), lambda step: 1.0)
    with pytest.raises(ValueError, match="max_norm must be a float where it is above"):
        clip_cotangent(jnp.ones(2), 2**31)  # which int32 would wrap around
    with pytest.raises(ValueError, match="needs the parameters"):
        clipped(jnp.ones(2), measure=measures.relative(measures.leaf_norm(), 1e-3))
