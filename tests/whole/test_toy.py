"""RLP on a toy that can be summed: every thought of a tiny transformer, with its exact probability.

A GPT-NeoX with a vocabulary of three to six tokens in float64 has a few dozen thoughts of at most
two tokens, so an expectation over thoughts is a sum, and the paper's propositions and the expected
step of Algorithm 1 are equalities.
The reference here is the plain model: `lm(input_ids).logits` and a softmax, row by row, without
layouts, caches, kernels or masks.
"""

import itertools
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, GPTNeoXConfig

import train
from rlp.config import ObjectiveConfig, RewardConfig
from rlp.data.documents import Document
from rlp.data.positions import Positions
from rlp.learn.teacher import Teacher
from rlp.model.layout import repeated_layout
from rlp.model.markers import Markers
from rlp.model.policy import Policy
from rlp.model.scoring import score
from rlp.model.thoughts import ThoughtFormat, Thoughts
from rlp.objective import group_relative_advantage, information_gain, log_evidence
from rlp.process.tally import Tally
from rlp.sampling.rollout import NoiseKey, draw, sample_thoughts

OPEN, CLOSE, FIRST_WORD = 0, 1, 2
TEMPERATURE = 0.5
"""Its inverse is exact in float32, where layouts keep it: sampler and trainer then agree to float64
rounding."""
CPU = torch.device("cpu")


def toy_policy(num_words: int = 3, *, close: tuple[int, ...] = (CLOSE,), seed: int = 0) -> Policy:
    """A random transformer over `num_words` words and two markers, in float64 throughout (no norm
    or softmax narrows it)."""
    torch.manual_seed(seed)
    config = GPTNeoXConfig(
        vocab_size=FIRST_WORD + num_words,
        hidden_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
        initializer_range=0.5,
        bos_token_id=None,
        eos_token_id=None,
        attention_dropout=0.0,
        hidden_dropout=0.0,
    )
    return Policy(
        AutoModelForCausalLM.from_config(config, dtype=torch.float64).eval(),
        Markers(open=(OPEN,), close=close),
    )


def toy_format(policy: Policy, *, horizon: int = 1) -> ThoughtFormat:
    return ThoughtFormat(
        markers=policy.markers,
        instruction=(),
        begin=None,
        temperature=TEMPERATURE,
        target_temperature=1.0,
        horizon=horizon,
    )


# ---- the reference: the plain model, and all thoughts by recursion ----


def next_logprobs(
    policy: Policy, tokens: list[int], *, temperature: float = 1.0, excluded: int | None = None
) -> Tensor:
    """[V] log-probabilities of the token after these, with gradient."""
    logits = policy.lm(input_ids=torch.tensor([tokens])).logits[0, -1] / temperature
    if excluded is not None:
        logits = logits.masked_fill(torch.arange(len(logits)) == excluded, -math.inf)
    return logits.log_softmax(dim=0)


@dataclass(frozen=True, slots=True)
class Thought:
    """One of all possible thoughts."""

    tokens: tuple[int, ...]
    truncated: bool
    logprob: Tensor
    """[L], with gradient."""
    interval: tuple[tuple[float, float], ...]
    """[L] between which uniform numbers each token is drawn."""

    @property
    def probability(self) -> Tensor:
        """Of the thought; a forced close marker has no say in it."""
        return self.logprob.sum().exp()

    def continuation(self, policy: Policy) -> list[int]:
        """What stands between the prefix and the target."""
        return [
            *policy.markers.open,
            *self.tokens,
            *(policy.markers.close if self.truncated else ()),
        ]


def all_thoughts(policy: Policy, prefix: list[int], budget: int) -> list[Thought]:
    """Every thought that can follow a prefix: it ends with the close marker, or at the budget."""
    close = policy.markers.close
    found: list[Thought] = []

    def extend(
        tokens: tuple[int, ...],
        logprobs: tuple[Tensor, ...],
        interval: tuple[tuple[float, float], ...],
    ) -> None:
        closed = tokens[-len(close) :] == close
        if closed or len(tokens) == budget:
            found.append(Thought(tokens, not closed, torch.stack(logprobs), interval))
            return
        following = next_logprobs(
            policy, [*prefix, *policy.markers.open, *tokens], temperature=TEMPERATURE
        )
        edges = [0.0, *following.detach().exp().cumsum(dim=0).tolist()]
        for token, logprob in enumerate(following):
            extend(
                (*tokens, token),
                (*logprobs, logprob),
                (*interval, (edges[token], edges[token + 1])),
            )

    extend((), (), ())
    return found


