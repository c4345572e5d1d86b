"""Whether a causal language model can be trained here: refused with a sentence, or admitted.

Two questions, at two times. `why_unfit` asks an architecture before a weight is read, on tensors
without numbers: is there a body without the head, a cache, a cache that can be forked?
`why_unsound` asks a loaded model, with numbers: are its logits `softcap(scale * hidden @ head.T +
bias)`, does decoding with a forked cache agree with it, does a forward pass in training mode draw
nothing by chance? Sampler, scorer and trainer are one policy where all of that holds, and nowhere
else. `why_together` asks an admitted model how its thoughts can be sampled.

Dimensions
    V  vocabulary
"""

import copy
import inspect
import logging
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM, PretrainedConfig

from rlp.config import ConfigError, first_line
from rlp.model.policy import Policy
from rlp.model.running_rows import ReadRows, RunningRows

CACHES = ("past_key_values", "cache_params")
"""What transformers calls a cache that every model of it can take and give back."""

LENGTH_KEYS = ("max_position_embeddings", "max_seq_len", "n_positions", "n_ctx")
"""What a config calls the longest sequence, the first that it has."""

NUM_TOKENS = 8
"""Tokens that a model is tried on."""

TRIED = (2, 4, 0)
"""Lengths of the prefixes that rows begin behind when that is tried."""

MANY_LAYERS = 16
"""How many roundings of one logit a whole pass through a cache may add up to."""


@dataclass(frozen=True, slots=True)
class ContextLimit:
    """The longest sequence that an architecture says it reads. A sliding window is none: it lets go
    of what is far away."""

    tokens: int
    key: str
    """Of the model's config.json."""
    rotary: bool
    """Whether positions are rotations, which more positions only continue."""

    def advice(self) -> str:
        """How the limit is raised."""
        if not self.rotary:
            return "Its positions are a table of that many rows: it can read no more."
        return (
            f"Its positions are rotary: to let it read more, write a larger {self.key} into its"
            " config.json, with the rope_parameters (such as rope_type yarn, its factor,"
            " original_max_position_embeddings) that its makers give for that length."
        )


def context_limit(architecture: PretrainedConfig) -> ContextLimit | None:
    """The limit of an architecture; None where it names none, as state-space models do."""
    text = architecture.get_text_config()
    names = [name for name in LENGTH_KEYS if isinstance(getattr(text, name, None), int)]
    if not names:
        return None
    name = names[0]
    tokens, rope = getattr(text, name), getattr(text, "rope_parameters", None) or {}
    if rope.get("factor") and rope.get("original_max_position_embeddings"):
        tokens = max(tokens, int(rope["factor"] * rope["original_max_position_embeddings"]))
    return ContextLimit(tokens, key=text.attribute_map.get(name, name), rotary=bool(rope))


def why_unfit(architecture: PretrainedConfig) -> str | None:
    """What this program needs of an architecture and does not find; None where nothing is missing.

    The model is built and run on tensors without numbers. A pass that can not be made so (a layer
    may need numbers to choose by) tells nothing: `why_unsound` asks again.
    """
    with FakeTensorMode(), torch.no_grad(), _quiet_fake_tensors():
        try:
            # Of the ways to run experts this is the one that looks at no number.
            lm = AutoModelForCausalLM.from_config(
                copy.deepcopy(architecture),
                trust_remote_code=False,
                experts_implementation="batched_mm",
            ).eval()
        except Exception:  # any: `model_shapes` builds it once more, and says why it can not
            return None

        takes = inspect.signature(lm.base_model.forward).parameters
        cache = next((name for name in CACHES if name in takes), None)
        head = lm.get_output_embeddings()
        if head is None:
            return "it has no LM head (no output embedding)"
        if lm.base_model is lm:
            return "it has no body that runs without the LM head"
        if cache is None:
            return (
                f"its forward pass takes no cache ({' or '.join(CACHES)}), so a prefix can not be"
                " computed once and continued by many thoughts"
            )
        return _missing_when_run(lm.base_model, cache, head)


