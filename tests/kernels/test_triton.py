"""The forms that Triton writes, held to the plain form: interpreted on the CPU, compiled on a GPU.

Triton decides when it is imported whether it interprets, so the CPU's share of these tests runs in
a process of its own, which `test_the_kernels_are_right_when_interpreted` starts. The GPU's share is
marked `gpu` and takes real sizes: `pytest -m gpu tests/kernels/test_triton.py`.
"""

import math
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

pytest.importorskip("triton", reason="Triton is not installed: pip install triton")

import rlp_kernels
from rlp_kernels import draw, folded, reference, triton_draw, triton_form
from tests.kernels.rounding import Bounds, assert_errs_like, token_logprob_bounds

INTERPRETED = triton_form.INTERPRETED
ON_A_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

# Rows, vocabulary, width. The small sizes are multiples of no tile; the large ones are Qwen3-1.7B's
# head.
SMALL, LARGE = (37, 203, 40), (2048, 151_936, 2048)
CASES = (
    [("cpu", SMALL)]
    if INTERPRETED
    else [
        pytest.param("cuda", shape, marks=[pytest.mark.gpu, ON_A_GPU]) for shape in (SMALL, LARGE)
    ]
)
every_case = pytest.mark.parametrize("device, shape", CASES)
DEVICES = ["cpu"] if INTERPRETED else [pytest.param("cuda", marks=[pytest.mark.gpu, ON_A_GPU])]
every_device = pytest.mark.parametrize("device", DEVICES)

# The gradient of the logits is rounded to bf16 before it is multiplied; the interpreter cuts
# instead of rounding.
BF16_FACTOR_ERROR = torch.finfo(torch.bfloat16).eps / (1 if INTERPRETED else 2)

# Small tiles, so that small inputs have several of everything: 3 parts of the vocabulary with 2
# tiles each, 2 tiles of rows.
SIZES = triton_form.Tiles(rows=32, columns=64, depth=32, warps=4, stages=2)
BLOCKS = {"row_tile": 24, "vocabulary_tile": 120}
PARTS = {"sizes": SIZES, "split_words": 80}


