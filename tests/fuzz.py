"""Inputs that nobody meant, for the readers of files that a stranger may have made.

    python tests/fuzz.py --inputs 20000     a longer search than that of the test suite; prints how many inputs it tried

The claim is the same for each reader: a value, an error of our own, or a counted skip; never another exception, never a
change of the input.
"""

import argparse
import gzip
import hashlib
import io
import json
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pyarrow.parquet
import torch
import zstandard
from conftest import word_tokenizer
from hypothesis import HealthCheck, Phase, Verbosity, given, seed, settings
from hypothesis import strategies as st
from safetensors.torch import save

from rlp import sources
from rlp.checkpoint import FORMAT, CheckpointError, open_checkpoint
from rlp.config import Config, ConfigError, DataConfig, known_keys, load_config
from rlp.data import DocumentStream
from rlp.export import read_thought_format
from rlp.run_folder import DamagedFileError, read_json_lines
from rlp.sources import DataError, open_rows

TOKENIZER = word_tokenizer()
OURS = (ConfigError, DataError, CheckpointError, DamagedFileError)

# --- Ingredients.

odd_text = st.one_of(st.text(max_size=20), st.sampled_from(["", "\0", "\ud800", "${oc.env:HOME}", "../../x", "/etc/passwd", "???", "!!python/object/apply:os.system [id]", "&a *a", "1e999", "\u2028", "w1 w2 w3", "x" * 5000]))
odd_number = st.one_of(st.integers(), st.floats(), st.sampled_from([0, -1, 1, 2 ** 31, 2 ** 63, 2 ** 64, 10 ** 400, 1e308]))
odd_value = st.recursive(st.one_of(st.none(), st.booleans(), odd_number, odd_text), lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(odd_text, inner, max_size=3)), max_leaves=8)
lines_of_config = st.lists(st.tuples(st.sampled_from(known_keys()), st.one_of(st.none(), st.integers(0, 9), odd_value)), max_size=3)

GOOD_CONFIG = {"run": {"dir": "runs/x"}, "model": {"path": "m"}, "data": {"train": ["x.jsonl"]}, "budget": {"steps": 1}}
GOOD_LINES = b'{"text": "w1 w2 w3"}\n{"text": "w4 w5", "ids": [1, 2]}\n\n{"text": null}\n'


def damaged(content: bytes) -> st.SearchStrategy[bytes]:
    """The content with a few bytes changed, cut out, put in or doubled."""
    change = st.tuples(st.sampled_from(["flip", "cut", "put", "double", "end"]), st.integers(0, max(len(content) - 1, 0)), st.binary(min_size=1, max_size=6))

    def apply(changes: list[tuple[str, int, bytes]]) -> bytes:
        result = content
        for kind, at, other in changes:
            result = {"flip": result[:at] + other[:1] + result[at + 1 :], "cut": result[:at] + result[at + len(other) :], "put": result[:at] + other + result[at:],
                      "double": result[:at] + result[max(0, at - 40) :], "end": result[:at]}[kind]
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


config_cases = st.tuples(st.one_of(lines_of_config.map(in_yaml), st.binary(max_size=60), damaged(in_yaml([])), odd_value.map(json_bytes)),
                         st.lists(st.one_of(odd_text, st.tuples(st.sampled_from(known_keys()), st.one_of(st.integers(0, 9).map(str), odd_text)).map("=".join)), max_size=2))


def read_data(folder: Path, case: tuple[str, bytes, str | None]) -> None:
    """Opens, reads some documents, resumes."""
    name, content, tokens_field = case
    path = folder / name
    path.write_bytes(content)
    config = DataConfig(train=[str(path)], max_bad_fraction=1.0)

    def stream() -> DocumentStream:
        rows = open_rows(config.train, config, "train", "data.train")
        return DocumentStream(rows, TOKENIZER, config, seed=0, candidates=lambda tokens: range(1, len(tokens)), warn=str, record=json.dumps, tokens_field=tokens_field, vocabulary=48)

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
    pyarrow.parquet.write_table(pyarrow.table({"text": ["w1 w2", None, "w3 w4"], "ids": [[1, 2], [], None]}), file)
    return file.getvalue()


