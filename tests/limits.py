"""The rules of `optaxclip.threshold` once more, in NumPy float64: loops over lists of past norms.

Each makes a function of a stream of norms (1-D) that gives the limits for it (1-D), and has the
name, the arguments and the defaults of the threshold that it is the oracle of. So a row such as
`lambda t: t.growth(1.01)` is both: the threshold with `threshold` for t, the oracle with this
module. A new threshold joins every test that runs over `RULES` by its oracle and one row here.
"""

import math

import numpy as np

# Where a rule has a jump, norms must be this far from it: rounding to float32 moves limits by 1e-5.
CLEAR = 1e-4


def rule(limits_of):
    """Makes `limits_of(norms, *arguments)` a function of the arguments that gives one of norms."""
    return lambda *args, **options: lambda norms: np.array(limits_of(norms, *args, **options))


def is_above(norm, boundary):
    """Whether a norm is above, so clearly that it is in float32 too."""
    assert not math.isclose(norm, boundary, rel_tol=CLEAR), "choose another stream"
    return norm > boundary


def deviation_from_median(norms):
    """The standard deviation of normal numbers, from the median of their distances to theirs."""
    return 1.4826 * np.median(np.abs(norms - np.median(norms)))


START = {"median": (np.median, deviation_from_median), "mean": (np.mean, np.std)}


@rule
def percentile(norms, percentile, *, window=1000, min_history=25, with_current=False):
    """The percentile of the latest norms."""
    limits = []
    for end in np.arange(len(norms)) + with_current:
        known = norms[max(end - window, 0) : end]
        limits.append(np.percentile(known, percentile) if len(known) >= min_history else np.inf)
    return limits


@rule
def quantile(norms, quantile, *, rate=0.05, initial=None, warmup=10, margin=None):
    """C_{t+1} = C_t exp(-eta (b_t - gamma)), b_t = [n_t <= C_t]."""
    above = math.exp(rate * (1 - quantile)) if margin is None else 1 + margin
    unlimited = warmup if initial is None else 0
    estimate = min(norms[:warmup]) if initial is None else initial
    limits = [np.inf] * unlimited
    for norm in norms[unlimited:]:
        limits.append(estimate * above)
        below = 0 if is_above(norm, estimate) else 1
        estimate *= math.exp(-rate * (below - quantile))
    return limits


@rule
def zscore(
    norms,
    z_max,
    *,
    decay=0.97,
    warmup=25,
    mode="reciprocal",
    feed="capped",
    start="median",
    min_sigma=0.05,
):
    """Mean and deviation as running averages; what is z > z* deviations above is lowered."""
    mean, sigma = (estimate(norms[:warmup]) for estimate in START[start])
    limits = [np.inf] * warmup
    for norm in norms[warmup:]:
        unit = max(sigma, min_sigma * mean)
        cap = limit = mean + z_max * unit
        outlier = is_above(norm, cap)
        if outlier:
            z = (norm - mean) / unit
            limit = {"reciprocal": mean + z_max**2 / z * unit, "mean": mean, "sigma": cap}[mode]
        limits.append(limit)
        if feed == "skip" and outlier:
            continue
        fed = {"capped": min(norm, cap), "clipped": min(norm, limit)}.get(feed, norm)
        mean = decay * mean + (1 - decay) * fed
        sigma = math.sqrt(decay * sigma**2 + (1 - decay) * (fed - mean) ** 2)
    return limits


@rule
def sigma(norms, k, *, window=128, feed="clipped", min_history=25, start="median", min_sigma=0.05):
    """The mean of the latest norms plus k deviations."""

    def boundary(known, start):
        mean, deviation = (estimate(known) for estimate in START[start])
        return mean + k * max(deviation, min_sigma * mean)

    limits, known = [], []
    for norm in norms:
        latest = known[-window:]
        limits.append(boundary(latest, "mean") if len(latest) >= min_history else np.inf)
        known.append(min(norm, limits[-1]) if feed == "clipped" else norm)
        if len(known) == min_history and start == "median":
            known = list(np.minimum(known, boundary(known, "median")))
    return limits


