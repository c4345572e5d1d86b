"""Best of G without training: the base thinks G times and one of its thoughts is kept.

Kept is the thought after which the next word is predicted with the most confidence, which needs no
answer; beside it, the vote of all G (the word that most of them predict) and the mean of their
predictions.

Dimensions
    M  positions;  G  thoughts per position;  V  vocabulary
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from lines import figures_of
from worlds import Reader

from rlp.measure.panel import PanelThoughts
from rlp.world.problems import HEADINGS

G = 8
"""RLP's group size."""
ROWS = 512
"""Rows of a forward."""


@dataclass(frozen=True, slots=True)
class Selected:
    """What the thoughts of each position come to."""

    kept: np.ndarray
    """[M] the thought that is kept."""
    kept_right: np.ndarray
    """[M] bool, whether the word that it makes most probable is the target."""
    vote_right: np.ndarray
    """[M] bool, whether the word that most thoughts make most probable is; of several such words
    the first counts."""
    kept_logprob: np.ndarray
    """[M] nats, of the target after the kept thought."""
    mixture_logprob: np.ndarray
    """[M] nats, of the target under the mean of all G predictions."""


def select(logprob: np.ndarray, targets: np.ndarray) -> Selected:
    """Keep one thought of each position, and let all of them vote.

    Args:
        logprob: [M, G, V] nats, the prediction after each thought.
        targets: [M] token ids, which choose nothing.
    """
    every, (_, group_size, size) = np.arange(len(targets)), logprob.shape
    guessed, kept = logprob.argmax(axis=2), logprob.max(axis=2).argmax(axis=1)
    votes = np.array([np.bincount(group, minlength=size).argmax() for group in guessed])
    of_target = logprob[every, :, targets]
    return Selected(
        kept=kept,
        kept_right=guessed[every, kept] == targets,
        vote_right=votes == targets,
        kept_logprob=of_target[every, kept],
        mixture_logprob=np.logaddexp.reduce(of_target, axis=1) - np.log(group_size),
    )


def best_of_g(reader: Reader, model: Path, temperature: float) -> dict:
    """Figures of the kept thoughts, under the names that every arm has, and of the vote."""
    found = reader.measure(model, temperature, G)
    logprob = next_word_logprob(reader, model, found.thoughts, temperature)
    chosen = select(logprob, found.panel.positions.target[:, 0])
    start = np.array(reader.start_logprob)
    return figures_of(found.means, temperature, G) | {
        "accuracy_with_thought": float(chosen.kept_right.mean()),
        "gain_over_start_nats": float((chosen.kept_logprob - start).mean()),
        "gain_over_no_think_nats": None,
        "accuracy_of_vote": float(chosen.vote_right.mean()),
        "gain_of_mixture_nats": float((chosen.mixture_logprob - start).mean()),
    }


def of_computing(reader: Reader, model: Path) -> dict[str, float]:
    """Of a model's thoughts at T 1: which share computes (its second word is a heading), which of
    these gain, and what they gain over the start on average, in nats."""
    found = reader.measure(model, 1.0, G)
    headings = set(reader.tokenizer.convert_tokens_to_ids(list(HEADINGS)))
    computes = np.array(
        [
            [thought[1:2].tolist() != [] and thought[1] in headings for thought in group]
            for group in found.thoughts.tokens
        ]
    )
    gain = (found.reasoned_logprob - np.array(reader.start_logprob)[:, None])[computes]
    return {
        "computing_share": float(computes.mean()),
        "computing_right_frac": float((gain > 0).mean()),
        "computing_gain_nats": float(gain.mean()),
    }


@torch.no_grad()
def next_word_logprob(
    reader: Reader, model: Path, thoughts: PanelThoughts, temperature: float
) -> np.ndarray:
    """[M, G, V] nats: the prediction of the next word after each thought, the open marker left
    out."""
    _, loaded = reader.load(model, temperature, G)
    markers, panel = loaded.thought_format.markers, reader.panel
    rows = []
    for m, (document, position) in enumerate(panel.positions.places()):
        prefix = loaded.thought_format.prefix(panel.documents[document].tokens, position)
        for thought, truncated in zip(thoughts.tokens[m], thoughts.truncated[m]):
            close = markers.close if truncated else ()
            rows.append(np.concatenate([prefix, thought, close]).astype(np.int64))

    found = []
    for start in range(0, len(rows), ROWS):
        part = rows[start : start + ROWS]
        ends = torch.tensor([len(row) - 1 for row in part])
        tokens = torch.zeros(len(part), int(ends.max()) + 1, dtype=torch.int64)
        for row, words in zip(tokens, part):
            row[: len(words)] = torch.from_numpy(words)
        # Padding stands behind what is asked, where causal attention does not look.
        logits = loaded.policy.lm(input_ids=tokens).logits[torch.arange(len(part)), ends].float()
        logits[:, markers.excluded] = -torch.inf
        found.append(logits.log_softmax(dim=1).numpy())
    return np.concatenate(found).reshape(len(panel), -1, found[0].shape[1])
