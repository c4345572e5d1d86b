"""A model thinks and predicts on the held-out panel: with a thought, without one, and with thoughts
that can not help.

Dimensions
    B  documents;  M  positions;  G  thoughts per position;  H  target tokens
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

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
from rlp.model.scoring import score
from rlp.model.thoughts import ThoughtFormat, Thoughts
from rlp.objective import log_evidence
from rlp.process.progress import Progress, Tell
from rlp.process.ranks import Ranks
from rlp.sampling.rollout import NoiseKey
from rlp.sampling.sampler import Sampler


@dataclass(frozen=True, slots=True)
class ThinkingModel:
    """A model, with what it needs to think and to be scored."""

    policy: Policy
    sampler: Sampler
    """Of the policy."""
    thought_format: ThoughtFormat
    lay_out: Callable[..., Layout]
    """One of `LAYOUTS`, which the policy can run."""

    def rows(
        self,
        documents: list[Document],
        positions: Positions | None,
        thoughts: Thoughts | None,
        *,
        lm: bool = False,
        no_think: bool = False,
    ) -> Layout:
        """What is to be scored, as rows of tokens."""
        return self.lay_out(
            documents,
            positions,
            thoughts,
            self.thought_format,
            lm=lm,
            no_think=no_think,
            device=self.policy.device,
        )


@torch.no_grad()
def no_think_logprob(
    model: ThinkingModel, panel: Panel, config: Config, ranks: Ranks
) -> list[float]:
    """[M] nats: log-evidence of every panel position without a thought, on every rank. A
    collective."""
    parts = []
    for start, stop, counts in panel.batches(config.evaluation.batch_size, ranks):
        layout = model.rows(
            panel.documents[start:stop],
            panel.positions.of_documents(start, stop),
            None,
            no_think=True,
        )
        evidence = log_evidence(score(model.policy, layout).no_think)
        parts.append((start, evidence.tolist()) if counts else None)
    return [value for values in _gather(parts, ranks) for value in values]


def measure_panel(
    model: ThinkingModel,
    panel: Panel,
    config: Config,
    ranks: Ranks,
    *,
    teacher: Policy | None = None,
    start_logprob: list[float] | None = None,
    temperature: float | None = None,
    progress: Tell = Progress,
) -> Decomposition:
    """Think at every panel position and measure what that was worth. A collective; the ledger does
    not count it.

    Thoughts are drawn with the panel's own noise: up to rounding no number depends on batch size,
    ranks, or what a run did before.

    Args:
        teacher: scores the baseline; None leaves `gain_over_ema_nats` out.
        start_logprob: [M], `no_think_logprob` of the starting checkpoint; None: the model is the
            starting checkpoint.
        temperature: of the thoughts; None: `thought.temperature`.
        progress: makes a `Progress`.
    """
    if temperature is not None:
        thought_format = replace(model.thought_format, temperature=temperature)
        model = replace(model, thought_format=thought_format)
    with model.policy.sampling():
        with progress("thinking on the held-out panel", None, "rounds") as thinking:
            thoughts = _think(model, panel, config, ranks, thinking)
        num_batches = len(panel.batches(config.evaluation.batch_size, ranks))
        with progress("scoring the held-out panel", num_batches, "batches") as scoring:
            answers = _score(model, panel, thoughts, teacher, config, ranks, scoring)
    start = answers["no_think"] if start_logprob is None else np.array(start_logprob)
    return decompose(panel, thoughts, answers, start, len(model.thought_format.markers.close))


def _think(
    model: ThinkingModel, panel: Panel, config: Config, ranks: Ranks, thinking: Progress
) -> PanelThoughts:
    """The thoughts of the whole panel; each rank samples its share of them at once."""
    start, stop, counts = panel.share(ranks)
    with model.sampler.phase():
        thoughts = model.sampler.sample(
            panel.documents[start:stop],
            panel.positions.of_documents(start, stop),
            model.thought_format,
            NoiseKey(PANEL_SEED, 0, PANEL_NOISE),
            group_size=config.evaluation.thoughts_per_position,
            max_thought_tokens=config.thought.max_thought_tokens,
            beat=thinking.advance,
        ).thoughts
    mine = (start, PanelThoughts.of(thoughts)) if counts else None
    return PanelThoughts.joined(_gather([mine], ranks))


def _score(
    model: ThinkingModel,
    panel: Panel,
    thoughts: PanelThoughts,
    teacher: Policy | None,
    config: Config,
    ranks: Ranks,
    scoring: Progress,
) -> dict[str, np.ndarray]:
    """`_score_documents` of the whole panel, on every rank."""
    donors, parts = panel.donors(), []
    for start, stop, counts in panel.batches(config.evaluation.batch_size, ranks):
        here = panel.positions.slice_of_documents(start, stop)
        part = _score_documents(
            model,
            panel.documents[start:stop],
            panel.positions.of_documents(start, stop),
            thoughts[here],
            None if donors is None else thoughts[donors[here]],
            teacher,
        )
        parts.append((start, part) if counts else None)
        scoring.advance()
    scored = _gather(parts, ranks)
    return {name: np.concatenate([part[name] for part in scored]) for name in scored[0]}


def _score_documents(
    model: ThinkingModel,
    documents: list[Document],
    positions: Positions,
    thoughts: PanelThoughts,
    foreign: PanelThoughts | None,
    teacher: Policy | None,
) -> dict[str, np.ndarray]:
    """Every prediction of some documents' targets: log-evidence in nats, [m, G] after thoughts and
    [m] else; whether the most probable tokens are the targets; what the two halves of the targets
    add to it, [m, G, 2] and [m, 2], with a horizon of 2 or more; how sure of its first token the
    model is after each thought, [m, G]; the LM loss [b] of each document, summed over its tokens.
    What is not asked for is absent.
    """
    policy, where = model.policy, (documents, positions)

    def of_groups(values: Tensor) -> Tensor:
        return rearrange(values, "(m g) -> m g", m=len(positions.position))

    layout = model.rows(*where, thoughts.on(policy.device), no_think=True)
    scores = score(policy, layout, surest=True)
    others = _after_an_empty_one(foreign, len(positions.position))
    controls = score(policy, model.rows(*where, others.on(policy.device), lm=True))
    control = of_groups(log_evidence(controls.target))
    answers = {
        "reasoned": of_groups(log_evidence(scores.target)),
        "no_think": log_evidence(scores.no_think),
        "empty": control[:, 0],
        "right_with": of_groups(scores.matched),
        "right_without": scores.no_think_matched,
        "surest": of_groups(scores.surest[:, 0]),
        "open_marker": scores.open_marker.exp(),
        "document_loss": -controls.document.double().sum(dim=1),
    }
    if scores.target.shape[1] > 1:
        answers["reasoned_halves"] = torch.stack(
            [of_groups(half) for half in _halves(scores.target)], dim=-1
        )
        answers["no_think_halves"] = torch.stack(_halves(scores.no_think), dim=-1)
    if foreign is not None:
        answers["shuffled"] = control[:, 1:]
    if teacher is not None:
        alone = score(teacher, model.rows(*where, None, no_think=True))
        answers["baseline"] = log_evidence(alone.no_think)
    return {name: values.double().cpu().numpy() for name, values in answers.items()}


def _halves(target_logprob: Tensor) -> list[Tensor]:
    """What the first and the second half of H target tokens add to their log-evidence: two parts
    [n] of [n, H]; of an odd number the second half has one more."""
    horizon = target_logprob.shape[1]
    parts = target_logprob.split([horizon // 2, horizon - horizon // 2], dim=1)
    return [part.sum(dim=1) / horizon for part in parts]


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
