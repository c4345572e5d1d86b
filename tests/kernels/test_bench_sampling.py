"""The benchmark of a sampling phase compares like with like. Its timings are measurements, not
claims: none is asserted."""

import json

import numpy as np
import pytest
import transformers

import bench_sampling
from rlp.data.documents import Document
from sampling_phase.setting import recorded_lengths
from update_step.given import Shape


@pytest.fixture
def report(tmp_path):
    verbosity = transformers.logging.get_verbosity()
    arguments = ["--quick", "--device", "cpu", "--json", str(tmp_path / "sampling.json")]
    assert bench_sampling.main(arguments) == 0
    transformers.logging.set_verbosity(verbosity)
    return json.loads((tmp_path / "sampling.json").read_text())


def test_contenders_sample_the_same_phase(report):
    """Thoughts of slots and blocks are the same, all lengths those recorded, and the report holds
    every number."""
    assert report["same_thoughts_as_blocks"] and report["lengths_as_recorded"]
    assert set(bench_sampling.HEADLINE) <= set(report)
    assert {"hardware", "versions", "commit", "date", "command"} <= set(report)
    assert (report["speedup_vs_vllm"] is None) == ("vLLM" in report["missing"])
    for name in ("slots", "blocks", "generate"):
        assert 0 < report["useful_over_spent_flops"][name] <= 1
        assert report["tokens_per_s"][name] > 0 and report["seconds"][name] > 0
    # Each block lasts as long as its longest thought, and one more for the open marker, less one.
    longest = recorded_lengths(32, 24).reshape(-1, 8).max(axis=1)
    assert report["decode_steps"]["blocks"] == longest.sum()
    assert report["slots_steps_over_blocks"] == (
        report["decode_steps"]["slots"] / report["decode_steps"]["blocks"]
    )


def test_lengths_are_widely_spread_around_a_sixth_of_the_budget():
    """Scaled up to whole tokens: half a token more at most on average, and one."""
    lengths = recorded_lengths(1024, 128)
    assert 128 / 6 <= lengths.mean() <= 128 / 6 + 1
    assert lengths.min() >= 1 and lengths.max() == 128 and lengths.std() > 0.8 * lengths.mean()


def test_noise_ends_a_thought_where_it_is_recorded_to_end():
    """With a 0 for its last token, unless the budget ends it; no other number is 0."""
    setting = bench_sampling.make_setting(Shape(48, 2, 4, 48), 8, 512)
    noise = setting.noise()
    for m, (d, t) in enumerate(setting.positions.places()):
        document: Document = setting.documents[d]
        for g, length in enumerate(setting.lengths[m].tolist()):
            zero = np.flatnonzero(noise.uniforms(document, t, g, 48) == 0).tolist()
            assert zero == ([length - 1] if length < 48 else [])
