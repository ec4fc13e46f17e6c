"""leaf -> stack of matrices -> leaf: which axes are rows, which columns, and in which shape.

A matrix is real, has no more rows than columns, entries of about 1, and both of its axes whole on
each device. Complex ones become real ones with twice the singular values, [[A, -B], [B, A]].
"""

from __future__ import annotations

import functools
import math
import numbers
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from optaxclip._check import _refuse, _static
from optaxclip.measure.shards import AxisName, split_over

Axes = tuple[int, ...]
Pair = tuple[int | Axes, int | Axes]
MatrixRule = Pair | Callable[[str, jax.Array], Pair | None] | None

PAIR = "a pair (rows, columns), each an axis or a tuple of axes"


def check_axes(**named: Any) -> None:
    """Accepts None, a pair of axes or tuples of axes, or a function (path, leaf) -> these."""
    for name, value in named.items():
        _static(name, value)
        if not (value is None or callable(value) or _is_pair(value)):
            _refuse(TypeError, name, value, f"None, {PAIR}, or a function (path, leaf) -> these")


def _is_pair(value: Any) -> bool:
    if not (isinstance(value, tuple) and len(value) == 2):
        return False
    flat = [axis for part in value for axis in (part if isinstance(part, tuple) else (part,))]
    return all(isinstance(x, numbers.Integral) and not isinstance(x, bool) for x in flat)


class Layout(NamedTuple):
    """Where the matrices of a leaf are."""

    stack: Axes
    rows: Axes
    columns: Axes
    shape: tuple[int, ...]  # of the leaf

    @property
    def turned(self) -> bool:
        """Whether columns are what the matrix has as rows, as these are fewer."""
        return self._size(self.rows) > self._size(self.columns)

    @property
    def least(self) -> int:
        """How many rows the matrix has; 1: it is a vector."""
        return min(self._size(self.rows), self._size(self.columns))

    def _size(self, axes: Axes) -> int:
        return math.prod(self.shape[a] for a in axes)

    def matrices(self, x: jax.Array) -> jax.Array:
        """The leaf as (*stack, rows, columns)."""
        order = (self.rows, self.columns)[:: -1 if self.turned else 1]
        x = whole(x, (*self.rows, *self.columns)).transpose(*self.stack, *order[0], *order[1])
        return x.reshape(*x.shape[: len(self.stack)], *map(self._size, order))

    def leaf(self, x: jax.Array) -> jax.Array:
        """The reverse, but for the sharding."""
        order = (self.rows, self.columns)[:: -1 if self.turned else 1]
        axes = (*self.stack, *order[0], *order[1])
        x = x.reshape([self.shape[a] for a in axes])
        return x.transpose([axes.index(a) for a in range(len(axes))])


def layout(rule: MatrixRule, axis_name: AxisName, path: str, leaf: jax.Array) -> Layout:
    """What a rule says of a leaf, and whether its matrices are whole here."""
    split = split_over(axis_name, path, leaf, group=False)
    if split:
        raise ValueError(
            f"the matrices of leaf {path!r} are split over the mapped axes {split}: gather it, or "
            "say axis_name=() if every shard holds whole matrices"
        )
    whole_leaf = Layout((), (), tuple(range(leaf.ndim)), leaf.shape)
    if leaf.ndim <= 1:
        return whole_leaf
    pair = rule(path, leaf) if callable(rule) else rule
    if pair is not None:
        return _given(pair, path, leaf)
    if sum(n != 1 for n in leaf.shape) <= 1:
        return whole_leaf
    if leaf.ndim > 5:
        raise ValueError(
            f"axes=None knows ranks up to 5; leaf {path!r} has shape {leaf.shape}: "
            "give axes a function (path, leaf) -> (rows, columns)"
        )
    last = leaf.ndim - 1
    if leaf.ndim == 3:
        return Layout((0,), (1,), (2,), leaf.shape)
    return Layout((), tuple(range(last)), (last,), leaf.shape)


def _given(pair: Any, path: str, leaf: jax.Array) -> Layout:
    if not _is_pair(pair):
        _refuse(TypeError, f"the axes of leaf {path!r}", pair, PAIR)
    rows, columns = (part if isinstance(part, tuple) else (part,) for part in pair)
    both = [a % leaf.ndim for a in (*rows, *columns) if -leaf.ndim <= a < leaf.ndim]
    if len(set(both)) < len(rows) + len(columns):
        message = f"axes {pair} are out of range for, or twice in, leaf {path!r} of {leaf.shape}"
        raise ValueError(message)
    stack = tuple(a for a in range(leaf.ndim) if a not in both)
    return Layout(stack, tuple(both[: len(rows)]), tuple(both[len(rows) :]), leaf.shape)


def whole(x: jax.Array, axes: Axes) -> jax.Array:
    """The same with axes that are split over no Explicit mesh axis: XLA sees to the others."""
    sharding = jax.typeof(x).sharding
    if sharding.mesh.empty or AxisType.Explicit not in sharding.mesh.axis_types:
        return x
    spec = [None if i in axes else name for i, name in enumerate(sharding.spec)]
    return like(x, PartitionSpec(*spec))


def like(x: jax.Array, spec: PartitionSpec) -> jax.Array:
    """The same, sharded so on its Explicit mesh, if it is on one."""
    sharding = jax.typeof(x).sharding
    if sharding.mesh.empty or AxisType.Explicit not in sharding.mesh.axis_types:
        return x
    return (
        x if sharding.spec == spec else jax.sharding.reshard(x, NamedSharding(sharding.mesh, spec))
    )


def where_was(new: jax.Array, old: jax.Array) -> jax.Array:
    """The same, sharded as what it replaces in a state, so that one program does for all steps."""
    sharding = jax.typeof(old).sharding
    if set(sharding.mesh.axis_types) == {AxisType.Auto}:  # where types do not say how
        return jax.lax.with_sharding_constraint(new, NamedSharding(sharding.mesh, PartitionSpec()))
    return like(new, sharding.spec)


def as_real(x: jax.Array) -> jax.Array:
    """A complex matrix as a real one of twice the rows and columns."""
    if not jnp.iscomplexobj(x):
        return x
    join = functools.partial(jnp.concatenate, axis=-1)
    a, b = jnp.real(x), jnp.imag(x)
    return jnp.concatenate([join([a, -b]), join([b, a])], axis=-2)


def as_before(y: jax.Array, x: jax.Array) -> jax.Array:
    """The reverse, for the matrix that `x` was."""
    if not jnp.iscomplexobj(x):
        return y
    m, n = x.shape[-2:]
    return jax.lax.complex(y[..., :m, :n], y[..., m:, :n])


def unit(x: jax.Array) -> jax.Array:
    """The power of two, of shape (..., 1, 1), that brings the largest entry of each near 1."""
    peak = jnp.max(jnp.abs(jax.lax.stop_gradient(x)), (-2, -1), keepdims=True, initial=0)
    exponent = jnp.clip(jnp.frexp(peak)[1], -126, 126)  # 0 for 0; 2^126 and 2^-126 are normal
    return jnp.ldexp(jnp.ones_like(peak), -exponent)
