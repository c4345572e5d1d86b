"""What a run leaves: one folder, its files, and how they are written.

    config.yaml        the resolved config, as `load_config` reads it
    environment.json   commit, versions, hardware, date, command line
    metrics.jsonl      one object per step, the same bytes for a resumed run as for an unbroken one
    timing.jsonl       one object per step, what the clock and the memory counter said
    thoughts.jsonl     a sample of thoughts each logging interval
    evaluation.jsonl   one object per evaluation of the held-out panel
    bad_documents.jsonl  rows of the training data that were skipped, the first 100 of each reason; summary.json counts them all
    alarms.jsonl       what the run said loudly; absent where there was nothing
    config_changes.jsonl  settings that it was continued with otherwise: the first step made with each, the
                       key, from and to; absent where there was none
    journal.jsonl      one object per step, to compare a run after crashes with one that had none
    post_training.jsonl  one object per stage (sft, rlvr) that the exported model was trained on by; written by what trained it
    ledger.json        tokens, FLOPs and seconds by phase
    summary.json       the numbers that a README quotes; written at the end
    report.html        the page made from all of these
    checkpoints/  export/  logs/
    lock/              which job holds the folder (`rlp.lock`)

Rank 0 writes; every rank knows the paths. JSON here never holds a NaN or an infinity.
"""

import datetime
import errno
import hashlib
import io
import json
import math
import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import BinaryIO

import torch

from rlp.config import Config, ConfigError, to_yaml, without_secrets
from rlp.distributed import Ranks
from rlp.faults import fault
from rlp.files import (append, cut, make_folder, new_folder, open_to_read, read_bytes, refuse_odd_entries, remove, sync,
                       write_atomically, write_new)
from rlp.forms import RUN_FILES, Form
from rlp.lock import RunLock

PACKAGES = ("torch", "transformers", "deepspeed", "datasets", "safetensors", "numpy")
"""Distributions whose versions `environment.json` records."""


class DamagedFileError(ValueError):
    """A file of a run folder that can not be read back. The message names the file and the line."""


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
        return [self.metrics_jsonl, self.timing_jsonl, self.thoughts_jsonl, self.evaluation_jsonl, self.alarms_jsonl, self.config_changes_jsonl, self.bad_documents_jsonl, self.journal_jsonl]

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


def create_run_folder(config: Config, ranks: Ranks, lock: RunLock) -> RunFolder:
    """Make the folder of a new run, which `lock` then holds, and write `config.yaml` and `environment.json`. Every rank calls it.

    Raises:
        ConfigError: on every rank, where rank 0 could not make the folder; above all where it exists.
    """
    folder = RunFolder(Path(config.run.dir))
    devices = ranks.gather(_device_name(ranks.device))
    refusal = ranks.broadcast(_make(folder, config, devices, lock) if ranks.is_first else None)
    if refusal:
        raise ConfigError(refusal)
    for path in folder.logs_of_steps:
        _logs.pop(path, None)  # of an earlier run of this process in a folder of that name
    return folder


def _make(folder: RunFolder, config: Config, devices: list[str], lock: RunLock) -> str | None:
    """Rank 0's part: the reason why it can not be done, or None."""
    if obstacle := why_no_run_folder(folder.path):
        return obstacle
    try:
        # Complete before it has its name: a run that dies here leaves nothing that a restart would refuse.
        with new_folder(folder.path, point="folder.before_rename") as path:
            new = RunFolder(path)
            for inner in (new.checkpoints, new.logs):
                make_folder(inner)
            write_new(new.config_yaml, to_yaml(config).encode(), point="folder.torn_config")
            write_new(new.environment_json, _as_json(environment(devices), "environment.json"),
                      point="folder.torn_environment")
            lock.write_first(path)
    except OSError as error:
        return _refusal(folder.path, error)
    return None


def why_no_run_folder(path: Path) -> str | None:
    """Why a new run can not make its folder here; None where nothing is known that keeps it from
    doing so. Nothing is made."""
    if os.path.lexists(path):
        return _refusal(path, FileExistsError())
    parent = next(parent for parent in path.absolute().parents if os.path.lexists(parent))
    code = errno.ENOTDIR if not parent.is_dir() else 0 if os.access(parent,
                                                                    os.W_OK
                                                                    | os.X_OK) else errno.EACCES
    return _refusal(path, OSError(code, os.strerror(code), str(parent))) if code else None


