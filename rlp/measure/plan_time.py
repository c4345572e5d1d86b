"""What a step takes, phase by phase, on a machine whose speed is known (`machines`).

    pass        flops / rate, and operators x launch: on a GPU the larger, because Python runs ahead
                of the device, on a CPU both
    decode      steps x (reading the weights, the trunks' keys and the slots' own, or their FLOPs,
                and operators as above); a recorded step pays `graphed_s` for each kernel instead,
                and reading on top
    draw        steps x passes over [slots, V] in float32
    train       forward and backward, the forward again with activation checkpointing, what ranks
                send each other, and the optimizer's own reading and writing
    save        bytes of a checkpoint / disk, spread over the steps between two

Seconds are those of the slowest rank. What ranks send is not overlapped with arithmetic here: an
upper bound. Operators per layer are counted (tests/measure/test_plan_time.py).
"""

from dataclasses import dataclass, replace

import numpy as np

from rlp.config import Config, ConfigError
from rlp.measure.decode_steps import Decoding, decoding
from rlp.measure.machines import Speed
from rlp.measure.plan_memory import checkpoint_bytes, panel_share
from rlp.measure.plan_work import (
    StepSizes,
    ceil_div,
    document_work,
    forward_tokens,
    slots_and_trunks,
    thought_work,
)
from rlp.model.shapes import ModelShapes, Work, forward_flops, row_work
from rlp.model.slot_attention import key_room
from rlp.sampling.native import LOOK_EVERY
from rlp.sampling.schedule import READ_TOKENS

OPERATORS = {"decode": 80, "read": 60, "train": 180, "optimizer": 350}
"""That compute, per layer: of a decoded token, a forward pass, a forward and a backward pass of a
micro-batch, and a step of the optimizer."""

BESIDE_LAYERS = 60
"""Operators of a pass beside those of its layers: embedding, head, draw or loss."""

DRAW_PASSES = {"cuda": 3, "cpu": 12}
"""Over [slots, V] in float32 to make logits and draw a token of them: by one kernel that reads them
twice, or operator by operator."""

OPTIMIZER_PASSES = 24
"""Over the float32 state to update it: AdamW and the EMA are operator by operator."""


@dataclass(frozen=True, slots=True)
class PhaseTime:
    """Seconds of a step, or of one evaluation, and what they are made of."""

    phase: str
    seconds: float
    rests_on: str


@dataclass(frozen=True, slots=True)
class TimePlan:
    """What a step takes."""

    speed: Speed
    lengths: str
    """What is assumed of them."""
    phases: tuple[PhaseTime, ...]
    """They add up to a step; `save` is its share."""
    evaluation: PhaseTime | None
    """One evaluation of the held-out panel."""
    export: PhaseTime | None
    straggling: float
    """Sampling of the slowest rank over that of the mean one."""

    @property
    def step_seconds(self) -> float:
        """Of all phases."""
        return sum(phase.seconds for phase in self.phases)

    def run_seconds(self, steps: int, evaluations: int) -> float:
        """Of a whole run."""
        more = evaluations * self.evaluation.seconds if self.evaluation else 0.0
        return steps * self.step_seconds + more + (self.export.seconds if self.export else 0.0)


@dataclass(frozen=True, slots=True)
class _Run:
    """What all phases are planned from."""

    config: Config
    mean_thought_tokens: float | None
    shapes: ModelShapes
    sizes: StepSizes
    speed: Speed
    world_size: int
    layout: str
    number_bytes: int
    phase_flops: dict[str, float]
    """Per step, over all ranks, for thoughts at their budget."""

    def decoding(self, thoughts: int) -> Decoding:
        """Of so many thoughts on each rank."""
        return decoding(
            max(1, thoughts),
            self.sizes.slots,
            self.sizes.thought_tokens,
            self.mean_thought_tokens,
            world_size=self.world_size,
            look_every=LOOK_EVERY[self.device],
        )

    @property
    def device(self) -> str:
        """`cuda` or `cpu`."""
        return "cuda" if self.speed.runs_ahead else "cpu"

    @property
    def thought_share(self) -> float:
        """Mean length of a thought over its budget."""
        return (self.mean_thought_tokens or self.sizes.thought_tokens) / self.sizes.thought_tokens

    def passes(self, flops: float, passes: float, operators: int) -> tuple[float, str]:
        """Seconds of some passes of the model on one rank, and of what.

        Args:
            flops: of all of them.
            operators: of each, per layer.
        """
        speed = self.speed
        called = passes * (self.shapes.layers * operators + BESIDE_LAYERS)
        computing, calling = flops / speed.flops, called * speed.launch_s
        computed = f"{flops:.2e} FLOPs a rank"
        calls = f"{called:,.0f} operators"
        if not speed.runs_ahead:
            return computing + calling, f"{computed} and {calls}"
        return max((computing, computed), (calling, calls))

    def sent(self, num_bytes: float) -> float:
        """Seconds in which each rank sends, and gets, so much."""
        share = (self.world_size - 1) / self.world_size
        rate = self.speed.link_bytes_per_s
        return share * num_bytes / rate if rate and share else 0.0


