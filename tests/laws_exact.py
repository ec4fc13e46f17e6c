"""Laws that hold bit for bit, because floating-point arithmetic obeys them.

A product with one factor is odd, monotone and homogeneous under powers of two; where a norm is
within the limit there is no arithmetic at all.
"""

import hypothesis
import numpy as np
import trees
from oracles import tree_norm, unit_axes
from roster import WARM
from runs import ALL, SMALLEST, limit_of, limits, lost, run, sizes
from strategies import OTHERS, drawn

MARGIN = 2.0**-20  # above all errors of a float32 norm
BAD = (np.nan, np.inf, -np.inf)


def finite(name, structure, case):
    """Finite gradients give finite updates."""
    d = drawn(case, structure)
    y = run(name, structure, d, [d.grads]).updates[0]
    for k in y:
        assert np.isfinite(y[k]).all(), k


def passes(name, structure, case):
    """Integer and bool leaves pass untouched, and structure, shapes and dtypes stay."""
    d = drawn(case, structure)
    out = run(name, structure, d, [d.grads])
    trees.assert_same_bits(out.others[0], OTHERS.get(structure, {}))
    for k, x in d.grads.items():
        y = out.updates[0][k]
        assert (y.shape, y.dtype) == (x.shape, x.dtype), k


def no_op(name, structure, case):
    """A group within its limit keeps every bit."""
    d = drawn(case, structure)
    out = run(name, structure, d, [d.grads])
    before = sizes(name, d.grads, d.params)
    allowed = limits(name, before, limit_of(name, d), out)
    measured = out.metrics[0]
    exactly = ALL[name].groups == "tree" and bool(measured["norm"] <= measured["limit"])
    exactly &= not structure.startswith("double")  # metrics are float32, such norms are not
    for k, x in d.grads.items():
        within = exactly | (before[k] <= allowed[k] * (1 - MARGIN))
        same_bits(out.updates[0][k], x, where=within)


def zero(name, structure, case):
    """Zeros stay zeros, with their sign."""
    d = drawn(case, structure)
    zeros = {k: np.copysign(0, x.real).astype(x.dtype) for k, x in d.grads.items()}
    y = run(name, structure, d, [zeros]).updates[0]
    for k, x in zeros.items():
        same_bits(y[k], x)


def odd(name, structure, case):
    """f(-x) = -f(x)."""
    d = drawn(case, structure)
    y, z = run(name, structure, d, [d.grads, _negative(d.grads)]).updates
    if name == "scale_by_stable_adam":  # its moments are of gradients, not of norms
        z = run(name, structure, d._replace(stream=_negative(d.stream)), [_negative(d.grads)])
        z = z.updates[0]
    for k in y:
        np.testing.assert_array_equal(-y[k], z[k])


def shrinks(name, structure, case):
    """|y| <= |x|, and the sign stays; of complex entries, both parts are such."""
    d = drawn(case, structure)
    y = run(name, structure, d, [d.grads]).updates[0]
    for k in y:
        for part in (np.real, np.imag):
            a, b = (np.float64(part(trees.float64(v[k]))) for v in (y, d.grads))
            assert (np.abs(a) <= np.abs(b)).all(), k
            assert (a * np.sign(b) >= 0).all(), k


def monotone(name, structure, case):
    """Under a larger limit no entry is smaller."""
    d = drawn(case, structure)
    limit = limit_of(name, d)
    ulps = np.float32(1 + 2.0**-23 * (1 + case.seed % 5)) if case.power % 2 else np.float32(2)
    y, z = run(name, structure, d, [d.grads] * 2, limits=[limit, limit * ulps]).updates
    for k in y:
        for part in (np.real, np.imag):
            a, b = (np.abs(part(trees.float64(v[k]))) for v in (y, z))
            # Beside a factor of 1, which leaves bits alone, one of 2 may flush subnormal numbers.
            assert ((a <= b) | (a < SMALLEST)).all(), k


def homogeneous(name, structure, case):
    """Gradients, their past and the limit times 2^k give the updates times 2^k."""
    d, times = drawn(case, structure), 2.0**case.power
    scaled = d._replace(
        stream=_scaled(d.stream, times),
        grads=_scaled(d.grads, times),
        limit=_scaled({0: d.limit}, times)[0],
        share=np.float32(d.share * times),
    )
    smallest, largest = _range([*d.stream.values(), *d.grads.values()])
    smallest, largest = smallest * min(times, 1), largest * max(times, 1)
    # From 2^64 on norms are not learned, and below 2^-30 they are summed up in another loop, which
    # may round otherwise. A mean over some fifty entries is below their norm by less than 2^6.
    hypothesis.assume(largest < 2.0**60 and (smallest > 2.0**-24 or largest < 2.0**-30))
    for k in d.grads:
        hypothesis.assume(_is_normal(scaled.stream[k]).all() and _is_normal(scaled.grads[k]).all())
    hypothesis.assume(limit_of(name, scaled) == limit_of(name, d) * times)
    y = run(name, structure, d, [d.grads]).updates[0]
    z = run(name, structure, scaled, [scaled.grads]).updates[0]
    if name == "stabilize_gradients":  # the norm it gives is a ratio of norms
        times = 1.0
    for k in y:
        expected = _scaled({k: y[k]}, times)[k]
        vanished = (y[k] == 0) & (d.grads[k] != 0)  # in float16, and perhaps not twice as large
        same_bits(z[k], expected, where=_is_normal(y[k]) & _is_normal(expected) & ~vanished)


