"""Predictions that the policy makes after its thoughts: drawn, scored, rewarded and trained,
against the plain model and sums over all of them."""

import itertools
import json
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from rlp.config import ConfigError
from rlp.data.documents import Document
from rlp.data.positions import Positions
from rlp.model.policy import Policy
from rlp.model.thoughts import Predictions, ThoughtFormat, Thoughts
from rlp.objective import exact_match, group_relative_advantage, prefix_match
from rlp.sampling.rollout import NoiseKey
from rlp.trainer import Trainer
from tests.sampled import sample_thoughts
from tests.training import assert_same_run, read_lines, tiny_config, write_corpus
from tests.whole.toy import (
    CLOSES,
    OPEN,
    TEMPERATURE,
    Thought,
    all_thoughts,
    as_thoughts,
    flat_gradient,
    next_logprobs,
    one_position_each,
    step_loss,
    toy_format,
    toy_policy,
)

END = 4
"""The last of three words ends a prediction."""


def predicting_format(policy: Policy, horizon: int) -> ThoughtFormat:
    return replace(toy_format(policy, horizon=horizon), end=END, predicts=True)


def sampled(
    policy: Policy, form: ThoughtFormat, budget: int = 3
) -> tuple[list[Document], Positions, Thoughts, object]:
    """Three documents, a position in each, eight thoughts at each."""
    contents = [[3, 2, 4, 2, 3, 2], [2, 4, 4, 3, 2, 4], [4, 3, 2, 2]]
    documents, positions = one_position_each(contents, [3, 4, 1], horizon=form.horizon)
    rollout = sample_thoughts(
        policy,
        documents,
        positions,
        form,
        NoiseKey(0, 1),
        group_size=8,
        max_thought_tokens=budget,
        slots=8,
    )
    return documents, positions, rollout.thoughts, rollout.decode_work


def words(tokens: Tensor, mask: Tensor) -> list[int]:
    return tokens[mask].tolist()


@pytest.mark.parametrize("close", CLOSES)
def test_a_prediction_is_drawn_from_the_plain_model_after_the_close_marker(close):
    """Token by token: its log-probability at the sampling temperature without the open marker, and
    the uniform number that follows those of the thought's budget. The thoughts are those of a run
    without predictions, and what is run is counted."""
    policy, budget, horizon = toy_policy(close=close), 3, 2
    form = predicting_format(policy, horizon)
    documents, positions, thoughts, work = sampled(policy, form, budget)
    plain = sampled(policy, form.predicting(False), budget)[2]
    for ours, theirs in zip(thoughts.parts(), plain.parts()):
        assert_close(ours, theirs)

    said, run, ended = thoughts.prediction, 0, set()
    for m, g in itertools.product(range(3), range(8)):
        document, position = documents[m], int(positions.position[m])
        uniforms = NoiseKey(0, 1).uniforms(document, position, g, budget + horizon)[budget:]
        thought = words(thoughts.tokens[m, g], thoughts.mask[m, g])
        forced = list(close) if thoughts.truncated[m, g] else []
        before = [*document.tokens[:position].tolist(), *policy.markers.open, *thought, *forced]
        prediction = words(said.tokens[m, g], said.mask[m, g])
        for h, token in enumerate(prediction):
            following = next_logprobs(
                policy, before + prediction[:h], temperature=TEMPERATURE, excluded=OPEN
            ).detach()
            assert_close(said.behavior_logprob[m, g, h].double(), following[token])
            edges = [0.0, *following.exp().cumsum(dim=0).tolist()]
            assert edges[token] <= uniforms[h] <= edges[token + 1]
        assert END not in prediction[:-1]
        assert bool(said.ended[m, g]) == (prediction[-1] == END)
        assert len(prediction) == horizon or prediction[-1] == END
        ended.add((len(prediction), len(forced)))
        run += len(thought) + len(forced) + len(prediction) - 1
    assert work.tokens == work.head_rows == run
    assert {length for length, _ in ended} == {1, 2} and (2, len(close)) in ended


@dataclass(frozen=True, slots=True)
class Trajectory:
    """A thought and a prediction after it, one of all."""

    thought: Thought
    prediction: tuple[int, ...]
    logprob: Tensor
    """[H], with gradient."""

    @property
    def logprobs(self) -> Tensor:
        """Of all that is sampled, with gradient."""
        return torch.cat([self.thought.logprob, self.logprob])


