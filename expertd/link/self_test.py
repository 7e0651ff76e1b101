"""What a host can ask its own link hardware and software. For a process that may be given up: a verbs call can hang."""

import ctypes
import time
from collections.abc import Sequence
from typing import Any

from expertd.link.mailbox import Mailbox
from expertd.native._transport import ffi, lib

PORT_STATES = {
    0: "absent",
    1: "down",
    2: "initialising",
    3: "armed",
    4: "active",
    5: "deferred",
}  # enum ibv_port_state
MAX_DEVICES = 16
# 4 and 32 frames of 4 KiB per message, 16 and 8 receives: what a link opens.
LATENCY_FRAMES, BULK_FRAMES, LATENCY_DEPTH, BULK_DEPTH = 4, 32, 16, 8


def load_library(candidates: Sequence[str]) -> str:
    """Load the verbs library by the first name that works, and give that name. Raises OSError with all reasons."""
    errors = []
    for name in candidates:
        try:
            ctypes.CDLL(name)
            return name
        except OSError as e:
            errors.append(str(e))
    raise OSError("; ".join(errors)[:300])


def list_devices(library: str = "") -> list[dict[str, Any]]:
    """Give each RDMA device's name, port_state, mtu (bytes), ipv4 addresses and error. Raises OSError with the reason."""
    found, err = ffi.new("xd_verbs_device[]", MAX_DEVICES), ffi.new("char[240]")
    count = lib.xd_verbs_devices(library.encode(), found, MAX_DEVICES, err, len(err))
    if count < 0:
        raise OSError(_text(err))
    return [_device(found[n]) for n in range(min(count, MAX_DEVICES))]


def _device(device: Any) -> dict[str, Any]:
    addresses = [_text(ip) for ip in device.ipv4]
    return {
        "name": _text(device.name),
        "port_state": PORT_STATES.get(device.port_state, f"state {device.port_state}"),
        "mtu": device.active_mtu,
        "ipv4": [ip for ip in addresses if ip],
        "error": _text(device.error),
    }


def open_device(device: str, local_ip: str, library: str = "") -> None:
    """Open a device as a link does, and close it: protection domain, memory, completion queue, queue pairs.

    Raises OSError with the reason.
    """
    names = [ffi.new("char[]", text.encode()) for text in (library, device, local_ip)]
    depths = [LATENCY_FRAMES, BULK_FRAMES, LATENCY_DEPTH, BULK_DEPTH]
    config, err = ffi.new("xd_verbs_config *", [*names, *depths, 1]), ffi.new("char[240]")
    verbs = lib.xd_verbs_open(config, err, len(err))
    if verbs == ffi.NULL:
        raise OSError(_text(err))
    lib.xd_verbs_close(verbs)


def time_swaps(box: Mailbox, size: int, num: int) -> list[float]:
    """Microseconds of `num` swaps of `size` bytes between two ranks, after a few that are not counted.

    Both ranks make the same call. Raises what Mailbox.check raises.
    """
    handle, sizes = ffi.cast("xd_mailbox *", box.address), ffi.new("size_t[]", [size] * 2)
    mine, everything = ffi.new("char[]", size), ffi.new("char[]", 2 * size)
    times = []
    for _ in range(num + num // 10 + 2):
        start = time.perf_counter()
        if lib.xd_mailbox_exchange(handle, 1, 0, mine, sizes, everything) != lib.XD_OK:
            break
        times.append((time.perf_counter() - start) * 1e6)
    box.check()
    return times[-num:]


def _text(chars: Any) -> str:
    return str(ffi.string(chars).decode(errors="replace"))
