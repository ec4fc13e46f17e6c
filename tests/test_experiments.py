"""The small experiments: each program as a user runs it, and its numbers against NumPy."""

import functools
import importlib
import math
import os
import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optaxclip

EXAMPLES = pathlib.Path(__file__).parent.parent / "examples"
EPS = 2.0**-23  # of float32


def run(name, *arguments):
    """A program as a user runs it, with what it printed."""
    command = [sys.executable, "-W", "error", EXAMPLES / name, *map(str, arguments)]
    env = {**os.environ, "XLA_FLAGS": ""}  # the devices are those of a user
    return subprocess.run(command, capture_output=True, text=True, check=False, env=env)


def rows(text):
    """The rows of the tables in an output; cells are at least two spaces apart."""
    cells = [line.strip().split("  ") for line in text.splitlines()]
    cells = [[cell.strip() for cell in row if cell.strip()] for row in cells]
    return [row for row in cells if len(row) > 1]


@pytest.fixture(name="load")
def fixture_load(monkeypatch):
    """A program as a module."""
    monkeypatch.syspath_prepend(EXAMPLES)
    return importlib.import_module


@pytest.mark.parametrize(
    ("name", "option"),
    [("cliff.py", "starts"), ("cliff.py", "steps")]
    + [("exploding_rnn.py", option) for option in ("seeds", "steps", "time")],
)
def test_nothing_to_do_is_a_sentence(name, option):
    """None of what there should be some of is a sentence that names the option."""
    done = run(name, f"--{option}", 0)

    assert done.returncode == 2
    assert done.stdout == ""
    assert re.search(rf"error: .*--{option}\b.* must be at least 1$", done.stderr.strip())


@pytest.mark.parametrize("name", ["one_page", "write_a_threshold"])
def test_help(load, name):
    """--help says what the program is, and runs nothing."""
    done = run(f"{name}.py", "--help")

    assert (done.returncode, done.stderr) == (0, "")
    said = " ".join(done.stdout.split())
    assert load(name).__doc__.partition("\n")[0] in said
    assert "─" not in said  # no table


# ------------------------------------------------------------------------------------ cliff.py


def loss_in_numpy(w, b):
    """The loss of the recurrent unit, in float64."""
    sigma, x = lambda x: 1 / (1 + math.exp(-x)), 0.5
    for _ in range(50):
        x = w * sigma(x) + b
    return (sigma(x) - 0.7) ** 2


