"""Spectral clipping against the singular value decomposition: accuracy and time.

Matrices have singular values in a geometric sequence from 3 c down to 3 c / condition, and are
compared with their clip by NumPy's SVD in float64, at a limit of c = 1. The error is the spectral
norm of the difference over c; "over" is how far the largest singular value exceeds what it should
be, relative to c. Power iteration scales the whole matrix and so has no error of this kind, but
"over", and it is a cold start: the vector of an earlier step brings it nearer.

    python benchmarks/spectral.py
    python benchmarks/spectral.py --size 512 --markdown benchmarks/spectral.md
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))

from optaxclip.spectral import clip_by_spectral_norm  # noqa: E402

WAYS = {
    "hard, newton_schulz": ("hard", "newton_schulz"),
    "hard, svd": ("hard", "svd"),
    "hard, power_iteration": ("hard", "power_iteration"),
    "soft, newton_schulz": ("soft", "newton_schulz"),
    "soft, svd": ("soft", "svd"),
}
CONDITIONS = (1e0, 1e2, 1e4, 1e6)
DTYPES = (jnp.float32, jnp.bfloat16, jnp.float32, jnp.float32)  # of each shape
ROUNDS = 5


def matrix(m: int, n: int, condition: float) -> np.ndarray:
    """Singular values from 3 to 3 / condition, in float64."""
    rng = np.random.default_rng([m, n])
    k = min(m, n)
    u = np.linalg.qr(rng.normal(size=(m, k)))[0]
    v = np.linalg.qr(rng.normal(size=(n, k)))[0]
    return (u * np.geomspace(3, 3 / condition, k)) @ v.T


def exact(x: np.ndarray, kind: str) -> np.ndarray:
    """The clip at 1, in float64."""
    u, sigma, vt = np.linalg.svd(x, full_matrices=False)
    return (u * (np.minimum(sigma, 1) if kind == "hard" else sigma / np.sqrt(1 + sigma**2))) @ vt


def compiled(kind: str, method: str, x: jax.Array) -> Any:
    """The clip of one matrix from a fresh state."""
    tx = clip_by_spectral_norm(1.0, kind=kind, method=method, record=False)
    return jax.jit(lambda x: tx.update(x, tx.init(x))[0]).lower(x).compile()


def seconds(run: Any, x: jax.Array) -> float:
    """The least over rounds, which other work on the machine disturbs least."""
    times = []
    for _ in range(ROUNDS):
        begin = time.perf_counter()
        jax.block_until_ready(run(x))
        times.append(time.perf_counter() - begin)
    return min(times)


def rows(size: int) -> list[list[str]]:
    """One row per way, dtype and shape: errors by condition, and time in units of SVD's."""
    found = []
    shapes = (size, size), (size, size), (4 * size, size), (size, 4 * size)
    for shape, dtype in zip(shapes, DTYPES, strict=True):
        inputs = [jnp.asarray(matrix(*shape, c), dtype) for c in CONDITIONS]
        runs = {way: compiled(*args, inputs[0]) for way, args in WAYS.items()}
        times = {way: seconds(run, inputs[1]) for way, run in runs.items()}
        for way, run in runs.items():
            kind, _ = WAYS[way]
            cells = [_cell(np.float64(run(x)), np.float64(x), way) for x in inputs]
            ratio = times[way] / times[f"{kind}, svd"]
            name = jnp.dtype(dtype).name
            found.append([way, name, f"{shape[0]} x {shape[1]}", *cells, f"{ratio:.2f}"])
    return found


def _cell(y: np.ndarray, x: np.ndarray, way: str) -> str:
    right = exact(x, way[:4])
    top = np.linalg.norm(right, 2)
    over = f"{np.linalg.norm(y, 2) - top:+.0e}"
    return over if "power" in way else f"{np.linalg.norm(y - right, 2):.0e} ({over})"


def main() -> None:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", type=int, default=128, help="the smaller side (%(default)s)")
    parser.add_argument("--markdown", type=Path, help="write the table to this file")
    args = parser.parse_args()
    head = ["clip", "dtype", "shape", *(f"condition {c:.0e}" for c in CONDITIONS), "time / SVD"]
    table, body = Table(title="error (over), in units of c"), rows(args.size)
    for name in head:
        table.add_column(name)
    for row in body:
        table.add_row(*row)
    console = Console()
    console.width = max(console.width, 140)
    console.print(table)
    if args.markdown:
        lines = [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *body)]
        text = f"# Spectral clipping against SVD\n\n{_about()}\n\n{_machine()}\n\n"
        args.markdown.write_text(text + "\n".join(lines) + "\n", encoding="utf-8")


def _machine() -> str:
    device = jax.devices()[0].device_kind
    return (
        f"Device: {device} ({os.cpu_count()} cores, {platform.machine()}); JAX {jax.__version__}. "
        f"Times are of a matrix of condition 1e+02, the best of {ROUNDS} rounds, at a load "
        f"average of {os.getloadavg()[0]:.1f}; below 1, the clip is faster than its SVD."
    )


def _about() -> str:
    return (__doc__ or "").split("\n\n")[1]


if __name__ == "__main__":
    main()
