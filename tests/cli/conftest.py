import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

# The stubs are imported by name here, and by the ranks that are started with our sys.path.
STUBS = Path(__file__).parents[1] / "cluster"
sys.path.insert(0, str(STUBS))

import stub_group  # noqa: E402

# A whole `expertd` in a process of its own, with stub ranks and without the checks of a checkpoint.
PROGRAM = """
import sys
sys.path[:0] = [sys.argv.pop(1)]
from pathlib import Path
from types import SimpleNamespace
import stub_group
from expertd.checkpoint import inspect, locate
stub_group.use_stub()
if Path(sys.argv[2]).is_dir():
    locate.find_checkpoint = lambda name, *rest: Path(name)
    inspect.check_checkpoint = lambda folder: SimpleNamespace(
        folder=folder, config={}, context_length=10, total_bytes=0
    )
from expertd.cli import main
main()
"""

Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start() -> Iterator[Start]:
    """Start `expertd ARGS` with stub ranks; whatever still runs at the end of the test fails it."""
    processes: list[subprocess.Popen[str]] = []

    def go(*args: object, **options: Any) -> "subprocess.Popen[str]":
        command = [sys.executable, "-W", "error", "-c", PROGRAM, str(STUBS), *map(str, args)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, **options}
        process = subprocess.Popen(command, **pipes)
        processes.append(process)
        return process

    yield go
    for process in processes:
        with process:
            process.kill()
    assert stub_group.children() == [], "a test left processes behind"


@pytest.fixture
def expertd(start: Start) -> Callable[..., SimpleNamespace]:
    """Run `expertd ARGS` to its end: .code, .out, .err."""

    def go(*args: object, **options: Any) -> SimpleNamespace:
        process = start(*args, **options)
        out, err = process.communicate(timeout=stub_group.LIMIT_S)
        return SimpleNamespace(code=process.returncode, out=out, err=err)

    return go
