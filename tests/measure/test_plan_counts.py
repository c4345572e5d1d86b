"""What is planned is what is counted: the layout's own work, and what autograd saves."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GPTNeoXConfig,
    LlamaConfig,
    PretrainedConfig,
    Qwen3Config,
)

from rlp.config import Config
from rlp.data.documents import Document
from rlp.data.positions import Positions
from rlp.measure.plan import plan_run
from rlp.measure.plan_memory import LOGITS_TILE_BYTES, activation_bytes
from rlp.measure.plan_work import FormatTokens, step_flops
from rlp.model import attention, slot_attention
from rlp.model.layout import LAYOUTS, Layout, tree_layout
from rlp.model.markers import Markers
from rlp.model.shapes import forward_flops, model_shapes
from rlp.model.thoughts import ThoughtFormat, Thoughts
from rlp.sampling import shared_slots
from rlp.sampling.rollout import NoiseKey
from tests.measure.small_plans import CPU, EIGHTY_GB, SHAPES, flops_of, plan_of, small_run
from tests.sampled import sample_thoughts
from tests.tiny_models import architecture, random_documents, tiny_policy

FORMS = [
    (1, (), Markers(open=(2,), close=(3,))),
    (2, (7, 8, 9), Markers(open=(2, 4), close=(3, 5, 6, 2, 4, 3, 5))),
]
"""Horizon, instruction and markers; the long close marker does not fit into six sampled tokens, so
no thought ends early."""


@dataclasses.dataclass(frozen=True, slots=True)
class Longest:
    """A step of documents of 10 tokens, all positions at their end, and thoughts cut by the
    budget."""

    documents: list[Document]
    positions: Positions
    thought_format: ThoughtFormat

    @classmethod
    def of(cls, config: Config, instruction: tuple[int, ...], markers: Markers) -> "Longest":
        horizon, per_document = config.target.horizon, config.position.per_document
        documents = random_documents([10] * 4)
        index = np.arange(4).repeat(per_document)
        positions = Positions(
            document=index,
            position=np.full(len(index), 10 - horizon),
            target=np.stack([documents[d].tokens[-horizon:] for d in index]),
        )
        return cls(
            documents,
            positions,
            ThoughtFormat(
                markers=markers,
                instruction=instruction,
                begin=None,
                temperature=1.0,
                target_temperature=1.0,
                horizon=horizon,
            ),
        )

    def thoughts(self) -> Thoughts:
        full = torch.ones(len(self.positions.position), 3, 6, dtype=torch.bool)
        return Thoughts(
            tokens=full.long(),
            mask=full,
            behavior_logprob=full.float(),
            entropy=full.float(),
            truncated=full[:, :, 0],
        )

    def arranged(self, layout: str, group: slice, *, lm: bool) -> Layout:
        return LAYOUTS[layout](
            self.documents,
            self.positions,
            self.thoughts().siblings(group),
            self.thought_format,
            lm=lm,
            no_think=lm,
            device=CPU,
        )

    @property
    def tokens(self) -> FormatTokens:
        return FormatTokens(
            open=len(self.thought_format.markers.open),
            close=len(self.thought_format.markers.close),
            instruction=len(self.thought_format.instruction),
        )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("horizon, instruction, markers", FORMS)
@pytest.mark.parametrize("lm_weight", [0, 1])
@pytest.mark.parametrize("per_document, thoughts_per_forward", [(1, 3), (2, 3), (2, 2), (1, 1)])
def test_the_update_is_planned_as_its_layout_counts_it(
    tmp_path, layout, horizon, instruction, markers, lm_weight, per_document, thoughts_per_forward
) -> None:
    """FLOPs of every phase, and tokens and queries of the largest forward, slice by slice as the
    training loop arranges them."""
    config = small_run(
        tmp_path,
        f"objective.lm_weight={lm_weight}",
        f"target.horizon={horizon}",
        f"position.per_document={per_document}",
        f"optim.thoughts_per_forward={thoughts_per_forward}",
        "optim.micro_batch_size=4",
    )
    step = Longest.of(config, instruction, markers)
    slices = [
        slice(first, first + thoughts_per_forward) for first in range(0, 3, thoughts_per_forward)
    ]
    update = [
        step.arranged(layout, group, lm=lm_weight > 0 and group.start == 0) for group in slices
    ]
    flops = step_flops(config, SHAPES, 1, layout=layout, format_tokens=step.tokens)
    assert flops["train"] == 3 * sum(forward_flops(SHAPES, part.thought_work) for part in update)
    assert flops["lm"] == 3 * sum(forward_flops(SHAPES, part.document_work) for part in update)
    ahead = [step.arranged(layout, group, lm=False) for group in slices] if len(slices) > 1 else []
    assert flops["score"] == sum(forward_flops(SHAPES, part.thought_work) for part in ahead)
    no_think = LAYOUTS[layout](
        step.documents,
        step.positions,
        None,
        step.thought_format,
        lm=False,
        no_think=True,
        device=CPU,
    )
    assert flops["teacher"] == forward_flops(SHAPES, no_think.document_work)
    found = {
        part.name: part.num_bytes
        for part in plan_run(
            config, SHAPES, 1, EIGHTY_GB, layout=layout, format_tokens=step.tokens
        ).memory
    }
    assert found["activations"] == max(part.tokens.numel() for part in update) * 2 * 300
    assert (
        found["LM head and logits tile"] - LOGITS_TILE_BYTES - 7 * 5 * 2
        == max(part.row.numel() for part in update) * 5 * 6
    )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("per_document, rows", [(1, 3), (1, 6), (2, 6), (3, 6), (2, 3)])
def test_sampling_is_planned_as_it_is_counted(
    tmp_path, monkeypatch, layout, per_document, rows
) -> None:
    """A real rollout in which no thought ends early: its ledger is the plan, to the last FLOP and
    byte."""
    horizon, instruction, markers = FORMS[1]
    config = small_run(
        tmp_path,
        f"target.horizon={horizon}",
        f"position.per_document={per_document}",
        f"sampling.slots={rows}",
    )
    step, policy = Longest.of(config, instruction, markers), tiny_policy(markers=markers)
    policy.lm.set_attn_implementation(attention.register("sdpa"))
    held = watched_keys(monkeypatch)
    found = sample_thoughts(
        policy,
        step.documents,
        step.positions,
        step.thought_format,
        NoiseKey(0, 1),
        group_size=3,
        max_thought_tokens=6,
        slots=rows,
        shared=layout == "tree",
    )
    assert found.thoughts.mask.all() and found.thoughts.truncated.all()
    shapes = model_shapes(architecture("qwen3"))
    flops = step_flops(config, shapes, 1, layout=layout, format_tokens=step.tokens)
    assert flops["decode"] == forward_flops(shapes, found.decode_work)
    assert flops["prefill"] == forward_flops(shapes, found.prefill_work)
    if layout == "tree":
        plan = plan_run(config, shapes, 1, layout=layout, format_tokens=step.tokens)
        assert {part.name: part.num_bytes for part in plan.memory}[
            "keys, values and states"
        ] == sum(keys.num_bytes() for keys in held)


def watched_keys(monkeypatch: pytest.MonkeyPatch) -> list[slot_attention.SlotKeys]:
    """All that a rollout makes."""
    made = []

    class Watched(slot_attention.SlotKeys):
        def __init__(self, **arguments: object) -> None:
            super().__init__(**arguments)
            made.append(self)

    monkeypatch.setattr(shared_slots, "SlotKeys", Watched)
    return made


def test_a_baseline_on_some_steps_and_a_kl_term_change_the_teacher_phase(tmp_path: Path) -> None:
    every = flops_of(small_run(tmp_path))
    assert (
        flops_of(small_run(tmp_path, "baseline.every_n_steps=4"))["teacher"] == every["teacher"] / 4
    )
    assert flops_of(small_run(tmp_path, "baseline.kind=none"))["teacher"] == 0
    assert (
        flops_of(small_run(tmp_path, "objective.kl_weight=0.1"))["teacher"]
        == every["teacher"] + every["train"] / 3
    )
    lm = flops_of(small_run(tmp_path, "objective.lm_weight=0.1"), "tree")
    assert (
        flops_of(small_run(tmp_path, "objective.lm_weight=0.1", "objective.kl_weight=0.1"), "tree")[
            "teacher"
        ]
        == lm["teacher"] + (lm["train"] + lm["lm"]) / 3
    )


def test_pretraining_alone_costs_the_lm_phase_alone(tmp_path: Path) -> None:
    plan = plan_of(
        small_run(
            tmp_path, "objective.policy_weight=0", "objective.lm_weight=1", "baseline.kind=none"
        )
    )
    assert {phase for phase, flops in plan.phase_flops.items() if flops} == {"lm"}
    assert plan.bytes_during("sampling") == sum(
        part.num_bytes for part in plan.memory if part.when == "always"
    )


WIDE = {
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "vocab_size": 97,
}


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
# Grouped heads with norms on them, plain, and fused LayerNorms, which keep less than the estimate
# says.
@pytest.mark.parametrize(
    "config, most",
    [
        (Qwen3Config(**WIDE, num_key_value_heads=2, head_dim=64), 1.35),
        (LlamaConfig(**WIDE, num_key_value_heads=2), 1.35),
        (GPTNeoXConfig(**WIDE), 1.75),
    ],
)
def test_activations_are_not_below_what_autograd_saves(
    config: PretrainedConfig, most: float
) -> None:
    shapes = model_shapes(config)
    model = AutoModelForCausalLM.from_config(
        config, attn_implementation="sdpa", dtype=torch.bfloat16
    ).train()
    tokens = torch.zeros(2, 64, dtype=torch.int64)
    assert (
        1
        <= activation_bytes(shapes, 128, 2, checkpointing=False) / saved_bytes(model, tokens)
        <= most
    )
    model.gradient_checkpointing_enable()
    # Only the inputs of the layers and the last norm are kept until a layer is run again.
    inputs = activation_bytes(
        dataclasses.replace(shapes, layer_activation_elements=0), 128, 2, checkpointing=True
    )
    assert 0.95 <= inputs / saved_bytes(model, tokens) <= most


def test_activations_of_a_tree_are_not_below_what_autograd_saves() -> None:
    """Copies of queries, keys and values by segment stand in for those of the row; bounds as for
    rows."""
    config = Qwen3Config(**WIDE, num_key_value_heads=2, head_dim=64)
    model = AutoModelForCausalLM.from_config(
        config, attn_implementation=attention.register("sdpa"), dtype=torch.bfloat16
    ).train()
    documents = random_documents([32, 32])
    positions = Positions(
        document=np.arange(2), position=np.array([31, 31]), target=np.zeros((2, 1), dtype=np.int64)
    )
    full = torch.ones(2, 4, 14, dtype=torch.bool)
    thought_format = ThoughtFormat(
        markers=Markers(open=(2,), close=(3,)),
        instruction=(),
        begin=None,
        temperature=1.0,
        target_temperature=1.0,
        horizon=1,
    )
    layout = tree_layout(
        documents,
        positions,
        Thoughts(full.long(), full, full.float(), full.float(), full[:, :, 0]),
        thought_format,
        lm=True,
        no_think=True,
        device=CPU,
    )
    saved = saved_bytes(
        model,
        layout.tokens,
        tree=layout.tree,
        position_ids=layout.position,
        attention_mask=layout.tokens.new_zeros(1, 1, 1, 1),
    )
    assert (
        1
        <= activation_bytes(model_shapes(config), layout.tokens.numel(), 2, checkpointing=False)
        / saved
        <= 1.35
    )


def saved_bytes(model: torch.nn.Module, tokens: torch.Tensor, **packed: object) -> int:
    """Bytes of the distinct tensors, other than weights, that autograd keeps for the backward
    pass."""
    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    kept = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            # The tensor is held, so that no later one is given its address.
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.base_model(input_ids=tokens, use_cache=False, **packed)
    return sum(num_bytes for num_bytes, _ in kept.values())
