"""What one update step costs when its thoughts are given: ours, and TRL's GRPOTrainer doing it.

    python kernels/bench_step.py --shape 256,4,8,32 --json step.json
    python kernels/bench_step.py --with-sampling --shape 256,4,8,128 --json sampled_step.json

Every contender computes the same numbers: the reward of each thought (eq. 5), its advantage (eq.
7), the gradient of the clipped surrogate (eq. 8), one AdamW step, one EMA step. That is checked
first, in float32; contenders that differ are not compared, and the program exits with 1. Then they
take turns, A B A B, on one process and one thread. The parts are in `update_step/`.

    ours          the training step without DeepSpeed: one teacher forward of the document, one
                  policy forward that gives rewards and thought log-probabilities, backward
    TRL careful   GRPOTrainer with a reward function that reads the last row only, pads to its own
                  micro-batch, and asks the teacher once per document; the fastest of several
                  micro-batches
    TRL naive     GRPOTrainer, micro-batch 8, with a reward function that computes all logits of
                  every completion, and asks the teacher once per completion

With sampling, ours samples in slots and TRL generates all completions in one batch, with the
lengths of `sampling_phase/lengths.json` imposed on both, their mean a sixth of the budget; the
thoughts are each one's own. TRL returns no log-probabilities of what it samples, ours does.

What is fair
    Same weights from a seed, document, positions, thoughts, dtype, temperature, AdamW, EMA teacher.
    The peers run TRL's own `training_step`: its preparing, rewards, advantages, loss and backward,
    with the given thoughts coming in through `rollout_func`. Eq. 7's factor is a reward weight of
    G / (G - 1), as TRL leaves it out; `loss_type="grpo"` is the mean over a thought's tokens, then
    over thoughts; the open marker is out of the peers' target softmax too. The careful peer is
    given more than TRL offers on a CPU: there TRL's fused head scores the prompt's tokens as well,
    and only where Triton runs does it keep to the completion; here it keeps to it everywhere.
    Gradient checkpointing, TRL's default, is off. On a CPU, ours and the careful peer take every
    turn; the others take two of ten.
What is not
    TRL pads all prompts of a step to the longest, and computes an entropy for its metrics: both are
    left as they are, and both are in its time. Our monitors (a few means per step) are left out of
    ours. Nobody clips gradients. Unless asked to, nothing is sampled. On a GPU
    all run in bfloat16, weights, moments and EMA too, which nobody should train with, but which
    costs all of them the same; TRL rounds logits to bfloat16 there and ours does not.
Not driven by TRL
    `Trainer.train`'s loop: the optimizer step between `training_step`s is ours, and the same for
    all.

Dimensions
    P  document tokens;  K  positions of the document (M = K);  G  thoughts per position;  N = K * G
    L  longest thought;  T  tokens of a row;  V  vocabulary
"""

import argparse
import json
import os
import sys
import tempfile
import warnings
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import rlp  # noqa: F401, before torch: see rlp/process/machine.py

# isort: split
import torch
import transformers

from update_step.architecture import architecture
from update_step.given import Shape
from update_step.memory import answer_alone
from update_step.report import over_shapes, provenance, summary, table
from update_step.sampled_step import measure_sampled, sampled_table
from update_step.turns import (
    CAREFUL,
    CHECKPOINTED,
    Bench,
    check,
    contender_names,
    fastest_micro_batch,
    peak_bytes,
    take_turns,
)

LARGEST_ERROR = 1e-4
"""Relative, in float32: beyond it the contenders do not compute the same step, and the benchmark is
void."""
CAVEATS = (
    "Equal-MFU ratios flatter nobody at L 2048: they are about 2x at most, because long thoughts"
    " leave little prefix to share.",
    "Nothing is claimed against a vLLM-backed peer: none is measured here.",
)


def main(arguments: list[str] | None = None) -> int:
    """Returns 1 where the contenders do not compute the same step."""
    options = parse(arguments)
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    # TRL uses a name of transformers that is deprecated there: a warning for each trainer.
    warnings.filterwarnings("ignore", message=".*gradient_checkpointing.*", category=FutureWarning)

    with tempfile.TemporaryDirectory() as folder:
        benches = make_benches(options, Path(folder))
        if options.memory_of:
            print(json.dumps(peak_bytes(benches[0], options.memory_of)))
            return 0

        report = announce(options, benches[0])
        if options.with_sampling:
            return with_sampling(options, benches, report)
        results = []
        for bench in benches:
            result = measure(bench, options)
            if result is None:
                return 1
            print(table(result), flush=True)
            results.append(result)

    print("\n" + "\n".join(CAVEATS))
    if options.json:
        report |= over_shapes(results) | {"caveats": CAVEATS, "shapes": results}
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    return 0


