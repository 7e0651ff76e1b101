"""What `expertd bench link` needs of RDMA verbs: a device that can be used, and the usual tool's figures."""

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from expertd.bench.processes import free_ports
from expertd.errors import ClusterError

# Asking a driver may hang or crash, so a child does.
ASK = """
import dataclasses, json, sys
from expertd.link import verbs
why = verbs.why_unusable(sys.argv[1])
print(json.dumps([why, [] if why else [dataclasses.asdict(d) for d in verbs.devices(sys.argv[1])]]))
"""
ASK_TIMEOUT_S = 20.0
TOOL = "ib_send_lat"
TOOL_TIMEOUT_S = 20.0
PORT_ACTIVE = 4
# Its columns (perftest 4): bytes, iterations, min, max, typical, average, deviation, 99 %, 99.9 %.
NUM_COLUMNS = 9


@dataclass(frozen=True)
class Usable:
    """A device, and the index and IPv4 address of one of its GIDs."""

    device: str
    gid_index: int
    address: str


def find(library: str) -> Usable:
    """A device of this machine that is ready for a link. Raises ClusterError that says why there is none."""
    command = [sys.executable, "-P", "-c", ASK, library]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=ASK_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        raise ClusterError(f"the verbs driver did not answer within {ASK_TIMEOUT_S:g} s") from None
    if done.returncode:
        raise ClusterError(f"asking the verbs driver ended with code {done.returncode}")
    why, devices = json.loads(done.stdout.splitlines()[-1])
    if why:
        raise ClusterError(why)
    ready = [d for d in devices if d["ipv4"] and not d["error"] and d["port_state"] == PORT_ACTIVE]
    index, address = min((int(i), a) for i, a in ready[0]["ipv4"].items())
    return Usable(ready[0]["name"], index, address)


def usual_tool(usable: Usable, sizes: tuple[int, ...], num_messages: int) -> list[dict[str, Any]]:
    """ib_send_lat with UC between two processes, for each size, in the shape of link_side.summarize.

    Raises ClusterError that says why it cannot be measured.
    """
    if not shutil.which(TOOL):
        raise ClusterError(f"no program {TOOL}. It is in the package perftest.")
    return [_measure(usable, size, num_messages) for size in sizes]


def _measure(usable: Usable, size: int, num_messages: int) -> dict[str, Any]:
    options = {"-c": "UC", "-s": size, "-n": num_messages, "-d": usable.device, "-x": usable.gid_index}
    (port,) = free_ports(1)
    command = [TOOL, "-F", "-p", str(port), *(str(part) for pair in options.items() for part in pair)]
    with _running(command) as server:
        deadline, said = time.monotonic() + TOOL_TIMEOUT_S, ""
        while time.monotonic() < deadline and server.poll() is None:
            try:
                left_s = max(0.1, deadline - time.monotonic())
                done = subprocess.run(
                    [*command, usable.address], capture_output=True, text=True, timeout=left_s
                )
            except subprocess.TimeoutExpired:
                break
            if done.returncode == 0:
                return parse(done.stdout, size)
            said = " ".join(done.stderr.split())[:200]
            time.sleep(0.1)  # the server may not listen yet
    raise ClusterError(f"{TOOL} does not run on {usable.device}: {said or 'it does not answer'}")


@contextmanager
def _running(command: list[str]) -> Iterator["subprocess.Popen[bytes]"]:
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, process_group=0)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def parse(said: str, size: int) -> dict[str, Any]:
    """The figures in what ib_send_lat has printed. Raises ClusterError when there are none for this size."""
    for line in said.splitlines():
        words = line.split()
        if words[:1] == [str(size)] and len(words) == NUM_COLUMNS:
            least, _, typical, _, _, p99, p999 = map(float, words[2:])
            figures = {"p50_us": typical, "p99_us": p99, "p999_us": p999, "min_us": least}
            return {"samples": int(words[1]), **figures, "rounds_us": [typical]}
    raise ClusterError(f"{TOOL} printed no figures for {size} bytes")
