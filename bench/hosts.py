"""Two hosts on one machine, for measuring: each has a mailbox and a link process, joined by TCP or verbs."""

import os
import secrets
import select
import socket
import subprocess
import sys
import time
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Any

import psutil

from expertd.errors import ClusterError
from expertd.link import mailbox
from expertd.link.messages import LinkConnect, LinkDown, LinkListening, LinkPeer, LinkSetup, LinkUp, codec

SETUP_S = 30.0
SILENCE_S = 10.0  # as patient as the sides: a busy machine may starve a pinned process


@dataclass(frozen=True)
class Way:
    """How the two are joined: as in LinkSetup, both ends at one address of this machine."""

    kind: str = "tcp"
    address: str = "127.0.0.1"
    verbs_library: str = ""


def two_hosts(stack: ExitStack, slot_bytes: int, cores: list[int], way: Way | None = None) -> list[int]:
    """Give the mailboxes of two hosts with one rank each; cores[h], if given, is the core of host h's link process.

    All ends with `stack`. Raises ClusterError when the link does not come up.
    """
    way = way or Way()
    interface = interface_of(way.address)
    hosts = [_Host(stack, slot_bytes, cores[h : h + 1]) for h in range(2)]
    secret = secrets.token_bytes(32)
    for h, host in enumerate(hosts):
        host.set_up(h, secret, way)
    ports = [host.hear(LinkListening).port for host in hosts]
    for h, host in enumerate(hosts):
        port = ports[0] if h == 1 else 0  # the host with the lower index listens
        host.send(LinkConnect([LinkPeer(1 - h, way.address, port, way.address, interface)]))
    for host in hosts:
        host.hear(LinkUp)
    return [host.mailbox_fd for host in hosts]


def interface_of(address: str) -> str:
    """The interface of this machine that has an IPv4 address. Raises ClusterError when none has it."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(a.address == address for a in addresses):
            return name
    raise ClusterError(f"no interface of this machine has the address {address}")


class _Host:
    def __init__(self, stack: ExitStack, slot_bytes: int, cores: list[int]) -> None:
        self.mailbox_fd = mailbox.create(2, slot_bytes)
        stack.callback(os.close, self.mailbox_fd)
        self._lifeline_fd, lifeline = os.pipe()
        stack.callback(os.close, self._lifeline_fd)
        control, theirs = socket.socketpair()
        self._control = stack.enter_context(control)
        self._decoder, self._heard = codec.decoder(), list[Any]()
        with theirs:
            fds = (theirs.fileno(), self.mailbox_fd, self._lifeline_fd)
            process = subprocess.Popen(
                [sys.executable, "-m", "expertd.link.process", str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                pass_fds=fds,
                process_group=0,
            )
        stack.callback(_end, process, lifeline)
        if cores:
            os.sched_setaffinity(process.pid, cores)

    def set_up(self, host: int, secret: bytes, way: Way) -> None:
        self.send(
            LinkSetup(
                epoch=1,
                kind=way.kind,
                host=host,
                num_ranks=[1, 1],
                secret=secret,
                listen=way.address if host == 0 else "",
                mailbox_fd=self.mailbox_fd,
                lifeline_fd=self._lifeline_fd,
                silence_s=SILENCE_S,
                setup_s=SETUP_S,
                verbs_library=way.verbs_library,
            )
        )

    def send(self, message: LinkSetup | LinkConnect) -> None:
        self._control.sendall(codec.encode(message))

    def hear(self, kind: type) -> Any:
        """The next message, which must be of this kind. Raises ClusterError."""
        deadline = time.monotonic() + SETUP_S
        while not self._heard:
            ready, _, _ = select.select([self._control], [], [], max(0.0, deadline - time.monotonic()))
            data = self._control.recv(1 << 16) if ready else b""
            if not data:
                raise ClusterError(f"a link process sent no {kind.__name__} within {SETUP_S:g} s")
            self._heard += self._decoder.feed(data)
        message = self._heard.pop(0)
        if isinstance(message, LinkDown):
            raise ClusterError(f"the link between two processes failed: {message.reason}")
        if not isinstance(message, kind):
            raise ClusterError(f"a link process sent {type(message).__name__}, wanted {kind.__name__}")
        return message


def _end(process: "subprocess.Popen[bytes]", lifeline: int) -> None:
    with suppress(OSError):
        os.close(lifeline)
    process.kill()
    process.wait()
