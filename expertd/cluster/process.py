"""A child of the supervisor, a rank or a link process: a control socket, a lifeline, an end that is awaited.

The lifeline is a pipe on which nothing is ever written. The child holds its read end, this process alone
holds its write end, so however we go (SIGKILL included) the child reads the end of the pipe and exits.
Both our ends are close-on-exec, hence no later child can inherit one and keep an earlier one alive.
"""

import asyncio
import contextlib
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator
from typing import Any, Self

import psutil

from expertd.errors import ClusterError
from expertd.topology.machine import huge_pages
from expertd.wire import Codec

# A child has a thread that does nothing but read its control socket; one that leaves a frame unread
# for this long is stuck.
SEND_TIMEOUT_S = 10.0
READ_BYTES = 1 << 16


class ChildProcess:
    """A running child; make one with `spawn`, and always end it with `hang_up` and `wait_exit`.

    `name` is what people read of it ("rank 0"); `lifeline_fd` is the lifeline's number in the child, which learns
    it from its first message.
    """

    def __init__(
        self,
        name: str,
        codec: Codec,
        process: asyncio.subprocess.Process,
        streams: tuple[asyncio.StreamReader, asyncio.StreamWriter],
        lifeline: int,
        lifeline_fd: int,
    ) -> None:
        self.name = name
        self.lifeline_fd = lifeline_fd
        self._codec = codec
        self._process = process
        self._reader, self._writer = streams
        self._lifeline: int | None = lifeline

    @classmethod
    async def spawn(cls, name: str, module: str, codec: Codec, pass_fds: tuple[int, ...] = ()) -> Self:
        """Start `python -m module CONTROL_FD` with its control socket, a lifeline and `pass_fds`.

        `codec` is that of the conversation; descriptors keep their numbers. Raises ClusterError when the system
        refuses a process.
        """
        ours, theirs = socket.socketpair()
        lifeline_fd, lifeline = os.pipe()
        streams = await asyncio.open_unix_connection(sock=ours, limit=READ_BYTES)
        try:
            fds = (theirs.fileno(), lifeline_fd, *pass_fds)
            process = await _start_python(module, theirs.fileno(), fds)
        except BaseException as e:
            streams[1].close()
            os.close(lifeline)
            if isinstance(e, OSError):
                raise ClusterError(f"{name}: cannot start a process: {e}. Free memory or processes.") from e
            raise
        finally:
            theirs.close()
            os.close(lifeline_fd)
        return cls(name, codec, process, streams, lifeline, lifeline_fd)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def running(self) -> bool:
        return self._process.returncode is None

    @property
    def is_stopped(self) -> bool:
        """Whether a signal has stopped it (SIGSTOP), as the system says."""
        with contextlib.suppress(psutil.Error):
            return psutil.Process(self.pid).status() == psutil.STATUS_STOPPED
        return False

    def send_nowait(self, message: Any) -> None:
        """Queue a small frame; a child that is gone gets nothing, silently: its end is reported elsewhere."""
        if not self._writer.is_closing():
            self._writer.write(self._codec.encode(message))

    async def send(self, message: Any) -> None:
        """Send a frame and wait until most of it is on its way.

        Raises ClusterError when the child does not read it within SEND_TIMEOUT_S seconds.
        """
        self.send_nowait(message)
        try:
            async with asyncio.timeout(SEND_TIMEOUT_S):
                await self._writer.drain()
        except TimeoutError as e:
            raise ClusterError(
                f"{self.name} has not read its control socket for {SEND_TIMEOUT_S:g} s. Restart expertd."
            ) from e
        except OSError:
            pass  # The child is gone; its end is reported by whoever watches it.

    async def messages(self) -> AsyncIterator[Any]:
        """Yield what the child says until it closes its socket. Raises RemoteProtocolError for garbage."""
        decoder = self._codec.decoder()
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
        """Close the control socket and the lifeline: the child ends by itself if it still can."""
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
    # -P and our own sys.path: the child imports what we would import, not a random.py in the current
    # folder. Its stdout goes to our stderr, because our stdout belongs to the answer. Its own process
    # group keeps the terminal's Ctrl-C away from it: we end it, in order.
    return await asyncio.create_subprocess_exec(
        *(sys.executable, "-P", "-m", module, str(control_fd)),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=2,
        env={
            **os.environ,
            **huge_pages(os.environ),
            "PYTHONPATH": os.pathsep.join(p or os.getcwd() for p in sys.path),
        },
        process_group=0,
        pass_fds=fds,
    )


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
