"""The held-out panel: the same positions scored with a thought, without one, and with thoughts that
can not help.

The gain of a thought is reported against six predictions of the same targets:

    start       the starting checkpoint's, without a thought; in a run it is computed once and kept
    ema         the EMA's, without a thought: the baseline of the reward
    no_think    the policy's own, without a thought
    empty       the policy's own after an open and a close marker: what the format alone does
    shuffled    the policy's own after the thoughts of another document: what a thought about
                something else does

A policy that gets worse without thoughts raises the gain over the EMA and over its own no-think
prediction, and not that over the start. A thought that says something about its prefix gains over
the shuffled one.

A panel is a sample of documents: intervals draw documents, with all their positions, with
replacement.

Dimensions
    B  documents;  M  positions;  G  thoughts per position;  L  thought tokens;  H  target tokens;
       C  columns
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from rlp.config import Config, ConfigError
from rlp.data.documents import Document
from rlp.data.noise import PANEL_NOISE
from rlp.data.positions import Positions, choose_positions
from rlp.learn.checkpoint import Checkpoint
from rlp.learn.export import known_ids, master_weights
from rlp.model.admission import check_model
from rlp.model.layout import LAYOUTS, Layout, tree_layout
from rlp.model.loading import (
    choose_dtype,
    choose_layout,
    load_policy,
    read_model_config,
)
from rlp.model.policy import Policy
from rlp.model.scoring import greedy_targets, score
from rlp.model.setup import ModelSetup, PanelSetup
from rlp.model.thoughts import ThoughtFormat, Thoughts
from rlp.objective import log_evidence
from rlp.process.progress import Progress, Tell
from rlp.process.ranks import Ranks
from rlp.sampling.rollout import NoiseKey, sample_thoughts

PANEL_SEED = 0
"""Panel, panel noise and intervals do not depend on `run.seed`, so runs with different seeds are
compared on the same positions."""

CONFIDENCE, NUM_RESAMPLES = 0.95, 2000
"""Of the bootstrap intervals."""


@dataclass(frozen=True, slots=True)
class Panel:
    """Held-out documents with one chosen set of positions."""

    documents: list[Document]
    positions: Positions

    def __len__(self) -> int:
        return len(self.positions.position)

    def batches(self, size: int, ranks: Ranks) -> list[tuple[int, int, bool]]:
        """(start, stop, counts) of this rank's batches of documents. Every rank has as many, the
        last ones perhaps repeated and not counted, so that a forward may be a collective."""
        starts = range(0, len(self.documents), size)
        rounds = -(-len(starts) // ranks.world_size)
        mine = [ranks.rank + ranks.world_size * r for r in range(rounds)]
        spans = [(starts[i % len(starts)], i < len(starts)) for i in mine]
        return [(start, min(start + size, len(self.documents)), counts) for start, counts in spans]

    def donors(self) -> np.ndarray | None:
        """[M] the position whose thoughts each one gets when they are shuffled: one in the next
        document, the last document's in the first. They depend on the panel alone. None for a
        single document: there is no other.
        """
        if len(self.documents) < 2:
            return None
        document, count = self.positions.document, self.num_positions()
        first = np.cumsum(count) - count
        following = (document + 1) % len(self.documents)
        return first[following] + (np.arange(len(self)) - first[document]) % count[following]

    def num_positions(self) -> np.ndarray:
        """[B] positions of each document."""
        return np.bincount(self.positions.document, minlength=len(self.documents))

    def sum_over_documents(self, values: np.ndarray) -> np.ndarray:
        """[B] what the positions [M] of each document add up to."""
        return np.bincount(self.positions.document, weights=values, minlength=len(self.documents))


@dataclass(frozen=True, slots=True)
class PanelThoughts:
    """The sampled thoughts of a whole panel, on every rank."""

    tokens: list[list[np.ndarray]]
    """Of each position and thought the sampled token ids, int64, the close marker included where it
    was sampled."""
    truncated: np.ndarray
    """[M, G] bool, True where the budget ended the thought."""

    def __getitem__(self, positions: slice | np.ndarray) -> "PanelThoughts":
        """Those of some positions."""
        chosen = np.arange(len(self.tokens))[positions]
        return PanelThoughts([self.tokens[m] for m in chosen], self.truncated[chosen])

    def on(self, device: torch.device) -> Thoughts:
        """As a layout takes them; what the sampler knew about them is left out (0)."""
        lengths = np.array([[len(thought) for thought in group] for group in self.tokens])
        mask = np.arange(max(1, lengths.max())) < lengths[:, :, None]
        tokens = np.zeros(mask.shape, dtype=np.int64)
        tokens[mask] = np.concatenate([thought for group in self.tokens for thought in group])
        tokens, mask, truncated = (
            torch.from_numpy(part).to(device) for part in (tokens, mask, self.truncated)
        )
        unknown = torch.zeros_like(tokens, dtype=torch.float32)
        return Thoughts(tokens, mask, unknown, unknown, truncated)


@dataclass(frozen=True, slots=True)
class Probe:
    """What a panel said."""

    panel: Panel
    thoughts: PanelThoughts
    columns: dict[str, np.ndarray]
    """[M] float64 each, by the names of `EVALUATION` in `rlp/measure/metrics.py`: what was measured
    at each position. A gain is the mean over its thoughts."""
    reasoned_logprob: np.ndarray
    """[M, G] float64, nats: S_pred of each thought (eq. 3)."""
    means: dict[str, float]
    """The columns' means, and what is a number of the whole panel. What could not be measured is
    left out."""
    intervals: dict[str, tuple[float, float]]
    """95 % bootstrap intervals of the means; empty for a panel of one document."""

    def numbers(self) -> dict[str, float]:
        """Means and the ends of their intervals, by the names of `EVALUATION`."""
        ends = {
            f"{name}_{end}": value
            for name, interval in self.intervals.items()
            for end, value in zip(("low", "high"), interval)
        }
        return self.means | ends


def probe_model(
    setup: PanelSetup,
    ranks: Ranks,
    *,
    start: str | None = None,
    checkpoint: Checkpoint | None = None,
    instruction: tuple[int, ...] = (),
) -> Probe:
    """Probe a model on the held-out documents of a config; nothing is trained and nothing is
    written. A collective.

    The sections `model`, `data` (`held_out`), `position`, `thought`, `target` and `evaluation`
    count.

    Args:
        setup: of that config.
        start: folder or Hub name of the starting checkpoint. Default: the model itself, so that the
            gain over the start is that over its own no-think; for a run's checkpoint, the model
            that the run started from.
        checkpoint: of a run that started from `model.path`; its weights are probed.
        instruction: token ids of an instruction that no file holds; none for that of
            `thought.instruction_file`.

    Raises:
        ConfigError, DataError, CheckpointError: something that the config names is not there or
            does not fit.
    """
    config = setup.config
    thought_format = replace(
        setup.thought_format,
        instruction=known_ids(instruction, setup.tokenizer) or setup.thought_format.instruction,
    )
    panel = held_out_panel(setup)
    start_logprob = None if start is None else _start_logprob(start, panel, setup, ranks)
    lay_out, policy = load_frozen(setup, ranks)
    if checkpoint is not None:
        if start is None:
            start_logprob = no_think_logprob(lay_out, policy, panel, thought_format, config, ranks)
        weights = master_weights(checkpoint, policy.lm)
        with torch.no_grad():
            for name, p in policy.lm.named_parameters():
                p.copy_(weights[name])
    return probe_panel(lay_out, panel, policy, None, start_logprob, thought_format, config, ranks)


def load_frozen(setup: ModelSetup, ranks: Ranks) -> tuple[Callable, Policy]:
    """The layout that a model can run, and the model."""
    config = setup.config
    architecture = read_model_config(config.model)
    layout, _ = choose_layout(config, architecture)
    dtype, _ = choose_dtype(config, ranks.device, architecture.get_text_config().hidden_size)
    policy = load_policy(config, setup.tokenizer, setup.markers, dtype, ranks.device).to(
        ranks.device
    )
    check_model(policy)
    return LAYOUTS[layout], policy


def _start_logprob(start: str, panel: Panel, setup: PanelSetup, ranks: Ranks) -> list[float]:
    """`no_think_logprob` of another checkpoint, which must read the same tokens."""
    config = replace(setup.config, model=replace(setup.config.model, path=start, init="pretrained"))
    start_setup = ModelSetup(config)
    if start_setup.tokenizer.get_vocab() != setup.tokenizer.get_vocab():
        raise ConfigError(
            f"start: the tokenizer of {start} is not that of "
            f"{setup.config.model.path}, so their log-probabilities are of other "
            "tokens. Write the checkpoint that the model "
            "was trained from; where the model was trained with "
            "thought.add_markers=true, write that too."
        )
    lay_out, policy = load_frozen(start_setup, ranks)
    return no_think_logprob(lay_out, policy, panel, setup.thought_format, config, ranks)


def held_out_panel(setup: PanelSetup) -> Panel:
    """The first held-out documents, in the order of `PANEL_SEED`, that together have
    `evaluation.panel_positions` positions, each read once.

    Positions are drawn uniformly among the candidates, for the selectors `entropy` and `surprisal`
    too: a panel that the policy chose would be another one after a resume, and in another run.
    """
    config = setup.config
    if setup.held_out is None:
        raise ConfigError(
            "data.held_out names no file, and a panel is made of held-out documents. Write"
            " data.held_out=[FILE]."
        )
    stream, wanted = setup.panel_stream(PANEL_SEED), config.evaluation.panel_positions
    documents, found = [], 0
    while found < wanted and stream.cursor < len(setup.held_out):
        document = stream.next_documents(1)[0]
        if stream.cursor > len(setup.held_out):
            break
        limit = len(setup.candidates(document.tokens))
        documents.append(document)
        found += (
            limit
            if config.position.per_document == "all"
            else min(limit, config.position.per_document)
        )
    positions = choose_positions(
        documents,
        setup.candidates,
        config.position,
        horizon=config.target.horizon,
        seed=PANEL_SEED,
        step=0,
    )
    first = positions[:wanted]
    return Panel(documents[: int(first.document[-1]) + 1], first)


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


def _gather(parts: list[tuple[int, object] | None], ranks: Ranks) -> list:
    """What all ranks measured on their batches that count, in the order of the panel. A
    collective."""
    gathered = [
        part for rank_parts in ranks.gather(parts) for part in rank_parts if part is not None
    ]
    return [content for _, content in sorted(gathered, key=lambda part: part[0])]


def probe_panel(
    lay_out: Callable,
    panel: Panel,
    policy: Policy,
    teacher: Policy | None,
    start_logprob: list[float] | None,
    thought_format: ThoughtFormat,
    config: Config,
    ranks: Ranks,
    *,
    generation: Callable[[], AbstractContextManager] = nullcontext,
    agree: Callable[[bool], bool] = bool,
    progress: Tell = Progress,
) -> Probe:
    """Think at every panel position and measure what that was worth. A collective; the ledger does
    not count it.

    Thoughts are drawn with the panel's own noise: up to rounding no number depends on batch size,
    ranks, or what a run did before.

    Args:
        lay_out: one of `LAYOUTS`.
        teacher: scores the baseline; None leaves `gain_over_ema_nats` out.
        start_logprob: [M], `no_think_logprob` of the starting checkpoint; None: the policy is the
            starting checkpoint.
        generation: a context around sampling, as `Engine.generation`.
        agree: of `sample_thoughts`.
        progress: makes a `Progress`.
    """
    batches = panel.batches(config.evaluation.batch_size, ranks)
    with policy.sampling():
        with progress("thinking on the held-out panel", len(batches), "batches") as thinking:
            thoughts = _think(
                lay_out, panel, policy, thought_format, config, ranks, generation, agree, thinking
            )
        donors, parts = panel.donors(), []
        with progress("scoring the held-out panel", len(batches), "batches") as scoring:
            for start, stop, counts in batches:
                where = panel.positions.slice_of_documents(start, stop)
                foreign = None if donors is None else thoughts[donors[where]]
                part = _score_documents(
                    lay_out,
                    panel.documents[start:stop],
                    panel.positions.of_documents(start, stop),
                    thoughts[where],
                    foreign,
                    policy,
                    teacher,
                    thought_format,
                )
                parts.append((start, part) if counts else None)
                scoring.advance()
    scored = _gather(parts, ranks)
    answers = {name: np.concatenate([part[name] for part in scored]) for name in scored[0]}
    return _summarize(
        panel,
        thoughts,
        answers,
        answers["no_think"] if start_logprob is None else np.array(start_logprob),
        len(thought_format.markers.close),
    )


def _think(
    lay_out: Callable,
    panel: Panel,
    policy: Policy,
    thought_format: ThoughtFormat,
    config: Config,
    ranks: Ranks,
    generation: Callable[[], AbstractContextManager],
    agree: Callable[[bool], bool],
    thinking: Progress,
) -> PanelThoughts:
    """Sample the thoughts of the whole panel."""

    def agree_and_tell(claim: bool) -> bool:
        thinking.advance(0)  # a token more of each thought
        return agree(claim)

    parts = []
    for start, stop, counts in panel.batches(config.evaluation.batch_size, ranks):
        with generation():
            sampled = sample_thoughts(
                policy,
                panel.documents[start:stop],
                panel.positions.of_documents(start, stop),
                thought_format,
                NoiseKey(PANEL_SEED, 0, PANEL_NOISE),
                group_size=config.evaluation.thoughts_per_position,
                max_thought_tokens=config.thought.max_thought_tokens,
                rows=config.thought.sampling_rows,
                shared=lay_out is tree_layout,
                agree=agree_and_tell,
            ).thoughts
        tokens, mask, truncated = (
            part.cpu().numpy() for part in (sampled.tokens, sampled.mask, sampled.truncated)
        )
        groups = [[thought[held] for thought, held in zip(*group)] for group in zip(tokens, mask)]
        parts.append((start, (groups, truncated)) if counts else None)
        thinking.advance()
    gathered = _gather(parts, ranks)
    return PanelThoughts(
        [group for groups, _ in gathered for group in groups],
        np.concatenate([truncated for _, truncated in gathered]),
    )


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


def _summarize(
    panel: Panel,
    thoughts: PanelThoughts,
    answers: dict[str, np.ndarray],
    start_logprob: np.ndarray,
    close_tokens: int,
) -> Probe:
    """Columns, means and intervals from what was predicted."""
    reasoned = answers["reasoned"]
    mean_reasoned = reasoned.mean(axis=1)
    without = {
        "start": start_logprob,
        "ema": answers.get("baseline"),
        "no_think": answers["no_think"],
        "empty": answers["empty"],
        "shuffled": answers["shuffled"].mean(axis=1) if "shuffled" in answers else None,
    }
    without = {name: logprob for name, logprob in without.items() if logprob is not None}
    lengths = (
        np.array([[len(thought) for thought in group] for group in thoughts.tokens])
        - close_tokens * ~thoughts.truncated
    )
    columns = {
        f"gain_over_{name}_nats": mean_reasoned - logprob for name, logprob in without.items()
    } | {
        "positive_gain_frac": mean_reasoned > start_logprob,
        "accuracy_with_thought": answers["right_with"].mean(axis=1),
        "accuracy_without_thought": answers["right_without"],
        "thought_tokens_mean": lengths.mean(axis=1),
        "thought_truncated_frac": thoughts.truncated.mean(axis=1),
        "thought_empty_frac": (lengths == 0).mean(axis=1),
        "reasoned_logprob_nats": mean_reasoned,
        **{f"{name}_logprob_nats": logprob for name, logprob in without.items()},
        "open_marker_mass": answers["open_marker"],
    }
    if reasoned.shape[1] > 1:
        columns["reward_group_std_nats"] = reasoned.std(axis=1, ddof=1)
    columns = {name: values.astype(np.float64) for name, values in columns.items()}

    document_tokens = np.array([len(document.tokens) - 1 for document in panel.documents])
    totals = np.stack(
        [
            *(panel.sum_over_documents(values) for values in columns.values()),
            answers["document_loss"],
        ]
    )
    counts = np.stack([panel.num_positions()] * len(columns) + [document_tokens])
    names = [*columns, "document_loss_nats"]
    means = dict(zip(names, _ratio(totals.sum(axis=1), counts.sum(axis=1)).tolist()))
    intervals = dict(zip(names, bootstrap_intervals(_ratio, totals, counts)))

    centered, longer = (
        values - values.mean(axis=1, keepdims=True) for values in (reasoned, lengths)
    )
    moments = [
        panel.sum_over_documents((one * other).sum(axis=1))
        for one, other in ((centered, longer), (centered, centered), (longer, longer))
    ]
    if moments[1].sum() > 0 and moments[2].sum() > 0:
        means["reward_length_correlation"] = float(
            _correlation(*(moment.sum() for moment in moments))
        )
        intervals |= dict(
            zip(
                ["reward_length_correlation"],
                bootstrap_intervals(_correlation, *(moment[None] for moment in moments)),
            )
        )
    known = {
        name: interval
        for name, interval in intervals.items()
        if name in means and np.isfinite(interval).all()
    }
    return Probe(panel, thoughts, columns, reasoned, means | {"panel_positions": len(panel)}, known)


def _ratio(total: np.ndarray, count: np.ndarray) -> np.ndarray:
    return total / count


def _correlation(
    covariance: np.ndarray, variance: np.ndarray, other_variance: np.ndarray
) -> np.ndarray:
    """0 where one of the two does not vary."""
    scale = np.sqrt(variance * other_variance)
    return np.where(scale > 0, covariance / np.where(scale > 0, scale, 1), 0)


def bootstrap_intervals(of_sums: Callable, *parts: np.ndarray) -> list[tuple[float, float]]:
    """95 % percentile intervals of statistics of sums over documents, documents drawn with
    replacement.

    Positions of one document share their prefix, so they are drawn together. The same documents are
    drawn for every statistic.

    Args:
        of_sums: what is made of the sums of the parts, each [C] and more axes.
        parts: [C, B], what each document adds.

    Returns:
        C pairs; none for a single document.
    """
    if parts[0].shape[1] < 2:
        return []
    from scipy.stats import bootstrap

    def statistic(*drawn: np.ndarray, axis: int) -> np.ndarray:
        return of_sums(*(part.sum(axis=axis) for part in drawn))

    low, high = bootstrap(
        parts,
        statistic,
        paired=True,
        vectorized=True,
        axis=1,
        confidence_level=CONFIDENCE,
        n_resamples=NUM_RESAMPLES,
        batch=250,
        method="percentile",
        rng=np.random.default_rng(PANEL_SEED),
    ).confidence_interval
    return list(zip(low.tolist(), high.tolist()))
