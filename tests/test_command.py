"""The command, as a user runs it: the right limit, and a sentence for all that is wrong."""

import csv
import os
import pathlib
import re
import subprocess
import sys

import numpy as np
import optax
import pytest

import optaxclip
from optaxclip.command import VARIANTS, main
from optaxclip.logs import read_run

pytestmark = pytest.mark.whole  # cheap, and each cell says something of its own

DATA = pathlib.Path(__file__).parent / "data" / "char_lm.csv"
PNG = b"\x89PNG"


def run(*arguments, cwd):
    """The command in a process of its own, from another folder, as the tested package."""
    command = [sys.executable, "-W", "error", "-m", "optaxclip", *map(str, arguments)]
    env = {**os.environ, "XLA_FLAGS": ""}
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=cwd, env=env)


def write(path, norms, *, name="norm"):
    path.write_text("\n".join([f"step,{name}", *(f"{i},{x!r}" for i, x in enumerate(norms, 1))]))
    return path


def ordinary(n):
    return np.random.default_rng(0).lognormal(1, 0.3, n).tolist()


def printed(capsys, *arguments):
    """What the command prints, which fits a terminal."""
    assert main([*map(str, arguments)]) == 0
    out, err = capsys.readouterr()
    assert not err
    assert max(len(line) for line in out.splitlines() if str(arguments[1]) not in line) <= 80
    return out


def run_line(line, names):
    """What a printed line of code makes."""
    exec(f"made = {line}", names)
    return names["made"]


def limits(out):
    """The curve, by clip rate."""
    return {float(a): float(b) for a, b in re.findall(r"^ +([\d.e-]+) % +(\S+)", out, re.MULTILINE)}


def test_advise_on_the_demo(tmp_path):
    """One command on the demo's log says which run it took, a limit, and draws it."""
    done = run("advise", DATA, "--plot", "deep/advice.png", cwd=tmp_path)

    assert done.returncode == 0, done.stderr
    assert not done.stderr
    assert "250 norms in the column 'norm'" in done.stdout
    assert "run 1 of 2: clipper=none" in done.stdout
    assert "--run 2 (clipper=global_norm)" in done.stdout
    (limit,) = re.findall(r"threshold should be about (\S+)\.\n", done.stdout)
    (exact,) = re.findall(
        r"optax\.chain\(optaxclip\.clip_by_global_norm\((\S+)\), optimizer\)", done.stdout
    )
    assert f"{float(exact):.3g}" == limit != exact  # in code with five digits
    assert "\nIt clips 8 % of the next 25 steps.\n" in done.stdout
    assert (tmp_path / "deep" / "advice.png").read_bytes().startswith(PNG)
    # The level falls and what is advised is for the end: of the latest half of the norms, 8 % are
    # above a limit that is close by. It rests on 10 norms, which is off by a third at most, and
    # moves a limit by less than a quarter where norms scatter by 30 %.
    with DATA.open() as file:
        norms = [float(row["norm"]) for row in csv.DictReader(file) if row["clipper"] == "none"]
    assert float(limit) == pytest.approx(np.quantile(norms[125:], 0.92), rel=0.25)


def test_advice_is_a_quantile_where_norms_are_steady(tmp_path, capsys):
    """On a part of the real log whose level holds, the limit is what NumPy says it is."""
    norms = read_run(DATA, where={"clipper": "global_norm"}).norms[125:]
    path = write(tmp_path / "run.csv", norms.tolist(), name="grad_norm")
    out = printed(capsys, "advise", path, "--column", "grad_norm", "--clip-rate", 0.2)

    assert "steady: " in out
    of_logs = lambda rate: np.exp(np.quantile(np.log(norms), 1 - rate))
    assert f"about {of_logs(0.2):.3g}.\nIt clips 20 % of the coming steps." in out
    found = limits(out)
    assert found[20] == pytest.approx(of_logs(0.2), rel=5e-5)  # printed with five digits
    assert set(found) == {20}  # the next smaller and larger rates have too few norms, or are 50 %


def test_advice_on_a_long_run(tmp_path, capsys):
    """Enough norms get the usual rate, and the curve says what others cost."""
    norms = ordinary(4000)
    out = printed(capsys, "advise", write(tmp_path / "run.csv", [*norms, np.nan]))

    assert "4001 norms in" in " ".join(out.split())  # a long path ends a line anywhere
    assert "Not finite: 1." in out
    assert "It clips 5 % of the coming steps." in out
    found = limits(out)
    assert set(found) == {1, 2, 5, 10, 20}  # of 4000 norms, 0.5 % are too few
    for percent, limit in found.items():
        expected = np.quantile(norms, 1 - percent / 100)
        # Between the rates of the curve, which are a quarter apart, the limit is
        # taken as linear: less than 1 % of it.
        assert limit == pytest.approx(expected, rel=0.015), percent


