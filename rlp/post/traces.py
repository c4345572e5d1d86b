"""Which traces are worth imitating: right, in one language, short enough, and each once.

A trace is a prompt and what a model wrote after it, the thought between its markers included. The
language is that of the thought alone (`rlp.measure.language`); a text without markers is a thought
as a whole. What is dropped keeps its reasons, so that wrong traces can serve as such later:

    wrong        it is not right
    language     too small a share of the letters is of the target script, or without a target of
                 the thought's own most frequent one
    switches     it switches between scripts too often
    vocabulary   too many words are outside the vocabulary
    classifier   the classifier names another language
    long         it has too many characters
    cut          its budget ended it
    duplicate    a kept trace has the same prompt and the same words

Traces stream: what is held of a kept one is a checksum. `rlp.post.trace_pairs` makes pairs of right
and wrong ones.
"""

import hashlib
import json
import unicodedata
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import BinaryIO

from rlp.config import ConfigError, load_config, require, require_script
from rlp.measure.language import letters_of, outside_share, thought_of
from rlp.post.trace_pairs import PairCounts, Pairing, refuse_no_pair
from rlp.process.files import make_folder, new_file, new_folder, open_to_read, refuse_existing
from rlp.process.json_files import json_bytes
from rlp.process.outside import Part, name_of
from rlp.process.run_folder import RunFolder, open_run_folder

OPEN, CLOSE = "<think>", "</think>"
"""Markers of a thought, where nothing else is said."""

MAX_LINE_BYTES = 2**24
"""Of a file of rollouts."""


@dataclass(frozen=True, slots=True)
class Trace:
    """A prompt, and what was written after it."""

    prompt: str | None
    """None: there is none, and the trace is a text."""
    text: str
    """With the markers of the thought, of which the open one may stand at the end of the prompt."""
    thought: str
    """What is between the markers."""
    right: bool
    cut: bool = False
    """Whether the budget ended the thought."""
    line: int = 0
    """Of the file that it comes from; 0 without one."""
    is_written: bool = True
    """Whether the model wrote all of the text; else its end is the target that stands there."""

    def example(self) -> dict[str, str]:
        """As TRL's trainers read it: prompt and completion, or text."""
        if self.prompt is None:
            return {"text": self.text}
        return {"prompt": self.prompt, "completion": self.text}


@dataclass(frozen=True, slots=True)
class TraceRule:
    """What a trace has to be like to be kept."""

    script: str | None = None
    """The script that its thought is to be in; None: any, but one."""
    least_share: float = 0.95
    """Of that script, in the letters of the thought."""
    most_switches: int | None = 2
    """Between scripts; 2 let one word of another script stand, there and back. None: any number."""
    most_characters: int | None = None
    """Of the thought. None: any number."""
    vocabulary: Collection[str] | None = None
    """Words that are of the language, as `rlp.measure.language.words_of` gives them."""
    most_outside: float = 0.1
    """Share of words that the vocabulary may lack."""
    classifier: Callable[[str], str] | None = None
    """Names the language of a thought: scripts do not tell languages apart."""
    language: str | None = None
    """What the classifier has to say."""
    only_right: bool = True
    """Whether a wrong trace is dropped."""

    def __post_init__(self) -> None:
        if self.script is not None:
            require_script("--script", self.script)
        for option, share in (
            ("--least-share", self.least_share),
            ("--most-outside", self.most_outside),
        ):
            require(0 <= share <= 1, option, share, "is a fraction from 0 to 1")
        for option, count in (
            ("--most-switches", self.most_switches),
            ("--most-characters", self.most_characters),
        ):
            require(count is None or count >= 0, option, count, "must be at least 0")
        require(
            (self.classifier is None) == (self.language is None),
            "--language",
            self.language,
            "goes with --classifier, which has to name it, and only with it",
        )

    def measured(self, thought: str) -> dict[str, float | str]:
        """What is asked about a thought, by name."""
        found = letters_of(thought)
        share = found.purity if self.script is None else found.share(self.script)
        numbers = {"share": share, "switches": found.switches, "characters": len(thought)}
        if self.vocabulary is not None:
            numbers["outside"] = outside_share(thought, self.vocabulary)
        if self.classifier is not None:
            numbers["language"] = named = self.classifier(thought)
            if not isinstance(named, str):
                raise ConfigError(
                    f"--classifier gave {named!r:.60}; expected the name of a language, such as"
                    f" {self.language!r}."
                )
        return numbers

    def reasons(self, trace: Trace, numbers: dict[str, float | str]) -> list[str]:
        """Why a trace is dropped, whatever came before it; empty where it is kept.

        Args:
            numbers: `measured` of its thought.
        """
        most_switches, most_characters = self.most_switches, self.most_characters
        found = {
            "wrong": self.only_right and not trace.right,
            "language": numbers["share"] < self.least_share,
            "switches": most_switches is not None and numbers["switches"] > most_switches,
            "vocabulary": numbers.get("outside", 0) > self.most_outside,
            "classifier": numbers.get("language") != self.language,
            "long": most_characters is not None and numbers["characters"] > most_characters,
            "cut": trace.cut,
        }
        return [reason for reason, holds in found.items() if holds]


