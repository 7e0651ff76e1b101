"""The splits over MLX's own distributed engine (its ring over TCP, JACCL or MPI): `--link mlx`.

For comparison, and where our own link cannot run. Not the default, because MLX's engine has neither deadlines nor
liveness: a rank inside a collective waits for as long as its peers are silent, a follower waits for its next plan in
one, and the ring's threads keep a core busy all that time. The ring raises when a neighbour's socket ends (mlx
0.32.4), in that exchange: the next one of the same step waits for ever. A peer that is stopped or two seats away, or a
dead one under JACCL, is for the supervisor to find, which kills it and every rank that then does not come to the next
epoch within 10 s. Nor are two routers' choices compared. A process can join one group in its life: what
is left of a broken one goes on over the mailbox, as one rank.
"""

import json
import os
import socket
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import numpy as np

from expertd.errors import ClusterError, ConfigError, LinkDown, RemoteProtocolError
from expertd.link.mailbox import Mailbox

# A plan with up to 1000 tokens fits; a longer one takes a second collective.
FRAME_BYTES = 4096
LENGTH_BYTES = 4
# Of what a rank says of itself before the group is there: an address with its port, the name of a device.
WORD_BYTES = 64
ONE_GROUP = "A process can join one group of MLX's only: start the ranks again."

_joined: set[str] = set()  # the back ends whose group this process has had

# Gives every rank's bytes, in rank order, from this rank's; all are equally long. The way in which ranks meet.
Gather = Callable[[bytes], Sequence[bytes]]


class MlxLink:
    """One rank's membership of an MLX group, in the shape that the runner and the model need of a link."""

    def __init__(self, group: Any, backend: str) -> None:
        self._group, self.backend = group, backend
        self.rank: int = group.rank()
        self.num_ranks: int = group.size()

    def exchange_rows(self, rows: mx.array, num_rows: list[int]) -> mx.array:
        """As `exchange` in expertd.model.exchange, without its checks: [num_rows[rank], width] -> all rows.

        MLX gathers equal shapes only, so rows are padded to the largest count and the padding is cut out again.
        """
        most, own = max(num_rows), rows.shape[0]
        if own < most:
            padding = mx.zeros((most - own, rows.shape[1]), dtype=rows.dtype)
            # The tie keeps an idle rank's exchanges in order: nothing else makes its padding wait for anything.
            rows = mx.concatenate([rows, mx.depends([padding], [rows])[0]])
        everything = mx.distributed.all_gather(rows, group=self._group)
        if min(num_rows) == most:
            return everything
        return mx.concatenate([everything[r * most : r * most + n] for r, n in enumerate(num_rows) if n])

    def send_frame(self, frame: bytes) -> None:
        """Rank 0: give `frame` to every rank. Blocks until all have come for it."""
        data = len(frame).to_bytes(LENGTH_BYTES, "little") + frame
        self._broadcast(data[:FRAME_BYTES], FRAME_BYTES)
        if len(data) > FRAME_BYTES:
            self._broadcast(data[FRAME_BYTES:], len(data) - FRAME_BYTES)

    def wait_frame(self, idle_s: float) -> bytes | None:
        """Ranks above 0: rank 0's next frame. Waits for as long as it takes, whatever idle_s says."""
        head = self._broadcast(b"", FRAME_BYTES)
        size = int.from_bytes(head[:LENGTH_BYTES], "little")
        missing = LENGTH_BYTES + size - FRAME_BYTES
        rest = self._broadcast(b"", missing) if missing > 0 else b""
        return (head + rest)[LENGTH_BYTES : LENGTH_BYTES + size]

    def check(self) -> None:
        """Nothing to tell: what fails in MLX's engine raises in the evaluation itself, or never ends."""

    def waits(self) -> tuple[list[int], float]:
        """MLX does not say how long its exchanges wait."""
        return [], 0.0

    def failure(self, e: RuntimeError) -> LinkDown:
        """What MLX raised in an evaluation, as an error of the link."""
        return LinkDown(f"rank {self.rank}, --link mlx: {_one_line(e)}")

    def _broadcast(self, data: bytes, num_bytes: int) -> bytes:
        """Rank 0's `data`, of num_bytes after padding. A gather, because that is what every back end has."""
        mine = mx.array(np.frombuffer(data.ljust(num_bytes, b"\0"), dtype=np.uint8))
        everything = mx.distributed.all_gather(mine, group=self._group)
        try:
            mx.eval(everything)
        except RuntimeError as e:
            raise self.failure(e) from e
        return np.array(everything[:num_bytes]).tobytes()


def gather_over(mailbox: Mailbox) -> Gather:
    """Let ranks meet through the mailbox that they have in common anyway."""

    def gather(mine: bytes) -> list[bytes]:
        everything, size = mailbox.exchange(mine, [len(mine)] * mailbox.num_ranks), len(mine)
        return [everything[r * size : (r + 1) * size] for r in range(mailbox.num_ranks)]

    return gather