def forgets(name, structure, case):
    """It does not matter when a step was not finite, nor whether it was one of zeros instead."""
    d, bad = drawn(case, structure), BAD[case.power % 3]
    at = 2 + case.seed % (WARM - 2)  # after the steps that adagc counts

    def after(x, *, moved=False):
        steps = {k: _with(s, at, x) for k, s in d.stream.items()}
        if moved:
            steps = {
                k: np.concatenate([s[:at], s[at + 1 :], s[at : at + 1]]) for k, s in steps.items()
            }
        return run(name, structure, d._replace(stream=steps), [d.grads]).updates[0]

    y = after(bad)
    for z in (after(bad, moved=True), after(0)):
        for k in y:
            same_bits(y[k], z[k])


def alive(name, structure, case):
    """No past of ordinary size makes an ordinary group vanish, tiny entries in it or not."""
    kind = "normal" if case.kind == "uneven" else case.kind
    d = drawn(case._replace(exponent=case.exponent % 12, kind=kind, limit=0), structure)
    y = run(name, structure, d, [d.grads]).updates[0]
    before, after = sizes(name, d.grads, d.params), sizes(name, y, d.params)
    for k in y:
        assert np.all((after[k] > 0) | (before[k] < 2.0**-20)), k


def bad_group(name, structure, case, *, policy):
    """A group with a bad entry becomes what the policy says, and the others what they would."""
    d, rng = drawn(case, structure), np.random.default_rng(case.seed)
    bad = BAD[case.power % 3]
    leaf = rng.choice([k for k, x in d.grads.items() if x.size])
    at = np.unravel_index(rng.integers(d.grads[leaf].size), d.grads[leaf].shape)
    spoiled, without = (d.grads | {leaf: _with(d.grads[leaf], at, x)} for x in (bad, 0))
    y, z = run(name, structure, d, [spoiled, without], policy=policy).updates
    group = _group_of(name, without, leaf, at)
    for k in y:
        same_bits(y[k], z[k], where=~group[k])
        if policy == "zero":
            assert (y[k][group[k]] == 0).all(), k
        if policy == "sanitize":
            same_bits(y[k], z[k], where=group[k])
    if policy == "propagate":
        assert np.isnan(y[leaf][at])


def strict(name, structure, case):
    """Under scale.strict the float64 norm is <= the limit, and f(f(x)) has the bits of f(x)."""
    d = drawn(case, structure)
    y = run(name, structure, d, [d.grads]).updates[0]
    after, flushed = sizes(name, y, d.params), lost(name, d)  # what is flushed has norm 0
    for k in y:
        assert (after[k] <= np.maximum(np.float64(d.limit), flushed[k])).all(), (k, after[k])
    z = run(name, structure, d, [y]).updates[0]
    for k in y:
        same_bits(z[k], y[k])


# -- of trees of arrays


def same_bits(actual, expected, where=True):
    """Two arrays agree in dtype and in every bit where the mask, which broadcasts, holds."""
    assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape)
    where = np.broadcast_to(where, actual.shape)
    if trees.bits(actual[where]) != trees.bits(expected[where]):
        raise AssertionError(f"{actual[where]} is not {expected[where]}")


def _negative(tree):
    return {k: -x for k, x in tree.items()}


def _scaled(tree, times):
    def scaled(x):
        parts = x.view(x.real.dtype)  # a product of complex numbers loses the sign of zeros
        return (parts * np.asarray(times, parts.dtype)).astype(parts.dtype).view(x.dtype)

    with np.errstate(over="ignore"):
        return {k: scaled(x) for k, x in tree.items()}


def _range(leaves):
    """The least number other than 0, and more than any norm."""
    parts = [np.ravel(x) for leaf in trees.float64(leaves) for x in (leaf.real, leaf.imag)]
    whole = np.abs(np.concatenate(parts))
    return np.min(whole, where=whole > 0, initial=np.inf), tree_norm([whole])


def _is_normal(x):
    """Where no part of an entry is subnormal, infinite, or so small that its products may be."""
    lowest = 2.0**-14 if x.dtype == np.float16 else 2.0**-90
    wide = trees.float64(x)
    parts = np.abs(wide.real), np.abs(wide.imag)
    return np.all([((p == 0) | (p >= lowest)) & np.isfinite(p) for p in parts], axis=0)


def _with(x, at, value):
    changed = np.array(x)  # of a scalar too, which x[-1] of a stack is no array of
    changed[at] = value
    return changed


def _group_of(name, tree, leaf, at):
    """Which entries share a norm with one of them, as masks that broadcast to the leaves."""
    own = {"adagc": "tree", "scale_by_stable_adam": "leaf"}.get(name, ALL[name].groups)
    group = {k: np.full(x.shape, own == "tree") for k, x in tree.items()}
    if own == "leaf":
        group[leaf][...] = True
    elif own == "entry":
        group[leaf][at] = True
    elif own == "unit":
        axes = unit_axes(tree[leaf])
        axes = range(tree[leaf].ndim) if axes is None else np.atleast_1d(axes)
        group[leaf][tuple(slice(None) if i in axes else n for i, n in enumerate(at))] = True
    return group
