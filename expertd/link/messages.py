"""What a supervisor and its link process say to each other, over a socket as with a rank.

    supervisor -> link   LinkSetup (first, once), LinkConnect (once)
    link -> supervisor   LinkListening (once), LinkUp (once), LinkDown (last)

One link process lives for one epoch: after a failure nothing of it is used again.
"""

from dataclasses import dataclass

from expertd.wire import Codec

MAX_FRAME_BYTES = 1 << 20


@dataclass(frozen=True)
class LinkSetup:
    """`num_ranks[h]` ranks run on host h of the group, numbered through; this is host `host`.

    `kind` is "tcp" or "verbs". `secret` (32 bytes, from the leader, over the control channel) proves to the other link
    processes that this one belongs to the epoch. `listen` is the address to listen on for hosts with a higher index,
    "" when there are none. A peer silent for `silence_s` is gone; setting up may take `setup_s`.
    """

    epoch: int
    kind: str
    host: int
    num_ranks: list[int]
    secret: bytes
    listen: str
    mailbox_fd: int
    lifeline_fd: int
    silence_s: float
    setup_s: float
    verbs_library: str = ""
    lint: bool = False


@dataclass(frozen=True)
class LinkListening:
    """The port, 0 when `listen` was empty."""

    port: int


@dataclass(frozen=True)
class LinkPeer:
    """Host `host` listens at address:port (lower index) or will call (higher index: port 0).

    All traffic stays on the interface `interface` with our address `local_address`, or fails.
    """

    host: int
    address: str
    port: int
    local_address: str
    interface: str


@dataclass(frozen=True)
class LinkConnect:
    peers: list[LinkPeer]


@dataclass(frozen=True)
class LinkReport:
    """One connection as it was measured by its self-test; latencies are half round trips of full-size frames."""

    host: int
    kind: str
    device: str
    attempts: int
    latency_p50_us: float
    latency_p99_us: float
    bulk_p50_us: float


@dataclass(frozen=True)
class LinkUp:
    reports: list[LinkReport]


@dataclass(frozen=True)
class LinkDown:
    """Why the link ended. `host` is the peer whose connection failed, -1 when it was none.

    `code` is a name such as "XD_SILENT"; `stage` is "setup" or "running".
    """

    host: int
    stage: str
    code: str
    reason: str


Message = LinkSetup | LinkListening | LinkConnect | LinkUp | LinkDown
codec = Codec(Message, MAX_FRAME_BYTES)
