"""The numbers of a run: what each one means, and where they are told.

`METRICS` (of a step) and `EVALUATION` (of the held-out panel) are where a number has its name, unit and
definition; a name that is in neither can not be logged.
`metrics.jsonl` is the record; the console and Weights & Biases are copies, and a copy that fails
never fails the run. What the clock and the memory counter say (`perf/*`) goes to `timing.jsonl`,
so that `metrics.jsonl` of a resumed run equals that of an unbroken one byte for byte.

`Progress` tells how far one long piece of work is, in a run or without one (`rlp probe`, `rlp eval`, unpacking data).

Averages are over all ranks: means of a step are sums over all its thoughts (or positions, or
tokens) divided by their number.
"""

import dataclasses
import difflib
import importlib.util
import logging
import math
import queue
import sys
import threading
import time
import unicodedata
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple, TextIO

import psutil

from tqdm import tqdm

from rlp.config import Config, ConfigError
from rlp.distributed import Ranks
from rlp.files import FolderLostError, open_log
from rlp.run_folder import RunFolder, append_json_line


class Metric(NamedTuple):
    """What a number is."""

    unit: str
    """Empty for a pure number; `fraction` is from 0 to 1."""
    definition: str


METRICS: dict[str, Metric] = {
    "reward/mean": Metric("nats", "Mean reward of the step's thoughts: what eq. 7 is fed. It is the information gain r(c) = S_pred(c) - S_ema (eq. 5), in nats; with reward.kind greedy_match 1 or 0, whether the targets are the most probable tokens; with reward.placebo what the placebo gives the thought, and not what it earned."),
    "reward/positive_frac": Metric("fraction", "Thoughts with a reward above 0."),
    "reward/positive_positions_frac": Metric("fraction", "Positions where the mean reward of the group is above 0."),
    "reward/flat_groups_frac": Metric("fraction", "Groups whose rewards are all equal, to 1e-5: their advantages are 0, and there is nothing to learn from them."),
    "reward/group_std": Metric("nats", "Mean over positions of the standard deviation of the reward within the group, in its unit. Zero means nothing to learn."),
    "reward/length_correlation": Metric("", "Within-group correlation of thought length and reward: covariance and variances about each group's mean, pooled. Left out where one does not vary."),
    "gain/mean": Metric("nats", "Mean information gain r(c) = S_pred(c) - S_ema of the step's own thoughts (eq. 5), whatever they are rewarded for. Left out where the baseline was not scored."),
    "gain/positive_frac": Metric("fraction", "Thoughts with a gain above 0: the target became more probable."),
    "gain/positive_positions_frac": Metric("fraction", "Positions where the mean gain of the group is above 0."),
    "thought/tokens_mean": Metric("tokens", "Mean number of sampled tokens in a thought, the close marker not counted."),
    "thought/tokens_std": Metric("tokens", "Standard deviation of that length over all thoughts of the step."),
    "thought/truncated_frac": Metric("fraction", "Thoughts that the budget ended before they sampled a close marker."),
    "thought/max_length_frac": Metric("fraction", "Thoughts that used their whole budget: the truncated ones, and those that closed with its last token."),
    "thought/empty_frac": Metric("fraction", "Thoughts that sampled the close marker at once."),
    "thought/distinct_bigrams_frac": Metric("fraction", "Different pairs of neighbouring tokens over all such pairs in a group's thoughts, mean over groups. Near 1: no two thoughts agree. A fall says that thoughts become one template."),
    "thought/copied_frac": Metric("fraction", "Runs of 4 tokens of thoughts that also stand in the prefix: copying of the context."),
    "thought/holds_target_frac": Metric("fraction", "Thoughts in which the target tokens stand in a row, anywhere. Expected where a right thought ends in the answer; frequent tokens are met by chance."),
    "thought/script_switch_frac": Metric("fraction", "Thoughts most of whose letters are of another script (Latin, Cyrillic, CJK) than most letters of the prefix, among those where both have letters."),
    "policy/entropy": Metric("nats per token", "Mean entropy of the distributions that thought tokens were sampled from, at the sampling temperature."),
    "policy/ratio_max_deviation": Metric("", "Largest |rho_u - 1| over thought tokens (eq. 8) and the updates of the step. Zero on-policy, up to rounding."),
    "policy/behavior_mismatch_kl": Metric("nats per token", "KL of the sampler to the trainer on sampled tokens before the first update of the step, where both hold the same weights: mean of rho - 1 - log rho. Anything but rounding is a mismatch."),
    "policy/behavior_mismatch_max": Metric("nats", "Largest |log rho_u| over thought tokens before the first update of the step."),
    "policy/clip_frac": Metric("fraction", "Thought tokens whose ratio lies outside 1 - clip_low .. 1 + clip_high."),
    "policy/open_marker_mass": Metric("probability", "Mean probability that the policy gives the open marker's first token where a thought may start; it is left out of target softmaxes."),
    "policy/reasoned_logprob": Metric("nats", "Mean S_pred: log-probability of the target after a thought (eq. 3)."),
    "baseline/logprob": Metric("nats", "Mean S_ema: log-probability of the target without a thought, under the baseline (eq. 4)."),
    "kl/start": Metric("nats per token", "KL of the policy to the starting checkpoint on thought tokens (k3 estimator); where objective.kl_weight is above 0."),
    "lm/loss": Metric("nats per token", "Next-token loss of the policy on the step's documents, without thoughts."),
    "teacher/distance": Metric("relative", "||phi - theta|| / ||theta||: how far the EMA lags behind the policy."),
    "optim/grad_norm": Metric("", "Global norm of the gradient before clipping."),
    "optim/learning_rate": Metric("", "Learning rate of the step."),
    "optim/skipped": Metric("updates", "Updates refused so far because a loss, reward, log-probability, ratio or gradient was not finite on some rank."),
    "optim/spikes": Metric("updates", "Updates refused so far because their gradient was too large; where optim.spike_factor is above 0."),
    "data/bad_documents": Metric("documents", "Documents skipped so far as unreadable, empty or too short."),
    "budget/tokens": Metric("tokens", "Document tokens read so far, over all ranks."),
    "budget/flops": Metric("FLOPs", "FLOPs spent so far by the ledger's count, over all ranks."),
    "perf/thought_tokens_per_s": Metric("tokens per second", "Sampled thought tokens per second of sampling, over all ranks."),
    "perf/step_s": Metric("seconds", "Duration of the step."),
    "perf/tokens_per_s": Metric("tokens per second", "Document tokens read and thought tokens sampled in the step, over all ranks, per second of the step."),
    "perf/left_s": Metric("seconds", "What the budget leaves, at the pace of the last steps (`Pace`), evaluations and checkpoints not counted."),
    "perf/peak_memory_bytes": Metric("bytes", "Largest memory allocated on a device during the step, over all ranks; on a CPU, the largest resident set so far."),
}

