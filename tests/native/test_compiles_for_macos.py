"""Every C file compiles for a Mac, from any machine: the headers there differ, and nobody here may have one."""

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.native.compiling import NATIVE, STRICT

SOURCES = sorted(
    p for folder in (NATIVE, NATIVE / "kernels") for p in folder.glob("*.c") if not p.name.startswith("_")
)


@pytest.fixture(scope="module")
def zig() -> list[str]:
    if importlib.util.find_spec("ziglang"):
        return [sys.executable, "-m", "ziglang"]
    if found := shutil.which("zig"):
        return [found]
    pytest.skip("no cross compiler: `pip install ziglang` (100 MB), or make cross")


@pytest.mark.parametrize("target", ["aarch64-macos", "aarch64-linux-gnu"])
@pytest.mark.parametrize("source", SOURCES, ids=lambda p: p.name)
def test_compiles(zig: list[str], source: Path, target: str, tmp_path: Path) -> None:
    command = [*zig, "cc", "-target", target, *STRICT, "-O2", "-c", str(source), "-o", str(tmp_path / "x.o")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
