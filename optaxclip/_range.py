"""fields of a state -> what they may hold, written beside each: `seen: Count`.

What ties fields together is the method `laws` of their class: what should hold, by its name. A
threshold says both in its own file, and `validate_state` reads them.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import Annotated, Any, NamedTuple, get_type_hints

import jax
import jax.numpy as jnp

Tree = Any


class Range(NamedTuple):
    """What a field of a state may hold: written beside the field, read by `validate_state`."""

    low: float | None = None  # None: no bound
    high: float | None = None
    dtypes: tuple[str, ...] = ("float32",)
    also: tuple[float, ...] = ()  # inf or NaN, where these are allowed; no others are
    start: float = 0  # what the field holds before the first step, unless told otherwise
    front: int | None = 0  # axes in front of those of its neighbours; None: not like them
    each: bool = False  # whether the field is a tree, and each array in it is so

    def holds(self, x: jax.Array) -> jax.Array:
        """Whether each entry is within."""
        inside = jnp.isfinite(x)
        if self.low is not None:
            inside &= x >= self.low
        if self.high is not None:
            inside &= x <= self.high
        for value in self.also:
            inside |= jnp.isnan(x) if math.isnan(value) else x == value
        return inside

    def __str__(self) -> str:
        """In words, for a message."""
        low = [] if self.low is None else [f">= {self.low:.4g}"]
        high = [] if self.high is None else [f"<= {self.high:.4g}"]
        kind = " ".join(["finite", " or ".join(self.dtypes), *low, *high])
        return ", or ".join([kind, *map(str, self.also)])


# No norm is learned from 2^64 on. Its averages round to no more than that: twice it, to be sure.
Norm = Annotated[jax.Array, Range(0, 2.0**65)]
Count = Annotated[jax.Array, Range(0, dtypes=("int32",))]
Steps = Annotated[jax.Array, Range(0, dtypes=("int32",), front=None)]

# For the memory of a threshold of one's own that declares nothing.
ANYTHING = Range(dtypes=("float32", "int32", "bool"), front=None)


class Field(NamedTuple):
    """An array in a state, and what is said of it."""

    place: str
    allowed: Any  # a `Range`, or the class that it should be and is not
    x: Any
    owner: type | None  # the class whose field it is


def _declared(x: Any) -> dict[str, Range | type]:
    """What a NamedTuple says of its fields: a range, or another such class."""
    kind: Any = type(x)
    return _of_class(kind) if hasattr(kind, "_fields") else {}


@functools.cache
def _of_class(kind: Any) -> dict[str, Range | type]:
    try:
        hints = get_type_hints(kind, include_extras=True)
    except NameError:  # a class of one's own, whose names are out of reach
        return {}
    notes = {name: getattr(hint, "__metadata__", (hint,)) for name, hint in hints.items()}
    said = [(name, note) for name, each in notes.items() for note in each]
    return {name: x for name, x in said if isinstance(x, Range) or hasattr(x, "_fields")}


def is_part(x: Any) -> bool:
    """Whether a NamedTuple says of some array what it may be."""
    return any(isinstance(said, Range) for said in _declared(x).values())


def joined(place: str, name: str) -> str:
    """A place within another, if these are any."""
    return "/".join(filter(None, [place, name]))


def named(place: str, path: tuple[Any, ...]) -> str:
    """A path for people to read: "0/memory/threshold/seen"."""
    return joined(place, jax.tree_util.keystr(path, simple=True, separator="/"))


def fields(place: str, node: Tree) -> Iterator[Field]:
    """What a part holds, in the order of its leaves."""
    if not is_part(node):
        for path, x in jax.tree.leaves_with_path(node, is_leaf=is_part):
            own = named(place, path)
            yield from fields(own, x) if is_part(x) else [Field(own, ANYTHING, x, None)]
        return
    for name, x in node._asdict().items():
        own, said = joined(place, name), _declared(node).get(name)
        if said is None or (isinstance(said, type) and isinstance(x, said)):
            yield from fields(own, x)
        elif isinstance(said, Range) and said.each:
            leaves = jax.tree.leaves_with_path(x)
            yield from (Field(named(own, path), said, leaf, type(node)) for path, leaf in leaves)
        else:
            yield Field(own, said, x, type(node))


def tied(place: str, node: Tree) -> Iterator[tuple[str, Any]]:
    """What has laws: a part, and what is in it."""
    if hasattr(node, "laws"):
        yield place, node
    for name, x in node._asdict().items() if hasattr(node, "_fields") else ():
        yield from tied(joined(place, name), x)


def plain(node: Tree) -> Tree:
    """The same with nothing around its arrays: nnx.Optimizer wraps each in a node of its own."""
    if hasattr(node, "_fields"):
        return type(node)(*map(plain, node))
    leaves = jax.tree.leaves(node)
    container = isinstance(node, dict | list | tuple) or node is None
    return node if container or len(leaves) != 1 else leaves[0]
