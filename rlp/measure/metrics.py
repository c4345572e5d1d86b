"""The numbers of a run: the name, unit and definition of each.

`METRICS` are those of a step, `EVALUATION` those of the held-out panel; a name that is in neither
can not be logged. What is rewarded is what `reward/*` says, whatever the reward is; the information
gain of the same thoughts is beside it as `gain/*`, in nats.

Averages are over all ranks: means of a step are sums over all its thoughts (or positions, or
tokens) divided by their number.
"""

import difflib
import math
from typing import NamedTuple


class Metric(NamedTuple):
    """What a number is."""

    unit: str
    """Empty for a pure number; `fraction` is from 0 to 1."""
    definition: str


METRICS: dict[str, Metric] = {
    "reward/mean": Metric(
        "nats",
        "Mean reward of the step's thoughts: what eq. 7 is fed. It is the information gain r(c) ="
        " S_pred(c) - S_ema (eq. 5), in nats; with reward.kind greedy_match 1 or 0, whether the"
        " targets are the most probable tokens, with prefix_match and exact_match whether the"
        " prediction is right; with a reward of one's own (package.module:name)"
        " what that gives, in a unit of its own; with reward.placebo what the placebo gives the"
        " thought, and not what it earned. With reward.language_weight above 0 it is all of this"
        " and reward/language. What the thoughts gained is gain/mean.",
    ),
    "reward/positive_frac": Metric("fraction", "Thoughts with a reward above 0."),
    "reward/positive_positions_frac": Metric(
        "fraction", "Positions where the mean reward of the group is above 0."
    ),
    "reward/flat_groups_frac": Metric(
        "fraction",
        "Groups whose rewards are all equal, to 1e-5: their advantages are 0, and there is nothing"
        " to learn from them.",
    ),
    "reward/group_std": Metric(
        "nats",
        "Mean over positions of the standard deviation of the reward within the group, in its unit."
        " Zero means nothing to learn.",
    ),
    "reward/length_correlation": Metric(
        "",
        "Within-group correlation of thought length and reward: covariance and variances about each"
        " group's mean, pooled. Left out where one does not vary.",
    ),
    "reward/language": Metric(
        "nats",
        "Mean of reward.language_weight * share, in the unit of the reward: what the step's own"
        " thoughts earned for letters of reward.script. Part of what eq. 7 is fed; left out where"
        " the weight is 0.",
    ),
    "gain/mean": Metric(
        "nats",
        "Mean information gain r(c) = S_pred(c) - S_ema of the step's own thoughts (eq. 5),"
        " whatever they are rewarded for. Left out where the baseline was not scored.",
    ),
    "gain/positive_frac": Metric(
        "fraction", "Thoughts with a gain above 0: the target became more probable."
    ),
    "gain/positive_positions_frac": Metric(
        "fraction", "Positions where the mean gain of the group is above 0."
    ),
    "thought/tokens_mean": Metric(
        "tokens", "Mean number of sampled tokens in a thought, the close marker not counted."
    ),
    "thought/tokens_std": Metric(
        "tokens", "Standard deviation of that length over all thoughts of the step."
    ),
    "thought/truncated_frac": Metric(
        "fraction", "Thoughts that the budget ended before they sampled a close marker."
    ),
    "thought/max_length_frac": Metric(
        "fraction",
        "Thoughts that used their whole budget: the truncated ones, and those that closed with its"
        " last token.",
    ),
    "thought/empty_frac": Metric("fraction", "Thoughts that sampled the close marker at once."),
    "thought/distinct_bigrams_frac": Metric(
        "fraction",
        "Different pairs of neighbouring tokens over all such pairs in a group's thoughts, mean"
        " over groups. Near 1: no two thoughts agree. A fall says that thoughts become one"
        " template.",
    ),
    "thought/duplicates_frac": Metric(
        "fraction",
        "Pairs of sibling thoughts (of one position) that are the same, token for token. At 1 all"
        " of a group are one thought, and eq. 7 has nothing to compare.",
    ),
    "thought/sibling_overlap_frac": Metric(
        "fraction",
        "Of a thought's different pairs of neighbouring tokens, those that another thought of its"
        " position has too; mean over siblings and thoughts. Thoughts of fewer than two tokens are"
        " left out.",
    ),
    "thought/copied_frac": Metric(
        "fraction",
        "Runs of 4 tokens of thoughts that also stand in the prefix: copying of the context.",
    ),
    "thought/holds_target_frac": Metric(
        "fraction",
        "Thoughts in which the target tokens stand in a row, anywhere. Expected where a right"
        " thought ends in the answer; frequent tokens are met by chance.",
    ),
    "thought/script_switch_frac": Metric(
        "fraction",
        "Thoughts most of whose letters are of another script (Latin, Cyrillic, CJK) than most"
        " letters of the prefix, among those where both have letters.",
    ),
    "thought/script_purity_frac": Metric(
        "fraction",
        "Mean share of a thought's letters that are of its most frequent script, among thoughts"
        " with letters; Han and Japanese kana count as one script. 1: no thought mixes.",
    ),
    "thought/mixed_scripts_frac": Metric(
        "fraction",
        "Thoughts with letters of more than one script, among those with letters. What rises here"
        " is raised as an alarm.",
    ),
    "thought/script_switches": Metric(
        "switches",
        "Mean number of neighbouring letters of different scripts in a thought, digits, signs and"
        " spaces passed over, among thoughts with letters.",
    ),
    "thought/target_script_frac": Metric(
        "fraction",
        "Mean share of a thought's letters that are of reward.script, among thoughts with letters;"
        " where a script is named.",
    ),
    "policy/entropy": Metric(
        "nats per token",
        "Mean entropy of the distributions that thought tokens were sampled from, at the sampling"
        " temperature. Left out where the sampler does not see the whole distribution (vLLM).",
    ),
    "policy/ratio_max_deviation": Metric(
        "",
        "Largest |rho_u - 1| over thought tokens (eq. 8) and the updates of the step. Zero"
        " on-policy, up to rounding.",
    ),
    "policy/behavior_mismatch_kl": Metric(
        "nats per token",
        "KL of the sampler to the trainer on sampled tokens before the first update of the step,"
        " where both hold the same weights: mean of rho - 1 - log rho. Anything but rounding is a"
        " mismatch.",
    ),
    "policy/behavior_mismatch_max": Metric(
        "nats", "Largest |log rho_u| over thought tokens before the first update of the step."
    ),
    "policy/clip_frac": Metric(
        "fraction", "Thought tokens whose ratio lies outside 1 - clip_low .. 1 + clip_high."
    ),
    "policy/open_marker_mass": Metric(
        "probability",
        "Mean probability that the policy gives the open marker's first token where a thought may"
        " start; it is left out of target softmaxes.",
    ),
    "policy/reasoned_logprob": Metric(
        "nats", "Mean S_pred: log-probability of the target after a thought (eq. 3)."
    ),
    "baseline/logprob": Metric(
        "nats",
        "Mean S_ema: log-probability of the target without a thought, under the baseline (eq. 4).",
    ),
    "kl/start": Metric(
        "nats per token",
        "KL of the policy to the starting checkpoint on thought tokens (k3 estimator); where"
        " objective.kl_weight is above 0.",
    ),
    "lm/loss": Metric(
        "nats per token", "Next-token loss of the policy on the step's documents, without thoughts."
    ),
    "teacher/distance": Metric(
        "relative", "||phi - theta|| / ||theta||: how far the EMA lags behind the policy."
    ),
    "optim/grad_norm": Metric("", "Global norm of the gradient before clipping."),
    "optim/learning_rate": Metric("", "Learning rate of the step."),
    "optim/skipped": Metric(
        "updates",
        "Updates refused so far because a loss, reward, log-probability, ratio or gradient was not"
        " finite on some rank.",
    ),
    "optim/spikes": Metric(
        "updates",
        "Updates refused so far because their gradient was too large; where optim.spike_factor is"
        " above 0.",
    ),
    "data/bad_documents": Metric(
        "documents", "Documents skipped so far as unreadable, empty or too short."
    ),
    "budget/tokens": Metric("tokens", "Document tokens read so far, over all ranks."),
    "budget/flops": Metric("FLOPs", "FLOPs spent so far by the ledger's count, over all ranks."),
    "perf/thought_tokens_per_s": Metric(
        "tokens per second", "Sampled thought tokens per second of sampling, over all ranks."
    ),
    "perf/step_s": Metric("seconds", "Duration of the step."),
    "perf/tokens_per_s": Metric(
        "tokens per second",
        "Document tokens read and thought tokens sampled in the step, over all ranks, per second of"
        " the step.",
    ),
    "perf/left_s": Metric(
        "seconds",
        "What the budget leaves, at the pace of the last steps (`Pace`), evaluations and"
        " checkpoints not counted.",
    ),
    "perf/peak_memory_bytes": Metric(
        "bytes",
        "Largest memory allocated on a device during the step, over all ranks; on a CPU, the"
        " largest resident set so far.",
    ),
}

