"""Benchmarks: what a YAML file says of each, and the tasks of lm-evaluation-harness that it
becomes."""

import difflib
import logging
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from importlib.util import find_spec
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from rlp.config import (
    ConfigError,
    DataConfig,
    first_line,
    read_yaml,
    refuse_mappings_for_lists,
    require,
    require_one_of,
)
from rlp.data.documents import short
from rlp.data.errors import BadDocument, DataError
from rlp.data.hub import settle_hub
from rlp.data.sources import Rows, open_rows

if TYPE_CHECKING:
    from lm_eval.api.task import Task


MOST_SAMPLES, MOST_TOKENS = 10_000, 2**24
"""Of a benchmark: more is a slip of the pen, and would be memory asked for."""

FEWSHOT_SEED = 1234
"""lm_eval's own, so that its examples are ours."""

_FIELDS = re.compile(r"\{\{\s*([\w-]+(?:\s+or\s+[\w-]+)*)\s*\}\}")
"""One reference to fields of a row. It is all that stands for something in a prompt: a template
engine would run what a stranger wrote."""


def _is_plain(template: str) -> bool:
    """Whether nothing but references to fields would be read as more than text."""
    rest = _FIELDS.sub("", template)
    return not any(opening in rest for opening in ("{{", "{%", "{#"))


def fill_fields(template: str, row: dict) -> str:
    """The template with the row's values in it. A value is text or a number, and is never looked at
    for references.

    Raises:
        BadDocument: the row has none of the fields of a reference, or it holds something else.
    """

    def value(reference: re.Match) -> str:
        names = reference[1].split(" or ")
        held = next(
            (row[name.strip()] for name in names if row.get(name.strip()) is not None), None
        )
        if not isinstance(held, str | int | float):
            said = "no such field" if held is None else f"a {type(held).__name__}"
            raise BadDocument(
                "no text",
                f"{reference[0]}: {said}; the row has {', '.join(map(str, row))}; expected text or"
                " a number",
            )
        return str(held)

    return _FIELDS.sub(value, template)


@dataclass
class Benchmark:
    """One row of the results: where questions come from, how they are asked, how answers are
    checked."""

    task: str | None = None
    """A task or group of lm_eval, such as gsm8k or mmlu_pro. Either this or `data`."""
    data: str | None = None
    """Questions of your own: a JSON Lines file, or `hub:OWNER/NAME` or `hub:OWNER/NAME@CONFIG`."""
    split: str = "test"
    """Split of a Hub data set, for `data`."""
    prompt: str = "Question: {{question}}\nAnswer:"
    """The prompt, for `data`: text in which `{{field}}` stands for a field of the row, `{{field or
    other}}` for the first that it has."""
    reference: str = "{{answer}}"
    """The right answer in the same way, for `data`; few-shot examples show it whole, and the check
    reads what stands after its last `####`."""
    examples: str | None = None
    """Few-shot examples, for `data`: a JSON Lines file, or a Hub data set as `data` names one."""
    examples_split: str = "train"
    """Split of the Hub data set of `examples`: those of `split` would show their own answers."""
    until: list[str] = field(default_factory=lambda: ["Question:"])
    """Texts that end an answer, for `data`; an lm_eval task has its own."""
    shots: int | None = None
    """Few-shot examples in the prompt; None: as the task says."""
    check: str = "task"
    """`task`: the task's own filter and metric. `math`: math-verify on the whole answer (always for
    `data`)."""
    metric: str | None = None
    """For check `task`: the metric to report; None: the task's first."""
    filter: str | None = None
    """For check `task`: the filter to report; None: the task's first."""
    samples: int = 1
    """k answers to each question; accuracy is pass@1, the mean over them. More than one needs
    sampled thoughts or answers."""
    thought_tokens: int | None = None
    """Budget of a thought, close marker included; None: as the checkpoint was trained."""
    thought_temperature: float | None = None
    """Of thought tokens; 0 is greedy; None: as the checkpoint was trained."""
    answer_tokens: int | None = None
    """Tokens of an answer at most; None: as the task says, or 256 as in lm_eval."""
    answer_temperature: float = 0.0
    """Of answer tokens; 0 is greedy."""

    def __post_init__(self) -> None:
        require(
            (self.task is None) != (self.data is None),
            "task",
            self.task,
            "and data: exactly one of them names the questions",
        )
        self.check = "math" if self.data else self.check
        require_one_of("check", self.check, ("task", "math"))
        require(self.shots is None or self.shots >= 0, "shots", self.shots, "must be at least 0")
        require(
            not (self.data and self.shots and not self.examples),
            "shots",
            self.shots,
            "needs examples: a JSON Lines file or a Hub data set that they come from",
        )
        require(
            1 <= self.samples <= MOST_SAMPLES,
            "samples",
            self.samples,
            f"must be at least 1 and at most {MOST_SAMPLES:,}",
        )
        for name in ("thought_tokens", "answer_tokens"):
            value = getattr(self, name)
            require(
                value is None or 1 <= value <= MOST_TOKENS,
                name,
                value,
                f"must be at least 1 and at most {MOST_TOKENS:,}",
            )
        for name in ("prompt", "reference"):
            require(
                _is_plain(getattr(self, name)),
                name,
                getattr(self, name),
                "is text with {{field}} or {{field or other}} in it, where names are of letters,"
                " digits, _ and -; no other template is read",
            )
        require(all(self.until), "until", self.until, "must hold texts that are not empty")
        for name in ("thought_temperature", "answer_temperature"):
            require(
                getattr(self, name) is None or 0 <= getattr(self, name) < math.inf,
                name,
                getattr(self, name),
                "must be finite and at least 0 (0 is greedy)",
            )


