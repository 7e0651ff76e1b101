"""`expertd doctor`: an ordered, bounded self-test of this machine, each rung with what was found and what to do next.

The rungs go from what everything needs to what only the fastest link needs, and each tells two causes apart that look
alike from above: RDMA that is switched off from a port that cannot do it, a cable from a missing address. A rung is

    ok        as it should be
    warning   expertd runs, but slower or less safely than it could
    failed    expertd does not run
    skipped   a rung that it needs was not passed, or the time was up
    not here  not for this platform

Whatever may hang or crash (verbs calls, MLX, commands of the system) runs in a process of its own and is given up when
its time is over. Commands and such processes come in through `Tools`, which tests replace.
"""

import json
import platform
import re
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from expertd.topology import advice, parsers_macos
from expertd.topology.collect import COMMAND_TIMEOUT_S, CommandError, Run, collect_host, run_command
from expertd.topology.machine import describe_machine
from expertd.topology.values import PORT_ACTIVE, THUNDERBOLT_4_GBPS, Host, UnreadableError, as_json

State = Literal["ok", "warning", "failed", "skipped", "not here"]

TOTAL_S = 55.0  # the whole ladder ends within a minute
MIN_RUNG_S = 0.5  # with less left, a rung is not begun
MLX_RUNG_S = 10.0  # starting MLX and compiling its kernels takes seconds on a cold or busy machine
RDMA_MACOS = (26, 2)  # Apple TN3205
LIBRARIES = {"Darwin": ["/usr/lib/librdma.dylib", "librdma.dylib"], "Linux": ["libibverbs.so.1"]}
REINSTALL = "pip install --force-reinstall --no-deps expertd"
PMSET = ("/usr/bin/pmset", "-g")
WIRED = ("/usr/sbin/sysctl", "-n", "hw.memsize", "iogpu.wired_limit_mb")
SYSTEM_MB = 8192  # what macOS and its programs need at least beside the GPU
FIREWALL = "/usr/libexec/ApplicationFirewall/socketfilterfw"
MAILBOX_SIZES, MAILBOX_NUMS = [64, 4096, 16384, 65536, 1 << 20], [300, 300, 300, 200, 50]
TCP_PAYLOADS, TCP_NUM = [64, 16384], 200
HAND_OFF = {"num_exchanges": 60, "repeats": 30}  # as many as a model of 60 layers has in a token
# Apple's default fence costs 150 to 200 us per crossing, the fast one 15 to 20 (mlx pull request 1773).
SLOW_HAND_OFF_US = 100.0
PEER_PORT = 7420  # where expertd listens for paired hosts; a host without it refuses, which is answer enough
EHOSTUNREACH_DARWIN = 65


@dataclass(frozen=True)
class Finding:
    """What one rung gives. `blocks`: the rungs that need it have nothing to go on, though it may be no failure."""

    state: State
    found: str
    next: str = ""
    blocks: bool = False
    values: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Rung:
    name: str
    state: State
    found: str
    next: str
    seconds: float
    values: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Report:
    machine: dict[str, Any]
    rungs: list[Rung]
    host: Host | None

    @property
    def exit_code(self) -> int:
        """1 when something keeps expertd from running at all."""
        return int(any(rung.state == "failed" for rung in self.rungs))


class JobError(Exception):
    """A question in a process of its own got no answer; the message says why."""


def run_job(name: str, args: dict[str, Any], timeout_s: float) -> dict[str, Any]:
    """Ask doctor_jobs in a new process. Raises JobError for a crash, a hang and an answer that is {"error": ...}."""
    command = [sys.executable, "-P", "-m", "expertd.cluster.doctor_jobs", name, json.dumps(args)]
    try:
        answer: dict[str, Any] = json.loads(run_command(command, timeout_s).splitlines()[-1])
    except CommandError as e:
        raise JobError(str(e).partition(": ")[2] or str(e)) from None
    except (ValueError, IndexError):
        raise JobError("the answer is not readable") from None
    if "error" in answer:
        raise JobError(str(answer["error"]))
    return answer


@dataclass(frozen=True)
class Tools:
    """Everything of the machine that the ladder touches."""

    system: str = field(default_factory=platform.system)
    macos: str = field(default_factory=lambda: platform.mac_ver()[0])
    run: Run = run_command
    job: Callable[[str, dict[str, Any], float], dict[str, Any]] = run_job
    clock: Callable[[], float] = time.monotonic


