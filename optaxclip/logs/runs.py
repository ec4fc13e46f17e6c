"""rows --> one run: its norms, and what was logged beside them.

Where steps rise from the first row to the last, all is one run. Else, rows that agree in what names
a run (a seed, any column of words with few values) belong together, and a step that does not rise
begins another run.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from .reading import Cell, Log, listed, number, read_log

# The last part of a name, as of "train/grad_norm".
NORMS = {
    "norm", "grad_norm", "gradnorm", "gnorm", "gradient_norm", "grads_norm", "global_norm",
    "global_grad_norm", "grad_global_norm", "grad_norm_global", "gradient_global_norm",
    "total_norm",
}  # fmt: skip
COUNT = "steps"  # of a clip; stays where it was while `skip_step` skips
STEPS = ("step", "_step", "global_step", "train_step", "iteration", "iter", COUNT)
RUNS = {"seed", "run", "run_id", "run_name", "trial", "experiment"}


class Run(NamedTuple):
    """What was logged of one run, in the steps in which its norm was."""

    source: str  # where it was read, for people
    column: str  # that the norms are in
    label: str  # what tells it from other runs, "clipper=none, seed=0"; "" if it is alone
    labels: list[str]  # of all runs there, this one too, in their order
    columns: dict[str, np.ndarray]  # (n,) float64 each, NaN where nothing was logged

    @property
    def norms(self) -> np.ndarray:
        """(n,) float64, in their order; inf and NaN included."""
        return self.columns[self.column]

    @property
    def steps(self) -> np.ndarray:
        """(n,) float64, as logged; or else counted from 1."""
        name = _step_column(self.columns, self.column)
        logged = self.columns[name] if name else np.array(np.nan)
        return logged if np.all(np.isfinite(logged)) else np.arange(1.0, len(self.norms) + 1)

    def beside(self, name: str) -> np.ndarray | None:
        """Another metric: of "0/norm", "0/limit"; or else the only one; None without one."""
        place = self.column.removesuffix(_last(self.column))
        found = [other for other in self.columns if _last(other) == name]
        own = place + name if place + name in found else found[0] if len(found) == 1 else ""
        return self.columns.get(own)


def read_run(
    log: Any,
    *,
    column: str | None = None,
    where: Mapping[str, Any] | None = None,
    run: int | None = None,
) -> Run:
    """Reads the norms of one run.

    Args:
      log: what :func:`~optaxclip.logs.read_log` reads: a path, a sequence of dicts, a dict of
        columns or a sequence of norms.
      column: the one with the norms before clipping. None: "norm", or else the only one whose last
        part is a usual name of a gradient norm, as in "train/grad_norm".
      where: by column, the value that rows must have.
      run: which run of those rows, counted from 1. None: the longest, and of equal ones the first.

    Returns:
      A :class:`Run`.

    Raises:
      FileNotFoundError, ModuleNotFoundError, TypeError: as :func:`~optaxclip.logs.read_log`.
      ValueError: if the log cannot be read, if there is no such column, row or run, if a norm is
        negative or no number, or none is finite and above 0.

    Example:
      >>> rows = [{"seed": seed, "norm": seed + n} for seed in (0, 1) for n in (1.0, 2.0, 3.0)]
      >>> read_run(rows).labels
      ['seed=0', 'seed=1']
      >>> print(read_run(rows, where={"seed": 1}).norms)
      [2. 3. 4.]
    """
    where = where or {}
    found = _chosen(read_log(log), where)
    column = _norm_column(found) if column is None else found.known(column)
    found = found.rows(i for i, cell in enumerate(found.columns[column]) if cell is not None)
    _judge(found, column)
    chosen = [f"{name}={value}" for name, value in where.items()]
    runs = {
        ", ".join(filter(None, (*chosen, label))): rows
        for label, rows in _runs(found, column).items()
    }
    lengths = [len(rows) for rows in runs.values()]
    place = lengths.index(max(lengths)) + 1 if run is None else run
    if not 1 <= place <= len(runs):
        raise ValueError(f"{found.source}: run must be from 1 to {len(runs)}; got {run}")
    label = list(runs)[place - 1]
    columns = {
        name: cells
        for name, texts in found.rows(runs[label]).columns.items()
        if (cells := _floats(texts)) is not None
    }
    return Run(found.source, column, label, list(runs), columns)


def _last(name: str) -> str:
    return name.rpartition("/")[-1]


def _norm_column(log: Log) -> str:
    if "norm" in log.columns:
        return "norm"
    found = [name for name in log.columns if _last(name).lower() in NORMS]
    if len(found) != 1:
        which = "several columns have" if found else "no column has"
        raise ValueError(
            f"{log.source}: {which} the name of a gradient norm; give the name of one as column: "
            f"{listed(found or log.columns)}"
        )
    return found[0]


def _step_column(names: Iterable[str], column: str) -> str | None:
    """The column that counts steps; of several with one name, that beside the norms."""
    place = column.removesuffix(_last(column))
    found = sorted(names, key=lambda name: name.startswith(place))
    by_last = {_last(name).lower(): name for name in found}  # W&B writes "Step"
    return next((by_last[name] for name in STEPS if name in by_last), None)


def _judge(log: Log, column: str) -> None:
    """Refuses what is no norm, and a column without any."""
    some = False
    for line, cell in zip(log.lines, log.columns[column], strict=True):
        norm = number(cell)
        if norm is None or norm < 0:
            raise ValueError(
                f"{log.source}, line {line}: {column!r} must be a number >= 0, nan, inf, or empty "
                f"where it was not logged; got {str(cell)[:60]!r}"
            )
        some = some or 0 < norm < np.inf
    if not some:
        raise ValueError(
            f"{log.source}: {column!r} must have a norm that is finite and above 0; none of "
            f"{len(log.lines)} is"
        )


def _floats(cells: list[Cell]) -> np.ndarray | None:
    """A column as numbers, NaN where nothing was logged; None if it holds something else."""
    found = [np.nan if cell is None else number(cell) for cell in cells]
    return None if None in found else np.array(found, np.float64)


def _chosen(log: Log, where: Mapping[str, Any]) -> Log:
    for name, value in where.items():
        cells = log.columns[log.known(name)]
        own = [i for i, cell in enumerate(cells) if _same(cell, value)]
        if not own:
            raise ValueError(
                f"{log.source}: no row has {name}={value}; it is one of "
                f"{listed(dict.fromkeys(cells))}"
            )
        log = log.rows(own)
    return log


def _same(cell: Cell, value: Any) -> bool:
    as_number = number(value)
    return str(cell) == str(value) or (as_number is not None and number(cell) == as_number)


def _runs(log: Log, column: str) -> dict[str, list[int]]:
    """The rows of every run, by its label."""
    name = _step_column(log.columns, column)
    steps = _floats(log.columns[name]) if name else None
    least = 0 if name and _last(name).lower() == COUNT else np.finfo(np.float64).tiny
    if steps is not None and np.all(np.diff(steps) >= least):
        return {"": list(range(len(steps)))}
    names = [name for name in log.columns if name != column and _names_runs(log, name)]
    together: dict[str, list[int]] = {}
    for i in range(len(log.lines)):
        label = ", ".join(f"{name}={log.columns[name][i]}" for name in names)
        together.setdefault(label, []).append(i)
    runs: dict[str, list[int]] = {}
    for label, rows in together.items():
        parts = [rows] if steps is None else _rising(rows, steps, least)
        for part in parts:
            begin = f"from line {log.lines[part[0]]}" if len(parts) > 1 else ""
            runs[", ".join(filter(None, (label, begin)))] = part
    if len(runs) > max(1, len(log.lines) / 2):
        raise ValueError(
            f"{log.source}: {name!r} must rise within a run, and hardly ever does: choose the rows "
            f"of one run by the value of a column (where), out of {listed(log.columns)}"
        )
    return runs


def _names_runs(log: Log, name: str) -> bool:
    """Whether a column is a seed, a name or the like, with many rows for each of its values."""
    cells = log.columns[name]
    if None in cells or not 1 < len(set(map(str, cells))) <= len(cells) / 2:
        return False
    return _last(name).lower() in RUNS or all(number(cell) is None for cell in cells)


def _rising(rows: list[int], steps: np.ndarray, least: float) -> list[list[int]]:
    """The rows in parts; another one begins where the step does not rise enough."""
    falls = np.flatnonzero(~(np.diff(steps[rows]) >= least)) + 1
    return [part.tolist() for part in np.split(np.array(rows), falls)]
