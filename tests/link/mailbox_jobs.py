"""What rank processes do for test_mailbox.py, started through tests/ranks.py."""

import hashlib
import random
import time

from expertd.link.mailbox import Mailbox


def payload(seed: int, round_id: int, rank: int, size: int) -> bytes:
    """The bytes that `rank` sends in a round: every rank, and the test, can compute everybody's."""
    return random.Random(f"{seed} {round_id} {rank}").randbytes(size)


def random_sizes(seed: int, round_id: int, num_ranks: int, slot_bytes: int) -> list[int]:
    """One size per rank: often nothing, a byte around a slot's end, or several slots."""
    rng = random.Random(f"{seed} {round_id}")
    kinds = [0, 1, slot_bytes - 1, slot_bytes, slot_bytes + 1, rng.randrange(4 * slot_bytes + 1)]
    return [rng.choice(kinds) for _ in range(num_ranks)]


def swap(box: Mailbox, seed: int, num_rounds: int, around_bytes: int) -> str:
    """Many exchanges of random sizes; gives a digest of all that came back."""
    sha = hashlib.sha256()
    for i in range(num_rounds):
        sizes = random_sizes(seed, i, box.num_ranks, around_bytes)
        sha.update(box.exchange(payload(seed, i, box.rank, sizes[box.rank]), sizes, tag=i + 1))
    return sha.hexdigest()


def answer(box: Mailbox, num_rounds: int) -> None:
    """Take part in exchanges of one byte per rank, then go on beating without coming to any more."""
    for i in range(num_rounds):
        box.exchange(b"x", [1] * box.num_ranks, tag=i + 1)
    print("answered", flush=True)
    time.sleep(60)


def swap_for(box: Mailbox, duration_s: float) -> int:
    """Exchange until rank 0's clock says so; the other ranks are slow, so rank 0 nearly always waits."""
    print("started", flush=True)
    end, num_rounds = time.monotonic() + duration_s, 0
    while True:
        num_rounds += 1
        flag = b"stop" if box.rank == 0 and time.monotonic() > end else b"more"
        if box.rank:
            time.sleep(0.05)
        everybody = box.exchange(flag, [4] * box.num_ranks, tag=num_rounds)
        if everybody.startswith(b"stop"):
            return num_rounds


def hold_the_gil(box: Mailbox, mailbox_fd: int, lifeline_fd: int) -> None:
    """Open the mailbox with a lifeline, then compute in C without ever letting another Python thread run."""
    box.close()
    with Mailbox(mailbox_fd, 1, 2, lifeline_fd=lifeline_fd):
        exponent = 300_000_000
        print("busy", flush=True)
        assert 3**exponent  # minutes
