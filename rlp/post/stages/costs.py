"""What a ledger of a run says, in the words of a stage."""

from rlp.measure.ledger import PHASES
from rlp.post.stages.interface import Spent


def spent_of(ledger: dict) -> Spent:
    """
    Args:
        ledger: as `Ledger.to_json` has it.
    """
    phases = ledger.get("phases", {})

    def total(what: str, *names: str) -> int:
        return sum(phases.get(name, {}).get(what, 0) for name in names)

    return Spent(
        optimizer_steps=ledger["steps"],
        input_tokens=ledger["input_tokens"],
        generated_tokens=total("tokens_generated", *PHASES),
        scored_tokens=total("tokens_in", "score", "teacher"),
        rewarded_tokens=total("tokens_trained", "train"),
        flops=ledger["flops"],
        paper_flops=ledger["paper_flops"],
        seconds=ledger["seconds"],
        counted_without=tuple(ledger.get("counted_without", ())),
    )
