"""Thoughts: drawn from the policy that is trained, the same however they are batched, ended as the
format says."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, GPT2Config

from rlp.data.documents import Document
from rlp.data.noise import PANEL_NOISE
from rlp.data.positions import Positions
from rlp.model import cached_rows
from rlp.model.admission import why_together
from rlp.model.layout import repeated_layout
from rlp.model.markers import Markers
from rlp.model.policy import Policy
from rlp.model.scoring import ask, score, unpack
from rlp.model.shapes import Work
from rlp.model.thoughts import ThoughtFormat, Thoughts
from rlp.sampling.rollout import NoiseKey, Rollout
from tests.sampled import sample_thoughts
from tests.tiny_models import ARCHITECTURES, WORDS, random_documents, tiny_policy

GROUP, BUDGET, TEMPERATURE = 4, 12, 0.7
NEVER = (0,) * (BUDGET + 1)
"""A close marker longer than any thought: every thought runs to the budget."""
FLOAT32 = {"rtol": 1e-4, "atol": 1e-4}
"""Cached decoding against a full forward in float32: sums of some 100 products of order one in
another order, through two layers, and a recurrence of 20 steps in the state-space models. Measured:
6e-6 at most."""

DOCUMENTS = random_documents([12, 7, 17])
"""The longest prefixes are beyond the sliding windows (6) and the scan chunks (8) of the tiny
models."""


def places(
    *positions: tuple[int, int], documents: list[Document] = DOCUMENTS, horizon: int = 1
) -> Positions:
    """Positions from (document, position) pairs."""
    target = np.stack([documents[d].tokens[t : t + horizon] for d, t in positions])
    return Positions(
        document=np.array([d for d, _ in positions]),
        position=np.array([t for _, t in positions]),
        target=target,
    )


NOISE = NoiseKey(seed=0, step=1)
POSITIONS = places((0, 2), (0, 9), (1, 5), (2, 1), (2, 15))


def format_of(
    close: tuple[int, ...] = NEVER,
    *,
    open_marker: tuple[int, ...] = (2,),
    instruction: tuple[int, ...] = (6, 7),
) -> ThoughtFormat:
    return ThoughtFormat(
        markers=Markers(open=open_marker, close=close),
        instruction=instruction,
        begin=None,
        temperature=TEMPERATURE,
        target_temperature=1.0,
        horizon=1,
    )


def think(
    policy: Policy,
    thought_format: ThoughtFormat,
    *,
    documents: list[Document] = DOCUMENTS,
    positions: Positions = POSITIONS,
    noise: NoiseKey = NOISE,
    group_size: int = GROUP,
    budget: int = BUDGET,
    rows: int = 1000,
    **arguments: object,
) -> Rollout:
    return sample_thoughts(
        policy,
        documents,
        positions,
        thought_format,
        noise,
        group_size=group_size,
        max_thought_tokens=budget,
        slots=rows,
        **arguments,
    )


def token_lists(thoughts: Thoughts) -> list[list[int]]:
    """The sampled tokens of each thought, thought by thought."""
    return [
        tokens[mask].tolist()
        for tokens, mask in zip(thoughts.tokens.flatten(0, 1), thoughts.mask.flatten(0, 1))
    ]


def cut(tokens: list[int], close: tuple[int, ...]) -> list[int]:
    """A thought ended after its first close marker."""
    ends = [
        u for u in range(len(close), len(tokens) + 1) if tuple(tokens[u - len(close) : u]) == close
    ]
    return tokens[: ends[0]] if ends else tokens


def marker_within(endless: list[list[int]], length: int) -> tuple[int, ...]:
    """Tokens that end some thoughts before the budget and others not at all."""
    for tokens in endless:
        for start in range(1, BUDGET - length):
            close = tuple(tokens[start : start + length])
            num_cut = sum(len(cut(other, close)) < BUDGET for other in endless)
            if 0 < num_cut < len(endless):
                return close
    raise AssertionError("every run of tokens is in all thoughts or in none")


@pytest.fixture(scope="module", params=ARCHITECTURES)
def policy(request: pytest.FixtureRequest) -> Policy:
    """Each architecture once."""
    return tiny_policy(request.param)


@pytest.fixture(scope="module")
def endless(policy: Policy) -> list[list[int]]:
    """Its thoughts when nothing but the budget ends them."""
    return token_lists(think(policy, format_of()).thoughts)


def same_thoughts(mine: Thoughts, other: Thoughts) -> None:
    """Equal tokens, and log-probabilities up to float32."""
    assert token_lists(mine) == token_lists(other)
    assert_close(mine.behavior_logprob[mine.mask], other.behavior_logprob[other.mask], **FLOAT32)
    assert_close(mine.entropy[mine.mask], other.entropy[other.mask], **FLOAT32)
    assert mine.truncated.tolist() == other.truncated.tolist()


# One token as in Qwen3, two as in a tokenizer without thought tokens; open and close alike.
@pytest.mark.parametrize("length", [1, 2])
def test_sampler_and_scorer_agree_on_every_thought_token(policy: Policy, length: int):
    """On-policy the ratio of eq. 8 is 1: cached, forked, left-padded decoding is one policy with
    the full right-padded forward."""
    open_marker = (2, 11)[:length]
    close = marker_within(
        token_lists(think(policy, format_of(open_marker=open_marker)).thoughts), length
    )
    thought_format = format_of(close, open_marker=open_marker)
    thoughts = think(policy, thought_format).thoughts
    lengths = thoughts.mask.sum(dim=2)
    assert thoughts.truncated.any() and (lengths < BUDGET).any()
    assert (lengths[thoughts.truncated] == BUDGET).all()
    layout = repeated_layout(
        DOCUMENTS, POSITIONS, thoughts, thought_format, lm=True, no_think=True, device=policy.device
    )
    with torch.no_grad():
        scored = score(policy, layout).thought
        entropy = unpack(layout, ask(policy, "entropy", layout)).thought
    mask = thoughts.mask.flatten(0, 1)
    assert_close(thoughts.behavior_logprob.flatten(0, 1)[mask], scored[mask], **FLOAT32)
    assert_close(thoughts.entropy.flatten(0, 1)[mask], entropy[mask], **FLOAT32)
    assert (
        not thoughts.behavior_logprob.flatten(0, 1)[~mask].any()
        and not thoughts.entropy.flatten(0, 1)[~mask].any()
    )


def test_positions_are_counted_in_each_row_without_its_padding():
    """Rotary embeddings see differences only; learned absolute ones (GPT-2) show a position that
    counts the padding on the left."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(WORDS),
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=64,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=1,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
    thought_format = format_of()
    gpt2 = Policy(AutoModelForCausalLM.from_config(config).float().eval(), thought_format.markers)
    thoughts = think(gpt2, thought_format).thoughts
    with torch.no_grad():
        scored = score(
            gpt2,
            repeated_layout(
                DOCUMENTS,
                POSITIONS,
                thoughts,
                thought_format,
                lm=False,
                no_think=False,
                device=gpt2.device,
            ),
        ).thought
    assert_close(thoughts.behavior_logprob.flatten(0, 1), scored, **FLOAT32)


