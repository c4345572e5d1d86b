"""Statistics of the thoughts and rewards of a step, added up over micro-batches and ranks.

Means are sums over global counts, so neither micro-batches nor ranks change a number. Every thought
is looked at, none is sampled: token work is vectorized, and done for so many positions at once as
fit `TOKENS_AT_ONCE`.

Dimensions
    M  positions;  G  thoughts per position;  N = M * G;  L  thought tokens
    P  prefix tokens;  H  target tokens;  V  vocabulary;  S  scripts
"""

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from einops import rearrange
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlp.data.documents import Document
from rlp.data.positions import Positions
from rlp.measure.siblings import watch_siblings
from rlp.model.thoughts import Thoughts
from rlp.process.tally import Tally
from rlp.writing import family_of, script_of, scripts_of

COPY_TOKENS = 4
"""A run of so many tokens that also stands in the prefix counts as copied; three in a row are often
grammar."""

CPU = torch.device("cpu")

NO_CHARACTER = "\ufffd"
"""What a tokenizer decodes a piece of a character to."""

FLAT_NATS = 1e-5
"""Rewards of a group that differ by no more are equal: the rounding of a float32
log-probability."""

TOKENS_AT_ONCE = 2**20
"""Thought and prefix tokens that are looked at together: 8 MB for each of about ten int64
temporaries."""


@dataclass(frozen=True, slots=True)
class TokenScripts:
    """The letters of each token: what a script (Latin, Cyrillic, CJK) is told by without decoding a
    thought."""

    script: Tensor
    """[V] int64, the script of most of the token's letters; 0 where it has none."""
    letters: Tensor
    """[V] int64, how many letters of that script it has."""
    unsure: Tensor
    """[V] bool: what the token contributes to a text it does not say alone, being a piece of a
    character or having letters of several families."""
    in_target: Tensor | None
    """[V] int64, letters of a target script; None without one."""
    names: tuple[str, ...]
    """[S], families of scripts (`rlp.writing`); names[0] is empty. Han and Japanese kana, which are
    mixed, are one family."""

    def on(self, device: torch.device) -> "TokenScripts":
        """The same tables in the memory of a device."""
        tables = {
            name: table.to(device)
            for name in ("script", "letters", "unsure", "in_target")
            if (table := getattr(self, name)) is not None
        }
        return replace(self, **tables)

    def dominant(self, tokens: Tensor, inside: Tensor) -> tuple[Tensor, Tensor]:
        """The script of most letters of token rows [..., X], and whether a row has letters: [...]
        each."""
        letters = self.letters[tokens] * inside
        counts = letters.new_zeros(*tokens.shape[:-1], len(self.names)).scatter_add(
            -1, self.script[tokens], letters
        )
        return counts.argmax(dim=-1), counts.sum(dim=-1) > 0


def token_scripts(
    tokenizer: PreTrainedTokenizerBase,
    vocabulary: int,
    device: torch.device = CPU,
    target: str | None = None,
) -> TokenScripts:
    """Read the vocabulary once. Special tokens, and pieces of a character that are no text alone,
    have no letters.

    Args:
        vocabulary: words of the model; those that the tokenizer does not have have no letters.
        target: a script whose letters are counted too.
    """
    texts = tokenizer.batch_decode(
        [[token] for token in range(min(vocabulary, len(tokenizer)))], skip_special_tokens=True
    )
    of_token = np.repeat(np.arange(len(texts)), [len(text) for text in texts])
    characters, which = np.unique(
        np.frombuffer("".join(texts).encode("utf-32-le"), dtype="<u4"), return_inverse=True
    )
    found = [script_of(chr(character)) for character in characters]
    words = [family_of(script) for script in found]
    names = ("", *sorted(set(words) - {""}))
    number = np.array([names.index(word) for word in words], dtype=np.int64)[which]
    in_target = None
    if target is not None:
        wanted = np.array([script in scripts_of(target) for script in found], dtype=bool)[which]
        in_target = torch.from_numpy(np.bincount(of_token[wanted], minlength=vocabulary))
    pairs, counts = np.unique((of_token * len(names) + number)[number > 0], return_counts=True)

    script, letters = np.zeros(vocabulary, dtype=np.int64), np.zeros(vocabulary, dtype=np.int64)
    # Of several scripts in a token the last assignment stands: the most letters.
    order = counts.argsort(kind="stable")
    token, number = np.divmod(pairs[order], len(names))
    script[token], letters[token] = number, counts[order]
    unsure = np.bincount(token, minlength=vocabulary) > 1
    unsure[[index for index, text in enumerate(texts) if NO_CHARACTER in text]] = True
    tables = (torch.from_numpy(table) for table in (script, letters, unsure))
    return TokenScripts(*tables, in_target, names).on(device)


