"""What a device holds, in closed form from shapes and settings."""

from dataclasses import dataclass

from rlp.config import Config, keeps_ema, needs_copies, panel_position
from rlp.measure.plan_work import (
    StepSizes,
    ceil_div,
    forward_queries,
    forward_tokens,
    positions_per_document,
    slots_and_trunks,
)
from rlp.model.shapes import NORM_COPIES, ModelShapes
from rlp.model.slot_attention import key_room
from rlp.sampling.schedule import READ_TOKENS, num_slots, trunk_places

GB = 1e9

LOGITS_TILE_BYTES = 5 * 1024 * 4096 * 4
"""The head's backward pass holds five float32 tiles of 1024 rows x 4096 words
(rlp_kernels.chunked)."""

SAMPLING_BYTES_PER_LOGIT = 32
"""Drawing a token holds, per word: logits, scaled logits, log-probabilities and probabilities in
float32, probabilities and their running sum in float64."""

BUCKET_ELEMENTS = 500_000_000
"""DeepSpeed's reduce_bucket_size, allocated whole under stages 2 and 3."""

LIVE_ELEMENTS = 1_000_000_000
"""DeepSpeed's stage3_max_live_parameters: what stage 3 may hold gathered while it runs layers."""

PROCESS_BYTES = 650_000_000
"""On a CPU: Python, torch, transformers and DeepSpeed with their libraries, before a model is
loaded, and the report's after it."""

ALLOCATOR_FRACTION = 0.25
"""On a CPU, of gradients, activations and head: what glibc holds between the blocks that come and
go. Beside it DeepSpeed has a second float32 gradient under stage 1 in bfloat16. With both the plan
is 0 to 13 % above what a Llama of 135 million parameters, 30 layers and 49 thousand words takes at
five sizes of a step, 5.5 to 7.9 GB (torch 2.13, DeepSpeed 0.19, 2026-11-21)."""

USABLE_FRACTION = 0.94
"""The rest of a device goes to the CUDA context, NCCL and the allocator's gaps. Ours, not
measured."""


@dataclass(frozen=True, slots=True)
class MemoryPart:
    """Bytes on one device, and when they are there."""

    name: str
    num_bytes: int
    when: str
    """`always`, `sampling`, `update` or `evaluation`: a step samples first, then updates, and frees
    between."""


def weight_bytes(parameters: int, number_bytes: int, stage: int, world_size: int) -> int:
    """Weights that forward and backward read: c n; only stage 3 shards them."""
    return ceil_div(parameters * number_bytes, world_size if stage == 3 else 1)


def gradient_bytes(parameters: int, number_bytes: int, stage: int, world_size: int) -> int:
    """Gradients: c n, sharded from stage 2. In bfloat16 there is a float32 copy as well: under
    stage 1 the whole sum over micro-batches is kept in float32, under stages 2 and 3 the own shard
    at the step.
    """
    float32_copy = 4 if number_bytes == 2 else 0
    return ceil_div(parameters * (number_bytes + float32_copy), world_size if stage >= 2 else 1)


def optimizer_bytes(parameters: int, stage: int, world_size: int, *, ema: bool) -> dict[str, int]:
    """Float32 numbers that the optimizer owns, sharded from stage 1: a master copy of the weights
    (under stage 0 the weights themselves are it), two moments (AdamW), and the EMA (in bfloat16 it
    would not move).
    """
    shards = world_size if stage >= 1 else 1
    copies = {
        "master weights": 4 if stage >= 1 else 0,
        "two moments": 8,
        "EMA of the weights": 4 if ema else 0,
    }
    return {name: ceil_div(parameters * size, shards) for name, size in copies.items()}


def activation_bytes(
    shapes: ModelShapes, tokens: int, number_bytes: int, checkpointing: bool
) -> int:
    """What a forward pass over `tokens` token positions (padding included) keeps for its backward
    pass.

    Without checkpointing: everything, in the compute dtype. With it: the input of each layer, what
    the last norm keeps, and the largest layer in full while it is run again.
    """
    kept = (
        (shapes.layers + NORM_COPIES) * shapes.width + shapes.layer_activation_elements
        if checkpointing
        else shapes.activation_elements
    )
    return tokens * kept * number_bytes


def cache_bytes(shapes: ModelShapes, rows: int, tokens: int, number_bytes: int) -> int:
    """Keys and values of `rows` thoughts, each with its own copy of its prefix, in the compute
    dtype; and the recurrent states of state-space layers, one per row of any length, in float32."""
    return rows * (tokens * shapes.key_value_elements * number_bytes + shapes.state_elements * 4)