@pytest.mark.parametrize("length", [1, 2, 3])
def test_a_thought_ends_with_its_first_close_marker(
    policy: Policy, endless: list[list[int]], length: int
):
    """It is the thought without an end, cut: whether siblings have ended changes nothing in it."""
    close = marker_within(endless, length)
    thoughts = think(policy, format_of(close)).thoughts
    assert token_lists(thoughts) == [cut(tokens, close) for tokens in endless]
    assert thoughts.truncated.flatten().tolist() == [
        tuple(cut(tokens, close)[-length:]) != close for tokens in endless
    ]


def test_thoughts_do_not_depend_on_how_many_are_decoded_side_by_side(
    policy: Policy, endless: list[list[int]]
):
    """`rows` changes padding, block and cache, not the thoughts: less than a group, no multiple of
    a group, all at once."""
    thought_format = format_of(marker_within(endless, 1))
    one_by_one = think(policy, thought_format, rows=1).thoughts
    for rows in (2 * GROUP + 3, 1000):
        same_thoughts(think(policy, thought_format, rows=rows).thoughts, one_by_one)


@pytest.mark.parametrize("rows", [1, 2 * GROUP + 3, 1000])
def test_where_rows_begin_together_thoughts_are_the_same(
    policy: Policy, endless: list[list[int]], monkeypatch: pytest.MonkeyPatch, rows: int
):
    """In whole groups, when none goes on: a cache that is not known row by row changes no
    thought."""
    thought_format = format_of(marker_within(endless, 1))
    one_by_one = think(policy, thought_format, rows=rows).thoughts
    monkeypatch.setattr(cached_rows, "KNOWN", {})
    monkeypatch.setattr(policy, "why_together", why_together(policy))
    same_thoughts(think(policy, thought_format, rows=rows).thoughts, one_by_one)


