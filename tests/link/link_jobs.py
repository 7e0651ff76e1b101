"""What rank processes do for test_pump.py and test_link_process.py, started through tests/link/hosts.py."""

import time
from typing import Any

from expertd.errors import ExpertdError
from expertd.link.mailbox import Mailbox
from tests.link.mailbox_jobs import payload, swap

__all__ = ["swap"]  # a job of its own here


def frames(box: Mailbox, sizes: list[int], pause_s: float = 0.0) -> bool:
    """Steps as a group does them: rank 0's frame, then an exchange, for each size."""
    for i, size in enumerate(sizes):
        time.sleep(pause_s)
        frame: bytes | None = payload(1, i, 0, size)
        if box.rank == 0:
            box.send_frame(payload(1, i, 0, size))
        else:
            while (frame := box.wait_frame(0.05)) is None:
                pass
        assert frame == payload(1, i, 0, size), f"frame {i}"
        everybody = [payload(2, i, rank, 5) for rank in range(box.num_ranks)]
        assert box.exchange(everybody[box.rank], [5] * box.num_ranks, tag=i + 1) == b"".join(everybody)
    return True


def until_down(box: Mailbox, size: int = 100, tag_from: int = 10**9) -> list[Any]:
    """Exchange until it fails; from exchange `tag_from` on at another place than the other ranks.

    Prints "started" after the first. Gives the error's class, its text and the exchanges before it. A wrong byte fails
    the job.
    """
    sizes = [size] * box.num_ranks
    for i in range(1, 10**9):
        everybody = [payload(5, i, rank, size) for rank in range(box.num_ranks)]
        try:
            found = box.exchange(everybody[box.rank], sizes, tag=i + (i >= tag_from))
        except ExpertdError as e:
            return [type(e).__name__, str(e), i - 1]
        assert found == b"".join(everybody), f"exchange {i}: wrong bytes"
        if i == 1:
            print("started", flush=True)
    raise AssertionError
