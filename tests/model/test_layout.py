"""Rows and queries, token by token: what a thought continues, what is asked, what is forced, and
what it costs."""

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from rlp.config import load_config
from rlp.data.documents import Document
from rlp.data.positions import Positions
from rlp.model.layout import (
    DOCUMENT,
    NO_THINK,
    OPEN_MARKER,
    TARGET,
    THOUGHT,
    Layout,
    continuation_layout,
    repeated_layout,
)
from rlp.model.markers import Markers
from rlp.model.shapes import Work, row_work
from rlp.model.thoughts import ThoughtFormat, Thoughts
from rlp.sampling.rollout import NoiseKey
from tests.sampled import sample_thoughts
from tests.tiny_models import WORDS, random_documents, tiny_policy

CPU = torch.device("cpu")
OPEN, CLOSE, INSTRUCTION = (2, 40), (41, 3), (42, 43, 44)
DOCUMENTS = [
    Document(id=0, tokens=np.array([10, 11, 12, 13, 14])),
    Document(id=1, tokens=np.array([20, 21, 22])),
]


def format_of(
    *,
    horizon: int = 1,
    instruction: tuple[int, ...] = INSTRUCTION,
    begin: int | None = None,
    temperature: float = 0.5,
) -> ThoughtFormat:
    return ThoughtFormat(
        markers=Markers(open=OPEN, close=CLOSE),
        instruction=instruction,
        begin=begin,
        temperature=temperature,
        target_temperature=1.0,
        horizon=horizon,
    )


def positions_at(*places: tuple[int, int], horizon: int = 1) -> Positions:
    return Positions(
        document=np.array([d for d, _ in places]),
        position=np.array([t for _, t in places]),
        target=np.stack([DOCUMENTS[d].tokens[t : t + horizon] for d, t in places]),
    )


def given_thoughts(*groups: list[tuple[list[int], bool]]) -> Thoughts:
    """Thoughts from (tokens, truncated) pairs, one list for each position."""
    width = max(len(tokens) for group in groups for tokens, _ in group)
    tokens = torch.zeros(len(groups), len(groups[0]), width, dtype=torch.int64)
    mask = torch.zeros(tokens.shape, dtype=torch.bool)
    for m, group in enumerate(groups):
        for g, (thought, _) in enumerate(group):
            tokens[m, g, : len(thought)], mask[m, g, : len(thought)] = torch.tensor(thought), True
    return Thoughts(
        tokens=tokens,
        mask=mask,
        behavior_logprob=torch.zeros(tokens.shape),
        entropy=torch.zeros(tokens.shape),
        truncated=torch.tensor([[truncated for _, truncated in group] for group in groups]),
    )


def queries(layout: Layout, block: int) -> list[tuple[list[int], int, float, int]]:
    """Each query of a block as (tokens up to the hidden state that predicts, target, temperature,
    excluded)."""
    start = sum(layout.sizes[:block])
    chosen = slice(start, start + layout.sizes[block])
    return [
        (
            layout.tokens[row, : column + 1].tolist(),
            int(target),
            round(1 / float(inverse), 6),
            int(excluded),
        )
        for row, column, target, inverse, excluded in zip(
            layout.row[chosen],
            layout.column[chosen],
            layout.target[chosen],
            layout.inverse_temperature[chosen],
            layout.excluded[chosen],
        )
    ]


# Two groups of two: ended by a sampled marker of two tokens, truncated, and thoughts that are the
# marker alone.
POSITIONS = positions_at((0, 2), (1, 1))
THOUGHTS = given_thoughts(
    [([30, 31, *CLOSE], False), ([32, 33], True)], [([*CLOSE], False), ([34, 35, 36], True)]
)
CONTEXTS = [[*INSTRUCTION, 10, 11, *OPEN]] * 2 + [[*INSTRUCTION, 20, *OPEN]] * 2
SAMPLED = [[30, 31, *CLOSE], [32, 33], [*CLOSE], [34, 35, 36]]
CLOSED = [[30, 31, *CLOSE], [32, 33, *CLOSE], [*CLOSE], [34, 35, 36, *CLOSE]]


