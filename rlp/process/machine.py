"""What a process may take of its machine, cores and memory, and how it is told to use them.

Imported before anything else of `rlp`, and before torch: its OpenMP runtime reads the environment
once, when it is loaded.

    waiting threads    An OpenMP thread that has done its share spins until the others have, at the
                       full price of a core. Where another process wants that core, the thread that
                       has work waits for the one that has none: a step of 32 s took 222 s on two
                       shared cores. `OMP_WAIT_POLICY=passive` lets it sleep, and is set unless it
                       is set already.
    cores, memory      A container sees all of its machine, and is stopped or throttled at its own
                       limits (cgroups).
"""

import os
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")

OF_THIS_PROCESS = Path("/proc/self/cgroup")

PROCESSORS = Path("/proc/cpuinfo")


def let_waiting_threads_sleep() -> None:
    """Set the OpenMP wait policy of this process and of those that it starts, where nobody has set
    it."""
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")


def usable_cores() -> int:
    """Cores that this process may keep busy: those that it may run on, and no more than its
    containers' quotas pay for."""
    cores = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    for folder in _cgroups("cpu"):
        if (quota := _cpu_quota(folder)) is not None:
            cores = min(cores, round(quota))
    return max(1, cores)


def available_memory_bytes() -> int | None:
    """Memory that this process can still take: what the machine has available, and what its
    containers' limits leave; None where the system does not say."""
    free = [_machine_available(), *(_cgroup_available(folder) for folder in _cgroups("memory"))]
    return min((num_bytes for num_bytes in free if num_bytes is not None), default=None)


def bfloat16_instructions() -> str | None:
    """What this processor multiplies bfloat16 with, and oneDNN, which torch multiplies with, may
    use: amx_bf16, avx512_bf16 or None."""
    allowed = os.environ.get("ONEDNN_MAX_CPU_ISA", "ALL").upper()
    if not any(name in allowed for name in ("ALL", "DEFAULT", "BF16", "FP16", "AMX", "AVX10")):
        return None

    for line in _lines(PROCESSORS):
        if line.startswith("flags"):
            flags = line.partition(":")[2].split()
            return next((name for name in ("amx_bf16", "avx512_bf16") if name in flags), None)
    return None


def _machine_available() -> int | None:
    for line in _lines(Path("/proc/meminfo")):
        if line.startswith("MemAvailable:"):
            return 1024 * int(line.split()[1])
    return None


def _cgroups(controller: str) -> list[Path]:
    """Folders of the control groups that this process is in for a controller, innermost first; of
    version 1 and 2."""
    folders = []
    for line in _lines(OF_THIS_PROCESS):
        _, controllers, inside = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue

        roots = [CGROUPS, CGROUPS / "unified"]
        if controllers:
            roots = [CGROUPS / controllers, CGROUPS / controller]
        root = next((root for root in roots if root.is_dir()), None)
        if root is None:
            continue

        # A container often sees its own group as the root, under a path that does not exist there.
        inner = root / inside.lstrip("/")
        for folder in (inner, *inner.parents):
            if folder.is_relative_to(root) and folder.is_dir():
                folders.append(folder)
    return folders


def _cpu_quota(folder: Path) -> float | None:
    """Cores that a group may use; None where there is no limit."""
    told = _first_line(folder / "cpu.max").split()
    if not told:
        told = [_first_line(folder / f"cpu.cfs_{name}_us") for name in ("quota", "period")]
    quota, period = (int(number) if number.isdigit() else 0 for number in told)
    return quota / period if quota > 0 and period > 0 else None


def _cgroup_available(folder: Path) -> int | None:
    """What the limit of a group leaves, files that can be dropped from memory not counted as used;
    None where there is no limit."""
    for limit_file, used_file, droppable in (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        limit, used = _first_line(folder / limit_file), _first_line(folder / used_file)
        # Version 1 has a huge number for no limit.
        if limit.isdigit() and used.isdigit() and int(limit) < 2**60:
            left = int(limit) - int(used)
            for line in _lines(folder / "memory.stat"):
                name, num_bytes = line.split()
                if name == droppable:
                    left += int(num_bytes)
            return max(0, left)
    return None


def _first_line(path: Path) -> str:
    return (_lines(path) or [""])[0].strip()


def _lines(path: Path) -> list[str]:
    """Of a file of the kernel; none where it is not there, or not for us."""
    try:
        return path.read_text().splitlines()
    except OSError:
        return []
