"""Save all that changes, and resume from it at any number of ranks and any ZeRO stage.

A checkpoint is a folder `step_N`:

    shard_RRRRR.safetensors   per rank: `master/NAME`, `exp_avg/NAME`, `exp_avg_sq/NAME`, `ema/NAME`, the flat
                              fragments of each float32 tensor that the rank owns
    meta.json                 sizes and checksums of the shards, where each fragment starts, and the run's state
    COMPLETE                  the checksum of meta.json, written last

It is written under another name, synced, and renamed: it is complete or invisible. No pickle is written or read.
"""

import errno
import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from rlp.config import ConfigError
from rlp.distributed import Ranks
from rlp.engine import STATES, Engine


class CheckpointError(Exception):
    """A checkpoint that can not be used; the message says which and why."""


def save_checkpoint(parent: Path, step: int, engine: Engine, ranks: Ranks, state: dict, keep: int) -> Path | None:
    """Write `parent/step_N` and remove all but the `keep` newest checkpoints.

    Args:
        state: JSON values: everything of the run that is no tensor.

    Returns:
        The folder, or None where some rank could not write: training may go on, the older checkpoints stand.
    """
    temporary = ranks.broadcast(parent / f".tmp.step_{step}.{secrets.token_hex(4)}" if ranks.is_first else None)
    failure = None
    shard = {}
    try:
        temporary.mkdir(parents=True, exist_ok=True)
        shard = _write_shard(temporary / f"shard_{ranks.rank:05d}.safetensors", engine, ranks)
    except (OSError, SafetensorError) as error:
        failure = f"rank {ranks.rank}: {error}"
    answers = ranks.gather((shard, failure))
    failures = [failure for _, failure in answers if failure]
    final = parent / f"step_{step}"
    if ranks.is_first and not failures:
        try:
            shards = {name: entry for shard, _ in answers for name, entry in shard.items()}
            _complete(temporary, final, {"step": step, "shards": shards, "state": state})
            _keep_newest(parent, keep)
        except OSError as error:
            failures = [f"rank 0: {error}"]
    failures = ranks.broadcast(failures)
    if failures and ranks.is_first:
        shutil.rmtree(temporary, ignore_errors=True)
    return None if failures else final


def _write_shard(path: Path, engine: Engine, ranks: Ranks) -> dict:
    """This rank's tensors. Where nothing is sharded the first rank has them all."""
    whole = engine.is_whole
    tensors, fragments, adam_step = {}, {}, 0
    for fragment in engine.fragments() if ranks.is_first or not whole else []:
        state = engine.state_of(fragment.flat)
        fragments[fragment.name] = fragment.start
        tensors[f"master/{fragment.name}"] = fragment.view(fragment.flat)
        for name in STATES:
            if name in state:
                tensors[f"{name}/{fragment.name}"] = fragment.view(state[name])
        adam_step = int(state["step"]) if state else 0
    # A copy each: safetensors refuses views that share storage.
    save_file({name: tensor.cpu().clone() for name, tensor in tensors.items()}, path)
    _sync(path)
    return {path.name: {"size": path.stat().st_size, "sha256": _digest(path), "fragments": fragments, "adam_step": adam_step}}


def _complete(temporary: Path, final: Path, meta: dict) -> None:
    """Write meta.json and COMPLETE, and give the folder its name."""
    (temporary / "meta.json").write_text(json.dumps(meta, indent=1, allow_nan=False))
    _sync(temporary / "meta.json")
    (temporary / "COMPLETE").write_text(_digest(temporary / "meta.json"))
    _sync(temporary / "COMPLETE")
    _sync(temporary)
    if final.exists():
        _set_aside(final)
    os.replace(temporary, final)
    _sync(final.parent)


def _keep_newest(parent: Path, keep: int) -> None:
    for stale in parent.glob(".tmp.step_*"):
        shutil.rmtree(stale, ignore_errors=True)
    for old in _by_step(parent)[keep:]:
        shutil.rmtree(old)


def _by_step(parent: Path) -> list[Path]:
    """Checkpoints of a run, newest first."""
    folders = [(int(match[1]), path) for path in parent.glob("step_*") if (match := re.fullmatch(r"step_(\d+)", path.name))]
    return [path for _, path in sorted(folders, reverse=True)]


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some file systems can not sync a folder
            raise
    finally:
        os.close(handle)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A verified checkpoint, open for reading."""

    path: Path
    step: int
    state: dict
    """What `save_checkpoint` was given."""
    shards: dict

    @property
    def adam_step(self) -> int:
        """Updates that the optimizer has made."""
        return max(shard["adam_step"] for shard in self.shards.values())

    def names(self) -> set[str]:
        """Parameters in it."""
        return {name for shard in self.shards.values() for name in shard["fragments"]}

    def read(self, kind: str, name: str, start: int, numel: int) -> Tensor:
        """[numel] float32: part of a flattened parameter's `master`, moment or EMA, from whichever shards hold it."""
        values = torch.empty(numel)
        filled = 0
        for file, shard in self.shards.items():
            if name not in shard["fragments"]:
                continue
            with safe_open(self.path / file, framework="pt") as tensors:
                piece = tensors.get_slice(f"{kind}/{name}")
                begin = shard["fragments"][name]
                low, high = max(start, begin), min(start + numel, begin + piece.get_shape()[0])
                if low < high:
                    values[low - start : high - start] = piece[low - begin : high - begin]
                    filled += high - low
        if filled != numel:
            raise CheckpointError(f"{self.path}: {kind} of {name} has {filled} of the {numel} values asked for. It was made by another model.")
        return values


