"""Claims about the held-out panel: where it thinks, and at which temperatures."""

import json

import numpy as np
import pytest

from rlp.config import ConfigError, load_config, panel_position
from rlp.data.errors import DataError
from rlp.measure.metrics import EVALUATION
from rlp.measure.panel import held_out_panel
from rlp.model.setup import PanelSetup
from rlp.run.ending import panel_table
from rlp.run.held_out import HEADLINE, Evaluation
from tests.training import read_lines, tiny_config


@pytest.fixture
def panel_of(tmp_path, model_folder, corpus):
    """The panel of the tiny run with overrides, and its config."""

    def opened(**overrides):
        settings = {"data__held_out": f"[{corpus}]", "data__max_bad_fraction": 1} | overrides
        config = tiny_config(tmp_path / "run", model_folder, corpus, **settings)
        return held_out_panel(PanelSetup(config, print)), config

    return opened


def same(one, other) -> bool:
    ours, theirs = one.positions, other.positions
    documents = [document.id for document in one.documents]
    return (
        documents == [document.id for document in other.documents]
        and np.array_equal(ours.document, theirs.document)
        and np.array_equal(ours.position, theirs.position)
    )


def test_a_panel_is_where_the_run_thinks_unless_it_has_a_place_of_its_own(panel_of):
    """The same panel for every place that a run may think at: what makes runs comparable."""
    answers = {"evaluation__selector": "marker", "evaluation__marker": "w3"}
    at_the_marker, _ = panel_of(position__selector="marker", position__marker="w3")
    for selector, count in (("entropy", 1), ("uniform", 3)):
        own, _ = panel_of(
            position__selector=selector,
            position__per_document=count,
            evaluation__per_document=2,
            **answers,
        )
        assert same(own, at_the_marker)
        before = [own.documents[d].tokens[t - 1] for d, t in own.positions.places()]
        assert len(set(before)) == 1
    as_the_run, _ = panel_of(position__per_document=3)
    assert not same(as_the_run, at_the_marker)


def test_the_panel_keeps_what_it_does_not_change(panel_of):
    _, config = panel_of(position__selector="entropy", position__per_document=3)
    assert panel_position(config) == config.position
    config.evaluation.per_document = "all"
    assert panel_position(config).per_document == "all"
    assert panel_position(config).selector == "entropy"


def test_a_marker_that_no_held_out_document_has_is_told_by_its_own_name(panel_of):
    with pytest.raises(DataError, match=r"evaluation\.marker 'w3 w3 w3 w3' does not occur"):
        panel_of(
            data__max_bad_fraction=0,
            evaluation__selector="marker",
            evaluation__marker="w3 w3 w3 w3",
        )


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["evaluation.selector=entropy"], "evaluation.selector must be uniform or marker"),
        (["evaluation.selector=marker"], "evaluation.marker goes with evaluation.selector: marker"),
        (["evaluation.marker=w3"], "evaluation.marker goes with evaluation.selector: marker"),
        (["evaluation.per_document=0"], "evaluation.per_document must be a whole number"),
        (["evaluation.per_document=some"], "evaluation.per_document must be a whole number"),
        (["evaluation.cold_temperature=0"], "evaluation.cold_temperature must be above 0"),
        (
            ["evaluation.cold_temperature=0.001", "sampling.engine=vllm"],
            "evaluation.cold_temperature must be at least 0.01 with sampling.engine: vllm",
        ),
    ],
)
def test_impossible_panels_are_refused(overrides, message):
    tree = {"run": {"dir": "r"}, "model": {"path": "m"}, "data": {"train": ["t"]}}
    with pytest.raises(ConfigError, match=message):
        load_config(tree, ["budget.steps=1", *overrides])


def test_cold_numbers_have_the_fields_of_the_others(trained, corpus):
    """And, at the temperature of the thoughts itself, their values: the noise is the panel's."""
    overrides = {
        "data__held_out": f"[{corpus}]",
        "evaluation__every_n_steps": 2,
        "thought__temperature": 0.7,
    }
    folder = trained(evaluation__cold_temperature=0.7, **overrides)
    summary = json.loads((folder / "summary.json").read_text())
    for when in ("before", "after"):
        assert summary[f"{when}_cold"] == summary[when]
    lines = [Evaluation.of(line) for line in read_lines(folder / "evaluation.jsonl")]
    assert len(lines) == 3 and all(line.cold == line.values for line in lines)
    assert set(lines[0].values) <= set(EVALUATION)


def test_a_run_without_a_cold_temperature_says_so(trained, corpus):
    folder = trained(data__held_out=f"[{corpus}]", budget__steps=1)
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["before"] and summary["before_cold"] is summary["after_cold"] is None
    assert not any(
        name.startswith("cold/")
        for line in read_lines(folder / "evaluation.jsonl")
        for name in line
    )


def test_the_end_of_a_run_is_told_at_both_temperatures():
    """Each number stands under its temperature and under before or after."""
    config = load_config(
        {
            "run": {"dir": "r"},
            "model": {"path": "m"},
            "data": {"train": ["t"]},
            "budget": {"steps": 1},
            "thought": {"temperature": 1.0},
            "evaluation": {"cold_temperature": 0.3},
        }
    )
    numbers = [
        {name: base + place for place, name in enumerate(HEADLINE)} | {"panel_positions": 7}
        for base in (10.0, 20.0, 30.0, 40.0)
    ]
    before, after = Evaluation(numbers[0], numbers[2]), Evaluation(numbers[1], numbers[3])
    head, title, first, *rest = panel_table(before, after, config)
    assert head.split() == ["thoughts", "at", "T", "1", "thoughts", "at", "T", "0.3"]
    assert title.split() == ["held-out", "panel", "of", "7", "positions", *["before", "after"] * 2]
    assert first.split()[-4:] == ["10.000", "20.000", "30.000", "40.000"]
    assert len(rest) == len(HEADLINE) - 1 and len({len(line) for line in (title, first)}) == 1
    warm = [Evaluation(values, None) for values in numbers[:2]]
    assert panel_table(*warm, config)[0].split()[-2:] == ["before", "after"]
