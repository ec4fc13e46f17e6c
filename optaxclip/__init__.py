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
from .export import register_for_export as register_for_export
from .record import ClipState as ClipState
from .record import Metrics as Metrics
from .record import metrics as metrics
from .stable_adam import scale_by_stable_adam as scale_by_stable_adam
from .validate import Problem as Problem
from .validate import validate_state as validate_state
from .variants import adagc as adagc
from .variants import adaptive_grad_clip as adaptive_grad_clip
from .variants import autoclip as autoclip
from .variants import clip_by_average_norm as clip_by_average_norm
from .variants import clip_by_block_rms as clip_by_block_rms
from .variants import clip_by_ema_ratio as clip_by_ema_ratio
from .variants import clip_by_global_norm as clip_by_global_norm
from .variants import clip_by_norm as clip_by_norm
from .variants import clip_by_norm_growth as clip_by_norm_growth
from .variants import clip_by_percentile as clip_by_percentile
from .variants import clip_by_quantile as clip_by_quantile
from .variants import clip_by_second_moment as clip_by_second_moment
from .variants import clip_by_sigma as clip_by_sigma
from .variants import clip_by_value as clip_by_value
from .variants import clippy as clippy
from .variants import normalize_by_global_norm as normalize_by_global_norm
from .variants import stabilize_gradients as stabilize_gradients
from .variants import zclip as zclip

__version__ = "0.1.0"
