"""Deliberate faults, one at a time: does a test turn red?

    python tests/mutants.py            all of them; the exit status is 1 if one lives
    python tests/mutants.py psum nan   those with one of these words in their name

Each fault is one replacement in a copy of the package, and the tests that should notice are run
on the copy. They are run on an unbroken copy first: a test that is red anyway tells nothing.
"""

import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
PYTEST = shlex.quote(str(Path(sys.executable).parent / "pytest"))
LONGEST = 300  # seconds: devices that wait for each other do so for ever


class Fault(NamedTuple):
    """A replacement in one file, and the tests that are run on it."""

    file: str
    right: str
    wrong: str
    tests: str  # arguments of pytest
    settings: dict[str, str] | None = None  # of the environment: what the tests pretend


ONE_DEVICE = {"XLA_FLAGS": "--xla_force_host_platform_device_count=1"}
GPU = {"OPTAXCLIP_PRETEND_GPU": "1", **ONE_DEVICE}


FAULTS = {
    "drop the psum": Fault(
        "measure/shards.py",
        "return jax.lax.psum(x, names) if names else x",
        "return x",
        "test_shard_map.py -k 'untracked or tracked'",
    ),
    "count a replicated leaf once per device": Fault(
        "measure/shards.py",
        "known if not _is_tracked(name) or name in varying(leaf)",
        "known",
        "test_shard_map.py",
    ),
    "branch on what devices disagree on": Fault(
        "measure/shards.py",
        "return jax.lax.pmax(flag.astype(jnp.int32), names) > 0 if names else flag",
        "return flag",
        "test_shard_map.py",
    ),
    "add up leaves that lie on other devices": Fault(
        "measure/shards.py",
        "if kind.mesh.size > 1 and AxisType.Auto in kind.mesh.axis_types:",
        "if False:",
        "test_bundles.py -k elsewhere",
    ),
    "lose a NaN in a maximum over devices": Fault(
        "measure/reductions.py",
        "return jnp.where(bad, jnp.full_like(most, jnp.nan), most)",
        "return most",
        "test_mesh.py -k nan",
    ),
    "feed NaN into memory": Fault(
        "threshold/base.py",
        "return jnp.where(leading(mask, y), x.astype(y.dtype), y)",
        "return x.astype(y.dtype)",
        "test_adaptive.py -k 'bad_step and clip_by_ema_ratio'",
    ),
    "learn a norm of zero": Fault(
        "_memory.py",
        "telling = finite & (size >= TOO_SMALL) & (size < TOO_LARGE)",
        "telling = finite & (size < TOO_LARGE)",
        "test_adaptive.py -k zero",
    ),
    "sum in the dtype of the leaf": Fault(
        "measure/arithmetic.py",
        "    x = widen(x)\n    if ord == EUCLIDEAN:\n",
        "    if ord == EUCLIDEAN:\n",
        "test_measure.py test_failures.py -k 'failure_1_ or half or float16 or bfloat16'",
    ),
    "< for <=: clip at the limit": Fault(
        "scale/hard.py",
        "over=~(norm <= limit))",
        "over=~(norm < limit))",
        "test_scale.py test_clip.py -k 'ends or zero'",
    ),
    "swap the axes of a unit": Fault(
        "measure/units.py",
        "by_rank = {2: (0,), 3: (0,), 4: (0, 1, 2)",
        "by_rank = {2: (1,), 3: (0,), 4: (0, 1, 2)",
        "test_variants.py -k adaptive_grad_clip",
    ),
    "skip the cast": Fault(
        "_clip.py",
        "rounded = y if y.dtype == grad.dtype else cast(y, grad.dtype)",
        "rounded = y",
        "test_clip.py -k dtype",
    ),
    "lose the counter": Fault(
        "_summary.py",
        "steps=optax.safe_increment(before.steps),",
        "steps=before.steps,",
        "test_record.py",
    ),
    "let a counter overflow": Fault(
        "_summary.py",
        "steps=optax.safe_increment(before.steps),",
        "steps=before.steps + 1,",
        "test_record.py",
    ),
    "alias a buffer": Fault(
        "record.py",
        "*(jnp.zeros((), jnp.int32) for _ in range(3))",
        "*[jnp.zeros((), jnp.int32)] * 3",
        "test_record.py test_clip.py test_restore.py -k 'donat or buffer'",
    ),
    "forget the floor of the weights": Fault(
        "measure/modifiers.py",
        "weight = jnp.maximum(weight.astype(norm.dtype), jnp.asarray(eps, norm.dtype))",
        "weight = weight.astype(norm.dtype)",
        "test_variants.py test_measure.py -k 'adaptive_grad_clip or relative'",
    ),
    "forget the floor of the spread": Fault(
        "threshold/zscore.py",
        "jnp.maximum(deviation, as_like(min_sigma, norm) * mean)",
        "deviation",
        "test_threshold_oracles.py test_arguments.py test_adaptive.py -k 'zclip or zscore'",
    ),
    "clip after learning": Fault(
        "threshold/ema_ratio.py",
        "limit = as_like(ratio, norm) * average",
        "limit = as_like(ratio, norm) * averages.mean(average, norm, decay)",
        "test_threshold_oracles.py test_golden_adaptive.py -k 'ema_ratio or adagc'",
    ),
    "feed the raw norm where a capped one is due": Fault(
        "threshold/feed.py",
        "return jnp.minimum(norm, cap)",
        "return norm",
        "test_threshold_oracles.py",
    ),
    "flip the sign under a negative limit": Fault(
        "_clip.py",
        "allowed = jnp.where(is_bad(limit), 0, limit)",
        "allowed = limit",
        "test_bad_input.py test_clip.py -k 'traced or sign'",
    ),
    "take a bad group for a good one": Fault(
        "_clip.py",
        "y = where(counts, y, spread)",
        "y = y",
        "test_clip.py -k 'nonfinite or nan'",
    ),
    "clip what is not to be measured again": Fault(
        "measure/looks.py",
        "return norm / power.astype(norm.dtype)",
        "return norm",
        "test_measure.py test_clip.py -k 'range or small or large'",
    ),
    "let XLA undo the power of two": Fault(
        "measure/looks.py",
        "unknown = jax.lax.optimization_barrier(jnp.float32(power))",
        "unknown = jnp.float32(power)",
        "test_clip.py test_measure.py -k 'range or small or large'",
    ),
    "let XLA see a leaf that it knows": Fault(
        "measure/looks.py",
        "return widened, lambda g: widened(jax.lax.optimization_barrier(g))",
        "return widened, widened",
        "test_clip.py -k known_while",
    ),
    "make all pieces at once": Fault(
        "measure/pieces.py",
        "if found else jnp.zeros(())",
        "if False else jnp.zeros(())",
        "test_pieces.py -k no_such_array",
        ONE_DEVICE,
    ),
    "let one leaf of a piece spoil the next piece": Fault(
        "measure/pieces.py",
        "return jnp.where(last < 0, last, jnp.zeros_like(last))",
        "return jnp.minimum(last, 0)",
        "test_pieces.py -k out_of_range",
        ONE_DEVICE,
    ),
    "leave packed norms in the order in which they were measured": Fault(
        "measure/norms.py",
        "return np.argsort(np.concatenate([order for order, *_ in groups(grads)]))",
        "return np.concatenate([order for order, *_ in groups(grads)])",
        "test_pieces.py -k its_own_norm",
        ONE_DEVICE,
    ),
    "hand each unit the norm of another": Fault(
        "measure/units.py",
        "found = dict(zip(order, each, strict=True))",
        "found = dict(enumerate(each))",
        "test_pieces.py test_clip.py -k 'its_own_norm or unit'",
        ONE_DEVICE,
    ),
    "measure the tree again times another power": Fault(
        "measure/looks.py",
        "found = packing.norms(grads, params, product, powers)",
        "found = packing.norms(grads, params, product, jax.tree.map(lambda x: x[::-1], powers))",
        "test_pieces.py -k out_of_range",
        ONE_DEVICE,
    ),
    "let XLA see where a leaf has its own numbers": Fault(
        "_numbers.py",
        "one = jax.lax.optimization_barrier(jnp.uint32(1))",
        "one = 1",
        "test_pieces.py -k add_no_loops",
        ONE_DEVICE,
    ),
    "widen parameters once for two": Fault(
        "measure/modifiers.py",
        "weights = behind_a_barrier(weights)",
        "pass",
        "test_pieces.py -k parameters",
        ONE_DEVICE,
    ),
    "take inf for a large entry": Fault(
        "_entries.py",
        "jnp.where(size < most, least | sign, other)",
        "jnp.where(size <= most, least | sign, other)",
        "test_clip.py -k edges",
    ),
    "let a leaf vary with those beside it": Fault(
        "measure/shards.py",
        "those = [i for i, x in enumerate(leaves) if varying(x) == names]",
        "those = [*range(len(leaves))]",
        "test_shard_map.py -k narrow",
    ),
    "take NaN for a number >= 0": Fault(
        "_numbers.py",
        "return jnp.isnan(limit) | (limit < 0)",
        "return ~(limit >= 0)",
        "test_clip.py -k nan",
    ),
    "put a state where its parameters are not": Fault(
        "_place.py",
        "spec = PartitionSpec() if norm.sharding is None else norm.sharding.spec",
        "spec = PartitionSpec()",
        "test_mesh.py -k memories",
    ),
    "round to nearest where a bound is strict": Fault(
        "scale/hard.py",
        "bits & mask",
        "bits",
        "test_scale.py test_clip.py -k strict",
    ),
    "never learn anew": Fault(
        "threshold/relearning.py",
        "level = length >= as_like(patience, length)",
        "level = length < 0",
        "test_adaptive.py -k 'rise_by_20 and zclip'",
    ),
    "overlook a negative count": Fault(
        "_range.py",
        "inside &= x >= self.low",
        "pass",
        "test_validate.py",
    ),
    "accept a NaN as a threshold": Fault(
        "_check.py",
        "_number(name, value, allowed, lambda x: x >= 0)",
        "_number(name, value, allowed, lambda x: not x < 0)",
        "test_check.py test_bad_input.py",
    ),
    "let a skipped step into the state inside": Fault(
        "skipping.py",
        "kept = _chosen(skip, state.inner, inner_state)",
        "kept = inner_state",
        "test_skipping.py -k 'bits or bit or stay'",
    ),
    "learn from skipped steps": Fault(
        "_judge.py",
        "if learns_all else ~verdict.skip",
        "if learns_all else jnp.ones_like(verdict.skip)",
        "test_skipping.py -k good_ones_alone",
    ),
    "take what is not finite when giving way": Fault(
        "_judge.py",
        "for group in (*norms, *losses)]) & ~nonfinite",
        "for group in (*norms, *losses)]) | nonfinite",
        "test_skipping.py -k never_taken",
    ),
    "drop all tokens that tie": Fault(
        "cotangent.py",
        "chosen = above | (equal & (jnp.cumsum(equal) <= k - jnp.sum(above)))",
        "chosen = above | equal",
        "test_cotangent.py -k ties",
    ),
    "let a bad example into the sum": Fault(
        "per_example/average.py",
        "tx = clip(measured, constant(max_norm), rule, record=False)",
        'tx = clip(measured, constant(max_norm), rule, nonfinite="propagate", record=False)',
        "test_per_example.py -k poison",
    ),
    "judge each key head by its first query head": Fault(
        "qk.py",
        "size = jnp.max(size.reshape(*seen.shape[:-1], key_heads, -1), -1)",
        "size = size.reshape(*seen.shape[:-1], key_heads, -1)[..., 0]",
        "test_qk.py -k groups",
    ),
    "end the fraction of tanh early": Fault(
        "scale/soft.py", "range(15, 0, -2)", "range(5, 0, -2)", "test_soft.py -k float64_factors"
    ),
    "carry without a bound": Fault(
        "feedback.py",
        "rest = rest * rescale(jnp.abs(rest), bound).astype(carry.dtype)",
        "rest = rest * 1",
        "test_feedback.py -k 'bounded or max_carry'",
    ),
    "round below the normal numbers as above": Fault(
        "scale/hard.py",
        "small = jnp.abs(x) < float(narrow.smallest_normal)",
        "small = jnp.abs(x) < 0",
        "test_scale.py -k strict",
    ),
    "leave the metrics at new addresses": Fault(
        "_summary.py",
        "return jnp.where(steps < 0, old, new)",
        "return new",
        "test_record.py -k in_place",
    ),
    "count bad entries as clipped": Fault(
        "_entries.py",
        "[(x > allowed + NORMAL).astype(jnp.int32) for x in turned]",
        "[(x > allowed).astype(jnp.int32) for x in bits]",
        "test_record.py -k entries",
        ONE_DEVICE,
    ),
    "take the largest of what is not finite": Fault(
        "_entries.py",
        "jnp.maximum(jnp.max(turned), NORMAL) - NORMAL",
        "jnp.max(turned) - NORMAL",
        "test_record.py -k no_entry",
        ONE_DEVICE,
    ),
    "take one limit for all where each has its own": Fault(
        "_clip.py",
        "is_uniform(threshold)",
        "True",
        "test_record.py test_adaptive.py -k 'entries or second_moment'",
        ONE_DEVICE,
    ),
    "add up squares in float32 and not look again": Fault(
        "measure/looks.py",
        "functools.partial(_widened, wide=True), grads), params)",
        "functools.partial(_widened, wide=False), grads), params)",
        "test_clip.py test_measure.py -k 'range or small or large'",
        GPU,
    ),
    "add up squares in float32 in one look on a CPU": Fault(
        "measure/looks.py",
        "    widened = functools.partial(_widened, wide=True)\n",
        "    widened = functools.partial(_widened, wide=False)\n",
        "test_pieces.py -k out_of_range",
        ONE_DEVICE,
    ),
    "have XLA add up what it knows while compiling": Fault(
        "measure/reductions.py",
        "jnp.full(x.shape, zero)",
        "jnp.zeros(x.shape, jnp.int32)",
        "test_pieces.py -k while_compiling",
        ONE_DEVICE,
    ),
    "read all large leaves before any is clipped": Fault(
        "measure/norms.py",
        "last = pieces.awaited(found[-1], parts)",
        "last = None",
        "test_pieces.py -k waits_for_no_later",
        ONE_DEVICE,
    ),
    "have all leaves wait for all norms": Fault(
        "measure/pieces.py",
        "least = max(GROUP, sum(sizes[i] for i in others) // MOST)",
        "least = math.inf",
        "test_pieces.py -k waits_for_no_later",
        ONE_DEVICE,
    ),
    "lay leaves together whose sums are float64": Fault(
        "measure/pieces.py",
        "return TINY if wide else SMALL",
        "return SMALL",
        "test_bundles.py -k only_tiny",
        ONE_DEVICE,
    ),
    "lay leaves together for metrics of their entries": Fault(
        "measure/pieces.py",
        "if _is_small(leaf, TINY) and are_here(leaf):",
        "if _is_small(leaf, SMALL) and are_here(leaf):",
        "test_bundles.py -k only_metrics",
        ONE_DEVICE,
    ),
    "have leaves alone wait for those that lie together": Fault(
        "measure/norms.py",
        "for group in pieces.in_turn(parts, small) if looks_once",
        "for group in pieces.in_turn(parts) if looks_once",
        "test_pieces.py -k wait_for_each_other",
        ONE_DEVICE,
    ),
    "read one entry's size for those beside it": Fault(
        "_entries.py",
        "most = [functools.reduce(jnp.maximum, sizes) for",
        "most = [sizes[0] for",
        "test_record.py -k read_as_one",
        ONE_DEVICE,
    ),
    "count one entry for those beside it": Fault(
        "_entries.py",
        "above = functools.reduce(jnp.add,",
        "above = functools.reduce(jnp.maximum,",
        "test_record.py -k read_as_one",
        ONE_DEVICE,
    ),
    "have norms of leaves in another order than the leaves": Fault(
        "measure/norms.py",
        "sums = pieces.power_sums(parts, axes, ord, fun, mine, after=last, small=small)",
        "sums = pieces.power_sums(parts, axes, ord, fun, mine, after=last)",
        "test_pieces.py -k its_own_norm",
        ONE_DEVICE,
    ),
    "ask for a size that is not known": Fault(
        "measure/bundles.py",
        "MOST if len(group) == 1 or group[0]",
        "MOST if group[0]",
        "test_export.py -k left_open",
    ),
    "have large leaves in bundles of sixteen": Fault(
        "measure/bundles.py",
        "<= SMALL else MOST_LARGE",
        "<= SMALL else MOST",
        "test_bundles.py -k large_leaves",
        ONE_DEVICE,
    ),
    "add up float64 leaf by leaf": Fault(
        "measure/bundles.py",
        "may_be_large = _device.on_cpu() and real_dtype(leaf) == jnp.float64",
        "may_be_large = False",
        "test_bundles.py -k large_leaves",
        ONE_DEVICE,
    ),
    "divide before a norm is known to be finite": Fault(
        "measure/norms.py",
        "found = [sizes.astype(jnp.float32) for sizes in found]",
        "pass",
        "test_pieces.py -k whatever_it_is_divided_by",
        ONE_DEVICE,
    ),
    "have a TPU add up in float64": Fault(
        "measure/looks.py",
        "cpu=_wide(packing), default=plain)",
        "cpu=_wide(packing), default=_wide(packing))",
        "test_pieces.py -k tpu",
        ONE_DEVICE,
    ),
    "leave float64 to the slow library": Fault(
        "measure/reductions.py",
        "return jax.lax.optimization_barrier(tuple(both))[0]",
        "return both[0]",
        "test_pieces.py -k one_look",
        ONE_DEVICE,
    ),
    "round every tie of bfloat16 up": Fault(
        "_numbers.py",
        "0x7FFF + ((bits >> 16) & 1)",
        "0x8000",
        "test_clip.py -k nearest",
    ),
    "make Adam's direction of moments that are not kept": Fault(
        "stable_adam.py",
        "m.nu, eps), grads, moments)",
        "m.nu, eps), grads, learned)",
        "test_bundles.py -k stable",
        ONE_DEVICE,
    ),
    "write Adam's quotients to memory": Fault(
        "stable_adam.py",
        "        return in_range(rms, surprise, None)",
        "        return rms.norms(surprise, None)",
        "test_bundles.py -k stable",
        ONE_DEVICE,
    ),
    "sanitize once for norms and updates": Fault(
        "_clip.py",
        "twice = _device.on_cpu() and not any_narrow(grads)",
        "twice = False",
        "test_bundles.py -k sanitized",
        ONE_DEVICE,
    ),
    "give quotients to a library, for their maximum": Fault(
        "measure/reductions.py",
        "jax.lax.optimization_barrier(both)[0]",
        "both[0]",
        "test_bundles.py -k clippy",
        ONE_DEVICE,
    ),
    "take a NaN with a sign for the least integer": Fault(
        "measure/reductions.py",
        " & UNSIGNED",
        "",
        "test_measure.py -k nan_with_a_sign",
        ONE_DEVICE,
    ),
    "shift norms by more than has a square": Fault(
        "threshold/averages.py",
        "2.0**61",
        "2.0**85",
        "test_threshold.py -k mean_square",
        ONE_DEVICE,
    ),
    "square norms as they are": Fault(
        "threshold/averages.py",
        "    power = choice(SHIFT, 1 / SHIFT)",
        "    power = choice(1, 1)",
        "test_threshold_oracles.py -k oracle",
        ONE_DEVICE,
    ),
    "ask for a ratio of norms in float64": Fault(
        "measure/modifiers.py",
        "suits=suits, wide=False)",
        "suits=suits)",
        "test_clip.py test_measure.py test_pieces.py -k relative",
        ONE_DEVICE,
    ),
    "clip the tree, and then its leaves": Fault(
        "variants/adagc.py",
        "if measure is not None or nonfinite",
        "if True or nonfinite",
        "test_bundles.py -k adam_reads",
        ONE_DEVICE,
    ),
    "add up norms that are whole over devices": Fault(
        "variants/adagc.py",
        "clips(global_norm(axis_name=()), _EACH)",
        "clips(global_norm(axis_name=axis_name), _EACH)",
        "test_shard_map.py -k 'adagc'",
    ),
    "update what Adam did not learn": Fault(
        "stable_adam.py",
        "lambda learns, d: jnp.where(learns, d, jnp.nan)",
        "lambda learns, d: d",
        "test_adaptive.py -k 'stable and sanitizes'",
    ),
    "write clipped bfloat16 to memory": Fault(
        "_numbers.py",
        "return _nearest_bfloat16(x) if by_bits else x.astype(dtype)",
        "return x.astype(dtype)",
        "test_bundles.py -k adam_reads",
    ),
    "measure another dtype than is clipped": Fault(
        "_clip.py",
        "clean = jax.tree.map(sanitized, hidden)",
        "clean = jax.tree.map(lambda g: sanitized(widen(g)), hidden)",
        "test_pieces.py -k policies",
        ONE_DEVICE,
    ),
    "lose the rows beyond equal parts": Fault(
        "measure/reductions.py",
        "if PARTS * length < rows.shape[0]:",
        "if False:",
        "test_pieces.py -k columns",
        ONE_DEVICE,
    ),
    "add columns of all leaves up at once": Fault(
        "measure/pieces.py",
        "wait = after if last is None else last",
        "wait = after",
        "test_pieces.py -k share_their_memory",
        ONE_DEVICE,
    ),
    "wait for a norm of a leaf without any": Fault(
        "measure/pieces.py",
        "if several and norms.size)",
        "if several)",
        "test_pieces.py -k columns",
        ONE_DEVICE,
    ),
    "mix up the leaves on a GPU": Fault(
        "measure/rows.py",
        "order = np.argsort([*here, *rest])",
        "order = np.asarray([*here, *rest])",
        "test_pieces.py -k each_leaf_has",
        GPU,
    ),
    "mix up the units on a GPU": Fault(
        "measure/rows.py",
        "return sorted(range(len(parts)), key=lambda i: _is_whole(parts[i], axes[i]))",
        "return list(range(len(parts)))",
        "test_pieces.py -k many_leaves_has",
        GPU,
    ),
    "take the factor of the next leaf on a GPU": Fault(
        "_numbers.py",
        "[one + np.uint32(at) - 1 for",
        "[one + np.uint32(at) for",
        "test_pieces.py -k many_leaves_has",
        GPU,
    ),
}


