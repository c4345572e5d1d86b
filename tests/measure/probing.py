"""A panel on a tiny policy, probed by one rank or by two that stand in for each other."""

import numpy as np
import torch

from rlp.config import Config, PositionConfig, load_config
from rlp.data.positions import choose_positions
from rlp.measure.decomposition import Decomposition
from rlp.measure.panel import Panel
from rlp.measure.panel_scoring import ThinkingModel, measure_panel
from rlp.model.layout import repeated_layout, tree_layout
from rlp.model.markers import Markers
from rlp.model.policy import Policy
from rlp.model.thoughts import ThoughtFormat
from rlp.sampling.native import NativeSampler
from tests.rank_threads import ThreadRank
from tests.tiny_models import random_documents, tiny_policy

OPEN, CLOSE = 2, 3
MARKERS = Markers(open=(OPEN,), close=(CLOSE,))


def settings(*overrides: str) -> Config:
    return load_config(
        {
            "model": {"path": "unused"},
            "data": {"train": ["unused"]},
            "budget": {"steps": 1},
            "run": {"dir": "unused"},
        },
        [
            "thought.max_thought_tokens=5",
            "evaluation.thoughts_per_position=3",
            "evaluation.batch_size=2",
            *overrides,
        ],
    )


def panel(
    lengths: tuple[int, ...] = (9, 12, 7, 14, 10), *, per_document: int = 2, horizon: int = 1
) -> Panel:
    """Random documents with positions drawn in them."""
    documents = random_documents(list(lengths), seed=3)
    positions = choose_positions(
        documents,
        lambda tokens: np.arange(1, len(tokens) - horizon + 1),
        PositionConfig(per_document=per_document),
        horizon=horizon,
        seed=0,
        step=0,
    )
    return Panel(documents, positions)


def thinking_model(
    policy: Policy, config: Config, *, lay_out=repeated_layout, horizon: int = 1
) -> ThinkingModel:
    """A tiny policy that thinks between `MARKERS`."""
    thought_format = ThoughtFormat(
        markers=MARKERS,
        instruction=(),
        begin=None,
        temperature=0.7,
        target_temperature=1.0,
        horizon=horizon,
    )
    sampler = NativeSampler(policy, slots=config.sampling.slots, shared=lay_out is tree_layout)
    return ThinkingModel(policy, sampler, thought_format, lay_out)


def probe(
    given: Panel,
    *,
    policy=None,
    lay_out=repeated_layout,
    config: Config | None = None,
    ranks=None,
    start=None,
    horizon: int = 1,
) -> Decomposition:
    config = config or settings()
    model = thinking_model(policy or tiny_policy(), config, lay_out=lay_out, horizon=horizon)
    return measure_panel(model, given, config, ranks or ThreadRank(), start_logprob=start)


@torch.no_grad()
def target_logprob(policy, context: list[int], target: list[int]) -> float:
    """Mean log-probability of a target by transformers alone, without the open marker."""
    logits = policy.lm(torch.tensor([[*context, *target]])).logits[0, len(context) - 1 : -1]
    logits[:, OPEN] = -torch.inf
    return float(torch.log_softmax(logits, dim=-1).gather(1, torch.tensor(target)[:, None]).mean())
