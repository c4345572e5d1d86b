"""What a checkpoint of a run holds beside tensors: stated once, saved and taken over by it."""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

from rlp.learn.checkpoint import (
    Checkpoint,
    CheckpointError,
    newest_checkpoint,
    open_checkpoint,
    restore,
    save_checkpoint,
)
from rlp.learn.continuing import refuse_other_inputs
from rlp.learn.guard import require_sound
from rlp.process.run_logs import (
    append_json_line,
    cut_logs,
    mark_logs,
    remove_unfinished,
    settle_logs,
)
from rlp.run.checks import refuse_checkpoint, refuse_new_start
from rlp.run.state import OpenRun


class Saved(NamedTuple):
    """One part of what is saved."""

    take: Callable[[], object]
    """What a checkpoint holds of it."""
    put: Callable[[object], None]
    """Takes it over."""


def compared(value: object) -> None:
    """A part that is compared before anything is taken over (`refuse_checkpoint`)."""


def replace_contents(mine: list | dict, value: list | dict) -> None:
    """Make a list or a dictionary equal to another."""
    mine.clear()
    mine.extend(value) if isinstance(mine, list) else mine.update(value)


def saved_parts(run: OpenRun) -> dict[str, Saved]:
    """All that changes in a run beside its tensors, by the name that a checkpoint gives it; what
    each looks like in a file is said in `rlp/process/schemas.py`."""
    state, stream, ledger = run.state, run.opened.setup.stream, run.parts.ledger
    return {
        "config": Saved(lambda: asdict(run.config), compared),
        "data": Saved(lambda: state.data, stream.load_state),
        "ledger": Saved(ledger.state, ledger.load_state),
        "seconds": Saved(lambda: state.seconds, lambda value: setattr(state, "seconds", value)),
        "guard": Saved(run.parts.guard.state, run.parts.guard.load_state),
        "start_logprob": Saved(
            lambda: run.start_logprob, lambda value: replace_contents(run.start_logprob, value)
        ),
        "watch": Saved(run.watch.state, run.watch.load_state),
        "dtype": Saved(lambda: str(run.dtype), compared),
        # A panel that is not read in this life may be read in the next.
        "inputs": Saved(
            lambda: run.checksums, lambda value: replace_contents(run.checksums, value)
        ),
        "changes": Saved(lambda: state.changes, lambda value: setattr(state, "changes", value)),
        "logs": Saved(lambda: mark_logs(run.folder, state.step), compared),
    }


def save(run: OpenRun) -> bool:
    """Write a checkpoint of all that changes, as after the last step that was made; whether it
    could be written.

    Raises:
        NumericsError: what it would hold is not finite.
    """
    watchdog, step = run.host.watchdog, run.state.step
    watchdog.mark("save")
    require_sound(
        run.parts.engine,
        run.ranks,
        f"step {step} is not saved. {run.host.where_to_go_on(run.folder)} Continue with"
        " run.resume=auto and a lower optim.learning_rate.",
    )
    state = {name: part.take() for name, part in saved_parts(run).items()}
    with watchdog.working("save"), run.wall.during("saving"):
        saved = save_checkpoint(
            run.folder.checkpoints,
            step,
            run.parts.engine,
            run.ranks,
            state,
            run.config.checkpoint.keep,
            settle=lambda: settle_logs(run.folder),
            say=run.log.say,
        )
    if saved is not None:
        run.state.is_saved, run.state.disposable = True, False
    return saved is not None


def load(run: OpenRun, checkpoint: Checkpoint) -> list[dict]:
    """Take over what a checkpoint holds; the settings that differ from its own.

    Raises:
        CheckpointError, ConfigError, DataError: the run would not continue it to the digit.
    """
    changes = refuse_checkpoint(checkpoint, run.config, run.opened, run.dtype)
    refuse_other_inputs(checkpoint.state["inputs"], run.checksums, checkpoint.path)
    restore(checkpoint, run.parts.engine, run.ranks)
    run.parts.teacher.refresh()
    try:
        for name, part in saved_parts(run).items():
            part.put(checkpoint.state[name])
    except ValueError as error:
        raise CheckpointError(f"{checkpoint.path}: {error}") from error
    run.state.data, run.state.step = run.opened.setup.stream.state(), checkpoint.step
    return changes


def resume(run: OpenRun, *, in_its_folder: bool) -> None:
    """Continue this run (`auto`), or start from another run's checkpoint (a path)."""
    host, folder, wanted = run.host, run.folder, run.config.run.resume
    if in_its_folder:
        checkpoint = newest_checkpoint(folder.checkpoints, run.ranks, run.log.say)
        if checkpoint is None:
            start_again(run)
            return
    elif wanted not in ("auto", "never"):
        checkpoint = open_checkpoint(Path(wanted), run.ranks)
    else:
        return

    changes = load(run, checkpoint)
    if in_its_folder and is_complete(run):
        # What it has logged after its last checkpoint, which may be an early one, stays.
        host.on_first_rank(
            folder,
            lambda: remove_unfinished(folder),
            "what a crash left could not be removed",
        )
        return
    if in_its_folder:
        lost = host.on_first_rank(
            folder,
            lambda: cut_logs(folder, run.state.step, checkpoint.state["logs"]),
            "its logs could not be cut back",
        )
        for words in lost:
            run.log.alarm(run.state.step, words)
    note_changes(run, checkpoint.state["changes"], changes, written=in_its_folder)
    run.log.say(f"continuing from {checkpoint.path} at step {run.state.step}")


def start_again(run: OpenRun) -> None:
    """Begin at step 0 in the folder of a run that was killed before its first checkpoint
    (`refuse_new_start`)."""
    if is_complete(run):
        return
    steps, changes = refuse_new_start(run.folder, run.config, run.ranks)
    run.host.on_first_rank(
        run.folder, lambda: cut_logs(run.folder, -1, {}), "its logs could not be cut back"
    )
    note_changes(run, [], changes)
    run.log.say(
        f"{run.folder.path} has no checkpoint yet: it was stopped in its first {steps} steps, and"
        " begins again at step 0"
    )


def note_changes(
    run: OpenRun, earlier: list[dict], changes: list[dict], *, written: bool = True
) -> None:
    """Say and write down the settings that the run is continued with otherwise.

    Args:
        earlier: those of earlier lives, which stand in the run folder where it was theirs
            (`written`).
    """
    new = [{"step": run.state.step + 1, **change} for change in changes]
    run.state.changes = [*earlier, *new]
    for change in new if written else run.state.changes:
        if run.ranks.is_first:
            append_json_line(run.folder.config_changes_jsonl, change)
    for change in new:
        run.log.say(
            f"from step {change['step']} on: {change['key']} is {change['to']!r}, was"
            f" {change['from']!r}"
        )


def is_complete(run: OpenRun) -> bool:
    """Whether this run folder already holds the end of its run. A collective."""
    return run.ranks.broadcast(run.folder.summary_json.exists())
