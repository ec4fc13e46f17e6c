"""The argument --clippers: names and thresholds, as in `none,global_norm=0.3`."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from typing import TypeVar

Maker = TypeVar("Maker")


def parse_clippers(
    text: str, clippers: Mapping[str, Maker], make: Callable[[Maker, float | None], object]
) -> dict[str, tuple[Maker, float | None]]:
    """By label, what makes the clipper, and its threshold if it has one; each was made once.

    Args:
      text: labels, `name` or `name=threshold`, with commas in between.
      clippers: by name, what makes a clipper.
      make: makes one, to see whether it can be.

    Raises:
      argparse.ArgumentTypeError: if there is no such clipper, or not with this threshold.
    """
    found = {}
    for label in text.split(","):
        name, _, number = label.partition("=")
        if name not in clippers:
            choices = ", ".join(clippers)
            raise argparse.ArgumentTypeError(f"no clipper {name!r}; choose from {choices}")
        try:
            threshold = float(number) if number else None
            make(clippers[name], threshold)
        except (TypeError, ValueError) as error:
            raise argparse.ArgumentTypeError(f"{label}: {error}") from None
        found[label] = clippers[name], threshold
    return found
