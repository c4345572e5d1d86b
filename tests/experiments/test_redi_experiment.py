"""The experiment on wrong traces: its page holds what its results hold, and its world is what it
says."""

import json

import pytest

from rlp.measure.results_file import read_results
from tests import REPOSITORY
from tests.experiments.scripts import script

analyze = script("redi", "analyze.py")
world = script("redi", "world.py")
RESULTS = REPOSITORY / "experiments" / "redi" / "results.jsonl"


def test_a_trace_is_running_sums_and_its_answer_the_last():
    """3, 3 + 9 = 12, 12 + 4 = 0 modulo 16, 0 + 15, 15 + 8 = 7."""
    numbers = [3, 9, 4, 15, 8]
    assert world.trace_of(numbers) == "3 12 0 15 7 </think> 7 ."
    assert world.is_right(numbers, "1 1 </think> 7 .")
    assert not world.is_right(numbers, "3 12 0 15 7 </think>")
    assert not world.is_right(numbers, "3 12 0 15 7 7 .")


@pytest.mark.parametrize(
    "trace, character, sound",
    [
        ("3 12 0 15 7 </think> 7 .", None, []),
        # 1 is wrong, 1 + 15 = 0 goes on soundly from it, and so does all that follows.
        ("3 12 1 0 8 </think> 8 .", 5, [3, 4, 5, 6, 7]),
        ("3 12 1 15 7 </think> 8 .", 5, [4, 5, 7]),  # 15 is not 1 + 15; 7 is 15 + 8; 8 is not 7
        ("3 12", None, []),  # it only ends early
        ("</think> 7", 0, []),
    ],
)
def test_where_a_trace_slips_and_what_is_sound_behind_it(trace, character, sound):
    numbers = [3, 9, 4, 15, 8]
    assert world.first_wrong(numbers, trace) == character
    assert world.sound_after_slip(numbers, trace) == sound


def test_questions_of_the_blocks_are_disjoint():
    blocks = world.questions_of(0)
    questions = [tuple(numbers) for block in blocks.values() for numbers in block]
    assert len(set(questions)) == len(questions)
    assert {name: len(block) for name, block in blocks.items()} == {
        "given": world.GIVEN,
        "pool": world.POOL,
        "held_out": world.HELD_OUT,
        "fresh": world.FRESH,
    }


def test_pairs_say_where_the_rejected_goes_wrong(tmp_path):
    rows = [
        {"prompt": "3 9 4 15 8 = <think>", "chosen": "c", "rejected": rejected, "reasons": []}
        for rejected in ("3 12 1 0 8 </think> 8 .", "3 12")
    ]
    world.write_rows(tmp_path / "pairs.jsonl", rows)
    (pair,) = world._with_slips(tmp_path / "pairs.jsonl")
    assert pair["first_wrong"] == 5 and json.dumps(pair)


def test_the_page_says_what_the_results_say():
    results = read_results(RESULTS, analyze.LAYOUT)
    page = analyze.README.read_text()
    assert analyze.filled(page, results) == page and len(analyze.complete(results)) >= 5
