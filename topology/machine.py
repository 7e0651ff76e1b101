"""What this machine is, in the few facts that a measurement cannot be read without."""

import contextlib
import os
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

SYSCTL_TIMEOUT_S = 5.0


def describe_machine() -> dict[str, Any]:
    """Give the CPU's name, usable cores, memory_gib, os, and the versions of Python, mlx and expertd.

    Imports no MLX, starts nothing that lasts, and never fails: what cannot be found is "unknown".
    """
    return {
        "cpu": _cpu_name(),
        "cores": len(usable_cores()) or psutil.cpu_count() or 1,
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "os": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "mlx": _version("mlx"),
        "expertd": _version("expertd"),
    }


def summarize(machine: dict[str, Any]) -> str:
    """Give `describe_machine()` as one line for people."""
    return (
        f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gib']} GiB, {machine['os']}, "
        f"Python {machine['python']}, mlx {machine['mlx']}, expertd {machine['expertd']}"
    )


def usable_cores() -> list[int]:
    """The processors that this process may be pinned to, or none where the system cannot pin (macOS)."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []


def own_cores(num_ranks: int) -> list[int]:
    """One processor per rank, or none when there are fewer or the system cannot pin."""
    cores = usable_cores()
    return cores[:num_ranks] if len(cores) >= num_ranks else []


def settle(cpus: Sequence[int]) -> None:
    """Make this process one that computes: kept to `cpus` (none: anywhere), and batch-scheduled on Linux.

    To be called before MLX starts its threads, which inherit both. Under SCHED_BATCH a thread that is woken does
    not push another off its core, so MLX's main thread goes on encoding while its stream thread has work
    already: 6.6 against 8.2 us per exchange in the graph at 4 KiB, one core per rank (bench/LOG.md).
    """
    if cpus and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, cpus)
    if hasattr(os, "SCHED_BATCH"):
        with contextlib.suppress(PermissionError):  # a container may forbid it; it is only a hint
            os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))


def _cpu_name() -> str:
    name = _sysctl("machdep.cpu.brand_string") if platform.system() == "Darwin" else _proc_cpuinfo()
    return name or platform.processor() or platform.machine() or "unknown"


def _sysctl(key: str) -> str:
    try:
        command = ["/usr/sbin/sysctl", "-n", key]
        done = subprocess.run(command, capture_output=True, text=True, timeout=SYSCTL_TIMEOUT_S)
        return done.stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def _proc_cpuinfo() -> str:
    """The name on x86; Linux on ARM gives none there."""
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "unknown"


def huge_pages(environment: Mapping[str, str]) -> dict[str, str]:
    """What to add to a child's environment so that its large arrays lie in huge pages, as far as the system grants it.

    glibc then advises the kernel of each; elsewhere it means nothing. Weights in pages of 4 KiB are read at 9 GB/s
    where those in huge pages are read at 14 (bench/LOG.md): each page's address has to be looked up.
    """
    name = "GLIBC_TUNABLES"
    return {} if sys.platform != "linux" or name in environment else {name: "glibc.malloc.hugetlb=1"}
