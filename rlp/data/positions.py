"""Which tokens of a document are predicted.

Dimensions
    M  positions of all documents together;  K  positions per document;  H  target tokens (the
       horizon)
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from rlp.config import PositionConfig, require
from rlp.data.documents import Document
from rlp.data.noise import POSITION_NOISE, keyed_noise


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
    scores: list[np.ndarray] | None = None,
) -> Positions:
    """K positions of each document (fewer where it has fewer candidates).

    Args:
        scores: for the selectors `entropy` and `surprisal`, one [P] array per document, the score
            of position t at index t; the K largest are taken, the earlier one of equals.
    """
    chosen = [
        _choose(
            document,
            candidates(document.tokens),
            config,
            seed,
            step,
            None if scores is None else scores[index],
        )
        for index, document in enumerate(documents)
    ]
    position = np.concatenate(chosen)
    document = np.repeat(np.arange(len(documents)), [len(part) for part in chosen])
    target = np.stack([documents[d].tokens[t : t + horizon] for d, t in zip(document, position)])
    return Positions(document=document, position=position, target=target)


def _choose(
    document: Document,
    candidates: np.ndarray,
    config: PositionConfig,
    seed: int,
    step: int,
    score: np.ndarray | None,
) -> np.ndarray:
    if config.per_document == "all" or len(candidates) <= config.per_document:
        return candidates
    if score is not None:
        ranked = candidates[np.argsort(-score[candidates], kind="stable")]
        return np.sort(ranked[: config.per_document])
    noise = keyed_noise(
        seed=seed,
        purpose=POSITION_NOISE,
        step=step,
        document=document.id,
        occurrence=document.occurrence,
    )
    return np.sort(noise.choice(candidates, size=config.per_document, replace=False))


def marker_ids(tokenizer: PreTrainedTokenizerBase, config: PositionConfig) -> tuple[int, ...]:
    """Token ids of `position.marker`, empty where there is none."""
    if config.marker is None:
        return ()
    ids = tuple(tokenizer.encode(config.marker, add_special_tokens=False))
    require(
        len(ids) > 0 and tokenizer.unk_token_id not in ids,
        "position.marker",
        config.marker,
        f"must be text that the tokenizer can write (token ids {list(ids)})",
    )
    return ids
