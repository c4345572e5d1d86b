"""Fast forms of the functions that RLP spends its time in, behind one checked entry each.

The plain form (`reference.py`) is the definition; every other form is its twin, held to it by
`tests/kernels/`. A form is chosen by `choose_form` from shapes and device alone, or named by the
caller; none is a silent fallback for another, and one that breaks raises.

Results are in nats, float32, or float64 for float64 inputs. Every function raises ValueError where
a shape, dtype or value is not as its arguments say, naming the argument and the row, and
ImportError where the form needs Triton and it is not installed. On a GPU the checks of tokens and
temperatures cost one synchronization per call.

Dimensions
    N  rows, one per predicted token
    M  positions
    G  thoughts per position
    D  width of the hidden state
    V  vocabulary
"""

import importlib
import math
from types import ModuleType

import torch
from torch import Tensor

from rlp_kernels import chunked, reference
from rlp_kernels.draw import draw_tokens

__all__ = [
    "CUDA_FORMS",
    "FORMS",
    "MAX_PLAIN_BYTES",
    "choose_form",
    "draw_tokens",
    "paired_logprobs",
    "token_argmax",
    "token_entropy",
    "token_logprobs",
    "token_logprobs_with_grad",
]

MAX_PLAIN_BYTES = 64 * 2**20
"""Most that the plain form may add to memory before `choose_form` turns to the chunked one: 64 MiB,
which is 110 rows of a 151,936-word vocabulary. It counts the float32 logits once and the float32
copy of a bf16 head once; with autograd's own copies the measured peak is about four times the
logits."""

CUDA_FORMS = ((0, "chunked"),)
"""On a GPU with bf16 or fp16 inputs: the form from this many rows on. Chunked, which is torch
alone, until a measurement names a faster one. By arithmetic that will be `folded` from about 2048
rows on, where the vendor's product is the faster one, and `triton` below, where one launch for all
of the vocabulary beats two for each tile of it."""

FORMS = ("plain", "chunked", "triton", "folded")
"""`plain` is the definition, `chunked` the same in bounded memory on any device; `triton` and
`folded` need Triton."""

_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def token_logprobs(
    hidden: Tensor,
    head: Tensor,
    target: Tensor,
    *,
    inverse_temperature: Tensor,
    excluded: Tensor,
    softcap: float = 0.0,
    bias: Tensor | None = None,
    form: str = "auto",
    wait: bool = True,
) -> Tensor:
    """Log-probability of each row's target, with the row's excluded token out of the softmax.

        z       = softcap(hidden . head^T + bias)       softcap(z) = c tanh(z / c)
        logprob = log softmax(z * inverse_temperature)[target],    logit of excluded = -inf

    Differentiable once, in hidden, head and bias; their gradients accumulate in float32 and come in
    the inputs' dtype. bf16 inputs are multiplied with float32 accumulation and the logits stay
    float32, also under autocast.

    Args:
        hidden: [N, D], the last hidden states, bf16, fp16, float32 or float64.
        head: [V, D], the output embedding, same dtype. Under ZeRO-3 it has to be gathered here
            and again when the backward pass arrives; the plain form keeps the gathered copy alive
            between the two, the chunked form does not.
        target: [N] int64, never the row's excluded token, whose log-probability is -inf.
        inverse_temperature: [N] float32, 1 / temperature of each row, positive. No gradient.
        excluded: [N] int64, the token that cannot occur in this row, -1 for none.
        softcap: c, 0 for none (Gemma 2 uses 30).
        bias: [V], same dtype, None for none (Phi and GPT-J have one). Under ZeRO-3 as the head.
        form: one of `FORMS`, or "auto" to take what `choose_form` says.
        wait: for the device, to refuse a target, a temperature or an excluded token that can not be
            with the row that has it. False: an assertion of the device does, which says less.

    Returns:
        [N], nats.
    """
    _check_logits("token_logprobs", hidden, head, excluded, softcap, bias)
    _check_rows("token_logprobs", "target", target, hidden, torch.int64)
    _check_inverse_temperature("token_logprobs", inverse_temperature, hidden)
    _check_values(
        "token_logprobs",
        head,
        excluded,
        target=target,
        inverse_temperature=inverse_temperature,
        wait=wait,
    )

    module = _module("token_logprobs", form, FORMS, hidden, head)
    return module.token_logprobs(
        hidden,
        head,
        target,
        inverse_temperature=inverse_temperature,
        excluded=excluded,
        softcap=softcap,
        bias=bias,
    )


