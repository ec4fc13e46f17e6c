"""Every example and benchmark runs as a user runs it, in a short mode."""

import csv
import importlib
import inspect
import itertools
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

import optaxclip

ROOT = pathlib.Path(__file__).parent.parent


def run(name, *arguments, **environment):
    """What a program prints."""
    command = [sys.executable, "-W", "error", ROOT / name, *map(str, arguments)]
    env = {**os.environ, **environment}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=env)


def test_char_lm(tmp_path):
    """The main job prints a row per clipper, and writes its picture and every step's metrics."""
    names, steps = ("norm=0.01", "adagc"), 8
    done = run(
        "examples/char_lm.py", "--steps", steps, "--seeds", "3,5",
        "--clippers", ",".join(names), "--out", tmp_path, JAX_LOG_COMPILES="1",
    )  # fmt: skip

    assert done.returncode == 0, done.stderr
    # One compilation for both seeds.
    assert done.stderr.count("Compiling jit(train_block)") == len(names)
    assert "sha256" in done.stdout
    assert (tmp_path / "char_lm.png").read_bytes().startswith(b"\x89PNG")

    with (tmp_path / "metrics.csv").open() as file:
        lines = list(csv.DictReader(file))
    keys = [(line["clipper"], line["seed"], int(line["step"])) for line in lines]
    assert keys == list(itertools.product(names, ("3", "5"), range(1, steps + 1)))
    assert all(float(line["loss_bits"]) > 0 for line in lines)
    fixed, adaptive = lines[: 2 * steps], lines[2 * steps :]
    begins = [[run[i]["loss_bits"] for i in (0, steps)] for run in (fixed, adaptive)]
    assert begins[0] == begins[1]  # each clipper starts from the same parameters,
    assert begins[0][0] != begins[0][1]  # and each seed from others
    assert any(float(line["clipped"]) > 0 for line in fixed)
    assert all(float(line["clipped_norm"]) <= 0.01 * (1 + 1e-6) for line in fixed)
    # Of AdaGC's two clips, the one by leaves, behind the one to a global norm of 1: no limit yet.
    assert all(line["limit"] == "inf" for line in adaptive)
    assert all(float(line["norm"]) <= 1 + 1e-6 for line in adaptive)

    rows = [line.split() for line in done.stdout.splitlines() if line.startswith(names)]
    assert [row[1] for row in rows] == ["fixed", "adaptive"]
    for row, history in zip(rows, (fixed, adaptive), strict=True):
        *_, mean, span, clipped, norm, _ = row
        low, high = (float(bits) for bits in span.strip("()").split("-"))
        # All three are rounded to two digits behind the point.
        assert float(mean) == pytest.approx((low + high) / 2, abs=0.01 + 1e-9)
        assert low < high
        ends = [int(history[i]["clipped_steps"]) for i in (steps - 1, -1)]
        assert float(clipped) == sum(ends) / 2
        # To two digits, by at most half of the second one.
        largest = max(float(line["norm"]) for line in history)
        assert float(norm) == pytest.approx(largest, rel=0.05, abs=0)


def test_char_lm_names_its_clippers():
    """An unknown clipper is a sentence with the choices, not a traceback."""
    done = run("examples/char_lm.py", "--clippers", "none,magic")

    assert done.returncode == 2
    assert "no clipper 'magic'; choose from none, value, norm, global_norm" in done.stderr
    assert "Traceback" not in done.stderr


def test_char_lm_knows_every_clipper(monkeypatch):
    """What the package has to clip with, but for the normalisers, has a name in the main job."""
    monkeypatch.syspath_prepend(ROOT / "examples")
    named = {
        getattr(clipper.make, "func", clipper.make)
        for clipper in importlib.import_module("char_lm").CLIPPERS.values()
    }
    public = {x for x in vars(optaxclip.variants).values() if inspect.isfunction(x)}
    clippers = {x for x in public if not x.__module__.endswith("normalizers")}

    assert optaxclip.zclip in clippers
    assert clippers <= named


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


def test_spiky_lm(tmp_path):
    """A NaN ends the unclipped run alone, and a limit below every norm changes every step."""
    options = ("--steps", 8, "--seeds", 1, "--rate", 1, "--out", tmp_path)
    done = run("examples/spiky_lm.py", *options, "--clippers", "none,global_norm=1e-6")

    assert done.returncode == 0, done.stderr
    rows = {line.split()[0]: line.split() for line in done.stdout.splitlines() if line.strip()}
    # Of garbage, of x 1000 and of good batches, of which there are none.
    assert rows["none"][1:] == ["1", "of", "1", "diverged", "0", "0", "-"]
    assert rows["global_norm=1e-6"][-3:] == ["100", "100", "-"]
    assert (tmp_path / "spiky_lm.png").read_bytes().startswith(b"\x89PNG")


def test_norm_free_vision(tmp_path):
    """A limit of 0 leaves the net as it was at any learning rate, and one of inf lets it learn."""
    options = ("--steps", 20, "--seeds", 1, "--lrs", 0.1, 1e3, "--out", tmp_path)
    clippers = "global_norm=0,global_norm=inf"
    done = run("examples/norm_free_vision.py", *options, "--clippers", clippers)

    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines() if line.startswith("global_norm")]
    errors = {row[0]: [float(cell) for cell in row[1:3]] for row in rows}
    assert errors["global_norm=0"][0] == errors["global_norm=0"][1] > 60
    assert errors["global_norm=inf"][0] < 30
    assert errors["global_norm=inf"][1] > 60
    assert (tmp_path / "norm_free_vision.png").read_bytes().startswith(b"\x89PNG")


def test_every_program_is_run_here():
    """A program that is added to examples needs a test in this file."""
    programs = {path.name for path in (ROOT / "examples").glob("[!_]*.py")}

    assert programs == {
        "char_lm.py",
        "cliff.py",  # this one and three more in test_experiments.py
        "exploding_rnn.py",
        "fsdp.py",  # in test_fsdp.py
        "log_metrics.py",  # in test_logging.py
        "rnn_cotangents.py",  # in test_rnn_cotangents.py
        "norm_free_vision.py",
        "one_page.py",
        "spiky_lm.py",
        "thresholds.py",
        "write_a_threshold.py",
    }
