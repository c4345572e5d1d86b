"""The teacher: networks that predict without a thought, for the baseline (eq. 4).

None of them thinks or has a gradient here: the EMA of the policy, the starting checkpoint, or the
policy itself. Which of them a run holds is what its baseline needs.

Dimensions
    M  positions;  H  target tokens
"""

import math
from collections.abc import Mapping

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
    """No-think log-evidence for the positions of a layout."""

    def __init__(
        self,
        networks: Mapping[str, Policy],
        ema: Policy | None,
        engine: Engine,
        ranks: Ranks,
    ) -> None:
        """
        Args:
            networks: by the statistic that each of them scores: `ema_logprob`, `start_logprob`,
                `policy_logprob`.
            ema: the one that is to be kept at the EMA of the policy, if any.
        """
        self.networks = dict(networks)
        self._ema = ema
        self._engine = engine
        self._ranks = ranks

    def refresh(self) -> None:
        """After an optimizer step: bring the EMA's forward copy up to date."""
        fault("teacher.refresh")
        if self._ema is not None:
            self._engine.shards.refresh_average(self._ema)

    @torch.no_grad()
    def logprob(self, statistic: str, layout: Layout) -> Tensor:
        """[M] log-evidence in nats, under the network of a statistic.

        Args:
            layout: document rows that ask for no-think targets.
        """
        return log_evidence(score(self.networks[statistic], layout).no_think)

    def distance(self) -> float | None:
        """Relative distance of the EMA to the policy, ||phi - theta|| / ||theta||; 0 before the
        first step.

        Returns None where there is no EMA. A collective: call it on every rank.
        """
        if self._ema is None:
            return None
        squares = [0.0, 0.0]
        for fragment in self._engine.shards.fragments():
            squares[0] += float(self._engine.shards.lag(fragment).square().sum())
            squares[1] += float(self._engine.shards.master(fragment).square().sum())

        apart, size = self._ranks.sum(squares)
        return math.sqrt(apart / size) if size > 0 else 0.0
