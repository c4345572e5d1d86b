"""What is wrong with a run, told from the numbers of its steps: thoughts that collapse, are never
closed or harm, and a sampler that is not the policy that is trained.
"""

import math
from dataclasses import dataclass

import torch

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

    def holds(self, value: float) -> bool:
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


@dataclass(frozen=True, slots=True)
class Mismatch:
    """How far sampler and trainer may be apart where they hold the same weights, in nats, at
    temperature 1."""

    largest: float
    """Of |log rho| over all tokens of a step: above it, an alarm."""
    kl: float
    """Mean of rho - 1 - log rho, about half the mean square of log rho: above it, an alarm."""


MISMATCH = {
    torch.float32: Mismatch(largest=1e-3, kl=1e-6),
    torch.bfloat16: Mismatch(largest=1.0, kl=1e-3),
}
"""What rounding alone stays below, by compute dtype.

float32: log-probabilities of one policy computed in two ways differ by 1e-5 at most on the tested
architectures; a hundred times that is no rounding, and a KL of 1e-6 is that of 1.4e-3 at every
token.

bfloat16 has 8 bits: a hidden state is rounded by up to 2^-9 of its size in each of the operations
on its way, and logits of size 10 to 20 move by some hundredths of a nat. A KL of 1e-3 is that of
0.045 nats rms; a pretrained model of 135 million parameters has 0.027 (3.5e-4). The largest of a
million such errors is about 5 rms, 0.2 nats, and unlikely tokens err more: a factor of e in a
probability is no rounding.

At a temperature T the error of a logit counts 1 / T, and its square in a KL."""

END_KL = 1e-2
"""Mean of rho - 1 - log rho, at temperature 1, above which a run ends in any dtype: 0.14 nats rms
at every token. What is trained then is not the policy that was sampled from."""


MISMATCH_METRICS = ("policy/behavior_mismatch_kl", "policy/behavior_mismatch_max")
"""What `mismatch_of` reads."""


def mismatch_of(
    means: dict[str, float], dtype: torch.dtype, temperature: float
) -> tuple[str, bool] | None:
    """What is wrong with the ratios of a step before its first update, in words, and whether the
    run has to end.

    None where they are those of rounding, or not finite: an update from those is refused with words
    of its own.

    Args:
        temperature: that thoughts are sampled at.
    """
    at_one = MISMATCH[dtype]
    limit = Mismatch(at_one.largest / temperature, at_one.kl / temperature**2)
    kl = means.get("policy/behavior_mismatch_kl", 0.0)
    largest = means.get("policy/behavior_mismatch_max", 0.0)
    if not (math.isfinite(kl) and math.isfinite(largest)):
        return None
    if kl <= limit.kl and largest <= limit.largest:
        return None

    words = (
        "sampler and trainer hold the same weights, and their log-probabilities of thought tokens"
        f" differ by up to {largest:.3g} nats (expected at most {limit.largest:.3g} in"
        f" {str(dtype).removeprefix('torch.')}), with a KL of {kl:.3g} nats a token (at most"
        f" {limit.kl:.3g})"
    )
    return words, kl > END_KL / temperature**2


class Watch:
    """Sees the numbers of every step, and says once each: thoughts have collapsed, are never
    closed, or harm."""

    def __init__(self) -> None:
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
                alarms.append(self._see_streak(name, streak, values[streak.metric]))
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

    def _see_streak(self, name: str, streak: Streak, value: float) -> str | None:
        self._streaks[name] = [*self._streaks[name], value] if streak.holds(value) else []
        if len(self._streaks[name]) < STREAK_STEPS:
            return None
        self._said.append(name)
        return streak.words.format(abs(sum(self._streaks[name]) / STREAK_STEPS), STREAK_STEPS)

    def state(self) -> dict:
        """What a checkpoint holds of it, so that a resumed run says nothing a second time."""
        return {
            "first": self._first,
            "collapsed": self._collapsed,
            "streaks": self._streaks,
            "said": self._said,
        }

    def load_state(self, state: dict) -> None:
        self._first, self._collapsed = list(state["first"]), state["collapsed"]
        self._streaks = {name: list(state["streaks"].get(name, [])) for name in STREAKS}
        self._said = list(state["said"])
