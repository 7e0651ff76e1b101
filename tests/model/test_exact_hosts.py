"""Promise 1 across hosts: the bits are those of one rank, through link processes, over TCP and over verbs."""

from pathlib import Path
from typing import Any

import pytest

from tests.link.hosts import ADDRESS, run_hosts
from tests.link.provider_fixture import Fabric
from tests.ranks import run_ranks
from tests.tiny import make_tiny

JOBS = Path(__file__).with_name("exact_jobs.py")
Digests = dict[str, dict[str, str]]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    from expertd.quant.convert import quantize_checkpoint
    from expertd.quant.settings import Settings

    root = tmp_path_factory.mktemp("tiny")
    full = make_tiny(root / "f32", "qwen3_moe")
    half = make_tiny(root / "bf16", "glm4_moe", dtype="bfloat16")
    quantize_checkpoint(half, root / "2bit", Settings(effort="plain", group_size=32, trunk=(4,)))
    return [str(full), str(root / "2bit")]


@pytest.fixture(scope="module")
def solo(checkpoints: list[str]) -> Digests:
    found: Digests = run_ranks(JOBS, "run", 1, {"checkpoints": checkpoints})[0]
    return found


@pytest.mark.parametrize(
    ("num_ranks", "kind"),
    [([1, 1], "verbs"), ([1, 1, 1], "tcp"), ([1, 1, 1], "verbs"), ([2, 1], "tcp")],
)
def test_hosts_give_the_bits_of_one_rank(
    checkpoints: list[str], solo: Digests, num_ranks: list[int], kind: str, fabric: Fabric
) -> None:
    settings: dict[str, Any] = {"kind": kind}
    if kind == "verbs":
        # All hosts share one address here, so one device: room for four queue pairs of each.
        environments = [fabric.environment(ADDRESS, "qps_taken:-2") for _ in num_ranks]
        settings |= {"verbs_library": str(fabric.library), "lint": True, "environments": environments}
    ranks = run_hosts(JOBS, "run", num_ranks, {"checkpoints": checkpoints}, **settings)
    assert len(ranks) == sum(num_ranks) and all(rank == ranks[0] for rank in ranks)
    for folder, digests in ranks[0].items():
        assert {d.split(" ")[0] for d in digests} == {"solo", "experts", "tokens"}
        for case, digest in digests.items():
            chunks = "one chunk" if case.endswith("one chunk") else "several"
            assert digest == solo[folder][f"solo (1.0,) {chunks}"], f"{Path(folder).name}: {case}"
    assert fabric.breaches() == []
