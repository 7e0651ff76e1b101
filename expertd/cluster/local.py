"""One rank of this host through all its epochs: its process, its pulse, and the requests it answers as leader."""

import asyncio
import contextlib
import socket
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Self

from expertd.cluster.epoch import Epoch
from expertd.cluster.process import ChildProcess
from expertd.cluster.reply import LeaderLost, Replies, Take
from expertd.config import GroupConfig
from expertd.engine.messages import Begin, Observe, Ready, Setup, Submit, codec

# A rank's C thread beats every 20 ms, whatever its Python or MLX are at. Silence means that the process is stopped
# or its machine is; the group's own wait (GroupConfig.pulse_timeout_s) is the second line.
PULSE_SILENCE_S = 0.8
LOOK_S = 0.1
# A rank with nothing else to do opens a new epoch's mailbox in milliseconds.
JOIN_S = 3.0
# One that finishes a broken step over MLX's ring may never end: an exchange that is asked for after the ring found a
# neighbour gone waits for ever (mlx 0.32.4), and a step has one for each layer.
MLX_JOIN_S = 10.0
# A look that was late by this much tells of ourselves being stopped, not of the ranks.
LATE_S = 0.2
# A rank says nothing while it reads a long prompt, so this must exceed the longest prefill.
SILENCE_TIMEOUT_S = 1800.0

# As mailbox.pulses: the beats of every rank of a mailbox, and of its link.
Pulses = Callable[[int], tuple[tuple[int, ...], int]]


class Pulse:
    """Tells from looks at a counter whether what counts it stands still."""

    def __init__(self) -> None:
        self._beats = 0
        self._seen = self._looked = time.monotonic()

    def is_silent(self, beats: int, now: float) -> bool:
        """Look once. Never silent before the first beat; a late look starts the silence afresh."""
        if beats != self._beats or beats == 0 or now - self._looked > LOOK_S + LATE_S:
            self._beats, self._seen = beats, now
        self._looked = now
        return now - self._seen > PULSE_SILENCE_S


@dataclass
class Seat:
    """A rank's place in an epoch; `joined` once its pulse was seen there."""

    epoch: Epoch
    number: int
    joined: bool = False


class LocalRank:
    """A rank process of this host. `id` never changes; `number` is what the rank is in its latest epoch.

    `dead` says how it ended ("died: ..."). `seats` are the epochs in which its pulse may beat: it keeps an old mailbox
    open until it has the next one, so that a rank busy with the rest of a broken step is not taken for a dead one.
    `had_mlx_group` says that it has joined MLX's own engine, which a process does once.
    """

    def __init__(self, rank_id: int, process: ChildProcess, fd_channel: socket.socket) -> None:
        self.id = rank_id
        self.process = process
        self.ready: Ready | None = None
        self.num_loaded = 0  # bytes of weights in its memory
        self.dead: str | None = None
        self.had_mlx_group = False
        self.seats: list[Seat] = []
        self.pulse = Pulse()
        self.replies = Replies(process.send_nowait)
        self.last_word = time.monotonic()
        self._fd_channel = fd_channel

    @classmethod
    async def spawn(cls, rank_id: int, module: str, group: GroupConfig) -> Self:
        """Start a rank and send it its Setup. Raises ClusterError when the system refuses a process."""
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        with theirs:
            try:
                process = await ChildProcess.spawn(f"rank {rank_id}", module, codec, (theirs.fileno(),))
            except BaseException:
                ours.close()
                raise
            process.send_nowait(Setup(rank_id, process.lifeline_fd, theirs.fileno(), asdict(group)))
        return cls(rank_id, process, ours)

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def number(self) -> int:
        return self.seats[-1].number if self.seats else self.id

    def join(self, epoch: Epoch, number: int) -> None:
        """Hand over the epoch's mailbox and tell the rank that it is `number` there."""
        self.seats.append(Seat(epoch, number))
        layout = epoch.layout
        # A rank that is gone, or so stuck that its buffer is full, does not join: that has its own watch.
        with contextlib.suppress(OSError):
            socket.send_fds(self._fd_channel, [layout.epoch.to_bytes(8, "big")], [epoch.mailbox_fd])
        way = (layout.address, layout.interface)
        self.process.send_nowait(
            Begin(layout.epoch, number, layout.split, layout.fractions, epoch.reason, *way)
        )

    def sits_in(self, epoch: Epoch | None) -> bool:
        return any(seat.epoch is epoch for seat in self.seats)

    def ailment(self, pulses: Pulses, now: float, join_timeout_s: float) -> str | None:
        """Look at a rank whose process runs: why it must be given up as dead, None when it seems well.

        To be called every LOOK_S seconds.
        """
        beats = [pulses(seat.epoch.mailbox_fd)[0][seat.number] for seat in self.seats]
        if self.pulse.is_silent(sum(beats), now):
            return f"stopped answering: no pulse for {PULSE_SILENCE_S:g} s"
        if beats and beats[-1]:
            self.seats[-1].joined = True
            del self.seats[:-1]
        elif beats:
            epoch, pulse = self.seats[-1].epoch, sum(beats)
            # Without an older mailbox it has no step to finish, and no pulse by which a stopped one could be told.
            if not pulse and now - epoch.began > PULSE_SILENCE_S and self.process.is_stopped:
                return f"was stopped before it joined epoch {epoch.layout.epoch}"
            limit_s = join_timeout_s
            if not pulse:
                limit_s = min(limit_s, JOIN_S)
            elif self.seats[0].epoch.link:
                limit_s = min(limit_s, MLX_JOIN_S)
            if now - epoch.began > limit_s:
                return f"did not join epoch {epoch.layout.epoch} within {limit_s:g} s"
        if self.replies and now - self.last_word > SILENCE_TIMEOUT_S:
            return f"has said nothing for {SILENCE_TIMEOUT_S:g} s with {len(self.replies)} requests open"
        return None

    async def answer(self, submit: Submit | Observe, take: Take) -> None:
        """Run one request on this rank, the leader. As Replies.answer."""
        if self.dead:
            raise LeaderLost(f"rank {self.number} {self.dead}")
        if not self.replies:
            self.last_word = time.monotonic()
        await self.replies.answer(submit, self.process.send, take)

    def hang_up(self) -> None:
        """Close all connections: the rank ends by itself if it still can."""
        self.process.hang_up()
        self._fd_channel.close()


async def wait_exits(ranks: list[LocalRank], timeout_s: float) -> None:
    """Wait until all have ended and are reaped, at most `timeout_s` seconds."""
    exits = [asyncio.create_task(rank.process.wait_exit()) for rank in ranks if rank.process.running]
    if exits:
        await asyncio.wait(exits, timeout=timeout_s)
    for task in exits:
        task.cancel()
