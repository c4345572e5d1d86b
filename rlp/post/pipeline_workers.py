"""Processes that do the tasks of a pipeline side by side.

    python -m rlp.post.pipeline_workers DIR/pipeline.yaml

reads the name of a task a line and answers each with a JSON line when it is done. A worker keeps
what it has imported for the next task, and ends with the process that started it, however that
ends. One that dies takes its task with it, and another one is started for the next. Where the
process that started them is asked to stop (SIGTERM), it passes that on.
"""

import json
import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from rlp.post.pipeline_tasks import Task
from rlp.post.stages.interface import StageError, StageStopped


class Workers:
    """As many processes as are asked for, each with a thread here that waits for it."""

    def __init__(self, number: int, config: Path) -> None:
        """
        Args:
            config: the YAML of the pipeline.
        """
        self._config, self._own = config, threading.local()
        self._all: list[subprocess.Popen] = []
        self._stopping = False
        self._pool = ThreadPoolExecutor(number)

    def begin(self, task: Task) -> Future:
        """Do a task as soon as a worker is free."""
        return self._pool.submit(self._ask, task)

    def _ask(self, task: Task) -> None:
        if self._stopping:
            raise StageStopped("asked to stop")
        worker = self._worker()
        try:
            worker.stdin.write(f"{task.name}\n")
            worker.stdin.flush()
            answer = worker.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer and self._stopping:
            raise StageStopped("asked to stop")
        if not answer:
            code = worker.wait()
            said = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
            raise StageError(f"the process that did it has ended with {said}")
        told = json.loads(answer)
        if told["stopped"]:
            raise StageStopped(told["error"])
        if told["error"] is not None:
            raise StageError(told["error"])

    def _worker(self) -> subprocess.Popen:
        """The worker of this thread; another one where that has died."""
        worker = getattr(self._own, "worker", None)
        if worker is None or worker.poll() is not None:
            command = [sys.executable, "-m", "rlp.post.pipeline_workers", str(self._config)]
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
            worker = subprocess.Popen(command, **pipes)
            self._own.worker = worker
            self._all.append(worker)
        return worker

    def _stop(self, number: int, frame: object) -> None:
        """Ask every worker to stop: one that trains saves, another one ends at once."""
        self._stopping = True
        for worker in self._all:
            worker.terminate()

    def __enter__(self) -> "Workers":
        self._before = signal.signal(signal.SIGTERM, self._stop)
        return self

    def __exit__(self, *error: object) -> None:
        for worker in self._all:
            worker.stdin.close()
            if error[0] is not None:
                worker.terminate()
        self._pool.shutdown(cancel_futures=True)
        for worker in self._all:
            worker.wait()
        signal.signal(signal.SIGTERM, self._before)


def work(config: Path) -> int:
    """A worker: do the tasks that are asked for."""
    from rlp.post.pipeline_config import load_pipeline
    from rlp.post.pipeline_task import perform
    from rlp.post.stages.pretraining import end_with_parent
    from rlp.process.ranks import start_ranks

    end_with_parent(signal.SIGKILL)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    pipeline, ranks = load_pipeline(config), start_ranks()
    for line in sys.stdin:
        error, stopped = None, False
        try:
            perform(Task.named(line.strip()), pipeline, ranks)
        except Exception as raised:
            error = str(raised) or type(raised).__name__
            stopped = isinstance(raised, StageStopped)
        print(json.dumps({"error": error, "stopped": stopped}), file=answers, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(work(Path(sys.argv[1])))
