"""Pictures show the numbers of the log, mark what happened, and leave no trace elsewhere."""

import itertools
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optaxclip
from optaxclip import plot
from optaxclip.logs import read_run

DATA = pathlib.Path(__file__).parent / "data" / "char_lm.csv"


def lived(tx, sizes):
    """The metrics of a transformation at every step, as a training loop logs them."""
    params = jnp.zeros(2)
    step = jax.jit(lambda grads, state: tx.update(grads, state, params))
    state, rows = tx.init(params), []
    for size in sizes:
        _, state = step(size * jnp.array([0.6, 0.8]), state)
        rows.append(optaxclip.metrics(state))
    return rows


def labelled(figure):
    """The lines of a figure by what the legend calls them, and the numbers they show."""
    found = {}
    for axes in figure.axes:
        for line in axes.get_lines():
            if not line.get_label().startswith("_"):
                found[line.get_label()] = line
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == list(found)
    return found


def wider(edges):
    """Edges that hold the smallest and the largest norm, which are edges themselves."""
    return np.concatenate([[edges[0] * (1 - 1e-12)], edges[1:-1], [edges[-1] * (1 + 1e-12)]])


def size_of(path):
    """Width and height of a PNG, out of its header."""
    head = path.read_bytes()[:24]
    assert head.startswith(b"\x89PNG")
    return int.from_bytes(head[16:20], "big"), int.from_bytes(head[20:24], "big")


def test_norms_of_a_clip(tmp_path):
    """Norms, limits and factors are those of the log; clipped and bad steps are marked."""
    sizes = np.array([0.5, 2.0, np.nan, 0.7, 4.0, np.inf, 1.0])
    rows = lived(optaxclip.clip_by_global_norm(1.5), sizes)
    figure = plot.norms(rows, path=tmp_path / "deep" / "norms.png")

    lines = labelled(figure)
    shown = np.where(np.isfinite(sizes), sizes, np.nan)
    np.testing.assert_allclose(lines["norm"].get_ydata(), shown, rtol=1e-6)  # float32
    np.testing.assert_array_equal(lines["limit"].get_ydata(), np.full(7, 1.5))
    np.testing.assert_array_equal(lines["clipped step (29 %)"].get_xdata(), [2, 5])
    np.testing.assert_array_equal(lines["norm not finite"].get_xdata(), [3, 6])
    factors = figure.axes[1].get_lines()[-1].get_ydata()
    np.testing.assert_allclose(factors, [1, 0.75, 0, 1, 0.375, 0, 1], rtol=1e-6)
    assert size_of(tmp_path / "deep" / "norms.png")[0] == 1600


def test_norms_of_a_skipped_step():
    """Around a clip, `skip_step` has the norms and the limits, and the clip inside the factors."""
    sizes = [1.0, 1.1, 0.9, 1.0, 50.0, np.nan, 1.0]
    rows = lived(optaxclip.skip_step(optaxclip.clip_by_global_norm(1.05), norm=10.0), sizes)
    figure = plot.norms(rows, column="skip/norm")

    lines = labelled(figure)
    np.testing.assert_array_equal(lines["skipped step (29 %)"].get_xdata(), [5, 6])
    np.testing.assert_array_equal(lines["limit"].get_ydata(), np.full(7, 10.0))
    np.testing.assert_array_equal(lines["norm not finite"].get_xdata(), [6])
    assert [axes.get_ylabel() for axes in figure.axes] == ["gradient norm", "factor"]
    assert np.min(figure.axes[1].get_lines()[-1].get_ydata()) == pytest.approx(1.05 / 1.1)


def test_all_kinds_of_logs_are_one_picture(tmp_path):
    """Dicts, columns, norms and a file give the same line."""
    sizes = [0.5, 2.0, 1.0]
    path = tmp_path / "run.csv"
    path.write_text("norm\n0.5\n2.0\n1.0\n")
    for log in ([{"norm": x} for x in sizes], {"norm": sizes}, sizes, path, read_run(path)):
        figure = plot.norms(log)
        np.testing.assert_array_equal(labelled(figure)["norm"].get_ydata(), sizes)
        assert len(figure.axes) == 1  # without factors, there is no panel for them


