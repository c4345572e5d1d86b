"""Which tokens of a document are predicted. What happens at a position is not known here.

Dimensions
    P  document tokens;  K  positions per document;  M  positions of all documents together
    H  target tokens (the horizon)
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from rlp.config import PositionConfig, require
from rlp.data.documents import Document
from rlp.data.noise import POSITION_NOISE, keyed_noise
from rlp.data.selectors import Choice, chosen_by, open_selector
from rlp.process.outside import Part


@dataclass(frozen=True, slots=True)
class Positions:
    """The positions chosen in a list of documents, document by document."""

    document: np.ndarray
    """[M] int64, index in the list of documents, never decreasing."""
    position: np.ndarray
    """[M] int64, index t of the first token to be predicted; the prefix is `tokens[:t]`."""
    target: np.ndarray
    """[M, H] int64, `tokens[t : t + H]`."""

    def __getitem__(self, chosen: slice) -> "Positions":
        """Some of them."""
        return Positions(self.document[chosen], self.position[chosen], self.target[chosen])

    def places(self) -> list[tuple[int, int]]:
        """(document, position) of each, as Python's numbers."""
        return list(zip(self.document.tolist(), self.position.tolist()))

    def of_documents(self, start: int, stop: int) -> "Positions":
        """Those of documents start to stop - 1, with the documents renumbered from 0."""
        chosen = self[self.slice_of_documents(start, stop)]
        return Positions(chosen.document - start, chosen.position, chosen.target)

    def rows_of(self, documents: Sequence[int]) -> np.ndarray:
        """Where the positions of some documents stand, document by document."""
        places = np.arange(len(self.position))
        return np.concatenate([places[self.slice_of_documents(d, d + 1)] for d in documents])

    def of_list(self, documents: Sequence[int]) -> "Positions":
        """Those of some documents, which are renumbered from 0 in this order."""
        rows = self.rows_of(documents)
        number = {d: index for index, d in enumerate(documents)}
        renumbered = np.array([number[d] for d in self.document[rows].tolist()], dtype=np.int64)
        return Positions(renumbered, self.position[rows], self.target[rows])

    def last(self) -> "Positions":
        """The last position alone."""
        return self[-1:]

    def last_of(self, document: int) -> int:
        """The last position of a document that has some."""
        return int(self.position[self.slice_of_documents(document, document + 1)].max())

    def slice_of_documents(self, start: int, stop: int) -> slice:
        """Where the positions of documents start to stop - 1 stand."""
        first, last = np.searchsorted(self.document, (start, stop))
        return slice(int(first), int(last))


@dataclass(frozen=True, slots=True)
class Candidates:
    """Which positions of a document may be chosen, as `candidate_positions` has them."""

    section: str
    """Of the config, that says so: `position` or `evaluation`."""
    config: PositionConfig
    horizon: int
    excluded: int
    marker: tuple[int, ...]

    def __call__(self, tokens: np.ndarray) -> np.ndarray:
        """Of a document [P]: int64, ascending."""
        return candidate_positions(
            tokens,
            self.config,
            horizon=self.horizon,
            excluded=self.excluded,
            marker=self.marker,
        )

    def count(self, tokens: np.ndarray) -> int:
        """How many are chosen of a document: K, or as many as it has."""
        limit, wanted = len(self(tokens)), self.config.per_document
        return limit if wanted == "all" else min(limit, wanted)


def candidate_positions(
    tokens: np.ndarray,
    config: PositionConfig,
    *,
    horizon: int,
    excluded: int,
    marker: tuple[int, ...] = (),
) -> np.ndarray:
    """Positions of a document that may be chosen: enough prefix, a whole horizon of targets, none
    of them `excluded`.

    Args:
        tokens: [P] int64.
        excluded: a token that no target softmax holds, so that it can not be scored as a target.
        marker: token ids of `position.marker`; a position then follows an occurrence of it.

    Returns:
        int64, ascending.
    """
    positions = np.arange(config.min_prefix_tokens, len(tokens) - horizon + 1)
    for offset in range(horizon):
        positions = positions[tokens[positions + offset] != excluded]
    for back, token in enumerate(reversed(marker), start=1):
        positions = positions[positions >= back]
        positions = positions[tokens[positions - back] == token]
    return positions


def choose_positions(
    documents: list[Document],
    candidates: Callable[[np.ndarray], np.ndarray],
    config: PositionConfig,
    *,
    horizon: int,
    seed: int,
    step: int,
    selector: Part | None = None,
    statistics: Mapping[str, list[np.ndarray]] | None = None,
) -> Positions:
    """K positions of each document (fewer where it has fewer candidates).

    Args:
        selector: chooses among more than K candidates; None: uniformly at random.
        statistics: what the selector needs, by name: one [P] array per document.
    """
    selector = selector or open_selector("uniform")
    chosen = []
    for index, document in enumerate(documents):
        may_be = candidates(document.tokens)
        if config.per_document != "all" and len(may_be) > config.per_document:
            known = {name: of_all[index] for name, of_all in (statistics or {}).items()}
            noise = keyed_noise(
                seed=seed,
                purpose=POSITION_NOISE,
                step=step,
                document=document.id,
                occurrence=document.occurrence,
            )
            may_be = chosen_by(
                selector, Choice(document, may_be, config.per_document, noise, **known)
            )
        chosen.append(may_be)

    position = np.concatenate(chosen)
    document = np.repeat(np.arange(len(documents)), [len(part) for part in chosen])
    target = np.stack([documents[d].tokens[t : t + horizon] for d, t in zip(document, position)])
    return Positions(document=document, position=position, target=target)


def marker_ids(
    tokenizer: PreTrainedTokenizerBase, config: PositionConfig, section: str = "position"
) -> tuple[int, ...]:
    """Token ids of the marker of a section of the config, empty where there is none."""
    if config.marker is None:
        return ()
    ids = tuple(tokenizer.encode(config.marker, add_special_tokens=False))
    require(
        len(ids) > 0 and tokenizer.unk_token_id not in ids,
        f"{section}.marker",
        config.marker,
        f"must be text that the tokenizer can write (token ids {list(ids)})",
    )
    return ids
