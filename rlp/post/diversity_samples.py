"""Prompts, and what models answered to them: the files that `rlp diversity` reads and writes.

A line of a samples file is {"model", "prompt", "kind": "open" | "closed", "text"}, with "answer" (a
text, or a list of texts that are all right) where the prompt is closed, and, where it was drawn by
`rlp diversity`, how. A line of a panel is {"prompt", "kind"}, with "answer", "category",
"tokens", how many an answer has at most, and "samples", how many answers are drawn.
"""

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from rlp.config import ConfigError
from rlp.data.errors import DataError
from rlp.process.files import read_bytes

Kind = Literal["open", "closed"]

KINDS: tuple[Kind, ...] = get_args(Kind)

DRAWN = ("seed", "temperature", "top_p", "format", "frame", "weights", "thinks", "dtype")
"""How an answer was drawn: all lines of a model agree in it."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """One of a panel."""

    text: str
    kind: Kind
    answers: tuple[str, ...] = ()
    """Of a closed one, each of them right; empty where it names none."""
    category: str = ""
    tokens: int | None = None
    """Of an answer at most; None: as the command says."""
    samples: int | None = None
    """Answers that are drawn; None: as the command says for its kind."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One answer of a model."""

    model: str
    prompt: Prompt
    text: str
    how: tuple[tuple[str, str], ...] = ()
    """What its line says of `DRAWN`, as JSON texts."""


def committed_panel() -> list[Prompt]:
    """60 open prompts in five categories (creative, advice, numbers, names, opinions), and 40
    closed ones with their answers."""
    folder = Path(__file__).parent / "prompts"
    return [*read_prompts(folder / "open.jsonl"), *read_prompts(folder / "closed.jsonl")]


def read_prompts(path: Path) -> list[Prompt]:
    """The prompts of a file, in its order.

    Raises:
        DataError: a line is none, or two are the same.
    """
    prompts = [
        _prompt(line, where) for where, line in read_objects(path, "prompt", EXAMPLES["prompt"])
    ]
    twice = [key for key, n in Counter((one.kind, one.text) for one in prompts).items() if n > 1]
    if twice:
        raise DataError(f"{path}: the {twice[0][0]} prompt {twice[0][1]!r} stands there twice.")
    return prompts


def read_samples(path: Path, *, field: str = "text") -> list[Sample]:
    """The answers of a file, in its order.

    Args:
        field: what is measured of a line: `text`, or `thought`, which stood before it.

    Raises:
        DataError: there is none; a line is none; lines of one model were drawn in different ways,
            or give a prompt different right answers.
    """
    samples, first, how = [], {}, {}
    for where, line in read_objects(path, "sample", EXAMPLES["sample"]):
        model = text_of(line, "model", where)
        text = text_of(line, field, where, empty=True)
        prompt = _prompt(line, where)
        earlier = first.setdefault((prompt.kind, prompt.text), (where, prompt))
        if earlier[1].answers != prompt.answers:
            raise DataError(
                f"{where}: the right answer to {prompt.text!r} is {list(prompt.answers)}, and"
                f" {list(earlier[1].answers)} at {earlier[0]}. Write the same in both."
            )
        drawn = tuple((name, json.dumps(line[name])) for name in DRAWN if name in line)
        before = how.setdefault(model, (where, drawn))
        if before[1] != drawn:
            raise DataError(
                f"{where}: {model!r} was drawn with {_in_words(drawn)}, and at {before[0]} with"
                f" {_in_words(before[1])}. Give what is drawn in another way a model name of its"
                " own, or a file of its own."
            )
        samples.append(Sample(model, earlier[1], text, drawn))
    return samples


def how_drawn(samples: list[Sample]) -> dict[str, dict[str, object]]:
    """Of each model how its answers were drawn, as far as the file says; by name, in their
    order."""
    how = {sample.model: sample.how for sample in samples}
    return {name: {key: json.loads(value) for key, value in how[name]} for name in sorted(how)}


def _in_words(drawn: tuple[tuple[str, str], ...]) -> str:
    return ", ".join(f"{name} {value}" for name, value in drawn) or "nothing that it says"


def read_objects(path: Path, what: str, example: str) -> Iterator[tuple[str, dict]]:
    """Each line of a file as `PATH, line N`, and its object; empty lines are passed over.

    Args:
        what: a line is, in a word.
        example: of a line.

    Raises:
        ConfigError: there is no file.
        DataError: a line is no JSON object, or there is none.
    """
    if not path.exists():
        raise ConfigError(f"no file at {path}. Write the path of a .jsonl file of {what}s.")
    found = False
    for number, content in enumerate(read_bytes(path).split(b"\n"), start=1):
        if not content.strip():
            continue
        where = f"{path}, line {number}"
        try:
            line = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{where} is no JSON: {error}. Expected {example}.") from error
        if not isinstance(line, dict):
            raise DataError(f"{where}: got a {type(line).__name__}, expected {example}.")
        found = True
        yield where, line
    if not found:
        raise DataError(f"{path} is empty: it has no {what}. Expected lines as {example}.")


EXAMPLES = {
    "sample": (
        '{"model": "base", "prompt": "Name a fruit.", "kind": "open", "text": "An apple."}, and'
        ' "answer" where kind is "closed"'
    ),
    "prompt": '{"prompt": "Name a fruit.", "kind": "open"}, and "answer" where kind is "closed"',
}


def _prompt(line: dict, where: str) -> Prompt:
    kind = line.get("kind")
    if kind not in KINDS:
        raise DataError(f'{where}: "kind" is {kind!r}, expected "open" or "closed".')
    counts = {name: line.get(name) for name in ("tokens", "samples")}
    for name, count in counts.items():
        if count is not None and (type(count) is not int or count < 1):
            raise DataError(f'{where}: "{name}" is {count!r}, expected a number from 1 up.')
    category = line.get("category") or ""
    if not isinstance(category, str):
        raise DataError(f'{where}: "category" is {category!r}, expected a text.')
    answers = _answers(line.get("answer"), where) if kind == "closed" else ()
    return Prompt(text_of(line, "prompt", where), kind, answers, category, **counts)


def _answers(value: object, where: str) -> tuple[str, ...]:
    """One text, several, or none."""
    texts = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(text, str) and text.strip() for text in texts):
        raise DataError(f'{where}: "answer" is {value!r}, expected a text, or a list of texts.')
    return tuple(texts)


def text_of(line: dict, name: str, where: str, *, empty: bool = False) -> str:
    """A text of a line.

    Args:
        empty: whether it may be empty.

    Raises:
        DataError: there is none.
    """
    value = line.get(name)
    if not isinstance(value, str) or not (empty or value.strip()):
        got = f"is {value!r}" if name in line else "is missing"
        raise DataError(f'{where}: "{name}" {got}, expected a text.')
    return value