def reasoned(policy: Policy, prefix: list[int], thought: Thought) -> Tensor:
    """[V] log p_theta(. | prefix, thought), the open marker left out."""
    return next_logprobs(policy, prefix + thought.continuation(policy), excluded=OPEN)


def no_think(policy: Policy, prefix: list[int]) -> Tensor:
    """[V] log p(. | prefix), the open marker left out."""
    return next_logprobs(policy, prefix, excluded=OPEN)


def targets(policy: Policy) -> list[int]:
    """Every token that can be a target."""
    return [token for token in range(policy.head.shape[0]) if token != OPEN]


def flat_gradient(value: Tensor, policy: Policy) -> Tensor:
    """The gradient of a number in all weights, as one vector."""
    parts = torch.autograd.grad(
        value,
        list(policy.parameters()),
        allow_unused=True,
        materialize_grads=True,
        retain_graph=True,
    )
    return torch.cat([part.flatten() for part in parts])


# ---- the same through rlp ----


def as_thoughts(groups: list[list[Thought]]) -> Thoughts:
    """Thoughts of each position, as the sampler would return them."""
    width = max(len(thought.tokens) for group in groups for thought in group)
    tokens = torch.zeros(len(groups), len(groups[0]), width, dtype=torch.int64)
    mask, logprob = (
        torch.zeros_like(tokens, dtype=torch.bool),
        torch.zeros_like(tokens, dtype=torch.float64),
    )
    for m, g in itertools.product(range(len(groups)), range(len(groups[0]))):
        length = len(groups[m][g].tokens)
        tokens[m, g, :length], mask[m, g, :length] = torch.tensor(groups[m][g].tokens), True
        logprob[m, g, :length] = groups[m][g].logprob.detach()
    truncated = torch.tensor([[thought.truncated for thought in group] for group in groups])
    return Thoughts(tokens, mask, logprob, torch.zeros_like(logprob), truncated)


def one_position_each(
    contents: list[list[int]], positions: list[int], horizon: int = 1
) -> tuple[list[Document], Positions]:
    """Documents, and one position in each."""
    documents = [
        Document(id=10 + index, tokens=np.array(tokens)) for index, tokens in enumerate(contents)
    ]
    target = np.array([tokens[t : t + horizon] for tokens, t in zip(contents, positions)])
    return documents, Positions(
        document=np.arange(len(documents)), position=np.array(positions), target=target
    )


def teacher_of(kind: str, policy: Policy, twin: Policy | None = None) -> Teacher:
    """The teacher of a policy that an engine holds."""
    return Teacher(kind, twin, SimpleNamespace(policy=policy), None)


@dataclass(frozen=True, slots=True)
class Evidence:
    """What rlp computes for every thought of every position."""

    logprob: Tensor
    """[M, G] log-probability of the thought."""
    reasoned_logprob: Tensor
    """[M, G] S_pred."""
    baseline_logprob: Tensor
    """[M] S_ema."""

    @property
    def reward(self) -> Tensor:
        return information_gain(self.reasoned_logprob, self.baseline_logprob)


@torch.no_grad()
def evidence(
    policy: Policy,
    teacher: Policy,
    documents: list[Document],
    positions: Positions,
    groups: list[list[Thought]],
) -> Evidence:
    """S_pred and log pi of given thoughts by the layout and the kernels, S_ema by the teacher."""
    thought_format = toy_format(policy, horizon=positions.target.shape[1])
    scores = score(
        policy,
        repeated_layout(
            documents,
            positions,
            as_thoughts(groups),
            thought_format,
            lm=False,
            no_think=False,
            device=CPU,
        ),
    )
    layout = repeated_layout(
        documents, positions, None, thought_format, lm=False, no_think=True, device=CPU
    )
    shape = (len(groups), len(groups[0]))
    baseline_logprob = teacher_of("self", teacher).baseline_logprob(layout, len(groups))
    return Evidence(
        scores.thought.sum(dim=1).reshape(shape),
        log_evidence(scores.target).reshape(shape),
        baseline_logprob,
    )


