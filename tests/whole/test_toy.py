"""RLP on a toy that can be summed: its thoughts have the probabilities that are scored, and the
paper's propositions about the reward hold."""

import itertools
import math
from collections import Counter

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from rlp.data.documents import Document
from rlp.data.positions import Positions
from rlp.sampling.draw import draw
from rlp.sampling.rollout import NoiseKey
from tests.sampled import sample_thoughts
from tests.whole.toy import (
    CLOSES,
    OPEN,
    PREFIXES,
    TEMPERATURE,
    all_thoughts,
    as_thoughts,
    bigram_policy,
    cross_entropy,
    data_distribution,
    every_target,
    evidence,
    next_logprobs,
    no_think,
    one_position_each,
    reasoned,
    targets,
    toy_format,
    toy_policy,
)


@pytest.mark.parametrize("horizon", [1, 2])
@pytest.mark.parametrize("close", CLOSES)
def test_scores_of_every_thought_are_those_of_the_plain_model(close, horizon):
    """Log pi at the sampling temperature, S_pred at temperature 1 behind the close marker, forced
    where the budget ended the thought; S_ema without any."""
    policy, teacher = toy_policy(close=close), toy_policy(seed=1)
    documents, positions = one_position_each(
        [prefix + [4, 2] for prefix in PREFIXES], [len(prefix) for prefix in PREFIXES], horizon
    )
    groups = [all_thoughts(policy, prefix, budget=2) for prefix in PREFIXES]
    found = evidence(policy, teacher, documents, positions, groups)
    for m, prefix in enumerate(PREFIXES):
        tails = [[], [4]][:horizon]
        baseline_logprob = (
            sum(no_think(teacher, prefix + tail)[target] for tail, target in zip(tails, [4, 2]))
            / horizon
        )
        assert_close(found.baseline_logprob[m], baseline_logprob.detach())
        for g, thought in enumerate(groups[m]):
            context = prefix + thought.continuation(policy)
            reasoned_logprob = (
                sum(
                    next_logprobs(policy, context + tail, excluded=OPEN)[target]
                    for tail, target in zip(tails, [4, 2])
                )
                / horizon
            )
            assert_close(found.reasoned_logprob[m, g], reasoned_logprob.detach())
            assert_close(found.logprob[m, g], thought.logprob.sum().detach())


def test_probabilities_of_all_thoughts_sum_to_one():
    """The policy is a distribution over thoughts: nothing is cut from it, the open marker may be
    thought, and a forced close costs nothing."""
    policy = toy_policy()
    groups = [all_thoughts(policy, prefix, budget=3) for prefix in PREFIXES]
    documents, positions = one_position_each(
        [prefix + [2] for prefix in PREFIXES], [len(prefix) for prefix in PREFIXES]
    )
    probability = evidence(policy, policy, documents, positions, groups).logprob.exp()
    assert probability.shape == (2, 1 + 4 + 4 * 4 + 4 * 4 * 4)
    assert_close(probability.sum(dim=1), torch.ones(2, dtype=torch.float64))
    assert any(OPEN in thought.tokens for thought in groups[0]) and any(
        thought.truncated for thought in groups[0]
    )


class GivenNoise:
    """Uniform numbers written down in advance."""

    def __init__(self, numbers: dict[tuple[int, int], list[float]]) -> None:
        self._numbers = numbers

    def uniforms(self, document: Document, position: int, thought: int, length: int) -> np.ndarray:
        numbers = self._numbers[document.id, thought]
        return np.array(numbers + [0.5] * (length - len(numbers)))


