"""Documents as token ids, with spans of tokens that have a loss."""

import json
from pathlib import Path

import numpy as np

from tests.tiny_models import WORDS


def write_masked(path: Path, count: int) -> Path:
    """Documents of 6 to 15 words, with a loss on one word behind the first and on a run of up to
    four."""
    noise, lines = np.random.default_rng(0), []
    for _ in range(count):
        size = int(noise.integers(6, 16))
        one, first = (int(noise.integers(1, size - 1)) for _ in range(2))
        spans = [[one, one + 1], [first, min(size, first + int(noise.integers(1, 5)))]]
        tokens = noise.integers(5, len(WORDS), size=size).tolist()
        lines.append(json.dumps({"tokens": tokens, "loss_spans": spans}) + "\n")
    path.write_text("".join(lines))
    return path
