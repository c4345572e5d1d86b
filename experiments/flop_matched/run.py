"""All arms over seeds on the heading world: pretrain at equal cost, post-train alike, evaluate
after each stage.

    python experiments/flop_matched/run.py --seeds 5

For every seed S there is a base (experiments/world/bases/seed_S, made by make_bases.py where it is
missing). RLP trains on it with configs/quickstart.yaml without the LM loss, `run.seed` S. Every
other arm is matched with that run by `rlp match`, and its own program asserts the match to 1 %.
Then each arm's exported folder gets the same supervised fine-tuning and after it the same
reinforcement learning from verifiable rewards (`post_train.py`, TRL), and is probed with
and without thoughts on the same held-out positions after each stage.

Files written to --out (default runs/flop_matched): a run folder for each arm and seed, and
results.jsonl, a line for each arm, seed and stage, in order. Run again, it goes on where it
stopped: finished lines are kept, an unfinished run is resumed. `analyze.py` makes tables, figures
and verdict from results.jsonl.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stderr, redirect_stdout
from multiprocessing import get_context
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(Path(__file__).parent)]
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("DS_ACCELERATOR", "cpu")

ARMS = {
    "base": None,
    "cpt_tokens": ("cpt", "tokens"),
    "cpt_flops": ("cpt", "flops"),
    "mixed_sft": ("mixed_sft", "flops"),
    "greedy_match": ("greedy_match", "flops"),
    "rlp": None,
    "rlp_lm": ("rlp_lm", "flops"),
    "shuffled_reward": ("shuffled_reward", "flops"),
    "foreign_thought": ("foreign_thought", "flops"),
}
"""Each arm, and how it is matched with `rlp`: (arm, by) of `rlp match`. The base is not trained."""

STAGES = ("pretrain", "sft", "rlvr")
WORLD = ROOT / "experiments" / "world"
QUICKSTART = str(ROOT / "configs" / "quickstart.yaml")
COMMON = ["checkpoint.every_n_steps=0", "logging.every_n_steps=20", "logging.thoughts=8"]
PANEL = ["evaluation.panel_positions=256", "evaluation.thoughts_per_position=4"]
"""A position in every held-out document, for the numbers that are compared."""

RESULT = ("accuracy_with_thought", "accuracy_without_thought", "gain_over_start_nats")


def work(arm: str, seed: int, out: Path) -> list[dict]:
    """`compare`, with what it prints sent to log.txt in the folder of the arm and seed."""
    folder = out / arm / f"seed_{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    with (
        (folder / "log.txt").open("a", encoding="utf-8") as log,
        redirect_stdout(log),
        redirect_stderr(log),
    ):
        return compare(arm, seed, out, folder)


def compare(arm: str, seed: int, out: Path, folder: Path) -> list[dict]:
    """Pretrain, post-train and probe one arm on one seed; its lines of results.jsonl."""
    from post_train import reinforce, supervise

    from rlp.process.ranks import start_ranks

    ranks = start_ranks()
    base = base_of(seed)
    started = time.perf_counter()
    model, spent = (
        (base, dict.fromkeys(("input_tokens", "flops", "paper_flops", "seconds"), 0))
        if arm == "base"
        else pretrain(arm, seed, out, folder, ranks)
    )
    stages, lines = {"pretrain": model}, []
    for stage in STAGES:
        if stage == "sft":
            stages["sft"] = supervise(model, folder / "sft", seed)
        if stage == "rlvr":
            stages["rlvr"] = reinforce(stages["sft"], folder / "rlvr", seed)
        numbers = probe(stages[stage], base, ranks)
        lines.append(
            {
                "arm": arm,
                "seed": seed,
                "stage": stage,
                **{name: numbers[name] for name in RESULT},
                **spent,
                "thought_tokens_mean": numbers["thought_tokens_mean"],
                "document_loss_nats": numbers["document_loss_nats"],
                "gain_over_shuffled_nats": numbers["gain_over_shuffled_nats"],
                "stage_seconds": round(time.perf_counter() - started, 1),
            }
        )
        started = time.perf_counter()
    lines[0]["curve"] = [] if arm == "base" else curve(folder / "run")
    (folder / "run").mkdir(parents=True, exist_ok=True)
    told = [json.dumps({key: line[key] for key in ("stage", *RESULT)}) for line in lines]
    (folder / "run" / "post_training.jsonl").write_text("".join(f"{line}\n" for line in told))
    return lines


def base_of(seed: int) -> Path:
    return WORLD / "bases" / f"seed_{seed}"


def make_world_and_bases(num_seeds: int) -> list[int]:
    """What the arms start from, where it is not there yet: the documents, and a base for each seed.
    The seeds whose base counts."""
    from rlp.world.folder import write_world

    if not (WORLD / "data" / "train.jsonl").is_file():
        write_world(WORLD / "data")
    subprocess.run(
        [
            sys.executable,
            str(WORLD / "make_bases.py"),
            "--seeds",
            str(num_seeds),
            "--out",
            str(WORLD / "bases"),
        ],
        check=True,
    )
    tried = json.loads((WORLD / "bases" / "bases.json").read_text())
    return [row["seed"] for row in tried if row["counts"]][:num_seeds]


def pretrain(arm: str, seed: int, out: Path, folder: Path, ranks: object) -> tuple[Path, dict]:
    """Run an arm, or go on with it; its exported folder and what it spent."""
    from rlp import Trainer
    from rlp.compare.arms import write_arm
    from rlp.compare.splice import splice
    from rlp.config import load_config
    from rlp.process.exit_codes import DONE
    from rlp.process.json_files import read_json
    from rlp.process.run_folder import open_run_folder

    run = folder / "run"
    overrides = [f"run.dir={run}", f"run.arm={arm}", f"run.seed={seed}", "run.resume=auto", *COMMON]
    if arm == "rlp":
        config = load_config(
            QUICKSTART,
            [
                *overrides,
                f"model.path={base_of(seed)}",
                "objective.lm_weight=0",
                "evaluation.every_n_steps=16",
            ],
        )
    else:
        reference = open_run_folder(out / "rlp" / f"seed_{seed}" / "run")
        kind, by = ARMS[arm]
        data = None
        if kind == "mixed_sft":
            data = folder / "spliced"
            if not data.exists():
                splice(
                    load_config(reference.config_yaml), num_documents=80 * 16, out=data, ranks=ranks
                )
        every = {"cpt_flops": 100, "mixed_sft": 40}.get(arm, 16)
        (folder / "match.yaml").unlink(missing_ok=True)
        config = write_arm(
            reference,
            kind,
            by,
            folder / "match.yaml",
            data,
            [*overrides, f"evaluation.every_n_steps={every}"],
        )
    code = Trainer(config, ranks=ranks).fit().code
    if code != DONE:
        raise RuntimeError(f"{arm}, seed {seed}: the run ended with {code}; see {run}")
    ledger = read_json(run / "ledger.json")
    return run / "export", {
        name: ledger[name] for name in ("input_tokens", "flops", "paper_flops", "seconds")
    }


def probe(model: Path, base: Path, ranks: object) -> dict[str, float]:
    """Held-out numbers of a model, its gain measured against the base."""
    from rlp.config import load_config
    from rlp.measure.frozen import measure_model
    from rlp.model.setup import PanelSetup

    config = load_config(QUICKSTART, [f"model.path={model}", "run.dir=unused", *PANEL])
    return measure_model(PanelSetup(config, lambda text: None), ranks, start=str(base)).means


def curve(run: Path) -> list[dict]:
    """The evaluations of a run with what it had spent by then."""
    lines = {
        name: [json.loads(line) for line in (run / f"{name}.jsonl").read_text().splitlines()]
        for name in ("metrics", "timing", "evaluation")
    }
    made = (
        run.parent / "spliced" / "ledger.json"
    )  # of mixed SFT: what its data had cost before the first step
    spent = {
        0: {
            name: json.loads(made.read_text())[name] if made.exists() else 0.0
            for name in ("input_tokens", "flops", "seconds")
        }
    }
    seconds = spent[0]["seconds"]
    for line, clock in zip(lines["metrics"], lines["timing"]):
        seconds += clock["perf/step_s"]
        spent[line["step"]] = {
            "input_tokens": line["budget/tokens"],
            "flops": line["budget/flops"],
            "seconds": round(seconds, 2),
        }
    return [
        {"step": line["step"], **spent[line["step"]], **{name: line[name] for name in RESULT}}
        for line in lines["evaluation"]
    ]


def tasks(seeds: list[int], done: set[tuple[str, int]]) -> list[list[tuple[str, int]]]:
    """What is left, in two rounds: the reference runs, and the arms that are matched with them."""
    every = [(arm, seed) for seed in seeds for arm in ARMS]
    return [
        [task for task in every if (task[0] == "rlp") == first and task not in done]
        for first in (True, False)
    ]


def read_done(path: Path) -> set[tuple[str, int]]:
    """Arms and seeds whose three lines are there."""
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return {(line["arm"], line["seed"]) for line in lines if line["stage"] == STAGES[-1]}


def main() -> int:
    parser = argparse.ArgumentParser(
        description="All arms over seeds, pretrained at equal cost and post-trained alike."
    )
    parser.add_argument(
        "--seeds",
        type=int,
        default=5,
        help="how many, from 0 on; one whose base is rejected is left out",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("runs/flop_matched"),
        help="folder of the runs; one that exists is continued",
    )
    parser.add_argument(
        "--workers", type=int, default=2, help="processes side by side, one core each"
    )
    arguments = parser.parse_args()
    out = arguments.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    os.chdir(ROOT)
    results, started = out / "results.jsonl", time.perf_counter()
    seeds = make_world_and_bases(arguments.seeds)
    for round_ in tasks(seeds, read_done(results)):
        with ProcessPoolExecutor(arguments.workers, mp_context=get_context("spawn")) as pool:
            waiting = [(task, pool.submit(work, *task, out)) for task in round_]
            for (arm, seed), future in waiting:
                lines = future.result()
                with results.open(
                    "a"
                ) as file:  # three lines at once: an arm is there whole or not at all
                    file.write("".join(json.dumps(line) + "\n" for line in lines))
                print(
                    f"{time.perf_counter() - started:6.0f} s  {arm:<16} seed {seed}  accuracy with"
                    " a thought after pretrain, sft, rlvr: "
                    + ", ".join(f"{line['accuracy_with_thought']:.3f}" for line in lines),
                    flush=True,
                )
    print(
        f"{results}: {len(read_done(results))} arms and seeds. Tables and figures: python"
        f" experiments/flop_matched/analyze.py {results}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
