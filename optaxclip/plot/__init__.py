"""log --> picture: what the norms were, what clipping did to them, and what limit fits.

======================  ========================================================================
picture                 what it shows
======================  ========================================================================
:func:`norms`           the norm of every step, its limit, which steps were clipped, the factors
:func:`histogram`       how often there were norms of each size, and percentiles
:func:`recommendation`  norms and the limit that is advised, and how often others would clip
:func:`limits`          norms, and the limits of several clippers that were replayed
======================  ========================================================================

Each returns a Matplotlib `Figure` and writes it to `path`, if there is one. No window opens and
nothing global changes, as `pyplot` is not used. `pip install 'optaxclip[plot]'` has Matplotlib.

A norm above a hundred times the largest limit or the median is drawn at the upper edge, so that a
run that diverges still shows what came before. Norms that are 0, and those below a millionth of the
largest that is drawn, are not shown.
"""

from .pictures import histogram as histogram
from .pictures import limits as limits
from .pictures import norms as norms
from .pictures import recommendation as recommendation
