"""A small pipeline on the embedded world, started in processes that can be killed, and how two of
its folders are compared."""

import json
import random
import subprocess
import sys
from pathlib import Path

from rlp.process.faults import VARIABLE
from rlp.world.folder import write_world
from rlp.world.problems import OPEN, computed, problem_text, split_questions, turns_of
from tests import REPOSITORY

LIMIT_S = 600.0
"""A start of the small pipeline takes 10 s; one that has not ended after this hangs."""

SERVER = REPOSITORY / "tests" / "faults" / "server.py"

YAML = """
dir: {dir}
seeds: [0]
model: {world}/base
stages:
  rlp:
    kind: rlp
    config: {world}/quickstart.yaml
    overrides:
      - budget.steps=4
      - optim.batch_size=4
      - optim.micro_batch_size=4
      - checkpoint.every_n_steps=2
      - evaluation.panel_positions=4
      - evaluation.every_n_steps=0
    keep_steps: [2]
  sft:
    kind: sft
    data: ["{world}/{{seed}}_sft.jsonl"]
    steps: 5
    batch_size: 4
    learning_rate: 1e-3
    max_tokens: 64
    checkpoint_every: 2
    keep_steps: [3]
    hand_on: 3
  rlvr:
    kind: rlvr
    data: ["{world}/{{seed}}_rlvr.jsonl"]
    steps: 4
    batch_size: 2
    generations: 4
    learning_rate: 1e-3
    max_completion_tokens: 16
    checkpoint_every: 1
    keep_rollouts: true
arms:
  rlp: [rlp, sft, rlvr]
  rlp_and_sft: [rlp, sft]
evaluation:
  temperatures: [1.0]
  panel:
    config: {world}/quickstart.yaml
    overrides: [evaluation.panel_positions=4, evaluation.thoughts_per_position=1]
"""


class Pipelines:
    """A world, a fork server that has imported all that a pipeline needs, and pipelines on it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.world = folder, folder / "world"
        write_world(self.world, kind="rare", seed=0)
        write_rows(self.world, seed=0)
        self._server = subprocess.Popen(
            [sys.executable, str(SERVER), str(self.world / "base"), "rlp.cli", *PRELOADED],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=(folder / "server.log").open("w"),
            text=True,
        )

    def close(self) -> None:
        self._server.stdin.close()
        self._server.wait(timeout=LIMIT_S)

    def write(self, name: str, change: tuple[str, str] = ("", "")) -> Path:
        """The YAML of a pipeline in a folder of its own."""
        path = self.folder / f"{name}.yaml"
        text = YAML.format(dir=self.folder / name, world=self.world)
        assert change[0] in text
        path.write_text(text.replace(*change))
        return path

    def start(
        self, config: Path, *, fault: str = "", kill_s: float | None = None
    ) -> tuple[int, str]:
        """Start or go on with a pipeline; its exit code and what it printed.

        Args:
            fault: `RLP_FAULT`.
            kill_s: seconds after which it is killed.
        """
        log = self.folder / f"{config.stem}.log"
        for old in self.folder.glob(f"{config.stem}.log.*"):
            old.unlink()
        job = {
            "arguments": ["pipeline", str(config)],
            "environment": {VARIABLE: fault},
            "world_size": 1,
            "log": str(log),
            "limit_s": LIMIT_S,
            "kill": None if kill_s is None else (0, kill_s),
            "wake_s": None,
            "launcher_s": None,
            "twin_s": None,
        }
        self._server.stdin.write(json.dumps(job) + "\n")
        self._server.stdin.flush()
        answer = self._server.stdout.readline()
        assert answer, (self.folder / "server.log").read_text()[-2000:]
        told = json.loads(answer)
        assert not told["hung"] and not told["left"], told
        said = Path(f"{log}.rank0")  # not there where it was killed at once
        return told["codes"][0], said.read_text(errors="replace") if said.exists() else ""


PRELOADED = (
    "rlp.cli",
    "rlp.post.pipeline_run",
    "rlp.post.stages.pretraining",
    "trl.trainer.sft_trainer",
    "trl.trainer.grpo_trainer",
    "datasets",
)


def write_rows(folder: Path, seed: int) -> None:
    """Rows for SFT and prompts for RLVR, of different questions."""
    questions = random.Random(seed).sample(split_questions(seed)["base_train"], 64)
    turns = [turns_of(question) for question in questions]
    texts = [{"text": problem_text(one, computed(one))} for one in turns[:32]]
    prompts = []
    for one in turns[32:]:
        *question, answer, _ = problem_text(one).split()
        prompts.append({"prompt": " ".join([*question, OPEN]), "answer": answer})
    for name, rows in (("sft", texts), ("rlvr", prompts)):
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{seed}_{name}.jsonl").write_text(lines)


TIMES = {"seconds", "wall_s", "environment"}
"""What may differ between two pipelines that did the same."""


def without_times(value: object) -> object:
    """A JSON value without what a clock said, at any depth."""
    if isinstance(value, dict):
        return {name: without_times(inner) for name, inner in value.items() if name not in TIMES}
    if isinstance(value, list):
        return [without_times(inner) for inner in value]
    return value


VOLATILE = ("lock", "log.txt", "logs")
"""Parts of a path that say who held a folder, how often, and what was printed."""

SAID_BY_A_CLOCK = {
    "environment.json",
    "timing.jsonl",
    "summary.json",
    "ledger.json",
    "report.html",
    "config.yaml",
    "meta.json",
    "COMPLETE",
}
"""Files of runs and models that hold seconds, or the path of the run."""


def content(folder: Path) -> dict[str, object]:
    """What two pipelines are compared by: every file by its path below the folder."""
    found: dict[str, object] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_dir() or any(part in VOLATILE for part in path.relative_to(folder).parts):
            continue
        if name == "pipeline.yaml" or path.name in SAID_BY_A_CLOCK:
            found[name] = "there"
        elif path.suffix in (".json", ".jsonl") and "work" not in path.parts:
            lines = path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
            told = [without_times(json.loads(line)) for line in lines]
            # Of stages side by side the one that ends first stands first.
            found[name] = sorted(told, key=str) if name == "results.jsonl" else told
        else:
            found[name] = path.read_bytes()
    return found


def differing(one: Path, other: Path) -> list[str]:
    """Files that are not the same in two folders."""
    left, right = content(one), content(other)
    return [name for name in sorted({*left, *right}) if left.get(name) != right.get(name)]