@dataclass
class Visit:
    """One climb: the tools, what was asked for, how long this rung may take, and what earlier rungs found."""

    tools: Tools
    peer: str = ""
    fast: bool = False
    limit_s: float = COMMAND_TIMEOUT_S
    host: Host | None = None
    library: str = ""
    devices: list[dict[str, Any]] = field(default_factory=list)

    def job(self, name: str, **args: Any) -> dict[str, Any]:
        return self.tools.job(name, args, self.limit_s)

    def known_host(self) -> Host:
        """This host, asked for once; all its commands together keep to the limit of the rung that asks first."""
        if self.host is None:
            end = self.tools.clock() + self.limit_s

            def run(command: Sequence[str], timeout_s: float) -> str:
                return self.tools.run(command, max(0.1, min(timeout_s, end - self.tools.clock())))

            self.host = collect_host(run=run, system=self.tools.system)
        return self.host


@dataclass(frozen=True)
class Step:
    name: str
    check: Callable[[Visit], Finding]
    needs: tuple[str, ...] = ()
    essential: bool = False  # a job that gets no answer is then a failure, else a warning
    only_on: str = ""
    limit_s: float = COMMAND_TIMEOUT_S


def climb(
    tools: Tools, peer: str = "", fast: bool = False, told: Callable[[Rung], None] | None = None
) -> Report:
    """Do all rungs in order, within TOTAL_S, and tell each as it is done. Never raises for what a rung finds."""
    visit, rungs, missed = Visit(tools, peer, fast), [], set[str]()
    end = tools.clock() + TOTAL_S
    for step in LADDER:
        began = tools.clock()
        visit.limit_s = min(step.limit_s, end - began)
        finding = _do(step, visit, missed)
        if finding.blocks or finding.state in ("failed", "skipped", "not here"):
            missed.add(step.name)
        seconds = round(tools.clock() - began, 2)
        rung = Rung(step.name, finding.state, finding.found, finding.next, seconds, finding.values)
        rungs.append(rung)
        if told:
            told(rung)
    return Report(describe_machine(), rungs, visit.host)


def _do(step: Step, visit: Visit, missed: set[str]) -> Finding:
    if step.only_on and visit.tools.system != step.only_on:
        return Finding("not here", f"for {'macOS' if step.only_on == 'Darwin' else step.only_on} only")
    if needed := [name for name in step.needs if name in missed]:
        return Finding("skipped", f"needs: {needed[0]}")
    if visit.limit_s < MIN_RUNG_S:
        return Finding("skipped", "no time was left", "run it again when the machine is less busy")
    try:
        return step.check(visit)
    except JobError as e:
        return Finding(
            "failed" if step.essential else "warning", str(e), JOB_ADVICE.get(step.name, ""), blocks=True
        )
    except (CommandError, UnreadableError) as e:
        return Finding("warning", f"could not find out: {e}")


# The rungs.


def check_parts(visit: Visit) -> Finding:
    found = visit.job("parts")
    text = f"Python {platform.python_version()}, mlx {found['mlx']} on the {found['device']}"
    return Finding("ok", f"{text}; the transport and the exchange load", values=found)


def check_macos(visit: Visit) -> Finding:
    version = tuple(int(n) for n in re.findall(r"\d+", visit.tools.macos)[:2])
    if version >= RDMA_MACOS:
        return Finding("ok", f"macOS {visit.tools.macos}")
    wanted = ".".join(map(str, RDMA_MACOS))
    text = (
        f"macOS {visit.tools.macos or 'of unknown version'}: RDMA over Thunderbolt needs {wanted}; TCP works"
    )
    return Finding("warning", text, "softwareupdate --list", blocks=True)


