"""What a thought is: its tokens, the format that it stands in, and the prediction that the policy
may make after it. How thoughts are sampled, and what they are worth, is not known here.

Dimensions
    M  positions;  G  thoughts per position;  L  thought tokens;  H  target tokens
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from rlp.config import Config
from rlp.model.markers import Markers


@dataclass(frozen=True, slots=True)
class ThoughtFormat:
    """What a thought looks like in a row, and the temperatures."""

    markers: Markers
    instruction: tuple[int, ...]
    """Token ids put before the prefix when thinking; never in the no-think context."""
    begin: int | None
    """The beginning-of-sequence token, kept in front of the instruction; None where the tokenizer
    has none."""
    temperature: float
    """Of thought tokens, in sampling and in training."""
    target_temperature: float
    horizon: int
    end: int | None = None
    """The end-of-sequence token, with which a prediction may end; None where the tokenizer has
    none."""
    predicts: bool = False
    """Whether the policy goes on after the close marker with a prediction of its own, which then
    stands in the place of the target."""

    @classmethod
    def of(
        cls,
        config: Config,
        markers: Markers,
        instruction: tuple[int, ...],
        begin: int | None,
        end: int | None = None,
    ) -> "ThoughtFormat":
        """The format that a config asks for, without predictions."""
        return cls(
            markers=markers,
            instruction=instruction,
            begin=begin,
            temperature=config.thought.temperature,
            target_temperature=config.target.temperature,
            horizon=config.target.horizon,
            end=end,
        )

    def predicting(self, predicts: bool) -> "ThoughtFormat":
        """The same with or without a prediction after each thought."""
        return replace(self, predicts=predicts)

    @property
    def predicted(self) -> int:
        """Tokens of a prediction, at most; 0 without predictions."""
        return self.horizon if self.predicts else 0

    @property
    def scored(self) -> int:
        """Real target tokens that are scored at a position. Behind a prediction only the first: the
        others would stand behind words that are not in the document."""
        return 1 if self.predicts else self.horizon

    def context(self, document: np.ndarray, position: int) -> np.ndarray:
        """Instruction and document before the position."""
        begins = len(self.instruction) > 0 and document[:1].tolist() == [self.begin]
        lead = document[:1] if begins else document[:0]
        instruction = np.array(self.instruction, dtype=np.int64)
        return np.concatenate([lead, instruction, document[len(lead) : position]])

    def prefix(self, document: np.ndarray, position: int) -> np.ndarray:
        """Instruction, document before the position, open marker: what a thought continues."""
        opening = np.array(self.markers.open, dtype=np.int64)
        return np.concatenate([self.context(document, position), opening])


@dataclass(frozen=True, slots=True)
class Predictions:
    """What the policy said would come, after the close marker of each thought: tokens drawn at the
    sampling temperature, open marker excluded, until the end-of-sequence token or H of them."""

    tokens: Tensor
    """[M, G, H] int64, padded on the right; the end-of-sequence token included."""
    mask: Tensor
    """[M, G, H] bool, True on sampled tokens; at least one."""
    behavior_logprob: Tensor
    """[M, G, H] float32, nats, of the distribution that each was drawn from; 0 off the mask."""
    ended: Tensor
    """[M, G] bool, True where the end-of-sequence token is the last of them."""

    @classmethod
    def joined(cls, several: "list[Predictions]") -> "Predictions":
        """Those of some positions, then those of others."""
        return cls(*(torch.cat(column) for column in zip(*(some.parts() for some in several))))

    def each(self, change: Callable[[Tensor], Tensor]) -> "Predictions":
        """With every field changed."""
        return Predictions(*(change(part) for part in self.parts()))

    def parts(self) -> tuple[Tensor, ...]:
        """Its fields in order."""
        return self.tokens, self.mask, self.behavior_logprob, self.ended


@dataclass(frozen=True, slots=True)
class Thoughts:
    """G sampled thoughts for each of M positions, with what the sampler knew about them."""

    tokens: Tensor
    """[M, G, L] int64, padded on the right; the close marker included where it was sampled."""
    mask: Tensor
    """[M, G, L] bool, True on sampled tokens; at least one per thought (Alg. 1, line 7)."""
    behavior_logprob: Tensor
    """[M, G, L] float32, nats, at the sampling temperature; 0 where mask is False."""
    entropy: Tensor | None
    """[M, G, L] float32, nats, of the distribution that each token was drawn from; 0 where mask is
    False. None where the sampler does not see the whole distribution."""
    truncated: Tensor
    """[M, G] bool, True where the budget ended the thought: its close marker is forced, without
    gradient."""
    prediction: Predictions | None = None
    """None where the policy makes none."""

    @property
    def sampled_tokens(self) -> Tensor:
        """[M, G, L] or [M, G, L + H]: `tokens`, and behind them those of the prediction."""
        if self.prediction is None:
            return self.tokens
        return torch.cat([self.tokens, self.prediction.tokens], dim=2)

    @property
    def sampled_mask(self) -> Tensor:
        """[M, G, L] bool, or [M, G, L + H]: `mask`, and behind it that of the prediction."""
        if self.prediction is None:
            return self.mask
        return torch.cat([self.mask, self.prediction.mask], dim=2)

    @property
    def sampled_logprob(self) -> Tensor:
        """[M, G, L] or [M, G, L + H] nats: behavior log-probabilities of all that was sampled."""
        if self.prediction is None:
            return self.behavior_logprob
        return torch.cat([self.behavior_logprob, self.prediction.behavior_logprob], dim=2)

    def __getitem__(self, positions: slice | tuple[slice, slice] | Tensor) -> "Thoughts":
        """Those of some positions."""
        return self._each(lambda part: part[positions])

    def siblings(self, group: slice) -> "Thoughts":
        """Some thoughts of each position."""
        return self[:, group]

    def exchanged(self, before: "Thoughts") -> "Thoughts":
        """Each position with the thoughts of the position before it.

        Args:
            before: what the first one gets: the thoughts of one position, of any length L.
        """
        return Thoughts.joined([before, self[:-1]])

    @classmethod
    def joined(cls, several: "list[Thoughts]") -> "Thoughts":
        """Those of some positions, then those of others, of different lengths L."""
        longest = max(some.tokens.shape[2] for some in several)
        padded = [some.padded(longest - some.tokens.shape[2]).parts() for some in several]
        made = [some.prediction for some in several]
        return cls(
            *(None if None in column else torch.cat(column) for column in zip(*padded)),
            prediction=None if None in made else Predictions.joined(made),
        )

    def padded(self, count: int) -> "Thoughts":
        """With `count` places more on the right of each thought."""
        return replace(
            self._each(lambda part: torch.nn.functional.pad(part, (0, count))),
            truncated=self.truncated,
            prediction=self.prediction,
        )

    def to(self, device: torch.device | str) -> "Thoughts":
        """The same on a device."""
        return self._each(lambda part: part.to(device))

    def _each(self, change: Callable[[Tensor], Tensor]) -> "Thoughts":
        return Thoughts(
            *(None if part is None else change(part) for part in self.parts()),
            prediction=None if self.prediction is None else self.prediction.each(change),
        )

    def parts(self) -> tuple[Tensor | None, ...]:
        """Its own fields in order, without the prediction."""
        return self.tokens, self.mask, self.behavior_logprob, self.entropy, self.truncated
