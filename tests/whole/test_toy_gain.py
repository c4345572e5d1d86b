"""The open marker on a toy of bigrams: what it can take from a prediction, and what a thought can
gain at most."""

import math

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from rlp.model.layout import repeated_layout
from rlp.model.policy import Policy
from rlp.model.scoring import score
from tests.whole.toy import (
    CLOSE,
    CPU,
    FIRST_WORD,
    OPEN,
    PREFIXES,
    Thought,
    all_thoughts,
    bigram_policy,
    cross_entropy,
    data_distribution,
    every_target,
    evidence,
    next_logprobs,
    no_think,
    one_position_each,
    targets,
    toy_format,
    toy_policy,
)

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
