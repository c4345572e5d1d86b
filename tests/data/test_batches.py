"""Batches shared by ranks: the documents are those of one process, and each rank tokenizes its
own, those of the next batch while a step is made."""

import json
import os
import threading
from collections import Counter
from pathlib import Path

import pytest

from rlp.data.batches import Batches
from rlp.data.documents import Document
from rlp.data.errors import DataError
from tests.data.reading import Reader, numbered, write
from tests.rank_threads import DEADLINE_S, ThreadRank, on_ranks


def count_reads(reader: Reader) -> Counter:
    """How often each row is read and tokenized from here on."""
    counts, read = Counter(), reader.reader.read

    def counted(row: int) -> object:
        counts[row] += 1
        return read(row)

    reader.reader.read = counted
    return counts


def take(reader: Reader, rank: ThreadRank, size: int, steps: int) -> list[list[tuple]]:
    """This rank's documents of some steps."""
    batches = Batches(reader.stream, size, rank)
    shares = [batches.next_share() for _ in range(steps)]
    batches.close()
    return [[(d.id, d.occurrence, d.tokens.tolist()) for d in share] for share in shares]


def with_bad_rows(folder: Path) -> list[Path]:
    """Three files; the first and the second hold bad rows of several kinds."""
    files = [
        numbered(folder / f"{name}.jsonl", count)
        for name, count in (("a", 40), ("b", 7), ("c", 20))
    ]
    lines = (folder / "a.jsonl").read_bytes().splitlines(keepends=True)
    lines[3] = lines[4] = lines[21] = b"{\n"
    lines[5] = b"\n"
    lines[39] = b'{"text": "w1"}\n'
    write(folder / "a.jsonl", b"".join(lines))
    lines = (folder / "b.jsonl").read_bytes().splitlines(keepends=True)
    write(folder / "b.jsonl", b"".join([*lines[:6], b'{"words": "w1 w2"}\n']))
    return files


# One source in its order and shuffled, a mixture; batches within an epoch and of several.
@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize(
    "settings, size",
    [
        ({"shuffle": False}, 6),
        ({"shuffle": True, "seed": 3}, 12),
        ({"shuffle": True, "weights": [0.6, 0.3, 0.1]}, 6),
        ({"shuffle": True, "weights": [0.2, 0.6, 0.2]}, 48),
    ],
)
def test_ranks_have_the_documents_of_one_process(
    tmp_path: Path, settings: dict, size: int, world_size: int
):
    """Over ends of epochs and bad rows: the same documents and occurrences in the same order, the
    same state after each step, the same rows skipped with the same words, each told once."""
    files, steps = with_bad_rows(tmp_path), 9
    plain = Reader(files, **settings)
    expected, states = [], []
    for _ in range(steps):
        documents = plain.stream.next_documents(size)
        expected.append([(d.id, d.occurrence, d.tokens.tolist()) for d in documents])
        states.append(plain.stream.state())

    def work(rank: ThreadRank) -> tuple:
        reader = Reader(files, **settings)
        batches, shares = Batches(reader.stream, size, rank), []
        for state in states:
            share = batches.next_share()
            shares.append([(d.id, d.occurrence, d.tokens.tolist()) for d in share])
            assert reader.stream.state() == state
        batches.close()
        return shares, reader.warnings, reader.listed

    ranks = on_ranks(world_size, work)
    for step in range(steps):
        assert [one for shares, _, _ in ranks for one in shares[step]] == expected[step]
    assert sum(plain.stream.bad.values()) > 3
    assert [told for _, *told in ranks] == [[plain.warnings, plain.listed]] * world_size


def test_a_rank_tokenizes_its_share_alone(tmp_path: Path):
    """4 steps of 6 documents on 3 ranks, and 2 documents each ahead for the fifth: no row is read
    twice, and none by two ranks."""
    path = numbered(tmp_path / "x.jsonl", 40)

    def work(rank: ThreadRank) -> Counter:
        reader = Reader([path])
        counts = count_reads(reader)
        batches = Batches(reader.stream, 6, rank)
        for _ in range(4):
            batches.next_share()
        batches._ahead.found()
        return counts

    counts = on_ranks(3, work)
    assert [sum(of_rank.values()) for of_rank in counts] == [10, 10, 10]
    assert sum(counts, Counter()) == Counter(range(30))


def test_a_bad_row_costs_the_rows_that_it_shifts(tmp_path: Path):
    """Row 1 of 12 is bad: each share begins or ends a row later, which is one row more to read on
    each rank and not the batch again."""
    lines = numbered(tmp_path / "x.jsonl", 40).read_bytes().splitlines(keepends=True)
    lines[1] = b"{\n"
    path = write(tmp_path / "x.jsonl", b"".join(lines))

    def work(rank: ThreadRank) -> list[int]:
        reader = Reader([path])
        counts = count_reads(reader)
        batches = Batches(reader.stream, 12, rank)
        batches.next_share()
        batches.close()
        ahead = set(batches._ahead.found())
        return sorted(set(counts) - ahead)

    assert on_ranks(3, work) == [[0, 1, 2, 3, 4], [4, 5, 6, 7, 8], [8, 9, 10, 11, 12]]


class Gate:
    """Reading stops at a row until it is let through."""

    def __init__(self, reader: Reader, row: int) -> None:
        self.arrived, self.open = threading.Event(), threading.Event()
        self.threads: dict[int, str] = {}
        self._read, self._row = reader.reader.read, row
        reader.reader.read = self.read

    def read(self, row: int) -> object:
        self.threads[row] = threading.current_thread().name
        if row == self._row:
            self.arrived.set()
            assert self.open.wait(DEADLINE_S)
        return self._read(row)