def watch_thoughts(
    tally: Tally,
    documents: list[Document],
    positions: Positions,
    thoughts: Thoughts,
    scripts: TokenScripts,
    *,
    close_tokens: int,
    max_thought_tokens: int,
) -> None:
    """Lengths, ends and entropy of what was sampled, and what its tokens have in common with each
    other, the prefix and the target.

    A thought is looked at without its close marker; the prefix is the document before the position,
    without instruction.
    """
    lengths = thought_lengths(thoughts, close_tokens)
    tally.add("thought/tokens_mean", lengths)
    tally.add("length_square", lengths.double().square())
    tally.add("thought/truncated_frac", thoughts.truncated)
    tally.add("thought/max_length_frac", thoughts.mask.sum(dim=2) == max_thought_tokens)
    tally.add("thought/empty_frac", lengths == 0)
    if thoughts.entropy is not None:
        tally.add("policy/entropy", thoughts.entropy, thoughts.mask)

    per_position = thoughts.tokens[0].numel() + int(positions.position.max())
    size = max(1, TOKENS_AT_ONCE // per_position)
    for start in range(0, len(positions.position), size):
        here = slice(start, start + size)
        prefixes = [
            documents[d].tokens[:t]
            for d, t in zip(positions.document[here], positions.position[here])
        ]
        target = torch.from_numpy(positions.target[here]).to(lengths.device)
        _watch_tokens(tally, prefixes, thoughts.tokens[here], lengths[here], target, scripts)


def _watch_tokens(
    tally: Tally,
    prefixes: list[np.ndarray],
    tokens: Tensor,
    lengths: Tensor,
    target: Tensor,
    scripts: TokenScripts,
) -> None:
    """Of some positions: prefixes [M] of tokens, thoughts [M, G, L] of lengths [M, G], target [M,
    H]."""
    prefix, num_prefix = _padded(prefixes, tokens.device)
    # A number of its own for each position: only its own prefix and siblings count.
    position = torch.arange(len(prefixes), device=tokens.device)[:, None]

    pairs, inside = _runs(tokens, lengths, 2, position[..., None])
    watch_siblings(tally, tokens, lengths, pairs, inside)
    pairs, inside = (rearrange(part, "m g w -> m (g w)") for part in (pairs, inside))
    tally.add("thought/distinct_bigrams_frac", _distinct_fraction(pairs, inside))

    runs, inside = _runs(tokens, lengths, COPY_TOKENS, position[..., None])
    prefix_runs, prefix_inside = _runs(prefix, num_prefix, COPY_TOKENS, position)
    tally.add("thought/copied_frac", torch.isin(runs[inside], prefix_runs[prefix_inside]))

    horizon = target.shape[1]
    runs, inside = _runs(tokens, lengths, horizon, position[..., None])
    wanted, _ = _runs(target, torch.full_like(target[:, 0], horizon), horizon, position)
    tally.add("thought/holds_target_frac", ((runs == wanted[..., None]) & inside).any(dim=2))

    of_thought, has_letters = scripts.dominant(tokens, inside_lengths(tokens, lengths))
    of_prefix, prefix_has_letters = scripts.dominant(prefix, inside_lengths(prefix, num_prefix))
    both = has_letters & prefix_has_letters[:, None]
    tally.add("thought/script_switch_frac", (of_thought != of_prefix[:, None])[both])


def _padded(rows: list[np.ndarray], device: torch.device) -> tuple[Tensor, Tensor]:
    """Rows as one tensor, padded on the right, and their lengths."""
    lengths = np.array([len(row) for row in rows])
    padded = np.zeros((len(rows), lengths.max()), dtype=np.int64)
    padded[np.arange(padded.shape[1]) < lengths[:, None]] = np.concatenate(rows)
    return torch.from_numpy(padded).to(device), torch.from_numpy(lengths).to(device)


def inside_lengths(tokens: Tensor, lengths: Tensor) -> Tensor:
    """[..., X] bool, which tokens of each row count."""
    return torch.arange(tokens.shape[-1], device=tokens.device) < lengths[..., None]


def _runs(tokens: Tensor, lengths: Tensor, n: int, position: Tensor) -> tuple[Tensor, Tensor]:
    """One number for each n tokens in a row, and which of them lie inside their row: [..., X - n +
    1] each.

    The number is a polynomial in the position and the tokens modulo 2 ** 64: equal for equal runs,
    and for different runs of a position with a probability that 10 ** 9 pairs of runs do not make
    noticeable.

    Args:
        tokens: [..., X], of which the first `lengths` [...] count.
    """
    width = max(tokens.shape[-1] - n + 1, 0)
    number = position
    for u in range(n):
        # Knuth's multiplier; int64 wraps around.
        number = number * 6364136223846793005 + tokens[..., u : u + width]
    return number, torch.arange(width, device=tokens.device) + n <= lengths[..., None]


def _distinct_fraction(numbers: Tensor, inside: Tensor) -> Tensor:
    """Different numbers over numbers in each row [M, X]; rows without any are left out."""
    outside = torch.iinfo(numbers.dtype).min
    ordered = numbers.masked_fill(~inside, outside).sort(dim=1).values
    is_first = torch.ones_like(ordered, dtype=torch.bool)
    is_first[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    different = (is_first & (ordered != outside)).sum(dim=1)
    count = inside.sum(dim=1)
    return (different.double() / count)[count > 0]


def thought_lengths(thoughts: Thoughts, close_tokens: int) -> Tensor:
    """[M, G] tokens of each thought without its close marker."""
    return thoughts.mask.sum(dim=2) - close_tokens * (~thoughts.truncated).long()


def watch_rewards(tally: Tally, reward: Tensor, lengths: Tensor, *, measured: bool = True) -> None:
    """The reward [M, G] that eq. 7 is fed, its spread within groups, and how it goes with length
    within groups.

    Args:
        measured: False where the reward is known up to a number of its own for each position: of
            its spread alone something can be said.
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


def watch_ratio(
    tally: Tally,
    logprob: Tensor,
    behavior_logprob: Tensor,
    mask: Tensor,
    clip_low: float,
    clip_high: float,
    *,
    first: bool,
) -> None:
    """How far the policy is from the behavior policy: 0 on-policy, up to rounding.

    Args:
        logprob, behavior_logprob, mask: [N, L], of the sampled tokens.
        first: whether no update was made with these thoughts yet: the two are the same policy then.
    """
    log_ratio = (logprob.detach() - behavior_logprob).masked_fill(~mask, 0.0)
    ratio = log_ratio.exp()
    if first:
        # Float64: of ratios near 1 a float32 sum has nothing left.
        exact = log_ratio.double()
        tally.add_largest("policy/behavior_mismatch_max", exact.abs())
        tally.add("policy/behavior_mismatch_kl", exact.expm1() - exact, mask)
    tally.add_largest("policy/ratio_max_deviation", (ratio - 1).abs())
    tally.add("policy/clip_frac", (ratio < 1 - clip_low) | (ratio > 1 + clip_high), mask)


def combine_parts(means: dict[str, float]) -> None:
    """Replace means that are parts of a metric by the metric.

    From the mean square of the length, its standard deviation; from covariance and variances,
    `reward/length_correlation`, left out where one of the two does not vary at all.
    """
    if "length_square" in means:
        variance = means.pop("length_square") - means["thought/tokens_mean"] ** 2
        means["thought/tokens_std"] = math.sqrt(max(0.0, variance))
    if "length_covariance" in means:
        covariance = means.pop("length_covariance")
        reward, length = means.pop("reward_variance"), means.pop("length_variance")
        if reward > 0 and length > 0:
            means["reward/length_correlation"] = covariance / math.sqrt(reward * length)
