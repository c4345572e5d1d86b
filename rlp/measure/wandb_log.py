"""Weights & Biases, a copy of the record that may fail without failing the run."""

import dataclasses
import importlib.util
import queue
import threading
from collections.abc import Callable
from functools import partial

from rlp.config import Config, ConfigError
from rlp.process.run_folder import RunFolder

FINISH_PATIENCE_S = 120
"""For Weights & Biases, at the end of the run."""

MAX_WAITING = 100_000
"""Lines that may wait for Weights & Biases."""


def require_wandb(mode: str) -> None:
    """Refuse a run that asks for Weights & Biases where it is not installed. Nothing is
    imported."""
    if mode != "disabled" and importlib.util.find_spec("wandb") is None:
        raise ConfigError(
            f"logging.wandb is {mode}, but the package wandb is not installed. Run pip install"
            " wandb, or write logging.wandb=disabled."
        )


class WandbAdapter:
    """A copy of the metrics for Weights & Biases. It may fail or hang; the run may not.

    It has a thread of its own, which nothing waits for but the end of the run, and that for
    `FINISH_PATIENCE_S`. Its failures come from a service process, a network and a file system that
    are not ours, and in as many types: all are caught here, each is said in one line, and the first
    one after the start switches the adapter off.
    """

    def __init__(self, folder: RunFolder, config: Config, say: Callable[[str], None]) -> None:
        self._say = say
        self._waiting: queue.Queue[dict | None] = queue.Queue(MAX_WAITING)
        self._thread: threading.Thread | None = None
        if config.logging.wandb != "disabled":
            self._thread = threading.Thread(
                target=self._work, args=(folder, config), name="wandb", daemon=True
            )
            self._thread.start()

    def log(self, step: int, values: dict[str, float]) -> None:
        """Hand over numbers of one step. A step may come in several calls, and again after a
        resume."""
        self._put({"step": step, **values})

    def close(self) -> None:
        """Wait until all is sent, for `FINISH_PATIENCE_S` at most. A second call does nothing."""
        self._put(None)
        if self._thread is not None:
            self._thread.join(FINISH_PATIENCE_S)
            if self._thread.is_alive():
                self._say(
                    f"Weights & Biases hangs; it is left behind after {FINISH_PATIENCE_S} s."
                    " metrics.jsonl is complete."
                )
        self._thread = None

    def _put(self, values: dict | None) -> None:
        if self._thread is None:
            return
        try:
            self._waiting.put_nowait(values)
        except queue.Full:
            self._thread = None
            self._say(
                f"Weights & Biases hangs: {MAX_WAITING} lines wait for it; it is switched off."
                " metrics.jsonl is complete."
            )

    def _work(self, folder: RunFolder, config: Config) -> None:
        run = None
        if config.logging.wandb == "online":
            run = self._start(folder, config, "online", "continuing offline")
        run = run or self._start(folder, config, "offline", "continuing without it")
        while (values := self._waiting.get()) is not None:
            if run and not self._attempt("could not log", partial(run.log, values)):
                run = None
        if run:
            self._attempt("could not finish", run.finish)

    def _start(self, folder: RunFolder, config: Config, mode: str, otherwise: str) -> object | None:
        try:
            import wandb

            settings = wandb.Settings(
                init_timeout=60, finish_timeout=FINISH_PATIENCE_S, console="off", silent=True
            )
            run = wandb.init(
                project=config.logging.wandb_project,
                name=folder.name,
                group=folder.name,
                dir=str(folder.logs),
                mode=mode,
                config=dataclasses.asdict(config),
                settings=settings,
            )
            # Steps as a value of our own: W&B's counter refuses the steps that a resumed run
            # repeats.
            run.define_metric("*", step_metric="step")
        except Exception as error:
            self._say(f"Weights & Biases could not start {mode} ({_one_line(error)}); {otherwise}.")
            return None
        return run

    def _attempt(self, what: str, do: Callable[[], object]) -> bool:
        """Whether it succeeded: after a failure there is no run."""
        try:
            do()
        except Exception as error:
            self._say(
                f"Weights & Biases {what} ({_one_line(error)}); it is switched off. metrics.jsonl"
                " is complete."
            )
            return False
        return True


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]
