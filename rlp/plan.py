"""What a run will need, before it starts: memory per device, FLOPs and tokens per step, disk.

Arithmetic only: nothing is allocated and no weight is read. Documents are taken at
`data.max_document_tokens`, thoughts at `thought.max_thought_tokens` and every position at the end of
its document, so each figure is an upper bound for the step it describes. Evaluation is not counted.

Letters
    n  parameters;  W  ranks (one device each);  c  bytes of a number in the compute dtype (2 or 4)
    B  documents per step;  K  positions per document;  G  thoughts per position
    P  document tokens;  L  thought tokens;  H  target tokens;  F  tokens of the thought format
"""

import shutil
from dataclasses import dataclass
from pathlib import Path

import torch

from rlp.config import Config, ConfigError
from rlp.layout import Work
from rlp.ledger import NORM_COPIES, ModelShapes, causal_pairs, forward_flops
from rlp.model import compute_dtype

GB = 1e9
FORMAT_TOKENS = 2
"""F: an open and a close marker of one token each, as in Qwen3, and no instruction."""
LOGITS_TILE_BYTES = 5 * 1024 * 4096 * 4
"""The head's backward pass holds five float32 tiles of 1024 rows x 4096 words (rlp_kernels.chunked)."""
SAMPLING_BYTES_PER_LOGIT = 32
"""Drawing a token holds, per word: logits, scaled logits, log-probabilities and probabilities in float32,
probabilities and their running sum in float64."""
BUCKET_ELEMENTS = 500_000_000
"""DeepSpeed's reduce_bucket_size, allocated whole under stages 2 and 3."""
LIVE_ELEMENTS = 1_000_000_000
"""DeepSpeed's stage3_max_live_parameters: what stage 3 may hold gathered while it runs layers."""
USABLE_FRACTION = 0.94
"""The rest of a device goes to the CUDA context, NCCL and the allocator's gaps. Ours, not measured."""


@dataclass(frozen=True, slots=True)
class MemoryPart:
    """Bytes on one device, and when they are there."""

    name: str
    num_bytes: int
    when: str
    """`always`, `sampling` or `update`: a step samples first, then updates, and frees between."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What a run needs."""

    world_size: int
    zero_stage: int
    dtype: str
    activation_checkpointing: bool
    memory: tuple[MemoryPart, ...]
    other_activation_bytes: int
    """Activations of a micro-batch if activation checkpointing were the other way."""
    host_bytes: int
    """Host memory per rank for an offloaded optimizer."""
    device_bytes: int | None
    """Memory of one device; None where it is not known."""
    phase_flops: dict[str, float]
    """Per step and ledger phase, over all ranks."""
    input_tokens: int
    """Document tokens per step, over all ranks."""
    thought_tokens: int
    """Sampled tokens per step, over all ranks."""
    steps: int
    """Steps until the first limit of the budget."""
    paper_flops: int
    """The paper's T_flop of the whole run: n l bs iters + T_inp, in tokens."""
    checkpoint_bytes: int
    """One checkpoint, over all ranks."""
    disk_bytes: int
    """Largest use of the disk: the checkpoints kept and the one being written."""
    disk_free_bytes: int

    def bytes_during(self, when: str) -> int:
        """Bytes on one device while it samples or while it updates."""
        return sum(part.num_bytes for part in self.memory if part.when in ("always", when))

    @property
    def peak_bytes(self) -> int:
        """The larger of the two."""
        return max(self.bytes_during("sampling"), self.bytes_during("update"))

    @property
    def step_flops(self) -> float:
        """FLOPs per step over all phases and ranks."""
        return sum(self.phase_flops.values())


def fits(plan: Plan, device_bytes: int) -> bool:
    """Whether the peak leaves a device the part that the plan does not count (`USABLE_FRACTION`)."""
    return plan.peak_bytes <= USABLE_FRACTION * device_bytes


