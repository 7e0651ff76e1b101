"""One rank process as the supervisor sees it: a control socket, a lifeline, an end that is awaited.

The lifeline is a pipe on which nothing is ever written. The rank holds its read end, this process alone
holds its write end, so however we go (SIGKILL included) the rank reads the end of the pipe and exits.
Both our ends are close-on-exec, hence no later rank can inherit one and keep an earlier rank alive.
"""

import asyncio
import contextlib
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator
from typing import Self

from expertd.engine.messages import Decoder, Message, encode
from expertd.errors import ClusterError

# A rank has a thread that does nothing but read its control socket; one that leaves a frame unread
# for this long is stuck.
SEND_TIMEOUT_S = 10.0
READ_BYTES = 1 << 16


class RankProcess:
    """A running rank; make one with `spawn`, and always end it with `hang_up` and `wait_exit`."""

    def __init__(
        self,
        rank: int,
        process: asyncio.subprocess.Process,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        lifeline: int,
        lifeline_fd: int,
    ) -> None:
        self.rank = rank
        self.lifeline_fd = lifeline_fd
        self._process = process
        self._reader = reader
        self._writer = writer
        self._lifeline: int | None = lifeline

    @classmethod
    async def spawn(cls, rank: int, module: str, mailbox_fd: int) -> Self:
        """Start `python -m module CONTROL_FD` with its control socket, the mailbox and a lifeline.

        Raises ClusterError when the system refuses a process.
        """
        ours, theirs = socket.socketpair()
        lifeline_fd, lifeline = os.pipe()
        reader, writer = await asyncio.open_unix_connection(sock=ours, limit=READ_BYTES)
        try:
            fds = (theirs.fileno(), mailbox_fd, lifeline_fd)
            process = await _start_python(module, theirs.fileno(), fds)
        except BaseException as e:
            writer.close()
            os.close(lifeline)
            if isinstance(e, OSError):
                raise ClusterError(
                    f"rank {rank}: cannot start a process: {e}. Free memory or processes."
                ) from e
            raise
        finally:
            theirs.close()
            os.close(lifeline_fd)
        return cls(rank, process, reader, writer, lifeline, lifeline_fd)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def running(self) -> bool:
        return self._process.returncode is None

    def send_nowait(self, message: Message) -> None:
        """Queue a small frame; a rank that is gone gets nothing, silently: its end is reported elsewhere."""
        if not self._writer.is_closing():
            self._writer.write(encode(message))

    async def send(self, message: Message) -> None:
        """Send a frame and wait until most of it is on its way.

        Raises ClusterError when the rank does not read it within SEND_TIMEOUT_S seconds.
        """
        self.send_nowait(message)
        try:
            async with asyncio.timeout(SEND_TIMEOUT_S):
                await self._writer.drain()
        except TimeoutError as e:
            raise ClusterError(
                f"rank {self.rank} has not read its control socket for {SEND_TIMEOUT_S:g} s. Restart expertd."
            ) from e
        except OSError:
            pass  # The rank is gone; its end is reported by whoever watches it.

    async def messages(self) -> AsyncIterator[Message]:
        """Yield what the rank says until it closes its socket. Raises RemoteProtocolError for garbage."""
        decoder = Decoder()
        while data := await self._read():
            for message in decoder.feed(data):
                yield message

    async def _read(self) -> bytes:
        try:
            return await self._reader.read(READ_BYTES)
        except OSError:
            return b""

    def describe_end(self) -> str:
        """Say how the process ended, for a user: "killed by SIGKILL", "exited with code 3"."""
        code = self._process.returncode
        if code is None:
            return "closed its control socket"
        if code >= 0:
            return f"exited with code {code}"
        return f"killed by {_signal_name(-code)}"

    def hang_up(self) -> None:
        """Close the control socket and the lifeline: the rank ends by itself if it still can."""
        self._writer.close()
        if self._lifeline is not None:
            os.close(self._lifeline)
            self._lifeline = None

    def terminate(self) -> None:
        self._signal(signal.SIGTERM)

    def kill(self) -> None:
        self._signal(signal.SIGKILL)

    def _signal(self, number: int) -> None:
        if self.running:
            # Not Process.send_signal: it polls, and may so reap the process under asyncio's own watcher,
            # which then cannot say how the process ended.
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    async def wait_exit(self) -> None:
        """Wait for the process to be reaped; the caller sets the deadline."""
        await self._process.wait()


async def _start_python(module: str, control_fd: int, fds: tuple[int, ...]) -> asyncio.subprocess.Process:
    # -P and our own sys.path: the rank imports what we would import, not a random.py in the current
    # folder. Its stdout goes to our stderr, because our stdout belongs to the answer. Its own process
    # group keeps the terminal's Ctrl-C away from it: we end it, in order.
    return await asyncio.create_subprocess_exec(
        *(sys.executable, "-P", "-m", module, str(control_fd)),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=2,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(p or os.getcwd() for p in sys.path)},
        process_group=0,
        pass_fds=fds,
    )


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
