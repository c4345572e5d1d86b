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
from rlp.measure.plan_memory import (
    GB,
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
from rlp.measure.plan_work import (
    QWEN3_TOKENS,
    FormatTokens,
    StepSizes,
    forward_tokens,
    longest_document_tokens,
    step_flops,
)
from rlp.model.loading import choose_dtype
from rlp.model.scans import DISTRIBUTIONS
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
) -> Plan:
    """Add up a run.

    Args:
        shapes: of the model (`model_shapes`).
        ranks_world_size: W.
        device_bytes: memory of one GPU; None plans for a CPU, this one.
        layout: `repeated` or `tree` (`choose_layout`).
        dtype: and why; None chooses (`choose_dtype`).
        missing_packages: of `ModelShapes.scan_packages`, those that can not be imported.

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
    if fits(plan):
        return plan
    sizes = StepSizes.of(config, ranks_world_size, format_tokens, layout=layout)
    return replace(
        plan, relief=_relief(config, plan_of, partial(longest_document_tokens, sizes, layout))
    )


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
    return replace(plan, steps=_steps(config.budget, plan))


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
        *evaluation_parts(config, shapes, sizes, layout, number_bytes, plain_scans=plain),
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


def render_plan(plan: Plan) -> str:
    """The plan as plain text, for `--dry-run`. GB are 10^9 bytes."""
    lines = [
        f"Memory per device, GB ({plan.world_size} ranks, ZeRO stage {plan.zero_stage}, layout"
        f" {plan.layout})",
        f"  {plan.dtype}: {plan.why_dtype}",
        *_memory_lines(plan),
        *_fit_lines(plan),
        "",
        "FLOPs per step, all ranks (an upper bound: longest documents and thoughts)",
        *(_line(phase, f"{flops:.3e}") for phase, flops in plan.phase_flops.items() if flops),
        _line("sum", f"{plan.step_flops:.3e}"),
        *(f"  counted without {name}, whose cost is not known" for name in plan.counted_without),
        "",
        "Tokens and budget",
        _line("input tokens per step", f"{plan.input_tokens:,}"),
        _line("thought tokens per step", f"{plan.thought_tokens:,}"),
        *_run_lines(plan),
        "",
        "Disk, GB",
        _gb_line("one checkpoint", plan.checkpoint_bytes),
        _gb_line("the export", plan.export_bytes),
        _gb_line("checkpoints kept and one being written", plan.disk_bytes),
        _gb_line("free", plan.disk_free_bytes),
    ]
    if plan.disk_bytes > plan.disk_free_bytes:
        lines.append("  NOT ENOUGH DISK: lower checkpoint.keep or choose another run.dir")
    return "\n".join(lines)


def _memory_lines(plan: Plan) -> list[str]:
    """The parts, their sums over each time of a step, and the peak."""
    lines = []
    for part in plan.memory:
        if part.num_bytes:
            lines.append(_gb_line(f"{part.name} [{part.when}]", part.num_bytes))
    for when, verb in (
        ("sampling", "sampling"),
        ("update", "updating"),
        ("evaluation", "evaluating"),
    ):
        if any(part.when == when and part.num_bytes for part in plan.memory):
            lines.append(_gb_line(f"sum while {verb}", plan.bytes_during(when)))
    lines.append(_gb_line("peak", plan.peak_bytes))

    other = "without" if plan.activation_checkpointing else "with"
    lines.append(
        _gb_line(f"activations {other} activation checkpointing", plan.other_activation_bytes)
    )
    if plan.plain_scan_bytes and not plan.plain_scans:
        names = " and ".join(DISTRIBUTIONS[package] for package in plan.scan_packages)
        lines.append(_gb_line("one state-space layer in plain torch", plan.plain_scan_bytes))
        lines.append(f"    beside its activations, without {names} (docs/install.md)")
    if plan.host_bytes:
        lines.append(_gb_line("host memory per rank (offloaded optimizer)", plan.host_bytes))
    return lines


def _fit_lines(plan: Plan) -> list[str]:
    """Whether the run fits, and what to write where it does not."""
    if plan.device_bytes is not None:
        where = f"{plan.device_bytes / GB:.2f} GB, {USABLE_FRACTION:.0%} of it usable"
    elif plan.available_bytes is not None:
        where = f"the {plan.available_bytes / GB:.2f} GB that this machine has for a rank"
    else:
        return []
    if fits(plan):
        return [f"  fits in {where}"]

    told = [f"  DOES NOT FIT in {where}"]
    if plan.relief:
        told.append("  write, in this order until it fits:")
        told += [_line(f"  {setting}", f"peak {peak / GB:.2f}") for setting, peak in plan.relief]
    return [*told, "  else shorter documents or thoughts, or a smaller model"]


def _run_lines(plan: Plan) -> list[str]:
    """The whole run, as far as it is known before a step has been timed."""
    lines = [] if plan.seconds is None else [_line("seconds", f"{plan.seconds:,g}")]
    if plan.steps is None:
        return [
            *lines,
            _line("steps", "as the seconds allow"),
            _line("the paper's T_flop of a step, tokens", f"{plan.step_paper_flops:.3e}"),
        ]
    return [
        *lines,
        _line("steps" if plan.seconds is None else "steps, at most", f"{plan.steps:,}"),
        _line("input tokens of the run", f"{plan.steps * plan.input_tokens:,}"),
        _line("FLOPs of the run", f"{plan.steps * plan.step_flops:.3e}"),
        _line("the paper's T_flop of the run, tokens", f"{plan.steps * plan.step_paper_flops:.3e}"),
    ]


def _line(name: str, value: str) -> str:
    return f"  {name:<46}{value:>22}"


def _gb_line(name: str, num_bytes: int) -> str:
    return _line(name, f"{num_bytes / GB:.2f}")
