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
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stderr, redirect_stdout
from multiprocessing import get_context
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
sys.path.insert(0, str(Path(__file__).parent))

from arms import ARMS, REFERENCE, SETTINGS
from lines import ROOT, TEMPERATURES
from pretraining import Pretraining, arm_folder
from worlds import make_world, reader_of

from rlp.process.ranks import start_ranks

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


def attempt(arm: str, settings: dict, out: Path) -> dict:
    """Run an arm with some settings and read it at both temperatures."""
    label = "_".join(str(value) for value in settings.values())
    folder = out / "tuning" / arm / label
    folder.mkdir(parents=True, exist_ok=True)
    with (
        (folder / "log.txt").open("a", encoding="utf-8") as log,
        redirect_stdout(log),
        redirect_stderr(log),
    ):
        ranks = start_ranks()
        reader, reference = reader_of(SEED, ranks), arm_folder(out, REFERENCE, SEED) / "run"
        work = Pretraining(arm, SEED, settings, folder, reference, ranks, draws=False)
        model, _, _ = work.train(reader)
        figures = [reader.figures(model, T) for T in TEMPERATURES]
    return {
        "arm": arm,
        "settings": settings,
        "accuracy": [round(one["accuracy_with_thought"], 4) for one in figures],
        "gain": [round(one["gain_over_start_nats"], 4) for one in figures],
    }


def make_reference(out: Path) -> None:
    """The world of the seed, and RLP's run on it as configs/quickstart.yaml has it."""
    ranks = start_ranks()
    make_world(SEED)
    folder = arm_folder(out, REFERENCE, SEED)
    folder.mkdir(parents=True, exist_ok=True)
    reader = reader_of(SEED, ranks)
    Pretraining(REFERENCE, SEED, {}, folder, folder / "run", ranks).train(reader)


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
    with ProcessPoolExecutor(arguments.workers, mp_context=get_context("spawn")) as pool:
        if left:
            pool.submit(make_reference, out).result()
        for future in [pool.submit(attempt, arm, settings, out) for arm, settings in left]:
            tried.append(future.result())
            write_settings(tried)
            print(json.dumps(tried[-1]), flush=True)
    return 0


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
