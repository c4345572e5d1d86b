"""Fast forms of the functions that RLP spends its time in, behind one checked entry each.

The plain form (`reference.py`) is the definition; every other form is its twin, held to it
by `tests/test_kernels.py`. A form is chosen by `choose_form` from shapes alone, or named by
the caller; none is a silent fallback for another.

Dimensions
    N  rows, one per predicted token
    D  width of the hidden state
    V  vocabulary
"""

import math

import torch
from torch import Tensor

from rlp_kernels import chunked, reference

__all__ = ["MAX_PLAIN_BYTES", "choose_form", "token_argmax", "token_entropy", "token_logprobs"]

MAX_PLAIN_BYTES = 64 * 2**20
"""Most that the plain form may add to memory before `choose_form` turns to the chunked one: 64 MiB, which
is 110 rows of a 151,936-word vocabulary. It counts the float32 logits once and the float32 copy of a bf16 head
once; with autograd's own copies the measured peak is about four times the logits."""

_FORMS = {"plain": reference.token_logprobs, "chunked": chunked.token_logprobs}
_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def token_logprobs(
    hidden: Tensor,
    head: Tensor,
    target: Tensor,
    *,
    inverse_temperature: Tensor,
    excluded: Tensor,
    softcap: float = 0.0,
    form: str = "auto",
) -> Tensor:
    """Log-probability of each row's target, with the row's excluded token out of the softmax.

        z       = softcap(hidden . head^T)              softcap(z) = c tanh(z / c)
        logprob = log softmax(z * inverse_temperature)[target],    logit of excluded = -inf

    Differentiable once, in hidden and head; their gradients accumulate in float32 and come in
    the inputs' dtype. bf16 inputs are multiplied with float32 accumulation and the logits stay
    float32, also under autocast.

    On a GPU the checks of the tokens and temperatures cost one synchronization per call.

    Args:
        hidden: [N, D], the last hidden states, bf16, fp16, float32 or float64.
        head: [V, D], the output embedding, same dtype. Under ZeRO-3 it has to be gathered here
            and again when the backward pass arrives; the plain form keeps the gathered copy alive
            between the two, the chunked form does not.
        target: [N] int64, never the row's excluded token, whose log-probability is -inf.
        inverse_temperature: [N] float32, 1 / temperature of each row, positive. No gradient.
        excluded: [N] int64, the token that cannot occur in this row, -1 for none.
        softcap: c, 0 for none (Gemma 2 uses 30).
        form: "plain", "chunked", or "auto" to take what `choose_form` says.

    Returns:
        [N] float32, nats; float64 for float64 inputs.

    Raises:
        ValueError: a shape, dtype or value is not as above; the message names the argument and the row.
    """
    _check_logits("token_logprobs", hidden, head, excluded, softcap)
    _check_rows("token_logprobs", "target", target, hidden, torch.int64)
    _check_inverse_temperature("token_logprobs", inverse_temperature, hidden)
    _check_values("token_logprobs", head, excluded, target=target, inverse_temperature=inverse_temperature)
    if form == "auto":
        form = choose_form(hidden.shape[0], head.shape[0], width=head.shape[1], dtype=head.dtype)
    if form not in _FORMS:
        raise ValueError(f"token_logprobs: form must be one of auto, {', '.join(_FORMS)}, got {form!r}.")
    return _FORMS[form](
        hidden, head, target, inverse_temperature=inverse_temperature, excluded=excluded, softcap=softcap
    )


def token_entropy(
    hidden: Tensor,
    head: Tensor,
    *,
    inverse_temperature: Tensor,
    excluded: Tensor,
    softcap: float = 0.0,
) -> Tensor:
    """Entropy of each row's softmax, -sum_v p_v log p_v, without gradient and never with [N, V] in memory.

    Arguments as in `token_logprobs`.

    Returns:
        [N] float32, nats; float64 for float64 inputs.
    """
    _check_logits("token_entropy", hidden, head, excluded, softcap)
    _check_inverse_temperature("token_entropy", inverse_temperature, hidden)
    _check_values("token_entropy", head, excluded, inverse_temperature=inverse_temperature)
    return chunked.token_entropy(
        hidden, head, inverse_temperature=inverse_temperature, excluded=excluded, softcap=softcap
    )


def token_argmax(hidden: Tensor, head: Tensor, *, excluded: Tensor, softcap: float = 0.0) -> Tensor:
    """Most probable token of each row, the lowest index on ties, never with [N, V] in memory.

    Temperature does not move the maximum, so there is none. Arguments as in `token_logprobs`.

    Returns:
        [N] int64.
    """
    _check_logits("token_argmax", hidden, head, excluded, softcap)
    _check_values("token_argmax", head, excluded)
    return chunked.token_argmax(hidden, head, excluded=excluded, softcap=softcap)


