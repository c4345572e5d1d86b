"""Thoughts while they grow: one step of all slots, by arithmetic on tensors alone.

A step runs the last token of each thought, draws the next one and sees what has ended. Where the
format predicts, a thought that has ended goes on with its close marker and a prediction. A step
reads nothing on the host and makes nothing whose shape depends on a number, so it can be recorded
once and replayed.

Dimensions
    N  slots;  T  thoughts of the rollout;  L  the budget, in thought tokens;  O  open marker tokens
    E  close marker tokens;  H  tokens of a prediction, 0 without one;  V  vocabulary
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rlp.model.thoughts import Predictions, ThoughtFormat, Thoughts
from rlp.sampling.draw import draw
from rlp.sampling.slots import Slots

NEVER = 2**62
"""Tokens that no slot runs."""


@dataclass(frozen=True, slots=True)
class Ended:
    """What the host finds in the slots, one number or flag each [N]."""

    going: np.ndarray
    length: np.ndarray
    """Tokens of the thought."""
    predicted: np.ndarray
    """Tokens of the prediction."""
    closed: np.ndarray
    broken: np.ndarray
    """Ended by a log-probability that is not a number."""


class Growth:
    """The numbers of N slots, and all that is drawn in them."""

    def __init__(
        self,
        slots: Slots,
        thought_format: ThoughtFormat,
        num_thoughts: int,
        budget: int,
        *,
        dtype: torch.dtype,
    ) -> None:
        """
        Args:
            dtype: of log-probabilities, that of the logits.
        """
        self._slots, self._format, self._budget = slots, thought_format, budget
        self._horizon = thought_format.predicted
        self._stride = budget + self._horizon
        device, num_slots = slots.length.device, slots.num_slots
        markers = thought_format.markers
        self._open, self._close = (
            torch.tensor(marker, device=device) for marker in (markers.open, markers.close)
        )

        def numbers(count: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros(count, dtype=dtype, device=device)

        self._token = numbers(num_slots, torch.int64)
        """The one to run next."""
        self._going, self._closed, self._broken = (numbers(num_slots, torch.bool) for _ in range(3))
        self._first = numbers(num_slots, torch.int64)
        """Where the tokens of a slot's thought begin, among all."""
        self._length, self._predicted = (numbers(num_slots, torch.int64) for _ in range(2))
        """Tokens of thought and prediction so far."""
        self._predicts_at = torch.full_like(self._length, NEVER)
        """How many tokens a slot has run when the first one of its prediction is drawn."""
        self._uniforms = torch.zeros(num_slots, self._stride, dtype=torch.float64, device=device)

        self._nowhere = torch.tensor(num_thoughts * self._stride, device=device)
        """One place behind all others takes what counts nowhere."""
        count = num_thoughts * self._stride + 1
        self._tokens = numbers(count, torch.int64)
        self._logprobs, self._entropies = (numbers(count, dtype) for _ in range(2))
        self._lengths, self._predictions = np.zeros((2, num_thoughts), dtype=np.int64)
        self._truncated = np.zeros(num_thoughts, dtype=bool)

    def begin(self, slots: list[int], thoughts: list[int], uniforms: np.ndarray) -> None:
        """New thoughts in these slots, to be drawn by uniforms [slots, L + H]."""
        device = self._token.device
        index, first = torch.tensor([slots, thoughts]).to(device)
        self._token[index] = self._open[0]
        self._first[index] = first * self._stride
        self._length[index] = 0
        self._predicted[index] = 0
        self._predicts_at[index] = NEVER
        self._uniforms[index] = torch.from_numpy(uniforms).to(device)
        self._going[index] = True
        self._closed[index] = False
        self._broken[index] = False

    def step(self) -> None:
        """One token more of every thought that goes on."""
        logits = self._slots.next(self._token, self._going)
        # The token that comes next is one of the open marker, or the u-th of the thought.
        index = self._slots.length
        u = (index - len(self._open)).clamp(min=0)
        opened, predicts = index >= len(self._open), index >= self._predicts_at
        thinks = self._going & opened & (self._predicts_at == NEVER)
        h = index - self._predicts_at
        at = torch.where(predicts, self._budget + h, u).clamp(max=self._stride - 1)
        uniform = self._uniforms.gather(1, at[:, None])[:, 0]
        token, logprob, entropy = draw(
            self._of_targets(logits, predicts), uniform, self._format.temperature
        )

        counts = thinks | self._going & predicts
        place = torch.where(counts, self._first + at, self._nowhere)
        self._tokens.index_copy_(0, place, token)
        self._logprobs.index_copy_(0, place, logprob)
        self._entropies.index_copy_(0, place, entropy)

        closed, broken = self._closes(token, place, u) & thinks, logprob.isnan() & counts
        over = closed | (u == self._budget - 1) & thinks
        self._closed |= closed
        self._broken |= broken
        self._length += thinks
        opening = self._open[index.clamp(max=len(self._open) - 1)]
        self._token.copy_(torch.where(opened, token, opening))
        if self._horizon:
            over = self._go_on(index, over, closed, counts & predicts, token)
        self._going &= ~(over | broken)

    def _of_targets(self, logits: Tensor, predicts: Tensor) -> Tensor:
        """Logits [N, V] without the open marker, where a prediction is drawn: it is left out of
        every softmax over targets."""
        if not self._horizon:
            return logits
        left_out = torch.zeros_like(logits[0], dtype=torch.bool)
        left_out[self._format.markers.excluded] = True
        return logits.masked_fill(predicts[:, None] & left_out, -torch.inf)

    def _go_on(
        self, index: Tensor, over: Tensor, closed: Tensor, predicts: Tensor, token: Tensor
    ) -> Tensor:
        """From a thought to its close marker, where it has none, and to its prediction.

        Args:
            index: [N] tokens run.
            over, closed: [N] bool, whether the thought is over now, and with its close marker.
            predicts: [N] bool, whether `token` belongs to a prediction.

        Returns:
            [N] bool, whether the prediction is over.
        """
        num_close = len(self._close)
        # The token that was drawn last is run before the first of the prediction is drawn.
        begins = index + 1 + torch.where(closed, 0, num_close)
        forced = index + num_close - self._predicts_at
        closing = self._close[forced.clamp(min=0, max=num_close - 1)]
        closes = self._going & (forced >= 0) & (index < self._predicts_at)
        self._token.copy_(torch.where(closes, closing, self._token))
        self._predicts_at.copy_(torch.where(over, begins, self._predicts_at))

        self._predicted += predicts
        ended = self._predicted == self._horizon
        if self._format.end is not None:
            ended |= token == self._format.end
        return ended & predicts

    def _closes(self, token: Tensor, place: Tensor, u: Tensor) -> Tensor:
        """[N] bool, whether the thought ends with the close marker now."""
        *earlier, last = self._format.markers.close
        closes = token == last
        if earlier:
            closes &= u >= len(earlier)
        for back, wanted in enumerate(reversed(earlier), start=1):
            closes &= self._tokens[(place - back).clamp(min=0)] == wanted
        return closes

    def look(self) -> Ended:
        """What has become of the thoughts; waits for the device."""
        rows = (self._going, self._length, self._predicted, self._closed, self._broken)
        seen = torch.stack([row.long() for row in rows]).cpu().numpy()
        going, length, predicted, closed, broken = seen
        return Ended(going > 0, length, predicted, closed > 0, broken > 0)

    def end(self, slots: list[int], thoughts: np.ndarray, seen: Ended) -> None:
        """Note how the thoughts in these slots ended."""
        self._lengths[thoughts] = seen.length[slots]
        self._predictions[thoughts] = seen.predicted[slots]
        self._truncated[thoughts] = ~seen.closed[slots]

    def keep(self, slots: list[int]) -> None:
        """Hold only these slots, renumbered in this order."""
        index = torch.tensor(slots, device=self._token.device)
        self._token, self._first = self._token[index], self._first[index]
        self._uniforms, self._going = self._uniforms[index], self._going[index]
        self._closed, self._broken = self._closed[index], self._broken[index]
        self._length, self._predicted = self._length[index], self._predicted[index]
        self._predicts_at = self._predicts_at[index]

    def thoughts(self, group_size: int) -> Thoughts:
        """All of them [M, G, longest]."""
        count, device = len(self._lengths), self._token.device
        longest = int(self._lengths.max(initial=0))

        def grouped(part: Tensor) -> Tensor:
            return part.unflatten(0, (count // group_size, group_size))

        def segment(lengths: np.ndarray, start: int, width: int) -> tuple[Tensor, ...]:
            """A mask and tokens, log-probabilities and entropies [M, G, width] from a place in each
            thought's on."""
            inside = torch.from_numpy(lengths).to(device)[:, None]
            mask = torch.arange(width, device=device) < inside
            every = (self._tokens, self._logprobs, self._entropies)
            rows = (part[:-1].unflatten(0, (count, self._stride)) for part in every)
            parts = (row[:, start : start + width].masked_fill(~mask, 0) for row in rows)
            return tuple(grouped(part) for part in (mask, *parts))

        mask, tokens, logprob, entropy = segment(self._lengths, 0, longest)
        prediction = None
        if self._horizon:
            said, words, likely, _ = segment(self._predictions, self._budget, self._horizon)
            ended = (
                torch.zeros_like(said) if self._format.end is None else words == self._format.end
            )
            prediction = Predictions(
                tokens=words,
                mask=said,
                behavior_logprob=likely,
                ended=(ended & said).any(dim=2),
            )
        return Thoughts(
            tokens=tokens,
            mask=mask,
            behavior_logprob=logprob,
            entropy=entropy,
            truncated=grouped(torch.from_numpy(self._truncated).to(device)),
            prediction=prediction,
        )
