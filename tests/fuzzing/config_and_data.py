"""Configs, and files of documents."""

import gzip
import io
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import zstandard
from hypothesis import strategies as st

from rlp.config import Config, DataConfig, known_keys, load_config
from rlp.data.reader import DocumentReader
from rlp.data.sources import open_rows
from rlp.data.stream import DocumentStream
from tests.fuzzing.ingredients import (
    GOOD_CONFIG,
    TOKENIZER,
    damaged,
    json_bytes,
    odd_text,
    odd_value,
)

lines_of_config = st.lists(
    st.tuples(st.sampled_from(known_keys()), st.one_of(st.none(), st.integers(0, 9), odd_value)),
    max_size=3,
)
GOOD_LINES = b'{"text": "w1 w2 w3"}\n{"text": "w4 w5", "ids": [1, 2]}\n\n{"text": null}\n'


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
        reader = DocumentReader(
            rows,
            TOKENIZER,
            config,
            candidates=lambda tokens: range(1, len(tokens)),
            tokens_field=tokens_field,
            vocabulary=48,
        )
        return DocumentStream(reader, seed=0, warn=str, record=json.dumps)

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
