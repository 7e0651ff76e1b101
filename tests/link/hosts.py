"""Several hosts on this machine: each has its own mailbox and a real link process; what a supervisor does, done here.

run_hosts("tests/jobs.py", "job", num_ranks=[1, 1], args={...}) -> what each rank's job(mailbox, **args) gave (JSON)
"""

import contextlib
import os
import secrets
import select
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from expertd.link import mailbox
from expertd.link.messages import (
    LinkConnect,
    LinkDown,
    LinkListening,
    LinkPeer,
    LinkSetup,
    LinkUp,
    codec,
)
from tests import ranks

ADDRESS = "127.0.0.1"
LOOPBACK = "lo0" if sys.platform == "darwin" else "lo"
DEADLINE_S = 60.0
# A live peer must not be taken for dead because the machine that runs the tests is busy.
PATIENT_S = 20.0

Environment = dict[str, str]


class Host:
    """One host: its mailbox, its link process, and what that has said so far."""

    def __init__(
        self,
        index: int,
        num_ranks: Sequence[int],
        slot_bytes: int,
        environment: Environment,
        launcher: Sequence[str] = (),
    ) -> None:
        self.index, self.num_ranks = index, list(num_ranks)
        self.ranks = range(sum(num_ranks[:index]), sum(num_ranks[: index + 1]))
        self.mailbox_fd = mailbox.create(sum(num_ranks), slot_bytes)
        self._control, theirs = socket.socketpair()
        self._lifeline_fd, self.lifeline = os.pipe()
        self._decoder, self._heard = codec.decoder(), list[Any]()
        self.down: LinkDown | None = None
        self._watcher: threading.Thread | None = None
        with theirs:
            self.process = subprocess.Popen(
                [*launcher, sys.executable, "-P", "-m", "expertd.link.process", str(theirs.fileno())],
                pass_fds=(theirs.fileno(), self.mailbox_fd, self._lifeline_fd),
                env={**os.environ, **environment},
            )

    def set_up(self, **settings: Any) -> None:
        defaults: dict[str, Any] = {
            "epoch": 1,
            "kind": "tcp",
            "silence_s": PATIENT_S,
            "setup_s": DEADLINE_S,
            "listen": ADDRESS if self.index < len(self.num_ranks) - 1 else "",
        }
        own = {"host": self.index, "num_ranks": self.num_ranks, "mailbox_fd": self.mailbox_fd}
        self.send(LinkSetup(**defaults | settings | own, lifeline_fd=self._lifeline_fd))

    def send(self, message: Any) -> None:
        self._control.sendall(codec.encode(message))

    def hear(self, timeout_s: float = DEADLINE_S) -> Any:
        """The next thing that the link process says; None when it has hung up."""
        deadline = time.monotonic() + timeout_s
        while not self._heard:
            ready, _, _ = select.select([self._control], [], [], max(0, deadline - time.monotonic()))
            assert ready, f"host {self.index}: its link process says nothing"
            try:
                data = self._control.recv(1 << 16)
            except OSError:
                data = b""
            if not data:
                return None
            self._heard += self._decoder.feed(data)
        return self._heard.pop(0)

    def watch(self) -> None:
        """From now on end the ranks' epoch when the link process ends, as the supervisor does."""
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        self._watcher.start()

    def _watch(self) -> None:
        while (message := self.hear(3600)) is not None:
            self.down = message
        reason = self.down.reason if self.down else f"the link process of host {self.index} has died"
        with contextlib.suppress(OSError):
            mailbox.poison(self.mailbox_fd, reason)

    def wait_down(self, timeout_s: float = DEADLINE_S) -> LinkDown:
        """Why the link process ended, once it has."""
        assert self._watcher
        self._watcher.join(timeout_s)
        assert self.down, f"host {self.index}: its link process has given no reason"
        assert self.process.wait(timeout_s) == 0
        return self.down

    def start_rank(
        self, file: Path, job: str, rank: int, args: dict[str, Any] | None = None, **mailbox_args: Any
    ) -> "subprocess.Popen[str]":
        mailbox_args = {"pulse_timeout_s": PATIENT_S} | mailbox_args
        return ranks.start_rank(
            file, job, self.mailbox_fd, rank, sum(self.num_ranks), args or {}, mailbox_args
        )

    def hang_up(self) -> None:
        """Let go of the link process, which must end by itself."""
        with contextlib.suppress(OSError):
            self._control.shutdown(socket.SHUT_RDWR)
        if self.lifeline >= 0:
            os.close(self.lifeline)
            self.lifeline = -1

    def close(self) -> None:
        self.hang_up()
        self.process.kill()
        self.process.wait()
        if self._watcher:
            self._watcher.join()
        self._control.close()
        os.close(self._lifeline_fd)
        os.close(self.mailbox_fd)


