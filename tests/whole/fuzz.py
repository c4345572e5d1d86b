"""Inputs that nobody meant, for the readers of files that a stranger may have made.

    python -m tests.whole.fuzz --inputs 20000     a longer search than that of the test suite; prints how
                                            many inputs it tried

The claim is the same for each reader: a value, an error of our own, or a counted skip; never
another exception, never a change of the input.
"""

import argparse
import atexit
import functools
import gzip
import hashlib
import io
import json
import math
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack, redirect_stderr, redirect_stdout
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pyarrow
import pyarrow.parquet
import torch
import yaml
import zstandard
from hypothesis import HealthCheck, Phase, Verbosity, given, seed, settings
from hypothesis import strategies as st
from safetensors.torch import save

from rlp.cli import main as rlp_command
from rlp.compare.match import open_match
from rlp.compare.tasks import load_benchmarks, own_task
from rlp.config import Config, ConfigError, DataConfig, known_keys, load_config
from rlp.data import sources
from rlp.data.sources import DataError, open_rows
from rlp.data.stream import DocumentStream
from rlp.learn.checkpoint import FORMAT, CheckpointError, open_checkpoint
from rlp.learn.export import known_ids, read_thought_format
from rlp.measure.figures import Curve, Interval, draw_curves, draw_intervals
from rlp.measure.ledger import PHASES
from rlp.measure.probe import find_subject
from rlp.process.environment import environment
from rlp.process.json_files import DamagedFileError
from rlp.process.ranks import start_ranks
from rlp.trainer import Run
from tests.measure.run_folders import make_run, make_thought
from tests.tiny_models import tiny_policy, word_tokenizer
from tests.training import tiny_config, write_corpus
from train import train_step

TOKENIZER = word_tokenizer()
OURS = (ConfigError, DataError, CheckpointError, DamagedFileError)

# --- Ingredients.

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
lines_of_config = st.lists(
    st.tuples(st.sampled_from(known_keys()), st.one_of(st.none(), st.integers(0, 9), odd_value)),
    max_size=3,
)

GOOD_CONFIG = {
    "run": {"dir": "runs/x"},
    "model": {"path": "m"},
    "data": {"train": ["x.jsonl"]},
    "budget": {"steps": 1},
}
GOOD_LINES = b'{"text": "w1 w2 w3"}\n{"text": "w4 w5", "ids": [1, 2]}\n\n{"text": null}\n'


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


# --- Readers.


def read_config(folder: Path, case: tuple[bytes, list[str]]) -> None:
    content, overrides = case
    path = folder / "config.yaml"
    path.write_bytes(content)
    assert isinstance(load_config(path, overrides), Config)
    assert path.read_bytes() == content


def in_yaml(pairs: list[tuple[str, object]]) -> bytes:
    """A config with values at known keys, as YAML that is JSON."""
    tree = json.loads(json.dumps(GOOD_CONFIG))
    for key, value in pairs:
        section, _, name = key.partition(".")
        if name and isinstance(tree.setdefault(section, {}), dict):
            tree[section][name] = value
        elif not name:
            tree[section] = value
    return json_bytes(tree)


config_cases = st.tuples(
    st.one_of(
        lines_of_config.map(in_yaml),
        st.binary(max_size=60),
        damaged(in_yaml([])),
        odd_value.map(json_bytes),
    ),
    st.lists(
        st.one_of(
            odd_text,
            st.tuples(
                st.sampled_from(known_keys()), st.one_of(st.integers(0, 9).map(str), odd_text)
            ).map("=".join),
        ),
        max_size=2,
    ),
)


def read_data(folder: Path, case: tuple[str, bytes, str | None]) -> None:
    """Opens, reads some documents, resumes."""
    name, content, tokens_field = case
    path = folder / name
    path.write_bytes(content)
    config = DataConfig(train=[str(path)], max_bad_fraction=1.0)

    def stream() -> DocumentStream:
        rows = open_rows(config.train, config, "train", "data.train")
        return DocumentStream(
            rows,
            TOKENIZER,
            config,
            seed=0,
            candidates=lambda tokens: range(1, len(tokens)),
            warn=str,
            record=json.dumps,
            tokens_field=tokens_field,
            vocabulary=48,
        )

    first = stream()
    documents = first.next_documents(3)
    assert all(2 <= len(document.tokens) <= config.max_document_tokens for document in documents)
    assert sum(first.bad.values()) + 3 == first.cursor, "a row is a document or a counted skip"
    second = stream()
    second.load_state(json.loads(json.dumps(first.state())))
    assert second.next_documents(1)[0].id == first.next_documents(1)[0].id
    assert path.read_bytes() == content


