"""The teacher: the no-think predictor that the reward is measured against (eq. 4).

It never thinks and never has a gradient. Which weights it holds is `baseline.kind`: the EMA of the
policy, the starting checkpoint, the policy itself, or none.

Dimensions
    M  positions;  H  target tokens
"""

import math

import torch
from torch import Tensor

from rlp.learn.engine import Engine
from rlp.model.layout import Layout
from rlp.model.policy import Policy
from rlp.model.scoring import score
from rlp.objective import log_evidence
from rlp.process.faults import fault
from rlp.process.ranks import Ranks


class Teacher:
    """S_ema for the positions of a layout."""

    def __init__(self, kind: str, twin: Policy | None, engine: Engine, ranks: Ranks) -> None:
        """
        Args:
            kind: `baseline.kind`.
            twin: a second copy of the starting checkpoint, for the kinds `ema` and `frozen`.
        """
        self.kind = kind
        self._twin = twin
        self._engine = engine
        self._ranks = ranks

    @property
    def model(self) -> Policy | None:
        """The network that predicts; None for the kind `none`."""
        return {"ema": self._twin, "frozen": self._twin, "self": self._engine.policy, "none": None}[
            self.kind
        ]

    def refresh(self) -> None:
        """After an optimizer step: bring the EMA's forward copy up to date."""
        fault("teacher.refresh")
        if self.kind == "ema":
            self._engine.refresh_average(self._twin)

    @torch.no_grad()
    def baseline_logprob(self, layout: Layout, num_positions: int) -> Tensor:
        """[M] S_ema in nats; zero for the kind `none`.

        Args:
            layout: document rows that ask for no-think targets.
        """
        if self.kind == "none":
            return torch.zeros(num_positions, device=layout.tokens.device)
        return log_evidence(score(self.model, layout).no_think)

    def distance(self) -> float | None:
        """Relative distance of the EMA to the policy, ||phi - theta|| / ||theta||; 0 before the
        first step.

        Returns None where there is no EMA. A collective: call it on every rank.
        """
        if self.kind != "ema":
            return None
        squares = [0.0, 0.0]
        for fragment in self._engine.fragments():
            squares[0] += float(self._engine.lag(fragment).square().sum())
            squares[1] += float(self._engine.master(fragment).square().sum())

        apart, size = self._ranks.sum(squares)
        return math.sqrt(apart / size) if size > 0 else 0.0
