"""The table of laws: each a function (variant, structure, case), tried on every variant it is for.

A case is three names and a few whole numbers, so that tests and the fuzzer share laws and failures.
"""

import functools
from collections.abc import Callable, Collection, Mapping
from typing import NamedTuple

import laws_close as close
import laws_exact as exact
from roster import BEYOND, EVERY
from runs import LIMITED, STRICT
from strategies import STRUCTURES


class Law(NamedTuple):
    """What holds, and for which variants and structures."""

    check: Callable[..., None]  # variant, structure, case; raises AssertionError
    of: Collection[str] = tuple(EVERY)
    besides: Mapping[str, str] = {}  # variant -> why the law is none of its
    structures: Collection[str] = tuple(STRUCTURES)

    @property
    def variants(self):
        """Those that the law is for."""
        return [name for name in self.of if name not in self.besides]


def _those(**facts):
    return [n for n, row in EVERY.items() if all(getattr(row, k) in v for k, v in facts.items())]


NORMALIZERS = dict.fromkeys(_those(normalizes=[True]), "it enlarges what is small")
ADAM = {"scale_by_stable_adam": "it limits one tree, m / sqrt(v), by the norm of another"}
MOMENTS = {"scale_by_stable_adam": "its moments move with a gradient of zero too"}
SKIPS = {"skip_step": "in a skipped step, nothing moves"}
CARRY = {"clip_with_feedback": "it pays what it owes, whatever the gradient is"}
RATIO = {"stabilize_gradients": "its limit is made of this very norm"}

BOTH = (*EVERY, *BEYOND)

LAWS = {
    "finite": Law(exact.finite, of=BOTH),
    "passes": Law(exact.passes, of=BOTH, besides=SKIPS),
    "no_op": Law(exact.no_op, besides=NORMALIZERS),
    "zero": Law(exact.zero, of=BOTH, besides=MOMENTS | CARRY),
    "odd": Law(exact.odd, of=BOTH, besides=CARRY),
    "shrinks": Law(exact.shrinks, besides=NORMALIZERS),
    "monotone": Law(
        exact.monotone,
        of=[n for n in EVERY if n in LIMITED],
        besides={"adagc": "its limit is that of the warm-up"},
    ),
    "homogeneous": Law(
        exact.homogeneous, besides={"scale_by_stable_adam": "its eps is an absolute number"}
    ),
    "forgets": Law(exact.forgets, of=_those(memory=[True]), besides=MOMENTS),
    "alive": Law(exact.alive, of=_those(memory=[True])),
    "bad, zero": Law(functools.partial(exact.bad_group, policy="zero")),
    "bad, propagate": Law(functools.partial(exact.bad_group, policy="propagate")),
    "bad, sanitize": Law(functools.partial(exact.bad_group, policy="sanitize"), besides=MOMENTS),
    "strict": Law(exact.strict, of=tuple(STRICT)),
    "bound": Law(close.bound, besides=ADAM | RATIO),
    "tight": Law(close.tight, besides=ADAM | RATIO),
    "direction": Law(close.direction, of=_those(groups=["tree", "leaf", "unit"]), besides=ADAM),
    "reported": Law(close.reported, besides=ADAM),
    "vmap_is_loop": Law(close.vmap_is_loop),
    "jit_is_eager": Law(close.jit_is_eager),
    "permuted": Law(close.permuted),
    "split": Law(
        close.split, of=_those(groups=["tree", "entry"]), besides=ADAM, structures=["vector"]
    ),
    "masked_is_subset": Law(close.masked_is_subset, structures=["same"]),
}
# These compile programs of their own.
OWN_PROGRAM = ("bad, propagate", "bad, sanitize", "strict", *tuple(LAWS)[-5:])