def parquet_bytes() -> bytes:
    file = io.BytesIO()
    pyarrow.parquet.write_table(
        pyarrow.table({"text": ["w1 w2", None, "w3 w4"], "ids": [[1, 2], [], None]}), file
    )
    return file.getvalue()


rows = st.lists(
    st.one_of(
        odd_value,
        st.fixed_dictionaries({"text": odd_value}),
        st.fixed_dictionaries(
            {"ids": st.lists(st.one_of(st.integers(-2, 60), odd_value), max_size=4)}
        ),
    ),
    max_size=5,
)
lines = st.one_of(
    damaged(GOOD_LINES),
    st.binary(max_size=80),
    rows.map(lambda values: GOOD_LINES + b"\n".join(map(json_bytes, values))),
)
fields = st.sampled_from([None, "ids"])
data_cases = st.one_of(
    st.tuples(st.sampled_from(["x.jsonl", "x.txt"]), lines, fields),
    st.tuples(
        st.just("x.jsonl.gz"),
        st.one_of(lines.map(gzip.compress), damaged(gzip.compress(GOOD_LINES * 9, mtime=0))),
        fields,
    ),
    st.tuples(
        st.just("x.jsonl.zst"),
        st.one_of(lines.map(zstandard.compress), damaged(zstandard.compress(GOOD_LINES * 9))),
        fields,
    ),
    st.tuples(st.just("x.parquet"), damaged(parquet_bytes()), fields),
)


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


def places_of(tree: object, way: tuple = ()) -> list[tuple]:
    """Every place of a tree, the tree itself left out."""
    inner = (
        tree.items()
        if isinstance(tree, dict)
        else enumerate(tree)
        if isinstance(tree, list)
        else ()
    )
    return [
        place for key, value in inner for place in ((*way, key), *places_of(value, (*way, key)))
    ]


def mutated(tree: object, most: int = 3) -> st.SearchStrategy[object]:
    """The tree with a few places of it changed: another value, a name gone, renamed or added, a
    list longer or shorter."""
    places = places_of(tree)
    change = st.tuples(
        st.sampled_from(
            [
                "kind",
                "kind",
                "kind",
                "kind",
                "kind",
                "odd",
                "raw",
                "drop",
                "rename",
                "add",
                "double",
                "cut",
                "wrap",
            ]
        ),
        st.sampled_from(places),
        st.integers(0, 10**6),
        odd_value,
    )

    def apply(changes: list[tuple]) -> object:
        result = json.loads(json.dumps(tree))
        for how, way, number, other in changes:
            holder = result
            for key in way[:-1]:
                holder = (
                    holder[key]
                    if isinstance(holder, dict)
                    and key in holder
                    or isinstance(holder, list)
                    and type(key) is int
                    and key < len(holder)
                    else None
                )
            if not isinstance(holder, dict | list) or not (
                way[-1] in holder
                if isinstance(holder, dict)
                else type(way[-1]) is int and way[-1] < len(holder)
            ):
                continue
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


# --- Checkpoints: their checksums agree, as a forger would have it.


def good_meta(shard: bytes) -> dict:
    entry = {
        "size": len(shard),
        "sha256": hashlib.sha256(shard).hexdigest(),
        "fragments": {"w": 0},
        "adam_step": 1,
    }
    return {
        "format": FORMAT,
        "step": 3,
        "shards": {"shard_00000-00000.safetensors": entry},
        "shapes": {"w": [4]},
        "state": {},
    }


GOOD_SHARD = save({"master/w": torch.arange(4.0), "exp_avg/w": torch.zeros(4)})


def with_header(shard: bytes, header: bytes, told: int | None = None) -> bytes:
    """A safetensors file with another header, and perhaps another length of it than it has."""
    size = int.from_bytes(shard[:8], "little")
    return (
        (len(header) if told is None else told).to_bytes(8, "little") + header + shard[8 + size :]
    )


