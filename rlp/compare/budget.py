"""Equal budgets: a run that spends what another one has spent, asserts it and shows it.

`rlp.compare.arms` writes the config of such a run; this is what the run itself does with it, by the
section `match` of its config.
"""

from dataclasses import asdict, dataclass
from pathlib import Path

from rlp.config import Config, ConfigError
from rlp.measure.verdict import TOLERANCE
from rlp.process.json_files import DamagedFileError, read_json
from rlp.process.schemas import WHOLE_LEDGER

AMOUNTS = {
    "tokens": "input_tokens",
    "flops": "flops",
    "paper_flops": "paper_flops",
    "seconds": "seconds",
}
"""What two runs may spend alike, and its name in `ledger.json`."""

TOTALS = ("steps", "input_tokens", "flops", "paper_flops", "paper_flops_sampled", "seconds")
"""Numbers of a whole run in `ledger.json`, in the order in which they are shown."""


def amount_spent(ledger: dict, by: str, where: Path | str) -> float:
    """What a run has spent.

    Args:
        by: in `AMOUNTS`.
        where: the ledger's file, for messages.

    Raises:
        ConfigError: it has spent nothing, or its FLOPs are not known.
    """
    if by == "flops" and ledger.get("counted_without"):
        raise ConfigError(
            f"{where}: the FLOPs of this model are counted without"
            f" {', '.join(ledger['counted_without'])}, whose cost is not known, so two runs can not"
            " be matched by them. Write --by tokens or --by seconds (in a config: match.by and its"
            " budget)."
        )
    amount = ledger.get(AMOUNTS[by])
    if amount is None or not amount > 0:
        raise ConfigError(
            f"{where}: {AMOUNTS[by]} is {amount!r}; expected what a finished run has spent."
        )
    return amount


@dataclass(frozen=True, slots=True)
class BudgetMatch:
    """What this run is to spend, and the ledger it is taken from."""

    by: str
    """In `AMOUNTS`."""
    other: dict
    """The ledger of the run that this one is held against."""

    def ratio(self, own: dict) -> float:
        """What this run has spent over what the other one has."""
        return own[AMOUNTS[self.by]] / self.other[AMOUNTS[self.by]]

    def holds(self, own: dict) -> bool:
        """Whether the two agree to 1 %."""
        return abs(self.ratio(own) - 1) <= TOLERANCE

    def table(self, own: dict) -> str:
        """Both ledgers, line by line."""
        rows = [(name, self.other[name], own[name]) for name in TOTALS]
        for phase, spent in own["phases"].items():
            if phase in self.other["phases"]:
                theirs = self.other["phases"][phase]["flops"]
                rows.append((f"{phase} flops", theirs, spent["flops"]))

        lines = [f"{'ledger':<24}{'matched run':>14}{'this run':>14}{'ratio':>9}"]
        for name, theirs, ours in rows:
            if theirs or ours:
                ratio = ours / theirs if theirs else float("nan")
                lines.append(f"{name:<24}{theirs:>14.4g}{ours:>14.4g}{ratio:>9.3f}")

        verdict = "matched"
        if not self.holds(own):
            verdict = (
                "NOT MATCHED: the two are no comparison. Smaller steps (optim.batch_size) come"
                " nearer"
            )
        lines.append(
            f"{AMOUNTS[self.by]}: ratio {self.ratio(own):.4f}, allowed 1 +- {TOLERANCE:g}:"
            f" {verdict}"
        )
        return "\n".join(lines)


def open_budget_match(config: Config) -> BudgetMatch | None:
    """The match that a config asks for, or None.

    Raises:
        ConfigError: its ledger can not be read, or holds another amount than the budget.
    """
    path, by = config.match.ledger, config.match.by
    if path is None:
        return None
    try:
        # Whoever writes the path may name a link.
        other = read_json(Path(path).resolve(), WHOLE_LEDGER)
    except (OSError, DamagedFileError) as error:
        raise ConfigError(
            f"match.ledger: {path} can not be read: {error}. Write the ledger.json of the finished"
            " run, or match.ledger=null."
        ) from error

    amount, limit = amount_spent(other, by, f"match.ledger: {path}"), asdict(config.budget)[by]
    if abs(limit / amount - 1) > TOLERANCE:
        raise ConfigError(f"budget.{by}: must be what {path} says, {amount:.6g}, got {limit:.6g}.")
    return BudgetMatch(by, other)
