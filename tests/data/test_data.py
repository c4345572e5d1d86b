"""From files to documents and positions: what is refused, what is skipped and counted, and an order
that an integer resumes."""

import gzip
import json
import warnings
from itertools import product
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from rlp.config import ConfigError
from rlp.data.errors import DataError
from rlp.data.sources import Rows, Table
from rlp.data.stream import share_of_rank
from tests.data.reading import GOOD, GOOD_TOKENS, Reader, numbered, write
from tests.tiny_models import WORDS, word_tokenizer

pytestmark = pytest.mark.usefixtures("unpacked")


# --- Rows that can not become a document: skipped, counted by reason, told once.

BAD_ROWS = {  # what stands in the first line, the reason it is counted under, a part of the warning
    "broken JSON": (b'{"text": \n', "broken JSON", "expected one JSON object on the line"),
    "two objects": (b'{"text": "w1"} {"text": "w2"}\n', "broken JSON", "Extra data"),
    "empty line": (b"\n", "empty line", "expected a document on each line"),
    "blank line": (b" \t\r\n", "empty line", "expected a document on each line"),
    "raw NUL": (b'{"text": "w1 \x00 w2"}\n', "broken JSON", "Invalid control character"),
    "a line of NUL": (b"\x00\x00\x00\n", "broken JSON", "expected one JSON object"),
    "Latin-1": ('{"text": "w1 é w2"}\n'.encode("latin-1"), "not UTF-8", "not UTF-8"),
    "lone surrogate": (b'{"text": "w1 \\ud800 w2"}\n', "not Unicode", "surrogate"),
    "ten thousand brackets": (
        b'{"text": ' + b"[" * 10000 + b"]" * 10000 + b"}\n",
        "broken JSON",
        "recursion",
    ),
    "a number of ten thousand digits": (
        b'{"text": ' + b"1" * 10000 + b"}\n",
        "broken JSON",
        "digits",
    ),
    "null text": (
        b'{"text": null}\n',
        "field is not text",
        "field 'text' is NoneType; expected text",
    ),
    "number text": (b'{"text": 3}\n', "field is not text", "field 'text' is int; expected text"),
    "list text": (
        b'{"text": ["w1"]}\n',
        "field is not text",
        "field 'text' is list; expected text",
    ),
    "object text": (
        b'{"text": {"a": "w1"}}\n',
        "field is not text",
        "field 'text' is dict; expected text",
    ),
    "missing field": (
        b'{"body": "w1 w2"}\n',
        "missing field",
        "no field 'text'; the row has body; write data.template",
    ),
    "no field": (b"{}\n", "missing field", "the row has none"),
    "a number": (b"3\n", "not a JSON object", "got int; expected an object such as"),
    "null": (b"null\n", "not a JSON object", "got NoneType"),
    "a list": (b'["w1 w2"]\n', "not a JSON object", "got list"),
    "empty text": (b'{"text": ""}\n', "empty text", "expected text"),
    "white text": (b'{"text": " \\n\\u00a0"}\n', "empty text", "expected text"),
    "one token": (b'{"text": "w1"}\n', "no position", "1 tokens"),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_a_bad_row_is_skipped_counted_and_told_once(tmp_path: Path, name: str):
    """By reason, with file and line, what came and what was expected; the good row behind it is
    read."""
    content, reason, part = BAD_ROWS[name]
    path = write(tmp_path / "x.jsonl", content + GOOD)
    reader = Reader([path])
    assert reader.tokens(3) == [GOOD_TOKENS] * 3
    assert reader.stream.bad == {reason: 3}
    assert len(reader.warnings) == 1
    assert f"skipped {path}:1: {reason} (" in reader.warnings[0] and part in reader.warnings[0]


@pytest.mark.parametrize("name", [name for name in BAD_ROWS if BAD_ROWS[name][1] != "empty line"])
def test_a_bad_row_stops_the_run_where_none_is_allowed(tmp_path: Path, name: str):
    """The error says where, what came, what was expected, how many, and what to write."""
    content, reason, part = BAD_ROWS[name]
    path = write(tmp_path / "x.jsonl", content + GOOD)
    with pytest.raises(DataError) as stopped:
        Reader([path], max_bad_fraction=0.0).tokens(1)
    message = str(stopped.value)
    assert message.startswith(f"{path}:1: {reason} (") and part in message
    assert (
        f"1 of 1 rows read are bad ({reason}: 1), more than data.max_bad_fraction = 0 allows"
        in message
    )
    assert "Mend the data, or raise data.max_bad_fraction" in message


def test_blank_lines_between_documents_are_no_fault(tmp_path: Path):
    """They are counted, and never stop a run."""
    reader = Reader([write(tmp_path / "x.jsonl", GOOD + b"\n\n\n" + GOOD)], max_bad_fraction=0.0)
    assert reader.tokens(4) == [GOOD_TOKENS] * 4
    assert reader.stream.bad == {"empty line": 6}


def test_one_warning_for_each_reason(tmp_path: Path):
    content = b"".join(
        BAD_ROWS[name][0]
        for name in ("null text", "number text", "missing field", "broken JSON", "list text")
    )
    reader = Reader([write(tmp_path / "x.jsonl", content + GOOD)])
    reader.tokens(2)
    assert reader.stream.bad == {"field is not text": 6, "missing field": 2, "broken JSON": 2}
    assert [
        text.partition("skipped ")[2].partition(" (")[0].rpartition("x.jsonl")[2]
        for text in reader.warnings
    ] == [":1: field is not text", ":3: missing field", ":4: broken JSON"]


def test_the_bad_fraction_is_of_the_rows_read(tmp_path: Path):
    """At 2 % the fourth bad row passes as the 200th read and the fifth stops the run; the first 100
    rows count as 100."""
    rows = [GOOD] * 200
    for bad in (0, 1, 160, 199):
        rows[bad] = b"{\n"
    reader = Reader([write(tmp_path / "x.jsonl", b"".join(rows))], max_bad_fraction=0.02)
    assert len(reader.tokens(196)) == 196
    assert reader.stream.bad == {"broken JSON": 3}
    with pytest.raises(
        DataError, match=r"x.jsonl:1: broken JSON .* 5 of 201 rows read are bad \(broken JSON: 5\)"
    ):
        reader.tokens(1)


@pytest.mark.parametrize("content", [b"{\n" * 5, b"\n" * 7, b'{"text": "w1"}\n' * 3, b"\n{}\n\n"])
def test_a_corpus_without_a_document_stops_instead_of_looping(tmp_path: Path, content: bytes):
    """Whatever data.max_bad_fraction allows."""
    with pytest.raises(
        DataError,
        match=r"x.jsonl:\d+: .*None of the \d rows is a document \(.*Write files with documents",
    ):
        Reader([write(tmp_path / "x.jsonl", content)]).tokens(1)


def test_one_good_row_among_many_bad_ones_is_found_again_and_again(tmp_path: Path):
    """The stop is for no document in a whole epoch, not for a long stretch without one."""
    assert (
        Reader([write(tmp_path / "x.jsonl", b"{\n" * 5 + GOOD + b"{\n" * 4)]).tokens(3)
        == [GOOD_TOKENS] * 3
    )


# --- Files.


def test_files_that_are_not_there_are_refused_with_what_to_write(tmp_path: Path):
    for name in ("absent.jsonl", "none*.jsonl"):
        with pytest.raises(
            DataError, match=r"data.train: no file at .*looked from .*Write the path of a .jsonl"
        ):
            Reader([tmp_path / name])


def test_an_empty_file_is_refused(tmp_path: Path):
    with pytest.raises(DataError, match="data.train: an empty file at"):
        Reader([write(tmp_path / "x.jsonl", b"")])


@pytest.mark.parametrize("name", ["x.docx", "x", "x.bin.gz"])
def test_an_unknown_ending_is_refused_with_what_to_write(tmp_path: Path, name: str):
    with pytest.raises(
        DataError,
        match=r"can not tell the format of .* Write data.format=jsonl, parquet, csv, tsv or text",
    ):
        Reader([write(tmp_path / name, GOOD)])


def test_the_format_can_be_written_where_the_ending_says_nothing(tmp_path: Path):
    assert Reader([write(tmp_path / "x.bin", GOOD)], format="jsonl").tokens(1) == [GOOD_TOKENS]


UNREADABLE = {
    "truncated.jsonl.gz": gzip.compress(GOOD * 100)[:-12],
    "no_gzip.jsonl.gz": GOOD,
    "empty_inside.jsonl.gz": gzip.compress(b""),
    "no_parquet.parquet": b"hello",
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", UNREADABLE)
def test_an_unreadable_file_is_refused_by_name(tmp_path: Path, name: str):
    """Half a file is no corpus: a truncated download is refused whole, never read as far as it
    goes."""
    with pytest.raises(DataError) as refused:
        Reader([write(tmp_path / name, UNREADABLE[name])])
    message = str(refused.value)
    assert (
        message.startswith(f"data.train: '{tmp_path / name}' can not be read: ")
        and "Expected a readable .jsonl, .parquet, .csv, .tsv or .txt file" in message
    )


def test_a_truncated_parquet_file_is_refused(tmp_path: Path):
    path = tmp_path / "x.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": ["w1 w2"] * 50}), path)
    write(path, path.read_bytes()[:-20])
    with pytest.raises(DataError, match=r"x.parquet' can not be read: "):
        Reader([path])


