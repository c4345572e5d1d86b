"""Benchmark accuracy with and without thoughts, through lm-evaluation-harness.

A question is answered as the model was trained: prompt, open marker, a sampled thought, close
marker (forced where the budget ends the thought), and then the answer, which continues the prompt.
Without a thought the answer follows the prompt. No chat template. Prompts, few-shot examples,
filters and metrics are lm_eval's own; the decoding is ours, and so is the check of mathematical
answers (`answers`). lm_eval is imported where it is used.

Thoughts come from `rollout` and all noise is keyed by (seed, prompt, sample), so an answer does not
depend on the other questions, their order or the batch size. The open marker is left out of every
answer's softmax, as it is of every target's in training.

Dimensions
    N  sequences decoded side by side;  Q  scored tokens;  T  tokens in a row;  V  vocabulary
"""

import io
import math
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import redirect_stderr
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from rlp.compare.answers import AnswerPool
from rlp.config import (
    BudgetConfig,
    Config,
    ConfigError,
    DataConfig,
    EngineConfig,
    ModelConfig,
    ThoughtConfig,
)
from rlp.learn.export import known_ids, read_thought_format
from rlp.model.admission import check_model
from rlp.model.loading import choose_dtype, load_policy, read_model_config
from rlp.model.markers import marker_notes
from rlp.model.policy import Policy
from rlp.model.setup import ModelSetup
from rlp.model.thoughts import ThoughtFormat

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import LM
    from lm_eval.api.task import Task
from rlp.compare.harness import thinking_lm
from rlp.compare.tasks import Benchmark, data_errors, settle_samples
from rlp.compare.thinker import GREEDY, Reply, Thinker


@dataclass(frozen=True, slots=True)
class Evaluator:
    """A checkpoint, ready to be asked."""

    policy: Policy
    tokenizer: PreTrainedTokenizerBase
    thought_format: ThoughtFormat
    thought: ThoughtConfig
    """As the checkpoint was trained, or the paper's: its budget counts where a benchmark names
    none."""

    def marker_notes(self) -> list[str]:
        """`marker_notes` of the checkpoint."""
        return marker_notes(self.tokenizer, self.thought_format.markers, self.thought)

    def thinker(self, benchmark: Benchmark, *, thinks: bool, seed: int, rows: int) -> Thinker:
        """What answers a benchmark."""
        temperature = (
            self.thought_format.temperature
            if benchmark.thought_temperature is None
            else max(benchmark.thought_temperature, GREEDY)
        )
        return Thinker(
            self.policy,
            self.tokenizer,
            replace(self.thought_format, temperature=temperature),
            thinks=thinks,
            seed=seed,
            rows=rows,
            thought_tokens=benchmark.thought_tokens or self.thought.max_thought_tokens,
            answer_temperature=benchmark.answer_temperature,
        )


