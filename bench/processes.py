"""Processes of a benchmark: ports for MLX's ring, and waiting with a deadline."""

import socket
import subprocess
import time
from pathlib import Path

from expertd.errors import ClusterError


def free_ports(count: int) -> list[int]:
    """Ports free a moment ago: MLX's ring takes numbers only. Held together, they are all different."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


def wait_for_all(processes: list[subprocess.Popen[bytes]], folder: Path, deadline_s: float) -> None:
    """Wait until all have ended well; number n writes its errors to `folder`/n.err.

    Raises ClusterError with a failed one's last words, or when deadline_s passes. Ends none of them.
    """
    deadline = time.monotonic() + deadline_s
    while any(code is None for code in [process.poll() for process in processes]):
        _check_exits(processes, folder)
        if time.monotonic() > deadline:
            raise ClusterError(f"not done after {deadline_s:g} s. Try fewer --repeats or a quieter machine.")
        time.sleep(0.05)
    _check_exits(processes, folder)


def _check_exits(processes: list[subprocess.Popen[bytes]], folder: Path) -> None:
    for rank, process in enumerate(processes):
        if process.poll():
            said = (folder / f"{rank}.err").read_text(errors="replace").split("\n")
            last = next((line for line in reversed(said) if line.strip()), "it said nothing")
            raise ClusterError(f"rank {rank} ended with code {process.returncode}: {last.strip()[:300]}")
