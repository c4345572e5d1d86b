"""All arms over seeds: pretrain at equal cost, post-train alike, read at two temperatures.

    python experiments/flop_matched/run.py --seeds 9

For every seed there is a world of its own (`worlds.py`): documents, base and panel. What is run is
a pipeline (`rlp pipeline`), which `stages.py` writes; it is resumed wherever it was stopped.

Files written to --out (default runs/flop_matched): pipeline.yaml, rows, the folder of the pipeline,
and results.jsonl in the layout of `lines.py`, to which the lines of a stage are added when all that
can be run is done. `analyze.py` makes tables, figures and claims from results.jsonl.
"""

import argparse
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
sys.path.insert(0, str(Path(__file__).parent))

from arms import ARMS, REFERENCE
from lines import AMOUNTS, FIGURES, LAYOUT, ROOT, SWEEP, TEMPERATURES, figures_of
from stages import POST, comparison, write_pipeline
from worlds import CURVE, computed_frac, make_world, reader_of, world_folder

from rlp.config import ConfigError
from rlp.measure.results_file import Results, add_results, read_results
from rlp.post.pipeline_config import Pipeline, load_pipeline
from rlp.post.pipeline_folder import TaskFolder
from rlp.post.pipeline_results import open_results, results_path
from rlp.post.pipeline_run import run_pipeline
from rlp.post.pipeline_tasks import Task
from rlp.process.json_files import read_json
from rlp.process.ranks import start_ranks
from rlp.process.run_logs import read_json_lines

STAGES = ("pretrain", *POST.values())
"""In their order."""
FREE = dict.fromkeys(AMOUNTS, 0)


def make_worlds(wanted: int, workers: int) -> list[int]:
    """Make the worlds of seeds from 0 on, side by side, until as many have a base that counts as
    are wanted; these seeds."""
    good, tried = [], 0
    with ThreadPoolExecutor(workers) as pool:
        while len(good) < wanted:
            seeds = range(tried, tried + wanted - len(good))
            counts = list(pool.map(make_world, seeds))
            good += [seed for seed, counted in zip(seeds, counts) if counted]
            for seed, counted in zip(seeds, counts):
                if not counted:
                    print(f"seed {seed}: its base does not count; see {world_folder(seed)}")
            tried = seeds.stop
    return good


# The lines of results.jsonl


def of_pipeline(pipeline: Pipeline) -> Iterator[dict]:
    """What the pipeline has read: the models along the stages, thoughts at T 1 alone before the
    last of pretraining, and the points of a run's own curve."""
    results = open_results(results_path(pipeline))
    for line in results.lines:
        if line["stage"] == "start":
            continue
        stage = POST.get(line["stage"], "pretrain")
        last = max(
            one["stage_step"]
            for one in results.where(arm=line["arm"], seed=line["seed"], stage=line["stage"]).lines
        )
        if stage == "pretrain" and line["stage_step"] < last and line["temperature"] != 1.0:
            continue
        names = (*LAYOUT.identity, "n", "thoughts", *FIGURES, *AMOUNTS)
        yield {name: line.get(name) for name in names} | {"stage": stage}
    for arm, stages in pipeline.arms.items():
        for seed in pipeline.seeds:
            task = Task(seed, (stages[0],))
            folder = TaskFolder(task.folder(pipeline))
            if stages[0] not in POST and folder.is_finished and (folder.work / "run").is_dir():
                identity = {"arm": arm, "seed": seed, "stage": "pretrain"}
                yield from (identity | line for line in curve(folder.work / "run"))


