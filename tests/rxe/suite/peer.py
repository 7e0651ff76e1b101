"""One end of a verbs connection, a process on a host of its own: python peer.py SETTINGS (JSON).

It opens the connection as a link process does, prints {"up": ...}, does its job until that is done or the connection
fails, and prints what came of it as one more line.
"""

import contextlib
import json
import random
import socket
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

from expertd.errors import ExpertdError
from expertd.link import codes
from expertd.link.connection import BULK, LATENCY, ROUND, Connection
from expertd.link.verbs import Config, Verbs
from expertd.native._transport import ffi, lib

PORT = 7077
SETUP_S = 60.0  # ten times what a real machine needs, as all limits here


def side_connection(listen: bool, address: str) -> socket.socket:
    """The TCP connection beside the cable: one end listens, the other calls until it is there."""
    if listen:
        with socket.create_server((address, PORT)) as listener:
            listener.settimeout(SETUP_S)
            sock, _ = listener.accept()
            return sock
    deadline = time.monotonic() + SETUP_S
    while True:
        try:
            return socket.create_connection((address, PORT), SETUP_S)
        except ConnectionRefusedError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)


def swap(side: socket.socket, mine: bytes) -> bytes:
    """Both ends give as many bytes as they take."""
    side.sendall(mine)
    theirs = bytearray()
    while len(theirs) < len(mine):
        piece = side.recv(len(mine) - len(theirs))
        if not piece:
            raise ConnectionError("the other end has closed the side connection")
        theirs += piece
    return bytes(theirs)


def open_connection(side: socket.socket, local_ip: str, epoch: int = 1) -> tuple[Connection, dict[str, Any]]:
    """Verbs as expertd.link.verbs says, warm; with the device and the port's MTU."""
    with Verbs(Config(local_ip, lint=True)) as end:
        local = end.local
        end.connect(swap(side, local))
        swap(side, b"!")  # all receives are posted
        connection = Connection(end.start(epoch, side.fileno()))
        connection.warm_up(SETUP_S)
        swap(
            side, b"!"
        )  # the queues may overtake each other: no frame may come while the other end is not done
        return connection, {"device": end.device, "mtu": ffi.from_buffer("xd_verbs_endpoint *", local).mtu}


Frame = tuple[int, bytes]


def random_frames(seed: str, connection: Connection, num_frames: int) -> Iterator[Frame]:
    """Queue and payload of frame after frame; sizes favour the edges of packets, 4 KiB frames and messages."""
    dice = random.Random(seed)
    for _ in range(num_frames):
        queue = dice.choice([LATENCY] * 7 + [BULK])
        most = connection.max_payload(queue)
        edges = [0, 1, 960, 961, 4031, 4032, 4033, most - 1, most]
        yield queue, dice.randbytes(min(most, dice.choice([*edges, dice.randrange(most)])))


def job_frames(connection: Connection, settings: dict[str, Any]) -> dict[str, Any]:
    """Random frames both ways at once; every one that comes must be the next that the other end sent."""
    num_frames, me = settings["num_frames"], settings["listen"]
    outgoing = random_frames(f"frames of {me}", connection, num_frames)
    expected: dict[int, list[bytes]] = {LATENCY: [], BULK: []}
    for queue, payload in random_frames(f"frames of {not me}", connection, num_frames):
        expected[queue].append(payload)
    seen = {LATENCY: 0, BULK: 0}
    result = {"sent": 0, "received": 0, "wrong": 0}
    ready = next(outgoing, None)
    deadline = time.monotonic() + settings["limit_s"]
    with watched(connection, result):
        while (ready or result["received"] < num_frames) and time.monotonic() < deadline:
            if ready and connection.send(ROUND, ready[1], queue=ready[0], tag=7):
                result["sent"] += 1
                ready = next(outgoing, None)
            if came := connection.receive():
                queue = came[0].queue
                result["wrong"] += came[1] != expected[queue][seen[queue]]
                seen[queue] += 1
                result["received"] += 1
    return result


def job_swaps(connection: Connection, settings: dict[str, Any]) -> dict[str, Any]:
    """Swap after swap, as decode steps do, until the connection fails or `num_frames` are done."""
    result = {"swaps": 0, "wrong": 0}
    me, size = settings["listen"], settings["swap_bytes"]
    mine, theirs = random.Random(f"swaps of {me}"), random.Random(f"swaps of {not me}")
    with watched(connection, result):
        while result["swaps"] < settings["num_frames"]:
            got = connection.swap(mine.randbytes(size), size, timeout_s=settings["limit_s"])
            result["wrong"] += got != theirs.randbytes(size)
            result["swaps"] += 1
    return result


def job_self_test(connection: Connection, settings: dict[str, Any]) -> dict[str, Any]:
    """Round trips in µs of each queue, at the listening end."""
    first, num = settings["listen"], settings["num_frames"]
    return {
        "latency_us": connection.self_test(first, LATENCY, num, settings["limit_s"]),
        "bulk_us": connection.self_test(first, BULK, num, settings["limit_s"]),
    }


@contextlib.contextmanager
def watched(connection: Connection, result: dict[str, Any]) -> Iterator[None]:
    """Turn the connection's failure into a part of the result; "" when there was none."""
    with contextlib.suppress(ExpertdError):
        yield
    err = ffi.new("char[240]")
    code = lib.xd_connection_failure(connection.handle, err, len(err))
    result["failure"] = codes.name(code) if code else ""
    result["reason"] = ffi.string(err).decode()


JOBS: dict[str, Callable[[Connection, dict[str, Any]], dict[str, Any]]] = {
    "frames": job_frames,
    "swaps": job_swaps,
    "self_test": job_self_test,
}


def main() -> None:
    """Set up, do the job, report."""
    settings = json.loads(sys.argv[1])
    with side_connection(settings["listen"], settings["side_address"]) as side:
        side.settimeout(SETUP_S)
        connection, chosen = open_connection(side, settings["local_ip"])
        with connection:
            print(json.dumps({"up": chosen}), flush=True)
            start = time.monotonic()
            result = JOBS[settings["job"]](connection, settings)
            result |= {"took_s": time.monotonic() - start, "statistics": asdict(connection.statistics())}
            print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
