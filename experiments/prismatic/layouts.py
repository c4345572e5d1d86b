"""What the lines of the results hold."""

from pathlib import Path

from rlp.measure.results_file import Layout

HERE = Path(__file__).parent
RESULTS = HERE / "results.jsonl"

MEASURES = (
    "g_vendi",
    "g_vendi_untrained",
    "hidden_vendi",
    "ngram_vendi",
    "nats",
    "skills",
    "entries",
)
"""Of a set, before anything is trained on it."""

SET_LAYOUT = Layout(
    identity=("arm", "seed"),
    figures=(*MEASURES, "accuracy", "accuracy_before", "seconds"),
)
"""`accuracy` is that of the student on held-out problems of every skill, `accuracy_before` the
base's; `seconds` of CPU."""

LOOP = HERE / "loop.jsonl"
LOOP_ARMS = ("random", "words", "hidden", "gradient", "all")
LOOP_LAYOUT = Layout(
    identity=("arm", "seed"),
    figures=(
        "kept",
        "proposed",
        "answers",
        "skills",
        "entries",
        "covered",
        "error_one",
        "error_kept",
        "undecided",
        "duplicates",
        "g_vendi",
        "accuracy",
        "seconds",
    ),
)
"""`skills` and `entries` are the equally frequent ones that the pool amounts to, `covered` skills
with at least four examples; errors are shares of wrong answers: of one answer of the solver, and of
those that were kept after the vote."""

GSM8K = HERE / "gsm8k.jsonl"
SUBSETS = (
    "random",
    "repeated_2",
    "repeated_4",
    "repeated_8",
    "repeated_16",
    "short",
    "long",
    "words_near",
    "gradients_near",
    "gradients_sparse",
    "gradients_dense",
)
GSM8K_MEASURES = ("g_vendi", "hidden_vendi", "word_vendi", "nats", "tokens")
GSM8K_LAYOUT = Layout(
    identity=("arm", "seed"),
    figures=(*GSM8K_MEASURES, "held_out_nats", "held_out_right", "seconds"),
)
"""`nats` per token of the answers under the real model, `tokens` of a problem; what a student says
of held-out answers, per token."""

PRETRAINING = HERE / "pretraining.jsonl"
PRETRAINING_ARMS = ("random", "distinct", "selected")
PRETRAINING_LAYOUT = Layout(
    identity=("arm", "seed"),
    figures=("distinct", "straight", "before", "accuracy", "flops", "seconds"),
)
"""Different questions, and the share of lopsided ones, of what is trained on; held-out accuracy
after a thought."""
