"""Fixtures of all rooms: a word tokenizer, a tiny model, a corpus, this process's ranks, runs."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from rlp.process.exit_codes import DONE
from rlp.process.ranks import Ranks, start_ranks
from tests.faults.harness import Harness
from tests.tiny_models import WORDS, tiny_policy, word_tokenizer
from tests.training import tiny_config, train, write_corpus

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


LINEAR = torch.nn.functional.linear


@pytest.fixture(autouse=True)
def plain_linear():
    """A run under ZeRO-3 puts DeepSpeed's `linear` in place of torch's and leaves it there, for the
    rest of the process: a bias is then added by another operation, and a later test would compute,
    and count, what it does not when it is run alone."""
    yield
    torch.nn.functional.linear = LINEAR


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return word_tokenizer()


@pytest.fixture(scope="session")
def model_folder(
    tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast
) -> Path:
    """A tiny random Qwen3 checkpoint with its tokenizer, as a Hugging Face folder."""
    folder = tmp_path_factory.mktemp("model") / "qwen3"
    tiny_policy().lm.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def harness(tmp_path_factory: pytest.TempPathFactory):
    """Runs of one or more ranks, forked from one process that has imported everything."""
    made = Harness(tmp_path_factory.mktemp("harness"))
    yield made
    made.close()


@pytest.fixture(scope="session")
def ranks() -> Ranks:
    return start_ranks()


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    """Twenty documents of 6 to 15 random words."""
    generator = np.random.default_rng(0)
    documents = [
        " ".join(
            WORDS[i] for i in generator.integers(5, len(WORDS), size=generator.integers(6, 16))
        )
        for _ in range(20)
    ]
    return write_corpus(tmp_path_factory.mktemp("corpus") / "train.jsonl", documents)


@pytest.fixture
def trained(tmp_path, model_folder, corpus, ranks):
    """Trains a tiny run with overrides and returns its folder."""

    def run(name: str = "run", **overrides: object) -> Path:
        assert train(tiny_config(tmp_path / name, model_folder, corpus, **overrides), ranks) == DONE
        return tmp_path / name

    return run


@pytest.fixture
def unpacked(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch):
    """What is unpacked goes to a folder of the test."""
    monkeypatch.setattr("rlp.data.unpacked.UNPACKED", tmp_path_factory.mktemp("unpacked"))
