"""What every contender samples: documents, positions, and thoughts whose lengths are recorded.

A random model closes no thought by itself, and samplers with other noise would close theirs at
other places. So where a thought ends is given: the close marker has a probability that hardly any
number but 0 draws, and the numbers that a thought is drawn by have a 0 where it is to end. That is
done to the model and to the noise, not to any sampler.

Dimensions
    M  positions of all documents;  G  thoughts per position;  V  vocabulary
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from rlp.data.documents import Document
from rlp.data.positions import Positions
from rlp.sampling.rollout import NoiseKey
from update_step.given import CLOSE, FIRST_WORD, SEED, THOUGHT_FORMAT, Shape

LENGTHS = Path(__file__).with_name("lengths.json")
NEVER, BY_ZERO_ALONE = -1e4, -20.0
"""Added to logits. At temperature 0.7 the first leaves a probability of 0; the second takes it down
by 4e-13, and 0 is nearly the only number that draws it."""


@dataclass(frozen=True, slots=True)
class RecordedNoise(NoiseKey):
    """Numbers that end each thought where it is recorded to end."""

    lengths: Mapping[tuple[int, int, int], int] = field(default_factory=dict)
    """Tokens with the close marker, by document, position and thought; at the budget a thought is
    cut."""

    def uniforms(self, document: Document, position: int, thought: int, length: int) -> np.ndarray:
        """As of any key; 0 for the token that is to be the close marker."""
        # Its parent by name: a dataclass with slots is another class than the one in its body.
        numbers = np.maximum(NoiseKey.uniforms(self, document, position, thought, length), 2.0**-53)
        recorded = self.lengths[document.id, position, thought]
        if recorded < length:
            numbers[recorded - 1] = 0.0
        return numbers


@dataclass(frozen=True, slots=True)
class Setting:
    """One sampling phase."""

    documents: list[Document]
    positions: Positions
    """[M]."""
    group_size: int
    max_thought_tokens: int
    lengths: np.ndarray
    """[M, G] int64, tokens of each thought, its close marker included."""

    @property
    def num_tokens(self) -> int:
        """That are sampled in all."""
        return int(self.lengths.sum())

    def noise(self) -> RecordedNoise:
        lengths = {
            (self.documents[d].id, t, g): int(self.lengths[m, g])
            for m, (d, t) in enumerate(self.positions.places())
            for g in range(self.group_size)
        }
        return RecordedNoise(SEED, 0, lengths=lengths)

    def prompts(self) -> list[list[int]]:
        """[M] what the thoughts of each position continue."""
        return [
            THOUGHT_FORMAT.prefix(self.documents[d].tokens, t).tolist()
            for d, t in self.positions.places()
        ]


def make_setting(shape: Shape, num_documents: int, vocabulary: int) -> Setting:
    """Random documents, K positions where uniform draws fall on average, lengths as recorded."""
    noise = np.random.default_rng(SEED)
    size = (num_documents, shape.document_tokens)
    documents = [
        Document(number, tokens)
        for number, tokens in enumerate(noise.integers(FIRST_WORD, vocabulary, size=size))
    ]
    position = np.arange(1, shape.positions + 1) * shape.document_tokens // (shape.positions + 1)
    positions = Positions(
        np.repeat(np.arange(num_documents), shape.positions),
        np.tile(position, num_documents),
        np.concatenate([document.tokens[position][:, None] for document in documents]),
    )
    lengths = recorded_lengths(num_documents * shape.num_thoughts, shape.thought_tokens)
    return Setting(
        documents,
        positions,
        shape.group_size,
        shape.thought_tokens,
        lengths.reshape(-1, shape.group_size),
    )


def recorded_lengths(count: int, budget: int) -> np.ndarray:
    """[count] int64 tokens of thoughts, scaled to a budget; the record is repeated where it ends.

    Their mean is a sixth of the budget and a little, as part of a token counts as one.
    """
    record = json.loads(LENGTHS.read_text())
    scaled = -(-np.array(record["tokens"]) * budget // record["budget"])
    return np.resize(scaled, count)


def close_by_noise(lm: PreTrainedModel) -> None:
    """Give a model a bias of the head with which thoughts end by `RecordedNoise` alone.

    0 draws the first word of the vocabulary that has a probability: words before the close marker
    get none.
    """
    head = lm.get_output_embeddings()
    bias = torch.zeros(head.weight.shape[0], dtype=head.weight.dtype, device=head.weight.device)
    bias[:CLOSE] = NEVER
    bias[CLOSE] = BY_ZERO_ALONE
    head.bias = nn.Parameter(bias, requires_grad=False)
