"""The committed configs: they load, fit, say what the plan says, and hold the paper's values."""

import dataclasses
from pathlib import Path

import pytest

from rlp.config import Config, load_config
from rlp.measure.plan import Plan, fits, plan_run
from rlp.measure.plan_memory import activation_bytes
from rlp.model.loading import choose_layout
from rlp.model.shapes import model_shapes
from tests import REPOSITORY
from tests.measure.small_plans import EIGHTY_GB, published


@pytest.mark.parametrize(
    "path",
    sorted(
        path
        for path in (REPOSITORY / "configs").glob("*.yaml")
        if not path.stem.startswith("benchmarks")
    ),
    ids=lambda path: path.stem,
)
def test_every_committed_config_loads(path: Path) -> None:
    assert load_config(path).run.dir.startswith("runs/")


PRESETS = {
    "qwen3_1p7b_paper": "qwen3_1p7b",
    "qwen3_1p7b_mixed": "qwen3_1p7b",
    "qwen3_1p7b_cpt": "qwen3_1p7b",
    "nemotron_nano_12b_v2_paper": "nemotron_nano_12b_v2",
}


def preset_plan(preset: str, *overrides: str) -> tuple[Config, Plan]:
    """For 8 devices of 80 GB, in the layout that the run takes."""
    config, model = (
        load_config(REPOSITORY / "configs" / f"{preset}.yaml", overrides),
        published(PRESETS[preset]),
    )
    layout, _ = choose_layout(config, model)
    return config, plan_run(config, model_shapes(model), 8, EIGHTY_GB, layout=layout)


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_fit_eight_devices_of_80_gb(preset: str) -> None:
    config, plan = preset_plan(preset)
    assert fits(plan, EIGHTY_GB)
    assert plan.layout == ("repeated" if "nemotron" in preset else "tree")
    assert config.optim.batch_size % (8 * config.optim.micro_batch_size) == 0


def lines_by_key(text: str) -> dict[str, str]:
    """Each line that sets a key, with the comment behind it, which may go on below itself."""
    lines: dict[str, str] = {}
    comment_column, key = -1, ""
    for line in text.splitlines():
        column = line.find("#")
        if line.strip().startswith("#"):
            lines[key] = lines.get(key, "") + (
                line[column + 1 :] if column == comment_column else ""
            )
        else:
            comment_column, key = column, line.split(":")[0].strip()
            lines[key] = line
    return lines


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_quote_the_plan(preset: str) -> None:
    """Gigabytes and tokens in the comments."""
    config, plan = preset_plan(preset)
    lines = lines_by_key((REPOSITORY / "configs" / f"{preset}.yaml").read_text())
    memory = {part.name: part.num_bytes for part in plan.memory}
    assert f" {memory['activations'] / 1e9:.0f} GB" in lines["micro_batch_size"]
    without = (
        plan.other_activation_bytes
        if config.engine.activation_checkpointing
        else memory["activations"]
    )
    assert f" {without / 1e9:.0f} GB" in lines["activation_checkpointing"]
    if config.objective.thinks:
        assert f" {memory['keys, values and states'] / 1e9:.0f} GB" in lines["slots"]
    if plan.layout == "tree":
        per_token = activation_bytes(
            model_shapes(published(PRESETS[preset])), 1, 2, config.engine.activation_checkpointing
        )
        tokens = memory["activations"] // per_token
        assert f" {tokens:,} tokens" in lines["micro_batch_size"].replace("8192", "8,192")


def test_the_papers_document_length_fits_the_12b_in_slices_alone() -> None:
    """As its preset says, with what it costs."""
    long = "data.max_document_tokens=8192"
    whole, sliced = (
        preset_plan("nemotron_nano_12b_v2_paper", long, *more)[1]
        for more in ((), ("optim.thoughts_per_forward=4", "sampling.slots=64"))
    )
    assert fits(sliced, EIGHTY_GB) and not fits(whole, EIGHTY_GB)
    assert round(sliced.step_flops / whole.step_flops, 2) == 1.3


@pytest.mark.parametrize("preset", ["qwen3_1p7b_paper", "nemotron_nano_12b_v2_paper"])
def test_paper_presets_hold_the_papers_values(preset: str) -> None:
    """Section 9: 512 documents, 16 rollouts of 2048 tokens at temperature 0.7, constant 1e-6, EMA
    0.999, no KL and no LM loss."""
    config = load_config(REPOSITORY / "configs" / f"{preset}.yaml")
    thought, objective, optim = config.thought, config.objective, config.optim
    assert (
        optim.batch_size,
        thought.group_size,
        thought.max_thought_tokens,
        thought.temperature,
    ) == (512, 16, 2048, 0.7)
    assert (
        optim.learning_rate,
        optim.schedule,
        optim.warmup_steps,
        config.baseline.kind,
        config.baseline.ema_decay,
    ) == (1e-6, "constant", 0, "ema", 0.999)
    assert (
        objective.lm_weight,
        objective.kl_weight,
        config.position.per_document,
        config.target.horizon,
    ) == (0, 0, 1, 1)


def test_arms_differ_from_the_paper_preset_in_their_objective_alone() -> None:
    paper, mixed, cpt = (
        load_config(REPOSITORY / "configs" / f"qwen3_1p7b_{arm}.yaml")
        for arm in ("paper", "mixed", "cpt")
    )
    assert dataclasses.replace(mixed, run=paper.run, objective=paper.objective) == paper
    assert (cpt.data, cpt.budget, cpt.optim.batch_size, cpt.optim.learning_rate) == (
        paper.data,
        paper.budget,
        paper.optim.batch_size,
        paper.optim.learning_rate,
    )
    assert (cpt.objective.policy_weight, cpt.objective.lm_weight) == (0, 1)