def test_a_thought_is_asked_token_by_token_in_its_context():
    """Each sampled token at the sampling temperature with nothing excluded, from instruction,
    prefix, open marker and the tokens before it."""
    layout = repeated_layout(
        DOCUMENTS, POSITIONS, THOUGHTS, format_of(), lm=False, no_think=False, device=CPU
    )
    expected = [
        (context + thought[:u], token, 0.5, -1)
        for context, thought in zip(CONTEXTS, SAMPLED)
        for u, token in enumerate(thought)
    ]
    assert queries(layout, THOUGHT) == expected


def test_a_target_is_asked_after_a_closed_thought_whoever_closed_it():
    """A sampled and a forced close marker stand alike before the target; the open marker is out of
    its softmax; temperature 1."""
    layout = repeated_layout(
        DOCUMENTS, POSITIONS, THOUGHTS, format_of(), lm=False, no_think=False, device=CPU
    )
    expected = [
        (context + thought, target, 1.0, OPEN[0])
        for context, thought, target in zip(CONTEXTS, CLOSED, [12, 12, 21, 21])
    ]
    assert queries(layout, TARGET) == expected


def test_a_forced_close_marker_carries_no_thought_query():
    """It was not sampled, so it is not trained: a truncated thought asks for its sampled tokens
    only."""
    layout = repeated_layout(
        DOCUMENTS,
        positions_at((0, 2)),
        given_thoughts([([32, 33], True), ([32, 33, *CLOSE], False)]),
        format_of(),
        lm=False,
        no_think=False,
        device=CPU,
    )
    assert layout.tokens[0].tolist() == layout.tokens[1].tolist()
    assert [target for _, target, *_ in queries(layout, THOUGHT)] == [32, 33, 32, 33, *CLOSE]
    assert [int(row) for row in layout.row[:6]] == [0, 0, 1, 1, 1, 1]


def test_a_horizon_asks_for_the_next_targets_after_the_first():
    """Three tokens: each given those before it; the last is never read."""
    positions = positions_at((0, 2), horizon=3)
    layout = repeated_layout(
        DOCUMENTS,
        positions,
        given_thoughts([([30, *CLOSE], False), ([31], True)]),
        format_of(horizon=3),
        lm=False,
        no_think=True,
        device=CPU,
    )
    context = [*INSTRUCTION, 10, 11, *OPEN]
    expected = []
    for thought in ([30, *CLOSE], [31, *CLOSE]):
        expected += [
            (context + thought + [12, 13][:h], target, 1.0, OPEN[0])
            for h, target in enumerate((12, 13, 14))
        ]
    assert queries(layout, TARGET) == expected
    assert queries(layout, NO_THINK) == [
        ([10, 11, 12, 13][: 2 + h], target, 1.0, OPEN[0]) for h, target in enumerate((12, 13, 14))
    ]
    assert layout.horizon == 3
    assert layout.tokens[0].tolist() == [*context, 30, *CLOSE, 12, 13]


def test_the_no_think_context_is_the_bare_document():
    """No instruction, no marker, no thought; the mass of the open marker is asked at the same
    place, nothing excluded."""
    layout = repeated_layout(
        DOCUMENTS, POSITIONS, THOUGHTS, format_of(), lm=False, no_think=True, device=CPU
    )
    assert queries(layout, NO_THINK) == [([10, 11], 12, 1.0, OPEN[0]), ([20], 21, 1.0, OPEN[0])]
    assert queries(layout, OPEN_MARKER) == [([10, 11], OPEN[0], 1.0, -1), ([20], OPEN[0], 1.0, -1)]


def test_the_lm_loss_asks_for_every_token_of_every_document_but_the_first():
    layout = repeated_layout(
        DOCUMENTS, POSITIONS, THOUGHTS, format_of(), lm=True, no_think=False, device=CPU
    )
    assert queries(layout, DOCUMENT) == [
        (document.tokens[:t].tolist(), int(document.tokens[t]), 1.0, -1)
        for document in DOCUMENTS
        for t in range(1, len(document.tokens))
    ]
    assert layout.document_mask.tolist() == [[True] * 4, [True] * 2 + [False] * 2]


