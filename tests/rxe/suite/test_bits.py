"""The same bits on two hosts as on one, over real verbs. Compared inside the guest, whose processor lacks AVX-512."""

from pathlib import Path

import pytest

from tests import netns, ranks
from tests.rxe.suite.test_link import linked


@pytest.mark.slow  # minutes: two ranks and two link processes share one emulated processor
def test_logits_are_those_of_one_host(net: netns.Net, tmp_path: Path) -> None:
    # Here, because importing MLX takes the guest long, which the other tests need not wait for.
    from tests.model import exact_jobs
    from tests.tiny import make_tiny

    folder = str(make_tiny(tmp_path / "tiny", "qwen3_moe"))
    with linked(net) as hosts:
        jobs = Path(exact_jobs.__file__)
        args = {"checkpoint": folder}
        processes = [
            host.start_rank(jobs, "run_briefly", rank, args) for host in hosts for rank in host.ranks
        ]
        digests, others = ranks.results_of(processes, 600)
    assert digests == others
    assert digests.keys() == {"solo", "experts", "tokens"}
    assert len(set(digests.values())) == 1, digests
