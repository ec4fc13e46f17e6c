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

To choose a limit, look first: `observe_norms` keeps a histogram of norms, `recommend_threshold`
makes a limit of it or of a log, and `replay` shows what a clipper would have done. The command
`optaxclip` does this for a file, and `plot` draws it. `diagnose` finds clips in the wrong place.

What is no clip of gradients by groups has a room of its own: `skipping` (whole steps), `cotangent`
(inside the backward pass), `spectral` (singular values), `feedback` (what was clipped comes later),
`per_example` (before the average), `qk` (attention weights) and `stable_adam` (inside Adam).
"""

from . import advise as advise
from . import cotangent as cotangent
from . import feedback as feedback
from . import lint as lint
from . import logs as logs
from . import measure as measure
from . import observe as observe
from . import per_example as per_example
from . import plot as plot
from . import qk as qk
from . import scale as scale
from . import skipping as skipping
from . import spectral as spectral
from . import threshold as threshold
from ._clip import clip as clip
from .advise import recommend_threshold as recommend_threshold
from .cotangent import clip_cotangent as clip_cotangent
from .cotangent import cotangent_probe as cotangent_probe
from .cotangent import drop_largest_cotangents as drop_largest_cotangents
from .export import register_for_export as register_for_export
from .feedback import clip_with_feedback as clip_with_feedback
from .lint import Finding as Finding
from .lint import diagnose as diagnose
from .observe import norm_summary as norm_summary
from .observe import observe_norms as observe_norms
from .per_example import clipped_value_and_grad as clipped_value_and_grad
from .per_example import per_example_clip as per_example_clip
from .per_example import update_max_norm as update_max_norm
from .qk import qk_clip as qk_clip
from .record import ClipState as ClipState
from .record import Metrics as Metrics
from .record import metrics as metrics
from .replaying import replay as replay
from .skipping import skip_step as skip_step
from .spectral import clip_by_spectral_norm as clip_by_spectral_norm
from .stable_adam import scale_by_stable_adam as scale_by_stable_adam
from .validate import Problem as Problem
from .validate import validate_state as validate_state
from .variants import adagc as adagc
from .variants import adaptive_grad_clip as adaptive_grad_clip
from .variants import auto_clip as auto_clip
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
