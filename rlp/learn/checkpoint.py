"""Save all that changes, and resume from it at any number of ranks and any ZeRO stage.

A checkpoint is a folder `step_N`:

    shard_RRRRR-PPPPP.safetensors   per rank, in parts: `master/NAME`, `exp_avg/NAME`,
                                    `exp_avg_sq/NAME`, `lag/NAME` (master - EMA), flat pieces of the
                                    float32 tensors that the rank owns
    meta.json                       sizes and checksums of the parts, where each piece starts, the
                                    shapes of the parameters, and the run's state
    COMPLETE                        the checksum of meta.json, written last

It is written under another name, synced, read back, and renamed: it is complete or invisible. Only
then do older ones go, so there is a good one at every moment. No pickle is written or read.
"""

import errno
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from rlp.config import ConfigError
from rlp.learn.engine import Engine
from rlp.learn.optimizer import STATES
from rlp.process.faults import fault
from rlp.process.files import (
    make_folder,
    name_folder,
    open_to_read,
    read_bytes,
    refuse_odd_entries,
    set_aside,
    temporary_of,
    write_new,
)
from rlp.process.ranks import Ranks
from rlp.process.run_folder import saved_steps
from rlp.process.schemas import META

FORMAT = 3
"""Of the folder; another one is refused."""

PART_BYTES = 2**26
"""Tensor data in a file, at most. A save takes about three times this much memory, however large
the model is."""

MAX_META_BYTES = 2**28
"""Of meta.json: some hundred bytes for each part of 64 MiB of tensors."""


class CheckpointError(Exception):
    """A checkpoint that can not be used; the message says which and why."""


def save_checkpoint(
    parent: Path,
    step: int,
    engine: Engine,
    ranks: Ranks,
    state: dict,
    keep: int,
    *,
    settle: Callable[[], None],
    say: Callable[[str], None],
) -> Path | None:
    """Write `parent/step_N`, then remove all but the `keep` newest checkpoints. A collective.

    Args:
        state: JSON values: everything of the run that is no tensor.
        settle: brings to disk, on the first rank, what must be there before the checkpoint is; an
            OSError of it fails the save.
        say: told what could not be done.

    Returns:
        The folder, or None where some rank could not write: training may go on, the older
        checkpoints stand.
    """
    final = parent / f"step_{step}"
    temporary = ranks.broadcast(temporary_of(final) if ranks.is_first else None)
    shards, failures = _write_shards(temporary, engine, ranks)
    if ranks.is_first and not failures:
        meta = {
            "format": FORMAT,
            "step": step,
            "shards": shards,
            "shapes": engine.shards.shapes(),
            "state": state,
        }
        try:
            settle()
            _complete(temporary, final, meta)
        except OSError as error:
            failures = [f"rank 0: {error}"]

    failures = ranks.broadcast(failures)
    if failures:
        say(
            f"step {step}: the checkpoint could not be written ({'; '.join(failures)}). Training"
            " goes on; the older checkpoints stand."
        )
    if ranks.is_first:
        try:
            _remove_old(parent, keep, newest=None if failures else final)
        except OSError as error:
            say(
                f"step {step}: an old checkpoint could not be removed ({error}). The new one is"
                " good; removal is tried again after the next."
            )
    return None if failures else final


def _write_shards(folder: Path, engine: Engine, ranks: Ranks) -> tuple[dict, list[str]]:
    """Write all shards; on every rank what meta.json says of them, and why some rank could not
    write its own. A collective."""
    failure, mine = None, {}
    try:
        fault("save.before_folder")
        make_folder(folder, exist_ok=True)
        mine = _write_shard(folder, engine, ranks)
        fault("save.after_shard")
    except (OSError, SafetensorError) as error:
        failure = f"rank {ranks.rank}: {error}"

    shards, failures = {}, []
    for written, failed in ranks.gather((mine, failure)):
        shards |= written
        if failed:
            failures.append(failed)
    return shards, failures