EVALUATION: dict[str, Metric] = {
    "gain_over_start_nats": Metric(
        "nats",
        "Mean S_pred minus the log-probability that the starting checkpoint gave the same targets"
        " without a thought. It can not be raised by getting worse without thoughts.",
    ),
    "gain_over_ema_nats": Metric("nats", "Mean S_pred minus S_ema, the reward's own baseline."),
    "gain_over_no_think_nats": Metric(
        "nats", "Mean S_pred minus the policy's own log-probability without a thought."
    ),
    "gain_over_empty_nats": Metric(
        "nats",
        "Mean S_pred minus the policy's own log-probability after an open and a close marker: what"
        " the words of a thought add to its format.",
    ),
    "gain_over_shuffled_nats": Metric(
        "nats",
        "Mean S_pred minus the policy's own log-probability after the thoughts of another document:"
        " what a thought owes to its own prefix. Left out for a panel of one document.",
    ),
    "cross_selected_gain_nats": Metric(
        "nats",
        "What the best of a position's thoughts gains over the policy's own no-think prediction,"
        " chosen by one half of the target tokens and scored on the other, each half in turn: what"
        " there is to select. Left out with a horizon of 1, where choosing and scoring would be the"
        " same, and for one thought a position.",
    ),
    "cross_selected_over_empty_nats": Metric(
        "nats",
        "What the same thought gains over an empty one: an open and a close marker, which all"
        " thoughts share.",
    ),
    "surest_thought_gain_nats": Metric(
        "nats",
        "What that thought of a position gains over the policy's own no-think prediction after"
        " which the policy gives its most probable next token the largest probability: chosen"
        " without the target. Left out for one thought a position.",
    ),
    "surest_thought_over_empty_nats": Metric(
        "nats", "What the same thought gains over an empty one."
    ),
    "surest_thought_accuracy": Metric(
        "fraction", "The most probable token is the target, after that thought."
    ),
    "positive_gain_frac": Metric(
        "fraction", "Positions whose mean gain over the starting checkpoint is above 0."
    ),
    "accuracy_with_thought": Metric(
        "fraction", "The most probable token is the target, after a thought; mean over thoughts."
    ),
    "accuracy_without_thought": Metric(
        "fraction", "The most probable token is the target, without a thought."
    ),
    "thought_tokens_mean": Metric(
        "tokens", "Mean length of a thought, its close marker not counted."
    ),
    "thought_truncated_frac": Metric(
        "fraction", "Thoughts that the budget ended: left unclosed, and closed by force."
    ),
    "thought_empty_frac": Metric("fraction", "Thoughts that sampled the close marker at once."),
    "reward_group_std_nats": Metric(
        "nats",
        "Mean over positions of the standard deviation of S_pred, which is that of the reward,"
        " within the group. Zero means nothing to learn.",
    ),
    "reward_length_correlation": Metric(
        "",
        "Within-group correlation of thought length and reward, as `reward/length_correlation`."
        " Left out where one does not vary.",
    ),
    "reasoned_logprob_nats": Metric(
        "nats", "Mean S_pred: log-probability of the target after a thought."
    ),
    "start_logprob_nats": Metric(
        "nats", "Log-probability of the target without a thought, under the starting checkpoint."
    ),
    "ema_logprob_nats": Metric(
        "nats", "Mean S_ema: log-probability of the target without a thought, under the baseline."
    ),
    "no_think_logprob_nats": Metric(
        "nats", "Log-probability of the target without a thought, under the policy."
    ),
    "empty_logprob_nats": Metric(
        "nats", "Log-probability of the target after a thought of no token, under the policy."
    ),
    "shuffled_logprob_nats": Metric(
        "nats",
        "Log-probability of the target after the thoughts of another document, under the policy.",
    ),
    "document_loss_nats": Metric(
        "nats per token",
        "Next-token loss of the policy on the panel's documents, without thoughts; its exponential"
        " is the perplexity.",
    ),
    "open_marker_mass": Metric(
        "probability", "Mean probability of the open marker where a thought may start."
    ),
    "panel_positions": Metric("positions", "Size of the held-out panel."),
    "panel_documents": Metric(
        "documents", "Documents of the panel, which its intervals draw; positions share them."
    ),
}
for _name, _metric in list(EVALUATION.items()):
    if _name.startswith("panel_"):
        continue
    EVALUATION[f"{_name}_low"] = Metric(
        _metric.unit,
        f"Lower end of the 95 % bootstrap interval of {_name}: documents drawn with replacement.",
    )
    EVALUATION[f"{_name}_high"] = Metric(
        _metric.unit, f"Upper end of the 95 % bootstrap interval of {_name}."
    )
