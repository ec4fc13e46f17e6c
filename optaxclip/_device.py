"""where a program runs -> how it is written: a question of speed alone, never of right or wrong.

It is asked while JAX traces, of the backend that JAX runs on by default: a program traced here and
run elsewhere is right there, and slower.
"""

from __future__ import annotations

import math

import jax

from ._numbers import is_known

ROW = 256  # entries, so that a kernel that adds up rows is busy
FREE = 2**13  # entries of a leaf which a CPU adds up in float64 as fast as in float32


def on_gpu() -> bool:
    """Whether a branch waits for the host, and every kernel takes microseconds to start."""
    return jax.default_backend() == "gpu"


def float64_is_free(leaves: list[jax.Array]) -> bool:
    """Whether squares are as fast added up in float64 as in float32.

    An H100 reads more slowly than it does either. A CPU takes 1.29 ms in place of 1.25 for 1200
    leaves of a million entries together, and 2.3 in place of 1.5 for large ones of 10 M.
    """
    small = all(is_known(leaf.size) and leaf.size <= FREE for leaf in leaves)
    return on_gpu() or (jax.default_backend() == "cpu" and small)


def row_axes(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The last axes of an array, as many as make a row worth reducing by itself.

    A GPU reduces rows in one kernel, and everything to one number in two: of many leaves, rows come
    first, and then those of all leaves together.
    """
    first = len(shape)
    while first and math.prod(shape[first:]) < ROW:
        first -= 1
    return tuple(range(first, len(shape)))
