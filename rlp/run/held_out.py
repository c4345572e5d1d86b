"""The held-out panel of a run: when it is scored, and what came out first and last."""

import math
from dataclasses import dataclass

from rlp.learn.guard import NumericsError
from rlp.measure.metrics import COLD
from rlp.measure.panel_scoring import ThinkingModel, measure_panel, no_think_logprob
from rlp.process.faults import fault
from rlp.process.run_folder import RunFolder
from rlp.process.run_logs import json_lines
from rlp.run.budget import is_due, is_spent
from rlp.run.state import OpenRun

HEADLINE = {
    "gain_over_start_nats": "gain over start (nats)",
    "positive_gain_frac": "positions with positive gain",
    "accuracy_with_thought": "accuracy with a thought",
    "accuracy_without_thought": "accuracy without a thought",
    "thought_tokens_mean": "thought length (tokens)",
}
"""The numbers that a run is told by."""


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What the panel said of the policy at one step, by the names of `EVALUATION`."""

    values: dict[str, float]
    """Of thoughts at `thought.temperature`."""
    cold: dict[str, float] | None
    """Of thoughts at `evaluation.cold_temperature`; None where there was none."""

    @classmethod
    def of(cls, line: dict) -> "Evaluation":
        """Of a line of evaluation.jsonl."""
        values, cold = {}, {}
        for name, value in line.items():
            if name.startswith(COLD):
                cold[name.removeprefix(COLD)] = value
            elif name != "step":
                values[name] = value
        return cls(values, cold or None)


class HeldOut:
    """Evaluations of a run, those of its earlier lives included."""

    def __init__(self, run: OpenRun) -> None:
        self._run = run
        self.first, self.last = run.host.on_first_rank(
            run.folder, lambda: logged_evaluations(run.folder), "its evaluations could not be read"
        )

    def is_owed(self) -> bool:
        """Whether the evaluation of the step that the run begins with is still to be made: it was
        stopped, or the run is new."""
        run, step = self._run, self._run.state.step
        every = run.config.evaluation.every_n_steps
        spent = is_spent(run.config.budget, step, run.parts.ledger)
        due = step == 0 or (is_due(every, step) and not spent)
        return due and not self._is_made()

    def evaluate(self) -> Evaluation | None:
        """Score the held-out panel; the first time, also without thoughts by the starting
        checkpoint. None where there is no panel."""
        if self._run.opened.panel is None:
            return None
        if self._is_made():  # by an end that was interrupted
            return Evaluation.of(self.last)
        with self._run.wall.during("evaluation"):
            return self._evaluate()

    def before(self) -> Evaluation | None:
        """What was measured before the first step; a run that starts from another run's checkpoint
        has no such evaluation."""
        if self.first is None or self.first["step"] != 0:
            return None
        return Evaluation.of(self.first)

    def _is_made(self) -> bool:
        """Whether the newest evaluation is that of this step."""
        return self.last is not None and self.last["step"] == self._run.state.step

    def _evaluate(self) -> Evaluation:
        run, step = self._run, self._run.state.step
        run.host.watchdog.mark("evaluation")
        fault("evaluation")
        values = score_panel(run)
        unusable = sorted(name for name, value in values.items() if not math.isfinite(value))
        if unusable:
            raise NumericsError(
                f"held-out evaluation at step {step}: not finite: {', '.join(unusable)}. The"
                f" weights are of no use. {run.host.where_to_go_on(run.folder)}"
            )
        run.log.evaluation(step, values)
        self.last = {"step": step, **values}
        self.first = self.first or self.last
        evaluation = Evaluation.of(self.last)
        told = ", ".join(f"{words} {values[name]:.3f}" for name, words in HEADLINE.items())
        if evaluation.cold:
            accuracy = evaluation.cold["accuracy_with_thought"]
            told += f"; at T {run.config.evaluation.cold_temperature:g} accuracy {accuracy:.3f}"
        run.log.say(f"held-out at step {step}: {told}")
        return evaluation


def score_panel(run: OpenRun) -> dict[str, float]:
    """A line of evaluation.jsonl, without its step, with the weights as they are."""
    parts, panel = run.parts, run.opened.panel
    model = ThinkingModel(
        parts.engine.policy, parts.sampler, run.opened.setup.thought_format, parts.lay_out
    )
    if not run.start_logprob:
        run.start_logprob.extend(no_think_logprob(model, panel, run.config, run.ranks))
    cold = run.config.evaluation.cold_temperature
    temperatures = {"": None} | ({} if cold is None else {COLD: cold})
    values = {}
    for prefix, temperature in temperatures.items():
        measured = measure_panel(
            model,
            panel,
            run.config,
            run.ranks,
            teacher=parts.panel_teacher,
            start_logprob=run.start_logprob,
            temperature=temperature,
            progress=run.host.progress,
        )
        values |= {f"{prefix}{name}": value for name, value in measured.numbers().items()}
    return values


def logged_evaluations(folder: RunFolder) -> tuple[dict | None, dict | None]:
    """The first and the newest evaluation of the run so far."""
    first = last = None
    if folder.evaluation_jsonl.exists():
        for last in json_lines(folder.evaluation_jsonl):
            first = first or last
    return first, last
