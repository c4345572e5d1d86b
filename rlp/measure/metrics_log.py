"""Where the numbers of a run are told: files, console, Weights & Biases.

`metrics.jsonl` is the record; the console and Weights & Biases are copies, and a copy that fails
never fails the run. What the clock and the memory counter say (`perf/*`) goes to `timing.jsonl`, so
that `metrics.jsonl` of a resumed run equals that of an unbroken one byte for byte.
"""

import sys
import time
from collections.abc import Callable

from tqdm import tqdm

from rlp.config import Config
from rlp.measure.metrics import EVALUATION_LINE, METRICS, TIMING_PREFIX, in_table_order
from rlp.measure.wandb_log import WandbAdapter, require_wandb
from rlp.process.console import format_bytes, format_duration, say_line
from rlp.process.progress import LINE_EVERY_S
from rlp.process.ranks import Ranks
from rlp.process.run_folder import RunFolder
from rlp.process.run_logs import append_json_line

_CONSOLE = (
    ("reward/mean", "reward", "{:+.4f} nats"),
    ("thought/tokens_mean", "thought", "{:.0f} tokens"),
    ("lm/loss", "lm", "{:.4f} nats"),
    ("optim/grad_norm", "grad", "{:.3g}"),
    ("perf/step_s", "took", "{:.2f} s"),
    ("perf/tokens_per_s", "speed", "{:,.0f} tokens/s"),
    ("perf/peak_memory_bytes", "memory", "{}"),
    ("perf/left_s", "left", "{}"),
)

_WORDS: dict[str, Callable[[float], str]] = {
    "perf/peak_memory_bytes": format_bytes,
    "perf/left_s": format_duration,
}
"""Numbers that the console tells in other units."""


class MetricsLog:
    """Tells what happens: rank 0 writes the files and speaks, the other ranks only check."""

    def __init__(
        self, folder: RunFolder, config: Config, ranks: Ranks, total_hint: int | None
    ) -> None:
        """
        Args:
            total_hint: optimizer steps expected, for the bar; None where the budget is not in
                steps.
        """
        self._folder = folder
        self._every_n_steps = config.logging.every_n_steps
        self._first_rank = ranks.is_first
        self._total = total_hint
        self._bar: tqdm | None = None
        self._said_at: float | None = None
        require_wandb(config.logging.wandb)
        self._wandb = WandbAdapter(folder, config, self.say) if ranks.is_first else None

    def step(self, step: int, values: dict[str, float | None]) -> None:
        """Record one optimizer step. Every rank calls it with the same values.

        Args:
            step: 1 for the first step.
            values: by name in `METRICS`; None is for a metric that this step did not measure.

        Raises:
            ValueError: a name that is not in `METRICS`, or a value that is no finite number.
        """
        measured = in_table_order(values, METRICS)
        if not self._first_rank:
            return
        numbers, timing = {"step": step}, {}
        for name, value in measured.items():
            (timing if name.startswith(TIMING_PREFIX) else numbers)[name] = value
        append_json_line(self._folder.metrics_jsonl, numbers)
        if timing:
            append_json_line(self._folder.timing_jsonl, {"step": step, **timing})
        self._wandb.log(step, measured)
        self._show(step, measured)

    def still(self, step: int, phase: str, seconds: float) -> None:
        """Say of a long step that it goes on, `LINE_EVERY_S` after the last line of any step, where
        nobody watches a terminal.

        Args:
            phase: what it is doing.
            seconds: since the step began.
        """
        watched = not self._first_rank or sys.stderr.isatty()
        if not watched and seconds >= LINE_EVERY_S and self._is_silent():
            self.say(f"step {step}: in {phase}, {format_duration(seconds)} so far")
            self._said_at = time.monotonic()

    def evaluation(self, step: int, values: dict[str, float | None]) -> None:
        """Record one evaluation of the held-out panel, by name in `EVALUATION_LINE`; `step` 0 is
        before the first update."""
        measured = in_table_order(values, EVALUATION_LINE)
        if not self._first_rank:
            return
        append_json_line(self._folder.evaluation_jsonl, {"step": step, **measured})
        self._wandb.log(step, {f"evaluation/{name}": value for name, value in measured.items()})

    def alarm(self, step: int, text: str) -> None:
        """Say loudly that something is wrong with the run, and keep it in `alarms.jsonl` for the
        report. Every rank may call it."""
        if self._first_rank:
            append_json_line(self._folder.alarms_jsonl, {"step": step, "text": text})
        self.say(f"ALARM step {step}: {text}")

    def say(self, text: str) -> None:
        """Print a line, on rank 0, above the bar where there is one. What data or a model wrote in
        it does nothing to the terminal."""
        if self._first_rank:
            say_line(text)

    def close(self) -> None:
        """End the bar and hand the last values to Weights & Biases."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None
        if self._wandb is not None:
            self._wandb.close()

    def _show(self, step: int, measured: dict[str, float]) -> None:
        told = {}
        for name, word, template in _CONSOLE:
            if name in measured:
                in_words = _WORDS.get(name, lambda value: value)
                told[word] = template.format(in_words(measured[name]))

        if sys.stderr.isatty():
            self._move_bar(step, told)
        elif step % self._every_n_steps == 0 or self._is_silent():
            of_total = f"/{self._total}" if self._total else ""
            numbers = (f"{word} {value}" for word, value in told.items())
            self.say("  ".join([f"step {step}{of_total}", *numbers]))
            self._said_at = time.monotonic()

    def _is_silent(self) -> bool:
        """Whether no step was told of yet, or none for `LINE_EVERY_S`."""
        return self._said_at is None or time.monotonic() - self._said_at >= LINE_EVERY_S

    def _move_bar(self, step: int, words: dict[str, str]) -> None:
        if self._bar is None:
            self._bar = tqdm(total=self._total, initial=step - 1, unit="step", dynamic_ncols=True)
        # The bar times the steps itself, and where it knows how many there are it says what is
        # left.
        own = ("took", "left") if self._total else ("took",)
        shown = (f"{word} {value}" for word, value in words.items() if word not in own)
        self._bar.set_postfix_str(", ".join(shown), refresh=False)
        self._bar.update(step - self._bar.n)
