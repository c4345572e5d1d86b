"""Fault points: named places where a test can make a run die, fail, hang or compute nonsense.

    RLP_FAULT=save.before_rename:3:kill@rank1      at the third passage, on rank 1
    RLP_FAULT=score.target:2-4:nan,rollout:5:stall  passages 2 to 4; a comma separates several; `2-`
                                                    has no end

Without the variable a point does nothing. Passages are counted from 1, on each rank by itself.
`FAULT_POINTS`, `COMMAND_POINTS` and `TENSOR_POINTS` are the places, `ACTIONS` what can happen
there.
"""

import errno
import os
import re
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor

VARIABLE = "RLP_FAULT"

FAULT_POINTS: dict[str, str] = {
    "folder.torn_config": "Half of the config.yaml of a new run is on disk.",
    "folder.torn_environment": "Half of its environment.json is.",
    "lock.torn_owner": "Half of the claim on a run folder is on disk.",
    "lock.before_rename": (
        "The claim of a job that continues is written and does not have its number yet."
    ),
    "lock.beat": "Before a sign of life of the job that holds the folder.",
    "lock.before_release": "A run has ended, and is about to let go of its folder.",
    "folder.before_rename": "The folder of a new run is written and does not have its name yet.",
    "folder.before_discard": (
        "A new run has failed before its first step, and its folder is about to be removed."
    ),
    "resume.before_aside": "A checkpoint is damaged, and about to be set aside.",
    "resume.before_restore": "A checkpoint is verified and none of it is loaded.",
    "resume.before_truncate": (
        "The checkpoint is loaded; one more log is about to be cut back to its step."
    ),
    "append.before_line": (
        "Before a line is added to a log (metrics, timing, thoughts, evaluation, journal)."
    ),
    "append.torn_line": "Half of a line is in the file.",
    "append.after_line": "After a line was added.",
    "append.torn_rank_log": "Half of what a library said is in logs/rank_N.log.",
    "rollout": "Before the thoughts of a step are sampled.",
    "score": "Before a forward that scores rows: teacher, policy or panel.",
    "backward": "Before the backward of a micro-batch.",
    "optimizer": "All gradients are there, and no weight has moved.",
    "teacher.refresh": "The weights have moved, the forward copy of the EMA has not.",
    "step.before_log": "A step is made, and nothing has been written of it.",
    "evaluation": "Before the held-out panel is scored.",
    "save.before_folder": "Before the folder of a checkpoint is made, under another name.",
    "save.before_part": "Before a rank writes one more file of its shard.",
    "save.torn_part": "Half of such a file is on disk.",
    "save.after_shard": "A rank has written its shard, and does not know of the others.",
    "save.before_meta": "All shards are written, meta.json is not.",
    "save.torn_meta": "Half of meta.json is on disk.",
    "save.before_complete": "meta.json is written, COMPLETE is not.",
    "save.torn_complete": "Half of COMPLETE is on disk.",
    "save.before_aside": "A checkpoint of the same step is there, and about to be set aside.",
    "save.before_rename": "The checkpoint is complete and does not have its name yet.",
    "save.after_rename": "The checkpoint has its name, and nobody has been told.",
    "purge.before_old": "Before an old checkpoint loses its name, to be deleted.",
    "purge.before_delete": "An old checkpoint has lost its name, and all its files are there.",
    "export.before_write": "Before the model is exported.",
    "export.torn_weights": "The weights of an export are written, and nothing else of it.",
    "export.torn_format": "Half of its thought_format.json is on disk.",
    "export.torn_card": "Half of its model card is.",
    "export.before_rename": "The export is written and does not have its name yet.",
    "export.after_rename": "The export has its name; ledger, summary and report are missing.",
    "end.torn_ledger": "Half of ledger.json is on disk.",
    "summary": "Before the summary, which makes a run complete.",
    "end.torn_summary": "Half of summary.json is on disk.",
    "report.torn_page": "Half of report.html is on disk.",
}
"""Where `fault` stands in a run. `GROUP.torn_FILE`: half of a file is on disk; `GROUP.before_ACT`:
a name or a length is about to change."""

