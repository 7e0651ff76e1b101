"""CI's share of soak.py; `make soak` has an hour of it."""

from pathlib import Path

import pytest

from tests.cluster.soak import MODEL, soak
from tests.tiny import make_tiny

pytestmark = pytest.mark.fault


def test_every_request_is_accounted_for(tmp_path: Path) -> None:
    report, wrong = soak(make_tiny(tmp_path / MODEL, "qwen3_moe"), seconds=16, seed=1, kill_every_s=5)
    print(report)
    assert wrong == []
    assert " 0 ranks killed" not in report and "finished" in report and "refused" in report
