"""How a step is measured: compiled, analysed, and timed in turn with all others."""

from __future__ import annotations

import concurrent.futures
import contextlib
import gc
import os
import random
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol

import _hlo
import jax
import jax.numpy as jnp
import numpy as np
import optax
from _candidates import OPTIMIZERS, Candidate
from _trees import Shapes, draw, place
from jax.sharding import Mesh, NamedSharding, PartitionSpec

WARMUP = 2  # rounds that are not counted
SAMPLE = 0.02  # seconds that one sample of the bare step should take, so that the clock is no noise
GRADIENTS, WEIGHTS = 2.0, 0.02  # the spread of their entries: every clip here has work to do


def cores() -> int:
    """Those that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def bytes_of(tree: Any) -> int:
    """The size of all arrays in a tree."""
    return sum(x.nbytes for x in jax.tree.leaves(tree))


class World:
    """What all candidates work on, in turn: the same parameters, moments and gradients.

    So there is memory for one of each, whatever the number of candidates, and all find their data
    at the same addresses.
    """

    def __init__(self, shapes: Shapes, dtype: str, optimizer: str, mesh: Mesh | None) -> None:
        self.name, self.mesh = optimizer, mesh
        self.pretended = mesh is not None and jax.default_backend() == "cpu"
        self.optimizer = OPTIMIZERS[optimizer]()
        self._draw = lambda scale, seed: draw(shapes, dtype, scale, seed, mesh)
        self.grads = self._draw(GRADIENTS, 1)
        self.restart()

    def restart(self) -> None:
        """Begins training anew, as a failed step may have given its buffers away."""
        self.params: Any = self._draw(WEIGHTS, 0)
        self.state = self.settled(self.optimizer.init(self.params))

    def settled(self, state: Any) -> Any:
        """A state whose every leaf is on the mesh, where there is one."""
        if self.mesh is None:
            return state
        whole = NamedSharding(self.mesh, PartitionSpec())
        on_mesh = lambda x: isinstance(x.sharding, NamedSharding)
        return jax.tree.map(lambda x: x if on_mesh(x) else jax.device_put(x, whole), state)


class Timed(Protocol):
    """What can be timed beside others."""

    name: str

    def sample(self, calls: int) -> float:
        """The seconds per call of so many steps in a row."""


class Job:
    """A candidate at work: its compiled step, its own state, and what was measured of it."""

    def __init__(self, candidate: Candidate, world: World) -> None:
        self.candidate, self.world, self.name = candidate, world, candidate.name
        self.clip = candidate.make() if candidate.make else optax.identity()
        self.own = world.settled(self.clip.init(world.params))
        self.shares = candidate.place != "alone"
        self.lowering: list[float] = []  # seconds
        self.compiling: list[float] = []
        self.temp_bytes: int | None = None
        self.taken = False  # whether the program is that of another job

    def arguments(self, grads: Any) -> tuple[Any, ...]:
        """What the step is called with; the first three are donated."""
        return self.world.params, self.world.state if self.shares else (), self.own, grads

    def step(self, params: Any, state: Any, own: Any, grads: Any) -> tuple[Any, Any, Any]:
        """One step of training, from the gradients on."""
        updates = grads
        if self.candidate.place != "last" and self.candidate.jits:
            updates, own = self.clip.update(updates, own, params)
        if self.shares:
            updates, state = self.world.optimizer.update(updates, state, params)
        if self.candidate.place == "last":
            updates, own = self.clip.update(updates, own, params)
        return optax.apply_updates(params, updates), state, own

    def compile(self) -> None:
        """Compiles the step as if for the first time."""
        jax.clear_caches()
        gc.collect()
        arguments = self.arguments(self.world.grads)
        settings: dict[str, Any] = {"donate_argnums": (0, 1, 2)}
        if self.world.mesh is not None:  # what comes out goes in again
            settings["out_shardings"] = jax.tree.map(lambda x: x.sharding, arguments[:3])
        began = time.perf_counter()
        lowered = jax.jit(self.step, **settings).lower(*arguments)
        middle = time.perf_counter()
        self.compiled = lowered.compile()
        self.lowering.append(middle - began)
        self.compiling.append(time.perf_counter() - middle)
        memory = self.compiled.memory_analysis()
        self.temp_bytes = getattr(memory, "temp_size_in_bytes", None)

    def take(self, other: Job) -> None:
        """Takes the program of another job, which has the same step."""
        self.compiled, self.temp_bytes, self.taken = other.compiled, other.temp_bytes, True
        self.lowering, self.compiling = other.lowering, other.compiling

    def sample(self, calls: int) -> float:
        """The seconds per step of so many in a row."""
        world = self.world
        began = time.perf_counter()
        for _ in range(calls):
            grads = world.grads
            if not self.candidate.jits:
                grads, _ = self.clip.update(grads, self.own, world.params)
            world.params, state, self.own = self.compiled(*self.arguments(grads))
            world.state = state if self.shares else world.state
            if world.pretended:
                # Started at once, programs with collectives wait for each other's threads for ever.
                jax.block_until_ready(world.params)
        jax.block_until_ready(world.params)
        return (time.perf_counter() - began) / calls

    def analysis(self) -> dict[str, Any]:
        """What XLA says of the compiled step, and what is counted in it."""
        cost = self.compiled.cost_analysis() or {}
        return {
            "flops": cost.get("flops"),
            "bytes": cost.get("bytes accessed"),
            "temp_bytes": self.temp_bytes,
            **_hlo.count(self.compiled.as_text())._asdict(),
        }

    def moved_bytes(self) -> int:
        """What a step must move: parameters and state both ways, gradients as often as read."""
        params, state, own, grads = self.arguments(self.world.grads)
        return 2 * bytes_of((params, state, own)) + self.candidate.reads * bytes_of(grads)


class Eager:
    """A clipper whose `update` is called outside `jit`, alone."""

    def __init__(self, job: Job) -> None:
        self.job, self.name = job, job.name

    def sample(self, calls: int) -> float:
        """The seconds per call of so many in a row."""
        world = self.job.world
        began = time.perf_counter()
        for _ in range(calls):
            out = self.job.clip.update(world.grads, self.job.own, world.params)
            jax.block_until_ready(out)
        return (time.perf_counter() - began) / calls


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """No garbage is collected meanwhile."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def interleaved(
    jobs: list[Any], rounds: int, seconds: float, tick: Callable[[str], None]
) -> dict[str, list[float]]:
    """Runs every job once per round, in an order drawn anew for each.

    Args:
      jobs: what to time; each ran before, so that nothing is compiled here.
      rounds: how many count, if time allows.
      seconds: after which no other round begins, beyond the fifth.
      tick: called after each round.

    Returns:
      By name, the seconds per step in every round.
    """
    order, times = random.Random(0), {job.name: [] for job in jobs}
    with undisturbed():
        calls = max(1, min(round(SAMPLE / jobs[0].sample(1)), 100)) if jobs else 0
        began = time.perf_counter()
        for i in range(WARMUP + rounds):
            for job in order.sample(jobs, len(jobs)):
                took = job.sample(calls)
                if i >= WARMUP:
                    times[job.name].append(took)
            tick(f"round {i + 1}")
            if time.perf_counter() - began > seconds and i + 1 >= WARMUP + min(rounds, 5):
                break
    return times