def test_thoughts_do_not_depend_on_the_order_or_the_choice_of_documents(policy: Policy):
    """A rank that holds document 2 alone, or holds them in another order, thinks the same about
    it."""
    thought_format = format_of()
    whole = think(policy, thought_format).thoughts
    turned = think(
        policy,
        thought_format,
        documents=DOCUMENTS[::-1],
        positions=places((0, 1), (0, 15), (1, 5), (2, 2), (2, 9), documents=DOCUMENTS[::-1]),
    ).thoughts
    for mine, other in enumerate((3, 4, 2, 0, 1)):
        same_thoughts(turned[mine : mine + 1], whole[other : other + 1])
    alone = think(
        policy,
        thought_format,
        documents=DOCUMENTS[2:],
        positions=places((0, 15), documents=DOCUMENTS[2:]),
    ).thoughts
    same_thoughts(alone, whole[4:5])


@pytest.mark.parametrize("name", ["qwen3", "gemma3_text", "mamba", "nemotron_h"])
def test_a_thought_is_the_inverse_cdf_of_a_fresh_forward(name: str):
    """The definition, token by token: the model's own logits of the whole text so far, no cache, no
    batch, one keyed uniform."""
    policy, thought_format = tiny_policy(name), format_of(open_marker=(2, 11))
    thoughts = think(policy, thought_format, budget=5).thoughts
    for m, (d, t) in enumerate(zip(POSITIONS.document, POSITIONS.position)):
        for g in range(GROUP):
            text = [6, 7, *DOCUMENTS[d].tokens[:t].tolist(), 2, 11]
            for u, uniform in enumerate(NOISE.uniforms(DOCUMENTS[d], int(t), g, 5)):
                with torch.no_grad():
                    logits = policy.lm(input_ids=torch.tensor([text])).logits[0, -1].double()
                logprobs = (logits / TEMPERATURE).log_softmax(dim=0)
                token = int((logprobs.exp().cumsum(dim=0) <= uniform).sum())
                assert int(thoughts.tokens[m, g, u]) == token
                assert_close(
                    thoughts.behavior_logprob[m, g, u].double(), logprobs[token], **FLOAT32
                )
                text.append(token)


def test_thoughts_differ_between_seeds_steps_documents_positions_siblings_and_purposes():
    """The same document under two ids, and twice under one, at positions of equal context: only the
    key differs."""
    policy, thought_format = tiny_policy(), format_of(instruction=())
    words = np.full(9, 20)
    twins = [
        Document(id=1, tokens=words),
        Document(id=2, tokens=words),
        Document(id=1, tokens=words, occurrence=1),
    ]
    positions = places((0, 4), (1, 4), (2, 4), documents=twins)

    def groups(noise: NoiseKey) -> list[list[int]]:
        return token_lists(
            think(
                policy, thought_format, documents=twins, positions=positions, noise=noise
            ).thoughts
        )

    keys = [
        NOISE,
        NoiseKey(seed=0, step=2),
        NoiseKey(seed=1, step=1),
        NoiseKey(seed=0, step=1, purpose=PANEL_NOISE),
    ]
    thoughts = [tuple(tokens) for noise in keys for tokens in groups(noise)]
    assert len(set(thoughts)) == len(keys) * len(twins) * GROUP
    assert groups(keys[0]) == groups(keys[0])
    uniforms = np.stack([keys[0].uniforms(twins[0], t, g, 6) for t in (4, 5) for g in (0, 1)])
    assert len(np.unique(uniforms)) == uniforms.size


def test_a_larger_group_or_budget_keeps_the_thoughts_there_were():
    """Thought g and token u have their own noise."""
    policy, thought_format = tiny_policy(), format_of()
    few = think(policy, thought_format, group_size=2, budget=5).thoughts
    many = think(policy, thought_format, group_size=6, budget=9).thoughts
    assert torch.equal(few.tokens, many.tokens[:, :2, :5])


