"""Inputs as they are met: truncated, swollen, changed, missing, mixed. What is wrong is refused or
counted; nothing vanishes."""

import csv
import gzip
import io
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import httpx
import numpy as np
import pyarrow.parquet
import pytest
import zstandard
from huggingface_hub import constants
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

import train as program
from rlp.config import ConfigError, DataConfig, ModelConfig
from rlp.data import hub, unpacked
from rlp.data.documents import first_ids
from rlp.data.errors import DataError
from rlp.data.records import QuoteScan
from rlp.data.sources import identity, open_rows
from rlp.data.stream import LISTED_PER_REASON, share_of_rank
from rlp.data.unpacked import EXPANSION_MARGIN_BYTES
from rlp.model.tokenizer import load_tokenizer
from tests import REPOSITORY
from tests.data.reading import GOOD, GOOD_TOKENS, Reader, numbered, write
from tests.tiny_models import word_tokenizer
from tests.training import read_lines, tiny_config

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


# --- CSV and TSV.


CSV = (
    b'text,note\r\n"w1, ""w2""\nw3",x\r\nw4,"a\n\nb"\n\nw5\nw6,y,z\nw7 "w8",\n\xff,bad\n"w9","last"'
)
"""A field over two lines with the delimiter and quotes in it; one over three; an empty line; too
few fields; too many; a quote amid a field; no UTF-8; no line end at the end. Lines 2, 4, 8, 9, 10,
11, 12 hold records."""


@pytest.mark.parametrize(
    "name, pack",
    [
        ("x.csv", bytes),
        ("x.csv.gz", lambda content: gzip.compress(content, mtime=0)),
        ("x.csv.zst", zstandard.compress),
        ("x.tsv", lambda content: content.replace(b",", b"\t")),
        ("bom.csv", lambda content: b"\xef\xbb\xbf" + content.replace(b"text", b'"text"', 1)),
    ],
)
def test_csv_rows_are_those_of_its_records(tmp_path: Path, unpacked, name: str, pack):
    """Every field is text; what is malformed is one bad document each, with the line that it begins
    in."""
    path = write(tmp_path / name, pack(CSV))
    reader = Reader([path], template="{text} {note}")
    rows, comma = reader.rows, "\t" if name.endswith("tsv") else ","
    assert [rows.read(index) for index in (0, 1, 5, 7)] == [
        {"text": f'w1{comma} "w2"\nw3', "note": "x"},
        {"text": "w4", "note": "a\n\nb"},
        {"text": 'w7 "w8"', "note": ""},
        {"text": "w9", "note": "last"},
    ]
    assert len(reader.tokens(4)) == 4
    assert [(bad["reason"], bad["where"].rpartition(":")[2]) for bad in reader.listed] == [
        ("empty line", "7"),
        ("broken CSV", "8"),
        ("broken CSV", "9"),
        ("not UTF-8", "11"),
    ]
    assert (
        "1 fields; the header names 2: text, note" in reader.listed[1]["detail"]
        and "3 fields" in reader.listed[2]["detail"]
    )


def test_a_csv_file_with_semicolons_is_read_by_its_delimiter(tmp_path: Path):
    """And without it, the missing field is named beside what the header holds."""
    path = write(tmp_path / "x.csv", b"text;note\nw1, w2;x\n" * 1)
    assert Reader([path], delimiter=";").rows.read(0) == {"text": "w1, w2", "note": "x"}
    with pytest.raises(DataError, match="2 fields; the header names 1: text;note"):
        Reader([path], max_bad_fraction=0).tokens(1)


@pytest.mark.parametrize(
    "content, words",
    [
        (
            b'text,note\nw1,x\nw2,"never\nclosed\n',
            "the quote in the record that begins in line 3 is never closed",
        ),
        (b"text,text\nw1,w2\n", "must name each field once"),
        (b"text,\nw1,w2\n", "must name each field once"),
        ("text,note\nw1,w2\n".encode("utf-16"), "the header, its first line: not UTF-8"),
        (b"\nw1,w2\n", "the header, its first line: empty line"),
        (b"text,note\n", "holds no row"),
    ],
)
def test_a_csv_file_that_can_not_be_read_is_refused(tmp_path: Path, content: bytes, words: str):
    with pytest.raises(DataError, match=words):
        Reader([write(tmp_path / "x.csv", content)])


