"""Opening a connection over RDMA verbs; the C header native/verbs.h is the contract.

Any call here may block for ever inside a driver or end the process: only a link process, which its supervisor can
kill, may make them, and whoever wants the list of devices asks a child process.
"""

from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from expertd.errors import LocalProtocolError
from expertd.link import codes
from expertd.native._transport import ffi, lib

MAX_DEVICES = 16
PORT_ACTIVE = 4


@dataclass(frozen=True)
class Device:
    """A device as it is now. `ipv4` maps the index of a GID to the address there; `error` says why it cannot be used."""

    name: str
    port_state: int
    active_mtu_bytes: int
    link_layer: int
    num_gids: int
    ipv4: dict[int, str]
    error: str


@dataclass(frozen=True)
class Config:
    """How to open one end; both ends agree on the frames, of 4 KiB, of each queue's messages.

    `device` "" takes the one that has `local_ip`; `library` "" the platform's. Depths are receives kept posted. `lint`
    checks Apple's rules on every call.
    """

    local_ip: str
    device: str = ""
    library: str = ""
    latency_frames: int = 4
    bulk_frames: int = 32
    latency_depth: int = 16
    bulk_depth: int = 8
    lint: bool = False


def devices(library: str = "") -> list[Device]:
    """The verbs devices of this machine, usable or not. Raises ClusterError when there is no library or no device."""
    err, found = codes.buffer(), ffi.new("xd_verbs_device[]", MAX_DEVICES)
    num = lib.xd_verbs_devices(library.encode(), found, MAX_DEVICES, err, len(err))
    if num < 0:
        raise codes.error(num, codes.text(err))
    return [_device(found[i]) for i in range(min(num, MAX_DEVICES))]


def _device(d: Any) -> Device:
    addresses = {d.ipv4_index[i]: codes.text(d.ipv4[i]) for i in range(len(d.ipv4)) if d.ipv4[i][0] != b"\0"}
    return Device(
        codes.text(d.name),
        d.port_state,
        d.active_mtu,
        d.link_layer,
        d.num_gids,
        addresses,
        codes.text(d.error),
    )


class Verbs:
    """One end on its way to a connection: open, swap `local`, connect, meet the other end at a barrier, start.

    Used once: after any failure close it and open another, whose queue pairs and PSNs are new.
    """

    def __init__(self, config: Config) -> None:
        """Raises ClusterError when there is nothing to use or the device does not let us."""
        err = codes.buffer()
        texts = [ffi.new("char[]", t.encode()) for t in (config.library, config.device, config.local_ip)]
        c = ffi.new(
            "xd_verbs_config *",
            {
                "library": texts[0],
                "device": texts[1],
                "local_ip": texts[2],
                "latency_frames": config.latency_frames,
                "bulk_frames": config.bulk_frames,
                "latency_depth": config.latency_depth,
                "bulk_depth": config.bulk_depth,
                "lint": config.lint,
            },
        )
        self._verbs = lib.xd_verbs_open(c, err, len(err))
        if self._verbs == ffi.NULL:
            raise codes.error(lib.XD_UNAVAILABLE, codes.text(err))
        self.device = codes.text(lib.xd_verbs_name(self._verbs))

    @property
    def local(self) -> bytes:
        """What the other end must know."""
        endpoint = ffi.new("xd_verbs_endpoint *")
        lib.xd_verbs_local(self._open, endpoint)
        return bytes(ffi.buffer(endpoint))

    def connect(self, remote: bytes) -> None:
        """Join the other end's queue pairs and post all receives.

        Raises RemoteProtocolError when the other end wants other messages than we, LinkDown with what the device said.
        """
        err, endpoint = codes.buffer(), ffi.new("xd_verbs_endpoint *")
        if len(remote) != ffi.sizeof("xd_verbs_endpoint"):
            raise codes.error(lib.XD_MISMATCH, f"verbs: an endpoint of {len(remote)} bytes came")
        ffi.buffer(endpoint)[:] = remote
        code = lib.xd_verbs_connect(self._open, endpoint, err, len(err))
        if code != lib.XD_OK:
            raise codes.error(code, codes.text(err))

    def start(self, epoch: int, side_fd: int = -1) -> Any:
        """The handle of the connection, for Connection, which owns all from now on; side_fd stays the caller's.

        The side connection's end is the peer's end. It must be read meanwhile: an end behind unread bytes is not seen.
        Raises LinkDown; all is closed then.
        """
        err, verbs = codes.buffer(), self._open
        self._verbs = ffi.NULL
        handle = lib.xd_verbs_start(verbs, epoch, side_fd, err, len(err))
        if handle == ffi.NULL:
            raise codes.error(lib.XD_DEVICE, codes.text(err))
        return handle

    @property
    def _open(self) -> Any:
        if self._verbs == ffi.NULL:
            raise LocalProtocolError("verbs: closed, or started before")
        return self._verbs

    def close(self) -> None:
        """Give all back, unless `start` has handed it on; may be called twice."""
        verbs, self._verbs = self._verbs, ffi.NULL
        lib.xd_verbs_close(verbs)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.close()
