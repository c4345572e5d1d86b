"""Thoughts while they grow: one step of all slots, by arithmetic on tensors alone.

A step runs the last token of each thought, draws the next one and sees what has ended. It reads
nothing on the host and makes nothing whose shape depends on a number, so it can be recorded once
and replayed.

Dimensions
    N  slots;  T  thoughts of the rollout;  L  the budget, in thought tokens;  O  open marker tokens
    V  vocabulary
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rlp.model.thoughts import ThoughtFormat, Thoughts
from rlp.sampling.draw import draw
from rlp.sampling.slots import Slots


@dataclass(frozen=True, slots=True)
class Ended:
    """What the host finds in the slots, one number or flag each [N]."""

    going: np.ndarray
    length: np.ndarray
    """Tokens that were run, of the open marker and the thought."""
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
        device, num_slots = slots.length.device, slots.num_slots
        self._open = torch.tensor(thought_format.markers.open, device=device)

        def numbers(count: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros(count, dtype=dtype, device=device)

        self._token = numbers(num_slots, torch.int64)
        """The one to run next."""
        self._going, self._closed, self._broken = (numbers(num_slots, torch.bool) for _ in range(3))
        self._first = numbers(num_slots, torch.int64)
        """Where the tokens of a slot's thought begin, among all."""
        self._uniforms = torch.zeros(num_slots, budget, dtype=torch.float64, device=device)

        self._nowhere = torch.tensor(num_thoughts * budget, device=device)
        """One place behind all others takes what counts nowhere."""
        count = num_thoughts * budget + 1
        self._tokens = numbers(count, torch.int64)
        self._logprobs, self._entropies = (numbers(count, dtype) for _ in range(2))
        self._lengths = np.zeros(num_thoughts, dtype=np.int64)
        self._truncated = np.zeros(num_thoughts, dtype=bool)

    def begin(self, slots: list[int], thoughts: list[int], uniforms: np.ndarray) -> None:
        """New thoughts in these slots, to be drawn by uniforms [slots, L]."""
        device = self._token.device
        index, first = torch.tensor([slots, thoughts]).to(device)
        self._token[index] = self._open[0]
        self._first[index] = first * self._budget
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
        thinks = index >= len(self._open)
        uniform = self._uniforms.gather(1, u[:, None])[:, 0]
        token, logprob, entropy = draw(logits, uniform, self._format.temperature)

        counts = self._going & thinks
        place = torch.where(counts, self._first + u, self._nowhere)
        self._tokens.index_copy_(0, place, token)
        self._logprobs.index_copy_(0, place, logprob)
        self._entropies.index_copy_(0, place, entropy)

        closed, broken = self._closes(token, place, u) & counts, logprob.isnan() & counts
        self._closed |= closed
        self._broken |= broken
        self._going &= ~(closed | broken | (u == self._budget - 1) & counts)
        opening = self._open[index.clamp(max=len(self._open) - 1)]
        self._token.copy_(torch.where(thinks, token, opening))

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
        rows = (self._going, self._slots.length, self._closed, self._broken)
        going, length, closed, broken = torch.stack([row.long() for row in rows]).cpu().numpy()
        return Ended(going > 0, length, closed > 0, broken > 0)

    def end(self, slots: list[int], thoughts: np.ndarray, seen: Ended) -> None:
        """Note how the thoughts in these slots ended."""
        self._lengths[thoughts] = seen.length[slots] - len(self._open) + 1
        self._truncated[thoughts] = ~seen.closed[slots]

    def keep(self, slots: list[int]) -> None:
        """Hold only these slots, renumbered in this order."""
        index = torch.tensor(slots, device=self._token.device)
        self._token, self._first = self._token[index], self._first[index]
        self._uniforms, self._going = self._uniforms[index], self._going[index]
        self._closed, self._broken = self._closed[index], self._broken[index]

    def thoughts(self, group_size: int) -> Thoughts:
        """All of them [M, G, longest]."""
        longest = int(self._lengths.max(initial=0))
        groups = len(self._lengths) // group_size
        device = self._token.device
        lengths = torch.from_numpy(self._lengths).to(device)
        mask = torch.arange(longest, device=device) < lengths[:, None]

        def grouped(part: Tensor) -> Tensor:
            return part.unflatten(0, (groups, group_size))

        def of_all(part: Tensor) -> Tensor:
            part = part[:-1].unflatten(0, (len(self._lengths), self._budget))[:, :longest]
            return grouped(part.masked_fill(~mask, 0))

        return Thoughts(
            tokens=of_all(self._tokens),
            mask=grouped(mask),
            behavior_logprob=of_all(self._logprobs),
            entropy=of_all(self._entropies),
            truncated=grouped(torch.from_numpy(self._truncated).to(device)),
        )
