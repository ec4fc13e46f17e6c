"""The benchmarks run as a user runs them, in their short mode; what they are made of is right."""

import importlib
import json
import math
import os
import pathlib
import subprocess
import sys
import threading

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from roster import BEYOND, EVERY

ROOT = pathlib.Path(__file__).parent.parent
BENCHMARKS = ROOT / "benchmarks"


def run(name, *arguments, **environment):
    """What a program prints."""
    command = [sys.executable, "-W", "error", BENCHMARKS / name, *map(str, arguments)]
    env = {**os.environ, **environment}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=env)


@pytest.fixture
def piece(monkeypatch):
    """Imports a module of the benchmarks."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """The folder of one short run, and what it printed; no peer can be imported there."""
    folder = tmp_path_factory.mktemp("benchmarks")
    for name in ("torch", "smartclip"):
        (folder / f"{name}.py").write_text(f"raise ImportError('{name} is not here')\n")
    done = run(
        "overhead.py", "--quick", "--trees", "gpt2,scanned", "--optimizers", "sgd",
        "--variants", "clip_by_global_norm,clip_by_value[record=False],zclip[tree]", "--peers",
        "--json", folder / "out/all.json", "--plot", folder / "out/all.png",
        "--save", "--results", folder / "results", PYTHONPATH=str(folder),
    )  # fmt: skip
    return folder, done


def rows_of(folder):
    return json.loads((folder / "out/all.json").read_text())["rows"]


def test_overhead(quick):
    """The bare step, its twin, Optax's clippers and ours have a row each, with finite ratios."""
    folder, done = quick

    assert done.returncode == 0, done.stderr
    assert (folder / "out/all.png").read_bytes().startswith(b"\x89PNG")
    rows = rows_of(folder)
    for tree, leaves in (("gpt2", 148), ("scanned", 8)):
        own = {row["candidate"]: row for row in rows if row["tree"] == tree}
        assert {row["leaves"] for row in own.values()} == {leaves}
        measured = {name: row for name, row in own.items() if "error" not in row}
        assert set(measured) == {
            "bare", "bare again", "optax.clip_by_global_norm", "optax.clip_by_global_norm again",
            "optaxclip.clip_by_global_norm", "optax.clip", "optaxclip.clip_by_value[record=False]",
            "optaxclip.zclip[tree]", "one-liner",
        }  # fmt: skip
        for name, row in measured.items():
            assert name in done.stdout
            ratio = row["over_bare"]
            assert 0 < ratio["low"] <= ratio["median"] <= ratio["high"] < math.inf
            assert ratio["p25"] <= ratio["median"] <= ratio["p75"]
            for key in ("step_ms", "lower_s", "compile_s", "flops", "bytes", "gb_per_s", "kernels"):
                assert 0 < row[key] < math.inf, key
            assert 0 < row["noise"] < math.inf
            assert row["collectives"] == {}
            # Three transfers of the parameters, and what the clipper reads once more.
            more = 4 / 3 if "bare" not in name and "clip_by_value" not in name else 1
            if name != "optax.clip":
                moved = row["moved_bytes"] / (3 * row["gradient_bytes"])
                assert moved == pytest.approx(more, rel=0.01)
            limit = row["limit_by_transfers_ms"] / own["bare"]["step_ms"]
            assert limit == pytest.approx(4 / 3, rel=0.01)
        ours = own["optaxclip.clip_by_global_norm"]
        assert ours["over_optax"]["median"] > 0
        assert ours["eager_over_optax"]["median"] > 0
        assert own["optaxclip.zclip[tree]"]["over_fixed"]["median"] > 0


def test_absent_peers_are_rows(quick):
    """A peer that cannot run has a row with the error, and stops nothing."""
    folder, done = quick

    for row in rows_of(folder):
        kind = row["candidate"].split(".")[0]
        assert ("error" in row) == (kind in ("torch", "smartclip"))
        if "error" in row:
            assert f"{kind} is not here" in row["error"]
            assert f"{row['candidate']}: {row['error']}" in done.stdout


