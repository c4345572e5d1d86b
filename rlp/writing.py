"""Scripts: which one a letter is of, by what Unicode calls it.

A letter is a character of the categories L*. Its compatibility form is asked (NFKC), so that a
full-width or a mathematical A is Latin, and its script is what its Unicode name begins with:
"CYRILLIC SMALL LETTER A", "NEW TAI LUE LETTER HIGH QA". A letter whose name begins otherwise, or
that has none, is of the script `OTHER`. All else has no script and is neutral: digits, signs,
punctuation, space, combining marks, and the few letters that no script owns (modifier letters).

A look-alike is what it is: the Cyrillic a in a Latin word is Cyrillic. A letter with diacritics is
of its script, in one character or in several.
"""

import unicodedata
from functools import lru_cache

OTHER = "other"
"""Of a letter whose script this Python does not name."""

_ONE_WORD = (
    "adlam ahom arabic armenian avestan balinese bamum batak bengali bhaiksuki bopomofo brahmi"
    " buginese buhid carian chakma cham cherokee chorasmian coptic cuneiform cypriot cypro-minoan"
    " cyrillic deseret devanagari dogra duployan elbasan elymaic ethiopic garay georgian glagolitic"
    " gothic grantha greek gujarati gurmukhi hangul hanunoo hatran hebrew hiragana javanese kaithi"
    " kannada katakana kawi kharoshthi khmer khojki khudawadi lao latin lepcha limbu lisu lycian"
    " lydian mahajani makasar malayalam mandaic manichaean marchen medefaidrin miao modi mongolian"
    " mro multani myanmar nabataean nandinagari newa nko nushu ogham oriya osage osmanya palmyrene"
    " phags-pa phoenician rejang runic samaritan saurashtra sharada shavian siddham sinhala sogdian"
    " soyombo sundanese sunuwar syriac tagalog tagbanwa takri tamil tangsa tangut telugu thaana"
    " thai tibetan tifinagh tirhuta todhri toto tulu-tigalari ugaritic vai vithkuqi wancho yezidi"
    " yi"
).split()

_SEVERAL_WORDS = (
    "anatolian hieroglyph",
    "bassa vah",
    "canadian syllabics",
    "caucasian albanian",
    "dives akuru",
    "egyptian hieroglyph",
    "gunjala gondi",
    "gurung khema",
    "hanifi rohingya",
    "imperial aramaic",
    "inscriptional pahlavi",
    "inscriptional parthian",
    "kayah li",
    "khitan small script",
    "kirat rai",
    "linear a",
    "linear b",
    "masaram gondi",
    "meetei mayek",
    "mende kikakui",
    "meroitic cursive",
    "meroitic hieroglyphic",
    "nag mundari",
    "new tai lue",
    "nyiakeng puachue hmong",
    "ol chiki",
    "ol onal",
    "old hungarian",
    "old italic",
    "old north arabian",
    "old permic",
    "old persian",
    "old sogdian",
    "old south arabian",
    "old turkic",
    "old uyghur",
    "pahawh hmong",
    "pau cin hau",
    "psalter pahlavi",
    "sora sompeng",
    "syloti nagri",
    "tai le",
    "tai tham",
    "tai viet",
    "warang citi",
    "zanabazar square",
)

_OTHERWISE = {
    "cjk": "han",
    "ideographic": "han",
    "old chinese": "han",
    "vertical ideographic": "han",
    "hentaigana": "hiragana",
    "vertical kana": "hiragana",
    "halfwidth katakana": "katakana",  # a sound mark without a compatible letter
    "katakana-hiragana": "katakana",  # the prolonged sound mark
    "roman": "latin",
    "turned": "latin",
}
"""Scripts whose letters have names that begin with another word."""

_NOBODYS = {"modifier", "vedic", "masu", "caron", "vertical tilde"}
"""How the names of letters begin that no script owns."""

_BEGINS = (
    {name: name for name in (*_ONE_WORD, *_SEVERAL_WORDS)}
    | _OTHERWISE
    | dict.fromkeys(_NOBODYS, "")
)

MIXES = {
    "japanese": frozenset({"han", "hiragana", "katakana"}),
    "korean": frozenset({"hangul", "han"}),
}
"""Writing that consists of several scripts, under a name of its own."""

SCRIPTS = tuple(sorted({*_ONE_WORD, *_SEVERAL_WORDS, "han", *MIXES}))
"""What a target script may be called."""

CJK = "cjk"
"""Family of Han, Hiragana and Katakana, which Japanese writes together."""


@lru_cache(maxsize=2**16)
def script_of(character: str) -> str:
    """The script of a letter, such as latin; empty for a character that is none."""
    if not character.isalpha():
        return ""
    compatible = unicodedata.normalize("NFKC", character)
    letters = [part for part in compatible if part.isalpha()] or [character]
    return next((script for script in map(_by_name, letters) if script), "")


def _by_name(letter: str) -> str:
    words = unicodedata.name(letter, OTHER).lower().split()
    for count in (3, 2, 1):
        if (script := _BEGINS.get(" ".join(words[:count]))) is not None:
            return script
    return OTHER


def family_of(script: str) -> str:
    """What a script is not told from when switches are counted: itself, but for those of `CJK`."""
    return CJK if script in MIXES["japanese"] else script


def scripts_of(target: str) -> frozenset[str]:
    """The scripts that a target, one of `SCRIPTS`, consists of."""
    return MIXES.get(target, frozenset({target}))
