"""A loss on some tokens of a document: it, its divisor and what the ledger calls trained."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.training import open_run, read_lines, tiny_config
from tests.whole.masked import write_masked

SETTINGS = {
    "data__tokens_field": "tokens",
    "data__loss_field": "loss_spans",
    "objective__policy_weight": 0.0,
    "objective__lm_weight": 1.0,
    "optim__grad_clip": 1e9,
}


@pytest.fixture
def masked(tmp_path: Path) -> Path:
    return write_masked(tmp_path / "masked.jsonl", 12)


def test_the_loss_is_the_mean_over_the_tokens_of_the_spans(
    trained, masked, tmp_path, model_folder, corpus, ranks
):
    """Loss and gradient of each step are those of a cross-entropy that is masked by hand, and the
    ledger counts as many trained tokens."""
    settings = {"data__train": f"[{masked}]", **SETTINGS}
    folder = trained("masked", optim__learning_rate=1e-12, **settings)
    run = open_run(tiny_config(tmp_path / "again", model_folder, corpus, **settings), ranks)
    model, counted = AutoModelForCausalLM.from_pretrained(model_folder), 0
    rows = read_lines(masked)
    for line in read_lines(folder / "metrics.jsonl"):
        total, count = 0.0, 0
        for document in run.opened.setup.stream.next_documents(4):
            tokens, spans = (rows[document.id][name] for name in ("tokens", "loss_spans"))
            places = sorted({t for start, stop in spans for t in range(start, stop)})
            logprob = model(torch.tensor([tokens])).logits[0].float().log_softmax(dim=1)
            total = total - sum(logprob[t - 1, tokens[t]] for t in places)
            count += len(places)
        model.zero_grad()
        (total / count).backward()
        norm = sum(p.grad.square().sum() for p in model.parameters()).sqrt()
        assert line["lm/loss"] == pytest.approx(float(total / count), rel=1e-5)
        assert line["optim/grad_norm"] == pytest.approx(float(norm), rel=1e-4)
        counted += count
    ledger = json.loads((folder / "ledger.json").read_text())
    assert ledger["phases"]["lm"]["tokens_trained"] == counted
    assert ledger["input_tokens"] > 2 * counted


def test_micro_batches_and_layouts_change_nothing(trained, masked):
    """One document at a time or four, in their order or by their lengths, in rows or packed."""
    settings = {"data__train": f"[{masked}]", **SETTINGS}
    whole = trained("whole", optim__micro_batch_size=4, engine__layout="repeated", **settings)
    by_length = {"data__max_document_tokens": 16, "optim__tokens_per_micro_batch": 40}
    for name, way in {
        "one": {"optim__micro_batch_size": 1},
        "tree": {"engine__layout": "tree"},
        "by_length": by_length,
    }.items():
        folders = (whole, trained(name, **settings | way))
        for one, other in zip(*(read_lines(folder / "metrics.jsonl") for folder in folders)):
            for name in ("lm/loss", "optim/grad_norm"):
                assert one[name] == pytest.approx(other[name], rel=1e-5)


def test_positions_by_difficulty_are_chosen_among_all_tokens(trained, masked):
    """A run that thinks may read spans too: they are for the LM loss alone."""
    settings = {"data__train": f"[{masked}]", **SETTINGS, "objective__policy_weight": 1.0}
    chosen = [
        [(line["document"], line["position"]) for line in read_lines(folder / "thoughts.jsonl")]
        for folder in (
            trained("spans", position__selector="surprisal", budget__steps=1, **settings),
            trained(
                "all",
                position__selector="surprisal",
                budget__steps=1,
                **settings | {"data__loss_field": None},
            ),
        )
    ]
    assert chosen[0] and sorted(set(chosen[0])) == sorted(set(chosen[1]))
