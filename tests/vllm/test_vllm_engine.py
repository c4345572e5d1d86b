"""vLLM itself, on a CPU: what it samples, with which weights, and what it leaves behind."""

import random

import numpy as np
import pytest
import torch

from rlp.config import ConfigError, SamplingConfig
from rlp.data.documents import Document
from rlp.data.positions import Positions
from rlp.model.layout import repeated_layout
from rlp.model.policy import Policy
from rlp.model.scoring import score
from rlp.model.thoughts import ThoughtFormat, Thoughts
from rlp.process.preemption import Preemption, StopRequested
from rlp.sampling.mismatch import mismatch_of
from rlp.sampling.opening import open_sampler
from rlp.sampling.rollout import NoiseKey
from rlp.sampling.vllm_sampler import VllmSampler
from tests.tiny_models import MARKERS, WORDS, random_documents
from tests.vllm.models import random_policy

GROUP, BUDGET, TEMPERATURE = 4, 12, 0.7
DOCUMENTS = random_documents([40, 30, 50])
PLACES = [(0, 20), (0, 35), (1, 25), (2, 1), (2, 48)]
FORMAT = ThoughtFormat(
    markers=MARKERS,
    instruction=(6, 7),
    begin=None,
    temperature=TEMPERATURE,
    target_temperature=1.0,
    horizon=1,
)


def positions(chosen: list[tuple[int, int]], documents: list[Document]) -> Positions:
    return Positions(
        document=np.array([d for d, _ in chosen]),
        position=np.array([t for _, t in chosen]),
        target=np.array([[documents[d].tokens[t]] for d, t in chosen]),
    )


def opened(policy: Policy, ranks, *, slots: int = 64, **arguments: object) -> VllmSampler:
    sampling = SamplingConfig(engine="vllm", slots=slots)
    return open_sampler(sampling, policy, shared=False, longest=128, **arguments)


def sample(
    sampler: VllmSampler, chosen: list[tuple[int, int]] = PLACES, documents=DOCUMENTS, **changes
) -> Thoughts:
    given = {"group_size": GROUP, "max_thought_tokens": BUDGET, "noise": NoiseKey(0, 1)}
    with sampler.phase():
        return sampler.sample(
            documents, positions(chosen, documents), FORMAT, **(given | changes)
        ).thoughts


def log_ratios(policy: Policy, thoughts: Thoughts) -> torch.Tensor:
    """Of all thought tokens: the policy's own log-probability less that of the sampler."""
    layout = repeated_layout(
        DOCUMENTS,
        positions(PLACES, DOCUMENTS),
        thoughts,
        FORMAT,
        lm=False,
        no_think=False,
        device="cpu",
    )
    with torch.no_grad():
        own = score(policy, layout).thought
    return (own - thoughts.behavior_logprob.flatten(0, 1))[thoughts.mask.flatten(0, 1)].double()


@pytest.fixture(scope="module")
def tied(ranks) -> tuple[Policy, VllmSampler]:
    policy = random_policy(tied=True)
    return policy, opened(policy, ranks)


def test_a_thought_is_the_same_alone_in_another_order_and_in_other_slots(tied, ranks):
    """Tokens to the bit, log-probabilities to the rounding of a product of other rows."""
    policy, sampler = tied
    whole = sample(sampler)
    reversed_ = sample(sampler, PLACES[::-1])
    few = sample(opened(policy, ranks, slots=3))
    assert torch.equal(reversed_.tokens.flip(0), whole.tokens)
    assert torch.equal(few.tokens, whole.tokens)
    for m, place in enumerate(PLACES):
        alone = sample(sampler, [place])
        length = alone.tokens.shape[2]
        assert torch.equal(alone.tokens[0], whole.tokens[m, :, :length])
        assert torch.equal(alone.mask[0], whole.mask[m, :, :length])
        apart = alone.behavior_logprob[0] - whole.behavior_logprob[m, :, :length]
        assert apart.abs().max() < 1e-5


def test_a_key_of_another_step_or_sibling_gives_other_thoughts(tied):
    thoughts, others = sample(tied[1]), sample(tied[1], noise=NoiseKey(0, 2))
    assert (
        len({tuple(row) for row in thoughts.tokens.flatten(0, 1).tolist()}) == len(PLACES) * GROUP
    )
    assert not torch.equal(thoughts.tokens, others.tokens)


def test_the_close_marker_is_kept_and_an_end_of_sequence_is_a_word(tied):
    thoughts = sample(tied[1], group_size=64)
    lengths = thoughts.mask.sum(dim=2)
    last = thoughts.tokens.gather(2, lengths[..., None] - 1)[..., 0]
    assert torch.equal(thoughts.truncated, last != MARKERS.close[0])
    assert thoughts.truncated.any() and not thoughts.truncated.all()
    assert (lengths[thoughts.truncated] == BUDGET).all()
    inner = thoughts.tokens[thoughts.mask]
    assert (inner == WORDS.index("<eos>")).any() and inner.max() < len(WORDS)


