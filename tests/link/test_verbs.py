"""The verbs back end over the provider: what two processes deliver to each other, and what they set up."""

import shutil
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from expertd.errors import ClusterError
from expertd.link import verbs
from tests.link.provider_fixture import HERE, NATIVE, Fabric
from tests.link.verbs_pair import IPS, run_one, run_pair


def endpoint(hexes: str) -> tuple[Any, ...]:
    """Version, QP numbers, PSNs, lid, MTU, frames, depths, GID."""
    return struct.unpack("<11I16s", bytes.fromhex(hexes))


# End to end.


def test_self_test_and_random_frames_both_ways(fabric: Fabric) -> None:
    """200 messages of each class there and back, then 5,000 frames of any size on both queues: "
    "every byte is right."""
    mine, theirs = run_pair(fabric, num_tests=200, num_frames=5000)
    trips, statistics = mine["result"]["trips"], mine["result"]["statistics"]
    assert [len(t) for t in trips] == [200, 200] and all(us > 0 for t in trips for us in t)
    assert mine["result"]["bytes"] > 100e6 and theirs["result"]["bytes"] > 100e6
    assert statistics["received_frames"] >= 5000 + 400 and statistics["duplicates"] == 0
    assert fabric.breaches() == []  # of the rules on every call, of the order of closing, nothing left open


def test_small_bulk_messages(fabric: Fabric) -> None:
    """What a link falls back to when messages of 32 frames do not pass the self-test."""
    both = run_pair(fabric, config={"bulk_frames": 4}, num_tests=20)
    assert [len(t) for t in both[0]["result"]["trips"]] == [20, 20]
    assert fabric.breaches() == []


@pytest.mark.parametrize("deep, shallow", [(0, 1), (1, 0)])
def test_unlike_depths_take_the_lower(fabric: Fabric, deep: int, shallow: int) -> None:
    small = {"config": {"latency_depth": 2, "bulk_depth": 2}}
    both = run_pair(fabric, per_host=(small, {}) if shallow == 0 else ({}, small), num_frames=300)
    assert all("result" in r for r in both), both
    assert fabric.breaches() == []


def test_connections_can_follow_each_other(fabric: Fabric) -> None:
    """Twelve in one process: nothing is used up, of the 10 queue pairs and 100 memory regions of a device."""
    assert [r["result"] for r in run_pair(fabric, "reopen", times=12)] == [list(range(12))] * 2
    assert fabric.breaches() == []


# Setting up.


def test_endpoint(fabric: Fabric) -> None:
    values = endpoint(run_one(fabric, "open_only")["result"][0])
    assert (values[0], values[6]) == (1, 4096)
    assert values[7:11] == (4, 32, 16, 8)
    assert values[11] == bytes(10) + b"\xff\xff\x0a\x00\x00\x01"
    assert fabric.breaches() == []


def test_every_opening_has_new_queue_pairs_and_psns(fabric: Fabric) -> None:
    opened = [endpoint(e) for e in run_one(fabric, "open_only", times=20)["result"]]
    psns = {psn for e in opened for psn in e[3:5]}
    assert len(psns) > 35 and max(psns) < 1 << 24
    assert len({e[1] for e in opened}) == 20


def test_small_grant_makes_the_queues_shallower(fabric: Fabric) -> None:
    """200 frames, less one message of 32, are five messages of 32 in flight, two of them reserved."""
    result = run_one(fabric, "open_only", temper="grant:200")["result"]
    assert endpoint(result[0])[9:11] == (16, 3)
    both = run_pair(fabric, tempers=("grant:200", ""), num_frames=200)
    assert all("result" in r for r in both), both


@pytest.mark.parametrize("temper", ["mr_three_refused", "mr_local_refused", "init_flags_refused"])
def test_access_flags_that_only_some_providers_take(fabric: Fabric, temper: str) -> None:
    both = run_pair(fabric, tempers=(temper, ""), num_frames=20)
    assert all("result" in r for r in both), both


def test_gid_is_found_again_at_every_opening(fabric: Fabric) -> None:
    both = run_pair(fabric, "reopen", tempers=("gid_moves", "gid:3"), times=3)
    assert [r["result"] for r in both] == [[0, 1, 2]] * 2


def test_address_chooses_the_cable(fabric: Fabric) -> None:
    ips = (f"10.0.9.1,{IPS[0]}", f"{IPS[1]},10.0.9.2")
    both = run_pair(fabric, ips=ips, num_frames=20)
    assert all("result" in r for r in both), both


def test_devices(fabric: Fabric) -> None:
    first, second = run_one(fabric, "list_devices", ip="10.0.0.1,10.0.9.1", temper="gid:3")["result"]
    assert first == {
        "name": "rdma_en2",
        "port_state": verbs.PORT_ACTIVE,
        "active_mtu_bytes": 4096,
        "link_layer": 0,
        "num_gids": 5,
        "ipv4": {"3": "10.0.0.1"},
        "error": "",
    }
    assert (second["name"], second["ipv4"]) == ("rdma_en3", {"3": "10.0.9.1"})
    assert fabric.breaches() == []


def test_library_that_is_not_there() -> None:
    with pytest.raises(ClusterError, match=r"^verbs: cannot load /nowhere/lib\.so \(.*\): .*or use TCP$"):
        verbs.devices("/nowhere/lib.so")


def test_library_that_knows_no_verbs() -> None:
    """Any shared library; Python's own extension is one."""
    import _json

    if not getattr(_json, "__file__", None):
        pytest.skip("_json is built in")
    with pytest.raises(ClusterError, match="has no function ibv_get_device_list: "):
        verbs.devices(str(_json.__file__))


