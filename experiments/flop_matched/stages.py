"""The comparison as a pipeline (`rlp pipeline`): the stage of each arm, the post-training that all
get, and what every model is read by.

RLP trains on the world of a seed with configs/quickstart.yaml, told where the answers are, and no
LM loss. Every other arm is matched with that run, and asserts the match to 1 % at its end.
"""

import sys
from pathlib import Path

import yaml
from arms import ARMS, POST_TRAINED, REFERENCE, settings_of
from lines import RLVR_FROM, STEPS, TEMPERATURES
from worlds import AT_PANEL, CURVE, PANEL, panel_of, world_folder

sys.path.append(str(Path(__file__).parents[1] / "pipeline"))

from prepare import write_rows

COMMON = (
    "logging.every_n_steps=20",
    "logging.thoughts=8",
    "evaluation.cold_temperature=null",
)
ROUNDS = 3
"""Of mixed SFT."""

POST = {"sft": "sft", "grpo": "rlvr"}
"""Stages after pretraining in the pipeline, and what results.jsonl calls them."""
BATCH, GENERATIONS = 8, 8


def stage_of(arm: str, settings: dict, evaluates_every: int) -> dict:
    """The stage that pretrains an arm.

    Args:
        settings: that tuning chose, or tries.
        evaluates_every: steps between the points of its curve; 0: none.
    """
    made = ARMS[arm]
    chosen = [f"{key}={value}" for key, value in settings.items() if "." in key]
    own = [f"run.arm={arm}", f"evaluation.every_n_steps={evaluates_every}"]
    common = [*own, *COMMON, *panel_of(CURVE), *chosen]
    if arm == REFERENCE:
        overrides = ["objective.lm_weight=0", *AT_PANEL, *common]
        config = str(world_folder("{seed}") / "quickstart.yaml")
        return {"kind": "rlp", "config": config, "overrides": overrides}
    match = {"stage": REFERENCE, "by": made.by}
    if made.kind == "mixed_sft":
        parts = {name: settings[name] for name in ("documents", "learning_rate", "loss")}
        overrides = [*COMMON, *made.overrides]
        return {"kind": "mixed_sft", "match": match, "rounds": ROUNDS, "overrides": overrides} | (
            parts
        )
    stage = {
        "kind": "cpt" if made.kind in ("cpt", "cpt_replay") else "rlp",
        "match": match | {"arm": made.kind},
        "overrides": [*common, *made.overrides],
    }
    replay = {name: settings[name] for name in ("documents", "plain_share") if name in settings}
    return stage | replay


def post_training(rows: Path) -> dict[str, dict]:
    """SFT on computing thoughts and answers, then RL from verifiable rewards on questions.

    Args:
        rows: folder of a folder for each seed.
    """
    one = {"batch_size": BATCH, "checkpoint_every": 20}
    *sft, sft_steps = STEPS["sft"]
    *rlvr, rlvr_steps = STEPS["rlvr"]
    return {
        "sft": one
        | {
            "kind": "sft",
            "data": [str(rows / "{seed}" / "sft.jsonl")],
            "steps": sft_steps,
            "keep_steps": sft,
            "hand_on": RLVR_FROM,
            "learning_rate": 3e-5,
            "max_tokens": 64,
        },
        "grpo": one
        | {
            "kind": "rlvr",
            "data": [str(rows / "{seed}" / "rlvr.jsonl")],
            "steps": rlvr_steps,
            "keep_steps": rlvr,
            "generations": GENERATIONS,
            # 12 words of thought, the close marker, the answer, and two to spare
            "max_completion_tokens": 16,
            "learning_rate": 1e-4,
        },
    }


def evaluation() -> dict:
    """The panel of a seed's world, fewer thoughts along a curve."""
    panel = {
        "config": str(world_folder("{seed}") / "quickstart.yaml"),
        "overrides": [*AT_PANEL, *panel_of(PANEL)],
        "curve_thoughts": CURVE[1],
    }
    return {"temperatures": list(TEMPERATURES), "panel": panel}


def comparison(out: Path, arms: list[str], seeds: list[int], stages: tuple[str, ...]) -> dict:
    """The YAML of the comparison, as a mapping.

    Args:
        stages: `pretrain`, and what follows it in the order of `lines.STEPS`.
    """
    trained = [arm for arm in arms if ARMS[arm].is_trained]
    behind = [name for name, told in POST.items() if told in stages]
    chains = {arm: [arm] for arm in trained}
    for arm in arms:
        if arm in POST_TRAINED and behind:
            chains[arm] = [*chains.get(arm, []), *behind]
    made = {arm: stage_of(arm, settings_of(arm), ARMS[arm].evaluates_every) for arm in trained}
    return {
        "dir": str(out / "pipeline"),
        "seeds": seeds,
        "model": str(world_folder("{seed}") / "base"),
        "stages": made | post_training(out / "rows"),
        "arms": chains,
        "evaluation": evaluation(),
    }


def write_pipeline(mapping: dict, path: Path) -> Path:
    """Write the YAML of a pipeline, and the rows that its post-training reads."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(mapping, sort_keys=False, width=100), encoding="utf-8")
    for seed in mapping["seeds"]:
        write_rows(seed, BATCH * STEPS["sft"][-1], BATCH * STEPS["rlvr"][-1], path.parent / "rows")
    return path