def open_checkpoint(path: Path) -> Checkpoint:
    """Read and verify one checkpoint.

    Raises:
        CheckpointError: incomplete, or a file whose size or checksum is not the recorded one.
    """
    meta_path, complete = path / "meta.json", path / "COMPLETE"
    if not (meta_path.is_file() and complete.is_file()):
        raise CheckpointError(f"{path} is no complete checkpoint: expected meta.json and COMPLETE in it.")
    if complete.read_text() != _digest(meta_path):
        raise CheckpointError(f"{path}: meta.json is not the one that was written (its checksum differs).")
    meta = json.loads(meta_path.read_text())
    for name, entry in meta["shards"].items():
        file = path / name
        if not file.is_file() or file.stat().st_size != entry["size"] or _digest(file) != entry["sha256"]:
            raise CheckpointError(f"{path}: {name} is missing or damaged (its size or checksum differs).")
    return Checkpoint(path=path, step=meta["step"], state=meta["state"], shards=meta["shards"])


def newest_checkpoint(parent: Path, ranks: Ranks, say: Callable[[str], None]) -> Checkpoint | None:
    """The newest good checkpoint of a run; bad ones are said, and set aside. None where there is none at all.

    Raises:
        CheckpointError: there are checkpoints, and none is good.
    """
    found: list[Path | str] = []
    if ranks.is_first:
        rejected = []
        for path in _by_step(parent):
            try:
                open_checkpoint(path)
            except CheckpointError as error:
                rejected.append(str(error))
                say(f"{error} It is set aside as {_set_aside(path).name}; the one before it is tried.")
                continue
            found = [path]
            break
        if rejected and not found:
            found = ["No good checkpoint is left: " + " ".join(rejected) + " Start a new run, or write run.resume=PATH of a good one."]
    found = ranks.broadcast(found)
    if found and isinstance(found[0], str):
        raise CheckpointError(found[0])
    return open_checkpoint(found[0]) if found else None


def _set_aside(path: Path) -> Path:
    """Give a folder a name that is no checkpoint's; nothing is deleted."""
    aside = path.with_name(f"set_aside.{path.name}.{secrets.token_hex(4)}")
    os.replace(path, aside)
    return aside


def restore(checkpoint: Checkpoint, engine: Engine, ranks: Ranks) -> None:
    """Set weights, master weights, moments and EMA, whatever the number of ranks and the stage were.

    Raises:
        CheckpointError: made by a model with other parameters, or without the EMA that this run needs.
    """
    fragments = engine.fragments()
    names = {name for name, _ in engine.parameters()}
    if names != checkpoint.names():
        odd = sorted(names ^ checkpoint.names())
        raise CheckpointError(f"{checkpoint.path} was made by another model: {len(odd)} parameters differ, such as {odd[0]}.")
    states = STATES if engine.keeps_ema else STATES[:2]
    for flat in {id(fragment.flat): fragment.flat for fragment in fragments}.values():
        if checkpoint.adam_step > 0:
            engine.restore_state(flat, checkpoint.adam_step, states)
    for fragment in fragments:
        where = (fragment.name, fragment.start, fragment.numel)
        fragment.view(fragment.flat).copy_(checkpoint.read("master", *where))
        for name in states if checkpoint.adam_step > 0 else ():
            fragment.view(engine.state_of(fragment.flat)[name]).copy_(checkpoint.read(name, *where))
    engine.write_weights(engine.policy, lambda *where: checkpoint.read("master", *where))


def refuse_other_run(saved: dict, config: dict, path: Path) -> None:
    """Refuse to continue a run with settings that would make it another run.

    Where it runs, how long, how it is sharded and told may change; what is computed may not.

    Args:
        saved, config: nested mappings of the two configs.
    """
    may_change = {"run", "engine", "evaluation", "checkpoint", "logging", "optim.micro_batch_size", "optim.thoughts_per_forward", "thought.sampling_rows", "model.attention"}
    if config["optim"]["schedule"] == "constant":
        may_change.add("budget")  # any other schedule runs over the budget
    must_not = {"engine.dtype", "evaluation.panel_positions"}
    differing = []
    for section, values in config.items():
        for name, value in values.items():
            key = f"{section}.{name}"
            fixed = key in must_not or not (section in may_change or key in may_change)
            if fixed and saved[section].get(name) != value:
                differing.append(f"{key} was {saved[section].get(name)!r}, is {value!r}")
    if differing:
        raise ConfigError(f"run.resume: {path} was made with other settings: {'; '.join(differing)}. Write the same values, or start a new run with model.path set to its export.")