def _missing_when_run(body: nn.Module, cache: str, head: nn.Module) -> str | None:
    """What two rows of tokens without numbers show: the last hidden state, the cache, and that
    cache forked into three."""
    try:
        output = body(input_ids=_no_numbers(2, NUM_TOKENS), use_cache=True)
    except Exception:  # of any type: tensors without numbers are refused in many ways
        return None

    hidden, kept = getattr(output, "last_hidden_state", None), getattr(output, cache, None)
    if hidden is None:
        return "its body gives no last hidden state"
    if hidden.shape[-1] != head.weight.shape[1]:
        return (
            f"its LM head reads {head.weight.shape[1]} numbers and its body gives"
            f" {hidden.shape[-1]}: something stands between them that is not known here"
        )
    if kept is None:
        return (
            f"its forward pass gives no cache back ({cache}): it is an encoder, or keeps its state"
            " in itself, where it can not be forked"
        )
    if not hasattr(kept, "reorder_cache"):
        return f"its cache ({type(kept).__name__}) can not be forked: it has no reorder_cache"

    try:
        body(input_ids=_no_numbers(2, 1), use_cache=True, **{cache: kept})
    except Exception:  # as above
        return None
    try:
        kept.reorder_cache(torch.tensor([0, 0, 1]))
        body(input_ids=_no_numbers(3, 1), use_cache=True, **{cache: kept})
    except Exception as error:  # the pass before differs from this one in the fork alone
        return (
            f"its cache ({type(kept).__name__}) can not be forked: {type(error).__name__}:"
            f" {first_line(error)}"
        )
    return None


def _no_numbers(rows: int, columns: int) -> Tensor:
    """Token ids without numbers, inside `FakeTensorMode`."""
    return torch.zeros(rows, columns, dtype=torch.long)


