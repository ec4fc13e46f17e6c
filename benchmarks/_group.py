"""One group of runs: all candidates on one tree with one optimizer, and a row for each."""

from __future__ import annotations

import contextlib
import datetime as dt
import itertools
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
from _candidates import BARE, BARE_AGAIN, FIXED, OPTAX_AGAIN, Candidate
from _measure import Eager, Job, World, bandwidth, bytes_of, interleaved, mesh_of, ratio
from _torch import BARE as TORCH_BARE
from _torch import CLIP as TORCH_CLIP
from _torch import torch_jobs
from _trees import Shapes, count

Row = dict[str, Any]
Tick = Callable[[str], None]

MOST_COPIED = 2**26  # entries: copies of what fits into a cache are faster, so of the tree's size
EAGER_SECONDS = 30.0  # of all rounds of eager calls: some take a second each
PROFILED = 3  # steps of each candidate in a trace


class Group(NamedTuple):
    """What all candidates of it share."""

    tree: str
    shapes: Shapes
    dtype: str
    optimizer: str
    devices: int


class How(NamedTuple):
    """How much is measured."""

    rounds: int
    seconds: float
    compiles: int
    peers: bool
    eager: bool
    profile: Path | None
    beside: Path | None


class Times(NamedTuple):
    """By candidate, in seconds: per step and per eager call in each round; per compilation."""

    steps: dict[str, list[float]]
    eager: dict[str, list[float]]
    lower: dict[str, float]
    compile: dict[str, float]


