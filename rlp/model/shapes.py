"""What a pass through a model costs, in closed form from the shapes of its weights.

`Work` is how much is run, `ModelShapes` what a model is made of, and `forward_flops` the product of
both. What is run in a step, and when, is not known here.
"""

import copy
import math
import re
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from rlp.model.scans import is_scan, plain_scan_bytes, scan_elements, scan_packages


@dataclass(frozen=True, slots=True)
class Work:
    """Size of a pass through the model, in the units that FLOPs are made of."""

    tokens: int = 0
    """Token positions run through the layers, padding not counted."""
    pairs: int = 0
    """Query-key pairs of causal attention: each token with itself and all before it in its row."""
    head_rows: int = 0
    """Hidden states multiplied with the LM head."""

    def __add__(self, other: "Work") -> "Work":
        return Work(
            self.tokens + other.tokens, self.pairs + other.pairs, self.head_rows + other.head_rows
        )


def row_work(
    lengths: np.ndarray | int, head_rows: int, *, before: np.ndarray | int = 0, count: int = 1
) -> Work:
    """Work of separate rows.

    Args:
        lengths: tokens that are run, of each row.
        head_rows: of all rows together.
        before: tokens that each row attends to besides, run before.
        count: how many rows of each length there are; `head_rows` is not multiplied.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    return Work(
        tokens=count * int(lengths.sum()),
        pairs=count * int(causal_pairs(lengths, before).sum()),
        head_rows=head_rows,
    )


def causal_pairs(
    new_tokens: np.ndarray | int, cached_tokens: np.ndarray | int = 0
) -> np.ndarray | int:
    """Query-key pairs of a row: each token sees the cached ones, the earlier ones and itself."""
    return new_tokens * cached_tokens + new_tokens * (new_tokens + 1) // 2


NORM_COPIES = 3
"""Numbers that a norm keeps for its backward pass, per number it reads: a float32 copy and one to
scale."""


@dataclass(frozen=True, slots=True)
class ModelShapes:
    """The numbers of a causal LM that its cost in FLOPs and memory follows from."""

    parameters: int
    """Trained numbers in total; tied weights once."""
    matmul_parameters: int
    """Multiply-adds per token position in the body: weights used in matrix products and
    convolutions, without embeddings and head. Of the routed experts only the share that one token
    visits."""
    scan_multiply_adds: int
    """Multiply-adds per token position in state-space scans: one to update each number of the
    recurrent state, one to read it out."""
    attention_layers: int
    """Attentions that a token goes through; a layer of differential attention is two."""
    query_key_width: int
    """Heads x head dimension of the product of queries and keys, per attention layer."""
    value_width: int
    """Heads x head dimension of the product of attention weights and values."""
    key_value_elements: int
    """Numbers kept per token position while sampling, over all attention layers."""
    state_elements: int
    """Numbers kept per row while sampling, of any length: convolution windows and recurrent
    states."""
    layers: int
    activation_elements: int
    """Numbers kept per token position for the backward pass, over all layers and the last norm: an
    estimate from above (see `_activation_elements`)."""
    layer_activation_elements: int
    """The same for the largest layer."""
    width: int
    """D, the width that the LM head reads."""
    vocabulary: int
    """V, rows of the LM head."""
    tied: bool
    """The LM head is the input embedding."""
    uncounted: tuple[str, ...] = ()
    """What the FLOPs are counted without: weights and layers whose cost is not known here; numbers
    in their names are `*`."""
    scan_layers: int = 0
    """State-space and linear-attention layers."""
    plain_scan_bytes: int = 0
    """Bytes per token position that the largest of them holds where it runs in plain torch, beside
    its activations (`rlp.model.scans`)."""
    scan_packages: tuple[str, ...] = ()
    """What they import for their fast functions."""


def forward_flops(shapes: ModelShapes, work: Work) -> float:
    """FLOPs of one forward pass; a backward pass costs twice that, one product per operand.

        2 (matmul + scan) tokens + 2 (query_key_width + value_width) pairs per attention layer
        + 2 D V head_rows

    Every attention layer is charged the same pairs, one with a sliding window too: an upper bound.
    With equal widths the attention term is the usual 4 x heads x head dimension x pairs.
    """
    body = 2 * (shapes.matmul_parameters + shapes.scan_multiply_adds) * work.tokens
    attention = (
        2 * shapes.attention_layers * (shapes.query_key_width + shapes.value_width) * work.pairs
    )
    head = 2 * shapes.width * shapes.vocabulary * work.head_rows
    return float(body + attention + head)


def model_shapes(hf_config: PretrainedConfig) -> ModelShapes:
    """Shapes of any causal LM, read off the model built on the meta device (no memory, no weights).

    Raises:
        ValueError: no model can be built from the config, or it has no LM head.
    """
    model = _on_meta(hf_config)
    config, unknown = model.config.get_text_config(), set()
    head = _head_weight(model)
    blocks = _blocks(model, config, unknown)

    modules = model.named_modules(remove_duplicate=False)
    attention = [(path, module) for path, module in modules if _is_attention(module)]
    query_key_width, value_width, key_value_width = (
        _attention_widths(config) if attention else _NO_WIDTHS
    )
    num_known = 0
    for path, module in attention:
        if is_as_its_config_says(module, query_key_width, value_width):
            num_known += 1
        else:
            unknown.add(_pattern(path))

    scans, state_elements, windows, embeddings = [], 0, 0, []
    for path, module in model.named_modules():
        if is_scan(module):
            scans.append(module)
            if (elements := scan_elements(module)) is None:
                unknown.add(_pattern(path))
            state_elements += elements or 0
        if isinstance(module, nn.Conv1d):
            windows += module.weight.numel()
        if isinstance(module, nn.Embedding):
            embeddings.append(module.weight)
    per_block = [_activation_elements(block, config, query_key_width) for block in blocks]

    return ModelShapes(
        parameters=sum(weight.numel() for weight in model.parameters()),
        matmul_parameters=_matmul_parameters(model, config, head, unknown),
        scan_multiply_adds=2 * state_elements,
        attention_layers=num_known * _attentions(config),
        query_key_width=query_key_width,
        value_width=value_width,
        key_value_elements=len(attention) * key_value_width,
        state_elements=state_elements + windows,
        layers=len(blocks),
        activation_elements=sum(per_block) + NORM_COPIES * head.shape[1],
        layer_activation_elements=max(per_block),
        width=head.shape[1],
        vocabulary=head.shape[0],
        tied=any(head is weight for weight in embeddings),
        uncounted=tuple(sorted(unknown)),
        scan_layers=len(scans),
        plain_scan_bytes=max(map(plain_scan_bytes, scans), default=0),
        scan_packages=tuple(sorted({name for scan in scans for name in scan_packages(scan)})),
    )


def _on_meta(hf_config: PretrainedConfig) -> PreTrainedModel:
    """The model without memory for its weights."""
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(
                copy.deepcopy(hf_config), trust_remote_code=False
            )
    except Exception as error:  # of any type: what a wrong number in a config leads to
        raise ValueError(
            f"no {hf_config.model_type} can be built from its config.json: {type(error).__name__}:"
            f" {error}"
        ) from error


def _head_weight(model: PreTrainedModel) -> nn.Parameter:
    head = model.get_output_embeddings()
    if head is None:
        raise ValueError(f"{type(model).__name__} has no LM head (no output embedding)")
    return head.weight


def _pattern(path: str) -> str:
    """The name of a weight or layer in all layers at once."""
    return re.sub(r"\b\d+\b", "*", path)


def _blocks(model: nn.Module, config: PretrainedConfig, unknown: set[str]) -> list[nn.Module]:
    """The decoder layers, in order; the whole body where no list of them is as long as the config
    says."""
    layers = getattr(config, "num_hidden_layers", None)
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == layers:
            return list(module)
    unknown.add(
        f"how often each layer runs ({layers} layers in its config, and no list of as many)"
    )
    return [model.base_model]


# Parameters that are added or multiplied element by element, not by a matrix product.
_ELEMENTWISE = re.compile(r"(A_log|bias)$")

_EXPERT_IN_A_LIST = re.compile(r"\bexperts\.\d+\.")


def _matmul_parameters(
    model: nn.Module, config: PretrainedConfig, head: nn.Parameter, unknown: set[str]
) -> int:
    """Weights of the body times the number of products that each takes part in per token position.

    One that stands in several places is counted in the first alone: which of them a token goes
    through is not told by the model.
    """
    total, seen = 0, set()
    for path, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, nn.Embedding):
            continue
        for name, weight in module.named_parameters(recurse=False):
            if weight is head or weight.dim() < 2:
                continue
            place = f"{path}.{name}"
            products = None if weight in seen else _products(module, place, weight, config)
            if products is None:
                unknown.add(_pattern(place))
            seen.add(weight)
            total += products or 0
    return total


def _products(
    module: nn.Module, path: str, weight: nn.Parameter, config: PretrainedConfig
) -> int | None:
    """Multiply-adds per token position of one weight of at least two dimensions; None where they
    are not known."""
    experts = _expert_counts(config)
    if _ELEMENTWISE.search(path):
        return 0
    if isinstance(module, (nn.Linear, Conv1D)):
        if not _EXPERT_IN_A_LIST.search(path):
            return weight.numel()
        return weight.numel() * experts[1] // experts[0] if experts else None
    if isinstance(module, nn.Conv1d):
        return weight.numel()
    if experts and weight.shape[0] == experts[0]:
        # [experts, in, out] holds the experts themselves, [experts, width] their router.
        return weight.numel() * experts[1] // experts[0] if weight.dim() == 3 else weight.numel()
    return None


def _expert_counts(config: PretrainedConfig) -> tuple[int, int] | None:
    """(experts per layer, experts that one token visits), or None for a dense model, or one whose
    config names them otherwise."""
    values = config.to_dict()

    def first(*names: str) -> object:
        return next((values[name] for name in names if values.get(name)), None)

    experts = first("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
    visited = first("num_experts_per_tok", "moe_topk", "moe_k")
    return (experts, visited) if isinstance(experts, int) and isinstance(visited, int) else None


def _linears(module: nn.Module) -> list[nn.Module]:
    return [child for child in module.children() if isinstance(child, (nn.Linear, Conv1D))]


def in_out(linear: nn.Module) -> tuple[int, int]:
    """(features read, features written); GPT-2's Conv1D stores its weight transposed."""
    rows, columns = linear.weight.shape
    return (rows, columns) if isinstance(linear, Conv1D) else (columns, rows)


