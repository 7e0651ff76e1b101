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


# What neither a clock nor a neighbour can change: `make test` runs two processes of these beside each other.
CALM = re.compile(
    r"(checkpoint|engine|native|quant|split|topology)/|model/test_(adapter|sampler|wide)\.py"
    r"|test_(golden|layers|packaging|wire)\.py"
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        path = item.path.relative_to(Path(__file__).parent).as_posix()
        if CALM.match(path) and not item.get_closest_marker("fault"):
            item.add_marker("calm")