def run_group(group: Group, candidates: list[Candidate], how: How, tick: Tick) -> list[Row]:
    """Measures all candidates on one tree with one optimizer.

    Args:
      group: the tree, the optimizer and the devices.
      candidates: what to measure, the bare step first.
      how: how often.
      tick: called with a name as each candidate is compiled, and after each round.

    Returns:
      A row for each candidate; for one that cannot run, with the error.
    """
    mesh = mesh_of(group.devices)
    with turn(how.beside, alone=False):
        world = World(group.shapes, group.dtype, group.optimizer, mesh)
        jobs, rows = prepare(world, candidates, tick)
        others = peers(group, rows) if how.peers else []
        lower, compile_ = compiled_again(jobs, how.compiles)
    with turn(how.beside, alone=True):
        speed = bandwidth(min(count(group.shapes), MOST_COPIED), mesh)
        steps = interleaved([*jobs, *others], how.rounds, how.seconds, tick)
        # Not on a CPU that is several devices: eager operations start at once, and wait for ever.
        called = [job for job in jobs if job.candidate.make and how.eager and not world.pretended]
        calls = [Eager(job) for job in called]
        eager = interleaved(calls, max(3, how.rounds // 3), EAGER_SECONDS, tick)
        if how.profile:
            trace(jobs, how.profile / f"{group.tree}-{group.optimizer}-{group.dtype}")
    times = Times(steps, eager, lower, compile_)
    by_name = {job.name: job for job in jobs}
    for job in jobs:
        rows[job.name] = own_row(job, by_name[BARE.name], times, speed)
        rows[job.name] |= compared(job, by_name, times)
        if how.beside:  # others compiled meanwhile
            rows[job.name].pop("compile_added_over_optax", None)
    for job in others:
        rows[job.name] = step_row(steps[job.name], steps[TORCH_BARE])
    common = shared(group, steps, speed)
    return [{**common, "candidate": name, **row} for name, row in rows.items()]


def shared(group: Group, steps: dict[str, list[float]], speed: dict[str, float]) -> Row:
    """What is the same in all rows of a group."""
    return {
        "tree": group.tree,
        "leaves": len(group.shapes),
        "parameters": count(group.shapes),
        "dtype": group.dtype,
        "optimizer": group.optimizer,
        "devices": group.devices,
        "rounds": len(steps[BARE.name]),
        "noise": noise(steps),
        "copy_gb_per_s": speed["copy"] / 1e9,
        "read_gb_per_s": speed["read"] / 1e9,
        "date": dt.datetime.now(tz=dt.UTC).date().isoformat(),
    }


def prepare(
    world: World, candidates: list[Candidate], tick: Tick
) -> tuple[list[Job], dict[str, Row]]:
    """The candidates that run, compiled; and of those that do not, the error."""
    jobs: list[Job] = []
    failed: dict[str, Row] = {}
    Job(candidates[0], world).compile()  # the first of all pays for what JAX loads lazily
    for candidate in candidates:
        tick(candidate.name)
        try:
            job = Job(candidate, world)
            twins = [each for each in jobs if job.name == f"{each.name} again"]
            if twins:  # one program under two names
                job.take(twins[0])
            else:
                job.compile()
            job.sample(1)
            jobs.append(job)
        except Exception as error:  # noqa: BLE001 - whatever stops a candidate is what its row says
            failed[candidate.name] = {"error": sentence(error)}
            world.restart()
    return jobs, failed


def peers(group: Group, rows: dict[str, Row]) -> list[Any]:
    """The steps of PyTorch; or none, and in its row the error."""
    try:
        return torch_jobs(group.shapes, group.dtype, group.optimizer)
    except Exception as error:  # noqa: BLE001 - whatever stops a peer is what its row says
        rows[TORCH_CLIP] = {"error": sentence(error)}
        return []


@contextlib.contextmanager
def turn(file: Path | None, *, alone: bool) -> Iterator[None]:
    """Waits until no other run with this file is alone, or, to be alone, until none is in a turn.

    Compiling is most of a run where a device is fast, and takes one core of many; what is timed
    has the whole machine.
    """
    if file is None:
        yield
        return
    import fcntl  # noqa: PLC0415 - Windows has none

    with file.open("a") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        yield


def compiled_again(jobs: list[Job], compiles: int) -> tuple[dict[str, float], dict[str, float]]:
    """The median seconds of lowering and of compiling, all candidates in turn."""
    for job in [*jobs] * (compiles - 1):
        if not job.taken:
            job.compile()
    return (
        {job.name: statistics.median(job.lowering) for job in jobs},
        {job.name: statistics.median(job.compiling) for job in jobs},
    )


def step_row(own: list[float], bare: list[float]) -> Row:
    """What is known of every step that ran."""
    return {"step_ms": 1e3 * statistics.median(own), "over_bare": ratio(own, bare)._asdict()}


def own_row(job: Job, bare: Job, times: Times, speed: dict[str, float]) -> Row:
    """What a job is by itself, and beside the limit: the bare step and one read of gradients."""
    own, plain = times.steps[job.name], times.steps[bare.name]
    gradients = bytes_of(job.world.grads)
    moved, least = job.moved_bytes(), bare.moved_bytes()
    transfers = 1 + gradients / least  # 4 / 3 for SGD, 8 / 7 for AdamW
    with_read = [t + gradients / speed["read"] for t in plain]
    by_transfers = ratio(own, plain).median / transfers
    by_bandwidth = ratio(own, with_read).median
    seconds = statistics.median(own)
    return {
        **step_row(own, plain),
        "lower_s": times.lower[job.name],
        "compile_s": times.compile[job.name],
        "limit_by_transfers_ms": 1e3 * statistics.median(plain) * transfers,
        "limit_by_bandwidth_ms": 1e3 * statistics.median(with_read),
        "over_limit_by_transfers": by_transfers,
        "over_limit_by_bandwidth": by_bandwidth,
        # Muon computes more than it moves.
        "over_limit": by_bandwidth if job.world.name == "muon" else by_transfers,
        "gradient_bytes": gradients,
        "moved_bytes": moved,
        "gb_per_s": moved / seconds / 1e9,
        "of_copy": moved / seconds / speed["copy"],
        **job.analysis(),
    }


def compared(job: Job, jobs: dict[str, Job], times: Times) -> Row:
    """What a job is beside others: the bare step, the clipper it replaces, the fixed limit."""
    row: Row = {"twin": job.candidate.twin}
    name, twin, bare = job.name, job.candidate.twin, jobs[BARE.name]
    if job.temp_bytes is not None:
        row["extra_temp"] = (job.temp_bytes - bare.temp_bytes) / bytes_of(job.world.grads)
    if name in times.eager:
        row["eager_ms"] = 1e3 * statistics.median(times.eager[name])
    added = {n: times.lower[n] + times.compile[n] - total(times, BARE.name) for n in times.lower}
    row["compile_added_s"] = added[name]
    if twin in jobs:
        row["over_optax"] = ratio(times.steps[name], times.steps[twin])._asdict()
        if name in times.eager:
            row["eager_over_optax"] = ratio(times.eager[name], times.eager[twin])._asdict()
        if added[twin] > 0:
            row["compile_added_over_optax"] = added[name] / added[twin]
    if job.candidate.tree_wide and FIXED in jobs:
        row["over_fixed"] = ratio(times.steps[name], times.steps[FIXED])._asdict()
    return row


def total(times: Times, name: str) -> float:
    """Seconds from a function to a program."""
    return times.lower[name] + times.compile[name]


def noise(steps: dict[str, list[float]]) -> float:
    """How far a ratio may be from 1 for nothing: that of two equal steps is, at 95 % confidence."""
    plain = OPTAX_AGAIN.removesuffix(" again")
    pairs = [(BARE_AGAIN.name, BARE.name), (OPTAX_AGAIN, plain)]
    known = [ratio(steps[a], steps[b]) for a, b in pairs if a in steps and b in steps]
    return max(abs(edge - 1) for each in known for edge in (each.low, each.high))


def trace(jobs: list[Job], folder: Path) -> None:
    """Writes a profiler trace in which every candidate's steps have its name."""
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0  # Python's own calls are most of what it would write
    with jax.profiler.trace(str(folder), profiler_options=options):
        for job, _ in itertools.product(jobs, range(PROFILED)):
            with jax.profiler.TraceAnnotation(job.name):
                job.sample(1)


def sentence(error: Exception) -> str:
    """The kind of an error, and the first line of what it says."""
    first = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {first[:200]}"
