"""What the YAML of a pipeline may say, the tasks that come of it, and what is refused before any of
them runs."""

import json
from concurrent.futures import Future
from dataclasses import asdict
from pathlib import Path

import pytest

from rlp.config import ConfigError, load_config
from rlp.data.errors import DataError
from rlp.post.pipeline_checks import refuse_bad
from rlp.post.pipeline_config import load_pipeline
from rlp.post.pipeline_folder import TaskFolder
from rlp.post.pipeline_tasks import Task, arms_of, every_task, run_tasks
from rlp.post.run_settings import settings_of, with_defaults
from rlp.post.stages.interface import Spent
from rlp.process.json_files import DamagedFileError

STAGES = """
stages:
  rlp: {kind: rlp, config: unused.yaml}
  cpt: {kind: cpt, match: {stage: rlp}}
  mine: {kind: "my_stages:filtered", options: {from: "{rlp}/thoughts.jsonl"}}
  sft: {kind: sft, data: ["{mine}/{seed}.jsonl"], steps: 4, learning_rate: 1e-3}
  plain: {kind: sft, data: [rows.jsonl], steps: 4, learning_rate: 1e-3, keep_steps: [2]}
  rlvr: {kind: rlvr, data: [rows.jsonl], steps: 4, learning_rate: 1e-3}
"""


def pipeline_of(folder: Path, arms: str, stages: str = STAGES, head: str = "seeds: [0, 3]"):
    path = folder / "pipeline.yaml"
    path.write_text(f"dir: {folder / 'out'}\nmodel: base\n{head}\n{stages}\narms: {arms}\n")
    return load_pipeline(path)


def refused(folder: Path, *arguments: str, **named: str) -> str:
    with pytest.raises(ConfigError) as told:
        every_task(pipeline_of(folder, *arguments, **named))
    return str(told.value)


def test_stages_that_arms_share_are_done_once(tmp_path):
    """Arms share what they begin with, and nothing behind it; controls stand behind what they are
    matched with."""
    arms = "{rlp: [rlp, plain, rlvr], short: [rlp, plain], cpt: [cpt, plain], base: [plain]}"
    pipeline = pipeline_of(tmp_path, arms)
    tasks = every_task(pipeline)
    chains = ["rlp", "rlp+plain", "rlp+plain+rlvr", "cpt", "cpt+plain", "plain"]
    assert [task.name for task in tasks] == [f"seed_{s}/{c}" for s in (0, 3) for c in chains]
    assert arms_of(Task(0, ("rlp", "plain")), pipeline) == ["rlp", "short"]
    assert Task(3, ("cpt",)).needs(pipeline) == [Task(3, ("rlp",))]
    assert [Task.named(task.name) for task in tasks] == tasks


def test_a_control_waits_for_what_it_is_matched_with_wherever_it_stands(tmp_path):
    pipeline = pipeline_of(tmp_path, "{cpt: [cpt], rlp: [rlp]}", head="seeds: [0]")
    assert every_task(pipeline) == [Task(0, ("rlp",)), Task(0, ("cpt",))]


def test_a_stage_reads_the_folders_of_stages_before_it(tmp_path):
    pipeline = pipeline_of(tmp_path, "{mine: [rlp, mine, sft]}")
    places = Task(3, ("rlp", "mine", "sft")).places(pipeline)
    out = tmp_path / "out" / "seed_3"
    assert places == {"seed": 3, "rlp": out / "rlp", "mine": out / "rlp+mine"}


def test_a_stage_that_does_not_exist_is_refused(tmp_path):
    said = refused(tmp_path, "{rlp: [rlp, rlvl]}")
    assert "arms.rlp: there is no stage 'rlvl'. Did you mean rlvr?" in said


def test_an_arm_that_asks_for_data_of_a_later_stage_is_refused(tmp_path):
    said = refused(tmp_path, "{early: [rlp, sft, mine]}")
    assert "the stage sft asks for {mine}, which comes later" in said
    assert "the folders of rlp." in said


def test_an_arm_that_asks_for_data_of_another_arms_stage_is_refused(tmp_path):
    assert "{mine}, which is no stage of this arm" in refused(tmp_path, "{bare: [sft]}")


def test_a_match_with_a_stage_that_no_arm_has_there_is_refused(tmp_path):
    said = refused(tmp_path, "{cpt: [plain, cpt], rlp: [rlp]}")
    assert "no arm has rlp where cpt stands, behind plain" in said


@pytest.mark.parametrize(
    "change, said",
    [
        (("kind: sft", "kind: stf"), "stages.sft.kind must be one of cpt, rlp, mixed_sft, sft"),
        (("learning_rate: 1e-3}", "learning_rat: 1e-3}"), "unknown key learning_rat. Did you mean"),
        (("keep_steps: [2]", "keep_steps: [8]"), "keep_steps ends at 4 steps, got [8]"),
        (("kind: sft,", "kind: sft, max_tokens: 0,"), "max_tokens must be at least 2, got 0"),
        (("keep_steps: [2]", "hand_on: 3"), "hand_on must be one of keep_steps, [4], got 3"),
        (("config: unused.yaml", "ranks: 2"), "config or match has to be there, and not both"),
        (("{stage: rlp}", "{stage: rlp, by: watts}"), "match.by must be one of tokens, flops"),
        (("  rlvr:", "  seed:"), "'seed' can not be a name"),
        (("data: [rows.jsonl], ", ""), "data must name the files of the rows"),
    ],
)
def test_a_wrong_value_is_refused_with_its_place(tmp_path, change, said):
    assert change[0] in STAGES
    assert said in refused(tmp_path, "{rlp: [rlp]}", stages=STAGES.replace(*change))


