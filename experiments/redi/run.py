"""Run every arm on every seed, and add a line for each to results.jsonl; continues where it was
stopped.

    python experiments/redi/run.py --seeds 8
"""

import argparse
import gc
import json
import shutil
import time
from math import comb
from pathlib import Path

from analyze import ARMS, LAYOUT, OWN, OWN_ARMS, RATES, RESULTS, START
from transformers import AutoModelForCausalLM, PreTrainedModel
from world import (
    CPU,
    NUMBERS,
    PARTS,
    SAMPLES,
    START_STEPS,
    is_right,
    make_start,
    prompt_of,
    questions_of,
    read_rows,
    sampled,
    sound_after_slip,
    token_logprobs,
    trace_of,
    write_pairs,
)

from rlp.measure.results_file import add_result, read_results
from rlp.post.pipeline_config import RediStage
from rlp.post.stages.interface import Work
from rlp.post.stages.redi import contrast
from rlp.process.ranks import Ranks, share_cores

ROOT = Path(__file__).parents[2]
STEPS, BATCH = 100, 16


class OneProcess(Ranks):
    """Without a process group, in which a trainer would wait for itself several times a step."""

    def gather(self, value: object) -> list:
        return [value]


def figures(model: PreTrainedModel, seed: int, pairs: list[dict]) -> dict[str, float | None]:
    """What is read of a model; log-probabilities are in nats a token."""
    held_out = questions_of(seed)["held_out"]
    said = sampled(model, held_out, SAMPLES, seed + 1)
    right = [
        sum(is_right(numbers, trace) for trace in traces) for numbers, traces in zip(held_out, said)
    ]
    told = {f"pass_{k}": mean([passed(count, k) for count in right]) for k in (1, 8)}
    told["right"] = _logprob(model, [(prompt_of(x), trace_of(x)) for x in held_out])
    told |= dict.fromkeys(("chosen", "rejected", "slip", "after_slip"))
    if not pairs:
        return told
    told["chosen"] = _logprob(model, [(row["prompt"], row["chosen"]) for row in pairs])
    wrong = [(row["prompt"], row["rejected"]) for row in pairs]
    told["rejected"] = _logprob(model, wrong)
    slips, after = [], []
    for row, logprobs in zip(pairs, token_logprobs(model, wrong)):
        numbers = [int(word) for word in row["prompt"].split()[:NUMBERS]]
        slips.append(logprobs[len(row["rejected"][: row["first_wrong"]].split())].item())
        after += [logprobs[i].item() for i in sound_after_slip(numbers, row["rejected"])]
    return told | {"slip": mean(slips), "after_slip": mean(after)}


def passed(right: int, k: int) -> float:
    """The chance that one of k of the samples is right, of which so many are."""
    return 1 - comb(SAMPLES - right, k) / comb(SAMPLES, k)


def _logprob(model: PreTrainedModel, rows: list[tuple[str, str]]) -> float:
    return mean([one.mean().item() for one in token_logprobs(model, rows)])


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def plan() -> list[tuple[str, str, float, str]]:
    """Of every line of a seed: the arm as results have it, its settings' name, its rate, and the
    file of its pairs."""
    ours = [(f"{arm}@{rate:g}", arm, rate, "pairs.jsonl") for arm in ARMS for rate in RATES]
    own = [(arm, rate) for arm in OWN_ARMS for rate in RATES]
    return ours + [(f"{OWN}{arm}@{rate:g}", arm, rate, "own.jsonl") for arm, rate in own]


def train(
    arm: str, rate: float, pairs: Path, folder: Path, seed: int, ranks: Ranks
) -> tuple[Path, dict]:
    """An arm at a rate, by the stage `redi`; its model, and what its log says."""
    alarms: list[str] = []
    settings = RediStage(
        kind="redi",
        data=[str(pairs)],
        steps=STEPS,
        batch_size=BATCH,
        learning_rate=rate,
        checkpoint_every=STEPS,
        max_tokens=64,
        stop_on_collapse=False,
        **ARMS[arm],
    )
    shutil.rmtree(folder, ignore_errors=True)
    start = str(pairs.with_name("start"))
    made = contrast(Work(settings, seed, start, folder, ranks, tell=alarms.append))
    norms = [line["grad_norm"] for line in read_rows(folder / "steps.jsonl")]
    told = {"gradient_first": mean(norms[:10]), "gradient_last": mean(norms[-10:])}
    fired = [said for said in alarms if said.startswith("collapse at step ")]
    told["collapse"] = int(fired[0].split()[3].rstrip(":")) if fired else None
    return made.kept[-1].path, told


def begin(home: Path, seed: int, results: Path) -> None:
    """Make the start of a seed, and tell how it came about."""
    shutil.rmtree(home, ignore_errors=True)
    home.mkdir(parents=True)
    lines = []

    def read(name: str, steps: int, model: PreTrainedModel) -> None:
        lines.append({"name": name, "steps": steps} | figures(model, seed, []))

    make_start(home, seed, read)
    told = [{name: line[name] for name in ("steps", "pass_1", "pass_8", "right")} for line in lines]
    pairs = read_rows(home / "pairs.jsonl")
    model = AutoModelForCausalLM.from_pretrained(home / "start")
    line = {"arm": START, "seed": seed, "rate": 0.0, "pairs": len(pairs), "curve": told}
    empty = dict.fromkeys(("gradient_first", "gradient_last", "collapse"))
    line |= figures(model, seed, pairs) | empty
    if not read_results(results, LAYOUT).has(arm=START, seed=seed):
        add_result(results, LAYOUT, line | {"seconds": None})
    assert len(told) == PARTS + 1 and told[-1]["steps"] == START_STEPS
    print(json.dumps(line), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--first", type=int, default=0, help="seed to begin with")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "redi")
    parser.add_argument("--results", type=Path, default=RESULTS)
    asked_for = parser.parse_args()
    share_cores()
    gc.freeze()  # what is imported stays; a trainer that ends looks for garbage
    ranks = OneProcess(0, 1, CPU)
    for seed in range(asked_for.first, asked_for.first + asked_for.seeds):
        home = asked_for.out / f"seed_{seed}"
        for name, arm, rate, file in plan():
            if read_results(asked_for.results, LAYOUT).has(arm=name, seed=seed):
                continue
            if not (home / "start" / "tokenizer_config.json").exists():
                begin(home, seed, asked_for.results)
            pairs, folder = home / file, home / name
            if not pairs.exists():
                start = AutoModelForCausalLM.from_pretrained(home / "start")
                write_pairs(pairs, start, questions_of(seed)["fresh"], seed + 1)
            began = time.process_time()
            path, told = train(arm, rate, pairs, folder, seed, ranks)
            model = AutoModelForCausalLM.from_pretrained(path)
            told |= figures(model, seed, read_rows(pairs)) | {"pairs": len(read_rows(pairs))}
            shutil.rmtree(folder)
            seconds = round(time.process_time() - began, 2)
            line = {"arm": name, "seed": seed, "rate": rate, **told, "seconds": seconds}
            add_result(asked_for.results, LAYOUT, line)
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
