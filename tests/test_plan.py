"""The plan, by hand: memory under each ZeRO stage, FLOPs by phase, budget and disk; and the committed configs."""

import ast
import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, GPTNeoXConfig, LlamaConfig, PretrainedConfig, Qwen3Config

from rlp.config import Config, ConfigError, load_config
from rlp.data import Document, Positions
from rlp.layout import ThoughtFormat, Thoughts, repeated
from rlp.ledger import PHASES, ModelShapes, forward_flops, model_shapes
from rlp.model import Markers
from rlp.plan import (
    BUCKET_ELEMENTS,
    LOGITS_TILE_BYTES,
    activation_bytes,
    cache_bytes,
    checkpoint_bytes,
    fits,
    gradient_bytes,
    optimizer_bytes,
    plan_run,
    positions_per_document,
    render_plan,
    step_flops,
    weight_bytes,
)

ROOT = Path(__file__).parents[1]
SHAPES = ModelShapes(parameters=1000, matmul_parameters=100, scan_multiply_adds=0, attention_layers=2, query_key_width=8, value_width=8,
                     key_value_elements=32, state_elements=50, layers=2, activation_elements=300, layer_activation_elements=140, width=5, vocabulary=7, tied=False)
EIGHTY_GB = 80 * 10**9


def small_run(tmp_path: Path, *overrides: str) -> Config:
    """B 4, P 10, G 3, L 6, H 1, one position per document, no LM loss, on a GPU in bfloat16 unless overridden."""
    path = tmp_path / "run.yaml"
    path.write_text("run: {dir: " + str(tmp_path / "absent" / "run") + "}\nmodel: {path: nowhere}\ndata: {train: [x.jsonl]}\n")
    given = ["data.max_document_tokens=10", "optim.batch_size=4", "thought.group_size=3", "thought.max_thought_tokens=6", "objective.lm_weight=0", "budget.steps=7"]
    return load_config(path, [*given, *overrides])


def parts(config: Config, world_size: int = 2, device_bytes: int | None = EIGHTY_GB) -> dict[str, int]:
    return {part.name: part.num_bytes for part in plan_run(config, SHAPES, world_size, device_bytes).memory}


# 1000 parameters, 4 ranks; bfloat16 at stages 1 to 3, where stage 0 does not exist.
@pytest.mark.parametrize("stage, weights, gradients", [(1, 2000, 6000), (2, 2000, 1500), (3, 500, 1500)])
def test_weights_and_gradients_of_each_stage_in_bfloat16(stage: int, weights: int, gradients: int) -> None:
    assert weight_bytes(1000, 2, stage, 4) == weights
    assert gradient_bytes(1000, 2, stage, 4) == gradients


@pytest.mark.parametrize("stage, weights, gradients, master, moments", [
    (0, 4000, 4000, 0, 8000), (1, 4000, 4000, 1000, 2000), (2, 4000, 1000, 1000, 2000), (3, 1000, 1000, 1000, 2000)])
def test_state_of_each_stage_in_float32(stage: int, weights: int, gradients: int, master: int, moments: int) -> None:
    assert weight_bytes(1000, 4, stage, 4) == weights
    assert gradient_bytes(1000, 4, stage, 4) == gradients
    assert optimizer_bytes(1000, stage, 4, ema=False) == {"master weights": master, "two moments": moments, "EMA of the weights": 0}


def test_sizes_that_do_not_divide_are_rounded_up() -> None:
    assert optimizer_bytes(1001, 1, 3, ema=True) == {"master weights": 1335, "two moments": 2670, "EMA of the weights": 1335}


def test_the_lm_loss_adds_document_rows_to_a_micro_batch(tmp_path: Path) -> None:
    """Two documents: 6 rows of thoughts and 2 of documents, all padded to 17 tokens."""
    config = small_run(tmp_path, "objective.lm_weight=0.1", "optim.micro_batch_size=2")
    found = parts(config)
    assert found["activations"] == (6 + 2) * 17 * 2 * 300
    assert found["LM head and logits tile"] == (6 * 7 + 2 * (9 + 2)) * 5 * 6 + 7 * 5 * 2 + LOGITS_TILE_BYTES


def test_activations_by_hand() -> None:
    """10 tokens x 2 bytes: 300 numbers each; or (2 layers + 3 copies of the norm) x width 5 + the largest layer's 140."""
    assert activation_bytes(SHAPES, 10, 2, checkpointing=False) == 10 * 2 * 300
    assert activation_bytes(SHAPES, 10, 2, checkpointing=True) == 10 * 2 * (5 * 5 + 140)


def test_cache_by_hand() -> None:
    """3 rows: 16 tokens of 32 numbers in 2 bytes, and 50 numbers of state in 4."""
    assert cache_bytes(SHAPES, 3, 16, 2) == 3 * (16 * 32 * 2 + 50 * 4)


