"""examples/log_metrics.py: every writer's files hold what a plain run says, each step and value."""

import csv
import json
import os
import socket
import struct
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
PROGRAM = ROOT / "examples/log_metrics.py"
STEPS = 100


def run(*arguments, **environment):
    """The program, with any warning an error."""
    command = [sys.executable, "-W", "error", PROGRAM, *map(str, arguments)]
    env = {**os.environ, **environment}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=env)


def expected():
    """The same training in NumPy's float64."""
    x = np.asarray(jax.random.normal(jax.random.key(0), (64, 8)), np.float64)
    y, w, rows = x @ np.arange(8.0), np.zeros(8), []
    for _ in range(STEPS):
        error = x @ w - y
        gradient = 2 * x.T @ error / 64
        norm = np.linalg.norm(gradient)
        factor = min(1, 1.5 / norm)
        w -= 0.1 * factor * gradient
        rows.append({"loss": np.mean(error**2), "clip/norm": norm, "clip/factor": factor})
    return rows


def table(out):
    """What is in the CSV file, by step."""
    with (out / "metrics.csv").open(newline="") as file:
        rows = [{name: float(text) for name, text in row.items()} for row in csv.DictReader(file)]
    return {int(row.pop("step")): row for row in rows}


def event_file(out):
    """What TensorBoard reads, by step."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(out), size_guidance={"scalars": 0}).Reload()
    found = {}
    for name in events.Tags()["scalars"]:
        for event in events.Scalars(name):
            found.setdefault(event.step, {})[name] = event.value
    return found


def offline_run(out):
    """The history in the file of an offline run, by step: protocol buffers in a LevelDB log."""
    from wandb.proto.wandb_internal_pb2 import Record

    (path,) = out.glob("wandb/offline-run-*/*.wandb")
    data, at, record, found = path.read_bytes(), 7, b"", {}  # behind a header of 7 bytes
    while at + 7 <= len(data):
        if 2**15 - at % 2**15 < 7:  # a block of 32 KiB ends in zeros where no head fits
            at += 2**15 - at % 2**15
            continue
        _, size, kind = struct.unpack_from("<IHB", data, at)  # checksum, length, which part
        record += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in {1, 4}:  # whole, or the last part
            message, record = Record.FromString(record), b""
            if message.HasField("history"):
                items = {
                    i.key or "/".join(i.nested_key): i.value_json for i in message.history.item
                }
                values = {name: json.loads(text) for name, text in items.items()}
                found[message.history.step.num] = values
    return {
        step: {name: value for name, value in row.items() if not name.startswith("_")}
        for step, row in found.items()
    }


READERS = {"csv": table, "tensorboard": event_file, "wandb": offline_run}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The files of one run with all writers, which sends nothing to where requests would go."""
    out = tmp_path_factory.mktemp("log_metrics")
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0)
        url = f"http://127.0.0.1:{server.getsockname()[1]}"
        proxies = dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"), url)
        done = run(
            "--to", ",".join(READERS), "--every", 30, "--out", out,
            **proxies, WANDB_BASE_URL=url, NO_PROXY="", no_proxy="",
            WANDB_CACHE_DIR=str(out / "cache"), WANDB_CONFIG_DIR=str(out / "config"),
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        with pytest.raises(BlockingIOError):  # nobody is waiting to be let in
            server.accept()
    return out


@pytest.mark.parametrize("name", READERS)
def test_every_step_is_written(name, written):
    """All steps are in the file, also those behind the last full period, with all values."""
    rows = READERS[name](written)
    assert list(rows) == list(range(1, STEPS + 1))
    names = {"norm", "clipped_norm", "limit", "factor", "clipped", "steps", "clipped_steps"}
    assert set(rows[1]) == {"loss", *(f"clip/{x}" for x in names | {"nonfinite_steps"})}
    for step, row in enumerate(expected(), 1):
        assert rows[step]["clip/steps"] == step
        # Float32: differences of numbers up to 20 are off by 2e-6, and no step adds to that.
        assert {x: rows[step][x] for x in row} == pytest.approx(row, rel=1e-5, abs=1e-5)


def test_the_run_clips_and_then_does_not(written):
    """There is something to see in the files."""
    rows = table(written)
    assert rows[1]["clip/clipped"] == 1
    assert rows[STEPS]["clip/clipped"] == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--to", "csv,magic"], "no writer 'magic'; choose from csv, tensorboard, wandb"),
        (["--every", "0"], "--every must be at least 1; got 0"),
    ],
)
def test_wrong_arguments(arguments, message, tmp_path):
    """A wrong argument is one sentence, and no file."""
    done = run(*arguments, "--out", tmp_path / "new")
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(("name", "package"), [("tensorboard", "tensorboardX"), ("wandb", "wandb")])
def test_absent_packages(name, package, tmp_path):
    """A writer whose package is absent says what to install."""
    absent = tmp_path / f"{package}.py"
    absent.write_text(f"raise ModuleNotFoundError({package!r})\n")  # as if it were not there
    path = os.pathsep.join(filter(None, (str(tmp_path), os.environ.get("PYTHONPATH"))))
    done = run("--to", name, "--out", tmp_path, PYTHONPATH=path)
    assert done.returncode == 2
    assert f"--to {name} needs a package: pip install {package}" in done.stderr
    assert "Traceback" not in done.stderr
