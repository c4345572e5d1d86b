"""Rows of Spectrum tuning (arXiv 2510.06084): many pairs of one task in one sequence.

    {"description": z, "pairs": [[x_1, y_1], [x_2, y_2], ...]}

becomes, with the frames of `RowFormat`, one sequence

    Description: z
    Input: x_1
    Output: y_1
    Output: y_2          where a pair has no input

The loss is on the outputs and the end behind each, and on nothing else. The description is dropped
with a probability; then nothing tells the task before the first output, which gets no loss.

Pieces are tokenized one by one and joined, so that the mask ends where an output ends whatever the
tokenizer would have merged, and an output has the same tokens in training and in scoring.

A row of one pair with its description is plain SFT on one draw at a time.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from rlp.config import ConfigError
from rlp.data.errors import DataError
from rlp.data.noise import SPECTRUM_DROP_NOISE, keyed_noise
from rlp.post.spectrum_tasks import draw_tasks, require_families
from rlp.process.files import make_folder, new_file, refuse_existing

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NO_LOSS = -100
"""The label of a token without loss, as of transformers."""

HOLE = "%s"
"""Where a description, or an input, goes. Braces are what a pipeline fills in."""

Answers = Literal["drawn", "mode"]


@dataclass
class RowFormat:
    """The texts around what a row holds."""

    description: str = "Description: %s\n"
    input: str = "Input: %s\n"
    output: str = "Output:"
    """Stands before every output, which follows after a space."""
    end: str = "\n"
    """Stands behind every output, and the model learns to write it."""

    def __post_init__(self) -> None:
        for name in ("description", "input"):
            frame = getattr(self, name)
            if HOLE not in frame:
                raise ConfigError(
                    f"format.{name} needs {HOLE} where the {name} goes, got {frame!r}."
                )
        for name in ("output", "end"):
            if not getattr(self, name):
                raise ConfigError(f"format.{name} must not be empty: an output has two ends.")


@dataclass(frozen=True, slots=True)
class Row:
    """Pairs of one task."""

    description: str
    pairs: tuple[tuple[str, str], ...]
    """Inputs, empty where the task has none, and outputs; at least one."""

    def to_json(self) -> dict:
        return {"description": self.description, "pairs": [list(pair) for pair in self.pairs]}


def row_of(value: Mapping, where: str) -> Row:
    """A row as a file has it.

    Raises:
        DataError: it is none; names `where`.
    """
    description, pairs = value.get("description"), value.get("pairs")
    if not isinstance(description, str) or not description.strip():
        raise DataError(f"{where}: description must be a text, got {description!r:.60}.")
    if not isinstance(pairs, Sequence) or isinstance(pairs, str) or not len(pairs):
        raise DataError(
            f"{where}: pairs must be a list of [input, output], at least one, got {pairs!r:.60}."
        )
    for pair in pairs:
        is_pair = isinstance(pair, Sequence) and not isinstance(pair, str) and len(pair) == 2
        if not is_pair or not all(isinstance(text, str) for text in pair) or not pair[1].strip():
            raise DataError(
                f"{where}: a pair must be [input, output], two texts, of which the input may be"
                f" empty, got {pair!r:.60}."
            )
    return Row(description, tuple((x, y) for x, y in pairs))


# Made of tasks


def make_rows(
    families: Sequence[str],
    count: int,
    *,
    pairs: int,
    told: float,
    answers: Answers = "drawn",
    seed: int = 0,
) -> Iterator[Row]:
    """Rows of tasks of these families (`draw_tasks`).

    Args:
        pairs: of each row.
        told: the share of rows whose description says which distribution it is.
        answers: drawn from it, or always the most likely one.

    Raises:
        ConfigError: an unknown family, or a number out of range.
    """
    require_families("families", families)
    for name, value, least in (("rows", count, 1), ("pairs", pairs, 1), ("seed", seed, 0)):
        if value < least:
            raise ConfigError(f"{name} must be at least {least}, got {value}.")
    if not 0 <= told <= 1:
        raise ConfigError(f"told is a fraction from 0 to 1, got {told:g}.")
    for task, noise in draw_tasks(families, count, told=told, seed=seed):
        drawn = task.draw(pairs, noise) if answers == "drawn" else task.modes(pairs, noise)
        yield Row(task.description, tuple(task.texts(drawn)))


def write_rows(path: Path, rows: Iterable[Row]) -> int:
    """A file of rows, one a line, and how many there are.

    Raises:
        ConfigError: the file is there.
    """
    refuse_existing(path)
    make_folder(path.parent, exist_ok=True)
    count = 0
    with new_file(path, point="spectrum.torn_rows") as file:
        for row in rows:
            file.write((json.dumps(row.to_json(), ensure_ascii=False) + "\n").encode())
            count += 1
    return count


# Tokens


class RowWriter:
    """The tokens of rows, piece by piece."""

    def __init__(
        self, tokenizer: "PreTrainedTokenizerBase", row_format: RowFormat | None = None
    ) -> None:
        """
        Args:
            row_format: None: the usual one.

        Raises:
            ConfigError: the tokenizer makes no token, or one for what it does not know, of a frame.
        """
        self._tokenizer, self._format = tokenizer, row_format or RowFormat()
        begin = tokenizer("").input_ids[:1]
        self._begin = begin if begin == [tokenizer.bos_token_id] else []
        self._lead, self._end = self._frame("output"), self._frame("end")

    def begin(self, description: str | None) -> list[int]:
        """Before the first pair; None where the description is dropped."""
        if description is None:
            return list(self._begin)
        return self._begin + self._ids(self._format.description.replace(HOLE, description))

    def ask(self, given: str) -> list[int]:
        """An input, empty where there is none, and what stands before its output."""
        if not given:
            return list(self._lead)
        return self._ids(self._format.input.replace(HOLE, given)) + self._lead

    def answer(self, output: str) -> list[int]:
        """An output and its end: the tokens with a loss."""
        return self._ids(f" {output}") + self._end

    def _frame(self, name: str) -> list[int]:
        try:
            return self._ids(getattr(self._format, name))
        except DataError as error:
            raise ConfigError(f"format.{name}: {error}") from error

    def _ids(self, text: str) -> list[int]:
        ids = self._tokenizer(text, add_special_tokens=False).input_ids
        unknown = self._tokenizer.unk_token_id
        if not ids or (unknown is not None and unknown in ids):
            came = "no token" if not ids else self._tokenizer.unk_token
            raise DataError(
                f"the tokenizer makes {came} of {text!r}. Write it in words that it knows."
            )
        return ids


def row_example(
    row: Row, writer: RowWriter, *, dropped: bool, max_tokens: int, where: str = "a row"
) -> dict[str, list[int]]:
    """A row as TRL's SFT trainer takes it: `input_ids`, and `labels` that are `NO_LOSS` on all but
    outputs and their ends. Of pairs that do not fit, whole ones are left out.

    Args:
        dropped: without the description, and without a loss on the first output.

    Raises:
        DataError: not one pair with a loss fits, or there is none.
    """
    ids = writer.begin(None if dropped else row.description)
    labels = [NO_LOSS] * len(ids)
    for number, (given, output) in enumerate(row.pairs):
        asked, answered = writer.ask(given), writer.answer(output)
        if len(ids) + len(asked) + len(answered) > max_tokens:
            break
        ids += asked + answered
        has_loss = number > 0 or not dropped
        labels += [NO_LOSS] * len(asked)
        labels += answered if has_loss else [NO_LOSS] * len(answered)
    if all(label == NO_LOSS for label in labels):
        raise DataError(
            f"{where}: no output with a loss fits into {max_tokens} tokens"
            f"{' behind the first, which has none without the description' * dropped}. Write more"
            " max_tokens, or shorter rows."
        )
    return {"input_ids": ids, "labels": labels}


def is_dropped(number: int, *, drop: float, seed: int) -> bool:
    """Whether row `number` loses its description."""
    noise = keyed_noise(seed=seed, purpose=SPECTRUM_DROP_NOISE, document=number)
    return bool(noise.random() < drop)


def row_examples(
    rows: Sequence[Row],
    tokenizer: "PreTrainedTokenizerBase",
    *,
    row_format: RowFormat | None = None,
    drop: float = 0.2,
    seed: int = 0,
    max_tokens: int = 1024,
) -> list[dict[str, list[int]]]:
    """A data set for TRL's SFT trainer, whose own collator pads it: `Dataset.from_list` of this.

    Args:
        drop: the probability that a description is dropped.
        seed: of that; a row's lot depends on the seed and its number alone.

    Raises:
        ConfigError: a drop out of range, or one above 0 with rows of one pair, which would have no
            loss at all.
        DataError: `row_example`.
    """
    refuse_drop(rows, drop)
    writer = RowWriter(tokenizer, row_format)
    return [
        row_example(
            row,
            writer,
            dropped=is_dropped(number, drop=drop, seed=seed),
            max_tokens=max_tokens,
            where=f"row {number + 1}",
        )
        for number, row in enumerate(rows)
    ]


def refuse_drop(rows: Sequence[Row], drop: float) -> None:
    """
    Raises:
        ConfigError: as `row_examples` says.
    """
    if not 0 <= drop < 1:
        raise ConfigError(f"drop is a probability from 0 on, below 1, got {drop:g}.")
    single = sum(len(row.pairs) == 1 for row in rows)
    if drop > 0 and single:
        raise ConfigError(
            f"drop: {single} of {len(rows)} rows have one pair, and without its description such a"
            " row has no loss. Write drop: 0, or rows of more pairs."
        )