@pytest.mark.parametrize("piece", [1, 2, 3, 7, 1000])
def test_records_are_found_whatever_pieces_a_file_is_read_in(piece: int):
    """Against the csv module, which is given the whole text: quotes at the start, the middle and
    the end of fields, doubled and not."""
    generator = np.random.default_rng(piece)
    for _ in range(2000):
        text = "".join(generator.choice(list('ab,,""\n')) for _ in range(generator.integers(0, 25)))
        content, scan, ends = text.encode(), QuoteScan(","), [0]
        for start in range(0, len(content), piece):
            ends += scan.ends(content[start : start + piece])[0].tolist()
        if not scan.is_open:  # such a file is refused
            ends += [len(content)] if ends[-1] < len(content) else []
            records = [
                content[start:end].decode().removesuffix("\n") for start, end in zip(ends, ends[1:])
            ]
            assert [next(csv.reader([record]), []) for record in records] == list(
                csv.reader(io.StringIO(text, newline=""))
            ), text


def test_a_csv_corpus_is_continued_where_it_was(tmp_path: Path):
    """As any other: by two integers, in any order."""
    path = write(
        tmp_path / "x.csv",
        b"text,note\n" + b"".join(b'"w%d\nw0",x\n' % (index % 40) for index in range(300)),
    )
    whole, half = Reader([path], shuffle=True, seed=3), Reader([path], shuffle=True, seed=3)
    expected = whole.tokens(500)
    assert half.tokens(123) == expected[:123]
    resumed = Reader([path], shuffle=True, seed=3)
    resumed.stream.load_state(half.stream.state())
    assert resumed.tokens(377) == expected[123:]


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


# --- Long documents, large corpora, many files.


def test_a_document_of_100_megabytes_costs_its_reading_and_no_tokenizing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Of 33 million words 64 are tokenized, and some more."""
    path = tmp_path / "x.jsonl"
    with open(path, "wb") as file:
        file.write(b'{"text": "' + b"w1 w2 w3 " * (10**8 // 9) + b'"}\n' + GOOD)
    tokenizer, asked = word_tokenizer(), []

    class Watched:
        def __getattr__(self, name: str) -> object:
            return getattr(tokenizer, name)

        def __call__(self, text: str, **words: object) -> object:
            asked.append(len(text))
            return tokenizer(text, **words)

    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    reader = Reader([path], max_document_tokens=64, tokenizer=Watched())
    assert reader.tokens(2) == [[7, 8, 9] * 21 + [7], GOOD_TOKENS]
    assert sum(asked) < 10000
    assert time.process_time() - start < 10
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1_000_000, (
        "a few copies of the line, in KiB"
    )


@pytest.fixture(scope="module")
def bpe() -> PreTrainedTokenizerFast:
    """Byte-level BPE over words, markup and long runs of one letter."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    texts = [
        "the cat sat on the mat\n    return x == y\n",
        "a" * 64,
        " " * 64,
        "=" * 80,
        "caf\u00e9 \u4e2d\u6587 \U0001f600",
    ] * 20
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=600,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@pytest.mark.parametrize(
    "text",
    [
        "the cat sat on the mat\n" * 500,
        "a" * 20000,
        " " * 30000 + "the cat",
        "=" * 9999 + "x",
        "\u4e2d\u6587\U0001f600" * 3000,
        "e\u0301" * 9000,
        "short",
        "a b" * 4000,
    ],
)
@pytest.mark.parametrize("count", [2, 7, 100, 2048])
def test_the_first_tokens_of_a_long_text_are_those_of_the_whole(
    bpe: PreTrainedTokenizerFast, text: str, count: int
):
    """Whatever stands at the cut: the middle of a word, a run of one letter, a base without its
    accent."""
    assert first_ids(text, bpe, count)[:count] == bpe(text)["input_ids"][:count]


MEMORY = """
import json, sys
from tests.data.reading import after_the_first
from tests.tiny_models import word_tokenizer
from rlp.data import unpacked
from rlp.config import DataConfig
from rlp.data.stream import DocumentStream
from rlp.data.sources import open_rows

def own_memory():
    lines = open("/proc/self/status")
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))

unpacked.UNPACKED = unpacked.Path(sys.argv[1])
config = DataConfig(train=sys.argv[2:], max_document_tokens=16)
before = own_memory()
rows = open_rows(config.train, config, "train", "data.train")
stream = DocumentStream(
    rows, word_tokenizer(), config, seed=0, candidates=after_the_first, warn=print
)
largest = 0
for _ in range(len(rows) // 100):
    stream.next_documents(100)
    largest = max(largest, own_memory())
read_mb = len(rows) * len(rows.read(0)["text"]) / 1e6
grown_mb = (largest - before) / 1024
print(json.dumps({"rows": len(rows), "read_mb": read_mb, "grown_mb": grown_mb}))
"""


@pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="memory of a process is read from /proc"
)
def test_memory_stays_flat_over_a_corpus_larger_than_it(tmp_path: Path):
    """175 megabytes of JSON lines and 64 of Parquet in a seeded order, every document, in a process
    that grows by less than a quarter of that."""
    files, texts = (
        [tmp_path / "x.jsonl", tmp_path / "x.parquet"],
        [f"w{i} " * 13000 for i in range(40)],
    )
    with open(files[0], "w") as file:
        file.writelines(f'{{"text": "{texts[i % 40]}"}}\n' for i in range(4500))
    with pyarrow.parquet.ParquetWriter(
        files[1], pyarrow.schema([("text", pyarrow.string())])
    ) as writer:
        for _ in range(40):
            writer.write_table(pyarrow.table({"text": texts}))
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, str(tmp_path / "unpacked"), *map(str, files)],
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert (
        told["rows"] == 6100 and told["read_mb"] > 230 and told["grown_mb"] < told["read_mb"] / 4
    ), told


def test_a_thousand_files_are_opened_at_once(tmp_path: Path):
    """As one corpus, in seconds, with no more open files than one; each row knows its own."""
    for number in range(1000):
        write(tmp_path / f"{number:04}.jsonl", GOOD * 2)
    start = time.process_time()
    reader = Reader([tmp_path / "*.jsonl"], shuffle=True)
    reader.stream.next_documents(2000)
    assert time.process_time() - start < 10
    assert len(reader.rows) == 2000 and reader.rows.where(1999) == f"{tmp_path / '0999.jsonl'}:2"
    assert len(os.listdir("/proc/self/fd")) < 500 if Path("/proc/self/fd").exists() else True


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


# --- Mixtures.


def mixture(folder: Path, weights: list[float], **fields: object) -> Reader:
    """Sources of 40, 7 and 20 documents; a document's first token tells its source: 6, 7 or 8."""
    files = {
        folder / f"{name}.jsonl": b"".join(
            b'{"text": "w%d w%d"}\n' % (name, row) for row in range(count)
        )
        for name, count in ((0, 40), (1, 7), (2, 20))
    }
    for path, content in files.items():
        if not path.exists():
            write(path, content)
    return Reader(list(files), weights=weights, shuffle=True, **fields)


def test_sources_are_drawn_by_their_weights(tmp_path: Path):
    """6000 documents at 1 : 2 : 5, within four standard deviations; the sizes of the files do not
    matter."""
    counts = Counter(tokens[0] for tokens in mixture(tmp_path, [1.0, 2.0, 5.0]).tokens(6000))
    for source, share in ((6, 1 / 8), (7, 2 / 8), (8, 5 / 8)):
        assert abs(counts[source] - 6000 * share) < 4 * (6000 * share * (1 - share)) ** 0.5


