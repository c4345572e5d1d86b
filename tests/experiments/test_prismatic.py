"""The experiment on the diversity of gradients: its page holds what its results hold, and its sets
differ in what they are said to differ in."""

from collections import Counter

import pytest

from tests.experiments.scripts import script

analyze = script("prismatic", "analyze.py")
sets = script("prismatic", "sets.py")
world = script("prismatic", "world.py")
loop = script("prismatic", "loop.py")
pretraining = script("prismatic", "pretraining.py")


def test_the_page_says_what_the_results_say():
    page = analyze.README.read_text()
    assert analyze.fill_page(page, analyze.parts()) == page


@pytest.mark.parametrize("name", ["skills_1_fillers_8", "skills_12_fillers_128"])
def test_sets_differ_in_skills_and_fillers_and_in_nothing_else(name):
    here = world.World(0)
    problems = sets.make_set(here, name, 0)
    skills, fillers = int(name.split("_")[1]), int(name.split("_")[3])
    assert len(problems) == sets.DOCUMENTS
    assert {len(one.words) for one in problems} == {6}
    assert len({one.skill for one in problems}) == skills
    # 192 draws of 16 names miss one with a chance of 16 (15/16)^192 = 7e-5.
    assert len({one.words[1] for one in problems}) == 16
    assert len({word for one in problems for word in (*one.words[:1], *one.words[3:5])}) <= fillers
    assert all(one.answer == here.right(one.words) for one in problems)


def test_the_old_edition_has_half_of_every_skill_and_known_sets_nine_tenths():
    here = world.World(1)
    for table, old in zip(here.tables, here.old):
        assert sum(a == b for a, b in zip(table, old)) == world.SYMBOLS // 2
        assert sorted(old) == list(range(world.SYMBOLS))
    for name, share in (("skills_8_fillers_32", 0.5), ("known_skills_8_fillers_32", 0.9)):
        problems = sets.make_set(here, name, 0)
        known = sum(sets.is_known(here, one) for one in problems) / len(problems)
        assert known == pytest.approx(share, abs=0.12)  # three standard deviations of 192 draws


def test_held_out_problems_are_every_entry_of_every_skill():
    counts = Counter((one.skill, one.symbol) for one in world.World(0).held_out(0))
    assert len(counts) == world.SKILLS * world.SYMBOLS and set(counts.values()) == {4}


def test_the_stand_in_proposes_and_solves_as_it_is_said_to():
    stand, pool = loop.begin(world.World(0), 0)
    assert len(pool) == loop.START
    said = stand.propose(pool, 2000)
    copies = sum(prompt in {one.prompt for one in pool} for prompt in said) / len(said)
    assert copies == pytest.approx(loop.COPIES, abs=0.03)
    prompt = pool[0].prompt
    right = stand.solve(prompt, 2000).count(stand.world.right(prompt.split())) / 2000
    assert right == pytest.approx(stand.right[stand.skill(prompt)], abs=0.04)


def test_most_of_the_pool_of_pretraining_is_lopsided():
    questions = pretraining.pool_of(0)
    share = sum(map(pretraining.is_straight, questions)) / len(questions)
    assert share == pytest.approx(pretraining.LOPSIDED, abs=0.05)
    assert len(questions) == pretraining.POOL > 2 * len(set(questions))


def test_ranks_that_are_equal_are_shared():
    assert analyze.spearman([1, 2, 3], [10, 30, 20]) == pytest.approx(0.5)
    # Ranks 1.5, 1.5, 3 against 1, 2, 3: 1.5 / sqrt(1.5 * 2).
    assert analyze.spearman([1, 1, 2], [1, 2, 3]) == pytest.approx(1.5 / 3**0.5)
