"""Runs that are made to fail: start, kill, resume, audit."""

import json
import re
import subprocess
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from rlp.measure.journal import audit
from rlp.process.exit_codes import DONE, PREEMPTED
from rlp.process.faults import VARIABLE
from rlp.process.run_logs import read_json_lines
from tests.tiny_models import WORDS, tiny_policy, word_tokenizer
from tests.training import TINY, write_corpus

SAVE_EVERY = 2
STEPS = 6
LIMIT_S = 300.0
"""A run of the harness takes 2 s, and 30 s on a machine that does much else; one that has not ended
after this hangs."""

SETTINGS = TINY | {
    "budget.steps": STEPS,
    "checkpoint.every_n_steps": SAVE_EVERY,
    "optim.micro_batch_size": 1,
    "optim.batch_size": 4,
    "evaluation.every_n_steps": 3,
    "position.per_document": 1,
    "thought.group_size": 2,
    "thought.max_thought_tokens": 3,
    "evaluation.panel_positions": 2,
    "logging.digest_every_n_steps": 1,
    "run.watchdog_s": 30,
}
"""Six steps of several micro-batches over an epoch and a half, a checkpoint every two, evaluations
between."""

SAME_BYTES = ("metrics.jsonl", "evaluation.jsonl", "thoughts.jsonl", "journal.jsonl")


@dataclass(frozen=True)
class Attempt:
    """One start of a run, and what happens to it."""

    fault: str = ""
    """`RLP_FAULT`."""
    kill: tuple[int, float] | None = None
    """A rank, and seconds after the start, of a SIGKILL."""
    launcher_s: float | None = None
    """The launcher is killed so long after the ranks have taken note of it."""
    twin_s: float | None = None
    """So long after the start another job starts in the same folder."""
    wake_s: float | None = None
    """A rank that stops itself is continued so long after; None: when the others have ended."""
    settings: dict[str, object] = field(default_factory=dict)
    """Of this attempt alone."""
    kind: str = ""
    """What it is, for counts: by default the action of the fault."""
    ends_with: tuple[int, ...] = ()
    """Exit codes that are right once the fault has struck; none given: the harness asks for no
    certain ones."""

    @classmethod
    def of(cls, text: str) -> "Attempt":
        """From `RLP_FAULT`, or `kill:RANK:SECONDS`."""
        if text.startswith("kill:"):
            _, rank, seconds = text.split(":")
            return cls(kill=(int(rank), float(seconds)), kind="kill at a time")
        return cls(fault=text, kind=text.split(",")[0].split(":")[2].split("@")[0] if text else "")

    def __str__(self) -> str:
        parts = [
            self.fault,
            f"kill:{self.kill[0]}:{self.kill[1]}" if self.kill else "",
            f"launcher killed after {self.launcher_s} s" if self.launcher_s is not None else "",
            f"another job after {self.twin_s} s" if self.twin_s is not None else "",
            f"woken after {self.wake_s} s" if self.wake_s is not None else "",
            str(self.settings or ""),
        ]
        return " ".join(part for part in parts if part)

    def has_struck(self, answer: dict) -> bool:
        """Whether what was asked for came to pass; the run may have ended before."""
        if self.kill:
            return -9 in answer["codes"]
        if self.launcher_s is not None:
            return set(answer["codes"]) != {0}
        if self.twin_s is not None:
            return "is held by" in answer["text"] or set(answer["twin_codes"]) != {0}
        return all(
            f"fault at {asked.split(':')[0]}," in answer["text"]
            for asked in self.fault.split(",")
            if asked
        )


@dataclass(frozen=True)
class Case:
    """One run that is made to fail, and continued until it is done."""

    faults: tuple[str | Attempt, ...] = ()
    """All attempts but the last; a text is read by `Attempt.of`."""
    survived: str = ""
    """`RLP_FAULT` of the last attempt, which has to end well."""
    ranks: int = 1
    resume_ranks: int | None = None
    """Of the attempts after the first; None: as many."""
    settings: dict[str, object] = field(default_factory=dict)

    def __str__(self) -> str:
        numbers = f"{self.ranks} ranks" + (
            f", continued on {self.resume_ranks}" if self.resume_ranks else ""
        )
        faults = [*map(str, self.faults), *([f"survived {self.survived}"] if self.survived else [])]
        return f"{' then '.join(faults)} [{numbers}] {self.settings or ''}".strip()