def plan_run(config: Config, shapes: ModelShapes, ranks_world_size: int, device_bytes: int | None = None, *, format_tokens: int = FORMAT_TOKENS) -> Plan:
    """Add up a run.

    Args:
        shapes: of the model (`model_shapes`).
        ranks_world_size: W.
        device_bytes: memory of one GPU; None plans for a CPU, where `engine.dtype: auto` is float32.
        format_tokens: F, tokens of the two markers and of the instruction.

    Raises:
        ConfigError: documents are too short for the positions asked for.
    """
    dtype = compute_dtype(config, torch.device("cpu" if device_bytes is None else "cuda"))
    number_bytes = dtype.itemsize
    sizes = _StepSizes.of(config, ranks_world_size, format_tokens)
    activations = [activation_bytes(shapes, sizes.micro_batch_rows * sizes.row_tokens, number_bytes, checkpointing) for checkpointing in (False, True)]
    checkpointing = config.engine.activation_checkpointing
    state, host_bytes = _state_parts(config, shapes.parameters, ranks_world_size, number_bytes)
    phase_flops = step_flops(config, shapes, format_tokens=format_tokens)
    step_input = config.optim.batch_size * config.data.max_document_tokens
    step_thoughts = sizes.thoughts * config.thought.max_thought_tokens
    steps = _steps(config, step_input, sum(phase_flops.values()))
    one_checkpoint = checkpoint_bytes(config, shapes.parameters)
    return Plan(
        world_size=ranks_world_size, zero_stage=config.engine.zero_stage, dtype=str(dtype).removeprefix("torch."), activation_checkpointing=checkpointing,
        memory=(*state, *_sampling_parts(config, shapes, sizes, number_bytes), *_update_parts(config, shapes, sizes, number_bytes, activations[checkpointing])),
        other_activation_bytes=activations[not checkpointing], host_bytes=host_bytes, device_bytes=device_bytes,
        phase_flops=phase_flops, input_tokens=step_input, thought_tokens=step_thoughts, steps=steps, paper_flops=steps * (step_thoughts + step_input),
        checkpoint_bytes=one_checkpoint, disk_bytes=one_checkpoint * (config.checkpoint.keep + 1), disk_free_bytes=_disk_free(Path(config.run.dir)))


