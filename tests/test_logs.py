"""Files of every kind give the norms that were written; bad ones, a sentence that says where."""

import importlib
import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from optaxclip.logs import read_run

DATA = pathlib.Path(__file__).parent / "data"
NAN, INF = np.nan, np.inf


def write(path, text):
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def write_events(folder, name, scalars):
    """An event file by TensorBoard's own writer: (step, tag, value), in this order."""
    writers = pytest.importorskip("tensorboard.summary.writer.event_file_writer")
    protos = importlib.import_module("tensorboard.compat.proto.event_pb2")
    summaries = importlib.import_module("tensorboard.compat.proto.summary_pb2")
    writer = writers.EventFileWriter(str(folder / name))
    for step, tag, value in scalars:
        one = summaries.Summary.Value(tag=tag, simple_value=value)
        summary = summaries.Summary(value=[one])
        writer.add_event(protos.Event(step=step, summary=summary, wall_time=0.0))
    writer.close()
    return folder / name


GOOD = {
    "csv": "step,loss,norm\n1,3.0,0.5\n2,2.5,nan\n3,2.0,\n4,2.0,Infinity\n5,1.0,2e0\n",
    "windows": "\ufeffnorm, step\r\n0.5,1\r\nNaN,2\r\n\r\n,3\r\ninf,4\r\n2,5\r\n",
    "tsv": "step\tgrad_norm\n1\t0.5\n2\tnan\n3\t\n4\tinf\n5\t2\n",
    "semicolons": "step;norm\n1;0.5\n2;nan\n3;\n4;inf\n5;2\n",
    "index": ",train/grad_norm,name\n0,0.5,a\n1,nan,a\n2,,a\n3,inf,a\n4,2,a\n",
    "quotes": '"step","a ""norm"", of all","norm"\n1,7,0.5\n2,7,nan\n3,7,""\n4,7,inf\n5,7,2\n',
    "one column": "norm\n0.5\nnan\ninf\n2\n",
    "jsonl": '{"step": 1, "norm": 0.5}\n{"step": 2, "norm": NaN}\n{"step": 3}\n'
    '\n{"step": 4, "norm": Infinity}\n{"step": 5, "norm": 2}\n',
    "nested": '{"train": {"loss": 1, "grad_norm": 0.5}}\n{"train": {"grad_norm": "nan"}}\n'
    '{"eval": {"loss": 2}}\n{"train": {"grad_norm": "inf"}}\n{"train/grad_norm": 2}\n',
    "separators in a string": '{"norm": 0.5, "text": "a\u2028b\x85c"}\r\n{"norm": NaN}\n'
    '{"norm": Infinity}\n{"norm": 2}\n',
    "null": '{"norm": 0.5}\n{"norm": "NaN"}\n{"norm": null}\n{"norm": "Infinity"}\n{"norm": 2.0}\n',
}


@pytest.mark.parametrize("kind", GOOD)
def test_text(kind, tmp_path):
    """What is empty was not logged; nan and inf were."""
    run = read_run(write(tmp_path / "log", GOOD[kind]))

    assert run.norms.dtype == np.float64
    np.testing.assert_array_equal(run.norms, [0.5, NAN, INF, 2])
    assert run.labels == [""]


def test_real_log():
    """The log of the demo is read whole, and gives what Python's own parser of floats does."""
    lines = [line.split(",") for line in (DATA / "char_lm.csv").read_text().splitlines()]
    place = lines[0].index("norm")
    for clipper in ("none", "global_norm"):
        own = [float(line[place]) for line in lines if line[0] == clipper]
        run = read_run(DATA / "char_lm.csv", where={"clipper": clipper})
        assert len(own) == 250
        np.testing.assert_array_equal(run.norms, own)
        np.testing.assert_array_equal(run.steps, np.arange(1, 251))
        assert run.label == f"clipper={clipper}"
    assert read_run(DATA / "char_lm.csv").labels == ["clipper=none", "clipper=global_norm"]