def _is_attention(module: nn.Module) -> bool:
    return type(module).__name__.endswith("Attention") and bool(_linears(module))


_NO_WIDTHS = (0, 0, 0)


def _attention_widths(config: PretrainedConfig) -> tuple[int, int, int]:
    """(query-key width, value width, numbers kept per token) of one attention layer; zeros where a
    config does not name one number for all layers."""
    try:
        return _widths_of_heads(config, config.to_dict())
    except Exception:  # of any type: some configs raise their own where layers differ
        return _NO_WIDTHS


def _widths_of_heads(config: PretrainedConfig, values: dict) -> tuple[int, int, int]:
    heads = config.num_attention_heads
    if values.get("qk_nope_head_dim"):
        # Multi-head latent attention: the latent and the rotary key are cached, not the keys and
        # values of every head.
        query_key_dim = values["qk_nope_head_dim"] + values["qk_rope_head_dim"]
        return (
            heads * query_key_dim,
            heads * values["v_head_dim"],
            values["kv_lora_rank"] + values["qk_rope_head_dim"],
        )
    # Some configs give head_dim another name, which only the attribute knows.
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    key_value_heads = 1 if values.get("multi_query") else values.get("num_key_value_heads") or heads
    return heads * head_dim, heads * head_dim, 2 * key_value_heads * head_dim


