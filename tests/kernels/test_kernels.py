"""Every form of a kernel is the same function: the plain form is the definition, the others are
held to it.

Exact claims are made in float64. In narrower dtypes a form may err, against float64, by at
most twice the plain form's own error. All of this is CPU arithmetic.
"""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

import rlp_kernels
from rlp_kernels import (
    CUDA_FORMS,
    FORMS,
    MAX_PLAIN_BYTES,
    choose_form,
    chunked,
    paired_logprobs,
    reference,
    token_argmax,
    token_entropy,
    token_logprobs,
    token_logprobs_with_grad,
)
from tests.kernels.rounding import assert_errs_like, token_logprob_bounds

NONE = -1

# Ten rows, 23 words: one word or row at a time, sizes that divide neither, and one tile for
# everything.
TILES = [(1, 1), (4, 5), (64, 64)]
# 0 is no soft cap; 1.5 is low enough that most logits are well inside the bend of tanh.
SOFTCAPS = [0.0, 1.5]


def make_inputs(num_rows=10, vocabulary=23, width=6, dtype=torch.float64, seed=0):
    """Random rows at temperatures 0.5 to 2; every other row excludes a token that is not its
    target."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(num_rows, width, generator=generator, dtype=torch.float64)
    head = torch.randn(vocabulary, width, generator=generator, dtype=torch.float64)
    target = torch.randint(vocabulary, (num_rows,), generator=generator)
    excluded = (
        target + torch.randint(1, vocabulary, (num_rows,), generator=generator)
    ) % vocabulary
    excluded[::2] = NONE
    inverse_temperature = torch.linspace(0.5, 2.0, num_rows)
    hidden, head = hidden.to(dtype).requires_grad_(), head.to(dtype).requires_grad_()
    return hidden, head, target, {"inverse_temperature": inverse_temperature, "excluded": excluded}


def value_and_grads(function, hidden, head, target, **settings):
    """Log-probabilities and the gradients of a fixed weighting of them, in hidden and head."""
    logprob = function(hidden, head, target, **settings)
    weights = torch.linspace(-1.0, 1.0, len(logprob)).to(logprob.dtype)
    return logprob.detach(), *torch.autograd.grad((logprob * weights).sum(), (hidden, head))


def bounds_of(hidden, head, target, rows, softcap=0.0):
    """What rounding can do to the results of `value_and_grads`."""
    return token_logprob_bounds(
        hidden, head, target, torch.linspace(-1.0, 1.0, len(target)), **rows, softcap=softcap
    )


def rows_of(num_rows, inverse_temperature=1.0, excluded=NONE):
    """The same temperature and excluded token in every row."""
    return {
        "inverse_temperature": torch.full((num_rows,), inverse_temperature),
        "excluded": torch.full((num_rows,), excluded),
    }


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


def test_auto_is_plain_while_the_logits_are_small_and_chunked_beyond():
    """110 rows x 151,936 words x 4 bytes is the last that fits 64 MiB; a bf16 head's float32 copy
    counts too."""
    assert MAX_PLAIN_BYTES == 64 * 2**20
    assert choose_form(110, 151_936, width=1024, dtype=torch.float32) == "plain"
    assert choose_form(111, 151_936, width=1024, dtype=torch.float32) == "chunked"
    assert choose_form(1, 151_936, width=1024, dtype=torch.bfloat16) == "chunked"
    hidden, head, target, rows = make_inputs(dtype=torch.float32)
    auto = token_logprobs(hidden, head, target, **rows)
    assert torch.equal(auto, token_logprobs(hidden, head, target, **rows, form="plain"))


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


def test_on_a_gpu_auto_takes_the_table_and_on_a_cpu_never_triton(monkeypatch):
    """Exact dtypes have no tensor cores to gain from, and stay chunked; so does everything while no
    form is measured on a GPU."""
    assert CUDA_FORMS == ((0, "chunked"),)
    monkeypatch.setattr(rlp_kernels, "CUDA_FORMS", ((2048, "folded"), (0, "triton")))
    assert set(FORMS) == {"plain", "chunked", "triton", "folded"}
    shape = {"vocabulary": 151_936, "width": 2048}
    for num_rows in (1, 2047, 2048, 65_536):
        on_gpu = choose_form(num_rows, **shape, dtype=torch.bfloat16, device="cuda")
        assert on_gpu == ("folded" if num_rows >= 2048 else "triton")
        assert choose_form(num_rows, **shape, dtype=torch.bfloat16) == "chunked"
    assert choose_form(65_536, **shape, dtype=torch.float32, device="cuda") == "chunked"
    assert choose_form(4, 64, width=8, dtype=torch.bfloat16, device="cuda") == "plain"


@pytest.mark.parametrize("form", ["triton", "folded"])
def test_a_form_of_triton_without_triton_says_what_to_write(form, monkeypatch):
    for module in ("rlp_kernels.triton_form", "rlp_kernels.folded"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    monkeypatch.setitem(sys.modules, "triton", None)
    hidden, head, target, rows = make_inputs(dtype=torch.float32)
    with pytest.raises(ImportError, match="pip install triton, or write form='chunked'"):
        token_logprobs(hidden, head, target, **rows, form=form)


@pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="Triton interprets, and takes CPU tensors"
)
@pytest.mark.parametrize("form", ["triton", "folded"])
def test_a_form_of_triton_refuses_cpu_tensors_unless_it_interprets(form):
    pytest.importorskip("triton", reason="Triton is not installed")
    hidden, head, target, rows = make_inputs(dtype=torch.float32)
    with pytest.raises(
        ValueError, match="runs on CUDA tensors, and hidden is on cpu: write form='chunked'"
    ):
        token_logprobs(hidden, head, target, **rows, form=form)


def test_importing_the_package_imports_no_triton():
    """It costs a second, and a CPU never takes its forms."""
    code = "import sys, rlp_kernels; print('triton' in sys.modules)"
    environment = os.environ | {"PYTHONPATH": str(Path(rlp_kernels.__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.stdout.strip() == "False", done.stderr


def refused(match, **changes):
    hidden, head, target, rows = make_inputs(dtype=torch.float32)
    arguments = {"hidden": hidden, "head": head, "target": target} | rows | changes
    with pytest.raises(ValueError, match=match):
        token_logprobs(**arguments)


def test_a_target_equal_to_the_excluded_token_is_refused_by_row():
    _, _, target, rows = make_inputs()
    excluded = rows["excluded"].clone()
    excluded[6] = target[6]
    refused("target is the excluded token.*Row 6 of 10", excluded=excluded)


def test_tokens_outside_the_vocabulary_are_refused():
    """A tile loop would never meet such a target, and would return a plausible number."""
    refused(r"target must be in \[0, 23\).*Row 0 of 10 has target 23", target=torch.full((10,), 23))
    refused(r"excluded must be -1 or in \[0, 23\)", excluded=torch.full((10,), -100))


def test_temperatures_that_are_not_positive_and_finite_are_refused():
    for value in (0.0, -1.0, math.inf, math.nan):
        refused("positive and finite", inverse_temperature=torch.full((10,), value))
    refused("gets no gradient", inverse_temperature=torch.ones(10, requires_grad=True))


def test_wrong_shapes_and_dtypes_are_refused_by_name():
    refused(r"head must be \[V, D\], got \[0\].*ZeRO-3", head=torch.empty(0))
    refused(
        r"hidden must be \[N, D\] with head's D = 6, got \[2, 5, 6\]", hidden=torch.zeros(2, 5, 6)
    )
    refused("share a floating dtype", hidden=torch.zeros(10, 6, dtype=torch.bfloat16))
    refused(r"target must be \[10\] torch.int64", target=torch.zeros(9, dtype=torch.int64))
    refused(
        r"excluded must be \[10\] torch.int64", excluded=torch.full((10,), -1, dtype=torch.int32)
    )
    refused(
        r"inverse_temperature must be \[10\] torch.float32",
        inverse_temperature=torch.ones(10).bfloat16(),
    )
    refused("softcap must be positive", softcap=-30.0)
    refused("form must be one of auto, plain, chunked, triton, folded, got 'fused'", form="fused")


PEAK_MEMORY = """
import torch
from rlp_kernels import token_argmax, token_entropy, token_logprobs

