"""What machines do in a second: devices by name, each figure with its source, and how one is asked
for.

    8xH100    8 devices that are known here: memory and seconds are planned
    8x80      8 devices of 80 GB: memory alone

Figures of makers are peaks of dense arithmetic. What a run reaches of them is assumed, and said
(`REACHED`); what is measured on this machine stands in `speed_here`.
"""

import re
from dataclasses import dataclass

from rlp.config import ConfigError

GB = 10**9

REACHED = {"products": 0.35, "reading": 0.9}
"""Of the peak, by large matrix products in whole passes of a model and by reading memory. 0.33 to
0.39 is what torchtitan reports for Llama 3.1 8B in bfloat16 on 8 and 128 H100
(github.com/pytorch/torchtitan, benchmarks/llama3_h100_202412_torchtitan.md); the other is ours, not
measured."""

LAUNCH_S, GRAPHED_S = 10e-6, 3e-6
"""An operator launched by Python on a GPU, and a small kernel replayed from a CUDA graph. Ours, not
measured."""

DISK_BYTES_PER_S = 2e9
"""Of a shared disk, for all nodes together. Ours; ask those who run it."""

DEVICES_PER_NODE = 8


@dataclass(frozen=True, slots=True)
class Kind:
    """A device, as its maker describes it."""

    memory_bytes: int
    flops: float
    """In bfloat16, dense."""
    bytes_per_s: float
    """Of its memory."""
    link_bytes_per_s: float
    """To another device of its node, one way."""
    network_bytes_per_s: float
    """To another node, one way."""
    source: str


KINDS = {
    "A100": Kind(
        80 * GB, 312e12, 2.039e12, 300e9, 25e9, "NVIDIA A100 80GB SXM and DGX A100 data sheets"
    ),
    "H100": Kind(80 * GB, 989e12, 3.35e12, 450e9, 50e9, "NVIDIA H100 SXM and DGX H100 data sheets"),
    "H200": Kind(141 * GB, 989e12, 4.8e12, 450e9, 50e9, "NVIDIA H200 SXM and DGX H200 data sheets"),
}


@dataclass(frozen=True, slots=True)
class Speed:
    """What a rank's device, and the disk, do in a second."""

    name: str
    flops: float
    """Of matrix products in whole passes of a model, in the compute dtype."""
    bytes_per_s: float
    """Reading its memory."""
    launch_s: float
    """An operator that Python calls."""
    graphed_s: float | None
    """A small kernel of a recorded step; None where nothing can be recorded."""
    link_bytes_per_s: float | None
    """Between ranks, one way; None where it is not known."""
    disk_bytes_per_s: float | None
    """Written, by all ranks together; None where it could not be measured."""
    runs_ahead: bool
    """Whether Python calls the next operator while the device computes."""
    rests_on: tuple[str, ...]
    """Where the figures are from, a line each."""


@dataclass(frozen=True, slots=True)
class Machine:
    """Devices to plan for, one rank each."""

    devices: int
    memory_bytes: int
    """Of each."""
    speed: Speed | None
    """None where only their memory is known."""


def machine_named(name: str) -> Machine:
    """The machine that `--machine` names.

    Raises:
        ConfigError: it names none.
    """
    found = re.fullmatch(r"([1-9]\d*)x(\w+)", name)
    devices, kind = (int(found[1]), found[2].upper()) if found else (0, "")
    if kind in KINDS:
        return Machine(devices, KINDS[kind].memory_bytes, _speed_of(devices, kind))
    if re.fullmatch(r"[1-9]\d*", kind):
        return Machine(devices, int(kind) * GB, None)
    raise ConfigError(
        f"--machine {name!r}: expected COUNTxKIND with a kind of {', '.join(KINDS)}, such as"
        " 8xH100, or COUNTxGIGABYTES, such as 8x80, which plans memory alone; leave it out for this"
        " machine."
    )


def _speed_of(devices: int, name: str) -> Speed:
    kind, several = KINDS[name], devices > DEVICES_PER_NODE
    link = kind.network_bytes_per_s if several else kind.link_bytes_per_s
    return Speed(
        name=f"{devices}x{name}",
        flops=REACHED["products"] * kind.flops,
        bytes_per_s=REACHED["reading"] * kind.bytes_per_s,
        launch_s=LAUNCH_S,
        graphed_s=GRAPHED_S,
        link_bytes_per_s=link,
        disk_bytes_per_s=DISK_BYTES_PER_S,
        runs_ahead=True,
        rests_on=(
            f"{kind.source}: {kind.flops / 1e12:,.0f} TFLOP/s dense bfloat16,"
            f" {kind.bytes_per_s / 1e12:.2f} TB/s,"
            f" {link / 1e9:.0f} GB/s between {'nodes' if several else 'devices'}",
            f"assumed: {REACHED['products']:.0%} of those FLOP/s in a pass of the model (torchtitan"
            " reports 33 to 39 %",
            f"  for Llama 3.1 8B on H100), {REACHED['reading']:.0%} of those TB/s,"
            f" {LAUNCH_S * 1e6:.0f} us an operator, {GRAPHED_S * 1e6:.0f} us a small kernel of a",
            f"  CUDA graph, {DISK_BYTES_PER_S / 1e9:.0f} GB/s of disk",
        ),
    )
