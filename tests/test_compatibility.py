"""The compatibility matrix of matrix.py, cell by cell."""

import re

import jax
import jax.numpy as jnp
import matrix
import optax
import pytest
from checks import frameworks, leaves, states, transformations, wrappers
from roster import Variant

WHOLE = [(name, variant) for variant in matrix.ROWS for name in matrix.CHECKS]
QUICK = matrix.quick()
REST = sorted(set(WHOLE) - set(QUICK), key=WHOLE.index)


@pytest.mark.parametrize(("check", "variant"), QUICK)
def test_cell(check, variant):
    """A variant passes a check, or fails with the very error that the table says."""
    matrix.outcome(matrix.CHECKS[check], variant)


@pytest.mark.proof
@pytest.mark.parametrize(("check", "variant"), REST)
def test_other_cell(check, variant):
    """So it is for the cells that an ordinary run leaves out."""
    matrix.outcome(matrix.CHECKS[check], variant)


def test_an_ordinary_run_covers_every_check_and_variant():
    """Every check meets a variant that learns and one that does not; the cheap ones meet all."""
    met = {name: {v for n, v in QUICK if n == name} for name in matrix.CHECKS}
    for group in (matrix.FIXED, matrix.LEARNING):
        assert all(variants & set(group) for variants in met.values())
    assert sum(variants == set(matrix.ROWS) for variants in met.values()) > 10


def test_every_check_is_in_the_table():
    """A function in the files of checks that is public and documented is a row, under its name."""
    named = {
        name
        for module in (transformations, wrappers, frameworks, leaves, states)
        for name, value in vars(module).items()
        if getattr(value, "__module__", None) == module.__name__ and re.match("[a-z]", name)
    }
    assert named - {"by_hand", "optimizer"} == matrix.CHECKS.keys()


def naive(max_norm=1.0):
    """A clip as one would first write it."""

    def update(grads, state, params=None):
        norm = jnp.sqrt(sum(jnp.sum(g**2) for g in jax.tree.leaves(grads)))
        clipped = lambda g: jnp.where(norm < max_norm, g, g / norm * max_norm)
        return jax.tree.map(clipped, grads), state

    return optax.GradientTransformation(lambda params: (), update)


@pytest.mark.parametrize(
    ("check", "error"),
    [
        ("derivatives_at_zero", AssertionError),  # NaN
        ("promotion", ValueError),
        ("debug_nans", FloatingPointError),  # 0 / 0
        ("mixed_dtypes", ValueError),
        ("no_floats", ValueError),
        ("float0", TypeError),
        ("threshold_types", ValueError),  # NumPy's are strong
        ("traced_threshold", ValueError),
        ("schedule", TypeError),
    ],
)
def test_the_checks_find_what_is_wrong(check, error, monkeypatch):
    """A naive clip does not pass."""
    monkeypatch.setitem(matrix.ROWS, "naive", Variant(naive))

    with pytest.raises(error):
        matrix.outcome(matrix.CHECKS[check]._replace(no=()), "naive")


def test_a_cell_that_is_not_as_declared_is_an_error():
    """What fails undeclared fails, and so does what is declared not to work and does."""
    passes, fails = (lambda row: None), (lambda row: 1 / 0)
    why = matrix.No("no reason", ZeroDivisionError, "division by zero")

    assert matrix.outcome(matrix.own(passes), "zclip") == "ok"
    assert matrix.outcome(matrix.own(fails, why), "zclip") == "no: no reason"
    with pytest.raises(ZeroDivisionError):
        matrix.outcome(matrix.own(fails), "zclip")
    with pytest.raises(ZeroDivisionError):
        matrix.outcome(matrix.own(fails, why._replace(says="overflow")), "zclip")
    with pytest.raises(AssertionError, match="it works now"):
        matrix.outcome(matrix.own(passes, why), "zclip")
