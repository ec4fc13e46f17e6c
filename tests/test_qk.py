"""QK-clip: against golden numbers, and in attention as it is: no logit is above the limit after it.

Logits are computed with the layers of Flax where it has them, in float32.
"""

import contextlib
import functools
import json
import math
import pathlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from kinds import assert_refused
from trees import assert_close, assert_same_bits, bits, normal

from optaxclip.qk import gqa, mla, qk_clip

GOLDEN = json.loads((pathlib.Path(__file__).parent / "golden" / "qk_clip.json").read_text())[
    "cases"
]
FLOAT32 = 2e-6  # some dozen roundings, of 6e-8 each
LOGITS = 1e-5  # sums of 5 and 6 products three times, in which a digit cancels: some 100 roundings
EQUAL = 1e-7  # of the same operations in another program, in which one may be rounded otherwise
NAN, INF = math.nan, math.inf
MOST = jnp.max(jnp.array(GOLDEN["max_logits_batch_heads"]), 0)  # (100, 100, 200, 400)


def heads(count=4, head_dim=6, embed=5, seed=0):
    """Weights as Flax keeps them, of attention with as many query heads."""
    return {
        name: {
            "kernel": normal(embed, n, head_dim, seed=seed + i),
            "bias": normal(n, head_dim, seed=seed + i),
        }
        for i, (name, n) in enumerate((("query", 4), ("key", count), ("value", count)))
    }


def factors(before, after, axis=-2):
    """What each head was multiplied by; all of its entries by the same."""
    ratio = np.moveaxis(np.asarray(after) / np.asarray(before), axis, 0)
    ratio = ratio.reshape(ratio.shape[0], -1)
    np.testing.assert_allclose(ratio, ratio[:, :1] * np.ones_like(ratio), FLOAT32)
    return ratio[:, 0]


# ---------------------------------------------------------------------- golden numbers


def test_mha_has_the_factors_of_the_paper():
    """Query and key of a head are both multiplied by sqrt(gamma), kernel and bias."""
    params = heads()
    clipped = qk_clip(params, MOST, limit=GOLDEN["tau"])

    root = np.sqrt(GOLDEN["gamma"])
    for name in ("query", "key"):
        for leaf in ("kernel", "bias"):
            found = factors(params[name][leaf], clipped[name][leaf])
            np.testing.assert_allclose(found, root, FLOAT32)
    assert_same_bits(clipped["value"], params["value"])


def test_gqa_has_the_factors_of_megatron():
    """The heads of a group are multiplied by one factor, that of its largest logit."""
    expected = GOLDEN["megatron_gqa_2groups"]
    params = heads(count=2)
    clipped = qk_clip(params, MOST, limit=GOLDEN["tau"])

    key = factors(params["key"]["kernel"], clipped["key"]["kernel"])
    query = factors(params["query"]["kernel"], clipped["query"]["kernel"])
    np.testing.assert_allclose(key, expected["k_factor"], FLOAT32)
    np.testing.assert_allclose(query, np.repeat(expected["q_factor_alpha0.5"], 2), FLOAT32)
    np.testing.assert_allclose(key * query[::2], expected["eta"], FLOAT32)


def test_mla_has_the_factors_of_maxtext():
    """Parts without rotary embedding by sqrt(gamma), the rotary query by gamma, values by 1."""
    nope, rope, value = 3, 2, 4
    params = {
        "wq_a": normal(5, 7),
        "wq_b": {"kernel": normal(7, 4, nope + rope)},
        "wkv_a": normal(5, 7 + rope),
        "wkv_b": {"kernel": normal(7, 4, nope + value)},
    }
    clipped = qk_clip(params, MOST, limit=GOLDEN["tau"], layout=mla(nope=nope))

    parts = {
        ("wq_b", "nope"): slice(nope),
        ("wq_b", "rope"): slice(nope, None),
        ("wkv_b", "k"): slice(nope),
        ("wkv_b", "v"): slice(nope, None),
    }
    for (name, part), columns in parts.items():
        before, after = (tree[name]["kernel"][..., columns] for tree in (params, clipped))
        expected = GOLDEN[f"{name}_factor_{part}"]
        np.testing.assert_allclose(factors(before, after), expected, FLOAT32)
    for name in ("wq_a", "wkv_a"):  # the latter has the rotary key, which all heads share
        assert_same_bits(clipped[name], params[name])


