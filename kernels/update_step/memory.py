"""The most memory that something takes."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch


def peak_during(action: Callable[[], object], device: torch.device) -> int | None:
    """Bytes that are held at most while it runs, beyond what is held before.

    On a CPU it is this process that is measured, which should have done nothing else. None where
    the system can not forget its high-water mark.
    """
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        action()
        return torch.cuda.max_memory_allocated() - before

    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    before = _status_bytes("VmRSS")
    action()
    return _status_bytes("VmHWM") - before


def answer_alone(program: str, arguments: dict[str, object]) -> object:
    """What a program prints as its last line of JSON, in a process of its own.

    Its malloc returns every tensor at once, so that free memory is not counted.

    Raises:
        RuntimeError: it fails.
    """
    command = [sys.executable, program]
    for option, value in arguments.items():
        command += [option, str(value)]
    malloc = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    environment = os.environ | malloc

    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def _status_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))
