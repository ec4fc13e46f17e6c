"""Every example and benchmark runs as a user runs it, in a short mode."""

import csv
import pathlib
import subprocess
import sys

import numpy as np

ROOT = pathlib.Path(__file__).parent.parent


def run(name, *arguments):
    """What a program prints."""
    command = [sys.executable, "-W", "error", ROOT / name, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_char_lm(tmp_path):
    """The main job prints its table and writes its picture and the metrics of every step."""
    done = run(
        "examples/char_lm.py", "--steps", 12, "--clippers", "none,norm=0.01", "--out", tmp_path
    )

    assert done.returncode == 0, done.stderr
    for word in ("sha256", "bits/char", "none", "norm=0.01", "clipped"):
        assert word in done.stdout
    assert (tmp_path / "char_lm.png").read_bytes().startswith(b"\x89PNG")
    with (tmp_path / "metrics.csv").open() as file:
        lines = list(csv.DictReader(file))
    steps = [(name, str(i)) for name in ("none", "norm=0.01") for i in range(1, 13)]
    assert [(line["clipper"], line["step"]) for line in lines] == steps
    assert all(float(line["loss_bits"]) > 0 for line in lines)
    free, clipped = lines[:12], lines[12:]
    assert all(line["factor"] == "1.0" and line["limit"] == "inf" for line in free)
    assert any(float(line["clipped"]) > 0 for line in clipped)
    assert all(float(line["clipped_norm"]) <= 0.01 * (1 + 1e-6) for line in clipped)


def test_char_lm_names_its_clippers():
    """An unknown clipper is a sentence with the choices, not a traceback."""
    done = run("examples/char_lm.py", "--clippers", "none,magic")

    assert done.returncode == 2
    assert "no clipper 'magic'; choose from none, value, norm, global_norm" in done.stderr
    assert "Traceback" not in done.stderr


def test_thresholds(tmp_path):
    """The picture of the limits is written, and the fixed one's row is what NumPy says it is."""
    done = run("examples/thresholds.py", "--seed", 3, "--out", tmp_path)

    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines()[3:-1]]
    norms = np.random.default_rng(3).lognormal(0, 0.1, 1300)
    quiet = 100 * np.mean(norms[200:600] > 1)
    factors = [f"{0.1 / norms[step]:.3f}" for step in (600, 700, 704)]  # 1 over ten times it
    assert rows[0] == ["clip_by_global_norm", f"{quiet:.1f}", "%", *factors, ">375", "0"]
    assert len(rows) == 11
    assert all(row[-1] == "0" for row in rows)  # the NaN changes nothing after it
    assert (tmp_path / "thresholds.png").read_bytes().startswith(b"\x89PNG")


def test_overhead():
    """The benchmark prints a line for the bare step and for each candidate."""
    done = run("benchmarks/overhead.py", "--leaves", 2, "--size", 100, "--rounds", 1)

    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[2].split()[0] == "bare"
    assert {line.split()[0] for line in lines[3:]} == {"optaxclip:", "optax:"}


def test_every_program_is_run_here():
    """A program that is added to examples or benchmarks needs a test in this file."""
    programs = {
        f"{folder}/{path.name}"
        for folder in ("examples", "benchmarks")
        for path in (ROOT / folder).glob("[!_]*.py")
    }

    assert programs == {
        "examples/char_lm.py",
        "examples/thresholds.py",
        "benchmarks/overhead.py",
    }
