"""The results of an experiment: one JSON line for each arm, seed, stage and reading of the model.

A line is identified by some of the names in `IDENTITY`, the same for all lines of a file, and holds
figures. A layout says which. Lines are added and never changed: what stands twice, lacks a name, or
has one that the layout does not know is refused, with its number.

Which arms and seeds an experiment is to have is known to the experiment; `missing` says in one
message what is not there yet, and `claim` writes the sentence that the exact paired test allows.
"""

import difflib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rlp.config import ConfigError
from rlp.measure.paired import Difference, claim_in_words, compare
from rlp.process.files import append, read_bytes
from rlp.process.json_files import refuse_non_finite
from rlp.process.run_logs import read_json_lines
from rlp.process.schemas import AMOUNT, COUNT, NAME, NUMBER, STEP, Maybe, Schema

IDENTITY: dict[str, Schema] = {
    "arm": NAME,
    "seed": COUNT,
    "stage": NAME,
    "stage_step": STEP,
    "panel": NAME,
    "temperature": AMOUNT,
}
"""What a line can be identified by. A temperature is that of the thoughts."""


@dataclass(frozen=True, slots=True)
class Layout:
    """What the lines of a results file hold."""

    identity: tuple[str, ...]
    """Of `IDENTITY`; `arm` and `seed` are among them. No two lines agree in all of them."""
    figures: tuple[str, ...]
    """Numbers that every line has; null where one was not measured."""
    others: dict[str, Schema] = field(default_factory=dict)
    """What a line may hold beside them, such as a curve."""

    def problem(self, line: dict) -> str | None:
        """Why a line is not of this layout, in words that follow its place; None where it is."""
        schemas = {name: IDENTITY[name] for name in self.identity}
        schemas |= dict.fromkeys(self.figures, Maybe(NUMBER))
        if lacking := [name for name in schemas if name not in line]:
            return f"has no {', '.join(lacking)}"
        schemas |= self.others
        for name, value in line.items():
            if name not in schemas:
                nearest = difflib.get_close_matches(name, schemas, n=1, cutoff=0.0)[0]
                return f"has an unknown {name!r}. Did you mean {nearest!r}?"
            if said := schemas[name].problem(value, name):
                return f"has a wrong value: {said}"
        return None

    def key(self, line: dict) -> tuple:
        return tuple(line[name] for name in self.identity)

    def in_words(self, key: tuple) -> str:
        """An identity: arm rlp, seed 3, stage sft."""
        return ", ".join(f"{name} {value}" for name, value in zip(self.identity, key))