def mutated_shards(shard: bytes) -> st.SearchStrategy[bytes]:
    header = json.loads(shard[8 : 8 + int.from_bytes(shard[:8], "little")])
    lengths = st.sampled_from([None, None, None, 0, 1, 8, 2**20, 2**40, 2**63, 2**64 - 1])
    return st.one_of(
        st.just(shard),
        damaged(shard),
        st.tuples(mutated(header), lengths).map(
            lambda made: with_header(shard, raw_json(made[0]), made[1])
        ),
    )


def forge(
    folder: Path, meta: bytes, shard: bytes, name: str = "shard_00000-00000.safetensors"
) -> Path:
    path = folder / "step_3"
    path.mkdir(exist_ok=True)
    (path / name).write_bytes(shard)
    (path / "meta.json").write_bytes(meta)
    (path / "COMPLETE").write_text(hashlib.sha256(meta).hexdigest())
    return path


def signed(meta: object, shard: bytes, name: str = "shard_00000-00000.safetensors") -> object:
    """The meta with size and checksum of the shard, where it still has a place for them."""
    entry = meta
    for key in ("shards", name):
        entry = entry.get(key) if isinstance(entry, dict) else None
    if isinstance(entry, dict):
        for key, value in (("size", len(shard)), ("sha256", hashlib.sha256(shard).hexdigest())):
            entry[key] = value if key in entry else entry.get(key)
    return meta


def read_checkpoint(folder: Path, case: tuple[bytes, object]) -> None:
    """A small one: opened, and every value asked for."""
    shard, meta = case
    checkpoint = open_checkpoint(forge(folder, raw_json(signed(meta, shard)), shard))
    assert 0 <= checkpoint.adam_step < 2**32 and 0 <= checkpoint.step < 2**32
    for kind in ("master", "exp_avg"):
        assert checkpoint.read(kind, "w", 1, 2).shape == (2,)


SMALL_META = good_meta(GOOD_SHARD)
checkpoint_cases = st.tuples(
    mutated_shards(GOOD_SHARD), st.one_of(st.just(SMALL_META), mutated(SMALL_META))
)


@functools.cache
def resuming() -> tuple[Run, dict, bytes]:
    """A tiny run that has made a step, and its checkpoint: the meta, and its shard."""
    home = Path(tempfile.mkdtemp(prefix="rlp_fuzz_"))
    atexit.register(shutil.rmtree, home, ignore_errors=True)
    tiny_policy().lm.save_pretrained(home / "model")
    TOKENIZER.save_pretrained(home / "model")
    corpus = write_corpus(
        home / "train.jsonl",
        [" ".join(f"w{(7 * i + j) % 40}" for j in range(8)) for i in range(12)],
    )
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        run = Run(tiny_config(home / "run", home / "model", corpus), start_ranks())
        run.begin_step()
        train_step(run)
        assert run.save()
    path = home / "run" / "checkpoints" / "step_1"
    return (
        run,
        json.loads((path / "meta.json").read_bytes()),
        (path / "shard_00000-00000.safetensors").read_bytes(),
    )


def read_resume(folder: Path, case: tuple[bytes, object]) -> None:
    """The checkpoint of a run, whole: what a resume sets, then what the next step asks of it."""
    run, shard, meta = resuming()[0], *case
    path = forge(folder, raw_json(signed(meta, shard)), shard)
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        checkpoint = open_checkpoint(path)
        run._load(checkpoint)
        load_config(checkpoint.config)
        run.begin_step()
        assert (
            run.progress_before >= 0
            and run.learning_rate() >= 0
            and run.is_spent() in (True, False)
        )
        run.inputs.stream.next_documents(2)
        (
            run.guard.largest_norm(),
            run.watch.see(
                {"thought/tokens_mean": 3.0, "thought/truncated_frac": 1.0, "reward/mean": -1.0},
                has_baseline=True,
            ),
            run.ledger.mean_step(),
        )
        json.dumps(
            [
                run.ledger.state(),
                run.guard.state(),
                run.watch.state(),
                run.inputs.stream.state(),
                run.ledger.to_json(),
            ],
            allow_nan=False,
        )


def resume_metas() -> st.SearchStrategy[object]:
    """Changes of the whole meta, which mostly meet the config or a shape, and of the rest of the
    state alone."""
    meta = resuming()[1]
    state, config = (
        {name: part for name, part in meta["state"].items() if name != "config"},
        {"config": meta["state"]["config"]},
    )
    parts = [
        mutated(state, most).map(lambda tree: meta | {"state": tree | config}) for most in (1, 1, 2)
    ]
    return st.one_of(
        *parts, mutated(meta), mutated(config).map(lambda tree: meta | {"state": state | tree})
    )


