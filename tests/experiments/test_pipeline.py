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
