"""When a run ends, and what its learning rate is until then."""

import math
from dataclasses import asdict

from rlp.config import BudgetConfig, OptimConfig
from rlp.measure.ledger import Ledger


def fraction_spent(budget: BudgetConfig, step: int, ledger: Ledger) -> float:
    """Largest fraction spent of what any limit of the budget has left for the run itself: what
    making its data has cost is no progress of it, so a schedule begins at its beginning; 1 where
    that is all.

    Args:
        step: steps that are made.
    """
    spent, carried = {"steps": step, **ledger.spent()}, {"steps": 0, **ledger.carried()}
    return max(
        (spent[name] - carried[name]) / (limit - carried[name]) if limit > carried[name] else 1.0
        for name, limit in limits(budget).items()
    )


def is_spent(budget: BudgetConfig, step: int, ledger: Ledger) -> bool:
    """Whether the run ends: its steps are made, or the next step would leave another limit farther
    behind than this one is before it."""
    spent = {"steps": step, **ledger.spent()}
    costs = {"steps": 0.0, **ledger.mean_step()}
    return any(spent[name] + costs[name] / 2 >= limit for name, limit in limits(budget).items())


def known_steps(budget: BudgetConfig) -> int | None:
    """Steps of the whole run, where nothing else limits it."""
    others = any(limit for name, limit in asdict(budget).items() if name != "steps")
    return None if others else budget.steps


def limits(budget: BudgetConfig) -> dict[str, float]:
    """Those that are set, by name."""
    return {name: limit for name, limit in asdict(budget).items() if limit is not None}


def is_due(every_n_steps: int, step: int) -> bool:
    """Whether something done every n steps is done at this step; never for 0."""
    return every_n_steps > 0 and step % every_n_steps == 0


def learning_rate_at(config: OptimConfig, step: int, progress: float) -> float:
    """Learning rate of a step: linear warm-up, then the schedule over the budget.

    Args:
        step: 1 for the first.
        progress: fraction of the budget that is spent before the step.
    """
    warmup = min(1.0, step / config.warmup_steps) if config.warmup_steps else 1.0
    if config.schedule == "constant":
        return config.learning_rate * warmup
    shape = {
        "linear": 1 - progress,
        "cosine": (1 + math.cos(math.pi * min(progress, 1.0))) / 2,
    }[config.schedule]
    final = config.final_fraction
    return config.learning_rate * warmup * (final + (1 - final) * shape)
