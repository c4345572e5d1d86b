"""Learning rates of all arms, and what else mixed SFT has, chosen on a seed of their own.

    python experiments/flop_matched/tune.py

Every arm that learns is run at every rate of one grid on the world of `SEED`, which the comparison
does not use, and read on that world's panel. One rule for all, RLP too: the smallest rate whose
accuracy with a thought (mean of T 1 and T 0.3) is at most `MARGIN` below the highest, which is what
a panel can not tell apart. settings.json holds what was chosen and all that was tried; run.py reads
it.
"""

import argparse
import itertools
import json
import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
sys.path.insert(0, str(Path(__file__).parent))

from arms import ARMS, REFERENCE, SETTINGS
from lines import ROOT, TEMPERATURES
from stages import evaluation, stage_of, write_pipeline
from worlds import make_world, world_folder

from rlp.measure.results_file import Results
from rlp.post.pipeline_config import load_pipeline
from rlp.post.pipeline_results import open_results, results_path
from rlp.post.pipeline_run import run_pipeline

SEED = 100
RATES = (3e-5, 1e-4, 3e-4, 1e-3)
RATE_KEYS = ("optim.learning_rate", "learning_rate")
MARGIN = 0.01
"""Two standard errors of a difference between accuracies near the ceiling."""
DOCUMENTS = (96, 288)
"""Documents that mixed SFT thinks about in a round, at two positions each."""
LOSSES = ("all", "thought_and_target")
REPLAYED, PLAIN_SHARE = 1280, 0.5
"""Documents of CPT with replay, as many as RLP reads, half of them with a thought."""


def grid(arm: str) -> list[dict]:
    """All settings that are tried for an arm."""
    if arm == "mixed_sft":
        tried = itertools.product(DOCUMENTS, LOSSES, RATES)
        return [{"documents": d, "loss": loss, "learning_rate": rate} for d, loss, rate in tried]
    own = {"documents": REPLAYED, "plain_share": PLAIN_SHARE} if arm == "cpt_replay" else {}
    return [own | {"optim.learning_rate": rate} for rate in RATES]


def tuned_arms() -> list[str]:
    """Arms that learn, but for those that have another's settings."""
    return [arm for arm, made in ARMS.items() if made.is_trained and made.tuned_as is None]


def label(arm: str, settings: dict) -> str:
    """The name of a try: its arm and its values, such as cpt_3e-05."""
    return "_".join([arm, "tried", *(str(value).replace(".", "-") for value in settings.values())])


def tries(out: Path, left: list[tuple[str, dict]]) -> dict:
    """The YAML of a pipeline with an arm for each try, beside RLP's run as configs/quickstart.yaml
    has it, whose cost they spend."""
    stages = {REFERENCE: stage_of(REFERENCE, {}, evaluates_every=0)}
    stages |= {
        label(arm, settings): stage_of(arm, settings, evaluates_every=0) for arm, settings in left
    }
    return {
        "dir": str(out / "tuning"),
        "seeds": [SEED],
        "model": str(world_folder("{seed}") / "base"),
        "stages": stages,
        "arms": {name: [name] for name in stages},
        "evaluation": evaluation(),
    }


def tried_line(arm: str, settings: dict, results: Results) -> dict | None:
    """What came of a try, where it is done: its last model at both temperatures."""
    lines = results.where(arm=label(arm, settings), stage=label(arm, settings)).lines
    if not lines:
        return None
    last = max(line["stage_step"] for line in lines)
    ends = {line["temperature"]: line for line in lines if line["stage_step"] == last}
    return {
        "arm": arm,
        "settings": settings,
        "accuracy": [round(ends[T]["accuracy_with_thought"], 4) for T in TEMPERATURES],
        "gain": [round(ends[T]["gain_over_start_nats"], 4) for T in TEMPERATURES],
    }


def best(tried: list[dict]) -> dict:
    """What is chosen of the tries of one arm: the smallest rate among those that the panel does not
    tell from the highest accuracy, and of these the most accurate."""

    def accuracy(one: dict) -> float:
        return sum(one["accuracy"]) / len(one["accuracy"])

    def rate(one: dict) -> float:
        return next(one["settings"][key] for key in RATE_KEYS if key in one["settings"])

    highest = max(map(accuracy, tried))
    near = [one for one in tried if accuracy(one) >= highest - MARGIN]
    return min(near, key=lambda one: (rate(one), -accuracy(one)))


def main() -> int:
    parser = argparse.ArgumentParser(description="Learning rates of all arms, on a seed apart.")
    parser.add_argument("--out", type=Path, default=Path("runs/flop_matched"))
    parser.add_argument("--arms", nargs="+", choices=tuned_arms(), default=tuned_arms())
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()
    out = arguments.out.resolve()
    os.chdir(ROOT)

    tried = json.loads(SETTINGS.read_text())["tried"] if SETTINGS.exists() else []
    there = [(one["arm"], one["settings"]) for one in tried]
    asked = [(arm, settings) for arm in arguments.arms for settings in grid(arm)]
    left = [pair for pair in asked if pair not in there]
    print(f"{SETTINGS}: {len(tried)} are tried, {len(left)} are left")
    if not left:
        return 0
    make_world(SEED)
    path = write_pipeline(tries(out, left), out / "tuning.yaml")
    pipeline = load_pipeline(path)
    code = run_pipeline(pipeline, path.read_bytes(), print, arguments.workers)
    results = open_results(results_path(pipeline))
    found = [tried_line(arm, settings, results) for arm, settings in left]
    write_settings([*tried, *(line for line in found if line is not None)])
    return code


def write_settings(tried: list[dict]) -> None:
    """settings.json: the best of each arm, and a line for each try, in the order of the grids."""
    arms = [arm for arm in tuned_arms() if any(one["arm"] == arm for one in tried)]
    tried = sorted(
        tried, key=lambda one: (arms.index(one["arm"]), grid(one["arm"]).index(one["settings"]))
    )
    taken = {arm: best([one for one in tried if one["arm"] == arm])["settings"] for arm in arms}
    chosen = json.dumps(taken, indent=1)
    lines = ",\n".join(f"  {json.dumps(one)}" for one in tried)
    told = f'{{"seed": {SEED},\n "chosen": {chosen},\n "tried": [\n{lines}\n ]}}\n'
    SETTINGS.write_text(told, encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