def test_parts_of_a_run_by_hand(tmp_path: Path) -> None:
    """2 ranks, stage 1, bfloat16, one document per micro-batch: 3 rows of 9 + 2 + 6 tokens."""
    config = small_run(tmp_path, "engine.activation_checkpointing=true")
    assert parts(config) == {
        "weights": 2000, "gradients": 6000, "master weights": 2000, "two moments": 4000, "EMA of the weights": 2000, "teacher": 2000,
        "starting checkpoint (KL)": 0, "communication buckets": 0, "gathered weights": 0,
        # Two documents a rank, all six thoughts side by side.
        "keys, values and states": 6 * (17 * 64 + 200), "next-token softmax": 6 * 7 * 32,
        "gathered layers": 0, "activations": 3 * 16 * 2 * 165 + 3 * 2 * 165,
        "LM head and logits tile": 3 * (6 + 1) * 5 * 6 + 7 * 5 * 2 + LOGITS_TILE_BYTES,
    }


def test_stage_3_shards_the_copies_and_gathers_to_sample(tmp_path: Path) -> None:
    config = small_run(tmp_path, "engine.zero_stage=3", "objective.kl_weight=0.1")
    found = parts(config)
    assert (found["weights"], found["teacher"], found["starting checkpoint (KL)"], found["gathered weights"]) == (1000, 1000, 1000, 2000)
    assert [parts(small_run(tmp_path, f"engine.zero_stage={stage}"))["communication buckets"] for stage in (1, 2, 3)] == [0, 2 * BUCKET_ELEMENTS, 2 * BUCKET_ELEMENTS]
    large = dataclasses.replace(SHAPES, parameters=3 * 10**9)
    synced = plan_run(small_run(tmp_path, "engine.zero_stage=3", "engine.generation=synced"), large, 2, EIGHTY_GB)
    assert {part.name: part.num_bytes for part in synced.memory}["gathered weights"] == 2 * 10**9


@pytest.mark.parametrize("kind, teacher", [("ema", 2000), ("frozen", 2000), ("self", 0), ("none", 0)])
def test_only_a_baseline_with_its_own_weights_holds_a_copy(tmp_path: Path, kind: str, teacher: int) -> None:
    assert parts(small_run(tmp_path, f"baseline.kind={kind}"))["teacher"] == teacher


def test_an_offloaded_optimizer_moves_to_the_host(tmp_path: Path) -> None:
    here, there = (plan_run(small_run(tmp_path, f"engine.offload_optimizer={offload}"), SHAPES, 2, EIGHTY_GB) for offload in ("false", "true"))
    assert there.host_bytes == 8000 and here.host_bytes == 0
    assert here.bytes_during("update") - there.bytes_during("update") == 8000


def test_the_peak_is_the_larger_of_sampling_and_update(tmp_path: Path) -> None:
    plan = plan_run(small_run(tmp_path), SHAPES, 2, EIGHTY_GB)
    always = sum(part.num_bytes for part in plan.memory if part.when == "always")
    assert plan.bytes_during("sampling") + plan.bytes_during("update") == sum(part.num_bytes for part in plan.memory) + always
    assert plan.peak_bytes == max(plan.bytes_during("sampling"), plan.bytes_during("update"))


def test_a_plan_fits_where_six_percent_stay_free(tmp_path: Path) -> None:
    plan = plan_run(small_run(tmp_path), SHAPES, 2)
    assert fits(plan, int(plan.peak_bytes / 0.94) + 1)
    assert not fits(plan, int(plan.peak_bytes / 0.94) - 1)


def test_a_cpu_is_planned_in_float32(tmp_path: Path) -> None:
    assert parts(small_run(tmp_path), device_bytes=None)["weights"] == 4000
    assert plan_run(small_run(tmp_path), SHAPES, 1).dtype == "float32"


def test_flops_of_a_step_by_hand(tmp_path: Path) -> None:
    """B 4, G 3, P 10, L 6. Per token 200, per pair 2 * 2 * 16 = 64, per head row 70."""
    flops = step_flops(small_run(tmp_path, "objective.lm_weight=0.1", "position.selector=surprisal"), SHAPES)
    assert tuple(flops) == PHASES
    # Prefix of 9 tokens and the open marker; then 5 tokens see 10 before them.
    assert flops["prefill"] == 4 * (10 * 200 + 55 * 64 + 70)
    assert flops["decode"] == 12 * (5 * 200 + (50 + 15) * 64 + 5 * 70)
    # Prefix, open marker, 6 tokens, close marker; heads for the 6 tokens and the target.
    assert flops["train"] == 3 * 12 * (17 * 200 + 153 * 64 + 7 * 70)
    assert flops["teacher"] == 4 * (10 * 200 + 55 * 64 + 2 * 70)
    # Nine targets of the LM loss, and the policy's own no-think log-probability of the target and the open marker.
    assert flops["lm"] == 3 * 4 * (10 * 200 + 55 * 64 + (9 + 2) * 70)
    assert flops["score"] == 4 * (10 * 200 + 55 * 64 + 9 * 70)


