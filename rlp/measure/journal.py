"""The journal: what each step read, thought and did, so that a run after any number of crashes can
be compared with one that had none.

A line of `journal.jsonl`, as text wherever a number could be rounded:

    step, applied          the optimizer step, and whether its update was made
    documents              checksum of the ids of the step's documents, all ranks, in order
    thoughts               checksum of the sampled tokens, in order; absent where the run does not
                           think
    numbers                means of the step and the gradient norm, as hex floats
    tokens, flops          spent since the start
    state                  every `logging.digest_every_n_steps`: checksum of master weights, moments
                           and EMA

No checksum depends on the number of ranks or on the ZeRO stage.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from rlp.config import Config, ConfigError
from rlp.data.documents import Document
from rlp.data.positions import Positions
from rlp.learn.engine import Engine
from rlp.learn.optimizer import STATES
from rlp.model.thoughts import Thoughts
from rlp.process.ranks import Ranks
from rlp.process.run_folder import RunFolder, open_run_folder
from rlp.process.run_logs import append_json_line, read_json_lines

NUMBERS = (
    "reward/mean",
    "policy/reasoned_logprob",
    "baseline/logprob",
    "lm/loss",
    "optim/grad_norm",
)
"""Metrics that everything before a step goes into."""

_CHUNK = 2**22
"""Values summed at a time: 32 MiB of int64."""


class Journal:
    """Writes the journal of a run. Every rank calls it; the first one writes."""

    def __init__(self, folder: RunFolder, config: Config, ranks: Ranks, engine: Engine) -> None:
        self._path = folder.journal_jsonl
        self._on, self._digest_every = config.logging.journal, config.logging.digest_every_n_steps
        self._ranks, self._engine = ranks, engine
        self._thoughts: list[bytes] = []

    def add_thoughts(self, positions: Positions, thoughts: Thoughts) -> None:
        """Note the thoughts of this rank's part of the step."""
        if not self._on:
            return
        tokens, mask = thoughts.sampled_tokens.cpu().numpy(), thoughts.sampled_mask.cpu().numpy()
        for document in range(int(positions.document.max()) + 1):
            rows = positions.slice_of_documents(document, document + 1)
            lengths, sampled = mask[rows].sum(axis=-1), tokens[rows][mask[rows]]
            parts = [part.astype(np.int64).tobytes() for part in (lengths, sampled)]
            self._thoughts.append(_checksum(parts).encode())

    def close_step(
        self,
        step: int,
        documents: list[Document],
        values: dict[str, float | None],
        *,
        applied: bool,
        tokens: int,
        flops: float,
    ) -> None:
        """Write the line of a step. A collective.

        Args:
            documents: this rank's.
            values: metrics of the step.
        """
        if not self._on:
            return
        mine, self._thoughts = ([document.id for document in documents], self._thoughts), []
        parts = self._ranks.gather(mine)
        line = {
            "step": step,
            "applied": applied,
            "documents": _checksum(f"{id} ".encode() for ids, _ in parts for id in ids),
        }
        if thoughts := [checksum for _, checksums in parts for checksum in checksums]:
            line["thoughts"] = _checksum(thoughts)
        line |= {
            "numbers": {
                name: float(values[name]).hex() for name in NUMBERS if values.get(name) is not None
            },
            "tokens": tokens,
            "flops": float(flops).hex(),
        }
        if self._digest_every and step % self._digest_every == 0:
            line["state"] = state_digest(self._engine, self._ranks)
        if self._ranks.is_first:
            append_json_line(self._path, line)


def state_digest(engine: Engine, ranks: Ranks) -> str:
    """Checksum of the float32 master weights, moments and EMA. A collective.

    Each tensor is a sum of its bit patterns, weighted with their places, modulo 2**64: it may be
    cut anywhere.
    """
    sums = {}
    for fragment in (
        engine.shards.fragments() if ranks.is_first or not engine.shards.is_whole else []
    ):
        state = engine.shards.state_of(fragment.flat)
        held = {"master": fragment.flat} | {name: state[name] for name in STATES if name in state}
        for kind, flat in held.items():
            sums[f"{kind}/{fragment.name}"] = weighted_bits(fragment.view(flat), fragment.start)
    return _digest_of(sums, ranks)


