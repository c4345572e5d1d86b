"""The page about a pipeline says what its results.jsonl says."""

import json
import re
from pathlib import Path

import pytest

from rlp.cli import main
from rlp.post.pipeline_results import COSTS

YAML = """
dir: {dir}
seeds: [0, 1, 2, 3, 4, 5]
model: base
stages:
  rlp: {{kind: rlp, config: unused.yaml}}
  sft: {{kind: sft, data: [rows.jsonl], steps: 4, learning_rate: 1e-3, keep_steps: [2]}}
arms:
  rlp: [rlp, sft]
  base: [sft]
evaluation: {{temperatures: [1.0], panel: {{config: unused.yaml}}}}
"""


def line(arm: str, seed: int, stage: str, step: int, accuracy: float) -> dict:
    told = {"arm": arm, "seed": seed, "stage": stage, "stage_step": step, "temperature": 1.0}
    costs = dict.fromkeys(COSTS, 0) | {"flops": 1e9 * step, "seconds": None}
    return told | costs | {"accuracy_with_thought": accuracy}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Six seeds: RLP is at 0.5 where the base is at 0.25, and after SFT both are at 0.75."""
    lines = []
    for seed in range(6):
        for arm in ("rlp", "base"):
            lines.append(line(arm, seed, "start", 0, 0.25))
            lines += [line(arm, seed, "sft", step, 0.25 + step / 8) for step in (2, 4)]
        lines.append(line("rlp", seed, "rlp", 80, 0.5 + seed / 100))
    (tmp_path / "pipeline.yaml").write_text(YAML.format(dir=tmp_path))
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))
    return tmp_path


def text_of(page: Path) -> str:
    """What a reader sees."""
    shown = re.sub(r"<style>.*?</style>|<[^>]+>", " ", page.read_text(), flags=re.S)
    return re.sub(r"\s+", " ", shown)


def test_a_page_has_stages_by_arms_with_intervals_claims_curves_and_costs(folder, capsys):
    assert main(["report", str(folder)]) == 0
    assert capsys.readouterr().out.strip() == str(folder / "report.html")
    page = text_of(folder / "report.html")
    # Mean of 0.50 to 0.55, and t(0.975, 5) * std / sqrt(6) = 2.571 * 0.0187 / 2.449 beside it.
    assert "rlp 0.250 0.250 to 0.250, 6 seeds 0.525 0.505 to 0.545, 6 seeds 0.750" in page
    assert "base 0.250 0.250 to 0.250, 6 seeds - 0.750" in page
    assert "after sft, T 1: rlp is not told apart from base (exact paired test, 6 seeds" in page
    assert "sft: accuracy with thought, T 1" in page
    assert "rlp all 0 0 0 0 0 8.400e+10 0.000e+00 -" in page


def test_a_pipeline_without_results_is_told_so(folder, capsys):
    (folder / "results.jsonl").unlink()
    assert main(["report", str(folder)]) == 2
    assert "no stage has ended" in capsys.readouterr().err


def test_a_page_about_a_pipeline_has_no_other_runs(folder, capsys):
    assert main(["report", str(folder), str(folder), "--out", str(folder / "both.html")]) == 2
    assert "a report on one has no other runs" in capsys.readouterr().err
