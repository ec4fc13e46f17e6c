"""The text of the examples: real English, which ships with Python itself."""

from __future__ import annotations

import hashlib
import math
from pydoc_data.topics import topics
from typing import NamedTuple

import numpy as np


class Text(NamedTuple):
    """A text as numbers, cut for truncated backpropagation through time."""

    train: np.ndarray  # (chunks, streams, chunk + 1) int32, each chunk going on where one ended
    valid: np.ndarray  # the same, of the last twentieth of the text, in 8 streams
    vocabulary: int
    unigram_bits: float  # what guessing by letter frequency alone costs per character
    about: str


def read_text(*, streams: int, chunk: int) -> Text:
    """The reference of the Python language as it came with this Python."""
    text = "\n\n".join(topics[key] for key in sorted(topics))
    characters, codes, counts = np.unique(list(text), return_inverse=True, return_counts=True)
    share = counts / len(text)
    unigram_bits = float(-(share @ np.log2(share)))
    about = (
        f"text: {len(text):,} characters, sha256 {hashlib.sha256(text.encode()).hexdigest()[:12]}\n"
        f"guessing blindly costs {math.log2(len(characters)):.2f} bits per character, "
        f"by letter frequency alone {unigram_bits:.2f}"
    )
    cut = len(text) - len(text) // 20
    codes = codes.astype(np.int32)
    train, valid = _chunks(codes[:cut], streams, chunk), _chunks(codes[cut:], 8, chunk)
    return Text(train, valid, len(characters), unigram_bits, about)


def _chunks(codes: np.ndarray, streams: int, chunk: int) -> np.ndarray:
    """Parallel streams cut into chunks that share one character, the label of the one before."""
    length = len(codes) // streams
    rows = codes[: length * streams].reshape(streams, length)
    return np.stack([rows[:, i : i + chunk + 1] for i in range(0, length - chunk, chunk)])
