"""Laws that hold within a tolerance, and those that compare one program with another.

The tolerance is that of a norm and a factor in float32, each right to a few 2^-24 and together to
well below 2^-20, and of one rounding to the dtype of the leaf. What is below the normal numbers of
float32 may be flushed to zero.
"""

import functools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import trees
from laws_exact import same_bits
from runs import ALL, BATCH, SMALLEST, limit_of, limits, lost, make, run, sizes, tiny, vmapped, wide
from strategies import BACKWARDS, OTHERS, drawn

NARROW, WIDE = 2.0**-20, 2.0**-44  # of norms and factors in float32 and in float64


def bound(name, structure, case):
    """The norm of every group is at most its limit."""
    d, _, after, allowed = _clipped(name, structure, case)
    flushed = lost(name, d)
    for k, tolerance in _tolerances(name, d.grads).items():
        assert (after[k] <= allowed[k] * (1 + tolerance) + flushed[k]).all(), (k, after, allowed)


def tight(name, structure, case):
    """A group that is clipped is clipped to its limit, no further."""
    d, before, after, allowed = _clipped(name, structure, case)
    flushed = lost(name, d)
    for k, tolerance in _tolerances(name, d.grads).items():
        # A factor below 2^-126 is flushed, and a norm above 2^128 is not finite.
        factor = np.minimum(allowed[k], 2.0**128) / np.maximum(before[k], SMALLEST)
        holds = (factor > 2 * SMALLEST) & (factor < 1 / SMALLEST) & (before[k] < 2.0**127)
        aim = allowed[k] if ALL[name].normalizes else np.minimum(allowed[k], before[k])
        aim = np.where(holds & (before[k] > flushed[k] / NARROW), aim, 0)
        assert (after[k] >= aim * (1 - tolerance) - flushed[k]).all(), (k, after, aim)


def direction(name, structure, case):
    """Every entry keeps its share of the norm of its group, so the direction stays."""
    d = drawn(case, structure)
    y = run(name, structure, d, [d.grads]).updates[0]
    before, after = sizes(name, d.grads, d.params), sizes(name, y, d.params)
    flushed = lost(name, d)
    for k, tolerance in _tolerances(name, d.grads).items():
        # Where rounding may have changed the norm of a group, there is no such share.
        known = (before[k] > 0) & (after[k] * tolerance > flushed[k]) & np.isfinite(before[k])
        x_share = trees.float64(d.grads)[k] / np.where(known, before[k], 1)
        y_share = trees.float64(y)[k] / np.where(known, after[k], 1)
        off = np.abs(y_share - x_share) - 2 * tolerance * np.abs(x_share)
        # Entries may be flushed before they are multiplied, and after.
        allowed = SMALLEST / np.where(known, before[k], 1) + 2 * tiny(y[k]) / np.where(
            known, after[k], 1
        )
        assert (off <= np.where(known, allowed, np.inf)).all(), k


def reported(name, structure, case):
    """The norms in the metrics are those of float64, before and after."""
    d = drawn(case, structure)
    # Where a norm is relative to the limit, that is 1.
    one = np.float32(1) if name == "clippy" else limit_of(name, d)
    out = run(name, structure, d, [d.grads], limits=[one])
    last = {k.removeprefix("leaf/"): v for k, v in out.metrics[0].items()}
    before = _largest(sizes(name, d.grads, d.params))
    after = _largest(sizes(name, out.updates[0], d.params))
    flushed = _largest(lost(name, d))
    hypothesis.assume(flushed / NARROW < before < 2.0**63)
    # Measured to 3e-7 in up to 1e8 entries; a relative norm has two such errors.
    np.testing.assert_allclose(last["norm"], before, 1e-6 if ALL[name].params else 5e-7)
    tolerance = max(_tolerances(name, d.grads).values())
    np.testing.assert_allclose(last["clipped_norm"], after, tolerance, flushed)