@pytest.mark.parametrize(
    "lm, no_think, thinks, sizes, rows",
    [
        (False, False, True, (11, 4, 0, 0, 0), 4),
        (True, False, True, (11, 4, 6, 0, 0), 6),
        (False, True, True, (11, 4, 0, 2, 2), 6),
        (True, True, True, (11, 4, 6, 2, 2), 6),
        (True, False, False, (0, 0, 6, 0, 0), 2),
        (False, True, False, (0, 0, 0, 2, 2), 2),
        (True, True, False, (0, 0, 6, 2, 2), 2),
    ],
)
def test_only_what_is_asked_for_is_run(
    lm: bool, no_think: bool, thinks: bool, sizes: tuple[int, ...], rows: int
):
    """Document rows serve the LM loss and the no-think targets at once, and are left out where
    neither is wanted."""
    layout = repeated_layout(
        DOCUMENTS,
        POSITIONS,
        THOUGHTS if thinks else None,
        format_of(),
        lm=lm,
        no_think=no_think,
        device=CPU,
    )
    assert layout.sizes == sizes and len(layout.row) == sum(sizes)
    assert len(layout.tokens) == rows


def test_padding_is_never_asked_about():
    """Rows are padded on the right, and every query's column and target lie inside its row."""
    layout = repeated_layout(
        DOCUMENTS, POSITIONS, THOUGHTS, format_of(), lm=True, no_think=True, device=CPU
    )
    lengths = [len(context) + len(thought) for context, thought in zip(CONTEXTS, CLOSED)] + [
        len(document.tokens) for document in DOCUMENTS
    ]
    assert layout.tokens.shape[1] == max(lengths)
    for row, length in enumerate(lengths):
        assert not layout.tokens[row, length:].any()
        assert layout.column[layout.row == row].max() < length


# --- The prefix.


@pytest.mark.parametrize(
    "document, begin, instruction, position, expected",
    [
        ([10, 11, 12], None, (), 2, [10, 11, *OPEN]),
        ([10, 11, 12], None, INSTRUCTION, 2, [*INSTRUCTION, 10, 11, *OPEN]),
        (
            [1, 11, 12],
            1,
            INSTRUCTION,
            2,
            [1, *INSTRUCTION, 11, *OPEN],
        ),  # a document begins once, and first
        ([1, 11, 12], 1, INSTRUCTION, 1, [1, *INSTRUCTION, *OPEN]),
        ([1, 11, 12], 1, (), 2, [1, 11, *OPEN]),
        (
            [10, 1, 12],
            1,
            INSTRUCTION,
            2,
            [*INSTRUCTION, 10, 1, *OPEN],
        ),  # a begin token inside is text
        ([1, 11, 12], None, INSTRUCTION, 2, [*INSTRUCTION, 1, 11, *OPEN]),
    ],
)
def test_the_instruction_stands_before_the_prefix_and_after_the_begin_token(
    document: list[int],
    begin: int | None,
    instruction: tuple[int, ...],
    position: int,
    expected: list[int],
):
    prefix = format_of(instruction=instruction, begin=begin).prefix(np.array(document), position)
    assert prefix.tolist() == expected and prefix.dtype == np.int64


def test_the_format_is_the_configs(tmp_path):
    """Both temperatures and the horizon come from the config; the ids are found by the caller."""
    path = tmp_path / "config.yaml"
    path.write_text(
        "run: {dir: x}\nmodel: {path: x}\ndata: {train: [x]}\nbudget: {steps: 1}\nthought:"
        " {temperature: 0.3}\ntarget: {temperature: 2.0, horizon: 5}\n"
    )
    made = ThoughtFormat.of(load_config(path), Markers(open=OPEN, close=CLOSE), INSTRUCTION, 1)
    assert made == ThoughtFormat(
        markers=Markers(open=OPEN, close=CLOSE),
        instruction=INSTRUCTION,
        begin=1,
        temperature=0.3,
        target_temperature=2.0,
        horizon=5,
    )


def test_the_excluded_token_is_the_first_of_the_open_marker():
    assert Markers(open=OPEN, close=CLOSE).excluded == OPEN[0]


# --- Cost.


def test_the_work_of_a_layout_by_hand():
    """Rows of 11, 11, 8 and 11 tokens for the thoughts, of 5 and 3 for the documents; a token pairs
    with itself and all before it."""
    layout = repeated_layout(
        DOCUMENTS, POSITIONS, THOUGHTS, format_of(), lm=True, no_think=True, device=CPU
    )
    assert layout.thought_work == Work(
        tokens=11 + 11 + 8 + 11, pairs=66 + 66 + 36 + 66, head_rows=11 + 4
    )
    assert layout.document_work == Work(tokens=5 + 3, pairs=15 + 6, head_rows=6 + 2 + 2)


