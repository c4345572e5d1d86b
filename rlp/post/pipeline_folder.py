"""The folder of a task: what it was asked, what it has made, and what was read of that.

    asked.json         settings and checksums of the inputs, written with the folder
    work/              what the stage itself writes
    manifest.json      asked.json again, the models by step with their checksums, ledger, versions,
                       commit; the stage is finished once it is there
    readings/          what evaluations have drawn, such as answers to prompts
    evaluation.json    what was read of every model so far
    log.txt            what was printed

A task whose folder was begun with other settings or inputs is refused, and what differs is named.
"""

import hashlib
import json
from dataclasses import asdict, dataclass
from functools import lru_cache
from glob import glob
from pathlib import Path

from rlp.config import ConfigError
from rlp.post.pipeline_tasks import WORK
from rlp.post.run_settings import with_defaults
from rlp.post.stages.interface import Kept, Made, Spent
from rlp.process.files import make_folder, new_folder, open_to_read, write_new
from rlp.process.json_files import json_bytes, read_json, write_json
from rlp.process.schemas import (
    AMOUNT,
    CHECKSUM,
    COUNT,
    NAME,
    NUMBER,
    PLAIN,
    STEP,
    Fields,
    Many,
    Maybe,
    Table,
    Text,
    each,
)

ASKED = Fields({"stage": NAME, "seed": COUNT, "settings": Table(PLAIN), "inputs": Table(PLAIN)})

_SPENT = Fields(
    {"optimizer_steps": STEP, "counted_without": Many(NAME)}
    | each(Maybe(COUNT), "input_tokens", "generated_tokens", "scored_tokens", "rewarded_tokens")
    | each(Maybe(AMOUNT), "flops", "paper_flops", "seconds")
)

_INSIDE = Text(4096, r"(?!/)(?!(.*/)?\.\.(/|$)).+")
"""A path that stays in its folder."""

MANIFEST = Fields(
    {
        "asked": ASKED,
        "models": Many(
            Fields({"step": STEP, "path": _INSIDE, "checksum": CHECKSUM, "spent": _SPENT})
        ),
        "ledger": _SPENT,
        "wall_s": AMOUNT,
        "environment": Table(PLAIN),
    }
)

READ = Fields(
    {
        "lines": Many(
            Fields(
                {"stage_step": STEP, "temperature": AMOUNT, "evaluation": NAME}
                | {"settings": CHECKSUM, "model": CHECKSUM, "seconds": AMOUNT}
                | {"figures": Table(Maybe(NUMBER))}
            )
        )
    }
)