def mesh_of(devices: int) -> Mesh | None:
    """One axis over so many devices; none for one."""
    if devices == 1:
        return None
    kinds = (jax.sharding.AxisType.Auto,)  # Optax's clippers know no other
    return jax.make_mesh((devices,), ("data",), kinds, devices=jax.devices()[:devices])


class Ratio(NamedTuple):
    """How many times as long a step takes as another one in the same round."""

    median: float
    p25: float
    p75: float
    low: float  # the 95 % bootstrap interval of the median
    high: float


def ratio(times: list[float], reference: list[float]) -> Ratio:
    """Compares two steps round by round."""
    ratios = np.divide(times, reference)
    resampled = np.random.default_rng(0).choice(ratios, (1000, len(ratios)))
    interval = np.percentile(np.median(resampled, axis=1), [2.5, 97.5])
    return Ratio(*map(float, (*np.percentile(ratios, [50, 25, 75]), *interval)))


def bandwidth(entries: int, mesh: Mesh | None) -> dict[str, float]:
    """Bytes per second of a copy and of a read on the device, the best of twenty runs each.

    A copy reads and writes every byte; in place, as a step does with its parameters, so that no
    cache fetches what is only to be overwritten. A reduction whose kernel is slow shows no limit of
    the memory. So a CPU reads once more by a BLAS, and elsewhere a read is taken to be at least as
    fast as a copy; on a CPU it is not: two cores copied 56 GB/s and read 34, in C as here. An
    accelerator takes several in a row, so that what it takes to start one does not count.
    """
    array = jax.device_put(jnp.ones(entries, jnp.float32), place((entries,), mesh))
    copy, read = jax.jit(jnp.negative, donate_argnums=0), jax.jit(jnp.sum)
    on_cpu = jax.default_backend() == "cpu"
    calls = 1 if on_cpu else 20
    copies, reads = [], []
    for _ in range(20):
        began = time.perf_counter()
        for _ in range(calls):
            array = copy(array)
        jax.block_until_ready(array)
        middle = time.perf_counter()
        for _ in range(calls):
            total = read(array)
        total.block_until_ready()
        copies.append((middle - began) / calls)
        reads.append((time.perf_counter() - middle) / calls)
    copied, read = 2 * array.nbytes / min(copies), array.nbytes / min(reads)
    return {"copy": copied, "read": max(read, _read_by_blas(array) if on_cpu else copied)}


def _read_by_blas(array: jax.Array) -> float:
    """Bytes per second of a sum of squares by NumPy, a thread for each core."""
    parts, times = np.array_split(np.asarray(array), cores()), []
    with concurrent.futures.ThreadPoolExecutor(cores()) as pool:
        for _ in range(20):
            began = time.perf_counter()
            list(pool.map(lambda part: np.dot(part, part), parts))
            times.append(time.perf_counter() - began)
    return array.nbytes / min(times)
