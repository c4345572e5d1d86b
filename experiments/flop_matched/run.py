"""All arms over seeds: pretrain at equal cost, post-train alike, read at two temperatures.

    python experiments/flop_matched/run.py --seeds 9

For every seed there is a world of its own (`worlds.py`): documents, base and panel. RLP trains on
it with configs/quickstart.yaml and no LM loss; every other arm is matched with that run by `rlp
match`, and asserts the match to 1 % at its end. Then the arms get the same supervised fine-tuning
and after it the same reinforcement learning from verifiable rewards (`post_train.py`, TRL).
Thoughts are read on the panel of the seed at T 1 and at T 0.3.

Files written to --out (default runs/flop_matched): worlds, a run folder for each arm and seed, and
results.jsonl, to which the lines of a stage are added when it is finished. Run again, it goes on
where it stopped. `analyze.py` makes tables, figures and claims from results.jsonl.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import (
    FIRST_COMPLETED,
    Future,
    ProcessPoolExecutor,
    ThreadPoolExecutor,
    wait,
)
from contextlib import redirect_stderr, redirect_stdout
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
sys.path.insert(0, str(Path(__file__).parent))

from arms import ARMS, BESIDE, FAMILY, FIRST, POST_TRAINED, REFERENCE, settings_of
from lines import AMOUNTS, LAYOUT, RLVR_FROM, ROOT, STEPS, SWEEP, TEMPERATURES
from pretraining import Pretraining, arm_folder, exported
from worlds import computed_frac, make_world, reader_of, world_folder

from rlp.config import ConfigError
from rlp.measure.results_file import Results, add_results, read_results
from rlp.process.ranks import Ranks, start_ranks

STAGES = ("pretrain", "sft", "rlvr")
"""In their order."""
FREE = dict.fromkeys(AMOUNTS, 0)


class Task(NamedTuple):
    """A stage of an arm on a seed."""

    arm: str
    seed: int
    stage: str


def needs(task: Task) -> Task | None:
    """What has to be there first."""
    if task.stage != "pretrain":
        return task._replace(stage=STAGES[STAGES.index(task.stage) - 1])
    if task.arm == REFERENCE or not ARMS[task.arm].is_trained:
        return None
    return Task(REFERENCE, task.seed, "pretrain")


def every_task(arms: list[str], seeds: list[int], stages: list[str]) -> list[Task]:
    """What is asked for, in the order of what matters: all seeds of the claim, then of the
    post-training of each of the first arms, of the other questions, and of the other arms'
    post-training."""
    rounds = [[(arm, "pretrain") for arm in (REFERENCE, *FAMILY) if arm in arms]]
    later = [arm for arm in POST_TRAINED if arm not in FIRST]
    rounds += [[(arm, stage) for stage in stages[1:]] for arm in FIRST if arm in arms]
    rounds += [[(arm, "pretrain")] for arm in BESIDE if arm in arms]
    rounds += [[(arm, stage) for stage in stages[1:]] for arm in later if arm in arms]
    return [Task(arm, seed, stage) for part in rounds for seed in seeds for arm, stage in part]


def perform(task: Task, out: Path) -> list[dict]:
    """Do a task in this process, what it prints going to log.txt in the folder of the arm and seed;
    its lines of results.jsonl."""
    folder = arm_folder(out, task.arm, task.seed)
    folder.mkdir(parents=True, exist_ok=True)
    with (
        (folder / "log.txt").open("a", encoding="utf-8") as log,
        redirect_stdout(log),
        redirect_stderr(log),
    ):
        work = of_pretraining if task.stage == "pretrain" else of_post_training
        lines = work(task, out, start_ranks())
    return [{**task._asdict(), **line} for line in lines]


def of_pretraining(task: Task, out: Path, ranks: Ranks) -> list[dict]:
    """Train the arm, or take the base as it is; read what comes out."""
    from selecting import best_of_g, of_computing

    reader, model = reader_of(task.seed, ranks), world_folder(task.seed) / "base"
    if task.arm == "base_best_of_g":
        return [{"stage_step": 0, **FREE, **best_of_g(reader, model, T)} for T in TEMPERATURES]
    if not ARMS[task.arm].is_trained:
        told = {"computed_frac": computed_frac(task.seed), **of_computing(reader, model)}
        spent, curve = {"stage_step": 0, **FREE, **told}, _sweep(model, task.seed, ranks)
    else:
        folder = arm_folder(out, task.arm, task.seed)
        reference = arm_folder(out, REFERENCE, task.seed) / "run"
        work = Pretraining(task.arm, task.seed, settings_of(task.arm), folder, reference, ranks)
        model, spent, curve = work.train(reader)
    return curve + [{**spent, **reader.figures(model, T)} for T in TEMPERATURES]


def _sweep(model: Path, seed: int, ranks: Ranks) -> list[dict]:
    """The base at many temperatures, on the panel and on other documents, by which one of them can
    be chosen."""
    reader, lines = reader_of(seed, ranks), []
    other = reader_of(seed, ranks, "train.jsonl")
    for temperature in SWEEP:
        elsewhere = other.figures(model, temperature, 2)["accuracy_with_thought"]
        line = reader.figures(model, temperature) | {"accuracy_on_other_documents": elsewhere}
        lines.append({"stage": "sweep", "stage_step": 0, **FREE, **line})
    return lines


def of_post_training(task: Task, out: Path, ranks: Ranks) -> list[dict]:
    """Post-train the arm by one stage, and read it along the way."""
    from post_train import reinforce, supervise

    folder, started = arm_folder(out, task.arm, task.seed), time.perf_counter()
    models = supervise(exported(out, task.arm, task.seed), folder / "sft", task.seed)
    if task.stage == "rlvr":
        models = reinforce(models[RLVR_FROM], folder / "rlvr", task.seed)
    spent = dict.fromkeys(AMOUNTS) | {"seconds": round(time.perf_counter() - started, 2)}
    reader, lines = reader_of(task.seed, ranks), []
    for step, model in models.items():
        thoughts = 4 if step == STEPS[task.stage][-1] else 1
        for T in TEMPERATURES:
            lines.append({"stage_step": step, **spent, **reader.figures(model, T, thoughts)})
    return lines


def is_finished(task: Task, results: Results, out: Path) -> bool:
    """Whether the lines of a task are there, and the files that other tasks begin with."""
    last = results.where(temperature=TEMPERATURES[-1], **task._asdict())
    if task.stage in STEPS:
        return last.has(stage_step=STEPS[task.stage][-1])
    return last.has() and exported(out, task.arm, task.seed).is_dir()


def run_tasks(
    waiting: list[Task], done: set[Task], workers: int, begin: Callable[[Task], Future]
) -> Iterator[tuple[Task, Future]]:
    """Do tasks side by side, in their order as far as their needs allow; what needs a task that
    failed is left out.

    Args:
        done: tasks whose work is there.
        begin: starts a task.

    Yields:
        each task that was begun, when it ends.
    """
    waiting, running, done = [task for task in waiting if task not in done], {}, set(done)
    while True:
        ready = [task for task in waiting if needs(task) is None or needs(task) in done]
        for task in ready[: workers - len(running)]:
            waiting.remove(task)
            running[begin(task)] = task
        if not running:
            return
        for future in wait(running, return_when=FIRST_COMPLETED).done:
            task = running.pop(future)
            if future.exception() is None:
                done.add(task)
            yield task, future


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


def begun(pool: ProcessPoolExecutor, task: Task, out: Path) -> Future:
    return pool.submit(perform, task, out)


def run_all(
    out: Path,
    tasks: list[Task],
    workers: int,
    begin: Callable[[ProcessPoolExecutor, Task, Path], Future] = begun,
) -> int:
    """Do what is left of the tasks and add their lines to results.jsonl; how many failed."""
    path, started, failed = out / "results.jsonl", time.perf_counter(), 0
    results = read_results(path, LAYOUT)
    done = {task for task in tasks if is_finished(task, results, out)}
    left = [task for task in tasks if task not in done]
    told_without_files = [task for task in left if results.has(**task._asdict())]
    if told_without_files:
        print(
            f"{path} has lines of {len(told_without_files)} stages whose folders are not in {out},"
            " or are not whole (another machine's, or an interrupted one's): the stages are done"
            " again, and the lines that are there stay."
        )
    print(f"{out}: {len(done)} stages are done, {len(left)} are left")
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        for task, future in run_tasks(left, done, workers, lambda t: begin(pool, t, out)):
            if error := future.exception():
                failed += 1
                said = f"FAILED: {error}".splitlines()[0]
            else:
                there = {LAYOUT.key(line) for line in read_results(path, LAYOUT).lines}
                new = [line for line in future.result() if LAYOUT.key(line) not in there]
                add_results(path, LAYOUT, new)
                said = in_words(future.result())
            print(
                f"{time.perf_counter() - started:6.0f} s  {task.arm:<16} seed {task.seed}"
                f" {task.stage:<9} {said}",
                flush=True,
            )
    return failed


def in_words(lines: list[dict]) -> str:
    """Accuracy with a thought at the end of a stage."""
    return ", ".join(
        f"{line['accuracy_with_thought']:.3f} at T {line['temperature']:g}"
        for line in lines[-len(TEMPERATURES) :]
    )


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
    out, stages = arguments.out.resolve(), list(STAGES[: STAGES.index(arguments.to) + 1])
    out.mkdir(parents=True, exist_ok=True)
    os.chdir(ROOT)
    arms = list(dict.fromkeys([REFERENCE, *arguments.arms]))
    try:
        seeds = make_worlds(arguments.seeds, arguments.workers)
        failed = run_all(out, every_task(arms, seeds, stages), arguments.workers)
    except ConfigError as error:
        print(f"run: {error}", file=sys.stderr)
        return 2
    print(
        f"{out / 'results.jsonl'}: {failed or 'no'} stages failed. Tables, figures and claims:"
        " python experiments/flop_matched/analyze.py"
    )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
