"""What a run leaves: one folder, its files, and how they are written.

    config.yaml        the resolved config, as `load_config` reads it
    environment.json   commit, versions, hardware, date, command line
    metrics.jsonl      one object per step, the same bytes for a resumed run as for an unbroken one
    timing.jsonl       one object per step, what the clock and the memory counter said
    thoughts.jsonl     a sample of thoughts each logging interval
    evaluation.jsonl   one object per evaluation of the held-out panel
    bad_documents.jsonl  rows of the training data that were skipped, the first 100 of each reason;
                         summary.json counts them all
    alarms.jsonl       what the run said loudly; absent where there was nothing
    config_changes.jsonl  settings that it was continued with otherwise: the first step made with
                          each, the
                       key, from and to; absent where there was none
    journal.jsonl      one object per step, to compare a run after crashes with one that had none
    post_training.jsonl  one object per stage (sft, rlvr) that the exported model was trained on by;
                         written by what trained it
    ledger.json        tokens, FLOPs and seconds by phase
    summary.json       the numbers that a README quotes; written at the end
    report.html        the page made from all of these
    checkpoints/  export/  logs/
    lock/              which job holds the folder (`rlp.process.lock`)

Rank 0 writes; every rank knows the paths. JSON here never holds a NaN or an infinity.
"""

import re
from dataclasses import dataclass
from pathlib import Path

from rlp.config import ConfigError
from rlp.process.files import refuse_odd_entries


@dataclass(frozen=True, slots=True)
class RunFolder:
    """Paths of one run. Holding one says nothing about which files exist."""

    path: Path

    @property
    def name(self) -> str:
        return self.path.resolve().name

    @property
    def config_yaml(self) -> Path:
        return self.path / "config.yaml"

    @property
    def environment_json(self) -> Path:
        return self.path / "environment.json"

    @property
    def metrics_jsonl(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def timing_jsonl(self) -> Path:
        return self.path / "timing.jsonl"

    @property
    def thoughts_jsonl(self) -> Path:
        return self.path / "thoughts.jsonl"

    @property
    def evaluation_jsonl(self) -> Path:
        return self.path / "evaluation.jsonl"

    @property
    def alarms_jsonl(self) -> Path:
        return self.path / "alarms.jsonl"

    @property
    def config_changes_jsonl(self) -> Path:
        return self.path / "config_changes.jsonl"

    @property
    def bad_documents_jsonl(self) -> Path:
        return self.path / "bad_documents.jsonl"

    @property
    def journal_jsonl(self) -> Path:
        return self.path / "journal.jsonl"

    @property
    def logs_of_steps(self) -> list[Path]:
        """The JSONL files, whose lines each belong to a step."""
        return [
            self.metrics_jsonl,
            self.timing_jsonl,
            self.thoughts_jsonl,
            self.evaluation_jsonl,
            self.alarms_jsonl,
            self.config_changes_jsonl,
            self.bad_documents_jsonl,
            self.journal_jsonl,
        ]

    @property
    def post_training_jsonl(self) -> Path:
        return self.path / "post_training.jsonl"

    @property
    def ledger_json(self) -> Path:
        return self.path / "ledger.json"

    @property
    def summary_json(self) -> Path:
        return self.path / "summary.json"

    @property
    def report_html(self) -> Path:
        return self.path / "report.html"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def export(self) -> Path:
        return self.path / "export"

    @property
    def logs(self) -> Path:
        return self.path / "logs"


def open_run_folder(path: str | Path) -> RunFolder:
    """The folder of a run that exists, finished or not.

    Raises:
        ConfigError: there is nothing there, or something that no run has left: above all a link in
            it, which would lead what is read and written elsewhere.
    """
    folder = RunFolder(Path(path))
    if not folder.path.exists():
        raise ConfigError(
            f"no run folder at {path}. Write the run.dir of a run, such as runs/quickstart."
        )
    # The path that a user names may be a link; nothing in the folder may. Weights & Biases makes
    # links, which nobody here reads.
    if folder.path.is_dir():
        refuse_odd_entries(
            folder.path,
            files=FILES,
            folders=("checkpoints", "export", "lock", "logs"),
            leave_out=("logs/wandb",),
        )
    if not folder.config_yaml.is_file():
        raise ConfigError(
            f"{path} is no run folder: it has no config.yaml. "
            "Write the run.dir of a run, such as runs/quickstart."
        )
    return folder


def saved_steps(parent: Path) -> dict[int, Path]:
    """Checkpoints in a folder by their step, ascending; unread."""
    found = {
        int(match[1]): path
        for path in parent.glob("step_*")
        if (match := re.fullmatch(r"step_(\d+)", path.name))
    }
    return dict(sorted(found.items()))


def chosen_checkpoint(path: Path, step: str | None) -> Path:
    """The checkpoint that a command line means: the path itself, or a step of a run folder.

    Raises:
        ConfigError: no such step.
    """
    parent = path / "checkpoints" if (path / "config.yaml").is_file() else path
    steps = saved_steps(parent)
    if not steps and parent == path:
        if step is not None:
            raise ConfigError(
                f"--step goes with a run folder, and {path} is none. Leave it out, or write the"
                " run.dir of a run."
            )
        return path
    if not steps:
        raise ConfigError(
            f"{path} is a run folder without a checkpoint: the run has saved none yet."
        )

    chosen = {str(number): folder for number, folder in steps.items()}
    chosen["newest"] = list(steps.values())[-1]
    if step not in chosen:
        asked = "is a run folder" if step is None else f"has no checkpoint of step {step}"
        raise ConfigError(
            f"{path} {asked}. It holds those of {', '.join(f'step {number}' for number in steps)}."
            f" Write --step {list(steps)[-1]}, or --step newest."
        )
    return chosen[step]


FILES = (
    "config.yaml",
    "environment.json",
    "metrics.jsonl",
    "timing.jsonl",
    "thoughts.jsonl",
    "evaluation.jsonl",
    "bad_documents.jsonl",
    "alarms.jsonl",
    "config_changes.jsonl",
    "journal.jsonl",
    "post_training.jsonl",
    "ledger.json",
    "summary.json",
    "report.html",
)
"""Of a run folder, beside its folders."""
