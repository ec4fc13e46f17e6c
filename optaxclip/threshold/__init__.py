"""norm, memory -> limit, memory: the largest norm allowed now, and what to remember.

A threshold is to norms what an `optax.GradientTransformation` is to updates: a pair.
`init(norm)` gives the memory before the first step, of anything with a shape and a dtype;
`update(norm, memory)` gives the limit, from **past data only**, and the memory that has learned
this norm. It works elementwise on norms of any shape, so every threshold works in every measure.

A threshold need not fear bad data: where a norm is not finite (it is then shown 0), or 0, or so
large that its square overflows, the engine throws away what was learned, group by group. For that,
every array in a memory has the shape of the norm, with axes in front if it holds several values
per group; what counts steps for all groups together is a `Clock`, which no bad norm stops.

===============  ===========================================  =================================
threshold        the limit is                                 it follows a lasting rise
===============  ===========================================  =================================
`constant`       a number, an array or a schedule             never
`percentile`     a percentile of the latest norms             once a share of the window is new
`quantile`       a quantile, followed with one number         by a factor per step
`zscore`         mean + z deviations, running                 by a factor per step, if capped
`sigma`          mean + k deviations of the latest norms      by a factor per step
`ema_ratio`      so many running averages                     by a factor per step
`growth`         a little more than the previous norm         by a factor per step, also spikes
`second_moment`  k root mean squares of the past              by a factor per step
`moment_ratio`   mean over root mean square; to normalize     does not depend on the size
`outlier`        mean + k deviations of any values, for       when `skip_step` gives way
                 `skip_step`: losses, too
===============  ===========================================  =================================

Five make thresholds of thresholds: `until` switches to another one after some steps, `fallback`
has another one while there is no limit, `bounded` keeps the limit between two bounds, `multiple`
multiplies it, and `relearning` forgets the past when a burst turns out to be a new level. A limit
follows from past norms only, but for `moment_ratio`, `percentile` with `with_current`, and what
`zscore` makes of a norm that is too large.
"""

from .base import Clock as Clock
from .base import Threshold as Threshold
from .bounded import bounded as bounded
from .constant import constant as constant
from .ema_ratio import ema_ratio as ema_ratio
from .fallback import fallback as fallback
from .growth import growth as growth
from .moment_ratio import moment_ratio as moment_ratio
from .multiple import multiple as multiple
from .outlier import outlier as outlier
from .percentile import percentile as percentile
from .quantile import quantile as quantile
from .relearning import relearning as relearning
from .second_moment import second_moment as second_moment
from .sigma import sigma as sigma
from .until import until as until
from .zscore import zscore as zscore