def open_link(rank: int, gather: Gather, address: str, interface: str) -> MlxLink:
    """Join JACCL where two hosts with one rank each both have it, else the ring.

    `address` and `interface` are this host's end of the way between the hosts, "" when all ranks are on one. Raises as
    open_ring and open_jaccl do.
    """
    has_jaccl = interface and mx.distributed.is_available("jaccl")
    # Apple names the RDMA device of an interface so (`ibv_devices` on a Mac: rdma_en2).
    devices = jaccl_devices(_gather_words(gather, f"rdma_{interface}" if has_jaccl else ""))
    if devices:
        return open_jaccl(rank, devices, gather)
    return open_ring(rank, gather, address or "127.0.0.1")


def jaccl_devices(names: Sequence[str]) -> list[list[str | None]] | None:
    """The matrix for open_jaccl from each rank's device ("": none); None unless there are two and both have one.

    With more, a rank needs a device towards each of the others.
    """
    if len(names) != 2 or not all(names):
        return None
    return [[None, names[0]], [names[1], None]]


def _gather_words(gather: Gather, mine: str) -> list[str]:
    return [word.decode().strip() for word in gather(mine.encode().ljust(WORD_BYTES))]


def open_ring(rank: int, gather: Gather, address: str = "127.0.0.1") -> MlxLink:
    """Join MLX's TCP ring, listening for one neighbour on `address`. Nobody is authenticated.

    Raises ClusterError when a neighbour cannot be reached within 15 s (MLX's limit); waits without limit for one that
    does not call.
    """
    with socket.socket() as probe:
        # Not listening: a neighbour that is early must be refused and try again. MLX takes port numbers only, so that
        # one which was free a moment ago must do.
        probe.bind((address, 0))
        everyone = _gather_words(gather, f"{address}:{probe.getsockname()[1]}")
    hosts = [[host] for host in everyone]
    with _file(hosts) as name:
        return _join("ring", rank, len(hosts), {"MLX_HOSTFILE": name})


def open_jaccl(rank: int, devices: list[list[str | None]], gather: Gather) -> MlxLink:
    """Join MLX's RDMA engine; devices[a][b] is the name of rank a's device towards rank b, None for a == b.

    `gather` carries the set-up of the connections. Raises ConfigError where this MLX has no JACCL (it needs macOS with
    RDMA over Thunderbolt enabled), ClusterError when the connections do not come up.
    """

    def factory(rank: int, size: int) -> Callable[[bytes, int], bytes]:
        return lambda mine, num_bytes: b"".join(gather(bytes(mine[:num_bytes])))

    with _file(devices) as name:
        return _join("jaccl", rank, len(devices), {"MLX_IBV_DEVICES": name}, all_gather_factory=factory)


def open_mpi(rank: int, num_ranks: int) -> MlxLink:
    """Join the MPI world that started this process. Raises ConfigError where there is no MPI library."""
    return _join("mpi", rank, num_ranks, {})


def _join(backend: str, rank: int, num_ranks: int, settings: dict[str, str], **more: Any) -> MlxLink:
    if not mx.distributed.is_available(backend):
        raise ConfigError(
            f"--link mlx: MLX's back end {backend} is not available here. Use `--link tcp`, or `--link auto`."
        )
    if backend in _joined:
        # MLX would give the same group again, though a dead one.
        raise RemoteProtocolError(f"rank {rank}, --link mlx: {ONE_GROUP}")
    try:
        with _environment({"MLX_RANK": str(rank), **settings}):
            group = mx.distributed.init(strict=True, backend=backend, **more)
    except (RuntimeError, ValueError) as e:
        raise ClusterError(f"rank {rank}, --link mlx, back end {backend}: {_one_line(e)}") from e
    _joined.add(backend)
    link = MlxLink(group, backend)
    if (link.rank, link.num_ranks) != (rank, num_ranks):
        raise RemoteProtocolError(
            f"--link mlx: MLX made this rank {link.rank} of {link.num_ranks}, wanted {rank} of {num_ranks}. {ONE_GROUP}"
        )
    return link


@contextmanager
def _file(value: Any) -> Iterator[str]:
    """MLX reads its hosts from a file alone; it is gone again once they are read."""
    with tempfile.NamedTemporaryFile("w", prefix="expertd-", suffix=".json") as file:
        json.dump(value, file)
        file.flush()
        yield file.name


@contextmanager
def _environment(settings: dict[str, str]) -> Iterator[None]:
    """MLX takes its settings from the environment alone."""
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _one_line(e: Exception) -> str:
    return " ".join(str(e).split())[:300]