def test_json_lines_text_gzip_and_parquet_hold_the_same_documents(tmp_path: Path):
    texts = ["w1 w2", "w3 w4 w5", "w6 w7"]
    lines = b"".join(json.dumps({"text": text}).encode() + b"\n" for text in texts)
    files = [
        write(tmp_path / "a.jsonl", lines),
        write(tmp_path / "b.jsonl.gz", gzip.compress(lines)),
        write(tmp_path / "c.txt", "\n".join(texts).encode()),
        write(tmp_path / "d.txt.gz", gzip.compress("\r\n".join(texts).encode())),
        tmp_path / "e.parquet",
    ]
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), files[-1])
    expected = [[WORDS.index(word) for word in text.split()] for text in texts]
    for path in files:
        assert Reader([path]).tokens(3) == expected, path.name
    together = Reader(files)
    assert together.tokens(15) == expected * 5
    assert together.rows.where(4) == f"{files[1]}:2"


def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path: Path):
    assert Reader([write(tmp_path / "x.jsonl", b"\xef\xbb\xbf" + GOOD)]).tokens(1) == [GOOD_TOKENS]
    assert Reader([write(tmp_path / "x.txt", b"\xef\xbb\xbfw1 w2 w3\n")]).tokens(1) == [GOOD_TOKENS]


