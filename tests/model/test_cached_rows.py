"""Tensors that grow by a column in place, and rows that are begun anew, against tensors that are
made anew each time."""

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from transformers.cache_utils import DynamicLayer, LinearAttentionLayer

from rlp.model import cached_rows
from rlp.model.admission import check_model, why_together
from rlp.model.cached_rows import FEWEST_FREE, Columns
from rlp.model.running_rows import ReadRows, RunningRows
from tests.tiny_models import ARCHITECTURES, WORDS, tiny_policy

NUM_ROWS, NUM_MOVES = 3, 300


def last(tensor: Tensor, columns: int, most: int | None) -> Tensor:
    """The definition: the last columns, at most so many, zeros before them where there are
    fewer."""
    columns = columns if most is None else min(columns, most)
    kept = tensor[:, :, max(0, tensor.shape[2] - columns) :]
    return torch.cat([kept.new_zeros(*kept.shape[:2], columns - kept.shape[2], 4), kept], dim=2)


@pytest.mark.parametrize("most", [None, 5, 2 * FEWEST_FREE])
def test_columns_in_place_are_those_of_a_tensor_that_is_made_anew(most: int | None):
    """Any run of moves: a token more, wider, narrower, a row replaced, rows kept."""
    random = np.random.default_rng(0)
    torch.manual_seed(0)
    columns, plain = Columns(torch.randn(1, 2, 7, 4), NUM_ROWS, 2, most), torch.zeros(3, 2, 0, 4)
    for move in random.choice(4, NUM_MOVES, p=[0.7, 0.1, 0.15, 0.05]):
        rows = torch.from_numpy(random.permutation(NUM_ROWS))
        if move == 0:
            new = torch.randn(NUM_ROWS, 2, 1, 4)
            plain = torch.cat([plain, new], dim=2)
            assert torch.equal(columns.add(new), plain)
            plain = last(plain, plain.shape[2], most)
        elif move == 1:
            wanted = int(random.integers(0, 90))
            plain = last(plain, wanted, most)
            columns.resize(wanted)
        elif move == 2:
            taken = torch.randn(2, 2, int(random.integers(0, plain.shape[2] + 1)), 4)
            plain = plain.index_copy(0, rows[:2], last(taken, plain.shape[2], None))
            columns.write(rows[:2], taken)
        else:
            plain = plain[rows]
            columns.keep(rows)
        assert torch.equal(columns.tensor(), plain)


def test_a_column_more_moves_none_of_the_others():
    """But now and then, where the room is used up: of 1,000 tokens in 1 of 32 at most, and rarer
    the longer it is."""
    columns = Columns(torch.randn(1, 2, 0, 4), NUM_ROWS, 2, None)
    homes = {columns.add(torch.zeros(NUM_ROWS, 2, 1, 4)).data_ptr() for _ in range(1000)}
    # From 4 * 32 columns on the room is a fourth larger each time.
    assert len(homes) <= 4 + np.log(1000 / (4 * FEWEST_FREE)) / np.log(5 / 4) + 1


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_rows_of_every_architecture_begin_one_by_one(name: str):
    policy = tiny_policy(name)
    check_model(policy)
    assert policy.why_together is None


def test_a_cache_that_is_not_known_is_named(monkeypatch: pytest.MonkeyPatch):
    """And the model is admitted."""
    monkeypatch.delitem(cached_rows.KNOWN, LinearAttentionLayer)
    policy = tiny_policy("nemotron_h")
    check_model(policy)
    assert policy.why_together == (
        "its cache holds a LinearAttentionLayer, which is not known row by row"
    )


def test_rows_that_hold_something_of_others_are_told(monkeypatch: pytest.MonkeyPatch):
    """By the numbers of the model itself, whatever its layers are called."""
    monkeypatch.setattr(Columns, "write", lambda self, rows, taken: None)
    policy = tiny_policy("llama")
    assert "logits that are" in why_together(policy)
    assert why_together(tiny_policy("mamba")) is None


def test_rows_that_can_not_be_begun_are_told(monkeypatch: pytest.MonkeyPatch):
    def fails(self: Columns, columns: int) -> None:
        raise RuntimeError("no room\nat all")

    monkeypatch.setattr(Columns, "resize", fails)
    assert why_together(tiny_policy("llama")) == (
        "a row can not begin beside others: RuntimeError: no room"
    )


def test_rows_of_a_cache_that_is_not_known_begin_together(monkeypatch: pytest.MonkeyPatch):
    """In any order, with rows left over; then fewer of them go on; then all begin again."""
    monkeypatch.delitem(cached_rows.KNOWN, DynamicLayer)
    policy = tiny_policy("llama")
    tokens = [np.random.default_rng(seed).integers(5, len(WORDS), size=20) for seed in range(3)]

    def fresh(which: int, length: int) -> Tensor:
        return policy("check", torch.from_numpy(tokens[which][:length])[None])[1][-1]

    with policy.sampling():
        rows = RunningRows(policy, 4)
        for begun in ((2, 0, 1), (1, 2, 0)):
            rows.end([0, 1, 3])
            prefixes = [tokens[one][: 3 + one] for one in begun]
            rows.begin([3, 1, 0], ReadRows(policy, prefixes), [0, 1, 2])
            at = [begun[2], begun[1], begun[0], begun[0]]  # row 2 is left over
            going = torch.tensor([True, True, False, True])
            for step in range(2):
                token = torch.tensor([tokens[one][3 + one + step] for one in at])
                logits = rows.next(token, going)
                for row in (0, 1, 3):
                    assert_close(
                        logits[row], fresh(at[row], 4 + at[row] + step), rtol=1e-4, atol=1e-4
                    )
        rows.keep([3, 0])
        token = torch.tensor([tokens[at[row]][5 + at[row]] for row in (3, 0)])
        logits = rows.next(token, torch.ones(2, dtype=torch.bool))
        for place, row in enumerate((3, 0)):
            assert_close(logits[place], fresh(at[row], 6 + at[row]), rtol=1e-4, atol=1e-4)