def peak_bytes():
    line = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024

def run(num_rows, vocabulary):
    hidden = torch.randn(num_rows, 16, requires_grad=True)
    head = torch.randn(vocabulary, 16, requires_grad=True)
    target = torch.zeros(num_rows, dtype=torch.int64)
    excluded = torch.full((num_rows,), -1)
    inverse_temperature = torch.ones(num_rows)
    rows = dict(inverse_temperature=inverse_temperature, excluded=excluded, softcap=30.0)
    token_logprobs(hidden, head, target, **rows, form="auto").sum().backward()
    token_entropy(hidden, head, **rows)
    token_argmax(hidden, head, excluded=excluded)

run(8, 64)  # libraries load their buffers here
before = peak_bytes()
run(512, 151_936)
print(peak_bytes() - before)
"""


@pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="reads the peak from /proc/self/status"
)
def test_the_logits_are_never_in_memory_whole():
    """512 rows of 151,936 words are 311 MB of float32 logits; forward and backward stay under half
    of that.

    They take 84 MB, and 1,334 MB in the plain form: the head and its gradient are 20 MB, a tile is
    8 MB. A fresh process is measured by its own high-water mark: ru_maxrss would begin at the
    parent's.
    """
    environment = os.environ | {
        "PYTHONPATH": str(Path(rlp_kernels.__file__).parents[1]),
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", PEAK_MEMORY],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 150e6, f"peak grew by {int(done.stdout) / 1e6:.0f} MB"


# A bias of the head.


def with_bias(hidden, head, dtype=torch.float64, seed=1):
    """A bias [V] of the size of the logits, and what it is: one more column of the head, read by a
    column of ones."""
    generator = torch.Generator().manual_seed(seed)
    bias = (
        torch.randn(head.shape[0], generator=generator, dtype=torch.float64)
        .to(dtype)
        .requires_grad_()
    )
    wide_hidden = (
        torch.cat([hidden, hidden.new_ones(len(hidden), 1)], dim=1).detach().requires_grad_()
    )
    return bias, wide_hidden, torch.cat([head, bias[:, None]], dim=1).detach().requires_grad_()


def biased_value_and_grads(function, hidden, head, bias, target, **settings):
    """As `value_and_grads`, with the gradient in the bias last."""
    logprob = function(hidden, head, target, bias=bias, **settings)
    weights = torch.linspace(-1.0, 1.0, len(logprob), dtype=logprob.dtype)
    return logprob.detach(), *torch.autograd.grad((logprob * weights).sum(), (hidden, head, bias))


@pytest.mark.parametrize(
    "form, tiles",
    [("plain", {}), *(("chunked", {"row_tile": r, "vocabulary_tile": v}) for r, v in TILES)],
)
@pytest.mark.parametrize("softcap", SOFTCAPS)
def test_a_bias_is_one_more_column_of_the_head(form, tiles, softcap):
    """In value and in all gradients; also of entropy and argmax."""
    hidden, head, target, rows = make_inputs()
    bias, wide_hidden, wide_head = with_bias(hidden, head)
    module, settings = {"plain": reference, "chunked": chunked}[form], rows | {"softcap": softcap}
    logprob, hidden_grad, head_grad = value_and_grads(
        reference.token_logprobs, wide_hidden, wide_head, target, **settings
    )
    expected = (logprob, hidden_grad[:, :-1], head_grad[:, :-1], head_grad[:, -1])
    assert_close(
        biased_value_and_grads(
            module.token_logprobs, hidden, head, bias, target, **settings, **tiles
        ),
        expected,
    )
    entropy = reference.token_entropy(wide_hidden, wide_head, **settings)
    assert_close(
        module.token_entropy(hidden, head, **settings, bias=bias, **tiles),
        entropy,
        check_device=False,
    )
    excluded = {"excluded": rows["excluded"], "softcap": softcap}
    best = reference.token_argmax(wide_hidden, wide_head, **excluded)
    assert torch.equal(module.token_argmax(hidden, head, **excluded, bias=bias, **tiles), best)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_chunked_with_a_bias_errs_at_most_twice_as_much_as_plain(dtype):
    """In the mean over all entries, both against float64 on the same rounded inputs."""
    hidden, head, target, rows = make_inputs(num_rows=65, vocabulary=3001, width=48, dtype=dtype)
    bias, _, _ = with_bias(hidden, head, dtype)
    inputs = (hidden, head, bias)
    wide = (tensor.detach().double().requires_grad_() for tensor in inputs)
    truth = biased_value_and_grads(reference.token_logprobs, *wide, target, **rows)
    plain = biased_value_and_grads(reference.token_logprobs, *inputs, target, **rows)
    tiles = {"row_tile": 32, "vocabulary_tile": 512}
    tiled = biased_value_and_grads(chunked.token_logprobs, *inputs, target, **rows, **tiles)
    for name, t, p, c in zip(
        ("logprob", "hidden grad", "head grad", "bias grad"), truth, plain, tiled, strict=True
    ):
        assert c.dtype == p.dtype == (torch.float32 if name == "logprob" else dtype)
        rms, plain_rms = ((x.double() - t).square().mean().sqrt() for x in (c, p))
        assert rms <= 2 * plain_rms + torch.finfo(p.dtype).eps * t.square().mean().sqrt(), name


def test_paired_rows_with_biases_are_those_of_each_model_alone():
    """Another bias for the teacher than for the policy."""
    policy_hidden, policy_head, _, _ = make_inputs(num_rows=6)
    teacher_hidden, teacher_head, target, rows = make_inputs(num_rows=2, seed=2)
    biases = [
        with_bias(hidden, head, seed=seed)[0].detach()
        for seed, hidden, head in (
            (1, policy_hidden, policy_head),
            (2, teacher_hidden, teacher_head),
        )
    ]
    pair = (
        policy_hidden.detach(),
        policy_head.detach(),
        teacher_hidden.detach(),
        teacher_head.detach(),
        target,
    )
    settings = {
        "group_size": 3,
        "excluded": rows["excluded"],
        "policy_bias": biases[0],
        "teacher_bias": biases[1],
    }
    expected_policy = token_logprobs(
        pair[0],
        pair[1],
        target.repeat_interleave(3),
        **rows_of(6) | {"excluded": rows["excluded"].repeat_interleave(3)},
        bias=biases[0],
    )
    expected_teacher = token_logprobs(
        pair[2], pair[3], target, **rows_of(2) | {"excluded": rows["excluded"]}, bias=biases[1]
    )
    for form in ("plain", "chunked"):
        reasoned, baseline, reward = paired_logprobs(*pair, **settings, form=form)
        assert_close(reasoned.flatten(), expected_policy)
        assert_close(baseline, expected_teacher)
        assert_close(reward, reasoned - baseline[:, None])


def test_a_bias_that_is_not_the_heads_is_refused():
    """One without an entry per word, one of another dtype, one for the policy alone, and one
    released before the backward pass."""
    hidden, head, target, rows = make_inputs()
    for bias in (torch.zeros(22, dtype=torch.float64), torch.zeros(23)):
        with pytest.raises(ValueError, match=r"bias must be \[23\] torch.float64"):
            token_logprobs(hidden, head, target, **rows, bias=bias)
    bias, _, _ = with_bias(hidden, head)
    with pytest.raises(ValueError, match="both be given, or neither"):
        paired_logprobs(
            hidden,
            head,
            hidden,
            head,
            target,
            group_size=1,
            excluded=rows["excluded"],
            policy_bias=bias,
        )
    logprob = chunked.token_logprobs(hidden, head, target, **rows, bias=bias.detach())
    logprob.grad_fn.saved_tensors[2].data = torch.empty(0, dtype=head.dtype)
    with pytest.raises(ValueError, match="gather the bias"):
        logprob.sum().backward()
