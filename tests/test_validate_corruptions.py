"""Which corrupted states are found: single flipped bits, and whatever a bad restore makes."""

from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from lived import LEARNS, replaced, run

from optaxclip import validate_state
from optaxclip._numbers import TOO_LARGE


def as_norm(x):
    """What a norm that was learned, or an average of such, can be."""
    return np.all((x >= 0) & (x <= 2 * TOO_LARGE))


def possible_metrics(*fields):
    """What metrics can be: NaN where a step was bad."""
    norm, clipped_norm, limit, factor, clipped, steps, clipped_steps, bad = fields
    wild = not np.isfinite(norm)
    sizes = [x >= 0 or (wild and np.isnan(x)) for x in (norm, clipped_norm, factor)]
    counts = 0 <= clipped_steps <= steps and 0 <= bad <= steps
    return all(sizes) and factor != np.inf and limit >= 0 and 0 <= clipped <= 1 + 2**-10 and counts


# Whether fields can be so, in NumPy.
POSSIBLE = {
    "Metrics": possible_metrics,
    "Clock": lambda step: step >= 0,
    "EmaRatioMemory": lambda mean, n: as_norm(mean) and np.all((n > 0) | (n == 0) & (mean == 0)),
    "GrowthMemory": as_norm,
    "MomentRatioMemory": lambda mean, root, n: (
        as_norm(mean) and as_norm(root) and np.all((n > 0) | (n == 0) & (mean == 0) & (root == 0))
    ),
    "QuantileMemory": lambda x, n: (
        np.all(np.isfinite(x) & (x >= 0)) and np.all((n > 0) | (n == 0) & (x == 0))
    ),
    "RelearningMemory": lambda _, __, n: np.all(n >= 0),
    "SecondMomentMemory": lambda root, n: (
        as_norm(root) and np.all((n > 0) | (n == 0) & (root == 0))
    ),
    "StableAdamState": lambda mu, nu, n, _: (
        all(np.isfinite(x).all() for x in [*mu.values(), *nu.values()])
        and all(np.all(x >= 0) for x in [n, *nu.values()])
    ),
    "Window": lambda x, n: (
        np.all((x >= 0) & (x <= TOO_LARGE) & (n >= 0) & (n <= len(x)))
        and np.array_equal(np.arange(len(x)).reshape(-1, *(1,) * n.ndim) < n, x > 0)
    ),
    "ZScoreMemory": lambda first, mean, deviation: (
        as_norm(mean)
        and as_norm(deviation)
        and np.all((first.seen > 0) | (mean == 0) & (deviation == 0))
    ),
}


def possible(node):
    """Whether all fields of all NamedTuples in a state can be so."""
    if not isinstance(node, tuple | list | dict):
        return True
    fields = node.values() if isinstance(node, dict) else node
    return bool(POSSIBLE.get(type(node).__name__, lambda *_: True)(*fields)) and all(
        map(possible, fields)
    )


def read(x):
    """As the device compares it: XLA:CPU takes subnormal numbers for 0."""
    x = np.asarray(x)
    return np.where(np.abs(x) < np.finfo(np.float32).tiny, 0, x) if x.dtype == np.float32 else x


def is_signed(state, i):
    """Whether a leaf may hold negative numbers: the first moments of Adam do."""
    return "mu" in jax.tree_util.keystr(jax.tree.leaves_with_path(state)[i][0])


# Of single flipped bits, how many are found, as the docstring of `validate_state` has it.
SHARES = {"sign": 0.91, "exponent": 0.09, "mantissa": 0.06, "integer": 0.48}


def flipped(rng, x, kind):
    """The array with one bit of one entry flipped."""
    y = np.asarray(x).copy()
    bit = {"sign": 31, "exponent": rng.integers(23, 31), "mantissa": rng.integers(23)}.get(
        kind, rng.integers(32)
    )
    y.reshape(-1).view(np.uint32)[rng.integers(y.size)] ^= np.uint32(1) << np.uint32(bit)
    return jnp.asarray(y)


