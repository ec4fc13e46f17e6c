"""The named clippers, each one line of measure x threshold x scale.

=============  =================================================================================
file           the limit is
=============  =================================================================================
`fixed`        given
`windowed`     a statistic of a window of past norms
`running`      made of a few running numbers
`ratio`        a multiple of what the norm was
`adagc`        one for the tree at first, then a multiple of what each leaf's norm was
`updates`      relative to each parameter, for final updates
`normalizers`  the norm of every update: these are no clips
`automatic`    chosen for you: 1 at first, then a statistic of a window
=============  =================================================================================

All take their threshold first and the rest by keyword, and these two:

* `nonfinite`: "zero", "propagate" or "sanitize", what becomes of a group whose norm is inf or NaN;
* `record`: whether the state keeps metrics.

See :func:`optaxclip.clip` for both, for what is guaranteed, and for the shape of the state.
"""

from .adagc import adagc as adagc
from .automatic import auto_clip as auto_clip
from .fixed import adaptive_grad_clip as adaptive_grad_clip
from .fixed import clip_by_average_norm as clip_by_average_norm
from .fixed import clip_by_block_rms as clip_by_block_rms
from .fixed import clip_by_global_norm as clip_by_global_norm
from .fixed import clip_by_norm as clip_by_norm
from .fixed import clip_by_value as clip_by_value
from .normalizers import normalize_by_global_norm as normalize_by_global_norm
from .normalizers import stabilize_gradients as stabilize_gradients
from .ratio import clip_by_ema_ratio as clip_by_ema_ratio
from .ratio import clip_by_norm_growth as clip_by_norm_growth
from .running import clip_by_quantile as clip_by_quantile
from .running import clip_by_second_moment as clip_by_second_moment
from .running import zclip as zclip
from .updates import clippy as clippy
from .windowed import autoclip as autoclip
from .windowed import clip_by_percentile as clip_by_percentile
from .windowed import clip_by_sigma as clip_by_sigma