def test_tokens_are_drawn_from_the_whole_distribution_of_the_policy(tied):
    """The first token of 4,000 thoughts, word by word: 5 standard deviations of a binomial, which
    48 words together exceed once in 36,000 times; and the log-probability is that at the sampling
    temperature."""
    policy, sampler = tied
    count = 4000
    thoughts = sample(sampler, PLACES[:1], group_size=count, max_thought_tokens=1)
    prefix = FORMAT.prefix(DOCUMENTS[0].tokens, PLACES[0][1])
    with torch.no_grad():
        logits = policy.lm(torch.from_numpy(prefix)[None]).logits[0, -1].double()
    expected = (logits / TEMPERATURE).softmax(dim=0)
    seen = torch.bincount(thoughts.tokens.flatten(), minlength=len(WORDS)) / count
    allowed = 5 * (expected * (1 - expected) / count).sqrt() + 1 / count
    assert ((seen - expected).abs() <= allowed).all()
    told = thoughts.behavior_logprob.flatten().double()
    assert (told - expected.log()[thoughts.tokens.flatten()]).abs().max() < 1e-5


@pytest.mark.parametrize("is_tied", [True, False])
def test_log_probabilities_are_those_of_the_newest_weights(ranks, is_tied):
    """Four phases, the weights moved between them: mean |log ratio| of 1e-6 at most in float32,
    where logits are some units wide; old weights are nats away."""
    policy = random_policy(tied=is_tied, seed=1)
    sampler = opened(policy, ranks)
    generator = torch.Generator().manual_seed(0)
    before = None
    for _ in range(4):
        thoughts = sample(sampler)
        found = log_ratios(policy, thoughts)
        assert found.abs().mean() <= 1e-6
        assert found.abs().max() <= 1e-5
        if before is not None:
            assert log_ratios(policy, before).abs().mean() > 1e-2
        before = thoughts
        with torch.no_grad():
            for p in policy.lm.parameters():
                p += 0.02 * torch.randn(p.shape, generator=generator)


def test_a_stale_head_is_seen(ranks, monkeypatch):
    """What vLLM does with tied embeddings whose head is not handed over: at the first phase it is
    refused, and after a phase that was right the ratios of the next are an alarm or an end."""
    plain = VllmSampler._with_head

    def headless(sampler):
        return ((name, value) for name, value in plain(sampler) if name != "lm_head.weight")

    policy = random_policy(tied=True, seed=2)
    sampler = opened(policy, ranks)
    sample(sampler)
    monkeypatch.setattr(VllmSampler, "_with_head", headless)
    with torch.no_grad():
        for p in policy.lm.parameters():
            p += 0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0))
    found = log_ratios(policy, sample(sampler))
    means = {
        "policy/behavior_mismatch_kl": float((found.expm1() - found).mean()),
        "policy/behavior_mismatch_max": float(found.abs().max()),
    }
    assert mismatch_of(means, torch.float32, TEMPERATURE) is not None

    with pytest.raises(ConfigError, match="vLLM computes another model"):
        sample(opened(policy, ranks))


def test_a_model_that_vllm_does_not_run_here_is_refused(ranks):
    """Its attention on a CPU has no heads of 16."""
    sampler = opened(random_policy(tied=True, head_dim=16), ranks)
    with pytest.raises(ConfigError, match="vLLM does not run this Qwen3.* Write sampling.engine=n"):
        sample(sampler)


def test_a_stop_in_the_middle_leaves_nothing_behind(tied, ranks):
    """Requests are given up, and the next phase is as if they had not been."""
    policy, sampler = tied
    undisturbed, preemption, looks = sample(sampler), Preemption(ranks), []

    def look() -> None:
        looks.append(1)
        if len(looks) == 3:
            preemption.request("a test")
        preemption.look()

    sampler._lend, sampler._look = preemption.leaving_early, look
    with pytest.raises(StopRequested):
        sample(sampler)
    assert len(looks) == 3 and not sampler._engine.is_busy()
    preemption.reason = None
    assert torch.equal(sample(sampler).tokens, undisturbed.tokens)


def test_the_process_stays_as_it_was(ranks):
    """Generators, threads, dtype and precision: vLLM seeds all generators when it starts, and takes
    the threads."""

    def state() -> tuple:
        return (
            random.getstate(),
            np.random.get_state()[1].tolist(),
            torch.get_rng_state().tolist(),
            torch.get_num_threads(),
            torch.set_num_threads,
            torch.get_default_dtype(),
            torch.get_float32_matmul_precision(),
            torch.is_grad_enabled(),
        )

    policy = random_policy(tied=False, seed=3)
    before = state()
    sample(opened(policy, ranks))
    assert state() == before