def test_cliff(tmp_path):
    """The table has a row per learning rate and a share per clipper, and the picture is written."""
    done = run("cliff.py", "--starts", 4, "--steps", 50, "--out", tmp_path)

    assert done.returncode == 0, done.stderr
    table = [row for row in rows(done.stdout) if row[-1].endswith("%")]
    assert [row[0] for row in table] == ["0.03", "0.1", "0.3", "1", "3", "10"]
    assert {share for row in table for share in row[1:]} <= {"0.0 %", "25.0 %", "50.0 %",
                                                             "75.0 %", "100.0 %"}  # fmt: skip
    assert (tmp_path / "cliff.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("point", [(3.5, -1.5), (4.0, -2.5), (5.0, -2.0), (6.0, -4.0)])
def test_cliff_draws_the_loss_it_says(load, point):
    """The loss is that of fifty steps of the unit, away from the edge, where roundings grow."""
    # Each step rounds a few times; away from the edge it forgets more of them than it adds.
    np.testing.assert_allclose(
        load("cliff").loss_of(jnp.array(point)), loss_in_numpy(*point), rtol=0, atol=50 * EPS
    )


def test_cliff_throws_off_what_is_not_clipped(load):
    """From the start that is drawn, one step leaves for good, and clipped ones reach the valley."""
    cliff = load("cliff")
    descend = jax.jit(cliff.descend, static_argnums=(0, 1))
    start = jnp.array([5.257, -3.056])
    none, one = (cliff.CLIPPERS[name] for name in ("no clip", "limit 1"))
    points, losses, norms = map(np.asarray, descend(1000, none, 0.3, start))
    clipped = list(map(np.asarray, descend(1000, one, 0.3, start)))

    # Where the unit is saturated, the loss is (1 - 0.7)^2.
    np.testing.assert_allclose(losses[-1], 0.09, rtol=4 * EPS)
    lengths = np.linalg.norm(np.diff(points, axis=0), axis=1)
    np.testing.assert_allclose(lengths.max(), 0.3 * norms.max(), rtol=1e-5)  # a step is lr x norm
    assert norms.max() > 10
    lengths = np.linalg.norm(np.diff(clipped[0], axis=0), axis=1)
    # Points of about 5 are rounded, and so are their differences.
    assert 0.3 - 10 * EPS < lengths.max() < 0.3 + 10 * EPS
    assert clipped[1][-1] < 1e-4
    assert loss_in_numpy(*map(float, clipped[0][-1])) < 1e-4


# ---------------------------------------------------------------------------- exploding_rnn.py


def test_exploding_rnn(tmp_path):
    """A large learning rate diverges: to inf without a clip, to a finite loss with one."""
    done = run(
        "exploding_rnn.py", "--seeds", 2, "--steps", 40, "--lrs", "0.001,10",
        "--clippers", "none,global_norm", "--out", tmp_path,
    )  # fmt: skip

    assert done.returncode == 0, done.stderr
    table = rows(done.stdout)
    none, clipped = ([row for row in table if row[0] == n] for n in ("none", "global_norm"))
    assert (none[0][1], clipped[0][1]) == ("50 %", "50 %")
    assert (none[1][2], clipped[1][2]) == ("inf", ">99")
    assert (tmp_path / "exploding_rnn.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("clipper", "sentence"),
    [
        ("magic", "no clipper 'magic'; choose from none, value, norm, global_norm"),
        ("none=1", "none takes no number; got 'none=1'"),
        ("global_norm=-1", "max_norm"),
    ],
)
def test_exploding_rnn_names_its_clippers(clipper, sentence):
    """A wrong clipper is a sentence, not a traceback."""
    done = run("exploding_rnn.py", "--clippers", clipper)

    assert done.returncode == 2
    assert sentence in done.stderr
    assert "Traceback" not in done.stderr


@jax.numpy_rank_promotion("allow")  # as Flax needs
def test_exploding_rnn_trains_what_it_says(load):
    """The loss of the first step is that of a tanh network in NumPy that recalls the signs."""
    example = load("exploding_rnn")
    job = example.Job(example.Net(1.5), time=7, steps=example.LAST)
    keys = jax.random.split(jax.random.key(3), 2)
    params = jax.tree.map(lambda x: x[1], example.begin(job.net, job.time, keys))
    losses = example.train(job, optaxclip.clip_by_global_norm(0.0), 0.1, params, keys[1])

    cell, dense = params["params"]["SimpleCell_0"], params["params"]["Dense_0"]
    for loss, key in zip(losses, jax.random.split(keys[1], example.LAST), strict=True):
        x, signs = (np.float64(array) for array in example.batch(job.time, key))
        np.testing.assert_array_equal(x[0], signs)
        state = np.zeros((len(signs), example.HIDDEN))
        for inputs in x:
            state = np.tanh(inputs @ np.float64(cell["i"]["kernel"]) + cell["i"]["bias"]
                            + state @ np.float64(cell["h"]["kernel"]))  # fmt: skip
        answer = state @ np.float64(dense["kernel"]) + np.float64(dense["bias"])
        # A limit of 0 changes no parameter. Roundings grow by up to three in each of seven steps.
        np.testing.assert_allclose(loss, np.mean((answer - signs) ** 2), rtol=1e-4)


# ------------------------------------------------------------------------ write_a_threshold.py


def test_write_a_threshold():
    """Two tables are printed, with the step that is clipped and the one that is not finite."""
    done = run("write_a_threshold.py")

    assert done.returncode == 0, done.stderr
    large, bad = ([row for row in rows(done.stdout) if row[0] == step] for step in ("60", "80"))
    assert [row[4] for row in large] == ["1", "1"]
    assert [(row[1], row[3]) for row in bad] == [("nan", "0"), ("nan", "0")]


@jax.numpy_dtype_promotion("standard")  # as Optax's Adam needs
@jax.numpy_rank_promotion("allow")  # as Flax needs
def test_write_a_threshold_is_the_geometric_mean(load):
    """Each limit is 1.5 times the weighted geometric mean of what norms became before."""
    example = load("write_a_threshold")
    history = jax.device_get(example.train(optaxclip.measure.global_norm()))

    became, limits = [], []
    for norm in np.float64(history["norm"]):
        weights = 0.9 ** np.arange(len(became))[::-1]
        limits.append(
            1.5 * np.exp(np.average(np.log(became), weights=weights)) if became else math.inf
        )
        if math.isfinite(norm):
            became.append(min(norm, limits[-1]))
    # The logarithms, of up to 6, are rounded in each of the ten steps that count.
    np.testing.assert_allclose(history["limit"], limits, rtol=60 * EPS)
    assert history["clipped"].sum() == history["clipped"][example.TOO_LARGE] == 1
    assert not np.isfinite(history["norm"][example.BAD])
    assert history["loss"][-1] < 0.1 * history["loss"][0]


# --------------------------------------------------------------------------------- one_page.py


def test_one_page():
    """The page and the package differ by roundings, and every clipper clips some of the steps."""
    done = run("one_page.py")

    assert done.returncode == 0, done.stderr
    table = [row for row in rows(done.stdout) if row[-1].isdigit()]
    assert len(table) == 5
    for name, difference, clipped in table:
        assert float(difference) <= 4 * EPS, name  # two norms, their quotient, and the product
        assert 0 < int(clipped) < 200, name
    skipped = next(row for row in table if "skipped" in row[0])
    assert float(skipped[1]) == 0  # a factor of 0 or 1 rounds nothing


def test_one_page_tells_clippers_apart(load):
    """The comparison sees a limit that is one part in a million off."""
    page = load("one_page")
    off = page.clip(page.global_norm, page.constant(1 + 1e-6), page.rescale)
    compare = functools.partial(page.compare, off, steps=20)

    assert 9e-7 < compare(optaxclip.clip_by_global_norm(1.0))[0] < 1.5e-6
