"""What this machine does in a second, measured in a moment on what the phases of a step rest on.

Each probe runs once to warm up and then for `PROBE_S`, unless that one took as long. The mean
counts: what disturbs a probe on a shared machine disturbs a run too.
"""

import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from rlp.measure.machines import Speed
from rlp.model.shapes import ModelShapes
from rlp.process.files import disk_bytes_per_s
from rlp.process.machine import available_memory_bytes

PROBE_S = 0.1
"""A probe's time, after its first run."""

PRODUCT_FLOPS = 10**9
"""Of the product that is timed, or what 4 to 512 of its rows come to."""

COPIED_BYTES = 128 * 10**6
"""Of what is copied: more than caches hold."""

FEW_ROWS = 128
"""Of an operator whose call is what costs."""

WRITTEN_BYTES = 32 * 10**6

OF_PASSES = {"cpu": 0.5, "cuda": 0.35}
"""What whole passes of a model reach of the rate of one large product: the rest goes to norms,
activations and attention. On a CPU as measured; for a GPU as in `machines.REACHED`."""

AROUND = 2.5
"""What an operator costs in a model over one in a norm: views, and the Python of the modules around
it. As measured on a CPU.

With both, in CPU seconds of one core of a 2.8 GHz Xeon, a step of SmolLM2 (135 million parameters)
took three quarters of what is planned here and one of the quickstart (85 thousand) 1.3 times as
much; single phases a third to 1.8 times (torch 2.13, 2026-11-22)."""


def measure_speed(
    shapes: ModelShapes, dtype: torch.dtype, device: torch.device, folder: Path
) -> Speed:
    """Time a product at the model's width, a copy, an operator, and the disk of a folder.

    Args:
        folder: the run's; it need not be there, and nothing stays in it.
    """
    began = time.perf_counter()
    width = shapes.width
    num_rows = min(512, max(4, PRODUCT_FLOPS // (8 * width**2)))
    rows = torch.ones(num_rows, width, dtype=dtype, device=device)
    weight = torch.ones(width, 4 * width, dtype=dtype, device=device)
    product_s = _seconds_of(lambda: rows @ weight, device)
    flops = 2 * num_rows * width * 4 * width / product_s

    free = available_memory_bytes() or COPIED_BYTES * 16
    block = torch.ones(min(COPIED_BYTES, free // 16) // 4, device=device)
    target = torch.empty_like(block)
    copied = 2 * block.numel() * block.element_size()
    bytes_per_s = copied / _seconds_of(lambda: target.copy_(block), device)

    launch_s = AROUND * _operator_s(width, device)
    written = disk_bytes_per_s(folder, WRITTEN_BYTES)
    took = time.perf_counter() - began
    share = OF_PASSES[device.type]
    disk = "disk not measured" if written is None else f"{written / 1e9:.2f} GB/s written"
    return Speed(
        name="this machine",
        flops=share * flops,
        bytes_per_s=bytes_per_s,
        launch_s=launch_s,
        graphed_s=None,
        link_bytes_per_s=None,
        disk_bytes_per_s=written,
        runs_ahead=device.type == "cuda",
        rests_on=(
            f"measured here in {took:.1f} s: {flops / 1e9:,.0f} GFLOP/s in a product of"
            f" {num_rows} x {width} x {4 * width},",
            f"  {bytes_per_s / 1e9:.1f} GB/s copied, {launch_s * 1e6:.1f} us an operator, {disk}",
            f"assumed: {share:.0%} of that product's rate in a pass of the model; nothing for what"
            " ranks send each other",
        ),
    )


class _Norm(nn.Module):
    """As a model has it: five operators behind the call of a module."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width), requires_grad=False)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.weight * (hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + 1e-6))


OPERATORS_OF_A_NORM = 6


def _operator_s(width: int, device: torch.device) -> float:
    """Seconds of an operator on a few rows, as a model calls it."""
    norm, rows = _Norm(width).to(device), torch.ones(FEW_ROWS, width, device=device)
    times = 20

    def call() -> None:
        for _ in range(times):
            norm(rows)

    return _seconds_of(call, device) / (times * OPERATORS_OF_A_NORM)


def _seconds_of(work: Callable[[], object], device: torch.device) -> float:
    """Mean seconds of a repetition."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None

    def timed(times: int) -> float:
        start = time.perf_counter()
        for _ in range(times):
            work()
        wait()
        return time.perf_counter() - start

    first = timed(1)  # with whatever is made ready for it
    if first > PROBE_S:
        return first
    times = max(1, int(PROBE_S / max(timed(1), 1e-6)))
    return timed(times) / times
