"""Gradient trees that the tests share."""

import jax
import jax.numpy as jnp
import numpy as np


def normal(*shape, dtype=jnp.float32, scale=1.0, seed=0):
    """One leaf of normal entries."""
    values = np.random.default_rng([seed, *shape]).normal(size=shape) * scale
    return jnp.asarray(values, dtype)


def floats(*, scale=3.0, seed=0, dtype=jnp.float32):
    """Leaves of ranks 1 to 4, as a dense layer, an attention and a convolution have them."""
    shapes = {"bias": (8,), "dense": (8, 4), "attention": (4, 2, 3), "conv": (3, 3, 2, 4)}
    return {
        name: normal(*shape, scale=scale, seed=seed, dtype=dtype) for name, shape in shapes.items()
    }


def mixed():
    """One tree with every kind of leaf that a gradient can hold."""
    return {
        "float32": normal(4, 3),
        "bfloat16": normal(5, dtype=jnp.bfloat16),
        "float16": normal(2, 2, dtype=jnp.float16),
        "complex": normal(3).astype(jnp.complex64) * (3 + 4j),
        "scalar": jnp.float32(-2.5),
        "python": 1.5,
        "none": None,
        "empty": {},
        "no_entries": jnp.zeros((0, 3), jnp.float32),
        "integer": jnp.arange(3),
        "bool": jnp.array([True, False]),
        "float0": np.zeros((2,), jax.dtypes.float0),
    }


def float64(tree):
    """The same values as NumPy float64 or complex128 arrays."""

    def wide(x):
        x = np.asarray(x)
        return x.astype(np.complex128 if np.iscomplexobj(x) else np.float64)

    return jax.tree.map(wide, tree)


def bits(x):
    """The bytes of a leaf, so that NaN, -0.0 and subnormal numbers compare as they are."""
    return np.asarray(x).tobytes()


def assert_same_bits(actual, expected):
    """Two trees agree in structure, dtypes and every bit."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert jnp.result_type(a) == jnp.result_type(b)
        assert bits(a) == bits(b)


def assert_close(actual, expected, rtol, atol=0.0):
    """Two trees agree in structure and within a tolerance."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(np.asarray(a, np.asarray(b).dtype), b, rtol, atol)
