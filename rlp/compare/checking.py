"""What the answers to a task are worth: by math-verify, or by the task's own filter and metric."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from rlp.compare.answers import AnswerPool
from rlp.compare.tasks import Benchmark
from rlp.config import ConfigError

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance
    from lm_eval.api.task import Task


@dataclass(frozen=True, slots=True)
class Checked:
    """The answers to a task, checked."""

    scores: np.ndarray
    """[questions, samples] float64."""
    outcomes: list[list[str]]
    """[questions][samples], as `Verdict.outcome`."""
    metric: str
    """What the scores are."""


def by_question(instances: list["Instance"]) -> list[list[int]]:
    """Indices of the requests of each question, in order; a multiple choice makes one of each
    choice."""
    groups: dict[int, list[int]] = {}
    for index, instance in enumerate(instances):
        groups.setdefault(instance.doc_id, []).append(index)
    return [sorted(members, key=lambda index: instances[index].idx) for members in groups.values()]


def check_mathematics(task: "Task", responses: list[list[str]], pool: AnswerPool) -> Checked:
    """By math-verify.

    Args:
        responses: [requests][samples], what was written.

    Raises:
        ConfigError: the task does not ask for written answers.
    """
    questions = by_question(task.instances)
    pairs = []
    for members in questions:
        asked = task.instances[members[0]]
        if len(members) > 1 or asked.request_type != "generate_until":
            raise ConfigError(
                f"{task.task_name} is no task of written answers, so math-verify can not check it."
                " Write check: task."
            )
        reference = str(task.doc_to_target(asked.doc))
        pairs += [(response, reference) for response in responses[members[0]]]

    verdicts = pool.verdicts(pairs)
    shape = len(questions), -1
    scores = np.array([verdict.right for verdict in verdicts], dtype=np.float64).reshape(shape)
    outcomes = np.array([verdict.outcome for verdict in verdicts]).reshape(shape)
    return Checked(scores, outcomes.tolist(), "math_verify")


def check_by_task(task: "Task", responses: list[list], benchmark: Benchmark) -> Checked:
    """By the task's own filter and metric, sample by sample: lm_eval itself would look at the
    first alone.

    Args:
        responses: [requests][samples], as lm_eval has them.

    Raises:
        ConfigError: the task has no such filter or metric.
    """
    questions = by_question(task.instances)
    scores = np.zeros((len(questions), benchmark.samples))
    outcomes = [["checked"] * benchmark.samples for _ in questions]
    metric = benchmark.metric
    for sample in range(benchmark.samples):
        for instance, said in zip(task.instances, responses):
            instance.resps, instance.filtered_resps = [said[sample]], {}
        task.apply_filters()
        chosen = _filter_of(task, benchmark)

        for q, members in enumerate(questions):
            filtered = [task.instances[index].filtered_resps[chosen] for index in members]
            measured = task.process_results(task.instances[members[0]].doc, filtered)
            metric = metric or next(iter(measured))
            if not isinstance(measured.get(metric), (bool, int, float, np.number)):
                raise ConfigError(
                    f"{task.task_name} gives no number {metric!r} for a question. Write metric: one"
                    f" of {', '.join(measured)}."
                )
            scores[q, sample] = measured[metric]
            if filtered[0] == "[invalid]":  # what lm_eval's filters leave where they find nothing
                outcomes[q][sample] = "unparseable"
    return Checked(scores, outcomes, metric if chosen == "none" else f"{metric} ({chosen})")


def _filter_of(task: "Task", benchmark: Benchmark) -> str:
    """The filter whose answers count, of those that were applied."""
    filters = list(task.instances[0].filtered_resps)
    chosen = benchmark.filter or filters[0]
    if chosen not in filters:
        raise ConfigError(
            f"{task.task_name} has no filter {chosen!r}. Write one of {', '.join(filters)}."
        )
    return chosen
