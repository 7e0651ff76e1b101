"""The doctor's questions that may hang or crash, each in a process of its own, which the doctor can give up.

    python -m expertd.cluster.doctor_jobs NAME '{"argument": ...}'

The answer is one line of JSON. A failure with a reason for people is {"error": "..."}; anything else ends the process
with its traceback, of which the doctor shows the last line.
"""

import ctypes
import importlib
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from expertd.errors import ExpertdError

Answer = dict[str, Any]
Job = Callable[..., Answer]

PORT_STATES = {0: "absent", 1: "down", 2: "initialising", 3: "armed", 4: "active"}  # enum ibv_port_state
SLOT_BYTES = 1 << 20
CONNECT_TIMEOUT_S = 2.0
STEP_TIMEOUT_S = 10.0  # above every limit of the doctor
PULSE_TIMEOUT_S = 5.0  # a busy machine starves a process for longer than serving would allow


def parts() -> Answer:
    """What was compiled: whether it loads here, and for which mlx."""
    import mlx.core as mx

    importlib.import_module("expertd.link.mailbox")  # loads the transport
    from expertd.model.exchange import MLX_VERSION  # raises when it was built for another mlx

    return {"mlx": MLX_VERSION, "device": "gpu" if mx.default_device() == mx.Device(mx.gpu) else "cpu"}


# RDMA verbs.


def library(candidates: list[str]) -> Answer:
    """Load the verbs library by the first name that works."""
    errors = []
    for name in candidates:
        try:
            ctypes.CDLL(name)
            return {"path": name}
        except OSError as e:
            errors.append(str(e))
    return {"error": "; ".join(errors)[:300]}


def devices(path: str = "") -> Answer:
    from expertd.link.verbs import devices

    return {"devices": [_device(d) for d in devices(path)]}


def _device(device: Any) -> Answer:
    state = PORT_STATES.get(device.port_state, f"state {device.port_state}")
    ipv4 = list(device.ipv4.values())
    return {"name": device.name, "port_state": state, "ipv4": ipv4, "error": device.error}


def open_device(device: str, local_ip: str, path: str = "") -> Answer:
    """Open a device as a link does: protection domain, memory, completion queue, queue pairs; and close it again."""
    from expertd.link.verbs import Config, Verbs

    Verbs(Config(local_ip, device, path, lint=True)).close()
    return {}


# Measurements, each between two processes: this one and a partner that ends when this one does.


def mailbox(sizes: list[int], nums: list[int]) -> Answer:
    """Time swaps of each size with a second process, through shared memory."""
    from expertd.link.mailbox import create

    fd = create(2, SLOT_BYTES)
    lifeline_fd, lifeline = os.pipe()
    args = {"fd": fd, "lifeline_fd": lifeline_fd, "rank": 1, "sizes": sizes, "nums": nums}
    partner = _partner("mailbox_rank", args, [fd, lifeline_fd])
    try:
        return mailbox_rank(fd, -1, 0, sizes, nums)
    finally:
        os.close(lifeline)
        partner.wait(timeout=STEP_TIMEOUT_S)


def mailbox_rank(fd: int, lifeline_fd: int, rank: int, sizes: list[int], nums: list[int]) -> Answer:
    from expertd.link.mailbox import Mailbox
    from expertd.link.self_test import time_swaps
    from expertd.topology.machine import settle

    settle([])
    with Mailbox(fd, rank, 2, STEP_TIMEOUT_S, PULSE_TIMEOUT_S, lifeline_fd) as box:
        times = [time_swaps(box, size, num) for size, num in zip(sizes, nums, strict=True)]
    return {"rows": [{"bytes": size, **_percentiles(t)} for size, t in zip(sizes, times, strict=True)]}


