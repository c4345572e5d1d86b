"""Splicing: whose thoughts, into which documents; in micro-batches, and on several ranks."""

import json
import re
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlp.compare.splice import Splicing, splice
from rlp.config import ConfigError, load_config
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
    how = overrides.pop("how", Splicing())
    own.mkdir(exist_ok=True, parents=True)
    config = tiny_config(own / "run", model, corpus, thought__temperature=1.0, **overrides)
    config.run.dir = "unused"
    splice(config, num_documents, folder / "spliced", ranks, how)
    return folder / "spliced"


@pytest.mark.parametrize("layout, selector", [("repeated", "uniform"), ("tree", "entropy")])
def test_several_ranks_splice_what_one_does(
    tmp_path, model_folder, corpus, layout, selector, one_model_at_a_time
):
    """9 documents in micro-batches of 2, thirds of a step, and a last step of one document, which
    leaves two of three ranks without one: the same bytes, and the same work counted."""

    def work(rank: Ranks) -> Path:
        folder = tmp_path / f"of_{rank.world_size}"
        return splice_tiny(
            folder,
            model_folder,
            corpus,
            rank,
            9,
            engine__layout=layout,
            position__selector=selector,
        )

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
        assert one["tokens"] == other["tokens"] and one["positions"] == other["positions"]
        torch.testing.assert_close(
            *(torch.tensor(line["group_rewards"]) for line in (one, other)), rtol=0, atol=1e-5
        )


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


@pytest.fixture
def spliced(tmp_path, model_folder, corpus) -> Callable[..., list[dict]]:
    """Splices 12 documents, or some; what documents.jsonl holds, with the folder told first."""

    def run(name: str, num_documents: int = 12, **settings: object) -> tuple[Path, list[dict]]:
        made = splice_tiny(
            tmp_path / name, model_folder, corpus, ThreadRank(), num_documents, **settings
        )
        return made, read_lines(made / "documents.jsonl")

    return run


def test_a_document_holds_the_best_thought_of_each_position(spliced, corpus):
    """Without what stands between the markers each line is a document of the corpus; a thought is
    there where it helped, both of them in one line, and the spans are theirs and the next two
    tokens'."""
    folder, lines = spliced("spliced", target__horizon=2)
    plain = [line["text"].split() for line in read_lines(corpus)]
    thoughts = 0
    for line in lines:
        words, tokens, left, put_in = line["text"].split(), line["tokens"], [], 0
        for place in range(len(tokens)):
            open_at = max((at for at in range(place + 1) if tokens[at] == 2), default=-1)
            inside = open_at >= 0 and 3 not in tokens[open_at:place]
            left += [] if inside else [words[place]]
        assert left == plain[line["document"]]

        assert len(line["positions"]) == 2 == len(line["group_rewards"])
        assert line["rewards"] == [max(group) for group in line["group_rewards"]]
        assert line["with_thought"] == [reward > 0 for reward in line["rewards"]]
        for position, kept in zip(line["positions"], line["with_thought"]):
            if kept:
                start = position + put_in
                close = tokens.index(3, start)
                assert tokens[start] == 2 and tokens[close + 1] != 2
                put_in += close + 1 - start
                thoughts += 1
                spans = [(t, a, b) for a, b in line["loss_spans"] for t in range(a, b)]
                assert start + 1 in [t for t, _, _ in spans] and start not in [
                    t for t, _, _ in spans
                ]
    told = json.loads((folder / "splice.json").read_text())
    assert told["lines"] == len(lines) == 12 and told["positions"] == 24
    assert told["thoughts"] == thoughts and told["with_thought_frac"] == thoughts / 24
    assert 12 < thoughts


def test_positions_by_difficulty_are_those_of_the_model_that_thinks(
    spliced, model_folder, corpus, tokenizer
):
    """The two tokens that it thinks least probable, and the pass that finds them is counted."""
    folder, lines = spliced("hard", 4, position__selector="surprisal")
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    texts = [line["text"] for line in read_lines(corpus)]
    for line in lines:
        tokens = torch.tensor(tokenizer(texts[line["document"]])["input_ids"])
        logprob = model(tokens[None]).logits[0, :-1].log_softmax(dim=1)
        surprisal = -logprob.gather(1, tokens[1:, None])[:, 0]
        assert sorted((surprisal.topk(2).indices + 1).tolist()) == line["positions"]
    plain, _ = spliced("any", 4)
    flops = [
        json.loads((of / "ledger.json").read_text())["phases"]["score"]["flops"]
        for of in (folder, plain)
    ]
    assert flops[0] > flops[1]


