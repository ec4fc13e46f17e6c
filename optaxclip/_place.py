"""params -> where a state lives: beside them, sharded as the norms that it remembers.

The first step would put it there anyway. Begun elsewhere, it would change its sharding in that
step, and the step be compiled twice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from .measure import Measure
from .measure.shards import varied, varying

Tree = Any


def abstract_norms(measure: Measure, params: Tree) -> Tree:
    """The norms as `jax.ShapeDtypeStruct`, float32, with the sharding that they will have."""
    mesh = _mesh(params)
    if mesh is None:
        norms = jax.eval_shape(measure.norms, params, params)
    else:
        norms = _sharded_norms(measure, params, mesh)

    def float32(norm: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        if mesh is None:
            return placeable(norm.update(dtype=jnp.float32))
        spec = PartitionSpec() if norm.sharding is None else norm.sharding.spec
        return norm.update(dtype=jnp.float32, sharding=NamedSharding(mesh, spec))

    return jax.tree.map(float32, norms)


def placeable(x: Any) -> Any:
    """An abstract or traced array without a sharding on a mesh that is not set here.

    JAX refuses to make an array like it; one without a sharding will do.
    """
    if isinstance(x, jax.Array) and not isinstance(x, jax.core.Tracer):
        return x
    kind = jax.typeof(x)
    here = kind.sharding.mesh in (None, jax.sharding.get_abstract_mesh())
    return x if here or kind.sharding.mesh.empty else jax.ShapeDtypeStruct(x.shape, x.dtype)


def beside(params: Tree) -> Callable[..., Tree]:
    """What puts a state on the mesh or device of the parameters, if these are on one.

    The function takes the state and, optionally, a norm or leaf: arrays that end in its shape are
    sharded as it is, others replicated. Abstract and traced parameters are nowhere, but inside
    shard_map arrays vary over devices as those do.
    """
    mesh = _mesh(params)
    device = _device(params)
    if mesh is None and device is None:
        return _varying_alike
    if mesh is None:
        return lambda state, like=None: jax.device_put(state, device)
    explicit = AxisType.Explicit in mesh.axis_types
    # Another spelling of a sharding is another program. A compiled one spells it in full on an
    # Explicit mesh, and else as its arguments do, or without trailing None if they do not have it.
    spellings = {
        _key(x.ndim, x.sharding.spec): x.sharding.spec
        for x in reversed(jax.tree.leaves(params))
        if not explicit and _mesh_of(x) is not None
    }

    def spec(x: jax.Array, like: Any) -> PartitionSpec:
        own = [None] * x.ndim
        if _mesh_of(like) is not None and x.ndim >= like.ndim:
            start = x.ndim - like.ndim
            own[start : start + len(like.sharding.spec)] = like.sharding.spec
        key = _key(x.ndim, own)
        return PartitionSpec(*own) if explicit else spellings.get(key, PartitionSpec(*key[1]))

    def place(state: Tree, like: Any = None) -> Tree:
        put = lambda x: jax.device_put(x, NamedSharding(mesh, spec(x, like)))
        return jax.tree.map(put, state)

    return place


def _varying_alike(state: Tree, like: Any = None) -> Tree:
    """Inside shard_map, a scan wants its carry to vary over devices from the start."""
    names = () if like is None else varying(like)
    if not names:
        return state

    def cast(x: jax.Array) -> jax.Array:
        alike = x.shape[max(x.ndim - like.ndim, 0) :] == like.shape
        return varied(x, names) if alike else x

    return jax.tree.map(cast, state)


def _key(ndim: int, spec: Sequence[Any]) -> tuple[int, tuple[Any, ...]]:
    axes = list(spec)
    while axes and axes[-1] is None:
        axes.pop()
    return ndim, tuple(axes)


def _device(params: Tree) -> Any:
    """The sharding of the first parameter that was put on a device."""
    for x in jax.tree.leaves(params):
        if not isinstance(x, jax.core.Tracer) and getattr(x, "committed", False):
            return x.sharding
    return None


def _mesh(params: Tree) -> Mesh | None:
    """The mesh of the first concrete parameter that is on one."""
    for x in jax.tree.leaves(params):
        mesh = None if isinstance(x, jax.core.Tracer) else _mesh_of(x)
        if mesh is not None:
            return mesh
    return None


def _mesh_of(x: Any) -> Mesh | None:
    mesh = getattr(getattr(x, "sharding", None), "mesh", None)
    return mesh if isinstance(mesh, Mesh) else None


def _sharded_norms(measure: Measure, params: Tree, mesh: Mesh) -> Tree:
    # An Auto mesh does not say how results are sharded before they are compiled. Its Explicit twin
    # does, by the same rules.
    twin = Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Explicit,) * mesh.devices.ndim)

    def typed(x: Any) -> jax.ShapeDtypeStruct:
        spec = x.sharding.spec if _mesh_of(x) is not None else PartitionSpec()
        sharding = NamedSharding(twin, spec)
        return jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x), sharding=sharding)

    abstract = jax.tree.map(typed, params)
    try:
        with jax.sharding.use_abstract_mesh(twin.abstract_mesh):
            return jax.eval_shape(measure.norms, abstract, abstract)
    except Exception:  # noqa: BLE001 - a measure of one's own may be for Auto meshes only
        return jax.eval_shape(measure.norms, params, params)
