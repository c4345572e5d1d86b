"""Pluralism: controls whose scores are arithmetic, and what is refused."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from rlp.cli import main
from rlp.config import ConfigError
from rlp.post import pluralism_measures as measures
from rlp.post.diversity_drawing import Drawing
from rlp.post.diversity_samples import Prompt, Sample
from rlp.post.evaluations import CHECKS, Reading, read_pluralism
from rlp.post.pluralism import measure, pluralism_of
from rlp.post.pluralism_population import read_population

LINE = {
    "prompt": "Which fruit?",
    "options": {"apple": "apple*", "pear": ["pear*", "quince"], "plum": "plum*", "fig": "fig*"},
    "population": {"apple": 0.5, "pear": 0.25, "plum": 0.25},
    "communities": {
        "north": {"apple": 1.0},
        "south": {"pear": 0.5, "plum": 0.5},
        "rogue": {"fig": 1.0},
    },
    "disallowed": ["rogue"],
}
OTHER = LINE | {"prompt": "Which snack?"}

EVERYONE = ["apple", "apple", "pear", "plum"]
"""Answers as they come in the population."""


def kl(p, q) -> float:
    return sum(a * math.log(a / b) for a, b in zip(p, q) if a > 0)


def jsd(p, q) -> float:
    """By its definition."""
    m = [(a + b) / 2 for a, b in zip(p, q)]
    return (kl(p, m) + kl(q, m)) / 2


POPULATION = (0.5, 0.25, 0.25, 0)


def questions_of(folder: Path, *lines: dict):
    path = folder / "population.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return read_population(path)


def figures(folder: Path, answers: dict[str | None, list[str]], **options) -> dict:
    """Of one model, which answers both questions alike; by community, None without a name."""
    questions = questions_of(folder, LINE, OTHER)
    samples = [
        Sample("m", Prompt(question.asked(name), "open"), text)
        for question in questions
        for name, texts in answers.items()
        for text in texts
    ]
    return measure(samples, questions, **options)["models"]["m"]


# The distance


def test_jensen_shannon_by_hand():
    assert measures.distance([1, 0], [0, 1]) == pytest.approx(math.log(2))
    assert measures.distance([1, 0], [0, 1], "jensen_shannon_distance") == pytest.approx(
        math.sqrt(math.log(2))
    )
    assert measures.distance([2, 1, 1, 0], POPULATION) == 0  # counts are divided by their sum
    found = measures.distance([[1, 0, 0, 0], [0, 0, 0, 0]], POPULATION)
    assert found[0] == pytest.approx(jsd((1, 0, 0, 0), POPULATION)) and np.isnan(found[1])


def test_chance_alone_puts_one_draw_at_a_known_distance():
    """Of one draw of two even options: always JSD((1, 0), (1/2, 1/2)). Many draws go to 0."""
    even = np.array([0.5, 0.5])
    assert measures.floor_of(even, 1) == pytest.approx(jsd((1, 0), even))
    # To first order JSD is chi^2 / 8 a draw, and chi^2 has a mean of O - 1 = 1.
    assert measures.floor_of(even, 1000) == pytest.approx(1 / 8000, rel=0.3)
    assert math.isnan(measures.floor_of(even, 0))
    # Of two sets the difference has twice the variance of one.
    between = measures.floor_between(np.array([500, 500]), np.array([500, 500]))
    assert between == pytest.approx(2 / 8000, rel=0.3)
    assert math.isnan(measures.floor_between(np.array([1, 0]), np.array([0, 0])))


# Controls


def test_who_lists_everything_holds_all_views_at_a_price(tmp_path):
    """Three of four options are reasonable; the list is long, and no answer to a choice."""
    found = figures(tmp_path, {None: ["Apples, pears, plums or figs."] * 3})
    assert (found["overton"], found["overton_weighted"], found["precision"]) == (1, 1, 0.75)
    assert (found["words"], found["valid"], found["distributional"]) == (5, 0, None)


def test_one_view_is_a_third_of_them_and_weighs_what_its_holders_do(tmp_path):
    found = figures(tmp_path, {None: ["An apple"]})
    assert found["overton"] == pytest.approx(1 / 3)
    assert (found["overton_weighted"], found["precision"], found["words"]) == (0.5, 1, 2)


@pytest.mark.parametrize(
    ("answers", "shares"),
    [
        (EVERYONE, POPULATION),
        (["apple"], (1, 0, 0, 0)),
        (["apple", "pear", "plum", "fig"], (0.25, 0.25, 0.25, 0.25)),
    ],
    ids=["population", "majority", "uniform"],
)
@pytest.mark.parametrize("by", measures.DISTANCES)
def test_the_distance_to_the_population_in_closed_form(tmp_path, answers, shares, by):
    found = figures(tmp_path, {None: answers}, by=by)
    expected = jsd(shares, POPULATION)
    if by == "jensen_shannon_distance":
        expected = math.sqrt(expected)
    assert found["distributional"] == pytest.approx(expected, abs=1e-9) and found["valid"] == 1
    # Both questions are answered alike, so resampling them changes nothing.
    assert found["intervals"]["distributional"] == pytest.approx([expected] * 2, abs=1e-9)
    # Two options of each of the two questions are in no answer of the majority.
    assert found["without_mass"] == (4 if answers == ["apple"] else 0)


def test_what_is_no_option_has_no_part_in_the_distribution(tmp_path):
    """Nothing, two options at once: the mass on options says so."""
    found = figures(tmp_path, {None: [*EVERYONE, "No idea", "pineapple", "apple or pear", ""]})
    assert (found["distributional"], found["valid"]) == (0, 0.5)
    counts = {"apple": 2, "pear": 1, "plum": 1, "fig": 0}
    assert [one["counts"] for one in found["by_question"]] == [counts] * 2


def test_who_answers_by_the_community_named_is_steered(tmp_path):
    """All the way: with the name nothing is left of the distance without it."""
    answers = {None: EVERYONE, "north": ["apple"], "south": ["pear", "plum"], "rogue": EVERYONE}
    found = figures(tmp_path, answers)
    north, south = jsd((1, 0, 0, 0), POPULATION), jsd((0, 0.5, 0.5, 0), POPULATION)
    assert found["communities"]["north"]["steerable"] == pytest.approx(-north)
    assert found["communities"]["south"]["steerable"] == pytest.approx(-south)
    assert found["steerable"] == pytest.approx(-(north + south) / 2)
    assert (found["named"], found["moved"], found["toward"]) == (0, 0, 0)


def test_a_name_that_changes_nothing_steers_nothing(tmp_path):
    found = figures(tmp_path, dict.fromkeys((None, "north", "south", "rogue"), EVERYONE))
    assert (found["steerable"], found["moved"], found["toward"]) == (0, 0, 0)
    assert found["named"] == found["unnamed"] > 0


def test_a_name_that_leads_away_counts_against_steering(tmp_path):
    """Named north it answers as the south does, which shares no option with it."""
    found = figures(tmp_path, {None: EVERYONE, "north": ["pear", "plum"]})
    expected = math.log(2) - jsd((1, 0, 0, 0), POPULATION)
    assert found["communities"]["north"]["steerable"] == pytest.approx(expected)


def test_with_and_without_the_name_are_of_the_same_questions(tmp_path):
    """Named north one question has no valid answer: what it has without the name counts in
    neither, so that the two means differ by `steerable`."""
    questions = questions_of(tmp_path, LINE, OTHER)
    told = {(0, None): "apple", (0, "north"): "apple", (1, None): "plum", (1, "north"): "No."}
    samples = [
        Sample("m", Prompt(questions[q].asked(name), "open"), text)
        for (q, name), text in told.items()
    ]
    found = measure(samples, questions)["models"]["m"]
    assert (found["named"], found["unnamed"], found["steerable"]) == (0, 0, 0)
    assert found["valid_named"] == 0.5


def test_who_moves_for_the_disallowed_name_is_not_bounded(tmp_path):
    """From the population to the fig, which shares nothing with it; chance puts 8 and 8 answers
    less far apart."""
    answers = {None: EVERYONE * 2, "north": EVERYONE, "south": EVERYONE, "rogue": ["A fig!"] * 8}
    found = figures(tmp_path, answers)
    assert found["moved"] == pytest.approx(math.log(2))
    assert found["toward"] == pytest.approx(-math.log(2))
    assert 0 < found["moved_floor"] < 0.2 and found["steerable"] == 0


def test_a_disallowed_community_is_in_no_figure_of_steering(tmp_path):
    found = figures(tmp_path, {None: EVERYONE, "rogue": ["fig"]})
    assert found["steerable"] is None and found["moved"] == pytest.approx(math.log(2))
    assert "moved" in found["communities"]["rogue"] and "named" not in found["communities"]["rogue"]


# Views


def test_patterns_are_whole_words_in_any_case():
    assert measures.stands_in("TAXES rise.", ["tax*"]) and measures.stands_in(
        "two  words", ["Two words"]
    )
    assert not measures.stands_in("taxes", ["tax"]) and not measures.stands_in(
        "pineapple", ["apple*"]
    )
    assert not measures.stands_in("aXb", ["a.b"])


def test_views_can_be_told_by_a_function_of_ones_own(tmp_path):
    """What it names beside the options is no reasonable view."""

    def views(prompt: str, text: str) -> list[str]:
        assert prompt in ("Which fruit?", "Which snack?")
        return ["apple", "an aside", "apple"] if "round" in text else ["pear"]

    found = figures(tmp_path, {None: ["something round", "no"]}, views=views)
    assert found["precision"] == 0.75 and found["valid"] == 0.5
    assert found["overton"] == pytest.approx(1 / 3)


@pytest.mark.parametrize("wrong", ["apple", None])
def test_a_function_of_views_that_gives_no_names_is_refused(tmp_path, wrong):
    """The letters of one text would be views that nobody has."""
    with pytest.raises(ConfigError, match="expected the names of what it holds"):
        figures(tmp_path, {None: ["apple"]}, views=lambda prompt, text: wrong)


def test_reasonable_views_can_be_named(tmp_path):
    """One that nobody holds weighs nothing, and counts as a view."""
    questions = questions_of(tmp_path, LINE | {"reasonable": ["apple", "fig"]})
    sample = Sample("m", Prompt("Which fruit?", "open"), "A fig or a pear")
    found = measure([sample], questions)["models"]["m"]
    assert (found["overton"], found["overton_weighted"], found["precision"]) == (0.5, 0, 0.5)


# What is refused


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"population": {"aple": 1.0}}, "unknown option 'aple'. Did you mean 'apple'?"),
        ({"population": {"apple": 0.5}}, "the shares sum to 0.5, expected 1"),
        ({"population": {"apple": 0.0}}, "the shares sum to 0, expected 1"),
        ({"population": {"apple": True}}, "the share of 'apple' is True"),
        ({"population": {"apple": math.nan}}, "the share of 'apple' is nan"),
        ({"population": None}, '"population" is None'),
        ({"communities": {"north": {}}}, "the community 'north' is {}, expected the shares"),
        ({"communities": {"north": {"fig": 0.9}}}, "'north': the shares sum to 0.9"),
        ({"disallowed": ["east"]}, "the disallowed community 'east' has no shares"),
        ({"options": ["apple"]}, '"options" is'),
        ({"options": {"apple": [], "pear": "x"}}, "the option 'apple' has the patterns []"),
        ({"reasonable": []}, '"reasonable" is empty'),
        ({"reasonable": ["kiwi"]}, "unknown option 'kiwi'"),
        ({"naming": "As {community}."}, '"naming" is'),
        ({"comunities": {}}, "unknown 'comunities'. Did you mean 'communities'?"),
        ({"samples": 0}, '"samples" is 0'),
    ],
    ids=lambda value: value if isinstance(value, str) else ",".join(value),
)
def test_a_wrong_line_is_refused_in_one_sentence(tmp_path, capsys, change, message):
    path = tmp_path / "population.jsonl"
    path.write_text(json.dumps(LINE) + "\n" + json.dumps(OTHER | change) + "\n")
    assert main(["pluralism", "--population", str(path)]) != 0
    error = capsys.readouterr().err.strip()
    assert message in error and "line 2" in error and "\n" not in error


def write_samples(path: Path, *rows: tuple[str, str]) -> Path:
    lines = [{"model": "m", "prompt": q, "kind": "open", "text": text} for q, text in rows]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_files_that_do_not_fit_are_refused(tmp_path, capsys):
    """Without a line, a population or an option of its own."""
    population, samples = tmp_path / "population.jsonl", tmp_path / "samples.jsonl"
    command = ["pluralism", "--population", str(population), "--samples", str(samples)]

    def refusal() -> str:
        assert main(command) != 0
        error = capsys.readouterr().err.strip()
        assert "\n" not in error and "Traceback" not in error
        return error

    assert "no file at" in refusal()
    population.write_text("")
    assert "is empty: it has no question" in refusal()
    population.write_text(json.dumps({k: v for k, v in LINE.items() if k != "population"}) + "\n")
    assert 'has no "population"' in refusal()
    population.write_text(json.dumps(LINE) + "\n")
    samples.write_text("")
    assert "is empty: it has no sample" in refusal()
    write_samples(samples, ("Which colour?", "red"))
    assert "no question of the population asks 'Which colour?'" in refusal()
    population.write_text((json.dumps(LINE) + "\n") * 2)
    assert "line 2 asks 'Which fruit?'" in refusal()


# The command


def test_the_command_names_its_distance_in_the_header_and_the_json(tmp_path, capsys):
    population, out = tmp_path / "population.jsonl", tmp_path / "out.json"
    population.write_text(json.dumps(LINE) + "\n")
    rows = [("Which fruit?", text) for text in EVERYONE]
    rows.append(("Answer as north would. Which fruit?", "apple"))
    samples = write_samples(tmp_path / "samples.jsonl", *rows)
    command = ["pluralism", "--population", str(population), "--samples", str(samples)]

    assert main([*command, "--json", str(out)]) == 0
    told, found = capsys.readouterr().out, json.loads(out.read_text())
    assert "Jensen-Shannon divergence, nats" in told and "north" in told
    assert found["measure"] == "jensen_shannon_divergence_nats"
    figures = found["models"]["m"]
    assert figures["distributional"] == 0
    assert figures["steerable"] == pytest.approx(-jsd((1, 0, 0, 0), POPULATION))
    assert any(
        "2 of 3 questions with a community's name have no answer" in n for n in found["notes"]
    )

    out.unlink()
    assert main([*command, "--by", "distance", "--json", str(out)]) == 0
    assert "Jensen-Shannon distance" in capsys.readouterr().out
    assert json.loads(out.read_text())["measure"] == "jensen_shannon_distance"


def test_answers_of_a_checkpoint_are_drawn_with_each_name_and_without(tmp_path, model_folder):
    line = {
        "prompt": "w1 w2",
        "options": [f"w{n}" for n in range(64)],
        "population": {"w1": 0.5, "w2": 0.5},
        "communities": {"w3": {"w1": 1.0}, "w4": {"w2": 1.0}},
        "disallowed": ["w4"],
        "naming": "{community} {prompt}",
        "tokens": 1,
    }
    questions, path = questions_of(tmp_path, line), tmp_path / "samples.jsonl"
    drawing = Drawing(open_samples=4, top_p=1.0, frame="{prompt}", rows=4)
    found = pluralism_of(str(model_folder), questions, samples=path, drawing=drawing, name="m")
    asked = [json.loads(line)["prompt"] for line in path.read_text().splitlines()]
    assert {prompt: asked.count(prompt) for prompt in asked} == dict.fromkeys(
        ("w1 w2", "w3 w1 w2", "w4 w1 w2"), 4
    )
    assert found["models"]["m"]["answers"] == 4
    again = pluralism_of(str(model_folder), questions, samples=path, drawing=drawing, name="m")
    assert again == found and len(path.read_text().splitlines()) == 12

    # As an evaluation of a pipeline: from the whole distribution too.
    settings = {"population": str(tmp_path / "population.jsonl"), "open_samples": 2}
    reading = Reading(
        model=model_folder,
        seed=0,
        temperature=1.0,
        start=str(model_folder),
        is_last=True,
        settings=settings,
        folder=tmp_path,
        ranks=None,
    )
    told = read_pluralism(reading)
    drawn = [json.loads(line) for line in (tmp_path / "pluralism.jsonl").read_text().splitlines()]
    assert len(drawn) == 3 * 2 and {line["top_p"] for line in drawn} == {1.0}
    assert 0 <= told["pluralism_overton"] <= 1
    for wrong, said in (({}, "there is no population"), (settings | {"topp": 1}, "key topp")):
        with pytest.raises(ConfigError, match=said):
            CHECKS["pluralism"](wrong)
