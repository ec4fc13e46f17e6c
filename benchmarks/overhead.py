"""What a clipper adds to a training step: compile time and step time, beside Optax's own.

The steps of all candidates run in turn, round after round, so that a busy machine slows them alike;
the table gives medians, and ratios to the first line: the step without a clipper, or, for the
adaptive ones on the whole tree, the step with a fixed limit.

    python benchmarks/overhead.py
    python benchmarks/overhead.py --clippers adaptive
    python benchmarks/overhead.py --leaves 1200 --size 1000 --optimizer adamw --dtype bfloat16
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import optaxclip

OPTIMIZERS = {"sgd": lambda: optax.sgd(1e-3), "adamw": lambda: optax.adamw(1e-3)}

# By name: a clipper of this package, and the one of Optax that it replaces.
CLIPPERS: dict[str, tuple[Callable[[], Any], Callable[[], Any] | None]] = {
    "clip_by_global_norm": (
        optaxclip.clip_by_global_norm,
        lambda: optax.clip_by_global_norm(1.0),
    ),
    "clip_by_norm": (optaxclip.clip_by_norm, None),
    "clip_by_block_rms": (optaxclip.clip_by_block_rms, lambda: optax.clip_by_block_rms(1.0)),
    "clip_by_value": (optaxclip.clip_by_value, lambda: optax.clip(1.0)),
    "clip_by_value, record=False": (
        lambda: optaxclip.clip_by_value(record=False),
        lambda: optax.clip(1.0),
    ),
    "adaptive_grad_clip": (optaxclip.adaptive_grad_clip, lambda: optax.adaptive_grad_clip(0.01)),
}


# Limits of the norm of the whole tree; the first is fixed, and the others are compared with it. All
# have the same ceiling, so that all clip, and do the same work on the gradients.
WHOLE = {"measure": optaxclip.measure.global_norm(), "max_norm": 1.0}
ADAPTIVE: dict[str, Callable[[], Any]] = {
    "clip_by_global_norm": optaxclip.clip_by_global_norm,
    "clip_by_percentile": lambda: optaxclip.clip_by_percentile(**WHOLE),
    "autoclip": lambda: optaxclip.autoclip(**WHOLE),
    "clip_by_quantile": lambda: optaxclip.clip_by_quantile(**WHOLE),
    "zclip": lambda: optaxclip.zclip(**WHOLE),
    "clip_by_sigma": lambda: optaxclip.clip_by_sigma(**WHOLE),
    "clip_by_ema_ratio of the tree": lambda: optaxclip.clip_by_ema_ratio(**WHOLE),
    "clip_by_norm_growth of the tree": lambda: optaxclip.clip_by_norm_growth(**WHOLE),
    "clip_by_second_moment of the tree": lambda: optaxclip.clip_by_second_moment(**WHOLE),
    "stabilize_gradients of the tree": lambda: optaxclip.stabilize_gradients(
        measure=WHOLE["measure"]
    ),
}


class Candidate(NamedTuple):
    """A compiled training step, what it carries along, and what was measured of it."""

    name: str
    step: Callable[..., Any]
    carry: list[Any]
    compile_seconds: float
    step_seconds: list[float]


def prepare(name: str, tx: optax.GradientTransformation, grads: list[jax.Array]) -> Candidate:
    """Compiles a step that updates and applies, parameters and state donated."""

    def step(params: Any, state: Any, grads: Any) -> tuple[Any, Any]:
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    params = [jnp.ones_like(g) for g in grads]
    state = tx.init(params)
    began = time.perf_counter()
    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(params, state, grads).compile()
    return Candidate(name, compiled, [params, state], time.perf_counter() - began, [])


def measure(candidates: list[Candidate], grads: list[jax.Array], rounds: int) -> None:
    """Runs every candidate once per round; the first two rounds are not counted."""
    for i in range(rounds + 2):
        for candidate in candidates:
            began = time.perf_counter()
            candidate.carry[:] = candidate.step(*candidate.carry, grads)
            jax.block_until_ready(candidate.carry)
            if i >= 2:
                candidate.step_seconds.append(time.perf_counter() - began)


def report(candidates: list[Candidate]) -> None:
    """One line per candidate; ratios are medians over rounds of step / first candidate's step."""
    first = candidates[0]
    print(f"{'':40} {'compile s':>10} {'step ms':>10} {'/ first':>8}")
    for c in candidates:
        milliseconds = 1e3 * statistics.median(c.step_seconds)
        ratios = [a / b for a, b in zip(c.step_seconds, first.step_seconds, strict=True)]
        ratio = statistics.median(ratios)
        print(f"{c.name:40} {c.compile_seconds:10.2f} {milliseconds:10.2f} {ratio:8.3f}")


def main() -> None:
    """Reads the options, measures, prints."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--clippers", choices=["fixed", "adaptive"], default="fixed")
    parser.add_argument("--leaves", type=int, default=148, help="in the tree (%(default)s)")
    parser.add_argument("--size", type=int, default=90_000, help="entries per leaf (%(default)s)")
    parser.add_argument("--optimizer", choices=OPTIMIZERS, default="sgd")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--rounds", type=int, default=20, help="(%(default)s)")
    args = parser.parse_args()

    keys = jax.random.split(jax.random.key(0), args.leaves)
    grads = [jax.random.normal(key, (args.size // 10, 10), args.dtype) for key in keys]
    print(
        f"{args.leaves} leaves of {args.size} {args.dtype}, {args.optimizer}; "
        f"{jax.devices()[0].device_kind}, {platform.machine()}, jax {jax.__version__}, "
        f"optax {optax.__version__}"
    )
    optimizer = OPTIMIZERS[args.optimizer]
    chained = lambda make: optax.chain(make(), optimizer())
    if args.clippers == "adaptive":
        candidates = [prepare(name, chained(make), grads) for name, make in ADAPTIVE.items()]
    else:
        candidates = [prepare("bare", optimizer(), grads)]
        for name, makers in CLIPPERS.items():
            for library, make in zip(("optaxclip", "optax"), makers, strict=True):
                if make is not None:
                    candidates.append(prepare(f"{library}: {name}", chained(make), grads))
    measure(candidates, grads, args.rounds)
    report(candidates)


if __name__ == "__main__":
    main()
