"""Hostile defaults: eight devices, strict dtypes and ranks; warnings are errors by pyproject."""

import os

os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")

import jax
import pytest

import optaxclip

# What `make test` and `make mutants` say that they test: the wheel, or a broken copy.
TESTED = os.environ.get("OPTAXCLIP_TESTED")
if TESTED:
    place = "site-packages" if TESTED == "wheel" else TESTED
    assert place in optaxclip.__file__, f"{optaxclip.__file__} is not the {TESTED} under test"

# What is written for a GPU gives the same numbers on a CPU, slower.
if os.environ.get("OPTAXCLIP_PRETEND_GPU"):
    optaxclip._device.on_gpu = lambda: True


@pytest.fixture(autouse=True)
def hostile():
    """No dtype or rank is promoted behind a test's back."""
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield
