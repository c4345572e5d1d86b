"""The documents of the experiment: single lines of GSM8K's solutions, and thoughts for some.

A line such as

    The total cost is $4 + $6 + $8 = $<<4+6+8=18>>18.

holds an expression of several operations and its result: between the context and the result lie
steps that the text does not write. Without a thought the model has to take them at once; the
thought that it is warmed up with takes them one by one:

    The total cost is $4 + $6 + $8 = <think>4+6=10 10+8=18</think>18.

Two spellings are made one, so that a marker of text finds the positions: " = " stands before the
result of an expression of two or more operations, if its operands are all in the line, and the
result, of at least two digits, is not there already; every other result has a plain "=" before it.
No sign of a currency stands between either and the result.

Problems are dealt out by their number, so that no problem has lines in two parts:
    warm_thoughts.jsonl  lines with a thought         warm_plain.jsonl  the same lines without
    train.jsonl          for the arms
    held_out.jsonl       for gate and panels          solutions.jsonl   held-out lines of any kind
    other_text.jsonl     text of another kind: what numpy says of its functions
"""

import inspect
import json
import re
from dataclasses import dataclass
from pathlib import Path

from rlp.config import DataConfig
from rlp.data.sources import open_rows
from rlp.process.files import new_folder, write_new

ANNOTATION = re.compile(r"\s*=\s*[$€£¢]?\s*<<([^<>=]*)=([^<>]*)>>\s*")
NUMBER = re.compile(r"\d+")
TOKEN = re.compile(r"\d+|[-+*/()]")
POSITION, OTHER = " = ", "="

WARM_PERCENT, TRAIN_PERCENT = 50, 35
"""Of GSM8K's training problems; the rest, and all test problems, are held out."""

FILES = ("warm_thoughts", "warm_plain", "train", "held_out", "solutions", "other_text")

RECORD = "documents.json"
"""In the folder: how many documents each file has."""

PARAGRAPH_CHARACTERS = (80, 600)
"""Shortest and longest paragraph of `other_text.jsonl`."""


def steps(expression: str) -> list[str] | None:
    """The steps that work out an expression of whole numbers, `a+b=c` each, in the order of
    arithmetic; None where one of them leaves the whole numbers from 0 on.

    A fraction of a number is taken as people do: 3/4*24 is 24/4=6 6*3=18.
    """
    expression = _as_people_do(expression.replace(" ", ""))
    tokens = TOKEN.findall(expression)
    if "".join(tokens) != expression:
        return None
    taken: list[str] = []
    try:
        left = _sum(tokens, taken)
    except (ValueError, IndexError):
        return None
    return taken if left is not None and not tokens else None


def _as_people_do(expression: str) -> str:
    if match := re.fullmatch(r"(\d+)/(\d+)\*(\d+)", expression):
        over, under, whole = match.groups()
    elif match := re.fullmatch(r"(\d+)\*(\d+)/(\d+)", expression):
        whole, over, under = match.groups()
    else:
        return expression
    return f"{whole}/{under}" if over == "1" else f"{whole}/{under}*{over}"


def _sum(tokens: list[str], taken: list[str]) -> int:
    value = _product(tokens, taken)
    while tokens and tokens[0] in "+-":
        value = _step(value, tokens.pop(0), _product(tokens, taken), taken)
    return value


def _product(tokens: list[str], taken: list[str]) -> int:
    value = _operand(tokens, taken)
    while tokens and tokens[0] in "*/":
        value = _step(value, tokens.pop(0), _operand(tokens, taken), taken)
    return value


def _operand(tokens: list[str], taken: list[str]) -> int:
    token = tokens.pop(0)
    if token != "(":
        return int(token)
    value = _sum(tokens, taken)
    if tokens.pop(0) != ")":
        raise ValueError("a bracket stays open")
    return value


def _step(left: int, operation: str, right: int, taken: list[str]) -> int:
    if operation == "/":
        result, rest = divmod(left, right) if right else (0, 1)
        if rest:
            raise ValueError("no whole number")
    else:
        result = {"+": left + right, "-": left - right, "*": left * right}[operation]
    if result < 0:
        raise ValueError("below 0")
    taken.append(f"{left}{operation}{right}={result}")
    return result


@dataclass(frozen=True, slots=True)
class Line:
    """A line of a solution."""

    before: str
    """Up to the position, " = " included; the whole line where it has no position."""
    thought: str
    """The steps; empty where there is no position."""
    after: str
    """From the result on, with the end of the line."""

    @property
    def plain(self) -> str:
        return self.before + self.after

    def with_thought(self, open_marker: str, close_marker: str) -> str:
        return f"{self.before}{open_marker}{self.thought}{close_marker}{self.after}"


