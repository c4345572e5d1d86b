"""The most and the least helpful thoughts of a step, as `thoughts.jsonl` tells them."""

from torch import Tensor

from rlp.data.documents import Document
from rlp.data.positions import Positions
from rlp.measure.thought_statistics import thought_lengths
from rlp.model.thoughts import Thoughts
from rlp.process.ranks import Ranks

PREFIX_TAIL_TOKENS = 64
"""Of the context before a thought that is told with it."""


class TopThoughts:
    """The most and the least helpful thoughts of a step, over all its micro-batches and ranks."""

    def __init__(self, count: int) -> None:
        """
        Args:
            count: thoughts to keep, half of them the most helpful ones.
        """
        self._half = count // 2
        self._held: list[tuple[float, int, dict]] = []
        self._offered = 0

    def offer(
        self,
        documents: list[Document],
        positions: Positions,
        thoughts: Thoughts,
        values: dict[str, Tensor],
        close_tokens: int,
    ) -> None:
        """Look at the thoughts of a micro-batch. Those are most helpful that have the largest
        reward; where it was not measured, the largest advantage.

        Args:
            values: [M, G] each, by name; `advantage` is among them. Values that are not finite are
                not kept: JSON has no word for them, and the update is refused with one.
        """
        if not all(bool(value.isfinite().all()) for value in values.values()):
            return
        helpful = values.get("reward", values["advantage"]).flatten()
        order = helpful.argsort(descending=True, stable=True).tolist()
        lengths = thought_lengths(thoughts, close_tokens)
        worst = order[len(order) - min(self._half, len(order)) :]
        for index in dict.fromkeys([*order[: self._half], *worst]):
            m, g = divmod(index, thoughts.tokens.shape[1])
            document, position = documents[positions.document[m]], int(positions.position[m])
            prefix_tail = document.tokens[max(0, position - PREFIX_TAIL_TOKENS) : position]
            told = {
                "document": document.id,
                "position": position,
                "prefix_tail": prefix_tail.tolist(),
                "thought": thoughts.tokens[m, g, : int(lengths[m, g])].tolist(),
                "target": positions.target[m].tolist(),
                **{name: float(value[m, g]) for name, value in values.items()},
                "thought_tokens": int(lengths[m, g]),
                "truncated": bool(thoughts.truncated[m, g]),
            }
            self._held.append((-float(helpful[index]), self._offered + index, told))
        self._offered += len(order)
        self._held = self._ends(self._held, self._half)

    def gather(self, ranks: Ranks) -> list[dict]:
        """The thoughts of all ranks, the most helpful first; text as token ids. A collective."""
        held, offered = [], 0
        for rank, (of_rank, offered_there) in enumerate(ranks.gather((self._held, self._offered))):
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
