"""inner -> inner without its bad steps: a step is taken whole, or leaves nothing behind.

    grads --measure--> norms --threshold--> limits --+
    loss ---------------------threshold--> limit ----+--> skip? --> updates, state of inner

A clip bounds a step that is too large, and a clip to zero still lets an Adam decay its moments,
count the step and move by its momentum. Around all of that, `skip_step` leaves parameters and inner
state bit for bit as they were, for a step whose gradients or loss say that it is not one to learn
from: not finite, or an outlier among those before it.

It is no clip by groups: what it does, it does to the whole tree.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, Final, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from . import _check
from ._check import _number, _refuse
from ._judge import Judge, judged, start
from ._numbers import part, where
from .measure import Measure, global_norm
from .record import SkipRecord
from .threshold import Threshold, constant
from .threshold.outlier import outlier

Tree = Any
Rule = str | float | jax.Array | Callable[[jax.Array], Any] | Threshold | None

HISTORIES = ("valid", "all")
# A NumPy integer, because optax.inject_hyperparams turns Python numbers, defaults included, into
# traced arrays, and it shapes the program.
WINDOW: Final[Any] = np.int64(128)
# A skipped step leaves the parameters where they were, so those after it are drawn from one and the
# same distribution. So many that all are outliers are none.
MAX_CONSECUTIVE = 25

RULE = (
    'None, "outlier", a Threshold, a number{}, a () array or a schedule step -> value (inf: no '
    "limit)"
)


class SkipState(NamedTuple):
    """The state of `skip_step`."""

    skip: SkipRecord  # what the rules remember, and the metrics
    inner: Tree  # of the transformation inside


def skip_step(
    inner: optax.GradientTransformation,
    *,
    norm: Rule = "outlier",
    loss: Rule = "outlier",
    window: int = WINDOW,
    k: float | jax.Array = 6.0,
    max_consecutive: float | jax.Array = MAX_CONSECUTIVE,
    history: str = "valid",
    measure: Measure | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Takes a step of another transformation, unless its gradients or its loss are bad.

    A step is skipped if n or l is not finite, n > mu_n + k sigma_n, or l > mu_l + k sigma_l, of the
    norm n of the gradients as they come in, before anything inside clips them, and of the loss l,
    which is the extra argument `value` of update: `tx.update(grads, state, params, value=loss)`.
    Then the updates are -0.0 (complex: -0.0 - 0.0i), which changes no bit of a parameter that it is
    added to (but XLA:CPU flushes subnormal ones in an `optax.apply_updates` outside jit), and the
    state inside stays as it was, bit for bit. Around the whole chain, not in it: what comes after
    it in a chain sees the zeros.

    **Giving way.** After `max_consecutive` steps in a row that were finite and above a limit, the
    next such step is taken, and the rules whose limits it is above forget all past and begin anew
    after it. So no rise that lasts is skipped for ever. A fixed limit has nothing to forget:
    of steps that are all above it, one in max_consecutive + 1 is taken. A step that is not finite
    is never taken, however many there are, and neither ends such a run nor counts in it; watch
    `consecutive` in the metrics.

    Args:
      inner: any transformation, such as a chain of a clip and an optimizer. It is given all extra
        arguments.
      norm: the rule for norms. "outlier": `threshold.outlier(k, window=window)`, so there is no
        limit for the first half window. None: none but that they be finite. A fixed limit: a
        number >= 0, a () array, or a schedule, which counts all steps. Or any `Threshold`; a limit
        below many of the values, as a percentile or quantile is, wants history="all".
      loss: the rule for losses, () float32 of either sign; the same choices, and a number of any
        sign. Without `value`, "outlier" is idle; any other rule raises. Of the thresholds,
        `outlier` and `constant` are for losses that may be <= 0; `sigma` and `zscore` find their
        outliers, too, but below 0 their `min_sigma` does nothing, and `validate_state` reports
        their windows; the others are for sizes. A loss of 2^64 or more, of either sign, is judged
        like others, but not learned. Inside `optax.MultiSteps` the loss is that of the last
        microbatch, and the norm that of the mean.
      window: L >= 1, how many values "outlier" keeps; static.
      k: how many standard deviations above the mean is an outlier, >= 0.
      max_consecutive: how many outliers in a row are skipped: a whole number >= 1, math.inf for
        all, or a () array.
      history: "valid": the rules learn from the steps that are taken. For limits above nearly all
        values, as "outlier" is: one below many would learn from ever smaller values, and skip ever
        more (of 500 like steps, percentile(90) skips 146 and quantile(0.9) 414). "all": from the
        skipped ones too, if finite, so that in a burst the first few lift the limit over the
        others; norms >= 2^64 or < 2^-100 stay out.
      measure: what a norm is of; None: the whole tree. Where there are several, one above its
        limit is enough.

    Returns:
      A transformation whose state is a :class:`SkipState`, and whose metrics are
      :class:`~optaxclip.record.SkipMetrics`.

    Raises:
      TypeError, ValueError: if an argument is not such; at update, if `value` is no real number or
        () array of one, or there is none for a rule other than "outlier".

    Example:
      >>> import jax.numpy as jnp, optax, optaxclip
      >>> clipped_sgd = optax.chain(optaxclip.clip_by_global_norm(1.0), optax.sgd(0.1))
      >>> tx = optaxclip.skip_step(clipped_sgd, window=4)
      >>> params, state = jnp.array([1.0]), tx.init(jnp.array([1.0]))
      >>> for grad, loss in [(0.5, 3.0), (0.6, 2.9), (jnp.nan, 2.8), (90.0, 2.8), (0.5, 2.8)]:
      ...     updates, state = tx.update(jnp.array([grad]), state, params, value=loss)
      ...     params = optax.apply_updates(params, updates)
      ...     print(params, optaxclip.metrics(state)["skip/skipped"])
      [0.95] 0
      [0.89] 0
      [0.89] 1
      [0.89] 1
      [0.84] 0

    Reference:
      The rule of OLMo-core's `SkipStepOptimizer`, MaxText's `skip_step_on_spikes` and Levanter's
      `skipstep` (all Apache-2.0), which :func:`optaxclip.threshold.outlier` says how to
      set, with history="all" and max_consecutive=math.inf.

    Deviation from these: by default, skipped values stay out of the history, deviations have a
    floor, a spike in the first half window does not set the scale, and it gives way. With any
    settings, what is not finite stays out of the history: in theirs, one NaN skips a window of
    steps.
    """
    _check.instance(optax.GradientTransformation, "optax.adamw(1e-3)", inner=inner)
    _check.window(window=window)
    _check.number(k=k)
    _check.patience(max_consecutive=max_consecutive)
    _check.choice(HISTORIES, history=history)
    measure = global_norm() if measure is None else measure
    _check.instance(Measure, "measure.global_norm()", measure=measure)
    asks = not (loss is None or isinstance(loss, str))
    by_default = functools.partial(outlier, k, window=window)
    judge = Judge(
        measure,
        _rule("norm", norm, by_default, signed=False),
        _rule("loss", loss, by_default, signed=True),
        max_consecutive,
        learns_all=history == "all",
    )
    inside = optax.with_extra_args_support(inner)

    def init(params: Tree) -> SkipState:
        return SkipState(start(judge, part(params)[0]), inside.init(params))

    # One program for eager calls, too.
    @functools.partial(jax.jit, inline=True)
    def before(
        grads: Tree, record: SkipRecord, params: Tree, loss: jax.Array | None
    ) -> tuple[jax.Array, Tree, SkipRecord]:
        skip, record = judged(judge, grads, record, params, loss)
        # Not the gradients as they are: what is not chosen would make the derivative NaN. Nor
        # zeros, at which a trust ratio has none.
        return skip, jax.tree.map(lambda g: where(skip, jnp.ones_like(g), g), grads), record

    def update(
        grads: Tree, state: SkipState, params: Tree = None, *, value: Any = None, **extra: Any
    ) -> tuple[Tree, SkipState]:
        if value is None and asks:
            raise ValueError("there is a rule for losses: call update(grads, ..., value=loss)")
        floats, whole = part(grads)
        own = None if params is None else part(params)[0]
        loss = None if value is None else _as_loss(value)
        skip, shown, record = before(floats, state.skip, own, loss)
        extra |= {} if value is None else {"value": value}
        updates, inner_state = inside.update(whole(shown), state.inner, params, **extra)
        kept = _chosen(skip, state.inner, inner_state)
        return _chosen(skip, None, updates), SkipState(record, kept)

    return optax.GradientTransformationExtraArgs(init, update)


