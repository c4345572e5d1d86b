"""What sampling gives: thoughts and what they cost, and the key of the noise that they were drawn
with.

Dimensions
    M  positions;  G  thoughts per position;  L  thought tokens
"""

from dataclasses import dataclass

import numpy as np

from rlp.data.documents import Document
from rlp.data.noise import THOUGHT_NOISE, keyed_noise
from rlp.model.shapes import Work, row_work
from rlp.model.thoughts import Thoughts


@dataclass(frozen=True, slots=True)
class NoiseKey:
    """What the sampling noise of a step is keyed by, beside document, position and thought."""

    seed: int
    step: int
    purpose: int = THOUGHT_NOISE

    def uniforms(self, document: Document, position: int, thought: int, length: int) -> np.ndarray:
        """[length] float64 in [0, 1), one per thought token."""
        return self._noise(document, position, thought).random(length)

    def seed_of(self, document: Document, position: int, thought: int) -> int:
        """63 bits, for a sampler that has a generator of its own for each thought."""
        return int(self._noise(document, position, thought).integers(2**63))

    def _noise(self, document: Document, position: int, thought: int) -> np.random.Generator:
        return keyed_noise(
            seed=self.seed,
            purpose=self.purpose,
            step=self.step,
            document=document.id,
            occurrence=document.occurrence,
            position=position,
            thought=thought,
        )


@dataclass(frozen=True, slots=True)
class Rollout:
    """Thoughts and what they cost."""

    thoughts: Thoughts
    prefill_work: Work
    decode_work: Work


def decode_work(prefixes: list[np.ndarray], thoughts: Thoughts, *, close_tokens: int = 0) -> Work:
    """What decoding thoughts behind their prefixes [M] costs: each sampled token but a thought's
    last is run once, and attends to all before it. Before a prediction, so is a forced close
    marker.

    Args:
        close_tokens: of the close marker; counts where there are predictions.
    """
    prefix = np.array([len(row) for row in prefixes], dtype=np.int64)
    run = thoughts.sampled_mask.sum(dim=2).cpu().numpy() - 1
    if thoughts.prediction is not None:
        run = run + thoughts.truncated.cpu().numpy() * close_tokens
    return row_work(run, int(run.sum()), before=prefix[:, None])