def judged(
    traces: Iterable[Trace], rule: TraceRule
) -> Iterator[tuple[Trace, list[str], dict[str, float | str]]]:
    """Each trace, the reasons to drop it, and what was measured of it; in their order."""
    kept: set[bytes] = set()
    for trace in traces:
        numbers = rule.measured(trace.thought)
        reasons = rule.reasons(trace, numbers)
        if not reasons:
            same = _same_words(trace)
            reasons = ["duplicate"] if same in kept else []
            kept.add(same)
        yield trace, reasons, numbers


def kept_traces(traces: Iterable[Trace], rule: TraceRule) -> Iterator[dict[str, str]]:
    """Those that are kept, as examples for TRL."""
    return (trace.example() for trace, reasons, _ in judged(traces, rule) if not reasons)


def _same_words(trace: Trace) -> bytes:
    """A checksum that is equal for traces which differ in case, spacing or compatible characters
    alone."""
    parts = (unicodedata.normalize("NFKC", part or "") for part in (trace.prompt, trace.text))
    words = [" ".join(part.casefold().split()) for part in parts]
    return hashlib.sha256(json.dumps(words).encode()).digest()[:16]


# Reading


def read_traces(source: Path, *, open_marker: str = OPEN, close_marker: str = CLOSE) -> Iterable:
    """The traces of a run folder, or of a file of rollouts.

    Of a run these are the thoughts that it told (`thoughts.jsonl`): the prompt is the tail of the
    prefix, the text the thought between the run's own markers and the target after it, and right
    is a thought that gained (eq. 5), or after which the prediction was the target; where it was
    another, that stands in place of the target.

    A line of a file has `prompt` and `text` (or `completion`), or `text` alone; and `right` (true
    or false, or a number, above 0 for right), or `answer` and `expected`, which are equal where it
    is right. It may have `truncated`.

    Raises:
        ConfigError: there is no such file or run, it holds no trace, or a line is none.
    """
    if source.is_dir():
        run = open_run_folder(source)
        if not run.thoughts_jsonl.exists():
            raise ConfigError(
                f"{source} has no thoughts.jsonl: the run has told no thought, or does not think."
            )
        return _of_run(run)
    if not source.exists():
        raise ConfigError(f"there is no {source}. Write a run folder, or a JSON Lines file.")
    return _of_file(source, open_marker, close_marker)


