"""Epochs: who is in one, what ends it, and who decides what follows.

An epoch is the time between two changes of the group. It has a mailbox of its own, so that late writes of a rank
that was stopped land nowhere, and it is never mended: the first failure ends it, for everybody. The cluster
(supervisor.py) ends epochs and reports changes; a `Coordinator` answers each change by beginning the next epoch,
or not yet, or never. `LocalCoordinator` does so for a group on one host.
"""

import asyncio
import logging
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from expertd.errors import ClusterError

if TYPE_CHECKING:
    from expertd.cluster.local import LocalRank
    from expertd.cluster.supervisor import Cluster

# Epochs in a row that failed without a token between them: from the second on the next one waits, and after the
# third the group is reduced to one rank, which has no link that could fail.
MAX_FRUITLESS = 3
BACK_OFF_S = 0.5
ONE_MLX_GROUP = "MLX lets a process join one group only. To have all ranks again, start expertd again."

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Layout:
    """Who is who in an epoch, and how steps are divided.

    `local` are this host's ranks by their ids, in rank order: the first is rank `first_rank` of `num_ranks`. `shares`
    has one number >= 0 for each of the num_ranks (they need not add up to 1). `mailbox_fd` None: a new mailbox; else
    the descriptor of one made for num_ranks, which the cluster then owns. `address` and `interface`: as in Begin.
    """

    epoch: int
    first_rank: int
    local: tuple[int, ...]
    num_ranks: int
    split: str
    shares: tuple[float, ...]
    mailbox_fd: int | None = None
    address: str = ""
    interface: str = ""

    @property
    def fractions(self) -> tuple[float, ...]:
        """The shares scaled to a sum of 1, equal when all are zero."""
        total = sum(self.shares)
        return tuple(s / total if total else 1 / self.num_ranks for s in self.shares)


@dataclass
class Epoch:
    """A begun epoch. `over` is why it ended; `fruitful` says that a token was committed in it.

    `link` is the back end of MLX over which it runs, "" for our own link.
    """

    layout: Layout
    mailbox_fd: int
    reason: str
    over: str | None = None
    fruitful: bool = False
    link: str = ""
    began: float = field(default_factory=time.monotonic)


@dataclass(frozen=True)
class RanksReady:
    """All ranks of this host have loaded: the first epoch may begin. `reason` says nothing."""

    reason: str = ""


@dataclass(frozen=True)
class RankDied:
    """`rank` of the last epoch died, as `reason` says; if it was in the present epoch, that is over."""

    rank: int
    reason: str


@dataclass(frozen=True)
class EpochEnded:
    """A living rank of this host found the epoch broken; it is over, and all ranks keep their weights.

    `num_fruitless` counts epochs, this one included, that ended like this in a row without a token, though a request
    was open or they lasted for less than FRUITLESS_S.
    """

    epoch: int
    reason: str
    num_fruitless: int


@dataclass(frozen=True)
class RankReturned:
    """A fresh process has taken the place of the dead rank `rank_id`, and has loaded: it sits in no epoch yet."""

    rank_id: int
    reason: str


Event = RanksReady | RankDied | EpochEnded | RankReturned


class Coordinator(Protocol):
    """Decides what follows a change; the cluster calls `changed` for one event at a time."""

    async def changed(self, event: Event) -> None:
        """Answer an event, usually with `cluster.begin`; an event may be outdated by the time it comes.

        An ExpertdError raised here ends the cluster with that reason.
        """

    def outlook(self) -> str | None:
        """Who goes on without the rank that just died, as a clause ("rank 1 goes on alone"); None: nobody, end."""


class LocalCoordinator:
    """For a group on one host: the living ranks go on, numbered from 0 in their order."""

    def __init__(self, cluster: "Cluster") -> None:
        self._cluster = cluster
        self._reduced = False

    async def changed(self, event: Event) -> None:
        if isinstance(event, EpochEnded):
            await self._back_off(event)
        if isinstance(event, RankReturned):
            if self._is_spent():
                _log.warning("%s, but not needed: %s", event.reason, ONE_MLX_GROUP)
                return
            self._reduced = False
            self._cluster.end_epoch(event.reason)
        ranks = self._going_on()
        if not self._cluster.running and ranks:
            await self._cluster.begin(self._layout(ranks))
        if event.reason and ranks:
            plural = "s" if len(ranks) > 1 else ""
            _log.warning("%s; going on with %d rank%s", event.reason, len(ranks), plural)

    def outlook(self) -> str | None:
        numbers = [str(rank.number) for rank in self._going_on()]
        if len(numbers) > 1:
            return f"ranks {', '.join(numbers[:-1])} and {numbers[-1]} go on"
        return f"rank {numbers[0]} goes on alone" if numbers else None

    async def _back_off(self, event: EpochEnded) -> None:
        if event.num_fruitless >= 2 * MAX_FRUITLESS:
            raise ClusterError(f"{event.reason}; this repeats itself. Start expertd again.")
        if event.num_fruitless == MAX_FRUITLESS and len(self._cluster.living) > 1:
            self._reduced = True
            _log.warning("%d epochs in a row failed without a token: one rank goes on alone", MAX_FRUITLESS)
        elif event.num_fruitless > 1:
            await asyncio.sleep(BACK_OFF_S)

    def _going_on(self) -> "list[LocalRank]":
        return self._cluster.living[: 1 if self._reduced or self._is_spent() else None]

    def _is_spent(self) -> bool:
        """Whether a living rank has had its one group of MLX's, and can join no other."""
        return any(rank.had_mlx_group for rank in self._cluster.living)

    def _layout(self, ranks: "list[LocalRank]") -> Layout:
        group = self._cluster.group
        return Layout(
            epoch=self._cluster.epoch + 1,
            first_rank=0,
            local=tuple(rank.id for rank in ranks),
            num_ranks=len(ranks),
            split=group.split,
            shares=tuple(group.fractions[rank.id] for rank in ranks),
        )
