"""The experiment on Spectrum tuning: its arms differ in what they are said to differ in, the tiny
model knows every word, and the page holds what the results hold."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import yaml

from experiments.spectrum import report, run, world
from rlp.measure.pages import fill_page
from rlp.measure.results_file import Results, read_results
from rlp.post.pipeline_config import load_pipeline
from rlp.post.spectrum_rows import RowWriter
from rlp.post.spectrum_tasks import COLOURS, FAMILIES
from rlp.process.run_logs import read_json_lines
from rlp.world.folder import make_tokenizer


def test_one_draw_at_equal_draws_has_the_very_draws(tmp_path):
    """Row by row, in their order; at equal steps the first of each; mode-SFT the best answers."""
    small = replace(world.WORLDS["tiny"], steps=4, rows=8)
    world.write_all_rows(tmp_path, small, seed=3)
    rows = {path.stem: read_json_lines(path) for path in tmp_path.iterdir()}
    assert {name: len(own) for name, own in rows.items()} == {
        "spectrum": 32,
        "one_steps": 32,
        "one_draws": 32 * 12,
        "mode": 32,
    }
    split = [
        {"description": row["description"], "pairs": [pair]}
        for row in rows["spectrum"]
        for pair in row["pairs"]
    ]
    assert rows["one_draws"] == split and rows["one_steps"] == split[::12]
    assert all(len(row["pairs"]) == 1 for row in rows["mode"])


def test_the_tiny_model_knows_every_word_of_every_task():
    """All colours of an urn with all fillings, all coins, all options, inputs and frames."""
    writer = RowWriter(make_tokenizer(world.vocabulary()), world.WORLDS["tiny"].format)
    noise = np.random.default_rng(0)
    families = [
        FAMILIES[name](noise) for name in world.ALL for _ in range(40 if name == "urn" else 1)
    ]
    assert len({one.options for one in families if one.name == "urn"}) >= 16
    assert {c for one in families if one.name == "urn" for c in one.options} == {*COLOURS}
    for family in families:
        for text in (family.description, *family.descriptions):
            writer.begin(text)  # refuses what it does not know
        for given, option in itertools.product(family.inputs, family.options):
            assert len(writer.ask(given) + writer.answer(option)) == (5 if given else 3)


@pytest.mark.parametrize("panel", world.WORLDS)
def test_all_arms_make_as_many_steps_in_the_same_frames(panel, tmp_path):
    """And differ in their rows, in how many a step reads, and in the dropped descriptions."""
    path = tmp_path / "pipeline.yaml"
    path.write_text(yaml.safe_dump(run.tree(tmp_path, panel, 3, tmp_path / "base")))
    pipeline, own = load_pipeline(path), world.WORLDS[panel]
    stages = pipeline.stages.values()
    assert {(stage.steps, stage.learning_rate) for stage in stages} == {(own.steps, own.rate)}
    assert all(stage.format == own.format for stage in stages)
    drawn = {name: stage.batch_size for name, stage in pipeline.stages.items()}
    assert drawn["one_draws"] == drawn["spectrum"] * own.pairs
    assert [name for name, stage in pipeline.stages.items() if stage.drop] == ["spectrum"]
    assert {"base", *pipeline.arms} == {*report.arms_of(panel)}


def test_real_questions_are_of_families_that_no_row_holds():
    own = world.WORLDS["smollm2"]
    assert not {*own.tuned} & {*own.asked}


def test_a_line_is_the_end_of_its_chain():
    """Of mode_spectrum the stage spectrum, and not mode; the start is the base, once."""
    figures = {
        f"spectrum_shots_{k}_{name}": k / 8 for k in (0, 1, 2, 4, 8) for name in ("excess", "jsd")
    }
    line = figures | dict.fromkeys(run.COSTS, 1)
    told = [
        line | {"arm": "mode_spectrum", "stage": "start"},
        line | {"arm": "mode", "stage": "mode"},
        line | {"arm": "mode_spectrum", "stage": "mode"},
        line | {"arm": "mode_spectrum", "stage": "spectrum"},
        line | {"arm": "mode", "stage": "start"},
    ]
    found = run.read_lines(tuple(told), "tiny", 3)
    assert [one["arm"] for one in found] == ["base", "mode", "mode_spectrum"]
    assert found[0]["kshot_excess"] == pytest.approx(15 / 8 / 4)  # 1, 2, 4 and 8 pairs


def test_seeds_that_are_not_whole_are_left_out():
    line = dict.fromkeys(report.LAYOUT.figures, 0.0) | {"panel": "tiny", "temperature": 1.0}
    arms = report.arms_of("tiny")
    lines = [line | {"arm": arm, "seed": seed} for seed in (0, 1) for arm in arms][:-1]
    results = Results(report.RESULTS, report.LAYOUT, tuple(lines))
    assert report.whole_seeds(results, "tiny", arms) == [0]
    assert {one["seed"] for one in report.chosen(results, "tiny").lines} == {0}


def test_the_page_says_what_the_results_say():
    results = read_results(report.RESULTS, report.LAYOUT)
    page = report.README.read_text(encoding="utf-8")
    assert fill_page(page, report.make_parts(results)) == page
