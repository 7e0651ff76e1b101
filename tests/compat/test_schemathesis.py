"""What schemathesis makes up from our own OpenAPI document never gets a 5xx."""

import asyncio
import sys
from pathlib import Path

import pytest
import stub_group

from tests.server.test_serve import with_server

pytestmark = pytest.mark.compat
TIMEOUT_S = 600


def test_no_request_of_schemathesis_is_a_bug_of_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stub_group.use_stub(monkeypatch.setattr)

    async def test(url: str) -> None:
        options = ["--checks", "not_a_server_error", "--max-examples", "10", "--phases", "coverage,fuzzing"]
        process = await asyncio.create_subprocess_exec(
            *(
                str(Path(sys.executable).with_name("st")),
                "run",
                f"{url}/openapi.json",
                *options,
                "--seed",
                "1",
            ),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            cwd=tmp_path,
        )
        out, _ = await process.communicate()
        assert process.returncode == 0, out.decode()[-4000:]

    with_server(tmp_path, test, limit_s=TIMEOUT_S)
