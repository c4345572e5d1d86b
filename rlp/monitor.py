"""What a step is watched by: statistics of thoughts and rewards, added up over micro-batches and ranks.

Means are sums over global counts, so neither micro-batches nor ranks change a number. Every thought is looked
at, none is sampled: token work is vectorized, and done for so many positions at once as fit `TOKENS_AT_ONCE`.

Dimensions
    M  positions;  G  thoughts per position;  N = M * G;  L  thought tokens
    P  prefix tokens;  H  target tokens;  V  vocabulary;  S  scripts
"""

import math
import unicodedata
from dataclasses import dataclass

import numpy as np
import torch
from einops import rearrange
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlp.data import Document, Positions
from rlp.distributed import Ranks
from rlp.layout import Thoughts

COPY_TOKENS = 4
"""A run of so many tokens that also stands in the prefix counts as copied; three in a row are often grammar."""

FLAT_NATS = 1e-5
"""Rewards of a group that differ by no more are equal: the rounding of a float32 log-probability."""

COLLAPSE_STEPS = 10
"""Steps whose mean thought length is what later ones are held against."""

COLLAPSE_FRACTION = 0.2
"""Mean thought length, as a fraction of that of the first steps, below which thoughts have collapsed."""

PREFIX_TAIL_TOKENS = 64
"""Of the context before a thought that is told with it."""

TOKENS_AT_ONCE = 2 ** 20
"""Thought and prefix tokens that are looked at together: 8 MB for each of about ten int64 temporaries."""


class Tally:
    """Sums and counts by name; `mean` is the only thing it knows, `largest` the exception."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}
        self._largest: dict[str, Tensor] = {}

    def add(self, name: str, values: Tensor) -> None:
        """Count every entry of `values` toward the mean of `name`; a name without any entry has no mean."""
        values = values.detach().double()
        self._sums[name] = self._sums.get(name, 0.0) + values.sum()
        self._counts[name] = self._counts.get(name, 0) + values.numel()

    def add_largest(self, name: str, values: Tensor) -> None:
        """Keep the largest entry."""
        largest = values.detach().double().max()
        self._largest[name] = torch.maximum(self._largest.get(name, largest), largest)

    def not_finite(self) -> list[str]:
        """Names of this rank's sums and maxima that are not finite numbers: some value among them was not."""
        return [name for name, value in [*self._sums.items(), *self._largest.items()] if not math.isfinite(value)]

    def reduce(self, ranks: Ranks) -> dict[str, float]:
        """Means and maxima over all ranks, equal on every rank. A collective."""
        mine = ({name: (float(total), self._counts[name]) for name, total in self._sums.items()}, {name: float(value) for name, value in self._largest.items()})
        everyone = ranks.gather(mine)
        means = {}
        for name in mine[0]:
            parts = [sums[name] for sums, _ in everyone if name in sums]
            count = sum(count for _, count in parts)
            if count > 0:
                means[name] = sum(total for total, _ in parts) / count
        return means | {name: max(largest[name] for _, largest in everyone if name in largest) for name in mine[1]}


@dataclass(frozen=True, slots=True)
class TokenScripts:
    """The letters of each token: what a script (Latin, Cyrillic, CJK) is told by without decoding a thought."""

    script: Tensor
    """[V] int64, the script of most of the token's letters; 0 where it has none."""
    letters: Tensor
    """[V] int64, how many letters of that script it has."""
    names: tuple[str, ...]
    """[S], the first word of the letters' Unicode names; names[0] is empty. Japanese kana count as CJK, which they are mixed with."""

    def dominant(self, tokens: Tensor, inside: Tensor) -> tuple[Tensor, Tensor]:
        """The script of most letters of token rows [..., X], and whether a row has letters: [...] each."""
        letters = self.letters[tokens] * inside
        counts = letters.new_zeros(*tokens.shape[:-1], len(self.names)).scatter_add(-1, self.script[tokens], letters)
        return counts.argmax(dim=-1), counts.sum(dim=-1) > 0


