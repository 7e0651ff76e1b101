"""The mailbox: how ranks of one host swap bytes. The C header native/mailbox.h is the contract.

The supervisor creates the memory and hands the descriptor to its ranks; a rank opens it.
"""

from collections.abc import Sequence
from types import TracebackType
from typing import Self

from expertd.errors import ClusterError, LocalProtocolError
from expertd.link import codes
from expertd.native._transport import ffi, lib

# A rank beats every 20 ms. GroupConfig says how long a silence is death in a served group.
PULSE_TIMEOUT_S = 0.5


def create(num_ranks: int, slot_bytes: int) -> int:
    """Create the shared memory for a group and give its descriptor; the caller owns and closes it.

    It has no name, so nothing is left behind whoever dies. Raises ClusterError when there is no memory.
    """
    err = codes.buffer()
    fd: int = lib.xd_mailbox_create(num_ranks, slot_bytes, err, len(err))
    if fd < 0:
        raise ClusterError(codes.text(err))
    return fd


def poison(fd: int, reason: str = "") -> None:
    """End the epoch: every rank inside an exchange returns at once, every later one fails.

    The ranks' LinkDown tells the first reason that was given.
    """
    if lib.xd_mailbox_poison(fd, reason.encode()) != 0:
        raise LocalProtocolError(f"descriptor {fd} is not a mailbox")


def pulses(fd: int) -> tuple[tuple[int, ...], int]:
    """Give every rank's beat, distant ones included, and the link process's: counters that advance while they live.

    0 means that it has not opened the mailbox yet. For who watches from outside; made to be called ten times a second.
    """
    beats, link_beat = ffi.new("uint64_t[]", lib.XD_MAX_RANKS), ffi.new("uint64_t *")
    num_ranks = lib.xd_mailbox_pulses(fd, beats, link_beat)
    if num_ranks < 0:
        raise LocalProtocolError(f"descriptor {fd} is not a mailbox")
    return tuple(beats[rank] for rank in range(num_ranks)), link_beat[0]


class Mailbox:
    """One rank's handle. `function` and `address` are what an exchange in an MLX graph calls."""

    def __init__(
        self,
        fd: int,
        rank: int,
        num_ranks: int,
        step_timeout_s: float = 60.0,
        pulse_timeout_s: float = PULSE_TIMEOUT_S,
        lifeline_fd: int = -1,
    ) -> None:
        err = codes.buffer()
        box = lib.xd_mailbox_open(fd, rank, lifeline_fd, step_timeout_s, pulse_timeout_s, err, len(err))
        if box == ffi.NULL:
            raise ClusterError(codes.text(err))
        self._box, self.rank, self.num_ranks = box, rank, num_ranks
        if (made_for := lib.xd_mailbox_num_ranks(box)) != num_ranks:  # C trusts our lists to have this length
            self.close()
            raise ClusterError(f"mailbox: rank {rank} found room for {made_for} ranks, wanted {num_ranks}")
        self.slot_bytes: int = lib.xd_mailbox_slot_bytes(box)
        self._frame = ffi.new("char[]", self.slot_bytes)
        self.function = int(ffi.cast("uintptr_t", ffi.addressof(lib, "xd_mailbox_exchange")))
        self.address = int(ffi.cast("uintptr_t", box))

    def exchange(self, mine: bytes, sizes: Sequence[int], tag: int = 1, digest: int = 0) -> bytes:
        """Swap bytes with all ranks outside any graph; `sizes` are every rank's, in bytes."""
        if len(sizes) != self.num_ranks or len(mine) != sizes[self.rank]:
            raise LocalProtocolError(
                f"rank {self.rank}, exchange {tag}: {len(mine)} bytes and sizes {list(sizes)}, "
                f"wanted one size for each of {self.num_ranks} ranks and this rank's bytes"
            )
        out = ffi.new("char[]", max(1, sum(sizes)))
        self._check(
            lib.xd_mailbox_exchange(self._open, tag, digest, mine, ffi.new("size_t[]", list(sizes)), out)
        )
        return bytes(ffi.buffer(out, sum(sizes)))

    def send_frame(self, frame: bytes) -> None:
        """Rank 0: start a step by giving `frame`, at most a slot, to every rank."""
        self._check(lib.xd_mailbox_send_frame(self._open, frame, len(frame)))

    def wait_frame(self, idle_s: float) -> bytes | None:
        """Ranks above 0: wait for the next frame, at most idle_s; None means that none came."""
        size = lib.xd_mailbox_wait_frame(self._open, idle_s, self._frame)
        if size == lib.XD_TIMEOUT:
            self.check()  # the frame came, but one of its other readers did not
            return None
        self._check(min(size, lib.XD_OK))
        return bytes(ffi.buffer(self._frame, size))

    def check(self) -> None:
        """Raise the first failure of this epoch, if there was one; to be asked after every evaluation."""
        err = codes.buffer()
        code = lib.xd_mailbox_failure(self._open, err, len(err))
        if code:
            raise codes.error(code, codes.text(err))

    def statistics(self) -> dict[str, float]:
        """Exchanges done and seconds waited in them, since opening."""
        count, waited = ffi.new("uint64_t *"), ffi.new("double *")
        lib.xd_mailbox_stats(self._open, count, waited)
        return {"num_exchanges": count[0], "waited_s": waited[0]}

    def waits(self) -> tuple[list[int], float]:
        """How many waits inside exchanges took no time, or 2^(i-1) to 2^i ns (element i), and the seconds of all."""
        counts, waited = ffi.new("uint64_t[]", lib.XD_WAIT_BUCKETS), ffi.new("double *")
        lib.xd_mailbox_waits(self._open, counts, waited)
        return list(counts), waited[0]

    @property
    def _open(self) -> object:
        if self._box == ffi.NULL:
            raise LocalProtocolError(f"rank {self.rank}: the mailbox is closed")
        return self._box

    def close(self) -> None:
        """Release the handle; may be called twice. No exchange may be in flight."""
        box, self._box = self._box, ffi.NULL
        lib.xd_mailbox_close(box)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.close()

    def _check(self, code: int) -> None:
        if code == lib.XD_OK:
            return
        self.check()
        raise LocalProtocolError(f"the mailbox gave code {code} without a reason")
