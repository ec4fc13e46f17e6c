"""states -> what `jax.export` can write: every NamedTuple under the name that its code gives it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
from jax import export

Tree = Any


def register_for_export(opt_state: Tree) -> None:
    """Lets `jax.export` serialize functions of an optimizer state.

    JAX asks for a name of each type of NamedTuple that a serialized function takes or gives, and
    neither it nor Optax registers any. This does for all that are in the state: those of the clips,
    of Optax and of one's own. It is needed once in each process that writes or reads such a
    function; again it does nothing, nor to types that were registered otherwise. To serialize
    needs the package flatbuffers, to register does not.

    Args:
      opt_state: any pytree: a state, a state of shapes from `jax.eval_shape`, or several in one.

    Example:
      >>> import jax, jax.export, jax.numpy as jnp, optax, optaxclip
      >>> from optaxclip.export import register_for_export
      >>> tx = optax.chain(optaxclip.clip_by_global_norm(1.0), optax.sgd(1.0))
      >>> grads = jnp.array([3.0, 4.0])
      >>> state = tx.init(grads)
      >>> register_for_export(state)
      >>> written = jax.export.export(jax.jit(tx.update))(grads, state).serialize()
      >>> updates, state = jax.export.deserialize(written).call(grads, state)
      >>> updates
      Array([-0.6, -0.8], dtype=float32)
    """
    for node in set(_types(jax.tree.structure(opt_state))):
        if not (issubclass(node, tuple) and hasattr(node, "_fields")):
            continue
        name = f"{node.__module__}.{node.__qualname__}"
        try:
            export.register_namedtuple_serialization(node, serialized_name=name)
        except ValueError as error:  # JAX has no public way to ask
            if "Duplicate serialization registration for type" not in str(error):
                raise


def _types(structure: Any) -> Iterator[type]:
    """The type of every node that is no leaf."""
    data = structure.node_data()
    if data is not None:
        yield data[0]
    for child in structure.children():
        yield from _types(child)
