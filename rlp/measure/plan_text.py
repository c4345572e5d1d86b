"""A plan as plain text, for `rlp plan` and `--dry-run`. GB are 10^9 bytes."""

import textwrap

from rlp.measure.plan import Plan, fits
from rlp.measure.plan_memory import GB, USABLE_FRACTION
from rlp.measure.plan_time import PhaseTime, TimePlan
from rlp.model.scans import DISTRIBUTIONS


def render_plan(plan: Plan) -> str:
    """All of it, line by line."""
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
        *_time_lines(plan),
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
            _line("steps", _steps_in(plan)),
            _line("the paper's T_flop of a step, tokens", f"{plan.step_paper_flops:.3e}"),
        ]
    return [
        *lines,
        _line("steps" if plan.seconds is None else "steps, at most", f"{plan.steps:,}"),
        _line("input tokens of the run", f"{plan.steps * plan.input_tokens:,}"),
        _line("FLOPs of the run", f"{plan.steps * plan.step_flops:.3e}"),
        _line("the paper's T_flop of the run, tokens", f"{plan.steps * plan.step_paper_flops:.3e}"),
    ]


def _time_lines(plan: Plan) -> list[str]:
    """Seconds of a step and of the run, and what they rest on."""
    time = plan.time
    if time is None:
        return []
    lines = [
        "",
        f"Seconds per step on {time.speed.name} ({time.lengths})",
        *(line for phase in time.phases for line in _phase_lines(phase)),
        f"  {'sum':<10}{_seconds(time.step_seconds)}  {_sampling_share(time)}",
    ]
    if time.straggling > 1:
        lines.append(f"  the slowest rank samples {time.straggling:.2f} times as long as the mean")
    for once in (time.evaluation, time.export):
        lines += _phase_lines(once) if once is not None else []
    if plan.steps is not None and plan.evaluations is not None:
        hours = time.run_seconds(plan.steps, plan.evaluations) / 3600
        lines.append(
            f"  {'run':<10}{hours:>8,.3g} h  {plan.steps:,} steps, {plan.evaluations} evaluations"
            f" and the export; {hours * plan.world_size:,.3g} device hours"
        )
    return [*lines, *(f"  {line}" for line in time.speed.rests_on)]


def _phase_lines(phase: PhaseTime) -> list[str]:
    """Its seconds, and what they are made of, folded beside them."""
    why = textwrap.wrap(phase.rests_on, 76)
    first = f"  {phase.phase:<10}{_seconds(phase.seconds)}  {why[0]}"
    return [first, *(" " * 22 + more for more in why[1:])]


def _seconds(seconds: float) -> str:
    return f"{seconds:>10,.1f}" if seconds >= 10 else f"{seconds:>10.2g}"


def _sampling_share(time: TimePlan) -> str:
    sampling = sum(
        phase.seconds for phase in time.phases if phase.phase in ("prefill", "decode", "draw")
    )
    return f"{sampling / time.step_seconds:.0%} of it sampling"


def _steps_in(plan: Plan) -> str:
    """How many steps a limit of seconds alone leaves."""
    if plan.time is None or plan.seconds is None:
        return "as the seconds allow"
    return f"about {plan.seconds // plan.time.step_seconds:,.0f}"


def _line(name: str, value: str) -> str:
    return f"  {name:<46}{value:>22}"


def _gb_line(name: str, num_bytes: int) -> str:
    return _line(name, f"{num_bytes / GB:.2f}")
