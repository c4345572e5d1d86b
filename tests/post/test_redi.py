"""The loss of REDI and its alarm: closed forms by hand, and what fires where."""

import random

import pytest
import torch
from torch.testing import assert_close

from rlp.post.redi import CollapseAlarm, departure, redi_loss


def pairs(number=3):
    """Log-probabilities with gradient, and counts."""
    torch.manual_seed(0)
    chosen, rejected = (-5 * torch.rand(2, number, dtype=torch.float64)).unbind()
    return (
        chosen.requires_grad_(),
        torch.tensor([2, 7, 4])[:number],
        rejected.requires_grad_(),
        torch.tensor([5, 3, 1])[:number],
    )


def test_the_loss_of_two_pairs_by_hand():
    """1/2 [(6/2 - 0.5 * 8/4) + (3/3 - 0.5 * 5/1)] = 1/2 [2 - 1.5]."""
    loss = redi_loss(
        torch.tensor([-6.0, -3.0]),
        torch.tensor([2, 3]),
        torch.tensor([-8.0, -5.0]),
        torch.tensor([4, 1]),
        0.5,
    )
    assert loss.item() == 0.25


@pytest.mark.parametrize("alpha", [0.0, 0.2, 0.8, 1.0])
def test_the_gradient_is_the_closed_form(alpha):
    """-1 / (N |y_w|), and alpha / (N |y_l|)."""
    chosen, chosen_tokens, rejected, rejected_tokens = pairs()
    redi_loss(chosen, chosen_tokens, rejected, rejected_tokens, alpha).backward()
    assert_close(chosen.grad, -1 / (3 * chosen_tokens.double()))
    assert_close(rejected.grad, alpha / (3 * rejected_tokens.double()))


def test_with_alpha_1_traces_that_change_places_change_the_sign():
    chosen, chosen_tokens, rejected, rejected_tokens = pairs()
    there = redi_loss(chosen, chosen_tokens, rejected, rejected_tokens, 1.0)
    back = redi_loss(rejected, rejected_tokens, chosen, chosen_tokens, 1.0)
    assert_close(there, -back)
    assert there.item() != 0


def test_the_loss_is_a_mean_over_pairs():
    """Pairs twice, and in another order, are the same loss; it is a line in alpha."""
    given = pairs()
    loss = redi_loss(*given, 0.3)
    assert_close(redi_loss(*(torch.cat([one, one.flip(0)]) for one in given), 0.3), loss)
    assert_close(loss, 0.7 * redi_loss(*given, 0.0) + 0.3 * redi_loss(*given, 1.0))


@pytest.mark.parametrize(
    "change, alpha, said",
    [
        ({}, -0.1, "alpha must be from 0"),
        ({}, 1.1, "got 1.1"),
        ({}, float("nan"), "alpha must be from 0"),
        ({1: torch.tensor([2, 0, 4])}, 0.5, r"chosen_tokens\[1\] is 0"),
        ({3: torch.tensor([0, 3, 1])}, 0.5, r"rejected_tokens\[0\] is 0"),
        ({3: torch.tensor([5, 3])}, 0.5, r"four tensors \[N\]"),
        ({0: torch.tensor(-1.0)}, 0.5, r"four tensors \[N\]"),
        (dict.fromkeys(range(4), torch.ones(0)), 0.5, "N at least 1"),
        (dict.fromkeys(range(4), torch.ones(2, 2)), 0.5, r"four tensors \[N\]"),
        ({0: torch.tensor([-1.0, float("nan"), -1.0])}, 0.5, r"chosen_logprob\[1\] is nan"),
        ({2: torch.tensor([-1.0, -1.0, -float("inf")])}, 0.5, r"rejected_logprob\[2\] is -inf"),
    ],
)
def test_what_is_no_pair_is_refused(change, alpha, said):
    given = [change.get(index, value) for index, value in enumerate(pairs())]
    with pytest.raises(ValueError, match=said):
        redi_loss(*given, alpha)


@pytest.mark.parametrize(
    "chosen, rejected, where",
    [
        ([1, 2, 3], [1, 9, 3], 1),
        ([1, 2, 3], [9], 0),
        ([1, 2], [1, 2, 3], 2),
        ([1, 2, 3], [1, 2], None),
        ([1], [1], None),
    ],
)
def test_where_a_wrong_trace_departs(chosen, rejected, where):
    assert departure(chosen, rejected) == where


def fired(values, **named):
    """The step at which an alarm fires first; None where it stays silent."""
    alarm = CollapseAlarm(**named)
    return next((step for step, value in enumerate(values, start=1) if alarm.see(value)), None)


def test_the_alarm_stays_silent_where_right_traces_get_likelier_or_stand_still():
    """At several widths of noise between batches, and over 100 trainings of 300 steps each."""
    rng = random.Random(0)
    for noise in (0.0, 0.02, 0.3):
        for rise in (0.0, 0.002):
            for _ in range(17):
                steps = [-1.0 + rise * step + rng.gauss(0, noise) for step in range(300)]
                assert fired(steps) is None, (noise, rise)


def test_the_alarm_fires_on_a_fall_beyond_its_noise():
    """From -0.17 to -1.44 within 100 steps, at once or after 100 good ones; the same fall within
    noise of its own size is none."""
    rng = random.Random(0)
    fall = [-0.17 - 1.27 * step / 100 for step in range(100)]
    noisy = [value + rng.gauss(0, 0.05) for value in fall]
    assert 20 <= fired(noisy) <= 40
    good = [-0.5 + 0.0033 * step + rng.gauss(0, 0.05) for step in range(100)]
    assert 100 < fired(good + noisy) <= 140
    assert fired([value + rng.gauss(0, 1.5) for value in fall]) is None


def test_the_alarm_fires_at_once_on_what_is_no_number():
    assert fired([-1.0, -1.0, float("nan")]) == 3
    assert fired([-float("inf")]) == 1


def test_a_drop_is_in_nats_a_token_and_is_told():
    """A step down of 0.09 is no collapse where 0.1 is allowed, and is one where 0.05 is."""
    steps = [-1.0] * 20 + [-1.09] * 20
    assert fired(steps) is None
    alarm = CollapseAlarm(drop=0.05)
    (said, *_) = [told for told in map(alarm.see, steps) if told]
    assert "has fallen from -1.000 to -1.0" in said


@pytest.mark.parametrize("named", [{"drop": 0.0}, {"drop": float("nan")}, {"window": 1}])
def test_an_alarm_that_can_not_measure_is_refused(named):
    with pytest.raises(ValueError, match="window of 2 steps"):
        CollapseAlarm(**named)
