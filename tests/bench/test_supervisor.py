"""The benchmark of a supervisor's own work reads whole answers of every API."""

import json
import subprocess
import sys
from pathlib import Path

from expertd.bench import supervisor


def test_every_api_is_measured(tmp_path: Path) -> None:
    """A few tokens of each; an answer that is cut off or refused would end it with an error."""
    command = [
        sys.executable,
        "-m",
        "expertd.bench.supervisor",
        "--streams",
        "2",
        "--tokens",
        "3",
        "--pace-ms",
        "1",
    ]
    ran = subprocess.run(
        [*command, "--repeats", "1", "--json", tmp_path / "x"], capture_output=True, text=True, timeout=120
    )
    assert ran.returncode == 0, ran.stderr
    report = json.loads((tmp_path / "x").read_text())
    assert list(report["ms_per_token"]) == list(supervisor.APIS)
    assert all(len(found["all"]) == 1 for found in report["ms_per_token"].values())
