"""What is wrong with a run, told from the numbers of its steps: thoughts that collapse, alone or
onto one another, are never closed, harm, or begin to mix scripts or to leave that of the text.
"""

import math
from dataclasses import dataclass

COLLAPSE_STEPS = 10
"""Steps whose mean thought length is what later ones are held against."""

COLLAPSE_FRACTION = 0.2
"""Mean thought length, as a fraction of that of the first steps, below which thoughts have
collapsed."""


@dataclass(frozen=True, slots=True)
class Streak:
    """What is wrong with a run when it is so in `STREAK_STEPS` steps in a row."""

    metric: str
    worst: float
    """The value that the metric reaches then."""
    above: bool
    """Whether it is wrong from that value up, or down."""
    words: str
    """What is wrong, with places for the size of the mean of those steps and for their number, and
    what to do."""

    unless: tuple[str, float] | None = None
    """Another metric and the value from which on it is not wrong."""

    def holds(self, values: dict[str, float]) -> bool:
        """Of a step that measured the metric."""
        if self.unless is not None and values.get(self.unless[0], -math.inf) >= self.unless[1]:
            return False
        value = values[self.metric]
        return value >= self.worst if self.above else value <= self.worst


STREAK_STEPS = 5
"""Steps that measured a metric; a step that did not is passed over."""

STREAKS = {
    "truncated": Streak(
        "thought/truncated_frac",
        0.95,
        True,
        "the budget ended {0:.0%} of the thoughts of the last {1} steps: the model does not know"
        " how a thought ends. Warm it on text with thoughts in it (docs/warm_start.md), or raise"
        " thought.max_thought_tokens if its thoughts are long.",
    ),
    "alike": Streak(
        "thought/duplicates_frac",
        0.95,
        True,
        "siblings have collapsed onto one another: {0:.0%} of the pairs of thoughts of a position"
        " in the last {1} steps were the same, token for token, and not nearly all of them help, so"
        " eq. 7 compares a thought with itself and nothing better is found. Go back to a checkpoint"
        " where they differed, and raise thought.temperature (docs/diversity.md).",
        # Where a task has one right thought and all have found it, nothing is wrong.
        unless=("gain/positive_frac", 0.9),
    ),
    "harm": Streak(
        "gain/mean",
        -1.0,
        False,
        "thinking harms: over the last {1} steps a thought cost {0:.2f} nats on average, so"
        " siblings are compared by how little harm they do. Ask `rlp probe` whether the markers"
        " alone do it, and warm the model on text with thoughts in it (docs/warm_start.md).",
    ),
}
"""By name in a checkpoint. The limits are ours."""


RISE = 0.1
"""How much above its mean over the first `COLLAPSE_STEPS` steps a fraction has risen, when it is so
in `STREAK_STEPS` steps in a row. Ours."""

RISES = {
    "mixing": (
        "thought/mixed_scripts_frac",
        "thoughts mix scripts: {0:.0%} of them over the last {1} steps, {2:.0%} over the first"
        " {3}. Mixing is paid by the reward as it stands: look at them with `rlp view`, and see"
        " reward.language_weight.",
    ),
    "leaving": (
        "thought/script_switch_frac",
        "thoughts leave the script of the text: {0:.0%} of them over the last {1} steps, {2:.0%}"
        " over the first {3}. Look at them with `rlp view`, and see reward.language_weight.",
    ),
}
"""By name in a checkpoint: the metric, and what is wrong where it rises."""


class Watch:
    """Sees the numbers of every step, and says once each: thoughts have collapsed, alone or onto
    one another, are never closed, harm, mix scripts, or leave that of the text."""

    def __init__(self) -> None:
        self._starts: dict[str, list[float]] = {name: [] for name in RISES}
        self._risen: dict[str, list[float]] = {name: [] for name in RISES}
        self._first: list[float] = []
        self._collapsed = False
        self._streaks: dict[str, list[float]] = {name: [] for name in STREAKS}
        self._said: list[str] = []

    def see(self, values: dict[str, float], *, has_baseline: bool = True) -> list[str]:
        """The alarms of a step.

        Args:
            values: metrics of the step; what it did not measure is absent.
            has_baseline: whether the reward is a gain over a prediction without a thought.
        """
        length = values.get("thought/tokens_mean")
        alarms = [] if length is None else [self._see_length(length)]
        for name, streak in STREAKS.items():
            counts = name not in self._said and (has_baseline or name != "harm")
            if counts and streak.metric in values:
                alarms.append(self._see_streak(name, streak, values))
        for name, (metric, _) in RISES.items():
            if name not in self._said and metric in values:
                alarms.append(self._see_rise(name, values[metric]))
        return [alarm for alarm in alarms if alarm]

    def _see_length(self, tokens_mean: float) -> str | None:
        """At the first step after `COLLAPSE_STEPS` whose mean is below `COLLAPSE_FRACTION` of
        theirs."""
        if len(self._first) < COLLAPSE_STEPS:
            self._first.append(tokens_mean)
            return None
        start = sum(self._first) / COLLAPSE_STEPS
        if self._collapsed or tokens_mean >= COLLAPSE_FRACTION * start:
            return None
        self._collapsed = True
        return (
            f"thoughts have collapsed: {tokens_mean:.1f} tokens on average, {start:.1f} over the"
            f" first {COLLAPSE_STEPS} steps. Short thoughts earn more here than long ones: see"
            " reward/length_correlation, and whether the base model gains from thinking at all."
        )

    def _see_streak(self, name: str, streak: Streak, values: dict[str, float]) -> str | None:
        held = [*self._streaks[name], values[streak.metric]] if streak.holds(values) else []
        self._streaks[name] = held
        if len(held) < STREAK_STEPS:
            return None
        self._said.append(name)
        return streak.words.format(abs(sum(held) / STREAK_STEPS), STREAK_STEPS)

    def _see_rise(self, name: str, value: float) -> str | None:
        """At the `STREAK_STEPS`th step in a row that is `RISE` above the mean of the first
        `COLLAPSE_STEPS`."""
        first, risen = self._starts[name], self._risen[name]
        if len(first) < COLLAPSE_STEPS:
            first.append(value)
            return None
        start = sum(first) / COLLAPSE_STEPS
        self._risen[name] = risen = [*risen, value] if value >= start + RISE else []
        if len(risen) < STREAK_STEPS:
            return None
        self._said.append(name)
        mean, words = sum(risen) / STREAK_STEPS, RISES[name][1]
        return words.format(mean, STREAK_STEPS, start, COLLAPSE_STEPS)

    def state(self) -> dict:
        """What a checkpoint holds of it, so that a resumed run says nothing a second time."""
        return {
            "first": self._first,
            "collapsed": self._collapsed,
            "streaks": self._streaks,
            "said": self._said,
            "starts": self._starts,
            "risen": self._risen,
        }

    def load_state(self, state: dict) -> None:
        self._first, self._collapsed = list(state["first"]), state["collapsed"]
        self._streaks = {name: list(state["streaks"].get(name, [])) for name in STREAKS}
        self._said = list(state["said"])
        # A checkpoint made before these were watched has none of them: they begin anew.
        starts, risen = state.get("starts", {}), state.get("risen", {})
        self._starts = {name: list(starts.get(name, [])) for name in RISES}
        self._risen = {name: list(risen.get(name, [])) for name in RISES}