def token_scripts(tokenizer: PreTrainedTokenizerBase, vocabulary: int, device: torch.device) -> TokenScripts:
    """Read the vocabulary once. Special tokens, and pieces of a character that are no text alone, have no letters.

    Args:
        vocabulary: words of the model; those that the tokenizer does not have have no letters.
    """
    texts = tokenizer.batch_decode([[token] for token in range(min(vocabulary, len(tokenizer)))], skip_special_tokens=True)
    of_token = np.repeat(np.arange(len(texts)), [len(text) for text in texts])
    characters, which = np.unique(np.frombuffer("".join(texts).encode("utf-32-le"), dtype="<u4"), return_inverse=True)
    words = [_script(chr(character)) for character in characters]
    names = ("", *sorted(set(words) - {""}))
    number = np.array([names.index(word) for word in words], dtype=np.int64)[which]
    pairs, counts = np.unique((of_token * len(names) + number)[number > 0], return_counts=True)
    script, letters = np.zeros(vocabulary, dtype=np.int64), np.zeros(vocabulary, dtype=np.int64)
    order = counts.argsort(kind="stable")  # of several scripts in a token the last assignment stands: the most letters
    script[pairs[order] // len(names)], letters[pairs[order] // len(names)] = pairs[order] % len(names), counts[order]
    return TokenScripts(torch.from_numpy(script).to(device), torch.from_numpy(letters).to(device), names)


def _script(character: str) -> str:
    """First word of a letter's Unicode name; empty for what is no letter."""
    if not character.isalpha():
        return ""
    word = unicodedata.name(character, "").partition(" ")[0]
    return "CJK" if word in ("HIRAGANA", "KATAKANA") else word


def watch_thoughts(tally: Tally, documents: list[Document], positions: Positions, thoughts: Thoughts, scripts: TokenScripts, *,
                   close_tokens: int, max_thought_tokens: int) -> None:
    """Lengths, ends and entropy of what was sampled, and what its tokens have in common with each other, the prefix and the target.

    A thought is looked at without its close marker; the prefix is the document before the position, without instruction.
    """
    lengths = thought_lengths(thoughts, close_tokens)
    tally.add("thought/tokens_mean", lengths)
    tally.add("length_square", lengths.double().square())
    tally.add("thought/truncated_frac", thoughts.truncated)
    tally.add("thought/max_length_frac", thoughts.mask.sum(dim=2) == max_thought_tokens)
    tally.add("thought/empty_frac", lengths == 0)
    tally.add("policy/entropy", thoughts.entropy[thoughts.mask])
    per_position = thoughts.tokens[0].numel() + int(positions.position.max())
    size = max(1, TOKENS_AT_ONCE // per_position)
    for start in range(0, len(positions.position), size):
        here = slice(start, start + size)
        prefixes = [documents[d].tokens[:t] for d, t in zip(positions.document[here], positions.position[here])]
        target = torch.from_numpy(positions.target[here]).to(lengths.device)
        _watch_tokens(tally, prefixes, thoughts.tokens[here], lengths[here], target, scripts)


def _watch_tokens(tally: Tally, prefixes: list[np.ndarray], tokens: Tensor, lengths: Tensor, target: Tensor, scripts: TokenScripts) -> None:
    """Of some positions: prefixes [M] of tokens, thoughts [M, G, L] of lengths [M, G], target [M, H]."""
    num_prefix = np.array([len(prefix) for prefix in prefixes])
    padded = np.zeros((len(prefixes), num_prefix.max()), dtype=np.int64)
    padded[np.arange(padded.shape[1]) < num_prefix[:, None]] = np.concatenate(prefixes)
    prefix, num_prefix = torch.from_numpy(padded).to(tokens.device), torch.from_numpy(num_prefix).to(tokens.device)
    # A number of its own for each position: only its own prefix and siblings count.
    position = torch.arange(len(prefixes), device=tokens.device)[:, None]

    pairs, inside = _runs(tokens, lengths, 2, position[..., None])
    tally.add("thought/distinct_bigrams_frac", _distinct_fraction(rearrange(pairs, "m g w -> m (g w)"), rearrange(inside, "m g w -> m (g w)")))
    runs, inside = _runs(tokens, lengths, COPY_TOKENS, position[..., None])
    prefix_runs, prefix_inside = _runs(prefix, num_prefix, COPY_TOKENS, position)
    tally.add("thought/copied_frac", torch.isin(runs[inside], prefix_runs[prefix_inside]))
    horizon = target.shape[1]
    runs, inside = _runs(tokens, lengths, horizon, position[..., None])
    wanted, _ = _runs(target, torch.full_like(target[:, 0], horizon), horizon, position)
    tally.add("thought/holds_target_frac", ((runs == wanted[..., None]) & inside).any(dim=2))

    of_thought, thought_has_letters = scripts.dominant(tokens, _columns(tokens) < lengths[..., None])
    of_prefix, prefix_has_letters = scripts.dominant(prefix, _columns(prefix) < num_prefix[:, None])
    tally.add("thought/script_switch_frac", (of_thought != of_prefix[:, None])[thought_has_letters & prefix_has_letters[:, None]])


def _columns(tokens: Tensor) -> Tensor:
    return torch.arange(tokens.shape[-1], device=tokens.device)


def _runs(tokens: Tensor, lengths: Tensor, n: int, position: Tensor) -> tuple[Tensor, Tensor]:
    """One number for each n tokens in a row, and which of them lie inside their row: [..., X - n + 1] each.

    The number is a polynomial in the position and the tokens modulo 2 ** 64: equal for equal runs, and for different runs
    of a position with a probability that 10 ** 9 pairs of runs do not make noticeable.

    Args:
        tokens: [..., X], of which the first `lengths` [...] count.
    """
    width = max(tokens.shape[-1] - n + 1, 0)
    number = position
    for u in range(n):
        number = number * 6364136223846793005 + tokens[..., u : u + width]  # Knuth's multiplier; int64 wraps around
    return number, torch.arange(width, device=tokens.device) + n <= lengths[..., None]


def _distinct_fraction(numbers: Tensor, inside: Tensor) -> Tensor:
    """Different numbers over numbers in each row [M, X]; rows without any are left out."""
    outside = torch.iinfo(numbers.dtype).min
    ordered = numbers.masked_fill(~inside, outside).sort(dim=1).values
    first = torch.cat([torch.ones_like(ordered[:, :1], dtype=torch.bool), ordered[:, 1:] != ordered[:, :-1]], dim=1)
    count = inside.sum(dim=1)
    return ((first & (ordered != outside)).sum(dim=1).double() / count)[count > 0]


def thought_lengths(thoughts: Thoughts, close_tokens: int) -> Tensor:
    """[M, G] tokens of each thought without its close marker."""
    return thoughts.mask.sum(dim=2) - close_tokens * (~thoughts.truncated).long()


def watch_rewards(tally: Tally, reward: Tensor, lengths: Tensor, *, measured: bool = True) -> None:
    """The reward [M, G] that eq. 7 is fed, its spread within groups, and how it goes with length within groups.

    Args:
        measured: False where the reward is known up to a number of its own for each position: of its spread
            alone something can be said.
    """
    centered = reward - reward.mean(dim=1, keepdim=True)
    length = lengths.double() - lengths.double().mean(dim=1, keepdim=True)
    if measured:
        tally.add("reward/mean", reward)
        tally.add("reward/positive_frac", reward > 0)
        tally.add("reward/positive_positions_frac", reward.mean(dim=1) > 0)
    tally.add("reward/flat_groups_frac", reward.amax(dim=1) - reward.amin(dim=1) <= FLAT_NATS)
    tally.add("reward/group_std", reward.std(dim=1))
    tally.add("length_covariance", centered * length)
    tally.add("reward_variance", centered.square())
    tally.add("length_variance", length.square())


def watch_gains(tally: Tally, gain: Tensor) -> None:
    """The information gain [M, G] of thoughts, whatever they are rewarded for."""
    tally.add("gain/mean", gain)
    tally.add("gain/positive_frac", gain > 0)
    tally.add("gain/positive_positions_frac", gain.mean(dim=1) > 0)


def watch_ratio(tally: Tally, logprob: Tensor, thoughts: Thoughts, clip_low: float, clip_high: float, *, first: bool) -> None:
    """How far the policy [N, L] is from the behavior policy: 0 on-policy, up to rounding.

    Args:
        first: whether no update was made with these thoughts yet: the two are the same policy then.
    """
    mask = rearrange(thoughts.mask, "m g l -> (m g) l")
    log_ratio = (logprob.detach() - rearrange(thoughts.behavior_logprob, "m g l -> (m g) l"))[mask]
    ratio = log_ratio.exp()
    if first:
        # Float64: of ratios near 1 a float32 sum has nothing left.
        exact = log_ratio.double()
        tally.add_largest("policy/behavior_mismatch_max", exact.abs())
        tally.add("policy/behavior_mismatch_kl", exact.expm1() - exact)
    tally.add_largest("policy/ratio_max_deviation", (ratio - 1).abs())
    tally.add("policy/clip_frac", (ratio < 1 - clip_low) | (ratio > 1 + clip_high))


def combine_parts(means: dict[str, float]) -> None:
    """Replace means that are parts of a metric by the metric.

    From the mean square of the length, its standard deviation; from covariance and variances, `reward/length_correlation`,
    left out where one of the two does not vary at all.
    """
    if "length_square" in means:
        means["thought/tokens_std"] = math.sqrt(max(0.0, means.pop("length_square") - means["thought/tokens_mean"] ** 2))
    if "length_covariance" in means:
        covariance, reward, length = (means.pop(name) for name in ("length_covariance", "reward_variance", "length_variance"))
        if reward > 0 and length > 0:
            means["reward/length_correlation"] = covariance / math.sqrt(reward * length)


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
    "truncated": Streak("thought/truncated_frac", 0.95, True,
                        "the budget ended {0:.0%} of the thoughts of the last {1} steps: the model "
                        "does not know how a thought ends. "
                        "Warm it on text with thoughts in it (docs/warm_start.md), or raise "
                        "thought.max_thought_tokens if its thoughts are long."),
    "harm": Streak("gain/mean", -1.0, False,
                   "thinking harms: over the last {1} steps a thought cost {0:.2f} nats on "
                   "average, so siblings are compared by how little harm they do. "
                   "Ask `rlp probe` whether the markers alone do it, and warm the model on text "
                   "with thoughts in it (docs/warm_start.md)."),
}
"""By name in a checkpoint. The limits are ours."""


@dataclass(frozen=True, slots=True)
class Mismatch:
    """How far sampler and trainer may be apart where they hold the same weights, in nats, at temperature 1."""

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
architectures; a hundred times that is no rounding, and a KL of 1e-6 is that of 1.4e-3 at every token.

bfloat16 has 8 bits: a hidden state is rounded by up to 2^-9 of its size in each of the operations on its way,
and logits of size 10 to 20 move by some hundredths of a nat. A KL of 1e-3 is that of 0.045 nats rms; a
pretrained model of 135 million parameters has 0.027 (3.5e-4). The largest of a million such errors is about
5 rms, 0.2 nats, and unlikely tokens err more: a factor of e in a probability is no rounding.

At a temperature T the error of a logit counts 1 / T, and its square in a KL."""

END_KL = 1e-2
"""Mean of rho - 1 - log rho, at temperature 1, above which a run ends in any dtype: 0.14 nats rms at every token.
What is trained then is not the policy that was sampled from."""


def mismatch_of(means: dict[str, float], dtype: torch.dtype, temperature: float) -> tuple[str, bool] | None:
    """What is wrong with the ratios of a step before its first update, in words, and whether the run has to end.

    None where they are those of rounding, or not finite: an update from those is refused with words of its own.

    Args:
        temperature: that thoughts are sampled at.
    """
    at_one = MISMATCH[dtype]
    limit = Mismatch(at_one.largest / temperature, at_one.kl / temperature**2)
    kl, largest = (means.get(f"policy/behavior_mismatch_{name}", 0.0) for name in ("kl", "max"))
    if not (math.isfinite(kl) and math.isfinite(largest) and (kl > limit.kl or largest > limit.largest)):
        return None
    words = (f"sampler and trainer hold the same weights, and their log-probabilities of thought tokens differ by up to {largest:.3g} nats "
             f"(expected at most {limit.largest:.3g} in {str(dtype).removeprefix('torch.')}), with a KL of {kl:.3g} nats a token (at most {limit.kl:.3g})")
    return words, kl > END_KL / temperature**2


class TopThoughts:
    """The most and the least helpful thoughts of a step, over all its micro-batches and ranks."""

    def __init__(self, count: int) -> None:
        """
        Args:
            count: thoughts to keep, half of them the most helpful ones.
        """
        self._half = count // 2
        self._held: list[tuple[float, int, dict]] = []
        self._offered = 0

    def offer(self, documents: list[Document], positions: Positions, thoughts: Thoughts, values: dict[str, Tensor], close_tokens: int) -> None:
        """Look at the thoughts of a micro-batch. Those are most helpful that have the largest reward; where it was
        not measured, the largest advantage.

        Args:
            values: [M, G] each, by name; `advantage` is among them. Values that are not finite are not kept: JSON
                has no word for them, and the update is refused with one.
        """
        if not all(bool(value.isfinite().all()) for value in values.values()):
            return
        helpful = values.get("reward", values["advantage"]).flatten()
        order = helpful.argsort(descending=True, stable=True).tolist()
        lengths = thought_lengths(thoughts, close_tokens)
        for index in dict.fromkeys([*order[: self._half], *order[len(order) - min(self._half, len(order)) :]]):
            m, g = divmod(index, thoughts.tokens.shape[1])
            document, position = documents[positions.document[m]], int(positions.position[m])
            self._held.append((-float(helpful[index]), self._offered + index, {
                "document": document.id, "position": position,
                "prefix_tail": document.tokens[max(0, position - PREFIX_TAIL_TOKENS) : position].tolist(),
                "thought": thoughts.tokens[m, g, : int(lengths[m, g])].tolist(), "target": positions.target[m].tolist(),
                **{name: float(value[m, g]) for name, value in values.items()},
                "thought_tokens": int(lengths[m, g]), "truncated": bool(thoughts.truncated[m, g])}))
        self._offered += len(order)
        self._held = self._ends(self._held, self._half)

    def gather(self, ranks: Ranks) -> list[dict]:
        """The thoughts of all ranks, the most helpful first; text as token ids. A collective."""
        parts = ranks.gather((self._held, self._offered))
        held = [(key, (rank, place), told) for rank, (mine, _) in enumerate(parts) for key, place, told in mine]
        offered = sum(offered for _, offered in parts)
        return [told for _, _, told in self._ends(held, min(self._half, offered // 2))]

    @staticmethod
    def _ends(held: list[tuple], half: int) -> list[tuple]:
        """The first and the last of them, in order, none of them twice."""
        ordered = sorted(held, key=lambda entry: entry[:2])
        return ordered if len(ordered) <= 2 * half else ordered[:half] + ordered[len(ordered) - half :]


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
        return (f"thoughts have collapsed: {tokens_mean:.1f} tokens on average, {start:.1f} over the first {COLLAPSE_STEPS} steps. "
                "Short thoughts earn more here than long ones: see reward/length_correlation, and whether the base model gains from thinking at all.")

    def _see_streak(self, name: str, streak: Streak, value: float) -> str | None:
        self._streaks[name] = [*self._streaks[name], value] if streak.holds(value) else []
        if len(self._streaks[name]) < STREAK_STEPS:
            return None
        self._said.append(name)
        return streak.words.format(abs(sum(self._streaks[name]) / STREAK_STEPS), STREAK_STEPS)

    def state(self) -> dict:
        """What a checkpoint holds of it, so that a resumed run says nothing a second time."""
        return {"first": self._first, "collapsed": self._collapsed, "streaks": self._streaks,
                "said": self._said}

    def load_state(self, state: dict) -> None:
        self._first, self._collapsed = list(state["first"]), state["collapsed"]
        self._streaks = {name: list(state["streaks"].get(name, [])) for name in STREAKS}
        self._said = list(state["said"])
