"""The wheel: holds all of expertd and nothing else, and works where no checkout is near."""

import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("expertd", "native", "topology", "quant", "bench")
DEMO_FILES = (".json", ".jinja", ".safetensors", ".txt", ".md")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy without anything that was built before: setuptools would take it over."""
    pytest.importorskip("nanobind", reason="the build's own requirements are not installed here")
    tree, out = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("wheel")
    ignored = shutil.ignore_patterns("__pycache__", "*.so", "_*.c", "*.egg-info")
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, tree / folder, ignore=ignored)
    for file in ROOT.iterdir():
        if file.is_file() and not file.name.startswith("."):
            shutil.copy(file, tree)
    compilers = _compilers(tmp_path_factory.mktemp("bin"))
    _pip("wheel", "--no-build-isolation", "--wheel-dir", out, tree, env=compilers)
    (path,) = out.iterdir()
    return path


def _compilers(folder: Path) -> dict[str, str]:
    """Compilers that read all that they should compile, but give what our own installation has: the same setup.py
    compiled it, in two minutes. These tests ask what is in the wheel, and whether it works from there."""
    spec = importlib.util.find_spec("expertd.native._kernels")
    assert spec and spec.origin
    for name in ("cc", "c++"):
        text = COMPILER.format(name=name, ours=shlex.quote(str(Path(spec.origin).parent)))
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    return {"CC": str(folder / "cc"), "CXX": str(folder / "c++")}


COMPILER = """#!/bin/sh
for word; do [ "$before" = -o ] && out=$word; before=$word; done
case $out in
  *.so) cp {ours}/"${{out##*/}}" "$out" ;;
  *) exec {name} "$@" -M ;;
esac
"""


def _pip(command: str, *args: str | Path, env: dict[str, str] | None = None) -> None:
    fixed = [sys.executable, "-m", "pip", command, "--no-deps", "--no-index", "--disable-pip-version-check"]
    done = subprocess.run([*fixed, *args], capture_output=True, text=True, env={**os.environ, **(env or {})})
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def _expected() -> set[str]:
    """Every Python file of the five folders, the type checkers' marker, the demo model, the benchmark's loops,
    the report's page, the server's."""
    files = {p for folder in FOLDERS for p in (ROOT / folder).rglob("*.py") if "__pycache__" not in p.parts}
    files |= {p for p in (ROOT / "expertd/demo").iterdir() if p.suffix in DEMO_FILES}
    files |= {p for p in (ROOT / "bench").iterdir() if p.suffix in (".c", ".h")}
    files |= set((ROOT / "quant").glob("*.jinja"))
    files |= set((ROOT / "expertd/server/page").iterdir())
    names = {p.relative_to(ROOT).as_posix() for p in files}
    return {n if n.startswith("expertd/") else f"expertd/{n}" for n in names} | {"expertd/py.typed"}


def test_wheel_holds_expertd_and_nothing_else(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    inside = {n for n in names if not n.split("/")[0].endswith(".dist-info")}
    compiled = {n for n in inside if n.endswith(".so")}
    assert sorted(n.split(".")[0] for n in compiled) == [
        "expertd/native/_graph",
        "expertd/native/_kernels",
        "expertd/native/_quantize",
        "expertd/native/_transport",
    ]
    assert inside - compiled == _expected()
    if (ROOT / "expertd/demo/model.safetensors").exists():
        assert "expertd/demo/model.safetensors" in inside
    assert any(n.endswith(".dist-info/licenses/LICENSE") for n in names)


PROBE = """
import importlib, os
import expertd
print(os.path.dirname(expertd.__file__))
import expertd.native._kernels
import expertd.native._quantize
import expertd.native._transport
import mlx.core
modules = "native._graph", "quant", "topology", "bench", "demo", "cluster.rank", "cli", "model.exchange"
for name in modules:
    print(os.path.dirname(importlib.import_module(f"expertd.{name}").__file__))
from expertd.link import mailbox
fd = mailbox.create(1, 64)
with mailbox.Mailbox(fd, 0, 1) as box:
    assert box.exchange(b"abc", [3]) == b"abc"
for name in ("quant", "native", "bench", "topology", "tests"):
    try:
        importlib.import_module(name)
    except ModuleNotFoundError:
        continue
    raise SystemExit(f"import {name} works")
"""


def test_wheel_works_far_from_the_checkout(wheel: Path, tmp_path: Path) -> None:
    target, elsewhere = tmp_path / "installed", tmp_path / "elsewhere"
    elsewhere.mkdir()
    _pip("install", "--target", target, wheel)
    done = subprocess.run(
        [sys.executable, "-c", PROBE],
        cwd=elsewhere,
        env={"PYTHONPATH": str(target), "PATH": "/usr/bin:/bin", "HOME": str(elsewhere)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    folders = [Path(line) for line in done.stdout.splitlines()]
    assert len(folders) == 9
    assert all(folder.is_relative_to(target / "expertd") for folder in folders), folders