resume_cases = st.deferred(
    lambda: st.tuples(
        st.one_of(*[st.just(resuming()[2])] * 3, mutated_shards(resuming()[2])), resume_metas()
    )
)


# --- Run folders.


@functools.cache
def run_folders() -> tuple[Path, Path, dict[str, object]]:
    """Two folders of finished runs, and what the files of the first hold: a list of lines, or a
    value."""
    home = Path(tempfile.mkdtemp(prefix="rlp_fuzz_"))
    atexit.register(shutil.rmtree, home, ignore_errors=True)
    for name in ("run", "other"):
        run = make_run(
            home / name,
            steps=3,
            thoughts=[make_thought(1, 0.5), make_thought(1, -0.5), make_thought(3, None)],
        )
        numbers = {"reward/mean": (0.5).hex(), "lm/loss": (2.5).hex()}
        lines = {
            "journal": [
                {
                    "step": step,
                    "applied": True,
                    "documents": "0" * 16,
                    "thoughts": "1" * 16,
                    "numbers": numbers,
                    "tokens": 10 * step,
                    "flops": (1e9).hex(),
                    "state": "2" * 16,
                }
                for step in (1, 2, 3)
            ],
            "alarms": [{"step": 2, "text": "an alarm"}],
            "config_changes": [{"step": 2, "key": "optim.learning_rate", "from": 1e-6, "to": 1e-5}],
            "post_training": [
                {
                    "stage": "sft",
                    "accuracy_with_thought": 0.5,
                    "accuracy_without_thought": 0.25,
                    "gain_over_start_nats": 0.1,
                }
            ],
        }
        for file, content in lines.items():
            (run / f"{file}.jsonl").write_bytes(
                b"".join(json_bytes(line) + b"\n" for line in content)
            )
        phases = {
            phase: {
                "tokens_in": 1,
                "tokens_generated": 2,
                "tokens_trained": 3,
                "flops": 1e9,
                "seconds": 1.0,
            }
            for phase in PHASES
        }
        ledger = {
            "phases": phases,
            "input_tokens": 30,
            "flops": 6e9,
            "paper_flops": 100.0,
            "paper_flops_sampled": 90.0,
            "seconds": 6.0,
            "steps": 3,
        }
        (run / "ledger.json").write_bytes(json_bytes(ledger))
        (run / "summary.json").write_bytes(
            json_bytes(
                json.loads((run / "summary.json").read_bytes())
                | {
                    "match": {"by": "flops", "ratio": 1.0},
                    "bad_documents": {"empty text": 1},
                }
            )
        )
        (run / "environment.json").write_bytes(json_bytes(environment(["cpu"])))
    files = {
        path.name: path
        for path in (home / "run").iterdir()
        if path.suffix in (".json", ".jsonl", ".yaml")
    }
    held = {
        name: (
            [json.loads(line) for line in path.read_bytes().splitlines()]
            if name.endswith(".jsonl")
            else yaml.safe_load(path.read_text())
        )
        for name, path in files.items()
    }
    return home / "run", home / "other", held


def in_file(name: str, tree: object) -> bytes:
    """A tree as the bytes of a file: a line for each entry, or one value; JSON is YAML."""
    if name.endswith(".jsonl") and isinstance(tree, list):
        return b"".join(raw_json(line) + b"\n" for line in tree)
    return raw_json(tree)


def one_file(name: str) -> st.SearchStrategy[tuple[str, bytes]]:
    good = run_folders()[2][name]
    return st.tuples(
        st.just(name),
        st.one_of(
            mutated(good).map(lambda tree: in_file(name, tree)),
            mutated(good).map(lambda tree: in_file(name, tree)),
            damaged(in_file(name, good)),
            odd_value.map(raw_json),
        ),
    )


run_folder_cases = st.deferred(
    lambda: st.tuples(
        st.integers(0, 1),
        st.lists(
            st.sampled_from(sorted(run_folders()[2])).flatmap(one_file), min_size=1, max_size=2
        ),
    )
)


