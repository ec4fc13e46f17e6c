"""where a program runs -> how it is written: a question of speed alone, never of right or wrong.

It is asked while JAX traces, of the backend that JAX runs on by default: a program traced here and
run elsewhere is right there, and slower.
"""

from __future__ import annotations

import math

import jax

ROW = 256  # entries, so that a kernel that adds up rows is busy


def on_gpu() -> bool:
    """Whether a branch waits for the host, and every kernel takes microseconds to start."""
    return jax.default_backend() == "gpu"


def row_axes(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The last axes of an array, as many as make a row worth reducing by itself.

    A GPU reduces rows in one kernel, and everything to one number in two: of many leaves, rows come
    first, and then those of all leaves together.
    """
    first = len(shape)
    while first and math.prod(shape[first:]) < ROW:
        first -= 1
    return tuple(range(first, len(shape)))