rows = st.lists(st.one_of(odd_value, st.fixed_dictionaries({"text": odd_value}), st.fixed_dictionaries({"ids": st.lists(st.one_of(st.integers(-2, 60), odd_value), max_size=4)})), max_size=5)
lines = st.one_of(damaged(GOOD_LINES), st.binary(max_size=80), rows.map(lambda values: GOOD_LINES + b"\n".join(map(json_bytes, values))))
fields = st.sampled_from([None, "ids"])
data_cases = st.one_of(
    st.tuples(st.sampled_from(["x.jsonl", "x.txt"]), lines, fields),
    st.tuples(st.just("x.jsonl.gz"), st.one_of(lines.map(gzip.compress), damaged(gzip.compress(GOOD_LINES * 9, mtime=0))), fields),
    st.tuples(st.just("x.jsonl.zst"), st.one_of(lines.map(zstandard.compress), damaged(zstandard.compress(GOOD_LINES * 9))), fields),
    st.tuples(st.just("x.parquet"), damaged(parquet_bytes()), fields))


def good_meta(shard: bytes) -> dict:
    entry = {"size": len(shard), "sha256": hashlib.sha256(shard).hexdigest(), "fragments": {"w": 0}, "adam_step": 1}
    return {"format": FORMAT, "step": 3, "shards": {"shard_00000-00000.safetensors": entry}, "shapes": {"w": [4]}, "state": {}}


GOOD_SHARD = save({"master/w": torch.arange(4.0), "exp_avg/w": torch.zeros(4)})


def read_checkpoint(folder: Path, case: tuple[bytes, list[tuple[str, object]]]) -> None:
    """A stranger's checkpoint: whatever it holds, its checksums agree."""
    shard, changes = case
    meta = good_meta(shard)
    for place, value in changes:
        *way, last = place.split("/")
        inner = meta
        for key in way:
            inner = inner.get(key, {}) if isinstance(inner, dict) else {}
        if isinstance(inner, dict):
            inner[last] = value
    path = folder / "step_3"
    path.mkdir(exist_ok=True)
    (path / "shard_00000-00000.safetensors").write_bytes(shard)
    (path / "meta.json").write_bytes(json_bytes(meta))
    (path / "COMPLETE").write_text(hashlib.sha256((path / "meta.json").read_bytes()).hexdigest())
    checkpoint = open_checkpoint(path)
    assert checkpoint.adam_step >= 0
    for kind in ("master", "exp_avg"):
        assert checkpoint.read(kind, "w", 1, 2).shape == (2,)


SHARD = "shards/shard_00000-00000.safetensors"
places = st.sampled_from(["format", "step", "state", "shapes", "shapes/w", "shards", "shards/../../x", "shards//etc/passwd", SHARD, f"{SHARD}/size", f"{SHARD}/sha256", f"{SHARD}/fragments", f"{SHARD}/fragments/w", f"{SHARD}/adam_step"])
checkpoint_cases = st.tuples(st.one_of(st.just(GOOD_SHARD), damaged(GOOD_SHARD)), st.lists(st.tuples(places, st.one_of(odd_value, st.integers(-1, 5))), max_size=2))


def read_run_files(folder: Path, content: bytes) -> None:
    """A thought format, and a log of a run."""
    path = folder / "thought_format.json"
    path.write_bytes(content)
    for read in (read_thought_format, read_json_lines):
        try:
            assert isinstance(read(path), (dict, list))
        except OURS:
            continue


run_file_cases = st.one_of(st.dictionaries(st.sampled_from(["open_marker", "temperature", "max_thought_tokens", "instruction_ids"]), odd_value).map(json_bytes), odd_value.map(json_bytes), st.binary(max_size=40))

READERS: dict[str, tuple[Callable, st.SearchStrategy]] = {
    "config": (read_config, config_cases), "data": (read_data, data_cases), "checkpoint": (read_checkpoint, checkpoint_cases), "run files": (read_run_files, run_file_cases)}


def search(name: str, inputs: int, key: int = 0) -> Counter:
    """Try a reader on so many inputs; how they ended. The same key gives the same inputs."""
    read, cases = READERS[name]
    ends: Counter = Counter()
    with tempfile.TemporaryDirectory() as folder:
        sources.UNPACKED = Path(folder) / "unpacked"

        @seed(key)
        @settings(max_examples=inputs, database=None, deadline=None, verbosity=Verbosity.normal, phases=(Phase.generate, Phase.shrink), suppress_health_check=list(HealthCheck))
        @given(cases)
        def attempt(case: object) -> None:
            try:
                read(Path(folder), case)
                ends["read"] += 1
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
        ends = search(name, arguments.inputs // len(READERS), arguments.seed)
        total += sum(ends.values())
        print(f"{name}: {sum(ends.values())} inputs in {time.time() - start:.0f} s: " + ", ".join(f"{end} {count}" for end, count in ends.most_common()), flush=True)
    print(f"{total} inputs, none of them broke a reader")
    return 0


if __name__ == "__main__":
    sys.exit(main())