def test_only_line_ends_end_a_line(tmp_path: Path):
    """A line separator of Unicode inside a document does not split it, so line numbers are those of
    an editor."""
    path = write(tmp_path / "x.jsonl", '{"text": "w1\u2028w2\u0085w3"}\n{\n'.encode() + GOOD)
    reader = Reader([path])
    assert reader.tokens(1) == [GOOD_TOKENS]
    reader.tokens(1)
    assert reader.warnings[0].startswith(f"skipped {path}:2:")


@pytest.mark.parametrize("column", [[None, "w1 w2"], ["", "w1 w2"], [None, None, "w1 w2"]])
def test_empty_cells_of_a_parquet_file_are_bad_documents(tmp_path: Path, column: list):
    """Unlike an empty line of a text file, they count against data.max_bad_fraction."""
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), tmp_path / "x.parquet")
    reader = Reader([tmp_path / "x.parquet"])
    assert reader.tokens(1) == [[7, 8]]
    assert sum(reader.stream.bad.values()) == len(column) - 1
    with pytest.raises(DataError, match="x.parquet:1: "):
        Reader([tmp_path / "x.parquet"], max_bad_fraction=0.0).tokens(1)


def test_numbers_in_a_parquet_file_are_no_text(tmp_path: Path):
    pyarrow.parquet.write_table(pyarrow.table({"text": [1, 2]}), tmp_path / "x.parquet")
    with pytest.raises(DataError, match=r"x.parquet:2: field is not text .*None of the 2 rows"):
        Reader([tmp_path / "x.parquet"]).tokens(1)


def test_a_glob_reads_its_files_in_the_order_of_their_names(tmp_path: Path):
    for name, word in (("b.jsonl", 2), ("a.jsonl", 1), ("c.jsonl", 3)):
        write(tmp_path / name, b'{"text": "w%d w0"}\n' % word)
    assert Reader([tmp_path / "*.jsonl"]).tokens(3) == [[7, 6], [8, 6], [9, 6]]


# --- Text and tokens.


def test_the_template_names_the_fields_of_a_row(tmp_path: Path):
    path = write(tmp_path / "x.jsonl", b'{"q": "w1 {w9}", "a": "w2", "n": 3}\n')
    assert Reader([path], template="{q} w8 {a} {{").tokens(1) == [[7, 4, 14, 8, 4]]


def test_a_document_is_cut_after_its_end_token_is_put(tmp_path: Path):
    path = write(tmp_path / "x.jsonl", GOOD)
    assert Reader([path], append_eos=True).tokens(1) == [[*GOOD_TOKENS, 1]]
    assert Reader([path], append_eos=True, max_document_tokens=3).tokens(1) == [GOOD_TOKENS]
    assert Reader([path], max_document_tokens=2).tokens(1) == [GOOD_TOKENS[:2]]


def test_an_end_token_that_the_tokenizer_lacks_is_refused(tmp_path: Path):
    tokenizer = word_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(
        ConfigError, match="data.append_eos needs a tokenizer that has an end-of-sequence token"
    ):
        Reader([write(tmp_path / "x.jsonl", GOOD)], append_eos=True, tokenizer=tokenizer)


def test_a_document_of_100_000_words_is_cut_not_dropped(tmp_path: Path):
    """Longer than any context, without a warning of the tokenizer."""
    path = write(tmp_path / "x.jsonl", b'{"text": "' + b"w1 " * 10**5 + b'"}\n')
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert Reader([path], max_document_tokens=5).tokens(1) == [[7] * 5]