def all_trajectories(policy: Policy, prefix: list[int], budget: int, horizon: int) -> list:
    """Every thought with every prediction that can follow it."""
    found = []

    def extend(thought: Thought, said: tuple[int, ...], logprobs: tuple[Tensor, ...]) -> None:
        if len(said) == horizon or END in said:
            found.append(Trajectory(thought, said, torch.stack(logprobs)))
            return
        before = [*prefix, *thought.continuation(policy), *said]
        following = next_logprobs(policy, before, temperature=TEMPERATURE, excluded=OPEN)
        for token in range(len(following)):
            if token != OPEN:
                extend(thought, (*said, token), (*logprobs, following[token]))

    for thought in all_thoughts(policy, prefix, budget):
        extend(thought, (), ())
    return found


def of_trajectories(group: list[Trajectory], horizon: int) -> Thoughts:
    """One position's thoughts and predictions, as the sampler would return them."""
    shape = (1, len(group), horizon)
    tokens, logprob = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape, dtype=torch.float64)
    for g, one in enumerate(group):
        tokens[0, g, : len(one.prediction)] = torch.tensor(one.prediction)
        logprob[0, g, : len(one.prediction)] = one.logprob.detach()
    lengths = torch.tensor([[len(one.prediction)] for one in group])
    mask = (torch.arange(horizon) < lengths)[None]
    prediction = Predictions(tokens, mask, logprob, ((tokens == END) & mask).any(dim=2))
    return replace(as_thoughts([[one.thought for one in group]]), prediction=prediction)


def is_prefix(said: tuple[int, ...], target: list[int]) -> bool:
    """What the reward means, of one prediction."""
    if list(said) == target[: len(said)]:
        return True
    return said[-1] == END and len(said) > 1 and list(said[:-1]) == target[: len(said) - 1]


def test_the_step_is_reinforce_on_thought_and_prediction():
    """The gradient of what `learn` hands to the engine, for all 65 thoughts of at most two tokens
    with a few predictions each, is that of -A times the mean log-probability of everything that was
    sampled, by the plain model. The forced close marker has none."""
    policy, prefix, target, horizon = toy_policy(seed=3), [2, 2], [3, 2], 2
    every = all_trajectories(policy, prefix, 2, horizon)
    group = every[::7]
    documents, positions = one_position_each([[*prefix, *target]], [2], horizon=horizon)
    loss = step_loss(
        policy,
        predicting_format(policy, horizon),
        documents,
        positions,
        of_trajectories(group, horizon),
        reward="prefix_match",
    )
    reward = torch.tensor([[float(is_prefix(one.prediction, target)) for one in group]])
    advantage = group_relative_advantage(reward.double())[0]
    by_hand = -sum(a * one.logprobs.mean() for a, one in zip(advantage, group)) / len(group)
    assert {one.thought.truncated for one in group} == {True, False}
    assert {len(one.prediction) for one in group} == {1, 2} and 0 < reward.mean() < 1
    assert_close(flat_gradient(loss, policy), flat_gradient(by_hand, policy))


def test_the_expected_step_is_the_gradient_of_the_expected_match():
    """Five words, thoughts and predictions of one token: summed over all pairs of the 20
    trajectories, twice the step (eq. 8 has the mean over two tokens) is minus the gradient of the
    probability that the prediction is right; and thought and prediction both have a part in it."""
    policy, prefix, target = toy_policy(seed=1), [2, 3], [3]
    every = all_trajectories(policy, prefix, 1, 1)
    probability = torch.stack([one.logprobs.sum().exp() for one in every])
    assert len(every) == 20 and probability.sum().item() == pytest.approx(1)
    documents, positions = one_position_each([[*prefix, *target]], [2])
    step = torch.zeros(sum(part.numel() for part in policy.parameters()), dtype=torch.float64)
    right = [is_prefix(one.prediction, target) for one in every]
    for (p, one, hit), (q, other, other_hit) in itertools.combinations(
        zip(probability.tolist(), every, right), 2
    ):
        if hit == other_hit:  # equal rewards: no advantage
            continue
        loss = step_loss(
            policy,
            predicting_format(policy, 1),
            documents,
            positions,
            of_trajectories([one, other], 1),
            reward="prefix_match",
        )
        step += 2 * p * q * flat_gradient(loss, policy)
    expected = probability[torch.tensor(right)].sum()
    assert_close(2 * step, -flat_gradient(expected, policy))

    thought_alone = sum(
        one.thought.probability * one.logprob.sum().exp().detach()
        for one, hit in zip(every, right)
        if hit
    )
    assert not torch.allclose(2 * step, -flat_gradient(thought_alone, policy), rtol=0.1)


