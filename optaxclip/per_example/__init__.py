"""gradients of examples -> their average, each clipped by itself: one outlier moves it little.

A clip of the average sees a wrong label only once it is in the average. Here each example's
gradient is clipped first, so that none moves the average by more than max_norm / B.

========================  ========================================================================
function                  use it when
========================  ========================================================================
`clipped_value_and_grad`  there is a loss of one example: takes the place of `jax.value_and_grad`,
                          in the memory of a few microbatches of gradients
`per_example_clip`        the gradients are there, with an axis of examples
`update_max_norm`         the limit should follow a quantile of the norms
========================  ========================================================================

**No privacy is claimed.** There is no noise and no accounting, a bad example is visible in the
counts, and a limit that follows the norms has learned from them. For differential privacy, use
`jax_privacy`, whose `clipped_grad` has the same numbers where both do the same.

The examples' gradients go through the engine, so that its guarantees hold for each of them: norms
in float32 that neither overflow nor vanish, zeros for a norm that is not finite, no NaN at 0.
Outside `jax.jit`, make a measure or a rule once: a new one is a new program.

Inside `jax.shard_map` the average is that of the device's own examples, to be averaged further by
`jax.lax.pmean`. Gradients of parameters that every device holds whole want a measure that says so:
`measure=optaxclip.measure.global_norm(axis_name=())`.
"""

from .average import Examples as Examples
from .average import per_example_clip as per_example_clip
from .gradients import clipped_value_and_grad as clipped_value_and_grad
from .limit import update_max_norm as update_max_norm