def token_logprobs_with_grad(
    hidden: Tensor,
    head: Tensor,
    target: Tensor,
    coefficient: Tensor,
    *,
    inverse_temperature: Tensor,
    excluded: Tensor,
    softcap: float = 0.0,
    wants_head: bool = True,
    form: str = "auto",
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Log-probabilities and, in the same call, the gradients of a weighted sum of them.

        grad_hidden, grad_head = gradients of sum_n coefficient_n * logprob_n

    For thought tokens on-policy the weight is known before the head sees them: the ratio is one and
    targets are scored first. `token_logprobs` and its backward pass make the logits twice, 8 N V D
    operations with the two gradients; here they are made once, 6 N V D (4 without the head's).

    The price is memory and traffic: the float32 logits of one tile of rows, [R, V] of at most
    `chunked.MAX_KEPT_BYTES`, and a float32 gradient of the head, [V, D]. Both are gone when the
    call returns. The results carry no graph: a caller hands them on with
    `hidden.backward(grad_hidden)` and adds `grad_head` to the head's own gradient. A head with a
    bias is not served.

    Args:
        coefficient: [N] float32 (float64 for float64 inputs): what multiplies each log-probability
            in the loss.
        wants_head: whether to compute the gradient of the head.
        form: "plain", "chunked", "triton", or "auto".
        hidden, head, target, inverse_temperature, excluded, softcap: as in `token_logprobs`.

    Returns:
        logprob [N] as in `token_logprobs`; grad_hidden [N, D] and grad_head [V, D] in the inputs'
        dtype, the latter None unless wanted.
    """
    where = "token_logprobs_with_grad"
    _check_logits(where, hidden, head, excluded, softcap)
    _check_rows(where, "target", target, hidden, torch.int64)
    _check_rows(where, "coefficient", coefficient, hidden, chunked.wide_dtype(hidden))
    _check_inverse_temperature(where, inverse_temperature, hidden)
    _check_values(where, head, excluded, target=target, inverse_temperature=inverse_temperature)

    module = _module(where, form, ("plain", "chunked", "triton"), hidden, head)
    return module.token_logprobs_with_grad(
        hidden.detach(),
        head.detach(),
        target,
        coefficient.detach(),
        inverse_temperature=inverse_temperature,
        excluded=excluded,
        softcap=softcap,
        wants_head=wants_head,
    )


def paired_logprobs(
    policy_hidden: Tensor,
    policy_head: Tensor,
    teacher_hidden: Tensor,
    teacher_head: Tensor,
    target: Tensor,
    *,
    group_size: int,
    excluded: Tensor,
    policy_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    form: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """Each position's target, by the policy after each of G thoughts, by the teacher without one.

        reward = reasoned_logprob - baseline_logprob                                         (eq. 5)

    At temperature 1, without gradient. The Triton form does both models in one launch; each row
    equals that of `token_logprobs` to the bit. What that buys is memory and exactness: scoring is
    under 1 % of a step.

    Args:
        policy_hidden: [M*G, D], the G thoughts of a position one after the other.
        policy_head: [V, D].
        teacher_hidden: [M, D], one row per position.
        teacher_head: [V, D].
        target: [M] int64.
        group_size: G.
        excluded: [M] int64, the token that cannot occur, -1 for none.
        policy_bias, teacher_bias: [V], what is added to the logits of each; None for both where
            there is none.
        form: "plain", "chunked", "triton", or "auto".

    Returns:
        reasoned_logprob [M, G], baseline_logprob [M], reward [M, G].
    """
    where = "paired_logprobs"
    _check_logits(f"{where} teacher", teacher_hidden, teacher_head, excluded, 0.0, teacher_bias)
    _check_rows(where, "target", target, teacher_hidden, torch.int64)
    _check_pair(policy_hidden, policy_head, teacher_hidden, teacher_head, group_size)
    if (policy_bias is None) != (teacher_bias is None):
        raise ValueError(f"{where}: policy_bias and teacher_bias must both be given, or neither.")
    _check_bias(f"{where} policy", policy_bias, policy_head)
    _check_values(where, teacher_head, excluded, target=target)

    module = _module(where, form, ("plain", "chunked", "triton"), policy_hidden, policy_head)
    return module.paired_logprobs(
        policy_hidden,
        policy_head,
        teacher_hidden,
        teacher_head,
        target,
        group_size=group_size,
        excluded=excluded,
        policy_bias=policy_bias,
        teacher_bias=teacher_bias,
    )


def _check_pair(
    policy_hidden: Tensor,
    policy_head: Tensor,
    teacher_hidden: Tensor,
    teacher_head: Tensor,
    group_size: int,
) -> None:
    """Refuse a policy that is not a twin of the teacher with `group_size` rows for each of its."""
    where = "paired_logprobs"
    num_positions, width = teacher_hidden.shape
    expected = [num_positions * group_size, width]
    is_twin = list(policy_hidden.shape) == expected and policy_head.shape == teacher_head.shape
    if group_size < 1 or not is_twin:
        raise ValueError(
            f"{where}: policy_hidden must be [M * group_size, D] = {expected} and policy_head the"
            f" teacher's {list(teacher_head.shape)}, got {list(policy_hidden.shape)} and"
            f" {list(policy_head.shape)}."
        )
    if (policy_hidden.dtype, policy_head.dtype) != (teacher_hidden.dtype, teacher_head.dtype):
        raise ValueError(
            f"{where}: policy and teacher must share a dtype, got {policy_hidden.dtype},"
            f" {policy_head.dtype} and {teacher_hidden.dtype}, {teacher_head.dtype}."
        )
    if {policy_hidden.device, policy_head.device} != {teacher_hidden.device}:
        raise ValueError(
            f"{where}: policy and teacher must share a device, got {policy_hidden.device},"
            f" {policy_head.device} and {teacher_hidden.device}."
        )


def token_entropy(
    hidden: Tensor,
    head: Tensor,
    *,
    inverse_temperature: Tensor,
    excluded: Tensor,
    softcap: float = 0.0,
    bias: Tensor | None = None,
    wait: bool = True,
) -> Tensor:
    """Entropy of each row's softmax, -sum_v p_v log p_v, without gradient.

    [N, V] is never in memory. Arguments as in `token_logprobs`.

    Returns:
        [N], nats.
    """
    _check_logits("token_entropy", hidden, head, excluded, softcap, bias)
    _check_inverse_temperature("token_entropy", inverse_temperature, hidden)
    _check_values(
        "token_entropy", head, excluded, inverse_temperature=inverse_temperature, wait=wait
    )

    return chunked.token_entropy(
        hidden,
        head,
        inverse_temperature=inverse_temperature,
        excluded=excluded,
        softcap=softcap,
        bias=bias,
    )


def token_argmax(
    hidden: Tensor,
    head: Tensor,
    *,
    excluded: Tensor,
    softcap: float = 0.0,
    bias: Tensor | None = None,
    wait: bool = True,
) -> Tensor:
    """Most probable token of each row, the lowest index on ties.

    [N, V] is never in memory. Temperature does not move the maximum, so there is none. Arguments as
    in `token_logprobs`.

    Returns:
        [N] int64.
    """
    _check_logits("token_argmax", hidden, head, excluded, softcap, bias)
    _check_values("token_argmax", head, excluded, wait=wait)
    return chunked.token_argmax(hidden, head, excluded=excluded, softcap=softcap, bias=bias)


def choose_form(
    num_rows: int,
    vocabulary: int,
    *,
    width: int,
    dtype: torch.dtype,
    max_plain_bytes: int = MAX_PLAIN_BYTES,
    device: str = "cpu",
) -> str:
    """The form that `form="auto"` takes.

    "plain" where it fits in `max_plain_bytes`; beyond, "chunked", or on a GPU what `CUDA_FORMS`
    says. What counts is the [N, V] logits and, for a head narrower than float32, its widened [V, D]
    copy. float32 and float64 have no product on the tensor cores and stay chunked on a GPU too. The
    answer depends on shapes, dtype and the type of device only, so a caller can log it before a
    run.
    """
    bytes_per_logit = 8 if dtype == torch.float64 else 4
    widened_width = 0 if dtype in (torch.float32, torch.float64) else width
    plain_bytes = vocabulary * (num_rows + widened_width) * bytes_per_logit

    if plain_bytes <= max_plain_bytes:
        return "plain"
    if device != "cuda" or widened_width == 0:
        return "chunked"
    return next(form for least_rows, form in CUDA_FORMS if num_rows >= least_rows)


def _module(
    where: str, form: str, forms: tuple[str, ...], hidden: Tensor, head: Tensor
) -> ModuleType:
    """The module of the form that was named or, for "auto", chosen.

    `forms` are those that have a twin of the function `where`; others are refused.
    """
    if form == "auto":
        vocabulary, width = head.shape
        form = choose_form(
            len(hidden), vocabulary, width=width, dtype=head.dtype, device=hidden.device.type
        )
        # The vendor's product has no twin of these: the form beside it does the same in Triton.
        form = form if form in forms else "triton"
    if form not in forms:
        raise ValueError(f"{where}: form must be one of auto, {', '.join(forms)}, got {form!r}.")

    if form in ("plain", "chunked"):
        return {"plain": reference, "chunked": chunked}[form]
    name = {"triton": "rlp_kernels.triton_form", "folded": "rlp_kernels.folded"}[form]
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != "triton":
            raise
        raise ImportError(
            f"{where}: form={form!r} needs Triton, which is not installed: pip install triton, or"
            " write form='chunked'."
        ) from error


def _check_logits(
    where: str,
    hidden: Tensor,
    head: Tensor,
    excluded: Tensor,
    softcap: float,
    bias: Tensor | None = None,
) -> None:
    """Refuse arguments from which no [N, V] logits can be made; looks at no tensor's values."""
    if head.dim() != 2 or head.numel() == 0:
        raise ValueError(
            f"{where}: head must be [V, D], got {list(head.shape)}. Under ZeRO-3 a released"
            " parameter is [0]: gather it first."
        )
    if hidden.dim() != 2 or hidden.shape[1] != head.shape[1]:
        raise ValueError(
            f"{where}: hidden must be [N, D] with head's D = {head.shape[1]}, got"
            f" {list(hidden.shape)}. Select or flatten the rows first."
        )
    if hidden.dtype not in _DTYPES or hidden.dtype != head.dtype:
        raise ValueError(
            f"{where}: hidden and head must share a floating dtype, got {hidden.dtype} and"
            f" {head.dtype}."
        )
    if hidden.device != head.device:
        raise ValueError(
            f"{where}: hidden and head must share a device, got {hidden.device} and {head.device}."
        )
    if not (softcap >= 0 and math.isfinite(softcap)):
        raise ValueError(f"{where}: softcap must be positive, or 0 for none, got {softcap}.")
    _check_rows(where, "excluded", excluded, hidden, torch.int64)
    _check_bias(where, bias, head)


def _check_bias(where: str, bias: Tensor | None, head: Tensor) -> None:
    """Refuse a bias that does not belong to the head."""
    expected = f"[{head.shape[0]}] {head.dtype} on {head.device}"
    if bias is not None and f"{list(bias.shape)} {bias.dtype} on {bias.device}" != expected:
        raise ValueError(
            f"{where}: bias must be {expected}, one value per row of head, got {list(bias.shape)}"
            f" {bias.dtype} on {bias.device}. Under ZeRO-3 a released parameter is [0]: gather it"
            " first."
        )


def _check_inverse_temperature(where: str, inverse_temperature: Tensor, hidden: Tensor) -> None:
    """Refuse inverse temperatures of the wrong shape or dtype, or ones that expect a gradient."""
    _check_rows(where, "inverse_temperature", inverse_temperature, hidden, torch.float32)
    if inverse_temperature.requires_grad:
        raise ValueError(
            f"{where}: inverse_temperature is a setting and gets no gradient: detach it."
        )


def _check_rows(where: str, name: str, rows: Tensor, hidden: Tensor, dtype: torch.dtype) -> None:
    """Refuse a per-row argument that is not [N] of the given dtype on hidden's device."""
    expected = f"[{hidden.shape[0]}] {dtype} on {hidden.device}"
    got = f"{list(rows.shape)} {rows.dtype} on {rows.device}"
    if got != expected:
        raise ValueError(
            f"{where}: {name} must be {expected}, one value per row of hidden, got {got}."
        )


def _check_values(
    where: str,
    head: Tensor,
    excluded: Tensor,
    *,
    target: Tensor | None = None,
    inverse_temperature: Tensor | None = None,
    wait: bool = True,
) -> None:
    """Refuse tokens and temperatures that would give a wrong or infinite number.

    One [N] comparison and one answer back from the device; the row is looked up only to say
    which it is. Without `wait` an assertion of the device says so, as it does of a token that has
    no embedding.
    """
    vocabulary = head.shape[0]
    wrong = {
        f"excluded must be -1 or in [0, {vocabulary})": (excluded < -1) | (excluded >= vocabulary)
    }
    if target is not None:
        wrong[f"target must be in [0, {vocabulary})"] = (target < 0) | (target >= vocabulary)
        wrong["target is the excluded token, so its log-probability would be -inf"] = (
            target == excluded
        )
    if inverse_temperature is not None:
        positive = (inverse_temperature > 0) & inverse_temperature.isfinite()
        wrong["inverse_temperature must be positive and finite"] = ~positive
    if not wait:
        for expected, rows in wrong.items():
            torch._assert_async(~rows.any(), f"{where}: {expected}.")
        return
    if not torch.stack(list(wrong.values())).any():
        return

    expected, rows = next((expected, rows) for expected, rows in wrong.items() if rows.any())
    row = int(rows.nonzero()[0])
    got = {"target": target, "excluded": excluded, "inverse_temperature": inverse_temperature}
    values = [f"{name} {value[row].item():g}" for name, value in got.items() if value is not None]
    raise ValueError(f"{where}: {expected}. Row {row} of {len(rows)} has {', '.join(values)}.")