@dataclass(frozen=True, slots=True)
class TaskFolder:
    """Paths of a task. Holding one says nothing about which files exist."""

    path: Path

    @property
    def asked_json(self) -> Path:
        return self.path / "asked.json"

    @property
    def manifest_json(self) -> Path:
        return self.path / "manifest.json"

    @property
    def evaluation_json(self) -> Path:
        return self.path / "evaluation.json"

    @property
    def log(self) -> Path:
        return self.path / "log.txt"

    @property
    def work(self) -> Path:
        return self.path / WORK

    def readings(self, step: int, temperature: float) -> Path:
        """Where evaluations of a model at a temperature keep what they draw."""
        return self.path / "readings" / f"step_{step}_T_{temperature:g}"

    @property
    def is_finished(self) -> bool:
        return self.manifest_json.is_file()

    def open(self, asked: dict) -> None:
        """Make the folder, or find it made for the same.

        Raises:
            ConfigError: it was made for something else.
        """
        if not self.path.exists():
            make_folder(self.path.parent, exist_ok=True)
            with new_folder(self.path, point="pipeline.before_rename") as new:
                write_new(
                    new / "asked.json",
                    json_bytes(asked, "asked.json"),
                    point="pipeline.torn_asked",
                )
                make_folder(new / WORK)
            return
        self.refuse_other(asked)

    def refuse_other(self, asked: dict) -> None:
        """Refuse a folder that was made with other settings or inputs.

        Raises:
            ConfigError: it was; says what differs.
        """
        before = read_json(self.asked_json, ASKED)
        if (config := before["inputs"].get("config")) is not None:
            before["inputs"]["config"] = with_defaults(config)
        # As it comes back from the file.
        if changes := differences(before, json.loads(json.dumps(asked))):
            what = "is finished" if self.is_finished else "was begun"
            raise ConfigError(
                f"{self.path} {what}, with other inputs: {'; '.join(changes)}. Write what it was"
                " made with, or another dir; or remove that folder, and those of the stages behind"
                " it, to have them made again."
            )

    def finish(self, asked: dict, made: Made, environment: dict, wall_s: float) -> None:
        """Write the manifest: from here on the stage is finished.

        Args:
            wall_s: seconds of the attempt that finished it.
        """
        models = [
            {
                "step": kept.step,
                "path": str(kept.path.relative_to(self.path)),
                "checksum": checksum_of_model(kept.path),
                "spent": asdict(kept.spent),
            }
            for kept in made.kept
        ]
        manifest = {
            "asked": asked,
            "models": models,
            "ledger": asdict(made.spent),
            "wall_s": wall_s,
            "environment": environment,
        }
        write_json(self.manifest_json, manifest, point="pipeline.torn_manifest")

    def manifest(self) -> dict:
        return read_json(self.manifest_json, MANIFEST)

    def kept(self) -> list[tuple[Kept, str]]:
        """The models of a finished stage, and their checksums."""
        return [
            (
                Kept(model["step"], self.path / model["path"], _spent(model["spent"])),
                model["checksum"],
            )
            for model in self.manifest()["models"]
        ]

    def ledger(self) -> Spent:
        """What a finished stage has spent."""
        return _spent(self.manifest()["ledger"])

    def wall_s(self) -> float:
        """What a finished stage took, to be made and to be read, on the clock on the wall."""
        return self.manifest()["wall_s"] + sum(line["seconds"] for line in self.read_lines())

    def read_lines(self) -> list[dict]:
        """What was read of its models so far."""
        if not self.evaluation_json.exists():
            return []
        return read_json(self.evaluation_json, READ)["lines"]

    def write_lines(self, lines: list[dict]) -> None:
        write_json(self.evaluation_json, {"lines": lines}, point="pipeline.torn_evaluation")


def _spent(told: dict) -> Spent:
    return Spent(**{**told, "counted_without": tuple(told["counted_without"])})


def differences(before: object, now: object, where: str = "") -> list[str]:
    """What is not the same, by its place: `settings.steps 64, now 80`."""
    if isinstance(before, dict) and isinstance(now, dict):
        found = []
        for key in dict.fromkeys([*before, *now]):
            place = f"{where}.{key}" if where else str(key)
            found += differences(before.get(key), now.get(key), place)
        return found
    return [] if before == now else [f"{where} was {before!r}, now {now!r}"]


def checksum_of_text(value: object) -> str:
    """Of a value that JSON can write."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def checksum_of_file(path: Path) -> str:
    """Read once, as long as its size and its time stay: every stage of an arm asks for the same
    model and rows."""
    path = path.resolve()
    status = path.stat()
    return _checksum(path, status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=4096)
def _checksum(path: Path, size: int, mtime_ns: int) -> str:
    with open_to_read(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


_OF_A_MODEL = ("*.safetensors", "config.json", "tokenizer*", "thought_format.json")
"""Files that what a model does depends on."""


def checksum_of_model(path: Path) -> str:
    """Of the weights, config and tokenizer of a Hugging Face folder."""
    files = sorted({file for name in _OF_A_MODEL for file in path.glob(name)})
    return checksum_of_text({file.name: checksum_of_file(file) for file in files})


def checksums_of_data(sources: list[str]) -> dict[str, str]:
    """Of every file that a list of files and globs names; a Hub data set by its name.

    Raises:
        ConfigError: one of them names no file.
    """
    found = {}
    for source in sources:
        if source.startswith("hub:"):
            found[source] = source
            continue
        files = [Path(source)] if Path(source).is_file() else sorted(map(Path, glob(source)))
        if not files:
            raise ConfigError(f"{source}: no such file. Write the path of a file, or a glob.")
        found |= {str(file): checksum_of_file(file) for file in files}
    return found