def test_flipped_bits():
    """A flipped bit is found if and only if what it leaves is impossible."""
    rng = np.random.default_rng(0)
    found, tried = Counter(), Counter()
    for trial in range(1000):
        kind = list(SHARES)[trial % 4]
        name = LEARNS[rng.integers(len(LEARNS))]
        clip = run().states[-1][name][0]
        leaves = jax.tree.leaves(clip)
        dtype = jnp.int32 if kind == "integer" else jnp.float32
        i = rng.choice([i for i, x in enumerate(leaves) if x.dtype == dtype])
        state = replaced(clip, i, flipped(rng, leaves[i], kind))

        detected = validate_state(state) != []
        changed = jax.tree.leaves(state)[i] != leaves[i]  # 0 has two signs
        hurts = changed.any() and not is_signed(clip, i)

        assert detected == (not possible(jax.tree.map(read, state)))
        tried[kind] += 1
        found[kind] += detected
        assert detected or kind != "sign" or not hurts
    for kind, share in SHARES.items():
        # Two deviations of a share of 250.
        assert found[kind] / tried[kind] == pytest.approx(share, abs=0.06)


def dropped_entry(x):
    """One entry less, or one axis more."""
    return x[..., :-1] if x.ndim else x[None]


# What makes of a leaf what no state has.
CORRUPT = {
    "NaN": lambda rng, x: jnp.asarray(
        np.where(np.arange(x.size).reshape(x.shape) == rng.integers(x.size), np.float32(np.nan), x)
    ),
    "negative count": lambda rng, x: jnp.full_like(x, -rng.integers(1, 2**31)),
    "shape": lambda rng, x: dropped_entry(x),
    "narrow": lambda rng, x: x.astype(jnp.bfloat16),
    "wide": lambda rng, x: np.asarray(x, np.float64),
    "other kind": lambda rng, x: x.astype(jnp.int32 if x.dtype == jnp.float32 else jnp.float32),
    "weak": lambda rng, x: jnp.full(x.shape, x.reshape(-1)[0].item()),
    "missing": lambda rng, x: None,
    "string": lambda rng, x: "?",
}


def kinds(node):
    """The classes of NamedTuples in a state."""
    if not isinstance(node, tuple | list | dict):
        return []
    inside = [
        kind for x in (node.values() if isinstance(node, dict) else node) for kind in kinds(x)
    ]
    return [type(node), *inside] if hasattr(node, "_fields") else inside


def without_class(rng, clip):
    """The state with dicts in place of one class of NamedTuples."""
    kind = kinds(clip)[rng.integers(len(kinds(clip)))]
    is_one = lambda x: type(x) is kind
    return jax.tree.map(lambda x: x._asdict() if is_one(x) else x, clip, is_leaf=is_one)


def corrupted(rng, clip, kind):
    """The state with one thing wrong."""
    if kind == "dict":
        return without_class(rng, clip)
    nodes = [(jax.tree_util.keystr(path), x) for path, x in jax.tree.leaves_with_path(clip)]
    # After a bad step, the norm that is shown is NaN.
    fits = {
        "NaN": lambda path, x: x.dtype == jnp.float32 and "metrics.norm" not in path,
        "negative count": lambda path, x: x.dtype == jnp.int32,
    }.get(kind, lambda *_: True)
    i = rng.choice([i for i, node in enumerate(nodes) if fits(*node)])
    return replaced(clip, i, CORRUPT[kind](rng, nodes[i][1]))


def test_random_corruptions():
    """All of 1000 are found with `like`; without it, all but shapes and containers that may be."""
    rng = np.random.default_rng(1)
    missed = Counter()
    for trial in range(1000):
        kind = [*CORRUPT, "dict"][trial % (len(CORRUPT) + 1)]
        name = LEARNS[rng.integers(len(LEARNS))]
        state = corrupted(rng, run().states[-1][name][0], kind)

        assert validate_state(state, like=run().init[name][0]) != []

        missed[kind] += validate_state(state) == []
    assert {kind for kind in missed if missed[kind]} <= {"shape", "dict"}
    # A memory of one array can have any shape; what is no NamedTuple may be a threshold's own.
    assert missed["shape"] < 0.1 * 100
    assert missed["dict"] < 0.8 * 100
