"""The rules of the source tree: who may import whom, what is shipped, and how long things may be."""

import ast
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import expertd

ROOT = Path(__file__).parents[1]
SHIPPED = ("expertd", "native", "topology", "quant", "bench")

# Who may import whom, beside itself; a name is a folder, or a package or module of expertd/.
_CHECKPOINT = {"errors", "config", "wire", "sampling", "dialect"}
_LINK = _CHECKPOINT | {"native", "topology"}
_SPLIT = _CHECKPOINT | {"checkpoint", "link"}
_MODEL = _SPLIT | {"split", "native"}
_ENGINE = _SPLIT | {"split", "model"}
_CLUSTER = _ENGINE | {"engine", "topology"}
_SERVER = _CLUSTER | {"cluster"}
_EVERYTHING = _SERVER | {"server", "cli", "native", "demo"}
MAY_IMPORT: dict[str, set[str]] = {
    "native": set(),
    "topology": {"native"},
    "errors": set(),
    "config": {"errors"},
    "wire": {"errors"},
    "sampling": set(),
    "dialect": set(),
    "checkpoint": _CHECKPOINT,
    "link": _LINK,
    "split": _SPLIT,
    "model": _MODEL,
    "engine": _ENGINE,
    "cluster": _CLUSTER,
    "server": _SERVER,
    "cli": _SERVER | {"server"},
    "demo": set(),
    "__main__": {"cli"},
    "": set(),  # expertd/__init__.py itself
    "quant": _EVERYTHING,
    "bench": _EVERYTHING | {"quant"},
}
# mlx-lm's internals drift, so few files know them; MLX is slow to import and belongs to the ranks.
MAY_IMPORT_MLX_LM = {
    f"expertd/model/{name}.py"
    for name in (
        "adapter",
        "cache_files",
        "caches",
        "classes",
        "dialect",
        "draft",
        "kv_bits",
        "model",
        "swap",
    )
}
WITHOUT_MLX = ("errors", "config", "wire", "sampling", "dialect", "checkpoint", "link", "server", "cli")
WITHOUT_MLX_FILES = {
    f"expertd/cluster/{path.name}"
    for path in (ROOT / "expertd/cluster").glob("*.py")
    if path.name not in ("rank.py", "doctor_jobs.py")
}

MAX_FILE_LINES = 600
MAX_FUNCTION_LINES = 60


def package_of(file: str) -> str:
    """The key of MAY_IMPORT that a file, relative to the root, belongs to."""
    parts = Path(file).with_suffix("").parts
    if parts[0] != "expertd":
        return parts[0]
    return "" if parts[1] == "__init__" else parts[1]


