"""Several sources drawn by their weights, each with epochs of its own."""

import json
from collections import Counter
from pathlib import Path

import pytest

from rlp.config import ConfigError, DataConfig
from rlp.data.errors import DataError
from rlp.data.stream import share_of_rank
from tests.data.reading import Reader, write

pytestmark = pytest.mark.usefixtures("unpacked")


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
