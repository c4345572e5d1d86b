"""Where a run happens: commit, versions, hardware, date, command line."""

import datetime
import os
import platform
import shlex
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import torch

from rlp.config import without_secrets

PACKAGES = ("torch", "transformers", "deepspeed", "datasets", "safetensors", "numpy")
"""Distributions whose versions `environment.json` records."""


def environment(devices: list[str]) -> dict:
    """Where a run happens, as `environment.json` holds it. No environment variable is recorded:
    they hold secrets.

    Args:
        devices: the device name of each rank, in rank order.
    """
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": without_secrets(shlex.join(sys.argv)),
        **_git_state(Path(__file__).resolve().parents[2]),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "platform": platform.platform(),
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "world_size": len(devices),
        "devices": devices,
    }


def device_name(device: torch.device) -> str:
    """What a GPU calls itself; otherwise the kind of the device."""
    return torch.cuda.getdevice_name(device) if device.type == "cuda" else device.type


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _git_state(project: Path) -> dict:
    """Commit of the project and whether tracked files differ from it; None where it is not its own
    checkout."""
    # Installed into a virtual environment, the package may lie inside somebody else's checkout.
    top = _git(project, "rev-parse", "--show-toplevel")
    if not top or Path(top).resolve() != project:
        return {"commit": None, "dirty": None}

    changes = _git(project, "status", "--porcelain", "--untracked-files=no")
    return {
        "commit": _git(project, "rev-parse", "HEAD"),
        "dirty": None if changes is None else bool(changes),
    }


def _git(project: Path, *arguments: str) -> str | None:
    """What git says, or None where there is no git, no repository or no answer."""
    try:
        done = subprocess.run(
            ["git", "-C", str(project), *arguments], capture_output=True, text=True, timeout=20
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
