"""Whether a checkpoint's thoughts give a reward to learn from, in words.

Where thoughts of one position predict alike, or a thought does no better than one about another
document, the reward has nothing to select, and training selects noise.
"""

import math

from rlp.config import Config
from rlp.measure.decomposition import Decomposition

MIN_DOCUMENTS = 30
"""Documents that a verdict needs: percentile intervals of fewer hold the mean in 80 to 89 % of the
cases where they say 95."""

MIN_GAINING_FRAC = 0.05
"""Of positions, the lower end of its interval: where fewer gain, there is nothing to select.
Ours."""

FORMAT_SHARE = 0.5
"""Of the gain, or the harm, of thinking: what an empty thought has to explain for the format to be
named as its cause. Ours."""

FLAT_GROUP_NATS = 1e-4
"""Spread of reward within groups below which advantages are rounding."""


def signal_in_words(found: Decomposition, config: Config) -> list[str]:
    """Whether there is signal; whether thoughts are on topic, and whether there is something to
    select; what they are worth; and what usually helps where there is no signal."""
    obstacle = _no_verdict(found)
    sentences = [obstacle] if obstacle else [_signal(found), _topic(found), _selection(found)]
    sentences += [_worth(found), *_format(found), *_cautions(found)]
    if not has_signal(found):
        sentences += _advice(found, config)
    return sentences


def has_signal(found: Decomposition) -> bool:
    """Whether thoughts are about their own text, some of them gain, and siblings differ."""
    if _no_verdict(found):
        return False
    return _is_on_topic(found) and _some_gain(found) and _siblings_differ(found)


def _no_verdict(found: Decomposition) -> str | None:
    """Why nothing can be said of the signal; None where something can."""
    documents = len(found.panel.documents)
    if documents < MIN_DOCUMENTS:
        return (
            f"No verdict: the panel holds {documents} document{'s' * (documents > 1)}, and below"
            f" {MIN_DOCUMENTS} intervals are too short to be trusted. Give it more documents, and"
            " write a larger evaluation.panel_positions."
        )
    if "reward_group_std_nats" not in found.means:
        return (
            "No verdict: one thought at each position has no siblings to be compared with. Write"
            " evaluation.thoughts_per_position=4."
        )
    return None


def _is_on_topic(found: Decomposition) -> bool:
    """Whether thoughts predict their own targets better than those of another document do."""
    return found.intervals["gain_over_shuffled_nats"][0] > 0


def _some_gain(found: Decomposition) -> bool:
    return found.intervals["positive_gain_frac"][0] >= MIN_GAINING_FRAC


def _siblings_differ(found: Decomposition) -> bool:
    return found.means["reward_group_std_nats"] > FLAT_GROUP_NATS


def _signal(found: Decomposition) -> str:
    if has_signal(found):
        return (
            "SIGNAL: thoughts are about their own text, some of them gain, and siblings differ:"
            " there is something to select."
        )
    if not _siblings_differ(found):
        return "NO SIGNAL: the thoughts of a position all predict alike, so every advantage is 0."
    if not _is_on_topic(found):
        return (
            "NO SIGNAL: thoughts can not be told from those of another document, so what is"
            " selected is chance."
        )
    return (
        "NO SIGNAL: thoughts are about their own text, and all but none of them gains: what is"
        " selected is the lesser harm."
    )


def _topic(found: Decomposition) -> str:
    gain = found.means["gain_over_shuffled_nats"]
    low, high = found.intervals["gain_over_shuffled_nats"]
    if low > 0:
        said = "yes, a"
    elif high < 0:
        said = "no, another document's is the better one; a"
    else:
        said = "not as far as this panel can see; a"
    return (
        f"On topic: {said} thought predicts its own target {gain:+.3f} nats (interval {low:+.3f} to"
        f" {high:+.3f}) better than the thoughts of another document do."
    )


def _selection(found: Decomposition) -> str:
    gaining, (low, high) = found.means["positive_gain_frac"], found.intervals["positive_gain_frac"]
    said = "yes" if _some_gain(found) and _siblings_differ(found) else "no"
    return (
        f"Something to select: {said}, thoughts gain at {gaining:.0%} of the positions (interval"
        f" {low:.0%} to {high:.0%}, its lower end has to be {MIN_GAINING_FRAC:.0%}), and siblings"
        f" differ by {found.means['reward_group_std_nats']:.2g} nats."
    )


def _worth(found: Decomposition) -> str:
    means = found.means
    low, high = found.intervals.get("gain_over_no_think_nats", (-math.inf, math.inf))
    effect = "helps" if low > 0 else "harms" if high < 0 else "neither clearly helps nor harms"
    return (
        f"Thinking {effect}: {means['gain_over_no_think_nats']:+.3f} nats against no thought and"
        f" {means['gain_over_empty_nats']:+.3f} against an empty one."
    )


def _format(found: Decomposition) -> list[str]:
    """Where an empty thought explains most of what thinking gains or costs, that it does: then the
    words of a thought do not.

        S_pred - S_no_think = (S_pred - S_empty) + (S_empty - S_no_think)
    """
    gain = found.means["gain_over_no_think_nats"]
    low, high = found.intervals.get("gain_over_no_think_nats", (-math.inf, math.inf))
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
    correlation = means.get("reward_length_correlation", 0.0)
    low, high = found.intervals.get("reward_length_correlation", (0.0, 0.0))
    if abs(correlation) > 0.1 and (low > 0 or high < 0):
        better, will = ("Longer", "lengthen") if correlation > 0 else ("Shorter", "shorten")
        sentences.append(
            f"{better} thoughts predict better (correlation {correlation:+.2f}): the first updates"
            f" will {will} thoughts."
        )
    if means["thought_truncated_frac"] > 0.5:
        sentences.append(
            f"{means['thought_truncated_frac']:.0%} of the thoughts were left unclosed and closed"
            " by force: the model does not end its thoughts within the budget."
        )
    if means["thought_empty_frac"] > 0.5:
        sentences.append(f"{means['thought_empty_frac']:.0%} of the thoughts are empty.")
    return sentences


def _advice(found: Decomposition, config: Config) -> list[str]:
    """What is missing most often first, the rest in the order of what it costs to try."""
    lines = [
        "What usually helps:",
        "  a warm start: train first on documents with thoughts between the markers, then probe"
        " again (docs/warm_start.md)",
    ]
    differ = found.means.get("reward_group_std_nats", 0.0) > FLAT_GROUP_NATS
    if differ and found.means.get("gain_over_shuffled_nats", 0.0) > 0:
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
