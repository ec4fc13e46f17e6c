"""What is timed: every variant of the package, Optax's own clipper beside it, and other peers."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
import optax.contrib

import optaxclip

LEARNING_RATE = 1e-4

OPTIMIZERS: dict[str, Callable[[], optax.GradientTransformation]] = {
    "sgd": lambda: optax.sgd(LEARNING_RATE),
    "adamw": lambda: optax.adamw(LEARNING_RATE),
    "muon": lambda: optax.contrib.muon(LEARNING_RATE),
}


class Candidate(NamedTuple):
    """A training step to time: the bare optimizer, or a clipper with it."""

    name: str
    make: Callable[[], optax.GradientTransformation] | None = None  # None: the bare step
    twin: str | None = None  # the clipper of Optax that this one replaces
    place: str = "first"  # in the chain; or "last"; or "alone": it is most of AdamW itself
    reads: int = 2  # of the gradients: one to measure, one to multiply
    jits: bool = True  # False: it must be called outside `jit`
    tree_wide: bool = False  # adaptive, with one norm; compared with the fixed limit


BARE, BARE_AGAIN = Candidate("bare", reads=1), Candidate("bare again", reads=1)
FIXED = "optaxclip.clip_by_global_norm"  # what the adaptive limits of one norm are compared with
OPTAX_AGAIN = "optax.clip_by_global_norm again"


def ours(variant: str, make: Callable[[], Any], twin: str | None = None, **kind: Any) -> Candidate:
    """A variant of this package."""
    return Candidate(f"optaxclip.{variant}", make, twin and f"optax.{twin}", **kind)


# All have the same ceiling, so that all clip, and do the same work on the gradients.
WHOLE = {"measure": optaxclip.measure.global_norm(), "max_norm": 1.0}


def whole(variant: str) -> Candidate:
    """An adaptive variant with one limit for the whole tree."""
    kwargs = dict(WHOLE)
    if variant == "stabilize_gradients":  # a normaliser, which has no ceiling
        del kwargs["max_norm"]
    make = functools.partial(getattr(optaxclip, variant), **kwargs)
    return ours(f"{variant}[tree]", make, tree_wide=True)


def stable_adamw() -> optax.GradientTransformation:
    """AdamW, with the clip in the place where StableAdamW has it."""
    return optax.chain(
        optaxclip.scale_by_stable_adam(),
        optax.add_decayed_weights(1e-4),
        optax.scale_by_learning_rate(LEARNING_RATE),
    )


def skipping_adamw() -> optax.GradientTransformation:
    """AdamW in a `skip_step`, which measures the gradients and keeps or drops the whole step."""
    return optaxclip.skip_step(optax.adamw(LEARNING_RATE))


def fed() -> optax.GradientTransformation:
    """A clip whose share of the gradients is paid out later."""
    return optaxclip.clip_with_feedback(optaxclip.clip_by_global_norm())


def soft() -> optax.GradientTransformation:
    """A soft clip of the whole tree."""
    whole_tree, limit = optaxclip.measure.global_norm(), optaxclip.threshold.constant(1.0)
    return optaxclip.clip(whole_tree, limit, optaxclip.scale.tanh)


DROP_INS = [
    ours("clip_by_global_norm", optaxclip.clip_by_global_norm, "clip_by_global_norm"),
    ours("clip_by_block_rms", optaxclip.clip_by_block_rms, "clip_by_block_rms"),
    ours("clip_by_value", optaxclip.clip_by_value, "clip"),
    ours(
        "clip_by_value[record=False]",
        lambda: optaxclip.clip_by_value(record=False),
        "clip",
        reads=1,
    ),
    ours("adaptive_grad_clip", optaxclip.adaptive_grad_clip, "adaptive_grad_clip"),
    ours(
        "normalize_by_global_norm", optaxclip.normalize_by_global_norm, "normalize_by_update_norm"
    ),
]

ADAPTIVE = [
    whole(variant)
    for variant in (
        "clip_by_percentile", "autoclip", "clip_by_quantile", "zclip", "clip_by_sigma",
        "clip_by_ema_ratio", "clip_by_norm_growth", "clip_by_second_moment", "stabilize_gradients",
    )
]  # fmt: skip

DEFAULTS = [
    ours("clip_by_norm", optaxclip.clip_by_norm),
    ours("clip_by_average_norm", lambda: optaxclip.clip_by_average_norm(1e-6)),
    ours("clip_by_percentile", optaxclip.clip_by_percentile),
    ours("auto_clip", optaxclip.auto_clip),
    ours("autoclip", optaxclip.autoclip),
    ours("clip_by_quantile", optaxclip.clip_by_quantile),
    ours("zclip", optaxclip.zclip),
    ours("clip_by_sigma", optaxclip.clip_by_sigma),
    ours("clip_by_ema_ratio", optaxclip.clip_by_ema_ratio),
    ours("adagc", optaxclip.adagc),
    ours("clip_by_norm_growth", optaxclip.clip_by_norm_growth),
    ours("clip_by_second_moment", optaxclip.clip_by_second_moment),
    ours("clippy", optaxclip.clippy, place="last"),
    ours("scale_by_stable_adam", stable_adamw, place="alone"),
    ours("stabilize_gradients", optaxclip.stabilize_gradients),
]

OPTAX = {
    f"optax.{name}": Candidate(f"optax.{name}", make, reads=reads)
    for name, make, reads in (
        ("clip_by_global_norm", lambda: optax.clip_by_global_norm(1.0), 2),
        ("clip_by_block_rms", lambda: optax.clip_by_block_rms(1.0), 2),
        ("clip", lambda: optax.clip(1.0), 1),
        ("adaptive_grad_clip", lambda: optax.adaptive_grad_clip(0.01), 2),
        ("normalize_by_update_norm", optax.normalize_by_update_norm, 2),
    )
}

# Not among "all", for they do more than a clip does: products of matrices, a copy of the tree.
BEYOND = [
    ours("clip[tanh]", soft),
    ours("clip_with_feedback", fed),
    ours("skip_step", skipping_adamw, place="alone"),
    ours("clip_by_spectral_norm", optaxclip.clip_by_spectral_norm),
    ours(
        "clip_by_spectral_norm[power_iteration]",
        lambda: optaxclip.clip_by_spectral_norm(method="power_iteration"),
    ),
]

VARIANTS = {c.name.removeprefix("optaxclip."): c for c in (*DROP_INS, *ADAPTIVE, *DEFAULTS)}
NAMES = VARIANTS | {c.name.removeprefix("optaxclip."): c for c in BEYOND}
SETS = {
    "all": [*VARIANTS.values()],
    "drop-ins": DROP_INS,
    "adaptive": ADAPTIVE,
    "beyond": BEYOND,
}


def stateless(clip: Callable[[Any, Any], Any]) -> Callable[[], optax.GradientTransformation]:
    """Makes a transformation of `gradients, parameters -> clipped gradients`."""
    return lambda: optax.stateless(clip)


def one_liner(grads: Any, params: Any) -> Any:
    """What people write by hand."""
    norm = jnp.sqrt(sum(jnp.sum(jnp.square(g)) for g in jax.tree.leaves(grads)))
    return jax.tree.map(lambda g: g * jnp.minimum(1, 1 / norm).astype(g.dtype), grads)


def smartclip(algorithm: str, **kwargs: Any) -> optax.GradientTransformation:
    """A clipper of the package smartclip, by its function for JAX."""
    clipper = getattr(importlib.import_module("smartclip"), algorithm)(**kwargs)
    backend = importlib.import_module("smartclip.backends.jax")
    return stateless(lambda grads, params: backend.apply_grads(grads, params, clipper))()


PEERS = [
    Candidate("one-liner", stateless(one_liner)),
    Candidate("smartclip.AGC", lambda: smartclip("AGC"), jits=False),
    Candidate(  # from the first step on: for a hundred of them it would not clip
        "smartclip.AutoClip",
        lambda: smartclip("AutoClip", warmup_steps=0, min_history=0),
        jits=False,
    ),
]


def select(names: str, optimizer: str, *, peers: bool) -> list[Candidate]:
    """The candidates of one group of runs: those asked for, and what they are compared with.

    Args:
      names: variants or sets of them, with commas in between; `clip_by_value` stands for all of
        its forms, `clip_by_value[record=False]` for one.
      optimizer: that of the steps; what is a part of AdamW joins only that.
      peers: whether the peers join.

    Returns:
      The bare step first, everything once.

    Raises:
      ValueError: if a name is not known.
    """
    chosen: dict[str, Candidate] = {}
    for name in names.split(","):
        found = SETS.get(name) or [c for v, c in NAMES.items() if name in (v, v.split("[")[0])]
        if not found:
            allowed = ", ".join([*SETS, *NAMES])
            raise ValueError(f"no variant {name!r}; choose from {allowed}")
        chosen |= {c.name: c for c in found}
    if optimizer != "adamw":
        chosen = {name: c for name, c in chosen.items() if c.place != "alone"}
    plain = OPTAX["optax.clip_by_global_norm"]
    references = [BARE, BARE_AGAIN, plain, plain._replace(name=OPTAX_AGAIN), DROP_INS[0]]
    twins = [OPTAX[c.twin] for c in chosen.values() if c.twin]
    every = [*references, *twins, *chosen.values(), *(PEERS if peers else [])]
    return [*{c.name: c for c in every}.values()]