def test_rows_that_are_not_there_cost_nothing():
    thoughts_only = repeated_layout(
        DOCUMENTS, POSITIONS, THOUGHTS, format_of(), lm=False, no_think=False, device=CPU
    )
    assert thoughts_only.document_work == Work()
    documents_only = repeated_layout(
        DOCUMENTS, POSITIONS, None, format_of(), lm=True, no_think=False, device=CPU
    )
    assert documents_only.thought_work == Work() and documents_only.document_work == Work(
        tokens=8, pairs=21, head_rows=6
    )


def test_work_adds_up():
    """And a long row does not overflow: a million tokens are half a million million pairs."""
    assert row_work(np.array([3]), 1) + row_work(np.array([5, 2]), 4) == row_work(
        np.array([3, 5, 2]), 5
    )
    assert row_work(np.array([10**6], dtype=np.int32), 0).pairs == 10**6 * (10**6 + 1) // 2


# --- What travels.


def test_thoughts_of_some_positions_are_whole_groups():
    part = THOUGHTS[1:2]
    assert part.tokens.tolist() == THOUGHTS.tokens[1:].tolist() and part.truncated.tolist() == [
        [False, True]
    ]
    assert part.mask.shape == part.behavior_logprob.shape == part.entropy.shape == (1, 2, 4)


def merging_tokenizer() -> PreTrainedTokenizerFast:
    """48 tokens: eight letters, and pairs of them that the tokenizer always merges."""
    letters = "abcdefgh"
    pairs = [first + second for first in letters for second in letters][: len(WORDS) - len(letters)]
    vocabulary = {token: index for index, token in enumerate([*letters, *pairs])}
    tokenizer = Tokenizer(
        models.BPE(vocab=vocabulary, merges=[(pair[0], pair[1]) for pair in pairs])
    )
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def test_token_ids_are_never_decoded_and_encoded_again():
    """Sampled thoughts seldom spell themselves: encoding their text gives other tokens. Rows hold
    the very ids of prefix, thought and target, which were drawn and are scored."""
    tokenizer, policy = merging_tokenizer(), tiny_policy()
    documents = random_documents([12, 9])
    positions = Positions(
        document=np.array([0, 1]),
        position=np.array([5, 4]),
        target=np.stack([documents[0].tokens[5:6], documents[1].tokens[4:5]]),
    )
    thoughts = sample_thoughts(
        policy,
        documents,
        positions,
        format_of(),
        NoiseKey(seed=0, step=1),
        group_size=2,
        max_thought_tokens=8,
        slots=4,
    ).thoughts
    layout = repeated_layout(
        documents, positions, thoughts, format_of(), lm=True, no_think=False, device=CPU
    )
    changed = 0
    for n in range(4):
        prefix = documents[n // 2].tokens[: positions.position[n // 2]].tolist()
        thought = thoughts.tokens[n // 2, n % 2][thoughts.mask[n // 2, n % 2]].tolist()
        changed += tokenizer.encode(tokenizer.decode(prefix + thought)) != prefix + thought
        row = [*INSTRUCTION, *prefix, *OPEN, *thought, *CLOSE]
        assert layout.tokens[n, : len(row)].tolist() == row
    assert changed == 4
    assert tokenizer.encode(tokenizer.decode([0, 1])) != [0, 1]


def test_each_token_of_a_continuation_is_asked_for_after_its_context():
    """At temperature 1 whatever the format's are, never as the open marker; the last one is
    predicted and not read."""
    contexts = [np.array([5, 6, 7]), np.array([8])]
    continuations = [np.array([11]), np.array([12, 13, 14])]
    layout = continuation_layout(contexts, continuations, format_of(), CPU)
    assert layout.tokens.tolist() == [[5, 6, 7], [8, 12, 13]]
    assert list(zip(layout.row.tolist(), layout.column.tolist(), layout.target.tolist())) == [
        (0, 2, 11),
        (1, 0, 12),
        (1, 1, 13),
        (1, 2, 14),
    ]
    assert layout.inverse_temperature.tolist() == [1.0] * 4
    assert layout.excluded.tolist() == [OPEN[0]] * 4
    assert layout.thought_mask.tolist() == [[True, False, False], [True, True, True]]
    assert layout.thought_work == Work(tokens=6, pairs=6 + 6, head_rows=4)
