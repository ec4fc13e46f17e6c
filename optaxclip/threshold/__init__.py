"""norm, memory -> limit, memory: the largest norm allowed now, and what to remember.

A threshold is to norms what an `optax.GradientTransformation` is to updates: a pair.
`init(norm)` gives the memory before the first step, of anything with a shape and a dtype;
`update(norm, memory)` gives the limit, from **past data only**, and the memory that has learned
this norm. It works elementwise on norms of any shape, so every threshold works in every measure.

A threshold need not fear bad data: the engine shows it 0 in place of a norm that is not finite,
and throws away what it then learned, group by group. For that, every array in a memory has the
shape of the norm, with axes in front if it holds several values per group; what counts steps for
all groups together is a `Clock`, which no bad norm stops.

===========  ====================================================================
threshold    the limit is
===========  ====================================================================
`constant`   a number, an array, or the value of a schedule at this step
`until`      that of one threshold for the first steps, of another one after them
===========  ====================================================================
"""

from .base import Clock as Clock
from .base import Threshold as Threshold
from .constant import constant as constant
from .until import until as until
