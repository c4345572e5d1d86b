"""What a run will need, before it starts: memory per device, FLOPs and tokens per step, disk.

Arithmetic only: nothing is allocated and no weight is read. Documents are taken at
`data.max_document_tokens`, thoughts at `thought.max_thought_tokens` and every position at the end of
its document, so each figure is an upper bound for the step it describes. FLOPs of evaluations are not counted.

Both layouts are planned (`rlp.layout`). A thought is cut in two:

    context = I + P - H            instruction and document before the position
    branch = O + L + E + H - 1     open marker, thought, forced close marker, all targets but the last

In `repeated` every thought is a row of context and branch; in `tree` the context is run once for all thoughts of a document.

Letters
    n  parameters;  W  ranks (one device each);  c  bytes of a number in the compute dtype (2 or 4)
    B  documents per step;  K  positions per document;  G  thoughts per position;  N = B K G;  g  of each group in one forward
    P  document tokens;  L  thought tokens;  H  target tokens;  O, E, I  tokens of open marker, close marker, instruction
"""

import math
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import psutil
import torch

from rlp.config import Config, ConfigError, keeps_ema, needs_copies
from rlp.distributed import ranks_of_this_machine
from rlp.layout import Work
from rlp.ledger import NORM_COPIES, ModelShapes, causal_pairs, forward_flops
from rlp.machine import available_memory_bytes
from rlp.model import choose_dtype

GB = 1e9
LOGITS_TILE_BYTES = 5 * 1024 * 4096 * 4
"""The head's backward pass holds five float32 tiles of 1024 rows x 4096 words (rlp_kernels.chunked)."""
SAMPLING_BYTES_PER_LOGIT = 32
"""Drawing a token holds, per word: logits, scaled logits, log-probabilities and probabilities in float32,
probabilities and their running sum in float64."""
BUCKET_ELEMENTS = 500_000_000
"""DeepSpeed's reduce_bucket_size, allocated whole under stages 2 and 3."""
LIVE_ELEMENTS = 1_000_000_000
"""DeepSpeed's stage3_max_live_parameters: what stage 3 may hold gathered while it runs layers."""
PROCESS_BYTES = 650_000_000
"""On a CPU: Python, torch, transformers and DeepSpeed with their libraries, before a model is loaded, and the report's after it."""
ALLOCATOR_FRACTION = 0.25
"""On a CPU, of gradients, activations and head: what glibc holds between the blocks that come and go. Beside it DeepSpeed has a
second float32 gradient under stage 1 in bfloat16. With both the plan is 0 to 13 % above what a Llama of 135 million parameters,
30 layers and 49 thousand words takes at five sizes of a step, 5.5 to 7.9 GB (torch 2.13, DeepSpeed 0.19, 2026-11-21)."""
USABLE_FRACTION = 0.94
"""The rest of a device goes to the CUDA context, NCCL and the allocator's gaps. Ours, not measured."""


@dataclass(frozen=True, slots=True)
class FormatTokens:
    """Tokens of the thought format; the values here are those of Qwen3 without an instruction."""

    open: int = 1
    """O."""
    close: int = 1
    """E."""
    instruction: int = 0
    """I."""