def test_the_rate_is_what_few_norms_allow(tmp_path, capsys):
    """Every log of 40 norms gets advice without asking for a rate."""
    for n in (40, 41, 63, 99, 199, 286, 399, 400):
        out = printed(capsys, "advise", write(tmp_path / "run.csv", ordinary(n)))
        (percent,) = re.findall(r"It clips (\S+) % of", out)
        assert 20 / n <= float(percent) / 100 < 20 / n + 0.01
        assert ("For 5 %, it takes 400 norms." in out) == (n < 400)


def test_a_run_that_diverged(tmp_path, capsys):
    """Norms of 1e20 that stay are no level to advise a limit for; a spike of 1e20 is nothing."""
    norms = np.array(ordinary(1000))
    spike = np.where(np.arange(1000) == 600, 1e20, norms)
    diverged = np.where(np.arange(1000) < 600, norms, 1e20 * norms)
    for sizes, said in ((norms, False), (spike, False), (diverged, True)):
        out = printed(capsys, "advise", write(tmp_path / "run.csv", sizes.tolist()))
        assert ("the run diverged" in " ".join(out.split())) == said
        limit = float(re.search(r"should be about (\S+)\.\n", out)[1])
        assert 0.02 < np.mean(norms > limit) < 0.1


def test_advice_can_be_taken(tmp_path, capsys):
    """The lines of code that are printed make transformations."""
    for path in (DATA, write(tmp_path / "run.csv", ordinary(400))):
        out = printed(capsys, "advise", path)
        lines = re.findall(r"^    (optax\.chain.*)$", out, re.MULTILINE)
        assert len(lines) == (2 if path == DATA else 1)
        for line in lines:
            names = {"optax": optax, "optaxclip": optaxclip, "optimizer": optax.sgd(1.0)}
            assert isinstance(run_line(line, names), optax.GradientTransformation)


def test_replay(tmp_path, capsys):
    """What a fixed limit would have done is what NumPy says; the picture is written."""
    norms = np.array(ordinary(60))
    norms[10] = np.nan
    path, picture = write(tmp_path / "run.csv", norms.tolist()), tmp_path / "limits.png"
    out = printed(
        capsys, "replay", path, "--plot", picture,
        "--with", "clip_by_global_norm=2.5,clip_by_ema_ratio",
    )  # fmt: skip

    rows = {line.split()[0]: line.split()[1:] for line in out.splitlines() if line[:5] == "clip_"}
    clipped, percent, limit, factor, after = rows["clip_by_global_norm=2.5"]
    assert float(clipped) == pytest.approx(100 * np.mean(norms > 2.5), rel=5e-3)
    assert (percent, limit, after) == ("%", "2.5", "2.5")
    assert float(factor) == pytest.approx(2.5 / np.nanmax(norms), rel=5e-3)
    assert "clip_by_ema_ratio*" in rows
    assert "here of the whole tree" in out
    assert "Not finite: 1." in out
    assert picture.read_bytes().startswith(PNG)


