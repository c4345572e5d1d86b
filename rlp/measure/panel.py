"""The held-out panel: the positions that every evaluation of a run, and of other runs, looks at.

Dimensions
    B  documents;  M  positions;  G  thoughts per position;  L  thought tokens
"""

from dataclasses import dataclass

import numpy as np
import torch

from rlp.config import ConfigError
from rlp.data.documents import Document
from rlp.data.positions import Positions, choose_positions
from rlp.model.setup import PanelSetup
from rlp.model.thoughts import Thoughts
from rlp.process.ranks import Ranks

PANEL_SEED = 0
"""Panel, panel noise and intervals do not depend on `run.seed`, so runs with different seeds are
compared on the same positions."""


@dataclass(frozen=True, slots=True)
class Panel:
    """Held-out documents with one chosen set of positions."""

    documents: list[Document]
    positions: Positions

    def __len__(self) -> int:
        return len(self.positions.position)

    def batches(self, size: int, ranks: Ranks) -> list[tuple[int, int, bool]]:
        """(start, stop, counts) of this rank's batches of documents. Every rank has as many, the
        last ones perhaps repeated and not counted, so that a forward may be a collective."""
        starts = range(0, len(self.documents), size)
        rounds = -(-len(starts) // ranks.world_size)
        mine = [ranks.rank + ranks.world_size * r for r in range(rounds)]
        spans = [(starts[i % len(starts)], i < len(starts)) for i in mine]
        return [(start, min(start + size, len(self.documents)), counts) for start, counts in spans]

    def share(self, ranks: Ranks) -> tuple[int, int, bool]:
        """(start, stop, counts): this rank's documents, all at once, likewise."""
        size = -(-len(self.documents) // ranks.world_size)
        start = ranks.rank * size
        counts = start < len(self.documents)
        start = start if counts else 0
        return start, min(start + size, len(self.documents)), counts

    def donors(self) -> np.ndarray | None:
        """[M] the position whose thoughts each one gets when they are shuffled: one in the next
        document, the last document's in the first. They depend on the panel alone. None for a
        single document: there is no other.
        """
        if len(self.documents) < 2:
            return None
        document, count = self.positions.document, self.num_positions()
        first = np.cumsum(count) - count
        following = (document + 1) % len(self.documents)
        return first[following] + (np.arange(len(self)) - first[document]) % count[following]

    def num_positions(self) -> np.ndarray:
        """[B] positions of each document."""
        return np.bincount(self.positions.document, minlength=len(self.documents))

    def sum_over_documents(self, values: np.ndarray) -> np.ndarray:
        """[B] what the positions [M] of each document add up to."""
        return np.bincount(self.positions.document, weights=values, minlength=len(self.documents))


def held_out_panel(setup: PanelSetup) -> Panel:
    """The first held-out documents, in the order of `PANEL_SEED`, that together have
    `evaluation.panel_positions` positions, each read once.

    `panel_position` says where. Positions are drawn uniformly among the candidates, for the
    selectors `entropy` and `surprisal` too: a panel that the policy chose would be another one
    after a resume, and in another run.
    """
    config = setup.config
    if setup.held_out is None:
        raise ConfigError(
            "data.held_out names no file, and a panel is made of held-out documents. Write"
            " data.held_out=[FILE]."
        )
    stream, wanted = setup.panel_stream(PANEL_SEED), config.evaluation.panel_positions
    documents, found = [], 0
    while found < wanted and stream.cursor < len(setup.held_out):
        document = stream.next_documents(1)[0]
        if stream.cursor > len(setup.held_out):
            break
        documents.append(document)
        found += setup.panel_candidates.count(document.tokens)

    positions = choose_positions(
        documents,
        setup.panel_candidates,
        setup.panel_candidates.config,
        horizon=config.target.horizon,
        seed=PANEL_SEED,
        step=0,
    )
    first = positions[:wanted]
    return Panel(documents[: int(first.document[-1]) + 1], first)


@dataclass(frozen=True, slots=True)
class PanelThoughts:
    """The sampled thoughts of a whole panel, on every rank."""

    tokens: list[list[np.ndarray]]
    """Of each position and thought the sampled token ids, int64, the close marker included where it
    was sampled."""
    truncated: np.ndarray
    """[M, G] bool, True where the budget ended the thought."""

    @classmethod
    def of(cls, thoughts: Thoughts) -> "PanelThoughts":
        """Sampled thoughts [m, G, L], without their padding."""
        tokens, mask = thoughts.tokens.cpu().numpy(), thoughts.mask.cpu().numpy()
        groups = [[thought[held] for thought, held in zip(*group)] for group in zip(tokens, mask)]
        return cls(groups, thoughts.truncated.cpu().numpy())

    @classmethod
    def joined(cls, parts: list["PanelThoughts"]) -> "PanelThoughts":
        """Those of all parts, in order."""
        groups = [group for part in parts for group in part.tokens]
        return cls(groups, np.concatenate([part.truncated for part in parts]))

    def lengths(self) -> np.ndarray:
        """[M, G] sampled tokens of each thought."""
        return np.array([[len(thought) for thought in group] for group in self.tokens])

    def __getitem__(self, positions: slice | np.ndarray) -> "PanelThoughts":
        """Those of some positions."""
        chosen = np.arange(len(self.tokens))[positions]
        return PanelThoughts([self.tokens[m] for m in chosen], self.truncated[chosen])

    def on(self, device: torch.device) -> Thoughts:
        """As a layout takes them; what the sampler knew about them is left out (0)."""
        lengths = self.lengths()
        mask = np.arange(max(1, lengths.max())) < lengths[:, :, None]
        tokens = np.zeros(mask.shape, dtype=np.int64)
        tokens[mask] = np.concatenate([thought for group in self.tokens for thought in group])
        tokens, mask, truncated = (
            torch.from_numpy(part).to(device) for part in (tokens, mask, self.truncated)
        )
        unknown = torch.zeros_like(tokens, dtype=torch.float32)
        return Thoughts(tokens, mask, unknown, unknown, truncated)