def choose_form(
    num_rows: int,
    vocabulary: int,
    *,
    width: int,
    dtype: torch.dtype,
    max_plain_bytes: int = MAX_PLAIN_BYTES,
) -> str:
    """The form that `form="auto"` takes: "plain" where it fits in `max_plain_bytes`, else "chunked".

    What counts is the [N, V] logits and, for a head narrower than float32, its widened [V, D]
    copy. The answer depends on shapes and dtype only, so a caller can log it before a run.
    """
    bytes_per_logit = 8 if dtype == torch.float64 else 4
    widened_width = 0 if dtype in (torch.float32, torch.float64) else width
    plain_bytes = vocabulary * (num_rows + widened_width) * bytes_per_logit
    return "plain" if plain_bytes <= max_plain_bytes else "chunked"


def _check_logits(where: str, hidden: Tensor, head: Tensor, excluded: Tensor, softcap: float) -> None:
    """Refuse arguments from which no [N, V] logits can be made; looks at no tensor's values."""
    if head.dim() != 2 or head.numel() == 0:
        raise ValueError(
            f"{where}: head must be [V, D], got {list(head.shape)}. Under ZeRO-3 a released parameter "
            "is [0]: gather it first."
        )
    if hidden.dim() != 2 or hidden.shape[1] != head.shape[1]:
        raise ValueError(
            f"{where}: hidden must be [N, D] with head's D = {head.shape[1]}, got {list(hidden.shape)}. "
            "Select or flatten the rows first."
        )
    if hidden.dtype not in _DTYPES or hidden.dtype != head.dtype:
        raise ValueError(
            f"{where}: hidden and head must share a floating dtype, got {hidden.dtype} and {head.dtype}."
        )
    if hidden.device != head.device:
        raise ValueError(f"{where}: hidden and head must share a device, got {hidden.device} and {head.device}.")
    if not (softcap >= 0 and math.isfinite(softcap)):
        raise ValueError(f"{where}: softcap must be positive, or 0 for none, got {softcap}.")
    _check_rows(where, "excluded", excluded, hidden, torch.int64)


def _check_inverse_temperature(where: str, inverse_temperature: Tensor, hidden: Tensor) -> None:
    """Refuse inverse temperatures of the wrong shape or dtype, or ones that expect a gradient."""
    _check_rows(where, "inverse_temperature", inverse_temperature, hidden, torch.float32)
    if inverse_temperature.requires_grad:
        raise ValueError(f"{where}: inverse_temperature is a setting and gets no gradient: detach it.")


def _check_rows(where: str, name: str, rows: Tensor, hidden: Tensor, dtype: torch.dtype) -> None:
    """Refuse a per-row argument that is not [N] of the given dtype on hidden's device."""
    expected = f"[{hidden.shape[0]}] {dtype} on {hidden.device}"
    got = f"{list(rows.shape)} {rows.dtype} on {rows.device}"
    if got != expected:
        raise ValueError(f"{where}: {name} must be {expected}, one value per row of hidden, got {got}.")


def _check_values(
    where: str,
    head: Tensor,
    excluded: Tensor,
    *,
    target: Tensor | None = None,
    inverse_temperature: Tensor | None = None,
) -> None:
    """Refuse tokens and temperatures that would give a wrong or infinite number instead of an error.

    One [N] comparison and one answer back from the device; the row is looked up only to say
    which it is.
    """
    vocabulary = head.shape[0]
    wrong = {f"excluded must be -1 or in [0, {vocabulary})": (excluded < -1) | (excluded >= vocabulary)}
    if target is not None:
        wrong[f"target must be in [0, {vocabulary})"] = (target < 0) | (target >= vocabulary)
        wrong["target is the excluded token, so its log-probability would be -inf"] = target == excluded
    if inverse_temperature is not None:
        positive = (inverse_temperature > 0) & inverse_temperature.isfinite()
        wrong["inverse_temperature must be positive and finite"] = ~positive
    if not torch.stack(list(wrong.values())).any():
        return
    for expected, rows in wrong.items():
        if rows.any():
            row = int(rows.nonzero()[0])
            got = {"target": target, "excluded": excluded, "inverse_temperature": inverse_temperature}
            values = ", ".join(f"{name} {value[row].item():g}" for name, value in got.items() if value is not None)
            raise ValueError(f"{where}: {expected}. Row {row} of {len(rows)} has {values}.")
