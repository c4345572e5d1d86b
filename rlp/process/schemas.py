"""What files hold that may be a stranger's: types, ranges and sizes, stated once.

A checkpoint's `meta.json` (`META`, with the run's state in it), a thought format (`THOUGHT_FORMAT`)
and the files of a run folder (`RUN_FILES`, by name) have a schema each. Whoever reads one of them
gets a value of that schema or the reader's own error. A file that an older or a newer version wrote
is read as far as it is known: what a schema does not name is looked at for size, depth and finite
numbers alone.

    schema      values
    Whole       whole numbers of a range, no booleans
    Number      finite numbers of a range, no booleans
    Text        text of a length, and of a pattern where there is one
    Flag        true, false
    Maybe       a schema, or nothing
    Many        a list
    Pair        a list of two
    Table       a mapping from any name to one schema
    Fields      a mapping from names to schemas of their own
    Plain       anything that JSON has, of finite numbers and so many levels
"""

import re
from dataclasses import dataclass, field
from typing import Protocol

LARGEST = 1e100
"""Of a number in a file; no count, loss or cost comes near it, and sums and products of such
numbers stay finite."""

MAX_TEXT, MAX_NAME, MAX_ENTRIES, MAX_LEVELS = 2**22, 2**12, 2**20, 20
"""Characters of a text and of a name, entries of a list or a mapping, lists and mappings inside
each other."""


class Schema(Protocol):
    """What a value is to be."""

    def problem(self, value: object, where: str) -> str | None:
        """Why the value at `where` is not of this schema, in words that follow the name of a file.

        None where it is of this schema.
        """


def _shown(name: object) -> str:
    return repr(name)[1:-1][:80]


def _odd(where: str, value: object, expected: str) -> str:
    if type(value) is int and abs(value) >= 10**40:
        shown = "a huge number"
    elif isinstance(value, str | list | dict) and len(value) >= 80:
        shown = f"a {type(value).__name__} of {len(value):,}"
    else:
        shown = repr(value)
    return f"{where or 'the value'} is {shown[:80]}, expected {expected}"


@dataclass(frozen=True, slots=True)
class Whole:
    least: int = 0
    most: int = 2**63 - 1

    def problem(self, value: object, where: str) -> str | None:
        if type(value) is int and self.least <= value <= self.most:
            return None
        expected = f"a whole number from {self.least} to {self.most}"
        return _odd(where, value, expected)


@dataclass(frozen=True, slots=True)
class Number:
    least: float = -LARGEST
    most: float = LARGEST

    def problem(self, value: object, where: str) -> str | None:
        # NaN compares with nothing.
        if type(value) in (float, int) and self.least <= value <= self.most:
            return None
        expected = f"a number from {self.least:g} to {self.most:g}"
        return _odd(where, value, expected)


@dataclass(frozen=True, slots=True)
class Text:
    most: int = MAX_TEXT
    pattern: str | None = None

    def problem(self, value: object, where: str) -> str | None:
        fits = isinstance(value, str) and len(value) <= self.most
        if fits and (self.pattern is None or re.fullmatch(self.pattern, value, re.ASCII)):
            return None
        expected = f"text of at most {self.most:,} characters"
        if self.pattern is not None:
            expected = f"text such as {self.pattern}"
        return _odd(where, value, expected)


@dataclass(frozen=True, slots=True)
class Flag:
    def problem(self, value: object, where: str) -> str | None:
        return None if isinstance(value, bool) else _odd(where, value, "true or false")


@dataclass(frozen=True, slots=True)
class Maybe:
    inner: Schema

    def problem(self, value: object, where: str) -> str | None:
        return None if value is None else self.inner.problem(value, where)


@dataclass(frozen=True, slots=True)
class Many:
    inner: Schema
    most: int = MAX_ENTRIES

    def problem(self, value: object, where: str) -> str | None:
        if not isinstance(value, list) or len(value) > self.most:
            return _odd(where, value, f"a list of at most {self.most:,}")
        for index, inner in enumerate(value):
            if said := self.inner.problem(inner, f"{where}[{index}]"):
                return said
        return None


@dataclass(frozen=True, slots=True)
class Pair:
    first: Schema
    second: Schema

    def problem(self, value: object, where: str) -> str | None:
        if not isinstance(value, list) or len(value) != 2:
            return _odd(where, value, "a list of two")
        first = self.first.problem(value[0], f"{where}[0]")
        return first or self.second.problem(value[1], f"{where}[1]")