class Calls:
    """What the base model was asked to run: (rows, columns, tokens that are not padding) of each
    call."""

    def __init__(self, policy: Policy) -> None:
        self.sizes: list[tuple[int, int, int]] = []
        self._handle = policy.lm.base_model.register_forward_pre_hook(self._note, with_kwargs=True)

    def _note(self, module: torch.nn.Module, arguments: tuple, keywords: dict) -> None:
        tokens, mask = keywords["input_ids"], keywords.get("attention_mask")
        self.sizes.append(
            (
                *tokens.shape,
                tokens.numel() if mask is None or tokens.shape[1] == 1 else int(mask.sum()),
            )
        )

    def __enter__(self) -> "Calls":
        return self

    def __exit__(self, *error: object) -> None:
        self._handle.remove()


@pytest.mark.parametrize("name", ["qwen3", "mamba2"])
@pytest.mark.parametrize("slots, reads", [(1000, [(0, 5)]), (2 * GROUP, [(0, 2), (2, 4), (4, 5)])])
def test_each_prefix_is_computed_once_for_its_group(
    name: str, slots: int, reads: list[tuple[int, int]]
):
    """A forward for the prefixes that begin together, of M rows and not M * G; then one column per
    further token, of the open marker too."""
    policy, thought_format = tiny_policy(name), format_of()
    prefix = [2 + t for t in POSITIONS.position.tolist()]  # instruction, document
    num_slots = min(slots, len(prefix) * GROUP)
    with Calls(policy) as calls:
        think(policy, thought_format, rows=slots)
    expected = []
    for start, stop in reads:
        expected += [(stop - start, max(prefix[start:stop]), sum(prefix[start:stop]))] + [
            (num_slots, 1, num_slots)
        ] * (1 + BUDGET - 1)
    assert calls.sizes == expected


def test_decoding_stops_when_every_thought_has_ended():
    """The open marker and all tokens of a thought but its last are run."""
    policy = tiny_policy()
    endless = token_lists(
        think(policy, format_of(), positions=places((0, 2)), group_size=1).thoughts
    )[0]
    close = tuple(endless[1:4])
    assert len(cut(endless, close)) == 4
    with Calls(policy) as calls:
        thoughts = think(policy, format_of(close), positions=places((0, 2)), group_size=1).thoughts
    assert thoughts.tokens.shape == (1, 1, 4) and not thoughts.truncated.any()
    assert len(calls.sizes) == 1 + 1 + 3


