"""What RLVR rewards."""

import pytest

from rlp.config import ConfigError
from rlp.post.pipeline_config import RlvrStage
from rlp.post.stages.interface import StageError
from rlp.post.stages.rlvr import checked, exact_match, open_reward, spelled

NEEDS = {"kind": "rlvr", "data": ["rows.jsonl"], "steps": 1, "learning_rate": 1e-3}

SAID = [
    "one two </think> north . south",
    "one two </think> south .",
    "one two north",
    "</think>north",
    "one </think>",
]


def test_exact_match_reads_the_first_word_behind_the_close_marker():
    """No marker, no answer, or another answer: 0."""
    reward = open_reward(RlvrStage(**NEEDS))
    assert reward(completions=SAID, answer=["north"] * 5) == [1.0, 0.0, 0.0, 1.0, 0.0]


def test_exact_match_of_another_field_place_and_pattern():
    """A number, as a row may hold it, behind the last `####` or in all of the completion."""
    given = {"completions": ["so 3 + 4 #### 7", "7"], "result": [7, 7]}
    assert exact_match(field="result", after="####", pattern=r"\s*(\d+)", **given) == [1.0, 0.0]
    assert exact_match(field="result", after="", pattern=r".*?(\d+)$", **given) == [1.0, 1.0]


def test_a_completion_is_spelled_with_its_markers_and_without_its_end(model_folder, tokenizer):
    ids = tokenizer("one <think> two </think> three").input_ids
    padded = [*ids, tokenizer.eos_token_id]
    assert spelled(tokenizer, padded) == spelled(tokenizer, ids)
    assert "</think>" in spelled(tokenizer, padded)


def test_a_reward_that_gives_something_else_is_told():
    with pytest.raises(StageError, match="gave 1 of them; expected a list of 2 numbers"):
        checked([1.0], 2, "mine:reward")


def test_a_pattern_without_a_group_is_refused():
    with pytest.raises(ConfigError, match="pattern must hold a group"):
        RlvrStage(**NEEDS, pattern="north")
