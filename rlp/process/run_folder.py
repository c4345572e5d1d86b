"""What a run leaves: one folder, its files, and how one that exists is opened.

Rank 0 writes; every rank knows the paths. JSON here never holds a NaN or an infinity.
"""

import re
from dataclasses import dataclass
from pathlib import Path

from rlp.config import ConfigError
from rlp.process.files import refuse_odd_entries

LOGS_OF_STEPS = (
    "metrics.jsonl",
    "timing.jsonl",
    "thoughts.jsonl",
    "evaluation.jsonl",
    "alarms.jsonl",
    "config_changes.jsonl",
    "bad_documents.jsonl",
    "journal.jsonl",
)
"""The JSONL files, whose lines each belong to a step."""

FILES = (
    "config.yaml",
    "environment.json",
    *LOGS_OF_STEPS,
    "post_training.jsonl",
    "ledger.json",
    "summary.json",
    "report.html",
)
"""Of a run folder, beside its folders."""

FOLDERS = ("checkpoints", "export", "lock", "logs")


def _inside(name: str) -> property:
    """The path of a file or folder in the run folder."""
    return property(lambda folder: folder.path / name)


@dataclass(frozen=True, slots=True)
class RunFolder:
    """Paths of one run. Holding one says nothing about which files exist."""

    path: Path

    config_yaml = _inside("config.yaml")
    """The resolved config, as `load_config` reads it."""
    environment_json = _inside("environment.json")
    """Commit, versions, hardware, date, command line."""
    metrics_jsonl = _inside("metrics.jsonl")
    """One object per step, the same bytes for a resumed run as for an unbroken one."""
    timing_jsonl = _inside("timing.jsonl")
    """One object per step, what the clock and the memory counter said."""
    thoughts_jsonl = _inside("thoughts.jsonl")
    """A sample of thoughts each logging interval."""
    evaluation_jsonl = _inside("evaluation.jsonl")
    """One object each time that the held-out panel is scored."""
    alarms_jsonl = _inside("alarms.jsonl")
    """What the run said loudly; absent where there was nothing."""
    config_changes_jsonl = _inside("config_changes.jsonl")
    """Settings that it was continued with otherwise: the first step made with each, the key, from
    and to; absent where there was none."""
    bad_documents_jsonl = _inside("bad_documents.jsonl")
    """Rows of the training data that were skipped, the first 100 of each reason; summary.json
    counts them all."""
    journal_jsonl = _inside("journal.jsonl")
    """One object per step, to compare a run after crashes with one that had none."""
    post_training_jsonl = _inside("post_training.jsonl")
    """One object per stage (sft, rlvr) that the exported model was trained on by; written by what
    trained it."""
    ledger_json = _inside("ledger.json")
    """Tokens, FLOPs and seconds by phase."""
    summary_json = _inside("summary.json")
    """The numbers that a README quotes; written at the end."""
    report_html = _inside("report.html")
    """The page made from all of these."""
    checkpoints = _inside("checkpoints")
    export = _inside("export")
    logs = _inside("logs")
    """What libraries say, a file for each rank, and Weights & Biases' own."""
    lock = _inside("lock")
    """Which job holds the folder (`rlp.process.lock`)."""

    @property
    def name(self) -> str:
        """Of the folder itself, wherever a link to it stands."""
        return self.path.resolve().name

    @property
    def logs_of_steps(self) -> list[Path]:
        """The files of `LOGS_OF_STEPS`."""
        return [self.path / name for name in LOGS_OF_STEPS]


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
            folders=FOLDERS,
            leave_out=("logs/wandb",),
        )
    if not folder.config_yaml.is_file():
        raise ConfigError(
            f"{path} is no run folder: it has no config.yaml. Write the run.dir of a run, such as"
            " runs/quickstart."
        )
    return folder


def saved_steps(parent: Path) -> dict[int, Path]:
    """Checkpoints in a folder by their step, ascending; unread."""
    found = {}
    for path in parent.glob("step_*"):
        if match := re.fullmatch(r"step_(\d+)", path.name):
            found[int(match[1])] = path
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
