"""RLP on a toy that can be summed: every thought of a tiny transformer, with its exact probability.

A GPT-NeoX with a vocabulary of three to six tokens in float64 has a few dozen thoughts of at most
two tokens, so an expectation over thoughts is a sum, and the paper's propositions and the expected
step of Algorithm 1 are equalities.
The reference here is the plain model: `lm(input_ids).logits` and a softmax, row by row, without
layouts, caches, kernels or masks.
"""

import itertools
import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GPTNeoXConfig

from rlp.algorithm import learn
from rlp.config import ObjectiveConfig, RewardConfig, SamplingConfig
from rlp.data.documents import Document
from rlp.data.positions import Positions
from rlp.data.selectors import open_selector
from rlp.learn.teacher import Teacher
from rlp.model.layout import repeated_layout
from rlp.model.markers import Markers
from rlp.model.policy import Policy
from rlp.model.scoring import score
from rlp.model.thoughts import ThoughtFormat, Thoughts
from rlp.objective import information_gain, log_evidence
from rlp.process.outside import Part
from rlp.step.baseline import open_baseline
from rlp.step.judge import Judge
from rlp.step.loss import open_loss
from rlp.step.micro_batch import MicroBatch
from rlp.step.packing import Cutter
from rlp.step.parts import StepParts
from rlp.step.record import StepRecord
from rlp.step.reward import open_reward

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


def baseline_logprob_of(
    kind: str,
    policy: Policy,
    documents: list[Document],
    positions: Positions,
    twin: Policy | None = None,
) -> Tensor:
    """[M] S_ema of a kind of baseline."""
    networks = {"ema_logprob": twin, "start_logprob": twin, "policy_logprob": policy}
    thought_format = toy_format(policy, horizon=positions.target.shape[1])
    parts = toy_parts(policy, thought_format, baseline=open_baseline(kind), networks=networks)
    return parts.no_think_logprob(MicroBatch(documents, positions))


class Uncounted:
    """A ledger that keeps nothing."""

    def add(self, *work: object, **passes: object) -> None:
        """Nothing."""

    def time(self, *phases: str) -> nullcontext:
        """Nothing."""
        return nullcontext()


def toy_parts(
    model: Callable,
    thought_format: ThoughtFormat,
    *,
    weights: ObjectiveConfig | None = None,
    baseline: Part | None = None,
    networks: dict[str, Policy] | None = None,
    reward: str = "information_gain",
) -> StepParts:
    """What a step works with, of a run that is one micro-batch on one rank."""
    weights = weights or ObjectiveConfig(lm_weight=0.0)
    config = SimpleNamespace(
        objective=weights,
        optim=SimpleNamespace(thoughts_per_forward=None, tokens_per_micro_batch=None),
        sampling=SamplingConfig(),
        reward=RewardConfig(),
        baseline=SimpleNamespace(every_n_steps=1),
    )
    engine = Backward(model)
    return StepParts(
        config=config,
        ranks=SimpleNamespace(device=CPU),
        setup=SimpleNamespace(thought_format=thought_format, markers=thought_format.markers),
        thought_format=thought_format,
        batches=None,
        engine=engine,
        teacher=Teacher(networks or {}, None, engine, None),
        start=None,
        guard=None,
        ledger=Uncounted(),
        pulse=None,
        cut=Cutter(config, "repeated", thought_format, engine, None),
        lay_out=repeated_layout,
        sampler=None,
        scripts=None,
        language=None,
        selector=open_selector("uniform"),
        baseline=baseline,
        reward=open_reward(reward),
        loss=open_loss(weights),
    )


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
    shape = (len(groups), len(groups[0]))
    baseline_logprob = baseline_logprob_of("self", teacher, documents, positions)
    return Evidence(
        scores.thought.sum(dim=1).reshape(shape),
        log_evidence(scores.target).reshape(shape),
        baseline_logprob,
    )


class Backward:
    """An engine that keeps the loss it is given."""

    backward_is_collective = forward_is_collective = False

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
    reward: str = "information_gain",
    **weights: float,
) -> Tensor:
    """What `learn` hands to the engine for one micro-batch that is the whole step."""
    objective = ObjectiveConfig(**{"lm_weight": 0.0} | weights)
    run = toy_parts(model, thought_format, weights=objective, reward=reward)
    step = StepRecord(
        number=1,
        learning_rate=0.0,
        say=print,
        journal=None,
        close_tokens=len(thought_format.markers.close),
        max_thought_tokens=thoughts.tokens.shape[2],
    )
    batch, judge = MicroBatch(documents, positions, thoughts, baseline_logprob), Judge()
    judge.begin(run, 1, batch, [batch])
    step.num_thoughts, step.num_tokens = thoughts.truncated.numel(), 1
    learn(run, step, judge, 0, batch, first=True)
    return run.engine.loss


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
