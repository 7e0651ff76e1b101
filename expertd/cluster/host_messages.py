"""What two supervisors say to each other over the control channel (channel.py).

    host -> leader   Join (first), Loaded, Measured, Prepared, Linked, Running, Ended, Ranks; Submit and Cancel
                     of its own clients; Held; a Hold of what it knew when it came
    leader -> host   Welcome or Refused; Measure, Prepare, Connect, Start, Stop; the events of that host's requests;
                     Hold, with those of others
    either           Bye (last)

A second channel, opened with Fetch, copies the checkpoint: Want and Piece.

An epoch is set up in three rounds, so that every host meets the others where it must and the running epoch is left only
when all is ready: Prepare (open a mailbox, listen), Connect (the link processes meet and test the link), Start.
"""

from dataclasses import dataclass, field
from typing import Any

from expertd.engine.messages import Cancel, Done, Failed, Rejected, Started, Submit, Token
from expertd.link.messages import LinkPeer, LinkReport
from expertd.wire import Codec

# Raised whenever a message changes its meaning; hosts with different numbers refuse each other.
PROTOCOL = 3
MAX_FRAME_BYTES = 64 << 20


@dataclass(frozen=True)
class HostAddress:
    """An IPv4 address of a host, the interface that has it, and what kind of interface that is (topology/)."""

    interface: str
    kind: str
    address: str
    prefix: int


@dataclass(frozen=True)
class Join:
    """`verbs` says why this host cannot use RDMA, "" when it can. `probe_port` is where its paths are measured."""

    protocol: int
    version: str
    mlx: str
    name: str
    addresses: list[HostAddress]
    probe_port: int
    verbs: str


@dataclass(frozen=True)
class FileInfo:
    name: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Welcome:
    """What is served, and how: `group` is GroupConfig as a map, without the leader's own paths and processors.

    `probe_secret` (32 bytes) opens the ports on which paths are measured.
    """

    model_id: str
    content_hash: str
    config_hash: str
    files: list[FileInfo]
    group: dict[str, Any]
    probe_secret: bytes


@dataclass(frozen=True)
class Refused:
    reason: str


@dataclass(frozen=True)
class Loaded:
    """The host's ranks hold the checkpoint. Everything here must equal the leader's, or the host stays alone."""

    num_ranks: int
    content_hash: str
    config_hash: str
    mlx: str
    architecture: str
    kernels: str
    activation_bits: int
    dtype: str


@dataclass(frozen=True)
class Ranks:
    """How many ranks this host has now (0: none lives), and why that changed."""

    num_ranks: int
    reason: str


@dataclass(frozen=True)
class Measure:
    """Measure every path to the host `host_id`, which has these addresses, and answer Measured."""

    host_id: str
    name: str
    port: int
    addresses: list[HostAddress]


@dataclass(frozen=True)
class PathReport:
    """One measured path: half round trips of `payload_bytes`, or why it cannot be used."""

    local: HostAddress
    remote: HostAddress
    payload_bytes: int = 0
    p50_us: float = 0.0
    p99_us: float = 0.0
    bandwidth_mb_s: float = 0.0
    error: str = ""


@dataclass(frozen=True)
class Measured:
    host_id: str
    paths: list[PathReport]


@dataclass(frozen=True)
class Prepare:
    """Set up epoch `epoch` as host `host` of `len(num_ranks)`. See LinkSetup for the rest."""

    epoch: int
    kind: str
    host: int
    num_ranks: list[int]
    secret: bytes
    listen: str


@dataclass(frozen=True)
class Prepared:
    epoch: int
    port: int


@dataclass(frozen=True)
class Connect:
    epoch: int
    peers: list[LinkPeer]


@dataclass(frozen=True)
class Linked:
    epoch: int
    reports: list[LinkReport]


@dataclass(frozen=True)
class Start:
    epoch: int
    split: str
    shares: list[float]


@dataclass(frozen=True)
class Running:
    epoch: int


@dataclass(frozen=True)
class Stop:
    epoch: int
    reason: str


@dataclass(frozen=True)
class Ended:
    """This epoch is over on this host. `host` is the peer whose link failed (index in the epoch), -1 for none;
    `stage` is "setup" or "running"."""

    epoch: int
    host: int
    stage: str
    reason: str


@dataclass(frozen=True)
class Copy:
    """What is new of a kept request. `num_tokens` are those before; `submit` comes with the first event.

    `error` is why it ended without a Done, "" while it did not; nobody works on one that is not led.
    """

    request_id: str
    num_tokens: int
    submit: Submit | None
    started: Started | None
    tokens: list[Token]
    done: Done | None
    error: str
    is_led: bool


@dataclass(frozen=True)
class Hold:
    """Copies to hold for whoever asks for these requests, here and after the leader's end, and the ids of those to
    forget; answered by Held."""

    number: int
    copies: list[Copy]
    forgotten: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Held:
    """This host holds everything up to Hold `number`."""

    number: int


@dataclass(frozen=True)
class Bye:
    reason: str


@dataclass(frozen=True)
class Fetch:
    content_hash: str


@dataclass(frozen=True)
class Want:
    name: str
    offset: int
    size: int


@dataclass(frozen=True)
class Piece:
    name: str
    offset: int
    data: bytes = field(repr=False)


Message = (
    Join
    | Welcome
    | Refused
    | Loaded
    | Ranks
    | Measure
    | Measured
    | Prepare
    | Prepared
    | Connect
    | Linked
    | Start
    | Running
    | Stop
    | Ended
    | Hold
    | Held
    | Bye
    | Fetch
    | Want
    | Piece
    | Submit
    | Cancel
    | Started
    | Token
    | Done
    | Rejected
    | Failed
)
codec = Codec(Message, MAX_FRAME_BYTES)
