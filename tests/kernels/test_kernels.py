"""Every form of a kernel is the same function: the plain form is the definition, the others are
held to it.

Exact claims are made in float64. In narrower dtypes a form may err, against float64, by at
most twice the plain form's own error. All of this is CPU arithmetic.
"""

import math

import pytest
import torch
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from rlp_kernels import (
    chunked,
    paired_logprobs,
    reference,
    token_argmax,
    token_entropy,
    token_logprobs,
    token_logprobs_with_grad,
)
from tests.kernels.rounding import assert_errs_like
from tests.kernels.rows import (
    NONE,
    SOFTCAPS,
    TILES,
    bounds_of,
    make_inputs,
    rows_of,
    value_and_grads,
)


@pytest.mark.parametrize("form", ["plain", "chunked"])
def test_a_two_word_vocabulary_at_odds_three_to_one_gives_ln_three_quarters(form):
    """Logits 0 and ln 3; at temperature one half the odds are nine to one."""
    hidden, head = torch.ones(2, 1), torch.tensor([[0.0], [math.log(3.0)]])
    rows = rows_of(2) | {"inverse_temperature": torch.tensor([1.0, 2.0])}
    logprob = token_logprobs(hidden, head, torch.tensor([1, 1]), **rows, form=form)
    assert_close(logprob, torch.tensor([3 / 4, 9 / 10]).log())


@pytest.mark.parametrize("form", ["plain", "chunked"])
def test_excluding_a_token_with_half_the_mass_adds_ln_two(form):
    """The open marker's case: with half the mass on it, every other token reads 0.69 nats too
    low."""
    hidden, head = torch.ones(1, 1), torch.tensor([[math.log(2.0)], [0.0], [0.0]])
    target = torch.tensor([1])
    with_marker = token_logprobs(hidden, head, target, **rows_of(1), form=form)
    without_marker = token_logprobs(hidden, head, target, **rows_of(1, excluded=0), form=form)
    assert_close(without_marker - with_marker, torch.tensor([math.log(2.0)]))


@pytest.mark.parametrize("form", ["plain", "chunked"])
@pytest.mark.parametrize("softcap", SOFTCAPS)
def test_probabilities_of_all_tokens_that_are_not_excluded_sum_to_one(form, softcap):
    hidden, head, _, _ = make_inputs(num_rows=1)
    target = torch.tensor([token for token in range(23) if token != 5])
    every_row = hidden.expand(len(target), -1)
    logprob = token_logprobs(
        every_row, head, target, **rows_of(22, 1.4, excluded=5), softcap=softcap, form=form
    )
    assert_close(logprob.exp().sum(), torch.tensor(1.0, dtype=torch.float64))


@pytest.mark.parametrize("row_tile, vocabulary_tile", TILES)
@pytest.mark.parametrize("softcap", SOFTCAPS)
def test_chunked_equals_plain_in_value_and_gradients(softcap, row_tile, vocabulary_tile):
    hidden, head, target, rows = make_inputs()
    plain = value_and_grads(reference.token_logprobs, hidden, head, target, **rows, softcap=softcap)
    tiles = {"row_tile": row_tile, "vocabulary_tile": vocabulary_tile}
    tiled = value_and_grads(
        chunked.token_logprobs, hidden, head, target, **rows, softcap=softcap, **tiles
    )
    assert_close(tiled, plain)


@pytest.mark.parametrize("softcap", SOFTCAPS)
def test_chunked_gradient_is_the_derivative(softcap):
    """Against finite differences, so independently of the plain form."""
    hidden, head, target, rows = make_inputs(num_rows=5, vocabulary=7, width=3)

    def logprob(hidden, head):
        return chunked.token_logprobs(
            hidden, head, target, **rows, softcap=softcap, row_tile=2, vocabulary_tile=3
        )

    assert torch.autograd.gradcheck(logprob, (hidden, head))