def test_event_files(tmp_path):
    """A file, a folder, and folders of runs, whether written step by step or tag by tag."""
    sizes = {"a": [0.5, 2.0, NAN, 1.0], "b": [3.0, 4.0, 5.0, INF]}
    for name, norms in sizes.items():
        by_step = [(i, tag, x) for i, x in enumerate(norms) for tag in ("loss", "train/grad_norm")]
        by_tag = sorted(by_step, key=lambda scalar: scalar[1])
        write_events(tmp_path, name, by_step if name == "a" else by_tag)
    (file,) = (tmp_path / "b").iterdir()

    np.testing.assert_array_equal(read_run(file).norms, sizes["b"])
    np.testing.assert_array_equal(read_run(tmp_path / "a").norms, sizes["a"])
    both = read_run(tmp_path)
    assert [label.split("/")[0] for label in both.labels] == ["file=a", "file=b"]
    np.testing.assert_array_equal(both.norms, sizes["a"])
    np.testing.assert_array_equal(read_run(tmp_path, run=2).norms, sizes["b"])


def test_a_step_that_was_logged_twice_in_an_event_file(tmp_path):
    """No norm is lost: the second one begins another run, as in a text file."""
    scalars = [(step, "grad_norm", float(i)) for i, step in enumerate((1, 2, 3, 3, 4), 1)]
    path = write_events(tmp_path, "a", scalars)

    np.testing.assert_array_equal(read_run(path, run=1).norms, [1, 2, 3])
    np.testing.assert_array_equal(read_run(path, run=2).norms, [4, 5])


