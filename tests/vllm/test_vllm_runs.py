"""Whole runs of the embedded world that think through vLLM, on a CPU."""

from pathlib import Path
from statistics import mean, stdev

import pytest
import torch
from transformers import AutoModelForCausalLM

from rlp.config import Config, load_config
from rlp.process.exit_codes import DONE
from rlp.world.folder import write_world
from tests import REPOSITORY
from tests.training import assert_same_run, launch, read_lines, train
from tests.vllm.models import random_policy, write_wide
from tests.vllm.two_ranks import STAGES

STEPS, SEEDS = 40, 4


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """The embedded world, and its base with wider heads."""
    folder = tmp_path_factory.mktemp("world")
    write_world(folder / "data")
    write_wide(REPOSITORY / "rlp" / "world" / "base", folder / "base")
    return folder


def config_of(world: Path, folder: Path, *overrides: str) -> Config:
    return load_config(
        REPOSITORY / "configs" / "quickstart.yaml",
        [
            f"run.dir={folder}",
            f"model.path={world / 'base'}",
            f"data.train=[{world / 'data' / 'train.jsonl'}]",
            f"data.held_out=[{world / 'data' / 'held_out.jsonl'}]",
            f"budget.steps={STEPS}",
            "evaluation.every_n_steps=0",
            "engine.dtype=float32",
            *overrides,
        ],
    )


def test_the_wider_base_is_the_base(world):
    """Up to rounding: the comparison with vLLM is on the quickstart's own model."""
    tokens = torch.arange(3, 20)[None]
    with torch.no_grad():
        narrow, wide = (
            AutoModelForCausalLM.from_pretrained(path)(tokens).logits
            for path in (REPOSITORY / "rlp" / "world" / "base", world / "base")
        )
    torch.testing.assert_close(wide, narrow, rtol=1e-4, atol=1e-4)


def figures(folder: Path) -> dict[str, float]:
    """What a run is compared by: the reward over its steps, in halves, and the panel at its end."""
    rewards = [line["reward/mean"] for line in read_lines(folder / "metrics.jsonl")]
    last = read_lines(folder / "evaluation.jsonl")[-1]
    return {
        "first half": mean(rewards[: STEPS // 2]),
        "second half": mean(rewards[STEPS // 2 :]),
        "gain": last["gain_over_start_nats"],
    }


def panel_noise(folder: Path) -> float:
    """Standard deviation of the gain at the end that the panel's own thoughts make: native runs
    share them, whatever their seed, and vLLM draws others."""
    last = read_lines(folder / "evaluation.jsonl")[-1]
    return last["reward_group_std_nats"] / (4 * last["panel_positions"]) ** 0.5


def test_a_run_through_vllm_learns_as_one_without(world, tmp_path, ranks, capsys):
    """The quickstart, cut to 40 steps. Thoughts are others, as those of another seed are: each
    figure lies within what four native seeds vary by, at 99 % of Student's t with 3 degrees of
    freedom for one more draw (5.84 sqrt(1 + 1/4) standard deviations); the gain's has the noise of
    two panels besides."""
    natives = []
    for seed in range(SEEDS):
        folder = tmp_path / f"native{seed}"
        assert train(config_of(world, folder, f"run.seed={seed}"), ranks) == DONE
        natives.append(figures(folder))
    folder = tmp_path / "vllm"
    assert train(config_of(world, folder, "sampling.engine=vllm"), ranks) == DONE
    found, said = figures(folder), []
    for name, value in found.items():
        native = [run[name] for run in natives]
        noise = stdev(native)
        if name == "gain":
            noise = (noise**2 + 2 * panel_noise(tmp_path / "native0") ** 2) ** 0.5
        spread = 5.84 * (1 + 1 / SEEDS) ** 0.5 * noise
        said.append(f"{name}: vllm {value:.3f}, native {mean(native):.3f} +- {noise:.3f}")
        assert abs(value - mean(native)) <= spread, said[-1]

    before = read_lines(folder / "evaluation.jsonl")[0]["gain_over_start_nats"]
    learned = mean(run["gain"] for run in natives) - before
    assert found["gain"] - before > learned / 2 > 0.1, (before, found, natives)
    lines = read_lines(folder / "metrics.jsonl")
    worst = max(line["policy/behavior_mismatch_max"] for line in lines)
    assert worst < 1e-4 and not any("policy/entropy" in line for line in lines)
    assert not (folder / "alarms.jsonl").exists()
    with capsys.disabled():
        print("\n" + "\n".join(said) + f"\nlargest |log ratio| of a run: {worst:.1e}")


def test_two_ranks_think_what_one_thinks(tmp_path, tokenizer, corpus):
    """An engine on each rank, and under stage 3 weights that are gathered one by one: thoughts are
    keyed, so the runs are one run, up to the order of sums."""
    model = tmp_path / "model"
    random_policy(tied=True).lm.save_pretrained(model)
    tokenizer.save_pretrained(model)
    script = ["-m", "tests.vllm.two_ranks"]
    for world_size, port in ((1, 29631), (2, 29632)):
        folder = tmp_path / f"ranks{world_size}"
        folder.mkdir()
        launch([*script, str(folder), str(model), str(corpus)], world_size, port, timeout=600)
    for stage in STAGES:
        alone, together = (tmp_path / f"ranks{n}" / f"stage{stage}" for n in (1, 2))
        assert_same_run(alone, together, 1e-4)
        lines = read_lines(together / "metrics.jsonl")
        assert max(line["policy/behavior_mismatch_max"] for line in lines) < 1e-4