REFUSED = {
    "clip_by_value": "clip_by_value: clipper must have one norm",
    "adagc": "adagc: clipper must be one clip",
    "zclap": "no clipper 'zclap'; it is one of adagc, ",
    "zclip=abc": "zclip=abc: the threshold must be a number; got 'abc'",
    "zclip=-1": "zclip=-1: z_max must be a finite number",
    "": "no clipper ''",
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_replayed_is_said(name, capsys):
    """A clipper that needs more than one norm, or is none, is a sentence."""
    assert main(["replay", str(DATA), "--with", name]) == 2
    out, err = capsys.readouterr()
    assert not out
    assert err.startswith(f"optaxclip: {REFUSED[name]}")
    assert err.count("\n") == 1


def test_variants(capsys):
    """All clippers are listed, each with the first sentence of its docstring."""
    assert main(["variants"]) == 0
    out = capsys.readouterr().out
    names = [line for line in out.splitlines() if not line.startswith(" ")]

    assert names == list(VARIANTS)
    assert {"zclip", "clip_by_global_norm", "scale_by_stable_adam"} <= set(names)
    assert all(VARIANTS[name] is getattr(optaxclip, name) for name in names)
    for name, make in VARIANTS.items():
        assert " ".join(make.__doc__.split("\n\n")[0].split()) in " ".join(out.split()), name


BAD = {
    "missing": (None, "no such file; allowed are CSV"),
    "empty": (b"", "is empty"),
    "blank": (b"\n \n\n", "is empty"),
    "header only": (b"step,norm\n", "is empty"),
    "binary": (b"\x89PNG\r\n\x1a\n\x00\xff", "is no text; allowed are CSV"),
    "zeros": (bytes(100), "is no text; allowed are CSV"),
    "no header": (b"1,0.5\n2,0.7\n", "line 1: the first line must name the columns"),
    "ragged": (b"step,norm\n1,0.5\n2\n", "line 3: 1 cells; must be 2"),
    "open quote": (b'step,norm\n1,"0.5\n2,3\n', "no CSV"),
    "a name twice": (b"norm,norm\n1,2\n", "column names must differ; got 'norm' twice"),
    "words": (b"norm\n0.5\n\nabc\n", "line 4: 'norm' must be a number >= 0, nan, inf, or empty"),
    "negative": (b"norm\n0.5\n-0.5\n", "line 3: 'norm' must be a number >= 0"),
    "minus infinity": (b"norm\n0.5\n-inf\n", "line 3: 'norm' must be a number >= 0"),
    "nothing but nan": (b"norm\nnan\nNaN\n", "must have a norm that is finite and above 0"),
    "nothing but zeros": (b"norm\n0\n0.0\n", "must have a norm that is finite and above 0"),
    "nothing logged": (b"step,norm\n1,\n2,\n", "must have a norm that is finite and above 0"),
    "no norm": (b"step,loss\n1,2\n", "no column has the name of a gradient norm"),
    "two norms": (
        b"a/norm,b/grad_norm,x\n1,2,3\n",
        "gradient norm; give the name of one as column: a/norm, b/grad_norm\n",
    ),
    "a JSON array": (b' [{"norm": 1}]\n', "begins with '[', as a JSON array does; allowed are CSV"),
    "no JSON": (b'{"norm": 1}\n{"norm": \n', "line 2: must be one JSON object"),
    "an array": (b'{"norm": 1}\n[1, 2]\n', "line 2: must be one JSON object"),
    "deep": (b'{"norm": ' + b"[" * 100_000, "line 1: must be one JSON object"),
    "a list": (b'{"norm": [1]}\n', "line 1: 'norm' must be a number >= 0"),
    "a bool": (b'{"norm": true}\n', "line 1: 'norm' must be a number >= 0"),
    "huge integer": (b'{"norm": 1' + b"0" * 400 + b"}\n", "line 1: 'norm' must be a number >= 0"),
    "mixed": (b"step,norm\n1,1\n1,2\n1,3\n", "'step' must rise within a run"),
    "few": (b"norm\n1\n2\n3\n", "a clip_rate of 0.5 takes 40 norms"),
}  # fmt: skip


def is_one_sentence(path, case, out, err):
    assert not out
    assert err.startswith("optaxclip: ")
    assert BAD[case][1] in err
    assert case == "few" or str(path) in err
    assert err.count("\n") == 1


def written(path, case):
    if BAD[case][0] is not None:
        path.write_bytes(BAD[case][0])
    return path


@pytest.mark.parametrize("case", BAD)
def test_bad_files(case, tmp_path, capsys):
    """Each is one sentence that names the file, and the exit status is 2."""
    path = written(tmp_path / "run.csv", case)
    assert main(["advise", str(path)]) == 2
    is_one_sentence(path, case, *capsys.readouterr())


@pytest.mark.parametrize("case", ["missing", "binary", "deep"])
def test_bad_files_in_a_process(case, tmp_path):
    """It is the same for who types the command."""
    path = written(tmp_path / "run.csv", case)
    done = run("advise", path, cwd=tmp_path)
    assert done.returncode == 2
    is_one_sentence(path, case, done.stdout, done.stderr)


def test_a_folder_without_event_files(tmp_path, capsys):
    """It is no log."""
    assert main(["advise", str(tmp_path)]) == 2
    assert "is a folder without TensorBoard event files" in capsys.readouterr().err


WRONG = {
    "column": (["--column", "gradnorm"], "no column 'gradnorm'; columns are clipper, seed, step"),
    "where": (["--where", "colour=red"], "no column 'colour'; columns are clipper, seed, step"),
    "value": (["--where", "clipper=x"], "no row has clipper=x; it is one of none, global_norm"),
    "run": (["--run", "3"], "run must be from 1 to 2; got 3"),
    "text column": (["--column", "clipper"], "line 2: 'clipper' must be a number >= 0"),
    "rate": (["--clip-rate", "0.7"], "clip_rate must be a number from 0 to 0.5"),
    "small rate": (["--clip-rate", "0.01"], "a clip_rate of 0.01 takes 2000 norms"),
    "picture": (["--plot", "picture.xyz"], "xyz"),
    "no format": (["--plot", "picture"], "path must end in what format it has, such as .png; got"),
    "where twice": (
        ["--where", "seed=0", "--where", "clipper=none", "--where", "seed=1"],
        "--where must name each column once; got 'seed' twice",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_arguments(case, capsys, monkeypatch, tmp_path):
    """Each is one sentence that says what is allowed."""
    monkeypatch.chdir(tmp_path)
    words, expected = WRONG[case]
    assert main(["advise", str(DATA), *words]) == 2
    err = capsys.readouterr().err
    assert expected in err
    assert err.count("\n") == 1


def test_without_matplotlib(tmp_path):
    """What to install for a picture is said."""
    program = f"""
import sys
sys.modules["matplotlib"] = sys.modules["matplotlib.figure"] = None
from optaxclip.command import main
sys.exit(main(["advise", {str(DATA)!r}, "--plot", "advice.png"]))
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert done.returncode == 2
    assert "a picture takes Matplotlib: pip install 'optaxclip[plot]'" in done.stderr
    assert "Traceback" not in done.stderr
