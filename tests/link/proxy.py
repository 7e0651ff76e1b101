"""A man in the middle of a TCP link: it passes everything on, and does something wrong to one frame."""

import contextlib
import socket
import struct
import threading
from collections.abc import Callable
from dataclasses import replace

from expertd.link import connection, handshake
from expertd.link.messages import LinkPeer
from tests.link.hosts import ADDRESS

# Bytes of a connection before its first frame: what the caller says, and what the listener says.
CALLER_BYTES = handshake._HELLO.size + handshake.PROOF_BYTES
LISTENER_BYTES = handshake.NONCE_BYTES + handshake.PROOF_BYTES + len(handshake.WELCOME)

Wrong = Callable[[bytes], bytes]  # what becomes of a frame


class Proxy:
    """Between a caller and the host it calls. `wrong` is done to round frame `number` (from 1) of the caller."""

    def __init__(self, wrong: Wrong, number: int) -> None:
        self._wrong, self._number, self._seen = wrong, number, 0
        self._server = socket.create_server((ADDRESS, 0))
        self._sockets: list[socket.socket] = []

    def through(self, peer: LinkPeer) -> LinkPeer:
        """Start, and give where to call instead."""
        threading.Thread(target=self._serve, args=(peer,), daemon=True).start()
        return replace(peer, port=self._server.getsockname()[1])

    def _serve(self, peer: LinkPeer) -> None:
        caller, _ = self._server.accept()
        listener = socket.create_connection((peer.address, peer.port))
        self._sockets = [caller, listener]
        for arguments in ((caller, listener, CALLER_BYTES, True), (listener, caller, LISTENER_BYTES, False)):
            threading.Thread(target=self._pass, args=arguments, daemon=True).start()

    def _pass(self, source: socket.socket, target: socket.socket, before: int, spoil: bool) -> None:
        try:
            with source.makefile("rb") as stream:
                while before and (said := stream.read1(before)):
                    target.sendall(said)
                    before -= len(said)
                while head := stream.read(connection.HEADER_BYTES):
                    (length,) = struct.unpack_from("<I", head, 48)
                    frame = head + stream.read(length)
                    is_round = frame[5] == connection.ROUND and length > 0
                    self._seen += spoil and is_round
                    chosen = spoil and is_round and self._seen == self._number
                    target.sendall(self._wrong(frame) if chosen else frame)
        except OSError:
            pass
        for sock in (source, target):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._server.close()
        for sock in self._sockets:
            sock.close()