def plan_time(
    config: Config,
    shapes: ModelShapes,
    sizes: StepSizes,
    speed: Speed,
    *,
    world_size: int,
    layout: str,
    number_bytes: int,
    phase_flops: dict[str, float],
    mean_thought_tokens: float | None = None,
) -> TimePlan:
    """Seconds of a step.

    Args:
        number_bytes: of a number in the compute dtype.
        phase_flops: `step_flops`.
        mean_thought_tokens: None for the worst case, every thought at its budget.

    Raises:
        ConfigError: a mean that no thoughts of this budget have.
    """
    budget = sizes.thought_tokens
    if mean_thought_tokens is not None and not 1 <= mean_thought_tokens <= budget:
        raise ConfigError(
            f"--mean-thought-tokens {mean_thought_tokens:g}: expected 1 to"
            f" thought.max_thought_tokens={budget}."
        )
    of_a_rank = ceil_div(sizes.documents, world_size) * sizes.per_document * sizes.group_size
    lengths = "every thought at its budget: the worst case"
    if mean_thought_tokens is not None:
        lengths = f"thoughts of {mean_thought_tokens:g} tokens in the mean, exponential, cut at"
        lengths += f" {budget}"
    run = _Run(
        config=config,
        shapes=shapes,
        sizes=sizes,
        speed=speed,
        world_size=world_size,
        layout=layout,
        number_bytes=number_bytes,
        phase_flops=phase_flops,
        mean_thought_tokens=mean_thought_tokens,
    )
    thinks = sizes.per_document > 0
    sampled = run.decoding(of_a_rank)
    phases = (
        *((_prefill(run), *_decode(run, sampled)) if thinks else ()),
        *_scoring(run),
        _training(run),
        _saving(run),
    )
    return TimePlan(
        speed=speed,
        lengths=lengths,
        phases=tuple(phase for phase in phases if phase is not None),
        evaluation=_evaluation(run),
        export=_written("export", 4 * shapes.parameters, 1, speed),
        straggling=sampled.straggling if thinks else 1.0,
    )


def _prefill(run: _Run) -> PhaseTime:
    """Trunks, packed into forwards: documents, or the contexts of positions."""
    sizes = run.sizes
    trunks = sizes.documents * (sizes.per_document if run.layout == "repeated" else 1)
    reads = ceil_div(ceil_div(trunks, run.world_size) * sizes.context_tokens, READ_TOKENS)
    flops = run.phase_flops["prefill"] / run.world_size
    seconds, why = run.passes(flops, reads, OPERATORS["read"])
    return PhaseTime("prefill", seconds, f"{why}; {reads:,} forwards")


def _decode(run: _Run, sampled: Decoding) -> tuple[PhaseTime, PhaseTime]:
    """Decode and draw."""
    speed, shapes, slots, steps = run.speed, run.shapes, run.sizes.slots, sampled.steps
    held = step_bytes(run, sampled)
    work = decode_work(run.sizes, sampled.lengths)
    computing = forward_flops(shapes, work) / sampled.steps_of_a_rank / speed.flops
    floor, of = max(
        (held / speed.bytes_per_s, f"reading {held / 1e9:.2f} GB"), (computing, "arithmetic")
    )
    called = shapes.layers * OPERATORS["decode"] + BESIDE_LAYERS
    calling = called * speed.launch_s
    if _is_recorded(run):
        one = floor + called * speed.graphed_s
        why = f"{of}, {called:,} kernels of a graph"
    elif speed.runs_ahead:
        one, why = max((floor, of), (calling, f"{called:,} operators"))
    else:
        one, why = floor + calling, f"{of}, {called:,} operators"

    passes = DRAW_PASSES[run.device]
    drawn = passes * slots * shapes.vocabulary * 4 / speed.bytes_per_s
    busy = min(1.0, sampled.lengths.sum() / sampled.steps / slots)
    return (
        PhaseTime(
            "decode",
            steps * one,
            f"{steps:,.0f} tokens in turn x {1e3 * one:.3g} ms: {why}; {busy:.0%} of {slots} slots"
            " busy",
        ),
        PhaseTime("draw", steps * drawn, f"as many x {passes} passes over {slots} x V in float32"),
    )


