"""The language of a text, as far as its letters tell it: shares of scripts, switches between them,
words outside a vocabulary.

    share(script)  letters of the script / letters
    purity         letters of the most frequent family of scripts / letters
    switches       neighbouring letters of different families; what stands between is passed over
    outside        words that a vocabulary does not have / words

What has no script (`rlp.writing`) is neutral: it is no letter, and two letters around it are
neighbours. Han, Hiragana and Katakana are one family, so Japanese has no switches, and neither has
Japanese beside Chinese: a script is not a language. Who has to tell languages of one script apart
gives a classifier, a callable of a text that names its language.

A text without letters, such as an empty thought or one of digits, has a share of 1 of every script
and no switch: no letter of it is of another script, and what is said against is mixing, not
silence. `letters` says so where it matters.
"""

import unicodedata
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise

from rlp.config import ConfigError, require_script
from rlp.writing import family_of, script_of, scripts_of

INSIDE_WORDS = "'\u2019-"
"""Apostrophes and the hyphen: part of a word that has letters around them."""


@dataclass(frozen=True, slots=True)
class Letters:
    """The letters of a text by script."""

    counts: Mapping[str, int]
    """Letters of each script that the text has."""
    switches: int
    """Neighbouring letters of different families."""

    @property
    def letters(self) -> int:
        return sum(self.counts.values())

    @property
    def purity(self) -> float:
        """Share of the most frequent family; 1 without letters."""
        families = Counter()
        for script, count in self.counts.items():
            families[family_of(script)] += count
        return max(families.values(), default=1) / max(1, self.letters)

    @property
    def is_mixed(self) -> bool:
        """Whether it has letters of more than one family."""
        return self.switches > 0

    def share(self, target: str) -> float:
        """Share of a target script; 1 without letters.

        Raises:
            ConfigError: there is no such script.
        """
        require_script("script", target)
        inside = sum(self.counts.get(script, 0) for script in scripts_of(target))
        return inside / self.letters if self.letters else 1.0


def letters_of(text: str) -> Letters:
    """The letters of a text."""
    scripts = [script for script in map(script_of, text) if script]
    switches = sum(family_of(one) != family_of(other) for one, other in pairwise(scripts))
    return Letters(Counter(scripts), switches)


def words_of(text: str) -> list[str]:
    """Words of a text as a vocabulary has them: in compatible form (NFKC), without case."""
    compatible = unicodedata.normalize("NFKC", text).casefold()
    kept = "".join(character if _is_of_a_word(character) else " " for character in compatible)
    return [word for part in kept.split() if (word := part.strip(INSIDE_WORDS))]


def _is_of_a_word(character: str) -> bool:
    """A letter, a mark on one (the vowels of many scripts), or what stands inside words."""
    return unicodedata.category(character)[0] in "LM" or character in INSIDE_WORDS


def outside_share(text: str, vocabulary: Collection[str]) -> float:
    """Share of words that a vocabulary, of words as `words_of` gives them, does not have; 0 of a
    text without words."""
    words = words_of(text)
    return sum(word not in vocabulary for word in words) / max(1, len(words))


def thought_of(text: str, open_marker: str, close_marker: str) -> str:
    """What stands between the markers of a text; from its beginning where the open marker stands
    in the prompt, to its end where the thought was cut off. All of a text without markers."""
    before, opened, after = text.partition(open_marker)
    begins_in_text = opened and close_marker not in before
    return (after if begins_in_text else text).partition(close_marker)[0]


def language_of_texts(
    texts: Iterable[str], script: str | None = None, vocabulary: Collection[str] | None = None
) -> dict[str, float]:
    """Means over texts, by name.

    Returns:
        `texts`, their number; `letterless_frac`, of those without letters; over the others
        `purity_frac`, `mixed_frac`, `switches`, and where they are asked for `script_frac` and
        `outside_frac`.

    Raises:
        ConfigError: there is no such script, or no text.
    """
    if script is not None:
        require_script("script", script)
    texts = list(texts)
    if not texts:
        raise ConfigError("the language of no text at all was asked for; give at least one.")
    with_letters = [(text, found) for text in texts if (found := letters_of(text)).letters]
    measured = {
        "purity_frac": [found.purity for _, found in with_letters],
        "mixed_frac": [found.is_mixed for _, found in with_letters],
        "switches": [found.switches for _, found in with_letters],
    }
    if script is not None:
        measured["script_frac"] = [found.share(script) for _, found in with_letters]
    if vocabulary is not None:
        measured["outside_frac"] = [outside_share(text, vocabulary) for text, _ in with_letters]
    means = {name: sum(values) / len(values) for name, values in measured.items() if values}
    return {
        "texts": float(len(texts)),
        "letterless_frac": 1 - len(with_letters) / len(texts),
    } | means
