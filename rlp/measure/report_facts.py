"""Facts of a report: what the runs were, how far they are, and in what they differ."""

from rlp.measure.report_runs import Arm, RunRecord
from rlp.measure.report_tables import hours_and_minutes, number
from rlp.measure.verdict import budget_in_words


def common_facts(runs: list[RunRecord]) -> list[tuple[str, str]]:
    """Rows of (what, value) that are the same for all runs."""
    first, *others = [_facts(run) for run in runs]
    return [
        (what, value)
        for what, value in first.items()
        if all(facts[what] == value for facts in others)
    ]


def _facts(run: RunRecord) -> dict[str, str]:
    machine, setting = run.environment or {}, run.setting
    model, baseline = setting("model.path"), setting("baseline.kind")
    if setting("model.init") == "random":
        model += ", random initialization"
    if baseline == "ema":
        baseline += f", decay {setting('baseline.ema_decay')}"
    weights = [
        f"{term} {setting(f'objective.{term}_weight')}"
        for term in ("policy", "lm", "predictor", "kl")
    ]
    return {
        "Status": status(run),
        "Model": model,
        "Data": setting("data.train"),
        "Loss weights": ", ".join(weights),
        "Thoughts": (
            f"{setting('thought.group_size')} per position, up to"
            f" {setting('thought.max_thought_tokens')} tokens, temperature"
            f" {setting('thought.temperature')}"
        ),
        "Baseline": baseline,
        "Batch": (
            f"{setting('optim.batch_size')} documents, positions in each:"
            f" {setting('position.per_document')}, learning rate {setting('optim.learning_rate')}"
        ),
        "Seed": setting("run.seed"),
        "Cost": _cost(run),
        "Started": machine.get("date", "-").replace("T", " ").replace("+00:00", " UTC"),
        "Commit": _commit(machine),
        "Hardware": _hardware(machine),
    }


def status(run: RunRecord) -> str:
    """How far a run is, and whether it has spent what it was to spend."""
    if run.summary is None:
        return f"unfinished, at step {run.last_step}"
    told = f"finished, {run.summary.get('steps', run.last_step)} steps"
    matched = budget_in_words(run.summary.get("match"))
    return f"{told}; {matched}" if matched else told


def _cost(run: RunRecord) -> str:
    totals = run.summary or run.ledger
    if totals is None:
        return "-"
    return f"{hours_and_minutes(totals.get('seconds'))}, {number(totals.get('flops'), '.3g')} FLOPs"


def _commit(machine: dict) -> str:
    commit = machine.get("commit")
    if commit is None:
        return "-"
    return commit[:10] + (", with uncommitted changes" if machine.get("dirty") else "")


def _hardware(machine: dict) -> str:
    if not machine:
        return "-"
    devices = machine["devices"]
    gpus = [f"{devices.count(name)} x {name}" for name in dict.fromkeys(devices) if name != "cpu"]
    if gpus:
        return ", ".join(gpus)
    return f"{machine['cpu']}, {machine['cores']} cores, ranks: {machine['world_size']}"


def arm_summary(arm: Arm) -> dict:
    """An arm in the table of arms: its runs and how far they are."""
    return {
        "arm": arm,
        "runs": len(arm.runs),
        "seeds": ", ".join(run.setting("run.seed") for run in arm.runs),
        "status": _some([status(run) for run in arm.runs]),
        "folders": ", ".join(run.label for run in arm.runs),
    }


def differences(arms: list[Arm]) -> list[tuple[str, list[str]]]:
    """Settings in which any two runs differ, where and how they run apart: (key, one cell per
    arm)."""
    settings = {run.label: _flat(run.config) for arm in arms for run in arm.runs}
    keys = dict.fromkeys(key for flat in settings.values() for key in flat)
    rows = []
    for key in keys:
        values = {label: flat.get(key, "-") for label, flat in settings.items()}
        if len(set(values.values())) > 1 and not key.startswith(
            ("run.", "logging.", "checkpoint.")
        ):
            rows.append((key, [_some([values[run.label] for run in arm.runs]) for arm in arms]))
    return rows


def _flat(config: dict[str, dict[str, object]]) -> dict[str, str]:
    """Settings by dotted key, as text."""
    return {
        f"{section}.{name}": str(value)
        for section, values in config.items()
        for name, value in values.items()
    }


def _some(values: list[str]) -> str:
    """Different values, the first three of them."""
    distinct = list(dict.fromkeys(values))
    more = f"; and {len(distinct) - 3} more" if len(distinct) > 3 else ""
    return "; ".join(distinct[:3]) + more


def environment_rows(run: RunRecord) -> list[tuple[str, str]]:
    """What a run recorded about where it ran: (name, value)."""
    return [(name, _plain(value)) for name, value in (run.environment or {}).items()]


def _plain(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {inner or 'not installed'}" for name, inner in value.items())
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return "-" if value is None else str(value)