def _rule(name: str, rule: Rule, by_default: Callable[[], Threshold], *, signed: bool) -> Threshold:
    """The threshold that an argument stands for."""
    if isinstance(rule, Threshold):
        return rule
    if rule is None:
        return constant(math.inf)
    allowed = RULE.format("" if signed else " >= 0")
    if isinstance(rule, str):
        return by_default() if rule == "outlier" else _refuse(ValueError, name, rule, allowed)
    if not callable(rule):
        _number(name, rule, allowed, lambda x: x >= (-math.inf if signed else 0))
        rule = jnp.asarray(rule, jnp.float32)  # of which constant does not judge the value
    limit: Any = rule
    return constant(limit)


def _as_loss(value: Any) -> jax.Array:
    """The loss as () float32."""
    allowed = "a loss, a real number or a () array"
    # What becomes NaN is an int that float64 cannot hold; a loss that is NaN is skipped.
    _number("value", value, allowed, lambda x: not (math.isnan(x) and isinstance(value, int)))
    if isinstance(value, jax.Array):
        return value.astype(jnp.float32)
    with np.errstate(over="ignore"):  # inf is what it is in float32
        return jnp.asarray(np.float32(float(value)))  # JAX would wrap an int around


def _chosen(skip: jax.Array, old: Tree, new: Tree) -> Tree:
    """The old tree in a skipped step, which is one of -0.0 if there is none, else the new one."""
    leaves, treedef = jax.tree.flatten(new)
    before = [None] * len(leaves) if old is None else treedef.flatten_up_to(old)
    moves = [i for i, x in enumerate(leaves) if getattr(x, "dtype", None) != jax.dtypes.float0]
    chosen = _select(skip, [before[i] for i in moves], [leaves[i] for i in moves])
    for i, x in zip(moves, chosen, strict=True):
        leaves[i] = x
    return treedef.unflatten(leaves)


@functools.partial(jax.jit, inline=True)
def _select(skip: jax.Array, old: list[Any], new: list[Any]) -> list[jax.Array]:
    # Not lax.cond, whose branches must agree in every dtype, sharding and axis that they vary over,
    # and which vmap makes this of. On CPU it is the faster one: AdamW on 4 M donated parameters
    # takes 9 ms alone, 20 so (XLA copies the old moments), 14 by lax.cond and 10 where that skips;
    # but with its branches in the other order 40. An accelerator has to wait for the predicate.
    def chosen(old: Any, new: Any) -> jax.Array:
        new = jnp.asarray(new)
        is_float = jnp.issubdtype(new.dtype, jnp.inexact)
        if old is None:
            minus_0 = complex(-0.0, -0.0) if jnp.iscomplexobj(new) else -0.0
            old = jnp.full_like(new, minus_0 if is_float else 0)
        return (where if is_float else jnp.where)(skip, jnp.asarray(old, new.dtype), new)

    return list(map(chosen, old, new))
