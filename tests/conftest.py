"""Hostile defaults: eight devices, strict dtypes and ranks; warnings are errors by pyproject.

Of the cells of a parametrized test, `make test` runs one in OPTAXCLIP_SHARE, and never none; the
others have the mark `rest`, and wait for `make proof`. By hand, or by name with -k, all are run.
"""

import math
import os
import zlib

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

# "4": the first quarter of cells, in an order that only depends on their names. "-4": the last one.
SHARE = int(os.environ.get("OPTAXCLIP_SHARE", "1"))


@pytest.hookimpl(tryfirst=True)  # before pytest looks at -m
def pytest_collection_modifyitems(config, items):
    if config.option.keyword:
        return
    tests = {}
    for item in filter(may_be_left, items):
        tests.setdefault(item.nodeid.partition("[")[0], []).append(item)
    for cells in tests.values():
        cells.sort(key=lambda item: zlib.crc32(item.nodeid.encode()), reverse=SHARE < 0)
        for item in cells[math.ceil(len(cells) / abs(SHARE)) :]:
            item.add_marker("rest")


def may_be_left(item):
    """Whether it is a cell that would run, were there no shares, of a test that has any."""
    skipped = any(mark.args[0] for mark in item.iter_markers("skipif"))
    marked = any(item.get_closest_marker(name) for name in ("proof", "whole"))
    return not skipped and not marked


@pytest.fixture(autouse=True)
def hostile():
    """No dtype or rank is promoted behind a test's back."""
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield
