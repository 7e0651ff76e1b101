"""What processes do for test_verbs.py and test_verbs_temper.py: one end of a link each, joined by a side socket.

python verbs_jobs.py JOB HOST SIDE_FD ARGS    prints {"result": ...} or {"error": ..., "code": ..., "text": ...}
"""

import json
import os
import random
import socket
import struct
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from expertd.errors import ExpertdError
from expertd.link import codes, verbs
from expertd.link.connection import BULK, LATENCY, ROUND, Connection
from expertd.link.verbs import Config, Verbs
from expertd.native._transport import ffi, lib

POOL = random.Random("pool").randbytes(1 << 20)


class Failed(Exception):
    """A connection failed; the arguments are the code's name and the reason."""


def swap_side(side: socket.socket, mine: bytes) -> bytes:
    """Both ends say something of the same size."""
    theirs = b""
    try:
        side.sendall(mine)
        while len(theirs) < len(mine):
            piece = side.recv(len(mine) - len(theirs))
            if not piece:
                raise Failed("side", "the peer is gone")
            theirs += piece
    except ConnectionError:
        raise Failed("side", "the peer is gone") from None
    return theirs


def connect(
    side: socket.socket, config: dict[str, Any], forge: dict[str, int] | None = None, epoch: int = 1
) -> Connection:
    """Open this end and join the other. `forge` changes words of what the other end said of itself."""
    v = Verbs(Config(**config))
    try:
        words = list(struct.unpack("<11I16s", swap_side(side, v.local)))
        for index, word in (forge or {}).items():
            words[int(index)] = word
        v.connect(struct.pack("<11I16s", *words))
        swap_side(side, b"connected")
        return Connection(v.start(epoch, side.fileno()))
    finally:
        v.close()


def frames(seed: int, host: int, num_frames: int) -> Iterator[tuple[int, bytes]]:
    """The queue and the bytes of every frame that `host` sends: both ends can compute them."""
    rng = random.Random(f"{seed} {host}")
    for _ in range(num_frames):
        queue = rng.choice([LATENCY, LATENCY, BULK])
        most = (16 if queue == LATENCY else 128) * 1024 - 64
        size = rng.choice([0, 1, most - 1, most, rng.randrange(most + 1)])
        at = rng.randrange(len(POOL) - size)
        yield queue, POOL[at : at + size]


def exchange(connection: Connection, host: int, num_out: int, num_in: int, timeout_s: float = 30) -> int:
    """Send and take random frames until all are there; gives the bytes that came, all of them compared."""
    outgoing, num_taken, num_bytes = list(frames(7, host, num_out))[::-1], 0, 0
    wanted: dict[int, list[bytes]] = {LATENCY: [], BULK: []}
    for queue, payload in frames(7, 1 - host, num_in):
        wanted[queue].append(payload)
    for pile in wanted.values():
        pile.reverse()
    end = time.monotonic() + timeout_s
    while outgoing or num_taken < num_in:
        moved = False
        if outgoing and connection.send(ROUND, outgoing[-1][1], queue=outgoing[-1][0]):
            outgoing.pop()
            moved = True
        if got := connection.receive():
            assert got[1] == wanted[got[0].queue].pop(), f"frame {num_taken} is wrong"
            num_taken, num_bytes, moved = num_taken + 1, num_bytes + len(got[1]), True
        if not moved:
            if time.monotonic() > end:
                raise Failed("silence", f"{len(outgoing)} frames left to send, {num_taken} of {num_in} came")
            time.sleep(0.0001)
    return num_bytes


def pair(
    side: socket.socket,
    host: int,
    config: dict[str, Any],
    forge: dict[str, int] | None = None,
    num_tests: int = 0,
    num_frames: int = 0,
    one_way: bool = False,
    idle_s: float = 0,
    warm_up_s: float = 5,
    swaps: int = 0,
    swap_s: float = 10,
    epoch: int = 1,
    timeout_s: float = 30,
) -> dict[str, Any]:
    """A link from opening to closing; `one_way`: only host 0 sends frames."""
    with connect(side, config, forge, epoch) as connection:
        try:
            if warm_up_s:
                connection.warm_up(warm_up_s)
                swap_side(side, b"warm")  # over verbs the two queues have no order between them
            trips = [connection.self_test(host == 0, q, num_tests, 20) for q in (LATENCY, BULK)]
            counts = (num_frames, 0)[host], (0, num_frames)[host]
            sends, takes = counts if one_way else (num_frames, num_frames)
            num_bytes = exchange(connection, host, sends, takes, timeout_s)
            time.sleep(idle_s)
            for i in range(swaps):
                assert connection.swap(POOL[:5000], 5000, tag=i, timeout_s=swap_s) == POOL[:5000]
            swap_side(side, b"done")
        except ExpertdError:
            err = codes.buffer()
            code = lib.xd_connection_failure(connection.handle, err, len(err))
            raise Failed(codes.name(code), codes.text(err)) from None
        return {"trips": trips, "bytes": num_bytes, "statistics": asdict(connection.statistics())}


def reopen(side: socket.socket, host: int, config: dict[str, Any], times: int) -> list[int]:
    """Set up one connection after another in one process: the numbers of the warm-ups that worked."""
    worked = []
    for attempt in range(times):
        with connect(side, config) as connection:
            try:
                connection.warm_up(1.0)
                worked.append(attempt)
            except ExpertdError:
                pass
            swap_side(side, b"x")
    return worked


def open_only(side: socket.socket, host: int, config: dict[str, Any], times: int = 1) -> list[str]:
    """Open and close; the endpoints in hex."""
    endpoints = []
    for _ in range(times):
        with Verbs(Config(**config)) as v:
            endpoints.append(v.local.hex())
    return endpoints


def twice(side: socket.socket, host: int, config: dict[str, Any]) -> None:
    """Connect the same queue pairs again."""
    with Verbs(Config(**config)) as v:
        remote = swap_side(side, v.local)
        for _ in range(2):
            v.connect(remote)
            swap_side(side, b"x")


def list_devices(side: socket.socket, host: int, library: str) -> list[dict[str, Any]]:
    """All devices."""
    return [asdict(d) for d in verbs.devices(library)]


def die(side: socket.socket, host: int, config: dict[str, Any]) -> str:
    """Host 1 dies without a word; host 0 sends on, and gives what it hears of it."""
    connection = connect(side, config)
    connection.warm_up(5)
    if host == 1:
        os._exit(0)
    end = time.monotonic() + 10
    try:
        while time.monotonic() < end:
            connection.send(ROUND, b"are you there", queue=LATENCY)
            connection.receive()
        return "nothing"
    except ExpertdError:
        err = codes.buffer()
        code = codes.name(lib.xd_connection_failure(connection.handle, err, len(err)))
        return f"{code}: {codes.text(err)}"
    finally:
        connection.close()


def main() -> None:
    job, host, side_fd, args = sys.argv[1:]
    side = socket.socket(fileno=int(side_fd))
    side.settimeout(20)
    try:
        print(json.dumps({"result": globals()[job](side, int(host), **json.loads(args))}))
    except Failed as e:
        print(json.dumps({"error": "Failed", "code": e.args[0], "text": e.args[1]}))
    except ExpertdError as e:
        print(json.dumps({"error": type(e).__name__, "code": "", "text": str(e)}))
    assert ffi


if __name__ == "__main__":
    main()
