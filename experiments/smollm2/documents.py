"""The documents of the experiment: single lines of GSM8K's solutions, and thoughts for some of them.

A line such as

    The total cost is $4 + $6 + $8 = $<<4+6+8=18>>18.

holds an expression of several operations and its result: between the context and the result lie
steps that the text does not write. Without a thought the model has to take them at once; the
thought that it is warmed up with takes them one by one:

    The total cost is $4 + $6 + $8 = <think>4+6=10 10+8=18</think>18.

Two spellings are made one, so that a marker of text finds the positions: " = " stands before the
result of an expression of two or more operations whose operands are all in the line and whose
result has at least two digits and is not in the line already; every other result has a plain "=" before it, and no sign of a
currency stands between either and the result.

Problems are dealt out by their number, so that no problem has lines in two files:
    warm_thoughts.jsonl  lines with a thought                  warm_plain.jsonl  the same without
    warm_single.jsonl    lines with other results only         train.jsonl       for the arms
    held_out.jsonl       for the gate and the panels           solutions.jsonl   other held-out lines
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path

ANNOTATION = re.compile(r"\s*=\s*[$€£¢]?\s*<<([^<>=]*)=([^<>]*)>>\s*")
NUMBER = re.compile(r"\d+")
TOKEN = re.compile(r"\d+|[-+*/()]")
POSITION, OTHER = " = ", "="

WARM_SHARE, TRAIN_SHARE = 0.5, 0.35
"""Of GSM8K's training problems; the rest, and its test problems, are held out."""


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


def write_documents(train: Path, test: Path, out: Path, markers: tuple[str, str]) -> dict[str, int]:
    """Make the files; how many lines each has.

    Args:
        train, test: GSM8K, as JSON lines with `question` and `answer`.
        out: folder that exists.
    """
    files: dict[str, list[str]] = {
        name: []
        for name in (
            *("warm_thoughts", "warm_plain", "warm_single"),
            *("train", "held_out", "solutions"),
        )
    }
    warm_below, train_below = 100 * WARM_SHARE, 100 * (WARM_SHARE + TRAIN_SHARE)
    for path, held_out in ((train, False), (test, True)):
        for number, row in enumerate(path.read_text(encoding="utf-8").splitlines()):
            lines = read_lines(json.loads(row)["answer"])
            place = number * 37 % 100  # 37 and 100 have no common divisor: every place is taken
            for line in lines:
                if held_out or place >= train_below:
                    files["held_out" if line.thought else "solutions"].append(line.plain)
                elif place < warm_below and line.thought:
                    files["warm_plain"].append(line.plain)
                    files["warm_thoughts"].append(line.with_thought(*markers))
                elif place < warm_below:
                    files["warm_single"].append(line.plain)
                elif line.thought:
                    files["train"].append(line.plain)
    for name, texts in files.items():
        text = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)
        (out / f"{name}.jsonl").write_text(text, encoding="utf-8")
    return {name: len(texts) for name, texts in files.items()}
