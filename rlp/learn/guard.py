"""Which updates are made: none from a number that is not finite on any rank, and on request none
from a gradient out of all proportion.

A reward or a ratio that is not finite need not reach the gradient: the clip of eq. 8, a mask or a
weight of zero can hide it. So what the loss is made from is looked at itself, and all ranks agree
before the update. Weights and optimizer state are looked at before they are saved: an update can
overflow although all that it was made from is finite.
"""

import statistics
from collections import deque
from collections.abc import Callable

from rlp.config import OptimConfig
from rlp.data.documents import Document
from rlp.learn.engine import Engine, StepResult
from rlp.process.ranks import Ranks
from rlp.process.tally import Tally

MAX_REFUSED_IN_A_ROW = 3
"""Steps without an update, one after another, that stop a run."""


class NumericsError(Exception):
    """The run stopped because its numbers are of no use."""


class Guard:
    """Makes updates, or refuses them on all ranks together: weights, moments and EMA then stay as
    they are."""

    def __init__(self, config: OptimConfig, ranks: Ranks) -> None:
        self._config, self._ranks = config, ranks
        self._norms: deque[float] = deque(maxlen=config.spike_window)
        self.skipped = 0
        """Updates refused so far because something was not finite."""
        self.spikes = 0
        """Updates refused so far for the size of their gradient."""
        self.in_a_row = 0
        """Steps since the last in which an update was made; the updates of a step are made from the
        same thoughts."""
        self._made = False

    def update(
        self,
        engine: Engine,
        learning_rate: float,
        tally: Tally,
        documents: list[Document],
        say: Callable[[str], None],
    ) -> StepResult:
        """Make the update from the gradient that the engine holds, or refuse it and say why. A
        collective.

        Args:
            tally: everything that was measured on the way to the loss.
            documents: this rank's, to be named.
            say: is told what was refused.
        """
        doubtful = tally.not_finite()
        if not engine.losses_are_finite():
            doubtful.append("the loss")
        sound = not self._ranks.any(bool(doubtful))
        result = engine.step(learning_rate, largest_norm=self.largest_norm() if sound else -1.0)
        if result.applied:
            self._norms.append(result.grad_norm)
            self._made = True
            return result

        spiked = sound and result.is_finite
        self.spikes += spiked
        self.skipped += not spiked
        # Where the gradient alone is at fault, nobody knows whose part of it was.
        found = [doubtful, [document.id for document in documents]] if doubtful or sound else None
        for rank, entry in enumerate(self._ranks.gather(found)):
            if entry is None:
                continue
            names, ids = entry
            why = f"not finite: {', '.join(names) or 'the gradient'}"
            if spiked:
                why = (
                    f"gradient norm {result.grad_norm:.4g} is above {self.largest_norm():.4g},"
                    " optim.spike_factor times the median"
                )
            say(f"update refused: {why}; documents of rank {rank}: {ids}")
        return result

    def close_step(self) -> None:
        """The updates of a step are made or refused."""
        self.in_a_row = 0 if self._made else self.in_a_row + 1
        self._made = False

    def largest_norm(self) -> float:
        """Above which a gradient is a spike; infinite while fewer than `spike_window` are known."""
        if self._config.spike_factor == 0 or len(self._norms) < self._config.spike_window:
            return float("inf")
        return self._config.spike_factor * statistics.median(self._norms)

    def state(self) -> dict:
        """What a resumed run needs to refuse the same updates."""
        return {
            "norms": list(self._norms),
            "skipped": self.skipped,
            "spikes": self.spikes,
            "in_a_row": self.in_a_row,
        }

    def load_state(self, state: dict) -> None:
        self._norms.extend(state["norms"])
        self.skipped, self.spikes = state["skipped"], state["spikes"]
        self.in_a_row = state["in_a_row"]


def require_sound(engine: Engine, ranks: Ranks, where: str) -> None:
    """Refuse weights, moments or an EMA that are not finite on some rank. A collective.

    Args:
        where: ends the message: what is left to go on from.

    Raises:
        NumericsError: on every rank the same.
    """
    found = sorted({name for names in ranks.gather(engine.shards.not_finite()) for name in names})
    if found:
        more = f" and {len(found) - 3} more" if len(found) > 3 else ""
        raise NumericsError(
            f"not finite: {', '.join(found[:3])}{more}. No checkpoint is made of them; {where}"
        )