@pytest.mark.parametrize(
    "said, prefix, exact",
    [
        ([3, 2, 2], 1, 1),
        ([3, 2, 3], 0, 0),
        ([3, END], 1, 0),
        ([3, 2, END], 1, 0),
        ([END], 0, 0),
        ([2, END], 0, 0),
    ],
)
def test_a_match_is_a_prefix_that_says_something(said, prefix, exact):
    """Against the target 3 2 2; and where the document itself ends, its end is right."""
    tokens = torch.tensor([[said + [0] * (3 - len(said))]])
    mask = torch.arange(3)[None, None] < len(said)
    ended = torch.tensor([[said[-1] == END]])
    target = torch.tensor([[3, 2, 2]])
    assert prefix_match(tokens, mask, ended, target).item() == prefix
    assert exact_match(tokens, mask, target).item() == exact
    if len(said) < 3:  # what was not said is no match, whatever stands in its place
        assert exact_match(tokens, mask, tokens[0]).item() == 0
    if said == [END]:
        assert prefix_match(tokens, mask, ended, torch.tensor([[END, 2, 2]])).item() == 1


RUN = {
    "reward__kind": "prefix_match",
    "target__horizon": 2,
    "objective__lm_weight": 1.0,
    "budget__steps": 4,
    "thought__group_size": 4,
    "data__max_document_tokens": 16,
}


@pytest.fixture
def corpus(tmp_path_factory):
    """Documents of few words, which are guessed right now and then."""
    texts = ["w1 " * count for count in (8, 10, 12, 9, 11, 7, 8, 10)]
    return write_corpus(tmp_path_factory.mktemp("few") / "words.jsonl", texts)


@pytest.mark.parametrize(
    "kind", ["prefix_match", pytest.param("exact_match", marks=pytest.mark.slow)]
)
def test_how_a_step_is_cut_changes_nothing(trained, kind):
    """Layouts, micro-batches, slices of groups and documents by their lengths: the same thoughts
    and predictions, rewards and gradients; and the ratio is 1."""
    setting = RUN | {"reward__kind": kind}
    plain = trained("plain", **setting)
    cuts = {
        "rows": {"engine__layout": "repeated"},
        "slices": {"optim__thoughts_per_forward": 3},
        "by_length": {"optim__tokens_per_micro_batch": 70},
    }
    for name, cut in cuts.items():
        assert_same_run(plain, trained(name, **setting, **cut), 1e-4)

    lines = read_lines(plain / "metrics.jsonl")
    assert max(line["policy/ratio_max_deviation"] for line in lines) < 1e-4
    assert 0 < sum(line["reward/mean"] for line in lines) < len(lines)
    ledger = json.loads((plain / "ledger.json").read_text())["phases"]
    assert ledger["decode"]["tokens_generated"] == ledger["train"]["tokens_trained"]


@pytest.mark.parametrize(
    "overrides, words",
    [
        ({"sampling__engine": "vllm"}, "Write sampling.engine=native"),
        ({"objective__predictor_weight": 0.5}, "Write objective.predictor_weight=0"),
        ({"reward__placebo": "foreign_thought"}, "Write reward.placebo=shuffled_reward or none"),
    ],
)
def test_what_a_prediction_can_not_go_with_is_refused(
    tmp_path, model_folder, corpus, ranks, overrides, words
):
    config = tiny_config(tmp_path / "run", model_folder, corpus, **(RUN | overrides))
    with pytest.raises(ConfigError, match=f"reward.kind: prefix_match .* {words}"):
        Trainer(config, ranks=ranks)