def performed(tasks, needs, fails=frozenset(), done=frozenset()) -> list:
    """The order in which tasks are begun, when the oldest that runs is always the first to end."""
    begun = []

    def begin(task) -> Future:
        begun.append(task)
        future: Future = Future()
        if task in fails:
            future.set_exception(RuntimeError("broken"))
        else:
            future.set_result(None)
        return future

    list(run_tasks(list(tasks), set(done), 2, needs, begin))
    return begun


def test_a_failed_stage_stops_only_what_needs_it(tmp_path):
    arms = "{rlp: [rlp, plain], cpt: [cpt, plain], base: [plain]}"
    pipeline = pipeline_of(tmp_path, arms)
    tasks = every_task(pipeline)
    begun = performed(tasks, lambda task: task.needs(pipeline), fails={Task(0, ("rlp",))})
    left_out = set(tasks) - set(begun)
    assert {task.name for task in left_out} == {
        "seed_0/rlp+plain",
        "seed_0/cpt",
        "seed_0/cpt+plain",
    }


# What is refused once paths are looked at, and before anything runs


def checked(folder: Path, change: tuple[str, str] = ("", ""), rows: str = "") -> str:
    """What is said of a pipeline whose model and rows are there."""
    (folder / "base").mkdir(exist_ok=True)
    (folder / "rows.jsonl").write_text(rows or '{"text": "one", "prompt": "one", "answer": "1"}\n')
    stages = f"""
stages:
  sft: {{kind: sft, data: [{folder}/rows.jsonl], steps: 4, learning_rate: 1e-3}}
  rlvr: {{kind: rlvr, data: [{folder}/rows.jsonl], steps: 4, batch_size: 1, learning_rate: 1e-3}}
evaluation:
  others: {{language: {{script: latin}}, variety: {{tokens: 4}}}}
"""
    head = f"seeds: [0]\nmodel: {folder}/base"
    path = folder / "pipeline.yaml"
    text = f"dir: {folder / 'out'}\n{head}\n{stages}\narms: {{one: [sft, rlvr]}}\n"
    assert change[0] in text
    path.write_text(text.replace(*change))
    try:
        refuse_bad(load_pipeline(path))
    except (ConfigError, DataError) as error:
        return str(error)
    return ""


def test_a_good_pipeline_is_not_refused(tmp_path):
    assert checked(tmp_path) == "" and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "change, said",
    [
        (("rows.jsonl], steps", "row.jsonl], steps"), "row.jsonl: no such file. Write the path"),
        (("/base", "/bases"), "there is no folder"),
        (("batch_size: 1,", "batch_size: 9,"), "stages.rlvr, seed 0: data: 1 prompts, and a step"),
        (("script: latin", "script: laitn"), "evaluation.others.language.script must be a script"),
        (("{tokens: 4}", "{token: 4}"), "evaluation.others.variety: unknown key token"),
        (("language: {", "langage: {"), "evaluation.others.langage: there is no such evaluation"),
        (("{kind: rlvr", "{kind: 'no_module:stage', options: {}} #"), "no module 'no_module'"),
        (("batch_size: 1,", "batch_size: 1, reward: 'json:nothing',"), "has no 'nothing'"),
    ],
)
def test_what_is_not_there_is_refused_before_anything_runs(tmp_path, change, said):
    told = checked(tmp_path, change)
    assert said in told and not (tmp_path / "out").exists()


def test_a_row_without_what_its_stage_needs_is_refused(tmp_path):
    told = checked(
        tmp_path, rows='{"text": "one", "prompt": "one", "answer": "1"}\n{"text": "b"}\n'
    )
    assert "rows.jsonl:2: a row needs text in prompt and answer, and prompt is none" in told


def test_a_stage_that_was_made_before_a_key_was_there_stands():
    """What the key does by default is what was done without it."""
    named = {"model": {"path": "m"}, "run": {"dir": "d"}, "data": {"train": ["t"]}}
    config = load_config(named | {"budget": {"steps": 1}})
    told = settings_of(config)
    without = {key: value for key, value in told.items() if key != "reward.language_weight"}
    assert with_defaults(without) == told
    assert with_defaults(without | {"optim.learning_rate": 0.5}) != told


@pytest.mark.parametrize("path", ["/etc", "../other", "work/../../other", "..", ""])
def test_a_manifest_whose_model_lies_elsewhere_is_refused(tmp_path, path):
    """Somebody else's folder leads nowhere."""
    spent = asdict(Spent())
    model = {"step": 1, "path": path, "checksum": "0" * 64, "spent": spent}
    asked = {"stage": "sft", "seed": 0, "settings": {}, "inputs": {}}
    told = {"asked": asked, "models": [model], "ledger": spent, "wall_s": 1.0, "environment": {}}
    folder = TaskFolder(tmp_path)
    folder.manifest_json.write_text(json.dumps(told))
    with pytest.raises(DamagedFileError, match="path"):
        folder.kept()
    folder.manifest_json.write_text(
        json.dumps(told).replace(f'"path": "{path}"', '"path": "work/a"')
    )
    assert folder.kept()[0][0].path == tmp_path / "work" / "a"