EVALUATION: dict[str, Metric] = {
    "gain_over_start_nats": Metric("nats", "Mean S_pred minus the log-probability that the starting checkpoint gave the same targets without a thought. It can not be raised by getting worse without thoughts."),
    "gain_over_ema_nats": Metric("nats", "Mean S_pred minus S_ema, the reward's own baseline."),
    "gain_over_no_think_nats": Metric("nats", "Mean S_pred minus the policy's own log-probability without a thought."),
    "gain_over_empty_nats": Metric("nats", "Mean S_pred minus the policy's own log-probability after an open and a close marker: what the words of a thought add to its format."),
    "gain_over_shuffled_nats": Metric("nats", "Mean S_pred minus the policy's own log-probability after the thoughts of another document: what a thought owes to its own prefix. Left out for a panel of one document."),
    "positive_gain_frac": Metric("fraction", "Positions whose mean gain over the starting checkpoint is above 0."),
    "accuracy_with_thought": Metric("fraction", "The most probable token is the target, after a thought; mean over thoughts."),
    "accuracy_without_thought": Metric("fraction", "The most probable token is the target, without a thought."),
    "thought_tokens_mean": Metric("tokens", "Mean length of a thought, its close marker not counted."),
    "thought_truncated_frac": Metric("fraction", "Thoughts that the budget ended: left unclosed, and closed by force."),
    "thought_empty_frac": Metric("fraction", "Thoughts that sampled the close marker at once."),
    "reward_group_std_nats": Metric("nats", "Mean over positions of the standard deviation of S_pred, which is that of the reward, within the group. Zero means nothing to learn."),
    "reward_length_correlation": Metric("", "Within-group correlation of thought length and reward, as `reward/length_correlation`. Left out where one does not vary."),
    "reasoned_logprob_nats": Metric("nats", "Mean S_pred: log-probability of the target after a thought."),
    "start_logprob_nats": Metric("nats", "Log-probability of the target without a thought, under the starting checkpoint."),
    "ema_logprob_nats": Metric("nats", "Mean S_ema: log-probability of the target without a thought, under the baseline."),
    "no_think_logprob_nats": Metric("nats", "Log-probability of the target without a thought, under the policy."),
    "empty_logprob_nats": Metric("nats", "Log-probability of the target after a thought of no token, under the policy."),
    "shuffled_logprob_nats": Metric("nats", "Log-probability of the target after the thoughts of another document, under the policy."),
    "document_loss_nats": Metric("nats per token", "Next-token loss of the policy on the panel's documents, without thoughts; its exponential is the perplexity."),
    "open_marker_mass": Metric("probability", "Mean probability of the open marker where a thought may start."),
    "panel_positions": Metric("positions", "Size of the held-out panel."),
}
for _name, _metric in list(EVALUATION.items()):
    if _name != "panel_positions":
        EVALUATION[f"{_name}_low"] = Metric(_metric.unit, f"Lower end of the 95 % bootstrap interval of {_name}: documents drawn with replacement.")
        EVALUATION[f"{_name}_high"] = Metric(_metric.unit, f"Upper end of the 95 % bootstrap interval of {_name}.")
