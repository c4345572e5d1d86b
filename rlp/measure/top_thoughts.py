"""The most and the least helpful thoughts of a step, as `thoughts.jsonl` tells them."""

from dataclasses import dataclass

import torch
from torch import Tensor

from rlp.data.documents import Document
from rlp.data.positions import Positions
from rlp.measure.thought_statistics import thought_lengths
from rlp.model.thoughts import Thoughts
from rlp.process.ranks import Ranks

PREFIX_TAIL_TOKENS = 64
"""Of the context before a thought that is told with it."""


@dataclass(frozen=True, slots=True)
class _Offer:
    """Thoughts of a micro-batch, and what is known of them."""

    documents: list[Document]
    positions: Positions
    thoughts: Thoughts
    values: dict[str, Tensor]
    close_tokens: int

    def told(self, index: int, values: dict[str, Tensor]) -> dict:
        """What is told of one of them.

        Args:
            values: on the host.
        """
        thoughts, positions = self.thoughts, self.positions
        m, g = divmod(index, thoughts.tokens.shape[1])
        length = int(thought_lengths(thoughts[m : m + 1], self.close_tokens)[0, g])
        document, position = self.documents[positions.document[m]], int(positions.position[m])
        prefix_tail = document.tokens[max(0, position - PREFIX_TAIL_TOKENS) : position]
        said = {}
        if thoughts.prediction is not None:
            of_thought = thoughts.prediction.mask[m, g]
            said["prediction"] = thoughts.prediction.tokens[m, g][of_thought].tolist()
        return {
            "document": document.id,
            "position": position,
            "prefix_tail": prefix_tail.tolist(),
            "thought": thoughts.tokens[m, g, :length].tolist(),
            **said,
            "target": positions.target[m].tolist(),
            **{name: float(value[m, g]) for name, value in values.items()},
            "thought_tokens": length,
            "truncated": bool(thoughts.truncated[m, g]),
        }


class TopThoughts:
    """The most and the least helpful thoughts of a step, over all its micro-batches and ranks."""

    def __init__(self, count: int) -> None:
        """
        Args:
            count: thoughts to keep, half of them the most helpful ones.
        """
        self._half = count // 2
        self._offers: list[_Offer] = []

    def offer(
        self,
        documents: list[Document],
        positions: Positions,
        thoughts: Thoughts,
        values: dict[str, Tensor],
        close_tokens: int,
    ) -> None:
        """Keep the thoughts of a micro-batch to be looked at. Those are most helpful that have the
        largest reward; where it was not measured, the largest advantage.

        Args:
            thoughts: in the memory of the host.
            values: [M, G] each, by name; `advantage` is among them. Values that are not finite are
                not told: JSON has no word for them, and the update is refused with one.
        """
        self._offers.append(_Offer(documents, positions, thoughts, values, close_tokens))

    def _look(self) -> tuple[list[tuple[float, int, dict]], int]:
        """This rank's candidates, and of how many thoughts they are. The device is read once."""
        parts = [value.flatten() for offer in self._offers for value in offer.values.values()]
        if not parts:
            return [], 0
        read = iter(torch.cat(parts).cpu().split([len(part) for part in parts]))
        held, offered = [], 0
        for offer in self._offers:
            values = {name: next(read).view_as(value) for name, value in offer.values.items()}
            if not all(bool(value.isfinite().all()) for value in values.values()):
                continue
            helpful = values.get("reward", values["advantage"]).flatten()
            order = helpful.argsort(descending=True, stable=True).tolist()
            worst = order[len(order) - min(self._half, len(order)) :]
            held += [
                (-float(helpful[index]), offered + index, offer.told(index, values))
                for index in dict.fromkeys([*order[: self._half], *worst])
            ]
            offered += len(order)
            held = self._ends(held, self._half)
        return held, offered

    def gather(self, ranks: Ranks) -> list[dict]:
        """The thoughts of all ranks, the most helpful first; text as token ids. A collective."""
        held, offered = [], 0
        for rank, (of_rank, offered_there) in enumerate(ranks.gather(self._look())):
            held += [(key, (rank, place), told) for key, place, told in of_rank]
            offered += offered_there
        return [told for _, _, told in self._ends(held, min(self._half, offered // 2))]

    @staticmethod
    def _ends(held: list[tuple], half: int) -> list[tuple]:
        """The first and the last of them, in order, none of them twice."""
        ordered = sorted(held, key=lambda entry: entry[:2])
        if len(ordered) <= 2 * half:
            return ordered
        return ordered[:half] + ordered[len(ordered) - half :]