def test_flops_of_the_update_are_those_of_the_layout_it_runs(tmp_path: Path) -> None:
    """The longest documents, positions at their end, thoughts cut by the budget."""
    config = small_run(tmp_path, "objective.lm_weight=1", "target.horizon=2")
    documents = [Document(id=i, tokens=np.arange(10)) for i in range(4)]
    positions = Positions(document=np.arange(4), position=np.full(4, 8), target=np.tile(np.arange(8, 10), (4, 1)))
    full = torch.ones(4, 3, 6, dtype=torch.bool)
    thoughts = Thoughts(tokens=full.long(), mask=full, behavior_logprob=full.float(), entropy=full.float(), truncated=full[:, :, 0])
    form = ThoughtFormat(markers=Markers(open=(1,), close=(2,)), instruction=(), begin=None, temperature=1.0, target_temperature=1.0, horizon=2)
    layout = repeated(documents, positions, thoughts, form, lm=True, no_think=True, device=torch.device("cpu"))
    flops = step_flops(config, SHAPES)
    assert flops["train"] == 3 * forward_flops(SHAPES, layout.thought_work)
    assert flops["lm"] == 3 * forward_flops(SHAPES, layout.document_work)


def test_a_baseline_on_some_steps_and_a_kl_term_change_the_teacher_phase(tmp_path: Path) -> None:
    every = step_flops(small_run(tmp_path), SHAPES)
    assert step_flops(small_run(tmp_path, "baseline.every_n_steps=4"), SHAPES)["teacher"] == every["teacher"] / 4
    assert step_flops(small_run(tmp_path, "baseline.kind=none"), SHAPES)["teacher"] == 0
    assert step_flops(small_run(tmp_path, "objective.kl_weight=0.1"), SHAPES)["teacher"] == every["teacher"] + every["train"] / 3


def test_pretraining_alone_costs_the_lm_phase_alone(tmp_path: Path) -> None:
    plan = plan_run(small_run(tmp_path, "objective.policy_weight=0", "objective.lm_weight=1", "baseline.kind=none"), SHAPES, 2)
    assert {phase for phase, flops in plan.phase_flops.items() if flops} == {"lm"}
    assert plan.bytes_during("sampling") == sum(part.num_bytes for part in plan.memory if part.when == "always")


def test_all_positions_of_a_document(tmp_path: Path) -> None:
    """Of ten tokens, those at 3 to 8 have three before them and two to predict."""
    assert positions_per_document(small_run(tmp_path, "position.per_document=all", "position.min_prefix_tokens=3", "target.horizon=2")) == 6
    with pytest.raises(ConfigError, match="has 9 positions, got 12"):
        positions_per_document(small_run(tmp_path, "position.per_document=12"))


def test_the_first_limit_of_the_budget_ends_the_run(tmp_path: Path) -> None:
    """A step reads 40 document tokens and at most 72 thought tokens."""
    step = sum(step_flops(small_run(tmp_path), SHAPES).values())
    assert plan_run(small_run(tmp_path), SHAPES, 2).steps == 7
    assert plan_run(small_run(tmp_path, "budget.tokens=121"), SHAPES, 2).steps == 4
    assert plan_run(small_run(tmp_path, f"budget.flops={2.5 * step}"), SHAPES, 2).steps == 3
    assert plan_run(small_run(tmp_path), SHAPES, 2).paper_flops == 7 * (72 + 40)


def test_disk_is_measured_where_the_run_folder_will_be(tmp_path: Path) -> None:
    config = small_run(tmp_path, "checkpoint.keep=2")
    plan = plan_run(config, SHAPES, 2)
    assert (plan.checkpoint_bytes, plan.disk_bytes) == (16_000, 48_000)
    assert plan.disk_free_bytes > 0
    assert checkpoint_bytes(small_run(tmp_path, "baseline.kind=frozen"), 1000) == 12_000


def test_the_rendered_plan_says_what_does_not_fit(tmp_path: Path) -> None:
    plan = plan_run(small_run(tmp_path), SHAPES, 2, 10**6)
    text = render_plan(dataclasses.replace(plan, disk_free_bytes=1))
    assert "DOES NOT FIT in 0.00 GB" in text and "NOT ENOUGH DISK" in text
    assert "DOES NOT FIT" not in render_plan(plan_run(small_run(tmp_path), SHAPES, 2, EIGHTY_GB))
    assert text.isascii()