class Backward:
    """An engine that keeps the loss it is given."""

    def __init__(self, model: Callable) -> None:
        self._model = model

    def __call__(self, *arguments: object) -> object:
        return self._model(*arguments)

    def backward(self, loss: Tensor) -> None:
        self.loss = loss


def step_loss(
    model: Callable,
    thought_format: ThoughtFormat,
    documents: list[Document],
    positions: Positions,
    thoughts: Thoughts,
    baseline_logprob: Tensor | None = None,
    **weights: float,
) -> Tensor:
    """What `train.learn` hands to the engine for one micro-batch that is the whole step: the run is
    cut down to what that function reads."""
    config = SimpleNamespace(
        objective=ObjectiveConfig(**{"lm_weight": 0.0} | weights),
        optim=SimpleNamespace(thoughts_per_forward=None),
        reward=RewardConfig(),
    )
    engine = Backward(model)
    run = SimpleNamespace(
        config=config,
        asks_for_matches=False,
        engine=engine,
        lay_out=repeated_layout,
        ranks=SimpleNamespace(device=CPU),
        setup=SimpleNamespace(thought_format=thought_format, markers=thought_format.markers),
        count=lambda *work, **passes: None,
        offer_thoughts=lambda *told: None,
    )
    batch = train.MicroBatch(documents, positions, thoughts, baseline_logprob)
    divisors = [thoughts.truncated.numel(), 1]
    train.learn(run, batch, None, None, divisors, Tally(), first=True)
    return engine.loss


def expected_step(
    policy: Policy, prefix: list[int], target: int, budget: int, group_size: int, **weights: float
) -> Tensor:
    """The gradient of the loss of a step, in expectation over all G-tuples of thoughts."""
    thoughts = all_thoughts(policy, prefix, budget)
    documents, positions = one_position_each([[*prefix, target]], [len(prefix)])
    baseline_logprob = torch.tensor([-1.5], dtype=torch.float64)
    total = torch.zeros(sum(part.numel() for part in policy.parameters()), dtype=torch.float64)
    for group in itertools.product(thoughts, repeat=group_size):
        loss = step_loss(
            policy,
            toy_format(policy),
            documents,
            positions,
            as_thoughts([list(group)]),
            baseline_logprob,
            **weights,
        )
        total += math.prod(thought.probability.item() for thought in group) * flat_gradient(
            loss, policy
        )
    return total


# ---- thoughts: sampled as they are scored ----

PREFIXES = [[3, 2, 4], [2, 4, 4, 3, 2]]
"""Of two lengths, so that the sampler pads."""
CLOSES = [(CLOSE,), (CLOSE, FIRST_WORD)]
"""A marker of one token, and of two: then a thought can reach its budget in the middle of the
marker."""


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
        rows=1024,
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
            rows=64,
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


def data_distribution(policy: Policy, prefix: list[int]) -> Tensor:
    """[V] p*, any distribution over the tokens that can be targets, another one for each prefix."""
    generator = torch.Generator().manual_seed(
        int(sum(7**i * token for i, token in enumerate(prefix)))
    )
    logits = torch.randn(policy.head.shape[0], generator=generator, dtype=torch.float64)
    return logits.masked_fill(torch.arange(len(logits)) == OPEN, -math.inf).softmax(dim=0)


def cross_entropy(p: Tensor, log_q: Tensor) -> Tensor:
    """CE(p, q) = -sum p log q (eq. 2)."""
    return -torch.where(p > 0, p * log_q, 0.0).sum().detach()


def every_target(
    policy: Policy, teacher: Policy, prefix: list[int], thoughts: list[Thought]
) -> Evidence:
    """Rows are the targets, columns the thoughts."""
    documents, positions = one_position_each(
        [[*prefix, target] for target in targets(policy)], [len(prefix)] * len(targets(policy))
    )
    return evidence(policy, teacher, documents, positions, [thoughts] * len(documents))


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