def vmap_is_loop(name, structure, case):
    """Two trees under vmap become what each becomes alone."""
    d = drawn(case, structure)
    batch, limit = [d.grads, {k: x[0] for k, x in d.stream.items()}], limit_of(name, d)
    out = run(name, structure, d, batch, limits=[limit, limit / 2])
    others = OTHERS.get(structure, {})
    stacked = jax.tree.map(lambda *x: np.stack(x), *[g | others for g in batch])
    with wide(structure):
        found = vmapped(name, structure)(
            stacked, np.array([limit, limit / 2]), out.state, d.params | others
        )
    for i in range(BATCH):
        _close({k: np.asarray(found[k])[i] for k in d.grads}, out.updates[i])


def jit_is_eager(name, structure, case):
    """A step in Python gives what it gives inside of a compiled loop."""
    d = drawn(case._replace(exponent=case.exponent % 5), structure)
    others = OTHERS.get(structure, {})
    out = run(name, structure, d, [d.grads], limits=[np.float32(1)])
    with wide(structure):
        as_jax = lambda tree: jax.tree.map(jnp.asarray, tree)
        args = as_jax(d.grads | others), out.state, as_jax(d.params | others)
        updates, _ = _eager(name).update(*args)
    _close({k: np.asarray(updates[k]) for k in d.grads}, out.updates[0])


def permuted(name, structure, case):
    """Leaves in another order are clipped as before."""
    parts = {k: [new] for k, new in BACKWARDS[structure].items()}
    _unchanged(name, structure, case, f"{structure} backwards", parts)


def split(name, structure, case):
    """A leaf in two or in eight parts is clipped as before, where groups are not leaves."""
    for n in (2, 8):
        parts = {"w": [f"w{i}" for i in range(n)]}
        _unchanged(name, structure, case, f"{structure} in {n}", parts)


def masked_is_subset(name, structure, case):
    """What a mask leaves out keeps its bits, and the rest is clipped as if it were not there."""
    d = drawn(case, structure)
    out = run(name, structure, d, [d.grads], masked="d").updates[0]
    rest = lambda tree: {k: x for k, x in tree.items() if k != "d"}
    subset = d._replace(stream=rest(d.stream), grads=rest(d.grads), params=rest(d.params))
    expected = run(name, f"{structure} but d", subset, [subset.grads]).updates[0]
    same_bits(out["d"], d.grads["d"])
    _close(rest(out), expected)


# -- what these have in common


def _clipped(name, structure, case):
    """The trees, and group by group the norms before and after, and the limits."""
    d = drawn(case, structure)
    out = run(name, structure, d, [d.grads])
    before, after = (sizes(name, x, d.params) for x in (d.grads, out.updates[0]))
    return d, before, after, limits(name, before, limit_of(name, d), out)


def _tolerances(name, tree):
    """By leaf, how far the norm of its group may be off, relatively."""
    eps = {k: float(jnp.finfo(x.dtype).eps) / 2 for k, x in tree.items()}
    if ALL[name].groups == "tree":
        eps = dict.fromkeys(eps, max(eps.values()))
    # The limit is a float32 number in any case, but the memory of one may have been rounded.
    is_wide = all(x.dtype == np.float64 for x in tree.values()) and not ALL[name].memory
    return {k: x + (WIDE if is_wide else NARROW) for k, x in eps.items()}


def _largest(tree):
    return max(np.max(x, initial=0) for x in tree.values())


@functools.cache
def _eager(name):
    return make(name, "zero", None, 1.0)


def _close(actual, expected):
    for k, x in expected.items():
        assert (actual[k].dtype, actual[k].shape) == (x.dtype, x.shape)
        a, b = trees.float64([actual[k], x])
        # One unit in the last place: where two float32 results differ, they may round apart.
        unit = max(float(jnp.finfo(x.dtype).eps), NARROW)
        np.testing.assert_allclose(a, b, unit, tiny(x), err_msg=k)


def _unchanged(name, structure, case, other, parts):
    """The update is that of the same numbers in other leaves: {leaf: names of its parts}."""
    d = drawn(case, structure)

    def changed(tree):
        cut = {k: np.split(x, len(parts[k]), -1) if x.ndim else [x] for k, x in tree.items()}
        return {name: x for k in tree for name, x in zip(parts[k], cut[k], strict=True)}

    moved = d._replace(stream=changed(d.stream), grads=changed(d.grads), params=changed(d.params))
    y = run(name, structure, d, [d.grads]).updates[0]
    z = run(name, other, moved, [moved.grads]).updates[0]
    _close(z, changed(y))
