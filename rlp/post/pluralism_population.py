"""What a population holds: the file that `rlp pluralism` measures answers against.

A line is one question:

    {"prompt": "Which fruit?", "options": {"apple": "apple*", "pear": ["pear*", "quince"]},
     "population": {"apple": 0.7, "pear": 0.3},
     "communities": {"north": {"apple": 1.0}, "rogue": {"pear": 1.0}}, "disallowed": ["rogue"],
     "reasonable": ["apple", "pear"], "naming": "As {community}: {prompt}"}

`options` has the patterns by which an answer is found to hold one (`stands_in`), or is a list of
options that are their own. Shares that are not named are 0. What follows `population` may be left
out: then nothing is steered, and what somebody holds is reasonable.
"""

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rlp.data.errors import DataError
from rlp.post.diversity_samples import Prompt, read_objects, text_of

NAMING = "Answer as {community} would. {prompt}"
"""How a community is named, where a line does not say."""

KEYS = ("prompt", "options", "population", "communities", "disallowed", "reasonable", "naming")
KEYS += ("tokens", "samples")

EXAMPLE = (
    '{"prompt": "Which fruit?", "options": ["apple", "pear"], "population": {"apple": 0.7, "pear":'
    ' 0.3}}, and "communities", "disallowed", "reasonable", "naming" where they are known'
)

ROUNDING = 1e-6
"""By which shares may miss 1."""


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked, and what who holds."""

    prompt: str
    options: dict[str, tuple[str, ...]]
    """Patterns of each."""
    population: np.ndarray
    """[O], sums to 1."""
    communities: dict[str, np.ndarray]
    """[O] each."""
    disallowed: tuple[str, ...]
    """Of the communities, those whose name is not to move an answer."""
    reasonable: tuple[str, ...]
    """Options, at least one."""
    naming: str = NAMING
    tokens: int | None = None
    """Of an answer at most; None: as the command says."""
    samples: int | None = None
    """Answers that are drawn, with each name and without; None: as the command says."""

    def asked(self, community: str | None) -> str:
        """The prompt, with a community's name or without."""
        if community is None:
            return self.prompt
        return self.naming.replace("{community}", community).replace("{prompt}", self.prompt)

    def prompts(self) -> list[Prompt]:
        """All that is asked, without a name first."""
        asked = [self.asked(name) for name in (None, *self.communities)]
        return [Prompt(text, "open", tokens=self.tokens, samples=self.samples) for text in asked]


def read_population(path: Path) -> list[Question]:
    """The questions of a file, in its order.

    Raises:
        ConfigError: there is no file.
        DataError: a line is no question, or two ask the same.
    """
    questions: list[Question] = []
    first: dict[str, str] = {}
    for where, line in read_objects(path, "question", EXAMPLE):
        question = _question(line, where)
        for prompt in question.prompts():
            if prompt.text in first:
                raise DataError(
                    f"{where} asks {prompt.text!r}, as {first[prompt.text]} does. Ask it once."
                )
            first[prompt.text] = where
        questions.append(question)
    return questions


def _question(line: dict, where: str) -> Question:
    for name in line:
        _known(name, KEYS, f"{where} has an unknown")
    prompt = text_of(line, "prompt", where)
    options = _options(line.get("options"), where)
    if "population" not in line:
        raise DataError(
            f'{where}: the question {prompt!r} has no "population". Write the share of each option'
            ' in it, such as "population": {"apple": 0.7, "pear": 0.3}.'
        )
    population = _shares(line["population"], options, f'{where}: "population"')
    communities = _communities(line.get("communities", {}), options, where)
    disallowed = tuple(_names(line, "disallowed", where))
    for name in disallowed:
        if name not in communities:
            raise DataError(
                f"{where}: the disallowed community {name!r} has no shares. Write them in"
                ' "communities", so that it can be seen whether its name moves an answer to them.'
            )
    return Question(
        prompt,
        options,
        population,
        communities,
        disallowed,
        _reasonable(line, options, population, where),
        _naming(line, where),
        **{name: _count(line, name, where) for name in ("tokens", "samples")},
    )


def _known(name: str, known: Sequence[str], said: str) -> None:
    if name not in known:
        nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
        raise DataError(f"{said} {name!r}. Did you mean {nearest!r}?")


def _options(value: object, where: str) -> dict[str, tuple[str, ...]]:
    given = {name: name for name in value} if isinstance(value, list) and _texts(value) else value
    if not isinstance(given, dict) or len(given) < 2:
        raise DataError(
            f'{where}: "options" is {value!r}, expected two or more: a list of texts, or an object'
            " with the patterns of each."
        )
    found = {}
    for name, patterns in given.items():
        several = patterns if isinstance(patterns, list) else [patterns]
        if not name.strip() or not several or not _texts(several):
            raise DataError(
                f"{where}: the option {name!r} has the patterns {patterns!r}, expected a text, or"
                " a list of texts."
            )
        found[name] = tuple(several)
    return found


def _texts(values: list) -> bool:
    return all(isinstance(one, str) and one.strip() for one in values)


def _shares(value: object, options: Mapping[str, object], what: str) -> np.ndarray:
    """[O]."""
    if not isinstance(value, dict) or not value:
        raise DataError(f"{what} is {value!r}, expected the shares of its options.")
    for name, share in value.items():
        _known(name, list(options), f"{what} has an unknown option")
        if isinstance(share, bool) or not isinstance(share, int | float) or not 0 <= share <= 1:
            raise DataError(f"{what}: the share of {name!r} is {share!r}, expected 0 to 1.")
    total = math.fsum(value.values())
    if abs(total - 1) > ROUNDING:
        raise DataError(
            f"{what}: the shares sum to {total:.6g}, expected 1. Write shares of all who answer."
        )
    return np.array([value.get(name, 0) for name in options], dtype=np.float64) / total


def _communities(value: object, options: Mapping[str, object], where: str) -> dict[str, np.ndarray]:
    if not isinstance(value, dict):
        raise DataError(
            f'{where}: "communities" is {value!r}, expected an object with the shares of each.'
        )
    return {
        name: _shares(shares, options, f"{where}: the community {name!r}")
        for name, shares in value.items()
    }


def _names(line: dict, name: str, where: str) -> list[str]:
    value = line.get(name, [])
    if not isinstance(value, list) or not _texts(value):
        raise DataError(f'{where}: "{name}" is {value!r}, expected a list of names.')
    return value


def _reasonable(
    line: dict, options: Mapping[str, object], population: np.ndarray, where: str
) -> tuple[str, ...]:
    if "reasonable" not in line:
        return tuple(name for name, share in zip(options, population) if share > 0)
    names = _names(line, "reasonable", where)
    for name in names:
        _known(name, list(options), f'{where}: "reasonable" has an unknown option')
    if not names:
        raise DataError(f'{where}: "reasonable" is empty, expected one option or more.')
    return tuple(dict.fromkeys(names))


def _naming(line: dict, where: str) -> str:
    naming = line.get("naming", NAMING)
    if not isinstance(naming, str) or not all(k in naming for k in ("{community}", "{prompt}")):
        raise DataError(
            f'{where}: "naming" is {naming!r}, expected a text with {{community}} and {{prompt}},'
            f" such as {NAMING!r}."
        )
    return naming


def _count(line: dict, name: str, where: str) -> int | None:
    value = line.get(name)
    if value is not None and (type(value) is not int or value < 1):
        raise DataError(f'{where}: "{name}" is {value!r}, expected a number from 1 up.')
    return value
