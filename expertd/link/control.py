"""A child process's end of the control socket to its supervisor: a reading thread, and sends with a deadline."""

import os
import queue
import select
import socket
import threading
from collections.abc import Callable
from typing import Any, TypeVar

from expertd.errors import RemoteProtocolError
from expertd.wire import Codec

T = TypeVar("T")

# The supervisor reads at once; one that does not for this long is stuck, and its children must not be.
SEND_TIMEOUT_S = 30.0


def exit_now() -> None:
    """End the process without a tidy end."""
    os._exit(0)


class Control:
    """`inbox` holds what the supervisor has said. `on_end` runs on the reading thread when it hangs up.

    By default that ends the process: whatever it is doing is wanted no more.
    """

    def __init__(self, sock: socket.socket, codec: Codec, on_end: Callable[[], None] = exit_now) -> None:
        self._sock, self._codec, self._on_end = sock, codec, on_end
        self.inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def start(self) -> None:
        threading.Thread(target=self._read, name="control", daemon=True).start()

    def take(self, kind: type[T]) -> T:
        """Wait for the next message, which must be of this kind. Raises RemoteProtocolError."""
        message = self.inbox.get()
        if not isinstance(message, kind):
            raise RemoteProtocolError(f"found {type(message).__name__}, wanted {kind.__name__}")
        return message

    def send(self, message: Any) -> None:
        """Send a message whole. Ends the process when the supervisor does not read it within SEND_TIMEOUT_S."""
        data = memoryview(self._codec.encode(message))
        while data:
            _, writable, _ = select.select([], [self._sock], [], SEND_TIMEOUT_S)
            if not writable:
                os._exit(1)
            try:
                data = data[self._sock.send(data, socket.MSG_DONTWAIT) :]
            except BlockingIOError:
                continue
            except OSError:
                return  # It has hung up; the reading thread knows what that means.

    def _read(self) -> None:
        decoder = self._codec.decoder()
        try:
            while data := self._receive():
                for message in decoder.feed(data):
                    self.inbox.put(message)
        except RemoteProtocolError as e:
            self.inbox.put(e)
        self._on_end()

    def _receive(self) -> bytes:
        try:
            return self._sock.recv(1 << 16)
        except OSError:
            return b""
