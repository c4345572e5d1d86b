"""Inputs as they are met: truncated, swollen, changed, missing, mixed. What is wrong is refused or
counted; nothing vanishes."""

import gzip
import io
import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
import zstandard

from rlp.config import ConfigError, DataConfig
from rlp.data import unpacked
from rlp.data.errors import DataError
from rlp.data.sources import identity
from rlp.data.stream import LISTED_PER_REASON
from rlp.data.unpacked import EXPANSION_MARGIN_BYTES
from rlp.process.exit_codes import DONE
from tests.data.reading import GOOD, GOOD_TOKENS, Reader, numbered, write
from tests.training import read_lines, tiny_config, train

pytestmark = pytest.mark.usefixtures("unpacked")


# --- Files that are not whole.


@pytest.mark.parametrize("cut", [1, 4, 20, 200])
@pytest.mark.parametrize("frames", [1, 2])
def test_a_truncated_zst_file_is_refused(tmp_path: Path, cut: int, frames: int):
    """The library itself takes the part that is there for the whole: a half-downloaded corpus would
    train without a word."""
    frame = zstandard.compress(
        b"".join(
            b'{"text": "w1 w2 w%d"}\n' % number
            for number in np.random.default_rng(0).integers(0, 40, size=3000)
        )
    )
    with pytest.raises(DataError, match=r"x.jsonl.zst' can not be read: it ends inside a frame"):
        Reader([write(tmp_path / "x.jsonl.zst", (frame * frames)[:-cut])])
    assert len(Reader([write(tmp_path / "y.jsonl.zst", frame * frames)]).rows) == 3000 * frames


def test_a_zst_file_of_several_frames_is_read_whole(tmp_path: Path):
    """As parallel compressors write them, with a frame to skip between."""
    skipped = b"\x50\x2a\x4d\x18" + (4).to_bytes(4, "little") + b"note"
    path = write(
        tmp_path / "x.jsonl.zst",
        zstandard.compress(GOOD) + skipped + zstandard.compress(b'{"text": "w5 w6"}\n'),
    )
    assert Reader([path]).tokens(2) == [GOOD_TOKENS, [11, 12]]


@pytest.mark.parametrize(
    "name, content",
    [
        ("x.jsonl.zst", GOOD),
        ("x.jsonl.zst", gzip.compress(GOOD, mtime=0)),
        ("x.jsonl.gz", zstandard.compress(GOOD)),
        ("x.jsonl.gz", GOOD),
    ],
)
def test_a_file_compressed_otherwise_than_its_name_says_is_refused(
    tmp_path: Path, name: str, content: bytes
):
    with pytest.raises(DataError, match="can not be read"):
        Reader([write(tmp_path / name, content)])


def test_a_file_that_unpacks_to_gigabytes_is_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A megabyte of zeros for a kilobyte of file, in either format; what was written of it is
    gone."""
    monkeypatch.setattr(unpacked, "EXPANSION_MARGIN_BYTES", 2**20)
    zeros = b"\0" * 2**24
    for name, content in (
        ("x.jsonl.gz", gzip.compress(zeros, mtime=0)),
        ("x.jsonl.zst", zstandard.compress(zeros)),
    ):
        with pytest.raises(
            DataError,
            match=(
                "unpacks to more than .* 200 times its size; if that is right, unpack it yourself"
            ),
        ):
            Reader([write(tmp_path / name, content)])
    assert not [path for path in unpacked.UNPACKED.iterdir() if path.suffix != ".lock"]
    assert EXPANSION_MARGIN_BYTES >= 2**27, "small files that repeat themselves pass"


def test_what_is_unpacked_is_unpacked_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """And again where the file has changed."""
    path = write(tmp_path / "x.jsonl.gz", gzip.compress(GOOD, mtime=0))
    Reader([path])
    monkeypatch.setattr(
        unpacked, "write_whole", lambda *arguments, **words: pytest.fail("unpacked twice")
    )
    assert Reader([path]).tokens(1) == [GOOD_TOKENS]
    monkeypatch.undo()
    write(path, gzip.compress(b'{"text": "w5 w6"}\n', mtime=0))
    os.utime(path, ns=(1, 1))
    assert Reader([path]).tokens(1) == [[11, 12]]


def test_a_cache_that_can_not_be_written_is_named_with_what_moves_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Below a file, as good as read-only; and a disk that fills while a file is unpacked."""
    path = write(tmp_path / "x.jsonl.gz", gzip.compress(GOOD, mtime=0))
    monkeypatch.setattr(unpacked, "UNPACKED", path / "unpacked")
    with pytest.raises(
        DataError, match=r"what is unpacked goes to .*x.jsonl.gz/unpacked \(HF_HOME moves it\)"
    ):
        Reader([path])
    monkeypatch.setattr(unpacked, "UNPACKED", tmp_path / "unpacked")
    monkeypatch.setattr(
        unpacked.BoundedFile,
        "write",
        lambda self, content: os.write(os.open("/dev/full", os.O_WRONLY), content),
    )
    with pytest.raises(DataError, match="No space left on device.*HF_HOME moves it"):
        Reader([path])
    assert [name.suffix for name in (tmp_path / "unpacked").iterdir()] == [".lock"]


