"""`make test` and `make proof` share the cells of tests: see conftest.py."""

import functools
import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


@functools.cache
def cells(share, marks):
    """Which cells of the tests of thresholds are collected."""
    command = [sys.executable, "-m", "pytest", "-q", "--collect-only", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, "-m", marks, "test_threshold.py", "test_check.py"],
        cwd=HERE,
        env=os.environ | {"OPTAXCLIP_SHARE": str(share)},
        capture_output=True,
        text=True,
        check=True,
    )
    return [line for line in done.stdout.splitlines() if "::" in line]


def test_together_they_run_every_cell_once():
    every, short, rest = cells(1, ""), cells(4, "not proof and not rest"), cells(4, "proof or rest")

    assert sorted(short + rest) == sorted(every)
    assert len(short) < len(rest)
    name = lambda cell: cell.partition("[")[0]
    assert {*map(name, short)} == {*map(name, every)}  # at least one of each


def test_the_newest_python_has_other_cells():
    first, last = cells(4, "not proof and not rest"), cells(-4, "not proof and not rest")

    is_cell = lambda line: "[" in line and "test_threshold" in line
    assert len(first) == len(last)
    # A test of one cell has no other.
    assert len({*filter(is_cell, first)} & {*filter(is_cell, last)}) < len(first) / 10


def test_a_table_that_is_marked_is_whole():
    only = lambda found: [line for line in found if "test_check" in line]
    assert only(cells(4, "not proof and not rest")) == only(cells(1, ""))
