"""where a program runs -> how it is written: a question of speed.

It is asked while JAX traces, of the backend that JAX runs on by default. What was traced on a GPU
and exported to run elsewhere has sums in float64: slower on a CPU, and on a TPU, whose float64 has
the range of float32, not right for norms beyond 1e19.
"""

from __future__ import annotations

import math

import jax

ROW = 128  # entries, so that a kernel that adds up rows is busy; XLA takes two for 34,000


def on_gpu() -> bool:
    """Whether a branch waits for the host, and every kernel takes microseconds to start."""
    return jax.default_backend() == "gpu"


def on_cpu() -> bool:
    """Whether copies of small leaves stay in a cache, and every kernel takes long to compile."""
    return jax.default_backend() == "cpu" and not on_gpu()


def axes_first(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The axes over which a reduction of everything goes first: of rows on a GPU, else all."""
    return row_axes(shape) if on_gpu() else tuple(range(len(shape)))


def row_axes(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The last axes of an array, as many as make a row worth reducing by itself.

    A GPU reduces rows in one kernel, and everything to one number in two: of many leaves, rows come
    first, and then those of all leaves together.
    """
    first = len(shape)
    while first and math.prod(shape[first:]) < ROW:
        first -= 1
    return tuple(range(first, len(shape)))
