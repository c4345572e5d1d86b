"""Whether a checkpoint's thoughts give a reward to learn from, in words.

Training selects among the thoughts of a position. There is something to select where a thought that
is chosen by one half of the target tokens predicts the other half better than no thought does; the
best of G by the tokens that it is scored on gains even where thoughts are noise. With a horizon of
1 there are no halves, so no target chooses: a thought taken by lot, or the one after which the
model is surest of its next token, has to gain. What an average
thought is worth, and whether thoughts are about their own text, are told beside it: a thought can
be on topic and cost more than it gives.
"""

from rlp.config import Config
from rlp.measure.decomposition import Decomposition
from rlp.measure.verdict import LEAST_DOCUMENTS

BY_HALVES = "cross_selected_gain_nats"

CHOICES = {
    BY_HALVES: "a thought chosen by the other half of the target tokens",
    "gain_over_no_think_nats": "a thought taken by lot",
    "surest_thought_gain_nats": "the thought after which the model is surest of its next token",
}
"""How a thought is chosen that is scored on what did not choose it."""

OVER_EMPTY = {
    BY_HALVES: "cross_selected_over_empty_nats",
    "gain_over_no_think_nats": "gain_over_empty_nats",
    "surest_thought_gain_nats": "surest_thought_over_empty_nats",
}
"""What the same thought gains over an empty one."""

FORMAT_SHARE = 0.5
"""Of the gain, or the harm, of thinking: what an empty thought has to explain for the format to be
named as its cause. Ours."""

FLAT_GROUP_NATS = 1e-4
"""Spread of reward within groups below which advantages are rounding."""


def signal_in_words(found: Decomposition, config: Config) -> list[str]:
    """Whether there is something to select; what thoughts are worth on average; whether they are on
    topic; and what usually helps where there is no signal."""
    obstacle = _no_verdict(found)
    if obstacle:
        return [obstacle, _average(found), *_cautions(found), *_advice(found, config)]
    sentences = [_signal(found), *_how_chosen(found), _worth(found), _topic(found)]
    sentences += [*_format(found), *_cautions(found), *_length(found)]
    return sentences if has_signal(found) else [*sentences, *_advice(found, config)]


def has_signal(found: Decomposition) -> bool:
    """Whether a chosen thought gains over no thought and over an empty one, and siblings differ."""
    if _no_verdict(found):
        return False
    return _siblings_differ(found) and _least(found, _best_choice(found)) > 0


def _no_verdict(found: Decomposition) -> str | None:
    """Why nothing can be said of the signal; None where something can."""
    documents = len(found.panel.documents)
    if documents < LEAST_DOCUMENTS:
        return (
            f"No verdict: the panel holds {documents} document{'s' * (documents > 1)}, and below"
            f" {LEAST_DOCUMENTS} intervals are too short to be trusted. Give it more documents, and"
            " write a larger evaluation.panel_positions."
        )
    if "reward_group_std_nats" not in found.means:
        return (
            "No verdict: one thought at each position has no siblings to be compared with. Write"
            " evaluation.thoughts_per_position=4."
        )
    return None


def _choices(found: Decomposition) -> list[str]:
    """What the verdict rests on; of two, one is enough, and each has its error of 2.5 %."""
    if BY_HALVES in found.means:
        return [BY_HALVES]
    return [name for name in CHOICES if name in found.intervals]


def _best_choice(found: Decomposition) -> str:
    return max(_choices(found), key=lambda name: _least(found, name))


def _least(found: Decomposition, name: str) -> float:
    """Lower end of what a choice gains over the better of no thought and an empty one."""
    return min(found.intervals[one][0] for one in (name, OVER_EMPTY[name]))


def _siblings_differ(found: Decomposition) -> bool:
    return found.means["reward_group_std_nats"] > FLAT_GROUP_NATS


def _signal(found: Decomposition) -> str:
    if not _siblings_differ(found):
        return "NO SIGNAL: the thoughts of a position all predict alike, so every advantage is 0."
    name = _best_choice(found)
    gain, empty = _with_interval(found, name), _with_interval(found, OVER_EMPTY[name])
    worth = f"{CHOICES[name]} is worth {gain} against no thought and {empty} against an empty one"
    if _least(found, name) > 0:
        return f"SIGNAL: there is something to select: {worth}."
    if all(found.intervals[choice][1] < 0 for choice in _choices(found)):
        return f"NO SIGNAL: what is selected is the lesser harm: {worth}."
    if found.intervals[name][0] > 0:
        return f"NO SIGNAL: the markers gain by themselves, which all thoughts share: {worth}."
    return f"NO SIGNAL: nothing to select that this panel can see: {worth}."


def _with_interval(found: Decomposition, name: str) -> str:
    low, high = found.intervals[name]
    return f"{found.means[name]:+.3f} nats (interval {low:+.3f} to {high:+.3f})"