def load_benchmarks(path: Path) -> dict[str, Benchmark]:
    """Read a YAML file of benchmarks, strictly.

    Raises:
        ConfigError: no such file, an unknown key, a wrong type or an impossible value.
    """
    tree = read_yaml(path)
    if (
        not isinstance(tree, dict)
        or set(tree) != {"benchmarks"}
        or not isinstance(tree["benchmarks"], dict)
        or not tree["benchmarks"]
    ):
        raise ConfigError(
            f"{path} must hold one section, `benchmarks:`, with a mapping from name to settings;"
            f" got {list(tree) if isinstance(tree, dict) else tree!r}."
        )
    for name in tree["benchmarks"]:
        require(
            isinstance(name, str) and name.isprintable(),
            f"{path}: benchmarks",
            name,
            "needs names that can be printed",
        )
    return {
        name: _read_benchmark(f"{path}: benchmarks.{name}", content)
        for name, content in tree["benchmarks"].items()
    }


def _read_benchmark(where: str, content: object) -> Benchmark:
    known = list(Benchmark.__dataclass_fields__)
    if not isinstance(content, dict):
        raise ConfigError(
            f"{where} must be a mapping with keys such as task and samples, got {content!r}."
        )
    for key in content:
        if key not in known:
            raise ConfigError(
                f"{where}: unknown key {key}."
                f" {_did_you_mean(str(key), known) or 'The keys are ' + ', '.join(known) + '.'}"
            )
    refuse_mappings_for_lists(Benchmark, content, f"{where}.")

    fields = OmegaConf.structured(Benchmark(task="unset"))
    try:
        return OmegaConf.to_object(OmegaConf.merge(fields, {"task": None} | content))
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error
    except OmegaConfBaseException as error:
        if isinstance(error.__cause__, ConfigError):
            raise ConfigError(f"{where}: {error.__cause__}") from error
        said = str(error).splitlines()[0]
        raise ConfigError(f"{where}: {error.full_key}: {said}") from error


def _did_you_mean(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.7)
    return f"Did you mean {' or '.join(near)}?" if near else ""


def load_tasks(benchmarks: dict[str, Benchmark]) -> dict[str, list["Task"]]:
    """The lm_eval tasks of each benchmark, with their data.

    Raises:
        ConfigError: lm_eval is not installed, or has no task of that name, or it would run code
            that a model wrote.
        DataError: data that can not be read or downloaded.
    """
    if find_spec("lm_eval") is None:
        raise ConfigError(
            "lm-evaluation-harness is not installed. Write: pip install 'rlp-pretraining[eval]'."
        )
    import datasets
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    if any(
        benchmark.task or str(benchmark.data).startswith("hub:")
        for benchmark in benchmarks.values()
    ):
        settle_hub()  # lm_eval asks for each file, and again and again
    datasets.disable_progress_bars()
    manager = TaskManager(include_defaults=any(benchmark.task for benchmark in benchmarks.values()))
    specs = {
        name: (
            own_task(name, benchmark)
            if benchmark.data
            else _known_task(name, benchmark.task, manager.all_tasks)
        )
        for name, benchmark in benchmarks.items()
    }
    loaded = {}
    for name, spec in specs.items():
        with data_errors(name, benchmarks[name]):
            tasks = list(manager.load([spec])["tasks"].values())
        for task in tasks:
            if getattr(task, "UNSAFE_CODE", False):
                raise ConfigError(
                    f"{name}: the task {task.task_name} runs code that the model writes, which is"
                    " not done here."
                )
            if benchmarks[name].shots is not None:
                task.set_config("num_fewshot", benchmarks[name].shots)
        loaded[name] = tasks
    return loaded