def _is_recorded(run: _Run) -> bool:
    """Whether a step is replayed as one graph: slots that share trunks, and forwards that are no
    collectives (`sampling.opening.wants_graph`)."""
    engine, asked = run.config.engine, run.config.sampling.graph
    if _samples_apart(run):
        return run.speed.graphed_s is not None
    together = engine.zero_stage == 3 and engine.generation == "synced"
    possible = run.speed.graphed_s is not None and run.layout == "tree" and not together
    return possible and asked != "off"


def _samples_apart(run: _Run) -> bool:
    """Whether vLLM samples: with graphs of its own, and no keys that thoughts share."""
    return run.config.sampling.engine == "vllm"


def decode_work(sizes: StepSizes, lengths: np.ndarray) -> Work:
    """Of thoughts of these lengths behind the longest context, on one rank."""
    run = lengths - 1
    prefix = sizes.context_tokens + sizes.format_tokens.open
    return row_work(run, int(run.sum()), before=np.full_like(run, prefix))


def step_bytes(run: _Run, sampled: Decoding) -> float:
    """Read to decode one token in every slot: weights and head once, and keys.

    Where trunks are shared, those of each trunk that is held once. On a GPU shapes are fixed, and
    all places are read, used or not; on a CPU each thought's up to where it is. Where they are not,
    each slot reads its context again, and its recurrent states, which it also writes.
    """
    sizes, shapes, lengths = run.sizes, run.shapes, sampled.lengths.astype(float)
    weights = (shapes.matmul_parameters + shapes.width * shapes.vocabulary) * run.number_bytes
    going = lengths.sum() / sampled.steps_of_a_rank
    # At a random moment, the thought of a random slot has run half of its length, and long ones
    # are met more often.
    own = (lengths**2).sum() / lengths.sum() / 2
    if run.layout == "repeated" or _samples_apart(run):
        tokens = going * (sizes.context_tokens + own)
    elif run.device == "cuda":
        tokens = sizes.held_documents * key_room(sizes.context_tokens)
        tokens += sizes.slots * key_room(sizes.decoded_tokens)
    else:
        trunks = np.ceil(going / (sizes.per_document * sizes.group_size))
        tokens = trunks * sizes.context_tokens + going * own
    states = going * shapes.state_elements * 4 * 2
    return float(weights + tokens * shapes.key_value_elements * run.number_bytes + states)


def _scoring(run: _Run) -> tuple[PhaseTime, ...]:
    """The passes without gradient beside sampling."""
    batches = _micro_batches(run)
    found = []
    for phase in ("score", "teacher"):
        flops = run.phase_flops[phase] / run.world_size
        if not flops:
            continue
        if phase == "score":
            flops *= run.thought_share
        seconds, why = run.passes(flops, batches, OPERATORS["read"])
        seconds += _gathered(run, batches)
        found.append(PhaseTime(phase, seconds, f"{why}; {batches:,} micro-batches"))
    return tuple(found)


def _gathered(run: _Run, times: float) -> float:
    """Seconds in which all weights come together so often, under stage 3."""
    if run.config.engine.zero_stage < 3:
        return 0.0
    return run.sent(times * run.shapes.parameters * run.number_bytes)