def test_the_table_of_readme(quick, tmp_path):
    """The saved results become a table between the markers, with device, versions and date."""
    folder, _ = quick
    page = tmp_path / "README.md"
    page.write_text("above\n<!-- benchmarks -->\nold\n<!-- /benchmarks -->\nbelow\n")
    done = run("overhead.py", "--results", folder / "results", "--readme", page)

    assert done.returncode == 0, done.stderr
    (file,) = (folder / "results").iterdir()
    saved = json.loads(file.read_text())
    assert file.name == f"cpu-{saved['cores']}-cores-{jax.__version__}.json"
    above, table, below = page.read_text().split("benchmarks -->")
    assert above == "above\n<!-- "
    assert below == "\nbelow\n"
    for part in (saved["device"], jax.__version__, optax.__version__, saved["rows"][0]["date"]):
        assert part in table
    assert "old" not in table
    heads, _, *lines = [line for line in table.splitlines() if line.startswith("|")]
    assert heads == "| variant | gpt2, SGD | scanned, SGD | compile | eager |"
    assert [line.split("`")[1] for line in lines] == [
        "clip_by_global_norm", "clip_by_value[record=False]", "zclip[tree]",
    ]  # fmt: skip

    page.write_text("no markers\n")
    done = run("overhead.py", "--results", folder / "results", "--readme", page)
    assert done.returncode == 1
    assert "<!-- benchmarks -->" in done.stderr
    assert "Traceback" not in done.stderr


def test_saved_rows_are_replaced_one_by_one(piece, tmp_path):
    """What is measured again takes the place of the old row; the others stay, with their dates."""
    results = piece("_results")
    shared = {**results.device(1), "date": "2000-01-02"}
    key = {"parameters": 1, "dtype": "float32", "optimizer": "sgd", "devices": 1}
    row = lambda tree, date: {"tree": tree, **key, "candidate": "bare", "date": date}
    results.merge(tmp_path, {**shared, "rows": [row("gpt2", "old"), row("nfnet", "old")]})
    path = results.merge(tmp_path, {**shared, "rows": [row("nfnet", "new"), row("scanned", "new")]})

    dates = {row["tree"]: row["date"] for row in json.loads(path.read_text())["rows"]}
    assert dates == {"gpt2": "old", "nfnet": "new", "scanned": "new"}


def test_a_table_for_each_dtype(piece):
    """Of one file; and below it what the clip costs PyTorch, where that ran."""
    results = piece("_results")
    shared = {"tree": "gpt2", "parameters": 1, "leaves": 1, "optimizer": "sgd", "devices": 1}
    shared |= {"date": "2000-01-02", "noise": 0.01, "read_gb_per_s": 2.0, "copy_gb_per_s": 1.0}
    own = lambda dtype, name, over: {
        **shared, "dtype": dtype, "candidate": name, "over_bare": {"median": over},
        "over_optax": {"median": over}, "over_limit": over,
    }  # fmt: skip
    rows = [
        own("bfloat16", "optaxclip.clip_by_global_norm", 1.25),
        own("float32", "optaxclip.clip_by_global_norm", 1.5),
        own("float32", "torch.clip_grad_norm_", 3.25),
    ]
    text = results.markdown({**results.device(1), "rows": rows})

    first, second = text.split("| variant")[1:]
    assert "1.50 · 1.50" in first
    assert "takes 3.25; `clip_by_global_norm` over its own 1.50 (gpt2 SGD)" in first
    assert "1.25 · 1.25" in second
    assert "PyTorch" not in second
    assert text.index("float32") < text.index("bfloat16")


def test_who_is_timed_is_alone(piece, tmp_path):
    """Runs that share a file compile at once, and none is timed before all have compiled."""
    turn, file = piece("_group").turn, tmp_path / "turns"
    done = []

    def timed():
        with turn(file, alone=True):
            done.append("timed")

    with turn(file, alone=False):
        with turn(file, alone=False):
            done.append("two compile")
        waits = threading.Thread(target=timed)
        waits.start()
        waits.join(0.2)
        done.append("compiled")
    waits.join()

    assert done == ["two compile", "compiled", "timed"]
    with turn(None, alone=True), turn(None, alone=True):
        pass


def test_spectral(tmp_path):
    """The table of errors has a row per clip, and none of Newton-Schulz is far from SVD."""
    done = run("spectral.py", "--size", "8", "--markdown", tmp_path / "spectral.md")

    assert done.returncode == 0, done.stderr
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in (tmp_path / "spectral.md").read_text().splitlines()
        if line.startswith(("| hard", "| soft"))
    ]
    assert {row[0] for row in rows} >= {"hard, newton_schulz", "soft, newton_schulz", "hard, svd"}
    for row in rows:
        if "power" not in row[0]:
            most = 1e-4 if row[1] == "float32" else 1e-2  # over 2^-8, what bfloat16 rounds to
            assert all(float(cell.split()[0]) < most for cell in row[3:7]), row


