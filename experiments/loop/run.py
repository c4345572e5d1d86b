"""Does a model collapse that is trained on its own output, round after round?

    python -m experiments.loop.run --seeds 8        # goes on where it was stopped
    python -m experiments.loop.report               # the tables and the picture of README.md

Seed by seed: its world, its base, and all arms of the pipeline; then a seed's lines are added to
runs/loop/results.jsonl, once all of its arms are there.
"""

import argparse
import sys
from pathlib import Path

import yaml

from experiments.loop import arms, world
from experiments.loop.report import LAYOUT, line_of, whole_seeds
from rlp.config import load_config
from rlp.measure.results_file import add_results, read_results
from rlp.post.pipeline_config import load_pipeline
from rlp.post.pipeline_results import open_results, results_path
from rlp.post.pipeline_run import run_pipeline
from rlp.process.exit_codes import DONE
from rlp.process.files import make_folder, write_atomically
from rlp.trainer import Trainer

BASE_DOCUMENTS = 19_200
"""600 steps of 32."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=8, metavar="N", help="seeds 0 to N - 1 (8)")
    parser.add_argument("--out", type=Path, default=Path("runs/loop"), metavar="FOLDER")
    asked = parser.parse_args()
    whole = whole_seeds(read_results(asked.out.resolve() / "results.jsonl", LAYOUT))
    for seed in sorted({*range(asked.seeds)} - {*whole}):
        code = run_seed(asked.out.resolve(), seed)
        if code != DONE:
            return code
    return DONE


def run_seed(
    out: Path,
    seed: int,
    *,
    chosen: dict[str, dict] = arms.ARMS,
    rounds: int = arms.ROUNDS,
    base: tuple[str, ...] = (),
    training: tuple[str, ...] = (),
) -> int:
    """All of one seed, or what is left of it; the exit code.

    Args:
        base, training: overrides of base.yaml and of round.yaml.
    """
    folder = out / "worlds" / str(seed)
    if not folder.exists():
        world.write_world(
            folder, seed, base=BASE_DOCUMENTS, rounds=rounds, documents=arms.DOCUMENTS
        )
    if (code := make_base(out, seed, base)) != DONE:
        return code
    # A pipeline for each seed: a seed that is whole stays so, whatever comes after it.
    tree = arms.pipeline_tree(out, [seed], arms=chosen, rounds=rounds, training=list(training))
    tree["dir"] = f"{tree['dir']}_{seed}"
    path = out / f"pipeline_{seed}.yaml"
    text = yaml.safe_dump(tree, sort_keys=False).encode()
    write_atomically(path, text, point="pipeline.torn_config")
    pipeline = load_pipeline(path)
    code = run_pipeline(pipeline, text, print)
    if code == DONE:
        results = read_results(out / "results.jsonl", LAYOUT)
        found = map(line_of, open_results(results_path(pipeline)).lines)
        new = [line for line in found if not results.has(**{k: line[k] for k in LAYOUT.identity})]
        add_results(results.path, LAYOUT, new)
    return code


def make_base(out: Path, seed: int, overrides: tuple[str, ...]) -> int:
    """The language model that every arm begins with; the exit code."""
    run, folder = out / "bases" / str(seed), out / "worlds" / str(seed)
    if (run / "summary.json").exists():
        return DONE
    make_folder(run.parent, exist_ok=True)
    paths = [
        f"run.dir={run}",
        f"run.seed={seed}",
        "run.resume=auto",
        f"model.path={folder / 'model_config.json'}",
        f"model.tokenizer={folder / 'tokenizer'}",
        f"data.train=[{folder / 'base_train.jsonl'}]",
    ]
    config = load_config(Path(__file__).with_name("base.yaml"), [*paths, *overrides])
    return Trainer(config).fit().code


if __name__ == "__main__":
    sys.exit(main())
