"""The comparison of arms: its pages hold what its results.jsonl holds, and what is run is a
pipeline of all its arms."""

import json

import numpy as np
import pytest

from rlp.measure.pages import fill_page
from rlp.post.pipeline_config import load_pipeline
from rlp.post.pipeline_tasks import Task, every_task
from tests import REPOSITORY
from tests.experiments.scripts import script

analyze = script("flop_matched", "analyze.py")
run = script("flop_matched", "run.py")
stages = script("flop_matched", "stages.py")
KINDS = run.make_world.__globals__["KINDS"]
FOLDER = REPOSITORY / "experiments" / "flop_matched"


@pytest.fixture(scope="module")
def results():
    return analyze.read_results(FOLDER / "results.jsonl", analyze.LAYOUT)


def test_no_arm_of_the_claim_lacks_a_seed(results):
    """No run that went badly is left out: nine seeds of the reference and its family."""
    seeds = results.where(arm="rlp", stage="pretrain").values("seed")
    assert len(seeds) == 9
    for temperature in analyze.TEMPERATURES:
        part = analyze.ends(results, "pretrain", temperature)
        part.require(["rlp", *analyze.FAMILY], seeds)


@pytest.mark.parametrize("page", analyze.PAGES, ids=lambda path: path.parent.name)
def test_a_page_says_what_the_results_say(results, page):
    """Made again, its tables and claims are the same to the letter."""
    assert analyze.filled(page, analyze.sections(results)) == page.read_text()


def test_a_claim_turns_with_the_results(results):
    """Where an arm has RLP's numbers the sentence does not say that RLP is above it."""
    final = analyze.ends(results, "pretrain", 1.0)
    by_seed = final.by_seed("rlp", "accuracy_with_thought")
    equal = [
        line | {"accuracy_with_thought": by_seed[line["seed"]]} if line["arm"] == "base" else line
        for line in final.lines
    ]
    changed = analyze.replace(final, lines=tuple(equal))
    assert "not told apart from base" in analyze.claims(changed).splitlines()[0]


def test_matched_arms_spend_the_same(results):
    """To 1 %, seed by seed, in what they are matched by."""
    final = analyze.ends(results, "pretrain", 1.0)
    for arm, made in analyze.ARMS.items():
        if made.kind is None or not final.has(arm=arm):
            continue
        own, reference = final.by_seed(arm, made.by), final.by_seed("rlp", made.by)
        assert all(abs(own[seed] / reference[seed] - 1) <= 0.01 for seed in own), arm


def test_the_settings_of_every_arm_were_chosen_by_one_rule():
    """The best of what was tried, on a seed that no result has."""
    told, tune = (
        json.loads((FOLDER / "settings.json").read_text()),
        script("flop_matched", "tune.py"),
    )
    assert set(told["chosen"]) == set(tune.tuned_arms()) and told["seed"] not in range(20)
    for arm, settings in told["chosen"].items():
        tried = [one for one in told["tried"] if one["arm"] == arm]
        assert [one["settings"] for one in tried] == tune.grid(arm)
        assert tune.best(tried)["settings"] == settings


ALL = ("pretrain", "sft", "rlvr")


@pytest.fixture
def comparison(tmp_path, monkeypatch):
    """Makes the pipeline of some arms on two seeds, as run.py does."""
    monkeypatch.setattr(stages, "write_rows", lambda *arguments: None)

    def made(arms, until=ALL):
        mapping = stages.comparison(tmp_path, list(arms), [0, 4], until)
        return load_pipeline(stages.write_pipeline(mapping, tmp_path / "pipeline.yaml"))

    return made