# --------------------------------------------------------------------------- attention


def flax_logits(params, x, **kwargs):
    """The logits of Flax's own attention layer, (batch, heads, queries, keys)."""
    seen = []

    def attend(query, key, value, **_):
        seen.append(jnp.einsum("bqhd,bkhd->bhqk", query, key) / math.sqrt(query.shape[-1]))
        return nn.dot_product_attention(query, key, value)

    layer = nn.MultiHeadDotProductAttention(num_heads=4, qkv_features=24, attention_fn=attend)
    if params is None:
        return layer.init(jax.random.key(0), x)["params"]
    layer.apply({"params": params}, x, **kwargs)
    return seen[0]


def largest(logits):
    """The largest logit of each head."""
    return jnp.max(logits, (0, 2, 3))


@pytest.mark.parametrize("limit", [0.5, 2.0, 100.0])
def test_logits_of_flax_are_within_the_limit(limit):
    """On the same inputs, heads above the limit are at it after the clip, and others as before."""
    x = normal(2, 7, 5, scale=3)
    params = flax_logits(None, x)
    params = jax.tree.map(lambda p: p + 0.3 * normal(*p.shape), params)  # biases are not 0
    before = largest(flax_logits(params, x))

    after = largest(flax_logits(qk_clip(params, before, limit=limit), x))

    np.testing.assert_allclose(after, np.minimum(before, limit), LOGITS)
    assert (after == before).all() == (limit == 100.0)


def test_logits_of_nnx_are_within_the_limit():
    """Parameters of an nnx module are found by the same names."""
    layer = nnx.MultiHeadAttention(4, 5, 24, rngs=nnx.Rngs(0), decode=False)
    graph, params = nnx.split(layer, nnx.Param)

    clipped = qk_clip(params, jnp.full(4, 4.0), limit=1.0)

    nnx.merge(graph, clipped)
    before, after = (nnx.to_pure_dict(state)["query"]["kernel"] for state in (params, clipped))
    np.testing.assert_allclose(factors(before, after), np.full(4, 0.5), FLOAT32)