def is_as_its_config_says(module: nn.Module, query_key_width: int, value_width: int) -> bool:
    """Whether the weights of an attention layer have the widths that come from the config. The
    output projection is the last."""
    sizes = [in_out(linear) for linear in _linears(module)]
    return sizes[-1][0] == value_width and any(written >= query_key_width for _, written in sizes)


def _attentions(config: PretrainedConfig) -> int:
    """Attentions in one attention layer: a differential one (DiffLlama) attends with each half of
    its value heads in turn."""
    return 2 if "lambda_std_dev" in config.to_dict() else 1


def _activation_elements(block: nn.Module, config: PretrainedConfig, query_key_width: int) -> int:
    """Numbers that the backward pass of one layer needs, per token position: an estimate from
    above.

    Each linear map keeps what it reads, and what it writes is kept by the norm, product or
    attention after it. A norm in bfloat16 keeps a float32 copy of what it reads (two numbers'
    worth) and what it scales. This is 1.1 to 1.3 times what autograd saves for Qwen3 and Llama with
    sdpa, and 1.7 times for the fused LayerNorms of GPT-NeoX (test_plan.py). It is too little where
    a model multiplies out its nonlinearities (GPT-2's gelu_new and dropout save 1.4 times this);
    what state-space layers hold without their fused scan is `plain_scan_bytes`.
    """
    of_heads = set()
    for module in filter(_is_attention, block.modules()):
        of_heads |= set(module.children())
    experts, visited = _expert_counts(config) or (1, 1)
    total, share = 0, visited / experts

    for path, module in block.named_modules():
        if isinstance(module, (nn.Linear, Conv1D)):
            elements = sum(in_out(module))
            total += elements * share if _EXPERT_IN_A_LIST.search(path) else elements
        elif isinstance(module, nn.Conv1d):
            total += 2 * module.out_channels
        elif "Norm" in type(module).__name__:
            # A norm inside attention is applied to each head.
            width = sum(weight.numel() for weight in module.parameters() if weight.dim() == 1)
            total += NORM_COPIES * (query_key_width if module in of_heads else width)
        else:
            stacked = [weight for weight in module.parameters(recurse=False) if weight.dim() == 3]
            total += sum(share * weight.shape[0] * sum(weight.shape[1:]) for weight in stacked)
    return math.ceil(total)
