"""A model thinks and predicts on the held-out panel: with a thought, without one, and with thoughts
that can not help.

Dimensions
    B  documents;  M  positions;  G  thoughts per position;  H  target tokens
"""

from collections.abc import Callable

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from rlp.config import Config
from rlp.data.documents import Document
from rlp.data.noise import PANEL_NOISE
from rlp.data.positions import Positions
from rlp.measure.decomposition import Decomposition, decompose
from rlp.measure.panel import PANEL_SEED, Panel, PanelThoughts
from rlp.model.layout import Layout
from rlp.model.policy import Policy
from rlp.model.scoring import greedy_targets, score
from rlp.model.thoughts import ThoughtFormat
from rlp.objective import log_evidence
from rlp.process.progress import Progress, Tell
from rlp.process.ranks import Ranks
from rlp.sampling.rollout import NoiseKey
from rlp.sampling.sampler import Sampler


@torch.no_grad()
def no_think_logprob(
    lay_out: Callable,
    model: Policy,
    panel: Panel,
    thought_format: ThoughtFormat,
    config: Config,
    ranks: Ranks,
) -> list[float]:
    """[M] nats: log-evidence of every panel position without a thought, on every rank. A
    collective.

    Args:
        lay_out: one of `LAYOUTS`.
    """
    parts = []
    for start, stop, counts in panel.batches(config.evaluation.batch_size, ranks):
        layout = lay_out(
            panel.documents[start:stop],
            panel.positions.of_documents(start, stop),
            None,
            thought_format,
            lm=False,
            no_think=True,
            device=model.device,
        )
        evidence = log_evidence(score(model, layout).no_think)
        parts.append((start, evidence.tolist()) if counts else None)
    return [value for values in _gather(parts, ranks) for value in values]


def measure_panel(
    lay_out: Callable,
    sampler: Sampler,
    panel: Panel,
    policy: Policy,
    teacher: Policy | None,
    start_logprob: list[float] | None,
    thought_format: ThoughtFormat,
    config: Config,
    ranks: Ranks,
    *,
    progress: Tell = Progress,
) -> Decomposition:
    """Think at every panel position and measure what that was worth. A collective; the ledger does
    not count it.

    Thoughts are drawn with the panel's own noise: up to rounding no number depends on batch size,
    ranks, or what a run did before.

    Args:
        lay_out: one of `LAYOUTS`.
        sampler: of the policy.
        teacher: scores the baseline; None leaves `gain_over_ema_nats` out.
        start_logprob: [M], `no_think_logprob` of the starting checkpoint; None: the policy is the
            starting checkpoint.
        progress: makes a `Progress`.
    """
    num_batches = len(panel.batches(config.evaluation.batch_size, ranks))
    with policy.sampling():
        with progress("thinking on the held-out panel", num_batches, "batches") as thinking:
            thoughts = _think(sampler, panel, thought_format, config, ranks, thinking)
        with progress("scoring the held-out panel", num_batches, "batches") as scoring:
            answers = _score(
                lay_out, panel, thoughts, policy, teacher, thought_format, config, ranks, scoring
            )
    start = answers["no_think"] if start_logprob is None else np.array(start_logprob)
    return decompose(panel, thoughts, answers, start, len(thought_format.markers.close))


def _think(
    sampler: Sampler,
    panel: Panel,
    thought_format: ThoughtFormat,
    config: Config,
    ranks: Ranks,
    thinking: Progress,
) -> PanelThoughts:
    """Sample the thoughts of the whole panel."""
    parts = []
    with sampler.phase():
        for start, stop, counts in panel.batches(config.evaluation.batch_size, ranks):
            rollout = sampler.sample(
                panel.documents[start:stop],
                panel.positions.of_documents(start, stop),
                thought_format,
                NoiseKey(PANEL_SEED, 0, PANEL_NOISE),
                group_size=config.evaluation.thoughts_per_position,
                max_thought_tokens=config.thought.max_thought_tokens,
                beat=lambda: thinking.advance(0),
            )
            parts.append((start, PanelThoughts.of(rollout.thoughts)) if counts else None)
            thinking.advance()
    return PanelThoughts.joined(_gather(parts, ranks))