def open_evaluator(checkpoint: str, *, device: torch.device, dtype: str = "auto") -> Evaluator:
    """Load a Hugging Face folder or Hub name. The `thought_format.json` of a folder says how it
    thinks; without one it thinks as the paper's configs do.

    Raises:
        ConfigError: no model there, or markers that its tokenizer writes otherwise than in
            training.
    """
    path = Path(checkpoint) / "thought_format.json"
    manifest = read_thought_format(path)
    try:
        thought = (
            ThoughtConfig(
                **{
                    key: manifest[key]
                    for key in ("open_marker", "close_marker", "temperature", "max_thought_tokens")
                }
            )
            if manifest
            else ThoughtConfig()
        )
    except (ConfigError, KeyError) as error:
        raise ConfigError(
            f"{path} is no thought format: {error!r}. Export the checkpoint again with `rlp"
            " export`."
        ) from error
    # A config is the recipe of a run; of its training sections nothing is used here.
    config = Config(
        model=ModelConfig(path=checkpoint),
        thought=thought,
        data=DataConfig(train=["unused"]),
        budget=BudgetConfig(steps=1),
        engine=EngineConfig(dtype=dtype, layout="repeated"),
    )
    setup = ModelSetup(config)
    ids = {"open_marker_ids": setup.markers.open, "close_marker_ids": setup.markers.close}
    for name, own in ids.items():
        if tuple(manifest.get(name, own)) != own:
            raise ConfigError(
                f"{path}: {name} is {manifest[name]}, and the tokenizer of the folder writes"
                f" {list(own)}. Write a folder with the tokenizer that the run used."
            )
    thought_format = replace(
        setup.thought_format,
        instruction=known_ids(manifest.get("instruction_ids", ()), setup.tokenizer),
    )
    dtype, _ = choose_dtype(
        config, device, read_model_config(config.model).get_text_config().hidden_size
    )
    policy = load_policy(config, setup.tokenizer, setup.markers, dtype, device).to(device).eval()
    check_model(policy)
    return Evaluator(policy, setup.tokenizer, thought_format, thought)


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
    return float(per_question.mean()), (
        float(per_question.std(ddof=1) / math.sqrt(len(per_question)))
        if len(per_question) > 1
        else None
    )


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
        with (
            redirect_stderr(io.StringIO()),
            data_errors(name, benchmark),
        ):  # lm_eval draws a bar for each task
            task.build_all_requests(limit=limit)
        lm = thinking_lm(thinker, answer_tokens=benchmark.answer_tokens)
        responses, replies = _ask(lm, task.instances, benchmark.samples)
        if benchmark.check == "math":
            scored, outcomes, metric = _check_mathematics(task, responses, pool)
        else:
            scored, outcomes, metric = _check_by_task(task, responses, benchmark)
        metrics.add(metric)
        scores.append(scored)
        questions = _by_question(task.instances)
        for q, members in enumerate(questions):
            for sample in range(benchmark.samples):
                said = [replies[index][sample] for index in members]
                rows.append(
                    {
                        "benchmark": name,
                        "mode": mode,
                        "task": task.task_name,
                        "question": int(task.instances[members[0]].doc_id),
                        "sample": sample,
                        "prompt": task.instances[members[0]].args[0],
                        "reference": str(task.doc_to_target(task.instances[members[0]].doc)),
                        **asdict(said[0]),
                        "score": float(scored[q, sample]),
                        "outcome": outcomes[q][sample],
                    }
                    | (
                        {
                            "choices": [
                                [reply.answer, responses[index][sample][0]]
                                for reply, index in zip(said, members)
                            ]
                        }
                        if len(said) > 1
                        else {}
                    )
                )
    scores = np.concatenate(scores)
    accuracy, error = mean_and_error(scores)

    def mean(key: str) -> float:
        return float(np.mean([row[key] for row in rows]))

    outcomes = Counter(row["outcome"] for row in rows)
    return (
        Result(
            benchmark=name,
            mode=mode,
            metric=", ".join(sorted(metrics)),
            questions=len(scores),
            samples=benchmark.samples,
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
            seconds=time.monotonic() - start,
        ),
        rows,
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


def _by_question(instances: list["Instance"]) -> list[list[int]]:
    """Indices of the requests of each question, in order; a multiple choice makes one of each
    choice."""
    groups: dict[int, list[int]] = {}
    for index, instance in enumerate(instances):
        groups.setdefault(instance.doc_id, []).append(index)
    return [sorted(members, key=lambda index: instances[index].idx) for members in groups.values()]


def _check_mathematics(
    task: "Task", responses: list[list], pool: AnswerPool
) -> tuple[np.ndarray, list[list[str]], str]:
    """Scores [questions, samples] and outcomes by math-verify."""
    questions = _by_question(task.instances)
    if any(
        len(members) > 1 or task.instances[members[0]].request_type != "generate_until"
        for members in questions
    ):
        raise ConfigError(
            f"{task.task_name} is no task of written answers, so math-verify can not check it."
            " Write check: task."
        )
    pairs = [
        (response, str(task.doc_to_target(task.instances[index].doc)))
        for (index,) in questions
        for response in responses[index]
    ]
    verdicts = pool.verdicts(pairs)
    samples = len(verdicts) // len(questions)
    scores = np.array([verdict.right for verdict in verdicts], dtype=np.float64).reshape(
        len(questions), samples
    )
    outcomes = [
        [verdict.outcome for verdict in verdicts[q * samples : (q + 1) * samples]]
        for q in range(len(questions))
    ]
    return scores, outcomes, "math_verify"


def _check_by_task(
    task: "Task", responses: list[list], benchmark: Benchmark
) -> tuple[np.ndarray, list[list[str]], str]:
    """Scores [questions, samples] and outcomes by the task's own filter and metric, sample by
    sample: lm_eval itself would look at the first alone."""
    questions = _by_question(task.instances)
    scores = np.zeros((len(questions), benchmark.samples))
    outcomes = [["checked"] * benchmark.samples for _ in questions]
    metric = benchmark.metric
    for sample in range(benchmark.samples):
        for instance, said in zip(task.instances, responses):
            instance.resps, instance.filtered_resps = [said[sample]], {}
        task.apply_filters()
        filters = list(task.instances[0].filtered_resps)
        chosen = benchmark.filter or filters[0]
        if chosen not in filters:
            raise ConfigError(
                f"{task.task_name} has no filter {chosen!r}. Write one of {', '.join(filters)}."
            )
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
    return scores, outcomes, metric if chosen == "none" else f"{metric} ({chosen})"


def run_benchmarks(
    benchmarks: dict[str, Benchmark],
    tasks: dict[str, list["Task"]],
    evaluator: Evaluator,
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
                thinker = evaluator.thinker(benchmark, thinks=mode == "think", seed=seed, rows=rows)
                yield run_benchmark(
                    name,
                    settle_samples(benchmark, mode),
                    tasks[name],
                    thinker,
                    pool,
                    mode=mode,
                    limit=limit,
                )


def thought_gain(think: list[dict], no_think: list[dict]) -> tuple[float, float | None]:
    """Accuracy with thoughts minus accuracy without, and its standard error, paired by question."""

    def per_question(rows: list[dict]) -> dict[tuple, float]:
        scores: dict[tuple, list[float]] = {}
        for row in rows:
            scores.setdefault((row["task"], row["question"]), []).append(row["score"])
        return {key: float(np.mean(values)) for key, values in scores.items()}

    with_thoughts, without = per_question(think), per_question(no_think)
    return mean_and_error(np.array([[with_thoughts[key] - without[key]] for key in with_thoughts]))
