"""What a line of results.jsonl holds, the arms in the order in which they are run, and the sizes of
the experiment on two kinds of machine."""

from dataclasses import dataclass

from rlp.measure.results_file import Layout
from rlp.process.schemas import NAME, NUMBER, Maybe

REFERENCE = "rlp"

ARMS: dict[str, str] = {
    REFERENCE: "",
    "shuffled_reward": "tokens",
    "mixed_sft": "flops",
    "cpt_replay": "flops",
    "cpt": "flops",
    "greedy_match": "tokens",
    "rlp_lm": "tokens",
}
"""What an arm spends alike with RLP of its seed (`rlp match --by`). Arms that think differ from it
in no step's size: as many steps are the same documents and, but for the length of thoughts, the
same FLOPs."""

WORDS = {
    "base": "the start",
    "rlp": "RLP",
    "shuffled_reward": "shuffled reward",
    "mixed_sft": "mixed SFT",
    "cpt_replay": "CPT with thought replay",
    "cpt": "CPT",
    "greedy_match": "greedy match",
    "rlp_lm": "RLP + LM",
}

COLD, WARM, CALIBRATED, TRAINED = "cold", "warm", "calibrated", "arms"
"""Stages: the model as it comes, the three that lead to the start, and the arms."""

LAYOUT = Layout(
    ("arm", "seed", "stage", "panel", "temperature"),
    ("n", "gain", "accuracy", "loss", "flops", "seconds"),
    {
        **dict.fromkeys(
            (
                *("documents", "gain_low", "gain_high", "gain_over_start", "accuracy_without"),
                *("best_of_g", "best_of_g_low", "best_of_g_high", "surest_gain"),
                *("surest_accuracy", "over_another", "thought_tokens", "closed_frac", "group_size"),
                *("steps", "no_think", "read_s"),
            ),
            Maybe(NUMBER),
        ),
        "machine": NAME,
    },
)
"""gain: nats a token over the model's own prediction without a thought; gain_over_start: over that
of the arms' start; best_of_g: chosen by one half of the target, scored on the other; flops and
seconds: of the training since the start; read_s: of the reading itself."""


@dataclass(frozen=True, slots=True)
class Scale:
    """Sizes."""

    seeds: int
    arms: tuple[str, ...]
    gate_positions: int
    gate_thoughts: int
    early_positions: int
    """Of the panel that the cold and the warm model are read on."""
    arm_positions: int
    """Of the panel of results after each arm; it is read at every temperature."""
    text_positions: int
    """Of the panels of other text."""
    warm: tuple[str, ...] = ()
    calibrate: tuple[str, ...] = ()
    rlp: tuple[str, ...] = ()
    temperatures: tuple[float, ...] = (1.0, 0.3)
    """Thoughts of every arm are read at these; training samples at the config's."""
    gate_temperatures: tuple[float, ...] = (1.0, 0.7, 0.3)
    """The first on the whole panel of the gate, the others on the early one."""


SCALES = {
    "cpu": Scale(
        seeds=6,
        arms=("rlp", "shuffled_reward"),
        gate_positions=256,
        gate_thoughts=4,
        early_positions=96,
        arm_positions=64,
        text_positions=32,
    ),
    "gpu": Scale(
        seeds=8,
        arms=tuple(ARMS),
        gate_positions=574,
        gate_thoughts=8,
        early_positions=574,
        arm_positions=574,
        text_positions=256,
        warm=(
            "budget.tokens=1_000_000",
            "optim.batch_size=64",
            "optim.tokens_per_micro_batch=8192",
        ),
        calibrate=("optim.batch_size=64", "budget.steps=40", "optim.tokens_per_micro_batch=8192"),
        rlp=(
            *("optim.batch_size=64", "thought.group_size=8", "budget.steps=60"),
            "optim.tokens_per_micro_batch=16384",
        ),
    ),
}
"""cpu: two cores of a small machine. gpu: one H100, by the cost of a step as measured elsewhere;
these numbers have not run."""
