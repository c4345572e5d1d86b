"""The held-out panel: the same positions scored with and without a thought, and what the thought gained.

The gain is reported against three predictions without a thought: the starting checkpoint's, computed once
and kept in the run; the EMA's, which the reward uses; and the policy's own. A policy that gets worse without
thoughts raises the last two and not the first.

Dimensions
    B  documents;  M  positions;  G  thoughts per position;  H  target tokens
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from rlp.config import Config
from rlp.data import PANEL_NOISE, Document, DocumentStream, Positions, choose_positions
from rlp.distributed import Ranks
from rlp.engine import Engine
from rlp.layout import ThoughtFormat, tree
from rlp.model import Policy
from rlp.monitor import thought_lengths
from rlp.objective import log_evidence
from rlp.rollout import NoiseKey, sample_thoughts
from rlp.scoring import greedy_targets, score

PANEL_SEED = 0
"""Panel and panel noise do not depend on `run.seed`, so runs with different seeds are compared on the same positions."""


@dataclass(frozen=True, slots=True)
class Panel:
    """Held-out documents with one chosen set of positions."""

    documents: list[Document]
    positions: Positions

    def __len__(self) -> int:
        return len(self.positions.position)

    def batches(self, size: int, ranks: Ranks) -> list[tuple[int, int, bool]]:
        """(start, stop, counts) of this rank's batches of documents. Every rank has as many, the last ones
        perhaps repeated and not counted, so that a forward may be a collective."""
        starts = range(0, len(self.documents), size)
        rounds = -(-len(starts) // ranks.world_size)
        mine = [ranks.rank + ranks.world_size * r for r in range(rounds)]
        spans = [(starts[i % len(starts)], i < len(starts)) for i in mine]
        return [(start, min(start + size, len(self.documents)), counts) for start, counts in spans]


def build_panel(stream: DocumentStream, num_rows: int, candidates: Callable[[np.ndarray], np.ndarray], config: Config) -> Panel:
    """The first held-out documents that together have `evaluation.panel_positions` positions, each read once.

    Positions are drawn uniformly among the candidates, for the selectors `entropy` and `surprisal` too: a panel that the
    policy chose would be another one after a resume, and in another run.
    """
    wanted = config.evaluation.panel_positions
    documents, found = [], 0
    while found < wanted and stream.cursor < num_rows:
        document = stream.next_documents(1)[0]
        if stream.cursor > num_rows:
            break
        limit = len(candidates(document.tokens))
        documents.append(document)
        found += limit if config.position.per_document == "all" else min(limit, config.position.per_document)
    positions = choose_positions(documents, candidates, config.position, horizon=config.target.horizon, seed=PANEL_SEED, step=0)
    first = Positions(positions.document[:wanted], positions.position[:wanted], positions.target[:wanted])
    return Panel(documents[: int(first.document[-1]) + 1], first)


@torch.no_grad()
def no_think_logprob(arrange: Callable, model: Policy, panel: Panel, form: ThoughtFormat, config: Config, ranks: Ranks) -> list[float]:
    """[M] nats: log-evidence of every panel position without a thought, on every rank. A collective.

    Args:
        arrange: `layout.repeated` or `layout.tree`.
    """
    parts = []
    for start, stop, counts in panel.batches(config.evaluation.batch_size, ranks):
        layout = arrange(panel.documents[start:stop], panel.positions.of_documents(start, stop), None, form, lm=False, no_think=True, device=model.device)
        evidence = log_evidence(score(model, layout).no_think)
        parts.append((start, evidence.tolist()) if counts else None)
    gathered = [part for rank_parts in ranks.gather(parts) for part in rank_parts if part is not None]
    return [value for _, values in sorted(gathered) for value in values]


def evaluate_panel(arrange: Callable, panel: Panel, engine: Engine, teacher: Policy | None, start_logprob: list[float], form: ThoughtFormat,
                   config: Config, ranks: Ranks) -> dict[str, float]:
    """Think at every panel position and measure what that was worth. A collective.

    Args:
        arrange: `layout.repeated` or `layout.tree`.
        teacher: scores the baseline; None leaves `gain_over_ema_nats` out.
        start_logprob: [M], `no_think_logprob` of the starting checkpoint.

    Returns:
        the panel's means by name (`COLUMNS`), and its size. The ledger does not count evaluation.
    """
    parts = []
    policy = engine.policy
    with policy.sampling():
        for start, stop, counts in panel.batches(config.evaluation.batch_size, ranks):
            where = panel.positions.slice_of_documents(start, stop)
            rows = _evaluate_documents(arrange, panel.documents[start:stop], panel.positions.of_documents(start, stop),
                                       torch.tensor(start_logprob[where], device=policy.device), engine, teacher, form, config)
            parts.append((start, rows.tolist()) if counts else None)
    gathered = [part for rank_parts in ranks.gather(parts) for part in rank_parts if part is not None]
    rows = np.array([row for _, values in sorted(gathered) for row in values])
    means = dict(zip(COLUMNS, (float(mean) for mean in rows.mean(axis=0))))
    if teacher is None:
        del means["gain_over_ema_nats"]
    return means | {"panel_positions": len(panel)}


COLUMNS = ("gain_over_start_nats", "gain_over_ema_nats", "gain_over_no_think_nats", "positive_gain_frac", "accuracy_with_thought",
           "accuracy_without_thought", "thought_tokens_mean", "thought_truncated_frac", "reasoned_logprob_nats", "no_think_logprob_nats", "open_marker_mass")
"""What is measured at each position. A gain is the mean over its thoughts; it counts as positive over the
starting checkpoint; a prediction is accurate when each of the H targets is the most probable token."""


def _evaluate_documents(arrange: Callable, documents: list[Document], positions: Positions, start_logprob: Tensor, engine: Engine, teacher: Policy | None,
                        form: ThoughtFormat, config: Config) -> Tensor:
    """[M, columns] float64, one row per position."""
    policy = engine.policy
    with engine.generation():
        rollout = sample_thoughts(policy, documents, positions, form, NoiseKey(PANEL_SEED, 0, PANEL_NOISE), group_size=config.evaluation.thoughts_per_position,
                                  max_thought_tokens=config.thought.max_thought_tokens, rows=config.thought.sampling_rows, shared=arrange is tree, agree=engine.agree)
    layout = arrange(documents, positions, rollout.thoughts, form, lm=False, no_think=True, device=policy.device)
    scores, greedy = score(policy, layout), greedy_targets(policy, layout)
    group = {"g": config.evaluation.thoughts_per_position}
    reasoned = rearrange(log_evidence(scores.target), "(m g) -> m g", **group).mean(dim=1)
    own = log_evidence(scores.no_think)
    if teacher is None:
        baseline = own
    else:
        without = arrange(documents, positions, None, form, lm=False, no_think=True, device=policy.device)
        baseline = log_evidence(score(teacher, without).no_think)
    right_with = rearrange(greedy.target.all(dim=1).double(), "(m g) -> m g", **group).mean(dim=1)
    right_without = greedy.no_think.all(dim=1)
    lengths = thought_lengths(rollout.thoughts, len(form.markers.close)).double().mean(dim=1)
    gain = reasoned - start_logprob
    columns = (gain, reasoned - baseline, reasoned - own, gain > 0, right_with, right_without, lengths,
               rollout.thoughts.truncated.double().mean(dim=1), reasoned, own, scores.open_marker.exp())
    return torch.stack([column.double() for column in columns], dim=1)