def test_scaling(tmp_path):
    """Every sweep has its costs and slopes, and its collectives once there are two devices."""
    done = run("scaling.py", "--quick", "--json", tmp_path / "s.json", "--plot", tmp_path / "s.png")

    assert done.returncode == 0, done.stderr
    assert (tmp_path / "s.png").read_bytes().startswith(b"\x89PNG")
    written = json.loads((tmp_path / "s.json").read_text())
    ours = [row for row in written["rows"] if row["candidate"] == "optaxclip.clip_by_global_norm"]
    assert [(row["sweep"], row["at"]) for row in ours] == [
        ("leaves", 2), ("leaves", 4), ("parameters", 1000), ("parameters", 4000), ("window", 8),
        ("window", 16), ("devices", 1), ("devices", 2),
    ]  # fmt: skip
    assert [row["collectives"] for row in ours][-2:] == [{}, {"all-reduce": 1}]
    assert all(row["step_ms"] > 0 and row["compile_s"] > 0 for row in written["rows"])
    assert all(math.isfinite(line["per_unit"]) for line in written["slopes"])


@pytest.mark.parametrize(
    ("program", "arguments", "message"),
    [
        ("overhead.py", ("--trees", "oak"), "no tree 'oak'; choose from gpt2, nfnet, scanned"),
        ("overhead.py", ("--optimizers", "lion"), "no optimizer 'lion'; choose from sgd, adamw"),
        ("overhead.py", ("--variants", "magic"), "no variant 'magic'; choose from all, drop-ins"),
        ("overhead.py", ("--dtype", "int8"), "no dtype 'int8'; choose from float32, bfloat16"),
        ("overhead.py", ("--sizes", "big"), "no size 'big'; write 1000000, 1M, 1.5G or max"),
        ("scaling.py", ("--sweeps", "depth"), "no sweep 'depth'; choose from leaves, parameters"),
        ("scaling.py", ("--leaves", "few"), "--leaves few: write numbers such as 10,30"),
    ],
)
def test_names_that_are_not_known(program, arguments, message):
    """A wrong option is a sentence with the choices, not a traceback."""
    done = run(program, *arguments)

    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_every_variant_is_a_candidate(piece):
    """What the package has to offer is timed, and each name selects what it says."""
    candidates = piece("_candidates")
    names = lambda text: {c.name for c in candidates.select(text, "adamw", peers=False)}

    assert {name.split("[")[0] for name in candidates.VARIANTS} == set(EVERY)
    assert {f"optaxclip.{name}" for name in candidates.VARIANTS} <= names("all")
    assert {f"optaxclip.{name}" for name in BEYOND} <= names("beyond")
    assert names("zclip") - names("clip_by_global_norm") == {
        "optaxclip.zclip", "optaxclip.zclip[tree]",
    }  # fmt: skip
    assert names("zclip[tree]") - names("clip_by_global_norm") == {"optaxclip.zclip[tree]"}


@pytest.mark.parametrize(("tree", "leaves"), [("gpt2", 148), ("nfnet", 1200), ("scanned", 8)])
def test_trees(piece, tree, leaves):
    """A tree has its number of leaves at every size, and about the parameters asked for."""
    trees = piece("_trees")

    for size in (10**6, 124 * 10**6, 10**9):
        shapes = trees.shapes_of(tree, size)
        assert len(shapes) == leaves
        assert trees.count(shapes) == pytest.approx(size, rel=0.15)
    assert len(trees.many(300, 10**6)) == 300


@pytest.mark.parametrize("name", ["clip_by_global_norm", "clippy", "scale_by_stable_adam"])
@jax.numpy_dtype_promotion("standard")  # as Optax's Adam needs
def test_a_job_trains(piece, name):
    """The timed step does what the clipper does in its place of a chain with the optimizer."""
    candidates, measure = piece("_candidates"), piece("_measure")
    candidate = candidates.VARIANTS[name]
    world = measure.World({"w": (3, 4), "b": (4,)}, "float32", "adamw", None)
    params = jax.tree.map(jnp.copy, world.params)
    chain = {
        "first": optax.chain,
        "last": lambda clip, adamw: optax.chain(adamw, clip),
        "alone": lambda clip, adamw: clip,
    }[candidate.place]
    tx = chain(candidate.make(), optax.adamw(candidates.LEARNING_RATE))
    state = tx.init(params)
    job = measure.Job(candidate, world)
    job.compile()
    assert job.sample(3) > 0

    for _ in range(3):
        updates, state = tx.update(world.grads, state, params)
        params = optax.apply_updates(params, updates)
    for key, expected in params.items():
        np.testing.assert_allclose(world.params[key], expected, rtol=1e-5)


