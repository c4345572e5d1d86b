"""What a run will need, before it starts: memory per device, FLOPs and tokens per step, disk.

Arithmetic only: nothing is allocated and no weight is read. Documents are taken at
`data.max_document_tokens`, thoughts at `thought.max_thought_tokens` and every position at the end
of its document, so each figure is an upper bound for the step it describes. FLOPs of evaluations
are not counted.

Both layouts are planned (`rlp.model.layout`). A thought is cut in two:

    context = I + P - H            instruction and document before the position
    branch = O + L + E + H - 1     open marker, thought, forced close marker, all targets but the
                                   last

In `repeated` every thought is a row of context and branch; in `tree` the context is run once for
all thoughts of a document.

Letters
    n  parameters;  W  ranks (one device each);  c  bytes of a number in the compute dtype (2 or 4)
    B  documents per step;  K  positions per document;  G  thoughts per position;  N = B K G;  g  of
       each group in one forward
    P  document tokens;  L  thought tokens;  H  target tokens;  O, E, I  tokens of open marker,
       close marker, instruction
"""

import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import psutil
import torch

from rlp.config import BudgetConfig, Config
from rlp.measure.machines import Speed
from rlp.measure.plan_memory import (
    USABLE_FRACTION,
    MemoryPart,
    activation_bytes,
    checkpoint_bytes,
    evaluation_parts,
    plain_scan_parts,
    process_parts,
    sampling_parts,
    state_parts,
    update_parts,
)
from rlp.measure.plan_time import TimePlan, plan_time
from rlp.measure.plan_work import (
    QWEN3_TOKENS,
    FormatTokens,
    StepSizes,
    forward_tokens,
    longest_document_tokens,
    step_flops,
)
from rlp.model.loading import choose_dtype
from rlp.model.shapes import ModelShapes
from rlp.process.machine import available_memory_bytes
from rlp.process.ranks import ranks_of_this_machine


@dataclass(frozen=True, slots=True)
class Plan:
    """What a run needs."""

    world_size: int
    zero_stage: int
    dtype: str
    why_dtype: str
    number_bytes: int
    """Of a number in it."""
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
    """Of a CPU's machine, for one rank: what it has free, in its container's limits, and what this
    process holds already; None on a GPU."""
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
    checkpoint_bytes: int
    """One checkpoint, over all ranks."""
    export_bytes: int
    """The model that the end of the run writes, in float32."""
    disk_bytes: int
    """Largest use of the disk: the checkpoints kept, and the one being written or the export."""
    disk_free_bytes: int
    evaluations: int | None = None
    """Of the held-out panel, over the run; None where its steps are not known."""
    time: TimePlan | None = None
    """None where the speed of the devices is not known."""
    counted_without: tuple[str, ...] = ()
    """What the FLOPs leave out (`ModelShapes.uncounted`)."""
    scan_packages: tuple[str, ...] = ()
    """What the model's state-space layers import for their fast functions (`rlp.model.scans`)."""
    plain_scans: bool = False
    """Whether they run without: on a CPU, and where one of these can not be imported."""
    plain_scan_bytes: int = 0
    """What one of them then holds in the largest forward; part of `memory` where they do."""
    relief: tuple[tuple[str, int], ...] = ()
    """Where the run does not fit: settings to write, each on top of the ones before it, with the
    peak that they lead to."""

    def bytes_during(self, when: str) -> int:
        """Bytes on one device while it samples, updates or evaluates."""
        return sum(part.num_bytes for part in self.memory if part.when in ("always", when))

    @property
    def peak_bytes(self) -> int:
        """The largest that the run comes to."""
        return max(self.bytes_during(when) for when in ("sampling", "update", "evaluation"))

    @property
    def step_paper_flops(self) -> int:
        """The paper's T_flop of a step: n l bs + T_inp, in tokens."""
        return self.thought_tokens + self.input_tokens

    @property
    def step_flops(self) -> float:
        """FLOPs per step over all phases and ranks."""
        return sum(self.phase_flops.values())