def _score(
    lay_out: Callable,
    panel: Panel,
    thoughts: PanelThoughts,
    policy: Policy,
    teacher: Policy | None,
    thought_format: ThoughtFormat,
    config: Config,
    ranks: Ranks,
    scoring: Progress,
) -> dict[str, np.ndarray]:
    """`_score_documents` of the whole panel, on every rank."""
    donors, parts = panel.donors(), []
    for start, stop, counts in panel.batches(config.evaluation.batch_size, ranks):
        here = panel.positions.slice_of_documents(start, stop)
        part = _score_documents(
            lay_out,
            panel.documents[start:stop],
            panel.positions.of_documents(start, stop),
            thoughts[here],
            None if donors is None else thoughts[donors[here]],
            policy,
            teacher,
            thought_format,
        )
        parts.append((start, part) if counts else None)
        scoring.advance()
    scored = _gather(parts, ranks)
    return {name: np.concatenate([part[name] for part in scored]) for name in scored[0]}


def _score_documents(
    lay_out: Callable,
    documents: list[Document],
    positions: Positions,
    thoughts: PanelThoughts,
    foreign: PanelThoughts | None,
    policy: Policy,
    teacher: Policy | None,
    thought_format: ThoughtFormat,
) -> dict[str, np.ndarray]:
    """Every prediction of some documents' targets: log-evidence in nats, [m, G] after thoughts and
    [m] else; whether the most probable tokens are the targets; the LM loss [b] of each document,
    summed over its tokens. What is not asked for is absent.
    """

    def laid_out(given: PanelThoughts | None, *, lm: bool, no_think: bool) -> Layout:
        return lay_out(
            documents,
            positions,
            None if given is None else given.on(policy.device),
            thought_format,
            lm=lm,
            no_think=no_think,
            device=policy.device,
        )

    def of_groups(values: Tensor) -> Tensor:
        return rearrange(values, "(m g) -> m g", m=len(positions.position))

    layout = laid_out(thoughts, lm=False, no_think=True)
    scores, greedy = score(policy, layout), greedy_targets(policy, layout)
    controls = score(
        policy,
        laid_out(_after_an_empty_one(foreign, len(positions.position)), lm=True, no_think=False),
    )
    control = of_groups(log_evidence(controls.target))
    answers = {
        "reasoned": of_groups(log_evidence(scores.target)),
        "no_think": log_evidence(scores.no_think),
        "empty": control[:, 0],
        "right_with": of_groups(greedy.target.all(dim=1)),
        "right_without": greedy.no_think.all(dim=1),
        "open_marker": scores.open_marker.exp(),
        "document_loss": -controls.document.double().sum(dim=1),
    }
    if foreign is not None:
        answers["shuffled"] = control[:, 1:]
    if teacher is not None:
        answers["baseline"] = log_evidence(
            score(teacher, laid_out(None, lm=False, no_think=True)).no_think
        )
    return {name: values.double().cpu().numpy() for name, values in answers.items()}


def _after_an_empty_one(thoughts: PanelThoughts | None, num_positions: int) -> PanelThoughts:
    """[m, 1 + G] at each position a thought of no token, whose close marker is forced, and then the
    thoughts, where there are some."""
    others = thoughts or PanelThoughts(
        [[]] * num_positions, np.zeros((num_positions, 0), dtype=bool)
    )
    nothing = np.array([], dtype=np.int64)
    return PanelThoughts(
        [[nothing, *group] for group in others.tokens],
        np.pad(others.truncated, ((0, 0), (1, 0)), constant_values=True),
    )


def _gather(parts: list[tuple[int, object] | None], ranks: Ranks) -> list:
    """What all ranks measured on their batches that count, in the order of the panel. A
    collective."""
    gathered = [part for of_rank in ranks.gather(parts) for part in of_rank if part is not None]
    return [content for _, content in sorted(gathered, key=lambda part: part[0])]
