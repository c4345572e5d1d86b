"""What thoughts add to an accuracy: paired by question, with an interval, in words."""

import re

import pytest

from rlp.compare.gain import thought_gain


def test_the_gain_of_thinking_is_paired_by_question():
    """Whoever gains the same on every question has no error."""
    think = [
        {"task": "t", "question": q, "score": score}
        for q, score in [(0, 1.0), (0, 0.0), (1, 1.0), (1, 1.0)]
    ]
    no_think = [{"task": "t", "question": q, "score": score} for q, score in [(1, 0.5), (0, 0.0)]]
    gain = thought_gain(think, no_think)
    assert (gain.mean, gain.standard_error) == (pytest.approx(0.5), pytest.approx(0.0))
    assert (gain.low, gain.high) == (pytest.approx(0.5), pytest.approx(0.5))
    alone = thought_gain(think[:2], no_think[1:])
    assert (alone.mean, alone.standard_error, alone.low) == (pytest.approx(0.5), None, None)


@pytest.mark.parametrize(
    "count, right, said",
    [
        (29, 29, "no verdict: 29 questions, and intervals over fewer than 30"),
        (30, 30, r"thoughts help: \+100\.00 points \(95 % percentile bootstrap over questions, 30"),
        (40, 20, "thoughts help"),
        (40, -20, "thoughts harm: -50.00 points"),
        (40, 1, "no effect of thoughts can be told"),
        (40, 0, "no effect of thoughts can be told"),
    ],
)
def test_a_verdict_needs_thirty_questions_and_an_interval_without_zero(count, right, said):
    """`right` questions are answered with a thought alone, or, below zero, without one alone."""

    def rows(num_right: int) -> list[dict]:
        return [{"task": "t", "question": q, "score": float(q < num_right)} for q in range(count)]

    assert re.match(said, thought_gain(rows(max(right, 0)), rows(max(-right, 0))).verdict)