@pytest.mark.parametrize("softcap", SOFTCAPS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_chunked_errs_no_more_than_rounding_and_at_most_twice_as_much_as_plain(dtype, softcap):
    """Both against float64 on the same rounded inputs."""
    hidden, head, target, rows = make_inputs(num_rows=65, vocabulary=3001, width=48, dtype=dtype)
    wide = (hidden.detach().double().requires_grad_(), head.detach().double().requires_grad_())
    truth = value_and_grads(reference.token_logprobs, *wide, target, **rows, softcap=softcap)
    plain = value_and_grads(reference.token_logprobs, hidden, head, target, **rows, softcap=softcap)
    tiles = {"row_tile": 32, "vocabulary_tile": 512}
    tiled = value_and_grads(
        chunked.token_logprobs, hidden, head, target, **rows, softcap=softcap, **tiles
    )
    assert all(
        part.dtype == (torch.float32 if what == 0 else dtype) for what, part in enumerate(tiled)
    )
    assert_errs_like(plain, tiled, truth, bounds_of(hidden, head, target, rows, softcap))


def test_bf16_logits_are_never_rounded_to_bf16():
    """Rounded logits miss float64 by 0.06 nats here; float32 ones by 6e-6."""
    hidden, head, target, rows = make_inputs(vocabulary=3001, width=48, dtype=torch.bfloat16)
    truth = reference.token_logprobs(hidden.double(), head.double(), target, **rows)
    for form in ("plain", "chunked"):
        logprob = token_logprobs(hidden, head, target, **rows, form=form)
        assert logprob.dtype == torch.float32
        assert (logprob - truth).abs().max() < 1e-4


@pytest.mark.parametrize("form", ["plain", "chunked"])
def test_autocast_does_not_narrow_the_logits(form):
    hidden, head, target, rows = make_inputs(dtype=torch.float32)
    outside = token_logprobs(hidden, head, target, **rows, form=form)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = token_logprobs(hidden, head, target, **rows, form=form)
    assert torch.equal(outside, inside)


def test_a_near_certain_target_keeps_the_digits_of_its_small_logprob():
    """Logits 30 and 20: the log-probability is -4.54e-5, and float32 numbers near 30 are 1.9e-6
    apart."""
    hidden, head = torch.ones(1, 1), torch.tensor([[30.0], [20.0]])
    logprob = token_logprobs(hidden, head, torch.tensor([0]), **rows_of(1), form="chunked")
    assert_close(
        logprob,
        torch.tensor([-math.log1p(math.exp(-10.0))]),
        rtol=0.0,
        atol=torch.finfo(torch.float32).eps,
    )


@pytest.mark.parametrize("row_tile, vocabulary_tile", TILES)
@pytest.mark.parametrize("softcap", SOFTCAPS)
def test_entropy_and_argmax_equal_their_definitions(softcap, row_tile, vocabulary_tile):
    hidden, head, _, rows = make_inputs()
    tiles = {"row_tile": row_tile, "vocabulary_tile": vocabulary_tile}
    entropy = chunked.token_entropy(hidden, head, **rows, softcap=softcap, **tiles)
    assert_close(entropy, reference.token_entropy(hidden, head, **rows, softcap=softcap).detach())
    token = chunked.token_argmax(hidden, head, excluded=rows["excluded"], softcap=softcap, **tiles)
    assert torch.equal(
        token, reference.token_argmax(hidden, head, excluded=rows["excluded"], softcap=softcap)
    )
    assert not entropy.requires_grad


def test_entropy_of_equal_logits_is_the_log_of_how_many_there_are():
    hidden, head = torch.zeros(2, 3), torch.randn(50, 3, generator=torch.Generator().manual_seed(0))
    rows = rows_of(2) | {"excluded": torch.tensor([NONE, 7])}
    assert_close(token_entropy(hidden, head, **rows), torch.tensor([50.0, 49.0]).log())


def test_the_lowest_index_wins_a_tie_within_and_across_tiles():
    """Whole numbers, so that equal logits are equal to the bit; the best word is at 2, 3 and 6."""
    head = torch.tensor([[0.0], [1.0], [4.0], [4.0], [-1.0], [2.0], [4.0]])
    excluded = torch.tensor([NONE, 2, 3])
    for vocabulary_tile in (1, 2, 3, 4, 7):
        token = chunked.token_argmax(
            torch.ones(3, 1), head, excluded=excluded, vocabulary_tile=vocabulary_tile
        )
        assert token.tolist() == [2, 3, 2]


def test_an_excluded_token_is_never_the_argmax():
    """Also where it is the first word, and alone in its tile."""
    head = torch.tensor([[9.0], [-3.0], [-2.0]])
    assert token_argmax(torch.ones(1, 1), head, excluded=torch.tensor([0])).tolist() == [2]
    assert chunked.token_argmax(
        torch.ones(1, 1), head, excluded=torch.tensor([0]), vocabulary_tile=1
    ).tolist() == [2]


def test_reruns_are_equal_to_the_bit():
    hidden, head, target, rows = make_inputs(
        num_rows=100, vocabulary=5003, width=32, dtype=torch.bfloat16
    )
    first, second = (
        value_and_grads(
            chunked.token_logprobs, hidden, head, target, **rows, row_tile=33, vocabulary_tile=500
        )
        for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("frozen", ["hidden", "head"])
def test_a_frozen_input_gets_no_gradient_and_leaves_the_other_unchanged(frozen):
    hidden, head, target, rows = make_inputs()
    chunked.token_logprobs(hidden, head, target, **rows, vocabulary_tile=5).sum().backward()
    inputs = {"hidden": hidden.detach().clone(), "head": head.detach().clone()}
    trained = "head" if frozen == "hidden" else "hidden"
    inputs[trained].requires_grad_()
    chunked.token_logprobs(
        inputs["hidden"], inputs["head"], target, **rows, vocabulary_tile=5
    ).sum().backward()
    assert inputs[frozen].grad is None
    assert torch.equal(inputs[trained].grad, {"hidden": hidden, "head": head}[trained].grad)


@pytest.mark.parametrize("trained, products", [("both", 3), ("hidden", 2), ("head", 2)])
def test_backward_multiplies_only_for_the_gradients_that_are_wanted(trained, products):
    """One product makes the logits again, and one more serves each gradient: 2 N V D operations
    each."""
    hidden, head, target, rows = make_inputs()
    hidden.requires_grad_(trained != "head")
    head.requires_grad_(trained != "hidden")
    logprob = chunked.token_logprobs(hidden, head, target, **rows, row_tile=4, vocabulary_tile=5)
    with FlopCounterMode(display=False) as counter:
        logprob.sum().backward()
    assert counter.get_total_flops() == products * 2 * 10 * 23 * 6


def test_only_the_inputs_and_two_numbers_per_row_are_kept_for_the_backward_pass():
    hidden, head, target, rows = make_inputs()
    kept = []

    def keep(tensor):
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        chunked.token_logprobs(hidden, head, target, **rows)
    inputs = {t.data_ptr() for t in (hidden, head, target, *rows.values())}
    assert [t.shape for t in kept if t.data_ptr() not in inputs] == [(10,), (10,)]


def test_the_head_may_be_released_between_forward_and_backward():
    """What ZeRO-3 does to a parameter; the plain gradients are the ones to find."""
    hidden, head, target, rows = make_inputs()
    _, _, expected = value_and_grads(reference.token_logprobs, hidden, head, target, **rows)
    logprob = chunked.token_logprobs(hidden, head, target, **rows, vocabulary_tile=5)
    storage = head.data
    head.data = torch.empty(0, dtype=head.dtype)
    head.data = storage.clone()
    storage.fill_(math.nan)
    (logprob * torch.linspace(-1.0, 1.0, 10, dtype=torch.float64)).sum().backward()
    assert_close(head.grad, expected)


def test_a_head_still_released_at_backward_is_refused():
    """Without the check the loop over an empty vocabulary would return zeros as hidden's
    gradient."""
    hidden, head, target, rows = make_inputs()
    logprob = chunked.token_logprobs(hidden, head.detach(), target, **rows)
    saved_head = logprob.grad_fn.saved_tensors[1]
    saved_head.data = torch.empty(0, dtype=head.dtype)
    with pytest.raises(ValueError, match="gather the head"):
        logprob.sum().backward()


def test_no_rows_give_no_logprobs_and_zero_gradients():
    """A rank may hold no row of a micro-batch and still takes part in the backward pass."""
    hidden, head, target, rows = make_inputs(num_rows=0)
    for function in (reference.token_logprobs, chunked.token_logprobs):
        logprob, hidden_grad, head_grad = value_and_grads(function, hidden, head, target, **rows)
        assert logprob.shape == (0,) and hidden_grad.shape == (0, 6)
        assert torch.equal(head_grad, torch.zeros_like(head))


@pytest.mark.parametrize("row_tile, vocabulary_tile", TILES)
@pytest.mark.parametrize("softcap", SOFTCAPS)
@pytest.mark.parametrize("wants_head", [True, False])
def test_the_gradient_in_the_forward_is_that_of_autograd(
    softcap, row_tile, vocabulary_tile, wants_head
):
    """Both forms; the coefficients have both signs."""
    hidden, head, target, rows = make_inputs()
    settings = rows | {"softcap": softcap}
    expected = value_and_grads(reference.token_logprobs, hidden, head, target, **settings)
    coefficient = torch.linspace(-1.0, 1.0, 10, dtype=torch.float64)
    tiles = {"row_tile": row_tile, "vocabulary_tile": vocabulary_tile}
    arguments = (hidden, head, target, coefficient)
    plain = token_logprobs_with_grad(*arguments, **settings, wants_head=wants_head, form="plain")
    tiled = chunked.token_logprobs_with_grad(*arguments, **settings, wants_head=wants_head, **tiles)
    for ours in (plain, tiled):
        assert (ours[2] is not None) == wants_head and not ours[0].requires_grad
        assert_close(ours[: 2 + wants_head], expected[: 2 + wants_head])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_gradient_in_the_forward_errs_no_more_than_rounding_and_at_most_twice_as_much_as_plain(
    dtype,
):
    hidden, head, target, rows = make_inputs(num_rows=65, vocabulary=3001, width=48, dtype=dtype)
    wide = (hidden.detach().double().requires_grad_(), head.detach().double().requires_grad_())
    truth = value_and_grads(reference.token_logprobs, *wide, target, **rows)
    plain = value_and_grads(reference.token_logprobs, hidden, head, target, **rows)
    coefficient = torch.linspace(-1.0, 1.0, 65)
    tiled = chunked.token_logprobs_with_grad(
        hidden, head, target, coefficient, **rows, row_tile=32, vocabulary_tile=512
    )
    assert [part.dtype for part in tiled] == [part.dtype for part in plain]
    assert_errs_like(plain, tiled, truth, bounds_of(hidden, head, target, rows))


@pytest.mark.parametrize("wants_head, units", [(True, 6), (False, 4)])
def test_the_gradient_in_the_forward_makes_the_logits_once(wants_head, units):
    """6 N V D operations with both gradients; forward and backward passes take 8."""
    hidden, head, target, rows = make_inputs()
    coefficient = torch.ones(10, dtype=torch.float64)
    with FlopCounterMode(display=False) as counter:
        chunked.token_logprobs_with_grad(
            hidden,
            head,
            target,
            coefficient,
            **rows,
            wants_head=wants_head,
            row_tile=4,
            vocabulary_tile=5,
        )
    assert counter.get_total_flops() == units * 10 * 23 * 6


def test_kept_logits_fit_their_budget_in_multiples_of_a_tile():
    assert chunked.kept_rows(151_936) == 3456
    assert 3456 * 151_936 * 4 <= chunked.MAX_KEPT_BYTES < (3456 + 128) * 151_936 * 4
    assert chunked.kept_rows(151_936, max_bytes=2 * 151_936 * 4) == 2
    assert chunked.kept_rows(151_936, max_bytes=1) == 1


@pytest.mark.parametrize("form", ["plain", "chunked"])
def test_paired_logprobs_are_both_models_rows_and_the_reward_their_difference(form):
    """Thoughts of a position lie side by side: row 3 m + g is thought g of position m."""
    policy_hidden, policy_head, _, _ = make_inputs(num_rows=12)
    teacher_hidden, teacher_head, target, rows = make_inputs(num_rows=4, seed=1)
    excluded = rows["excluded"]
    pair = (policy_hidden, policy_head, teacher_hidden, teacher_head, target)
    reasoned, baseline, reward = paired_logprobs(*pair, group_size=3, excluded=excluded, form=form)
    one = torch.ones(4)
    for thought in range(3):
        alone = token_logprobs(
            policy_hidden[thought::3],
            policy_head,
            target,
            inverse_temperature=one,
            excluded=excluded,
        )
        assert_close(reasoned[:, thought], alone.detach())
    alone = token_logprobs(
        teacher_hidden, teacher_head, target, inverse_temperature=one, excluded=excluded
    )
    assert_close(baseline, alone.detach())
    assert torch.equal(reward, reasoned - baseline[:, None]) and not reward.requires_grad


def test_pairs_that_do_not_match_are_refused():
    policy_hidden, policy_head, _, _ = make_inputs(num_rows=12)
    teacher_hidden, teacher_head, target, rows = make_inputs(num_rows=4)
    pair = (policy_hidden, policy_head, teacher_hidden, teacher_head, target)
    with pytest.raises(
        ValueError, match=r"policy_hidden must be \[M \* group_size, D\] = \[8, 6\].*got \[12, 6\]"
    ):
        paired_logprobs(*pair, group_size=2, excluded=rows["excluded"])
    with pytest.raises(ValueError, match="policy and teacher must share a dtype"):
        paired_logprobs(
            policy_hidden.float(),
            policy_head.float(),
            *pair[2:],
            group_size=3,
            excluded=rows["excluded"],
        )
    with pytest.raises(
        ValueError, match="form must be one of auto, plain, chunked, triton, got 'folded'"
    ):
        paired_logprobs(*pair, group_size=3, excluded=rows["excluded"], form="folded")


def test_a_coefficient_that_is_not_one_per_row_is_refused():
    hidden, head, target, rows = make_inputs(dtype=torch.float32)
    for coefficient in (torch.ones(9), torch.ones(10, dtype=torch.float64), torch.ones(10, 1)):
        with pytest.raises(ValueError, match=r"coefficient must be \[10\] torch.float32"):
            token_logprobs_with_grad(hidden, head, target, coefficient, **rows)
