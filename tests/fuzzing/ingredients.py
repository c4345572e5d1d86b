"""Odd texts, numbers and values; bytes with damage; trees of which a few places are changed."""

import json
from collections.abc import Iterable

from hypothesis import strategies as st

from rlp.config import ConfigError
from rlp.data.errors import DataError
from rlp.learn.checkpoint import CheckpointError
from rlp.process.json_files import DamagedFileError
from tests.tiny_models import word_tokenizer

TOKENIZER = word_tokenizer()
OURS = (ConfigError, DataError, CheckpointError, DamagedFileError)

odd_text = st.one_of(
    st.text(max_size=20),
    st.sampled_from(
        [
            "",
            "\0",
            "\ud800",
            "${oc.env:HOME}",
            "../../x",
            "/etc/passwd",
            "???",
            "!!python/object/apply:os.system [id]",
            "&a *a",
            "1e999",
            "\u2028",
            "w1 w2 w3",
            "x" * 5000,
        ]
    ),
)
odd_number = st.one_of(
    st.integers(), st.floats(), st.sampled_from([0, -1, 1, 2**31, 2**63, 2**64, 10**400, 1e308])
)
odd_value = st.recursive(
    st.one_of(st.none(), st.booleans(), odd_number, odd_text),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(odd_text, inner, max_size=3)
    ),
    max_leaves=8,
)

GOOD_CONFIG = {
    "run": {"dir": "runs/x"},
    "model": {"path": "m"},
    "data": {"train": ["x.jsonl"]},
    "budget": {"steps": 1},
}


def damaged(content: bytes) -> st.SearchStrategy[bytes]:
    """The content with a few bytes changed, cut out, put in or doubled."""
    change = st.tuples(
        st.sampled_from(["flip", "cut", "put", "double", "end"]),
        st.integers(0, max(len(content) - 1, 0)),
        st.binary(min_size=1, max_size=6),
    )

    def apply(changes: list[tuple[str, int, bytes]]) -> bytes:
        result = content
        for kind, at, other in changes:
            result = {
                "flip": result[:at] + other[:1] + result[at + 1 :],
                "cut": result[:at] + result[at + len(other) :],
                "put": result[:at] + other + result[at:],
                "double": result[:at] + result[max(0, at - 40) :],
                "end": result[:at],
            }[kind]
        return result

    return st.lists(change, max_size=2).map(apply)


def json_bytes(value: object) -> bytes:
    return json.dumps(value).encode()


# --- Mutations of what is valid: most of a tree stays as it was, so that what is odd is met deep
# inside a reader.

RAW = (
    "1e400",
    "-1e400",
    "NaN",
    "Infinity",
    "-0.0",
    "1" * 5000,
    "[" * 3000 + "]" * 3000,
    '{"a":' * 400 + "1" + "}" * 400,
    "1e-400",
    '"' + "x" * 10_000_000 + '"',
)
"""JSON that no `json.dumps` of ours writes: the mark `raw:N` in a text is replaced by it."""

KINDS = {
    int: [
        0,
        1,
        -1,
        2,
        2**31,
        2**32 - 1,
        2**32,
        2**53,
        2**53 + 1,
        2**63 - 1,
        2**63,
        2**64,
        10**30,
        10**120,
        True,
        1.0,
        "1",
    ],
    float: [0.0, -0.0, -1.0, 1e-300, 1e30, -1e30, 9e99, 1e101, 1.7e308, 1, 0, 2**70, "1.0", None],
    str: [
        "",
        " ",
        "0",
        "x" * 5000,
        "\0",
        "\ud800",
        "\U0001f600",
        "../x",
        "/etc/passwd",
        "<script>",
        "$x_{$",
        "{{ 7 * 7 }}",
        "${oc.env:HOME}",
        "%s%n",
        "\x1b[2J",
        "\u202e",
        "never",
        "flops",
        "0x1p+9999",
        "0x1.8p+3",
        None,
        1,
    ],
    bool: [0, 1, "true", None],
    type(None): [0, "", [], {}, False],
}
"""In place of a value of a type: mostly others of the same type."""


OTHER_CHANGES = ("odd", "raw", "drop", "rename", "add", "double", "cut", "wrap")
"""Of a place, beside another value of its kind, which is the most likely."""


def places_of(tree: object, way: tuple = ()) -> list[tuple]:
    """Every place of a tree, the tree itself left out."""
    inner: Iterable = ()
    if isinstance(tree, dict):
        inner = tree.items()
    elif isinstance(tree, list):
        inner = enumerate(tree)
    return [
        place for key, value in inner for place in ((*way, key), *places_of(value, (*way, key)))
    ]


def _has(holder: object, key: object) -> bool:
    """The holder is a tree that has something there."""
    if isinstance(holder, dict):
        return key in holder
    return isinstance(holder, list) and type(key) is int and key < len(holder)


def mutated(tree: object, most: int = 3) -> st.SearchStrategy[object]:
    """The tree with a few places of it changed: another value, a name gone, renamed or added, a
    list longer or shorter."""
    places = places_of(tree)
    change = st.tuples(
        st.sampled_from([*["kind"] * 5, *OTHER_CHANGES]),
        st.sampled_from(places),
        st.integers(0, 10**6),
        odd_value,
    )

    def apply(changes: list[tuple]) -> object:
        result = json.loads(json.dumps(tree))
        for how, way, number, other in changes:
            holder = result
            for key in way[:-1]:
                holder = holder[key] if _has(holder, key) else None
            if _has(holder, way[-1]):
                _change(holder, way[-1], how, number, other)
        return result

    return st.lists(change, min_size=1, max_size=most).map(apply)


def _change(holder: dict | list, key: object, how: str, number: int, other: object) -> None:
    old = holder[key]
    likely = KINDS.get(type(old), [None, [], {}, 1, "x"])
    if how == "drop":
        del holder[key]
    elif how == "rename" and isinstance(holder, dict):
        holder[["x", "step", "", "../x", "\ud800"][number % 5]] = holder.pop(key)
    elif how == "add" and isinstance(holder, dict):
        holder[["x", "another", "\0"][number % 3]] = other
    elif how == "double" and isinstance(holder, list):
        holder.extend(holder[: 1 + number % 3])
    elif how == "cut" and isinstance(old, list | dict | str):
        holder[key] = type(old)()
    else:
        holder[key] = {"odd": other, "raw": f"raw:{number % len(RAW)}", "wrap": [old]}.get(
            how, likely[number % len(likely)]
        )


def raw_json(value: object) -> bytes:
    """The value as JSON, with `RAW` where it says so."""
    content = json_bytes(value)
    for index, text in enumerate(RAW):
        content = content.replace(f'"raw:{index}"'.encode(), text.encode())
    return content


def in_file(name: str, tree: object) -> bytes:
    """A tree as the bytes of a file: a line for each entry, or one value; JSON is YAML."""
    if name.endswith(".jsonl") and isinstance(tree, list):
        return b"".join(raw_json(line) + b"\n" for line in tree)
    return raw_json(tree)
