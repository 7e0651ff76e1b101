"""Inside the guest: makes the hosts and their RDMA devices, runs the command, and leaves its exit status.

Only the standard library is at hand: this runs before anything is known of the command's environment.
"""

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

CONTROL = Path("/run/control")
ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests import netns  # noqa: E402


def rdma(*args: str) -> None:
    """Run iproute2's rdma."""
    subprocess.run(["rdma", *args], check=True)


def with_devices(net: netns.Net) -> netns.Net:
    """The same hosts with an rxe device at each end of each cable, which no other host sees."""
    made = []
    for host in net.hosts:
        cables = {}
        for peer, cable in host.cables.items():
            device = cable.interface.replace("en_", "rxe_")
            argv = ["rdma", "link", "add", device, "type", "rxe", "netdev", cable.interface]
            subprocess.run(["ip", "netns", "exec", host.namespace, *argv], check=True)
            # A device is always made in the first namespace, whoever asks.
            rdma("dev", "set", device, "netns", host.namespace)
            cables[peer] = replace(cable, device=device)
        made.append(replace(host, cables=cables))
    return netns.Net(made)


def output() -> int:
    """The port that leads to the harness's standard output."""
    for name in Path("/sys/class/virtio-ports").glob("*/name"):
        if name.read_text().strip() == "xd.out":
            return os.open(f"/dev/{name.parent.name}", os.O_WRONLY)
    raise FileNotFoundError("no virtio port 'xd.out'")


def main() -> None:
    """Everything the guest is for."""
    job = json.loads((CONTROL / "job.json").read_text())
    out = output()
    rdma("system", "set", "netns", "exclusive")  # before the first namespace, else it is refused
    net = with_devices(netns.build(job["num_hosts"], job["mtu"]))
    environment = job["environment"] | {"XD_RXE_HOSTS": json.dumps(net.as_dict())}
    print(f"guest: hosts ready after {time.clock_gettime(time.CLOCK_BOOTTIME):.1f} s", flush=True)
    status = subprocess.call(
        job["argv"], cwd=job["cwd"], env=environment, stdin=subprocess.DEVNULL, stdout=out, stderr=out
    )
    (CONTROL / "status").write_text(str(status if status >= 0 else 128 - status))
    os.close(out)


if __name__ == "__main__":
    main()
