"""Parts from outside, tried before the first step on evidence that is made up.

What can be known then is told then: a part that raises, or gives another shape, costs no step.

Dimensions
    M  positions (2);  G  thoughts per position;  N = M * G;  L  thought tokens;  P  document tokens
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from rlp.config import Config
from rlp.data.documents import Document
from rlp.data.positions import Positions
from rlp.data.selectors import Choice, Selector, chosen_by, open_selector
from rlp.model.thoughts import Predictions, Thoughts
from rlp.process.outside import Part, PartError, name_of
from rlp.step.baseline import NETWORKS, Baseline, NoThink, baseline_of, open_baseline
from rlp.step.loss import Loss, Scored, loss_of, open_loss
from rlp.step.reward import Evidence, Reward, open_reward, rewards_of

M, L, P = 2, 3, 6
"""Sizes of what is made up."""


@dataclass(frozen=True, slots=True)
class ReplaceableParts:
    """The four parts of a run that a user may replace."""

    selector: Part
    baseline: Part
    reward: Part
    loss: Part

    @property
    def outside(self) -> list[Part]:
        """Those that are not ours."""
        parts = (self.selector, self.baseline, self.reward, self.loss)
        return [part for part in parts if part.is_outside]


def open_parts(
    config: Config,
    *,
    selector: Selector | None = None,
    baseline: Baseline | None = None,
    reward: Reward | None = None,
    loss: Loss | None = None,
) -> tuple[Config, ReplaceableParts]:
    """The parts that a config names, or that are handed over, and the config that says so.

    Raises:
        PartError: one of them can not be used.
    """
    config = replace(
        config,
        position=_named(config.position, "selector", selector),
        baseline=_named(config.baseline, "kind", baseline),
        reward=_named(config.reward, "kind", reward),
        objective=_named(config.objective, "kind", loss),
    )
    parts = ReplaceableParts(
        selector=open_selector(config.position.selector, selector),
        baseline=open_baseline(config.baseline.kind, baseline),
        reward=open_reward(config.reward.kind, reward),
        loss=open_loss(config.objective, loss),
    )
    refuse_unmet_needs(config, parts)
    refuse_predictions(config, parts.reward)
    networks = set()
    if parts.baseline.is_outside:
        networks |= {NETWORKS[need] for need in parts.baseline.needs if need in NETWORKS}
    if parts.loss.is_outside and "start_logprob" in parts.loss.needs:
        networks.add("start")
    engine = replace(config.engine, networks=sorted(networks))
    return replace(config, engine=engine), parts


def _named(section: object, key: str, part: object) -> object:
    """A section of the config that names a part that was handed over."""
    return section if part is None else replace(section, **{key: name_of(part)})


def refuse_unmet_needs(config: Config, parts: ReplaceableParts) -> None:
    """Refuse a reward that needs a baseline which is not scored on every step."""
    if not config.objective.thinks or "baseline_logprob" not in parts.reward.needs:
        return
    baseline = config.baseline
    if baseline.kind == "none" or baseline.every_n_steps > 1:
        raise PartError(
            f"reward.kind: {parts.reward.name} needs baseline_logprob on every step, and"
            f" baseline.kind is {baseline.kind}, scored every {baseline.every_n_steps} steps. Write"
            " baseline.kind=ema baseline.every_n_steps=1."
        )


def refuse_predictions(config: Config, reward: Part) -> None:
    """Refuse a reward that needs a prediction where none is made, or where it would be read in
    another sense."""
    if not config.objective.thinks or "prediction" not in reward.needs:
        return
    found = None
    if config.sampling.engine == "vllm":
        found = "sampling.engine: vllm samples no prediction. Write sampling.engine=native."
    if config.objective.predictor_weight > 0:
        found = (
            "objective.predictor_weight trains the prediction of the real target, and there is"
            " another in its place. Write objective.predictor_weight=0."
        )
    if config.reward.placebo in ("foreign_thought", "other_thought"):
        found = (
            f"reward.placebo: {config.reward.placebo} moves thoughts, and a prediction belongs to"
            " the position at which it was made. Write reward.placebo=shuffled_reward or none."
        )
    if found:
        raise PartError(
            f"reward.kind: {reward.name} rewards a prediction that the policy makes after the"
            f" thought, and {found}"
        )


def try_parts(config: Config, parts: ReplaceableParts, group_size: int) -> None:
    """Call each part from outside once.

    Raises:
        PartError: it raised, or gave what can not be used.
    """
    if not parts.outside:
        return
    noise = np.random.default_rng(0)
    documents, positions, thoughts = made_up(noise, group_size)
    if parts.selector.is_outside:
        try_selector(parts.selector, documents[0])
    if parts.baseline.is_outside:
        known = {need: _logprobs(noise, M) for need in parts.baseline.needs}
        baseline_of(parts.baseline, NoThink(documents, positions, **known), torch.device("cpu"))
    if parts.reward.is_outside:
        rewards_of(parts.reward, _evidence(parts.reward, noise, documents, positions, thoughts))
    if parts.loss.is_outside:
        try_loss(parts.loss, config, noise, thoughts)


def made_up(
    noise: np.random.Generator, group_size: int
) -> tuple[list[Document], Positions, Thoughts]:
    """Two documents, a position in each, and a group of thoughts at each."""
    documents = [Document(index, np.arange(P, dtype=np.int64)) for index in range(M)]
    positions = Positions(
        document=np.arange(M), position=np.full(M, P - 1), target=np.full((M, 1), P - 1)
    )
    shape = (M, group_size, L)
    thoughts = Thoughts(
        tokens=torch.from_numpy(noise.integers(0, P, size=shape)),
        mask=torch.ones(shape, dtype=torch.bool),
        behavior_logprob=_logprobs(noise, *shape),
        entropy=-_logprobs(noise, *shape),
        truncated=torch.zeros(shape[:2], dtype=torch.bool),
    )
    return documents, positions, thoughts


def try_selector(selector: Part, document: Document) -> None:
    """One choice of 1 out of 4."""
    known = {need: np.linspace(0, 1, P, dtype=np.float32) for need in selector.needs}
    candidates = np.arange(1, P - 1)
    chosen_by(selector, Choice(document, candidates, 1, np.random.default_rng(0), **known))


def try_loss(loss: Part, config: Config, noise: np.random.Generator, thoughts: Thoughts) -> None:
    """One pass, and whether its terms have a gradient."""
    rows, leaf = M * thoughts.tokens.shape[1], torch.zeros((), requires_grad=True)
    start = _logprobs(noise, rows, L) if "start_logprob" in loss.needs else None
    texts = M if config.objective.lm_weight > 0 else 0
    total = loss_of(
        loss,
        Scored(
            thought_logprob=_logprobs(noise, rows, L) + leaf,
            behavior_logprob=_logprobs(noise, rows, L),
            mask=torch.ones(rows, L, dtype=torch.bool),
            advantage=_logprobs(noise, rows),
            reasoned_logprob=_logprobs(noise, rows) + leaf,
            start_logprob=start,
            document_logprob=_logprobs(noise, texts, P - 1) + leaf,
            document_mask=torch.ones(texts, P - 1, dtype=torch.bool),
            num_thoughts=float(rows),
            num_tokens=float(M * (P - 1)),
            weights=config.objective,
        ),
    )
    if not total.requires_grad:
        raise loss.refuse("terms without a gradient", "at least one that depends on a `*_logprob`")


def _evidence(
    reward: Part,
    noise: np.random.Generator,
    documents: list[Document],
    positions: Positions,
    thoughts: Thoughts,
) -> Evidence:
    shape = tuple(thoughts.truncated.shape)
    return Evidence(
        reasoned_logprob=_logprobs(noise, *shape),
        baseline_logprob=_logprobs(noise, M) if "baseline_logprob" in reward.needs else None,
        matched=torch.zeros(shape, dtype=torch.bool) if "matched" in reward.needs else None,
        documents=documents,
        positions=positions,
        thoughts=thoughts,
        prediction=_prediction(noise, shape) if "prediction" in reward.needs else None,
    )


def _prediction(noise: np.random.Generator, shape: tuple[int, ...]) -> Predictions:
    """One token after each thought."""
    tokens = torch.from_numpy(noise.integers(0, P, size=(*shape, 1)))
    return Predictions(
        tokens=tokens,
        mask=torch.ones_like(tokens, dtype=torch.bool),
        behavior_logprob=_logprobs(noise, *shape, 1),
        ended=torch.zeros(shape, dtype=torch.bool),
    )


def _logprobs(noise: np.random.Generator, *shape: int) -> Tensor:
    """Float32 numbers below 0."""
    return torch.from_numpy(-noise.exponential(size=shape).astype(np.float32))
