"""Fixtures of several folders."""

import re
from pathlib import Path

import pytest

from tests.link.provider_fixture import Fabric, build_provider


@pytest.fixture(scope="session")
def provider(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The verbs library with Apple's temper, as a path for `library`."""
    return build_provider(tmp_path_factory.mktemp("provider"))


@pytest.fixture
def fabric(provider: Path, tmp_path: Path) -> Fabric:
    """A cable of its own for each test."""
    return Fabric(tmp_path, provider)


# What kills nothing, and neither a clock nor a neighbour can change: `make test` runs two of these at a time. What they
# wait for comes within seconds and may take 30; each has folders, ports and processes of its own. Not those in
# which two processes answer each other 20,000 times (bench/test_link.py, link/test_transport.py): each time they would
# wait for the neighbour.
CALM = re.compile(
    r"(api|checkpoint|engine|model|native|quant|split|topology)/"
    r"|bench/test_(kernels|rival_speed|shapes|throughput)\.py"
    r"|cli/test_(commands|help|hosts|quality|service|talk|topology)\.py"
    r"|cluster/test_(assemble|copies|identity|memory|mlx_hosts|paths|prefix_files|provide|record|requests|tls)\.py"
    r"|link/test_(crc32c|swap|verbs)\.py"
    r"|server/test_(anthropic|app|chat|door|metrics|page|parts|responses|sampling|serve)\.py"
    r"|test_(end_to_end|golden|layers|mistakes|packaging|readme|running|wire)\.py"
)

# With the longest tests: they begin, so that at the end no process waits for another one's.
LONG = re.compile(
    r"engine/test_wild|model/test_exact|native/test_(arm64|sanitized)|server/test_page|test_(readme|running)"
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if CALM.match(path_of(item)) and not item.get_closest_marker("fault"):
            item.add_marker("calm")
    items.sort(key=lambda item: not LONG.match(path_of(item)))


def path_of(item: pytest.Item) -> str:
    return item.path.relative_to(Path(__file__).parent).as_posix()