def _how_chosen(found: Decomposition) -> list[str]:
    """With a horizon of 1, why no target chooses."""
    if BY_HALVES in found.means:
        return []
    return [
        "With a horizon of 1 no target chooses, as one token can not both choose a thought and"
        " judge it: what is judged is a thought taken by lot, and the one after which the model is"
        " surest. target.horizon=2 or more lets one half of the targets choose."
    ]


def _topic(found: Decomposition) -> str:
    gain = found.means["gain_over_shuffled_nats"]
    low, high = found.intervals["gain_over_shuffled_nats"]
    if low > 0:
        said = "yes, which alone is no reward: a"
    elif high < 0:
        said = "no, another document's is the better one; a"
    else:
        said = "not as far as this panel can see; a"
    return (
        f"On topic: {said} thought predicts its own target {gain:+.3f} nats (interval {low:+.3f} to"
        f" {high:+.3f}) better than the thoughts of another document do."
    )


def _worth(found: Decomposition) -> str:
    low, high = found.intervals["gain_over_no_think_nats"]
    effect = "helps" if low > 0 else "harms" if high < 0 else "neither clearly helps nor harms"
    return f"Thinking {effect} on average. {_average(found)}"


def _average(found: Decomposition) -> str:
    means = found.means
    return (
        f"An average thought is worth {means['gain_over_no_think_nats']:+.3f} nats against no"
        f" thought and {means['gain_over_empty_nats']:+.3f} against an empty one."
    )


def _format(found: Decomposition) -> list[str]:
    """Where an empty thought explains most of what thinking gains or costs, that it does: then the
    words of a thought do not.

        S_pred - S_no_think = (S_pred - S_empty) + (S_empty - S_no_think)
    """
    gain = found.means["gain_over_no_think_nats"]
    low, high = found.intervals["gain_over_no_think_nats"]
    of_format = gain - found.means["gain_over_empty_nats"]
    if low <= 0 <= high or of_format / gain < FORMAT_SHARE:
        return []
    if gain > 0:
        return [
            f"The markers do it: an empty thought, the two markers alone, gains {of_format:.2f}"
            f" nats, thinking {gain:.2f}. The words of a thought add little."
        ]
    won = gain - of_format
    words = f", of which the words of a thought win back {won:.2f}" if won > 0 else ""
    return [
        f"The markers do the harm: an empty thought, the two markers alone, costs {-of_format:.2f}"
        f" nats{words}, thinking {-gain:.2f}. The model has not learned that after the close"
        " marker the text goes on; a warm start teaches it (docs/warm_start.md)."
    ]


def _cautions(found: Decomposition) -> list[str]:
    means, sentences = found.means, []
    if means["thought_truncated_frac"] > 0.5:
        sentences.append(
            f"{means['thought_truncated_frac']:.0%} of the thoughts were left unclosed and closed"
            " by force: the model does not end its thoughts within the budget."
        )
    if means["thought_empty_frac"] > 0.5:
        sentences.append(f"{means['thought_empty_frac']:.0%} of the thoughts are empty.")
    return sentences


def _length(found: Decomposition) -> list[str]:
    """What the first updates do to the length of thoughts, where that is clear."""
    correlation = found.means.get("reward_length_correlation", 0.0)
    low, high = found.intervals.get("reward_length_correlation", (0.0, 0.0))
    if abs(correlation) <= 0.1 or low <= 0 <= high:
        return []
    better, will = ("Longer", "lengthen") if correlation > 0 else ("Shorter", "shorten")
    return [
        f"{better} thoughts predict better (correlation {correlation:+.2f}): the first updates"
        f" will {will} thoughts."
    ]


def _advice(found: Decomposition, config: Config) -> list[str]:
    """What is missing most often first, the rest in the order of what it costs to try."""
    lines = [
        "What usually helps:",
        "  a warm start: train first on documents with thoughts between the markers, then probe"
        " again (docs/warm_start.md)",
    ]
    if any(found.means[name] > 0 for name in _choices(found)):
        lines.append(
            "  a larger panel, if the signal is only small:"
            f" evaluation.panel_positions={4 * config.evaluation.panel_positions}"
        )
    if config.position.selector != "marker":
        lines.append(
            "  positions where a thought can matter, such as those before an answer:"
            " position.selector=marker position.marker=TEXT"
        )
    if config.target.horizon == 1:
        lines.append(
            "  a longer horizon, so that the reward is not the luck of one token: target.horizon=16"
        )
    if config.thought.max_thought_tokens < 2048:
        lines.append(
            "  a larger budget on real text: thought.max_thought_tokens=2048; budgets of 64 to 512"
            " tokens did harm in the paper (Table S.1)"
        )
    return lines
