"""What each rank does for test_mlx_link.py."""

import hashlib

from expertd.errors import ExpertdError
from expertd.link.mailbox import Mailbox
from expertd.model.mlx_link import gather_over, open_ring


def frames(mailbox: Mailbox, sizes: list[int]) -> list[tuple[int, str]]:
    """Length and digest of the frames that came, or at rank 0 of those that went."""
    link, seen = open_ring(mailbox.rank, gather_over(mailbox)), []
    for number, size in enumerate(sizes):
        frame: bytes | None = bytes((i * 7 + number) % 251 for i in range(size))
        if link.rank == 0:
            assert frame is not None
            link.send_frame(frame)
        else:
            frame = link.wait_frame(0.5)
        assert frame is not None
        seen.append((len(frame), hashlib.sha256(frame).hexdigest()))
    return seen


def twice(mailbox: Mailbox) -> tuple[str, str]:
    """The refusal of a second group, in which the ranks would have changed places."""
    gather = gather_over(mailbox)
    open_ring(mailbox.rank, gather)
    try:
        open_ring(1 - mailbox.rank, gather)
    except ExpertdError as e:
        return type(e).__name__, str(e)
    return "", ""
