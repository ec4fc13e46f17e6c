"""file --> rows: a log as it was written, with the line that each row is in."""

from __future__ import annotations

import csv
import importlib
import io
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

Cell = Any  # str, int, float, or None where nothing was logged
Row = tuple[int, dict[str, Cell]]  # a line, and the cells by column

ALLOWED = "allowed are CSV with a header, JSONL, and TensorBoard event files or a folder of them"
EVENTS = "tfevents"  # in the name of every event file
MEMORY = "the log"  # what a log in memory is called
MOST_SHOWN = 12  # names in an error


class Log(NamedTuple):
    """Rows of a log, by column."""

    source: str  # where it was read, for people
    columns: dict[str, list[Cell]]  # a cell per row
    lines: list[int]  # that the rows are in, counted from 1; of event files and memory, rows

    def rows(self, chosen: Iterable[int]) -> Log:
        """Some of the rows."""
        own = list(chosen)
        columns = {name: [cells[i] for i in own] for name, cells in self.columns.items()}
        return Log(self.source, columns, [self.lines[i] for i in own])

    def known(self, name: str) -> str:
        """The name of a column, if there is such a one."""
        if name not in self.columns:
            raise ValueError(
                f"{self.source}: no column {name!r}; columns are {listed(self.columns)}"
            )
        return name


def read_log(log: Any) -> Log:
    """Reads all rows of a log.

    Args:
      log: the path of a file, or of a folder of event files; or a log in memory: a sequence of
        dicts, one per step; a dict of columns; or a sequence of norms.

    Returns:
      A :class:`Log`. Dicts in dicts are flat in it, as "train/grad_norm". Of event files, each is
      named in a column "file".

    Raises:
      FileNotFoundError: if there is no such file.
      ModuleNotFoundError: if reading it takes TensorBoard, and that is not installed.
      TypeError: if a log in memory is none of these.
      ValueError: if a file is not what it should be; says where, and what is allowed.

    Example:
      >>> log = read_log([{"step": 1, "train": {"norm": 0.5}}, {"step": 2}])
      >>> log.columns
      {'step': [1, 2], 'train/norm': [0.5, None]}
    """
    if not isinstance(log, str | os.PathLike):
        return _collected(MEMORY, enumerate(_in_memory(log), 1))
    path = Path(log)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file; {ALLOWED}")
    if path.is_dir() or EVENTS in path.name:
        return _collected(str(path), _event_rows(path))
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text:
        raise ValueError(f"{path} is no text; {ALLOWED}")
    if text.lstrip().startswith("["):
        raise ValueError(f"{path} begins with '[', as a JSON array does; {ALLOWED}")
    rows = _json_rows if text.lstrip().startswith("{") else _csv_rows
    return _collected(str(path), rows(path, text))


def number(cell: Cell) -> float | None:
    """A cell as a number; None if it is not."""
    if cell is None or isinstance(cell, bool):
        return None
    try:
        return float(cell)
    except (ValueError, TypeError, OverflowError):
        return None


def listed(names: Iterable[Any]) -> str:
    """Names in an error, not too many."""
    every = list(map(str, names))
    more = [f"and {len(every) - MOST_SHOWN} more"] if len(every) > MOST_SHOWN else []
    return ", ".join([*every[:MOST_SHOWN], *more])


def _collected(source: str, rows: Iterable[Row]) -> Log:
    """Rows as columns; what a row lacks is None."""
    numbered = list(rows)
    if not numbered:
        raise ValueError(f"{source} is empty: a log must have a row for every step; {ALLOWED}")
    names = dict.fromkeys(name for _, cells in numbered for name in cells)
    columns = {name: [cells.get(name) for _, cells in numbered] for name in names}
    return Log(source, columns, [line for line, _ in numbered])


