"""Every transformation of the package, in two tables: what laws, wrappers and meshes are tried on.

Memories are short, so that a limit stands after `WARM` steps of a test; that the defaults reach
their pieces is the business of test_arguments.py. A variant joins by one row.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import optax

import optaxclip as oc

WARM = 11  # steps after which all of these have a limit


class Variant(NamedTuple):
    """One way to call a public variant, and what it is by its nature."""

    make: Callable[..., optax.GradientTransformation]  # keywords `nonfinite`, `record` -> variant
    groups: str = "tree"  # what shares one norm: tree, leaf, unit, entry; or matrix
    params: bool = False  # whether update needs params
    memory: bool = False  # whether it learns from norms
    normalizes: bool = False  # changes gradients below the limit too, by design


def _learns(make, **kwargs):
    return Variant(functools.partial(make, **kwargs), memory=True)


EVERY = {
    "clip_by_value": Variant(oc.clip_by_value, groups="entry"),
    "clip_by_norm": Variant(oc.clip_by_norm, groups="leaf"),
    "clip_by_global_norm": Variant(oc.clip_by_global_norm),
    "clip_by_block_rms": Variant(oc.clip_by_block_rms, groups="leaf"),
    "clip_by_average_norm": Variant(functools.partial(oc.clip_by_average_norm, 0.1), groups="leaf"),
    "adaptive_grad_clip": Variant(
        functools.partial(oc.adaptive_grad_clip, 0.5), groups="unit", params=True
    ),
    "clippy": Variant(oc.clippy, groups="leaf", params=True),
    "normalize_by_global_norm": Variant(oc.normalize_by_global_norm, normalizes=True),
    "clip_by_percentile": _learns(oc.clip_by_percentile, window=8, min_history=2),
    "auto_clip": _learns(oc.auto_clip),
    "autoclip": _learns(oc.autoclip, window=8),
    "clip_by_quantile": _learns(oc.clip_by_quantile, patience=10),
    "zclip": _learns(oc.zclip, warmup=3),
    "clip_by_sigma": _learns(oc.clip_by_sigma, window=8, min_history=2),
    "clip_by_ema_ratio": _learns(oc.clip_by_ema_ratio, warmup=2)._replace(groups="leaf"),
    "adagc": _learns(oc.adagc, warmup=2)._replace(groups="leaf"),
    "clip_by_norm_growth": _learns(oc.clip_by_norm_growth)._replace(groups="leaf"),
    "clip_by_second_moment": _learns(oc.clip_by_second_moment, warmup=2)._replace(groups="entry"),
    "stabilize_gradients": _learns(oc.stabilize_gradients)._replace(groups="leaf", normalizes=True),
    "scale_by_stable_adam": _learns(oc.scale_by_stable_adam)._replace(
        groups="entry", normalizes=True
    ),
}


def fed(max_norm=1.0, *, nonfinite="zero", record=True):
    """A clip by the global norm, with error feedback."""
    return oc.clip_with_feedback(
        oc.clip_by_global_norm(max_norm, nonfinite=nonfinite, record=record)
    )


def skipping(max_norm=1.0, *, nonfinite="zero", record=True):
    """A clip by the global norm, in the steps that are not skipped."""
    return oc.skip_step(oc.clip_by_global_norm(max_norm, nonfinite=nonfinite, record=record))


# What is no line of the algebra: it joins what applies to it.
BEYOND = {
    "clip_by_spectral_norm": Variant(oc.clip_by_spectral_norm, groups="matrix"),
    "clip_by_spectral_norm[power_iteration]": Variant(
        functools.partial(oc.clip_by_spectral_norm, method="power_iteration"), groups="matrix"
    ),
    "clip_with_feedback": Variant(fed, memory=True),
    "skip_step": Variant(skipping, memory=True),
}