def weights_digest(engine: Engine, module: nn.Module, ranks: Ranks) -> str:
    """Checksum of the weights of a frozen module, in the dtype that it computes in. A
    collective."""
    held = engine.shards.held_weights(module)
    return _digest_of({name: weighted_bits(part, start) for name, start, part in held}, ranks)


def _digest_of(sums: dict[str, int], ranks: Ranks) -> str:
    """Of the sums of all ranks, each of its part."""
    total: dict[str, int] = {}
    for part in ranks.gather(sums):
        for name, value in part.items():
            total[name] = (total.get(name, 0) + value) % 2**64
    return _checksum([json.dumps(sorted(total.items())).encode()])


def weighted_bits(values: Tensor, start: int) -> int:
    """sum_i (2 i + 1) bits_i modulo 2**64, of values in float32, the first of which has index
    `start`."""
    total = 0
    for first in range(0, values.numel(), _CHUNK):
        bits = values[first : first + _CHUNK].float().view(torch.int32).to(torch.int64)
        place = torch.arange(start + first, start + first + bits.numel(), device=bits.device)
        total += int((bits * (2 * place + 1)).sum())
    return total % 2**64


def _checksum(parts: Iterable[bytes]) -> str:
    """16 hex digits of a SHA-256."""
    return hashlib.sha256(b"".join(parts)).hexdigest()[:16]


def audit(run: Path, reference: Path, *, tolerance: float = 0.0) -> list[str]:
    """What a run did otherwise than an uninterrupted one, by their journals; empty where nothing.

    Args:
        tolerance: relative and absolute, of the numbers; above 0 (another number of ranks or ZeRO
            stage) the state digests are not compared.

    Raises:
        ConfigError: no run folder, or one without a journal.
    """
    mine, expected = (read_json_lines(path) for path in [_path_in(run), _path_in(reference)])
    steps, found = [line["step"] for line in mine], []
    for step, times in sorted(Counter(steps).items()):
        if times > 1:
            found.append(f"step {step} is there {times} times")
    if steps != sorted(steps):
        found.append("steps are out of order")

    by_step = {line["step"]: line for line in mine}
    wanted = {line["step"]: line for line in expected}
    found += [f"step {step} is missing" for step in sorted(wanted.keys() - by_step.keys())]
    found += [f"step {step} is one too many" for step in sorted(by_step.keys() - wanted.keys())]
    for step in sorted(wanted.keys() & by_step.keys()):
        differences = _differences(by_step[step], wanted[step], tolerance)
        found += [f"step {step}: {difference}" for difference in differences]
    return found


def _path_in(run: Path) -> Path:
    folder = open_run_folder(run)
    if not folder.journal_jsonl.exists():
        raise ConfigError(
            f"{folder.path} has no journal.jsonl: it was run with logging.journal=false, or has"
            " made no step."
        )
    return folder.journal_jsonl


def _differences(line: dict, wanted: dict, tolerance: float) -> list[str]:
    exact = ["applied", "documents", "thoughts", "tokens", "flops"]
    if not tolerance:
        exact.append("state")
    found = []
    for name in exact:
        if line.get(name) != wanted.get(name):
            found.append(f"{name} is {line.get(name)}, expected {wanted.get(name)}")

    mine, theirs = line["numbers"], wanted["numbers"]
    for name in sorted(mine.keys() | theirs.keys()):
        if mine.get(name) == theirs.get(name):
            continue
        here, there = (float.fromhex(side.get(name, "nan")) for side in (mine, theirs))
        if not abs(here - there) <= tolerance * (1 + abs(there)):
            found.append(f"{name} is {here!r}, expected {there!r}")
    return found
