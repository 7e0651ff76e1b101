"""Fixtures of the link's tests."""

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
