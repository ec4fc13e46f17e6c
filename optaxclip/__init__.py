"""Gradient clipping for JAX: composable Optax transformations that say what they did.

    grads, params --measure--> norms --threshold--> limits --scale--> factors --clip--> grads
                                 |        ^  |                           |
                                 |  memory+  +memory                     |
                                 +----------------- record <-------------+

Chain a named clipper before an optimizer, and read its metrics out of the optimizer state:

>>> import jax.numpy as jnp, optax, optaxclip
>>> tx = optax.chain(optaxclip.clip_by_global_norm(1.0), optax.adamw(1e-3))
>>> params = {"w": jnp.array([3.0, 4.0])}
>>> updates, opt_state = tx.update(params, tx.init(params), params)
>>> print(optaxclip.metrics(opt_state)["norm"])
5.0

Or compose one out of the rooms of the flow: `clip(measure, threshold, scale)`.
"""

from . import measure as measure
from . import scale as scale
from . import threshold as threshold
from ._clip import clip as clip
from .record import ClipState as ClipState
from .record import Metrics as Metrics
from .record import metrics as metrics
from .variants import adaptive_grad_clip as adaptive_grad_clip
from .variants import clip_by_average_norm as clip_by_average_norm
from .variants import clip_by_block_rms as clip_by_block_rms
from .variants import clip_by_global_norm as clip_by_global_norm
from .variants import clip_by_norm as clip_by_norm
from .variants import clip_by_value as clip_by_value
from .variants import normalize_by_global_norm as normalize_by_global_norm

__version__ = "0.1.0"
