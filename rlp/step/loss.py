"""Losses: what is minimized, term by term, from the log-probabilities of one pass.

A loss is a callable of one `Scored` that returns named terms; their sum gets a gradient. The
built-in one is the first user; one of your own is named by `objective.kind: package.module:name`.

Each term is a sum over this pass divided by a count of the whole step (`num_thoughts` or
`num_tokens`), so that micro-batches and ranks change nothing.

Dimensions
    B  documents of this pass;  P  document tokens
    N  thoughts of this pass;  L  thought tokens
"""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from rlp.config import ObjectiveConfig
from rlp.objective import clipped_surrogate, kl_to_start
from rlp.process.outside import Part, open_part

STATISTICS = ("start_logprob",)
"""What a loss may need: fields of `Scored`."""


@dataclass(frozen=True, slots=True)
class Scored:
    """What one pass of the policy has scored. In a run without thoughts N is 0."""

    thought_logprob: Tensor
    """[N, L] nats, with gradient: log pi of the sampled tokens at the sampling temperature;
    those of a prediction stand behind the thought's."""
    behavior_logprob: Tensor
    """[N, L] nats: the same when they were sampled."""
    mask: Tensor
    """[N, L] bool, True on sampled tokens; at least one per thought."""
    advantage: Tensor
    """[N], in the unit of the reward (eq. 7)."""
    reasoned_logprob: Tensor
    """[N] nats, with gradient: S_pred (eq. 3)."""
    start_logprob: Tensor | None
    """[N, L] nats: log-probabilities of the sampled tokens under the starting checkpoint. None
    unless the loss needs them."""
    document_logprob: Tensor
    """[B, P - 1] nats, with gradient: log p(x_t | x_<t), 0 where `document_mask` is False. Empty in
    a pass without documents."""
    document_mask: Tensor
    """[B, P - 1] bool, True on the tokens of the LM loss."""
    num_thoughts: float
    """Of the whole step, all ranks."""
    num_tokens: float
    """Predicted document tokens of the whole step, all ranks."""
    weights: ObjectiveConfig
    """The `objective` section of the config."""
    ratio_cap: float | None = None
    """Bound of the ratio where A < 0 (`objective.ratio_cap`), where another program than the
    trainer has sampled; else None."""


class Loss(Protocol):
    """The objective of a run.

    `needs` names what it reads of `Scored` beyond what is always there, out of `STATISTICS`.
    """

    needs: tuple[str, ...] = ()

    def __call__(self, scored: Scored) -> dict[str, Tensor]:
        """Scalars by name, summed in this order; some with a gradient."""


class RLP:
    """The clipped surrogate of eq. 8 and the next-token loss on the same documents, each with its
    weight, and the two terms that the paper leaves out."""

    def __init__(self, weights: ObjectiveConfig) -> None:
        self.needs = ("start_logprob",) if weights.kl_weight > 0 else ()

    def __call__(self, scored: Scored) -> dict[str, Tensor]:
        weights, terms = scored.weights, {}
        if len(scored.mask):
            surrogate = clipped_surrogate(
                scored.thought_logprob,
                scored.behavior_logprob,
                scored.mask,
                scored.advantage,
                clip_low=weights.clip_low,
                clip_high=weights.clip_high,
                ratio_cap=scored.ratio_cap,
            )
            terms["policy"] = weights.policy_weight * surrogate.sum() / scored.num_thoughts
            if weights.predictor_weight > 0:
                evidence = scored.reasoned_logprob.sum() / scored.num_thoughts
                terms["predictor"] = -weights.predictor_weight * evidence
            if weights.kl_weight > 0:
                kl = kl_to_start(scored.thought_logprob, scored.start_logprob, scored.mask)
                terms["kl"] = weights.kl_weight * kl.sum() / scored.num_thoughts

        if scored.document_logprob.numel():
            terms["lm"] = -weights.lm_weight * scored.document_logprob.sum() / scored.num_tokens
        return terms


def open_loss(weights: ObjectiveConfig, given: Loss | None = None) -> Part:
    """The loss that a config names (`open_part`)."""
    return open_part(
        "objective.kind", weights.kind, {"rlp": lambda: RLP(weights)}, STATISTICS, given
    )


def loss_of(loss: Part, scored: Scored) -> Tensor:
    """The sum of the terms of a loss.

    Raises:
        PartError: a loss from outside gave no terms, or something else than finite scalars.
    """
    terms = loss(scored)
    if loss.is_outside:
        refuse_terms(loss, terms)
    total = None
    for term in terms.values():
        total = term if total is None else total + term
    return total


def refuse_terms(loss: Part, terms: object) -> None:
    """Refuse what is no dictionary of finite scalars."""
    expected = "a dictionary of finite scalar tensors by name, such as {'policy': tensor(0.1)}"
    if not isinstance(terms, dict) or not terms:
        raise loss.refuse(f"{type(terms).__name__} {terms!r:.60}", expected)
    for name, term in terms.items():
        if not isinstance(term, Tensor) or term.ndim != 0:
            shape = list(term.shape) if isinstance(term, Tensor) else type(term).__name__
            raise loss.refuse(f"for {name!r} {shape}", expected)
        if not bool(term.isfinite()):
            raise loss.refuse(f"for {name!r} {term.item()}", expected)
