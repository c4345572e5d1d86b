"""What sampling a phase of thoughts costs: slots, blocks, `generate` as TRL calls it, and vLLM.

    python kernels/bench_sampling.py --json sampling.json
    python kernels/bench_sampling.py --model SMOLLM2 --documents 8 --rows 32 --dtype bfloat16

One phase: documents, K positions of each, G thoughts at each position, whose lengths are recorded
and widely spread, their mean a sixth of the budget (`sampling_phase/lengths.json`). All have the
same model, weights, prompts, temperature, lengths and rows side by side, one process and one
thread, and take turns, A B A B. There are eight times as many thoughts as rows, so that there is a
queue: 1,024 thoughts a GPU in 128 slots are what a step of 512 documents with 16 thoughts each
brings to 8 GPUs.

    slots      NativeSampler: a thought that ends frees its slot for the next one
    slots, eager   the same without a CUDA graph, on a GPU
    blocks     the reference (`sampling_phase/blocks.py`): a block lasts as long as its longest
               thought; the same trunks, held once
    generate   `transformers` as TRL's GRPOTrainer calls it: each prompt repeated G times, do_sample
    vLLM       alone, one request a thought, with its prefix cache; where it is installed

What is fair
    Slots and blocks draw by the same keyed numbers; their thoughts are compared token by token, and
    are the same but for those that part where a number is within 1e-5 of the boundary between two
    tokens: there rounding decides, and how many there are is said. The end of a thought is in model
    and numbers (`sampling_phase/setting.py`), and each pays for it with one addition to the logits;
    `generate` gets a logits processor of one operator, vLLM the number of tokens of each request.
    Decode steps are forwards of one token a row. FLOPs spent are those of all products that were
    run, as torch counts them; useful ones those of each document once, each thought behind its
    prefix once, and the head where a token is drawn.
What is not
    `generate` returns no log-probabilities and no entropies; ours does, and its time is in its
    turns. Its rows are ours, as rows are what memory is for; a larger batch has fewer steps and
    more padding. Random documents: what they say changes no time. vLLM's forwards can not be
    counted.

Dimensions
    P  document tokens;  K  positions of a document;  G  thoughts per position;  L  budget
"""

import argparse
import json
import os
import statistics
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import rlp  # noqa: F401, before torch: see rlp/process/machine.py

# isort: split
import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedModel

from sampling_phase.contenders import (
    BLOCKS,
    EAGER,
    GENERATE,
    SLOTS,
    VLLM,
    Contender,
    build,
    why_missing,
)
from sampling_phase.measure import audit, parting_distance, take_turns, useful_flops
from sampling_phase.setting import close_by_noise, make_setting
from update_step.architecture import architecture
from update_step.given import SEED, Shape
from update_step.memory import answer_alone, peak_during
from update_step.report import provenance

AT_A_BOUNDARY = 1e-5
"""Of a number in [0, 1) from a boundary: what float32 logits of up to 20 can be wrong by, as they
come of products summed in another order."""
HEADLINE = (
    "slots_steps_over_blocks",
    "speedup_vs_blocks",
    "speedup_vs_generate",
    "speedup_vs_vllm",
    "same_thoughts_as_blocks",
)


def main(arguments: list[str] | None = None) -> int:
    """Returns 1 where lengths are not those recorded, or float32 thoughts not those of blocks."""
    options = parse(arguments)
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    if options.memory_of:
        contender, device = build_alone(options), torch.device(options.device)
        print(json.dumps(peak_during(contender.run, device)))
        return 0

    report = provenance(torch.device(options.device))
    print("\n".join(f"{key}: {value}" for key, value in report.items()))
    result = measure(options)
    print(table(result), flush=True)
    if options.json:
        headline = {name: result[name] for name in HEADLINE}
        options.json.write_text(json.dumps(report | headline | result, indent=1) + "\n")
    is_exact = options.dtype != "float32" or result["same_thoughts_as_blocks"]
    if not (is_exact and result["lengths_as_recorded"]):
        print("void: the contenders do not sample the same phase")
        return 1
    return 0


def measure(options: argparse.Namespace) -> dict:
    """Everything about one model."""
    device, lm = torch.device(options.device), make_model(options)
    setting = make_setting(options.shape, options.documents, lm.config.vocab_size)
    names = [SLOTS, *([EAGER] if device.type == "cuda" else []), BLOCKS, GENERATE, VLLM]
    missing = {name: why for name in names if (why := why_missing(name))}
    names = [name for name in names if name not in missing and name not in options.without]
    contenders = {name: build(name, lm, setting, options.rows) for name in names}

    eager = {SLOTS: EAGER if EAGER in contenders else SLOTS}
    audits = {
        name: audit(contenders[eager.get(name, name)], lm.base_model, options.rows)
        for name in names
        if name != VLLM
    }
    seldom = {GENERATE} if device.type == "cpu" else set()
    raw = take_turns(contenders, device, options.repeats, seldom)
    peak = {} if not options.memory else {name: peak_alone(name, options) for name in names}

    medians = {name: statistics.median(values) for name, values in raw.items()}
    useful = useful_flops(setting, lm.config)
    slots, blocks = audits[SLOTS], audits[BLOCKS]
    parted = (slots.sampled.tokens != blocks.sampled.tokens).any(axis=1)
    distance = parting_distance(lm, setting, slots.sampled, blocks.sampled)

    def speedup(name: str) -> float | None:
        return medians[name] / medians[SLOTS] if name in medians else None

    return {
        "model": str(options.model or "Qwen3 architecture, random"),
        "dtype": options.dtype,
        "shape": str(options.shape),
        "documents": options.documents,
        "rows": options.rows,
        "thoughts": setting.lengths.size,
        "tokens": setting.num_tokens,
        "slots_steps_over_blocks": slots.decode_steps / blocks.decode_steps,
        "speedup_vs_blocks": speedup(BLOCKS),
        "speedup_vs_generate": speedup(GENERATE),
        "speedup_vs_vllm": speedup(VLLM),
        "same_thoughts_as_blocks": distance <= AT_A_BOUNDARY,
        "thoughts_parted_at_a_boundary": int(parted.sum()),
        "parting_distance": distance,
        "lengths_as_recorded": all(
            (one.sampled.lengths == setting.lengths.flatten()).all() for one in audits.values()
        ),
        "missing": missing,
        "decode_steps": {name: one.decode_steps for name, one in audits.items()},
        "tokens_per_s": {name: setting.num_tokens / value for name, value in medians.items()},
        "seconds": medians,
        "ranges": {name: [min(values), max(values)] for name, values in raw.items()},
        "peak_bytes_beyond_weights": peak,
        "useful_flops": useful,
        "useful_over_spent_flops": {name: useful / one.flops for name, one in audits.items()},
        "raw_seconds": raw,
    }