@pytest.mark.parametrize("close", CLOSES)
def test_each_token_is_drawn_from_an_interval_as_long_as_its_probability(close):
    """The sampler, at both ends of every interval of every thought: tokens, ends, truncation and
    log-probability are the reference's."""
    policy, budget = toy_policy(close=close), 2
    groups = [all_thoughts(policy, prefix, budget) for prefix in PREFIXES]
    # Float64 cumulative sums err by about 1e-15; this is a thousand times more, and far less than
    # any probability here.
    inside = 1e-12
    numbers = {
        (10 + m, 2 * g + upper): [
            high - inside if upper else low + inside for low, high in thought.interval
        ]
        for m, group in enumerate(groups)
        for g, thought in enumerate(group)
        for upper in (0, 1)
    }
    documents, positions = one_position_each(
        [prefix + [2] for prefix in PREFIXES], [len(prefix) for prefix in PREFIXES]
    )
    rollout = sample_thoughts(
        policy,
        documents,
        positions,
        toy_format(policy),
        GivenNoise(numbers),
        group_size=2 * len(groups[0]),
        max_thought_tokens=budget,
        slots=1024,
    )
    found = rollout.thoughts
    expected = as_thoughts([[thought for thought in group for _ in (0, 1)] for group in groups])
    assert torch.equal(found.tokens, expected.tokens)
    assert torch.equal(found.mask, expected.mask)
    assert torch.equal(found.truncated, expected.truncated)
    assert_close(found.behavior_logprob, expected.behavior_logprob)


def test_impossible_tokens_are_never_drawn():
    """Intervals are closed below and open above: neither 0 nor an edge nor the number next to 1
    falls on a token of probability 0."""
    logits = torch.tensor(
        [[-math.inf, 0.0, -math.inf, 0.0, -math.inf]], dtype=torch.float64
    ).expand(3, 5)
    token, logprob, entropy = draw(
        logits, torch.tensor([0.0, 0.5, math.nextafter(1, 0)], dtype=torch.float64), TEMPERATURE
    )
    assert token.tolist() == [1, 3, 3]
    assert_close(-logprob, torch.full((3,), math.log(2), dtype=torch.float64))
    assert_close(entropy, -logprob)


def test_sampled_frequencies_are_the_exact_probabilities():
    """Chi-square over 4000 thoughts of 20 keys: a right sampler exceeds the bound once in a million
    choices of seeds."""
    policy, prefix, budget, group_size = toy_policy(), PREFIXES[0], 2, 100
    thoughts = all_thoughts(policy, prefix, budget)
    documents, positions = one_position_each([prefix + [2]] * 2, [len(prefix)] * 2)
    counts: Counter[tuple[int, ...]] = Counter()
    for seed, step in itertools.product(range(4), range(5)):
        rollout = sample_thoughts(
            policy,
            documents,
            positions,
            toy_format(policy),
            NoiseKey(seed, step),
            group_size=group_size,
            max_thought_tokens=budget,
            slots=64,
        )
        counts.update(
            tuple(tokens[mask].tolist())
            for tokens, mask in zip(
                rollout.thoughts.tokens.flatten(0, 1), rollout.thoughts.mask.flatten(0, 1)
            )
        )
    num_sampled = 20 * 2 * group_size
    assert counts.total() == num_sampled and set(counts) <= {thought.tokens for thought in thoughts}
    expected = torch.stack([num_sampled * thought.probability for thought in thoughts]).detach()
    observed = torch.tensor([counts[thought.tokens] for thought in thoughts], dtype=torch.float64)
    rare = expected < 5  # too few for the chi-square limit: one cell together
    expected, observed = (
        torch.cat([cells[~rare], cells[rare].sum()[None]]) for cells in (expected, observed)
    )
    chi_square = ((observed - expected) ** 2 / expected).sum()
    assert (
        torch.special.gammaincc(
            torch.tensor((len(expected) - 1) / 2, dtype=torch.float64), chi_square / 2
        )
        > 1e-6
    )


# ---- the propositions, summed exactly ----


def test_expected_reward_is_the_cross_entropy_reduction():
    """Proposition 1, for each of 21 thoughts and two prefixes: p* is any data distribution, the
    open marker never in it."""
    policy, teacher = toy_policy(), toy_policy(seed=1)
    for prefix in PREFIXES:
        thoughts, p = all_thoughts(policy, prefix, budget=2), data_distribution(policy, prefix)
        expected_reward = (
            p[targets(policy)] @ every_target(policy, teacher, prefix, thoughts).reward
        )
        before = cross_entropy(p, no_think(teacher, prefix))
        for value, thought in zip(expected_reward, thoughts, strict=True):
            assert_close(value, before - cross_entropy(p, reasoned(policy, prefix, thought)))


