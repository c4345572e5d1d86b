"""Run every arm on every seed, and add a line for each to results.jsonl; continues where it was
stopped.

    python experiments/language/run.py --seeds 9
"""

import argparse
import json
import time
from pathlib import Path

from analyze import ARMS, LAYOUT, RESULTS
from training import (
    SCRIPT,
    completions,
    make_base,
    plain_documents,
    reinforce,
    said_answer,
    supervise,
    think_ahead,
)
from world import CLOSE, OPEN, ROOT, answer_of, asked, questions_of

from rlp.measure.language import letters_of, thought_of
from rlp.measure.results_file import add_result, read_results
from rlp.post.traces import TraceRule, filter_traces
from rlp.process.ranks import Ranks, start_ranks

HELD_OUT_THOUGHTS, TRACES = 8, 8
"""Thoughts at each held-out question, and traces of the base at each train question."""


def figures(model: Path, seed: int) -> dict[str, float | None]:
    """Thoughts of a model at held-out questions: how they are written, and whether the answer after
    them is right."""
    said = completions(model, questions_of(seed)["held_out"], HELD_OUT_THOUGHTS, seed)
    right = [said_answer(text) == answer_of(question) for question, text in said]
    found = [letters_of(thought_of(text, OPEN, CLOSE)) for _, text in said]
    by_kind = {
        name: [one for one, letters in zip(right, found) if letters.is_mixed == mixed]
        for name, mixed in (("accuracy_mixed", True), ("accuracy_one_script", False))
    }
    return {
        "accuracy": mean(right),
        "mixed": mean([one.is_mixed for one in found]),
        "switches": mean([one.switches for one in found]),
        "latin": mean([one.share("latin") for one in found]),
        "cyrillic": mean([one.letters > 0 and one.share("cyrillic") == 1 for one in found]),
        "n": len(said),
        **{name: mean(values) if len(values) >= 30 else None for name, values in by_kind.items()},
    }


def mean(values: list) -> float:
    return sum(values) / len(values)


def write_traces(base: Path, path: Path, seed: int) -> None:
    """What the base writes after the train questions, as `rlp traces` reads it."""
    said = completions(base, questions_of(seed)["train"], TRACES, seed + 1000)
    lines = [
        {
            "prompt": " ".join([*asked(question), OPEN]),
            "completion": text.partition("<eos>")[0].strip(),
            "answer": said_answer(text),
            "expected": answer_of(question),
        }
        for question, text in said
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


RLP_WEIGHTS = {"rlp": 0.0, "rlp_language": 1.0, "rlp_language_4": 4.0}
"""lambda, in nats."""

RULES = {
    "sft_right": TraceRule(least_share=0.0, most_switches=None),
    "sft_language": TraceRule(script=SCRIPT, least_share=0.95, most_switches=0),
}
"""Right traces alone, and right ones in one script."""


def model_of(arm: str, seed: int, home: Path, ranks: Ranks) -> tuple[Path, dict]:
    """Train an arm, or take the model that is there; what is to be told of it."""
    base, out = home / "base", home / arm
    if arm == "base":
        if not (out / "tokenizer_config.json").exists():
            make_base(out, seed)
        return out, {}
    if arm.startswith("rlp"):
        corpus = home / "documents.jsonl"
        lines = [json.dumps({"text": document}) + "\n" for document in plain_documents(seed)]
        corpus.write_text("".join(lines))
        return think_ahead(base, corpus, home / arm, seed, ranks, weight=RLP_WEIGHTS[arm]), {}
    told = {}
    if arm.startswith("sft"):
        traces, kept = home / "traces.jsonl", home / f"kept_{arm}"
        if not traces.exists():
            write_traces(base, traces, seed)
        if not kept.exists():
            print(filter_traces(traces, kept, RULES[arm]).in_words(), flush=True)
        told["traces"] = len((kept / "kept.jsonl").read_text().splitlines())
    if not (out / "tokenizer_config.json").exists():
        if arm.startswith("sft"):
            supervise(base, kept / "kept.jsonl", out, seed)
        else:
            reinforce(base, out, seed, with_language=arm.endswith("language"))
    return out, told


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=9)
    parser.add_argument("--first", type=int, default=0, help="seed to begin with")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "language")
    parser.add_argument("--results", type=Path, default=RESULTS)
    asked_for = parser.parse_args()
    ranks = start_ranks()
    for seed in range(asked_for.first, asked_for.first + asked_for.seeds):
        for arm in ARMS:
            if read_results(asked_for.results, LAYOUT).has(arm=arm, seed=seed):
                continue
            home = asked_for.out / f"seed_{seed}"
            home.mkdir(parents=True, exist_ok=True)
            start = time.process_time()
            model, told = model_of(arm, seed, home, ranks)
            seconds = time.process_time() - start
            line = {"arm": arm, "seed": seed, **figures(model, seed), "seconds": seconds, **told}
            add_result(asked_for.results, LAYOUT, line)
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