@pytest.mark.parametrize("cut", [0.3, 0.9, 0.99])
def test_a_parquet_file_with_its_end_cut_off_or_its_middle_zeroed_is_refused(
    tmp_path: Path, cut: float
):
    file = io.BytesIO()
    pyarrow.parquet.write_table(
        pyarrow.table({"text": [f"w{i % 40} w2 {i}" for i in range(5000)]}), file
    )
    content = file.getvalue()
    part = int(len(content) * cut)
    with pytest.raises(DataError, match="x.parquet' can not be read"):
        Reader([write(tmp_path / "x.parquet", content[:part])])
    with pytest.raises(DataError, match="y.parquet' can not be read"):
        Reader(
            [
                write(
                    tmp_path / "y.parquet",
                    content[: part // 2]
                    + bytes(len(content) // 20)
                    + content[part // 2 + len(content) // 20 :],
                )
            ]
        )


def test_parquet_columns_of_other_kinds_are_read(tmp_path: Path):
    """Categories, as pandas writes them, over several row groups; large strings; a cell that is no
    UTF-8 is one bad row."""
    category = pyarrow.array([f"w{i} w0" for i in range(40)] * 20).dictionary_encode()
    pyarrow.parquet.write_table(
        pyarrow.table({"text": category}), tmp_path / "a.parquet", row_group_size=100
    )
    assert [tokens[0] for tokens in Reader([tmp_path / "a.parquet"]).tokens(800)] == [
        6 + i % 40 for i in range(800)
    ]
    broken = pyarrow.StringArray.from_buffers(
        2,
        pyarrow.py_buffer(np.array([0, 2, 7], dtype=np.int32).tobytes()),
        pyarrow.py_buffer(b"\xff\xfew1 w2"),
    )
    pyarrow.parquet.write_table(pyarrow.table({"text": broken}), tmp_path / "b.parquet")
    reader = Reader([tmp_path / "b.parquet"])
    assert reader.tokens(1) == [[7, 8]] and reader.stream.bad == {"unreadable cell": 1}


# --- A handful of rows.


@pytest.mark.parametrize(
    "bad, fraction, stops",
    [(1, 0.01, True), (1, 0.2, False), (2, 0.2, True), (4, 0.5, True), (0, 0.0, False)],
)
def test_a_fraction_of_a_few_rows_is_taken_of_those_rows(
    tmp_path: Path, bad: int, fraction: float, stops: bool
):
    """Five rows, met ten times each in one order or another: what is allowed in the first epoch is
    in every one."""
    path = write(tmp_path / "x.jsonl", b"{}\n" * bad + GOOD * (5 - bad))
    reader = Reader([path], max_bad_fraction=fraction, shuffle=True)
    if not stops:
        assert len(reader.tokens(10 * (5 - bad))) == 10 * (5 - bad)
        return
    with pytest.raises(
        DataError,
        match=f"data.max_bad_fraction = {fraction} allows. .* raise data.max_bad_fraction to ",
    ) as stopped:
        reader.tokens(5)
    assert (
        reader.stream.cursor <= 5
        and 2 * fraction <= float(re.search("to ([0-9.]+) or more", str(stopped.value))[1]) <= 1
    )


def test_a_folder_in_place_of_a_file_is_said_with_the_glob_that_names_its_files(tmp_path: Path):
    for name in ("a.jsonl", "b.jsonl.gz", "c.csv", "notes.docx"):
        write(tmp_path / name, GOOD)
    with pytest.raises(
        DataError,
        match=(
            rf"a folder, and no file \(its files are named by a glob: '{tmp_path}/\*.jsonl'\), at"
            rf" '{tmp_path}'"
        ),
    ):
        Reader([tmp_path])


def test_a_file_whose_name_looks_like_a_glob_is_that_file(tmp_path: Path):
    assert Reader([write(tmp_path / "x[1].jsonl", GOOD)]).tokens(1) == [GOOD_TOKENS]


def test_text_that_holds_the_replacement_character_is_a_document(tmp_path: Path):
    """U+FFFD stands in much of the web; bytes that are not UTF-8 are told by the bytes."""
    assert Reader([write(tmp_path / "x.jsonl", '{"text": "w1 \ufffd w2"}\n'.encode())]).tokens(
        1
    ) == [[7, 4, 8]]


# --- Files that change.


def test_a_file_that_changes_under_a_run_stops_it(tmp_path: Path):
    """Lines are read where they stood; they may stand elsewhere."""
    path = numbered(tmp_path / "x.jsonl", 30)
    reader = Reader([path])
    reader.tokens(3)
    write(path, path.read_bytes()[5:])
    with pytest.raises(DataError, match="x.jsonl has changed since this run opened it"):
        reader.tokens(1)
    path.unlink()
    with pytest.raises(DataError, match="x.jsonl can not be read any more"):
        reader.tokens(1)


# The same length: an edited word, two lines exchanged. Another length: a line appended. Elsewhere:
# the same file, copied.
@pytest.mark.parametrize(
    "change, refused",
    [
        (lambda content: content.replace(b"w7", b"w9", 1), True),
        (lambda content: content[15:30] + content[:15] + content[30:], True),
        (lambda content: content + GOOD, True),
        (lambda content: content, False),
    ],
)
def test_a_run_continues_with_the_files_that_it_began_with(tmp_path: Path, change, refused: bool):
    path = numbered(tmp_path / "x.jsonl", 5)
    write(path, path.read_bytes() + b'{"text": "w7 w0"}\n')
    first = Reader([path])
    first.tokens(2)
    state = first.stream.state()
    write(path, change(path.read_bytes()))
    os.utime(path, (1, 1))
    second = Reader([path])
    if refused:
        with pytest.raises(
            DataError,
            match=(
                r"x.jsonl is not what the checkpoint was made from: it had \d+ bytes.*Put the file"
                r" back, or start a new run"
            ),
        ):
            second.stream.load_state(state)
    else:
        second.stream.load_state(state)


def test_a_changed_megabyte_of_a_large_file_is_seen(tmp_path: Path):
    """Only a megabyte is looked at, in 16 places over the whole."""
    path = write(tmp_path / "x.jsonl", b"x" * 2**24)
    whole = identity(path)
    for start in range(0, 2**24, 2**20):
        content = bytearray(b"x" * 2**24)
        content[start : start + 2**20 + 2**17] = b"y" * len(content[start : start + 2**20 + 2**17])
        assert identity(write(path, bytes(content))) != whole, start


def test_another_number_of_files_is_refused_at_resume(tmp_path: Path):
    numbered(tmp_path / "a.jsonl", 5)
    state = Reader([tmp_path / "*.jsonl"]).stream.state()
    numbered(tmp_path / "b.jsonl", 5)
    with pytest.raises(DataError, match="names 2 files; the checkpoint was made from 1"):
        Reader([tmp_path / "*.jsonl"]).stream.load_state(state)


# --- Token ids in place of text.


@pytest.mark.parametrize(
    "ids, reason",
    [
        ([5, 48], "token id beyond the vocabulary"),
        ([5, -1], "token id beyond the vocabulary"),
        ([5, 2**70], "token id beyond the vocabulary"),
        ([5, True], "field is not token ids"),
        ([5, 6.0], "field is not token ids"),
        ("5 6", "field is not token ids"),
        (None, "field is not token ids"),
        ([5], "no position"),
    ],
)
def test_token_ids_that_the_model_lacks_are_bad_documents(tmp_path: Path, ids: object, reason: str):
    """An id beyond the embedding would read another row of memory on a GPU."""
    path = write(tmp_path / "x.jsonl", json.dumps({"ids": ids}).encode() + b'\n{"ids": [7, 8]}\n')
    reader = Reader([path], tokens_field="ids")
    assert reader.tokens(1) == [[7, 8]]
    assert reader.stream.bad == {reason: 1} and reason in reader.warnings[0]


@pytest.mark.parametrize(
    "row, reason",
    [
        ({"loss": [[1, 4]]}, "loss span outside the document"),
        ({"loss": [[-1, 2]]}, "loss span outside the document"),
        ({"loss": [[2, 2]]}, "loss span outside the document"),
        ({"loss": [[1, True]]}, "loss span outside the document"),
        ({"loss": [1, 2]}, "loss span outside the document"),
        ({"loss": "1-2"}, "loss span outside the document"),
        ({}, "missing field"),
    ],
)
def test_loss_spans_that_are_none_are_bad_documents(tmp_path: Path, row: dict, reason: str):
    rows = [{"ids": [5, 6, 7]} | row, {"ids": [7, 8], "loss": [[1, 2]]}]
    path = write(tmp_path / "x.jsonl", "".join(f"{json.dumps(row)}\n" for row in rows).encode())
    reader = Reader([path], tokens_field="ids", loss_field="loss")
    assert reader.tokens(1) == [[7, 8]]
    assert reader.stream.bad == {reason: 1} and reason in reader.warnings[0]


def test_a_row_without_a_loss_is_passed_over_and_no_fault(tmp_path: Path):
    """It has no span, or one of its first token, which nothing predicts, or one behind the cut; the
    spans of the others are cut with their tokens, and an end-of-sequence token has no loss."""
    rows = [[], [[0, 1]], [[3, 4]], [[1, 2], [2, 4]]]
    lines = [json.dumps({"ids": [5, 6, 7, 8], "loss": spans}) for spans in rows]
    path = write(tmp_path / "x.jsonl", "\n".join(lines).encode())
    settings = {"tokens_field": "ids", "loss_field": "loss", "max_bad_fraction": 0.0}
    (document,) = Reader([path], max_document_tokens=3, **settings).stream.next_documents(1)
    assert document.predicted.tolist() == [True, True]

    reader = Reader([path], append_eos=True, **settings)
    ended = reader.stream.next_documents(2)
    assert [document.predicted.tolist() for document in ended] == [
        [False, False, True, False],
        [True, True, True, False],
    ]
    assert reader.stream.bad == {"no token with a loss": 2}


def test_spans_without_token_ids_are_refused():
    with pytest.raises(ConfigError, match="data.loss_field holds spans of the tokens"):
        DataConfig(loss_field="loss")


# --- The record of what was skipped.


def test_skipped_documents_are_in_the_run_folder(tmp_path, model_folder, ranks):
    """By reason, file and line, each as often as it was met; a resumed run has the list of an
    unbroken one; counts at the end."""
    bad = {3: b"{\n", 4: b'{"text": null}\n', 9: b'{"text": "caf\xe9 w1"}\n'}
    lines = [bad.get(row, b'{"text": "w1 w2 w3 w%d w5 w6"}\n' % (row % 40)) for row in range(12)]
    path = write(tmp_path / "corpus.jsonl", b"".join(lines))
    settings = {
        "data__max_bad_fraction": 1.0,
        "budget__steps": 8,
        "checkpoint__every_n_steps": 3,
        "objective__policy_weight": 0.0,
        "evaluation__every_n_steps": 0,
    }

    def run(name: str, **more: object) -> Path:
        assert (
            train(tiny_config(tmp_path / name, model_folder, path, **settings | more), ranks)
            == DONE
        )
        return tmp_path / name

    whole = run("whole")
    listed = read_lines(whole / "bad_documents.jsonl")
    assert len(listed) >= 6
    assert {(line["where"].rpartition(":")[2], line["reason"]) for line in listed} == {
        ("4", "broken JSON"),
        ("5", "field is not text"),
        ("10", "not UTF-8"),
    }
    counts = json.loads((whole / "summary.json").read_text())["bad_documents"]
    assert (
        sum(counts.values())
        == len(listed)
        == read_lines(whole / "metrics.jsonl")[-1]["data/bad_documents"]
    )
    run("broken", budget__steps=4)
    (tmp_path / "broken" / "summary.json").unlink()
    shutil.rmtree(
        tmp_path / "broken" / "checkpoints" / "step_4"
    )  # as if the run had died in step 4
    run("broken", run__resume="auto")
    assert (tmp_path / "broken" / "bad_documents.jsonl").read_bytes() == (
        whole / "bad_documents.jsonl"
    ).read_bytes()


def test_the_list_of_skipped_documents_is_bounded_and_the_count_is_not(tmp_path: Path):
    path = write(tmp_path / "x.jsonl", b"{\n" * 300 + b'{"text": 3}\n' + GOOD)
    reader = Reader([path])
    reader.tokens(1)
    assert [entry["count"] for entry in reader.listed if entry["reason"] == "broken JSON"] == list(
        range(1, LISTED_PER_REASON + 1)
    )
    assert reader.stream.bad == {"broken JSON": 300, "field is not text": 1}


def test_what_a_row_holds_can_not_fill_a_message(tmp_path: Path):
    """A field name of a megabyte."""
    reader = Reader(
        [write(tmp_path / "x.jsonl", json.dumps({"n" * 10**6: 1}).encode() + b"\n" + GOOD)]
    )
    reader.tokens(1)
    assert len(reader.warnings[0]) < 1000