def _refusal(path: Path, error: OSError) -> str:
    if os.path.lexists(path):
        return (f"run.dir {path} exists and is never written over. "
                "Write run.dir=OTHER for a new run, or run.resume=auto to continue it.")
    return (f"run.dir {path} can not be created: {error}. "
            "Write run.dir=OTHER, a folder that you may write to.")


def open_run_folder(path: str | Path) -> RunFolder:
    """The folder of a run that exists, finished or not.

    Raises:
        ConfigError: there is nothing there, or something that no run has left: above all a link in it, which would lead
            what is read and written elsewhere.
    """
    folder = RunFolder(Path(path))
    if not folder.path.exists():
        raise ConfigError(f"no run folder at {path}. Write the run.dir of a run, such as runs/quickstart.")
    # The path that a user names may be a link; nothing in the folder may. Weights & Biases makes links, which nobody here reads.
    if folder.path.is_dir():
        refuse_odd_entries(folder.path, files=FILES, folders=("checkpoints", "export", "lock", "logs"), leave_out=("logs/wandb",))
    if not folder.config_yaml.is_file():
        raise ConfigError(f"{path} is no run folder: it has no config.yaml. "
                          "Write the run.dir of a run, such as runs/quickstart.")
    return folder


def saved_steps(parent: Path) -> dict[int, Path]:
    """Checkpoints in a folder by their step, ascending; unread."""
    found = {int(match[1]): path for path in parent.glob("step_*") if (match := re.fullmatch(r"step_(\d+)", path.name))}
    return dict(sorted(found.items()))


FILES = ("config.yaml", "environment.json", "metrics.jsonl", "timing.jsonl", "thoughts.jsonl", "evaluation.jsonl",
         "bad_documents.jsonl", "alarms.jsonl", "config_changes.jsonl", "journal.jsonl", "post_training.jsonl", "ledger.json", "summary.json",
         "report.html")
"""Of a run folder, beside its folders."""


def environment(devices: list[str]) -> dict:
    """Where a run happens, as `environment.json` holds it. No environment variable is recorded: they hold secrets.

    Args:
        devices: the device name of each rank, in rank order.
    """
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": without_secrets(shlex.join(sys.argv)),
        **_git_state(Path(__file__).resolve().parent.parent),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "platform": platform.platform(),
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "world_size": len(devices),
        "devices": devices,
    }


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _git_state(project: Path) -> dict:
    """Commit of the project and whether tracked files differ from it; None where it is not its own checkout."""
    # Installed into a virtual environment, the package may lie inside somebody else's checkout.
    top = _git(project, "rev-parse", "--show-toplevel")
    if not top or Path(top).resolve() != project:
        return {"commit": None, "dirty": None}
    changes = _git(project, "status", "--porcelain", "--untracked-files=no")
    return {"commit": _git(project, "rev-parse", "HEAD"), "dirty": None if changes is None else bool(changes)}