"""What one evaluation of the held-out panel says: a line of `evaluation.jsonl`, and `before` and `after` of `summary.json`."""

TIMING_PREFIX = "perf/"
"""Metrics of the machine and not of the run: two runs of the same config differ in them."""

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

LINE_EVERY_S = 30.0
"""Where nobody watches a terminal, long work is told of this often."""

PACE_STEPS = 20
"""Steps that `perf/left_s` looks back on."""


FINISH_PATIENCE_S = 120
"""For Weights & Biases, at the end of the run."""

MAX_WAITING = 100_000
"""Lines that may wait for Weights & Biases."""


def visible_text(text: str) -> str:
    """Text with its control characters spelled out (`\\x1b`), all but line ends and tabs.

    Terminal escapes, invisible characters, reversals of the writing direction and unpaired
    surrogates do nothing this way, and can still be seen.
    """
    return "".join(_spelled(character) if unicodedata.category(character) in ("Cc", "Cf", "Cs") and character not in "\n\t" else character for character in text)


def quoted_text(text: str) -> str:
    """Text in quotes on one line, white space to be seen: `"\\n"`, `" four"`. A single space is itself; any other is spelled out."""
    shown = "".join(_spelled(character) if character.isspace() and character != " " or character == "\\" else character for character in text)
    return f'"{visible_text(shown)}"'


def _spelled(character: str) -> str:
    return character.encode("unicode_escape").decode()


def say_line(text: str, file: TextIO | None = None) -> None:
    """Print a line above any bar (by default to stdout). What data or a model wrote in it does nothing to the terminal."""
    try:
        tqdm.write(visible_text(text), file=file)
        (file or sys.stdout).flush()
    except OSError:
        pass  # the output goes to a full disk, or nobody reads it any more: nobody is left to be told, and work goes on


