"""The benchmark of an update step compares like with like. Its timings are measurements, not
claims: none is asserted."""

import json
import os
import subprocess
import sys

import pytest

from tests import REPOSITORY

BENCH = REPOSITORY / "kernels" / "bench_step.py"


@pytest.mark.slow
def test_contenders_compute_the_same_step(tmp_path):
    """Rewards and gradients of ours and of TRL's trainer agree to 1e-4 in float32, and the report
    holds every number."""
    pytest.importorskip("trl", reason="TRL is not installed (the extra `post`)")
    done = subprocess.run(
        [
            sys.executable,
            str(BENCH),
            "--quick",
            "--device",
            "cpu",
            "--json",
            str(tmp_path / "step.json"),
        ],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "step.json").read_text())
    assert 0 < report["reward_max_rel_err"] <= 1e-4
    assert 0 < report["grad_rel_err"] <= 1e-4
    assert {
        "speedup_vs_trl_careful",
        "speedup_vs_trl_naive",
        "peak_memory_ratio",
        "medians",
        "ranges",
        "hardware",
        "versions",
        "commit",
        "date",
        "command",
        "caveats",
    } <= set(report)
    shape = report["shapes"][0]
    assert {shape["ours"], "repeated", "TRL careful", "TRL naive"} <= set(shape["medians"])
    for name, parts in shape["raw_seconds"].items():
        assert all(len(values) >= 1 and min(values) > 0 for values in parts.values()), name


@pytest.mark.slow
def test_a_whole_step_with_its_sampling_takes_its_turns(tmp_path):
    """Both sample thoughts of the lengths that are recorded (else the program fails), and each part
    of a step has its time."""
    pytest.importorskip("trl", reason="TRL is not installed (the extra `post`)")
    out = tmp_path / "step.json"
    command = [sys.executable, str(BENCH), "--quick", "--with-sampling", "--device", "cpu"]
    done = subprocess.run(
        [*command, "--json", str(out)],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(out.read_text())
    assert report["speedup_vs_trl"] > 0 and {"hardware", "versions", "commit"} <= set(report)
    for name in ("ours", "TRL careful"):
        parts = report["shapes"][0]["medians"][name]
        assert min(parts["sampling"], parts["scoring"], parts["update"]) > 0
        assert parts["step"] == pytest.approx(
            parts["sampling"] + parts["scoring"] + parts["update"], rel=0.5
        )
