"""Documents are put together by their real lengths: what is measured is what is laid out, nothing
is larger than asked, and everything is run once."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from rlp.config import ConfigError
from rlp.data.positions import Positions
from rlp.model.layout import LAYOUTS
from rlp.model.markers import Markers
from rlp.model.thoughts import ThoughtFormat, Thoughts
from rlp.step.micro_batch import MicroBatch, in_order
from rlp.step.packing import Cutter, Extent, Lengths, Packer
from tests.tiny_models import random_documents

CPU = torch.device("cpu")
ALONE = SimpleNamespace(backward_is_collective=False, forward_is_collective=False)


def thought_format(instruction: tuple[int, ...] = (), horizon: int = 1) -> ThoughtFormat:
    return ThoughtFormat(Markers((2,), (3, 4)), instruction, None, 1.0, 1.0, horizon)


def a_step(
    lengths: list[int], *, group_size: int = 4, horizon: int = 1, seed: int = 0
) -> MicroBatch:
    """One to three positions in each document, and thoughts of 1 to 30 tokens, half of them cut."""
    generator = np.random.default_rng(seed)
    documents = random_documents(lengths, seed=seed)
    places = [
        (d, t)
        for d, length in enumerate(lengths)
        for t in sorted(
            generator.choice(np.arange(1, length - horizon + 1), 1 + d % 3, replace=False)
        )
    ]
    positions = Positions(
        np.array([d for d, _ in places]),
        np.array([t for _, t in places]),
        np.stack([documents[d].tokens[t : t + horizon] for d, t in places]),
    )
    shape = (len(places), group_size)
    thought_tokens = torch.from_numpy(
        1 + np.minimum(generator.exponential(6, shape), 29).astype(int)
    )
    mask = torch.arange(30) < thought_tokens[..., None]
    thoughts = Thoughts(
        torch.from_numpy(generator.integers(5, 48, (*shape, 30))) * mask,
        mask,
        torch.zeros(mask.shape),
        torch.zeros(mask.shape),
        torch.from_numpy(generator.random(shape) < 0.5),
    )
    return MicroBatch(documents, positions, thoughts)


def laid_out(batch: MicroBatch, layout: str, form: ThoughtFormat, *, lm: bool):
    """One pass of the update."""
    here = lm and batch.is_first_slice
    arguments = batch.documents, batch.positions, batch.thoughts, form
    return LAYOUTS[layout](
        *arguments, lm=here, no_think=here and batch.thoughts is not None, device=CPU
    )


def cutter(
    layout: str,
    form: ThoughtFormat,
    tokens: int | None,
    *,
    lm: bool = True,
    engine: object = ALONE,
    ranks: object = None,
) -> Cutter:
    config = SimpleNamespace(
        optim=SimpleNamespace(
            tokens_per_micro_batch=tokens, micro_batch_size=2, thoughts_per_forward=None
        ),
        objective=SimpleNamespace(lm_weight=float(lm)),
    )
    return Cutter(config, layout, form, engine, ranks)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("instruction, horizon", [((), 1), ((7, 8, 9), 2)])
@pytest.mark.parametrize("lm", [True, False])
def test_what_is_measured_is_what_is_laid_out(layout, instruction, horizon, lm):
    """Token positions, padding included, and rows of the head, of several documents with whole and
    with sliced groups, and of documents alone."""
    form, step = thought_format(instruction, horizon), a_step([9, 4, 14, 6], horizon=horizon)
    lengths = Lengths(step, form)
    for documents, group in (((0,), slice(0, 4)), ((2, 1, 3), slice(0, 2)), ((1, 2), slice(2, 3))):
        plain = lm and group.start == 0
        parts = [lengths.extent(d, group, lm=plain, no_think=plain) for d in documents]
        found = sum(parts[1:], parts[0])
        (batch,) = replace(step.part(documents), groups=(group,)).slices()
        layout_of = laid_out(batch, layout, form, lm=lm)
        tokens = found.rows * found.longest if layout == "repeated" else found.tokens
        assert (tokens, found.queries) == (layout_of.tokens.numel(), layout_of.row.numel())
        assert found.size(layout) == max(tokens, found.queries)


@pytest.mark.parametrize(
    "layout, tokens", [("tree", 90), ("repeated", 260), ("tree", 2000), ("repeated", 2000)]
)
def test_nothing_is_larger_than_asked_and_everything_is_run_once(layout, tokens):
    """Where some documents go in slices, and where none does."""
    form, step = thought_format(), a_step([9, 4, 14, 6, 30, 5, 12])
    batches = cutter(layout, form, tokens).update(step)
    seen = torch.zeros(step.thoughts.truncated.shape, dtype=torch.int64)
    for batch in batches:
        assert len(batch.documents) == 1 or len(batch.groups) == 1
        for part in batch.slices():
            run = laid_out(part, layout, form, lm=True)
            assert max(run.tokens.numel(), run.row.numel()) <= tokens
            seen[batch.rows[:, None], torch.arange(part.group.start, part.group.stop)] += 1
    assert (seen == 1).all()
    texts = [id(document) for batch in batches for document in batch.documents]
    assert sorted(texts) == sorted(map(id, step.documents))
    assert torch.equal(
        in_order(batches, [batch.thoughts.tokens for batch in batches]), step.thoughts.tokens
    )
    has_slices = max(len(batch.groups) for batch in batches) > 1
    assert has_slices == (tokens < 2000)
    assert max(len(batch.documents) for batch in batches) > 1


def test_lengths_that_are_alike_are_padded_together():
    """Rows of 100 and of 10 tokens in turn: two passes without padding, where neighbours would pad
    every second row."""
    extents = [Extent(2, longest, 2 * longest, 2) for longest in (100, 10, 100, 10, 100, 10)]
    packs = Packer(lambda d, group: extents[d], 2, "repeated", 600).pack(6)
    assert [pack.documents for pack in packs] == [(0, 2, 4), (1, 3, 5)]


@pytest.mark.parametrize("passes", [4, 5, 12])
def test_a_rank_with_less_to_do_makes_as_many_passes(passes):
    """Under stages 2 and 3 a pass is a collective: documents are taken apart first, then groups,
    down to one thought a pass, and no pass is empty."""
    form, step = thought_format(), a_step([9, 4, 14])
    asked = []
    ranks = SimpleNamespace(largest=lambda mine: asked.append(mine) or passes)
    together = SimpleNamespace(backward_is_collective=True, forward_is_collective=False)
    batches = cutter("tree", form, 10_000, engine=together, ranks=ranks).update(step)
    slices = [part for batch in batches for part in batch.slices()]
    assert asked == [1] and len(slices) == passes
    assert all(part.thoughts.mask.any() for part in slices)
    assert len(batches) == 3 and sum(len(batch.rows) for batch in batches) == len(
        step.positions.position
    )


def test_all_is_scored_ahead_where_a_forward_is_a_collective_and_a_rank_has_slices():
    """Each rank then makes the same passes in the same order."""
    form, step = thought_format(), a_step([9, 4, 14])
    claims = []
    ranks = SimpleNamespace(largest=lambda mine: mine, any=lambda mine: claims.append(mine) or True)
    together = SimpleNamespace(backward_is_collective=True, forward_is_collective=True)
    cut = cutter("tree", form, 10_000, engine=together, ranks=ranks)
    assert cut.ahead(cut.update(step)) == [True] and claims == [False]
    alone = cutter("tree", form, 70)
    batches = alone.update(step)
    assert alone.ahead(batches) == [len(batch.groups) > 1 for batch in batches]
    assert any(alone.ahead(batches)) and not all(alone.ahead(batches))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_does_not_fit_alone_is_refused_with_what_to_write(layout):
    """With that it is not refused."""
    form, step = thought_format(), a_step([9, 4, 14, 6])
    with pytest.raises(ConfigError, match=r"tokens_per_micro_batch is 20, .* Write") as refused:
        cutter(layout, form, 20).update(step)
    needed = 20
    while True:
        try:
            assert cutter(layout, form, needed).update(step)
            break
        except ConfigError as error:
            said = int(str(error).partition("tokens_per_micro_batch=")[2].split()[0])
            assert said > needed
            needed = said
    assert "position.per_document" in str(refused.value)


def test_documents_alone_are_put_together_by_their_lengths_too():
    """For the passes without thoughts: selectors and the baseline, and continued pretraining."""
    form, step = thought_format(), a_step([9, 4, 14, 6])
    for batches in (
        cutter("repeated", form, 28).documents(step, lm=True, no_think=False),
        cutter("repeated", form, 28).update(MicroBatch(step.documents)),
    ):
        assert [[len(d.tokens) for d in batch.documents] for batch in batches] == [[14, 9], [6, 4]]
    with pytest.raises(ConfigError, match="a document takes 14 token positions"):
        cutter("repeated", form, 13).update(MicroBatch(step.documents))
