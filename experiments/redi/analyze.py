"""Write the tables, the claims and the picture of README.md from results.jsonl.

python experiments/redi/analyze.py
"""

from pathlib import Path

from rlp.measure.results_file import Layout
from rlp.process.schemas import COUNT, PLAIN, Many, Maybe

RESULTS = Path(__file__).parent / "results.jsonl"
FIGURES = (
    "rate",
    "pass_1",
    "pass_8",
    "right",
    "chosen",
    "rejected",
    "slip",
    "after_slip",
    "gradient_first",
    "gradient_last",
    "seconds",
)
"""pass@1 and pass@8 at held-out questions. Log-probabilities in nats a token: of the right traces
of held-out questions, of the chosen and rejected of the arm's pairs, of the first wrong token of a
rejected, and of the tokens behind it that are right where they stand. Norms of the gradient, of the
first and last ten steps. CPU seconds."""

LAYOUT = Layout(
    identity=("arm", "seed"),
    figures=FIGURES,
    others={"pairs": COUNT, "curve": Many(PLAIN), "collapse": Maybe(COUNT)},
)
"""An arm is `NAME@RATE`, or `start`. `curve` is how the start came about; `collapse` the step at
which the alarm fired."""

START = "start"
RATES = (3e-5, 3e-4)
ARMS: dict[str, dict[str, object]] = {
    "alpha_0": {"alpha": 0.0},
    "alpha_0.2": {"alpha": 0.2},
    "alpha_0.5": {"alpha": 0.5},
    "alpha_0.8": {"alpha": 0.8},
    "alpha_1": {"alpha": 1.0},
    "first_wrong": {"alpha": 0.8, "negative": "first_wrong"},
    "after_wrong": {"alpha": 0.8, "negative": "after_wrong"},
    "dpo": {"loss": "dpo", "beta": 0.1},
    "simpo": {"loss": "simpo", "beta": 2.0},
}
"""Settings of the stage `redi`."""
OWN = "own_"
OWN_ARMS = ("alpha_0", "alpha_0.2", "alpha_0.8", "alpha_1", "first_wrong")
"""Of pairs of the start's own traces; they are called `own_NAME@RATE`."""
