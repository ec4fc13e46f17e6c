"""The trees that are clipped: shapes of models as people train them, at any number of parameters.

Each layout is a function of one width, and the width is chosen so that the whole comes nearest to
the number of parameters asked for; the number of leaves stays what it is.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

Shapes = dict[str, tuple[int, ...]]
Tree = dict[str, jax.Array]

WIDEST = 2**17
DRAWN = 2**22  # entries


def gpt2(width: int) -> Shapes:
    """The 148 leaves of GPT-2 small: twelve layers of twelve, two embeddings, a last norm."""
    d = width
    shapes = {"wte": (65 * d, d), "wpe": (max(4 * d // 3, 1), d)}  # 50257, 1024 and 768 there
    for i in range(12):
        shapes |= {
            f"{i}/ln_1/scale": (d,),
            f"{i}/ln_1/bias": (d,),
            f"{i}/attn/kernel": (d, 3 * d),
            f"{i}/attn/bias": (3 * d,),
            f"{i}/attn_out/kernel": (d, d),
            f"{i}/attn_out/bias": (d,),
            f"{i}/ln_2/scale": (d,),
            f"{i}/ln_2/bias": (d,),
            f"{i}/mlp/kernel": (d, 4 * d),
            f"{i}/mlp/bias": (4 * d,),
            f"{i}/mlp_out/kernel": (4 * d, d),
            f"{i}/mlp_out/bias": (d,),
        }
    return shapes | {"ln_f/scale": (d,), "ln_f/bias": (d,)}


def nfnet(width: int) -> Shapes:
    """1200 small leaves: a hundred bottleneck blocks of four convolutions with gain and bias."""
    shapes: Shapes = {}
    for stage, (blocks, factor) in enumerate([(8, 1), (17, 2), (50, 6), (25, 6)]):  # as in NFNets
        outer, inner, group = 2 * factor * width, factor * width, width
        convolutions = [(1, outer, inner), (3, group, inner), (3, group, inner), (1, inner, outer)]
        for block in range(blocks):
            for i, (side, fan_in, fan_out) in enumerate(convolutions):
                place = f"{stage}/{block}/conv_{i}"
                shapes[f"{place}/kernel"] = (side, side, fan_in, fan_out)
                shapes[f"{place}/gain"] = shapes[f"{place}/bias"] = (fan_out,)
    return shapes


def scanned(width: int) -> Shapes:
    """Eight leaves: a transformer whose 24 layers are stacked, as `lax.scan` wants them."""
    d = width
    return {
        "embedding": (32 * d, d),
        "layers/attn_norm": (24, d),
        "layers/attn": (24, d, 3 * d),
        "layers/attn_out": (24, d, d),
        "layers/mlp_norm": (24, d),
        "layers/mlp": (24, d, 4 * d),
        "layers/mlp_out": (24, 4 * d, d),
        "norm": (d,),
    }


TREES: dict[str, Callable[[int], Shapes]] = {"gpt2": gpt2, "nfnet": nfnet, "scanned": scanned}


def count(shapes: Shapes) -> int:
    """The number of parameters."""
    return sum(map(math.prod, shapes.values()))


def shapes_of(tree: str, size: int) -> Shapes:
    """The shapes of a tree of about `size` parameters."""
    layout = TREES[tree]
    above = 1 + bisect.bisect_left(range(1, WIDEST), size, key=lambda w: count(layout(w)))
    widths = range(max(above - 1, 1), above + 1)
    return min(map(layout, widths), key=lambda shapes: abs(count(shapes) - size))


def many(leaves: int, size: int) -> Shapes:
    """So many matrices of a dozen shapes, which have about `size` parameters together."""
    rows = max(size // leaves // 16, 1)
    return {f"{i:04}": (rows + i % 12, 16) for i in range(leaves)}


def draw(shapes: Shapes, dtype: str, scale: float, seed: int, mesh: Mesh | None) -> Tree:
    """Normal numbers times `scale`, on the first device, or split over the axis of a mesh.

    Leaves of more than `DRAWN` entries repeat them, as a billion takes half a minute to draw.
    """
    random = np.random.default_rng(seed)

    def leaf(shape: tuple[int, ...]) -> jax.Array:
        drawn = random.standard_normal(min(math.prod(shape), DRAWN), np.float32)
        numbers = (np.float32(scale) * drawn).astype(jnp.dtype(dtype))
        return jax.device_put(np.resize(numbers, shape), place(shape, mesh))

    return {name: leaf(shape) for name, shape in shapes.items()}


def place(shape: tuple[int, ...], mesh: Mesh | None) -> jax.Device | NamedSharding:
    """Where a leaf goes: its first axis that can be divided among all devices is."""
    if mesh is None:
        return jax.devices()[0]
    split = next((i for i, n in enumerate(shape) if n and n % mesh.size == 0), None)
    spec = [None] * split + list(mesh.axis_names) if split is not None else []
    return NamedSharding(mesh, PartitionSpec(*spec))