def test_a_line_for_each_position_holds_its_thought_alone(spliced, corpus):
    """The same thoughts, tokens and cost as in one line a document."""
    together, whole = spliced("whole")
    apart, single = spliced("apart", how=Splicing(lines="position"))
    assert len(single) == 24 and all(len(line["positions"]) == 1 for line in single)
    pairs = [(line["document"], *line["positions"], *line["rewards"]) for line in single]
    assert pairs == [
        (line["document"], position, reward)
        for line in whole
        for position, reward in zip(line["positions"], line["rewards"])
    ]
    size = {line["document"]: 0 for line in whole}
    for line in single:
        size[line["document"]] += len(line["tokens"])
    words = [len(line["text"].split()) for line in read_lines(corpus)]
    assert all(
        size[line["document"]] == len(line["tokens"]) + words[line["document"]] for line in whole
    )
    flops = [json.loads((of / "ledger.json").read_text())["flops"] for of in (together, apart)]
    assert flops[0] == flops[1]


def test_a_round_reads_on_and_counts_on(spliced):
    """Two rounds of 6 documents are the two halves of one of 12, thoughts too, and their ledger is
    that of all."""
    (whole, every), (first, one) = spliced("whole"), spliced("first", 8)
    second, other = spliced("second", 4, how=Splicing(skip=8, ledger=first / "ledger.json"))
    assert [line["tokens"] for line in one + other] == [line["tokens"] for line in every]
    spent, expected = (json.loads((of / "ledger.json").read_text()) for of in (second, whole))
    for name in ("input_tokens", "paper_flops", "flops"):
        assert spent[name] == pytest.approx(expected[name], rel=1e-12)
    assert spent["phases"]["decode"] | {"seconds": 0} == expected["phases"]["decode"] | {
        "seconds": 0
    }


def test_another_model_thinks_in_the_same_documents(spliced, trained):
    """That of an earlier round, with its own thoughts; the config that is written names it."""
    export = trained("round") / "export"
    folder, lines = spliced("later", how=Splicing(model=str(export)))
    _, before = spliced("before")
    assert [line["document"] for line in lines] == [line["document"] for line in before]
    assert [line["group_rewards"] for line in lines] != [line["group_rewards"] for line in before]
    assert load_config(folder / "config.yaml").model.path == str(export)


def test_random_thoughts_cost_one_sample_and_no_reward(spliced):
    """One thought at each position of half of the documents, whatever it is worth; the others are
    as they were, and cost nothing."""
    folder, lines = spliced("random", 20, how=Splicing(keep="random", plain_share=0.5))
    told = json.loads((folder / "splice.json").read_text())
    plain = [line for line in lines if not line["positions"]]
    assert 4 <= len(plain) <= 16 and told["lines_with_thought"] == 20 - len(plain)
    assert all(2 not in line["tokens"] and line["loss_spans"] == [] for line in plain)
    for line in lines:
        assert line["rewards"] is None and line["with_thought"] == [True] * len(line["positions"])
        assert all(line["tokens"][first] == 2 for first in line["positions"][:1])
    ledger = json.loads((folder / "ledger.json").read_text())
    assert ledger["phases"]["score"]["flops"] == 0 < ledger["phases"]["decode"]["flops"]
    assert ledger["paper_flops"] - ledger["input_tokens"] == told["positions"] * 5


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"keep": "worst"}, "--keep must be one of best, random"),
        ({"lines": "word"}, "--lines must be one of document, position"),
        ({"skip": -1}, "--skip must be at least 0"),
        ({"keep": "random", "plain_share": 1.0}, "--plain-share is a share from 0 to 1"),
        ({"plain_share": 0.5}, "--plain-share goes with --keep random"),
    ],
)
def test_askings_that_make_no_sense_are_refused(settings: dict, words: str):
    with pytest.raises(ConfigError, match=words):
        Splicing(**settings)


def test_a_model_of_another_tokenizer_or_no_ledger_is_refused(
    spliced, tmp_path, model_folder, corpus
):
    """Before anything is sampled, and nothing is written."""
    other = tmp_path / "other"
    shutil.copytree(model_folder, other)
    AutoTokenizer.from_pretrained(other).save_pretrained(other)
    text = (other / "tokenizer.json").read_text().replace('"w7"', '"seven"')
    (other / "tokenizer.json").write_text(text)
    (tmp_path / "half.json").write_text('{"flops": 1')
    for how, words in (
        (Splicing(model=str(other)), "--model: the tokenizer of .*other is not that of"),
        (Splicing(ledger=tmp_path / "none.json"), "--ledger: .*none.json can not be read"),
        (Splicing(ledger=tmp_path / "half.json"), "--ledger: .*half.json can not be read"),
    ):
        with pytest.raises(ConfigError, match=words):
            spliced("refused", how=how)
        assert not (tmp_path / "refused" / "spliced").exists()