def fits(plan: Plan, device_bytes: int | None = None) -> bool:
    """Whether the peak leaves a GPU the part that the plan does not count (`USABLE_FRACTION`), and
    a CPU nothing to swap. True where the memory is not known.

    Args:
        device_bytes: another GPU's memory than the plan's.
    """
    device_bytes = device_bytes or plan.device_bytes
    if device_bytes is not None:
        return plan.peak_bytes <= USABLE_FRACTION * device_bytes
    return plan.available_bytes is None or plan.peak_bytes <= plan.available_bytes


def plan_run(
    config: Config,
    shapes: ModelShapes,
    ranks_world_size: int,
    device_bytes: int | None = None,
    *,
    layout: str,
    format_tokens: FormatTokens = QWEN3_TOKENS,
    dtype: tuple[torch.dtype, str] | None = None,
    missing_packages: tuple[str, ...] = (),
    speed: Speed | None = None,
    mean_thought_tokens: float | None = None,
) -> Plan:
    """Add up a run.

    Args:
        shapes: of the model (`model_shapes`).
        ranks_world_size: W.
        device_bytes: memory of one GPU; None plans for a CPU, this one.
        layout: `repeated` or `tree` (`choose_layout`).
        dtype: and why; None chooses (`choose_dtype`).
        missing_packages: of `ModelShapes.scan_packages`, those that can not be imported.
        speed: of the devices, for the seconds of a step; None plans none.
        mean_thought_tokens: that seconds are planned with; None for the worst case.

    Raises:
        ConfigError: documents are too short for the positions asked for, or too long for
            `optim.tokens_per_micro_batch`.
    """
    plan_of = partial(
        _add_up,
        shapes=shapes,
        world_size=ranks_world_size,
        device_bytes=device_bytes,
        layout=layout,
        format_tokens=format_tokens,
        dtype=dtype,
        missing_packages=missing_packages,
    )
    plan = plan_of(config)
    sizes = StepSizes.of(config, ranks_world_size, format_tokens, layout=layout)
    if not fits(plan):
        tokens_of = partial(longest_document_tokens, sizes, layout)
        plan = replace(plan, relief=_relief(config, plan_of, tokens_of))
    if speed is None:
        return plan
    time = plan_time(
        config,
        shapes,
        sizes,
        speed,
        world_size=ranks_world_size,
        layout=layout,
        number_bytes=plan.number_bytes,
        phase_flops=plan.phase_flops,
        mean_thought_tokens=mean_thought_tokens,
    )
    return replace(plan, time=time)