@dataclass(frozen=True, slots=True)
class MemoryPart:
    """Bytes on one device, and when they are there."""

    name: str
    num_bytes: int
    when: str
    """`always`, `sampling`, `update` or `evaluation`: a step samples first, then updates, and frees between."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What a run needs."""

    world_size: int
    zero_stage: int
    dtype: str
    why_dtype: str
    layout: str
    """`repeated` or `tree`."""
    activation_checkpointing: bool
    memory: tuple[MemoryPart, ...]
    other_activation_bytes: int
    """Activations of a micro-batch if activation checkpointing were the other way."""
    host_bytes: int
    """Host memory per rank for an offloaded optimizer."""
    device_bytes: int | None
    """Memory of one GPU; None on a CPU."""
    available_bytes: int | None
    """Of a CPU's machine, for one rank: what it has free, in its container's limits, and what this process holds already; None on a GPU."""
    phase_flops: dict[str, float]
    """Per step and ledger phase, over all ranks."""
    input_tokens: int
    """Document tokens per step, over all ranks."""
    thought_tokens: int
    """Sampled tokens per step, over all ranks."""
    steps: int | None
    """Steps until the first limit of the budget; None where its only limit is one of seconds."""
    seconds: float | None
    """The limit of seconds, if there is one: what a step takes is not known before the run."""
    step_paper_flops: int
    """The paper's T_flop of a step: n l bs + T_inp, in tokens."""
    checkpoint_bytes: int
    """One checkpoint, over all ranks."""
    export_bytes: int
    """The model that the end of the run writes, in float32."""
    disk_bytes: int
    """Largest use of the disk: the checkpoints kept, and the one being written or the export."""
    disk_free_bytes: int
    counted_without: tuple[str, ...] = ()
    """What the FLOPs leave out (`ModelShapes.uncounted`)."""
    relief: tuple[tuple[str, int], ...] = ()
    """Where the run does not fit: settings to write, each on top of the ones before it, with the peak that they lead to."""

    def bytes_during(self, when: str) -> int:
        """Bytes on one device while it samples, updates or evaluates."""
        return sum(part.num_bytes for part in self.memory if part.when in ("always", when))

    @property
    def peak_bytes(self) -> int:
        """The largest that the run comes to."""
        return max(self.bytes_during(when) for when in ("sampling", "update", "evaluation"))

    @property
    def step_flops(self) -> float:
        """FLOPs per step over all phases and ranks."""
        return sum(self.phase_flops.values())


def fits(plan: Plan, device_bytes: int | None = None) -> bool:
    """Whether the peak leaves a GPU the part that the plan does not count (`USABLE_FRACTION`), and a CPU nothing to swap. True where
    the memory is not known.

    Args:
        device_bytes: another GPU's memory than the plan's.
    """
    device_bytes = device_bytes or plan.device_bytes
    if device_bytes is not None:
        return plan.peak_bytes <= USABLE_FRACTION * device_bytes
    return plan.available_bytes is None or plan.peak_bytes <= plan.available_bytes


def plan_run(config: Config, shapes: ModelShapes, ranks_world_size: int, device_bytes: int | None = None, *, layout: str, form: FormatTokens = FormatTokens(),
             dtype: tuple[torch.dtype, str] | None = None) -> Plan:
    """Add up a run.

    Args:
        shapes: of the model (`model_shapes`).
        ranks_world_size: W.
        device_bytes: memory of one GPU; None plans for a CPU, this one.
        layout: `repeated` or `tree` (`choose_layout`).
        dtype: and why; None chooses (`choose_dtype`).

    Raises:
        ConfigError: documents are too short for the positions asked for.
    """
    plan = _add_up(config, shapes, ranks_world_size, device_bytes, layout, form, dtype)
    return plan if fits(plan) else replace(plan, relief=_relief(config, lambda other: _add_up(other, shapes, ranks_world_size, device_bytes, layout, form, dtype)))


