"""How much memory is left: the system's, or what the tightest control group leaves."""

from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from expertd.topology.memory import available_memory


@pytest.fixture(autouse=True)
def system(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1000, total=2000))


def write(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(f"{text}\n")


def test_without_groups_the_system_decides(tmp_path: Path) -> None:
    assert available_memory(tmp_path) == (1000, "what the system has free")


@pytest.mark.parametrize(
    ("limit", "used", "left"),
    [
        ("700", "300", 420),
        ("max", "300", 1000),
        ("2000", "300", 1000),
        ("100", "300", 0),
        ("junk", "x", 1000),
    ],
)
def test_version_2(tmp_path: Path, limit: str, used: str, left: int) -> None:
    write(tmp_path / "proc/self", cgroup="0::/a/b")
    write(tmp_path / "sys/fs/cgroup/a/b", memory__max="max", memory__current="10", memory__stat="")
    write(
        tmp_path / "sys/fs/cgroup/a", memory__max=limit, memory__current=used, memory__stat="inactive_file 20"
    )
    found, why = available_memory(tmp_path)
    assert found == left
    assert ("cgroup/a/memory.max" in why) == (left < 1000)


def test_version_1(tmp_path: Path) -> None:
    write(tmp_path / "proc/self", cgroup="9:cpu:/x\n5:memory:/c\nbroken")
    write(
        tmp_path / "sys/fs/cgroup/memory/c",
        memory__limit_in_bytes="500",
        memory__usage_in_bytes="450",
        memory__stat="cache 9\ntotal_inactive_file 40\n",
    )
    assert available_memory(tmp_path)[0] == 90
