"""The language of texts made by hand, with numbers counted by hand."""

import unicodedata

import pytest

from rlp.config import ConfigError, load_config
from rlp.measure.language import (
    language_of_texts,
    letters_of,
    outside_share,
    thought_of,
    words_of,
)
from rlp.writing import SCRIPTS, script_of

FOUR_SCRIPTS = "north \u0441\u0435\u0432\u0435\u0440 \u5317 \u0634\u0645\u0627\u0644"
"""north in Latin (5 letters), Cyrillic (5), Han (1) and Arabic (4)."""


@pytest.mark.parametrize(
    "text, counts, switches",
    [
        (FOUR_SCRIPTS, {"latin": 5, "cyrillic": 5, "han": 1, "arabic": 4}, 3),
        # Neutral signs between two letters leave them neighbours.
        ("ab 12 (+) cd", {"latin": 4}, 0),
        ("ab 12 \u0431 12 cd", {"latin": 4, "cyrillic": 1}, 2),
        # A Cyrillic a in a Latin word is what it is.
        ("p\u0430ge", {"latin": 3, "cyrillic": 1}, 2),
        # Japanese, with its sound mark, and a half-width kana: three scripts, one family.
        (
            "\u6771\u4eac\u306f\u30bf\u30ef\u30fc\uff71",
            {"han": 2, "hiragana": 1, "katakana": 4},
            0,
        ),
        # Full-width and mathematical letters are those they stand for.
        ("\uff21\uff22 \U0001d400", {"latin": 3}, 0),
        # Diacritics, composed or not, belong to their letter; a vowel sign is a mark.
        ("caf\u00e9", {"latin": 4}, 0),
        (unicodedata.normalize("NFD", "caf\u00e9"), {"latin": 4}, 0),
        ("\u0939\u093f\u0928\u094d\u0926\u0940", {"devanagari": 3}, 0),
        # Names of two and of three words; the prefix of one is that of no other.
        ("\u1980\u1950", {"new tai lue": 1, "tai le": 1}, 1),
        ("\U0001e100", {"nyiakeng puachue hmong": 1}, 0),
        ("12 + 30 = 42 \u2192 \u03a9"[:12], {}, 0),
        ("", {}, 0),
    ],
)
def test_letters_and_switches_of_texts_made_by_hand(text, counts, switches):
    found = letters_of(text)
    assert (dict(found.counts), found.switches) == (counts, switches)
    assert found.letters == sum(counts.values())


def test_shares_of_four_scripts():
    found = letters_of(FOUR_SCRIPTS)
    shares = {script: found.share(script) for script in ("latin", "cyrillic", "han", "arabic")}
    assert shares == {"latin": 5 / 15, "cyrillic": 5 / 15, "han": 1 / 15, "arabic": 4 / 15}
    assert found.share("greek") == 0 and found.purity == 5 / 15


def test_a_language_of_several_scripts_is_one_target():
    found = letters_of("\u6771\u4eac\u306f\u30bf ok")
    assert found.share("japanese") == 4 / 6 and found.share("han") == 2 / 6
    assert found.purity == 4 / 6 and found.switches == 1


@pytest.mark.parametrize("text", ["", "12 + 30 = 42", "\u2192 !?", "\u0301"])
def test_a_text_without_letters_is_in_no_other_script(text):
    found = letters_of(text)
    assert (found.letters, found.share("latin"), found.purity, found.is_mixed) == (0, 1, 1, False)


def test_words_outside_a_vocabulary():
    """Without case, in compatible form; digits are no words."""
    text = "Don't go NORTH-west, \uff27\uff2f 42 times \u0434\u043e\u043c"
    assert words_of(text) == ["don't", "go", "north-west", "go", "times", "\u0434\u043e\u043c"]
    assert words_of("\u0939\u093f\u0928\u094d\u0926\u0940 - ok") == [
        "\u0939\u093f\u0928\u094d\u0926\u0940",
        "ok",
    ]
    assert outside_share(text, {"go", "don't", "times"}) == 2 / 6
    assert outside_share("42", set()) == 0


@pytest.mark.parametrize(
    "text, thought",
    [
        ("a <t>b c</t> d", "b c"),
        ("b c</t> d", "b c"),  # the prompt ends with the open marker
        ("b c", "b c"),
        ("a <t>b c", "b c"),  # cut off
        ("b</t> d <t>e</t>", "b"),
        ("<t></t> d", ""),
    ],
)
def test_the_thought_of_a_text_is_between_its_markers(text, thought):
    assert thought_of(text, "<t>", "</t>") == thought


def test_means_over_texts_leave_out_those_without_letters():
    found = language_of_texts(
        ["ab\u0431\u0431", "abcd", "42", ""], script="latin", vocabulary={"abcd"}
    )
    assert found == {
        "texts": 4,
        "letterless_frac": 0.5,
        "purity_frac": 0.75,
        "mixed_frac": 0.5,
        "switches": 0.5,
        "script_frac": 0.75,
        "outside_frac": 0.5,
    }
    assert language_of_texts(["1"]) == {"texts": 1, "letterless_frac": 1}
    with pytest.raises(ConfigError, match="no text at all"):
        language_of_texts([])


def test_every_letter_of_the_first_plane_has_a_script_that_can_be_named():
    """But for those that belong to no script, and for what this Python has no name for."""
    letters = [chr(code) for code in range(2**16) if chr(code).isalpha()]
    without = [letter for letter in letters if not script_of(letter)]
    assert {script_of(letter) for letter in letters} - {""} <= set(SCRIPTS)
    caron = "\u02c7"
    forms = {unicodedata.normalize("NFKC", letter)[0] for letter in without if letter < "\u1c00"}
    assert all("MODIFIER" in unicodedata.name(form) for form in forms - {caron})
    assert len(without) < 60


@pytest.mark.parametrize(
    "settings, words",
    [
        (["reward.script=latn"], "reward.script must be a script (did you mean latin?), one of"),
        (["reward.script=Latin"], "did you mean latin?"),
        (["reward.language_weight=-1"], "reward.language_weight must be at least 0, got -1"),
        (["reward.language_weight=1"], "reward.script must name the script"),
    ],
)
def test_a_script_that_does_not_exist_is_refused_with_the_known_ones(settings, words):
    base = {"run": {"dir": "r"}, "model": {"path": "m"}, "data": {"train": ["d"]}}
    base |= {"budget": {"steps": 1}}
    with pytest.raises(ConfigError) as refused:
        load_config(base, settings)
    assert words in str(refused.value)
    if "did you mean" in words:
        assert all(script in str(refused.value) for script in SCRIPTS)
    config = load_config(base, ["reward.script=new tai lue", "reward.language_weight=0.5"])
    assert (config.reward.script, config.reward.language_weight) == ("new tai lue", 0.5)