def test_a_norm_that_is_far_off_is_drawn_at_the_edge():
    """A run that diverges to 1e20 still shows what came before."""
    sizes = [1.0, 2.0, 1e20, 0.5, 1.0]
    figure = plot.norms(sizes)

    lines = labelled(figure)
    np.testing.assert_array_equal(lines["norm"].get_ydata(), [1, 2, np.nan, 0.5, 1])
    np.testing.assert_array_equal(lines["norm too large to show, up to 1.0e+20"].get_xdata(), [3])
    low, high = figure.axes[0].get_ylim()
    assert 0.1 < low < 0.5
    assert 2 < high < 10


def test_histogram_of_norms(tmp_path):
    """Every norm is in a bar, and the lines are NumPy's percentiles."""
    sizes = np.random.default_rng(0).lognormal(0, 0.5, 2000)
    advice = optaxclip.recommend_threshold(sizes)
    figure = plot.histogram([*sizes, np.nan, 0.0], advice=advice, path=tmp_path / "bars.png")

    bars = figure.axes[0].patches[0].get_data()
    assert bars.values.sum() == 2000
    np.testing.assert_array_equal(bars.values, np.histogram(sizes, bins=wider(bars.edges))[0])
    places = [line.get_xdata()[0] for line in labelled(figure).values()]
    np.testing.assert_allclose(places[:4], np.percentile(sizes, [50, 90, 95, 99]))
    assert places[4] == advice.limit
    assert size_of(tmp_path / "bars.png")[0] == 1600


def test_histogram_of_norms_that_are_far():
    """They are in the outermost bars, a hundred times the median away, and none is lost."""
    figure = plot.histogram([1e-9, *np.linspace(0.5, 2, 99), 1e9, 1e20])
    bars = figure.axes[0].patches[0].get_data()
    np.testing.assert_allclose(bars.edges[[0, -1]] / 1.25, [0.01, 100], rtol=0.02)
    assert (bars.values[0], bars.values[-1], bars.values.sum()) == (1, 2, 102)


def test_histogram_of_a_state():
    """The bins of a state are drawn as they are."""
    tx, params = optaxclip.observe_norms(), jnp.zeros(1)
    sizes = [0.3, 1.0, 1.1, 4.1, np.nan]
    state = tx.init(params)
    for size in sizes:
        _, state = tx.update(jnp.full(1, size), state)
    bars = plot.histogram({"held": state}).axes[0].patches[0].get_data()

    expected, _ = np.histogram(sizes[:4], bins=bars.edges)
    np.testing.assert_array_equal(bars.values, expected)
    assert bars.values.sum() == 4
    np.testing.assert_allclose(np.diff(np.log2(bars.edges)), 0.25, rtol=1e-6)
    assert bars.edges[0] <= 0.3 < bars.edges[1]


def test_histogram_refuses_a_state_of_several_norms_or_none():
    """A picture is of one histogram with something in it."""
    params = {"a": jnp.zeros(2), "b": jnp.zeros(2)}
    several = optaxclip.observe_norms(optaxclip.measure.leaf_norm()).init(params)
    with pytest.raises(ValueError, match=r"must keep one, that of the tree; this one has 2 at"):
        plot.histogram(several)
    with pytest.raises(ValueError, match=r"must have seen a norm"):
        plot.histogram(optaxclip.observe_norms().init(params))
    with pytest.raises(TypeError, match=r"advice must be a Advice, such as"):
        plot.histogram([1.0, 2.0], advice=1.0)


