"""The arms of the comparison, and with which settings each is run.

An arm is RLP's run with one thing changed, by the same name in `rlp match`, in results.jsonl and in
the tables. `FAMILY` is what the claim is about: RLP against each of its arms, with Holm's
correction over all of them. `BESIDE` are questions of their own. Rates, and what else was tuned,
stand in settings.json, which tune.py makes on a seed that the comparison does not use.
"""

import json
from dataclasses import dataclass
from pathlib import Path

SETTINGS = Path(__file__).parent / "settings.json"
REFERENCE = "rlp"


@dataclass(frozen=True, slots=True)
class Arm:
    """One way to spend what RLP spends."""

    words: str
    """Its name in tables and sentences."""
    kind: str | None = None
    """`--arm` of `rlp match`; None where nothing is trained, and for RLP itself."""
    by: str = "flops"
    overrides: tuple[str, ...] = ()
    """What it changes beside that."""
    evaluates_every: int = 20
    """Steps between the points of its curve."""
    tuned_as: str | None = None
    """The arm whose settings it has; None: its own, where it has any."""

    @property
    def is_trained(self) -> bool:
        return self.kind is not None or self is ARMS[REFERENCE]


ARMS = {
    REFERENCE: Arm("RLP"),
    "base": Arm("base"),
    "base_best_of_g": Arm("base's best of 8"),
    "cpt": Arm("CPT", "cpt", evaluates_every=100),
    "cpt_replay": Arm("CPT + replay", "cpt_replay", evaluates_every=80),
    "mixed_sft": Arm("mixed SFT", "mixed_sft", overrides=("position.per_document=2",)),
    "greedy_match": Arm("greedy match", "greedy_match"),
    "rpt": Arm("RPT", "rpt"),
    "rlvr": Arm("RLVR", "rlvr"),
    "rlp_lm": Arm("RLP + LM", "rlp_lm"),
    "shuffled_reward": Arm("shuffled reward", "shuffled_reward"),
    "other_thought": Arm("other thought", "other_thought"),
    "rlp_entropy": Arm(
        "RLP + LM at 2 entropy positions",
        "rlp_lm",
        overrides=(
            "position.selector=entropy",
            "position.marker=null",
            "position.per_document=2",
            "optim.batch_size=8",
            "optim.micro_batch_size=8",
        ),
        tuned_as=REFERENCE,
    ),
    "rlp_uniform": Arm(
        "RLP at 4 uniform positions",
        "rlp_uniform",
        overrides=(
            "position.per_document=4",
            "optim.batch_size=4",
            "optim.micro_batch_size=4",
        ),
        tuned_as=REFERENCE,
    ),
    "rlp_paper": Arm(
        "RLP with the paper's positions, group and temperature",
        "rlp_paper",
        overrides=("optim.batch_size=8", "optim.micro_batch_size=8"),
        tuned_as=REFERENCE,
    ),
    "rlp_fast": Arm(
        "RLP at three times the rate",
        "rlp",
        overrides=("optim.learning_rate=3e-4",),
        tuned_as=REFERENCE,
    ),
    "rlp_bounded": Arm(
        "RLP with a floor under the gain",
        "rlp",
        overrides=("reward.kind=bounded:BoundedGain",),
        tuned_as=REFERENCE,
    ),
    "cpt_seconds": Arm("CPT for equal seconds", "cpt", by="seconds", tuned_as="cpt"),
}
"""In the order of the tables."""

FAMILY = tuple(ARMS)[1:12]
"""What RLP is held against; the claim is corrected for so many comparisons."""

BESIDE = tuple(ARMS)[12:]
"""Other questions, each by itself."""

POST_TRAINED = (REFERENCE, *(arm for arm in FAMILY if arm != "base_best_of_g"))
FIRST = (REFERENCE, "base", "mixed_sft", "greedy_match", "rlvr", "cpt_replay", "shuffled_reward")
"""Those whose post-training is done first, where time may be short."""


def settings_of(arm: str) -> dict[str, object]:
    """What tuning chose for an arm: overrides by their keys, and what its data are made with."""
    chosen = json.loads(SETTINGS.read_text(encoding="utf-8"))["chosen"]
    return chosen.get(ARMS[arm].tuned_as or arm, {})
