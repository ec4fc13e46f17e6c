"""loss -> losses and clipped gradients, one microbatch of examples at a time."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from optaxclip import _check, scale
from optaxclip._check import _refuse
from optaxclip._clip import Scale
from optaxclip._place import placeable
from optaxclip.measure import Measure
from optaxclip.measure.shards import varied, varying

from .average import Examples, checked, clipped_mean, examples_of, is_whole, length, number_of

Tree = Any
Argnums = int | tuple[int, ...]


def clipped_value_and_grad(
    fun: Callable[..., Any],
    *,
    max_norm: float | jax.Array,
    measure: Measure | None = None,
    rule: Scale = scale.rescale,
    argnums: Argnums = 0,
    has_aux: bool = False,
    batch_argnums: Argnums = 1,
    microbatch_size: int | None = None,
) -> Callable[..., Any]:
    """`jax.value_and_grad` of a batch, with the gradient of each example clipped by itself.

    The function that is returned takes the arguments of `fun`, those of `batch_argnums` with an
    axis of examples in front, and `padding=` as `per_example_clip` does; other keyword arguments
    go to `fun` as they are, the same for all examples. It makes the gradients of one microbatch at
    a time; as they come, clipped and measured again, XLA:CPU holds three times their size.
    On a mesh, a microbatch is taken from all devices alike, if its size is a multiple of how many
    there are; where the mesh is Explicit, it must be, and JAX wants parameters that are not split
    along the axis that the examples are.

    Args:
      fun: the loss of **one** example, as `jax.value_and_grad` takes it. Where a model wants a
        batch, give it one of one, x[None].
      max_norm: C, see `per_example_clip`; a () array may be traced.
      measure: see `per_example_clip`.
      rule: see `per_example_clip`.
      argnums: the positional arguments to differentiate by.
      has_aux: whether `fun` returns (loss, aux).
      batch_argnums: the positional arguments, trees of arrays, that have examples.
      microbatch_size: how many gradients are made at once, a divisor of B; None: B.

    Returns:
      A function that returns the losses, (B,), or with `has_aux` the pair (losses, aux); the
      average of the clipped gradients; and :class:`Examples`. As under `jax.vmap`, losses and aux
      have the examples in front; losses of bad examples are as they came.

    Raises:
      TypeError, ValueError: if an argument is not such; when called, ValueError for a batch that
        is no multiple of microbatch_size, or has an Explicit mesh of more devices than divide it;
        TypeError for positional arguments that are missing.

    Example:
      >>> import jax.numpy as jnp
      >>> def loss(w, x, y):
      ...     return 0.5 * (w @ x - y) ** 2
      >>> step = clipped_value_and_grad(loss, max_norm=1.0, batch_argnums=(1, 2), microbatch_size=2)
      >>> x, y = jnp.eye(2).repeat(2, axis=0), jnp.array([-0.5, -0.5, -0.5, -90.0])
      >>> losses, grads, examples = step(jnp.zeros(2), x, y)
      >>> print(grads, examples.norms, examples.clipped)
      [0.25  0.375] [ 0.5  0.5  0.5 90. ] 0.25
    """
    how = checked(max_norm, measure, rule)
    by, batched = _indices(argnums=argnums, batch_argnums=batch_argnums)
    if set(by) & set(batched):
        _refuse(ValueError, "batch_argnums", batch_argnums, f"others than argnums, {argnums}")
    _check.choice((True, False), has_aux=has_aux)
    if microbatch_size is not None:
        _check.window(microbatch_size=microbatch_size)
    one = jax.value_and_grad(fun, argnums, has_aux)

    def value_and_grad(
        *args: Any, padding: jax.Array | None = None, **kwargs: Any
    ) -> tuple[Any, Tree, Examples]:
        missing = [i for i in (*by, *batched) if i >= len(args)]
        if missing:
            raise TypeError(
                f"argnums and batch_argnums must be arguments that are given by position; got "
                f"{len(args)}, and so no argument {missing[0]}"
            )
        batch = {i: args[i] for i in batched}
        count = length("a batch", batch, 0)
        number = number_of(count, padding)
        # Of parameters that are the same on all devices, JAX would add the gradients up over them.
        names = {name for x in jax.tree.leaves(batch) for name in varying(x)}
        vary = lambda tree: jax.tree.map(lambda x: varied(x, names), tree)
        own = [vary(x) if i in by else x for i, x in enumerate(args)]
        axes = [0 if i in batched else None for i in range(len(args))]
        each = jax.vmap(functools.partial(one, **kwargs), axes)

        def clipped(batch: dict[int, Tree], padding: jax.Array | None) -> tuple[Tree, Tree]:
            values, grads = each(*(batch.get(i, x) for i, x in enumerate(own)))
            mean, norms = clipped_mean(grads, number, padding, **how)
            return mean, (values, norms)

        mean, (values, norms) = _by_microbatch(clipped, (batch, padding), count, microbatch_size)
        params = args[by[0]] if isinstance(argnums, int) else tuple(args[i] for i in by)
        mean = jax.tree.map(lambda m, p: m.astype(jnp.result_type(p)), mean, params)
        return values, mean, examples_of(norms, number, padding, **how)

    return value_and_grad


def _indices(**named: Any) -> list[tuple[int, ...]]:
    """Positions of arguments, each as a tuple, once they are found to be such."""
    found = []
    for name, value in named.items():
        parts = value if isinstance(value, tuple) else (value,)
        whole = all(map(is_whole, parts))
        if not whole or min(parts, default=-1) < 0 or len(set(parts)) < len(parts):
            error = ValueError if whole else TypeError
            _refuse(error, name, value, "an int >= 0 or a tuple of different ones")
        found.append(parts)
    return found


def _by_microbatch(
    fun: Callable[..., tuple[Tree, Tree]], batch: tuple[Tree, ...], count: int, size: int | None
) -> tuple[Tree, Tree]:
    """The sum of the first results, and the second ones with the examples in front."""
    if size is None or size == count or not count:
        return fun(*batch)
    if count % size:
        raise ValueError(
            f"microbatch_size must divide the number of examples, {count}; got {size}. Fill the "
            "batch up, and say by padding= which examples do"
        )
    steps = count // size
    devices = [_devices(x) for x in jax.tree.leaves(batch)]
    if any(size % number for number in devices):
        raise ValueError(
            "microbatch_size must be a multiple of the devices of an Explicit mesh that examples "
            f"are split over, {max(devices)}; got {size}"
        )

    # Example j of microbatch i is number j * steps + i: a batch that is split over devices is so
    # in every microbatch. Each is indexed where it lies, because a scan over it would copy.
    def at(i: jax.Array) -> tuple[Tree, ...]:
        lay = lambda x: jnp.reshape(x, (size, steps, *jnp.shape(x)[1:]))
        pick = lambda x: jax.lax.dynamic_index_in_dim(lay(x), i, 1, keepdims=False)
        return jax.tree.map(pick, batch)

    def step(sums: Tree, i: jax.Array) -> tuple[Tree, Tree]:
        new, rest = fun(*at(i))
        return jax.tree.map(jnp.add, sums, new), rest

    kinds, _ = jax.eval_shape(lambda i: fun(*at(i)), jnp.int32(0))
    blank = jax.tree.map(lambda x: varied(jnp.zeros_like(placeable(x)), varying(x)), kinds)
    sums, rest = jax.lax.scan(step, blank, jnp.arange(steps, dtype=jnp.int32))
    in_front = lambda x: jnp.swapaxes(x, 0, 1).reshape(count, *x.shape[2:])
    return sums, jax.tree.map(in_front, rest)


def _devices(x: Any) -> int:
    """Over how many devices of an Explicit mesh the examples are split."""
    kind = jax.typeof(x).sharding
    axis = kind.spec[0] if len(kind.spec) else None
    names = axis if isinstance(axis, tuple) else () if axis is None else (axis,)
    return math.prod(kind.mesh.shape[name] for name in names)
