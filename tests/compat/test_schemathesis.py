"""What schemathesis makes up from our own OpenAPI document never gets a 5xx."""

import asyncio
from pathlib import Path

import pytest
import stub_group

from tests.compat.test_clients import CLIENTS
from tests.server.test_serve import with_server

pytestmark = pytest.mark.compat
TIMEOUT_S = 3600


@pytest.mark.parametrize("num_examples", [2, pytest.param(100, marks=pytest.mark.soak)])
def test_no_request_of_schemathesis_is_a_bug_of_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_examples: int
) -> None:
    """The bounds of each parameter of the document, and so many requests by chance for each endpoint."""
    stub_group.use_stub(monkeypatch.setattr)

    async def test(url: str) -> None:
        options = ["--checks", "not_a_server_error", "--phases", "coverage,fuzzing", "--seed", "1"]
        options += ["--workers", "8"]  # an answer is waited for longer than it is worked on
        process = await asyncio.create_subprocess_exec(
            CLIENTS / "st",
            "run",
            f"{url}/openapi.json",
            *options,
            "--max-examples",
            str(num_examples),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            cwd=tmp_path,
        )
        out, _ = await process.communicate()
        assert process.returncode == 0, out.decode()[-4000:]

    with_server(tmp_path, test, limit_s=TIMEOUT_S)