def duration(seconds: float) -> str:
    """Seconds as people say them: 0.4 s, 48 s, 3:20 (minutes), 1:02:05 (hours), 3 d 04:10 (days and hours)."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, hours, days = whole // 60 % 60, whole // 3600, whole // 86400
    if days:
        return f"{days} d {hours % 24:02d}:{minutes:02d}"
    clock = f"{minutes:02d}:{whole % 60:02d}"
    return f"{hours}:{clock}" if hours else clock.removeprefix("0")


def size(num_bytes: float) -> str:
    """Bytes as people say them, in powers of ten: 812 MB, 6.1 GB."""
    for unit, unit_bytes in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if num_bytes >= 0.9995 * unit_bytes:
            return f"{num_bytes / unit_bytes:.3g} {unit}"
    return f"{num_bytes:.0f} bytes"


class Pace:
    """How long the rest takes, by the last steps."""

    def __init__(self, num_steps: int = PACE_STEPS) -> None:
        self._steps: deque[tuple[float, float]] = deque(maxlen=num_steps)

    def left_s(self, advanced: float, seconds: float, left: float) -> float | None:
        """Take one more step into account; seconds until all is done, or None before anything has moved.

            left x (seconds of the last steps) / (what they advanced)

        Args:
            advanced: of the whole, by this step, in any unit.
            seconds: that the step took.
            left: what is to be done, in the same unit.
        """
        self._steps.append((advanced, seconds))
        done, taken = (sum(column) for column in zip(*self._steps))
        return max(0.0, left) * taken / done if done > 0 else None


class Progress:
    """How far a long piece of work is: a bar on a terminal; elsewhere a line every `LINE_EVERY_S` seconds, and none before.

        with Progress("thinking on the panel", total=64, unit="documents") as progress:
            for batch in batches:
                ...
                progress.advance(len(batch))
    """

    def __init__(self, what: str, total: int | None = None, unit: str = "", *, shown: bool = True, say: Callable[[str], None] | None = None,
                 on_advance: Callable[[], None] = lambda: None) -> None:
        """
        Args:
            total: how much there is to do, in `unit`; None where nobody knows.
            unit: a word in the plural. `bytes` are told in MB and GB.
            shown: False says nothing, for ranks that do not speak.
            say: takes a line where there is no terminal; by default it goes to stderr.
            on_advance: called where something moves, shown or not.
        """
        self._on_advance = on_advance
        self._what, self._total, self._unit = what, total, unit
        self._shown, self._say = shown, say or (lambda text: say_line(text, sys.stderr))
        self._done, self._bar = 0, None

    def __enter__(self) -> "Progress":
        self._began = self._told = time.monotonic()
        if self._shown and sys.stderr.isatty():
            in_bytes = self._unit == "bytes"
            # Work that is done within a second shows no bar at all.
            self._bar = tqdm(desc=self._what, total=self._total, unit="B" if in_bytes else f" {self._unit}", unit_scale=in_bytes, leave=False, delay=1, dynamic_ncols=True)
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def advance(self, amount: int = 1) -> None:
        """So much more is done; 0: something moves, and there is nothing to count."""
        self._done += amount
        self._on_advance()
        if self._bar is not None:
            self._bar.update(amount)
        elif self._shown and time.monotonic() - self._told >= LINE_EVERY_S:
            self._told = time.monotonic()
            self._say(self._line())

    def _line(self) -> str:
        taken = self._told - self._began
        amount = (lambda value: size(value)) if self._unit == "bytes" else (lambda value: f"{value:,}")
        of_total = "" if self._total is None else f" of {amount(self._total)}"
        unit = "" if self._unit == "bytes" else f" {self._unit}"
        left = "" if self._total is None or not self._done else f", about {duration(taken * (self._total - self._done) / self._done)} left"
        return f"{self._what}: {amount(self._done)}{of_total}{unit} in {duration(taken)}{left}"


Tell = Callable[[str, int | None, str], Progress]
"""What makes a `Progress` of (what, total, unit), and with it says who speaks, and where."""


class WallTime:
    """Where the time of a process goes, from its start: each moment belongs to one part."""

    def __init__(self) -> None:
        """The time until now belongs to the part `start`."""
        age = max(0.0, time.time() - psutil.Process().create_time())
        self._parts: dict[str, float] = {"start": age}
        self._part, self._since = "start", time.monotonic()

    def enter(self, part: str) -> str:
        """What is done from now on; returns what was done until now."""
        before, now = self._part, time.monotonic()
        self._parts[before] = self._parts.get(before, 0.0) + now - self._since
        self._part, self._since = part, now
        return before

    @contextmanager
    def during(self, part: str) -> Iterator[None]:
        """The block belongs to a part; what comes after it to the part from before."""
        before = self.enter(part)
        try:
            yield
        finally:
            self.enter(before)

    def so_far(self) -> dict[str, float]:
        """Seconds of each part."""
        self.enter(self._part)
        return dict(self._parts)

    def told(self) -> str:
        """The sum, and its parts of at least half a second, the largest first."""
        parts = sorted(((seconds, part) for part, seconds in self.so_far().items() if seconds >= 0.5), reverse=True)
        listed = ", ".join(f"{part} {duration(seconds)}" for seconds, part in parts)
        return duration(sum(self._parts.values())) + (f": {listed}" if listed else "")


_WORDS: dict[str, Callable[[float], str]] = {"perf/peak_memory_bytes": size, "perf/left_s": duration}
"""Numbers that the console tells in other units."""


class MetricsLog:
    """Tells what happens: rank 0 writes the files and speaks, the other ranks only check."""

    def __init__(self, folder: RunFolder, config: Config, ranks: Ranks, total_hint: int | None) -> None:
        """
        Args:
            total_hint: optimizer steps expected, for the bar; None where the budget is not in steps.
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
        timing = {name: value for name, value in measured.items() if name.startswith(TIMING_PREFIX)}
        append_json_line(self._folder.metrics_jsonl, {"step": step, **{name: value for name, value in measured.items() if name not in timing}})
        if timing:
            append_json_line(self._folder.timing_jsonl, {"step": step, **timing})
        self._wandb.log(step, measured)
        self._show(step, measured)

    def still(self, step: int, phase: str, seconds: float) -> None:
        """Say of a long step that it goes on, `LINE_EVERY_S` after the last line of any step, where nobody watches a terminal.

        Args:
            phase: what it is doing.
            seconds: since the step began.
        """
        if self._first_rank and not sys.stderr.isatty() and seconds >= LINE_EVERY_S and time.monotonic() - (self._said_at or 0.0) >= LINE_EVERY_S:
            self.say(f"step {step}: in {phase}, {duration(seconds)} so far")
            self._said_at = time.monotonic()

    def evaluation(self, step: int, values: dict[str, float | None]) -> None:
        """Record one evaluation of the held-out panel, by name in `EVALUATION`; `step` 0 is before the first update."""
        measured = in_table_order(values, EVALUATION)
        if not self._first_rank:
            return
        append_json_line(self._folder.evaluation_jsonl, {"step": step, **measured})
        self._wandb.log(step, {f"evaluation/{name}": value for name, value in measured.items()})

    def alarm(self, step: int, text: str) -> None:
        """Say loudly that something is wrong with the run, and keep it in `alarms.jsonl` for the report. Every rank may call it."""
        if self._first_rank:
            append_json_line(self._folder.alarms_jsonl, {"step": step, "text": text})
        self.say(f"ALARM step {step}: {text}")

    def say(self, text: str) -> None:
        """Print a line, on rank 0, above the bar where there is one. What data or a model wrote in it does nothing to the terminal."""
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
        in_words = measured | {name: words(measured[name]) for name, words in _WORDS.items() if name in measured}
        words = {word: form.format(in_words[name]) for name, word, form in _CONSOLE if name in measured}
        if sys.stderr.isatty():
            self._move_bar(step, words)
        elif step % self._every_n_steps == 0 or self._said_at is None or time.monotonic() - self._said_at >= LINE_EVERY_S:
            of_total = f"/{self._total}" if self._total else ""
            self.say("  ".join([f"step {step}{of_total}", *(f"{word} {value}" for word, value in words.items())]))
            self._said_at = time.monotonic()

    def _move_bar(self, step: int, words: dict[str, str]) -> None:
        if self._bar is None:
            self._bar = tqdm(total=self._total, initial=step - 1, unit="step", dynamic_ncols=True)
        # The bar times the steps itself, and where it knows how many there are it says what is left.
        own = ("took", "left") if self._total else ("took",)
        self._bar.set_postfix_str(", ".join(f"{word} {value}" for word, value in words.items() if word not in own), refresh=False)
        self._bar.update(step - self._bar.n)