def make_model(options: argparse.Namespace) -> PreTrainedModel:
    """With the weights of a folder, or the random ones of the benchmark."""
    torch.manual_seed(SEED)
    kind = {"attn_implementation": "sdpa", "dtype": getattr(torch, options.dtype)}
    if options.model:
        lm = AutoModelForCausalLM.from_pretrained(options.model, **kind)
    else:
        lm = AutoModelForCausalLM.from_config(architecture(options), **kind)
    close_by_noise(lm)
    return lm.to(options.device).eval().requires_grad_(False)


def build_alone(options: argparse.Namespace) -> Contender:
    """The one whose memory is asked for, after a phase of one document: what a first phase
    allocates for good is allocated."""
    lm = make_model(options)
    first = make_setting(options.shape, 1, lm.config.vocab_size)
    build(options.memory_of, lm, first, options.rows).run()
    setting = make_setting(options.shape, options.documents, lm.config.vocab_size)
    return build(options.memory_of, lm, setting, options.rows)


def peak_alone(name: str, options: argparse.Namespace) -> int | None:
    """Bytes beyond weights, in a process of its own."""
    arguments = {
        "--shape": options.shape,
        "--documents": options.documents,
        "--rows": options.rows,
        "--d": options.d,
        "--layers": options.layers,
        "--vocabulary": options.vocabulary,
        "--dtype": options.dtype,
        "--device": options.device,
        "--memory-of": name,
    }
    return answer_alone(__file__, arguments | ({"--model": options.model} if options.model else {}))


def table(result: dict) -> str:
    """One line per contender, and the headline."""
    lines = [
        f"\n{result['model']}, {result['dtype']}; P,K,G,L {result['shape']},"
        f" {result['documents']} documents, {result['thoughts']} thoughts,"
        f" {result['tokens']} tokens, {result['rows']} rows",
        f"{'contender':14s}{'tokens/s':>10s}{'phase, s (min - max)':>28s}{'steps':>7s}"
        f"{'useful/spent':>14s}{'peak MiB':>10s}",
    ]
    for name, median in result["seconds"].items():
        low, high = result["ranges"][name]
        peak = result["peak_bytes_beyond_weights"].get(name)
        share = result["useful_over_spent_flops"].get(name)
        lines.append(
            f"{name:14s}{result['tokens_per_s'][name]:10.1f}{median:12.3f}"
            f" ({low:.3f} - {high:.3f}){result['decode_steps'].get(name, '-'):>7}"
            f"{f'{share:.2f}' if share else '-':>14s}{f'{peak / 2**20:.0f}' if peak else '-':>10s}"
        )
    lines += [f"{name}: {why}" for name, why in result["missing"].items()]
    lines += [f"{name}: {result[name]}" for name in HEADLINE]
    lines.append(
        f"thoughts parted at a boundary: {result['thoughts_parted_at_a_boundary']},"
        f" farthest from it {result['parting_distance']:.1e}"
    )
    return "\n".join(lines)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--shape", type=Shape.parse, default=Shape(256, 4, 8, 128), metavar="P,K,G,L",
        help="document tokens, positions, thoughts per position, budget (256,4,8,128)",
    )  # fmt: skip  # an option to a line
    parser.add_argument("--documents", type=int, default=16)
    parser.add_argument("--rows", type=int, default=64, help="slots, rows of a block or a batch")
    parser.add_argument("--model", type=Path, metavar="FOLDER", help="instead of the random one")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--repeats", type=int, default=6)
    parser.add_argument("--json", type=Path, metavar="OUT", help="write everything measured there")
    parser.add_argument("--d", type=int, default=256, help="width of the Qwen3 architecture")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument(
        "--memory",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="peak memory too: a phase more of each, in a process of its own",
    )
    parser.add_argument("--without", action="append", default=[], metavar="CONTENDER")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="a tiny phase, two rounds, no memory: does it run, and are the thoughts the same?",
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.quick:
        options.shape, options.documents, options.rows = Shape(48, 2, 4, 24), 4, 8
        options.memory = False
        options.repeats, options.d, options.layers, options.vocabulary = 2, 64, 2, 512
    return options


if __name__ == "__main__":
    sys.exit(main())