@dataclass(frozen=True, slots=True)
class Table:
    inner: Schema
    names: str | None = None
    """Pattern of the names, and what a name of it is."""
    named: str = "name"

    def _is_name(self, name: object) -> bool:
        fits = isinstance(name, str) and len(name) <= MAX_NAME
        return fits and (self.names is None or bool(re.fullmatch(self.names, name, re.ASCII)))

    def problem(self, value: object, where: str) -> str | None:
        if not isinstance(value, dict) or len(value) > MAX_ENTRIES:
            return _odd(where, value, f"a mapping of at most {MAX_ENTRIES:,} names")
        for name, inner in value.items():
            if not self._is_name(name):
                return f"{where} names {repr(name)[:80]}, which is no {self.named}"
            if said := self.inner.problem(inner, f"{where}.{name}"):
                return said
        return None


@dataclass(frozen=True, slots=True)
class Plain:
    levels: int = MAX_LEVELS

    def problem(self, value: object, where: str) -> str | None:
        if isinstance(value, dict | list):
            if self.levels == 0:
                return f"{where} is nested more than {MAX_LEVELS} levels deep"
            inner = Plain(self.levels - 1)
            schema = Table(inner) if isinstance(value, dict) else Many(inner)
        elif isinstance(value, bool):
            return None
        else:
            schema = Text() if isinstance(value, str) else Maybe(Number())
        return schema.problem(value, where)


PLAIN = Plain()


@dataclass(frozen=True, slots=True)
class Fields:
    required: dict[str, Schema]
    optional: dict[str, Schema] = field(default_factory=dict)
    rest: Schema = PLAIN
    """Of all other names."""

    def problem(self, value: object, where: str) -> str | None:
        if not isinstance(value, dict) or len(value) > MAX_ENTRIES:
            return _odd(where, value, f"a mapping with {', '.join(self.required) or 'names'}")
        lacking = [name for name in self.required if name not in value]
        if lacking:
            return f"{where or 'the value'} has no {', '.join(lacking)}"

        for name, inner in value.items():
            schema = self.required.get(name) or self.optional.get(name) or self.rest
            place = f"{where}.{_shown(name)}" if where else _shown(name)
            if said := schema.problem(inner, place):
                return said
        return None


# Kinds of numbers and texts


def each(schema: Schema, *names: str) -> dict[str, Schema]:
    """One schema for several names."""
    return dict.fromkeys(names, schema)


STEP = Whole(most=2**32 - 1)
"""An optimizer step: half a word of the keys that noise is drawn by."""

COUNT, AMOUNT, NUMBER = Whole(), Number(least=0), Number()

NAME, TEXT, LINE = Text(MAX_NAME), Text(), Text(2**16)

CHECKSUM = Text(64, "[0-9a-f]{16,64}")

HEX_FLOAT = Text(40, r"-?0x[01](\.[0-9a-f]{1,13})?p[+-]?(\d{1,3}|10[01]\d|102[0-3])|-?inf|nan")
"""What `float.hex` writes, with an exponent that a float has."""

MEASURED = Table(NUMBER)

TOKEN_IDS = Many(Whole(most=2**31 - 1))

# A ledger

PHASE = Fields(
    each(COUNT, "tokens_in", "tokens_generated", "tokens_trained")
    | each(AMOUNT, "flops", "seconds"),
    rest=NUMBER,
)

LEDGER = Fields(
    {},
    {"phases": Table(PHASE), "input_tokens": COUNT, "steps": STEP, "counted_without": Many(NAME)}
    | each(AMOUNT, "flops", "paper_flops", "paper_flops_sampled", "seconds"),
)

WHOLE_LEDGER = Fields(LEDGER.optional)
"""Of a run that is finished, which another one is compared with."""

# A checkpoint

CONFIG = Table(Table(PLAIN))
"""Sections and their settings; `load_config` says what these may be."""

CHANGE = Fields({"step": STEP, "key": NAME, "from": PLAIN, "to": PLAIN})
"""A setting that a run was continued with otherwise."""