# ---- a step of Algorithm 1, in expectation ----

# 13 ** 2 groups of the 13 thoughts over two words, 7 ** 3 of the 7 over one. Seeds whose short
# thoughts are likely enough that length matters.
STEPS = [(2, 2, 8), (1, 3, 22)]


@pytest.mark.parametrize(("num_words", "group_size", "seed"), STEPS)
def test_expected_step_is_the_gradient_of_the_length_normalised_objective(
    num_words, group_size, seed
):
    """The expected gradient of eq. 8 is that of -sum_c pi(c) (r(c) - mu) / |c|, with r and its mean
    mu held fixed.

    The mean over tokens puts 1/|c| beside the reward. The proof of section 9.1 (eq. 14) has the sum
    over tokens
    instead: where lengths differ, the step of eq. 8 is not along the gradient of E[r], though not
    far from it.
    """
    policy, prefix, target = toy_policy(num_words, seed=seed), [2, 2], FIRST_WORD
    thoughts = all_thoughts(policy, prefix, budget=2)
    reward = torch.stack(
        [reasoned(policy, prefix, thought)[target] for thought in thoughts]
    ).detach()
    probability = torch.stack([thought.probability for thought in thoughts])
    length = torch.tensor([len(thought.tokens) for thought in thoughts])
    centered = reward - probability.detach() @ reward
    of_expected_reward = flat_gradient(probability @ reward, policy)
    step = expected_step(policy, prefix, target, budget=2, group_size=group_size)
    assert_close(step, -flat_gradient(probability @ (centered / length), policy))
    assert step.abs().max() > 0.01
    assert 0.8 < torch.cosine_similarity(step, -of_expected_reward, dim=0) < 0.99


def test_expected_step_of_one_token_thoughts_is_the_gradient_of_the_expected_reward():
    """With one length for all, eq. 8 is unbiased: minus the gradient of J(theta) = E_c[r(c)], r
    held fixed (eqs. 6 and 14)."""
    policy, prefix, target = toy_policy(2), [2, 3], 3
    thoughts = all_thoughts(policy, prefix, budget=1)
    reward = torch.stack(
        [reasoned(policy, prefix, thought)[target] for thought in thoughts]
    ).detach()
    objective = torch.stack([thought.probability for thought in thoughts]) @ reward
    assert_close(
        expected_step(policy, prefix, target, budget=1, group_size=3),
        -flat_gradient(objective, policy),
    )


def test_predictor_term_completes_the_gradient_of_the_expected_reward():
    """With predictor_weight 1 nothing is held fixed: the step is minus the whole gradient of sum_c
    pi(c) log p(x | c)."""
    policy, prefix, target = toy_policy(2), [2, 3], 3
    thoughts = all_thoughts(policy, prefix, budget=1)
    objective = sum(
        thought.probability * reasoned(policy, prefix, thought)[target] for thought in thoughts
    )
    assert_close(
        expected_step(policy, prefix, target, budget=1, group_size=2, predictor_weight=1.0),
        -flat_gradient(objective, policy),
    )


def sampled_step(policy: Policy) -> tuple[list[Document], Positions, Thoughts]:
    """Three documents, a position in each, four sampled thoughts at each."""
    documents, positions = one_position_each([[3, 2, 4, 2], [2, 4, 4, 3, 2, 4], [4, 3]], [3, 4, 1])
    thoughts = sample_thoughts(
        policy,
        documents,
        positions,
        toy_format(policy),
        NoiseKey(0, 1),
        group_size=4,
        max_thought_tokens=3,
        rows=8,
    ).thoughts
    return documents, positions, thoughts


def test_loss_of_freshly_sampled_thoughts_is_zero_and_its_gradient_is_not():
    """From the sampler to the loss: what was drawn is scored as it was drawn, so every ratio is 1
    and the advantages cancel."""
    policy = toy_policy()
    loss = step_loss(policy, toy_format(policy), *sampled_step(policy))
    assert_close(loss.detach(), torch.zeros((), dtype=torch.float64))
    assert flat_gradient(loss, policy).abs().max() > 0.01