def peer_of(listening: LinkListening, host: int, of: int) -> LinkPeer:
    return LinkPeer(host, ADDRESS, listening.port if host < of else 0, ADDRESS, LOOPBACK)


def connect(
    hosts: Sequence[Host], through: Callable[[int, LinkPeer], LinkPeer] = lambda _, peer: peer
) -> None:
    """Tell every link process where the others listen; `through(caller, peer)` may lead a call elsewhere."""
    listening = [host.hear() for host in hosts]
    for host, said in zip(hosts, listening, strict=True):
        assert isinstance(said, LinkListening), f"host {host.index}: {said}"
    for host in hosts:
        others = [h for h in range(len(hosts)) if h != host.index]
        peers = [through(host.index, peer_of(listening[h], h, host.index)) for h in others]
        host.send(LinkConnect(peers))


@contextlib.contextmanager
def spawn_hosts(
    num_ranks: Sequence[int], slot_bytes: int = 1 << 16, environments: Sequence[Environment] = ()
) -> Iterator[list[Host]]:
    """Link processes that have not been told anything yet; `environments` has what is special for each."""
    with contextlib.ExitStack() as stack:
        hosts = []
        for index in range(len(num_ranks)):
            environment = environments[index] if environments else {}
            hosts.append(Host(index, num_ranks, slot_bytes, environment))
            stack.callback(hosts[-1].close)
        yield hosts


@contextlib.contextmanager
def open_hosts(
    num_ranks: Sequence[int],
    slot_bytes: int = 1 << 16,
    through: Callable[[int, LinkPeer], LinkPeer] = lambda _, peer: peer,
    environments: Sequence[Environment] = (),
    **settings: Any,
) -> Iterator[list[Host]]:
    """Hosts whose link is up; `settings` are fields of LinkSetup."""
    with spawn_hosts(num_ranks, slot_bytes, environments) as hosts:
        secret = secrets.token_bytes(32)
        for host in hosts:
            host.set_up(secret=secret, **settings)
        connect(hosts, through)
        for host in hosts:
            said = host.hear()
            assert isinstance(said, LinkUp), f"host {host.index}: {said}"
            host.watch()
        yield hosts


def run_hosts(
    file: Path,
    job: str,
    num_ranks: Sequence[int],
    args: dict[str, Any] | None = None,
    timeout_s: float = 120,
    slot_bytes: int = 1 << 16,
    environments: Sequence[Environment] = (),
    **settings: Any,
) -> list[Any]:
    """Run the job on every rank of every host and wait for all; a rank that fails fails the test."""
    with spawn_hosts(num_ranks, slot_bytes, environments) as hosts:
        secret = secrets.token_bytes(32)
        processes = [host.start_rank(file, job, rank, args) for host in hosts for rank in host.ranks]
        try:
            for host in hosts:
                host.set_up(secret=secret, **settings)
            connect(hosts)
            for host in hosts:
                said = host.hear()
                assert isinstance(said, LinkUp), f"host {host.index}: {said}"
                host.watch()
        except BaseException:
            for process in processes:
                process.kill()
                process.communicate()
            raise
        return ranks.results_of(processes, timeout_s)