def curve(run: Path) -> Iterator[dict]:
    """The evaluations of a run before its last one, with what it had spent by then."""
    spliced = run.parent / "spliced" / "ledger.json"
    first = read_json(spliced) if spliced.exists() else FREE
    spent, seconds = {0: {name: first[name] for name in AMOUNTS}}, first["seconds"]
    logs = (read_json_lines(run / f"{name}.jsonl") for name in ("metrics", "timing"))
    for line, clock in zip(*logs):
        seconds += clock["perf/step_s"]
        spent[line["step"]] = {
            "input_tokens": line["budget/tokens"],
            "flops": line["budget/flops"],
            "paper_flops": None,
            "seconds": round(seconds, 2),
        }
    steps = max(spent)
    for line in read_json_lines(run / "evaluation.jsonl"):
        if line["step"] < steps:
            told = figures_of(line, 1.0, CURVE[1])
            yield {"stage_step": line["step"], **spent[line["step"]], **told}


def of_base(arm: str, seed: int) -> Iterator[dict]:
    """The base as it is, at many temperatures, and the best of its thoughts."""
    from selecting import best_of_g, of_computing

    ranks, model = start_ranks(), world_folder(seed) / "base"
    reader = reader_of(seed, ranks)
    own = {"arm": arm, "seed": seed, "stage": "pretrain", "stage_step": 0, **FREE}
    if arm == "base_best_of_g":
        yield from ({**own, **best_of_g(reader, model, T)} for T in TEMPERATURES)
        return
    other = reader_of(seed, ranks, "train.jsonl")
    for T in SWEEP:
        elsewhere = other.figures(model, T, 2)["accuracy_with_thought"]
        figures = reader.figures(model, T) | {"accuracy_on_other_documents": elsewhere}
        yield {**own, "stage": "sweep", **figures}
    told = {"computed_frac": computed_frac(seed), **of_computing(reader, model)}
    yield from ({**own, **told, **reader.figures(model, T)} for T in TEMPERATURES)


def gather(path: Path, lines: Iterator[dict]) -> int:
    """Add the lines that are not there; how many."""
    there = {LAYOUT.key(line) for line in read_results(path, LAYOUT).lines}
    new = [line for line in lines if LAYOUT.key(line) not in there]
    if new:
        add_results(path, LAYOUT, new)
    return len(new)


def bases_left(results: Results, arms: list[str], seeds: list[int]) -> list[tuple[str, int]]:
    """Arms that train nothing, and seeds, that have no lines."""
    untrained = [arm for arm in arms if not ARMS[arm].is_trained]
    pairs = [(arm, seed) for arm in untrained for seed in seeds]
    return [(arm, seed) for arm, seed in pairs if not results.has(arm=arm, seed=seed)]


def main() -> int:
    parser = argparse.ArgumentParser(
        description="All arms over seeds, pretrained at equal cost and post-trained alike."
    )
    parser.add_argument(
        "--seeds",
        type=int,
        default=9,
        help="how many, from 0 on; one whose base does not count is passed over",
    )
    parser.add_argument(
        "--arms", nargs="+", choices=list(ARMS), default=list(ARMS), help="only these, and RLP"
    )
    parser.add_argument(
        "--to", choices=STAGES, default=STAGES[-1], help="the last stage to be done"
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
    out, stages = arguments.out.resolve(), STAGES[: STAGES.index(arguments.to) + 1]
    os.chdir(ROOT)
    arms = list(dict.fromkeys([REFERENCE, *arguments.arms]))
    results = out / "results.jsonl"
    try:
        seeds = make_worlds(arguments.seeds, arguments.workers)
        path = write_pipeline(comparison(out, arms, seeds, stages), out / "pipeline.yaml")
        pipeline = load_pipeline(path)
        code = run_pipeline(pipeline, path.read_bytes(), print, arguments.workers)
        added = gather(results, of_pipeline(pipeline))
        for arm, seed in bases_left(read_results(results, LAYOUT), arms, seeds):
            added += gather(results, of_base(arm, seed))
    except ConfigError as error:
        print(f"run: {error}", file=sys.stderr)
        return 2
    print(
        f"{results}: {added} lines are added. Tables, figures and claims:"
        " python experiments/flop_matched/analyze.py"
    )
    return code


if __name__ == "__main__":
    sys.exit(main())