@pytest.mark.skipif(INTERPRETED, reason="this is the process that the test starts")
def test_the_kernels_are_right_when_interpreted():
    """Every test below, on the CPU."""
    path = os.pathsep.join(
        [str(Path(rlp_kernels.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    )
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        "-o",
        "addopts=",
        "-p",
        "no:cacheprovider",
        "--noconftest",
        __file__,
    ]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr


def make_inputs(device, shape, dtype, seed=0):
    """Logits of deviation 2, temperatures 0.5 to 2; every other row excludes a token that is not
    its target."""
    num_rows, vocabulary, width = shape
    generator = torch.Generator(device).manual_seed(seed)
    hidden = torch.randn(num_rows, width, generator=generator, device=device).to(dtype)
    head = (
        torch.randn(vocabulary, width, generator=generator, device=device) * (2 / width**0.5)
    ).to(dtype)
    target = torch.randint(vocabulary, (num_rows,), generator=generator, device=device)
    excluded = (
        target + torch.randint(1, vocabulary, (num_rows,), generator=generator, device=device)
    ) % vocabulary
    excluded[::2] = -1
    inverse_temperature = torch.linspace(0.5, 2.0, num_rows, device=device)
    return hidden, head, target, {"inverse_temperature": inverse_temperature, "excluded": excluded}


def twin(form, device):
    """The form's `token_logprobs`, with small tiles on the CPU and its own on a GPU."""
    module, sizes = {
        "triton": (triton_form, PARTS | BLOCKS),
        "folded": (folded, BLOCKS),
        "plain": (reference, {}),
    }[form]
    return partial(module.token_logprobs, **(sizes if device == "cpu" else {}))


def coefficients(hidden):
    """A fixed weighting of the log-probabilities, of both signs; the same numbers in float32 and
    float64."""
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    return torch.linspace(-1.0, 1.0, len(hidden), device=hidden.device).to(dtype)


def value_and_grads(function, hidden, head, target, **settings):
    """Log-probabilities and the gradients of their weighted sum in hidden and head."""
    hidden, head = hidden.detach().requires_grad_(), head.detach().requires_grad_()
    logprob = function(hidden, head, target, **settings)
    return logprob.detach(), *torch.autograd.grad(logprob, (hidden, head), coefficients(hidden))


def way(name, device):
    """`value_and_grads` of a form, through autograd or in the forward pass."""
    if name != "triton, gradient in forward":
        return partial(value_and_grads, twin(name, device))
    blocks = PARTS | BLOCKS if device == "cpu" else {}

    def with_grad(hidden, head, target, **settings):
        return triton_form.token_logprobs_with_grad(
            hidden, head, target, coefficients(hidden), **settings, **blocks
        )

    return with_grad


@every_case
@pytest.mark.parametrize("name", ["triton", "folded", "triton, gradient in forward"])
@pytest.mark.parametrize("softcap", [0.0, 3.0])  # 3: logits of deviation 2 are well inside the bend
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_form_errs_no_more_than_rounding_and_at_most_twice_as_much_as_plain(
    device, shape, name, softcap, dtype
):
    """Both against float64 on the same rounded inputs."""
    factor_error = (
        BF16_FACTOR_ERROR
        if dtype == torch.bfloat16 and (name != "folded" or device == "cuda")
        else 0.0
    )
    draws = []
    # Where the output is narrow its rounding is all there is, the same for both forms; in
    # float32 a few draws even out the luck.
    for seed in range(4 if dtype == torch.float32 and shape == SMALL else 1):
        hidden, head, target, rows = make_inputs(device, shape, dtype, seed)
        settings = rows | {"softcap": softcap}
        plain = value_and_grads(reference.token_logprobs, hidden, head, target, **settings)
        ours = way(name, device)(hidden, head, target, **settings)
        truth = value_and_grads(
            reference.token_logprobs, hidden.double(), head.double(), target, **settings
        )
        for o, p in zip(ours, plain, strict=True):
            assert (o.dtype, o.shape) == (p.dtype, p.shape)
        bounds = token_logprob_bounds(
            hidden, head, target, coefficients(hidden), **settings, factor_error=factor_error
        )
        draws.append((plain, ours, truth, bounds))
    *results, bounds = zip(*draws)
    results = [tuple(map(torch.cat, zip(*parts))) for parts in results]
    assert_errs_like(*results, Bounds.joined(bounds))


@every_case
@pytest.mark.parametrize("form", ["triton", "folded"])
@pytest.mark.parametrize("dtype, softcap", [(torch.bfloat16, 3.0), (torch.float32, 0.0)])
def test_a_form_with_a_bias_errs_at_most_twice_as_much_as_plain(
    device, shape, form, softcap, dtype
):
    """In the mean over all entries, both against float64 on the same rounded inputs; the bias has a
    gradient too.

    Forgiven are one spacing of the output dtype, and what rounding a float32 logit does to its
    probability: a share of eps |z|.
    """
    hidden, head, target, rows = make_inputs(device, shape, dtype)
    bias = torch.randn(
        len(head), generator=torch.Generator(device).manual_seed(1), device=device
    ).to(dtype)

    def value_and_biased_grads(function, *inputs):
        inputs = [tensor.detach().requires_grad_() for tensor in inputs]
        logprob = function(*inputs[:2], target, bias=inputs[2], **rows, softcap=softcap)
        return logprob.detach(), *torch.autograd.grad(logprob, inputs, coefficients(inputs[0]))

    plain, ours = (
        value_and_biased_grads(function, hidden, head, bias)
        for function in (reference.token_logprobs, twin(form, device))
    )
    truth = value_and_biased_grads(
        reference.token_logprobs, hidden.double(), head.double(), bias.double()
    )
    largest = (
        reference.token_logits(
            hidden.double(),
            head.double(),
            **rows | {"excluded": torch.full_like(target, -1)},
            softcap=softcap,
            bias=bias.double(),
        )
        .abs()
        .max()
    )
    for what, t, p, o in zip(
        ("logprob", "hidden grad", "head grad", "bias grad"), truth, plain, ours, strict=True
    ):
        assert o.dtype == p.dtype and o.shape == p.shape
        rms, plain_rms, size = (
            x.double().square().mean().sqrt() for x in (o.double() - t, p.double() - t, t)
        )
        assert (
            rms
            <= 2 * plain_rms
            + (torch.finfo(p.dtype).eps + torch.finfo(torch.float32).eps * largest) * size
        ), what


@every_device
def test_paired_rows_with_biases_are_those_of_each_model_alone(device):
    """To the bit, with another bias for the teacher than for the policy."""
    policy_hidden, policy_head, _, _ = make_inputs(device, (36, 203, 40), torch.float32)
    teacher_hidden, teacher_head, target, rows = make_inputs(
        device, (12, 203, 40), torch.float32, seed=1
    )
    excluded, biases = (
        rows["excluded"],
        torch.randn(2, 203, generator=torch.Generator(device).manual_seed(2), device=device),
    )
    pair = (policy_hidden, policy_head, teacher_hidden, teacher_head, target)
    parts = PARTS if device == "cpu" else {}
    reasoned, baseline, _ = triton_form.paired_logprobs(
        *pair,
        group_size=3,
        excluded=excluded,
        policy_bias=biases[0],
        teacher_bias=biases[1],
        **parts,
    )
    one, logprobs = torch.ones(36, device=device), partial(triton_form.token_logprobs, **parts)
    position = torch.arange(36, device=device) // 3
    alone = logprobs(
        policy_hidden,
        policy_head,
        target[position],
        inverse_temperature=one,
        excluded=excluded[position],
        bias=biases[0],
    )
    assert torch.equal(reasoned.flatten(), alone)
    assert torch.equal(
        baseline,
        logprobs(
            teacher_hidden,
            teacher_head,
            target,
            inverse_temperature=one[:12],
            excluded=excluded,
            bias=biases[1],
        ),
    )


@every_case
@pytest.mark.parametrize("name", ["triton", "folded", "triton, gradient in forward"])
def test_reruns_are_equal_to_the_bit(device, shape, name):
    hidden, head, target, rows = make_inputs(device, shape, torch.bfloat16)
    first, second = (way(name, device)(hidden, head, target, **rows) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@every_case
def test_a_log_probability_does_not_depend_on_the_rows_beside_it(device, shape):
    """The parts of the vocabulary and their order are fixed, so a micro-batch gives the bits of the
    whole.

    Interpreted, a product is one of NumPy's, whose rounding may depend on a row's place in the
    matrix. So the products are exact here: multiples of 1/4 and 1/8, whose sums float32 holds.
    What is summed after them is not.
    """
    hidden, head, target, rows = make_inputs(device, shape, torch.bfloat16)
    if INTERPRETED:
        hidden, head = (4 * hidden).round() / 4, (8 * head).round() / 8
    logprobs = twin("triton", device)
    few = slice(19, 36)
    alone = logprobs(
        hidden[few], head, target[few], **{name: value[few] for name, value in rows.items()}
    )
    assert torch.equal(alone, logprobs(hidden, head, target, **rows)[few])


@every_case
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_paired_rows_are_those_of_each_model_alone_and_the_reward_their_difference(
    device, shape, dtype
):
    """To the bit; the policy's rows end within a tile, which is where the teacher's begin anew."""
    group_size, num_positions = 3, shape[0] // 3
    policy_hidden, policy_head, _, _ = make_inputs(
        device, (group_size * num_positions, *shape[1:]), dtype
    )
    teacher_hidden, teacher_head, target, rows = make_inputs(
        device, (num_positions, *shape[1:]), dtype, seed=1
    )
    excluded = rows["excluded"]
    pair = (policy_hidden, policy_head, teacher_hidden, teacher_head, target)
    parts = PARTS if device == "cpu" else {}
    reasoned, baseline, reward = triton_form.paired_logprobs(
        *pair, group_size=group_size, excluded=excluded, **parts
    )

    position = torch.arange(group_size * num_positions, device=device) // group_size
    one = torch.ones(group_size * num_positions, device=device)
    logprobs = partial(triton_form.token_logprobs, **parts)
    policy_alone = logprobs(
        policy_hidden,
        policy_head,
        target[position],
        inverse_temperature=one,
        excluded=excluded[position],
    )
    teacher_alone = logprobs(
        teacher_hidden,
        teacher_head,
        target,
        inverse_temperature=one[:num_positions],
        excluded=excluded,
    )
    assert reasoned.shape == reward.shape == (num_positions, group_size) and baseline.shape == (
        num_positions,
    )
    assert torch.equal(reasoned.flatten(), policy_alone)
    assert torch.equal(baseline, teacher_alone)
    assert torch.equal(reward, reasoned - baseline[:, None])
    plain = reference.paired_logprobs(*pair, group_size=group_size, excluded=excluded)
    assert_close((reasoned, baseline, reward), plain)


@every_device
@pytest.mark.parametrize("form", ["triton", "folded"])
def test_a_two_word_vocabulary_at_odds_three_to_one_gives_ln_three_quarters(device, form):
    """Logits 0 and ln 3; at temperature one half the odds are nine to one."""
    hidden, head = (
        torch.ones(2, 1, device=device),
        torch.tensor([[0.0], [math.log(3.0)]], device=device),
    )
    rows = {
        "inverse_temperature": torch.tensor([1.0, 2.0], device=device),
        "excluded": torch.full((2,), -1, device=device),
    }
    logprob = twin(form, device)(hidden, head, torch.tensor([1, 1], device=device), **rows)
    assert_close(logprob.cpu(), torch.tensor([3 / 4, 9 / 10]).log())


@every_device
@pytest.mark.parametrize("form", ["triton", "folded"])
def test_a_near_certain_target_keeps_the_digits_of_its_small_logprob(device, form):
    """Logits 30 and 20: the log-probability is -4.54e-5, and float32 numbers near 30 are 1.9e-6
    apart."""
    hidden, head = torch.ones(1, 1, device=device), torch.tensor([[30.0], [20.0]], device=device)
    rows = {
        "inverse_temperature": torch.ones(1, device=device),
        "excluded": torch.full((1,), -1, device=device),
    }
    logprob = twin(form, device)(
        hidden, head, torch.zeros(1, dtype=torch.int64, device=device), **rows
    )
    expected = torch.tensor([-math.log1p(math.exp(-10.0))])
    assert_close(logprob.cpu(), expected, rtol=0.0, atol=torch.finfo(torch.float32).eps)


@every_device
@pytest.mark.parametrize("form", ["triton", "folded"])
def test_a_part_of_the_vocabulary_with_nothing_but_the_excluded_token_adds_nothing(device, form):
    """On the CPU word 0 is alone in the first part, word 80 in the last: 81 words in parts of 80,
    and the reverse."""
    hidden, head, _, _ = make_inputs(device, (2, 81, 8), torch.float32)
    target, excluded = torch.tensor([0, 79], device=device), torch.tensor([80, 80], device=device)
    rows = {"inverse_temperature": torch.ones(2, device=device), "excluded": excluded}
    blocks = {"triton": {"split_words": 80}, "folded": {"vocabulary_tile": 80}}[form]
    module = {"triton": triton_form, "folded": folded}[form]
    assert_close(
        module.token_logprobs(hidden, head, target, **rows, **blocks),
        reference.token_logprobs(hidden, head, target, **rows),
    )


@every_device
@pytest.mark.parametrize("form", ["triton", "folded"])
@pytest.mark.parametrize("frozen", ["hidden", "head"])
def test_a_frozen_input_gets_no_gradient_and_leaves_the_other_unchanged(device, form, frozen):
    hidden, head, target, rows = make_inputs(device, (5, 90, 16), torch.float32)
    _, hidden_grad, head_grad = value_and_grads(twin(form, device), hidden, head, target, **rows)
    inputs = {
        "hidden": hidden.requires_grad_(frozen != "hidden"),
        "head": head.requires_grad_(frozen != "head"),
    }
    twin(form, device)(**inputs, target=target, **rows).backward(coefficients(hidden))
    trained = "head" if frozen == "hidden" else "hidden"
    assert inputs[frozen].grad is None
    assert torch.equal(inputs[trained].grad, {"hidden": hidden_grad, "head": head_grad}[trained])


@every_device
@pytest.mark.parametrize("name", ["triton", "folded", "triton, gradient in forward"])
def test_small_upstream_gradients_lose_no_digit(device, name):
    """A mean over a million thought tokens scales them by 2^-20; bf16 has the exponents for that,
    fp16 would not."""
    hidden, head, target, rows = make_inputs(device, (5, 90, 16), torch.bfloat16)
    if name == "triton, gradient in forward":
        blocks = PARTS | BLOCKS if device == "cpu" else {}
        grads = [
            triton_form.token_logprobs_with_grad(
                hidden, head, target, coefficients(hidden) * scale, **rows, **blocks
            )[1:]
            for scale in (1.0, 2.0**-20)
        ]
    else:
        inputs = (hidden.requires_grad_(), head.requires_grad_())
        logprob = twin(name, device)(*inputs, target, **rows)
        grads = [
            torch.autograd.grad(logprob, inputs, coefficients(hidden) * scale, retain_graph=True)
            for scale in (1.0, 2.0**-20)
        ]
    for large, small in zip(*grads, strict=True):
        assert torch.equal(small * 2.0**20, large)


@every_device
def test_the_gradient_in_the_forward_leaves_the_head_out_when_it_is_frozen(device):
    hidden, head, target, rows = make_inputs(device, (5, 90, 16), torch.float32)
    both = way("triton, gradient in forward", device)(hidden, head, target, **rows)
    alone = way("triton, gradient in forward", device)(
        hidden, head, target, **rows, wants_head=False
    )
    assert alone[2] is None and all(
        torch.equal(a, b) for a, b in zip(alone[:2], both[:2], strict=True)
    )


@every_device
@pytest.mark.parametrize("form", ["triton", "folded"])
def test_only_the_inputs_and_two_numbers_per_row_are_kept_for_the_backward_pass(device, form):
    hidden, head, target, rows = make_inputs(device, (5, 90, 16), torch.float32)
    kept = []

    def keep(tensor):
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        twin(form, device)(hidden.requires_grad_(), head, target, **rows)
    inputs = {tensor.data_ptr() for tensor in (hidden, head, target, *rows.values())}
    assert [tensor.shape for tensor in kept if tensor.data_ptr() not in inputs] == [(5,), (5,)]


@every_device
@pytest.mark.parametrize("form", ["triton", "folded"])
def test_rows_and_head_may_be_views_with_any_strides(device, form):
    """Selected hidden states, a transposed head: read where they lie, without a copy of the
    head."""
    hidden, head, target, rows = make_inputs(device, (10, 90, 16), torch.float32)
    wide = torch.cat([hidden, hidden], dim=1)[::2, 16:]
    every_other = {name: value[::2] for name, value in rows.items()}
    across = head.T.contiguous().T
    assert not wide.is_contiguous() and not across.is_contiguous()
    expected = value_and_grads(
        twin(form, device), hidden[::2].contiguous(), head, target[::2], **every_other
    )
    assert_close(
        value_and_grads(twin(form, device), wide, across, target[::2], **every_other), expected
    )


@every_device
@pytest.mark.parametrize("form", ["triton", "folded"])
def test_no_rows_give_no_logprobs_and_zero_gradients(device, form):
    """A rank may hold no row of a micro-batch and still takes part in the backward pass."""
    hidden, head, target, rows = make_inputs(device, (0, 90, 16), torch.float32)
    logprob, hidden_grad, head_grad = value_and_grads(
        twin(form, device), hidden, head, target, **rows
    )
    assert logprob.shape == (0,) and hidden_grad.shape == (0, 16)
    assert torch.equal(head_grad, torch.zeros_like(head))


@every_device
@pytest.mark.parametrize("form", ["triton", "folded"])
def test_a_form_is_reached_by_its_name_and_float64_is_refused(device, form):
    hidden, head, target, rows = make_inputs(device, (5, 90, 16), torch.float32)
    named = rlp_kernels.token_logprobs(hidden, head, target, **rows, form=form)
    assert_close(named, reference.token_logprobs(hidden, head, target, **rows))
    with pytest.raises(ValueError, match="hidden is float64: write form='chunked'"):
        rlp_kernels.token_logprobs(hidden.double(), head.double(), target, **rows, form=form)


@every_device
@pytest.mark.parametrize("vocabulary", [32, 203])  # one tile; six and a part, of 32 words
def test_a_draw_is_that_of_the_plain_form(device, vocabulary):
    """Its own error is that of `draw_tokens`, far below the distance of these numbers from a
    boundary; a row with NaN, +inf or nothing at all is broken alone, and -inf is never drawn."""
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(40, vocabulary, generator=generator)
    uniform = torch.rand(40, generator=generator, dtype=torch.float64)
    uniform[0], uniform[1] = 0.0, 1 - 2.0**-53
    logits[:4, :40] = logits[:4, -1:] = -math.inf  # a whole tile, or the row
    logits[:4, vocabulary // 2] = -150.0
    logits[5, 7], logits[6, 9], logits[7] = math.nan, math.inf, -math.inf
    logits, uniform = logits.to(device), uniform.to(device)

    ours = triton_draw.draw_tokens(logits, uniform, 0.7, tile=32)
    plain = draw._from_tiles(logits, uniform, 0.7, 32)
    sound = torch.tensor([row not in (5, 6, 7) for row in range(40)], device=device)
    assert torch.equal(ours[0][sound], plain[0][sound])
    for a, b in zip(ours[1:], plain[1:], strict=True):
        assert_close(a[sound], b[sound], rtol=0, atol=1e-5)
        assert a[~sound].isnan().all()
    assert ((ours[0] >= 0) & (ours[0] < vocabulary)).all()


@every_device
def test_a_draw_reads_logits_and_numbers_where_they_lie(device):
    """Views with any strides; and no row at all."""
    logits = torch.randn(203, 20, generator=torch.Generator().manual_seed(0)).to(device)
    uniform = torch.linspace(0, 0.99, 20, dtype=torch.float64, device=device)
    alone = triton_draw.draw_tokens(logits.T[::2].contiguous(), uniform[::2].contiguous(), 0.7)
    views = rlp_kernels.draw_tokens(logits.T[::2], uniform[::2], 0.7, form="triton")
    assert all(torch.equal(a, b) for a, b in zip(views, alone, strict=True))
    assert triton_draw.draw_tokens(logits.T[:0], uniform[:0], 0.7)[0].shape == (0,)


@pytest.mark.gpu
@ON_A_GPU
def test_a_graph_holds_a_draw():
    """Replayed with other logits and numbers, it draws what a call draws."""
    logits = torch.randn(128, 151_936, device="cuda")
    uniform = torch.rand(128, dtype=torch.float64, device="cuda")
    rlp_kernels.draw_tokens(logits, uniform, 0.7)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        held = rlp_kernels.draw_tokens(logits, uniform, 0.7)
    logits.normal_(), uniform.uniform_()
    graph.replay()
    expected = rlp_kernels.draw_tokens(logits, uniform, 0.7)
    assert all(torch.equal(a, b) for a, b in zip(held, expected, strict=True))