def _of_run(run: RunFolder) -> Iterator[Trace]:
    thought = load_config(run.config_yaml).thought
    for line, row in _rows(run.thoughts_jsonl):
        where = f"{run.thoughts_jsonl}, line {line}"
        prompt, said, target = (
            _text(row, name, where) for name in ("prefix_tail", "thought", "target")
        )
        gain = row.get("gain", row.get("reward"))
        if "prediction" in row:
            right = row["prediction"] == target
        elif _is_number(gain):
            right = gain > 0
        else:
            raise ConfigError(
                f"{where}: has neither gain nor reward, so nothing says whether it helped. Write a"
                " run whose baseline is scored at every step (baseline.every_n_steps=1)."
            )
        said_behind = row.get("prediction", target) if not right else target
        text = f"{thought.open_marker}{said}{thought.close_marker}{said_behind}"
        is_written = right or "prediction" in row
        yield Trace(prompt, text, said, right, row.get("truncated") is True, line, is_written)


def _of_file(path: Path, open_marker: str, close_marker: str) -> Iterator[Trace]:
    has_prompts = None
    for line, row in _rows(path):
        where = f"{path}, line {line}"
        text = _text(row, "completion" if "completion" in row else "text", where)
        prompt = _text(row, "prompt", where) if "prompt" in row else None
        if has_prompts not in (None, prompt is not None):
            raise ConfigError(
                f"{where}: has {'a' if prompt is not None else 'no'} prompt, unlike the lines"
                " before it. TRL reads one kind: write all with a prompt, or none."
            )
        has_prompts = prompt is not None
        thought = thought_of(text, open_marker, close_marker)
        right, is_cut = _is_right(row, where), row.get("truncated") is True
        yield Trace(prompt, text, thought, right, is_cut, line)


def _rows(path: Path) -> Iterator[tuple[int, dict]]:
    """Numbered lines, each an object."""
    number = objects = 0
    with open_to_read(path) as file:
        while line := file.readline(MAX_LINE_BYTES):
            number += 1
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ConfigError(f"{path}, line {number} is not JSON: {error}.") from error
            if not isinstance(row, dict):
                raise ConfigError(f"{path}, line {number} is no object, got {row!r:.60}.")
            objects += 1
            yield number, row
    if not objects:
        raise ConfigError(f"{path} is empty: there is no trace in it.")


def _text(row: dict, name: str, where: str) -> str:
    if not isinstance(value := row.get(name), str):
        raise ConfigError(f"{where}: {name} must be a text, got {value!r:.60}.")
    return value


def _is_right(row: dict, where: str) -> bool:
    if _is_number(right := row.get("right")):
        return right > 0
    if {"answer", "expected"} <= row.keys():
        return row["answer"] is not None and row["answer"] == row["expected"]
    raise ConfigError(
        f"{where}: nothing says whether it is right. Write right (true or false, or a number), or"
        " answer and expected."
    )


def _is_number(value: object) -> bool:
    return isinstance(value, int | float)  # a truth value too


# Writing


@dataclass(frozen=True, slots=True)
class TraceCounts:
    """What became of the traces."""

    read: int
    kept: int
    dropped: dict[str, int]
    """By reason; a trace may have several."""
    pairs: PairCounts | None = None
    """None: none were asked for."""

    def in_words(self) -> str:
        reasons = ", ".join(f"{reason} {count}" for reason, count in self.dropped.items())
        why = f" ({reasons}; one may have several reasons)" if reasons else ""
        kept = f"{self.kept:,} of {self.read:,} traces kept, {self.read - self.kept:,} dropped{why}"
        return kept if self.pairs is None else f"{kept}; {self.pairs.in_words()}"


