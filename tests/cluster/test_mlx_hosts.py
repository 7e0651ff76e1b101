"""Two hosts over MLX's own engine: the answer of one host, and who may not join says why."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from expertd.cluster import site
from expertd.cluster.leader import Leader
from expertd.cluster.member import Member
from expertd.cluster.site import SetupFailed
from expertd.link.messages import LinkPeer
from tests.cluster.computers import answers, computers, in_group

PROMPT = "Once upon a time there was a little fox who"


@pytest.mark.slow
def test_two_hosts_over_mlx_answer_as_one(tmp_path: Path) -> None:
    with computers(tmp_path, "ab") as (a, b):
        # A patient silence: the ring's threads keep two processors busy, and others may be at work here.
        a.serve("demo", "--link", "mlx", "--split", "experts", "--silence", "5")
        a.wait(answers)
        alone = a.ask(PROMPT)
        assert alone.num_tokens == 16
        b.join(a, "--silence", "5")
        a.wait(in_group(1))
        assert a.ask(PROMPT) == alone
        assert a.health()["hosts"]["link"] == "mlx (ring)"
        assert b.health()["hosts"]["link"] == "mlx (ring)"
        b.end()
        a.wait(in_group(0))
        assert a.ask(PROMPT) == alone


def a_leader(link: str, used_mlx: bool = False, formed: tuple[Member, ...] = ()) -> Any:
    group = SimpleNamespace(link=link)
    return SimpleNamespace(
        _cluster=SimpleNamespace(group=group), _used_mlx=used_mlx, _formed=list(formed), _verbs=""
    )


def members(*verbs: str) -> list[Member]:
    return [cast(Member, SimpleNamespace(verbs=v)) for v in verbs]


@pytest.mark.parametrize(
    ("link", "verbs", "kind"),
    [
        ("auto", "", "verbs"),
        ("auto", "no device", "tcp"),
        ("tcp", "", "tcp"),
        ("verbs", "no device", "verbs"),  # never falls back: the host stays out
        ("mlx", "", "tcp"),
    ],
)
def test_link_between_hosts(link: str, verbs: str, kind: str) -> None:
    assert Leader._choose_kind(a_leader(link), members(verbs)) == kind


def test_mlx_refuses_what_it_cannot_do() -> None:
    first, second = members("one", "other")
    Leader._check_mlx(a_leader("mlx"), [first], [1, 1])
    Leader._check_mlx(a_leader("tcp", used_mlx=True), [first], [1, 3])
    with pytest.raises(SetupFailed, match=r"the hosts have 2, 1 ranks.* Use --ranks 1 on every host"):
        Leader._check_mlx(a_leader("mlx"), [first], [2, 1])
    with pytest.raises(SetupFailed, match=r"has had its own\. Start `expertd serve` again") as error:
        Leader._check_mlx(a_leader("mlx", True, (first,)), [first, second], [1, 1, 1])
    assert error.value.host == 2  # the one that runs already is not to blame


def test_a_rank_listens_on_its_end_of_the_way_to_the_host_before() -> None:
    peers = [LinkPeer(h, f"10.0.{h}.2", 0, f"10.0.{h}.1", f"en{h}") for h in (0, 2)]
    assert site._own_end(1, 3, peers) == {"address": "10.0.0.1", "interface": "en0"}
    assert site._own_end(0, 3, [LinkPeer(2, "", 0, "10.0.2.9", "en5")])["interface"] == "en5"
    assert site._own_end(0, 1, []) == {}
