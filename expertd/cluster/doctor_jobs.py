"""The doctor's questions that may hang or crash, each in a process of its own, which the doctor can give up.

    python -m expertd.cluster.doctor_jobs NAME '{"argument": ...}'

The answer is one line of JSON. A failure with a reason for people is {"error": "..."}; anything else ends the process
with its traceback, of which the doctor shows the last line.
"""

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

SLOT_BYTES = 1 << 20
CONNECT_TIMEOUT_S = 2.0
STEP_TIMEOUT_S = 10.0  # above every limit of the doctor
PULSE_TIMEOUT_S = 5.0  # a busy machine starves a process for longer than serving would allow


def parts() -> Answer:
    """What was compiled: whether it loads here, and for which mlx."""
    import mlx.core as mx

    import expertd.link.mailbox  # loads the transport
    from expertd.model.exchange import MLX_VERSION  # raises when it was built for another mlx

    return {"mlx": MLX_VERSION, "device": "gpu" if mx.default_device() == mx.Device(mx.gpu) else "cpu"}


# RDMA verbs.


def library(candidates: list[str]) -> Answer:
    from expertd.link.self_test import load_library

    return {"path": load_library(candidates)}


def devices(path: str = "") -> Answer:
    from expertd.link.self_test import list_devices

    return {"devices": list_devices(path)}


def open_device(device: str, local_ip: str, path: str = "") -> Answer:
    from expertd.link import self_test

    self_test.open_device(device, local_ip, path)
    return {}


# Measurements, each between two processes: this one and a partner that ends when this one does.


def mailbox(sizes: list[int], nums: list[int]) -> Answer:
    """Time swaps of each size with a second process, through shared memory."""
    from expertd.link.mailbox import create

    fd = create(2, SLOT_BYTES)
    lifeline_fd, lifeline = os.pipe()
    args = {"fd": fd, "lifeline_fd": lifeline_fd, "sizes": sizes, "nums": nums}
    partner = _partner("mailbox_rank", {**args, "rank": 1}, [fd, lifeline_fd])
    try:
        return mailbox_rank(rank=0, **{**args, "lifeline_fd": -1})
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
    added = [(a - b) / num_exchanges for a, b in pairs]
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
