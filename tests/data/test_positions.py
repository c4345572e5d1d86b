"""Positions and the noise that chooses them: candidates by definition, keyed draws."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from rlp.config import ConfigError, PositionConfig
from rlp.data.documents import Document
from rlp.data.noise import ORDER_NOISE, PANEL_NOISE, POSITION_NOISE, THOUGHT_NOISE, keyed_noise
from rlp.data.positions import Positions, candidate_positions, choose_positions, marker_ids
from rlp.data.selectors import open_selector
from tests.tiny_models import random_documents


def candidates_of(
    tokens: list[int],
    *,
    horizon: int = 1,
    excluded: int = 2,
    marker: tuple[int, ...] = (),
    **fields: object,
) -> list[int]:
    return candidate_positions(
        np.array(tokens),
        PositionConfig(**fields),
        horizon=horizon,
        excluded=excluded,
        marker=marker,
    ).tolist()


def test_a_position_has_a_context_before_it_and_all_its_targets_after():
    tokens = [10, 11, 12, 13, 14]
    assert candidates_of(tokens) == [1, 2, 3, 4]
    assert candidates_of(tokens, horizon=3) == [1, 2]
    assert candidates_of(tokens, horizon=4) == [1]
    assert candidates_of(tokens, horizon=5) == []
    assert candidates_of(tokens, min_prefix_tokens=3) == [3, 4]
    assert candidates_of(tokens, min_prefix_tokens=3, horizon=2) == [3]
    assert candidates_of([10]) == candidates_of([]) == []


def test_the_excluded_token_is_never_a_target():
    """No target softmax holds the open marker; in the context it may stand."""
    assert candidates_of([10, 2, 12, 13, 2]) == [2, 3]
    assert candidates_of([10, 2, 12, 13, 2], horizon=2) == [2]
    assert candidates_of([10, 2, 12, 13, 2], horizon=3) == []


def test_a_marker_of_several_tokens_puts_positions_right_behind_it():
    tokens = [7, 8, 7, 8, 9, 8, 7, 8]
    assert candidates_of(tokens, marker=(8,)) == [2, 4, 6]
    assert candidates_of(tokens, marker=(7, 8)) == [
        2,
        4,
    ]  # the last occurrence has no target behind it
    assert candidates_of(tokens, marker=(7, 8, 7)) == [3]
    assert candidates_of(tokens, marker=(8, 7), horizon=2) == [3]
    assert candidates_of(tokens, marker=(9, 9)) == []
    assert candidates_of(tokens, marker=(7, 8), min_prefix_tokens=3) == [4]


@pytest.mark.parametrize("seed", range(5))
def test_candidates_are_those_of_the_definition(seed: int):
    """Word by word, over random documents of four words."""
    generator = np.random.default_rng(seed)
    tokens = generator.integers(0, 4, size=40)
    horizon, least, marker = (
        int(generator.integers(1, 4)),
        int(generator.integers(1, 5)),
        tuple(generator.integers(0, 4, size=seed % 3).tolist()),
    )
    expected = [
        t
        for t in range(least, len(tokens) - horizon + 1)
        if 2 not in tokens[t : t + horizon]
        and t >= len(marker)
        and tokens[t - len(marker) : t].tolist() == list(marker)
    ]
    assert (
        candidates_of(tokens.tolist(), horizon=horizon, marker=marker, min_prefix_tokens=least)
        == expected
    )


def test_marker_ids_are_the_tokens_of_its_text(tokenizer: PreTrainedTokenizerFast):
    assert marker_ids(tokenizer, PositionConfig()) == ()
    assert marker_ids(tokenizer, PositionConfig(selector="marker", marker="w1 w2")) == (7, 8)
    with pytest.raises(
        ConfigError,
        match=(
            r"position.marker must be text that the tokenizer can write \(token ids \[4\]\), got"
            r" 'Answer:'"
        ),
    ):
        marker_ids(tokenizer, PositionConfig(selector="marker", marker="Answer:"))


def chosen(
    documents: list[Document],
    *,
    horizon: int = 1,
    seed: int = 0,
    step: int = 1,
    scores: list[np.ndarray] | None = None,
    **fields: object,
) -> Positions:
    config = PositionConfig(**fields)
    return choose_positions(
        documents,
        lambda tokens: np.arange(1, len(tokens) - horizon + 1),
        config,
        horizon=horizon,
        seed=seed,
        step=step,
        selector=open_selector(config.selector),
        statistics=None if scores is None else {config.selector: scores},
    )


def test_uniform_positions_are_uniform():
    """4000 draws of one of eight: each 500 times, and the chi-square of seven degrees under its
    99.9 % point."""
    document = Document(id=3, tokens=np.arange(10, 19))
    counts = Counter(int(chosen([document], step=step).position[0]) for step in range(4000))
    assert sorted(counts) == list(range(1, 9))
    assert sum((count - 500) ** 2 / 500 for count in counts.values()) < 24.3


def test_several_uniform_positions_are_distinct_and_in_order():
    """3000 draws of three of eight, without replacement: each position 3/8 of the time, within four
    standard deviations."""
    document = Document(id=3, tokens=np.arange(10, 19))
    counts = Counter()
    for step in range(3000):
        position = chosen([document], step=step, per_document=3).position
        assert len(position) == 3 and (np.diff(position) > 0).all()
        counts.update(position.tolist())
    spread = (3000 * 3 / 8 * 5 / 8) ** 0.5
    assert all(abs(counts[t] - 1125) < 4 * spread for t in range(1, 9))


def test_uniform_positions_depend_on_seed_step_and_document_only():
    """Not on the batch that a document comes in, nor its place there."""
    documents = random_documents([40, 30, 50])
    together = chosen(documents, per_document=3)
    for index, document in enumerate(documents):
        alone = chosen([document], per_document=3)
        assert (
            together.position[together.slice_of_documents(index, index + 1)].tolist()
            == alone.position.tolist()
        )
    turned = chosen(documents[::-1], per_document=3)
    assert (
        turned.position[turned.slice_of_documents(2, 3)].tolist() == together.position[:3].tolist()
    )
    assert chosen(documents, per_document=3, step=2).position.tolist() != together.position.tolist()
    assert chosen(documents, per_document=3, seed=1).position.tolist() != together.position.tolist()
    renamed = [Document(id=document.id + 1000, tokens=document.tokens) for document in documents]
    assert chosen(renamed, per_document=3).position.tolist() != together.position.tolist()


def test_the_second_time_in_a_step_a_document_has_other_positions():
    """Each occurrence draws for itself: of 4 times, 3 of 40 positions, hardly two alike; the first
    as ever."""
    document = random_documents([40])[0]
    again = [replace(document, occurrence=occurrence) for occurrence in range(4)]
    positions = chosen(again, per_document=3)
    rows = [tuple(positions.position[positions.slice_of_documents(d, d + 1)]) for d in range(4)]
    assert len(set(rows)) == 4
    assert rows[0] == tuple(chosen([document], per_document=3).position)


@pytest.mark.parametrize("selector", ["entropy", "surprisal"])
def test_scored_selectors_take_the_largest_and_the_earlier_of_equals(selector: str):
    """Among candidates only: index 0 has the largest score and no context."""
    documents = random_documents([6, 4])
    scores = [np.array([9.0, 1.0, 5.0, 5.0, 0.0, 7.0]), np.array([9.0, 3.0, 3.0, 3.0])]
    assert chosen(
        documents, scores=scores, per_document=2, selector=selector
    ).position.tolist() == [2, 5, 1, 2]
    assert chosen(
        documents, scores=scores, per_document=1, selector=selector
    ).position.tolist() == [5, 1]
    assert chosen(
        random_documents([500]), scores=[np.arange(500) % 3], per_document=4, selector=selector
    ).position.tolist() == [2, 5, 8, 11]


def test_all_takes_every_candidate():
    assert chosen(random_documents([5, 3]), per_document="all").position.tolist() == [
        1,
        2,
        3,
        4,
        1,
        2,
    ]


def test_a_document_with_fewer_candidates_gives_what_it_has():
    positions = chosen(random_documents([3, 9, 2]), per_document=4)
    assert positions.document.tolist() == [0, 0, 1, 1, 1, 1, 2]
    assert positions.position[:2].tolist() == [1, 2] and positions.position[-1] == 1
    assert chosen(
        random_documents([3]), per_document=4, selector="entropy", scores=[np.zeros(3)]
    ).position.tolist() == [1, 2]


def test_targets_are_the_horizon_at_the_position():
    documents = random_documents([9, 7])
    positions = chosen(documents, horizon=3, per_document=2)
    for document, position, target in zip(positions.document, positions.position, positions.target):
        assert target.tolist() == documents[document].tokens[position : position + 3].tolist()
    assert positions.target.dtype == np.int64


def test_positions_of_some_documents_are_renumbered():
    """A micro-batch is a run of documents; documents with few positions keep their place."""
    positions = chosen(random_documents([3, 9, 2, 5]), per_document=3)
    part = positions.of_documents(1, 3)
    assert part.document.tolist() == [0, 0, 0, 1]
    assert part.position.tolist() == positions.position[2:6].tolist()
    assert part.target.tolist() == positions.target[2:6].tolist()
    assert positions.of_documents(0, 4).position.tolist() == positions.position.tolist()


# --- Noise.

KEYS = [
    {"seed": 0, "purpose": THOUGHT_NOISE, "step": 1, "document": 5, "position": 7, "thought": 2}
    | change
    for change in (
        {},
        {"seed": 1},
        {"purpose": POSITION_NOISE},
        {"purpose": PANEL_NOISE},
        {"purpose": ORDER_NOISE},
        {"step": 2},
        {"document": 6},
        {"position": 8},
        {"thought": 3},
        {"document": 7, "position": 5},
        {"position": 2, "thought": 7},
        {"seed": 2**63 - 1},
        {"document": 2**40},
        {"step": 2**31},
    )
]


def test_noise_repeats_for_the_same_key_and_differs_for_any_other():
    """Keys that differ in one part, or that swap two, share no draw."""
    draws = [keyed_noise(**key).random(64) for key in KEYS]
    assert all((keyed_noise(**key).random(64) == draw).all() for key, draw in zip(KEYS, draws))
    assert len(np.unique(np.concatenate(draws))) == 64 * len(KEYS)


def test_a_longer_draw_begins_with_the_shorter_one():
    """So a larger thought budget does not change the tokens before it."""
    for key in KEYS:
        assert (keyed_noise(**key).random(100)[:9] == keyed_noise(**key).random(9)).all()


def test_noise_of_neighbouring_keys_is_uncorrelated():
    """2000 numbers each: a correlation of independent draws has standard deviation 1 / sqrt(2000) =
    0.022; five of them allowed."""
    draws = np.stack([keyed_noise(**key).random(2000) for key in KEYS])
    correlation = np.corrcoef(draws) - np.eye(len(KEYS))
    assert np.abs(correlation).max() < 5 * 2000**-0.5
    assert (np.abs(draws.mean(axis=1) - 0.5) < 5 * (1 / 12 / 2000) ** 0.5).all()
