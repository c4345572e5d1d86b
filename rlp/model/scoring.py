"""One forward of a layout, and from it every log-probability that the objective needs.

Which model is asked, and what its answers are for, is not known here.

Dimensions
    B  documents;  P  document tokens;  M  positions;  H  target tokens
    N  rows of thoughts;  L  thought tokens;  Q  queries
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from rlp.model.layout import DOCUMENT, NO_THINK, OPEN_MARKER, TARGET, THOUGHT, Layout
from rlp.process.faults import fault, poisoned


@dataclass(frozen=True, slots=True)
class Scores:
    """Log-probabilities in nats, float32, with gradient where the forward had one. Blocks that the
    layout does not ask for are empty."""

    thought: Tensor
    """[N, L] log pi(l_u | prefix, l_<u) at the sampling temperature; 0 off the thought."""
    target: Tensor
    """[N, H] log p(x_{t+h} | prefix, thought, x_t..), open marker excluded."""
    document: Tensor
    """[B, P - 1] log p(x_t | x_<t) of the LM loss; 0 off its tokens."""
    no_think: Tensor
    """[M, H] as `target`, without a thought."""
    open_marker: Tensor
    """[M] log-probability of the open marker where a thought may start."""
    matched: Tensor | None = None
    """[N] bool, whether every target is the most probable token after the thought; None unless
    asked for."""
    no_think_matched: Tensor | None = None
    """[M] bool, likewise without a thought."""
    surest: Tensor | None = None
    """[N, H] log-probability of the most probable token in the place of each target; None unless
    asked for. The first one knows nothing of the targets."""


def score(
    model: Callable, layout: Layout, *, matched: bool = False, surest: bool = False
) -> Scores:
    """Run a layout once and put the answers back in shape.

    Args:
        model: the policy or the teacher, or the engine that trains the policy.
        matched: ask for `Scores.matched` and `Scores.no_think_matched` too.
        surest: for these and for `Scores.surest`.
    """
    fault("score")
    matches = {}
    if matched or surest:
        statistic = "logprob_greedy_and_surest" if surest else "logprob_and_greedy"
        logprob, greedy, *best = ask(model, statistic, layout)
        found = unpack(layout, greedy)
        matches["matched"] = found.target.all(dim=1)
        matches["no_think_matched"] = found.no_think.all(dim=1)
        if surest:
            matches["surest"] = unpack(layout, *best).target
    else:
        logprob = ask(model, "logprob", layout)

    scores = unpack(layout, logprob)
    return replace(
        scores,
        **matches,
        thought=poisoned("score.thought", scores.thought),
        target=poisoned("score.target", scores.target),
        no_think=poisoned("score.no_think", scores.no_think),
    )


def ask(model: Callable, statistic: str, layout: Layout) -> Tensor:
    """[Q] the answer to each query of a layout, or a pair of them; `statistic` as in
    `Policy.forward`."""
    return model(
        statistic,
        layout.tokens,
        layout.position,
        layout.tree,
        layout.row,
        layout.column,
        layout.target,
        layout.inverse_temperature,
        layout.excluded,
        layout.asked,
    )


def unpack(layout: Layout, answers: Tensor) -> Scores:
    """Per-query answers [Q] as the blocks of a layout."""
    blocks = answers.split(layout.sizes)
    document = blocks[DOCUMENT]
    if layout.sizes[DOCUMENT]:
        document = _spread(layout.document_mask, layout.document_place, document)
    return Scores(
        thought=_spread(layout.thought_mask, layout.thought_place, blocks[THOUGHT]),
        target=rearrange(blocks[TARGET], "(n h) -> n h", h=layout.horizon),
        document=document,
        no_think=rearrange(blocks[NO_THINK], "(m h) -> m h", h=layout.horizon),
        open_marker=blocks[OPEN_MARKER],
    )


def _spread(mask: Tensor, place: Tensor, values: Tensor) -> Tensor:
    """Values at the True places of a mask, whose numbers are `place`, 0 elsewhere. Nobody waits for
    the device, as who counts the places of a mask does."""
    return values.new_zeros(mask.numel()).index_copy(0, place, values).view_as(mask)


@torch.no_grad()
def difficulty(model: Callable, layout: Layout, selector: str) -> Tensor:
    """Per-token scores for the selectors `entropy` and `surprisal`, without thinking.

    Args:
        layout: document rows that ask for every token (`lm`, of documents without a `loss_mask`).

    Returns:
        [Q] nats, for each token of each document but its first: the entropy before it, or -log
        p(x_t | x_<t).
    """
    if selector == "entropy":
        return ask(model, "entropy", layout)
    return -ask(model, "logprob", layout)


def by_document(difficulties: Tensor, lengths: list[int]) -> list[np.ndarray]:
    """One [P] float32 array per document, of P = `lengths` tokens: index 0, which has no context,
    is 0."""
    parts = np.split(difficulties.cpu().numpy(), np.cumsum([length - 1 for length in lengths])[:-1])
    return [np.concatenate([np.zeros(1, dtype=part.dtype), part]) for part in parts]