def imports_of(source: str) -> Iterator[tuple[int, str]]:
    """Line and full name of everything imported anywhere in a file, inside functions too."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((node.lineno, f"{'.' * node.level}{node.module or ''}.{a.name}") for a in node.names)


def faults_of(file: str, source: str) -> list[str]:
    """Every import of a file that the rules forbid, as `file:line: reason`."""
    own, faults = package_of(file), []
    for line, name in imports_of(source):
        top, _, rest = name.partition(".")
        if top == "":
            faults.append(f"{file}:{line}: relative import")
        elif top in SHIPPED and top != "expertd":
            faults.append(f"{file}:{line}: imports {top}, which is installed as expertd.{top}")
        elif top == "expertd":
            package = rest.split(".")[0]
            allowed = (
                package in {"", own} | MAY_IMPORT[own]
            )  # "": the bare package, which has the version only
            if package in MAY_IMPORT and not allowed:
                faults.append(f"{file}:{line}: {own or 'expertd'} may not import {package}")
        elif top == "mlx_lm" and file not in MAY_IMPORT_MLX_LM:
            faults.append(f"{file}:{line}: only {', '.join(sorted(MAY_IMPORT_MLX_LM))} may import mlx_lm")
        elif top == "mlx" and (own in WITHOUT_MLX or file in WITHOUT_MLX_FILES):
            faults.append(f"{file}:{line}: {own} may not import mlx")
    return faults


def files(*suffixes: str) -> list[Path]:
    """Our own sources: what is shipped and its tests, without what a build leaves there."""
    found = [p for folder in (*SHIPPED, "tests") for p in (ROOT / folder).rglob("*") if p.suffix in suffixes]
    return [
        p
        for p in found
        if "__pycache__" not in p.parts and p.name not in ("_transport.c", "_quantize.c", "_kernels.c")
    ]


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def test_imports_go_one_way() -> None:
    shipped = [p for p in files(".py") if relative(p).split("/")[0] in SHIPPED]
    assert len(shipped) > 30
    assert [fault for p in shipped for fault in faults_of(relative(p), p.read_text())] == []


def test_every_package_has_its_rule() -> None:
    inside = {
        p.stem for p in (ROOT / "expertd").iterdir() if p.suffix == ".py" or (p / "__init__.py").exists()
    }
    assert inside - {"__init__"} <= set(MAY_IMPORT)


@pytest.mark.parametrize(
    "file, source, reason",
    [
        ("native/build.py", "import expertd.errors", "native may not import errors"),
        ("native/build.py", "from expertd import topology", "native may not import topology"),
        ("topology/x.py", "from expertd.config import GroupConfig", "topology may not import config"),
        ("expertd/errors.py", "import expertd.config", "errors may not import config"),
        ("expertd/link/mailbox.py", "from expertd.model.model import Model", "link may not import model"),
        ("expertd/split/cut.py", "def f():\n    from expertd import engine", "split may not import engine"),
        ("expertd/engine/engine.py", "from expertd.native import _transport", "engine may not import native"),
        ("expertd/cluster/rank.py", "import expertd.server.app", "cluster may not import server"),
        ("expertd/cli/main.py", "from expertd.quant.convert import x", "cli may not import quant"),
        ("expertd/server/app.py", "from expertd.bench import y", "server may not import bench"),
        ("expertd/__init__.py", "import expertd.errors", "expertd may not import errors"),
        ("quant/convert.py", "from expertd.bench import speed", "quant may not import bench"),
        ("expertd/cli/main.py", "import quant", "installed as expertd.quant"),
        ("quant/convert.py", "from .writer import x", "relative import"),
        ("quant/convert.py", "from . import writer", "relative import"),
        ("expertd/engine/engine.py", "import mlx_lm.models", "may import mlx_lm"),
        ("quant/convert.py", "from mlx_lm.utils import load", "may import mlx_lm"),
        ("expertd/model/sampler.py", "import mlx_lm", "may import mlx_lm"),
        ("expertd/checkpoint/shards.py", "import mlx.core as mx", "checkpoint may not import mlx"),
        ("expertd/cluster/supervisor.py", "if 1:\n    import mlx.nn", "cluster may not import mlx"),
        ("expertd/errors.py", "from mlx.core import array", "errors may not import mlx"),
    ],
)
def test_checker_finds_seeded_faults(file: str, source: str, reason: str) -> None:
    (fault,) = faults_of(file, f'"""A file."""\n{source}\n')
    assert re.match(rf"{file}:\d+: ", fault)
    assert reason in fault


@pytest.mark.parametrize(
    "file, source",
    [
        ("expertd/link/mailbox.py", "from expertd.native._transport import ffi, lib\nimport expertd.link"),
        ("expertd/model/exchange.py", "import mlx.core as mx\nfrom expertd.native import _graph"),
        ("expertd/model/adapter.py", "from mlx_lm.utils import load_model"),
        (
            "expertd/cluster/rank.py",
            "import expertd\nfrom expertd import engine, __version__\nimport expertd.engine.engine",
        ),
        ("expertd/cli/main.py", "import importlib\nimportlib.import_module('expertd.quant.cli')"),
        ("quant/convert.py", "import mlx.core\nfrom expertd.quant.writer import x, y"),
        ("bench/speed.py", "from expertd.quant import convert\nimport expertd.cluster.supervisor"),
        ("topology/probe.py", "from expertd.native import _transport\nimport json"),
    ],
)
def test_checker_passes_what_is_allowed(file: str, source: str) -> None:
    assert faults_of(file, source) == []


# What is shipped.


def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_every_package_is_shipped() -> None:
    found = {p.parent.relative_to(ROOT) for folder in SHIPPED for p in (ROOT / folder).rglob("__init__.py")}
    names = {".".join(p.parts if p.parts[0] == "expertd" else ("expertd", *p.parts)) for p in found}
    packages = project()["tool"]["setuptools"]["packages"]
    assert sorted(packages) == sorted(names)


def test_changelog_has_this_version() -> None:
    """The newest heading that is not `Unreleased`."""
    changelog = (ROOT / "CHANGELOG.md").read_text()
    versions = re.findall(r"^## \[?(\d[^\s\]]*)", changelog, flags=re.MULTILINE)
    assert versions[:1] == [expertd.__version__]


# Budgets.


def test_no_file_is_too_long() -> None:
    lengths = {relative(p): len(p.read_text().splitlines()) for p in files(".py", ".c", ".cpp", ".h")}
    assert {file: n for file, n in lengths.items() if n > MAX_FILE_LINES} == {}


def functions_of(source: str) -> Iterator[tuple[str, int]]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node.name, (node.end_lineno or node.lineno) - node.lineno + 1


def test_no_function_is_too_long() -> None:
    lengths = [(relative(p), *f) for p in files(".py") for f in functions_of(p.read_text())]
    assert len(lengths) > 200
    assert [f for f in lengths if f[2] > MAX_FUNCTION_LINES] == []


def test_length_is_measured() -> None:
    assert list(functions_of("class A:\n    async def f(self):\n        x = 1\n\n        return x\n")) == [
        ("f", 4)
    ]
