"""The experiment on pluralism: its made population has the shares that are said, its controls the
scores that are known, and its page holds what its results hold."""

import math
import random
from dataclasses import replace

import numpy as np
import pytest

from experiments.pluralism import reading, report, training, world
from rlp.measure.pages import fill_page
from rlp.measure.results_file import read_results


@pytest.fixture(scope="module")
def made() -> world.World:
    return world.World(3)


def test_the_population_is_its_communities_by_weight(made):
    """The disallowed one has no part in it, and a view that somebody holds is reasonable."""
    for topic in world.TOPICS:
        people = sum(w * made.shares(name, topic) for name, w in world.WEIGHTS.items())
        assert made.shares(world.PEOPLE, topic) == pytest.approx(people)
        held = [tree for tree, share in zip(world.TREES, people) if share > 0]
        assert held == list(made.reasonable[topic]) and len(held) == 4
        rogue = made.shares(world.DISALLOWED, topic)
        assert rogue.sum() == pytest.approx(1)
        assert rogue[world.TREES.index(made.fifth[topic])] == world.OWN
        assert made.fifth[topic] not in held


def test_documents_are_drawn_by_the_shares(made):
    """Of one topic's answers, within four standard errors."""
    documents = [text.split() for text in made.documents(12_000)]
    assert {word for words in documents for word in words} <= {*world.VOCABULARY}
    said = [words[3] for words in documents if words[:2] == [world.PEOPLE, "q5"]]
    for tree, share in zip(world.TREES, made.shares(world.PEOPLE, "q5")):
        error = math.sqrt(share * (1 - share) / len(said))
        assert abs(said.count(tree) / len(said) - share) <= 4 * error


def test_arms_read_trained_topics_alone_and_answers_have_the_loss(made):
    words = training.make_tokenizer(world.VOCABULARY)
    held_out = set(words.convert_tokens_to_ids(list(world.HELD_OUT)))
    # A tree and the full stop of every pair; without the name the first pair has none.
    pairs = {"mode_sft": {1}, "spectrum": {training.PAIRS, training.PAIRS - 1}}
    for arm, counts in pairs.items():
        rows = training.sft_rows(made, arm)
        assert len(rows) == training.STEPS * training.ROWS
        assert not any(held_out & set(row["input_ids"]) for row in rows)
        lost = [sum(label != training.NO_LOSS for label in row["labels"]) for row in rows]
        assert {count / 2 for count in lost} == counts
    row = words.decode(training.sft_rows(made, "mode_sft")[0]["input_ids"]).split()
    assert row[3] == made.majority(row[0], row[1]) and row[2] == ":" and row[4] == "."


def test_controls_have_the_scores_that_are_known(made):
    lines = {(line["arm"], line["panel"]): line for line in reading.read_controls(made)}
    everything = lines["everything", "held_out"]
    assert (everything["overton"], everything["valid"], everything["distributional"]) == (
        1,
        0,
        None,
    )
    assert everything["precision"] == pytest.approx(4 / 6, abs=1e-6)
    majority = lines["majority", "held_out"]
    assert (majority["overton"], majority["precision"]) == (0.25, 1)
    # Against one answer JSD is ln 2 + (p ln p - (1 + p) ln(1 + p)) / 2, p the share of its holders.
    shares = [made.shares(world.PEOPLE, topic).max() for topic in world.HELD_OUT]
    known = [math.log(2) + (p * math.log(p) - (1 + p) * math.log(1 + p)) / 2 for p in shares]
    assert majority["distributional"] == pytest.approx(np.mean(known), abs=1e-6)
    wanted, named = lines["as_wanted", "held_out"], lines["as_named", "held_out"]
    assert wanted["distributional"] == wanted["moved"] == wanted["named"] == 0
    assert wanted["steerable"] == named["steerable"] == -wanted["unnamed"] < 0
    assert named["toward"] == -named["moved"] < -0.3


def test_lists_are_read_by_their_trees(made):
    topic = world.HELD_OUT[0]
    four, fifth = made.reasonable[topic], made.fifth[topic]
    found = reading.figures_of_lists(
        made, [(topic, [*four, fifth]), (topic, [four[0]]), (topic, [])]
    )
    assert found == pytest.approx(
        {"overton": (1 + 0.25 + 0) / 3, "precision": (0.8 + 1) / 2, "listed": 2}, abs=1e-6
    )


def test_examples_are_of_other_topics_and_name_nobody(made):
    prompt = reading._shots(made, "north", ["q1", "q2"], "q3", random.Random(0)).split()
    assert prompt[:2] == ["q1", ":"] and prompt[-2:] == ["q3", ":"] and "north" not in prompt


def test_the_page_says_what_the_results_say():
    results = read_results(report.RESULTS, report.LAYOUT)
    page = report.README.read_text()
    assert len(report.whole_seeds(results)) >= 8
    assert fill_page(page, report.make_parts(results)) == page


def test_a_result_that_changes_changes_the_page():
    """The check above can fail."""
    results = read_results(report.RESULTS, report.LAYOUT)
    changed = [line | {"overton": 0.0 if line["arm"] == "base" else 1.0} for line in results.lines]
    parts = report.make_parts(replace(results, lines=tuple(changed)))
    page = report.README.read_text()
    assert fill_page(page, parts) != page