def in_table_order(values: dict[str, float | None], table: dict[str, Metric]) -> dict[str, float]:
    """The measured values in the order of the table, each name and number checked."""
    for name, value in values.items():
        if name not in table:
            nearest = difflib.get_close_matches(name, table, n=1, cutoff=0.0)[0]
            raise ValueError(f"unknown metric {name!r}. Did you mean {nearest!r}? Names, units and definitions are in rlp/metrics.py.")
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if value is not None and not (number and math.isfinite(value)):
            raise ValueError(f"metric {name} must be a finite number, or None where it was not measured, got {value!r}.")
    return {name: values[name] for name in table if values.get(name) is not None}


def require_wandb(mode: str) -> None:
    """Refuse a run that asks for Weights & Biases where it is not installed. Nothing is imported."""
    if mode != "disabled" and importlib.util.find_spec("wandb") is None:
        raise ConfigError(f"logging.wandb is {mode}, but the package wandb is not installed. Run pip install wandb, or write logging.wandb=disabled.")


class WandbAdapter:
    """A copy of the metrics for Weights & Biases. It may fail or hang; the run may not.

    It has a thread of its own, which nothing waits for but the end of the run, and that for `FINISH_PATIENCE_S`. Its
    failures come from a service process, a network and a file system that are not ours, and in as many types: all
    are caught here, each is said in one line, and the first one after the start switches the adapter off.
    """

    def __init__(self, folder: RunFolder, config: Config, say: Callable[[str], None]) -> None:
        self._say = say
        self._waiting: queue.Queue[dict | None] = queue.Queue(MAX_WAITING)
        self._thread: threading.Thread | None = None
        if config.logging.wandb != "disabled":
            self._thread = threading.Thread(target=self._work, args=(folder, config), name="wandb", daemon=True)
            self._thread.start()

    def log(self, step: int, values: dict[str, float]) -> None:
        """Hand over numbers of one step. A step may come in several calls, and again after a resume."""
        self._put({"step": step, **values})

    def close(self) -> None:
        """Wait until all is sent, for `FINISH_PATIENCE_S` at most. A second call does nothing."""
        self._put(None)
        if self._thread is not None:
            self._thread.join(FINISH_PATIENCE_S)
            if self._thread.is_alive():
                self._say(f"Weights & Biases hangs; it is left behind after {FINISH_PATIENCE_S} s. metrics.jsonl is complete.")
        self._thread = None

    def _put(self, values: dict | None) -> None:
        if self._thread is None:
            return
        try:
            self._waiting.put_nowait(values)
        except queue.Full:
            self._thread = None
            self._say(f"Weights & Biases hangs: {MAX_WAITING} lines wait for it; it is switched off. metrics.jsonl is complete.")

    def _work(self, folder: RunFolder, config: Config) -> None:
        run = self._start(folder, config, "online", "continuing offline") if config.logging.wandb == "online" else None
        run = run or self._start(folder, config, "offline", "continuing without it")
        while (values := self._waiting.get()) is not None:
            run = run and self._attempt("could not log", run, lambda: run.log(values))
        run = run and self._attempt("could not finish", run, lambda: run.finish())

    def _start(self, folder: RunFolder, config: Config, mode: str, otherwise: str) -> object | None:
        try:
            import wandb

            settings = wandb.Settings(init_timeout=60, finish_timeout=FINISH_PATIENCE_S, console="off", silent=True)
            run = wandb.init(project=config.logging.wandb_project, name=folder.name, group=folder.name, dir=str(folder.logs),
                             mode=mode, config=dataclasses.asdict(config), settings=settings)
            # Steps as a value of our own: W&B's counter refuses the steps that a resumed run repeats.
            run.define_metric("*", step_metric="step")
        except Exception as error:
            self._say(f"Weights & Biases could not start {mode} ({_one_line(error)}); {otherwise}.")
            return None
        return run

    def _attempt(self, what: str, run: object, do: Callable[[], object]) -> object | None:
        """The run, or None where it failed: from then on there is none."""
        try:
            do()
        except Exception as error:
            self._say(f"Weights & Biases {what} ({_one_line(error)}); it is switched off. metrics.jsonl is complete.")
            return None
        return run


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


