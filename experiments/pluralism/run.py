"""Does a model keep the spread of a population, the steering by a name, and several views in one
answer, through training on what most people say?

    python -m experiments.pluralism.run --seeds 10      # goes on where it was stopped
    python -m experiments.pluralism.report              # the tables and the picture of README.md

Arm by arm, a model's lines are added to results.jsonl once it is read.
"""

import argparse
import json
import time
from pathlib import Path

from experiments.pluralism.reading import read_controls, read_model  # rlp before torch
from experiments.pluralism.report import ARMS, CONTROLS, LAYOUT, RESULTS
from experiments.pluralism.training import SFT_ARMS, Asked, make_base, reinforce, supervise
from experiments.pluralism.world import World
from rlp.measure.results_file import add_results, read_results
from rlp.process.files import make_folder


def model_of(world: World, arm: str, home: Path) -> Path:
    """Train an arm, or take the model that is there."""
    base, out = home / "base", home / arm
    if (out / "tokenizer_config.json").exists():
        return out
    if arm == "base":
        make_base(world, out)
    elif arm in SFT_ARMS:
        supervise(world, arm, base, out)
    else:
        reinforce(world, base, out)
    return out


def lines_of(world: World, arm: str, home: Path) -> list[dict]:
    """The lines of an arm, one for each panel."""
    start = time.process_time()
    model = model_of(world, arm, home)
    seconds = time.process_time() - start
    told = {"arm": arm, "seed": world.seed, "seconds": round(seconds, 1)}
    return [told | line for line in read_model(world, Asked(model))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=10, metavar="N", help="how many (10)")
    parser.add_argument("--first", type=int, default=0, help="seed to begin with")
    parser.add_argument("--out", type=Path, default=Path("runs/pluralism"), metavar="FOLDER")
    parser.add_argument("--results", type=Path, default=RESULTS)
    asked_for = parser.parse_args()
    for seed in range(asked_for.first, asked_for.first + asked_for.seeds):
        world, home = World(seed), asked_for.out.resolve() / f"seed_{seed}"
        make_folder(home, exist_ok=True)
        if not read_results(asked_for.results, LAYOUT).has(arm=next(iter(CONTROLS)), seed=seed):
            lines = [line | {"seed": seed, "seconds": None} for line in read_controls(world)]
            add_results(asked_for.results, LAYOUT, lines)
        for arm in ARMS:
            if not read_results(asked_for.results, LAYOUT).has(arm=arm, seed=seed):
                lines = lines_of(world, arm, home)
                add_results(asked_for.results, LAYOUT, lines)
                print("\n".join(map(json.dumps, lines)), flush=True)


if __name__ == "__main__":
    main()
