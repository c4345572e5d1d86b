"""The tables of the experiments hold what their results.jsonl holds, and the README no other
number."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest

from tests import REPOSITORY

FOLDER = REPOSITORY / "experiments" / "flop_matched"


def load(path: Path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


analyze = load(FOLDER / "analyze.py")


@pytest.fixture(scope="module")
def results() -> dict:
    return analyze.read_results(FOLDER / "results.jsonl")


def test_every_arm_has_every_seed_and_stage(results):
    """No run that went badly is left out: five seeds of nine arms at three stages, each once."""
    lines = [json.loads(line) for line in (FOLDER / "results.jsonl").read_text().splitlines()]
    found = [(line["arm"], line["seed"], line["stage"]) for line in lines]
    assert len(found) == len(set(found)) and set(found) == {
        (arm, seed, stage) for arm in analyze.ARMS for seed in range(5) for stage in analyze.STAGES
    }


def test_the_tables_are_those_of_the_results(results):
    """Made again, the README of the comparison is the same to the letter."""
    readme = (FOLDER / "README.md").read_text()
    assert analyze.fill(readme, analyze.sections(results)) == readme


def test_the_page_on_comparing_repeats_the_verdict(results):
    page = (REPOSITORY / "docs" / "comparing.md").read_text()
    assert analyze.fill(page, {"verdict": analyze.verdict(results)}) == page


def test_the_main_readme_has_the_means_of_the_results(results):
    """Accuracy with a thought over the five seeds, the arms in the order of its columns."""
    arms = [
        "rlp",
        "greedy_match",
        "mixed_sft",
        "cpt_flops",
        "shuffled_reward",
        "foreign_thought",
        "base",
    ]
    readme = (REPOSITORY / "README.md").read_text()
    for title, stage in (("after pretraining", "pretrain"), ("and the same SFT and RLVR", "rlvr")):
        (line,) = [line for line in readme.splitlines() if line.startswith(f"| {title} |")]
        told = [float(cell) for cell in line.split("|")[2:-1]]
        runs = [results[arm, stage].values() for arm in arms]
        means = [np.mean([run["accuracy_with_thought"] for run in seeds]) for seeds in runs]
        assert told == [round(mean, 3) for mean in means]


def test_matched_arms_spend_the_same(results):
    """To 1 %, seed by seed, in what they are matched by."""
    for arm, name in {
        "cpt_tokens": "input_tokens",
        "cpt_flops": "flops",
        "mixed_sft": "flops",
        "greedy_match": "flops",
        "rlp_lm": "flops",
        "shuffled_reward": "flops",
        "foreign_thought": "flops",
    }.items():
        for seed, line in results[arm, "pretrain"].items():
            assert abs(line[name] / results["rlp", "pretrain"][seed][name] - 1) <= 0.01, (arm, seed)


def test_differences_are_paired_by_seed():
    """Seeds that differ a lot and an effect that does not: the interval is about the effect."""
    results = {
        (arm, "sft"): {
            seed: {"accuracy_with_thought": 0.1 * seed + effect + 0.01 * (seed % 2)}
            for seed in range(5)
        }
        for arm, effect in (("rlp", 0.05), ("cpt_flops", 0.0))
    }
    for seed in range(5):
        results["rlp", "sft"][seed]["accuracy_with_thought"] += 0.002 * seed
    mean, low, high = analyze.difference(results, "cpt_flops", "sft", "accuracy_with_thought")
    assert mean == pytest.approx(0.054) and 0.05 <= low <= mean <= high <= 0.058 + 1e-9