@rule
def ema_ratio(norms, ratio, *, decay=0.95, warmup=10):
    """So many times the running average of clipped norms."""
    average = min(norms[:warmup])
    limits = [np.inf] * warmup
    for norm in norms[warmup:]:
        limits.append(ratio * average)
        average = decay * average + (1 - decay) * min(norm, limits[-1])
    return limits


@rule
def growth(norms, max_growth, *, floor=0.0):
    """So many times the previous norm, as it was after clipping."""
    limits, previous = [np.inf], norms[0]
    for norm in norms[1:]:
        limits.append(max(max_growth * previous, floor))
        previous = min(norm, limits[-1])
    return limits


@rule
def second_moment(norms, k, *, decay=0.999, warmup=20, floor=0.0, feed="capped"):
    """So many root mean squares, these corrected for their start from 0."""
    limits, v = [], 0.0
    for t, norm in enumerate(norms):
        rms = math.sqrt(v / (1 - decay**t)) if t else np.inf
        boundary = max(k * rms, floor)
        limits.append(boundary if t >= warmup else np.inf)
        cap = max(boundary, 10 * rms)
        fed = {"capped": min(norm, cap), "clipped": min(norm, limits[-1]), "raw": norm}[feed]
        v = decay * v + (1 - decay) * fed**2
    return limits


@rule
def moment_ratio(norms, decay=0.6, norm_decay=0.999, *, bias_correction=True):
    """The mean over the root mean square, this norm included."""
    limits, m, v = [], 0.0, 0.0
    for t, norm in enumerate(norms, start=1):
        m = decay * m + (1 - decay) * norm
        v = norm_decay * v + (1 - norm_decay) * norm**2
        corrected = m / (1 - decay**t), v / (1 - norm_decay**t)
        mean, square = corrected if bias_correction else (m, v)
        limits.append(mean / math.sqrt(square))
    return limits


@rule
def bounded(norms, rule, *, min_norm=0.0, max_norm=np.inf):
    """The limits of another rule between bounds."""
    return np.clip(rule(norms), min_norm, max_norm)


@rule
def fallback(norms, rule, other):
    """The limits of another rule where the first has none."""
    return np.where(np.isinf(rule(norms)), other(norms), rule(norms))


@rule
def multiple(norms, rule, *, ratio):
    """So many times the limits of another rule."""
    return ratio * rule(norms)


@rule
def relearning(norms, rule, *, patience=25):
    """Whenever so many norms in a row were above the limit, the rule begins anew with the first."""
    limits, run = rule(norms), 0
    for t, norm in enumerate(norms):
        run = run + 1 if is_above(norm, limits[t]) else 0
        if run == patience:
            limits[t + 1 :] = rule(norms[t + 1 - patience :])[patience:]
            run = 0
    return limits


RULES = {
    "percentile": lambda t: t.percentile(95.0),
    "quantile": lambda t: t.quantile(0.9),
    "zscore": lambda t: t.zscore(2.5),
    "sigma": lambda t: t.sigma(3.0),
    "ema_ratio": lambda t: t.ema_ratio(2.0),
    "growth": lambda t: t.growth(1.01),
    "second_moment": lambda t: t.second_moment(3.0),
    "moment_ratio": lambda t: t.moment_ratio(),
    "bounded": lambda t: t.bounded(t.growth(1.01), min_norm=1.0, max_norm=3.0),
    "fallback": lambda t: t.fallback(t.ema_ratio(2.0), t.growth(1.5)),
    "multiple": lambda t: t.multiple(t.ema_ratio(2.0), ratio=1.5),
    "relearning": lambda t: t.relearning(t.growth(1.01)),
}