COMMAND_POINTS: dict[str, str] = {
    "unpack.torn_file": "A file of training data is unpacked, under another name.",
    "match.torn_config": "`rlp match`: half of the config is on disk.",
    "splice.torn_documents": "`rlp splice`: half of its documents.jsonl is on disk.",
    "splice.torn_config": "Half of its config.yaml is.",
    "splice.torn_ledger": "Half of its ledger.json is.",
    "splice.torn_counts": "Half of its splice.json is.",
    "splice.before_rename": "The folder is written and does not have its name yet.",
    "mixed_sft.torn_asked": "`rlp mixed-sft`: half of its mixed_sft.json is on disk.",
    "mixed_sft.before_rename": "Its folder is written and does not have its name yet.",
    "mixed_sft.torn_rounds": "Half of its rounds.jsonl is on disk.",
    "pipeline.torn_config": "`rlp pipeline`: half of a config that it writes is on disk.",
    "pipeline.torn_asked": "Half of the asked.json of a stage is.",
    "pipeline.before_rename": "The folder of a stage is written and does not have its name yet.",
    "pipeline.torn_manifest": "A stage is done, and half of its manifest.json is on disk.",
    "pipeline.torn_evaluation": "Half of what was read of its models is.",
    "stage.after_step": "TRL's trainers: a step is made, and a model that is to be kept is kept.",
    "stage.before_model": "Such a model is written and does not have its name yet.",
    "stage.torn_format": "Half of its thought_format.json is.",
    "stage.torn_steps": "Half of the log of its steps is on disk.",
    "stage.torn_rollouts": "Half of the rollouts of a step of RLVR are.",
    "stage.torn_checkpoint": "A checkpoint is written, but for half of what makes it whole.",
    "generate.torn_documents": "`generate` of a pipeline: half of the documents are on disk.",
    "probe.torn_rows": "`rlp probe`: rows.parquet is written, and not on disk.",
    "probe.torn_picture": "probe.png is.",
    "probe.torn_numbers": "Half of probe.json is on disk.",
    "probe.before_rename": "The folder is written and does not have its name yet.",
    "markers.before_rename": (
        "`rlp add-markers`: the folder is written and does not have its name yet."
    ),
    "eval.torn_rows": "`rlp eval`: half of the answers of a benchmark are on disk.",
    "eval.torn_json": "Half of the results are.",
    "diversity.torn_samples": "`rlp diversity`: half of some drawn answers are on disk.",
    "diversity.torn_json": "Half of what was measured on them is.",
    "traces.torn_kept": "`rlp traces`: the traces that it keeps are written, and not on disk.",
    "traces.torn_dropped": "Those that it drops are.",
    "traces.torn_pairs": "Pairs of the two are.",
    "traces.torn_counts": "Its counts are.",
    "traces.before_rename": "The folder is written and does not have its name yet.",
    "spectrum.torn_rows": "`rlp spectrum rows`: its rows are written, and not on disk.",
    "spectrum.torn_json": "`rlp spectrum score`: half of its figures are on disk.",
    "pluralism.torn_json": "`rlp pluralism`: half of its figures are on disk.",
    "select.torn_identity": "`rlp select`: half of what its gradients depend on is on disk.",
    "select.before_folder": "The folder that it works in does not have its name yet.",
    "select.torn_samples": "Checksums that stand for its rows are written, and not on disk.",
    "select.torn_features": "Half of the features of a chunk are on disk.",
    "select.torn_codes": "They are, and half of what says so.",
    "select.torn_rows": "Its rows are written, and not on disk.",
    "select.torn_kept": "Those that it keeps are.",
    "select.torn_json": "Half of its figures are on disk.",
    "select.before_done": "All is written, and nothing has its name.",
    "results.torn_line": "Half of a line of an experiment's results.jsonl is on disk.",
    "world.torn_file": "`rlp world`: half of one more file is on disk.",
    "world.before_rename": "The folder is written and does not have its name yet.",
}
"""Where it stands in what is done before a run or beside it."""

TENSOR_POINTS: dict[str, str] = {
    "rollout.logprob": "Log-probabilities of sampled tokens under the behavior policy.",
    "score.target": "Log-probabilities of targets, from which evidence and reward are made.",
    "score.no_think": "Log-probabilities of targets without a thought, under teacher or policy.",
    "score.thought": "Log-probabilities of thought tokens, from which the ratio is made.",
    "loss": "The loss of a micro-batch.",
    "gradient": "The gradient of that loss, the loss itself being finite.",
}
"""Where `poisoned` or `poisoned_gradient` stands."""

SIGNALS = {
    "kill": signal.SIGKILL,
    "term": signal.SIGTERM,
    "hup": signal.SIGHUP,
    "stop": signal.SIGSTOP,
}
"""Signals that a process can send itself. Somebody else has to send SIGCONT."""

