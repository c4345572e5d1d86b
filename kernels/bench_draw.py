"""What drawing a token from each row of logits costs, and how exact it is.

    python kernels/bench_draw.py --json draw.json

`draw_tokens` by every form that the device runs, beside the draw of the reference sampler
(`sampling_phase/blocks.py`): a log-softmax and a float64 cumulative sum over the whole vocabulary.
In turn, three warm-ups, medians with their range. On a CPU process time on one thread; on a GPU
wall time of 20 draws between synchronizations, and the share of the memory's rate that reading the
logits once would take. Errors are those of log-probabilities, against float64.

Dimensions
    R  rows;  V  vocabulary
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import rlp  # noqa: F401, before torch: see rlp/process/machine.py

# isort: split
import torch
from torch import Tensor

from rlp_kernels import draw_tokens
from sampling_phase.blocks import plain_draw
from update_step.report import provenance

TEMPERATURE = 0.7
SHAPES = {
    "cpu": [(8, 100), (64, 8192), (32, 49_152), (8, 151_936)],
    "cuda": [(128, 49_152), (128, 151_936), (512, 151_936)],
}
BYTES_PER_S = {"H100": 3.35e12, "H200": 4.8e12}
"""Of the SXM boards, from the data sheet."""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="OUT", help="write everything measured there")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)

    report = provenance(torch.device(options.device))
    print("\n".join(f"{key}: {value}" for key, value in report.items()))
    print(f"{'rows, V':>14s}  {'draw':10s}{'us (min - max)':>28s}{'x ours':>8s}{'error':>9s}")
    results = [measure(*shape, options) for shape in SHAPES[options.device]]
    if options.json:
        options.json.write_text(json.dumps(report | {"shapes": results}, indent=1) + "\n")
    return 0


def measure(num_rows: int, vocabulary: int, options: argparse.Namespace) -> dict:
    """All draws from logits of deviation 3; ours is the first."""
    generator = torch.Generator(options.device).manual_seed(0)
    given = {"generator": generator, "device": options.device}
    logits = 3 * torch.randn(num_rows, vocabulary, **given)
    uniform = torch.rand(num_rows, dtype=torch.float64, **given)
    forms = ["triton", "plain"] if options.device == "cuda" else ["plain"]
    draws = {form: partial(draw_tokens, form=form) for form in forms} | {"reference": plain_draw}

    raw = {name: [] for name in draws}
    for turn in range(-3, options.repeats):
        for name, draw in draws.items():
            action = partial(draw, logits, uniform, TEMPERATURE)
            seconds = seconds_of(action, options.device)
            raw[name] += [seconds] if turn >= 0 else []

    medians = {name: statistics.median(values) for name, values in raw.items()}
    errors = {name: error_of(draw, logits, uniform) for name, draw in draws.items()}
    for name, median in medians.items():
        spread = f"({1e6 * min(raw[name]):.1f} - {1e6 * max(raw[name]):.1f})"
        print(
            f"{f'{num_rows}, {vocabulary}':>14s}  {name:10s}{1e6 * median:10.1f} {spread:>17s}"
            f"{median / medians[forms[0]]:8.2f}{errors[name]:9.1e}",
            flush=True,
        )
    return {
        "rows": num_rows,
        "vocabulary": vocabulary,
        "seconds": medians,
        "raw_seconds": raw,
        "errors": errors,
        "share_of_memory_rate": share_of_memory_rate(logits, medians[forms[0]]),
    }


def seconds_of(action: Callable[[], object], device: str) -> float:
    """Of one call, out of 20."""
    if device == "cuda":
        torch.cuda.synchronize()
    now = time.perf_counter if device == "cuda" else time.process_time
    start = now()
    for _ in range(20):
        action()
    if device == "cuda":
        torch.cuda.synchronize()
    return (now() - start) / 20


def error_of(draw: Callable, logits: Tensor, uniform: Tensor) -> float:
    """Of a log-probability, at most, over the first 64 rows."""
    logits, uniform = logits[:64], uniform[:64]
    token, logprob, _ = draw(logits, uniform, TEMPERATURE)
    exact = (logits.double() / TEMPERATURE).log_softmax(dim=1).gather(1, token[:, None])[:, 0]
    return float((logprob.double() - exact).abs().max())


def share_of_memory_rate(logits: Tensor, seconds: float) -> float | None:
    """Of what reading the logits once takes; None where the device's rate is not known."""
    name = torch.cuda.get_device_name() if logits.is_cuda else ""
    rate = next((rate for board, rate in BYTES_PER_S.items() if board in name), None)
    return logits.numel() * 4 / rate / seconds if rate else None


if __name__ == "__main__":
    sys.exit(main())
