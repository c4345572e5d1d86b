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
    """[B, P - 1] log p(x_t | x_<t) of the LM loss; 0 off the document."""
    no_think: Tensor
    """[M, H] as `target`, without a thought."""
    open_marker: Tensor
    """[M] log-probability of the open marker where a thought may start."""
    matched: Tensor | None = None
    """[N] bool, whether every target is the most probable token after the thought; None unless
    asked for."""
    no_think_matched: Tensor | None = None
    """[M] bool, likewise without a thought."""


def score(model: Callable, layout: Layout, *, matched: bool = False) -> Scores:
    """Run a layout once and put the answers back in shape.

    Args:
        model: the policy or the teacher, or the engine that trains the policy.
        matched: ask for `Scores.matched` and `Scores.no_think_matched` too.
    """
    fault("score")
    if matched:
        logprob, greedy = ask(model, "logprob_and_greedy", layout)
        found = unpack(layout, greedy)
        matches = {
            "matched": found.target.all(dim=1),
            "no_think_matched": found.no_think.all(dim=1),
        }
    else:
        logprob, matches = ask(model, "logprob", layout), {}

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
    )


def unpack(layout: Layout, answers: Tensor) -> Scores:
    """Per-query answers [Q] as the blocks of a layout."""
    blocks = answers.split(layout.sizes)
    document = blocks[DOCUMENT]
    if layout.sizes[DOCUMENT]:
        document = _spread(layout.document_mask, document)
    return Scores(
        thought=_spread(layout.thought_mask, blocks[THOUGHT]),
        target=rearrange(blocks[TARGET], "(n h) -> n h", h=layout.horizon),
        document=document,
        no_think=rearrange(blocks[NO_THINK], "(m h) -> m h", h=layout.horizon),
        open_marker=blocks[OPEN_MARKER],
    )


def _spread(mask: Tensor, values: Tensor) -> Tensor:
    """Values in row-major order at the True places of a mask, 0 elsewhere."""
    return torch.zeros_like(mask, dtype=values.dtype).masked_scatter(mask, values)


@torch.no_grad()
def difficulty(model: Callable, layout: Layout, selector: str) -> list[np.ndarray]:
    """Per-position scores for the selectors `entropy` and `surprisal`, without thinking.

    Args:
        layout: document rows that ask for every token (`lm`).

    Returns:
        one [P] float32 array per document: at index t the entropy before token t, or -log p(x_t |
        x_<t), nats; index 0, which has no context, is 0.
    """
    answers = (
        ask(model, "entropy", layout) if selector == "entropy" else -ask(model, "logprob", layout)
    )
    padded = torch.nn.functional.pad(unpack(layout, answers).document, (1, 0)).cpu().numpy()
    lengths = layout.document_mask.sum(dim=1).tolist()
    return [row[: length + 1] for row, length in zip(padded, lengths)]
