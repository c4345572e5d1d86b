"""Splicing at scale: in micro-batches, and on several ranks."""

import json
import re
import threading
from pathlib import Path

import pytest

from rlp.compare.splice import splice
from rlp.config import ConfigError
from rlp.measure.frozen import load_frozen
from rlp.measure.panel_scoring import ThinkingModel
from rlp.model.layout import NO_THINK, Layout
from rlp.model.scoring import Scores, score
from rlp.process.faults import forget_passages
from rlp.process.ranks import Ranks
from tests.rank_threads import ThreadRank, on_ranks
from tests.training import read_lines, tiny_config


@pytest.fixture
def one_model_at_a_time(monkeypatch: pytest.MonkeyPatch):
    """transformers loads no two in one process."""
    loading = threading.Lock()

    def load_alone(*arguments: object) -> ThinkingModel:
        with loading:
            return load_frozen(*arguments)

    monkeypatch.setattr("rlp.compare.splice.load_frozen", load_alone)


def splice_tiny(
    folder: Path, model: Path, corpus: Path, ranks: Ranks, num_documents: int, **overrides: object
) -> Path:
    """What splicing makes, with batches of 4; each rank reads a config of its own."""
    own = folder / f"rank{ranks.rank}"
    own.mkdir(exist_ok=True, parents=True)
    config = tiny_config(own / "run", model, corpus, thought__temperature=1.0, **overrides)
    config.run.dir = "unused"
    splice(config, num_documents, folder / "spliced", ranks)
    return folder / "spliced"


@pytest.mark.parametrize("layout", ["repeated", "tree"])
def test_several_ranks_splice_what_one_does(
    tmp_path, model_folder, corpus, layout, one_model_at_a_time
):
    """9 documents in micro-batches of 2, thirds of a step, and a last step of one document, which
    leaves two of three ranks without one: the same bytes, and the same work counted."""

    def work(rank: Ranks) -> Path:
        folder = tmp_path / f"of_{rank.world_size}"
        return splice_tiny(folder, model_folder, corpus, rank, 9, engine__layout=layout)

    (alone,) = on_ranks(1, work)
    for world_size in (2, 3):
        together = on_ranks(world_size, work)[0]
        for name in ("documents.jsonl", "splice.json", "config.yaml"):
            assert (together / name).read_bytes() == (alone / name).read_bytes(), name
        spent, expected = (
            json.loads((folder / "ledger.json").read_text()) for folder in (together, alone)
        )
        for name in ("input_tokens", "flops"):
            assert spent[name] == expected[name]


@pytest.mark.parametrize(
    "settings, largest",
    [
        ({}, (2, 2 * 2 * 4)),
        ({"optim__micro_batch_size": 4}, (4, 4 * 2 * 4)),
        ({"optim__thoughts_per_forward": 3}, (2, 2 * 2 * 3)),
    ],
)
def test_splicing_scores_in_the_micro_batches_of_a_run(
    tmp_path, model_folder, corpus, monkeypatch, settings, largest
):
    """Documents and thoughts in a forward at most, of 4 documents a step with 2 positions of 4
    thoughts; what is spliced is the same up to rounding."""
    seen, asked = [], score

    def counted(model: object, layout: Layout, **kinds: object) -> Scores:
        seen.append((layout.sizes[NO_THINK] // 2, len(layout.thought_mask)))
        return asked(model, layout, **kinds)

    monkeypatch.setattr("rlp.compare.splice.score", counted)
    folder = splice_tiny(tmp_path / "some", model_folder, corpus, ThreadRank(), 8, **settings)
    assert tuple(max(column) for column in zip(*seen)) == largest

    whole = splice_tiny(
        tmp_path / "all", model_folder, corpus, ThreadRank(), 8, optim__micro_batch_size=4
    )
    for one, other in zip(*(read_lines(of / "documents.jsonl") for of in (folder, whole))):
        assert one["tokens"] == other["tokens"] and one["position"] == other["position"]
        assert one["group_rewards"] == pytest.approx(other["group_rewards"], abs=1e-5)


@pytest.mark.parametrize("world_size", [1, 2])
def test_rewards_that_are_no_numbers_are_refused_on_all_ranks(
    tmp_path, model_folder, corpus, monkeypatch, one_model_at_a_time, world_size
):
    """Whichever rank has met them: with the documents, and nothing is written."""
    monkeypatch.setenv("RLP_FAULT", "score.target:2:nan")
    forget_passages()

    def work(rank: Ranks) -> str:
        with pytest.raises(ConfigError, match="gives rewards that are not finite") as caught:
            splice_tiny(tmp_path, model_folder, corpus, rank, 8)
        return str(caught.value)

    told = set(on_ranks(world_size, work))
    assert len(told) == 1 and re.search(r"for documents \[\d+\]\. Its weights", told.pop())
    assert not (tmp_path / "spliced").exists()