def tcp(payloads: list[int], num: int) -> Answer:
    """Time exchanges with a second process over TCP on the loopback, through the transport that a link uses."""
    from expertd.topology.measure import probe

    with socket.create_server(("127.0.0.1", 0)) as server:
        theirs = socket.create_connection(server.getsockname())
        ours, caller = server.accept()
    with ours, theirs:
        if caller != theirs.getsockname():
            return {"error": "another program connected to the port of this measurement. Try again"}
        partner = _partner("tcp_end", {"fd": theirs.fileno()}, [theirs.fileno()])
        theirs.close()  # the partner's is the only one left: its end is seen here
        try:
            return {"rows": [asdict(m) for m in probe(ours, payloads, num)]}
        finally:
            partner.wait(timeout=STEP_TIMEOUT_S)


def tcp_end(fd: int) -> Answer:
    from expertd.topology.measure import serve_probe

    serve_probe(socket.socket(fileno=fd))
    return {}


def _partner(name: str, args: Answer, fds: list[int]) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-P", "-m", __spec__.name, name, json.dumps(args)]
    return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, pass_fds=fds)


def hand_off(num_exchanges: int, repeats: int, fast: bool = False) -> Answer:
    """Time what one exchange adds to a graph on this machine's default device: the way to the CPU stream and back.

    A group of one rank, so that nobody is waited for; the same graph with and without `num_exchanges` exchanges.
    """
    if fast:  # read by MLX when it is imported
        os.environ["MLX_METAL_FAST_SYNCH"] = "1"
    import mlx.core as mx

    from expertd.link.mailbox import Mailbox, create
    from expertd.model.exchange import exchange

    fd = create(1, SLOT_BYTES)
    with Mailbox(fd, 0, 1, STEP_TIMEOUT_S, PULSE_TIMEOUT_S) as box:

        def run(with_exchanges: bool) -> float:
            rows = mx.ones((1, 4096))
            for tag in range(1, num_exchanges + 1):
                rows = mx.sin(rows)
                rows = exchange(box, rows, [1], tag) if with_exchanges else rows
            start = time.perf_counter()
            mx.eval(rows)
            return (time.perf_counter() - start) * 1e6

        pairs = [(run(True), run(False)) for _ in range(repeats + 2)][2:]  # the first ones compile kernels
        box.check()
    os.close(fd)
    plain_us = statistics.median(without for _, without in pairs)
    added = [(with_ - plain_us) / num_exchanges for with_, _ in pairs]
    device = "gpu" if mx.default_device() == mx.Device(mx.gpu) else "cpu"
    return {"device": device, "num_exchanges": num_exchanges, **_percentiles(added)}


def _percentiles(times_us: list[float]) -> Answer:
    ordered = sorted(times_us)
    p99 = ordered[min(len(ordered) - 1, int(len(ordered) * 0.99))]
    return {"p50_us": round(statistics.median(ordered), 2), "p99_us": round(p99, 2)}


# Another host.


def peer(host: str, port: int) -> Answer:
    """Find out how this machine would reach a host: its addresses, from where, and what a TCP connection says."""
    from expertd.topology.pin import interface_of, source_for

    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError as e:
        return {"error": str(e.strerror or e)}
    addresses = []
    for family, _, _, _, to in found[:4]:
        source = source_for(str(to[0]))
        began = time.monotonic()
        with socket.socket(family, socket.SOCK_STREAM) as sock:
            sock.settimeout(CONNECT_TIMEOUT_S / min(4, len(found)))
            try:
                sock.connect(to)
                code, said = 0, "connected"
            except TimeoutError:
                code, said = -1, "no answer"
            except OSError as e:
                code, said = e.errno or -1, str(e.strerror or e)
        took_ms = round((time.monotonic() - began) * 1e3, 2)
        way = {"source": source, "interface": interface_of(source) if source else ""}
        addresses.append({"address": to[0], **way, "errno": code, "said": said, "took_ms": took_ms})
    return {"addresses": addresses}


JOBS: dict[str, Job] = {
    job.__name__: job
    for job in (parts, library, devices, open_device, mailbox, mailbox_rank, tcp, tcp_end, hand_off, peer)
}


def main() -> None:
    name, arguments = sys.argv[1:]
    try:
        answer = JOBS[name](**json.loads(arguments))
    except (ExpertdError, OSError) as e:
        answer = {"error": str(e)}
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
