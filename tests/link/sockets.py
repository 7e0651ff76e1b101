"""Both ends of a TCP connection over loopback, and frames made by hand: the peer that breaks the rules."""

import contextlib
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from typing import Any

from expertd.link.connection import HEADER_BYTES, LATENCY, TEST, Connection
from expertd.native._transport import lib

EPOCH = 7
MAGIC, VERSION = 0x31746478, 1
_HEADER = struct.Struct("<IBBBBIIQQQIIIII")  # all but the header's own checksum
TINY = 4096  # bytes of socket buffers: no frame of full size goes out, or comes in, at once
DEADLINE_S = 20.0  # far beyond what any of this takes


def tcp_pair(buffer_bytes: int = 0) -> tuple[socket.socket, socket.socket]:
    """Two connected sockets; `buffer_bytes` makes the buffers of both as small as the system allows."""
    with socket.socket() as server, contextlib.ExitStack() as stack:
        mine = stack.enter_context(socket.socket())
        for s in (server, mine):
            if buffer_bytes:
                s.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, buffer_bytes)
                s.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer_bytes)
        server.bind(("127.0.0.1", 0))
        server.listen(1)
        mine.connect(server.getsockname())
        theirs, _ = server.accept()
        stack.pop_all()
        return mine, theirs


@contextlib.contextmanager
def connections(buffer_bytes: int = 0) -> Iterator[tuple[Connection, Connection]]:
    a, b = tcp_pair(buffer_bytes)
    with Connection.from_socket(a, EPOCH) as left, Connection.from_socket(b, EPOCH) as right:
        yield left, right


@contextlib.contextmanager
def against_hand() -> Iterator[tuple[Connection, socket.socket]]:
    """A connection, and the bare socket at its other end."""
    a, b = tcp_pair()
    b.settimeout(DEADLINE_S)
    with Connection.from_socket(a, EPOCH) as connection, b:
        yield connection, b


def crc32c(data: bytes) -> int:
    return int(lib.xd_crc32c_table(0, data, len(data)))


def frame(payload: bytes = b"", **fields: Any) -> bytes:
    """A right frame of kind XD_TEST with sequence 1, but for the given fields of xd_header."""
    values = {
        "magic": MAGIC,
        "version": VERSION,
        "kind": TEST,
        "queue": LATENCY,
        "source": 0,
        "epoch": EPOCH,
        "tag": 0,
        "sequence": 1,
        "round": 0,
        "digest": 0,
        "offset": 0,
        "total": len(payload),
        "length": len(payload),
        "credits": 0,
        "payload_crc": crc32c(payload),
    }
    assert fields.keys() <= values.keys()
    head = _HEADER.pack(*(values | fields).values())
    return head + struct.pack("<I", crc32c(head)) + payload


def read_frame(s: socket.socket) -> dict[str, int]:
    """Take one frame off a bare socket; the fields of its header."""
    head = _read(s, HEADER_BYTES)
    names = ["magic", "version", "kind", "queue", "source", "epoch", "tag", "sequence", "round", "digest"]
    names += ["offset", "total", "length", "credits", "payload_crc"]
    fields = dict(zip(names, _HEADER.unpack(head[:-4]), strict=True))
    _read(s, fields["length"])
    return fields


def _read(s: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        piece = s.recv(size - len(data))
        assert piece, "the connection ended"
        data += piece
    return data


def together(*works: Callable[[], Any]) -> list[Any]:
    """Run each work on a thread of its own; what each gave, or the exception that it raised."""
    results: list[Any] = [None] * len(works)

    def run(i: int) -> None:
        try:
            results[i] = works[i]()
        except Exception as e:
            results[i] = e

    threads = [threading.Thread(target=run, args=(i,), daemon=True) for i in range(len(works))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(2 * DEADLINE_S)  # every call ends before that
        assert not thread.is_alive(), "an end waits for ever"
    return results