def test_step_of_several_positions_is_the_mean_of_their_steps():
    """A thought is compared with its siblings only, and every position weighs the same, however
    long its thoughts."""
    policy = toy_policy()
    documents, positions, thoughts = sampled_step(policy)
    alone = [
        step_loss(
            policy,
            toy_format(policy),
            [document],
            positions.of_documents(d, d + 1),
            thoughts[d : d + 1],
        )
        for d, document in enumerate(documents)
    ]
    assert thoughts.mask.sum(dim=(1, 2)).unique().numel() > 1
    together = flat_gradient(
        step_loss(policy, toy_format(policy), documents, positions, thoughts), policy
    )
    assert_close(together, sum(flat_gradient(loss, policy) for loss in alone) / 3)


def test_update_is_the_same_with_any_baseline():
    """EMA (or frozen: another network), self, none, not scored, or nonsense: S_ema is one number
    for a position, and cancels in eq. 7."""
    policy = toy_policy()
    thought_format = toy_format(policy)
    documents, positions, thoughts = sampled_step(policy)
    layout = repeated_layout(
        documents, positions, None, thought_format, lm=False, no_think=True, device=CPU
    )
    kinds = [
        teacher_of(kind, policy, toy_policy(seed=1)).baseline_logprob(layout, 3)
        for kind in ("ema", "self", "none")
    ]
    assert (kinds[0] - kinds[1]).abs().min() > 0.01 and (kinds[1] - kinds[2]).abs().min() > 0.01
    unscored = flat_gradient(
        step_loss(policy, thought_format, documents, positions, thoughts), policy
    )
    for baseline_logprob in (*kinds, torch.tensor([5.0, -7.0, 0.25], dtype=torch.float64)):
        assert_close(
            flat_gradient(
                step_loss(policy, thought_format, documents, positions, thoughts, baseline_logprob),
                policy,
            ),
            unscored,
        )


def test_forced_close_marker_and_target_carry_no_policy_gradient():
    """Only sampled tokens are trained: d loss / d log-probability is A / |c| on each of them, and 0
    on every other answer of the layout."""
    policy = toy_policy()
    documents, positions = one_position_each([[3, 2, 4]], [2])
    group = all_thoughts(policy, [3, 2], budget=2)
    chosen = [
        next(thought for thought in group if thought.truncated),
        next(thought for thought in group if not thought.truncated),
    ]
    answers: list[Tensor] = []

    def watched(*arguments: object) -> Tensor:
        answers.append(policy(*arguments).detach().requires_grad_())
        return answers[-1]

    advantage = group_relative_advantage(
        evidence(policy, policy, documents, positions, [chosen]).reasoned_logprob
    )[0]
    loss = step_loss(watched, toy_format(policy), documents, positions, as_thoughts([chosen]))
    gradient = torch.autograd.grad(loss, answers[0])[0]
    lengths = [len(thought.tokens) for thought in chosen]
    expected = torch.cat(
        [
            *(-(a / length / 2).expand(length) for a, length in zip(advantage, lengths)),
            torch.zeros(2, dtype=torch.float64),
        ]
    )
    assert_close(gradient, expected)


# ---- the open marker ----