@dataclass(frozen=True, slots=True)
class Results:
    """Lines of a results file, all of them or those of a selection."""

    path: Path
    layout: Layout
    lines: tuple[dict, ...]

    def where(self, **identity: object) -> "Results":
        """Those with these values, such as `stage="sft", temperature=1.0`. There may be none."""
        self._known(identity)
        lines = [line for line in self.lines if all(line[k] == v for k, v in identity.items())]
        return Results(self.path, self.layout, tuple(lines))

    def has(self, **identity: object) -> bool:
        """Whether a line is there: whoever continues an experiment skips what it has."""
        return bool(self.where(**identity).lines)

    def values(self, name: str) -> list:
        """Different values of one name of the identity, in the order of their first line."""
        self._known({name: None})
        return list(dict.fromkeys(line[name] for line in self.lines))

    def by_seed(self, arm: str, figure: str) -> dict[int, float]:
        """A figure of an arm, where it was measured.

        Raises:
            ConfigError: a seed has several lines; `where` has to choose among them.
        """
        found: dict[int, float] = {}
        seen: dict[int, dict] = {}
        for line in self.where(arm=arm).lines:
            if line["seed"] in seen:
                one, other = (
                    self.layout.in_words(self.layout.key(x)) for x in (seen[line["seed"]], line)
                )
                raise ConfigError(
                    f"{self.path}: two lines for one seed: {one}; and {other}. Choose one with"
                    " where(...)."
                )
            seen[line["seed"]] = line
            if line[figure] is not None:
                found[line["seed"]] = line[figure]
        return found

    def missing(self, arms: Sequence[str], seeds: Sequence[int]) -> str:
        """The arms and seeds without a line here, in one sentence; empty where all have one."""
        there = {(line["arm"], line["seed"]) for line in self.lines}
        lacking = {arm: [seed for seed in seeds if (arm, seed) not in there] for arm in arms}
        said = [
            f"{arm} (all {len(seeds)} seeds)"
            if len(absent) == len(seeds)
            else f"{arm} (seed{'s' * (len(absent) > 1)} {', '.join(map(str, absent))})"
            for arm, absent in lacking.items()
            if absent
        ]
        return f"{self.path} has no line of {'; '.join(said)}." if said else ""

    def require(self, arms: Sequence[str], seeds: Sequence[int]) -> None:
        """Refuse to go on without them.

        Raises:
            ConfigError: as `missing` says.
        """
        if said := self.missing(arms, seeds):
            raise ConfigError(f"{said} Run the experiment again: it makes what is missing.")

    def compare(self, reference: str, arms: Sequence[str], figure: str) -> tuple[Difference, ...]:
        """A reference arm against a family of arms by one figure (`rlp.measure.paired`)."""
        return compare(
            self.by_seed(reference, figure), {arm: self.by_seed(arm, figure) for arm in arms}
        )

    def claim(self, reference: str, arms: dict[str, str], figure: str) -> str:
        """The sentence that the test allows.

        Args:
            arms: names of the family in words, the reference's among them or not.
        """
        family = [arm for arm in arms if arm != reference]
        return claim_in_words(
            arms.get(reference, reference), self.compare(reference, family, figure), arms
        )

    def _known(self, identity: dict[str, object]) -> None:
        if unknown := [name for name in identity if name not in self.layout.identity]:
            raise ValueError(
                f"{', '.join(unknown)}: lines of {self.path.name} are identified by"
                f" {', '.join(self.layout.identity)}."
            )


def read_results(path: Path, layout: Layout) -> Results:
    """All lines of a file, checked; a file that is not there has none.

    Raises:
        ConfigError: a line that is not of the layout, or stands there twice.
        DamagedFileError: a line before the last is no JSON object.
    """
    path = Path(path)
    lines = read_json_lines(path) if path.exists() else []
    first: dict[tuple, int] = {}
    for number, line in enumerate(lines, start=1):
        if said := layout.problem(line):
            raise ConfigError(f"{path}, line {number} {said}. Mend or remove the line.")
        key = layout.key(line)
        if key in first:
            raise ConfigError(
                f"{path}, line {number} is of {layout.in_words(key)}, as line {first[key]} is."
                " Remove one of them."
            )
        first[key] = number
    return Results(path, layout, tuple(lines))


def add_result(path: Path, layout: Layout, line: dict) -> None:
    """`add_results` of one line."""
    add_results(path, layout, [line])


def add_results(path: Path, layout: Layout, lines: Sequence[dict]) -> None:
    """Add lines, all at once; what is there stays as it is, but for half a line that a crash has
    left.

    Raises:
        ConfigError: one is not of the layout, or the file has a line of its identity.
    """
    results = read_results(path, layout)
    there = {layout.key(line) for line in results.lines}
    for line in lines:
        if said := layout.problem(line):
            raise ConfigError(f"{path}: the line to be added {said}.")
        refuse_non_finite(line, Path(path).name)
        if layout.key(line) in there:
            raise ConfigError(
                f"{path} has a line of {layout.in_words(layout.key(line))} already, and none is"
                " written over."
            )
        there.add(layout.key(line))
    content = read_bytes(results.path) if results.path.exists() else b""
    good = content.rfind(b"\n") + 1
    new = "".join(json.dumps(line, allow_nan=False) + "\n" for line in lines).encode()
    if good < len(content) and len(results.lines) > content.count(b"\n"):
        good, new = len(content), b"\n" + new  # the last line is whole, and nobody ended it
    append(results.path, new, point="results.torn_line", size=good)
