"""How many threads may compute here: what affinity, hyperthreads and quotas leave of the processors."""

from collections.abc import Iterator
from pathlib import Path

import psutil

from expertd.topology.machine import usable_cores


def share_of_threads(num_sharers: int, root: Path = Path("/")) -> int:
    """How many threads each of `num_sharers` processes like this one should compute with, at least 1.

    One per core, not per hyperthread: two that share a core's arithmetic and its way to memory gain nothing.
    """
    cores = min([_num_cores(root), *_quotas(root)])
    return max(1, int(cores) // num_sharers)


def _num_cores(root: Path) -> int:
    processors = usable_cores()
    if not processors:
        return psutil.cpu_count(logical=False) or 1
    return len({_core(root, processor) for processor in processors})


def _core(root: Path, processor: int) -> str:
    """What a processor has in common with the others of its core."""
    folder = root / f"sys/devices/system/cpu/cpu{processor}/topology"
    for name in ("core_cpus_list", "thread_siblings_list"):  # the newer name and the older
        try:
            return (folder / name).read_text().strip()
        except OSError:
            continue
    return str(processor)


def _quotas(root: Path) -> Iterator[float]:
    """The processors that this process's control groups allow it, from its own up to the root's."""
    for folder in control_groups(root, "cpu"):
        yield from _quota(folder)


def control_groups(root: Path, controller: str) -> Iterator[Path]:
    """The folders of the groups of this process that have a controller ("cpu", "memory"), its own first."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2) if line.count(":") > 1 else ("", "?", "")
        if controllers == "" or controller in controllers.split(","):
            yield from _upwards(root / "sys/fs/cgroup" / (controller if controllers else ""), path)


def _upwards(base: Path, path: str) -> Iterator[Path]:
    """The folder of a control group and of those above it."""
    parts = [part for part in path.split("/") if part not in ("", "..")]
    yield from (base.joinpath(*parts[:n]) for n in range(len(parts), -1, -1))


def _quota(folder: Path) -> Iterator[float]:
    """cpu.max is "max 100000" or "150000 100000"; the older two files say -1 for no quota."""
    try:
        quota, period = (folder / "cpu.max").read_text().split()
    except (OSError, ValueError):
        try:
            quota = (folder / "cpu.cfs_quota_us").read_text().strip()
            period = (folder / "cpu.cfs_period_us").read_text().strip()
        except OSError:
            return
    if quota.isdigit() and period.isdigit() and int(period):
        yield int(quota) / int(period)