def test_the_work_of_a_rollout_by_hand():
    """Prefixes of 5 and 12 tokens; thoughts of 4 (ended) and 6 (truncated) tokens, of which 3 and 5
    are run again."""
    policy = tiny_policy()
    positions = places((0, 2), (0, 9))
    endless = token_lists(
        think(policy, format_of(), positions=positions, group_size=1, budget=6).thoughts
    )
    close = tuple(endless[0][1:4])
    assert cut(endless[1], close) == endless[1]
    rollout = think(policy, format_of(close), positions=positions, group_size=1, budget=6)
    assert rollout.prefill_work == Work(tokens=5 + 12, pairs=5 * 6 // 2 + 12 * 13 // 2, head_rows=2)
    assert rollout.decode_work == Work(
        tokens=3 + 5, pairs=(6 + 7 + 8) + (13 + 14 + 15 + 16 + 17), head_rows=3 + 5
    )


# --- The end of a thought.


@pytest.fixture(scope="module")
def long_thought() -> list[int]:
    """One thought of qwen3 that runs to the budget."""
    return token_lists(
        think(tiny_policy(), format_of(), positions=places((0, 9)), group_size=1).thoughts
    )[0]


def one_thought(close: tuple[int, ...], budget: int = BUDGET) -> Thoughts:
    return think(
        tiny_policy(), format_of(close), positions=places((0, 9)), group_size=1, budget=budget
    ).thoughts


@pytest.mark.parametrize("length", [1, 2, 3])
def test_a_close_marker_sampled_exactly_at_the_budget_is_not_truncated(
    long_thought: list[int], length: int
):
    """The budget counts the close marker; nothing is forced."""
    stop = next(
        u
        for u in range(4, BUDGET + 1)
        if len(cut(long_thought, tuple(long_thought[u - length : u]))) == u
    )
    thoughts = one_thought(tuple(long_thought[stop - length : stop]), budget=stop)
    assert token_lists(thoughts) == [long_thought[:stop]] and thoughts.mask.all()
    assert not thoughts.truncated.any()


def test_a_close_marker_that_the_budget_cuts_is_truncated(long_thought: list[int]):
    """Half a marker is text; the whole marker is forced after it."""
    stop = next(
        u
        for u in range(4, BUDGET)
        if len(cut(long_thought, tuple(long_thought[u - 1 : u + 1]))) == u + 1
    )
    thoughts = one_thought(tuple(long_thought[stop - 1 : stop + 1]), budget=stop)
    assert token_lists(thoughts) == [long_thought[:stop]]
    assert thoughts.truncated.all()


def test_a_budget_of_one_token_gives_one_token(long_thought: list[int]):
    """At least one token per thought (Alg. 1, line 7), also where it is the close marker: an empty
    thought."""
    assert token_lists(one_thought(NEVER, budget=1)) == [long_thought[:1]]
    assert one_thought(NEVER, budget=1).truncated.all()
    empty = one_thought((long_thought[0],))
    assert token_lists(empty) == [long_thought[:1]] and not empty.truncated.any()


def test_tokens_after_the_end_are_padding_without_numbers():
    """Token 0, log-probability 0, entropy 0, mask False: nothing of the rows that decoding kept
    running."""
    policy = tiny_policy()
    close = marker_within(token_lists(think(policy, format_of()).thoughts), 1)
    thoughts = think(policy, format_of(close)).thoughts
    off = ~thoughts.mask
    assert (
        off.any()
        and not thoughts.tokens[off].any()
        and not thoughts.behavior_logprob[off].any()
        and not thoughts.entropy[off].any()
    )
    assert (thoughts.mask.int().diff(dim=2) <= 0).all() and thoughts.mask[:, :, 0].all()


def test_sampling_leaves_no_gradient_and_no_mode_behind():
    policy = tiny_policy()
    policy.lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    policy.train()
    modes = [module.training for module in policy.modules()]
    thoughts = think(policy, format_of()).thoughts
    assert (
        policy.training
        and any(modes[1:])
        and [module.training for module in policy.modules()] == modes
    )
    assert not thoughts.behavior_logprob.requires_grad and not thoughts.entropy.requires_grad


# --- Ranks that sample together.


@pytest.mark.parametrize("extra", [1, 2 * BUDGET, 5 * BUDGET])
def test_a_rank_that_waits_for_others_thinks_the_same(extra: int):
    """While other ranks still sample, this one runs along, its thoughts untouched."""
    policy = tiny_policy()
    close = marker_within(token_lists(think(policy, format_of()).thoughts), 1)
    questions = []

    def agree(mine: bool) -> bool:
        questions.append(mine)
        return mine or len(questions) < len(alone) + extra

    alone: list[bool] = []
    think(
        policy,
        format_of(close),
        rows=2 * GROUP,
        agree=lambda mine: alone.append(mine) or mine,
    )
    together = think(policy, format_of(close), rows=2 * GROUP, agree=agree)
    same_thoughts(together.thoughts, think(policy, format_of(close), rows=2 * GROUP).thoughts)
    assert len(questions) >= len(alone) + extra


def test_the_temperature_of_the_format_is_the_temperature_of_the_thoughts():
    """Colder thoughts are less random, and their log-probabilities those of the colder policy."""
    policy = tiny_policy()
    thought_format = replace(format_of(), temperature=0.25)
    thoughts = think(policy, thought_format).thoughts
    layout = repeated_layout(
        DOCUMENTS,
        POSITIONS,
        thoughts,
        thought_format,
        lm=False,
        no_think=False,
        device=policy.device,
    )
    with torch.no_grad():
        assert_close(
            thoughts.behavior_logprob.flatten(0, 1), score(policy, layout).thought, **FLOAT32
        )
    assert thoughts.entropy.mean() < 0.7 * think(policy, format_of()).thoughts.entropy.mean()
