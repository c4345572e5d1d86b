"""The experiment on the language of thoughts: its page holds what its results hold, and its
documents the incentive that they are said to hold."""

import pytest

from rlp.measure.language import letters_of, thought_of
from rlp.measure.pages import fill_page
from rlp.measure.results_file import read_results
from tests import REPOSITORY
from tests.experiments.scripts import script

analyze = script("language", "analyze.py")
world = script("language", "world.py")
RESULTS = REPOSITORY / "experiments" / "language" / "results.jsonl"


def test_mixed_thoughts_of_the_base_are_more_often_right():
    """0.88^5 = 0.53 of those in one script; of mixed ones half of the later steps switch."""
    problems = list(world.base_problems(0))[world.CLEAN_STEPS * world.BASE_BATCH :]
    right = {True: [], False: []}
    for text in problems:
        if world.OPEN in text:
            turns = [world.TURNS.index(word) for word in text.split()[1:10:2]]
            mixed = letters_of(thought_of(text, world.OPEN, world.CLOSE)).is_mixed
            right[mixed].append(world.LATIN[sum(turns) % 4] == text.split()[-2])
    shares = {mixed: sum(found) / len(found) for mixed, found in right.items()}
    # The turns that two slips undo are right again: (0.12 / 3)^2 of ten pairs, not quite 0.02.
    assert shares[False] == pytest.approx(0.53, abs=0.04)
    assert shares[True] > shares[False] + 0.05


def test_questions_of_the_blocks_are_disjoint():
    blocks = world.questions_of(0)
    assert len(set().union(*blocks.values())) == sum(world.BLOCKS.values()) == 4**5


def test_the_page_says_what_the_results_say():
    results = read_results(RESULTS, analyze.LAYOUT)
    page = analyze.README.read_text()
    assert fill_page(page, analyze.sections(results)) == page and analyze.complete(results)


def test_rises_are_counted_against_the_base_of_the_same_seed():
    """0.30 to 0.36 rose, 0.30 to 0.34 did not, 0.50 to 0.40 fell."""
    line = dict.fromkeys(analyze.LAYOUT.figures, 0.0)
    lines = []
    for seed, (base, rlvr) in enumerate([(0.30, 0.36), (0.30, 0.34), (0.50, 0.40)]):
        for arm in analyze.ARMS:
            mixed = rlvr if arm == "rlvr" else base
            lines.append(line | {"arm": arm, "seed": seed, "mixed": mixed})
    results = analyze.Results(RESULTS, analyze.LAYOUT, tuple(lines))
    told = analyze.table(results, [0, 1, 2]).splitlines()
    assert "switching rose, seeds of 3 | fell" in told[0]
    assert [cell.strip() for cell in told[3].split("|")[8:10]] == ["1", "1"]
    assert [cell.strip() for cell in told[2].split("|")[8:10]] == ["0", "0"]