def _write_shard(folder: Path, engine: Engine, ranks: Ranks) -> dict:
    """Write this rank's tensors, part by part, and read each part back; what meta.json says of
    them, by file name."""
    written = {}
    for index, (starts, adam_step, tensors) in enumerate(_parts(engine, ranks)):
        fault("save.before_part")
        path = folder / f"shard_{ranks.rank:05d}-{index:05d}.safetensors"
        content = safetensors.torch.save(tensors)
        write_new(path, content, point="save.torn_part")
        checksum = hashlib.sha256(content).hexdigest()
        if _digest(path) != checksum:
            raise OSError(errno.EIO, "reads back otherwise than it was written", str(path))
        written[path.name] = {
            "size": len(content),
            "sha256": checksum,
            "fragments": starts,
            "adam_step": adam_step,
        }
    return written


def _parts(engine: Engine, ranks: Ranks) -> Iterator[tuple[dict[str, int], int, dict[str, Tensor]]]:
    """This rank's tensors, at most `PART_BYTES` at a time: where each parameter's piece starts in
    the flattened parameter, the optimizer's step, and copies of the pieces. Where nothing is
    sharded the first rank has them all."""
    starts, tensors, adam_step, room = {}, {}, 0, PART_BYTES
    for fragment in (
        engine.shards.fragments() if ranks.is_first or not engine.shards.is_whole else []
    ):
        state = engine.shards.state_of(fragment.flat)
        kinds = {"master": fragment.flat} | {name: state[name] for name in STATES if name in state}
        adam_step = int(state["step"]) if state else 0
        bytes_each, done = 4 * len(kinds), 0

        while done < fragment.numel:
            if room < bytes_each:
                yield starts, adam_step, tensors
                starts, tensors, room = {}, {}, PART_BYTES

            count = min(fragment.numel - done, room // bytes_each)
            starts[fragment.name] = fragment.start + done
            for kind, flat in kinds.items():
                piece = fragment.view(flat)[done : done + count]
                # A copy each: safetensors refuses views that share storage.
                tensors[f"{kind}/{fragment.name}"] = piece.to("cpu", copy=True)
            done, room = done + count, room - count * bytes_each
    if tensors:
        yield starts, adam_step, tensors


def _complete(temporary: Path, final: Path, meta: dict) -> None:
    """Write meta.json and COMPLETE, and give the folder its name."""
    fault("save.before_meta")
    content = json.dumps(meta, indent=1, allow_nan=False).encode()
    write_new(temporary / "meta.json", content, point="save.torn_meta")

    fault("save.before_complete")
    checksum = hashlib.sha256(content).hexdigest()
    write_new(temporary / "COMPLETE", checksum.encode(), point="save.torn_complete")

    if final.exists():
        _set_aside(final, point="save.before_aside")
    name_folder(temporary, final, point="save.before_rename")
    fault("save.after_rename")


def _remove_old(parent: Path, keep: int, newest: Path | None) -> None:
    """Remove what this or an earlier save left unfinished, and, where there is a new checkpoint,
    all but the `keep` newest.

    An old checkpoint loses its name first: half of one is never taken for damage.
    """
    if newest is not None:
        others = [path for path in _by_step(parent) if path != newest]
        for old in others[keep - 1 :]:
            set_aside(old, f".tmp.{old.name}", point="purge.before_old")
    _remove_unfinished(parent)


def _remove_unfinished(parent: Path) -> None:
    """Delete what saves and removals left that were interrupted. At the start of a run, and after a
    save, nobody writes there."""
    for stale in parent.glob(".tmp.step_*"):
        fault("purge.before_delete")
        shutil.rmtree(stale)


def _by_step(parent: Path) -> list[Path]:
    """Checkpoints of a run, newest first."""
    return list(reversed(saved_steps(parent).values()))


def newest_name(parent: Path) -> Path | None:
    """The folder of a run's newest checkpoint, unread; None where there is none."""
    return next(iter(_by_step(parent)), None)


def _digest(path: Path) -> str:
    with open_to_read(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A verified checkpoint, open for reading."""

    path: Path
    step: int
    state: dict
    """What `save_checkpoint` was given."""
    shapes: dict[str, list[int]]
    """Of each parameter, by name."""
    shards: dict

    @property
    def adam_step(self) -> int:
        """Updates that the optimizer has made."""
        return max((shard["adam_step"] for shard in self.shards.values()), default=0)

    def read(self, kind: str, name: str, start: int, numel: int) -> Tensor:
        """[numel] float32: part of a flattened parameter's `master`, moment or EMA, from whichever
        shards hold it."""
        values, read = torch.zeros(numel), []
        for file, shard in self.shards.items():
            if name not in shard["fragments"]:
                continue
            begin = shard["fragments"][name]
            try:
                with safe_open(self.path / file, framework="pt") as tensors:
                    piece = tensors.get_slice(f"{kind}/{name}")
                    length = _length(piece, f"{self.path}: {file} holds {kind} of {name}")
                    low, high = max(start, begin), min(start + numel, begin + length)
                    if low < high:
                        values[low - start : high - start] = piece[low - begin : high - begin]
                        read.append((low, high))
            except SafetensorError as error:
                raise CheckpointError(
                    f"{self.path}: {kind} of {name} can not be read from {file}: {error}."
                ) from error

        filled = sum(high - low for low, high in read)
        if filled != numel:
            raise CheckpointError(
                f"{self.path}: {kind} of {name} has {filled} of the {numel} values asked for. It"
                " was made by another model."
            )
        read.sort()
        if any(end != begin for (_, end), (begin, _) in zip(read, read[1:])):
            raise CheckpointError(
                f"{self.path}: pieces of {kind} of {name} overlap, and others are missing."
            )
        return values

    @property
    def config(self) -> dict:
        """Of the run that made it, as nested mappings.

        Raises:
            CheckpointError: it holds none.
        """
        if "config" not in self.state:
            raise CheckpointError(f"{self.path} holds no config of a run.")
        return self.state["config"]


def _length(piece: object, where: str) -> int:
    """Of a flat float32 piece of a safetensors file, unread."""
    shape = piece.get_shape()
    if piece.get_dtype() != "F32" or len(shape) != 1:
        raise CheckpointError(
            f"{where} as {piece.get_dtype()} {shape}; expected one dimension of F32."
        )
    return shape[0]


def open_checkpoint(path: Path, ranks: Ranks | None = None) -> Checkpoint:
    """Read and verify one checkpoint. With `ranks` a collective: each verifies its share of the
    files.

    Raises:
        CheckpointError: incomplete, or a file whose size or checksum is not the recorded one; on
            every rank the same.
        ConfigError: written by another version.
    """
    checkpoint, problem = None, None
    if path.is_dir():
        refuse_odd_entries(path)
    try:
        checkpoint = _read_meta(path)
        names = sorted(checkpoint.shards)
        if ranks:
            names = names[ranks.rank :: ranks.world_size]
        for name in names:
            _verify(path / name, checkpoint.shards[name])
    except CheckpointError as error:
        problem = str(error)
    except OSError as error:
        if error.errno != errno.EIO:
            raise
        problem = f"{path} can not be read: {error}."

    problems = [said for said in (ranks.gather(problem) if ranks else [problem]) if said]
    if problems:
        raise CheckpointError(problems[0])
    return checkpoint


def peek(path: Path) -> dict | None:
    """The state in a checkpoint, or in the newest of a folder of them, that can be read; tensors
    are not verified. None where there is none."""
    candidates = [path] if (path / "meta.json").is_file() else _by_step(path)
    for candidate in candidates:
        try:
            return _read_meta(candidate).state
        except (CheckpointError, OSError):
            continue  # whoever resumes says what is wrong with it
    return None


def _read_meta(path: Path) -> Checkpoint:
    meta_path, complete = path / "meta.json", path / "COMPLETE"
    if not (meta_path.is_file() and complete.is_file()):
        raise CheckpointError(
            f"{path} is no complete checkpoint: expected meta.json and COMPLETE in it."
        )
    if read_bytes(complete) != _digest(meta_path).encode():
        raise CheckpointError(
            f"{path}: meta.json is not the one that was written (its checksum differs)."
        )
    if meta_path.stat().st_size > MAX_META_BYTES:
        raise CheckpointError(
            f"{path}: meta.json is larger than {MAX_META_BYTES:,} bytes, which no checkpoint needs."
        )

    try:
        meta = json.loads(read_bytes(meta_path))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: meta.json is not JSON: {error}.") from error
    if not isinstance(meta, dict):
        raise CheckpointError(
            f"{path}: meta.json must be a JSON object, got {type(meta).__name__}."
        )
    if meta.get("format") != FORMAT:
        raise ConfigError(
            f"run.resume: {path} has format {repr(meta.get('format', 1))[:20]}; this version of rlp"
            f" reads format {FORMAT}. Continue with the version that wrote it."
        )
    if problem := META.problem(meta, ""):
        raise CheckpointError(f"{path}: meta.json: {problem}.")
    return Checkpoint(path, meta["step"], meta["state"], meta["shapes"], meta["shards"])


def _verify(file: Path, entry: dict) -> None:
    if (
        not file.is_file()
        or file.stat().st_size != entry["size"]
        or _digest(file) != entry["sha256"]
    ):
        raise CheckpointError(
            f"{file.parent}: {file.name} is missing or damaged (its size or checksum differs)."
        )


def newest_checkpoint(
    parent: Path, ranks: Ranks, say: Callable[[str], None], *, changes: bool = True
) -> Checkpoint | None:
    """The newest good checkpoint of a run; bad ones are said, and set aside. None where there never
    was one. A collective.

    Args:
        changes: False leaves the folder as it is (a dry run): what is bad is said alone.

    Raises:
        CheckpointError: there are checkpoints, or were, and none is good.
    """
    found = None
    if ranks.is_first:
        if changes:
            _try_to_remove_unfinished(parent, say)
        found = _by_step(parent), sorted(parent.glob("set_aside.*"))
    paths, earlier = ranks.broadcast(found)

    rejected = [f"{path} was set aside earlier." for path in earlier]
    for path in paths:
        try:
            return open_checkpoint(path, ranks)
        except CheckpointError as error:
            rejected.append(str(error))
        if changes:
            what = ranks.broadcast(_try_to_set_aside(path) if ranks.is_first else None)
            say(f"{rejected[-1]} {what}; the one before it is tried.")
        else:
            say(f"{rejected[-1]} The run sets it aside and tries the one before it.")

    if rejected:
        raise CheckpointError(
            f"No good checkpoint is left: {' '.join(rejected)} Start a new run, or write"
            " run.resume=PATH of a good one."
        )
    return None


def _try_to_remove_unfinished(parent: Path, say: Callable[[str], None]) -> None:
    try:
        _remove_unfinished(parent)
    except OSError as error:
        say(
            f"what an interrupted save left could not be removed ({error}). It is tried again after"
            " the next save."
        )


def _try_to_set_aside(path: Path) -> str:
    """`_set_aside` of a damaged checkpoint; what became of it, in words."""
    try:
        return f"It is set aside as {_set_aside(path, point='resume.before_aside').name}"
    except OSError as error:
        return f"It could not be set aside ({error})"


def _set_aside(path: Path, *, point: str) -> Path:
    """Give a folder a name that is no checkpoint's; nothing is deleted."""
    return set_aside(path, f"set_aside.{path.name}", point=point)


def restore(checkpoint: Checkpoint, engine: Engine, ranks: Ranks) -> None:
    """Set weights, master weights, moments and EMA, whatever the number of ranks and the stage
    were.

    Raises:
        CheckpointError: made by a model with other parameters, or without the EMA that this run
            needs.
    """
    fault("resume.before_restore")
    refuse_other_model(checkpoint, engine.shards.shapes())

    fragments, kinds = engine.shards.fragments(), ()
    if checkpoint.adam_step > 0:
        kinds = STATES if engine.shards.keeps_ema else STATES[:2]
        for flat in {id(fragment.flat): fragment.flat for fragment in fragments}.values():
            engine.shards.restore_state(flat, checkpoint.adam_step, kinds)

    for fragment in fragments:
        where = (fragment.name, fragment.start, fragment.numel)
        fragment.view(fragment.flat).copy_(checkpoint.read("master", *where))
        for kind in kinds:
            fragment.view(engine.shards.state_of(fragment.flat)[kind]).copy_(
                checkpoint.read(kind, *where)
            )
    engine.shards.write_weights(engine.policy, lambda *where: checkpoint.read("master", *where))


def refuse_other_model(checkpoint: Checkpoint, shapes: dict[str, list[int]]) -> None:
    """Refuse a checkpoint whose parameters are not those of a model, by name and shape."""
    odd = sorted(
        name
        for name in shapes.keys() | checkpoint.shapes.keys()
        if shapes.get(name) != checkpoint.shapes.get(name)
    )
    if odd:
        raise CheckpointError(
            f"{checkpoint.path} was made by another model: {len(odd)} parameters differ, such as"
            f" {odd[0]}, of shape {checkpoint.shapes.get(odd[0], 'none')} there and"
            f" {shapes.get(odd[0], 'none')} here."
        )
