"""Worlds and bases over seeds: what every experiment that reports a spread starts from.

    python experiments/world/make_bases.py --seeds 9        # the first nine that count
    python experiments/world/make_bases.py --seed 3         # that one alone; two may run at once
    python experiments/world/make_bases.py --kind headings --seeds 5

Of the rare-thought world everything is drawn anew with the seed: questions, documents, panel, and
the initialization and order of the base (`run.seed`). A folder holds all of one seed:

    experiments/world/seeds/S/
        base_train.jsonl, train.jsonl, held_out.jsonl, tokenizer/, model_config.json
        base.yaml, quickstart.yaml    with the paths of this folder and its seed
        base/                         the export of base.yaml
        base.json                     whether it counts, and its held-out numbers

Seed 0 is what `rlp world` writes: its base is the committed one. Of the heading world (`--kind
headings`, in experiments/world/heading_seeds) the documents are those of seed 0 with every seed,
and the base's `run.seed` alone differs.

Which bases count is fixed beforehand. A base of the rare-thought world counts when it can compute
where it is made to: given the words of a computing thought so far it puts the right next one first
in more than MIN_COMPUTED of the held-out cases, that is, its training is past the phase change at
which it finds the rule (before it RLP has no signal). Of the heading world, when its own held-out
accuracy with a thought is above MIN_ACCURACY. Seeds are tried from 0 upwards until as many count
as were asked for. Run again, it makes only what is missing.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
HERE = ROOT / "experiments" / "world"

MIN_COMPUTED = 0.9
MIN_ACCURACY = 0.4
"""Held-out accuracy with a thought; chance is 0.25, and bases of the heading world past the phase
change have 0.55 to 0.65."""


class BaseError(Exception):
    """No base can be made; the message says where and what to do."""


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


def computed_frac(export: Path, held_out: Path) -> float:
    """How often a model puts the right word first inside a computing thought, of the headings after
    the first one (before which the kinds of thoughts part) and the answer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from rlp.world.problems import CUE, HEADINGS, TURNS, computed, problem_text

    tokenizer = AutoTokenizer.from_pretrained(export)
    network = AutoModelForCausalLM.from_pretrained(export, dtype=torch.float32).eval()
    texts = []
    for line in held_out.read_text().splitlines():
        for problem in json.loads(line)["text"].split(" .")[:-1]:
            words = problem.split(f" {CUE} ")[0].split()
            turns = [TURNS.index(word) for word in words[1::2]]
            texts.append(problem_text(turns, computed(turns)))
    tokens = torch.tensor([tokenizer(text).input_ids for text in texts])  # [B, P], all of a length
    with torch.no_grad():
        guess = network(input_ids=tokens).logits[:, :-1].argmax(dim=-1)
    asked = torch.isin(tokens[:, 1:], torch.tensor(tokenizer.convert_tokens_to_ids(HEADINGS)))
    asked &= asked.cumsum(dim=1) > 1
    return (guess == tokens[:, 1:])[asked].double().mean().item()


@dataclass(frozen=True, slots=True)
class Kind:
    """How the bases of one kind of world are made and judged."""

    out: Path
    judge: Callable[[Path, Path, dict[str, float]], tuple[str, float, float]]
    """Of an export, the held-out file and its numbers: what it is judged by, its value, and what
    that must be above."""
    worlds: bool
    """Whether each seed has a world of its own."""


KINDS = {
    "rare": Kind(
        HERE / "seeds",
        lambda export, held_out, numbers: (
            "computed_frac",
            computed_frac(export, held_out),
            MIN_COMPUTED,
        ),
        worlds=True,
    ),
    "headings": Kind(
        HERE / "heading_seeds",
        lambda export, held_out, numbers: (
            "accuracy_with_thought",
            numbers["accuracy_with_thought"],
            MIN_ACCURACY,
        ),
        worlds=False,
    ),
}


def train_base(folder: Path, seed: int) -> Path:
    """Train the base of a seed on the world in its folder; its export.

    Raises:
        BaseError: the training failed; what it printed stands above.
    """
    run = folder / "base_run"
    shutil.rmtree(run, ignore_errors=True)  # left by an interrupted call
    command = [sys.executable, "train.py", str(folder / "base.yaml")]
    command += [f"run.dir={run.resolve()}", f"run.seed={seed}", "checkpoint.every_n_steps=0"]
    done = subprocess.run(command, cwd=ROOT, check=False)
    if done.returncode != 0:
        raise BaseError(
            f"seed {seed}: `{' '.join(command)}` ended with exit code {done.returncode}. Its"
            " message stands above."
        )
    return run / "export"


def make_seed(
    name: str, seed: int, out: Path, train: Callable[[Path, int], Path] = train_base
) -> dict:
    """Make the world and the base of a seed, or find them made; what its base.json says.

    Args:
        train: makes the export of a seed from the world in its folder.
    """
    from rlp.world.folder import write_world

    kind, folder = KINDS[name], out / str(seed)
    record = folder / "base.json"
    if record.exists():
        return json.loads(record.read_text())

    if not (folder / "train.jsonl").exists():
        write_world(folder, kind=name, seed=seed if kind.worlds else 0)
    if seed != 0:
        shutil.rmtree(folder / "base", ignore_errors=True)
        os.replace(train(folder, seed), folder / "base")
        shutil.rmtree(folder / "base_run", ignore_errors=True)

    numbers = panel_numbers(folder / "base")
    judged_by, value, bound = kind.judge(folder / "base", folder / "held_out.jsonl", numbers)
    row = {"seed": seed, "counts": value > bound, "judged_by": judged_by, judged_by: value}
    arriving = record.with_suffix(".tmp")
    arriving.write_text(json.dumps(row | numbers, indent=1) + "\n")
    os.replace(arriving, record)
    return row | numbers


def make_bases(
    wanted: int, name: str, out: Path, train: Callable[[Path, int], Path] = train_base
) -> list[int]:
    """The first `wanted` seeds whose base counts; each has its folder under `out`."""
    good, seed = [], 0
    while len(good) < wanted:
        row = make_seed(name, seed, out, train)
        print(told(row), flush=True)
        good += [seed] if row["counts"] else []
        seed += 1
    return good


def told(row: dict) -> str:
    """A seed in one line."""
    judged_by = row["judged_by"]
    return (
        f"seed {row['seed']}: {judged_by} {row[judged_by]:.3f}:"
        f" {'counts' if row['counts'] else 'rejected'}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description="Worlds and bases over seeds.")
    parser.add_argument("--kind", choices=KINDS, default="rare")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--seeds", type=int, default=9, help="how many that count; 9 by default")
    which.add_argument("--seed", type=int, help="this one alone, whether it counts or not")
    parser.add_argument("--out", type=Path, help="folder of the seeds")
    arguments = parser.parse_args()
    out = arguments.out or KINDS[arguments.kind].out
    try:
        if arguments.seed is not None:
            print(told(make_seed(arguments.kind, arguments.seed, out)))
            return 0
        good = make_bases(arguments.seeds, arguments.kind, out)
    except (BaseError, ValueError) as error:
        print(f"make_bases: {error}", file=sys.stderr)
        return 2
    print(f"{out}: seeds {', '.join(map(str, good))}")
    return 0


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    sys.exit(main())