def test_event_files_without_tensorboard(tmp_path):
    """What to install is said."""
    write(tmp_path / "events.out.tfevents.1.host", b"")
    program = f"""
import sys
sys.modules["tensorboard"] = None
from optaxclip.logs import read_run
read_run({str(tmp_path)!r})
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert done.stderr.splitlines()[-1].endswith(
        "reading event files takes TensorBoard, pip install tensorboard"
    )


RUNS = {
    "steps that rise": ("phase,step,norm", "a,1,1 a,2,2 b,3,3 b,4,4", {"": [1, 2, 3, 4]}),
    "seeds": (
        "seed,step,norm", "0,1,1 0,2,2 1,1,3 1,2,4", {"seed=0": [1, 2], "seed=1": [3, 4]},
    ),
    "rows that alternate": (
        "step,name,norm", "1,a,1 1,b,2 2,a,3 2,b,4", {"name=a": [1, 3], "name=b": [2, 4]},
    ),
    "blocks that alternate, and steps that rise across them": (
        "step,seed,norm", "1,0,1 2,0,2 1,1,3 2,1,4 3,0,5 4,0,6 3,1,7 4,1,8",
        {"seed=0": [1, 2, 5, 6], "seed=1": [3, 4, 7, 8]},
    ),
    "a counter that stands still": ("steps,norm", "1,1 2,2 2,3 3,4", {"": [1, 2, 3, 4]}),
    "capitals": (
        "Step,Seed,train/Grad_Norm", "1,0,1 2,0,2 1,1,3 2,1,4", {"Seed=0": [1, 2], "Seed=1": [3, 4]}
    ),
    "a counter with capitals": ("Steps,norm", "1,1 2,2 2,3 3,4", {"": [1, 2, 3, 4]}),
    "no steps": ("name,norm", "a,1 a,2 b,3 b,4", {"name=a": [1, 2], "name=b": [3, 4]}),
    "a restart": (
        "step,norm", "1,1 2,2 3,3 1,4 2,5 3,6 4,7",
        {"from line 2": [1, 2, 3], "from line 5": [4, 5, 6, 7]},
    ),
    "a step twice": (
        "step,norm", "1,1 2,2 2,3 3,4", {"from line 2": [1, 2], "from line 4": [3, 4]},
    ),
    "rows without a norm": ("step,norm", "1,1 1, 2,2 2, 3,3", {"": [1, 2, 3]}),
}  # fmt: skip


@pytest.mark.parametrize("case", RUNS)
def test_runs_are_never_mixed(case, tmp_path):
    """Every run is found with its own norms; the longest is taken, of equal ones the first."""
    header, rows, expected = RUNS[case]
    path = write(tmp_path / "log.csv", "\n".join([header, *rows.split(" ")]))
    found = read_run(path)

    assert found.labels == list(expected)
    for i, norms in enumerate(expected.values(), 1):
        np.testing.assert_array_equal(read_run(path, run=i).norms, norms)
    np.testing.assert_array_equal(found.norms, max(expected.values(), key=len))


def test_rows_are_chosen_by_value(tmp_path):
    """A value is compared as text or as a number."""
    text = "lr,clipper,step,norm\n0.10,a,1,1\n0.10,b,1,2\n0.2,a,1,3\n0.2,b,1,4\n0.2,b,2,5\n"
    path = write(tmp_path / "log.csv", text)

    chosen = read_run(path, where={"lr": 0.2, "clipper": "b"})
    np.testing.assert_array_equal(chosen.norms, [4, 5])
    assert chosen.label == "lr=0.2, clipper=b"
    np.testing.assert_array_equal(read_run(path, where={"lr": "0.1", "clipper": "a"}).norms, [1])


def test_columns_beside_the_norms(tmp_path):
    """Metrics of the same clip come first; those of others only if there is no doubt."""
    columns = {"0/norm": [1.0], "0/limit": [2.0], "1/norm": [3.0], "1/limit": [4.0], "1/x": [5.0]}
    run = read_run(columns, column="1/norm")

    assert (run.beside("limit"), run.beside("x")) == ([4.0], [5.0])
    assert read_run(columns, column="0/norm").beside("limit") == [2.0]
    assert read_run(columns, column="0/norm").beside("x") == [5.0]
    assert read_run({**columns, "2/norm": [1.0]}, column="2/norm").beside("limit") is None


def test_logs_in_memory():
    """Dicts of JAX scalars, columns and plain norms are logs, too."""
    jnp = importlib.import_module("jax.numpy")
    rows = [{"norm": jnp.float32(x), "steps": jnp.int32(i)} for i, x in enumerate((0.5, NAN, 2))]
    for log in (rows, {"norm": [0.5, NAN, 2.0]}, np.array([0.5, NAN, 2.0]), iter([0.5, NAN, 2])):
        np.testing.assert_array_equal(read_run(log).norms, [0.5, NAN, 2])


NO_LOGS = {
    "None": (None, TypeError, "got NoneType"),
    "number": (1.0, TypeError, "got float"),
    "matrix": (np.ones((2, 2)), TypeError, r"got 'norm' of shape \(2,\)"),
    "vector in a dict": ([{"norm": np.ones(3)}], TypeError, r"got 'norm' of shape \(3,\)"),
    "ragged columns": ({"norm": [1.0], "step": [1, 2]}, ValueError, "one length"),
    "nothing": ([], ValueError, "is empty"),
    "no columns": ({}, ValueError, "one length"),
}


@pytest.mark.parametrize("case", NO_LOGS)
def test_no_log_in_memory(case):
    """What is no log is told what one is."""
    log, error, match = NO_LOGS[case]
    with pytest.raises(error, match=match):
        read_run(log)


def test_json_is_read_as_it_was_written(tmp_path):
    """Random logs survive the way through JSONL and CSV, bit for bit."""
    norms = np.random.default_rng(0).lognormal(0, 20, 500)
    lines = [json.dumps({"a": {"norm": x}, "step": i}) for i, x in enumerate(norms.tolist())]
    np.testing.assert_array_equal(read_run(write(tmp_path / "a", "\n".join(lines))).norms, norms)
    rows = "".join(f"{x!r}\n" for x in norms.tolist())
    np.testing.assert_array_equal(read_run(write(tmp_path / "b", "norm\n" + rows)).norms, norms)
