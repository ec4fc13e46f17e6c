"""grads, params -> norms: what a limit is compared with.

A measure is a pair. `norms(grads, params)` gives the size of every *group*, the entries that are
clipped together; `spread(factors, grads)` says which entries each factor multiplies.

==================  =================================  ==========================================
measure             one group is                       use it when
==================  =================================  ==========================================
`global_norm`       the whole tree                     in doubt: the direction of the step stays
`leaf_norm`         a leaf                             one layer explodes, the others must go on
`leaf_rms`          a leaf, per entry: norm / sqrt(n)  layers differ in size; final updates
`leaf_mean`         a leaf, per entry: norm / n        porting TensorFlow's average norm
`unit_norm`         an output neuron or filter         AGC, with `relative`
`element`           a coordinate                       a bound on each entry matters
`by_label`          the leaves under one label         encoder and decoder are limited apart
==================  =================================  ==========================================

Three modifiers make further measures: `relative(measure, eps)` divides by the norm of the
parameters, `relative_entries(measure, relative, absolute)` divides each entry by its own parameter,
and `stacked(measure, axes)` measures each layer of scan-stacked parameters alone.

Norms are () or small arrays, float32 (float64 for float64 leaves). `None`, integer, bool and
float0 leaves have been taken out of `grads` before a measure sees it.

Under `jit`, arrays are whole on any mesh, and there is nothing to say. Inside `jax.shard_map`, a
leaf is one device's shard; norms are summed over the axes along which JAX knows it to vary, so that
a leaf that is the same everywhere counts once. `axis_name=` says it where JAX does not: in `pmap`
and with check_vma=False, and for units, which may lie within a shard or across several. It is a
name, a tuple of names, () for a leaf that is not split, or a function (path, leaf) -> one of
these, with paths as "encoder/kernel". Left out where it is needed, it is an error, unless a map
that tracks is inside one that does not: there JAX itself has forgotten the outer axes.

Your own measure is `Measure(norms, spread)`, where norms are positively homogeneous:
norms(c g) = |c| norms(g).
"""

from .base import Measure as Measure
from .modifiers import by_label as by_label
from .modifiers import relative as relative
from .modifiers import relative_entries as relative_entries
from .modifiers import stacked as stacked
from .norms import element as element
from .norms import global_norm as global_norm
from .norms import leaf_mean as leaf_mean
from .norms import leaf_norm as leaf_norm
from .norms import leaf_rms as leaf_rms
from .units import unit_norm as unit_norm
