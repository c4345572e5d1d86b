"""Does Spectrum tuning bring back what SFT on the best answer takes, and does SFT on one draw at a
time do as well?

    python -m experiments.spectrum.run --seeds 6                       # the tiny model
    python -m experiments.spectrum.run --seeds 8 --single              # one that read no two pairs
    python -m experiments.spectrum.run --seeds 3 --model FOLDER        # SmolLM2-135M
    python -m experiments.spectrum.report                              # the tables of README.md

Seed by seed, one pipeline each; what is there is not made again, and a seed's lines are added once
all of its arms are there.
"""

import argparse
import sys
from pathlib import Path

from rlp.compare.asked_model import open_asked_model  # rlp before torch
from rlp.measure.results_file import add_results, read_results
from rlp.post.pipeline_config import load_pipeline
from rlp.post.pipeline_results import open_results, results_path
from rlp.post.pipeline_run import run_pipeline
from rlp.post.spectrum_scoring import Asked, bayes, score_model, score_oracle, uniform
from rlp.process.exit_codes import DONE
from rlp.process.files import make_folder, write_atomically

# isort: split
import torch
import yaml

from experiments.spectrum.report import FIGURES, LAYOUT, RESULTS, arms_of
from experiments.spectrum.world import WORLDS, World, make_base, write_all_rows

CHAINS = {
    "spectrum": ["spectrum"],
    "one_steps": ["one_steps"],
    "one_draws": ["one_draws"],
    "mode": ["mode"],
    "mode_spectrum": ["mode", "spectrum"],
    "mode_one_steps": ["mode", "one_steps"],
    "mode_one_draws": ["mode", "one_draws"],
}
"""The stages of each arm; the base is read beside them."""

HEAT = (0.5, 2.0, 5.0)
"""Temperatures beside 1, of the base and of mode-SFT."""

COSTS = ("optimizer_steps", "input_tokens", "flops", "seconds")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--seeds", type=int, default=6, metavar="N", help="seeds 0 to N - 1 (6)")
    parser.add_argument("--first", type=int, default=0, metavar="S", help="seed to begin with (0)")
    parser.add_argument("--model", type=Path, help="a folder of SmolLM2; the tiny model without")
    parser.add_argument("--single", action="store_true", help="a tiny one that read single pairs")
    parser.add_argument("--out", type=Path, default=Path("runs/spectrum"), metavar="FOLDER")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="FILE")
    asked = parser.parse_args()
    panel = "smollm2" if asked.model else "single" if asked.single else "tiny"
    for seed in range(asked.first, asked.first + asked.seeds):
        if read_results(asked.results, LAYOUT).has(arm="uniform", seed=seed, panel=panel):
            continue
        code = run_seed(asked.out.resolve() / panel, panel, seed, asked.model, asked.results)
        if code != DONE:
            return code
    return DONE


def run_seed(out: Path, panel: str, seed: int, model: Path | None, results: Path) -> int:
    """All arms of a seed, and the oracles; the exit code."""
    world = WORLDS[panel]
    make_folder(out / f"rows_{seed}", exist_ok=True)
    write_all_rows(out / f"rows_{seed}", world, seed)
    base = out / f"base_{seed}" if model is None else model.resolve()
    if model is None and not (base / "tokenizer_config.json").exists():
        make_base(base, seed, 1 if panel == "single" else world.pairs)
    text = yaml.safe_dump(tree(out, panel, seed, base), sort_keys=False).encode()
    path = out / f"pipeline_{seed}.yaml"
    write_atomically(path, text, point="pipeline.torn_config")
    pipeline = load_pipeline(path)
    code = run_pipeline(pipeline, text, print)
    if code == DONE:
        lines = read_lines(open_results(results_path(pipeline)).lines, panel, seed)
        lines += beside(world, panel, seed, base, Path(pipeline.dir) / f"seed_{seed}")
        add_results(results, LAYOUT, lines)
    return code


def tree(out: Path, panel: str, seed: int, base: Path) -> dict:
    """The YAML of a seed's pipeline."""
    world = WORLDS[panel]
    stages = {}
    for name in ("mode", "spectrum", "one_draws", "one_steps"):
        stages[name] = {
            "kind": "spectrum",
            "data": [str(out / f"rows_{seed}" / f"{name}.jsonl")],
            "steps": world.steps,
            "batch_size": world.rows * (world.pairs if name == "one_draws" else 1),
            "learning_rate": world.rate,
            "drop": 0.2 if name == "spectrum" else 0.0,
            "max_tokens": 256,
            "format": vars(world.format),
        }
    chains = {arm: chain for arm, chain in CHAINS.items() if arm in arms_of(panel)}
    settings = {"families": list(world.asked), "tasks": world.tasks, "shots": list(world.shots)}
    return {
        "dir": str(out / f"pipeline_{seed}"),
        "seeds": [seed],
        "model": str(base),
        "stages": stages,
        "arms": chains,
        "evaluation": {
            "temperatures": [1.0],
            "others": {"spectrum": settings | {"format": vars(world.format)}},
        },
    }


def read_lines(told: tuple[dict, ...], panel: str, seed: int) -> list[dict]:
    """The pipeline's lines as those of this experiment: the start, and the end of each chain."""
    found = {}
    for line in told:
        arm = "base" if line["stage"] == "start" else line["arm"]
        if arm == "base" or line["stage"] == CHAINS[arm][-1]:
            figures = {name.removeprefix("spectrum_"): value for name, value in line.items()}
            found[arm] = line_of(arm, seed, panel, 1.0, figures)
    return list(found.values())


def line_of(arm: str, seed: int, panel: str, temperature: float, figures: dict) -> dict:
    """A line, with the means over numbers of pairs above 0."""
    line = {"arm": arm, "seed": seed, "panel": panel, "temperature": temperature}
    line |= {name: figures.get(name) for name in (*FIGURES, *COSTS)}
    for name in ("excess", "jsd"):
        shots = [k for k in WORLDS[panel].shots if k > 0]
        values = [figures[f"shots_{k}_{name}"] for k in shots]
        line[f"kshot_{name}"] = None if None in values else sum(values) / len(values)
    return line


def beside(world: World, panel: str, seed: int, base: Path, folder: Path) -> list[dict]:
    """Other temperatures, of the tiny model, and the oracles."""
    asked = Asked(world.asked, world.tasks, world.shots, seed)
    lines = []
    if panel == "tiny":
        mode = folder / "mode" / "work" / "models" / f"step_{world.steps}"
        for arm, model in (("base", base), ("mode", mode)):
            opened = open_asked_model(str(model), device=torch.device("cpu"), dtype="float32")
            for temperature, told in score_model(opened, asked, world.format, HEAT).items():
                lines.append(line_of(arm, seed, panel, temperature, told["all"]))
    for arm, scorer in (("bayes", bayes), ("uniform", uniform)):
        lines.append(line_of(arm, seed, panel, 1.0, score_oracle(scorer, asked)["all"]))
    return lines


if __name__ == "__main__":
    sys.exit(main())