def _relief(
    config: Config, plan_of: Callable[[Config], Plan], tokens_of: Callable[[int], int]
) -> tuple[tuple[str, int], ...]:
    """Settings that make the run smaller, those first that change nothing but its speed, each on
    top of the ones before it, until it fits.

    Args:
        tokens_of: so many thoughts of each group in a forward (`longest_document_tokens`).

    Returns:
        (setting, peak with it), of those that help.
    """
    group = config.thought.group_size

    def slices(thoughts: int) -> tuple[str, str, int]:
        if config.optim.thoughts_per_forward is not None:
            return "optim", "thoughts_per_forward", thoughts
        return "optim", "tokens_per_micro_batch", tokens_of(thoughts)

    steps = [
        ("optim", "micro_batch_size", 1),
        ("sampling", "slots", group),
        slices(max(1, group // 4)),
        ("engine", "activation_checkpointing", True),
        ("sampling", "slots", 1),
        slices(1),
        ("baseline", "kind", "self"),
    ]
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


def _add_up(
    config: Config,
    *,
    shapes: ModelShapes,
    world_size: int,
    device_bytes: int | None,
    layout: str,
    format_tokens: FormatTokens,
    dtype: tuple[torch.dtype, str] | None,
    missing_packages: tuple[str, ...],
) -> Plan:
    """The plan without its relief. Arguments as in `plan_run`."""
    on_cpu = device_bytes is None
    plain = shapes.scan_layers > 0 and (on_cpu or bool(missing_packages))
    dtype, why_dtype = dtype or choose_dtype(
        config, torch.device("cpu" if on_cpu else "cuda"), shapes.width
    )
    sizes = StepSizes.of(config, world_size, format_tokens, layout=layout)
    memory, host_bytes, other_activations = _memory(
        config, shapes, sizes, world_size, layout, dtype.itemsize, on_cpu=on_cpu, plain=plain
    )

    phase_flops = step_flops(config, shapes, world_size, layout=layout, format_tokens=format_tokens)
    one_checkpoint, export = checkpoint_bytes(config, shapes.parameters), 4 * shapes.parameters
    plan = Plan(
        world_size=world_size,
        zero_stage=config.engine.zero_stage,
        dtype=str(dtype).removeprefix("torch."),
        why_dtype=why_dtype,
        number_bytes=dtype.itemsize,
        layout=layout,
        activation_checkpointing=config.engine.activation_checkpointing,
        memory=memory,
        other_activation_bytes=other_activations,
        host_bytes=host_bytes,
        device_bytes=device_bytes,
        available_bytes=_available_bytes() if on_cpu else None,
        phase_flops=phase_flops,
        input_tokens=config.optim.batch_size * config.data.max_document_tokens,
        thought_tokens=sizes.thoughts * config.thought.max_thought_tokens,
        steps=None,
        seconds=config.budget.seconds,
        checkpoint_bytes=one_checkpoint,
        export_bytes=export,
        disk_bytes=one_checkpoint * config.checkpoint.keep + max(one_checkpoint, export),
        disk_free_bytes=_disk_free(Path(config.run.dir)),
        counted_without=shapes.uncounted,
        scan_packages=shapes.scan_packages,
        plain_scans=plain,
        plain_scan_bytes=forward_tokens(sizes, layout) * shapes.plain_scan_bytes,
    )
    steps = _steps(config.budget, plan)
    return replace(plan, steps=steps, evaluations=_evaluations(config, steps))


def _evaluations(config: Config, steps: int | None) -> int | None:
    """Before and after the run, and every so many steps."""
    if not config.data.held_out:
        return 0
    every = config.evaluation.every_n_steps
    return None if steps is None else 2 + ((steps - 1) // every if every else 0)


def _memory(
    config: Config,
    shapes: ModelShapes,
    sizes: StepSizes,
    world_size: int,
    layout: str,
    number_bytes: int,
    *,
    on_cpu: bool,
    plain: bool,
) -> tuple[tuple[MemoryPart, ...], int, int]:
    """All that a device holds; what is offloaded to the host; and activations of a micro-batch if
    activation checkpointing were the other way.

    Args:
        plain: state-space layers run in plain torch.
    """
    checkpointing = config.engine.activation_checkpointing
    activations, other_activations = (
        activation_bytes(shapes, forward_tokens(sizes, layout), number_bytes, choice)
        for choice in (checkpointing, not checkpointing)
    )
    state, host_bytes = state_parts(config, shapes.parameters, world_size, number_bytes)
    update = update_parts(config, shapes, sizes, number_bytes, activations)
    memory = (
        *state,
        *(process_parts(shapes, [*state, *update], world_size, number_bytes) if on_cpu else ()),
        *evaluation_parts(
            config,
            shapes,
            sizes,
            layout,
            number_bytes,
            world_size=world_size,
            plain_scans=plain,
        ),
        *sampling_parts(config, shapes, sizes, layout, number_bytes),
        *update,
        *(plain_scan_parts(config, shapes, sizes, layout) if plain else ()),
    )
    return memory, host_bytes, other_activations


def _steps(budget: BudgetConfig, plan: Plan) -> int | None:
    """Steps until the first limit; documents shorter than the longest take more steps to read as
    many tokens."""
    steps = [budget.steps] if budget.steps else []
    for limit, of_a_step in (
        (budget.tokens, plan.input_tokens),
        (budget.flops, plan.step_flops),
        (budget.paper_flops, plan.step_paper_flops),
    ):
        if limit is not None:
            steps.append(math.ceil(limit / of_a_step))
    return min(steps, default=None)


def _available_bytes() -> int | None:
    """Memory that one rank of this machine may fill, with what this process has filled of it
    already."""
    free = available_memory_bytes()
    if free is None:
        return None
    return free // ranks_of_this_machine() + psutil.Process().memory_info().rss


def _disk_free(run_dir: Path) -> int:
    """Free bytes where the run folder will be: at its nearest ancestor that exists."""
    parent = next(path for path in run_dir.absolute().parents if path.exists())
    return shutil.disk_usage(parent).free
