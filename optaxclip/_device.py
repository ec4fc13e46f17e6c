"""where a program runs -> how it is written: a question of speed.

It is asked while JAX traces, of the backend that JAX runs on by default. What was traced on a GPU
and exported to run elsewhere has sums in float64: slower on a CPU, and on a TPU, whose float64 has
the range of float32, not right for norms beyond 1e19.
"""

from __future__ import annotations

import math

import jax

ROW = 128  # entries, so that a kernel that adds up rows is busy; XLA takes two for 34,000
# Rows that are reduced as one, at most, as a thread reads 16 entries of each before its block joins
# theirs; and how many of these there are then, at least: 15 for each of an H200's multiprocessors.
TALL, MANY = 4, 2**11

# Entries from which on a CPU reduces an array in rows, so that there is work for all cores; of a
# smaller one, it would be a loop more to compile. And how many rows, if its size can be divided.
LARGE, ROWS = 2**17, 64


def on_gpu() -> bool:
    """Whether a branch waits for the host, and every kernel takes microseconds to start."""
    return jax.default_backend() == "gpu"


def on_cpu() -> bool:
    """Whether copies of small leaves stay in a cache, and every kernel takes long to compile."""
    return jax.default_backend() == "cpu" and not on_gpu()


def axes_first(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The axes over which a reduction of everything goes first: of rows on a GPU, else all."""
    return _row_axes(shape) if on_gpu() else tuple(range(len(shape)))


def _row_axes(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The last axes of an array, as many as make a row worth reducing by itself.

    A GPU reduces rows in one kernel, and everything to one number in two: of many leaves, rows come
    first, and then those of all leaves together.
    """
    first = len(shape)
    while first and math.prod(shape[first:]) < ROW:
        first -= 1
    return tuple(range(first, len(shape)))


def rows_for_cores(size: int) -> int:
    """How many rows a CPU reduces apart, of all of an array: one core takes what is one number."""
    return math.gcd(size, ROWS) if size >= LARGE else 1


def in_rows(x: jax.Array) -> tuple[jax.Array, tuple[int, ...]]:
    """The entries of an array in one place, and the axes of what is one row in a reduction of all.

    On a GPU, of many rows, up to `TALL` are one, as XLA has a thread read from each of them.
    """
    if not on_gpu():
        rows = rows_for_cores(x.size)
        return (x, tuple(range(x.ndim))) if rows == 1 else (x.reshape(rows, -1), (1,))
    axes = _row_axes(x.shape)
    rows = math.prod(x.shape[: axes[0]]) if axes else 0
    tall = math.gcd(TALL, *x.shape[:1])
    while tall > 1 and rows < tall * MANY:
        tall //= 2
    if tall == 1:
        return x, axes
    return x.reshape(tall, -1, *x.shape[1:]), (0, *(a + 1 for a in axes))
