"""shards -> whole: over which mesh axes a leaf is split, where a program sees one shard of it.

Under `jit` an array is whole, however it is sharded, and nothing here is needed. Inside
`jax.shard_map` and `jax.pmap` it is the shard of one device, and sums must go over the devices.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Hashable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from optaxclip._numbers import is_known

Names = tuple[str, ...]
AxisName = str | Names | Callable[[str, jax.Array], str | Names | None] | None

# The name of the axis along which `stacked` maps a measure.
STACK = "optaxclip.stacked"


def split_over(axis_name: AxisName, path: str, leaf: jax.Array, *, group: bool = True) -> Names:
    """The mapped axes over which a leaf is split; none where arrays are whole.

    Args:
      axis_name: what the user said of it: names, or a function (path, leaf) -> names; None: those
        that JAX tracks.
      path: of the leaf, as "encoder/kernel".
      leaf: its shard.
      group: whether the whole leaf is of one group. Otherwise a shard may hold whole groups, or a
        part of each, and JAX does not track which.

    Returns:
      Names of axes that are mapped here.

    Raises:
      ValueError: if None leaves it open, or a name is not that of a mapped axis.
    """
    named = axis_name(path, leaf) if callable(axis_name) else axis_name
    mapped = manual_axes()
    if named is None:
        if any(not _is_tracked(name) for name in mapped):
            raise ValueError(
                f"inside pmap, or shard_map with check_vma=False, JAX does not track over which of "
                f"the mapped axes {mapped} leaf {path!r} is split: say it by axis_name=, as "
                f"{mapped[0]!r}, or () if every device holds the whole leaf"
            )
        names = varying(leaf)
        if names and (not group or _is_bound(STACK)):
            raise ValueError(
                f"leaf {path!r} is split over the mapped axes {names}, within its groups or "
                f"between them: say it by axis_name=, as {names[0]!r}, or () if every shard holds "
                "whole groups"
            )
        return names
    names = (named,) if isinstance(named, str) else tuple(named)
    unknown = [name for name in names if not _is_bound(name)]
    if unknown and mapped:
        message = f"axis_name must name axes that are mapped here, {mapped}; got {unknown[0]!r}"
        raise ValueError(message)
    known = tuple(name for name in names if name not in unknown)
    if callable(axis_name):  # which is about this very leaf
        return known
    # A leaf that is the same on all devices counts once.
    return tuple(name for name in known if not _is_tracked(name) or name in varying(leaf))


def total(x: jax.Array, names: Names) -> jax.Array:
    """The sum over shards, entry by entry."""
    return jax.lax.psum(x, names) if names else x


def count(names: Names) -> int:
    """How many shards there are."""
    return math.prod(jax.lax.axis_size(name) for name in names)


def largest(x: jax.Array, names: Names) -> jax.Array:
    """The maximum over shards, entry by entry."""
    return _largest(x, names) if names else x


def anywhere(flag: jax.Array) -> jax.Array:
    """A flag that is the same on all devices, so that they may branch on it: whether any has it."""
    mapped = manual_axes()
    names = varying(flag) if all(map(_is_tracked, mapped)) else mapped
    return jax.lax.pmax(flag.astype(jnp.int32), names) > 0 if names else flag


def layout(x: jax.Array) -> Hashable | None:
    """How a leaf lies on devices: arrays of equal layout are added up where they are.

    None if that is not known here: on an Auto mesh, XLA decides it later, and without a mesh the
    arguments of a compiled function may be on several devices all the same.
    """
    kind = jax.typeof(x).sharding
    if kind.mesh.empty:
        return () if jax.device_count() == 1 else None
    if kind.mesh.size > 1 and AxisType.Auto in kind.mesh.axis_types:
        return None
    return kind.mesh, kind.spec, varying(x)


def is_in_one_place(x: jax.Array) -> bool:
    """Whether an array is known to be whole, on one device and of a known size."""
    return layout(x) == () and is_known(x.size)


def varying(x: Any) -> Names:
    """The mapped axes along which devices hold different values, as far as JAX tracks them."""
    return tuple(sorted(jax.typeof(x).mat.varying))


def varied(x: jax.Array, names: Iterable[str]) -> jax.Array:
    """The same values, varying over these axes too, as a scan wants its carry from the start."""
    more = tuple(sorted(set(names) - set(varying(x))))
    return jax.lax.pcast(x, more, to="varying") if more else x


def behind_a_barrier(tree: Any) -> Any:
    """The same arrays, of which XLA does not know that they are.

    One barrier for those that vary over the same axes, as what leaves it varies over all of them.
    """
    leaves, treedef = jax.tree.flatten(tree)
    for names in sorted({varying(x) for x in leaves}):
        those = [i for i, x in enumerate(leaves) if varying(x) == names]
        behind = jax.lax.optimization_barrier([leaves[i] for i in those])
        for i, x in zip(those, behind, strict=True):
            leaves[i] = x
    return treedef.unflatten(leaves)


def gathered(x: jax.Array) -> jax.Array:
    """The array whole on each device of an Explicit mesh, so that any reshape of it is possible."""
    kind = jax.typeof(x).sharding
    split = any(axis is not None for axis in kind.spec)
    return jax.sharding.reshard(x, NamedSharding(kind.mesh, PartitionSpec())) if split else x


# jax.lax.pmax has no derivative, and that of floats drops NaN, see _numbers.largest.
@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _largest(x: jax.Array, names: Names) -> jax.Array:
    return in_order(jax.lax.pmax(in_order(x), names))


@_largest.defjvp
def _largest_jvp(
    names: Names, primals: tuple[jax.Array], tangents: tuple[jax.Array]
) -> tuple[jax.Array, jax.Array]:
    value = _largest(primals[0], names)
    mine = (primals[0] == value).astype(value.dtype)
    return value, total(mine * tangents[0], names) / jnp.maximum(total(mine, names), 1)


def in_order(x: jax.Array) -> jax.Array:
    """float32 or float64 as the integers that are ordered alike, NaN the largest; or back."""
    bits = f"int{8 * x.dtype.itemsize}"
    if not jnp.issubdtype(x.dtype, jnp.floating):
        return jax.lax.bitcast_convert_type(_reflected(x), bits.replace("int", "float"))
    one_nan = jnp.where(jnp.isnan(x), jnp.full_like(x, jnp.nan), x)
    return _reflected(jax.lax.bitcast_convert_type(one_nan, bits))


def _reflected(bits: jax.Array) -> jax.Array:
    """Negative floats count down from the sign bit, integers up."""
    return jnp.where(bits < 0, bits ^ jnp.iinfo(bits.dtype).max, bits)


def manual_axes() -> Names:
    """The axes that are mapped here, by shard_map or pmap; none where arrays are whole."""
    return tuple(jax.sharding.get_abstract_mesh().manual_axes)


def in_a_stack() -> bool:
    """Whether a leaf is one layer of a stack, or one example, of many that are measured at once."""
    return _is_bound(STACK)


def _is_bound(name: str) -> bool:
    try:
        jax.lax.axis_size(name)
    except NameError:
        return False
    return True


def _is_tracked(name: str) -> bool:
    # An axis of vmap is in no type of a leaf, though in that of its index, inside jit.
    return name in manual_axes() and name in varying(jax.lax.axis_index(name))