@dataclass
class Outcome:
    """What became of a case."""

    problems: list[str] = field(default_factory=list)
    lost_steps: list[int] = field(default_factory=list)
    """By attempt: steps that had been logged and were made again."""
    recovery_s: list[float] = field(default_factory=list)
    """By continued attempt: seconds from its start to its end."""
    survivor_s: list[float] = field(default_factory=list)
    """By failed attempt of several ranks: seconds that the last rank outlived the first."""
    codes: list[list[int]] = field(default_factory=list)
    struck: list[str] = field(default_factory=list)
    """Kinds of the attempts whose fault came to pass."""
    hung: int = 0
    """Attempts in which some rank did not end by itself."""
    text: str = ""
    """All that was printed."""


class Harness:
    """A fork server, a tiny model and a corpus; keeps the uninterrupted runs that cases are
    compared with."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.model = folder / "model"
        tiny_policy().lm.save_pretrained(self.model)
        word_tokenizer().save_pretrained(self.model)
        generator = np.random.default_rng(0)
        documents = [
            " ".join(
                WORDS[i] for i in generator.integers(5, len(WORDS), size=generator.integers(6, 12))
            )
            for _ in range(16)
        ]
        self.corpus = write_corpus(folder / "corpus.jsonl", documents)
        self._references: dict[str, Path] = {}
        self._server = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("server.py")), str(self.model)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=(folder / "server.log").open("w"),
            text=True,
        )

    def close(self) -> None:
        self._server.stdin.close()
        self._server.wait(timeout=LIMIT_S)

    def start(
        self,
        run: Path,
        *,
        ranks: int = 1,
        fault: str | Attempt = "",
        settings: dict | None = None,
        limit_s: float = LIMIT_S,
        wake_s: float | None = None,
    ) -> dict:
        """Start or continue a run, and wait for its end; the answer of `run_ranks` and what was
        printed.

        Args:
            wake_s: of `run_ranks`, where the fault is a text.
        """
        attempt = replace(Attempt.of(fault), wake_s=wake_s) if isinstance(fault, str) else fault
        base = self.folder / f"{run.name}.yaml"
        base.write_text(
            f"model: {{path: {self.model}}}\ndata: {{train: [{self.corpus}], held_out:"
            f" [{self.corpus}]}}\nrun: {{dir: {run}, resume: auto}}\n"
        )
        values = SETTINGS | (settings or {}) | attempt.settings
        log = self.folder / f"{run.name}.log"
        for old in self.folder.glob(f"{run.name}.log.*"):
            old.unlink()
        job = {
            "arguments": [
                str(base),
                *(f"{key}={'null' if value is None else value}" for key, value in values.items()),
            ],
            "environment": {VARIABLE: attempt.fault},
            "world_size": ranks,
            "log": str(log),
            "limit_s": limit_s,
            "kill": attempt.kill,
            "wake_s": attempt.wake_s,
            "launcher_s": attempt.launcher_s,
            "twin_s": attempt.twin_s,
        }
        self._server.stdin.write(json.dumps(job) + "\n")
        self._server.stdin.flush()
        answer = self._server.stdout.readline()
        if not answer:
            raise RuntimeError(
                f"the fork server died: {(self.folder / 'server.log').read_text()[-2000:]}"
            )
        return json.loads(answer) | {
            "text": "".join(
                path.read_text(errors="replace")
                for path in sorted(self.folder.glob(f"{run.name}.log.*"))
            )
        }

    def reference(self, ranks: int, settings: dict) -> Path:
        """The run without a fault."""
        key = f"reference_{ranks}_" + "_".join(
            f"{name}.{value}" for name, value in sorted(settings.items())
        ).replace("/", "")
        if key not in self._references:
            answer = self.start(self.folder / key, ranks=ranks, settings=settings)
            if set(answer["codes"]) != {0}:
                raise RuntimeError(f"the run without a fault failed: {answer}")
            self._references[key] = self.folder / key
        return self._references[key]

    def play(self, case: Case, name: str, *, allow_missed: bool = False) -> Outcome:
        """Fail, continue, compare.

        Args:
            allow_missed: a fault that is never come to is no problem; random ones are sometimes
                drawn past the end.
        """
        outcome = Outcome()
        run = self.folder / name
        ranks, logged = case.ranks, 0
        for number, fault in enumerate([*case.faults, case.survived]):
            attempt = Attempt.of(fault) if isinstance(fault, str) else fault
            if number:
                ranks = case.resume_ranks or case.ranks
            last = number == len(case.faults)
            if not last and (run / "summary.json").exists():
                continue  # a random fault was drawn past the end
            answer = self.start(run, ranks=ranks, fault=attempt, settings=case.settings)
            outcome.codes.append(answer["codes"])
            outcome.text += answer["text"]
            if number:
                outcome.recovery_s.append(answer["seconds"])
            if number and (begun := continued_from(answer["text"])) is not None:
                outcome.lost_steps.append(max(0, logged - begun))
                logged = 0
            if ranks > 1 and set(answer["codes"]) != {0}:
                outcome.survivor_s.append(answer["survivor_s"])
            outcome.hung += answer["hung"]
            struck = attempt.has_struck(answer)
            outcome.struck += [attempt.kind] if struck and attempt.kind else []
            missed = not struck and not attempt.kill and not allow_missed
            found = [
                *_wrong(attempt, answer, struck),
                *([f"never came to {attempt}"] if missed else []),
            ]
            if last and set(answer["codes"]) != {0}:
                found.append(
                    f"is the last one, and ended with {answer['codes']}: {answer['text'][-1500:]}"
                )
            outcome.problems += [f"attempt {number} {problem}" for problem in found]
            logged = max(
                logged, last_step(run)
            )  # an attempt that died while it cut the logs back has made no step
        if not outcome.problems:
            outcome.problems += self._audit(case, run)
        if NOT_SAVED not in outcome.text:
            outcome.problems += [
                f"lost {lost} steps" for lost in outcome.lost_steps if lost > SAVE_EVERY
            ]
        return outcome

    def _audit(self, case: Case, run: Path) -> list[str]:
        same_topology = case.resume_ranks in (None, case.ranks)
        reference = self.reference(case.ranks, case.settings)
        found = audit(run, reference, tolerance=0 if same_topology else 1e-5)
        if same_topology:
            found += [
                f"{name} differs from the uninterrupted run's"
                for name in SAME_BYTES
                if (run / name).read_bytes() != (reference / name).read_bytes()
            ]
            found += ["the export differs"] if _weights(run) != _weights(reference) else []
        steps = [line["step"] for line in read_json_lines(run / "metrics.jsonl")]
        found += (
            [f"metrics.jsonl holds the steps {steps}"]
            if steps != list(range(1, case.settings.get("budget.steps", STEPS) + 1))
            else []
        )
        left = [
            path.name
            for path in (run, run / "checkpoints")
            for path in path.iterdir()
            if path.name.startswith(".")
        ]
        return found + ([f"left behind: {left}"] if left else [])


NOT_SAVED = "the checkpoint could not be written"
"""A run whose disk was full says so, and may lose the steps that it could not save."""


def _wrong(attempt: Attempt, answer: dict, struck: bool) -> list[str]:
    """What an attempt did that it must not do, whatever became of the run."""
    codes, found = answer["codes"], []
    if answer["hung"]:
        found.append(f"hung: exit codes {codes}: {answer['text'][-3000:]}")
    if answer["left"]:
        found.append(f"left {answer['left']} processes behind")
    if struck and ":kill" in attempt.fault and set(codes) == {0}:
        found.append(f"ended well in spite of {attempt}")
    ends_with = {*attempt.ends_with}
    if PREEMPTED in ends_with and came_after_the_last_step(answer["text"]):
        ends_with.add(DONE)
    if struck and ends_with and not {*codes, *answer["twin_codes"]} <= ends_with:
        found.append(
            f"ended with {codes} {answer['twin_codes'] or ''}, not with one of {attempt.ends_with}:"
            f" {answer['text'][-1500:]}"
        )
    if (
        "Traceback" in answer["text"]
        and "InjectedFault: " not in answer["text"].rpartition("Traceback")[2]
    ):
        found.append(f"shows a traceback: {answer['text'][-3000:]}")
    return found


def came_after_the_last_step(text: str) -> bool:
    """Whether a fault struck when the budget was spent: a run that is asked to stop then has saved,
    evaluates, exports, and is complete."""
    made = re.search(r"^step (\d+)/\1 ", text, flags=re.MULTILINE)
    return made is not None and text.rfind("\nfault at ") > made.start()


def _weights(run: Path) -> bytes:
    return (run / "export" / "model.safetensors").read_bytes()


def last_step(run: Path) -> int:
    """The last step in the metrics, 0 where there is none; a torn line does not count."""
    path = run / "metrics.jsonl"
    lines = read_json_lines(path) if path.exists() else []
    return lines[-1]["step"] if lines else 0


def continued_from(text: str) -> int | None:
    """The step that a run said it continues from; None where it died before."""
    for line in text.splitlines():
        if line.startswith("continuing from ") and " at step " in line:
            return int(line.rsplit(" ", 1)[1])
        if " is complete: nothing to do" in line:
            return STEPS
        if line.endswith("begins again at step 0"):
            return 0
    return None
