"""What is told of a step when it is made: metrics, thoughts, journal, alarms."""

import math
import resource

import torch

from rlp.learn.engine import StepResult
from rlp.learn.guard import MAX_REFUSED_IN_A_ROW, NumericsError
from rlp.measure.thought_statistics import combine_parts
from rlp.process.faults import fault
from rlp.process.run_logs import append_json_line, refused_logs
from rlp.run.budget import fraction_spent
from rlp.run.saved import save
from rlp.run.state import OpenRun
from rlp.sampling.mismatch import mismatch_of
from rlp.step.record import StepRecord


def close_step(run: OpenRun, step: StepRecord, result: StepResult, progress_before: float) -> None:
    """Count a step as made, close the ledger's, record its metrics, and stop a run whose updates
    are refused again and again.

    Args:
        progress_before: fraction of the budget that was spent before it.

    Raises:
        NumericsError: the run ends.
    """
    fault("step.before_log")
    run.parts.pulse.end()
    state, ledger = run.state, run.parts.ledger
    state.data, state.step = run.opened.setup.stream.state(), step.number
    state.is_saved = state.disposable = False
    cost = ledger.close_step(run.ranks)
    seconds = run.parts.pulse.seconds()
    state.seconds += seconds

    values = step.tally.reduce(run.ranks)
    combine_parts(values)
    values |= measure_step(run, step, result, cost, seconds, progress_before)
    unusable = {
        name for name, value in values.items() if value is not None and not math.isfinite(value)
    }
    run.log.step(
        step.number, {name: value for name, value in values.items() if name not in unusable}
    )
    tell_thoughts(run, step)
    run.journal.close_step(
        step.number,
        step.documents,
        values,
        applied=result.applied,
        tokens=ledger.input_tokens,
        flops=ledger.flops,
    )
    raise_alarms(run, values)
    stop_without_updates(run)


def measure_step(
    run: OpenRun,
    step: StepRecord,
    result: StepResult,
    cost: dict,
    seconds: float,
    progress_before: float,
) -> dict[str, float | None]:
    """Metrics of the update, the budget and the clock. A collective.

    Args:
        cost: the ledger's account of the step.
    """
    parts, guard, ledger = run.parts, run.parts.guard, run.parts.ledger
    phases = cost["phases"]
    sampling = phases["prefill"]["seconds"] + phases["decode"]["seconds"]
    sampled = phases["decode"]["tokens_generated"]
    done = fraction_spent(run.config.budget, run.state.step, ledger)
    return {
        "optim/grad_norm": result.grad_norm,
        "optim/learning_rate": step.learning_rate,
        "optim/skipped": guard.skipped,
        "optim/spikes": guard.spikes if run.config.optim.spike_factor else None,
        "teacher/distance": parts.teacher.distance(),
        "data/bad_documents": sum(run.opened.setup.stream.bad.values()),
        "budget/tokens": ledger.input_tokens,
        "budget/flops": ledger.flops,
        "perf/step_s": seconds,
        "perf/thought_tokens_per_s": sampled / sampling if sampled else None,
        "perf/peak_memory_bytes": peak_memory(run),
        "perf/tokens_per_s": (cost["input_tokens"] + sampled) / seconds,
        "perf/left_s": run.pace.left_s(done - progress_before, seconds, 1 - done),
    }


def peak_memory(run: OpenRun) -> float:
    """Bytes, the largest of all ranks. A collective."""
    if run.ranks.device.type == "cuda":
        local = torch.cuda.max_memory_allocated()
    else:
        local = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return float(max(run.ranks.gather(local)))


def tell_thoughts(run: OpenRun, step: StepRecord) -> None:
    """Write the most and the least helpful thoughts of the step, at logging intervals. A
    collective."""
    told = step.told.gather(run.ranks) if step.told is not None else []
    if not run.ranks.is_first:
        return
    decode = run.opened.setup.tokenizer.decode
    for thought in told:
        parts = ("prefix_tail", "thought", "prediction", "target")
        texts = {name: decode(thought[name]) for name in parts if name in thought}
        append_json_line(run.folder.thoughts_jsonl, {"step": step.number} | thought | texts)


def raise_alarms(run: OpenRun, values: dict[str, float | None]) -> None:
    """Say loudly what is wrong: a disk that refuses lines, and metrics that do not look like
    learning."""
    step, log = run.state.step, run.log
    if waiting := refused_logs(run.folder):
        log.say(
            f"step {step}: the disk refuses {', '.join(waiting)}; lines wait in memory, and no"
            f" checkpoint is made without them. Make room in {run.folder.path}"
        )
    known = {name: value for name, value in values.items() if value is not None}
    for alarm in run.watch.see(known, has_baseline=run.config.baseline.kind != "none"):
        log.alarm(step, alarm)


def tell_mismatch(run: OpenRun, step: int, means: dict[str, float]) -> None:
    """Say loudly that sampler and trainer are two policies, before an update is made from that. A
    collective.

    Args:
        means: `MISMATCH_METRICS` of all ranks, of ratios that no update has moved.

    Raises:
        NumericsError: they are so far apart that nothing can be trained like that. No update is
            made with these thoughts.
    """
    found = mismatch_of(means, run.dtype, run.config.thought.temperature)
    if found is None:
        return
    mismatch, ends = found
    advice = "Compare with engine.layout=repeated and engine.dtype=float32, and report it."
    if ends:
        raise NumericsError(
            f"step {step}: {mismatch}. The thoughts are not those of the policy that is trained,"
            " and no update was made with them."
            f" {run.host.where_to_go_on(run.folder)} {advice}"
        )
    run.log.alarm(step, f"{mismatch}. {advice}")


def stop_without_updates(run: OpenRun) -> None:
    """Save, and end a run of which several steps in a row have made no update.

    Raises:
        NumericsError: it ends.
    """
    guard = run.parts.guard
    guard.close_step()
    if guard.in_a_row < MAX_REFUSED_IN_A_ROW:
        return
    save(run)
    raise NumericsError(
        f"{guard.in_a_row} steps in a row made no update (the last is step {run.state.step});"
        f" the weights are those from before. {run.host.where_to_go_on(run.folder)} Lower"
        " optim.learning_rate, or look at the documents named above."
    )