def test_the_next_batch_is_tokenized_while_a_step_is_made(tmp_path: Path):
    """The main thread has its first batch and goes on although a row of the second is not done;
    when it asks for that batch, it reads nothing itself."""
    reader = Reader([numbered(tmp_path / "x.jsonl", 20)])
    gate = Gate(reader, row=5)
    batches = Batches(reader.stream, 4, ThreadRank())
    first = batches.next_share()
    assert gate.arrived.wait(DEADLINE_S)
    assert [document.id for document in first] == [0, 1, 2, 3]
    assert sorted(gate.threads) == [0, 1, 2, 3, 4, 5], "bounded, and one row at a time"

    gate.open.set()
    assert [document.id for document in batches.next_share()] == [4, 5, 6, 7]
    batches.close()
    here = threading.current_thread().name
    assert [row for row in range(8) if gate.threads[row] == here] == [0, 1, 2, 3]


def test_what_is_read_ahead_changes_no_cursor(tmp_path: Path):
    """A checkpoint of step 1 continues with the documents of step 2, which had been read ahead; a
    stream that is set back elsewhere goes on from there."""
    path = numbered(tmp_path / "x.jsonl", 20)
    reader = Reader([path], shuffle=True)
    batches = Batches(reader.stream, 4, ThreadRank())
    begun = json.loads(json.dumps(reader.stream.state()))
    first = batches.next_share()
    batches._ahead.found()
    saved = json.loads(json.dumps(reader.stream.state()))
    assert saved["cursors"] == [4] and saved["given"] == 4

    other = Reader([path], shuffle=True)
    other.stream.load_state(saved)
    resumed = Batches(other.stream, 4, ThreadRank())
    second = [document.id for document in resumed.next_share()]
    assert second == [document.id for document in batches.next_share()]

    reader.stream.load_state(begun)
    again = batches.next_share()
    assert [document.id for document in again] == [document.id for document in first]
    batches.close()
    resumed.close()


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_row_that_can_not_be_read_ends_the_step_that_needs_it(tmp_path: Path, world_size: int):
    """On all ranks with the same words, whoever has read it, and not a step earlier; a run that
    ends before it never hears of it."""
    path = numbered(tmp_path / "x.jsonl", 20)

    def work(rank: ThreadRank) -> str:
        reader = Reader([path])
        read = reader.reader._document

        def breaking(row: int) -> Document:
            if row == 7:
                raise DataError("x.jsonl has changed")
            return read(row)

        reader.reader._document = breaking
        batches = Batches(reader.stream, 4, rank)
        batches.next_share()
        batches._ahead.found()
        with pytest.raises(DataError, match="x.jsonl has changed") as caught:
            batches.next_share()
        batches.close()
        return str(caught.value)

    assert on_ranks(world_size, work) == ["x.jsonl has changed"] * world_size


def test_what_nobody_foresaw_is_raised_in_its_step(tmp_path: Path):
    """An error of a tokenizer, say: not in the thread that reads ahead, and as it is."""
    reader = Reader([numbered(tmp_path / "x.jsonl", 20)])
    read = reader.reader._document
    reader.reader._document = lambda row: 1 // (row != 6) and read(row)
    batches = Batches(reader.stream, 4, ThreadRank())
    batches.next_share()
    assert list(batches._ahead.found()) == [4, 5]
    with pytest.raises(ZeroDivisionError):
        batches.next_share()
    batches.close()


def test_data_that_is_too_bad_is_refused_on_all_ranks_alike(tmp_path: Path):
    """With the words of one process: how many of how many rows."""
    lines = numbered(tmp_path / "x.jsonl", 40).read_bytes().splitlines(keepends=True)
    lines[10:] = [b"{\n"] * 30
    path = write(tmp_path / "x.jsonl", b"".join(lines))
    with pytest.raises(DataError) as expected:
        Reader([path], max_bad_fraction=0.1).stream.next_documents(48)

    def work(rank: ThreadRank) -> str:
        with pytest.raises(DataError) as caught:
            take(Reader([path], max_bad_fraction=0.1), rank, 24, 2)
        return str(caught.value)

    assert on_ranks(2, work) == [str(expected.value)] * 2


def test_a_run_that_ends_waits_for_one_row_and_no_more(tmp_path: Path):
    reader = Reader([numbered(tmp_path / "x.jsonl", 20)])
    gate = Gate(reader, row=5)
    batches = Batches(reader.stream, 4, ThreadRank())
    batches.next_share()
    assert gate.arrived.wait(DEADLINE_S)
    closing = threading.Thread(target=batches.close)
    closing.start()
    while not batches._ahead._is_closed:
        pass
    gate.open.set()
    closing.join(DEADLINE_S)
    assert not closing.is_alive() and sorted(gate.threads) == [0, 1, 2, 3, 4, 5]


def test_a_fork_while_rows_are_read_ahead_goes_on(tmp_path: Path):
    """The thread stays behind: the child reads what it lacks itself."""
    reader = Reader([numbered(tmp_path / "x.jsonl", 20)])
    gate = Gate(reader, row=5)
    batches = Batches(reader.stream, 4, ThreadRank())
    batches.next_share()
    assert gate.arrived.wait(DEADLINE_S)
    child = os.fork()
    if child == 0:
        gate.open.set()
        os._exit([document.id for document in batches.next_share()] != [4, 5, 6, 7])
    gate.open.set()
    assert os.waitpid(child, 0)[1] == 0
    batches.close()
