"""The sharded example runs as a user runs it, on one host and on two."""

import os
import pathlib
import re
import subprocess
import sys

import pytest

PROGRAM = pathlib.Path(__file__).parents[1] / "examples" / "fsdp.py"


def run(out, *arguments):
    """What the program prints, and its rows: step -> loss, norm, clipped_norm, limit, ..."""
    command = [sys.executable, "-W", "error", PROGRAM, "--out", out, *map(str, arguments)]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=300,
        env={**os.environ, "XLA_FLAGS": ""},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    lines = re.findall(r"^ *\d+(?: +[\d.e+-]+){6}$", done.stdout, re.MULTILINE)
    rows = [tuple(map(float, line.split())) for line in lines]
    return done.stdout, rows


def check(rows, steps):
    """The loss falls, nothing above the limit comes out, and the second run repeats the first."""
    assert [row[0] for row in rows] == [*range(steps), *range(steps // 2, steps)]
    losses = [row[1] for row in rows[:steps]]
    assert losses[-1] < 0.8 * losses[0]
    for _, _, norm, clipped_norm, limit, clipped, _ in rows:
        assert clipped == (norm > limit)
        # Six digits are printed.
        assert clipped_norm == pytest.approx(min(norm, limit), rel=1e-5, abs=0)
    assert [row[6] for row in rows[:steps]] == pytest.approx(
        [sum(row[5] for row in rows[: i + 1]) for i in range(steps)]
    )
    assert rows[steps - 1][6] > 0
    assert rows[steps:] == rows[steps // 2 : steps]


def test_a_restored_run_goes_on_with_the_same_numbers(tmp_path):
    """Sharded, clipped by what it learned, saved, restored: the second run equals the first one."""
    out, rows = run(tmp_path, "--steps", 8)

    check(rows, 8)
    assert "8 devices of 1 processes, mesh (1, 8)" in out
    assert "the second run had the same numbers, bit for bit" in out
    sizes = re.search(r"the state has ([\d,]+) bytes; each device holds ([\d,]+)", out)
    whole, held = (int(size.replace(",", "")) for size in sizes.groups())
    assert held < whole / 7


@pytest.mark.proof
def test_another_mesh_goes_on_with_the_same_losses(tmp_path):
    """A checkpoint of one mesh is restored onto another one; what differs is rounding."""
    out, _ = run(tmp_path, "--steps", 8, "--clipper", "adagc=1.1", "--restore-mesh", "2x4")

    assert "restored on mesh (2, 4)" in out
    (apart,) = re.findall(r"the same losses, but for (\S+) of them", out)
    # Sums over shards are rounded differently, by a few 2^-24, and four steps add that up.
    assert float(apart) < 1e-5


@pytest.mark.proof
def test_two_processes_are_as_one(tmp_path):
    """The program starts itself twice, and both halves together do what one process did."""
    _, alone = run(tmp_path, "--steps", 4)
    out, rows = run(tmp_path, "--steps", 4, "--processes", 2)

    check(rows, 4)
    assert "8 devices of 2 processes, mesh (1, 8)" in out
    assert "the second run had the same numbers, bit for bit" in out
    for one, two in zip(alone, rows, strict=True):
        # Gloo adds up in another order.
        assert two == pytest.approx(one, rel=1e-4, abs=0)


@pytest.mark.proof
def test_a_host_that_fails_ends_the_job(tmp_path):
    """Where the processes fail, the program ends with their error, and does not wait for ever."""
    command = [sys.executable, PROGRAM, "--processes", "2", "--clipper", "magic", "--out", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)

    assert done.returncode != 0
    assert "has no attribute 'magic'" in done.stderr