def test_the_comparison_is_a_pipeline_of_all_arms(comparison):
    """Every arm that is trained has its stage, and those that are post-trained the same two behind
    it; a control waits for RLP's run of its seed."""
    pipeline = comparison(analyze.ARMS)
    tasks = every_task(pipeline)
    trained = [arm for arm, made in analyze.ARMS.items() if made.is_trained]
    assert [
        task.stage
        for task in tasks
        if task.seed == 4 and len(task.chain) == 1 and (task.stage != "sft")
    ] == trained
    for arm in stages.POST_TRAINED:
        own = [arm] if analyze.ARMS[arm].is_trained else []
        assert pipeline.arms[arm] == [*own, "sft", "grpo"]
    for task in tasks:
        if len(task.chain) == 1 and task.stage not in ("rlp", "sft"):
            assert task.needs(pipeline) == [Task(task.seed, ("rlp",))]
    assert comparison(["rlp", "base"], ("pretrain",)).arms == {"rlp": ["rlp"]}


def test_every_arm_is_run_with_what_was_chosen_for_it(comparison):
    pipeline = comparison(analyze.ARMS)
    for arm, made in analyze.ARMS.items():
        if not made.is_trained:
            continue
        stage = pipeline.stages[arm]
        for key, value in stages.settings_of(arm).items():
            given = stage.overrides if "." in key else [f"{key}={getattr(stage, key)}"]
            assert f"{key}={value}" in given, arm
        assert stage.overrides[len(stage.overrides) - len(made.overrides) :] == (
            [*made.overrides] if arm != "rlp" else []
        )


def test_tries_of_an_arm_are_arms_of_one_pipeline(tmp_path, monkeypatch):
    """On the seed apart, each beside the RLP run whose cost it spends."""
    monkeypatch.setattr(stages, "write_rows", lambda *arguments: None)
    tune = script("flop_matched", "tune.py")
    left = [(arm, settings) for arm in tune.tuned_arms() for settings in tune.grid(arm)]
    path = stages.write_pipeline(tune.tries(tmp_path, left), tmp_path / "tuning.yaml")
    tasks = every_task(load_pipeline(path))
    assert {task.seed for task in tasks} == {100} and len(tasks) == 2 + len(left)


def test_lines_that_are_there_stay_and_are_not_doubled(tmp_path):
    """Such as another machine's."""
    path = tmp_path / "results.jsonl"
    identity = {"arm": "rlp", "seed": 0, "stage": "pretrain"}
    lines = [
        {**identity, "stage_step": step, "temperature": T, **dict.fromkeys(run.LAYOUT.figures, 0.5)}
        for step in (40, 80)
        for T in analyze.TEMPERATURES
    ]
    assert run.gather(path, iter(lines[:2])) == 2
    before = path.read_bytes()
    assert run.gather(path, iter([line | {"n": 1} for line in lines])) == 2
    assert path.read_bytes().startswith(before)
    results = analyze.read_results(path, run.LAYOUT)
    assert run.bases_left(results, ["rlp", "base"], [0, 4]) == [("base", 0), ("base", 4)]


def test_the_most_confident_thought_and_the_vote():
    """Two positions, three thoughts, three words: at the first the confident one is right and the
    vote wrong, at the second the other way round."""
    selecting = script("flop_matched", "selecting.py")
    p = np.array(
        [
            [[0.9, 0.05, 0.05], [0.2, 0.6, 0.2], [0.1, 0.5, 0.4]],
            [[0.1, 0.8, 0.1], [0.5, 0.3, 0.2], [0.4, 0.3, 0.3]],
        ]
    )
    found = selecting.select(np.log(p), np.array([0, 0]))
    assert found.kept.tolist() == [0, 0]
    assert found.kept_right.tolist() == [True, False]
    assert found.vote_right.tolist() == [False, True]
    assert found.kept_logprob == pytest.approx(np.log([0.9, 0.1]))
    assert found.mixture_logprob == pytest.approx(np.log([1.2 / 3, 1.0 / 3]))


def test_the_page_on_the_world_has_the_table_of_shares():
    share = script("world", "share.py")
    table = share.table(share.read_results(share.RESULTS, share.LAYOUT))
    page = share.PAGE.read_text()
    assert fill_page(page, {"shares": table}) == page
