"""Pairs of a right and a wrong trace after the same prompt, from traces that were judged.

    {"prompt": ..., "chosen": ..., "rejected": ..., "reasons": ["wrong", ...], "lines": [3, 7]}

The chosen is a trace that is kept, the rejected one that is wrong, whatever else is held against
it; `reasons` has it all, and `lines` says where the two come from. Every different wrong trace is
the rejected of one pair; the kept ones of its prompt take turns as the chosen. TRL's trainers read
such a line as it is.

What is held of a trace while they stream is its place in the files that are written, and a
checksum; the texts are read again from there.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from rlp.config import ConfigError
from rlp.process.files import open_to_read


@dataclass(frozen=True, slots=True)
class PairCounts:
    """What became of the prompts."""

    pairs: int
    without_wrong: int
    """Prompts whose traces are all right, or were dropped for other reasons."""
    without_right: int
    """Prompts of which no trace is kept; some are wrong."""
    same: int
    """Wrong traces that the words of another one of their prompt are, or of a kept one."""

    def in_words(self) -> str:
        return (
            f"{self.pairs:,} pairs; prompts without a wrong trace {self.without_wrong:,}, without a"
            f" kept one {self.without_right:,}; wrong traces that were there already {self.same:,}"
        )


@dataclass(slots=True)
class _Prompt:
    """Places in kept.jsonl and dropped.jsonl: where a line begins, and the trace's line."""

    kept: list[tuple[int, int]] = field(default_factory=list)
    wrong: list[tuple[int, int, bytes]] = field(default_factory=list)
    """With a checksum of prompt and trace."""


class Pairing:
    """Takes traces one by one, and then gives their pairs."""

    def __init__(self) -> None:
        self._prompts: dict[bytes, _Prompt] = {}
        self._words: dict[bytes, bool] = {}  # of a wrong trace False, of a kept one True
        self._same = 0

    def add_other(self, prompt: bytes) -> None:
        """A trace that is right, and not kept."""
        self._prompts.setdefault(prompt, _Prompt())

    def add_kept(self, prompt: bytes, words: bytes, place: int, line: int) -> None:
        """A trace that stands at this place of kept.jsonl.

        Args:
            prompt: a checksum of its prompt.
            words: a checksum of prompt and trace.
            line: of the source.
        """
        self._words[words] = True
        self._prompts.setdefault(prompt, _Prompt()).kept.append((place, line))

    def add_wrong(self, prompt: bytes, words: bytes, place: int, line: int) -> None:
        """A wrong trace that stands at this place of dropped.jsonl."""
        of_prompt = self._prompts.setdefault(prompt, _Prompt())
        if words in self._words:
            self._same += 1
            return
        self._words[words] = False
        of_prompt.wrong.append((place, line, words))

    def finish(self) -> PairCounts:
        """No trace comes any more; what became of all."""
        for one in self._prompts.values():
            before = len(one.wrong)
            one.wrong = [trace for trace in one.wrong if not self._words[trace[2]]]
            self._same += before - len(one.wrong)
        prompts = self._prompts.values()
        return PairCounts(
            pairs=sum(len(one.wrong) for one in prompts if one.kept),
            without_wrong=sum(not one.wrong for one in prompts),
            without_right=sum(not one.kept for one in prompts if one.wrong),
            same=self._same,
        )

    def pairs(self, kept: Path, dropped: Path) -> Iterator[dict]:
        """In the order of the prompts, and of the wrong traces of each.

        Args:
            kept: the file that the places of `add_kept` are in; `dropped` likewise.
        """
        with open_to_read(kept) as right, open_to_read(dropped) as wrong:
            for one in self._prompts.values():
                for index, (place, line, _) in enumerate(one.wrong if one.kept else ()):
                    chosen_place, chosen_line = one.kept[index % len(one.kept)]
                    chosen, rejected = _read(right, chosen_place), _read(wrong, place)
                    yield {
                        "prompt": chosen["prompt"],
                        "chosen": chosen["completion"],
                        "rejected": rejected["completion"],
                        "reasons": rejected["reasons"],
                        "lines": [chosen_line, line],
                    }


def _read(file: BinaryIO, place: int) -> dict:
    file.seek(place)
    return json.loads(file.readline())


def refuse_no_pair(counts: PairCounts, source: Path) -> None:
    """
    Raises:
        ConfigError: not one pair came out.
    """
    if counts.pairs == 0:
        raise ConfigError(
            f"{source} gives no pair for --pairs: {counts.without_wrong:,} of its prompts have no"
            f" wrong trace, and {counts.without_right:,} wrong ones only. Nothing was written:"
            " leave --pairs out for the kept traces alone, or sample more of each prompt."
        )