_LIBRARIES = ("transformers", "datasets", "torch", "py.warnings", "DeepSpeed")


class _OnlyTo(logging.Filter):
    """Hands a logger's records to one handler and to nobody else."""

    def __init__(self, handler: logging.Handler) -> None:
        super().__init__()
        self.handler = handler

    def filter(self, record: logging.LogRecord) -> bool:
        self.handler.handle(record)
        return False


class _RankLog(logging.Handler):
    """Adds what libraries say to a file. Where that can not be done it is lost: a run does not end for its libraries' words."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path = path

    def emit(self, record: logging.LogRecord) -> None:
        with suppress(OSError, ConfigError, FolderLostError), open_log(self._path) as file:
            file.write(self.format(record) + "\n")


def quiet_libraries(folder: RunFolder, ranks: Ranks) -> None:
    """Send what libraries log, and Python's warnings, to `logs/rank_N.log`, and take their progress bars away.

    A library gives its logger a console handler when it is imported, so this goes after the imports.
    DeepSpeed may come later: it is imported by the engine, and logs while it is.
    """
    import transformers.utils.logging as transformers_logging

    handler = _RankLog(folder.logs / f"rank_{ranks.rank}.log")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    for library in _LIBRARIES:
        # Torch gives some of its inner loggers handlers of their own.
        for inner in [name for name in logging.root.manager.loggerDict if name.startswith(f"{library}.")]:
            logging.getLogger(inner).handlers = []
            logging.getLogger(inner).propagate = True
        logger = logging.getLogger(library)
        logger.handlers = [handler]
        logger.propagate = False
    # DeepSpeed logs through one logger, whose filter outlives the handler that its import adds.
    logging.getLogger("DeepSpeed").filters = [_OnlyTo(handler)]
    logging.captureWarnings(True)
    transformers_logging.disable_progress_bar()
