"""How rare may the useful thought be? RLP from bases whose thoughts compute in other shares.

    python experiments/world/share.py               # makes what is missing, and README.md's table
    python experiments/world/share.py --table       # the table alone

For every share and seed a world, a base trained as the committed one but for the share of computing
thoughts in the second part of its data, and RLP from it with the quickstart's config, for twice its
steps. The bases have the order and start of their seed, whatever the share. One line of
share.jsonl beside this file has what the base does, and how soon RLP is right.
"""

import argparse
import json
import random
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

from make_bases import HERE, ROOT, BaseError, computed_frac, train_base
from without_training import Base, measure

from rlp.config import ConfigError
from rlp.measure.pages import fill_page, markdown_table
from rlp.measure.results_file import Layout, Results, add_result, read_results
from rlp.process.files import make_folder, write_atomically
from rlp.process.json_files import read_json
from rlp.process.run_logs import read_json_lines
from rlp.world.folder import jsonl, write_world
from rlp.world.problems import split_questions
from rlp.world.rare import base_documents

SHARES = (0.005, 0.01, 0.02, 0.03, 0.06, 0.12, 0.25, 0.5)
SEEDS = (0, 2, 3)
"""Whose bases count at the share of the committed one (make_bases.py)."""
STEPS = 160
RIGHT = 0.9
"""Accuracy with a thought, at temperature 1, of a model that has found it."""
RESULTS, PAGE = HERE / "share.jsonl", HERE / "README.md"
LAYOUT = Layout(
    ("arm", "seed"),
    (
        *("share", "computing_frac", "computed_frac", "steps_to_right", "computing_frac_after"),
        *("base_accuracy", "base_accuracy_cold", "base_gain", "base_surest_of_8"),
        *("accuracy", "accuracy_cold", "accuracy_without", "gain_over_start"),
    ),
)


def world_of(share: float, seed: int, out: Path) -> Path:
    """A world whose base.yaml trains on documents in which so many thoughts compute."""
    folder = out / f"share_{share:g}_seed_{seed}"
    if not (folder / "shared").exists():
        shutil.rmtree(folder, ignore_errors=True)  # left by an interrupted call
        write_world(folder, seed=seed)
        rng = random.Random(f"base_train {seed}")
        documents = base_documents(split_questions(seed)["base_train"], rng, share)
        write_atomically(folder / "base_train.jsonl", jsonl(documents), point="share.torn")
        (folder / "shared").touch()
    return folder


def base_of(folder: Path, seed: int) -> Path:
    """The base of a world, made where it is not there."""
    if not (folder / "trained" / "config.json").exists():
        train_base(folder, seed).replace(folder / "trained")
    return folder / "trained"


def reinforced(folder: Path, base: Path) -> Path:
    """RLP's run from a base."""
    run = folder / "rlp"
    if not (run / "summary.json").exists():
        command = [sys.executable, "train.py", str(folder / "quickstart.yaml")]
        command += [f"run.dir={run}", f"model.path={base}", f"budget.steps={STEPS}"]
        command += ["run.resume=auto"]
        done = subprocess.run(command, cwd=ROOT, check=False)
        if done.returncode != 0:
            raise BaseError(f"`{' '.join(command)}` ended with exit code {done.returncode}.")
    return run


def finding(share: float, seed: int, out: Path) -> dict:
    """A line of share.jsonl."""
    folder = world_of(share, seed, out)
    base = base_of(folder, seed)
    run = reinforced(folder, base)
    held_out = folder / "held_out.jsonl"
    hot, cold = (measure(Base(base, held_out), T, 8) for T in (1.0, 0.3))
    after = measure(Base(run / "export", held_out), 1.0, 8)
    curve = read_json_lines(run / "evaluation.jsonl")
    right = [line["step"] for line in curve if line["accuracy_with_thought"] > RIGHT]
    told = read_json(run / "summary.json")
    return {
        "arm": f"{share:g}",
        "seed": seed,
        "share": share,
        "computing_frac": hot["computing_frac"],
        "computed_frac": computed_frac(base, held_out),
        "base_accuracy": hot["mean"],
        "base_accuracy_cold": cold["mean"],
        "base_gain": hot["gain_nats"],
        "base_surest_of_8": hot["confident"],
        "steps_to_right": right[0] if right else None,
        "computing_frac_after": after["computing_frac"],
        "accuracy": told["after"]["accuracy_with_thought"],
        "accuracy_cold": told["after_cold"]["accuracy_with_thought"],
        "accuracy_without": told["after"]["accuracy_without_thought"],
        "gain_over_start": told["after"]["gain_over_start_nats"],
    }


def table(results: Results) -> str:
    """One row for each share: means over seeds, and how many found it."""
    titles = ["share in the base's data", "thoughts that compute", "right words in these"]
    titles += ["base, T 1", "T 0.3", "surest of 8", "worlds that RLP solves", "steps to 0.9"]
    titles += ["RLP, T 1", "T 0.3", "without a thought"]
    rows = []
    for arm in sorted(results.values("arm"), key=float):
        lines = results.where(arm=arm).lines
        steps = [line["steps_to_right"] for line in lines]
        means = {
            name: statistics.fmean(line[name] for line in lines)
            for name in ("computing_frac", "computed_frac", "base_accuracy", "base_accuracy_cold")
            + ("base_surest_of_8", "accuracy", "accuracy_cold", "accuracy_without")
        }
        found = sorted(step for step in steps if step is not None)
        cells = [f"{float(arm):g}"]
        cells += [f"{means[name]:.3f}" for name in ("computing_frac", "computed_frac")]
        cells += [f"{means[name]:.2f}" for name in ("base_accuracy", "base_accuracy_cold")]
        cells += [f"{means['base_surest_of_8']:.2f}", f"{len(found)} of {len(steps)}"]
        cells += [", ".join(map(str, found)) or f"not in {STEPS}"]
        cells += [
            f"{means[name]:.2f}" for name in ("accuracy", "accuracy_cold", "accuracy_without")
        ]
        rows.append(cells)
    return markdown_table(titles, rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shares", type=float, nargs="+", default=SHARES)
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "share", help="of the runs")
    parser.add_argument("--table", action="store_true", help="the table of what there is, no more")
    options = parser.parse_args()
    make_folder(options.out, exist_ok=True)
    try:
        for seed in options.seeds if not options.table else ():
            for share in options.shares:
                if not read_results(RESULTS, LAYOUT).has(arm=f"{share:g}", seed=seed):
                    line = finding(share, seed, options.out.resolve())
                    add_result(RESULTS, LAYOUT, line)
                    print(json.dumps(line), flush=True)
        made = table(read_results(RESULTS, LAYOUT))
        print(made)
        write_atomically(
            PAGE, fill_page(PAGE.read_text(), {"shares": made}).encode(), point="share.torn"
        )
    except (BaseError, ConfigError) as error:
        print(f"share: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
