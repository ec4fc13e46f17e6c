"""Gradient trees drawn at random: few structures, because XLA compiles each, with any values.

All that is drawn is a few whole numbers, a `Case`, which Hypothesis shrinks towards 0.
"""

from typing import NamedTuple

import hypothesis.strategies as st
import jax.numpy as jnp
import numpy as np
import trees
from oracles import tree_norm
from roster import WARM

# By leaf: dtype and shape. "double" needs x64.
STRUCTURES = {
    "vector": {"w": ("float32", (16,))},
    "same": dict.fromkeys("abcd", ("float32", (3, 2))),
    "mixed": {
        "bfloat16": ("bfloat16", (5,)),
        "complex": ("complex64", (3,)),
        "float16": ("float16", (2, 2)),
        "float32": ("float32", (4, 3)),
        "no_entries": ("float32", (0, 3)),
        "scalar": ("float32", ()),
    },
    "half": {"b": ("bfloat16", (4, 3)), "h": ("float16", (6,)), "s": ("bfloat16", ())},
    "ranks": {
        "bias": ("float32", (4,)),
        "conv": ("float32", (2, 2, 3, 4)),
        "dense": ("bfloat16", (3, 4)),
        "stack": ("float32", (2, 3, 4)),
    },
    "complex": {"c": ("complex64", (4,)), "m": ("complex64", (2, 3)), "r": ("float32", (3,))},
    "double": {"d": ("float64", (5,)), "f": ("float32", (2, 2))},
}
# What a tree may hold beside the leaves that are clipped.
OTHERS = {
    "mixed": {
        "bool": np.array([True, False]),
        "empty": {},
        "integer": np.arange(3, dtype=np.int32),
        "none": None,
    },
}

# The leaves of a structure once more, in the opposite order, or without one.
BACKWARDS = {
    name: {leaf: f"{len(leaves) - i}{leaf}" for i, leaf in enumerate(leaves)}
    for name, leaves in STRUCTURES.items()
}

KINDS = ("normal", "equal", "sparse", "spike", "subnormal", "uneven")

# Exponents of 2 from 1e-36 to 1e36, and what float16 has of them.
LOWEST, HIGHEST = -119, 120
FLOAT16 = (-20, 12)
# The largest entries, so that a hundred of them have a norm that float32 can hold.
LARGEST = {"float16": 6e4}
LARGE = 2.0**123


NOTHING, OFF = -9, 4  # exponents of a limit that stand for 0 and inf


class Case(NamedTuple):
    """What a test of a law starts from."""

    seed: int = 0  # of the random entries, and of what each law chooses at random
    exponent: int = 0  # of 2, the size of the gradients
    kind: str = "normal"  # one of KINDS
    jump: int = 0  # exponent of 2, how much larger the step is than those before it
    limit: int = 0  # exponent of 2, limit over norm; 0: the norm itself, OFF: inf, NOTHING: 0
    power: int = 1  # exponent of 2, what a law multiplies by


class Drawn(NamedTuple):
    """The trees of a case: dicts of NumPy arrays, without the leaves that pass through."""

    stream: dict  # WARM steps before it, stacked
    grads: dict
    params: dict
    limit: float  # a float32 number; about as large as the norm
    share: float  # the same, about 1, for norms that are relative to parameters


def cases():
    """Any case."""
    return st.builds(
        Case,
        seed=st.integers(0, 2**16),
        exponent=st.integers(LOWEST, HIGHEST) | st.integers(-8, 8),
        kind=st.sampled_from(KINDS),
        jump=st.integers(-4, 12),
        limit=st.integers(NOTHING, OFF),
        power=st.integers(-8, 8),
    )


def drawn(case, structure):
    """The trees of a case."""
    steps = values(case, structure, WARM + 1)
    grads = {name: x[-1] for name, x in steps.items()}
    params = values(case._replace(jump=0, kind="normal"), structure, 1, salt=1)
    mantissa = 2.0 ** np.random.default_rng(case.seed).random() if case.limit else 1.0
    share = {NOTHING: 0.0, OFF: np.inf}.get(case.limit, mantissa * 2.0**case.limit)
    limit = share * max(tree_norm(trees.float64(grads)), 2.0**-100)
    return Drawn(
        {name: x[:-1] for name, x in steps.items()},
        grads,
        {name: x[0] for name, x in params.items()},
        np.float32(limit if np.isinf(limit) else min(limit, LARGE)),
        np.float32(share),
    )


def values(case, structure, count, *, salt=0):
    """So many trees, stacked."""
    return {
        name: _leaf(case, np.random.default_rng([case.seed, salt, i]), dtype, (count, *shape))
        for i, (name, (dtype, shape)) in enumerate(STRUCTURES[structure].items())
    }


def _leaf(case, rng, dtype, shape):
    is_complex = dtype.startswith("complex")
    x = np.clip(rng.standard_normal((*shape, 1 + is_complex)), -4, 4)
    if case.kind == "equal":
        x = np.sign(x)
    elif case.kind == "sparse":
        x *= rng.random(x.shape) < 0.3
    elif case.kind == "spike" and x.size:
        x[-1].flat[rng.integers(x[-1].size)] *= 2.0**10
    low, high = FLOAT16 if dtype == "float16" else (LOWEST, HIGHEST)
    uneven = case.kind == "uneven"
    exponent = rng.integers(low, high) if uneven else np.clip(case.exponent, low, high)
    x = np.ldexp(x, exponent)
    x[-1:] = np.ldexp(x[-1:], case.jump)
    if case.kind == "subnormal":
        tiny = float(jnp.finfo(dtype).smallest_subnormal)
        x = np.where(rng.random(x.shape) < 1 / 3, tiny * rng.integers(-3, 4, x.shape), x)
    largest = LARGEST.get(dtype, LARGE)
    x = np.clip(x, -largest, largest)
    return (x[..., 0] + 1j * x[..., 1] if is_complex else x[..., 0]).astype(jnp.dtype(dtype))