def test_each_source_has_epochs_of_its_own(tmp_path: Path):
    """Whatever the weights: each seven documents of the small one are all of it, in an order of
    their own."""
    drawn = [
        tokens[1] for tokens in mixture(tmp_path, [1.0, 2.0, 5.0]).tokens(600) if tokens[0] == 7
    ]
    epochs = [drawn[start : start + 7] for start in range(0, len(drawn) - 6, 7)]
    assert len(epochs) > 10 and all(sorted(epoch) == list(range(6, 13)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 5


@pytest.mark.parametrize("read", [0, 1, 50, 333])
def test_a_mixture_resumes_exactly_at_any_world_size(tmp_path: Path, read: int):
    """Batches of 6 shared by 1, 2 or 3 ranks, broken off anywhere, are the documents of an unbroken
    stream in its order."""
    whole = [
        document.id
        for document in mixture(tmp_path, [0.7, 0.2, 0.1]).stream.next_documents(read + 60)
    ]
    assert len(set(whole)) > 30 or read < 60
    first = mixture(tmp_path, [0.7, 0.2, 0.1])
    first.stream.next_documents(read)
    state = json.loads(json.dumps(first.stream.state()))
    for world_size in (1, 2, 3):
        streams = [mixture(tmp_path, [0.7, 0.2, 0.1]).stream for _ in range(world_size)]
        for stream in streams:
            stream.load_state(state)
        steps = [
            [
                stream.next_documents(6)[share_of_rank(6, rank, world_size)]
                for rank, stream in enumerate(streams)
            ]
            for _ in range(10)
        ]
        assert [document.id for step in steps for share in step for document in share] == whole[
            read:
        ]


def test_bad_rows_of_a_source_do_not_change_its_share(tmp_path: Path):
    """A source is drawn for a document, not for a row; the other sources give the same documents at
    the same places."""
    good = mixture(tmp_path, [1.0, 1.0, 1.0]).tokens(100)
    lines = (tmp_path / "2.jsonl").read_bytes().splitlines(keepends=True)
    write(
        tmp_path / "2.jsonl",
        b"".join(b"{\n" if row % 2 else line for row, line in enumerate(lines)),
    )
    reader = mixture(tmp_path, [1.0, 1.0, 1.0])
    mixed = reader.tokens(100)
    assert [tokens[0] for tokens in mixed] == [tokens[0] for tokens in good] and reader.stream.bad[
        "broken JSON"
    ] > 5
    assert [tokens for tokens in mixed if tokens[0] != 8] == [
        tokens for tokens in good if tokens[0] != 8
    ]


def test_a_source_without_a_document_stops_the_run(tmp_path: Path):
    """Whatever the others hold: its share can not be given."""
    write(tmp_path / "1.jsonl", b"{\n" * 3)
    with pytest.raises(DataError, match="1.jsonl:.*None of the 3 rows is a document"):
        mixture(tmp_path, [1.0, 1.0, 1.0]).tokens(100)


def test_weights_that_do_not_fit_are_refused():
    with pytest.raises(
        ConfigError,
        match=(
            r"data.weights needs one weight for each of the 2 entries of data.train, or none, got"
            r" \[1.0\]"
        ),
    ):
        DataConfig(train=["a", "b"], weights=[1.0])
    for weights in ([1.0, 0.0], [1.0, -1.0], [1.0, float("nan")], [1.0, float("inf")]):
        with pytest.raises(ConfigError, match="data.weights must be finite and above 0"):
            DataConfig(train=["a", "b"], weights=weights)


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
            program.train(
                tiny_config(tmp_path / name, model_folder, path, **settings | more), ranks
            )
            == program.DONE
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


# --- The Hub.


@pytest.fixture
def hub_unknown(monkeypatch: pytest.MonkeyPatch):
    """Nobody has asked yet whether the Hub answers."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    hub.settle_hub.cache_clear()
    yield
    hub.settle_hub.cache_clear()


def test_a_hub_that_does_not_answer_is_asked_once(hub_unknown, monkeypatch: pytest.MonkeyPatch):
    """One request of a few seconds in place of a minute of retries for each file; the message says
    what to write."""
    asked = []

    def refuse(address: str, timeout: float) -> None:
        asked.append((address, timeout))
        raise httpx.ConnectError("no route")

    monkeypatch.setattr(httpx, "head", refuse)
    start = time.monotonic()
    for _ in range(2):
        with pytest.raises(
            ConfigError,
            match=(
                "model.tokenizer: no tokenizer at 'someone/model'.*Write a folder that holds a"
                " Hugging Face model, or a Hub name that this machine can reach"
            ),
        ):
            load_tokenizer(ModelConfig(path="someone/model"))
    with pytest.raises(
        DataError, match="data.train: 'hub:someone/data' can not be read.*or has in its cache"
    ):
        open_rows(["hub:someone/data"], DataConfig(), "train", "data.train")
    assert asked == [(constants.ENDPOINT, hub.PATIENCE_S)] and time.monotonic() - start < 20


def test_a_hub_that_answers_is_used(hub_unknown, monkeypatch: pytest.MonkeyPatch):
    """With whatever status: that it is there is enough."""
    monkeypatch.setattr(httpx, "head", lambda address, timeout: httpx.Response(503))
    hub.settle_hub()
    assert constants.HF_HUB_OFFLINE is False


@pytest.mark.parametrize(
    "name, value, words",
    [
        (
            "HTTPS_PROXY",
            "socks9://there",
            (
                r"the proxy that HTTPS_PROXY names can not be used: .* Write http://HOST:PORT, or"
                r" unset it"
            ),
        ),
        ("HTTPS_PROXY", "http://[::bad", r"the proxy that HTTPS_PROXY names can not be used"),
        (
            "HF_ENDPOINT",
            "garbage",
            (
                r"HF_ENDPOINT is 'garbage', which is no address. Write one such as"
                r" https://huggingface.co"
            ),
        ),
        (
            "HF_ENDPOINT",
            "https://there:port",
            r"HF_ENDPOINT is 'https://there:port', which is no address \(",
        ),
    ],
)
def test_a_proxy_or_an_endpoint_that_is_none_is_a_config_error(
    hub_unknown, monkeypatch: pytest.MonkeyPatch, name: str, value: str, words: str
):
    """Said before anything is asked; the libraries raise whatever their parsers do."""
    for other in [other for other in os.environ if other.lower().endswith("_proxy")]:
        monkeypatch.delenv(other)
    monkeypatch.setenv(name, value)
    if name == "HF_ENDPOINT":
        monkeypatch.setattr(constants, "ENDPOINT", value)
    with pytest.raises(ConfigError, match=words):
        load_tokenizer(ModelConfig(path="someone/model"))


@pytest.mark.parametrize("source", ["hub:", "hub:@part"])
def test_hub_with_nothing_after_it_asks_nobody(
    hub_unknown, monkeypatch: pytest.MonkeyPatch, source: str
):
    monkeypatch.setattr(httpx, "head", lambda address, timeout: pytest.fail("the Hub was asked"))
    with pytest.raises(DataError, match="is no name of a Hub data set. Write hub:OWNER/NAME"):
        open_rows([source], DataConfig(), "train", "data.train")
