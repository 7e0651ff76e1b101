"""How long a swap through the mailbox takes by itself, without MLX."""

import time

from expertd.link.mailbox import Mailbox
from expertd.native._transport import ffi, lib


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