def check_thunderbolt(visit: Visit) -> Finding:
    host = visit.known_host()
    if not host.thunderbolt and visit.tools.system != "Darwin":
        return Finding("not here", "no host on a Thunderbolt or USB4 cable; expertd uses the network")
    if not host.thunderbolt:
        return Finding(
            "warning", "; ".join(host.notes) or "no Thunderbolt port", "expertd topology", blocks=True
        )
    ports = ", ".join(
        f"{p.receptacle} {p.interface} {p.speed_gbps} Gb/s".replace("  ", " ") for p in host.thunderbolt
    )
    if visit.tools.system == "Darwin" and not advice.has_thunderbolt_5(host):
        text = (
            f"ports {ports}: at most {THUNDERBOLT_4_GBPS} Gb/s is Thunderbolt 4, which has no RDMA; TCP works"
        )
        return Finding("warning", text, "nothing to mend: leave RDMA as it is")
    return Finding("ok", f"ports {ports}")


def check_cable(visit: Visit) -> Finding:
    cables = visit.known_host().cables
    if not cables:
        todo = "join the two machines by a Thunderbolt 5 cable, port to port, without a dock or a hub"
        return Finding("warning", "no other host on any port", todo, blocks=True)
    slow = [p for p in cables if p.speed_gbps <= THUNDERBOLT_4_GBPS] if _can_rdma(visit) else []
    text = ", ".join(f"{p.interface or p.receptacle} to {p.peer_name} at {p.speed_gbps} Gb/s" for p in cables)
    if slow:
        return Finding("warning", f"{text}: slower than the port can do", "use a Thunderbolt 5 cable")
    return Finding("ok", text)


def _can_rdma(visit: Visit) -> bool:
    return visit.tools.system == "Darwin" and advice.has_thunderbolt_5(visit.known_host())


def _problems(visit: Visit, about: str, fine: str) -> Finding:
    problems = [p for p in advice.find_problems(visit.known_host()) if p.about == about]
    if not problems:
        return Finding("ok", fine)
    return Finding(
        "warning", "; ".join(p.found for p in problems), "; ".join(dict.fromkeys(p.next for p in problems))
    )


def check_bridge(visit: Visit) -> Finding:
    return _problems(visit, "bridge", "no bridge joins several cables")


def check_addresses(visit: Visit) -> Finding:
    return _problems(visit, "address", "each cable's interface has an IPv4 address")


def check_offer(visit: Visit) -> Finding:
    return _problems(visit, "rdma", "the other end offers what this one can use")


def check_switch(visit: Visit) -> Finding:
    """The switch can be set in Recovery alone; on Thunderbolt 4 it can be set, too, and changes nothing."""
    switch = parsers_macos.parse_rdma_ctl(visit.tools.run(("rdma_ctl", "status"), visit.limit_s))
    if not _can_rdma(visit):
        return Finding(
            "warning", f"{switch}, but no port here is Thunderbolt 5", "expertd uses TCP", blocks=True
        )
    if switch != "enabled":
        return Finding("warning", "RDMA is switched off; TCP works", advice.ENABLE_RDMA, blocks=True)
    return Finding("ok", "RDMA is switched on")


def check_library(visit: Visit) -> Finding:
    names = LIBRARIES.get(visit.tools.system, LIBRARIES["Linux"])
    try:
        visit.library = visit.job("library", candidates=names)["path"]
    except JobError as e:
        if visit.tools.system == "Darwin":
            return Finding(
                "warning", f"{e}: macOS is too old for RDMA; TCP works", "softwareupdate --list", blocks=True
            )
        return Finding(
            "not here", f"no {names[0]}; expertd uses TCP", "for RDMA: sudo apt install libibverbs1"
        )
    return Finding("ok", visit.library)


def check_devices(visit: Visit) -> Finding:
    try:
        visit.devices = visit.job("devices", path=visit.library)["devices"]
    except JobError as e:
        if visit.tools.system == "Darwin":
            raise
        return Finding("not here", str(e))
    names = ", ".join(d["name"] for d in visit.devices)
    return Finding("ok", names, values={"devices": visit.devices})


def check_port(visit: Visit) -> Finding:
    states = ", ".join(f"{d['name']} {d['port_state']}" for d in visit.devices)
    if _active(visit):
        return Finding("ok", states)
    todo = (
        "connect the cable; both ends need RDMA switched on (rdma_ctl status), and a minute after their start"
    )
    return Finding("warning", f"no port is active: {states}", todo, blocks=True)


def _active(visit: Visit) -> list[dict[str, Any]]:
    return [d for d in visit.devices if d["port_state"] == PORT_ACTIVE]


