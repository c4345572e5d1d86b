"""Worlds, bases, and the rows of SFT and RLVR, a set for each seed of pipeline.yaml.

    python experiments/pipeline/prepare.py

The rows are those of `experiments/flop_matched`: questions of the block `base_train`, which the
held-out block shares nothing with. Run again, it makes only what is missing.
"""

import json
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parents[1] / "world"))

from make_bases import KINDS, make_seed

from rlp.post.pipeline_config import load_pipeline
from rlp.world.problems import OPEN, computed, problem_text, split_questions, turns_of

HERE = Path(__file__).parent


def write_rows(seed: int, num_sft: int, num_rlvr: int, out: Path) -> None:
    """Computing thoughts with their answers, and prompts that end where a thought begins."""
    questions = split_questions(seed)["base_train"]
    turns = drawn(questions, "sft", seed, num_sft)
    texts = [{"text": problem_text(one, computed(one))} for one in turns]
    prompts = []
    for one in drawn(questions, "rlvr", seed, num_rlvr):
        *question, answer, _ = problem_text(one).split()
        prompts.append({"prompt": " ".join([*question, OPEN]), "answer": answer})
    for name, rows in (("sft", texts), ("rlvr", prompts)):
        path = out / str(seed) / f"{name}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def drawn(questions: list[int], stage: str, seed: int, number: int) -> list[list[int]]:
    """The turns of so many questions of a seed, for a stage."""
    return [turns_of(one) for one in random.Random(f"{stage} {seed}").sample(questions, number)]


def main() -> None:
    pipeline = load_pipeline(HERE / "pipeline.yaml")
    sizes = [stage.steps * stage.batch_size for stage in map(pipeline.stages.get, ("sft", "rlvr"))]
    for seed in pipeline.seeds:
        counts = make_seed("rare", seed, KINDS["rare"].out)["counts"]
        print(f"seed {seed}: its base {'counts' if counts else 'does not count'}")
        write_rows(seed, *sizes, HERE / "data")


if __name__ == "__main__":
    main()
