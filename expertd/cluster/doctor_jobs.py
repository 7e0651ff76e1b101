"""The doctor's questions that may hang or crash, each in a process of its own, which the doctor can give up.

    python -m expertd.cluster.doctor_jobs NAME '{"argument": ...}'

The answer is one line of JSON. A failure that is expected is {"error": "..."}; anything else ends the process with its
traceback, of which the doctor shows the last line.
"""

import ctypes
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

Answer = dict[str, Any]
Job = Callable[..., Answer]

PORT_STATES = {
    0: "absent",
    1: "down",
    2: "initialising",
    3: "armed",
    4: "active",
    5: "deferred",
}  # enum ibv_port_state
MAX_DEVICES = 16
# 4 and 32 frames of 4 KiB per message, 16 and 8 receives: what a link opens.
LATENCY_FRAMES, BULK_FRAMES, LATENCY_DEPTH, BULK_DEPTH = 4, 32, 16, 8
SLOT_BYTES = 1 << 20
CONNECT_TIMEOUT_S = 2.0
STEP_TIMEOUT_S = 10.0  # above every limit of the doctor
PULSE_TIMEOUT_S = 5.0  # a busy machine starves a process for longer than serving would allow


def parts() -> Answer:
    """What was compiled: whether it loads here, and for which mlx."""
    import mlx.core as mx

    from expertd.native import _exchange, _transport

    return {
        "mlx": version("mlx"),
        "built_for_mlx": _exchange.built_for_mlx,
        "device": "gpu" if mx.default_device() == mx.Device(mx.gpu) else "cpu",
        "transport": Path(_transport.__file__).name,
    }


# RDMA verbs: any call may block for ever inside a driver.


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
    from expertd.native._transport import ffi, lib

    found, err = ffi.new("xd_verbs_device[]", MAX_DEVICES), ffi.new("char[240]")
    count = lib.xd_verbs_devices(path.encode(), found, MAX_DEVICES, err, len(err))
    if count < 0:
        return {"error": _text(ffi, err)}
    return {"devices": [_device(ffi, found[n]) for n in range(min(count, MAX_DEVICES))]}


def _device(ffi: Any, device: Any) -> Answer:
    addresses = [_text(ffi, ip) for ip in device.ipv4]
    return {
        "name": _text(ffi, device.name),
        "port_state": PORT_STATES.get(device.port_state, f"state {device.port_state}"),
        "mtu": device.active_mtu,
        "ipv4": [ip for ip in addresses if ip],
        "error": _text(ffi, device.error),
    }


def open_device(device: str, local_ip: str, path: str = "") -> Answer:
    """Open a device as a link does: protection domain, memory, completion queue, queue pairs; and close it again."""
    from expertd.native._transport import ffi, lib

    names = [ffi.new("char[]", text.encode()) for text in (path, device, local_ip)]
    config = ffi.new(
        "xd_verbs_config *",
        [*names, LATENCY_FRAMES, BULK_FRAMES, LATENCY_DEPTH, BULK_DEPTH, 1],
    )
    err = ffi.new("char[240]")
    verbs = lib.xd_verbs_open(config, err, len(err))
    if verbs == ffi.NULL:
        return {"error": _text(ffi, err)}
    lib.xd_verbs_close(verbs)
    return {}


def _text(ffi: Any, chars: Any) -> str:
    return str(ffi.string(chars).decode(errors="replace"))


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
    from expertd.native._transport import ffi, lib
    from expertd.topology.machine import settle

    settle([])
    rows = []
    with Mailbox(fd, rank, 2, STEP_TIMEOUT_S, PULSE_TIMEOUT_S, lifeline_fd) as box:
        handle = ffi.cast("xd_mailbox *", box.address)
        for size, num in zip(sizes, nums, strict=True):
            mine, everything = ffi.new("char[]", size), ffi.new("char[]", 2 * size)
            both = ffi.new("size_t[]", [size, size])
            swap = partial(lib.xd_mailbox_exchange, handle, 1, 0, mine, both, everything)
            times = _times(num, swap)
            box.check()
            rows.append({"bytes": size, **_percentiles(times)})
    return {"rows": rows}


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


def _times(num: int, call: Callable[[], int]) -> list[float]:
    """Microseconds of each call, stopping at the first that fails."""
    times = []
    for _ in range(num + num // 10 + 2):
        start = time.perf_counter()
        if call() != 0:
            break
        times.append((time.perf_counter() - start) * 1e6)
    return times[-num:]


def _percentiles(times_us: list[float]) -> Answer:
    ordered = sorted(times_us) or [0.0]
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
    print(json.dumps(JOBS[name](**json.loads(arguments))))


if __name__ == "__main__":
    main()