WIDE = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 97}


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
# Grouped heads with norms on them, plain, and fused LayerNorms, which keep less than the estimate says.
@pytest.mark.parametrize("config, most", [
    (Qwen3Config(**WIDE, num_key_value_heads=2, head_dim=64), 1.35), (LlamaConfig(**WIDE, num_key_value_heads=2), 1.35), (GPTNeoXConfig(**WIDE), 1.75)])
def test_activations_are_not_below_what_autograd_saves(config: PretrainedConfig, most: float) -> None:
    shapes = model_shapes(config)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=torch.bfloat16).train()
    tokens = torch.zeros(2, 64, dtype=torch.int64)
    assert 1 <= activation_bytes(shapes, 128, 2, checkpointing=False) / saved_bytes(model, tokens) <= most
    model.gradient_checkpointing_enable()
    # Only the inputs of the layers and the last norm are kept until a layer is run again.
    inputs = activation_bytes(dataclasses.replace(shapes, layer_activation_elements=0), 128, 2, checkpointing=True)
    assert 0.95 <= inputs / saved_bytes(model, tokens) <= most


def saved_bytes(model: torch.nn.Module, tokens: torch.Tensor) -> int:
    """Bytes of the distinct tensors, other than weights, that autograd keeps for the backward pass."""
    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    kept = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            # The tensor is held, so that no later one is given its address.
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.base_model(input_ids=tokens, use_cache=False)
    return sum(num_bytes for num_bytes, _ in kept.values())


def published(name: str) -> ModelShapes:
    return model_shapes(AutoConfig.for_model(**json.loads((ROOT / "tests" / "shapes" / f"{name}.json").read_text())))


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_committed_config_loads(path: Path) -> None:
    assert load_config(path).run.dir.startswith("runs/")


PRESETS = {"qwen3_1p7b_paper": "qwen3_1p7b", "qwen3_1p7b_mixed": "qwen3_1p7b", "qwen3_1p7b_cpt": "qwen3_1p7b", "nemotron_nano_12b_v2_paper": "nemotron_nano_12b_v2"}


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_fit_eight_devices_of_80_gb(preset: str) -> None:
    config = load_config(ROOT / "configs" / f"{preset}.yaml")
    assert fits(plan_run(config, published(PRESETS[preset]), 8, EIGHTY_GB), EIGHTY_GB)
    assert config.optim.batch_size % (8 * config.optim.micro_batch_size) == 0


@pytest.mark.parametrize("preset", ["qwen3_1p7b_paper", "nemotron_nano_12b_v2_paper"])
def test_paper_presets_hold_the_papers_values(preset: str) -> None:
    """Section 9: 512 documents, 16 rollouts of 2048 tokens at temperature 0.7, constant 1e-6, EMA 0.999, no KL and no LM loss."""
    config = load_config(ROOT / "configs" / f"{preset}.yaml")
    thought, objective, optim = config.thought, config.objective, config.optim
    assert (optim.batch_size, thought.group_size, thought.max_thought_tokens, thought.temperature) == (512, 16, 2048, 0.7)
    assert (optim.learning_rate, optim.schedule, optim.warmup_steps, config.baseline.kind, config.baseline.ema_decay) == (1e-6, "constant", 0, "ema", 0.999)
    assert (objective.lm_weight, objective.kl_weight, config.position.per_document, config.target.horizon) == (0, 0, 1, 1)


def test_arms_differ_from_the_paper_preset_in_their_objective_alone() -> None:
    paper, mixed, cpt = (load_config(ROOT / "configs" / f"qwen3_1p7b_{arm}.yaml") for arm in ("paper", "mixed", "cpt"))
    assert dataclasses.replace(mixed, run=paper.run, objective=paper.objective) == paper
    assert (cpt.data, cpt.budget, cpt.optim.batch_size, cpt.optim.learning_rate) == (paper.data, paper.budget, paper.optim.batch_size, paper.optim.learning_rate)
    assert (cpt.objective.policy_weight, cpt.objective.lm_weight) == (0, 1)


# Both look up only, and neither pulls in DeepSpeed or a tracker by itself.
@pytest.mark.parametrize("module, above", [("ledger", {"distributed", "layout"}), ("plan", {"config", "layout", "ledger", "model"})])
def test_the_arithmetic_imports_only_what_is_above_it(module: str, above: set[str]) -> None:
    tree = ast.parse((ROOT / "rlp" / f"{module}.py").read_text())
    names = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    names |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    assert {name.removeprefix("rlp.") for name in names if name.startswith("rlp")} == above
    assert not any(name.startswith(("deepspeed", "wandb")) for name in names)