def test_settings_out_of_range() -> None:
    with pytest.raises(
        ClusterError, match=r"^verbs: 4 and 129 frames, depths 16 and 8; wanted 1 to 128 frames"
    ):
        verbs.Verbs(verbs.Config("10.0.0.1", bulk_frames=129))


# Apple's rules, as `lint` asserts them.


def test_every_rule_is_asserted(tmp_path: Path) -> None:
    """Each broken once, in the order of lint.c; "ok" is a call that keeps them all."""
    if not shutil.which("cc"):
        pytest.skip("no C compiler")
    sources = [HERE / "provider_check" / "lint.c", NATIVE / "verbs_lint.c"]
    own = ["-DXD_VERBS_OWN_ABI"] if sys.platform == "linux" else []
    subprocess.run(["cc", *own, f"-I{NATIVE}", "-o", tmp_path / "lint", *sources], check=True, timeout=60)
    done = subprocess.run([tmp_path / "lint"], check=True, capture_output=True, text=True, timeout=20)
    assert done.stdout.splitlines() == [
        "ok",
        "sends are posted only after RTS",
        "only SEND is executed",
        "inline data are not known",
        "one message is posted at a time",
        "more frames to send are in flight than were granted",
        "a message must have exactly one SGE",
        "every message of a queue must have the same number of frames",
        "a message must lie in its slab",
        "a message must carry the key of its slab",
        "ok",
        "receives are posted only after RTS",
        "one receive is posted at a time",
        "more frames to receive are in flight than were granted",
        "ok",
        "a message with another number of frames came",
        "ok",
        "a memory region must begin on a page of 16 KiB",
        "a memory region must not cross a 4 GiB boundary",
        "a memory region must have 1 byte to 16 MiB",
    ]


# Our own declarations of the binary interface.

STRUCTURES = {
    "ibv_port_attr": "state active_mtu gid_tbl_len lid phys_state link_layer port_cap_flags2",
    "ibv_global_route": "dgid sgid_index hop_limit",
    "ibv_ah_attr": "grh dlid sl is_global port_num",
    "ibv_qp_cap": "max_send_wr max_recv_wr max_send_sge max_recv_sge max_inline_data",
    "ibv_pd": "context handle",
    "ibv_mr": "context pd addr length lkey rkey",
    "ibv_cq": "context cq_context cqe async_events_completed",
    "ibv_qp": "context pd send_cq recv_cq qp_num state qp_type events_completed",
    "ibv_qp_init_attr": "send_cq recv_cq srq cap qp_type sq_sig_all",
    "ibv_qp_attr": "qp_state path_mtu rq_psn sq_psn dest_qp_num qp_access_flags cap ah_attr "
    "pkey_index port_num rate_limit",
    "ibv_sge": "addr length lkey",
    "ibv_recv_wr": "wr_id next sg_list num_sge",
    "ibv_send_wr": "wr_id next sg_list num_sge opcode send_flags imm_data",
    "ibv_wc": "wr_id status opcode byte_len qp_num wc_flags slid dlid_path_bits",
    "ibv_context": "device ops ops.poll_cq ops.post_send ops.post_recv cmd_fd abi_compat",
}
CONSTANTS = (
    "IBV_PORT_ACTIVE IBV_MTU_256 IBV_MTU_4096 IBV_QPT_RC IBV_QPT_UC IBV_QPT_UD IBV_QPS_INIT "
    "IBV_QPS_RTR IBV_QPS_RTS "
    "IBV_QPS_ERR IBV_WR_SEND IBV_SEND_SIGNALED IBV_SEND_INLINE IBV_WC_RECV IBV_ACCESS_LOCAL_WRITE "
    "IBV_ACCESS_REMOTE_WRITE "
    "IBV_ACCESS_REMOTE_READ IBV_WC_LOC_LEN_ERR IBV_WC_LOC_QP_OP_ERR IBV_WC_LOC_PROT_ERR "
    "IBV_WC_WR_FLUSH_ERR IBV_QP_STATE "
    "IBV_QP_ACCESS_FLAGS IBV_QP_PKEY_INDEX IBV_QP_PORT IBV_QP_AV IBV_QP_PATH_MTU IBV_QP_RQ_PSN "
    "IBV_QP_SQ_PSN IBV_QP_CAP "
    "IBV_QP_DEST_QPN"
)


def layout(folder: Path, *flags: str) -> list[str]:
    """Every size, offset and constant that we use, as the compiler sees it."""
    lines = [f'P("sizeof {s}", sizeof(struct {s}));' for s in STRUCTURES]
    for s, members in STRUCTURES.items():
        lines += [f'P("{s}.{m}", offsetof(struct {s}, {m}));' for m in members.split()]
    lines += [f'P("{c}", (unsigned long){c});' for c in CONSTANTS.split()]
    source, program = folder / "layout.c", folder / "layout"
    source.write_text(
        '#include <stddef.h>\n#include <stdio.h>\n#include "verbs_abi.h"\n'
        '#define P(name, value) printf("%s %lu\\n", name, (unsigned long)(value))\n'
        "int main(void) {\n" + "\n".join(lines) + "\nreturn 0;\n}\n"
    )
    subprocess.run(["cc", *flags, f"-I{NATIVE}", "-o", program, source], check=True, timeout=60)
    return subprocess.run(
        [program], check=True, capture_output=True, text=True, timeout=60
    ).stdout.splitlines()


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux uses our own declarations")
def test_our_declarations_are_those_of_libibverbs(tmp_path: Path) -> None:
    if not Path("/usr/include/infiniband/verbs.h").exists() or not shutil.which("cc"):
        pytest.skip("libibverbs-dev is not installed: nothing to compare with")
    ours, real = layout(tmp_path, "-DXD_VERBS_OWN_ABI"), layout(tmp_path)
    assert len(ours) > 100
    assert ours == real
