"""Measure x threshold x scale on one page of plain JAX, and how near it comes to optaxclip.

The page below is for reading: what optaxclip does as long as nothing is unusual. The rest of the
file compares the two on random trees, and prints the largest difference.

    python examples/one_page.py

What to see: a clipper is three parts that know nothing of each other, and the page and the package
differ by roundings of float32, 4e-7 of the largest entry of a leaf at most.

What not to conclude: that the rest of the package is not needed. The page leaves out

* range: the square of 1e20 overflows here, that of 300 in float16, too, and that of 1e-25 is 0;
* low precision: the norm of a bfloat16 leaf is rounded to bfloat16, and updates may change dtype;
* what is not finite: a NaN passes unclipped, and a memory that has seen one has no limit any more;
* leaves that are integer or bool, and trees without any leaf;
* meshes: inside `jax.shard_map` a norm would be that of one device's part;
* metrics, schedules, masks, units and entries, checks of arguments, and what makes it fast.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

import optaxclip

# ---------------------------------------------------------------------------------- the page

Tree = Any  # of gradients or parameters; or of their shape, with a () array per leaf:
Norms = Limits = Memory = Any
Measure = Callable[[Tree, Tree], Norms]  # grads, params -> norms
Threshold = tuple[Callable[[Norms], Memory], Callable[[Norms, Memory], tuple[Limits, Memory]]]
Scale = Callable[[jax.Array, jax.Array], jax.Array]  # norm, limit -> factor


def leaf_norm(grads: Tree, params: Tree) -> Norms:
    """A measure: each leaf has its own norm."""
    return jax.tree.map(jnp.linalg.norm, jax.tree.map(jnp.ravel, grads))


def global_norm(grads: Tree, params: Tree) -> Norms:
    """A measure: all leaves have the norm of the whole tree."""
    norm = jnp.linalg.norm(jnp.stack(jax.tree.leaves(leaf_norm(grads, params))))
    return jax.tree.map(lambda _: norm, grads)


def relative(measure: Measure, eps: float) -> Measure:
    """A measure of a measure: norms over those of the parameters."""

    def norms(grads: Tree, params: Tree) -> Norms:
        return jax.tree.map(
            lambda norm, size: norm / jnp.maximum(size, eps),
            measure(grads, params),
            measure(params, params),
        )

    return norms


def constant(limit: float) -> Threshold:
    """A threshold without memory."""
    return lambda norms: (), lambda norms, _: (jax.tree.map(lambda _: limit, norms), ())


def growth(ratio: float) -> Threshold:
    """A threshold that remembers what the last norms became, and lets them grow by a ratio."""

    def update(norms: Norms, last: Norms) -> tuple[Limits, Norms]:
        limits = jax.tree.map(lambda norm: ratio * norm, last)
        return limits, jax.tree.map(jnp.minimum, norms, limits)

    return lambda norms: jax.tree.map(lambda _: jnp.inf, norms), update


def rescale(norm: jax.Array, limit: jax.Array) -> jax.Array:
    """A scale that shrinks to the limit."""
    return jnp.where(norm > limit, limit / norm, 1.0)


def skip(norm: jax.Array, limit: jax.Array) -> jax.Array:
    """A scale that drops what is above the limit."""
    return jnp.where(norm > limit, 0.0, 1.0)


def clip(measure: Measure, threshold: Threshold, scale: Scale) -> optax.GradientTransformation:
    """The three of them together, as a transformation whose state is the memory."""
    init, learn = threshold

    def update(grads: Tree, memory: Memory, params: Tree = None) -> tuple[Tree, Memory]:
        norms = measure(grads, params)
        limits, memory = learn(norms, memory)
        factors = jax.tree.map(scale, norms, limits)
        return jax.tree.map(jnp.multiply, grads, factors), memory

    return optax.GradientTransformation(lambda params: init(measure(params, params)), update)


# ----------------------------------------------------------------------------- the comparison

ours, t = optaxclip.measure, optaxclip.threshold

# By what it is, the page's clipper and the package's.
PAIRS = {
    "clip_by_global_norm(1)": (
        clip(global_norm, constant(1.0), rescale),
        optaxclip.clip_by_global_norm(1.0),
    ),
    "clip_by_norm(1)": (clip(leaf_norm, constant(1.0), rescale), optaxclip.clip_by_norm(1.0)),
    "leaves relative to weights": (
        clip(relative(leaf_norm, 2.0), constant(0.5), rescale),
        optaxclip.clip(ours.relative(ours.leaf_norm(), 2.0), t.constant(0.5)),
    ),
    "clip_by_norm_growth(1.01)": (
        clip(leaf_norm, growth(1.01), rescale),
        optaxclip.clip(ours.leaf_norm(), t.growth(1.01)),
    ),
    "steps above 3 skipped": (
        clip(global_norm, constant(3.0), skip),
        optaxclip.clip(ours.global_norm(), t.constant(3.0), optaxclip.scale.skip),
    ),
}


def random_tree(rng: np.random.Generator, size: float) -> dict[str, Any]:
    """A scalar, a vector, a matrix and a filter, with entries of about this size."""
    shapes = {"scale": (), "bias": (7,), "kernel": (5, 7), "filter": (3, 3, 2, 4)}
    return {
        key: jnp.asarray(size * rng.normal(size=shape), jnp.float32)
        for key, shape in shapes.items()
    }


def compare(
    page: optax.GradientTransformation, package: optax.GradientTransformation, steps: int
) -> tuple[float, int]:
    """The largest difference relative to the largest entry of a leaf, and the steps clipped."""
    rng = np.random.default_rng(0)
    params = random_tree(rng, 1.0)
    states, clipped, largest = [page.init(params), package.init(params)], 0, 0.0
    for _ in range(steps):
        grads = random_tree(rng, 10 ** rng.uniform(-2, 1))
        theirs, states[0] = page.update(grads, states[0], params)
        updates, states[1] = package.update(grads, states[1], params)
        for one, other in zip(jax.tree.leaves(theirs), jax.tree.leaves(updates), strict=True):
            # 1e-30 is for updates that are all 0.
            scale = np.maximum(np.abs(other).max(), 1e-30)
            largest = max(largest, float(np.abs(one - other).max() / scale))
        clipped += int(optaxclip.metrics(states[1])["clipped"] > 0)
    return largest, clipped


def main() -> None:
    """Compares, shows."""
    argparse.ArgumentParser(description=__doc__.partition("\n")[0]).parse_args()
    console, steps = Console(), 200
    out = Table("clipper", box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
    out.add_column("largest difference", justify="right")
    out.add_column(f"clipped of {steps} steps", justify="right")
    for name, (page, package) in PAIRS.items():
        largest, clipped = compare(page, package, steps)
        out.add_row(name, f"{largest:.1e}", str(clipped))
    console.print(out)
    console.print("relative to the largest entry of the leaf; the float32 epsilon is 1.2e-07")


if __name__ == "__main__":
    main()