def _csv_rows(path: Path, text: str) -> Iterator[Row]:
    first = text.lstrip().partition("\n")[0]
    delimiter = max(",\t;", key=first.count)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    header: list[str] = []
    try:
        for cells in reader:
            if not cells:
                continue
            if not header:
                header = _header(path, reader.line_num, [name.strip() for name in cells])
                continue
            if len(cells) != len(header):
                raise ValueError(
                    f"{path}, line {reader.line_num}: {len(cells)} cells; must be "
                    f"{len(header)}, as many as in the header"
                )
            named = zip(header, map(str.strip, cells), strict=True)
            yield reader.line_num, {name: cell or None for name, cell in named}
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.line_num}: no CSV ({error})") from None


def _header(path: Path, line: int, names: list[str]) -> list[str]:
    if all(number(name) is not None for name in names):
        raise ValueError(
            f"{path}, line {line}: the first line must name the columns, such as "
            f"step,norm; got {listed(names)}"
        )
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{path}, line {line}: column names must differ; got {twice!r} twice")
    return names


def _json_rows(path: Path, text: str) -> Iterator[Row]:
    # Not splitlines, which takes what a string may hold, such as U+2028, for the end of a line.
    for line, words in enumerate(text.split("\n"), 1):
        if not words.strip():
            continue
        row = _object(words)
        if row is None:
            raise ValueError(
                f"{path}, line {line}: must be one JSON object, such as "
                f'{{"step": 1, "norm": 0.5}}; got {words.strip()[:60]}'
            )
        yield line, dict(_flat(row))


def _object(words: str) -> dict[str, Cell] | None:
    try:
        found = json.loads(words)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _flat(row: Mapping[Any, Any], front: str = "") -> Iterator[tuple[str, Cell]]:
    for name, cell in row.items():
        if isinstance(cell, Mapping):
            yield from _flat(cell, f"{front}{name}/")
        else:
            yield f"{front}{name}", cell


def _event_rows(path: Path) -> Iterator[Row]:
    """The scalars of event files, a row for each step of each file."""
    files = sorted(path.rglob(f"*{EVENTS}*")) if path.is_dir() else [path]
    if not files:
        raise ValueError(f"{path} is a folder without TensorBoard event files; {ALLOWED}")
    try:
        # By name, as TensorBoard has no types.
        loader = importlib.import_module("tensorboard.backend.event_processing.event_file_loader")
        tensors = importlib.import_module("tensorboard.util.tensor_util")
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            f"{path}: reading event files takes TensorBoard, pip install tensorboard"
        ) from None
    line = 0
    for file in files:
        name = file.relative_to(path).as_posix() if path.is_dir() else file.name
        row: dict[str, Cell] = {}
        for event in loader.EventFileLoader(str(file)).Load():
            for value in event.summary.value:
                found = tensors.make_ndarray(value.tensor)
                if found.size != 1 or found.dtype.kind not in "fiu":
                    continue
                if row.get("step") != event.step or value.tag in row:
                    if row:
                        line += 1
                        yield line, row
                    row = {"file": name, "step": event.step}
                row[value.tag] = found.item()
        if row:
            line += 1
            yield line, row


def _in_memory(log: Any) -> list[dict[str, Cell]]:
    allowed = (
        "a log must be a path, a sequence of dicts of numbers, a dict of columns of one length, "
        "or a sequence of norms"
    )
    if isinstance(log, Mapping):
        columns = {str(name): np.asarray(cells) for name, cells in log.items()}
        shapes = {cells.shape for cells in columns.values()}
        if len(shapes) != 1 or len(next(iter(shapes))) != 1:
            raise ValueError(f"{allowed}; got columns of shapes {listed(shapes)}")
        cells = zip(*(column.tolist() for column in columns.values()), strict=True)
        return [dict(zip(columns, row, strict=True)) for row in cells]
    if not isinstance(log, Iterable):
        raise TypeError(f"{allowed}; got {type(log).__name__}")
    rows = []
    for row in log:
        found = dict(_flat(row if isinstance(row, Mapping) else {"norm": row}))
        for name, cell in found.items():
            if np.ndim(cell) != 0:
                raise TypeError(f"{allowed}; got {name!r} of shape {np.shape(cell)}")
        rows.append({name: np.asarray(cell).item() for name, cell in found.items()})
    return rows