@dataclass(frozen=True, slots=True)
class _StepSizes:
    """How large the pieces of one step are."""

    positions: int
    """B K, over all ranks; 0 where the run does not think."""
    thoughts: int
    """B K G, over all ranks."""
    prefix_tokens: int
    """The longest prefix with its format: document[: P - H], open marker, instruction. The close marker is among F
    too, so the cache of a thought is this and L, and one more token than is ever run."""
    row_tokens: int
    """The longest row of the update: prefix, thought and all targets but the last; or a whole document."""
    micro_batch_rows: int
    """Rows of one forward pass: the thoughts of the micro-batch's documents, and the documents for the LM loss."""
    micro_batch_queries: int
    """Rows of the LM head in that pass."""
    sampling_rows: int
    """Thoughts decoded side by side on one rank: whole groups."""

    @classmethod
    def of(cls, config: Config, world_size: int, format_tokens: int) -> "_StepSizes":
        per_rank = _ceil_div(config.optim.batch_size, world_size)
        documents = min(config.optim.micro_batch_size, per_rank)
        document, thought, horizon = config.data.max_document_tokens, config.thought.max_thought_tokens, config.target.horizon
        lm = config.objective.lm_weight > 0
        if not config.objective.thinks:
            return cls(0, 0, 0, document, documents, documents * (document - 1), 0)
        group, per_document = config.thought.group_size, positions_per_document(config)
        prefix = document - horizon + format_tokens
        groups_at_once = min(max(1, config.thought.sampling_rows // group), per_rank * per_document)
        return cls(
            positions=config.optim.batch_size * per_document, thoughts=config.optim.batch_size * per_document * group,
            prefix_tokens=prefix, row_tokens=prefix + thought + horizon - 1,
            micro_batch_rows=documents * (per_document * group + lm),
            micro_batch_queries=documents * (per_document * group * (thought + horizon) + lm * (document - 1 + per_document * (horizon + 1))),
            sampling_rows=groups_at_once * group)


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


def checkpoint_bytes(config: Config, parameters: int) -> int:
    """Float32 master weights, two moments, and the EMA where there is one: 12 or 16 bytes per parameter."""
    return parameters * (16 if config.baseline.kind == "ema" else 12)


def _state_parts(config: Config, parameters: int, world_size: int, number_bytes: int) -> tuple[list[MemoryPart], int]:
    """(what stays on the device all the time, what is offloaded to the host)."""
    stage = config.engine.zero_stage
    copy = weight_bytes(parameters, number_bytes, stage, world_size)
    optimizer = optimizer_bytes(parameters, stage, world_size, ema=config.baseline.kind == "ema")
    twin = copy if config.baseline.kind in ("ema", "frozen") else 0
    parts = {
        "weights": copy,
        "gradients": gradient_bytes(parameters, number_bytes, stage, world_size),
        **({name: 0 for name in optimizer} if config.engine.offload_optimizer else optimizer),
        "teacher": twin,
        "starting checkpoint (KL)": copy if config.objective.kl_weight > 0 else 0,
        "communication buckets": BUCKET_ELEMENTS * number_bytes if stage >= 2 else 0,
    }
    host_bytes = sum(optimizer.values()) if config.engine.offload_optimizer else 0
    return [MemoryPart(name, num_bytes, "always") for name, num_bytes in parts.items()], host_bytes


def _gathered_bytes(config: Config, parameters: int, number_bytes: int) -> int:
    return min(parameters, LIVE_ELEMENTS) * number_bytes if config.engine.zero_stage == 3 else 0


def _sampling_parts(config: Config, shapes: ModelShapes, sizes: _StepSizes, number_bytes: int) -> list[MemoryPart]:
    if not config.objective.thinks:
        return []
    gathered = _gathered_bytes(config, shapes.parameters, number_bytes)
    if config.engine.zero_stage == 3 and config.engine.generation == "gathered":
        gathered = shapes.parameters * number_bytes
    tokens = sizes.prefix_tokens + config.thought.max_thought_tokens
    return [
        MemoryPart("gathered weights", gathered, "sampling"),
        MemoryPart("keys, values and states", cache_bytes(shapes, sizes.sampling_rows, tokens, number_bytes), "sampling"),
        MemoryPart("next-token softmax", sizes.sampling_rows * shapes.vocabulary * SAMPLING_BYTES_PER_LOGIT, "sampling"),
    ]


def _update_parts(config: Config, shapes: ModelShapes, sizes: _StepSizes, number_bytes: int, activations: int) -> list[MemoryPart]:
    # Queried hidden states with their float32 gradient, the gradient of the head, and the tiles.
    head = sizes.micro_batch_queries * shapes.width * (number_bytes + 4) + shapes.vocabulary * shapes.width * number_bytes + LOGITS_TILE_BYTES
    return [
        MemoryPart("gathered layers", _gathered_bytes(config, shapes.parameters, number_bytes), "update"),
        MemoryPart("activations", activations, "update"),
        MemoryPart("LM head and logits tile", head, "update"),
    ]


def step_flops(config: Config, shapes: ModelShapes, *, format_tokens: int = FORMAT_TOKENS) -> dict[str, float]:
    """FLOPs of one step by ledger phase, over all ranks, as the ledger counts them.

    `score` is the document pass that the selectors entropy and surprisal need: the targets after the
    thoughts are read off the update's own forward pass and cost the head rows counted there. `teacher`
    is one document pass for all positions, on the steps that score the baseline, and with a KL term
    one pass of the starting checkpoint over the thoughts.
    """
    sizes = _StepSizes.of(config, 1, format_tokens)
    documents, document = config.optim.batch_size, config.data.max_document_tokens
    thought, horizon = config.thought.max_thought_tokens, config.target.horizon
    rows = _rows(sizes.thoughts, sizes.row_tokens, head_rows=sizes.thoughts * (thought + horizon))
    # A thought's last token is sampled and not run.
    run = thought - 1
    decode = Work(tokens=sizes.thoughts * run, pairs=sizes.thoughts * causal_pairs(run, sizes.prefix_tokens - 1), head_rows=sizes.thoughts * run)
    selects = config.objective.thinks and config.position.selector in ("entropy", "surprisal")
    baseline = config.objective.thinks and config.baseline.kind != "none"
    no_think = _rows(documents, document, head_rows=sizes.positions * (horizon + 1))
    document_pass = _rows(documents, document, head_rows=documents * (document - 1))
    # Beside a thought, the LM loss's own pass also gives the policy's no-think log-probabilities.
    lm_pass = document_pass + Work(head_rows=no_think.head_rows)
    return {
        "prefill": forward_flops(shapes, _rows(sizes.positions, sizes.prefix_tokens - 1, head_rows=sizes.positions)),
        "decode": forward_flops(shapes, decode),
        "score": forward_flops(shapes, document_pass) if selects else 0.0,
        "teacher": (forward_flops(shapes, no_think) / config.baseline.every_n_steps if baseline else 0.0)
                   + (forward_flops(shapes, rows) if config.objective.kl_weight > 0 else 0.0),
        "train": 3 * forward_flops(shapes, rows) if config.objective.thinks else 0.0,
        "lm": 3 * forward_flops(shapes, lm_pass) if config.objective.lm_weight > 0 else 0.0,
    }


def _rows(count: int, tokens: int, *, head_rows: int) -> Work:
    """Work of separate rows of one length."""
    return Work(tokens=count * tokens, pairs=count * causal_pairs(tokens), head_rows=head_rows)


def _steps(config: Config, step_input_tokens: int, flops: float) -> int:
    """Steps until the first limit; documents shorter than the longest take more steps to read as many tokens."""
    budget = config.budget
    limits = [budget.steps, budget.tokens and _ceil_div(budget.tokens, step_input_tokens), budget.flops and int(-(-budget.flops // flops))]
    return min(limit for limit in limits if limit is not None)


def _disk_free(run_dir: Path) -> int:
    """Free bytes where the run folder will be: at its nearest ancestor that exists."""
    parent = next(path for path in run_dir.absolute().parents if path.exists())
    return shutil.disk_usage(parent).free


def render_plan(plan: Plan) -> str:
    """The plan as plain text, for `--dry-run`. GB are 10^9 bytes."""
    lines = [f"Memory per device, GB ({plan.world_size} ranks, ZeRO stage {plan.zero_stage}, {plan.dtype})"]
    lines += [_line(f"{part.name} [{part.when}]", f"{part.num_bytes / GB:.2f}") for part in plan.memory if part.num_bytes]
    lines += [_line(f"sum while {verb}", f"{plan.bytes_during(when) / GB:.2f}") for when, verb in (("sampling", "sampling"), ("update", "updating"))]
    lines.append(_line("peak", f"{plan.peak_bytes / GB:.2f}"))
    other = "without" if plan.activation_checkpointing else "with"
    lines.append(_line(f"activations {other} activation checkpointing", f"{plan.other_activation_bytes / GB:.2f}"))
    if plan.host_bytes:
        lines.append(_line("host memory per rank (offloaded optimizer)", f"{plan.host_bytes / GB:.2f}"))
    if plan.device_bytes is not None:
        verdict = "fits" if fits(plan, plan.device_bytes) else "DOES NOT FIT"
        lines.append(f"  {verdict} in {plan.device_bytes / GB:.2f} GB, {USABLE_FRACTION:.0%} of it usable")
    lines += ["", "FLOPs per step, all ranks (an upper bound: longest documents and thoughts)"]
    lines += [_line(phase, f"{flops:.3e}") for phase, flops in plan.phase_flops.items() if flops]
    lines.append(_line("sum", f"{plan.step_flops:.3e}"))
    lines += ["", "Tokens and budget", _line("input tokens per step", f"{plan.input_tokens:,}"), _line("thought tokens per step", f"{plan.thought_tokens:,}")]
    lines += [_line("steps", f"{plan.steps:,}"), _line("input tokens of the run", f"{plan.steps * plan.input_tokens:,}")]
    lines += [_line("FLOPs of the run", f"{plan.steps * plan.step_flops:.3e}"), _line("the paper's T_flop of the run, tokens", f"{plan.paper_flops:.3e}")]
    lines += ["", "Disk, GB", _line("one checkpoint", f"{plan.checkpoint_bytes / GB:.2f}")]
    lines += [_line("checkpoints kept and one being written", f"{plan.disk_bytes / GB:.2f}"), _line("free", f"{plan.disk_free_bytes / GB:.2f}")]
    if plan.disk_bytes > plan.disk_free_bytes:
        lines.append("  NOT ENOUGH DISK: lower checkpoint.keep or choose another run.dir")
    return "\n".join(lines)


def _line(name: str, value: str) -> str:
    return f"  {name:<46}{value:>22}"
