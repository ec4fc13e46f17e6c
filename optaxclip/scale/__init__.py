"""norm, limit -> factor: what a group is multiplied by.

===============  =============================  =========  ==================================
scale            factor                         at 0       use it when
===============  =============================  =========  ==================================
`rescale`        min(1, c / n)                  1          always, unless another is wanted
`strict`         a hair below min(1, c / n)     1          the bound must hold exactly
`skip`           1 if n <= c, else 0            1          a step that is too large should be
                                                           no step
`normalize`      c / n                          inf        every step should have one length
`softsign`       c / (c + n)                    1          what is large should still differ in
                                                           size
`rsqrt`          1 / sqrt(1 + (n / c)^2)        1          smooth, and close to `rescale`
`tanh`           (c / n) tanh(n / c)            1          smooth, and as close as there is
`automatic`      c / (n + gamma)                c / gamma  as `normalize`, and what is tiny
                                                           should stay small
`psac`           c / (n + r / (n + r))          c          the same, with less weight on what
                                                           is small
===============  =============================  =========  ==================================

Here n is the norm and c the limit. But for rounding, no scale makes n x factor larger than c, and
all but `skip` bring it near c as n grows; "at 0" is the factor as n goes to 0, which is also the
slope of n x factor there. The first three are hard clips, which leave a norm up to the limit alone.
`softsign`, `rsqrt` and `tanh` are soft clips, which have no kink at the limit, and shrink **every**
gradient: a norm at the limit to 0.5, 0.71 and 0.76 of it. The other three are normalizers, which
enlarge what is small, and so no clips.

In the metrics, `clipped` is the share of groups with a factor below 1. Under a soft clip those are
all but groups far below the limit; `factor` and `clipped_norm` say how much it shrank them. With
all scales, limit inf means factor 1, and limit 0 gives zeros.

A scale is a function of two arrays of one shape and dtype, both >= 0. It sees a group that must
vanish as norm 1 under limit 0, and, with nonfinite="propagate", norms that are inf or NaN.
"""

from .hard import normalize as normalize
from .hard import rescale as rescale
from .hard import skip as skip
from .hard import strict as strict
from .soft import automatic as automatic
from .soft import psac as psac
from .soft import rsqrt as rsqrt
from .soft import softsign as softsign
from .soft import tanh as tanh