def test_ratios(piece):
    """A ratio compares round by round: what slows both steps of a round alike leaves no trace."""
    ratio = piece("_measure").ratio
    busy = np.array([1.0, 7.0, 1.0, 3.0])

    assert ratio(2 * busy, busy) == (2, 2, 2, 2, 2)
    spread = ratio([1.0, 2.0, 3.0], [1.0, 1.0, 1.0])
    assert (spread.median, spread.p25, spread.p75) == (2, 1.5, 2.5)
    assert (spread.low, spread.high) == (1, 3)


def test_collectives_are_counted(piece):
    """A sum over eight devices is one all-reduce; one in a branch is counted apart."""
    hlo = piece("_hlo")
    mesh = jax.make_mesh((8,), ("data",), (jax.sharding.AxisType.Auto,))
    x = jax.device_put(jnp.ones(8), jax.NamedSharding(mesh, jax.P("data")))
    flag = jax.device_put(jnp.array(True), jax.NamedSharding(mesh, jax.P()))
    text = lambda f, *args: jax.jit(f).lower(*args).compile().as_text()

    every = hlo.count(text(jnp.sum, x))
    assert every.collectives == {"all-reduce": 1}
    assert every.branch_kernels == 0
    rare = hlo.count(text(lambda f, x: jax.lax.cond(f, jnp.sum, lambda x: 1.0, x), flag, x))
    assert rare.collectives == {}
    assert rare.branch_collectives == {"all-reduce": 1}


HLO = """
HloModule step, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%fused (p: f32[8]) -> f32[] {
  %p = f32[8]{0} parameter(0)
  %zero = f32[] constant(0)
  ROOT %r = f32[] reduce(%p, %zero), dimensions={0}, to_apply=%add
}

%wrapped (p: f32[8]) -> f32[8] {
  %p.1 = f32[8]{0:T(256)} parameter(0)
  ROOT %gather = f32[8]{0} all-gather(%p.1), dimensions={0}
}

%body (t: (s32[], f32[8])) -> (s32[], f32[8]) {
  %t = (s32[], /*index=1*/f32[8]{0}) parameter(0)
  %i = s32[] get-tuple-element(%t), index=0
  %y = f32[8]{0} get-tuple-element(%t), index=1
  %n = f32[8]{0} negate(%y)
  ROOT %next = (s32[], f32[8]{0}) tuple(%i, %n)
}

%condition (t: (s32[], f32[8])) -> pred[] {
  %t.1 = (s32[], f32[8]{0}) parameter(0)
  %j = s32[] get-tuple-element(%t.1), index=0
  ROOT %less = pred[] compare(%j, %j), direction=LT
}

%yes (p: f32[8]) -> f32[8] {
  %p.2 = f32[8]{0} parameter(0)
  ROOT %c = f32[8]{0} copy(%p.2)
}

%no (p: f32[8]) -> f32[8] {
  ROOT %p.3 = f32[8]{0} parameter(0)
}

ENTRY %main (x: f32[8], t: (s32[], f32[8]), p: pred[]) -> f32[8] {
  %x = f32[8]{0} parameter(0)
  %t.2 = (s32[], f32[8]{0}) parameter(1)
  %p.4 = pred[] parameter(2)
  %f = f32[] fusion(%x), kind=kLoop, calls=%fused, metadata={op_name="jit(step)/sum"}
  %start = (f32[8]{0}, f32[8]{0}) async-start(%x), calls=%wrapped
  %done = f32[8]{0} async-done(%start)
  %reduce-start = f32[] all-reduce-start(%f), replica_groups={}, to_apply=%add
  %reduce-done = f32[] all-reduce-done(%reduce-start)
  %loop = (s32[], f32[8]{0}) while(%t.2), condition=%condition, body=%body
  ROOT %z = f32[8]{0} conditional(%p.4, %x, %x), true_computation=%yes, false_computation=%no
}
"""


def test_kernels_are_counted(piece):
    """What is inside a fusion or a reduction is no kernel; what a loop runs is, and counts once."""
    counts = piece("_hlo").count(HLO)

    # The fusion, the all-gather, the all-reduce, negate and compare; in a branch, the copy.
    assert counts == (5, 1, 1, {"all-gather": 1, "all-reduce": 1}, {})


def test_every_program_is_run_here():
    """A program that is added to the benchmarks needs a test in this file."""
    programs = {path.name for path in BENCHMARKS.glob("[!_]*.py")}

    assert programs == {"overhead.py", "scaling.py", "spectral.py"}