def with_sampling(options: argparse.Namespace, benches: list[Bench], report: dict) -> int:
    """The steps of all shapes with their sampling."""
    results = []
    for bench in benches:
        bench = replace(bench, micro_batch=fastest_micro_batch(bench))
        results.append(measure_sampled(bench, options.warmups, options.repeats))
        print(sampled_table(results[-1]), flush=True)
    if options.json:
        report |= {"speedup_vs_trl": min(result["speedup_vs_trl"] for result in results)}
        options.json.write_text(json.dumps(report | {"shapes": results}, indent=1) + "\n")
    return 0


def announce(options: argparse.Namespace, bench: Bench) -> dict:
    """Say what is measured, and on what; returns the latter."""
    report = provenance(bench.device)
    print("\n".join(f"{key}: {value}" for key, value in report.items()))
    print(
        f"model: Qwen3 architecture, d {options.d}, {options.layers} layers,"
        f" V {options.vocabulary}, random, {bench.dtype};"
        f" {options.warmups} warm-ups, {options.repeats} repeats"
    )
    return report


def make_benches(options: argparse.Namespace, folder: Path) -> list[Bench]:
    """One for each shape."""
    device = torch.device(options.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    config = architecture(options)
    return [
        Bench(config, shape, device, dtype, folder, options.micro_batch or shape.group_size)
        for shape in options.shape
    ]


def measure(bench: Bench, options: argparse.Namespace) -> dict | None:
    """Everything about one shape; None if the contenders do not compute the same step."""
    names = contender_names(bench, options.checkpointing)
    bench = replace(bench, micro_batch=fastest_micro_batch(bench))
    reward_error, gradient_error, contenders = check(bench, names)
    shape = bench.shape
    print(
        f"\nP {shape.document_tokens}  K {shape.positions}  G {shape.group_size} "
        f" L {shape.thought_tokens}: reward_max_rel_err {reward_error:.1e},"
        f" grad_rel_err {gradient_error:.1e} (float32, all {len(names)} contenders)"
    )
    if not max(reward_error, gradient_error) <= LARGEST_ERROR:
        print(f"void: the contenders do not compute the same step (allowed: {LARGEST_ERROR:g})")
        return None

    # In float32 the check was everybody's first warm-up.
    warmups = options.warmups - 1 if contenders else options.warmups
    contenders = contenders or {name: bench.build(name) for name in names}
    raw = take_turns(bench, contenders, warmups, options.repeats)

    # Each costs a process and its imports.
    memory_of = set() if options.quick else {names[0], "repeated", CAREFUL, CHECKPOINTED}
    peak = {name: peak_bytes_alone(bench, name, options) for name in names if name in memory_of}
    return summary(bench, names, raw, peak, reward_error, gradient_error)


def peak_bytes_alone(bench: Bench, name: str, options: argparse.Namespace) -> int | None:
    """`peak_bytes` in a process of its own."""
    if bench.device.type == "cuda":
        return peak_bytes(bench, name)

    arguments = {
        "--shape": bench.shape,
        "--d": options.d,
        "--layers": options.layers,
        "--vocabulary": options.vocabulary,
        "--memory-of": name,
        "--micro-batch": bench.micro_batch,
    }
    return answer_alone(__file__, arguments)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--shape",
        type=Shape.parse,
        action="append",
        metavar="P,K,G,L",
        help="document tokens, positions, thoughts per position, longest thought; may be repeated"
        " (256,4,8,32 and 256,4,8,128)",
    )
    parser.add_argument("--json", type=Path, metavar="OUT", help="write everything measured there")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--warmups", type=int, default=3)
    parser.add_argument("--d", type=int, default=256, help="width of the Qwen3 architecture")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument(
        "--checkpointing",
        action="store_true",
        help="add the careful peer with gradient checkpointing",
    )
    parser.add_argument(
        "--with-sampling",
        action="store_true",
        help="a whole step with its sampling, beside the careful peer with its own generation",
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="a tiny shape and two rounds: does it run, and do the contenders agree?",
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    parser.add_argument("--micro-batch", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)

    if options.quick:
        options.shape, options.repeats, options.warmups = [Shape(48, 2, 4, 12)], 2, 1
        options.d, options.layers, options.vocabulary = 64, 2, 512
    options.shape = options.shape or [Shape(256, 4, 8, 32), Shape(256, 4, 8, 128)]
    return options


if __name__ == "__main__":
    sys.exit(main())
