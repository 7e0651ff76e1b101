"""The ladder on machines that are well, wrong, slow or wedged: with scripted tools, and with the real processes."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from expertd.cluster import doctor
from expertd.cluster.doctor import LADDER, JobError, Report, Rung, Tools, climb, report_json, run_job
from expertd.cluster.redact import redact
from expertd.topology.collect import CommandError
from tests.link.provider_fixture import Fabric

SAMPLES = Path(__file__).parents[1] / "topology/samples"
TEXTS = {
    "system_profiler": (SAMPLES / "three_macs.json").read_text(),
    "networksetup": (SAMPLES / "hardware_ports_mini.txt").read_text(),
    "ifconfig": (SAMPLES / "ifconfig_configured.txt").read_text(),
    "rdma_ctl": "enabled",
    "pmset": " sleep  0\n",
    "sysctl": "137438953472\n0\n",
    "socketfilterfw": "Firewall is disabled. (State = 0)",
}
DEVICE = {"name": "rdma_en2", "port_state": "active", "ipv4": ["10.0.0.1"], "error": ""}
SWAPS = [{"bytes": n, "p50_us": 9.5, "p99_us": 20.0} for n in (64, 1 << 20)]
TCP = [
    {"payload_bytes": n, "p50_us": 60.0, "p99_us": 99.0, "bandwidth_mb_s": 4000.0, "num": 9}
    for n in (64, 16384)
]
ANSWERS: dict[str, dict[str, Any]] = {
    "parts": {"mlx": "0.32.4", "device": "gpu"},
    "library": {"path": "/usr/lib/librdma.dylib"},
    "devices": {"devices": [{**DEVICE, "name": "rdma_en4", "port_state": "down"}, DEVICE]},
    "open_device": {},
    "peer": {"addresses": []},
    "mailbox": {"rows": SWAPS},
    "tcp": {"rows": TCP},
    "hand_off": {"device": "gpu", "num_exchanges": 60, "p50_us": 170.0, "p99_us": 190.0},
}


def mac(answers: dict[str, Any] | None = None, **texts: str | Exception) -> Tools:
    """Two Macs on Thunderbolt 5 cables and all is well, but for what is given: texts of commands, answers of jobs."""

    def run(command: Sequence[str], timeout_s: float) -> str:
        assert 0 < timeout_s <= 5
        text = {**TEXTS, **texts}[Path(command[0]).name]
        if isinstance(text, Exception):
            raise text
        return text

    def job(name: str, args: dict[str, Any], timeout_s: float) -> dict[str, Any]:
        assert 0 < timeout_s <= 10
        answer = {**ANSWERS, **(answers or {})}[name]
        if isinstance(answer, Exception):
            raise answer
        return dict(answer)

    return Tools(system="Darwin", macos="26.3.1", run=run, job=job)


def rung(report: Report, name: str) -> Rung:
    return next(r for r in report.rungs if r.name == name)


def states(report: Report) -> dict[str, str]:
    return {r.name: r.state for r in report.rungs}


def test_all_is_well() -> None:
    three = json.loads(TEXTS["system_profiler"])["SPThunderboltDataType"]
    report = climb(mac(system_profiler=json.dumps({"SPThunderboltDataType": [three[0], three[2]]})))
    skipped = {"other host": "skipped", "hand-off, fast": "skipped"}
    assert states(report) == {step.name: "ok" for step in LADDER} | skipped
    assert report.exit_code == 0
    assert "rdma_en2 10.0.0.1" in rung(report, "RDMA address").found
    assert "64 B 9.5, 1 MiB 9.5" in rung(report, "mailbox").found
    assert "170.0 us per exchange" in rung(report, "hand-off").found
    assert rung(report, "wired memory").found.startswith("the GPU may keep about 96 of 128 GB")
    assert rung(report, "wired memory").next.endswith("sudo sysctl iogpu.wired_limit_mb=122880")
    assert "bound decoding" in rung(report, "hand-off").next


HANG = JobError("no answer in 5 s")
NO_LIBRARY, NO_DEVICE = JobError("image not found"), JobError("verbs: no RDMA device")
DOWN = {"devices": {"devices": [{**DEVICE, "port_state": "down"}]}}
NO_GID = {"devices": {"devices": [{**DEVICE, "ipv4": []}]}}
BRIDGED = (SAMPLES / "ifconfig_bridge_up.txt").read_text()
NO_CABLE = (SAMPLES / "no_cable.json").read_text()
PMSET = (SAMPLES / "pmset.txt").read_text()


@pytest.mark.parametrize(
    "tools, name, found, todo, skipped",
    [
        (replace(mac(), macos="15.7"), "macOS", "macOS 15.7: RDMA", "softwareupdate", "RDMA switch"),
        (mac({"library": NO_LIBRARY}), "RDMA library", "macOS is too old", "softwareupdate", "RDMA devices"),
        (mac(rdma_ctl="disabled"), "RDMA switch", "switched off", "Recovery", "RDMA switch"),
        (mac({"devices": NO_DEVICE}), "RDMA devices", "no RDMA device", "", "RDMA port"),
        (mac({"devices": HANG}), "RDMA devices", "no answer in 5 s", "pull the cable", "RDMA port"),
        (mac(DOWN), "RDMA port", "no port is active: rdma_en2 down", "both ends", "RDMA address"),
        (mac(NO_GID), "RDMA address", "rdma_en2 has no IPv4 address", "sudo ifconfig en2 inet", "RDMA queue pairs"),
        (mac({"open_device": HANG}), "RDMA queue pairs", "no answer", "restart the machine", ""),
        (mac(ifconfig=BRIDGED), "bridge", "joins 2 Thunderbolt cables", "ifconfig bridge0 down", ""),
        (mac(ifconfig=BRIDGED), "address on the cable", "en2, the cable to Mac Studio", "sudo ifconfig en2 inet", ""),
        (mac(), "RDMA of the other end", "MacBook Pro, on en3, offers no RDMA", "rdma_ctl enable", ""),
        (mac(pmset=PMSET), "sleep", "sleeps after 1 min", "sudo pmset -a sleep 0", ""),
        (mac(socketfilterfw="Firewall is enabled. (State = 1)"), "firewall", "is on", "--unblockapp", ""),
        (mac(sysctl="137438953472\n131072\n"), "wired memory", "131072 of 131072 MB", "wired_limit_mb=122880", ""),
        (mac(sysctl="sysctl: unknown oid"), "wired memory", "could not find out: sysctl: wanted two", "", ""),
        (mac(socketfilterfw="Feuerwand"), "firewall", "could not find out: socketfilterfw: wanted", "", ""),
        (mac(pmset=CommandError("pmset: no answer in 5 s")), "sleep", "no answer in 5 s", "", ""),
        (mac(system_profiler=CommandError("s: no answer")), "Thunderbolt ports", "no answer", "", "cable"),
        (mac(system_profiler=NO_CABLE), "cable", "no other host", "Thunderbolt 5 cable", "address on the cable"),
    ],
)  # fmt: skip
def test_each_fault_has_its_rung(tools: Tools, name: str, found: str, todo: str, skipped: str) -> None:
    """It is named where it is, with what to do; what cannot be judged then is skipped, and expertd still runs."""
    report = climb(tools)
    fault = rung(report, name)
    assert fault.state == "warning", fault
    assert found in fault.found and todo in fault.next
    assert report.exit_code == 0
    if skipped and skipped != name:
        assert rung(report, skipped).state == "skipped"


def test_thunderbolt_4_is_not_sent_to_recovery() -> None:
    report = climb(mac({"devices": NO_DEVICE}, system_profiler=(SAMPLES / "thunderbolt_4.json").read_text()))
    assert "Thunderbolt 4, which has no RDMA" in rung(report, "Thunderbolt ports").found
    assert rung(report, "RDMA switch").next == "expertd uses TCP"


@pytest.mark.parametrize(
    "job, name",
    [("parts", "expertd's parts"), ("mailbox", "mailbox"), ("tcp", "TCP"), ("hand_off", "hand-off")],
)
def test_what_keeps_expertd_from_running_fails(job: str, name: str) -> None:
    report = climb(mac({job: JobError("ImportError: libmlx.so: cannot open")}))
    assert rung(report, name).state == "failed" and rung(report, name).next
    assert report.exit_code == 1
    if job == "parts":
        assert {rung(report, n).state for n in ("mailbox", "TCP", "hand-off")} == {"skipped"}


def addresses(errno: int, said: str) -> dict[str, Any]:
    way = {"address": "10.0.0.2", "source": "10.0.0.1", "interface": "en2"}
    return {"peer": {"addresses": [{**way, "errno": errno, "said": said, "took_ms": 1.0}]}}


@pytest.mark.parametrize(
    "answer, state, todo",
    [
        (addresses(0, "connected"), "ok", ""),
        (addresses(61, "Connection refused"), "ok", ""),
        (addresses(65, "No route to host"), "warning", "Local Network"),
        (addresses(-1, "no answer"), "warning", "ping studio"),
        ({"peer": JobError("nodename nor servname provided")}, "warning", "expertd hosts"),
    ],
)
def test_other_host(answer: dict[str, Any], state: str, todo: str) -> None:
    found = rung(climb(mac(answer), peer="studio"), "other host")
    assert (found.state, todo in found.next) == (state, True)


def test_fast_fence_is_measured_only_when_asked() -> None:
    calls: list[dict[str, Any]] = []

    def job(name: str, args: dict[str, Any], timeout_s: float) -> dict[str, Any]:
        calls.append(args)
        return dict(ANSWERS[name])

    climb(replace(mac(), job=job))
    assert not any(args.get("fast") for args in calls)
    assert rung(climb(replace(mac(), job=job), fast=True), "hand-off, fast").state == "ok"
    assert calls[-1]["fast"] is True


def test_everything_hangs_and_the_ladder_ends_in_time() -> None:
    """Each question takes all its time: the sum stays below a minute, and what is left is skipped."""
    now = [0.0]

    def run(command: Sequence[str], timeout_s: float) -> str:
        now[0] += timeout_s
        raise CommandError("no answer")

    def job(name: str, args: dict[str, Any], timeout_s: float) -> dict[str, Any]:
        if name in ("library", "devices"):
            now[0] += 4.9
            return dict(ANSWERS[name])
        now[0] += timeout_s
        if name == "parts":
            return dict(ANSWERS[name])
        raise JobError("no answer")

    report = climb(Tools("Darwin", "26.3", run, job, lambda: now[0]), peer="studio", fast=True)
    assert now[0] <= 60
    assert rung(report, "hand-off").state == "skipped" and "no time" in rung(report, "hand-off").found
    assert max(r.seconds for r in report.rungs) <= 10.1


# Reports for strangers.


def test_redacted_report_says_nothing_of_who_and_where() -> None:
    answers = {"peer": addresses(0, "connected")["peer"]}
    report = climb(mac(answers, ifconfig=BRIDGED), peer="studio.local")
    report = replace(
        report, host=replace(report.host or pytest.fail("no host"), name="janes-mini", host_id="0123abcd")
    )
    whole = report_json(report)
    text = json.dumps(redact(whole, ["studio.local"]))
    uuid = whole["host"]["thunderbolt"][0]["domain_uuid"]
    places = ["192.168.1.20", "10.0.0.", "2001:db8", "fe80", "100.101", "169.254", uuid, str(Path.home())]
    for secret in [*places, "janes-mini", "studio.local", "Mac Studio", "0123abcd"]:
        assert secret not in text, secret
    assert "127.0.0.1" in text and "bridge0" in text and "0.32.4" in text and "26.3.1" in text
    ports = json.loads(text)["host"]["thunderbolt"]
    assert (
        ports[0]["domain_uuid"].startswith("<identity ") and ports[0]["domain_uuid"] != ports[0]["peer_uuid"]
    )


@pytest.mark.parametrize(
    "text, wanted",
    [
        ("at 10.0.0.2.", "at <address 1>."),
        ("10.0.0.2:7420 and 10.0.0.2", "<address 1>:7420 and <address 1>"),
        ("fe80::1%en0", "<address 1>%en0"),
        ("inet 10.0.0.1/30", "inet <address 1>/30"),
        ("02:00:5e:10:00:01", "<address 1>"),
        ("mlx 0.32.4 at 12:30, 1.5 us, dead", "mlx 0.32.4 at 12:30, 1.5 us, dead"),
        ("from ::ffff:10.0.0.1: x, fe80::, ::1", "from <address 1>: x, <address 2>, ::1"),
        ("mini minimal", "<host 1> minimal"),
    ],
)
def test_redact(text: str, wanted: str) -> None:
    assert redact({"a": [text]}, ["mini"]) == {"a": [wanted]}


# The real processes.


def test_jobs_of_this_machine() -> None:
    swaps = run_job("mailbox", {"sizes": [64, 65536], "nums": [20, 5]}, 30)["rows"]
    assert [row["bytes"] for row in swaps] == [64, 65536] and all(row["p50_us"] > 0 for row in swaps)
    assert run_job("tcp", {"payloads": [64], "num": 10}, 30)["rows"][0]["bandwidth_mb_s"] > 0
    assert run_job("hand_off", {"num_exchanges": 5, "repeats": 3}, 30)["device"] in ("cpu", "gpu")
    assert run_job("parts", {}, 30)["mlx"]
    (way,) = run_job("peer", {"host": "127.0.0.1", "port": 9}, 30)["addresses"]
    assert way["source"] == "127.0.0.1" and way["errno"]


def test_job_that_crashes_hangs_or_fails() -> None:
    with pytest.raises(JobError, match=r"ended with code 1: KeyError: 'no such job'"):
        run_job("no such job", {}, 30)
    with pytest.raises(JobError, match=r"no answer in 0.01 s"):
        run_job("parts", {}, 0.01)
    with pytest.raises(JobError, match="nowhere"):
        run_job("library", {"candidates": ["/nowhere.so"]}, 30)


@pytest.mark.parametrize(
    "temper, name, state, found",
    [
        ("", "RDMA queue pairs", "ok", "rdma_en2 opens"),
        ("no_device", "RDMA devices", "warning", "no RDMA device"),
        ("port_down", "RDMA port", "warning", "no port is active: rdma_en2 down"),
        ("no_ipv4", "RDMA address", "warning", "rdma_en2 has no IPv4 address"),
        ("pd_null", "RDMA queue pairs", "warning", "protection domain"),
    ],
)
def test_rungs_of_rdma_with_a_provider(
    temper: str,
    name: str,
    state: str,
    found: str,
    provider: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The verbs' rungs in their own processes, over a library with Apple's temper."""
    for key, value in Fabric(tmp_path, provider).environment("10.0.0.1", temper).items():
        monkeypatch.setenv(key, value)
    monkeypatch.setitem(doctor.LIBRARIES, "Darwin", [str(provider)])
    scripted = mac()

    def job(name: str, args: dict[str, Any], timeout_s: float) -> dict[str, Any]:
        if name in ("library", "devices", "open_device"):
            return run_job(name, args, 30)
        return scripted.job(name, args, timeout_s)

    report = climb(replace(scripted, job=job))
    assert rung(report, name).state == state, rung(report, name)
    assert found in rung(report, name).found
    assert Fabric(tmp_path, provider).breaches() == []


def test_driver_that_hangs_is_given_up(
    provider: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for key, value in Fabric(tmp_path, provider).environment("10.0.0.1", "hang:alloc_pd").items():
        monkeypatch.setenv(key, value)
    with pytest.raises(JobError, match=r"no answer in 1.5 s"):
        run_job("open_device", {"device": "rdma_en2", "local_ip": "10.0.0.1", "path": str(provider)}, 1.5)


def test_linux_without_rdma_is_fine() -> None:
    report = climb(replace(mac({"library": NO_LIBRARY}), system="Linux"))
    assert {r.state for r in report.rungs} <= {"ok", "not here", "skipped"}
    assert report.exit_code == 0