def read_lines(answer: str) -> list[Line]:
    """The lines of a solution. One with several positions is cut after the first of them."""
    text = answer.split("\n####")[0]
    return [_read_line(line) for line in text.splitlines() if line.strip()]


def _read_line(line: str) -> Line:
    written = ""
    end = 0
    for match in ANNOTATION.finditer(line):
        written += _without_annotations(line[end : match.start()])
        end = match.end()
        thought = _thought_of(match.group(1), match.group(2).strip(), written, line[end:])
        if thought:
            rest = _without_annotations(ANNOTATION.sub(OTHER, line[end:]))
            return Line(written + POSITION, thought, rest + "\n")
        written += OTHER
    return Line(written + _without_annotations(line[end:]) + "\n", "", "")


def _without_annotations(text: str) -> str:
    """Text in which no annotation is left, and no " = " but those that are put there."""
    return re.sub(r"\s+=\s+", OTHER, re.sub(r"<<[^<>]*>>", "", text))


def _thought_of(expression: str, result: str, written: str, rest: str) -> str:
    """The steps of an expression; empty where its result is no position."""
    taken = steps(expression)
    if not taken or len(taken) < 2 or len(result) < 2 or not result.isdecimal():
        return ""
    shown = set(NUMBER.findall(written))
    is_there = rest.startswith(result) and not rest[len(result) :][:1].isdecimal()
    if not is_there or taken[-1].partition("=")[2] != result:
        return ""
    can_be_taken = set(NUMBER.findall(expression)) <= shown and result not in shown
    return " ".join(taken) if can_be_taken else ""


def write_documents(source: str, out: Path, markers: tuple[str, str]) -> dict[str, int]:
    """Make the folder, where it is not there.

    Args:
        source: GSM8K: `hub:openai/gsm8k@main`, or a folder with its train.jsonl and test.jsonl.
        markers: open and close marker.

    Returns:
        documents by file.

    Raises:
        DataError: the problems can not be read.
    """
    if (out / RECORD).is_file():
        return json.loads((out / RECORD).read_text(encoding="utf-8"))
    files: dict[str, list[str]] = {name: [] for name in FILES}
    for split in ("train", "test"):
        for number, answer in enumerate(_answers(source, split)):
            _deal(files, read_lines(answer), part_of(split, number), markers)
    files["other_text"] = docstrings()
    counts = {name: len(texts) for name, texts in files.items()}

    out.parent.mkdir(parents=True, exist_ok=True)
    with new_folder(out, point="world.before_rename") as new:
        for name, texts in files.items():
            rows = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)
            write_new(new / f"{name}.jsonl", rows.encode(), point="world.torn_file")
        write_new(new / RECORD, json.dumps(counts).encode(), point="world.torn_file")
    return counts


def _answers(source: str, split: str) -> list[str]:
    name = source if source.startswith("hub:") else str(Path(source) / f"{split}.jsonl")
    rows = open_rows([name], DataConfig(train=[name]), split, "--gsm8k")
    return ["{answer}".format_map(rows.read(index)) for index in range(len(rows))]


def part_of(split: str, number: int) -> str:
    """Which part a problem belongs to: warm, train or held_out."""
    place = number * 37 % 100  # 37 and 100 have no common divisor: every place is taken
    if split == "test" or place >= WARM_PERCENT + TRAIN_PERCENT:
        return "held_out"
    return "warm" if place < WARM_PERCENT else "train"


def _deal(
    files: dict[str, list[str]], lines: list[Line], part: str, markers: tuple[str, str]
) -> None:
    """Put the lines of a solution where they belong."""
    if part == "held_out":
        files["solutions"] += [line.plain for line in lines]
    thoughtful = [line for line in lines if line.thought]
    files["warm_plain" if part == "warm" else part] += [line.plain for line in thoughtful]
    if part == "warm":
        files["warm_thoughts"] += [line.with_thought(*markers) for line in thoughtful]


def docstrings() -> list[str]:
    """Paragraphs of prose from what numpy says of its functions, in the order of their names."""
    import numpy

    shortest, longest = PARAGRAPH_CHARACTERS
    found: dict[str, None] = {}
    for name in sorted(numpy.__all__):
        said = inspect.getdoc(getattr(numpy, name)) or ""
        for paragraph in said.split("\n\n"):
            text = " ".join(paragraph.split())
            is_prose = text[:1].isupper() and text.endswith(".") and ">>>" not in text
            if is_prose and "---" not in text and shortest <= len(text) <= longest:
                found[text + "\n"] = None
    return list(found)
