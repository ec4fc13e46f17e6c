"""Every law on every variant, with a few cases that are the same in every run; fuzz.py has more."""

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from laws import LAWS, OWN_PROGRAM
from runs import ALL
from strategies import Case, cases

import optaxclip as oc

# Where a law compiles programs of its own, it is tried on small ones, and on one variant for each
# kind of group and of memory.
FEW = (
    "clip_by_global_norm",
    "adaptive_grad_clip",
    "clip_by_quantile",
    "clip_by_norm_growth",
    "clip_by_second_moment",
)

# By variant, so that one process tries all laws on the programs of a variant.
EVERY_LAW = [
    pytest.param(law, variant, id=f"{variant}-{law}")
    for variant in ALL
    for law in LAWS
    if variant in LAWS[law].variants
    if law not in OWN_PROGRAM or variant in FEW or law == "strict"
]


def _structure(law):
    if law == "strict" or law not in OWN_PROGRAM:
        return "mixed"
    return "same" if "same" in LAWS[law].structures else LAWS[law].structures[0]


def holds(law, variant, structure, examples):
    """Tries a law on as many cases, the same ones in every run."""

    @hypothesis.settings(
        max_examples=examples,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=[hypothesis.HealthCheck.filter_too_much],
    )
    @hypothesis.given(cases())
    def on(case):
        LAWS[law].check(variant, structure, case)

    on()


@pytest.mark.parametrize(("law", "variant"), EVERY_LAW)
def test_law(law, variant):
    """The law holds for the variant, mostly on a tree of every dtype."""
    holds(law, variant, _structure(law), examples=10)


@pytest.mark.parametrize("variant", ["clip_by_norm", "clip_by_global_norm", "clippy"])
def test_a_subnormal_bfloat16_entry_is_kept_in_a_loop(variant):
    """What is within its limit keeps its bits in a scan, where jax 0.12 flushes barriers."""
    LAWS["no_op"].check(variant, "mixed", Case(seed=255, kind="subnormal"))


def test_units_that_overflow_clip_nothing():
    """Where lambda |w| is more than float32 holds, no finite entry is too large for it."""
    LAWS["no_op"].check("clippy", "ranks", Case(exponent=120, limit=4))


def test_a_tiny_first_gradient_does_not_freeze_a_coordinate():
    """A coordinate that began with a gradient too small to remember is not clipped for ever."""
    tx = oc.clip_by_second_moment(warmup=2)
    update = jax.jit(tx.update)
    state = tx.init(jnp.zeros(2))

    for gradient in [2e-37, *[1.0] * 30]:
        updates, state = update(jnp.array([gradient, 1.0]), state)

    np.testing.assert_array_equal(updates, [1.0, 1.0])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_subnormal_scalar_becomes_zero_too(dtype):
    """Limit 0 and a bad leaf make zeros of a scalar leaf, however small it is."""
    tiny = jnp.asarray(jnp.finfo(dtype).smallest_subnormal, dtype)
    grads = {"scalar": tiny, "vector": jnp.ones(2)}
    off, tx = oc.clip_by_global_norm(0.0), oc.clip_by_global_norm()

    none, _ = off.update(grads, off.init(grads))
    bad, _ = tx.update(grads | {"vector": jnp.full(2, jnp.nan)}, tx.init(grads))

    # As bytes, because comparing with 0 would flush it.
    assert np.asarray(none["scalar"]).tobytes() == np.asarray(bad["scalar"]).tobytes()
    assert not any(np.asarray(none["scalar"]).tobytes())
