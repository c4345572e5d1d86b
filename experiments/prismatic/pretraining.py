"""RLP itself on documents that were selected, and on as many that were not, for as many steps; adds
a line to pretraining.jsonl for each arm and seed, and goes on where it was stopped.

    python experiments/prismatic/pretraining.py --seeds 8

The world is that of headings (experiments/world), with the base that comes with the package. Its
pool of documents is lopsided: most journeys go straight on for at least three of six turns, and
come again and again.
"""

import argparse
import json
import random
import time
from importlib.resources import files
from pathlib import Path

from layouts import HERE, PRETRAINING, PRETRAINING_ARMS, PRETRAINING_LAYOUT

from rlp import Trainer
from rlp.config import load_config
from rlp.measure.results_file import add_result, read_results
from rlp.post.selection import keep_share
from rlp.post.selection_run import Choosing, Scoring, select
from rlp.process.exit_codes import DONE
from rlp.process.ranks import Ranks, start_ranks
from rlp.world.problems import TURNS, problem_text, split_questions, turns_of

BASE = str(files("rlp.world") / "headings_base")
POOL, DOCUMENTS, LOPSIDED = 512, 64, 0.85
STRAIGHT = 3
"""Turns that a lopsided journey has of the kind `straight`, at least."""
STEPS, BATCH, THOUGHTS, RATE = 24, 8, 8, 1e-4


def is_straight(question: int) -> bool:
    return turns_of(question).count(TURNS.index("straight")) >= STRAIGHT


def pool_of(seed: int) -> list[int]:
    """Questions of the train block, most of them from the lopsided part of it."""
    rng, block = random.Random(f"prismatic pretraining {seed}"), split_questions(0)["train"]
    lopsided = [question for question in block if is_straight(question)]
    others = [question for question in block if not is_straight(question)]
    return [rng.choice(lopsided if rng.random() < LOPSIDED else others) for _ in range(POOL)]


def write_documents(path: Path, questions: list[int]) -> None:
    rows = [{"text": problem_text(turns_of(one)), "question": one} for one in questions]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def documents_of(arm: str, home: Path, seed: int) -> Path:
    """`DOCUMENTS` of the pool: any, any that differ, or those that `rlp select` keeps."""
    rng, questions = random.Random(f"prismatic pretraining {arm} {seed}"), pool_of(seed)
    chosen = home / f"{arm}.jsonl"
    if chosen.exists():
        return chosen
    if arm == "random":
        write_documents(chosen, rng.sample(questions, DOCUMENTS))
    elif arm == "distinct":
        write_documents(chosen, rng.sample(sorted(set(questions)), DOCUMENTS))
    else:
        pool, out = home / "pool.jsonl", home / "selected_rows.jsonl"
        write_documents(pool, questions)
        out.unlink(missing_ok=True)
        select(
            Scoring(corpus=str(pool), proxy=BASE),
            Choosing(out=out, keep=keep_share(1), clusters=32, most=DOCUMENTS, kept=chosen),
        )
    return chosen


def trained(documents: Path, held_out: Path, run: Path, seed: int, ranks: Ranks) -> dict:
    """The summary of a run, made or found."""
    config = {
        "run": {"dir": str(run), "seed": seed, "resume": "auto"},
        "model": {"path": BASE},
        "data": {
            "train": [str(documents)],
            "held_out": [str(held_out)],
            "max_document_tokens": 64,
        },
        "position": {"selector": "marker", "marker": "faces", "per_document": 1},
        "thought": {"group_size": THOUGHTS, "max_thought_tokens": 16, "temperature": 1.0},
        "objective": {"lm_weight": 0.0},
        "optim": {"batch_size": BATCH, "micro_batch_size": BATCH, "learning_rate": RATE},
        "engine": {"dtype": "float32"},
        "budget": {"steps": STEPS},
        "evaluation": {"panel_positions": 256, "thoughts_per_position": 2, "every_n_steps": 0},
        "checkpoint": {"every_n_steps": 0},
        "logging": {"every_n_steps": 30},
    }
    if not (run / "summary.json").exists():
        ended = Trainer(load_config(config), ranks=ranks).fit()
        if ended.code != DONE:
            raise RuntimeError(f"the run in {run} ended with exit code {ended.code}")
    return json.loads((run / "summary.json").read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--first", type=int, default=0, help="seed to begin with")
    parser.add_argument("--out", type=Path, default=HERE.parent.parent / "runs" / "prismatic")
    parser.add_argument("--results", type=Path, default=PRETRAINING)
    asked_for = parser.parse_args()
    ranks = start_ranks()
    for seed in range(asked_for.first, asked_for.first + asked_for.seeds):
        home = asked_for.out / f"seed_{seed}"
        home.mkdir(parents=True, exist_ok=True)
        held_out = home / "held_out.jsonl"
        write_documents(held_out, split_questions(0)["held_out"])
        for arm in PRETRAINING_ARMS:
            if read_results(asked_for.results, PRETRAINING_LAYOUT).has(arm=arm, seed=seed):
                continue
            start = time.process_time()
            documents = documents_of(arm, home, seed)
            questions = [json.loads(line)["question"] for line in documents.open()]
            summary = trained(documents, held_out, home / arm, seed, ranks)
            line = {
                "arm": arm,
                "seed": seed,
                "distinct": len(set(questions)),
                "straight": sum(map(is_straight, questions)) / len(questions),
                "before": summary["before"]["accuracy_with_thought"],
                "accuracy": summary["after"]["accuracy_with_thought"],
                "flops": summary["flops"],
                "seconds": time.process_time() - start,
            }
            add_result(asked_for.results, PRETRAINING_LAYOUT, line)
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
