"""The runs that a report is about, read from their folders and gathered into arms."""

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rlp.config import ConfigError, parse_yaml
from rlp.measure.figures import COLORS
from rlp.measure.metrics import METRICS
from rlp.process.files import read_bytes
from rlp.process.json_files import DamagedFileError, read_json
from rlp.process.run_folder import RunFolder
from rlp.process.run_logs import read_json_lines
from rlp.process.schemas import CONFIG


@dataclass(frozen=True, slots=True)
class RunRecord:
    """All that a run folder holds for a report. What the run has not written yet is empty or
    None."""

    label: str
    arm: str
    """Identity of its arm: `run.arm`, or its path without the seed at its end."""
    config_text: str
    config: dict[str, dict[str, object]]
    """Read without its rules: the config of a run may be older than they are."""
    environment: dict | None
    metrics: list[dict]
    timing: list[dict]
    evaluation: list[dict]
    thoughts: list[dict]
    alarms: list[dict]
    changes: list[dict]
    """Settings that it was continued with otherwise."""
    post_training: list[dict]
    ledger: dict | None
    summary: dict | None

    @property
    def seed(self) -> int:
        """What pairs it with the runs of other arms; 0, the default, where the config has none."""
        seed = self.config.get("run", {}).get("seed")
        return seed if isinstance(seed, int) else 0

    @property
    def last_step(self) -> int:
        return self.metrics[-1]["step"] if self.metrics else 0

    def setting(self, key: str) -> str:
        """A setting as text; a dash where the config has none."""
        section, _, name = key.partition(".")
        value = self.config.get(section, {}).get(name, "-")
        return ", ".join(map(str, value)) if isinstance(value, list) else str(value)

    def before_and_after(self) -> tuple[dict, dict]:
        """First and last evaluation of the panel; of an unfinished run, the latest."""
        if self.summary is not None:
            return self.summary.get("before") or {}, self.summary.get("after") or {}
        return (self.evaluation[0], self.evaluation[-1]) if self.evaluation else ({}, {})

    def cold(self) -> tuple[dict, dict]:
        """The same of thoughts at `evaluation.cold_temperature`; empty where there were none."""
        summary = self.summary or {}
        return summary.get("before_cold") or {}, summary.get("after_cold") or {}

    def totals(self) -> dict:
        """input_tokens, flops, paper_flops, seconds: of the ledger, or as far as an unfinished run
        has come."""
        if self.ledger is not None:
            return {"phases": {}} | self.ledger
        last = self.metrics[-1] if self.metrics else {}
        return {
            "input_tokens": last.get("budget/tokens"),
            "flops": last.get("budget/flops"),
            "phases": {},
        }

    def along(self, axis: str) -> dict[int, float]:
        """Where each step stands on an axis; step 0 is before the first."""
        if axis == "step":
            return {step: step for step in [0, *(line["step"] for line in self.metrics)]}
        places = {0: 0.0}
        if axis == "seconds":
            lines = [line for line in self.timing if "perf/step_s" in line]
            seconds = np.cumsum([line["perf/step_s"] for line in lines]).tolist()
            return places | dict(zip((line["step"] for line in lines), seconds))
        name = f"budget/{axis}"
        return places | {line["step"]: line[name] for line in self.metrics if name in line}

    def values(self, name: str) -> dict[int, float]:
        """A metric by step, where it was measured."""
        lines = self.metrics if name in METRICS else self.evaluation
        return {line["step"]: line[name] for line in lines if line.get(name) is not None}


@dataclass(frozen=True, slots=True)
class Arm:
    """Runs that differ in their seed."""

    label: str
    color: str
    runs: list[RunRecord]


def read_run(folder: RunFolder, label: str) -> RunRecord:
    config_text = read_bytes(folder.config_yaml).decode(errors="replace")
    config = _parsed(config_text, folder.config_yaml)
    settings = config.get("run", {})
    arm = settings.get("arm") or without_seed(folder.path.resolve(), settings.get("seed"))
    return RunRecord(
        label=label,
        arm=str(arm),
        config_text=config_text,
        config=config,
        environment=_json_if_any(folder.environment_json),
        metrics=_lines_if_any(folder.metrics_jsonl),
        timing=_lines_if_any(folder.timing_jsonl),
        evaluation=_lines_if_any(folder.evaluation_jsonl),
        thoughts=_lines_if_any(folder.thoughts_jsonl),
        alarms=_lines_if_any(folder.alarms_jsonl),
        changes=_lines_if_any(folder.config_changes_jsonl),
        post_training=_lines_if_any(folder.post_training_jsonl),
        ledger=_json_if_any(folder.ledger_json),
        summary=_json_if_any(folder.summary_json),
    )


def without_seed(path: Path, seed: int | None) -> Path:
    """A run's path without the part at its end that names its seed: of `a/rlp_seed3`, `a/rlp-s3`
    and `a/rlp/3` it is `a/rlp`."""
    name = path.name
    if isinstance(seed, int):
        name = re.sub(rf"(?:(?:^|[-_.])(?:seed|s)[-_]?0*{seed}|^0*{seed})$", "", name)
    return path.with_name(name) if name else path.parent


def _parsed(config_text: str, path: Path) -> dict[str, dict[str, object]]:
    try:
        tree = parse_yaml(config_text, str(path))
    except ConfigError as error:
        raise DamagedFileError(str(error)) from error
    if said := CONFIG.problem(tree, ""):
        raise DamagedFileError(
            f"{path} must hold sections such as `model:` and `data:` with settings in them: {said}."
        )
    return tree


def _json_if_any(path: Path) -> dict | None:
    return read_json(path) if path.exists() else None


def _lines_if_any(path: Path) -> list[dict]:
    return read_json_lines(path) if path.exists() else []


def arms_of(runs: list[RunRecord]) -> list[Arm]:
    """Runs by arm, in the order of their first run."""
    identities = list(dict.fromkeys(run.arm for run in runs))
    labels = distinct_names(
        [Path(identity).name or identity for identity in identities], identities
    )
    arms = []
    for identity, label in zip(identities, labels):
        color = COLORS[len(arms) % len(COLORS)]
        arms.append(Arm(label, color, [run for run in runs if run.arm == identity]))
    return arms


def distinct_names(names: list[str], longer: list[str]) -> list[str]:
    """The names, or the longer ones where two are the same."""
    return names if len(set(names)) == len(names) else longer