def check_gid(visit: Visit) -> Finding:
    active = _active(visit)
    if with_address := [d for d in active if d["ipv4"]]:
        return Finding("ok", ", ".join(f"{d['name']} {d['ipv4'][0]}" for d in with_address))
    host, name = visit.known_host(), active[0]["name"]
    port = next((p for p in host.cables if p.interface and name == f"rdma_{p.interface}"), None)
    command = (
        advice.address_command(port, host) if port else "give its interface (not the bridge) an IPv4 address"
    )
    return Finding("warning", f"{name} has no IPv4 address in its GID table", command, blocks=True)


def check_open(visit: Visit) -> Finding:
    device = next(d for d in _active(visit) if d["ipv4"])
    visit.job("open_device", device=device["name"], local_ip=device["ipv4"][0], path=visit.library)
    return Finding("ok", f"{device['name']} opens: protection domain, memory, queue pairs")


def check_sleep(visit: Visit) -> Finding:
    minutes = parsers_macos.parse_sleep_minutes(visit.tools.run(PMSET, visit.limit_s))
    if minutes:
        text = f"the system sleeps after {minutes} min of idleness: Thunderbolt cannot wake it, and the link ends"
        return Finding("warning", text, "sudo pmset -a sleep 0")
    return Finding("ok", "the system does not sleep by itself")


