"""A head with a bias: one more column, in every form."""

import pytest
import torch
from torch.testing import assert_close

from rlp_kernels import chunked, paired_logprobs, reference, token_logprobs
from tests.kernels.rows import SOFTCAPS, TILES, make_inputs, rows_of, value_and_grads

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
