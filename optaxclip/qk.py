"""params, attention logits -> params: heads whose logits are too large get smaller weights.

**This is no clip of gradients but a rescale of weights**, after the update: where the largest
logit q . k that a head has seen in the forward pass is above a limit, its query and key weights
are shrunk, so that on the same inputs its largest logit would have been the limit.

=========  ======================================  ============================================
layout     what there is                           what is shrunk
=========  ======================================  ============================================
`gqa`      query and key weights of each head;     query by gamma^alpha, key by
           equally many (MHA), fewer keys (GQA)    gamma^(1 - alpha)
           or one (MQA)
`mla`      latent attention: heads have a rotary   query and key but the rotary parts by
           part, whose key they share              gamma^(1/2), the rotary query by gamma
=========  ======================================  ============================================

In a training step:

    updates, opt_state = tx.update(grads, opt_state, params)
    params = optax.apply_updates(params, updates)
    params["attention"] = qk_clip(params["attention"], max_logits, layout=gqa())

`max_logits` is the model's to report: the maximum over batch, queries and keys of the logits that
go into the softmax, scaled and without the mask's -inf. Moments of the optimizer stay as they are.
Do not call it for attention that normalizes queries and keys (QK-norm): there, weights do not
change the logits, and would be shrunk at every step.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from . import _check
from ._check import _refuse, _shown
from ._numbers import part, where, widen
from .measure.base import AxisRule, places, resolve
from .measure.shards import gathered

Tree = Any


class Weights(NamedTuple):
    """The weights under one path, and which powers of gamma multiply them."""

    path: str  # "query": all leaves in modules of this name; or "attention/query"
    power: float  # of gamma
    axis: AxisRule  # that of heads, which that of head_dim follows; or of all of max_logits
    columns: int | None = None  # of head_dim, to which power is for; None: all
    other_power: float = 0.0  # for the columns from there on


class Layout(NamedTuple):
    """Where in the parameters queries and keys come from."""

    query: Weights
    key: Weights


def gqa(
    *, query: str = "query", key: str = "key", axis: AxisRule = -2, alpha: float = 0.5
) -> Layout:
    """Multi-head, grouped-query and multi-query attention.

    There may be fewer key heads than query heads. Query heads (k n, ..., k n + n - 1) then share
    key head k, as in Llama, and the one of them with the largest logit shrinks all.

    Args:
      query: path of the module of the queries, "query" or "attention/query"; all leaves in it,
        kernel and bias, belong to it.
      key: as query, for the keys.
      axis: which axis of a leaf is the heads, with that of head_dim behind it: -2 does for Flax's
        kernels (embed, heads, head_dim) and biases (heads, head_dim). An int; a tuple with one
        axis per axis of `max_logits`; or a function (path, leaf) -> one of these.
      alpha: in [0, 1], the power of gamma for queries; keys have the rest. A traced one that is
        not leaves the weights alone.

    Returns:
      A layout for :func:`qk_clip`.

    Raises:
      TypeError, ValueError: if an argument is not such.

    Example:
      >>> from optaxclip.qk import gqa
      >>> gqa(query="wq", key="wk").key.power
      0.5
    """
    _paths(query=query, key=key)
    _check.axes(axis=axis)
    _check.within(0, 1, alpha=alpha)
    return Layout(Weights(query, alpha, axis), Weights(key, 1 - alpha, axis))


def mla(*, query: str = "wq_b", key_value: str = "wkv_b", nope: int, axis: AxisRule = -2) -> Layout:
    """Multi-head latent attention, in which all heads share one rotary key.

    The columns of a query head are first those without, then those with rotary embedding; those
    of a key-value head first those of the key, then the value, which stays. The shared rotary key
    stays too.

    Args:
      query: path of the up-projection of queries, leaves (rank, heads, nope + rope); where queries
        have no latent, of the projection.
      key_value: path of the up-projection of keys and values, leaves (rank, heads, nope + value).
      nope: how many columns of a head have no rotary embedding (`qk_nope_head_dim`).
      axis: that of heads, as in `gqa`.

    Returns:
      A layout for :func:`qk_clip`.

    Raises:
      TypeError, ValueError: if an argument is not such.

    Example:
      >>> from optaxclip.qk import mla
      >>> mla(nope=128).query.other_power
      1.0
    """
    _paths(query=query, key_value=key_value)
    _check.window(nope=nope)
    _check.axes(axis=axis)
    return Layout(Weights(query, 0.5, axis, nope, 1.0), Weights(key_value, 0.5, axis, nope))


def qk_clip(
    params: Tree,
    max_logits: jax.Array,
    *,
    limit: float | jax.Array = 100.0,
    layout: Layout | None = None,
) -> Tree:
    """Shrinks the query and key weights of heads whose logits were above a limit.

    gamma_h = min(1, tau / S_max^h),  W_q <- gamma^alpha W_q,  W_k <- gamma^(1 - alpha) W_k

    Call it after `optax.apply_updates`, once for each attention. A head with gamma = 1 keeps its
    weights bit for bit, and so does one whose largest logit is not above zero or not finite.

    Args:
      params: a tree with the parameters of one attention, or of scan-stacked ones.
      max_logits: S_max, (heads,) float32, the largest logit of each query head in this step; with
        stacked layers (layers, heads), where leaves have the axis of layers in front, or where the
        layout says.
      limit: tau > 0; inf leaves the weights alone, and so does a traced one that is not > 0.
      layout: which leaves are queries and keys; None: `gqa()`, by the names that Flax gives them.

    Returns:
      As `params`, with shapes and dtypes as they were.

    Raises:
      TypeError, ValueError: if an argument is not such; ValueError if the layout finds no leaf or
        those of several modules, or numbers of heads that do not go together.

    Example:
      >>> import jax.numpy as jnp
      >>> params = {name: {"kernel": jnp.ones((1, 2, 1))} for name in ("query", "key", "value")}
      >>> params = qk_clip(params, jnp.array([50.0, 400.0]))
      >>> for name in ("query", "key", "value"):
      ...     print(name, params[name]["kernel"].ravel())
      query [1.  0.5]
      key [1.  0.5]
      value [1. 1.]

    Reference:
      Kimi Team, Kimi K2: Open agentic intelligence, arXiv:2507.20534, algorithm 1; for groups,
      the rule of Megatron-LM.

    Deviation from the paper: none; grouped keys, of which it says nothing, follow the largest
    logit of the group.
    """
    _check.within(1.2e-38, math.inf, limit=limit)
    layout = gqa() if layout is None else layout
    _check.instance(Layout, "qk.gqa()", layout=layout)
    floats, whole = part(params)
    found = places(floats)
    seen = gathered(jnp.asarray(max_logits, jnp.float32))
    if seen.ndim == 0:
        _refuse(ValueError, "max_logits", max_logits, "an array of shape (..., heads)")
    queries, keys = (_found(each.path, floats) for each in layout)
    key_path, key = found[keys[0]]
    key_heads = key.shape[_axes(layout.key, key_path, key, seen.ndim)[-1]]
    heads = seen.shape[-1]
    if heads % key_heads:
        raise ValueError(
            f"the heads of max_logits, {heads}, must be a multiple of those of keys, {key_heads}"
        )
    gamma = _gamma(seen, jnp.asarray(limit, jnp.float32), key_heads)
    leaves, treedef = jax.tree.flatten(floats)
    for i in queries:
        shared = jnp.repeat(gamma, heads // key_heads, axis=-1)
        leaves[i] = _scaled(layout.query, *found[i], shared)
    for i in keys:
        leaves[i] = _scaled(layout.key, *found[i], gamma)
    return whole(treedef.unflatten(leaves))


def _paths(**named: Any) -> None:
    """Accepts paths of modules."""
    for name, value in named.items():
        if not isinstance(value, str) or not all(value.split("/")):
            error = ValueError if isinstance(value, str) else TypeError
            _refuse(error, name, value, 'a path, such as "query" or "attention/query"')


def _found(path: str, tree: Tree) -> list[int]:
    """Which leaves lie in the one module of this path."""
    own = path.split("/")
    modules: dict[str, list[int]] = {}
    for i, (place, _) in enumerate(places(tree)):
        keys = place.split("/")
        starts = [k for k in range(len(keys)) if keys[k : k + len(own)] == own]
        if starts:
            modules.setdefault("/".join(keys[: starts[0] + len(own)]), []).append(i)
    if len(modules) != 1:
        raise ValueError(
            f"the layout must find one {path!r} in params, so call qk_clip once for each "
            f"attention; got {_shown(sorted(modules))}"
        )
    return modules.popitem()[1]


def _axes(weights: Weights, path: str, leaf: jax.Array, ndim: int) -> tuple[int, ...]:
    """The axes of a leaf that are those of max_logits."""
    axes = resolve(weights.axis, path, leaf) or ()
    if len(axes) == 1:
        axes = (*range(ndim - 1), *axes)
    if len(set(axes)) != ndim:
        message = f"the axis of leaf {path!r} must be that of heads, or one for each axis of "
        raise ValueError(f"{message}max_logits, {ndim}; got {axes}")
    return axes


def _gamma(seen: jax.Array, limit: jax.Array, key_heads: int) -> jax.Array:
    """min(1, tau / S_max) of each key head."""
    size = jnp.where(jnp.isfinite(seen), seen, 0)
    size = jnp.max(size.reshape(*seen.shape[:-1], key_heads, -1), -1)
    over = (limit > 0) & (size > limit)
    return jnp.where(over, limit / jnp.where(over, size, 1), 1)


def _scaled(weights: Weights, path: str, leaf: jax.Array, gamma: jax.Array) -> jax.Array:
    axes = _axes(weights, path, leaf, gamma.ndim)
    if tuple(leaf.shape[a] for a in axes) != gamma.shape:
        message = f"leaf {path!r} must have the heads, {gamma.shape}, along its axes {axes}; got "
        raise ValueError(f"{message}{leaf.shape}")
    if weights.columns is None:
        power = jnp.asarray(weights.power, jnp.float32)
        factor = gamma ** jnp.where((power >= 0) & (power <= 1), power, 0)
    else:
        axes = (*axes, axes[-1] + 1)
        if axes[-1] == leaf.ndim or leaf.shape[axes[-1]] < weights.columns:
            raise ValueError(
                f"leaf {path!r} must have nope={weights.columns} columns or more behind its axis "
                f"of heads, {axes[-2]}; got shape {leaf.shape}"
            )
        first = np.arange(leaf.shape[axes[-1]]) < weights.columns
        powers = np.where(first, weights.power, weights.other_power).astype(np.float32)
        factor = gamma[..., None] ** powers.reshape((1,) * gamma.ndim + powers.shape)
    factor = jnp.transpose(factor, np.argsort(axes).tolist())
    factor = jnp.expand_dims(factor, [a for a in range(leaf.ndim) if a not in axes])
    x = widen(leaf)
    factor = jnp.ones_like(x) * factor.astype(x.dtype)  # sharded as the leaf is, for `where`
    # Not the product alone: XLA:CPU flushes subnormal numbers in a multiplication by 1.
    return where(factor == 1, leaf, (x * factor).astype(leaf.dtype))
