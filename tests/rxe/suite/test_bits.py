"""The same bits on two hosts as on one, over real verbs. Compared inside the guest, whose processor lacks AVX-512."""

from pathlib import Path

from tests import netns, ranks
from tests.model import exact_jobs
from tests.rxe.suite.test_link import linked
from tests.tiny import make_tiny


def test_logits_are_those_of_one_host(net: netns.Net, tmp_path: Path) -> None:
    folder = str(make_tiny(tmp_path / "tiny", "qwen3_moe"))
    with linked(net, slot_bytes=1 << 20) as hosts:
        args = {"checkpoints": [folder]}
        jobs = Path(exact_jobs.__file__)
        processes = [host.start_rank(jobs, "run", rank, args) for host in hosts for rank in host.ranks]
        results = ranks.results_of(processes, 600)
    digests = results[0][folder]
    assert results[1][folder] == digests
    assert {case.split(" ")[0] for case in digests} == {"solo", "experts", "tokens"}
    for case, digest in digests.items():
        chunks = "one chunk" if case.endswith("one chunk") else "several"
        assert digest == digests[f"solo (1.0,) {chunks}"], case