def test_recommendation(tmp_path):
    """Both panels have the limit of the advice, and the norms above it are marked."""
    norms = read_run(DATA).norms
    advice = optaxclip.recommend_threshold(norms, clip_rate=0.1)
    path = tmp_path / "advice.png"
    figure = plot.recommendation(DATA, clip_rate=0.1, path=path)

    lines = labelled(figure)
    np.testing.assert_array_equal(lines["norm"].get_ydata(), norms)
    above = lines["norm above the limit"].get_ydata()
    np.testing.assert_array_equal(np.isfinite(above), norms > advice.limit)
    assert set(lines[f"advised limit {advice.limit:.3g}"].get_ydata()) == {advice.limit}
    curve, point, _ = figure.axes[1].get_lines()
    assert (point.get_xdata()[0], point.get_ydata()[0]) == (10, advice.limit)
    assert np.all(np.diff(curve.get_xdata()) >= 0)
    assert np.all(np.diff(curve.get_ydata()) <= 0)
    assert figure.get_suptitle() == f"A limit of {advice.limit:.3g} clips 10 % of the next 25 steps"
    assert figure.axes[0].get_title(loc="left") == "char_lm.csv: clipper=none (drifting)"
    assert size_of(path)[0] == 1600


def test_a_path_that_does_not_say_its_format(tmp_path):
    """It is refused, and nothing is written."""
    with pytest.raises(ValueError, match=r"path must end in what format .*such as .png; got '.*x'"):
        plot.norms([1.0, 2.0], path=tmp_path / "deep" / "x")
    assert not list(tmp_path.iterdir())


def test_limits():
    """The limit of every clipper that was replayed is a line with dashes of its own."""
    sizes = np.random.default_rng(0).lognormal(0, 0.3, 60)
    clippers = {"fixed": optaxclip.clip_by_global_norm(1.5), "zclip": optaxclip.zclip()}
    found = {name: optaxclip.replay(sizes, tx).limit for name, tx in clippers.items()}
    lines = labelled(plot.limits(sizes, found))

    for name, limit in found.items():
        shown = np.where(np.isfinite(limit), limit, np.nan)
        np.testing.assert_allclose(lines[name].get_ydata(), shown, rtol=1e-6)
    assert lines["fixed"].is_dashed()
    assert len({line.get_linestyle() for line in lines.values()}) > 1
    with pytest.raises(
        ValueError, match=r"limits must be 60, one for each norm; got \(3,\) of 'x'"
    ):
        plot.limits(sizes, {"x": [1.0, 2.0, 3.0]})


def test_labels_do_not_collide():
    """Ticks of norms over a hundredth, a few and many decades are some, and apart."""
    for deviation in (0.0, 0.002, 0.3, 2.0, 6.0):
        sizes = np.random.default_rng(0).lognormal(0, deviation, 300)
        figure = plot.recommendation(sizes, clip_rate=0.1)
        figure.draw_without_rendering()
        for axis in (figure.axes[0].yaxis, figure.axes[1].xaxis):
            low, high = sorted(axis.get_view_interval())
            labels = [
                tick.label1
                for tick in axis.get_major_ticks()
                if low <= tick.get_loc() <= high and tick.label1.get_text()
            ]
            boxes = [label.get_window_extent() for label in labels]
            assert len(boxes) >= 2, deviation
            assert not any(a.overlaps(b) for a, b in itertools.pairwise(boxes)), deviation


def test_nothing_else_changes():
    """No window, no pyplot, no setting; and without Matplotlib the package still imports."""
    program = """
import sys, optaxclip
from optaxclip import plot
assert "matplotlib" not in sys.modules
import matplotlib
names = set(matplotlib.rcParams) - {"backend"}  # which would import pyplot, when asked for
before = {name: matplotlib.rcParams[name] for name in names}
plot.norms([1.0, 2.0])
assert {name: matplotlib.rcParams[name] for name in names} == before
assert "matplotlib.pyplot" not in sys.modules
"""
    subprocess.run([sys.executable, "-W", "error", "-c", program], check=True)
