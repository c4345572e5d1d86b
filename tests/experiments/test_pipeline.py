"""The stages along the way: the page says what the results say, and rows are those of the
comparison of arms."""

import json

from rlp.measure.pages import fill_page
from rlp.post.pipeline_config import load_pipeline
from rlp.post.pipeline_results import open_results
from rlp.post.pipeline_tasks import every_task
from tests import REPOSITORY
from tests.experiments.scripts import script

FOLDER = REPOSITORY / "experiments" / "pipeline"
prepare = script("pipeline", "prepare.py")
show = script("pipeline", "show.py")
smollm2 = script("pipeline", "smollm2.py")


def test_the_pipeline_of_the_experiment_can_be_planned():
    """Nine worlds, and each arm through the same two stages."""
    pipeline = load_pipeline(FOLDER / "pipeline.yaml")
    assert len(pipeline.seeds) == 9 and set(pipeline.arms) == set(show.WORDS)
    assert all(tuple(stages[-2:]) == show.SHARED for stages in pipeline.arms.values())
    assert len(every_task(pipeline)) == 9 * (1 + 3 * 7 + 2)


def test_rows_of_a_seed_are_its_own_and_share_no_question_with_the_panel(tmp_path):
    prepare.write_rows(3, 16, 8, tmp_path)
    texts, prompts = (
        [json.loads(line) for line in (tmp_path / "3" / f"{name}.jsonl").read_text().splitlines()]
        for name in ("sft", "rlvr")
    )
    assert len(texts) == 16 and len(prompts) == 8
    held_out = {
        prepare.problem_text(prepare.turns_of(one)).rsplit(" ", 2)[0]
        for one in prepare.split_questions(3)["held_out"]
    }
    asked = [text["text"].partition(" <think>")[0] for text in texts]
    asked += [prompt["prompt"].partition(" <think>")[0] for prompt in prompts]
    assert all(one.endswith("faces") for one in asked) and not held_out & set(asked)


def test_the_page_says_what_the_results_say():
    results = open_results(FOLDER / "results.jsonl")
    page = (FOLDER / "README.md").read_text()
    assert fill_page(page, show.sections(results, list(show.WORDS))) == page


def test_lines_are_dealt_out_and_none_of_them_is_on_the_panel(tmp_path):
    """Three lines of a problem of the arms go to RLP, SFT and RLVR; a held-out one to nobody."""
    told = "Anna pays $4 + $6 + $8 = $<<4+6+8=18>>18.\n"
    answers = [{"question": "", "answer": f"{3 * told}#### 18"} for _ in range(100)]
    content = "".join(json.dumps(answer) + "\n" for answer in answers)
    (tmp_path / "train.jsonl").write_text(content)
    counts = smollm2.write_rows(str(tmp_path), tmp_path / "rows")
    assert counts == {"rlp": 35, "sft": 35, "rlvr": 35, "prompts": 40}
    first = {
        name: json.loads((tmp_path / "rows" / f"{name}.jsonl").read_text().splitlines()[0])
        for name in counts
    }
    before = "Anna pays $4 + $6 + $8 = "
    assert first["rlp"] == {"text": f"{before}18.\n"}
    assert first["rlvr"] == {"prompt": f"{before}<think>", "answer": "18"}
    chain = {"prompt": f"{before}<think>", "completion": "4+6=10 10+8=18</think>18.\n"}
    assert first["sft"] == chain


def test_the_pipeline_of_the_real_model_can_be_planned():
    pipeline = load_pipeline(FOLDER / "smollm2.yaml")
    places = {(arm, stage) for arm, stages in pipeline.arms.items() for stage in stages}
    assert set(smollm2.PLACES) <= places | {("base", "start")}


def test_the_page_of_the_real_model_says_what_its_results_say():
    results = open_results(FOLDER / "smollm2.jsonl")
    page = (FOLDER / "smollm2.md").read_text()
    assert fill_page(page, smollm2.parts(results)) == page
