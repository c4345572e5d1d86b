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
    calibrate.jsonl      the same lines three times, as tokens: without a thought, with the right
                         one, and with one that slips, where the loss is on the result alone
    train.jsonl          for the arms
    held_out.jsonl       for gate and panels          solutions.jsonl   held-out lines of any kind
    other_text.jsonl     text of another kind: what numpy says of its functions
"""

import inspect
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random

from rlp.config import DataConfig
from rlp.data.sources import open_rows
from rlp.process.files import new_folder, write_new

ANNOTATION = re.compile(r"\s*=\s*[$€£¢]?\s*<<([^<>=]*)=([^<>]*)>>\s*")
NUMBER = re.compile(r"\d+")
TOKEN = re.compile(r"\d+|[-+*/()]")
POSITION, OTHER = " = ", "="

WARM_PERCENT, TRAIN_PERCENT = 50, 35
"""Of GSM8K's training problems; the rest, and all test problems, are held out."""

TEXTS = ("warm_thoughts", "warm_plain", "train", "held_out", "solutions", "other_text")
FILES = (*TEXTS, "calibrate")
"""Each a file of JSON lines."""

RECORD = "documents.json"
"""In the folder: how many documents each file has."""

PARAGRAPH_CHARACTERS = (80, 600)
"""Shortest and longest paragraph of `other_text.jsonl`."""


def steps(expression: str, slip: tuple[int, int] | None = None) -> list[str] | None:
    """The steps that work out an expression of whole numbers, `a+b=c` each, in the order of
    arithmetic; None where one of them leaves the whole numbers from 0 on.

    A fraction of a number is taken as people do: 3/4*24 is 24/4=6 6*3=18.

    Args:
        slip: index of a step, and what is wrongly added to its result.
    """
    expression = _as_people_do(expression.replace(" ", ""))
    tokens = TOKEN.findall(expression)
    if "".join(tokens) != expression:
        return None
    taken = _Taken([], slip)
    try:
        _sum(tokens, taken)
    except (ValueError, IndexError):
        return None
    return None if tokens else taken.steps


def _as_people_do(expression: str) -> str:
    if match := re.fullmatch(r"(\d+)/(\d+)\*(\d+)", expression):
        over, under, whole = match.groups()
    elif match := re.fullmatch(r"(\d+)\*(\d+)/(\d+)", expression):
        whole, over, under = match.groups()
    else:
        return expression
    return f"{whole}/{under}" if over == "1" else f"{whole}/{under}*{over}"


@dataclass(frozen=True, slots=True)
class _Taken:
    """The steps so far, and where one goes wrong."""

    steps: list[str]
    slip: tuple[int, int] | None

    def step(self, left: int, operation: str, right: int) -> int:
        """Take one; its result."""
        if operation == "/":
            result, rest = divmod(left, right) if right else (0, 1)
            if rest:
                raise ValueError("no whole number")
        else:
            result = {"+": left + right, "-": left - right, "*": left * right}[operation]
        if self.slip is not None and self.slip[0] == len(self.steps):
            result += self.slip[1]
        if result < 0:
            raise ValueError("below 0")
        self.steps.append(f"{left}{operation}{right}={result}")
        return result


def _sum(tokens: list[str], taken: _Taken) -> int:
    value = _product(tokens, taken)
    while tokens and tokens[0] in "+-":
        value = taken.step(value, tokens.pop(0), _product(tokens, taken))
    return value


def _product(tokens: list[str], taken: _Taken) -> int:
    value = _operand(tokens, taken)
    while tokens and tokens[0] in "*/":
        value = taken.step(value, tokens.pop(0), _operand(tokens, taken))
    return value


def _operand(tokens: list[str], taken: _Taken) -> int:
    token = tokens.pop(0)
    if token != "(":
        return int(token)
    value = _sum(tokens, taken)
    if tokens.pop(0) != ")":
        raise ValueError("a bracket stays open")
    return value


SLIPS = (1, -1, 2, -2, 10, -10, 9, -9, 20, 100, -100)
"""What a slip adds to the result of a step: a wrong digit, or a wrong carry."""


def with_slip(expression: str, random: Random) -> str:
    """Steps of which one goes wrong, and with it the result; empty where there are none."""
    right = steps(expression) or []
    slips = [(index, wrong) for index in range(len(right)) for wrong in SLIPS]
    random.shuffle(slips)
    for slip in slips:
        taken = steps(expression, slip)
        if taken and taken[-1].partition("=")[2] != right[-1].partition("=")[2]:
            return " ".join(taken)
    return ""


@dataclass(frozen=True, slots=True)
class Line:
    """A line of a solution."""

    before: str
    """Up to the position, " = " included; the whole line where it has no position."""
    thought: str
    """The steps; empty where there is no position."""
    after: str
    """From the result on, with the end of the line."""
    expression: str = ""
    """That the thought works out."""

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
            return Line(written + POSITION, thought, rest + "\n", match.group(1))
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


def write_documents(
    source: str, out: Path, markers: tuple[str, str], encode: Callable[[str], list[int]]
) -> dict[str, int]:
    """Make the folder, where it is not there.

    Args:
        source: GSM8K: `hub:openai/gsm8k@main`, or a folder with its train.jsonl and test.jsonl.
        markers: open and close marker.
        encode: tokens of a text.

    Returns:
        documents by file.

    Raises:
        DataError: the problems can not be read.
    """
    if (out / RECORD).is_file():
        return json.loads((out / RECORD).read_text(encoding="utf-8"))
    files: dict[str, list[dict]] = {name: [] for name in FILES}
    for split in ("train", "test"):
        for number, answer in enumerate(solutions(source, split)):
            for line in read_lines(answer):
                _deal(files, line, part_of(split, number), markers, encode)
    files["other_text"] = [{"text": text} for text in docstrings()]
    counts = {name: len(rows) for name, rows in files.items()}

    out.parent.mkdir(parents=True, exist_ok=True)
    with new_folder(out, point="world.before_rename") as new:
        for name, rows in files.items():
            text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            write_new(new / f"{name}.jsonl", text.encode(), point="world.torn_file")
        write_new(new / RECORD, json.dumps(counts).encode(), point="world.torn_file")
    return counts


def solutions(source: str, split: str) -> list[str]:
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
    files: dict[str, list[dict]],
    line: Line,
    part: str,
    markers: tuple[str, str],
    encode: Callable[[str], list[int]],
) -> None:
    """Put a line of a solution where it belongs."""
    if part == "held_out":
        files["solutions"].append({"text": line.plain})
    if not line.thought:
        return
    files["warm_plain" if part == "warm" else part].append({"text": line.plain})
    if part == "warm":
        files["warm_thoughts"].append({"text": line.with_thought(*markers)})
        files["calibrate"] += _three_times(line, markers, encode)


def _three_times(
    line: Line, markers: tuple[str, str], encode: Callable[[str], list[int]]
) -> list[dict]:
    """A line without a thought, with the right one, and with one that slips. After the last one the
    loss is on the result alone: what a wrong thought is worth is learned, and none is taught."""
    slipped, rows = with_slip(line.expression, Random(line.plain)), []
    for thought in ("", line.thought, *([slipped] if slipped else [])):
        head = line.before + (f"{markers[0]}{thought}{markers[1]}" if thought else "")
        text, start = head + line.after, len(encode(head))
        result = encode(NUMBER.match(line.after)[0])
        whole = {"tokens": encode(text), "text": text}
        span = [start, start + len(result)] if thought == slipped else [0, len(whole["tokens"])]
        rows.append(whole | {"loss_spans": [span]})
    return rows


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
