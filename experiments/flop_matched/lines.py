"""What results.jsonl holds: a line for each arm, seed, stage, step of that stage and temperature.

stage       `sweep` (of the base, over temperatures), `pretrain`, `sft`, `rlvr`
stage_step  optimizer steps of that stage; 0 where nothing is trained
n           positions that were read, each with `thoughts` thoughts
input_tokens, flops, paper_flops, seconds
            of the stage so far, as its ledger counts them; null where that is not known
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from rlp.measure.results_file import Layout
from rlp.process.schemas import NUMBER, Maybe

ROOT = Path(__file__).parents[2]

TEMPERATURES = (1.0, 0.3)
"""At which every arm's thoughts are read."""

SWEEP = (0.2, 0.3, 0.5, 0.7, 1.0, 1.3, 1.6, 2.0)
"""At which the base's are."""

STEPS = {"sft": (8, 16, 64), "rlvr": (20, 40, 80)}
"""Of each stage of post-training, at which the model is read."""
RLVR_FROM = 16
"""Step of the fine-tuning that RLVR goes on from: a little of it, for enough of it is all that an
arm needs."""

FIGURES = (
    "accuracy_with_thought",
    "accuracy_without_thought",
    "gain_over_start_nats",
    "gain_over_no_think_nats",
    "document_loss_nats",
    "thought_tokens_mean",
)
AMOUNTS = ("input_tokens", "flops", "paper_flops", "seconds")

LAYOUT = Layout(
    identity=("arm", "seed", "stage", "stage_step", "temperature"),
    figures=("n", "thoughts", *FIGURES, *AMOUNTS),
    others=dict.fromkeys(
        (
            "accuracy_on_other_documents",
            "accuracy_of_vote",
            "gain_of_mixture_nats",
            "computed_frac",
            "computing_share",
            "computing_right_frac",
            "computing_gain_nats",
        ),
        Maybe(NUMBER),
    ),
)


def figures_of(means: dict, temperature: float, thoughts: int) -> dict:
    """The part of a line that says what was read, from the numbers of a panel."""
    return {
        "temperature": temperature,
        "n": int(means["panel_positions"]),
        "thoughts": thoughts,
        **{name: means.get(name) for name in FIGURES},
    }
