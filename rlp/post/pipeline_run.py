"""A pipeline from its plan to its results: what is left of its tasks is done, one or several side
by side, and each adds its lines to results.jsonl when it ends."""

import contextlib
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from rlp.config import ConfigError
from rlp.post.pipeline_checks import refuse_bad, refuse_changed
from rlp.post.pipeline_config import Pipeline
from rlp.post.pipeline_folder import TaskFolder
from rlp.post.pipeline_plan import Costs, render
from rlp.post.pipeline_results import add_lines, results_path
from rlp.post.pipeline_task import asked_of, left_to_read, perform
from rlp.post.pipeline_tasks import Task, run_tasks
from rlp.post.pipeline_workers import Workers
from rlp.post.stages.interface import StageStopped
from rlp.process.console import format_duration, visible_text
from rlp.process.exit_codes import DONE, PREEMPTED
from rlp.process.files import (
    make_folder,
    new_folder,
    read_bytes,
    remove_unfinished,
    write_atomically,
    write_new,
)
from rlp.process.lock import BEAT_S, RunLock
from rlp.process.poller import Poller
from rlp.process.ranks import start_ranks

if TYPE_CHECKING:
    from rlp.process.ranks import Ranks

STAGES_FAILED = 1
"""Exit code of a pipeline of which not all came to its end."""


def run_pipeline(
    pipeline: Pipeline, text: bytes, say: Callable[[str], None], workers: int = 1
) -> int:
    """Do all that is left of a pipeline; the exit code.

    Args:
        text: its YAML, which its folder keeps.
        say: prints a line.

    Raises:
        ConfigError, DataError: it can not be done; nothing was made.
    """
    tasks = refuse_bad(pipeline)
    ranks = start_ranks()
    with holding(pipeline, text, ranks, say):
        done = finished(tasks, pipeline)
        told = Path(pipeline.dir) / "pipeline.yaml"
        if read_bytes(told) != text:
            write_atomically(told, text, point="pipeline.torn_config")
        for task in tasks:
            if task in done:
                add_lines(task, pipeline)
        progress = Progress(tasks, done, pipeline, workers, say)
        progress.begin()
        if workers == 1:
            return _run(tasks, done, pipeline, 1, progress, partial(here, pipeline, ranks))
        with Workers(workers, told) as pool:
            return _run(tasks, done, pipeline, workers, progress, pool.begin)


def plan_pipeline(pipeline: Pipeline) -> str:
    """What a pipeline would do and cost; nothing is written.

    Raises:
        ConfigError, DataError: what the pipeline would raise before its first task.
    """
    tasks = refuse_bad(pipeline)
    done = finished(tasks, pipeline)
    return render(tasks, done, pipeline, Costs(tasks, pipeline, start_ranks()))


def _run(
    tasks: list[Task],
    done: set[Task],
    pipeline: Pipeline,
    workers: int,
    progress: "Progress",
    begin: Callable[[Task], Future],
) -> int:
    """Do the tasks that are not done, and tell of each."""
    stopped, failed = False, []
    for task, future in run_tasks(tasks, done, workers, lambda task: task.needs(pipeline), begin):
        error = future.exception()
        if isinstance(error, StageStopped):
            stopped = True
            break
        if error is None:
            add_lines(task, pipeline)
        else:
            failed.append(task)
        progress.ended(task, error)
    progress.end(failed, stopped)
    return PREEMPTED if stopped else STAGES_FAILED if failed else DONE


def here(pipeline: Pipeline, ranks: "Ranks", task: Task) -> Future:
    """Do a task in this process."""
    future: Future = Future()
    try:
        perform(task, pipeline, ranks)
        future.set_result(None)
    except Exception as error:
        future.set_exception(error)
    return future


def finished(tasks: list[Task], pipeline: Pipeline) -> set[Task]:
    """Tasks that are done and read.

    Raises:
        ConfigError: one was begun with other inputs than it would have.
    """
    whole: set[Task] = set()
    read: set[Task] = set()
    for task in tasks:
        if not all(need in whole for need in task.needs(pipeline)):
            continue
        refuse_changed(task, pipeline, asked_of(task, pipeline))
        if TaskFolder(task.folder(pipeline)).is_finished:
            whole.add(task)
            if not left_to_read(task, pipeline):
                read.add(task)
    return read


