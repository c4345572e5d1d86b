"""Bases of the heading world over seeds: the starting checkpoints of every experiment that reports
a spread.

    python experiments/world/make_bases.py --seeds 5 --out experiments/world/bases

Seed 0 is the committed base; every other seed is a run of configs/world_base.yaml with that
`run.seed`, about 100 s on
one core. The rule is fixed beforehand: a base counts when its own held-out accuracy with a thought
is above MIN_ACCURACY, that is, when its training is past the phase change at which it finds the
rule (before it RLP has no signal); otherwise the next seed is tried. Seeds are tried from 0 upwards
until as many count as were asked for.

Files written to --out:

    seed_S/      the export of seed S, for each seed that counts
    bases.json   every seed tried, in order, the rejected ones included, with its held-out numbers

Run again, it makes only what is missing.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[2]
COMMITTED = ROOT / "rlp" / "world" / "base"
"""The base of seed 0."""

MIN_ACCURACY = 0.4
"""Held-out accuracy with a thought of a base that counts; chance is 0.25, and clean bases of the
world have 0.55 to 0.65."""


class BaseError(Exception):
    """No bases can be made; the message says where and what to do."""


def panel_numbers(export: Path) -> dict[str, float]:
    """The held-out numbers of an exported model after its training, by metric name, from its model
    card.

    Raises:
        BaseError: the card has no table of them.
    """
    card = export / "README.md"
    rows = [
        line.strip("| ").split(" | ")
        for line in card.read_text().splitlines()
        if line.startswith("| ")
    ]
    numbers = {row[0]: float(row[2]) for row in rows if len(row) == 3 and row[0].strip()}
    if "accuracy_with_thought" not in numbers:
        raise BaseError(
            f"{card}: no row `accuracy_with_thought` in its table, expected the model card of an"
            f" RLP export. Remove {export} and run this again."
        )
    return numbers


def train_base(seed: int, out: Path) -> Path:
    """Train the base of a seed under `out`; its export.

    Raises:
        BaseError: the training failed; what it printed stands above.
    """
    run = out / f"training_seed_{seed}"
    shutil.rmtree(run, ignore_errors=True)  # left by an interrupted call
    command = [
        sys.executable,
        "train.py",
        "configs/world_base.yaml",
        f"run.dir={run.resolve()}",
        f"run.seed={seed}",
        "checkpoint.every_n_steps=0",
    ]
    done = subprocess.run(command, cwd=ROOT, check=False)
    if done.returncode != 0:
        raise BaseError(
            f"seed {seed}: `{' '.join(command)}` ended with exit code {done.returncode}. Its"
            " message stands above."
        )
    return run / "export"


def add_base(seed: int, out: Path, train: Callable[[int, Path], Path]) -> dict:
    """Make the base of a seed, keep it if it counts; its row of bases.json."""
    folder = out / f"seed_{seed}"
    export = COMMITTED if seed == 0 else train(seed, out)
    numbers = panel_numbers(export)
    counts = numbers["accuracy_with_thought"] > MIN_ACCURACY
    if counts:
        shutil.rmtree(folder, ignore_errors=True)
        arriving = out / f".seed_{seed}"
        shutil.copytree(export, arriving, dirs_exist_ok=True)
        os.replace(arriving, folder)
    if export != COMMITTED:
        shutil.rmtree(export.parent)
    return {"seed": seed, "counts": counts, **numbers}


def make_bases(
    wanted: int, out: Path, train: Callable[[int, Path], Path] = train_base
) -> list[int]:
    """The first `wanted` seeds whose base counts; each has its folder under `out`.

    Args:
        train: makes the export of a seed in a folder of its own under `out`.
    """
    out.mkdir(parents=True, exist_ok=True)
    record = out / "bases.json"
    tried = {row["seed"]: row for row in json.loads(record.read_text())} if record.exists() else {}
    good, seed = [], 0
    while len(good) < wanted:
        complete = seed in tried and (
            not tried[seed]["counts"] or (out / f"seed_{seed}" / "model.safetensors").exists()
        )
        if not complete:
            tried[seed] = add_base(seed, out, train)
            rows = [tried[key] for key in sorted(tried)]
            record.write_text(json.dumps(rows, indent=1) + "\n")
        row = tried[seed]
        print(
            f"seed {seed}: accuracy with a thought {row['accuracy_with_thought']:.3f}:"
            f" {'counts' if row['counts'] else f'rejected (not above {MIN_ACCURACY})'}",
            flush=True,
        )
        good += [seed] if row["counts"] else []
        seed += 1
    return good


def main() -> int:
    parser = argparse.ArgumentParser(description="Bases of the heading world over seeds.")
    parser.add_argument(
        "--seeds", type=int, default=5, help="how many bases that count; 5 by default"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=ROOT / "experiments" / "world" / "bases",
        help="folder of the bases",
    )
    arguments = parser.parse_args()
    try:
        good = make_bases(arguments.seeds, arguments.out)
    except BaseError as error:
        print(f"make_bases: {error}", file=sys.stderr)
        return 2
    print(f"{arguments.out}: seeds {', '.join(map(str, good))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
