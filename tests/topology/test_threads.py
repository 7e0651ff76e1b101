"""How many threads compute: what affinity, hyperthreads and quotas leave."""

import os
from pathlib import Path

import psutil
import pytest

from expertd.topology import machine
from expertd.topology.machine import huge_pages
from expertd.topology.threads import share_of_threads


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine of four cores with two hyperthreads each, all of which are ours."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    for processor in range(8):
        write(
            tmp_path / f"sys/devices/system/cpu/cpu{processor}/topology/core_cpus_list",
            f"{processor // 2 * 2}-",
        )
    write(tmp_path / "proc/self/cgroup", "0::/a/b")
    return tmp_path


def write(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f"{text}\n")


def test_one_thread_per_core(root: Path) -> None:
    assert [share_of_threads(n, root) for n in (1, 2, 3, 4, 9)] == [4, 2, 1, 1, 1]


def test_affinity_counts(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2}, raising=False)
    assert share_of_threads(1, root) == 2


@pytest.mark.parametrize(
    ("file", "text", "threads"),
    [
        ("a/b/cpu.max", "250000 100000", 2),
        ("a/cpu.max", "100000 100000", 1),
        ("cpu.max", "50000 100000", 1),
        ("a/b/cpu.max", "max 100000", 4),
        ("a/b/cpu.max", "nonsense", 4),
        ("elsewhere/cpu.max", "100000 100000", 4),
    ],
)
def test_quota_of_any_group_above_counts(root: Path, file: str, text: str, threads: int) -> None:
    write(root / "sys/fs/cgroup" / file, text)
    assert share_of_threads(1, root) == threads


@pytest.mark.parametrize(("quota", "threads"), [("300000", 3), ("-1", 4)])
def test_quota_of_version_1_counts(root: Path, quota: str, threads: int) -> None:
    write(root / "proc/self/cgroup", "5:memory:/x\n4:cpu,cpuacct:/a")
    write(root / "sys/fs/cgroup/cpu/a/cpu.cfs_quota_us", quota)
    write(root / "sys/fs/cgroup/cpu/a/cpu.cfs_period_us", "100000")
    assert share_of_threads(1, root) == threads


def test_without_any_of_these_files_all_processors_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {2, 5}, raising=False)
    assert share_of_threads(1, tmp_path) == 2
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(psutil, "cpu_count", lambda logical=True: 12 if logical else 6)
    assert machine.usable_cores() == [] and share_of_threads(1, tmp_path) == 6


def test_here_it_is_at_least_one() -> None:
    assert share_of_threads(1) >= share_of_threads(10**6) == 1


def test_huge_pages_leave_what_the_user_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.platform", "linux")
    assert huge_pages({}) == {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
    assert huge_pages({"GLIBC_TUNABLES": "glibc.malloc.check=3"}) == {}
    monkeypatch.setattr("sys.platform", "darwin")
    assert huge_pages({}) == {}
