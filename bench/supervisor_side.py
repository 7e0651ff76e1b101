"""The stub engine of bench/supervisor.py: a rank that computes nothing and says a token for every stream, once a step.

It speaks as cluster/rank.py does: all that a step says in one write. Its checkpoint's name is the length of a step, in
milliseconds.
"""

import os
import select
import socket
import sys
import time

from expertd.engine.messages import Begin, Cancel, Done, Ready, Setup, Started, Submit, Token, codec
from expertd.link.mailbox import Mailbox

CONTEXT_LENGTH = 1 << 20


class Stub:
    def __init__(self, control: socket.socket) -> None:
        self._control, self._decoder = control, codec.decoder()
        self._outbox = bytearray()
        self._open: dict[str, list[int]] = {}  # tokens said, tokens wanted
        self._pace_s = 0.0

    def run(self) -> None:
        """Step until the supervisor is gone."""
        due = time.monotonic()
        while True:
            self._read(max(0.0, due - time.monotonic()) if self._open else None)
            if self._open and time.monotonic() >= due:
                self._step()
                due = time.monotonic() + self._pace_s
            self._control.sendall(self._outbox)
            self._outbox.clear()

    def _read(self, timeout_s: float | None) -> None:
        if not select.select([self._control], [], [], timeout_s)[0]:
            return
        data = self._control.recv(1 << 16)
        if not data:
            os._exit(0)
        for message in self._decoder.feed(data):
            self._take(message)

    def _take(self, message: object) -> None:
        if isinstance(message, Setup):
            self._setup, self._pace_s = message, float(message.group["checkpoint"]) / 1e3
            self._channel = socket.socket(fileno=message.fd_channel)
            self._outbox += codec.encode(
                Ready(message.rank, "stub", CONTEXT_LENGTH, 1000, 8, 2, ["solo"], 0.1)
            )
        elif isinstance(message, Begin):
            _, (fd,), _, _ = socket.recv_fds(self._channel, 8, 1)
            self._mailbox = Mailbox(fd, message.rank, message.num_ranks, lifeline_fd=self._setup.lifeline_fd)
            os.close(fd)
        elif isinstance(message, Submit):
            self._open[message.request_id] = [0, message.max_tokens or 16]
            self._outbox += codec.encode(Started(message.request_id, 10))
        elif isinstance(message, Cancel):
            self._open.pop(message.request_id, None)

    def _step(self) -> None:
        for request_id, counts in list(self._open.items()):
            counts[0] += 1
            self._outbox += codec.encode(Token(request_id, [counts[0]], "word "))
            if counts[0] == counts[1]:
                del self._open[request_id]
                self._outbox += codec.encode(
                    Done(request_id, "length", 10, counts[0], 100.0, 10.0, "solo", 1)
                )


if __name__ == "__main__":
    Stub(socket.socket(fileno=int(sys.argv[1]))).run()