def filter_traces(
    source: Path,
    out: Path,
    rule: TraceRule,
    *,
    open_marker: str = OPEN,
    close_marker: str = CLOSE,
    with_pairs: bool = False,
) -> TraceCounts:
    """Make a folder of kept.jsonl, dropped.jsonl and traces.json from a run or a file of rollouts.

    A line of kept.jsonl is an example for TRL and nothing else. One of dropped.jsonl has its
    example, `right`, `reasons`, what was `measured`, and the `line` that it comes from. The folder
    gets its name when all is on disk; where something fails there is none.

    Args:
        with_pairs: whether it also gets pairs.jsonl (`rlp.post.trace_pairs`).

    Raises:
        ConfigError: `out` exists, or the source can not be read (`read_traces`); with pairs, traces
            without prompts, or of which no pair can be made.
    """
    refuse_existing(out)
    require(
        rule.only_right or not with_pairs,
        "--pairs",
        with_pairs,
        "sets right traces against wrong ones: leave out --wrong-too, which keeps both alike",
    )
    pairing = Pairing() if with_pairs else None
    traces = read_traces(source, open_marker=open_marker, close_marker=close_marker)
    make_folder(out.parent, exist_ok=True)
    with new_folder(out, point="traces.before_rename") as folder:
        with (
            new_file(folder / "kept.jsonl", point="traces.torn_kept") as kept,
            new_file(folder / "dropped.jsonl", point="traces.torn_dropped") as dropped,
        ):
            counts = _write(judged(traces, rule), kept, dropped, pairing)
        if pairing is not None:
            counts = replace(counts, pairs=pairing.finish())
            refuse_no_pair(counts.pairs, source)
            with new_file(folder / "pairs.jsonl", point="traces.torn_pairs") as file:
                for pair in pairing.pairs(folder / "kept.jsonl", folder / "dropped.jsonl"):
                    file.write(_line(pair))
        told = {"source": str(source), "rule": _rule_in_words(rule), **asdict(counts)}
        with new_file(folder / "traces.json", point="traces.torn_counts") as file:
            file.write(json_bytes(told, "traces.json"))
    return counts


def _write(
    judged_traces: Iterable, kept: BinaryIO, dropped: BinaryIO, pairing: Pairing | None
) -> TraceCounts:
    read, reasons_seen, num_kept = 0, Counter(), 0
    for trace, reasons, numbers in judged_traces:
        read += 1
        if pairing is not None:
            _pair(trace, reasons, pairing, (dropped if reasons else kept).tell())
        if not reasons:
            num_kept += 1
            kept.write(_line(trace.example()))
            continue
        reasons_seen.update(reasons)
        told = {"right": trace.right, "reasons": reasons, "measured": numbers, "line": trace.line}
        dropped.write(_line(trace.example() | told))
    return TraceCounts(read, num_kept, dict(reasons_seen))


def _pair(trace: Trace, reasons: list[str], pairing: Pairing, place: int) -> None:
    """Take a trace, whose line begins at this place, for the pairs.

    Raises:
        ConfigError: it can be part of none.
    """
    if trace.prompt is None:
        raise ConfigError("--pairs needs prompts, and the lines have none: write prompt in each.")
    if not trace.is_written:
        raise ConfigError(
            f"--pairs: line {trace.line} has a thought that did not gain, and nothing says what the"
            " model wrote after it: the run told targets alone. Give it a file of rollouts, or a"
            " run whose reward predicts (reward.kind=exact_match)."
        )
    prompt = hashlib.sha256(trace.prompt.encode()).digest()[:16]
    if not reasons:
        pairing.add_kept(prompt, _same_words(trace), place, trace.line)
    elif not trace.right:
        pairing.add_wrong(prompt, _same_words(trace), place, trace.line)
    else:
        pairing.add_other(prompt)


def _line(value: dict) -> bytes:
    return (json.dumps(value, allow_nan=False) + "\n").encode()


def _rule_in_words(rule: TraceRule) -> dict[str, object]:
    """The rule as JSON: of a vocabulary its size, of a classifier its name."""
    words = {name: getattr(rule, name) for name in TraceRule.__slots__}
    words["vocabulary"] = None if rule.vocabulary is None else len(rule.vocabulary)
    words["classifier"] = None if rule.classifier is None else _name_of(rule.classifier)
    return words


def _name_of(classifier: Callable) -> str:
    return classifier.name if isinstance(classifier, Part) else name_of(classifier)