@contextlib.contextmanager
def holding(
    pipeline: Pipeline, text: bytes, ranks: "Ranks", say: Callable[[str], None]
) -> Iterator[None]:
    """The folder of a pipeline is this job's: made, or found, with its YAML in it."""
    folder = Path(pipeline.dir)
    with RunLock(ranks) as lock:
        if not folder.exists():
            make_folder(folder.absolute().parent, exist_ok=True)
            with new_folder(folder, point="pipeline.before_rename") as new:
                write_new(new / "pipeline.yaml", text, point="pipeline.torn_config")
                lock.write_first(new)
        elif not (folder / "pipeline.yaml").is_file():
            raise ConfigError(
                f"dir: {folder} is there and is no folder of a pipeline: it has no pipeline.yaml."
                " Write another dir."
            )
        lock.claim(folder, say, lambda: None)
        remove_unfinished(folder)

        def beat(polls: Iterator[bytes]) -> None:
            for _ in polls:
                lock.beat()

        poller = Poller("pipeline lock", BEAT_S, beat)
        try:
            yield
        finally:
            poller.close(BEAT_S)


# Telling


@dataclass
class Progress:
    """Tells how far a pipeline is, and when it will be done."""

    tasks: list[Task]
    done: set[Task]
    pipeline: Pipeline
    workers: int
    say: Callable[[str], None]

    def begin(self) -> None:
        self.began, self.left = time.monotonic(), [t for t in self.tasks if t not in self.done]
        for task in self.left:
            folder = TaskFolder(task.folder(self.pipeline))
            if folder.path.exists():
                state = "its models are to be read" if folder.is_finished else "begun"
                self.say(f"{task.name}: {state}; going on with it")
        self.say(
            f"{self.pipeline.dir}: {len(self.done)} of {len(self.tasks)} stages are done,"
            f" {len(self.left)} are left"
        )

    def ended(self, task: Task, error: BaseException | None) -> None:
        """A line for each task that has ended."""
        self.left.remove(task)
        taken = format_duration(time.monotonic() - self.began)
        what = "done" if error is None else f"FAILED: {_told(error)}"
        number = len(self.tasks) - len(self.left)
        self.say(
            visible_text(
                f"{number}/{len(self.tasks)}  {task.name}: {what}; {taken}{self._remaining()}"
            )
        )

    def _remaining(self) -> str:
        """Stages that nobody knows are taken to be as long as the mean of the others."""
        seconds = [self._seconds(task) for task in self.left]
        known = [value for value in seconds if value is not None]
        if not known:
            return ""
        left = sum(known) / len(known) * len(seconds) / self.workers
        return f", about {format_duration(left)} left"

    def _seconds(self, task: Task) -> float | None:
        """What such a stage took where it is done, in other arms and on other seeds; None where it
        is done nowhere."""
        alike = [
            TaskFolder(other.folder(self.pipeline))
            for other in self.tasks
            if other.chain[-1:] == task.chain[-1:] and other not in self.left
        ]
        known = [folder.wall_s() for folder in alike if folder.is_finished]
        return sum(known) / len(known) if known else None

    def end(self, failed: list[Task], stopped: bool) -> None:
        """What became of all of it, and how to go on."""
        if stopped:
            self.say("asked to stop, and saved. Start the same command again to go on.")
            return
        for task in failed:
            folder = TaskFolder(task.folder(self.pipeline))
            self.say(f"{task.name} failed; {folder.log} says why")
        waiting = [task for task in self.left if task not in failed]
        if failed:
            self.say(
                f"{len(failed)} stages failed, {len(waiting)} that need them wait, and the others"
                " stand. Mend the cause and start the same command again: it goes on with these."
            )
            return
        read = f"; figures: {results_path(self.pipeline)}"
        self.say(
            f"{self.pipeline.dir}: all {len(self.tasks)} stages are done"
            f"{read if self.pipeline.evaluation.is_asked_for else ''}"
        )


def _told(error: BaseException) -> str:
    """An error in one line."""
    words = " ".join(str(error).split())
    return words[:400] or type(error).__name__
