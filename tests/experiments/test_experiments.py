"""The comparison of arms: its pages hold what its results.jsonl holds, and a run of it can be
stopped, continued and taken from another machine."""

import json
from concurrent.futures import Future
from dataclasses import replace

import numpy as np
import pytest

from tests import REPOSITORY
from tests.experiments.scripts import script

analyze = script("flop_matched", "analyze.py")
run = script("flop_matched", "run.py")
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


def performed(tasks: list, workers: int, fails: set = frozenset(), done: set = frozenset()) -> list:
    """The order in which tasks are begun, when the oldest that runs is always the first to end."""
    begun = []

    def begin(task) -> Future:
        begun.append(task)
        future: Future = Future()
        if task in fails:
            future.set_exception(RuntimeError("broken"))
        else:
            future.set_result([])
        return future

    list(run.run_tasks(tasks, set(done), workers, begin))
    return begun


def test_what_a_stage_needs_is_done_before_it():
    """Arms wait for RLP's run of their seed, and post-training for its own arm's."""
    tasks = run.every_task(["rlp", "base", "cpt"], [0, 1], ["pretrain", "sft", "rlvr"])
    begun = performed(tasks, workers=2)
    assert sorted(begun) == sorted(tasks) and len(tasks) == 18
    for place, task in enumerate(begun):
        assert run.needs(task) is None or run.needs(task) in begun[:place]


def test_a_failed_stage_stops_only_what_needs_it():
    tasks = run.every_task(["rlp", "base", "cpt"], [0, 1], ["pretrain", "sft", "rlvr"])
    begun = performed(tasks, 2, fails={run.Task("rlp", 0, "pretrain")})
    left_out = set(tasks) - set(begun)
    assert {(task.arm, task.seed) for task in left_out} == {("rlp", 0), ("cpt", 0)}


def test_what_is_there_is_not_done_again():
    tasks = run.every_task(["rlp", "cpt"], [0], ["pretrain"])
    begun = performed(tasks, 1, done={run.Task("rlp", 0, "pretrain")})
    assert begun == [run.Task("cpt", 0, "pretrain")]


def lines_of(task, steps: tuple[int, ...]) -> list[dict]:
    """Lines of a stage, at both temperatures."""
    figures = dict.fromkeys(run.LAYOUT.figures, 0.5)
    return [
        {**task._asdict(), "stage_step": step, "temperature": T, **figures}
        for step in steps
        for T in analyze.TEMPERATURES
    ]


def test_another_machines_lines_stay_and_its_missing_folders_are_told(
    tmp_path, monkeypatch, capsys
):
    """Its results.jsonl with no run folder: RLP's run is done again, its lines are not doubled, and
    what has all that it needs is not touched."""
    worlds = replace(KINDS["rare"], out=tmp_path / "worlds")
    monkeypatch.setitem(KINDS, "rare", worlds)
    (worlds.out / "0" / "base").mkdir(parents=True)
    rlp, base = (run.Task(arm, 0, "pretrain") for arm in ("rlp", "base"))
    there = lines_of(rlp, (80,)) + lines_of(base, (0,))
    run.add_results(tmp_path / "results.jsonl", run.LAYOUT, there)
    before = (tmp_path / "results.jsonl").read_bytes()

    def begin(task) -> Future:
        future: Future = Future()
        future.set_result(lines_of(task, (80,)))
        return future

    assert run.run_all(tmp_path, [rlp, base], 1, lambda pool, task, out: begin(task)) == 0
    told = capsys.readouterr().out
    assert (tmp_path / "results.jsonl").read_bytes() == before
    assert told.count("another machine's") == 1 and "1 stages are done, 1 are left" in told


def test_a_run_that_can_not_be_gone_on_with_is_kept_aside(tmp_path, capsys):
    """An unfinished run has no checkpoint; its folder gets another name, and nothing is lost."""
    pretraining = script("flop_matched", "pretraining.py")
    for content in ("one", "two"):
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "metrics.jsonl").write_text(content)
        pretraining.set_aside_another(tmp_path / "run", config=None)
    aside = sorted(path for path in tmp_path.iterdir())
    assert [path.name for path in aside] == ["run_aside_1", "run_aside_2"]
    assert [(path / "metrics.jsonl").read_text() for path in aside] == ["one", "two"]
    assert "not finished" in capsys.readouterr().out


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
    assert table in (REPOSITORY / "experiments" / "world" / "README.md").read_text()