# --- Order.


def test_each_epoch_is_a_permutation_of_the_corpus(tmp_path: Path):
    reader = Reader([numbered(tmp_path / "x.jsonl", 30)], shuffle=True)
    epochs = [[document.id for document in reader.stream.next_documents(30)] for _ in range(4)]
    assert all(sorted(epoch) == list(range(30)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_the_order_depends_on_the_seed_and_on_nothing_else(tmp_path: Path):
    path = numbered(tmp_path / "x.jsonl", 30)

    def order(seed: int) -> list[int]:
        return [
            document.id
            for document in Reader([path], shuffle=True, seed=seed).stream.next_documents(60)
        ]

    assert order(0) == order(0)
    assert order(0) != order(1)


def test_without_shuffling_the_files_are_read_as_they_are(tmp_path: Path):
    reader = Reader([numbered(tmp_path / "x.jsonl", 10)], shuffle=False)
    assert [document.id for document in reader.stream.next_documents(20)] == [
        *range(10),
        *range(10),
    ]


def test_a_document_keeps_its_id_and_its_tokens_in_every_epoch(tmp_path: Path):
    reader = Reader([numbered(tmp_path / "x.jsonl", 30)], shuffle=True)
    assert all(
        document.tokens.tolist() == [6 + document.id, 6]
        for document in reader.stream.next_documents(90)
    )


def test_a_document_that_comes_twice_in_a_step_says_how_often_it_came_before(tmp_path: Path):
    """Counted in the batch of all ranks, and from 0 again in the next one."""
    reader = Reader([numbered(tmp_path / "x.jsonl", 3)], shuffle=False)
    batches = [
        [(document.id, document.occurrence) for document in reader.stream.next_documents(count)]
        for count in (4, 7)
    ]
    assert batches[0] == [(0, 0), (1, 0), (2, 0), (0, 1)]
    assert batches[1] == [(1, 0), (2, 0), (0, 0), (1, 1), (2, 1), (0, 1), (1, 2)]


# Before the first document, inside an epoch, at its end, in the next, with bad rows behind and
# ahead.
@pytest.mark.parametrize("shuffle, read", list(product((True, False), (0, 1, 7, 26, 27, 40))))
def test_a_cursor_resumes_exactly(tmp_path: Path, shuffle: bool, read: int):
    """No document lost, none repeated, the counts of bad rows carried on, no warning told twice."""
    path = numbered(tmp_path / "x.jsonl", 30)
    lines = path.read_bytes().splitlines(keepends=True)
    lines[3] = lines[11] = lines[29] = b"{\n"
    write(path, b"".join(lines))
    whole, first = (Reader([path], shuffle=shuffle) for _ in range(2))
    documents = [document.id for document in whole.stream.next_documents(read + 60)]
    assert [document.id for document in first.stream.next_documents(read)] == documents[:read]
    state = json.loads(json.dumps(first.stream.state()))
    second = Reader([path], shuffle=shuffle)
    second.stream.load_state(state)
    assert [document.id for document in second.stream.next_documents(60)] == documents[read:]
    assert second.stream.state() == whole.stream.state()
    assert len(first.warnings + second.warnings) == 1


def test_a_corpus_that_has_changed_is_refused_at_resume(tmp_path: Path):
    state = Reader([numbered(tmp_path / "x.jsonl", 30)]).stream.state()
    with pytest.raises(
        DataError, match="x.jsonl is not what the checkpoint was made from: it had .* bytes, sha256"
    ):
        Reader([numbered(tmp_path / "y.jsonl", 29)]).stream.load_state(state)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 6, 12])
def test_the_documents_of_a_step_are_the_same_at_any_world_size(world_size: int):
    """The ranks' shares, one after another, are the batch."""
    batch = list(range(12))
    assert [
        document
        for rank in range(world_size)
        for document in batch[share_of_rank(12, rank, world_size)]
    ] == batch


def test_a_batch_that_the_ranks_can_not_share_is_refused_with_one_that_they_can():
    with pytest.raises(
        ConfigError,
        match=(
            r"optim.batch_size must be a multiple of the 8 ranks.*write optim.batch_size=16, got 12"
        ),
    ):
        share_of_rank(12, 0, 8)


def test_rows_are_found_across_files_of_unequal_length():
    """The first and last row of each table."""
    tables = [
        Table(name, [{"text": f"{name}{row}"} for row in range(count)], "")
        for name, count in (("a", 3), ("b", 1), ("c", 2))
    ]
    rows = Rows([tables])
    assert len(rows) == 6
    assert [rows.where(index) for index in range(6)] == ["a:1", "a:2", "a:3", "b:1", "c:1", "c:2"]
    assert [rows.read(index)["text"] for index in range(6)] == ["a0", "a1", "a2", "b0", "c0", "c1"]
