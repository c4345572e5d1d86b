"""What every contender is given: a document, positions, thoughts, and the settings of the step.

Dimensions
    P  document tokens;  K  positions of the document (M = K);  G  thoughts per position;  N = K * G
    L  longest thought;  V  vocabulary
"""

import argparse
from dataclasses import dataclass, replace

import numpy as np
import torch
from einops import rearrange

from rlp.data.documents import Document
from rlp.data.positions import Positions
from rlp.model.markers import Markers
from rlp.model.thoughts import ThoughtFormat, Thoughts

SEED, LEARNING_RATE, EMA_DECAY, CLIP, TEMPERATURE = 0, 1e-6, 0.999, 0.2, 0.7
PAD, EOS, OPEN, CLOSE, FIRST_WORD = 0, 1, 2, 3, 8
THOUGHT_FORMAT = ThoughtFormat(
    markers=Markers(open=(OPEN,), close=(CLOSE,)),
    instruction=(),
    begin=None,
    temperature=TEMPERATURE,
    target_temperature=1.0,
    horizon=1,
)


@dataclass(frozen=True, slots=True)
class Shape:
    """P,K,G,L."""

    document_tokens: int
    positions: int
    group_size: int
    thought_tokens: int

    @classmethod
    def parse(cls, text: str) -> "Shape":
        numbers = [int(part) for part in text.split(",")]
        fits = len(numbers) == 4 and min(numbers) >= 1
        if not fits or numbers[2] < 2 or numbers[0] < 2 * (numbers[1] + 1):
            raise argparse.ArgumentTypeError(
                "--shape is P,K,G,L with G >= 2 and P >= 2 (K + 1), such as 256,4,8,32;"
                f" got {text!r}"
            )
        return cls(*numbers)

    def __str__(self) -> str:
        return f"{self.document_tokens},{self.positions},{self.group_size},{self.thought_tokens}"

    @property
    def num_thoughts(self) -> int:
        return self.positions * self.group_size


@dataclass(frozen=True, slots=True)
class Given:
    """What a step is given."""

    documents: list[Document]
    positions: Positions
    thoughts: Thoughts

    def completion(self, n: int) -> list[int]:
        """The sampled tokens of thought n."""
        tokens = rearrange(self.thoughts.tokens, "m g l -> (m g) l")[n]
        mask = rearrange(self.thoughts.mask, "m g l -> (m g) l")[n]
        return tokens[mask].tolist()

    def prompt(self, n: int) -> list[int]:
        """What thought n continues."""
        m = self.position_of(n)
        document = self.documents[self.positions.document[m]]
        return THOUGHT_FORMAT.prefix(document.tokens, self.positions.position[m]).tolist()

    def closed(self, n: int) -> list[int]:
        """What the target of thought n is predicted from; a truncated one is closed by force."""
        truncated = rearrange(self.thoughts.truncated, "m g -> (m g)")[n]
        forced = THOUGHT_FORMAT.markers.close if truncated else ()
        return [*self.prompt(n), *self.completion(n), *forced]

    def position_of(self, n: int) -> int:
        return n // self.thoughts.tokens.shape[1]

    def at(self, device: torch.device) -> "Given":
        """The same with the thoughts on a device, where a sampler leaves them."""
        return replace(self, thoughts=self.thoughts.to(device))


@dataclass(frozen=True, slots=True)
class Rows:
    """What TRL is given: the same as lists of token ids, one for each of the N thoughts."""

    document: np.ndarray
    """[P] int64."""
    position: np.ndarray
    """[K] int64."""
    position_of: list[int]
    target: np.ndarray
    """[N] int64."""
    prompts: list[list[int]]
    completions: list[list[int]]
    closed: list[list[int]]

    @classmethod
    def of(cls, given: Given) -> "Rows":
        every = range(given.thoughts.truncated.numel())
        position_of = [given.position_of(n) for n in every]
        return cls(
            given.documents[0].tokens,
            given.positions.position,
            position_of,
            given.positions.target[position_of, 0],
            [given.prompt(n) for n in every],
            [given.completion(n) for n in every],
            [given.closed(n) for n in every],
        )


def make_given(shape: Shape, vocabulary: int) -> Given:
    """A random document, K positions where uniform draws fall on average, and their thoughts.

    A thought has L / 4 to L tokens. One of each position has all L and is truncated; the others end
    with the close marker.
    """
    noise = np.random.default_rng(SEED)
    document = noise.integers(FIRST_WORD, vocabulary, size=shape.document_tokens)
    position = np.arange(1, shape.positions + 1) * shape.document_tokens // (shape.positions + 1)

    size = (shape.positions, shape.group_size, shape.thought_tokens)
    least = max(1, shape.thought_tokens // 4)
    lengths = noise.integers(least, shape.thought_tokens + 1, size=size[:2])
    lengths[:, 0] = shape.thought_tokens
    truncated = lengths == shape.thought_tokens

    place = np.arange(shape.thought_tokens)
    is_close = ~truncated[..., None] & (place == lengths[..., None] - 1)
    tokens = np.where(is_close, CLOSE, noise.integers(FIRST_WORD, vocabulary, size=size))
    mask = torch.from_numpy(place < lengths[..., None])

    thoughts = Thoughts(
        tokens=torch.from_numpy(tokens) * mask,
        mask=mask,
        behavior_logprob=torch.zeros(size),
        entropy=torch.zeros(size),
        truncated=torch.from_numpy(truncated),
    )
    positions = Positions(np.zeros_like(position), position, document[position][:, None])
    return Given([Document(0, document)], positions, thoughts)
