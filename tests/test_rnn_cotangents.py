"""The recurrent net whose backward pass explodes: the program, and its numbers against NumPy."""

import argparse
import importlib
import math
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest

EXAMPLES = pathlib.Path(__file__).parent.parent / "examples"


@pytest.fixture(name="example")
def fixture_example(monkeypatch):
    """The program as a module."""
    monkeypatch.syspath_prepend(EXAMPLES)
    return importlib.import_module("rnn_cotangents")


def test_it_runs(tmp_path):
    """It prints a row per way to train, with the bound where there is one, and writes a picture."""
    options = ["--steps", "12", "--seeds", "2", "--out", tmp_path]
    command = [sys.executable, "-W", "error", EXAMPLES / "rnn_cotangents.py", *map(str, options)]
    # The devices are those of a user.
    env = {**os.environ, "XLA_FLAGS": "", "JAX_LOG_COMPILES": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)

    assert done.returncode == 0, done.stderr
    assert done.stderr.count("Compiling jit(train_block)") == 1  # for all limits
    rows = [line.split("  ") for line in done.stdout.splitlines()]
    rows = {
        row[0].strip(): [x.strip() for x in row[1:] if x.strip()] for row in rows if len(row) > 3
    }
    nothing, norm, cotangents, both = (
        rows[name] for name in ("nothing", "global norm", "cotangents", "both")
    )
    # In the first step, the global norm changes nothing of what is measured before it.
    assert nothing[:2] == norm[:2]
    assert cotangents[:2] == both[:2]
    assert float(nothing[0]) > 1e3
    assert float(cotangents[0]) <= 0.1 * 1.7 + 0.01  # of a step, and of the output at it
    losses = [float(row[2].split()[0]) for row in (nothing, norm, cotangents, both)]
    assert losses[2] < min(losses[0], losses[1])
    assert (tmp_path / "rnn_cotangents.png").read_bytes().startswith(b"\x89PNG")


def numpy_norms(kernels, x, means, limit):
    """The norm of dL/dh_t before clipping, step by step back through time, in float64."""
    W, U, v = kernels
    states = [np.zeros((x.shape[1], len(W)))]
    for row in x:
        states.append(np.tanh(states[-1] @ W + row @ U))
    errors = np.stack(states[1:]) @ v[:, 0] - means
    back, norms = np.zeros_like(states[0]), []
    for h, error in zip(states[:0:-1], errors[::-1], strict=True):
        back = back + 2 / means.size * error[:, None] * v[:, 0]
        norms.append(np.linalg.norm(back))
        back = back * min(1, limit / norms[-1])
        back = (back * (1 - h**2)) @ W.T
    return norms[::-1]


@pytest.mark.parametrize("way", ["nothing", "cotangents"])
def test_its_norms_are_those_of_numpy(example, way):
    """In the first backward pass, all 200 norms are those of float64."""
    # At a radius of 1.7 states are chaotic, and those of float32 soon others than those of float64.
    args = argparse.Namespace(
        radius=1.0, lr=0.01, max_norm=0.003, global_norm=1.0, seeds=1, steps=1
    )
    found = example.train(example.WAYS[way], args, lambda **_: None)["cotangents"][0, 0]

    keys = jax.random.split(jax.random.key(0), 2)
    params, _ = example.begin(example.Net(1.0), 0.01, keys[0])
    flat = {jax.tree_util.keystr(path): x for path, x in jax.tree.leaves_with_path(params)}
    kernel = lambda name: np.asarray(next(x for key, x in flat.items() if name in key), np.float64)
    kernels = [kernel(name) for name in ("recurrent", "'input'", "'Dense_0'")]
    x, means = (np.asarray(a, np.float64) for a in example.batch(keys[1]))
    limit = 0.003 if way == "cotangents" else math.inf
    expected = np.array(numpy_norms(kernels, x, means, limit))

    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert (expected > 0.003).sum() > 100  # where there is a limit, it acts