def forked_cache_bytes(
    shapes: ModelShapes, sizes: StepSizes, slots: int, trunks: int, number_bytes: int
) -> int:
    """Of `slots` thoughts, and of the contexts that are copied into them."""
    longest = sizes.context_tokens + sizes.decoded_tokens
    return cache_bytes(shapes, slots, longest, number_bytes) + cache_bytes(
        shapes, trunks, sizes.context_tokens, number_bytes
    )


def shared_cache_bytes(
    shapes: ModelShapes,
    trunks: int,
    trunk_tokens: int,
    slots: int,
    slot_tokens: int,
    number_bytes: int,
) -> int:
    """Keys and values of `trunks` documents, each once, and of the slots beside them.

        trunks x room for trunk_tokens + slots x room for slot_tokens

    Room is made once, for the longest (`rlp.model.slot_attention.key_room`).
    """
    places = trunks * key_room(trunk_tokens) + slots * key_room(slot_tokens)
    return places * shapes.key_value_elements * number_bytes


def checkpoint_bytes(config: Config, parameters: int) -> int:
    """Float32 master weights, two moments, and the EMA where there is one: 12 or 16 bytes per
    parameter."""
    return parameters * (16 if keeps_ema(config) else 12)


def state_parts(
    config: Config, parameters: int, world_size: int, number_bytes: int
) -> tuple[list[MemoryPart], int]:
    """(what stays on the device all the time, what is offloaded to the host)."""
    stage = config.engine.zero_stage
    copy = weight_bytes(parameters, number_bytes, stage, world_size)
    optimizer = optimizer_bytes(parameters, stage, world_size, ema=keeps_ema(config))
    for_teacher, for_start = needs_copies(config)
    parts = {
        "weights": copy,
        "gradients": gradient_bytes(parameters, number_bytes, stage, world_size),
        **(dict.fromkeys(optimizer, 0) if config.engine.offload_optimizer else optimizer),
        "teacher": copy if for_teacher else 0,
        "starting checkpoint (KL)": copy if for_start else 0,
        "communication buckets": BUCKET_ELEMENTS * number_bytes if stage >= 2 else 0,
    }
    host_bytes = sum(optimizer.values()) if config.engine.offload_optimizer else 0
    return [MemoryPart(name, num_bytes, "always") for name, num_bytes in parts.items()], host_bytes


def process_parts(
    shapes: ModelShapes, parts: list[MemoryPart], world_size: int, number_bytes: int
) -> list[MemoryPart]:
    """What a process on a CPU holds beside what it computes with (`ALLOCATOR_FRACTION`).

    Args:
        parts: those that stay, and those of the update.
    """
    come_and_go = ("gradients", "activations", "LM head and logits tile")
    moving = sum(part.num_bytes for part in parts if part.name in come_and_go)
    second_gradient = ceil_div(4 * shapes.parameters, world_size) if number_bytes == 2 else 0
    held = round(ALLOCATOR_FRACTION * moving) + second_gradient
    return [
        MemoryPart("Python and its libraries", PROCESS_BYTES, "always"),
        MemoryPart("held by the allocator", held, "update"),
    ]


def plain_scan_parts(
    config: Config, shapes: ModelShapes, sizes: StepSizes, layout: str
) -> list[MemoryPart]:
    """What state-space layers hold where they run in plain torch, beside their activations: one
    layer at a time, and in an update without activation checkpointing all of them."""
    layers = 1 if config.engine.activation_checkpointing else shapes.scan_layers
    held = sizes.held_positions * sizes.context_tokens
    prefill = min(held, max(READ_TOKENS, sizes.context_tokens))
    update = forward_tokens(sizes, layout)
    of_a_token = shapes.plain_scan_bytes
    return [
        MemoryPart("state-space scan in plain torch", prefill * of_a_token, "sampling"),
        MemoryPart("state-space scans in plain torch", layers * update * of_a_token, "update"),
    ]


def _gathered_bytes(config: Config, parameters: int, number_bytes: int) -> int:
    return min(parameters, LIVE_ELEMENTS) * number_bytes if config.engine.zero_stage == 3 else 0