STATE = Fields(
    {},
    {
        "config": CONFIG,
        "data": Fields(
            {
                "cursors": Many(Whole(most=2**53)),
                "given": Whole(most=2**53),
                "bad": Table(COUNT),
                "files": Many(Pair(LINE, LINE)),
            }
        ),
        "ledger": Fields(
            {
                "phases": Table(PHASE),
                "input_tokens": COUNT,
                "paper_flops": AMOUNT,
                "paper_flops_sampled": AMOUNT,
                "steps": STEP,
            },
            rest=NUMBER,
        ),
        "seconds": AMOUNT,
        "guard": Fields(
            {"norms": Many(AMOUNT), "skipped": COUNT, "spikes": COUNT, "in_a_row": COUNT}
        ),
        "start_logprob": Many(NUMBER),
        "watch": Fields(
            {
                "first": Many(AMOUNT),
                "collapsed": Flag(),
                "streaks": Table(Many(NUMBER)),
                "said": Many(NAME),
            },
            each(Table(Many(NUMBER)), "starts", "risen"),
        ),
        "dtype": NAME,
        "inputs": Table(CHECKSUM),
        "changes": Many(CHANGE),
        "logs": Table(Fields({"bytes": COUNT, "lines": COUNT, "sha256": CHECKSUM})),
    },
)
"""What a checkpoint holds beside tensors, each part of which a resume needs.

A part that is not named here is not looked at closely, and
`test_every_part_of_a_checkpoint_has_a_schema` says so."""

SHARD = Fields({"size": COUNT, "sha256": CHECKSUM, "fragments": Table(COUNT), "adam_step": STEP})

META = Fields(
    {
        "step": STEP,
        "state": STATE,
        "shapes": Table(Many(COUNT, most=16)),
        "shards": Table(
            SHARD, names=r"shard_\d{5}-\d{5}\.safetensors", named="shard of the checkpoint"
        ),
    }
)

# What an export says of thoughts

THOUGHT_FORMAT: dict[str, Schema] = {
    **each(NAME, "open_marker", "close_marker"),
    **each(AMOUNT, "temperature", "target_temperature"),
    **each(Whole(most=2**31), "max_thought_tokens", "horizon"),
    "open_marker_ids": TOKEN_IDS,
    "close_marker_ids": TOKEN_IDS,
    "instruction_ids": TOKEN_IDS,
}
"""What readers use of `thought_format.json`."""

# The files of a run folder

_STEP = {"step": STEP}

RUN_FILES: dict[str, Schema] = {
    "environment.json": Fields(
        {"devices": Many(NAME), "cpu": NAME, "cores": Maybe(COUNT), "world_size": COUNT},
        {
            "commit": Maybe(NAME),
            "dirty": Maybe(Flag()),
            "command": TEXT,
            "packages": Table(Maybe(NAME)),
            **each(NAME, "date", "python", "platform"),
        },
    ),
    "metrics.jsonl": Fields(_STEP, rest=NUMBER),
    "timing.jsonl": Fields(_STEP, rest=NUMBER),
    "evaluation.jsonl": Fields(_STEP, rest=NUMBER),
    "thoughts.jsonl": Fields(
        _STEP
        | each(COUNT, "document", "position", "thought_tokens")
        | {"truncated": Flag()}
        | each(TEXT, "prefix_tail", "thought", "target"),
        each(Maybe(NUMBER), "reasoned_logprob", "baseline_logprob", "reward", "gain", "advantage")
        | {"script_share": NUMBER}
        | {"prediction": TEXT},
    ),
    "alarms.jsonl": Fields(_STEP | {"text": TEXT}),
    "config_changes.jsonl": CHANGE,
    "bad_documents.jsonl": Fields(_STEP),
    "journal.jsonl": Fields(
        _STEP
        | {
            "applied": Flag(),
            "documents": CHECKSUM,
            "numbers": Table(HEX_FLOAT),
            "tokens": COUNT,
            "flops": HEX_FLOAT,
        },
        each(CHECKSUM, "thoughts", "state"),
    ),
    "post_training.jsonl": Fields(
        {},
        {"stage": NAME}
        | each(
            Maybe(NUMBER),
            "accuracy_with_thought",
            "accuracy_without_thought",
            "gain_over_start_nats",
        ),
    ),
    "ledger.json": LEDGER,
    "summary.json": Fields(
        {},
        {
            **each(Maybe(MEASURED), "before", "after", "before_cold", "after_cold"),
            **each(AMOUNT, "seconds", "flops"),
            "steps": STEP,
            "bad_documents": Table(COUNT),
            "verdict": Many(LINE),
            "match": Maybe(Fields({"by": NAME, "ratio": NUMBER})),
        },
    ),
    "mixed_sft.json": Fields({}),
    "splice.json": Fields(
        {"longest_insert_tokens": Whole(most=2**31), "keep": NAME, "vocabulary": CHECKSUM}
    ),
}
"""By file name; of a `.jsonl` each line."""