_COMMANDS: dict[str, Callable[[Path, Path, Path], set[tuple]]] = {
    "thoughts.jsonl": lambda run, other, folder: {
        ("view", run, "--sort", "best"),
        ("view", run, "--step", "1", "--search", "x"),
    },
    "journal.jsonl": lambda run, other, folder: {
        ("audit", run, other, "--tolerance", "0.1"),
        ("audit", other, run),
    },
    **dict.fromkeys(
        ("config.yaml", "ledger.json", "summary.json"),
        lambda run, other, folder: {
            ("match", run, "--arm", "cpt", "--by", "flops", "--out", folder / "arm.yaml")
        },
    ),
}
"""What reads a file beside the report, which reads them all."""


def read_run_folder(folder: Path, case: tuple[int, list[tuple[str, bytes]]]) -> str:
    """Every command that reads what was changed of a run folder, and the ends of them."""
    (number, case), (run, other, held) = case, run_folders()
    said = []
    try:
        for name, content in case:
            (run / name).write_bytes(content)
        drawn = {
            "rlp.measure.report.draw_curves": lambda *values, **options: "data:,",
            "rlp.measure.report.draw_intervals": lambda *values, **options: "data:,",
        }
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()), ExitStack() as patches:
            for what, instead in drawn.items():
                patches.enter_context(patch(what, instead))
            commands = {
                (
                    ("report", run, other, "--out", folder / "page.html")
                    if number % 2
                    else ("report", run, "--out", folder / "page.html")
                )
            }
            commands |= {
                command
                for name, _ in case
                for command in _COMMANDS.get(name, lambda *paths: set())(run, other, folder)
            }
            said += [
                rlp_command([str(word) for word in command])
                for command in sorted(commands, key=str)
            ]
            (folder / "arm.yaml").unlink(missing_ok=True)
            said += (
                [_match(run, held["ledger.json"])]
                if any(name == "ledger.json" for name, _ in case)
                else []
            )
    finally:
        for name, _ in case:
            (run / name).write_bytes(in_file(name, held[name]))
    assert set(said) <= {0, 1, 2, 3}, said
    return "read by all" if set(said) <= {0, 1} else "refused by some"


def _match(run: Path, own: dict) -> int:
    """The other run's ledger as a matched run reads it."""
    config = load_config(
        GOOD_CONFIG
        | {
            "budget": {"flops": 6e9},
            "match": {"ledger": str(run / "ledger.json"), "by": "flops"},
        }
    )
    try:
        assert open_match(config).table(own)
    except OURS:
        return 3
    return 0


def read_figure(folder: Path, case: tuple[list[float], list[float], str]) -> None:
    """Numbers that a run folder may hold, drawn."""
    x, values, label = case
    size = min(len(x), len(values))
    curve = Curve(
        np.array(x[:size], dtype=float),
        np.array([values[:size]], dtype=float),
        "#000000",
        "-",
        dots=False,
    )
    assert draw_curves([curve], [], unit="nats", x_label=label, size=(2, 1)).startswith("data:")
    assert draw_intervals(
        ["a"], [("#000000", {"a": Interval(values[0], min(values), max(values))})], x_label="nats"
    ).startswith("data:")


figure_numbers = st.lists(
    st.one_of(
        st.floats(-1e100, 1e100), st.sampled_from([0.0, 1e100, -1e100, 1e-300, float(2**63)])
    ),
    min_size=1,
    max_size=30,
)
figure_cases = st.tuples(figure_numbers, figure_numbers, st.sampled_from(["step", "FLOPs"]))


# --- Thought formats and benchmarks.

GOOD_FORMAT = {
    "open_marker": "<think>",
    "open_marker_ids": [2],
    "close_marker": "</think>",
    "close_marker_ids": [3],
    "excluded_from_targets": 2,
    "instruction_ids": [5, 6],
    "temperature": 0.7,
    "target_temperature": 1.0,
    "max_thought_tokens": 5,
    "horizon": 1,
    "order": ["prefix", "thought"],
}


def read_thoughts(folder: Path, content: bytes) -> None:
    """A thought format, as an evaluation and a probe read it."""
    path = folder / "thought_format.json"
    path.write_bytes(content)
    assert isinstance(read_thought_format(path), dict)
    subject = find_subject(str(folder), "x.jsonl", None, [])
    known_ids(subject.instruction, TOKENIZER)
    assert math.isfinite(1 / subject.config.thought.temperature)


thought_cases = st.one_of(
    mutated(GOOD_FORMAT).map(raw_json),
    mutated(GOOD_FORMAT).map(raw_json),
    damaged(json_bytes(GOOD_FORMAT)),
    odd_value.map(raw_json),
    st.binary(max_size=40),
)