def sampling_parts(
    config: Config, shapes: ModelShapes, sizes: StepSizes, layout: str, number_bytes: int
) -> list[MemoryPart]:
    if not config.objective.thinks:
        return []
    if config.sampling.engine == "vllm":
        return vllm_parts(config, shapes, sizes, number_bytes)
    gathered = _gathered_bytes(config, shapes.parameters, number_bytes)
    if config.engine.zero_stage == 3 and config.engine.generation == "gathered":
        gathered = shapes.parameters * number_bytes
    rows = sizes.slots
    if layout == "repeated":
        cache = forked_cache_bytes(shapes, sizes, rows, sizes.held_positions, number_bytes)
    else:
        cache = shared_cache_bytes(
            shapes,
            sizes.held_documents,
            sizes.context_tokens,
            rows,
            sizes.decoded_tokens,
            number_bytes,
        )
    return [
        MemoryPart("gathered weights", gathered, "sampling"),
        MemoryPart("keys, values and states", cache, "sampling"),
        MemoryPart(
            "next-token softmax", rows * shapes.vocabulary * SAMPLING_BYTES_PER_LOGIT, "sampling"
        ),
    ]


def panel_share(config: Config, world_size: int) -> tuple[int, int]:
    """Documents of the held-out panel on one rank, which samples all of its share at once, and
    thoughts of each, where every document has the positions that are asked for."""
    panel = config.evaluation
    positions = min(positions_per_document(config, panel_position(config)), panel.panel_positions)
    documents = ceil_div(ceil_div(panel.panel_positions, positions), world_size)
    return documents, positions * panel.thoughts_per_position


def vllm_parts(
    config: Config, shapes: ModelShapes, sizes: StepSizes, number_bytes: int
) -> list[MemoryPart]:
    """What vLLM holds while it samples: a copy of the weights, with a head of its own where it is
    tied, and keys and values, which `sampling.vllm_memory_frac` may make fewer."""
    head = shapes.tied * shapes.width * shapes.vocabulary
    tokens = sizes.context_tokens + sizes.horizon + sizes.decoded_tokens + 1
    cache = cache_bytes(shapes, config.sampling.slots, tokens, number_bytes)
    return [
        MemoryPart("weights in vLLM", (shapes.parameters + head) * number_bytes, "sampling"),
        MemoryPart("keys, values and states", cache, "sampling"),
    ]


def evaluation_parts(
    config: Config,
    shapes: ModelShapes,
    sizes: StepSizes,
    layout: str,
    number_bytes: int,
    *,
    world_size: int = 1,
    plain_scans: bool = False,
) -> list[MemoryPart]:
    """Of the held-out panel: keys while a rank thinks over its share of it, or one layer of a
    forward without gradient over a batch of documents."""
    if not config.data.held_out:
        return []
    panel, documents, each = config.evaluation, *panel_share(config, world_size)
    thinking = documents * each
    scored = min(panel.batch_size, documents)
    thoughts = scored * each
    if layout == "repeated":
        rows = num_slots(config.sampling.slots, thinking)
        held = trunk_places(rows, panel.thoughts_per_position, thinking, lasting=False)
        cache = forked_cache_bytes(shapes, sizes, rows, held, number_bytes)
        tokens = (thoughts + scored) * (sizes.context_tokens + sizes.branch_tokens)
    else:
        rows, held = slots_and_trunks(config.sampling.slots, documents, each)
        cache = shared_cache_bytes(
            shapes, held, sizes.context_tokens, rows, sizes.decoded_tokens, number_bytes
        )
        tokens = scored * sizes.document_tokens + thoughts * sizes.branch_tokens
    sampling = cache + rows * shapes.vocabulary * SAMPLING_BYTES_PER_LOGIT
    of_a_token = (shapes.layer_activation_elements + 2 * shapes.width) * number_bytes
    of_a_token += plain_scans * shapes.plain_scan_bytes
    scoring = tokens * of_a_token + LOGITS_TILE_BYTES
    return [MemoryPart("held-out panel", max(sampling, scoring), "evaluation")]


def update_parts(
    config: Config, shapes: ModelShapes, sizes: StepSizes, number_bytes: int, activations: int
) -> list[MemoryPart]:
    # Queried hidden states with their float32 gradient, the gradient of the head, and the tiles.
    head = (
        forward_queries(sizes) * shapes.width * (number_bytes + 4)
        + shapes.vocabulary * shapes.width * number_bytes
        + LOGITS_TILE_BYTES
    )
    return [
        MemoryPart(
            "gathered layers", _gathered_bytes(config, shapes.parameters, number_bytes), "update"
        ),
        MemoryPart("activations", activations, "update"),
        MemoryPart("LM head and logits tile", head, "update"),
    ]
