"""Ranks that start in a moment: forked from one process that has imported all they need, instead of each anew.

    async with forked_ranks(): ...   every rank that is spawned inside comes from it

What a rank does is the same; only its first two seconds, which are imports, are done once. It may be forked because MLX
starts no thread before it computes.
"""

import array
import asyncio
import fcntl
import gc
import json
import os
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from expertd.cluster import process
from expertd.cluster.supervisor import RANK_MODULE

MAX_BYTES = 4096
LOWEST_FREE_FD = 500


class ForkedProcess:
    """What ChildProcess needs of an asyncio process."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self._ended = asyncio.Event()

    def end(self, code: int) -> None:
        self.returncode = code
        self._ended.set()

    async def wait(self) -> int:
        await self._ended.wait()
        assert self.returncode is not None
        return self.returncode


class Nursery:
    """Our end of the socket to the process that forks."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._born: asyncio.Queue[ForkedProcess] = asyncio.Queue()
        self._living: dict[int, ForkedProcess] = {}
        sock.setblocking(False)
        asyncio.get_running_loop().add_reader(sock, self._hear)

    async def start(self, module: str, control_fd: int, fds: tuple[int, ...]) -> ForkedProcess:
        """As process._start_python."""
        assert module == RANK_MODULE
        data = json.dumps({"control_fd": control_fd, "fds": fds}).encode()
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))]
        self._sock.sendmsg([data], ancillary)
        return await self._born.get()

    def _hear(self) -> None:
        message: dict[str, int] = json.loads(self._sock.recv(MAX_BYTES))
        if "born" in message:
            child = self._living[message["born"]] = ForkedProcess(message["born"])
            self._born.put_nowait(child)
        else:
            self._living.pop(message["gone"]).end(message["code"])

    def close(self) -> None:
        asyncio.get_running_loop().remove_reader(self._sock)
        self._sock.close()


@asynccontextmanager
async def forked_ranks() -> AsyncIterator[None]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    command = [sys.executable, "-m", "tests.cluster.forked", str(theirs.fileno())]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p or os.getcwd() for p in sys.path)}
    with subprocess.Popen(command, pass_fds=[theirs.fileno()], env=environment) as parent:
        theirs.close()
        nursery, before = Nursery(ours), process._start_python
        process._start_python = nursery.start  # type: ignore[assignment]
        try:
            yield
        finally:
            process._start_python = before
            nursery.close()
            parent.wait(10)


# The process that forks.


def main() -> None:
    sock = socket.socket(fileno=int(sys.argv[1]))
    import_all()
    sock.settimeout(0.02)
    while True:
        try:
            data, fds, _, _ = socket.recv_fds(sock, MAX_BYTES, 16)
        except TimeoutError:
            data = b"{}"
        if not data:
            return
        if request := json.loads(data):
            sock.send(json.dumps({"born": fork(sock, request, fds)}).encode())
        reap(sock)


def import_all() -> None:
    """What a rank imports before it reads a weight."""
    import mlx_lm.utils
    import transformers

    import expertd.cluster.rank
    import expertd.engine.engine
    import expertd.engine.runner
    import expertd.link.mailbox
    import expertd.model.kernels
    import expertd.model.model

    transformers.AutoTokenizer  # noqa: B018  # it is lazy
    assert mlx_lm.utils and expertd.cluster.rank
    gc.collect()  # each rank does so before it is ready: half of the time that it needs
    gc.freeze()


def fork(sock: socket.socket, request: dict[str, Any], fds: list[int]) -> int:
    pid = os.fork()
    if pid:
        for fd in fds:
            os.close(fd)
        return pid
    sock.close()
    os.setpgid(0, 0)
    # Above all that are wanted first, so that none is overwritten before its turn.
    high = [fcntl.fcntl(fd, fcntl.F_DUPFD, LOWEST_FREE_FD) for fd in fds]
    for fd, wanted in zip(high, request["fds"], strict=True):
        os.dup2(fd, wanted)
    for fd in {*fds, *high} - set(request["fds"]):
        os.close(fd)
    from expertd.cluster import rank

    sys.argv = ["rank", str(request["control_fd"])]
    try:
        rank.main()
    finally:
        os._exit(1)


def reap(sock: socket.socket) -> None:
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if not pid:
            return
        sock.send(json.dumps({"gone": pid, "code": os.waitstatus_to_exitcode(status)}).encode())


if __name__ == "__main__":
    main()