GOOD_BENCHMARKS = {
    "benchmarks": {
        "a": {
            "data": "x.jsonl",
            "prompt": "Q: {{question or problem}}\nA:",
            "reference": "{{answer}}",
            "until": ["Q:"],
            "samples": 2,
            "thought_tokens": 8,
            "thought_temperature": 0.5,
            "answer_tokens": 4,
            "answer_temperature": 0.0,
            "shots": 0,
        },
        "b": {
            "task": "gsm8k",
            "check": "task",
            "metric": "exact_match",
            "filter": "none",
            "shots": 1,
        },
    }
}
GOOD_ROWS = [
    {"question": "w1 w2", "answer": "1"},
    {"problem": "w3", "answer": 2.5, "question": None},
]


def read_benchmarks(folder: Path, case: tuple[bytes, bytes]) -> None:
    """A benchmark file, and the questions that it names."""
    content, rows = case
    (folder / "b.yaml").write_bytes(content)
    (folder / "x.jsonl").write_bytes(rows)
    for name, benchmark in load_benchmarks(folder / "b.yaml").items():
        if benchmark.data == "x.jsonl":
            task = own_task(name, replace(benchmark, data=str(folder / "x.jsonl")))
            for row in task["custom_dataset"]()["test"]:
                assert isinstance(task["doc_to_text"](row), str) and isinstance(
                    task["doc_to_target"](row), str
                )


benchmark_cases = st.tuples(
    st.one_of(
        st.just(json_bytes(GOOD_BENCHMARKS)),
        mutated(GOOD_BENCHMARKS).map(raw_json),
        damaged(json_bytes(GOOD_BENCHMARKS)),
    ),
    st.one_of(
        mutated(GOOD_ROWS).map(lambda tree: in_file("x.jsonl", tree)),
        damaged(in_file("x.jsonl", GOOD_ROWS)),
        st.binary(max_size=60),
    ),
)

READERS: dict[str, tuple[Callable, st.SearchStrategy, float]] = {
    "config": (read_config, config_cases, 0.15),
    "data": (read_data, data_cases, 0.15),
    "checkpoint": (read_checkpoint, checkpoint_cases, 0.3),
    "resume": (read_resume, resume_cases, 0.12),
    "run folder": (read_run_folder, run_folder_cases, 0.1),
    "figures": (read_figure, figure_cases, 0.01),
    "thought format": (read_thoughts, thought_cases, 0.08),
    "benchmarks": (read_benchmarks, benchmark_cases, 0.09),
}
"""How each kind of input is read and made, and its share of a search."""


class Case:
    """An input that is shown in short, where it breaks a reader."""

    def __init__(self, value: object) -> None:
        self.value = value

    def __repr__(self) -> str:
        return repr(self.value)[-4000:]


def search(name: str, inputs: int, key: int = 0) -> Counter:
    """Try a reader on so many inputs; how they ended. The same key gives the same inputs."""
    read, cases, _ = READERS[name]
    ends: Counter = Counter()
    with tempfile.TemporaryDirectory() as folder:
        sources.UNPACKED = Path(folder) / "unpacked"

        @seed(key)
        @settings(
            max_examples=inputs,
            database=None,
            deadline=None,
            verbosity=Verbosity.normal,
            phases=(Phase.generate, Phase.shrink),
            suppress_health_check=list(HealthCheck),
        )
        @given(cases.map(Case))
        def attempt(case: Case) -> None:
            try:
                ends[read(Path(folder), case.value) or "read"] += 1
            except OURS as error:
                assert str(error).strip(), "an error says something"
                ends[type(error).__name__] += 1

        attempt()
    return ends


def main() -> int:
    parser = argparse.ArgumentParser(description="Search for inputs that break a reader.")
    parser.add_argument("--inputs", type=int, default=20000, help="over all readers")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    total = 0
    for name in READERS:
        start = time.time()
        ends = search(name, round(arguments.inputs * READERS[name][2]), arguments.seed)
        total += sum(ends.values())
        print(
            f"{name} ({READERS[name][2]:.0%}): {sum(ends.values())} inputs in"
            f" {time.time() - start:.0f} s: "
            + ", ".join(f"{end} {count}" for end, count in ends.most_common()),
            flush=True,
        )
    print(f"{total} inputs, none of them broke a reader")
    return 0


if __name__ == "__main__":
    sys.exit(main())
