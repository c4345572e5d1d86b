"""The ledger counts what the model does: FLOPs against torch's counter, caches against
transformers."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    DeepseekV3Config,
    DiffLlamaConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MambaConfig,
    MixtralConfig,
    NemotronHConfig,
    PretrainedConfig,
    Qwen3Config,
    RecurrentGemmaConfig,
    Zamba2Config,
)
from transformers.pytorch_utils import Conv1D

from rlp.measure.ledger import PHASES, Ledger
from rlp.model.shapes import (
    ModelShapes,
    Work,
    causal_pairs,
    forward_flops,
    in_out,
    is_as_its_config_says,
    model_shapes,
)
from rlp.process.ranks import Ranks

SMALL = {
    "hidden_size": 64,
    "vocab_size": 97,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 96,
}
STATE_SPACE = {
    "ssm_state_size": 8,
    "mamba_num_heads": 8,
    "mamba_head_dim": 16,
    "n_groups": 2,
    "chunk_size": 16,
}
CONFIGS = {
    "qwen3": Qwen3Config(**SMALL, num_key_value_heads=2, head_dim=32, tie_word_embeddings=True),
    "gpt_neox": GPTNeoXConfig(**SMALL),
    "llama": LlamaConfig(**SMALL, num_key_value_heads=2),
    "gpt2": GPT2Config(n_embd=64, n_layer=3, n_head=4, vocab_size=97),
    "mixtral": MixtralConfig(
        **SMALL, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2
    ),
    "deepseek_v3": DeepseekV3Config(
        **SMALL,
        num_key_value_heads=4,
        q_lora_rank=32,
        kv_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=16,
        v_head_dim=16,
        n_routed_experts=8,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=1,
        moe_intermediate_size=32,
    ),
    "diffllama": DiffLlamaConfig(**SMALL, num_key_value_heads=2),
    "mamba": MambaConfig(hidden_size=64, vocab_size=97, num_hidden_layers=3, state_size=4),
    "nemotron_h": NemotronHConfig(
        hidden_size=64,
        vocab_size=97,
        hybrid_override_pattern="M-*M",
        intermediate_size=96,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        **STATE_SPACE,
    ),
}
HAND = ModelShapes(
    parameters=1000,
    matmul_parameters=100,
    scan_multiply_adds=10,
    attention_layers=2,
    query_key_width=8,
    value_width=4,
    key_value_elements=32,
    state_elements=0,
    layers=2,
    activation_elements=300,
    layer_activation_elements=140,
    width=5,
    vocabulary=7,
    tied=False,
)


def published(name: str) -> PretrainedConfig:
    """The architecture of a published model, its numbers copied from its config.json."""
    return AutoConfig.for_model(
        **json.loads((Path(__file__).parent / "shapes" / f"{name}.json").read_text())
    )


def build(config: PretrainedConfig) -> torch.nn.Module:
    torch.manual_seed(0)
    # The counter misses fused attention on a CPU and grouped expert products everywhere: both
    # written out.
    return AutoModelForCausalLM.from_config(
        config, attn_implementation="eager", experts_implementation="eager"
    )


def counted_flops(model: torch.nn.Module, tokens: torch.Tensor, *, backward: bool) -> dict:
    with FlopCounterMode(display=False) as counter:
        logits = model(input_ids=tokens, use_cache=False).logits
        if backward:
            logits.sum().backward()
    return counter.get_flop_counts()["Global"]


@pytest.mark.parametrize("turn", ["first", "second"])
def test_each_test_begins_with_torchs_own_linear(turn: str):
    """Whatever the one before has put in its place, as ZeRO-3 does: the counter would see another
    operation."""
    hidden, head, bias = torch.ones(1, 2), torch.ones(3, 2), torch.ones(3)
    with FlopCounterMode(display=False) as counter:
        torch.nn.functional.linear(hidden, head, bias)
    assert counter.get_flop_counts()["Global"] == {torch.ops.aten.addmm: 2 * 1 * 2 * 3}
    torch.nn.functional.linear = lambda hidden, head, bias: hidden @ head.T + bias


def full_square(tokens: torch.Tensor) -> Work:
    """The counter sees the whole T x T square of query-key pairs, and the head on every row."""
    rows, length = tokens.shape
    return Work(tokens=rows * length, pairs=rows * length * length, head_rows=rows * length)


@pytest.fixture(scope="module")
def tokens() -> torch.Tensor:
    return torch.randint(0, 97, (2, 48), generator=torch.Generator().manual_seed(0))


# Grouped heads and tied, fused projections, plain, transposed weights, experts, latent attention,
# attention with half of the value heads twice.
@pytest.mark.parametrize(
    "name", ["qwen3", "gpt_neox", "llama", "gpt2", "mixtral", "deepseek_v3", "diffllama"]
)
@pytest.mark.parametrize("backward", [False, True])
def test_flops_are_those_of_the_flop_counter(
    name: str, backward: bool, tokens: torch.Tensor
) -> None:
    ours = forward_flops(model_shapes(CONFIGS[name]), full_square(tokens)) * (3 if backward else 1)
    assert ours == pytest.approx(
        sum(counted_flops(build(CONFIGS[name]), tokens, backward=backward).values()), rel=0.01
    )


def test_flops_of_mamba_are_those_of_the_flop_counter(tokens: torch.Tensor) -> None:
    """Its reading of the state is a matrix product, its update is not: the counter sees half of our
    scan.

    Forward only: the counter takes the backward of a depthwise convolution for that of a dense one.
    """
    shapes = model_shapes(CONFIGS["mamba"])
    half_scan = dataclasses.replace(shapes, scan_multiply_adds=shapes.scan_multiply_adds // 2)
    assert forward_flops(half_scan, full_square(tokens)) == pytest.approx(
        sum(counted_flops(build(CONFIGS["mamba"]), tokens, backward=False).values()), rel=0.01
    )


def test_projections_of_a_hybrid_are_those_of_the_flop_counter(tokens: torch.Tensor) -> None:
    """Mamba-2 without its fused scan multiplies chunk by chunk, which is another algorithm: only
    its linear maps compare."""
    shapes, model = model_shapes(CONFIGS["nemotron_h"]), build(CONFIGS["nemotron_h"])
    convolutions = sum(
        module.weight.numel() for module in model.modules() if isinstance(module, torch.nn.Conv1d)
    )
    linear = dataclasses.replace(
        shapes,
        matmul_parameters=shapes.matmul_parameters - convolutions,
        scan_multiply_adds=0,
        attention_layers=0,
    )
    assert (
        forward_flops(linear, full_square(tokens))
        == counted_flops(model, tokens, backward=False)[torch.ops.aten.mm]
    )


@pytest.mark.parametrize("name", list(CONFIGS))
def test_parameters_are_counted_once(name: str) -> None:
    assert model_shapes(CONFIGS[name]).parameters == sum(
        weight.numel() for weight in build(CONFIGS[name]).parameters()
    )


@pytest.mark.parametrize("name", list(CONFIGS))
def test_cache_sizes_are_those_of_transformers(name: str, tokens: torch.Tensor) -> None:
    shapes, model = model_shapes(CONFIGS[name]), build(CONFIGS[name])
    for length in (8, 20):
        assert (
            cached_elements(model, tokens[:1, :length])
            == shapes.key_value_elements * length + shapes.state_elements
        )


@torch.no_grad()
def cached_elements(model: torch.nn.Module, tokens: torch.Tensor) -> int:
    output = model(input_ids=tokens, use_cache=True)
    cache = output["past_key_values"] if "past_key_values" in output else output["cache_params"]
    held = [value for layer in cache.layers for value in vars(layer).values()]
    tensors = [
        tensor
        for value in held
        for tensor in (value.values() if isinstance(value, dict) else [value])
    ]
    return sum(
        tensor.numel()
        for tensor in tensors
        if isinstance(tensor, torch.Tensor) and tensor.dim() > 1
    )


def test_a_scan_updates_and_reads_each_number_of_its_state() -> None:
    """Mamba: 3 layers of 128 channels x 4. Mamba-2: 2 layers of 8 heads x 16 x 8."""
    assert model_shapes(CONFIGS["mamba"]).scan_multiply_adds == 2 * 3 * 128 * 4
    assert model_shapes(CONFIGS["nemotron_h"]).scan_multiply_adds == 2 * 2 * 8 * 16 * 8


def test_the_transposed_weights_of_gpt2_are_read_the_right_way() -> None:
    assert in_out(Conv1D(nf=3, nx=5)) == in_out(torch.nn.Linear(5, 3)) == (5, 3)


def test_published_models_have_their_published_size() -> None:
    """Qwen3-1.7B: 1.7 B, 1.4 B without embeddings, tied. Nemotron-Nano-12B-v2: 12.31 B (its model
    card)."""
    qwen = model_shapes(published("qwen3_1p7b"))
    assert (round(qwen.parameters / 1e9, 2), round(qwen.matmul_parameters / 1e9, 2), qwen.tied) == (
        1.72,
        1.41,
        True,
    )
    nemotron = model_shapes(published("nemotron_nano_12b_v2"))
    assert (round(nemotron.parameters / 1e9, 2), nemotron.attention_layers, nemotron.tied) == (
        12.31,
        6,
        False,
    )


ZAMBA2 = Zamba2Config(
    hidden_size=64,
    vocab_size=97,
    num_hidden_layers=4,
    layers_block_type=["mamba", "hybrid", "mamba", "hybrid"],
    num_attention_heads=4,
    num_key_value_heads=4,
    mamba_d_state=8,
    n_mamba_heads=8,
    mamba_ngroups=1,
    chunk_size=16,
    intermediate_size=96,
    num_mem_blocks=1,
)


def test_a_weight_that_two_layers_share_is_counted_once_and_named() -> None:
    """Zamba2 runs one block in several places, with adapters of which each place has its own: how
    often is not told by the model."""
    shapes = model_shapes(ZAMBA2)
    assert any(name.endswith("gate_up_proj.weight") for name in shapes.uncounted)
    assert shapes.matmul_parameters < shapes.parameters


def test_layers_whose_cost_is_not_known_are_left_out_by_name(tokens: torch.Tensor) -> None:
    """The gates of RecurrentGemma, block by block; the rest is that of the flop counter."""
    config = RecurrentGemmaConfig(**SMALL, num_key_value_heads=1, head_dim=16, lru_width=64)
    shapes = model_shapes(config)
    gates = "model.layers.*.temporal_block.rg_lru."
    assert shapes.uncounted == (f"{gates}input_gate_weight", f"{gates}recurrent_gate_weight")
    body = dataclasses.replace(
        shapes, attention_layers=0, matmul_parameters=shapes.matmul_parameters - 2 * 4 * 64
    )  # without its two convolutions
    counted = counted_flops(build(config), tokens, backward=False)
    assert (
        forward_flops(body, full_square(tokens))
        == counted[torch.ops.aten.mm] + counted[torch.ops.aten.addmm]
    )
    assert Ledger(shapes).to_json()["counted_without"] == list(shapes.uncounted)
    assert Ledger(HAND).to_json()["counted_without"] == []


def test_an_attention_layer_that_its_config_does_not_describe_is_known() -> None:
    config = LlamaConfig(**SMALL)
    model = build(config)
    attention = model.model.layers[1].self_attn
    assert is_as_its_config_says(attention, 64, 64)
    attention.o_proj = torch.nn.Linear(48, 64, bias=False)
    assert not is_as_its_config_says(attention, 64, 64)


@pytest.mark.parametrize(
    "name, fields",
    [
        ("aria_text", {"moe_num_experts": 4, "moe_topk": 2}),
        ("ernie4_5_moe", {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 16}),
        ("hunyuan_v1_moe", {"num_experts": 4, "moe_topk": 2, "head_dim": 16}),
    ],
)
def test_experts_are_counted_whatever_the_config_calls_them(
    name: str, fields: dict, tokens: torch.Tensor
) -> None:
    config = CONFIG_MAPPING[name](**SMALL | fields, num_key_value_heads=2, pad_token_id=0)
    shapes = model_shapes(config)
    assert shapes.uncounted == ()
    assert forward_flops(shapes, full_square(tokens)) == pytest.approx(
        sum(counted_flops(build(config), tokens, backward=False).values()), rel=0.01
    )


def test_forward_flops_by_hand() -> None:
    """2 * (100 + 10) * 3 body, 2 * 2 * (8 + 4) * 6 attention, 2 * 5 * 7 * 2 head."""
    assert forward_flops(HAND, Work(tokens=3, pairs=6, head_rows=2)) == 660 + 288 + 140


def test_sampling_costs_what_one_pass_over_the_same_tokens_costs() -> None:
    """A prefix of 5 and then 4 tokens one by one see the same pairs as 9 tokens at once."""
    one_by_one = sum(
        (Work(1, causal_pairs(1, 5 + u), 1) for u in range(4)), Work(5, causal_pairs(5), 5)
    )
    assert one_by_one == Work(9, causal_pairs(9), 9)
    assert causal_pairs(4, 5) == 6 + 7 + 8 + 9


class TwoRanks(Ranks):
    """This rank, and another that did twice as much."""

    def gather(self, value: list) -> list:
        return [value, [2 * number for number in value]]


ALONE = type("Alone", (Ranks,), {"gather": lambda self, value: [value]})(
    rank=0, world_size=1, device=torch.device("cpu")
)
TWO = TwoRanks(rank=0, world_size=2, device=torch.device("cpu"))


def one_step(ledger: Ledger) -> None:
    ledger.add_documents(100)
    ledger.add_thoughts(6, max_thought_tokens=10, sampled_tokens=33)
    ledger.add("decode", Work(tokens=33), passes=1, tokens_in=5, tokens_generated=33)
    ledger.add("train", Work(tokens=40), passes=3, tokens_trained=33)
    ledger.add("train", Work(tokens=2), passes=3, tokens_trained=1)


def test_a_step_is_the_sum_over_the_ranks() -> None:
    ledger = Ledger(HAND)
    one_step(ledger)
    ledger._step.phases["decode"].seconds = 0.5
    step = ledger.close_step(TWO)
    assert step["phases"]["decode"] == {
        "tokens_in": 15,
        "tokens_generated": 99,
        "tokens_trained": 0,
        "flops": 3 * 220.0 * 33,
        "seconds": 1.0,
    }
    assert step["phases"]["train"]["tokens_trained"] == 102
    assert step["flops"] == 3 * (220.0 * 33 + 3 * 220.0 * 42)
    assert (step["input_tokens"], step["steps"], step["seconds"]) == (300, 1, 1.0)
    assert step["paper_flops"] == 3 * (6 * 10 + 100)
    assert step["paper_flops_sampled"] == 3 * (33 + 100)


def test_steps_add_up_and_the_next_one_starts_empty() -> None:
    ledger = Ledger(HAND)
    for _ in range(2):
        one_step(ledger)
        step = ledger.close_step(ALONE)
    total = ledger.to_json()
    assert set(total) == {
        "phases",
        "input_tokens",
        "flops",
        "paper_flops",
        "paper_flops_sampled",
        "seconds",
        "steps",
        "counted_without",
    }
    assert tuple(total["phases"]) == PHASES
    assert (total["flops"], total["input_tokens"], total["steps"]) == (2 * step["flops"], 200, 2)
    assert (ledger.flops, ledger.input_tokens, ledger.steps) == (total["flops"], 200, 2)


def test_a_resumed_ledger_goes_on_as_if_nothing_had_happened() -> None:
    straight, stopped, resumed = Ledger(HAND), Ledger(HAND), Ledger(HAND)
    for ledger in (straight, stopped):
        one_step(ledger)
        ledger.close_step(ALONE)
    resumed.load_state(json.loads(json.dumps(stopped.state())))
    for ledger in (straight, resumed):
        one_step(ledger)
        ledger.close_step(ALONE)
    assert resumed.state() == straight.state()
    assert resumed.to_json() == straight.to_json()


def test_the_state_of_an_open_step_is_refused() -> None:
    ledger = Ledger(HAND)
    ledger.add_documents(1)
    with pytest.raises(AssertionError, match="close_step first"):
        ledger.state()


def test_wrong_use_is_refused() -> None:
    ledger = Ledger(HAND)
    with pytest.raises(ValueError, match="passes must be 1"):
        ledger.add("train", Work(1), passes=2)
    with pytest.raises(
        ValueError, match="unknown phase 'sampling'; the phases are prefill, decode"
    ):
        ledger.add("sampling", Work(1), passes=1)
    state = ledger.state()
    del state["phases"]["lm"]
    with pytest.raises(ValueError, match="expected the keys"):
        ledger.load_state(state)


def test_time_is_counted_even_when_the_block_fails() -> None:
    ledger = Ledger(HAND)
    with pytest.raises(KeyError), ledger.time("score"):
        raise KeyError
    with ledger.time("score"):
        pass
    assert 0 < ledger.close_step(ALONE)["phases"]["score"]["seconds"] < 1


def test_an_inner_block_takes_its_seconds_from_the_outer_one(monkeypatch) -> None:
    """Seconds go where the FLOPs go: a pass of another phase inside a block is not the block's. The
    watchdog hears of both ends."""
    clock = iter([0.0, 1.0, 4.0, 4.5, 5.5, 10.0])
    monkeypatch.setattr("rlp.measure.ledger.time.perf_counter", lambda: next(clock))
    phases = []
    ledger = Ledger(HAND, on_phase=phases.append)
    with ledger.time("train"):
        with ledger.time("teacher"):
            pass
        with ledger.time("score"):
            pass
    seconds = {
        phase: count["seconds"]
        for phase, count in ledger.close_step(ALONE)["phases"].items()
        if count["seconds"]
    }
    assert seconds == {"train": 6.0, "teacher": 3.0, "score": 1.0}
    assert phases == ["train", "teacher", "train", "score", "train"]


def test_a_gpu_is_waited_for_when_the_step_is_closed_and_not_before(monkeypatch) -> None:
    """Its moments are events in its queue, read at the end: blocks in each other as on a clock."""
    waits, queue = [], iter([0.0, 1000.0, 4000.0, 10_000.0])

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.at_ms = next(queue)

        def synchronize(self) -> None:
            waits.append(self.at_ms)

        def elapsed_time(self, end: "Event") -> float:
            return end.at_ms - self.at_ms

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: waits.append("all"))
    ledger = Ledger(HAND)
    with ledger.time("train"), ledger.time("teacher"):
        pass
    assert not waits
    phases = ledger.close_step(ALONE)["phases"]
    assert (phases["train"]["seconds"], phases["teacher"]["seconds"]) == (7.0, 3.0)
    assert sorted(waits) == [4000.0, 10_000.0]


def test_phases_that_share_a_pass_divide_its_seconds_as_its_flops(monkeypatch) -> None:
    """Three quarters of the FLOPs, three quarters of the seconds; to the first phase where none has
    any."""
    clock = iter([0.0, 8.0, 8.0, 10.0])
    monkeypatch.setattr("rlp.measure.ledger.time.perf_counter", lambda: next(clock))
    ledger = Ledger(HAND)
    with ledger.time("train", "lm"):
        ledger.add("train", Work(tokens=30), passes=3)
        ledger.add("lm", Work(tokens=10), passes=3)
    step = ledger.close_step(ALONE)["phases"]
    assert (step["train"]["seconds"], step["lm"]["seconds"]) == (6.0, 2.0)
    with ledger.time("train", "lm"):
        pass
    step = ledger.close_step(ALONE)["phases"]
    assert (step["train"]["seconds"], step["lm"]["seconds"]) == (2.0, 0.0)