def _training(run: _Run) -> PhaseTime:
    """The update: forward, backward, reduction and optimizer."""
    config, sizes, shapes = run.config, run.sizes, run.shapes
    updates, stage = config.optim.updates_per_rollout, config.engine.zero_stage
    batches = updates * sizes.slices * _micro_batches(run)
    again = 4 / 3 if config.engine.activation_checkpointing else 1.0
    flops = run.phase_flops["train"] * _branch_share(run) + run.phase_flops["lm"]
    seconds, why = run.passes(
        again * flops / run.world_size, batches, round(again * OPERATORS["train"])
    )

    # Stage 1 sums float32 gradients once, as its sum over micro-batches is; 2 and 3 each time.
    gradient = shapes.parameters * (4 if stage <= 1 else run.number_bytes)
    reduced = run.sent((updates if stage <= 1 else batches) * gradient * (2 if stage == 0 else 1))
    spread = run.sent(updates * shapes.parameters * run.number_bytes) if stage in (1, 2) else 0.0
    sending = reduced + spread + _gathered(run, batches * (3 if again > 1 else 2))
    own = shapes.parameters / (run.world_size if stage else 1)
    optimizing = updates * (
        OPTIMIZER_PASSES * 4 * own / run.speed.bytes_per_s
        + OPERATORS["optimizer"] * shapes.layers * run.speed.launch_s
    )
    offloaded = ", which is offloaded: not counted" if config.engine.offload_optimizer else ""
    return PhaseTime(
        "train",
        seconds + sending + optimizing,
        f"{why}; {batches:,} micro-batches; {sending:.2g} s between ranks, {optimizing:.2g} s"
        f" optimizer{offloaded}",
    )


def _micro_batches(run: _Run) -> int:
    """Of a rank, before groups are cut into slices."""
    sizes, limit = run.sizes, run.sizes.tokens_per_micro_batch
    documents = ceil_div(sizes.documents, run.world_size)
    if limit is None:
        return ceil_div(documents, max(1, sizes.micro_batch_documents))
    whole = replace(sizes, micro_batch_documents=documents, tokens_per_micro_batch=None)
    tokens = forward_tokens(whole, run.layout) * _branch_share(run)
    return ceil_div(round(tokens), limit)


def _branch_share(run: _Run) -> float:
    """FLOPs of the update with thoughts of these lengths, over those with thoughts at the budget:
    in repeated rows the context is run for each, however short its thought."""
    if not run.sizes.thoughts or run.layout == "tree":
        return run.thought_share
    sizes = run.sizes
    fixed = sizes.context_tokens + sizes.branch_tokens - sizes.thought_tokens
    longest = fixed + sizes.thought_tokens
    return (fixed + run.thought_share * sizes.thought_tokens) / longest


def _evaluation(run: _Run) -> PhaseTime | None:
    """The held-out panel once: each rank samples its share, and scores it with its thoughts, with
    those of other positions, and without any by the policy and the teacher."""
    settings = run.config.evaluation
    if not run.config.data.held_out:
        return None
    documents, each = panel_share(run.config, run.world_size)
    group = settings.thoughts_per_position
    slots, held = slots_and_trunks(run.config.sampling.slots, documents, each)
    sizes = replace(
        run.sizes,
        documents=documents,
        per_document=each // group,
        group_size=group,
        thoughts_per_forward=group,
        slots=slots,
        held_documents=held,
    )
    panel = replace(run, sizes=sizes)
    decode, draw = _decode(panel, panel.decoding(documents * each))

    thoughts = forward_flops(run.shapes, thought_work(sizes, run.layout, lm=False))
    texts = forward_flops(run.shapes, document_work(replace(sizes, lm=True), run.layout))
    forwards = 3 * ceil_div(documents, settings.batch_size)
    scored, why = run.passes(
        2 * run.thought_share * thoughts + 3 * texts, forwards, OPERATORS["read"]
    )
    twice = settings.cold_temperature is not None
    return PhaseTime(
        "evaluation",
        (1 + twice) * (decode.seconds + draw.seconds + scored),
        f"{settings.panel_positions:,} positions x {group} thoughts"
        f"{' at two temperatures, each' if twice else ''}: {decode.rests_on}; scored by {why}",
    )


def _saving(run: _Run) -> PhaseTime | None:
    every = run.config.checkpoint.every_n_steps
    if not every:
        return None
    num_bytes = checkpoint_bytes(run.config, run.shapes.parameters)
    return _written("save", num_bytes, every, run.speed)


def _written(phase: str, num_bytes: int, every: int, speed: Speed) -> PhaseTime | None:
    """What is written every so many steps; None where the disk is not known."""
    if not speed.disk_bytes_per_s:
        return None
    whole = num_bytes / speed.disk_bytes_per_s
    often = f"; {whole:.3g} s every {every} steps" if every > 1 else ""
    return PhaseTime(phase, whole / every, f"{num_bytes / 1e9:.3g} GB to disk{often}")