def _git(project: Path, *arguments: str) -> str | None:
    """What git says, or None where there is no git, no repository or no answer."""
    try:
        done = subprocess.run(["git", "-C", str(project), *arguments], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def write_json(path: Path, value: object, *, point: str) -> None:
    """Write one JSON value to a file of its own, atomically.

    Args:
        point: the fault point that stands in the middle.

    Raises:
        ValueError: a number in it is not finite.
    """
    write_atomically(path, _as_json(value, path.name), point=point)


def _as_json(value: object, name: str) -> bytes:
    _refuse_non_finite(value, name)
    return (json.dumps(value, indent=2, allow_nan=False) + "\n").encode()


def read_json(path: Path, form: Form | None = None) -> object:
    """What `write_json` wrote.

    Args:
        form: of the value; None: that of a file of this name (`RUN_FILES`).

    Raises:
        DamagedFileError: it is no JSON, or has another form.
    """
    try:
        value = json.loads(read_bytes(path))
    except (ValueError, RecursionError) as error:
        raise DamagedFileError(f"{path} is not JSON: {error}. It is written whole or not at all, so something else has "
                               "changed it.") from error
    form = form or RUN_FILES.get(path.name)
    if form is not None and (said := form.problem(value, "")):
        raise DamagedFileError(f"{path}: {said}. No run writes this, so something else has changed the file.")
    return value


class Log:
    """A JSONL file that this process adds lines to: what it should hold, in numbers, and what the disk has refused so far."""

    def __init__(self, path: Path, size: int = 0, lines: int = 0, digest: "hashlib._Hash | None" = None) -> None:
        self.path = path
        self.size, self.lines, self._digest = size, lines, digest or hashlib.sha256()
        self._torn = False
        """Whether a failed attempt may have left something behind the good part of the file."""
        self.waiting = b""
        """Lines that the disk has refused; they count in `size`, `lines` and the digest."""
        self._step = -1
        self._before = self._state()
        """As it was before the first line of the newest step."""

    @classmethod
    def of(cls, path: Path) -> "Log":
        """Of a file that is there, or is not."""
        log = cls(path)
        with suppress(FileNotFoundError), open_to_read(path) as file:
            for line in _lines(file, path):
                log.count(line)
        return log

    def add(self, step: int, line: bytes) -> None:
        """Count a line and try to write it, with all that waits."""
        if step > self._step:
            self._step, self._before = step, self._state()
        self.count(line)
        self.waiting += line
        with suppress(OSError):
            self.flush()

    def flush(self) -> None:
        """Write what waits.

        Raises:
            OSError: it waits on.
        """
        if self.waiting:
            fault("append.before_line")
            good, self._torn = self.size - len(self.waiting) if self._torn else None, True
            append(self.path, self.waiting, point="append.torn_line", size=good)
            self.waiting, self._torn = b"", False
            fault("append.after_line")

    def mark(self, step: int) -> dict:
        """What a checkpoint of a step says of the log: size, lines and checksum up to that step. A step that was given up
        after it may have lines; those do not count."""
        size, lines, digest = self._before if self._step > step else self._state()
        return {"bytes": size, "lines": lines, "sha256": digest.hexdigest()}

    def _state(self) -> tuple[int, int, "hashlib._Hash"]:
        return self.size, self.lines, self._digest.copy()

    def count(self, line: bytes) -> None:
        """Take a line for one that the file holds."""
        self.size, self.lines = self.size + len(line), self.lines + 1
        self._digest.update(line)


_logs: dict[Path, Log] = {}
"""Of this process, by path."""


def append_json_line(path: Path, value: dict) -> None:
    """Add one object to a log of the run, in one write; a crash can tear the last line and no other.

    Where the disk refuses, lines wait in memory and go with the next one: each is written once, in order, or, where the
    process ends first, belongs to steps after the newest checkpoint (`settle_logs`).

    Raises:
        ValueError: a number in it is not finite.
    """
    _refuse_non_finite(value, path.name)
    if path not in _logs:
        _logs[path] = Log.of(path)
    _logs[path].add(value.get("step", 0), (json.dumps(value, allow_nan=False) + "\n").encode())


def settle_logs(folder: RunFolder) -> None:
    """Write what was refused so far, and wait until all logs are on disk: a checkpoint of a step is good only with the
    logs up to it.

    Raises:
        OSError: a log can still not be written.
    """
    for path in folder.logs_of_steps:
        if path in _logs:
            _logs[path].flush()
        if path.exists():
            sync(path)
    sync(folder.path)


def mark_logs(folder: RunFolder, step: int) -> dict[str, dict]:
    """What the logs hold up to a step, by file name, for `cut_logs` of a run that continues from there."""
    return {path.name: _logs[path].mark(step) for path in folder.logs_of_steps if path in _logs}


def refused_logs(folder: RunFolder) -> list[str]:
    """Names of the logs whose last lines wait in memory, because the disk is full or broken."""
    return [path.name for path in folder.logs_of_steps if path in _logs and _logs[path].waiting]


def cut_logs(folder: RunFolder, step: int, marks: dict[str, dict]) -> list[str]:
    """Make every log end with a step, so that a run that continues says each step once; and remove what a crash left half
    written. Kept lines keep their bytes. Needs no room on the disk, and memory for one line.

    All logs are read before one is changed.

    Args:
        step: the last step that the checkpoint has applied; -1: nothing is kept.
        marks: of `mark_logs`, by the checkpoint; a log without one is read line by line.

    Returns:
        what has changed in logs since the checkpoint, in words: lines of them were lost, or edited.

    Raises:
        DamagedFileError: a line that has to be kept, and is not the last, is no JSON object with a step.
        OSError: a log can not be cut.
    """
    kept, found = {}, []
    for path in folder.logs_of_steps:
        mark = marks.get(path.name, _NOTHING)
        log = _kept(path, step, mark)
        if log is None:
            log = _kept(path, step, _NOTHING)
            found.append(f"{path.name} is not what it was when the checkpoint of step {step} was made: it had {mark['lines']} "
                         f"lines ({mark['bytes']:,} bytes) then, and has {log.lines} ({log.size:,} bytes) of those steps now; "
                         "lines of it were lost or changed. The run does not need them, and goes on.")
        kept[path] = log

    for path, log in kept.items():
        if path.exists() and path.stat().st_size > log.size:
            cut(path, log.size, point="resume.before_truncate")
        _logs[path] = log
    remove_unfinished(folder)
    return found


def remove_unfinished(folder: RunFolder) -> None:
    """Remove what a crash left half written."""
    for left in (*folder.path.glob(".*.partial"), *folder.path.glob(".tmp.*")):
        remove(left)


_NOTHING = {"bytes": 0, "lines": 0, "sha256": hashlib.sha256().hexdigest()}
"""The mark of a log that has no line."""


def _kept(path: Path, step: int, mark: dict) -> Log | None:
    """What a log holds up to a step; None where it does not begin with what the mark says."""
    log, begins = Log(path), mark == _NOTHING
    with open_to_read(path) if path.exists() else io.BytesIO() as file:
        for number, line in enumerate(_lines(file, path) if step >= 0 else (), start=1):
            if not begins and log.size >= mark["bytes"]:
                begins = log.mark(step) == mark
                if not begins:
                    return None
            if begins:
                value = _object(line)
                if not line.endswith(b"\n") and value is None:
                    break  # torn by a crash
                if value is None or type(value.get("step")) is not int:
                    raise DamagedFileError(f'{path}, line {number}: expected a JSON object with a whole number "step", got '
                                           f"{line[:80]!r}. Only a last line can be torn by a crash, so something else has "
                                           "changed the file. Mend or remove the line.")
                if value["step"] > step or not line.endswith(b"\n"):
                    break
            log.count(line)
    return log if begins or log.mark(step) == mark else None


def read_json_lines(path: Path) -> list[dict]:
    """Every whole line of a JSONL file, in order. A torn last line, of a run that was killed, is left out.

    Raises:
        DamagedFileError: a line before the last is no JSON object, or a line has not the form of the file (`RUN_FILES`).
    """
    return list(json_lines(path))


def json_lines(path: Path) -> Iterator[dict]:
    """`read_json_lines`, one at a time: in memory is one."""
    form = RUN_FILES.get(path.name)
    with open_to_read(path) as file:
        for number, line in enumerate(_lines(file, path), start=1):
            value = _object(line)
            if value is not None:
                if form is not None and (said := form.problem(value, "")):
                    raise DamagedFileError(f"{path}, line {number}: {said}. No run writes this, so something else has changed "
                                           "the file.")
                yield value
            elif line.endswith(b"\n"):
                raise DamagedFileError(f"{path}, line {number}: expected a JSON object, got {line[:80]!r}. Only a last line can "
                                       "be torn by a crash, so something else has changed the file. Mend or remove the line.")


MAX_LINE_BYTES = 2 ** 26
"""Of a line of a log; a thought of a million tokens takes a tenth of it."""


def _lines(file: BinaryIO, path: Path) -> Iterator[bytes]:
    while line := file.readline(MAX_LINE_BYTES):
        if len(line) == MAX_LINE_BYTES:
            raise DamagedFileError(f"{path} has a line of more than {MAX_LINE_BYTES:,} bytes, which no run has written.")
        yield line


def _object(line: bytes) -> dict | None:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _refuse_non_finite(value: object, where: str) -> None:
    if isinstance(value, dict):
        for key, inner in value.items():
            _refuse_non_finite(inner, f"{where}: {key}")
    elif isinstance(value, (list, tuple)):
        for index, inner in enumerate(value):
            _refuse_non_finite(inner, f"{where}[{index}]")
    elif isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{where} is {value}, and JSON has finite numbers only. Leave the key out where there is nothing to say.")