def broken(fault, folder):
    """A copy of the package with that fault."""
    shutil.copytree(ROOT / "optaxclip", folder / "optaxclip")
    if fault is None:
        return
    path = folder / "optaxclip" / fault.file
    text = path.read_text(encoding="utf-8")
    if text.count(fault.right) != 1:
        message = f"{fault.file} has {text.count(fault.right)} times: {fault.right!r}"
        raise SystemExit(message)
    path.write_text(text.replace(fault.right, fault.wrong), encoding="utf-8")


def red(fault, tests, settings):
    """The first test that fails on a copy of the package with that fault, or ""."""
    with tempfile.TemporaryDirectory() as name:
        broken(fault, Path(name))
        # `pytest`, because `python -m pytest` would look into the checkout first.
        command = f"{PYTEST} -x -q -n 0 -p no:cacheprovider {tests}"
        try:
            done = subprocess.run(
                shlex.split(command),
                cwd=ROOT / "tests",
                env=os.environ | {"PYTHONPATH": name, "OPTAXCLIP_TESTED": name} | (settings or {}),
                capture_output=True,
                text=True,
                check=False,
                timeout=LONGEST,
            )
        except subprocess.TimeoutExpired:
            return f"no end within {LONGEST} s"
    if done.returncode < 0:
        return f"killed by signal {-done.returncode}"
    if done.returncode not in (0, 1, 2):  # 2: a test file that cannot even be imported
        raise SystemExit(done.stdout + done.stderr)
    failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return failed[0] if failed else ""


def main():
    """Prints what each fault turned red."""
    chosen = {
        name: fault
        for name, fault in FAULTS.items()
        if not sys.argv[1:] or any(word in name for word in sys.argv[1:])
    }
    alive = 0
    for name, fault in chosen.items():
        already = red(None, fault.tests, fault.settings)
        found = already or red(fault, fault.tests, fault.settings)
        alive += bool(already) or not found
        verdict = "RED BEFORE" if already else "red" if found else "ALIVE"
        print(f"{verdict:<10} {name}: {found[:150]}", flush=True)
    print(f"{len(chosen)} faults, {len(chosen) - alive} noticed")
    return min(alive, 1)


if __name__ == "__main__":
    sys.exit(main())