def _known_task(name: str, task: str, known: list[str]) -> str:
    if task not in known:
        raise ConfigError(
            f"{name}: lm_eval has no task {task!r}."
            f" {_did_you_mean(task, known) or 'See its list with: lm-eval ls tasks.'} A file of"
            " your own needs a name that ends in .jsonl."
        )
    return task


@contextmanager
def data_errors(name: str, benchmark: Benchmark) -> Iterator[None]:
    """Around lm_eval's reading of a task's rows: what goes wrong there is a DataError."""
    import datasets
    from jinja2 import TemplateError

    try:
        yield
    # What a download raises, or a task of lm_eval on a row that it does not expect, depends on
    # library, cache and network.
    except (
        OSError,
        ValueError,
        TypeError,
        LookupError,
        RuntimeError,
        ImportError,
        AssertionError,
        SyntaxError,
        MemoryError,
        TemplateError,
        datasets.exceptions.DatasetsError,
    ) as error:
        raise DataError(
            f"{name}: the data of {benchmark.task} can not be loaded: {type(error).__name__}:"
            f" {first_line(error)}. Run it where the Hugging Face Hub can be reached (some sets"
            " need a login), or write --tasks FILE.jsonl."
        ) from error


class _Questions(list):
    """Rows as lm_eval takes them: finished prompts and references."""

    features = {"prompt": str, "reference": str}


def own_task(name: str, benchmark: Benchmark) -> dict:
    """The lm_eval config of questions that are no task of lm_eval. What it gets is finished text,
    and no template to fill."""
    rows = {"test": _finished(benchmark.data, benchmark.split, benchmark, name)}
    if benchmark.examples:
        rows["examples"] = _finished(benchmark.examples, benchmark.examples_split, benchmark, name)
    return {
        "task": name,
        "output_type": "generate_until",
        "custom_dataset": lambda **_: rows,
        "test_split": "test",
        "doc_to_text": itemgetter("prompt"),
        "doc_to_target": itemgetter("reference"),
        "fewshot_split": "examples" if benchmark.examples else None,
        "fewshot_config": {"sampler": "first_n"},
        "num_fewshot": benchmark.shots or 0,
        "generation_kwargs": {"until": list(benchmark.until), "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    }


def _finished(source: str, split: str, benchmark: Benchmark, name: str) -> _Questions:
    """All questions of a file, or of a split of a Hub data set.

    Raises:
        DataError: it can not be read, or a row lacks a field; with its line.
    """
    try:
        rows = open_rows([source], DataConfig(train=[source]), split, name)
        finished = _Questions()
        for index in range(len(rows)):
            row = _row(rows, index)
            if row is not None:
                finished.append(
                    {key: fill_fields(getattr(benchmark, key), row) for key in _Questions.features}
                )
    except BadDocument as error:
        raise DataError(
            f"{name}: {rows.where(index)}: {error.args[0]} ({short(error.args[1])}). Mend the line,"
            " or the prompt and reference of the benchmark."
        ) from error
    except DataError as error:
        raise DataError(f"{name}: the data of {source} can not be loaded: {error}") from error
    if not finished:
        raise DataError(
            f"{name}: {source} holds no question. Write a file with one JSON object on each line."
        )
    return finished


def _row(rows: Rows, index: int) -> dict | None:
    """A row, or None for an empty line."""
    try:
        return rows.read(index)
    except BadDocument as error:
        if error.args[0] == "empty line":
            return None
        raise


def settle_samples(benchmark: Benchmark, mode: str) -> Benchmark:
    """One sample where nothing is drawn."""
    drawn = benchmark.answer_temperature > 0 or (
        mode == "think" and benchmark.thought_temperature != 0
    )
    return benchmark if drawn else replace(benchmark, samples=1)


def versions() -> dict[str, str]:
    """Of the libraries that results depend on."""
    return {
        name: version(name)
        for name in ("lm_eval", "math-verify", "transformers", "torch", "datasets")
    }
