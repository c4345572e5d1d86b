"""CSV and TSV: rows are records, whatever pieces a file is read in."""

import csv
import gzip
import io
from pathlib import Path

import numpy as np
import pytest
import zstandard

from rlp.data.errors import DataError
from rlp.data.records import QuoteScan
from tests.data.reading import Reader, write

pytestmark = pytest.mark.usefixtures("unpacked")


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
