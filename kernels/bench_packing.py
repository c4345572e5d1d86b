"""What micro-batches by real lengths save: `optim.tokens_per_micro_batch` beside
`optim.micro_batch_size`.

    python kernels/bench_packing.py --json packing.json

Both hold as much in one forward at most: as many of the longest documents, with thoughts of the
whole budget, as a multiple of one says. Thoughts have the recorded lengths of
`sampling_phase/lengths.json`, documents lengths that are uniform up to the longest. Counted are
passes and token positions, padding included, of a whole update; with `--measure`, CPU seconds of
forward and backward of a small random model too, in turns.

Dimensions
    M  positions;  G  thoughts per position
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import rlp  # noqa: F401, before torch: see rlp/process/machine.py

# isort: split
import numpy as np
import torch
from transformers import AutoModelForCausalLM

from rlp.data.documents import Document
from rlp.data.positions import Positions
from rlp.model import attention
from rlp.model.layout import LAYOUTS, Layout
from rlp.model.policy import Policy
from rlp.model.scoring import score
from rlp.model.thoughts import Thoughts
from rlp.step.micro_batch import MicroBatch
from rlp.step.packing import Cutter
from sampling_phase.setting import recorded_lengths
from update_step.architecture import architecture
from update_step.given import CLOSE, FIRST_WORD, SEED, THOUGHT_FORMAT

ALONE = SimpleNamespace(backward_is_collective=False, forward_is_collective=False)


def a_step(options: argparse.Namespace, budget: int, document_tokens: int) -> MicroBatch:
    """Documents of 1/16 to all of the longest, one position in each, and recorded thoughts."""
    noise = np.random.default_rng(SEED)
    sizes = noise.integers(document_tokens // 16, document_tokens + 1, options.documents)
    documents = [
        Document(number, noise.integers(FIRST_WORD, options.vocabulary, size))
        for number, size in enumerate(sizes)
    ]
    position = noise.integers(1, sizes)
    target = np.stack([document.tokens[t : t + 1] for document, t in zip(documents, position)])
    lengths = torch.from_numpy(recorded_lengths(options.documents * options.group_size, budget))
    lengths = lengths.reshape(-1, options.group_size)
    mask = torch.arange(int(lengths.max())) < lengths[..., None]
    nothing = torch.zeros(mask.shape)
    tokens = torch.from_numpy(noise.integers(FIRST_WORD, options.vocabulary, tuple(mask.shape)))
    thoughts = Thoughts(tokens * mask, mask, nothing, nothing, lengths == budget)
    return MicroBatch(documents, Positions(np.arange(len(sizes)), position, target), thoughts)


def passes_of(step: MicroBatch, layout: str, **optim: int | None) -> list[Layout]:
    """The forwards of an update."""
    settings = {"micro_batch_size": 1, "tokens_per_micro_batch": None, "thoughts_per_forward": None}
    config = SimpleNamespace(
        optim=SimpleNamespace(**settings | optim), objective=SimpleNamespace(lm_weight=0.1)
    )
    cut = Cutter(config, layout, THOUGHT_FORMAT, ALONE, None)
    return [
        LAYOUTS[layout](
            part.documents,
            part.positions,
            part.thoughts,
            THOUGHT_FORMAT,
            lm=part.is_first_slice,
            no_think=part.is_first_slice,
            device=torch.device("cpu"),
        )
        for batch in cut.update(step)
        for part in batch.slices()
    ]


def seconds_of(policy: Policy, passes: list[Layout]) -> float:
    """CPU time of forward and backward."""
    policy.zero_grad()
    start = time.process_time()
    for layout in passes:
        scores = score(policy, layout)
        (scores.thought.sum() + scores.target.sum() + scores.document.sum()).backward()
    return time.process_time() - start


def compare(options: argparse.Namespace, layout: str, many: int) -> dict:
    """Both ways at the same bound: so many of the longest documents with all their thoughts."""
    group = options.group_size
    longest = options.document_tokens + group * (options.thought_tokens + 2)
    if layout == "repeated":
        longest = (group + 1) * (options.document_tokens + options.thought_tokens + 2)
    step = a_step(options, options.thought_tokens, options.document_tokens)
    ways = {
        "by_count": passes_of(step, layout, micro_batch_size=many),
        "by_length": passes_of(step, layout, tokens_per_micro_batch=many * longest),
    }
    found = {
        name: {
            "passes": len(passes),
            "positions": sum(one.tokens.numel() for one in passes),
            "largest": max(one.tokens.numel() for one in passes),
        }
        for name, passes in ways.items()
    }
    if options.measure:
        torch.manual_seed(SEED)
        lm = AutoModelForCausalLM.from_config(architecture(options), attn_implementation="sdpa")
        if layout == "tree":
            lm.set_attn_implementation(attention.register("sdpa"))
        policy = Policy(lm, THOUGHT_FORMAT.markers)
        turns = [{name: seconds_of(policy, ways[name]) for name in ways} for _ in range(4)][1:]
        for name in ways:
            found[name]["cpu_s"] = statistics.median(turn[name] for turn in turns)
    return {"layout": layout, "longest_documents": many, "bound": many * longest, **found}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--documents", type=int, default=64)
    parser.add_argument("--group-size", type=int, default=16)
    parser.add_argument("--document-tokens", type=int, default=1024)
    parser.add_argument("--thought-tokens", type=int, default=2048)
    parser.add_argument("--d", type=int, default=64)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--vocabulary", type=int, default=512)
    parser.add_argument("--measure", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    assert CLOSE < FIRST_WORD <= options.vocabulary

    rows = [compare(options, layout, many) for layout in LAYOUTS for many in (1, 2, 4)]
    for row in rows:
        count, length = row["by_count"], row["by_length"]
        said = f"{row['layout']:9} {row['longest_documents']} longest ({row['bound']:7,}): "
        said += f"passes {count['passes']} -> {length['passes']}, positions"
        said += f" {count['positions']:,} -> {length['positions']:,}, largest"
        said += f" {count['largest']:,} -> {length['largest']:,}"
        if options.measure:
            said += f", CPU {length['cpu_s'] / count['cpu_s']:.2f} of by count"
        print(said)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