ACTIONS = (*SIGNALS, "past", "exit", "raise", "enospc", "eio", "stall", "slow", "nan", "inf")
"""A signal; the clock on the wall set back by a day, for this process; an exit with code 9; an
`InjectedFault`; an OSError of a full disk or of a broken one; a sleep without end; a sleep of a
second; and, at a tensor point, one value that is not finite."""


class InjectedFault(RuntimeError):
    """Raised where a test asked for it."""


class _Fault(NamedTuple):
    point: str
    first: int
    last: float
    action: str
    rank: int | None


_passages: Counter = Counter()

_asked: tuple[str, list[_Fault]] = ("", [])


def fault(point: str, first: Callable[[], object] | None = None) -> None:
    """Let happen what the environment asks for at this passage of the point.

    Args:
        first: is called right before, where something happens; leaves half of a file, as a crash
            would.
    """
    action = _due(point)
    if action is None:
        return
    if first is not None:
        first()
    if action in SIGNALS:
        os.kill(os.getpid(), SIGNALS[action])
    elif action == "past":
        now = time.time
        time.time = lambda: now() - 86_400
    elif action == "exit":
        os._exit(9)
    elif action == "raise":
        raise InjectedFault(f"fault at {point}")
    elif action in ("enospc", "eio"):
        code = {"enospc": errno.ENOSPC, "eio": errno.EIO}[action]
        raise OSError(code, os.strerror(code), f"fault at {point}")
    elif action == "slow":
        time.sleep(1)
    while action == "stall":
        time.sleep(3600)


def poisoned(point: str, values: "Tensor") -> "Tensor":
    """The tensor itself, or, where the environment asks for it, a copy whose first value is not
    finite."""
    action = _due(point) if values.numel() else None
    if action is None:
        return values
    first = values.new_zeros(values.shape).flatten()
    first[0] = float(action)
    return values + first.reshape(values.shape)


def poisoned_gradient(point: str, values: "Tensor") -> "Tensor":
    """The tensor itself; where the environment asks for it, its gradient will not be finite."""
    action = _due(point)
    if action is not None:
        values.register_hook(lambda gradient: gradient * float(action))
    return values


def forget_passages() -> None:
    """Count every point from 1 again: for a process that makes several runs."""
    _passages.clear()


def _due(point: str) -> str | None:
    """The action that is asked for at this passage of a point."""
    global _asked
    text = os.environ.get(VARIABLE, "")
    if not text:
        return None
    if _asked[0] != text:
        _asked = (text, [_parse(part) for part in text.split(",")])

    _passages[point] += 1
    passage, rank = _passages[point], int(os.environ.get("RANK", "0"))
    for asked in _asked[1]:
        if (
            asked.point == point
            and asked.rank in (None, rank)
            and asked.first <= passage <= asked.last
        ):
            # Not to sys.stdout, which another thread may have redirected for the moment.
            told = f"fault at {point}, passage {passage}, rank {rank}: {asked.action}"
            print(told, file=sys.__stdout__, flush=True)
            return asked.action
    return None


_ASKED = re.compile(
    r"(?P<point>[a-z_.]+):(?P<first>\d+)(?P<more>-(?P<last>\d*))?:(?P<action>[a-z]+)"
    r"(@rank(?P<rank>\d+))?"
)


def _parse(text: str) -> _Fault:
    match = _ASKED.fullmatch(text.strip())
    known = FAULT_POINTS.keys() | COMMAND_POINTS.keys() | TENSOR_POINTS.keys()
    if not match or match["point"] not in known or match["action"] not in ACTIONS:
        raise ValueError(
            f"{VARIABLE}: expected POINT:PASSAGE:ACTION or POINT:PASSAGE:ACTION@rankN, got"
            f" {text!r}. Points: {', '.join(sorted(known))}. Actions: {', '.join(ACTIONS)}."
        )
    if (match["point"] in TENSOR_POINTS) != (match["action"] in ("nan", "inf")):
        raise ValueError(
            f"{VARIABLE}: {text!r}: nan and inf are for {', '.join(TENSOR_POINTS)}, and those know"
            " nothing else."
        )

    first = last = int(match["first"])
    if match["more"]:
        last = float(match["last"] or "inf")
    rank = int(match["rank"]) if match["rank"] else None
    return _Fault(match["point"], first, last, match["action"], rank)