"""What one evaluation of the held-out panel says at one temperature of the thoughts: `before`,
`after`, `before_cold` and `after_cold` of `summary.json`."""

COLD = "cold/"
"""Prefix, in a line of `evaluation.jsonl`, of what was measured at
`evaluation.cold_temperature`."""

EVALUATION_LINE = EVALUATION | {
    f"{COLD}{_name}": Metric(_metric.unit, f"{_name}, thinking at evaluation.cold_temperature.")
    for _name, _metric in EVALUATION.items()
}
"""A line of `evaluation.jsonl`."""

TIMING_PREFIX = "perf/"
"""Metrics of the machine and not of the run: two runs of the same config differ in them."""


def in_table_order(values: dict[str, float | None], table: dict[str, Metric]) -> dict[str, float]:
    """The measured values in the order of the table, each name and number checked."""
    for name, value in values.items():
        if name not in table:
            nearest = difflib.get_close_matches(name, table, n=1, cutoff=0.0)[0]
            raise ValueError(
                f"unknown metric {name!r}. Did you mean {nearest!r}? Names, units and definitions"
                " are in rlp/measure/metrics.py."
            )
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if value is not None and not (number and math.isfinite(value)):
            raise ValueError(
                f"metric {name} must be a finite number, or None where it was not measured, got"
                f" {value!r}."
            )
    return {name: values[name] for name in table if values.get(name) is not None}