def _relief(config: Config, plan_of: Callable[[Config], Plan]) -> tuple[tuple[str, int], ...]:
    """Settings that make the run smaller, those first that change nothing but its speed, each on top of the ones before it, until it fits.

    Returns:
        (setting, peak with it), of those that help.
    """
    group = config.thought.group_size
    steps = [("optim", "micro_batch_size", 1), ("thought", "sampling_rows", group), ("optim", "thoughts_per_forward", max(1, group // 4)),
             ("engine", "activation_checkpointing", True), ("thought", "sampling_rows", 1), ("optim", "thoughts_per_forward", 1), ("baseline", "kind", "self")]
    found, peak = [], plan_of(config).peak_bytes
    for section, name, value in steps:
        placebo_needs_it = name == "micro_batch_size" and config.reward.placebo != "none"
        if placebo_needs_it or getattr(getattr(config, section), name) == value:
            continue
        smaller = replace(config, **{section: replace(getattr(config, section), **{name: value})})
        plan = plan_of(smaller)
        if plan.peak_bytes < peak:
            config, peak = smaller, plan.peak_bytes
            found.append((f"{section}.{name}={str(value).lower()}", peak))
        if fits(plan):
            break
    return tuple(found)


def _add_up(config: Config, shapes: ModelShapes, ranks_world_size: int, device_bytes: int | None, layout: str, form: FormatTokens,
            dtype: tuple[torch.dtype, str] | None) -> Plan:
    dtype, why_dtype = dtype or choose_dtype(config, torch.device("cpu" if device_bytes is None else "cuda"), shapes.width)
    number_bytes = dtype.itemsize
    sizes = _StepSizes.of(config, ranks_world_size, form)
    activations = [activation_bytes(shapes, _forward_tokens(sizes, layout), number_bytes, checkpointing) for checkpointing in (False, True)]
    checkpointing = config.engine.activation_checkpointing
    state, host_bytes = _state_parts(config, shapes.parameters, ranks_world_size, number_bytes)
    update = _update_parts(config, shapes, sizes, number_bytes, activations[checkpointing])
    moving = sum(part.num_bytes for part in (*state, *update) if part.name in ("gradients", "activations", "LM head and logits tile"))
    second = _ceil_div(4 * shapes.parameters, ranks_world_size) if number_bytes == 2 else 0
    process = [] if device_bytes is not None else [MemoryPart("Python and its libraries", PROCESS_BYTES, "always"),
                                                   MemoryPart("held by the allocator", round(ALLOCATOR_FRACTION * moving) + second, "update")]
    phase_flops = step_flops(config, shapes, ranks_world_size, layout=layout, form=form)
    step_input = config.optim.batch_size * config.data.max_document_tokens
    step_thoughts = sizes.thoughts * config.thought.max_thought_tokens
    step_paper_flops = step_thoughts + step_input
    one_checkpoint, export = checkpoint_bytes(config, shapes.parameters), 4 * shapes.parameters
    return Plan(
        world_size=ranks_world_size, zero_stage=config.engine.zero_stage, dtype=str(dtype).removeprefix("torch."), why_dtype=why_dtype, layout=layout, activation_checkpointing=checkpointing,
        memory=(*state, *process, *_evaluation_parts(config, shapes, sizes, layout, number_bytes), *_sampling_parts(config, shapes, sizes, layout, number_bytes), *update),
        other_activation_bytes=activations[not checkpointing], host_bytes=host_bytes, device_bytes=device_bytes, available_bytes=_available_bytes() if device_bytes is None else None,
        phase_flops=phase_flops, input_tokens=step_input, thought_tokens=step_thoughts, seconds=config.budget.seconds,
        steps=_steps(config, {"tokens": step_input, "flops": sum(phase_flops.values()), "paper_flops": step_paper_flops}), step_paper_flops=step_paper_flops,
        checkpoint_bytes=one_checkpoint, export_bytes=export, disk_bytes=one_checkpoint * config.checkpoint.keep + max(one_checkpoint, export), disk_free_bytes=_disk_free(Path(config.run.dir)),
        counted_without=shapes.uncounted)


@dataclass(frozen=True, slots=True)
class _StepSizes:
    """How large the pieces of one step are, whatever the layout."""

    documents: int
    """B, over all ranks."""
    document_tokens: int
    """P."""
    thought_tokens: int
    """L."""
    horizon: int
    """H."""
    form: FormatTokens
    per_document: int
    """K; 0 where the run does not think."""
    group_size: int
    """G."""
    thoughts_per_forward: int
    """g, at most G."""
    lm: bool
    """Whether the first forward pass of a micro-batch has its documents in it, for the LM loss."""
    micro_batch_documents: int
    """Documents of one forward pass on one rank."""
    sampling_positions: int
    """Groups decoded side by side on one rank."""
    sampled_documents: tuple[int, ...]
    """On one rank: how many documents each such block of positions belongs to."""

    @classmethod
    def of(cls, config: Config, world_size: int, form: FormatTokens) -> "_StepSizes":
        group = config.thought.group_size
        documents = _ceil_div(config.optim.batch_size, world_size)
        per_document = positions_per_document(config) if config.objective.thinks else 0
        at_once = min(max(1, config.thought.sampling_rows // group), documents * per_document)
        return cls(
            documents=config.optim.batch_size, document_tokens=config.data.max_document_tokens, thought_tokens=config.thought.max_thought_tokens,
            horizon=config.target.horizon, form=form, per_document=per_document, group_size=group,
            thoughts_per_forward=min(config.optim.thoughts_per_forward or group, group), lm=config.objective.lm_weight > 0,
            micro_batch_documents=min(config.optim.micro_batch_size, documents), sampling_positions=at_once,
            sampled_documents=_documents_of_blocks(documents * per_document, per_document, at_once))

    @property
    def positions(self) -> int:
        """B K, over all ranks."""
        return self.documents * self.per_document

    @property
    def thoughts(self) -> int:
        """N = B K G, over all ranks."""
        return self.positions * self.group_size

    @property
    def context_tokens(self) -> int:
        """I + P - H, what a thought stands behind."""
        return self.form.instruction + self.document_tokens - self.horizon

    @property
    def branch_tokens(self) -> int:
        """O + L + E + H - 1, what a thought adds to it in the update: the last target is predicted and never read."""
        return self.form.open + self.thought_tokens + self.form.close + self.horizon - 1

    @property
    def decoded_tokens(self) -> int:
        """O + L - 1, what a thought adds to it while sampling: its last token is drawn and not run."""
        return self.form.open + self.thought_tokens - 1

    @property
    def document_queries(self) -> int:
        """Rows of the LM head in the pass of the LM loss: P - 1, and beside thoughts H targets and an open marker per position."""
        return self.document_tokens - 1 + self.per_document * (self.horizon + 1)

    @property
    def slices(self) -> int:
        """Forward passes that a group takes."""
        return _ceil_div(self.group_size, self.thoughts_per_forward)


def _documents_of_blocks(positions: int, per_document: int, block: int) -> tuple[int, ...]:
    """Positions, document by document, in blocks: how many documents each block belongs to."""
    return tuple((min(start + block, positions) - 1) // per_document - start // per_document + 1 for start in range(0, positions, max(1, block)))


def _forward_tokens(sizes: _StepSizes, layout: str) -> int:
    """Token positions of the largest forward pass of the update on one rank, padding included, per document of the micro-batch:

        repeated    K g rows, and one for the LM loss, all padded to the longest, context + branch
        tree        K g branches, and the trunk: the document where the LM loss runs it, else the context; with an
                    instruction these are two trunks
    """
    branches = sizes.per_document * sizes.thoughts_per_forward
    if layout == "repeated":
        row = sizes.context_tokens + sizes.branch_tokens if branches else sizes.document_tokens
        return sizes.micro_batch_documents * (branches + sizes.lm) * row
    trunks = sizes.lm * sizes.document_tokens + _context_trunks(sizes, lm=sizes.lm) * sizes.context_tokens
    return sizes.micro_batch_documents * (trunks + branches * sizes.branch_tokens)


def _context_trunks(sizes: _StepSizes, *, lm: bool) -> int:
    """Trunks of its own (1 or 0) that a document needs for its thoughts: without an instruction they share that of the LM loss."""
    shared = lm and sizes.form.instruction == 0
    return int(sizes.per_document > 0 and not shared)


def _forward_queries(sizes: _StepSizes) -> int:
    """Rows of the LM head in that pass: L + H per thought, and those of the LM loss."""
    thoughts = sizes.per_document * sizes.thoughts_per_forward
    return sizes.micro_batch_documents * (thoughts * (sizes.thought_tokens + sizes.horizon) + sizes.lm * sizes.document_queries)


def positions_per_document(config: Config) -> int:
    """K; for `all`, every position of the longest document that has a prefix and a target."""
    possible = config.data.max_document_tokens - config.target.horizon - config.position.min_prefix_tokens + 1
    if config.position.per_document == "all":
        return possible
    if config.position.per_document > possible:
        raise ConfigError(f"position.per_document: a document of data.max_document_tokens={config.data.max_document_tokens} has {possible} positions, "
                          f"got {config.position.per_document}. Write position.per_document=all or a longer document.")
    return config.position.per_document


def _ceil_div(amount: int, parts: int) -> int:
    return -(-amount // parts)


def weight_bytes(parameters: int, number_bytes: int, stage: int, world_size: int) -> int:
    """Weights that forward and backward read: c n; only stage 3 shards them."""
    return _ceil_div(parameters * number_bytes, world_size if stage == 3 else 1)


def gradient_bytes(parameters: int, number_bytes: int, stage: int, world_size: int) -> int:
    """Gradients: c n, sharded from stage 2. In bfloat16 there is a float32 copy as well: under stage 1 the
    whole sum over micro-batches is kept in float32, under stages 2 and 3 the own shard at the step."""
    float32_copy = 4 if number_bytes == 2 else 0
    return _ceil_div(parameters * (number_bytes + float32_copy), world_size if stage >= 2 else 1)


def optimizer_bytes(parameters: int, stage: int, world_size: int, *, ema: bool) -> dict[str, int]:
    """Float32 numbers that the optimizer owns, sharded from stage 1: a master copy of the weights (under
    stage 0 the weights themselves are it), two moments (AdamW), and the EMA (in bfloat16 it would not move)."""
    shards = world_size if stage >= 1 else 1
    copies = {"master weights": 4 if stage >= 1 else 0, "two moments": 8, "EMA of the weights": 4 if ema else 0}
    return {name: _ceil_div(parameters * size, shards) for name, size in copies.items()}


def activation_bytes(shapes: ModelShapes, tokens: int, number_bytes: int, checkpointing: bool) -> int:
    """What a forward pass over `tokens` token positions (padding included) keeps for its backward pass.

    Without checkpointing: everything, in the compute dtype. With it: the input of each layer, what the
    last norm keeps, and the largest layer in full while it is run again.
    """
    kept = (shapes.layers + NORM_COPIES) * shapes.width + shapes.layer_activation_elements if checkpointing else shapes.activation_elements
    return tokens * kept * number_bytes


def cache_bytes(shapes: ModelShapes, rows: int, tokens: int, number_bytes: int) -> int:
    """Keys and values of `rows` thoughts, each with its own copy of its prefix, in the compute dtype; and
    the recurrent states of state-space layers, one per row of any length, in float32."""
    return rows * (tokens * shapes.key_value_elements * number_bytes + shapes.state_elements * 4)


def shared_cache_bytes(shapes: ModelShapes, trunk_tokens: int, branches: int, branch_tokens: int, number_bytes: int) -> int:
    """Keys and values of `trunk_tokens` tokens of documents, each once, and of branches beside them, in the compute dtype.

        trunk_tokens + branches x branch_tokens

    The room of a branch grows to its longest tokens and no further (`rlp.attention.next_room`). Room is made, and ended branches
    are dropped, layer by layer: the copies of one layer, a few per cent, are left out.
    """
    return (trunk_tokens + branches * branch_tokens) * shapes.key_value_elements * number_bytes


def checkpoint_bytes(config: Config, parameters: int) -> int:
    """Float32 master weights, two moments, and the EMA where there is one: 12 or 16 bytes per parameter."""
    return parameters * (16 if keeps_ema(config) else 12)


def _state_parts(config: Config, parameters: int, world_size: int, number_bytes: int) -> tuple[list[MemoryPart], int]:
    """(what stays on the device all the time, what is offloaded to the host)."""
    stage = config.engine.zero_stage
    copy = weight_bytes(parameters, number_bytes, stage, world_size)
    optimizer = optimizer_bytes(parameters, stage, world_size, ema=keeps_ema(config))
    for_teacher, for_start = needs_copies(config)
    parts = {
        "weights": copy,
        "gradients": gradient_bytes(parameters, number_bytes, stage, world_size),
        **({name: 0 for name in optimizer} if config.engine.offload_optimizer else optimizer),
        "teacher": copy if for_teacher else 0,
        "starting checkpoint (KL)": copy if for_start else 0,
        "communication buckets": BUCKET_ELEMENTS * number_bytes if stage >= 2 else 0,
    }
    host_bytes = sum(optimizer.values()) if config.engine.offload_optimizer else 0
    return [MemoryPart(name, num_bytes, "always") for name, num_bytes in parts.items()], host_bytes


def _gathered_bytes(config: Config, parameters: int, number_bytes: int) -> int:
    return min(parameters, LIVE_ELEMENTS) * number_bytes if config.engine.zero_stage == 3 else 0


def _sampling_parts(config: Config, shapes: ModelShapes, sizes: _StepSizes, layout: str, number_bytes: int) -> list[MemoryPart]:
    if not config.objective.thinks:
        return []
    gathered = _gathered_bytes(config, shapes.parameters, number_bytes)
    if config.engine.zero_stage == 3 and config.engine.generation == "gathered":
        gathered = shapes.parameters * number_bytes
    rows = sizes.sampling_positions * sizes.group_size
    if layout == "repeated":
        cache = cache_bytes(shapes, rows, sizes.context_tokens + sizes.decoded_tokens, number_bytes)
    else:
        cache = shared_cache_bytes(shapes, max(sizes.sampled_documents) * sizes.context_tokens, rows, sizes.decoded_tokens, number_bytes)
    return [
        MemoryPart("gathered weights", gathered, "sampling"),
        MemoryPart("keys, values and states", cache, "sampling"),
        MemoryPart("next-token softmax", rows * shapes.vocabulary * SAMPLING_BYTES_PER_LOGIT, "sampling"),
    ]


def _evaluation_parts(config: Config, shapes: ModelShapes, sizes: _StepSizes, layout: str, number_bytes: int) -> list[MemoryPart]:
    """Of the held-out panel, document batch by document batch: keys while it thinks, or one layer of a forward without gradient."""
    if not config.data.held_out:
        return []
    documents = min(config.evaluation.batch_size, config.evaluation.panel_positions)
    thoughts = min(config.evaluation.panel_positions, documents * positions_per_document(config)) * config.evaluation.thoughts_per_position
    rows = min(thoughts, max(config.thought.sampling_rows, config.evaluation.thoughts_per_position))
    if layout == "repeated":
        cache = cache_bytes(shapes, rows, sizes.context_tokens + sizes.decoded_tokens, number_bytes)
        tokens = (thoughts + documents) * (sizes.context_tokens + sizes.branch_tokens)
    else:
        cache = shared_cache_bytes(shapes, documents * sizes.context_tokens, rows, sizes.decoded_tokens, number_bytes)
        tokens = documents * sizes.document_tokens + thoughts * sizes.branch_tokens
    sampling = cache + rows * shapes.vocabulary * SAMPLING_BYTES_PER_LOGIT
    scoring = tokens * (shapes.layer_activation_elements + 2 * shapes.width) * number_bytes + LOGITS_TILE_BYTES
    return [MemoryPart("held-out panel", max(sampling, scoring), "evaluation")]


def _update_parts(config: Config, shapes: ModelShapes, sizes: _StepSizes, number_bytes: int, activations: int) -> list[MemoryPart]:
    # Queried hidden states with their float32 gradient, the gradient of the head, and the tiles.
    head = _forward_queries(sizes) * shapes.width * (number_bytes + 4) + shapes.vocabulary * shapes.width * number_bytes + LOGITS_TILE_BYTES
    return [
        MemoryPart("gathered layers", _gathered_bytes(config, shapes.parameters, number_bytes), "update"),
        MemoryPart("activations", activations, "update"),
        MemoryPart("LM head and logits tile", head, "update"),
    ]


def step_flops(config: Config, shapes: ModelShapes, ranks_world_size: int, *, layout: str, form: FormatTokens = FormatTokens()) -> dict[str, float]:
    """FLOPs of one step by ledger phase, over all ranks, as the ledger counts them.

    `score` is the document pass that the selectors entropy and surprisal need, and for groups in slices
    (`optim.thoughts_per_forward`) one pass over the thoughts ahead of the update: the targets after whole groups are
    read off the update's own forward pass and cost the head rows counted there. A placebo scores thoughts ahead too: those
    of all positions where they are foreign, those of each rank's last position where rewards are shuffled. `teacher` is one document pass for
    all positions, on the steps that score the baseline, and with a KL term one pass of the starting checkpoint over all
    that the update runs. `train` and `lm` are a forward and a backward pass for each update with the same thoughts.
    """
    sizes = _StepSizes.of(config, ranks_world_size, form)
    thinks, updates = config.objective.thinks, config.optim.updates_per_rollout
    selects = thinks and config.position.selector in ("entropy", "surprisal")
    document_pass = _rows(sizes.documents, sizes.document_tokens, head_rows=sizes.documents * (sizes.document_tokens - 1))
    no_think = _rows(sizes.documents, sizes.document_tokens, head_rows=sizes.positions * (sizes.horizon + 1))
    baseline = forward_flops(shapes, no_think) / config.baseline.every_n_steps if thinks and config.baseline.kind != "none" else 0.0
    foreign, shuffled = (thinks and config.reward.placebo == placebo for placebo in ("foreign_thought", "shuffled_reward"))
    times_ahead = float(sizes.slices > 1 or foreign) + (ranks_world_size / sizes.positions if shuffled else 0.0)
    ahead = times_ahead * forward_flops(shapes, _thought_work(sizes, layout, lm=False)) if times_ahead else 0.0
    update = {"train": forward_flops(shapes, _thought_work(sizes, layout, lm=sizes.lm)), "lm": forward_flops(shapes, _document_work(sizes, layout))}
    return {
        "prefill": forward_flops(shapes, _prefill_work(sizes, layout, ranks_world_size)),
        "decode": forward_flops(shapes, _decode_work(sizes)),
        "score": (forward_flops(shapes, document_pass) if selects else 0.0) + ahead,
        "teacher": baseline + (updates * sum(update.values()) if config.objective.kl_weight > 0 else 0.0),
        **{phase: 3 * updates * flops for phase, flops in update.items()},
    }


def _prefill_work(sizes: _StepSizes, layout: str, world_size: int) -> Work:
    """What runs before the first token of a thought is drawn:

        repeated    each position's prefix, context + O tokens
        tree        the context of each document, once for the positions of it that are sampled side by side, and the
                    open marker in every branch
    """
    if layout == "repeated":
        return _rows(sizes.positions, sizes.context_tokens + sizes.form.open, head_rows=sizes.positions)
    markers = sizes.thoughts * sizes.form.open
    return _rows(world_size * sum(sizes.sampled_documents), sizes.context_tokens, head_rows=0) + Work(
        tokens=markers, pairs=sizes.thoughts * causal_pairs(sizes.form.open, sizes.context_tokens), head_rows=markers)


def _decode_work(sizes: _StepSizes) -> Work:
    """Each token of a thought but the last, behind its prefix."""
    run = sizes.thoughts * (sizes.thought_tokens - 1)
    return Work(tokens=run, pairs=sizes.thoughts * causal_pairs(sizes.thought_tokens - 1, sizes.context_tokens + sizes.form.open), head_rows=run)


def _thought_work(sizes: _StepSizes, layout: str, *, lm: bool) -> Work:
    """One forward over all thoughts.

        repeated    N rows of context + branch tokens
        tree        N branches that see a context before them, and the context of each document in every slice of its
                    groups; with the LM loss (`lm`) the trunks of the first slice belong to that
    """
    head_rows = sizes.thoughts * (sizes.thought_tokens + sizes.horizon)
    if layout == "repeated":
        return _rows(sizes.thoughts, sizes.context_tokens + sizes.branch_tokens, head_rows=head_rows)
    trunks = sizes.documents * (sizes.slices - lm) * _context_trunks(sizes, lm=False)
    branches = Work(tokens=sizes.thoughts * sizes.branch_tokens, pairs=sizes.thoughts * causal_pairs(sizes.branch_tokens, sizes.context_tokens), head_rows=head_rows)
    return branches + _rows(trunks, sizes.context_tokens, head_rows=0)


def _document_work(sizes: _StepSizes, layout: str) -> Work:
    """One forward of the LM loss: the documents, where there is such a loss, and in a tree with an instruction their contexts.

    Beside thoughts this pass also gives the policy's no-think log-probabilities.
    """
    if not sizes.lm:
        return Work()
    documents = _rows(sizes.documents, sizes.document_tokens, head_rows=sizes.documents * sizes.document_queries)
    contexts = sizes.documents * _context_trunks(sizes, lm=True) if layout == "tree" else 0
    return documents + _rows(contexts, sizes.context_tokens, head_rows=0)


def _rows(count: int, tokens: int, *, head_rows: int) -> Work:
    """Work of separate rows of one length."""
    return Work(tokens=count * tokens, pairs=count * causal_pairs(tokens), head_rows=head_rows)


def _steps(config: Config, step: dict[str, float]) -> int | None:
    """Steps until the first limit; documents shorter than the longest take more steps to read as many tokens.

    Args:
        step: what a step spends, by the names of the budget's limits.
    """
    budget = asdict(config.budget)
    limits = [math.ceil(budget[name] / amount) for name, amount in step.items() if budget[name] is not None]
    return min([*limits, *([config.budget.steps] if config.budget.steps else [])], default=None)


def _available_bytes() -> int | None:
    """Memory that one rank of this machine may fill, with what this process has filled of it already."""
    free = available_memory_bytes()
    return None if free is None else free // ranks_of_this_machine() + psutil.Process().memory_info().rss


def _disk_free(run_dir: Path) -> int:
    """Free bytes where the run folder will be: at its nearest ancestor that exists."""
    parent = next(path for path in run_dir.absolute().parents if path.exists())
    return shutil.disk_usage(parent).free


def render_plan(plan: Plan) -> str:
    """The plan as plain text, for `--dry-run`. GB are 10^9 bytes."""
    lines = [f"Memory per device, GB ({plan.world_size} ranks, ZeRO stage {plan.zero_stage}, layout {plan.layout})", f"  {plan.dtype}: {plan.why_dtype}"]
    lines += [_line(f"{part.name} [{part.when}]", f"{part.num_bytes / GB:.2f}") for part in plan.memory if part.num_bytes]
    lines += [_line(f"sum while {verb}", f"{plan.bytes_during(when) / GB:.2f}") for when, verb in (("sampling", "sampling"), ("update", "updating"), ("evaluation", "evaluating"))
              if any(part.when == when and part.num_bytes for part in plan.memory)]
    lines.append(_line("peak", f"{plan.peak_bytes / GB:.2f}"))
    other = "without" if plan.activation_checkpointing else "with"
    lines.append(_line(f"activations {other} activation checkpointing", f"{plan.other_activation_bytes / GB:.2f}"))
    if plan.host_bytes:
        lines.append(_line("host memory per rank (offloaded optimizer)", f"{plan.host_bytes / GB:.2f}"))
    lines += _fit_lines(plan)
    lines += ["", "FLOPs per step, all ranks (an upper bound: longest documents and thoughts)"]
    lines += [_line(phase, f"{flops:.3e}") for phase, flops in plan.phase_flops.items() if flops]
    lines.append(_line("sum", f"{plan.step_flops:.3e}"))
    lines += [f"  counted without {name}, whose cost is not known" for name in plan.counted_without]
    lines += ["", "Tokens and budget", _line("input tokens per step", f"{plan.input_tokens:,}"), _line("thought tokens per step", f"{plan.thought_tokens:,}")]
    lines += _run_lines(plan)
    lines += ["", "Disk, GB", _line("one checkpoint", f"{plan.checkpoint_bytes / GB:.2f}")]
    lines += [_line("the export", f"{plan.export_bytes / GB:.2f}"), _line("checkpoints kept and one being written", f"{plan.disk_bytes / GB:.2f}"), _line("free", f"{plan.disk_free_bytes / GB:.2f}")]
    if plan.disk_bytes > plan.disk_free_bytes:
        lines.append("  NOT ENOUGH DISK: lower checkpoint.keep or choose another run.dir")
    return "\n".join(lines)


def _fit_lines(plan: Plan) -> list[str]:
    """Whether the run fits, and what to write where it does not."""
    where = f"{plan.device_bytes / GB:.2f} GB, {USABLE_FRACTION:.0%} of it usable" if plan.device_bytes is not None else (
        None if plan.available_bytes is None else f"the {plan.available_bytes / GB:.2f} GB that this machine has for a rank")
    if where is None:
        return []
    if fits(plan):
        return [f"  fits in {where}"]
    told = [f"  DOES NOT FIT in {where}"]
    told += ["  write, in this order until it fits:", *(_line(f"  {setting}", f"peak {peak / GB:.2f}") for setting, peak in plan.relief)] if plan.relief else []
    return told + ["  else shorter documents or thoughts, or a smaller model"]


def _run_lines(plan: Plan) -> list[str]:
    """The whole run, as far as it is known before a step has been timed."""
    lines = [] if plan.seconds is None else [_line("seconds", f"{plan.seconds:,g}")]
    if plan.steps is None:
        return [*lines, _line("steps", "as the seconds allow"), _line("the paper's T_flop of a step, tokens", f"{plan.step_paper_flops:.3e}")]
    return [*lines, _line("steps" if plan.seconds is None else "steps, at most", f"{plan.steps:,}"), _line("input tokens of the run", f"{plan.steps * plan.input_tokens:,}"),
            _line("FLOPs of the run", f"{plan.steps * plan.step_flops:.3e}"), _line("the paper's T_flop of the run, tokens", f"{plan.steps * plan.step_paper_flops:.3e}")]


def _line(name: str, value: str) -> str:
    return f"  {name:<46}{value:>22}"