def bigram_policy(logits: Tensor) -> Policy:
    """A policy whose next token depends on the last one alone: `logits[last, next]`, [V, V]."""

    class Body(nn.Module):
        def forward(self, input_ids: Tensor, use_cache: bool = False) -> SimpleNamespace:
            return SimpleNamespace(
                last_hidden_state=nn.functional.one_hot(input_ids, len(logits)).to(logits.dtype)
            )

    class Bigram(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.config, self.base_model = SimpleNamespace(), Body()
            self.head = nn.Linear(len(logits), len(logits), bias=False, dtype=logits.dtype)
            self.head.weight.data = logits.T.contiguous()

        def get_output_embeddings(self) -> nn.Linear:
            return self.head

        def forward(self, input_ids: Tensor) -> SimpleNamespace:
            return SimpleNamespace(logits=self.head(self.base_model(input_ids).last_hidden_state))

    return Policy(Bigram(), Markers(open=(OPEN,), close=(CLOSE,)))


NUM_WORDS = 4
IMPOSSIBLE = -200.0
"""exp(-200) is below 1e-86: nothing, beside float64's 1e-16."""


def marker_thief(after_close: dict[int, float]) -> Policy:
    """Four words, equally likely after any word, but half of the mass there is on the open marker.

    Args:
        after_close: logits after the close marker, other tokens being impossible.
    """
    logits = torch.full(
        (FIRST_WORD + NUM_WORDS, FIRST_WORD + NUM_WORDS), IMPOSSIBLE, dtype=torch.float64
    )
    logits[:, FIRST_WORD:] = 0.0
    logits[FIRST_WORD:, OPEN] = math.log(NUM_WORDS)
    logits[CLOSE] = IMPOSSIBLE
    logits[CLOSE, list(after_close)] = torch.tensor(list(after_close.values()), dtype=torch.float64)
    return bigram_policy(logits)


def gains(policy: Policy) -> tuple[Tensor, Tensor, Tensor]:
    """Rewards of the four words after the shortest thought [4]: ours, and with every token left in
    the softmax; and the open marker's mass."""
    words = list(range(FIRST_WORD, FIRST_WORD + NUM_WORDS))
    documents, positions = one_position_each([[2, word] for word in words], [1] * NUM_WORDS)
    thought = Thought((CLOSE,), False, torch.zeros(1, dtype=torch.float64), ())
    ours = evidence(policy, policy, documents, positions, [[thought]] * NUM_WORDS).reward[:, 0]
    naive = next_logprobs(policy, [2, OPEN, CLOSE])[words] - next_logprobs(policy, [2])[words]
    with torch.no_grad():
        mass = score(
            policy,
            repeated_layout(
                documents, positions, None, toy_format(policy), lm=False, no_think=True, device=CPU
            ),
        ).open_marker.exp()
    return ours, naive.detach(), mass


def test_mass_of_the_open_marker_is_that_right_after_the_prefix():
    """Where a thought may start, with every token in the softmax."""
    policy = toy_policy()
    documents, positions = one_position_each(
        [prefix + [2, 4] for prefix in PREFIXES], [len(prefix) for prefix in PREFIXES]
    )
    layout = repeated_layout(
        documents, positions, None, toy_format(policy), lm=False, no_think=True, device=CPU
    )
    assert_close(
        score(policy, layout).open_marker,
        torch.stack([next_logprobs(policy, prefix)[OPEN] for prefix in PREFIXES]),
    )


UNIFORM = {FIRST_WORD + word: 0.0 for word in range(NUM_WORDS)}


@pytest.mark.parametrize(
    "after_close", [UNIFORM, UNIFORM | {OPEN: math.log(NUM_WORDS)}]
)  # the marker is gone after the thought, or still there
def test_mass_on_the_open_marker_is_no_gain(after_close):
    """The words are uniform with and without a thought, so the gain is 0 and no thought could have
    more; naively it is log 2."""
    ours, naive, mass = gains(marker_thief(after_close))
    zero = torch.zeros(NUM_WORDS, dtype=torch.float64)
    assert_close(mass, zero + 0.5)
    assert_close(ours, zero)
    assert_close(naive, zero + (0.0 if OPEN in after_close else math.log(2)))


def test_the_best_possible_gain_is_never_exceeded():
    """A thought that settles which of four words comes is worth log 4 = 1.39 nats, not the log 8
    that the marker's mass would add."""
    ours, naive, _ = gains(marker_thief({FIRST_WORD: 0.0}))
    assert_close(ours[0], torch.tensor(math.log(4), dtype=torch.float64))
    assert_close(naive[0], torch.tensor(math.log(8), dtype=torch.float64))


def test_no_thought_gains_more_than_the_baseline_lacks():
    """In expectation over the data a reward is at most KL(p* || pbar), whatever the thought,
    because both predictors are distributions over the same tokens."""
    for seed in range(3):
        policy, teacher, prefix = toy_policy(seed=seed), toy_policy(seed=seed + 10), PREFIXES[0]
        p = data_distribution(policy, prefix)
        bound = cross_entropy(p, no_think(teacher, prefix)) - cross_entropy(p, p.log())
        assert (
            p[targets(policy)]
            @ every_target(policy, teacher, prefix, all_thoughts(policy, prefix, budget=2)).reward
            <= bound
        ).all()
