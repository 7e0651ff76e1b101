"""How much memory is free for us: what the system has, and what control groups leave of it."""

from collections.abc import Iterator
from pathlib import Path

import psutil

from expertd.topology.threads import control_groups


def available_memory(root: Path = Path("/")) -> tuple[int, str]:
    """Bytes that new processes of ours may fill, and what decides that, for people."""
    free = psutil.virtual_memory().available
    found = [(free, "what the system has free"), *_left_by_groups(root)]
    return min(found)


def _left_by_groups(root: Path) -> Iterator[tuple[int, str]]:
    """What each control group of this process leaves, from its own up to the root's."""
    for folder in control_groups(root, "memory"):
        yield from _left(folder)


def _left(folder: Path) -> Iterator[tuple[int, str]]:
    """The limit less what is used; pages of files that are merely cached count as free. Version 2, then 1."""
    names = (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes"))
    for limit_name, used_name in names:
        try:
            limit, used = (folder / limit_name).read_text().strip(), (folder / used_name).read_text().strip()
            cached = _cached(folder / "memory.stat")
        except OSError:
            continue
        if limit.isdigit() and used.isdigit():
            yield max(0, int(limit) - int(used) + cached), f"what the limit {folder / limit_name} leaves"


def _cached(stat: Path) -> int:
    """Inactive pages of files, which the kernel gives up first."""
    values = dict(line.split() for line in stat.read_text().splitlines() if line.count(" ") == 1)
    found = values.get("total_inactive_file") or values.get("inactive_file") or "0"
    return int(found) if found.isdigit() else 0