@pytest.mark.parametrize("key_heads", [1, 2, 4])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 1])
def test_logits_of_groups_are_within_the_limit(key_heads, alpha):
    """No logit is above the limit, however heads are grouped and the factor is shared out."""
    params, x, limit = heads(count=key_heads), normal(9, 5, scale=2), 3.0

    def logits(params):
        query, key = (
            jnp.einsum("te,ehd->htd", x, params[name]["kernel"]) + params[name]["bias"][:, None]
            for name in ("query", "key")
        )
        return jnp.einsum("hqd,hkd->hqk", query, jnp.repeat(key, 4 // key_heads, 0))[None]

    before = largest(logits(params))
    clipped = qk_clip(params, before, limit=limit, layout=gqa(alpha=alpha))

    groups = np.repeat(np.max(before.reshape(key_heads, -1), 1), 4 // key_heads)
    gamma = np.minimum(1, limit / groups)
    assert gamma.min() < 1
    np.testing.assert_allclose(largest(logits(clipped)), before * gamma, LOGITS)
    if alpha == 1:
        assert_same_bits(clipped["key"], params["key"])
    if alpha == 0:
        assert_same_bits(clipped["query"], params["query"])


def test_logits_of_latent_attention_are_within_the_limit():
    """With a rotary key that all heads share and no factor may touch, logits are at the limit."""
    nope, rope, limit = 4, 2, 3.0
    params = {
        "wq_b": normal(5, 4, nope + rope),
        "wkv_b": normal(5, 4, nope + 3),
        "wk_rope": normal(5, rope),
    }
    x = normal(9, 5, scale=2)

    def logits(params):
        query = jnp.einsum("te,ehd->htd", x, params["wq_b"])
        key = jnp.einsum("te,ehd->htd", x, params["wkv_b"])[..., :nope]
        angle = jnp.arange(9.0)
        turn = lambda a: a * jnp.cos(angle)[:, None] + jnp.flip(a, -1) * jnp.sin(angle)[:, None]
        rotary = jnp.einsum(
            "hqd,kd->hqk", jax.vmap(turn)(query[..., nope:]), turn(x @ params["wk_rope"])
        )
        return (jnp.einsum("hqd,hkd->hqk", query[..., :nope], key) + rotary)[None]

    before = logits(params)
    after = logits(qk_clip(params, largest(before), limit=limit, layout=mla(nope=nope)))

    assert (largest(before) > limit).all()
    gamma = (limit / largest(before)).reshape(1, 4, 1, 1)
    np.testing.assert_allclose(after, before * gamma, rtol=0, atol=LOGITS * float(jnp.max(before)))


def test_training_keeps_logits_down():
    """After an update that would raise them for ever, logits stay at the limit step by step."""
    x = normal(1, 6, 5)
    params = flax_logits(None, x)
    tx = optax.sgd(0.05)
    push = lambda params: -jnp.sum(largest(flax_logits(params, x)))

    @functools.partial(jax.jit, static_argnums=2)
    def step(params, opt_state, limit):
        updates, opt_state = tx.update(jax.grad(push)(params), opt_state)
        params = optax.apply_updates(params, updates)
        seen = largest(flax_logits(params, x))
        return qk_clip(params, seen, limit=limit), opt_state, seen

    free, held = (params, tx.init(params)), (params, tx.init(params))
    for _ in range(20):
        *free, wild = step(*free, 1e30)
        *held, seen = step(*held, 2.0)
    assert wild.max() > 50
    assert largest(flax_logits(held[0], x)).max() <= 2 * (1 + LOGITS)
    assert seen.max() < 4


# --------------------------------------------------- bugs of others, which are not here


def test_there_is_no_constant_under_the_root():
    """Logits fall by limit / max whatever the limit is: sqrt(.2 max) in place of .2 sqrt(max),
    as a port has it, is no such rule, because a constant under the root does not scale out."""
    params = heads()
    for scale in (1e-3, 1.0, 1e3):
        clipped = qk_clip(params, MOST * scale, limit=100.0 * scale)
        product = factors(params["query"]["kernel"], clipped["query"]["kernel"]) * factors(
            params["key"]["kernel"], clipped["key"]["kernel"]
        )
        np.testing.assert_allclose(product, GOLDEN["gamma"], FLOAT32)


@pytest.mark.parametrize(
    "layout", [gqa(), gqa(alpha=1.0), mla(query="query", key_value="key", nope=6)]
)
@pytest.mark.parametrize("bad", [NAN, INF, -INF, 0.0, -50.0, 100.0])
def test_what_is_no_excess_changes_nothing(layout, bad):
    """A largest logit that is not finite, not positive or at the limit leaves the head alone."""
    params = heads()
    clipped = qk_clip(params, jnp.array([bad, 400.0, bad, bad]), layout=layout)

    for name in ("query", "key"):
        for i in (0, 2, 3):
            for leaf in ("kernel", "bias"):
                before, after = (x[name][leaf][..., i, :] for x in (params, clipped))
                assert bits(before) == bits(after)
    assert not np.array_equal(clipped["query"]["kernel"], params["query"]["kernel"])


def test_a_bad_logit_does_not_hide_those_of_its_group():
    """One head's NaN leaves the group to the others' logits."""
    params = heads(count=1)
    clipped = qk_clip(params, jnp.array([NAN, 400.0, INF, 1.0]))

    np.testing.assert_allclose(
        factors(params["key"]["kernel"], clipped["key"]["kernel"]), [0.5], FLOAT32
    )


@pytest.mark.parametrize("limit", [NAN, -1.0, 0.0, -INF, INF])
def test_a_bad_traced_limit_changes_nothing(limit):
    """A traced limit that is none kills no head and flips no sign."""
    params = heads()
    clip = jax.jit(lambda limit: qk_clip(params, MOST, limit=limit))

    assert_same_bits(clip(jnp.float32(limit)), params)


@pytest.mark.parametrize("alpha", [NAN, -0.5, 1.5, INF])
def test_a_bad_traced_alpha_changes_nothing(alpha):
    """A traced power that is none writes no NaN and makes no weight larger."""
    params = heads()
    clip = jax.jit(lambda alpha: qk_clip(params, MOST, layout=gqa(alpha=alpha)))

    assert_same_bits(clip(jnp.float32(alpha)), params)
    assert_close(clip(jnp.float32(0.5)), qk_clip(params, MOST), FLOAT32)


@pytest.mark.parametrize("limit", [INF, np.float32(INF), 3e38])
def test_limit_inf_is_off(limit):
    """A limit of inf, as one that is large, leaves the weights alone, and derivatives finite."""
    params = heads()
    assert_same_bits(qk_clip(params, MOST, limit=limit), params)

    total = lambda seen: jnp.sum(qk_clip(params, seen, limit=limit)["key"]["bias"])
    assert not np.any(jax.grad(total)(MOST))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float8_e4m3fn"])
def test_weights_that_stay_keep_every_bit(dtype):
    """NaN, -0.0 and subnormal weights of a head with gamma = 1 are kept, and dtypes always."""
    tiny = float(jnp.finfo(dtype).smallest_subnormal)
    values = jnp.array([tiny, -0.0, NAN, 1.0, -tiny, 0.5], jnp.float32).astype(dtype)
    if dtype == "float32":
        values = values.at[0].set(jax.lax.bitcast_convert_type(jnp.int32(1), jnp.float32))
    kernel = jnp.broadcast_to(values, (5, 4, 6))
    params = {"query": kernel, "key": kernel}

    clipped = jax.jit(qk_clip)(params, jnp.array([1.0, 400.0, 1.0, 1.0]))

    for before, after in zip(*map(jax.tree.leaves, (params, clipped)), strict=True):
        assert after.dtype == before.dtype
        for i in (0, 2, 3):
            assert bits(before[:, i]) == bits(after[:, i])
        assert after[0, 1, 3] == 0.5


# ------------------------------------------------------------------------ where things are


def test_stacked_layers_have_logits_of_their_own():
    """With the axis of layers in front, every layer is as if it stood alone."""
    layers = [heads(count=2, seed=10 * i) for i in range(3)]
    seen = jnp.stack([MOST, MOST[::-1], jnp.ones(4)])
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *layers)

    clipped = qk_clip(stacked, seen)

    each = [qk_clip(layer, m) for layer, m in zip(layers, seen, strict=True)]
    assert_close(clipped, jax.tree.map(lambda *x: jnp.stack(x), *each), EQUAL)


def test_axes_may_be_anywhere():
    """Layers as axis 1 and heads in front of or behind all else: a tuple or a function says so."""
    params = heads()
    seen = jnp.stack([MOST, MOST[::-1]])
    expected = [qk_clip(params, m) for m in seen]

    stack = jax.tree.map(lambda x: jnp.stack([x, x], 1), params)
    for kind, axes in (("kernel", (1, 2)), ("bias", (1, 0))):
        part = {name: {kind: stack[name][kind]} for name in ("query", "key")}
        rule = axes if kind == "kernel" else (lambda path, leaf, axes=axes: axes)
        clipped = qk_clip(part, seen, layout=gqa(axis=rule))
        for name in part:
            for i in range(2):
                found = jnp.moveaxis(clipped[name][kind], 1, 0)[i]
                assert_close(found, expected[i][name][kind], EQUAL)

    front = {name: jnp.moveaxis(params[name]["kernel"], 1, 0) for name in ("query", "key")}
    clipped = qk_clip(front, MOST, layout=gqa(axis=0))
    assert_close(jnp.moveaxis(clipped["key"], 0, 1), expected[0]["key"]["kernel"], EQUAL)


def test_the_module_is_found_in_a_deep_tree():
    """A path of several names finds the one place where they follow each other."""
    attention = heads()
    params = {
        "decoder": {"self": attention, "cross": heads(seed=5)},
        "step": jnp.int32(3),
        "n": None,
    }
    layout = gqa(query="self/query", key="self/key")

    clipped = qk_clip(params, MOST, layout=layout)

    assert_close(clipped["decoder"]["self"], qk_clip(attention, MOST), EQUAL)
    assert_same_bits(clipped["decoder"]["cross"], params["decoder"]["cross"])
    assert (clipped["step"], clipped["n"]) == (3, None)


def test_a_module_may_have_its_name_twice():
    """Of modules of one name within each other, the outer one is what the layout says."""
    params = {
        "attention": {
            name: {name: {"kernel": leaves["kernel"]}, "bias": leaves["bias"]}
            for name, leaves in heads().items()
        }
    }

    clipped = qk_clip(params, MOST)["attention"]

    root = np.sqrt(GOLDEN["gamma"])
    for name in ("query", "key"):
        before, after = params["attention"][name], clipped[name]
        for found in (
            factors(before[name]["kernel"], after[name]["kernel"]),
            factors(before["bias"], after["bias"]),
        ):
            np.testing.assert_allclose(found, root, FLOAT32)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("spec", [P("x"), P(None, "x"), P(None, None, "x")])
def test_on_meshes(kind, spec):
    """Kernels split along embed, heads or head_dim stay so, and have the same values."""
    mesh = jax.make_mesh((2,), ("x",), (kind,))
    params = {name: normal(6, 4, 6, seed=i) for i, name in enumerate(("query", "key"))}
    put = jax.device_put(params, NamedSharding(mesh, spec))

    for clip in (qk_clip, jax.jit(qk_clip)):
        clipped = clip(put, MOST)
        assert_close(clipped, qk_clip(params, MOST), EQUAL)
        assert clipped["key"].sharding.is_equivalent_to(put["key"].sharding, 3)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("key_heads", [1, 2, 4])
def test_logits_may_be_split_over_heads(kind, key_heads):
    """With max_logits and weights split over heads, set_mesh or not, values are the same."""
    mesh = jax.make_mesh((2,), ("x",), (kind,))
    params = heads(count=key_heads)
    split = lambda n, *spec: NamedSharding(mesh, P(*spec) if n % 2 == 0 else P())
    layout = {
        name: {"kernel": split(n, None, "x"), "bias": split(n, "x")}
        for name, n in (("query", 4), ("key", key_heads), ("value", key_heads))
    }
    put, seen = jax.device_put(params, layout), jax.device_put(MOST, split(4, "x"))
    expected = qk_clip(params, MOST)

    for clip in (qk_clip, jax.jit(qk_clip)):
        for context in (contextlib.nullcontext(), jax.set_mesh(mesh)):
            with context:
                clipped = clip(put, seen)
            assert_close(clipped, expected, FLOAT32)
            same = jax.tree.map(
                lambda x, s: x.sharding.is_equivalent_to(s, x.ndim), clipped, layout
            )
            assert all(jax.tree.leaves(same))


def test_inside_shard_map():
    """Heads that are split over devices have factors of their own."""
    mesh = jax.make_mesh((4,), ("x",))
    params = {name: normal(6, 4, 6, seed=i) for i, name in enumerate(("query", "key"))}
    specs = {"query": P(None, "x"), "key": P(None, "x")}
    put = jax.device_put(
        (params, MOST), jax.tree.map(lambda s: NamedSharding(mesh, s), (specs, P("x")))
    )

    mapped = jax.shard_map(qk_clip, mesh=mesh, in_specs=(specs, P("x")), out_specs=specs)

    assert_close(mapped(*put), qk_clip(params, MOST), EQUAL)


def test_vmap_and_derivatives():
    """A vmap over logits is a loop; derivatives are the factor, at weights of 0 too, and finite."""
    params = {name: normal(5, 4, 6).at[0].set(0) for name in ("query", "key")}
    seen = jnp.stack([MOST, jnp.zeros(4)])

    many = jax.vmap(qk_clip, (None, 0))(params, seen)
    assert_close(jax.tree.map(lambda x: x[0], many), qk_clip(params, MOST), EQUAL)

    total = lambda params, seen: jnp.sum(qk_clip(params, seen)["key"])
    slope, by_logit = jax.grad(total, (0, 1))(params, MOST)
    root = np.sqrt(GOLDEN["gamma"]).reshape(1, 4, 1)
    np.testing.assert_allclose(slope["key"], root * np.ones((5, 4, 6)), FLOAT32)
    assert np.isfinite(by_logit).all()


# --------------------------------------------------------------------------- arguments

ONE = {name: jnp.ones((5, 4, 6)) for name in ("query", "key")}
PATHS = 'a path, such as "query" or "attention/query"'
AXES = "None, an int, a tuple of ints or a function (path, leaf) -> axes"
ERRORS = {
    "no leaf": (
        lambda: qk_clip({"q": jnp.ones((5, 4, 6))}, MOST),
        ValueError,
        (
            "the layout must find one 'query' in params, so call qk_clip once for each attention; "
            "got []"
        ),
    ),
    "two attentions": (
        lambda: qk_clip({"a": ONE, "b": ONE}, MOST),
        ValueError,
        (
            "the layout must find one 'query' in params, so call qk_clip once for each attention; "
            "got ['a/query', 'b/query']"
        ),
    ),
    "heads": (
        lambda: qk_clip(ONE, jnp.ones(6)),
        ValueError,
        "the heads of max_logits, 6, must be a multiple of those of keys, 4",
    ),
    "query heads": (
        lambda: qk_clip(ONE, jnp.ones(8)),
        ValueError,
        "leaf 'query' must have the heads, (8,), along its axes (1,); got (5, 4, 6)",
    ),
    "no heads": (
        lambda: qk_clip(ONE, 3.0),
        ValueError,
        "max_logits must be an array of shape (..., heads); got 3.0",
    ),
    "axes": (
        lambda: qk_clip(ONE, MOST, layout=gqa(axis=(0, 1))),
        ValueError,
        (
            "the axis of leaf 'key' must be that of heads, or one for each axis of max_logits, 1; "
            "got (0, 1)"
        ),
    ),
    "columns": (
        lambda: qk_clip(ONE, MOST, layout=mla(query="query", key_value="key", nope=7)),
        ValueError,
        (
            "leaf 'query' must have nope=7 columns or more behind its axis of heads, 1; got shape "
            "(5, 4, 6)"
        ),
    ),
    "limit": (
        lambda: qk_clip(ONE, MOST, limit=0.0),
        ValueError,
        "limit must be a number from 1.2e-38 to inf or a () array; got 0.0",
    ),
    "layout": (
        lambda: qk_clip(ONE, MOST, layout="mha"),
        TypeError,
        "layout must be a Layout, such as qk.gqa(); got 'mha'",
    ),
    "path": (lambda: gqa(query="a//b"), ValueError, f"query must be {PATHS}; got 'a//b'"),
    "no path": (
        lambda: mla(key_value=None, nope=1),
        TypeError,
        f"key_value must be {PATHS}; got None",
    ),
    "axis": (lambda: gqa(axis=1.5), TypeError, f"axis must be {AXES}; got 1.5"),
    "alpha": (
        lambda: gqa(alpha=1.5),
        ValueError,
        "alpha must be a number from 0 to 1 or a () array; got 1.5",
    ),
    "nope": (lambda: mla(nope=0), ValueError, "nope must be a whole number >= 1; got 0"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_bad_arguments_are_named(case):
    """An error names the argument, its value and what is allowed."""
    assert_refused(*ERRORS[case])