@contextmanager
def _quiet_fake_tensors() -> Iterator[None]:
    """Torch logs what it can not do without numbers as errors, on the console."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    was, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = was


def check_model(
    policy: Policy, agree: Callable[[str | None], str | None] = lambda refusal: refusal
) -> None:
    """Refuse a loaded model that would not be trained rightly; find out how rows of its cache
    begin. A collective under ZeRO-3.

    Args:
        agree: gives every rank the same answer, where several load the model.

    Raises:
        ConfigError: `why_unsound` found something, on any rank.
    """
    refusal = agree(why_unsound(policy))
    if refusal:
        raise ConfigError(f"model.path: {type(policy.lm).__name__} can not be trained: {refusal}")
    policy.why_together = agree(why_together(policy))


def why_unsound(policy: Policy) -> str | None:
    """What makes sampler, scorer and trainer of this model different policies; None where nothing
    does.

    Random states, and the mode of the policy, are as before when it returns.
    """
    tokens = torch.arange(NUM_TOKENS, device=policy.device)[None]
    try:
        with _kept_random_states(policy.device) as states, policy.sampling():
            return _wrong_logits(policy, tokens) or _noise(policy, tokens, states)
    except torch.distributed.DistError:
        raise
    except Exception as error:  # any: it is run in ways that its makers need not have tried
        return (
            f"it can not be run as this program runs it: {type(error).__name__}:"
            f" {first_line(error)}. Choose another model."
        )


def why_together(policy: Policy) -> str | None:
    """Why rows of this model's cache can not begin one by one, beside others that go on; None where
    they can, as was tried."""
    tokens = torch.arange(NUM_TOKENS, device=policy.device)
    try:
        with policy.sampling():
            own, _ = policy("check", tokens[None])
            read = ReadRows(policy, [np.arange(length) for length in TRIED])
            if read.unknown is not None:
                return f"its cache holds a {read.unknown}, which is not known row by row"
            error = _beginning_error(policy, read, tokens, own)
    except torch.distributed.DistError:
        raise
    except (
        Exception
    ) as error:  # any: a cache is changed in ways that its makers need not have tried
        return f"a row can not begin beside others: {type(error).__name__}: {first_line(error)}"
    if not error <= MANY_LAYERS * _rounding(policy, own):
        return (
            f"a row that begins beside others gives logits that are {error:.3g} away from its own"
        )
    return None


def _beginning_error(policy: Policy, read: ReadRows, tokens: Tensor, own: Tensor) -> float:
    """Three rows, of which each begins anew while the others go on: behind a prefix longer than
    all, behind one shorter, and behind none."""
    rows, errors = RunningRows(policy, len(TRIED)), []
    going = torch.ones(len(TRIED), dtype=torch.bool, device=tokens.device)
    place = list(TRIED)
    rows.begin([2, 1, 0], read, [2, 1, 0])
    for row, prefix in ((0, 1), (1, 0), (2, 2), (1, 2)):
        rows.end([row])
        rows.begin([row], read, [prefix])
        place[row] = TRIED[prefix]
        logits = rows.next(tokens[place], going)
        errors.append(_apart(logits, own[place]))
        place = [index + 1 for index in place]
    return max(errors)


def _wrong_logits(policy: Policy, tokens: Tensor) -> str | None:
    """What is wrong with a pass over all tokens, or with decoding."""
    own, ours = policy("check", tokens)
    unit = _rounding(policy, own)
    if not (error := _apart(own, ours)) <= unit:
        return (
            f"its logits differ from softcap(scale * hidden @ head.T + bias) by {error:.3g}. It"
            " transforms its logits in a way that is not known here; add it to `_logit_transform`"
            " in rlp/model/policy.py."
        )
    if not (error := _decoding_error(policy, tokens, own)) <= MANY_LAYERS * unit:
        return (
            f"decoding with a cache that was forked gives logits that are {error:.3g} away from its"
            " own without one, so thoughts would be sampled from another policy than the one that"
            " is trained. Report it to transformers, or choose another model."
        )
    return None


def _rounding(policy: Policy, logits: Tensor) -> float:
    """What rounding may make of logits: in bfloat16, which carries 8 bits, 2 ** -7 of the
    largest."""
    unit = 2**-7 if policy.head.dtype == torch.bfloat16 else 2**-13
    return max(logits.abs().max().item(), 1.0) * unit


def _apart(one: Tensor, other: Tensor) -> float:
    return (one - other).abs().max().item()


def _decoding_error(policy: Policy, tokens: Tensor, own: Tensor) -> float:
    """Two prefixes of other lengths, so one of them padded on the left; forked, crosswise; and one
    token more."""
    long, short = NUM_TOKENS - 1, NUM_TOKENS - 3
    lengths = torch.tensor([long, short], device=tokens.device)
    column = torch.arange(long, device=tokens.device)
    place = column - (long - lengths)[:, None]
    prefixes, mask = tokens[0][place.clamp(min=0)], place >= 0

    _, cache = policy.prefill(prefixes, mask)
    index = torch.tensor([1, 0, 1], device=tokens.device)
    policy.fork(cache, index)
    position = lengths[index]
    mask = torch.cat([mask[index], mask.new_ones(len(index), 1)], dim=1)
    return _apart(policy.decode(tokens[0][position], mask, position, cache), own[position])


def _noise(policy: Policy, tokens: Tensor, states: Callable[[], list[np.ndarray]]) -> str | None:
    """What differs between two passes in training mode and one in evaluation mode, or is drawn in
    them by chance."""
    expected, _ = policy("check", tokens)
    before = states()
    policy.train()
    first, second = (policy("check", tokens)[0] for _ in range(2))
    policy.eval()

    remedy = "Turn its noise off in its config.json, or choose another model."
    if any(not np.array_equal(one, other) for one, other in zip(before, states(), strict=True)):
        return (
            "a forward pass in training mode draws random numbers, so sampler and trainer would be"
            f" two policies. {remedy}"
        )
    error = max(_apart(first, second), _apart(first, expected))
    if not error <= _rounding(policy, expected):
        return (
            "forward passes in training mode differ from each other, or from evaluation mode, by"
            f" {error:.3g}. {remedy}"
        )
    return None


@contextmanager
def _kept_random_states(device: torch.device) -> Iterator[Callable[[], list[np.ndarray]]]:
    """The states of all generators that a model may draw from, to be read inside and put back at
    the end."""
    python, numpy = random.getstate(), np.random.get_state()

    devices = [device] if device.type == "cuda" else []

    def states() -> list[np.ndarray]:
        return [
            np.array(random.getstate()[1]),
            np.append(*np.random.get_state()[1:3]),
            torch.get_rng_state().numpy(),
            *(torch.cuda.get_rng_state(one).numpy() for one in devices),
        ]

    with torch.random.fork_rng(devices):
        try:
            yield states
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
