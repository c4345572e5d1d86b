"""Long documents, large corpora, many files: what they cost."""

import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from rlp.data.documents import first_ids
from tests import REPOSITORY
from tests.data.reading import GOOD, GOOD_TOKENS, Reader, write
from tests.tiny_models import word_tokenizer

pytestmark = pytest.mark.usefixtures("unpacked")


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
from rlp.data.reader import DocumentReader
from rlp.data.stream import DocumentStream
from rlp.data.sources import open_rows

def own_memory():
    lines = open("/proc/self/status")
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))

unpacked.UNPACKED = unpacked.Path(sys.argv[1])
config = DataConfig(train=sys.argv[2:], max_document_tokens=16)
before = own_memory()
rows = open_rows(config.train, config, "train", "data.train")
reader = DocumentReader(rows, word_tokenizer(), config, candidates=after_the_first)
stream = DocumentStream(reader, seed=0, warn=print)
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