def check_wired_memory(visit: Visit) -> Finding:
    """What the GPU may keep in memory. Above it, weights are paged in for each token: no error, but no speed."""
    total, limit_mb = parsers_macos.parse_wired_memory(visit.tools.run(WIRED, visit.limit_s))
    total_mb = total >> 20
    most_mb = total_mb - max(SYSTEM_MB, total_mb // 16)
    if not limit_mb:
        text = f"the GPU may keep about {total_mb * 3 // 4 // 1024} of {total_mb // 1024} GB in memory, by default"
        todo = f"for a larger model, until the next start: sudo sysctl iogpu.wired_limit_mb={most_mb}"
        return Finding("ok", text, todo)
    if limit_mb > most_mb:
        text = f"the GPU may keep {limit_mb} of {total_mb} MB: too little is left for the system"
        return Finding("warning", text, f"sudo sysctl iogpu.wired_limit_mb={most_mb}")
    return Finding("ok", f"the GPU may keep {limit_mb // 1024} of {total_mb // 1024} GB in memory")


def check_firewall(visit: Visit) -> Finding:
    if parsers_macos.parse_firewall(visit.tools.run((FIREWALL, "--getglobalstate"), visit.limit_s)):
        allow = f"sudo {FIREWALL} --add {sys.executable}; sudo {FIREWALL} --unblockapp {sys.executable}"
        return Finding("warning", "the firewall is on: it may refuse the other host", allow)
    return Finding("ok", "the firewall is off")


def check_peer(visit: Visit) -> Finding:
    if not visit.peer:
        return Finding("skipped", "no other host was named", "expertd doctor --peer HOST")
    found = visit.job("peer", host=visit.peer, port=PEER_PORT)["addresses"]
    ways = [f"{a['address']} from {a['interface'] or 'nowhere'} ({a['source']}): {a['said']}" for a in found]
    # A refusal comes from the host itself.
    if any(a["errno"] == 0 or "refused" in a["said"].lower() for a in found):
        return Finding("ok", "; ".join(ways), values={"addresses": found})
    if visit.tools.system == "Darwin" and any(a["errno"] == EHOSTUNREACH_DARWIN for a in found):
        todo = "System Settings > Privacy & Security > Local Network: switch on your terminal, then try again"
    else:
        todo = f"ping {visit.peer}; see that it is awake and that its firewall lets expertd through"
    return Finding("warning", "; ".join(ways) or "no address", todo, values={"addresses": found})


def check_mailbox(visit: Visit) -> Finding:
    rows = visit.job("mailbox", sizes=MAILBOX_SIZES, nums=MAILBOX_NUMS)["rows"]
    text = ", ".join(f"{_size(row['bytes'])} {row['p50_us']:.1f}" for row in rows)
    return Finding("ok", f"two processes swap in us (p50): {text}", values={"rows": rows})


def _size(num_bytes: int) -> str:
    return (
        f"{num_bytes >> 20} MiB"
        if num_bytes >> 20
        else f"{num_bytes >> 10} KiB"
        if num_bytes >> 10
        else f"{num_bytes} B"
    )


def check_tcp(visit: Visit) -> Finding:
    rows = visit.job("tcp", payloads=TCP_PAYLOADS, num=TCP_NUM)["rows"]
    text = ", ".join(f"{_size(row['payload_bytes'])} {row['p50_us']:.1f}" for row in rows)
    bandwidth = rows[-1]["bandwidth_mb_s"]
    return Finding(
        "ok", f"loopback swaps in us (p50): {text}; {bandwidth:.0f} MB/s each way", values={"rows": rows}
    )


def check_hand_off(visit: Visit) -> Finding:
    found = visit.job("hand_off", **HAND_OFF)
    return Finding("ok", _hand_off_text(found), _hand_off_advice(found), values=found)


def _hand_off_text(found: dict[str, Any]) -> str:
    what = "GPU to CPU and back" if found["device"] == "gpu" else "on the CPU alone, no GPU here"
    return f"{found['p50_us']:.1f} us per exchange (p99 {found['p99_us']:.1f}): {what}"


def _hand_off_advice(found: dict[str, Any]) -> str:
    slow = found["device"] == "gpu" and found["p50_us"] > SLOW_HAND_OFF_US
    return (
        "this, not the cable, will bound decoding; --fast-synch measures MLX's faster fence" if slow else ""
    )


def check_fast_hand_off(visit: Visit) -> Finding:
    """Asked for only: MLX's fast fence can leave the GPU spinning until the machine is restarted (mlx issue 3142)."""
    if not visit.fast:
        return Finding(
            "skipped", "not asked for: it can wedge the GPU until a restart", "expertd doctor --fast-synch"
        )
    found = visit.job("hand_off", fast=True, **HAND_OFF)
    return Finding(
        "ok", _hand_off_text(found), "MLX advises against it; expertd does not switch it on", values=found
    )


LADDER = (
    Step("expertd's parts", check_parts, essential=True, limit_s=MLX_RUNG_S),
    Step("macOS", check_macos, only_on="Darwin"),
    Step("Thunderbolt ports", check_thunderbolt),
    Step("cable", check_cable, needs=("Thunderbolt ports",)),
    Step("bridge", check_bridge, needs=("Thunderbolt ports",)),
    Step("address on the cable", check_addresses, needs=("cable",)),
    Step("RDMA of the other end", check_offer, needs=("cable",)),
    Step("RDMA library", check_library),
    Step("RDMA switch", check_switch, needs=("macOS", "RDMA library"), only_on="Darwin"),
    Step("RDMA devices", check_devices, needs=("RDMA library",)),
    Step("RDMA port", check_port, needs=("RDMA devices",)),
    Step("RDMA address", check_gid, needs=("RDMA port",)),
    Step("RDMA queue pairs", check_open, needs=("RDMA address",)),
    Step("sleep", check_sleep, only_on="Darwin"),
    Step("wired memory", check_wired_memory, only_on="Darwin"),
    Step("firewall", check_firewall, only_on="Darwin"),
    Step("other host", check_peer),
    Step("mailbox", check_mailbox, needs=("expertd's parts",), essential=True),
    Step("TCP", check_tcp, needs=("expertd's parts",), essential=True),
    Step("hand-off", check_hand_off, needs=("expertd's parts",), essential=True, limit_s=MLX_RUNG_S),
    Step("hand-off, fast", check_fast_hand_off, needs=("hand-off",), only_on="Darwin", limit_s=MLX_RUNG_S),
)

WEDGED = (
    "RDMA does not answer: pull the cable and put it in again; if that does not help, restart the machine"
)
JOB_ADVICE = {
    "expertd's parts": REINSTALL,
    "RDMA devices": WEDGED,
    "RDMA queue pairs": f"end other programs that use RDMA, then try again. {WEDGED}",
    "other host": "look at the name; `expertd hosts` lists what is paired",
    "mailbox": "run it again when the machine is less busy",
    "TCP": "run it again when the machine is less busy",
    "hand-off": "run it again when the machine is less busy",
}


def report_json(report: Report) -> dict[str, Any]:
    """Give the whole report as what json.dumps takes, addresses and identities included (see `redact`)."""
    host = as_json(report.host) if report.host else None
    return {"machine": report.machine, "rungs": [asdict(rung) for rung in report.rungs], "host": host}
