"""Benchmark accuracy with and without thoughts, through lm-evaluation-harness.

A question is answered as the model was trained: prompt, open marker, a sampled thought, close
marker (forced where the budget ends the thought), and then the answer, which continues the prompt.
Without a thought the answer follows the prompt. No chat template. Prompts, few-shot examples,
filters and metrics are lm_eval's own; the decoding is ours (`thinker`), and so is the check of
mathematical answers (`answers`). lm_eval is imported where it is used.

Thoughts come from `rlp.sampling` and all noise is keyed by (seed, prompt, sample), so an answer
does not depend on the other questions, their order or the batch size. The open marker is left out
of every answer's softmax, as it is of every target's in training.
"""

import io
import math
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import redirect_stderr
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import numpy as np

from rlp.compare.answers import AnswerPool
from rlp.compare.asked_model import AskedModel
from rlp.compare.checking import Checked, by_question, check_by_task, check_mathematics
from rlp.compare.harness import thinking_lm
from rlp.compare.tasks import FEWSHOT_SEED, Benchmark, data_errors, settle_samples
from rlp.compare.thinker import Reply, Thinker
from rlp.config import ConfigError

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import LM
    from lm_eval.api.task import Task


@dataclass(frozen=True, slots=True)
class Result:
    """A benchmark in one mode."""

    benchmark: str
    mode: str
    """`think` or `no_think`."""
    metric: str
    """What accuracy is the mean of."""
    questions: int
    samples: int
    accuracy: float
    """pass@1: the mean over questions of the mean over samples."""
    standard_error: float | None
    """Of accuracy, over questions; None for a single question."""
    thought_tokens_mean: float
    thought_truncated_frac: float
    answer_tokens_mean: float
    answer_truncated_frac: float
    unparseable_frac: float
    """Answers in which the check found nothing to read; they count as wrong."""
    check_timeouts: int
    """Answers that took too long to check; they count as wrong."""
    check_crashes: int
    """Answers whose check died; they count as wrong."""
    prompts_cut: int
    """Prompts that lost their beginning."""
    seconds: float


def mean_and_error(scores: np.ndarray) -> tuple[float, float | None]:
    """pass@1 of scores [questions, samples], and its standard error: samples of a question are no
    new questions, so questions are what is resampled."""
    per_question = scores.mean(axis=1)
    mean, count = float(per_question.mean()), len(per_question)
    if count == 1:
        return mean, None
    return mean, float(per_question.std(ddof=1) / math.sqrt(count))


def run_benchmark(
    name: str,
    benchmark: Benchmark,
    tasks: list["Task"],
    thinker: Thinker,
    pool: AnswerPool,
    *,
    mode: str,
    limit: int | None,
) -> tuple[Result, list[dict]]:
    """Ask all questions of a benchmark `samples` times each.

    Args:
        limit: at most so many questions of each task; None: all.

    Returns:
        The result, and one mapping per question and sample with all that was written.
    """
    start = time.monotonic()
    scores, rows, metrics = [], [], set()
    for task in tasks:
        # Each mode draws the same examples, those that lm_eval draws in its one pass.
        task.set_fewshot_seed(FEWSHOT_SEED)
        # lm_eval draws a bar for each task.
        with redirect_stderr(io.StringIO()), data_errors(name, benchmark):
            task.build_all_requests(limit=limit)
        lm = thinking_lm(thinker, answer_tokens=benchmark.answer_tokens)
        responses, replies = _ask(lm, task.instances, benchmark.samples)
        if benchmark.check == "math":
            checked = check_mathematics(task, responses, pool)
        else:
            checked = check_by_task(task, responses, benchmark)

        scores.append(checked.scores)
        metrics.add(checked.metric)
        for row in _rows(task, responses, replies, checked):
            rows.append({"benchmark": name, "mode": mode, **row})

    metric, seconds = ", ".join(sorted(metrics)), time.monotonic() - start
    return _result(np.concatenate(scores), rows, metric, seconds), rows


def _rows(
    task: "Task", responses: list[list], replies: list[list[Reply]], checked: Checked
) -> Iterator[dict]:
    """What was asked and said, question by question and sample by sample."""
    for q, members in enumerate(by_question(task.instances)):
        question = task.instances[members[0]]
        for sample, score in enumerate(checked.scores[q]):
            said = [replies[index][sample] for index in members]
            row = {
                "task": task.task_name,
                "question": int(question.doc_id),
                "sample": sample,
                "prompt": question.args[0],
                "reference": str(task.doc_to_target(question.doc)),
                **asdict(said[0]),
                "score": float(score),
                "outcome": checked.outcomes[q][sample],
            }
            if len(said) > 1:
                row["choices"] = [
                    [reply.answer, responses[index][sample][0]]
                    for reply, index in zip(said, members)
                ]
            yield row


def _result(scores: np.ndarray, rows: list[dict], metric: str, seconds: float) -> Result:
    """What scores [questions, samples] and the rows of a benchmark add up to."""
    accuracy, error = mean_and_error(scores)
    outcomes = Counter(row["outcome"] for row in rows)

    def mean(key: str) -> float:
        return float(np.mean([row[key] for row in rows]))

    return Result(
        benchmark=rows[0]["benchmark"],
        mode=rows[0]["mode"],
        metric=metric,
        questions=scores.shape[0],
        samples=scores.shape[1],
        accuracy=accuracy,
        standard_error=error,
        thought_tokens_mean=mean("thought_tokens"),
        thought_truncated_frac=mean("thought_truncated"),
        answer_tokens_mean=mean("answer_tokens"),
        answer_truncated_frac=mean("answer_truncated"),
        unparseable_frac=outcomes["unparseable"] / len(rows),
        check_timeouts=outcomes["timeout"],
        check_crashes=outcomes["crash"],
        prompts_cut=sum(row["prompt_cut"] for row in rows if row["sample"] == 0),
        seconds=seconds,
    )


def _ask(
    lm: "LM", instances: list["Instance"], samples: int
) -> tuple[list[list], list[list[Reply]]]:
    """Responses and replies [instances][samples], each kind of request in one call as lm_eval makes
    it."""
    responses: list[list] = [[] for _ in instances]
    replies: list[list[Reply]] = [[] for _ in instances]
    for kind in sorted({instance.request_type for instance in instances}):
        if kind == "loglikelihood_rolling":
            raise ConfigError(
                f"{instances[0].task_name} measures perplexity, not answers. Write a task of"
                " questions."
            )
        members = [
            index
            for index, instance in enumerate(instances)
            if instance.request_type == kind
            for _ in range(samples)
        ]
        said = getattr(lm, kind)([instances[index] for index in members])
        for index, response, reply in zip(members, said, lm.replies):
            responses[index].append(response)
            replies[index].append(reply)
    return responses, replies


def run_benchmarks(
    benchmarks: dict[str, Benchmark],
    tasks: dict[str, list["Task"]],
    model: AskedModel,
    *,
    modes: tuple[str, ...],
    limit: int | None,
    seed: int,
    rows: int,
    timeout_s: float = 10.0,
) -> Iterator[tuple[Result, list[dict]]]:
    """Each benchmark in each mode.

    Without a thought and with greedy answers all samples would be the same, so there is one.
    """
    with AnswerPool(timeout_s=timeout_s) as pool:
        for name, benchmark in benchmarks.items():
            for mode in modes:
                thinker = model.thinker(benchmark, thinks=mode == "think", seed=seed, rows=rows)
                yield run_benchmark(
                    name,
                    settle_samples(benchmark, mode),
                    tasks[name],
                    thinker,
                    pool,
                    mode=mode,
                    limit=limit,
                )