def test_expected_evidence_is_at_most_that_of_the_marginal_over_thoughts():
    """Proposition 2 (Jensen): E_c S_pred <= log E_c p(x | c) for every target, and J(theta) at most
    the collapsed predictor's improvement."""
    policy, teacher, prefix = toy_policy(), toy_policy(seed=1), PREFIXES[0]
    thoughts, p = all_thoughts(policy, prefix, budget=2), data_distribution(policy, prefix)
    found = every_target(policy, teacher, prefix, thoughts)
    probability = found.logprob[0].exp()
    collapsed = sum(
        thought.probability * reasoned(policy, prefix, thought).exp() for thought in thoughts
    ).detach()
    assert_close(collapsed.sum(), torch.ones((), dtype=torch.float64))
    gap = collapsed.log()[targets(policy)] - found.reasoned_logprob @ probability
    assert (gap > 1e-3).all()  # strict, because the thoughts here do change the prediction
    objective = p[targets(policy)] @ found.reward @ probability
    bound = cross_entropy(p, no_think(teacher, prefix)) - cross_entropy(p, collapsed.log())
    assert_close(bound - objective, p[targets(policy)] @ gap)


def test_the_marginal_bound_is_tight_where_the_predictor_ignores_the_thought():
    """Proposition 2, equality: a bigram model sees only the close marker."""
    policy, prefix = (
        bigram_policy(
            torch.randn(6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        ),
        [2],
    )
    thoughts = all_thoughts(policy, prefix, budget=2)
    found = every_target(policy, policy, prefix, thoughts)
    collapsed = sum(
        thought.probability * reasoned(policy, prefix, thought).exp() for thought in thoughts
    ).detach()
    assert_close(found.reasoned_logprob @ found.logprob[0].exp(), collapsed.log()[targets(policy)])


def test_mean_reward_over_positions_is_the_improvement_of_the_whole_sequence():
    """Proposition 3: averaged over the positions of a document, rewards are the per-token
    cross-entropy reduction of the sequence.

    Summed over all 16 documents of three tokens that start alike, both positions of each, and all
    thoughts of each position.
    """
    policy, teacher, start = toy_policy(), toy_policy(seed=1), 3
    documents = [
        Document(id=index, tokens=np.array([start, *rest]))
        for index, rest in enumerate(itertools.product(targets(policy), repeat=2))
    ]
    every_token = np.array([[token] for document in documents for token in document.tokens[1:]])
    positions = Positions(
        document=np.repeat(np.arange(16), 2), position=np.tile([1, 2], 16), target=every_token
    )
    prefixes = [[start], *([start, token] for token in targets(policy))]
    thoughts = {tuple(prefix): all_thoughts(policy, prefix, budget=2) for prefix in prefixes}
    groups = [
        thoughts[tuple(documents[d].tokens[:t])]
        for d, t in zip(positions.document, positions.position)
    ]
    found = evidence(policy, teacher, documents, positions, groups)

    probability = torch.stack(
        [
            math.prod(
                data_distribution(policy, list(document.tokens[:t]))[document.tokens[t]]
                for t in (1, 2)
            )
            for document in documents
        ]
    )
    assert_close(probability.sum(), torch.ones((), dtype=torch.float64))
    mean_reward = (found.logprob.exp() * found.reward).sum(dim=1).reshape(16, 2).mean(dim=1)

    before = {key: no_think(teacher, list(key)) for key in thoughts}
    after = {
        key: sum(thought.probability * reasoned(policy, list(key), thought) for thought in group)
        for key, group in thoughts.items()
    }

    def sequence_cross_entropy(logprobs: dict[tuple[int, ...], Tensor]) -> Tensor:
        per_token = [
            sum(logprobs[tuple(document.tokens[:t])][document.tokens[t]] for t in (1, 2)) / 2
            for document in documents
        ]
        return -(probability @ torch.stack(per_token)).detach()

    assert_close(
        probability @ mean_reward, sequence_cross_entropy(before) - sequence_cross_entropy(after)
    )
