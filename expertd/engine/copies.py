"""When to copy keys and values to the other ranks instead of letting them read the tokens again.

Reading is the others' work, beside rank 0's steps; copying holds rank 0 up. On one host reading disturbs it as well. So
rows are copied where that takes a small part of what reading them would. A token of Qwen3-30B-A3B has 98 kB of
keys and values: 20 us over Thunderbolt 5, about a millisecond to read, and as much over gigabit Ethernet.
"""

from collections import deque
from collections.abc import Iterator
from statistics import median

from expertd.engine.plan import Rows

# How many times as long reading has to take.
TIMES_FASTER = 8
# Of a slot, which holds a frame, for rows: types and shapes of 2 arrays in 100 layers need 3 KiB.
FOR_ROWS = 15 / 16
# Beside each array's rows: its type, shape and length.
BESIDE_ROWS = 32
# Frames beside one step, of all streams that other ranks lack: 1 ms over Thunderbolt 5.
FRAMES_BESIDE = 4


class Copies:
    """What frames of rows took in this epoch, as rank 0 sees it: a slow link holds the third one up."""

    def __init__(self, slot_bytes: int) -> None:
        """`slot_bytes`: what a frame may have, 0 for no frames."""
        self._frame_bytes = int(slot_bytes * FOR_ROWS)
        self._frames_s: deque[float] = deque(maxlen=7)
        self.num_frames = 0

    def frame_tokens(self, row_bytes: int) -> int:
        """How many tokens' rows a frame holds; 0 if none or if there are no rows."""
        return self._frame_bytes // row_bytes if row_bytes else 0

    def frames_of(self, every: list[Rows]) -> Iterator[list[Rows]]:
        """Rows of several sequences, none more than `frame_tokens`, as many in a frame as it holds."""
        frame, free = list[Rows](), 0
        for rows in every:
            size = sum(len(data) + BESIDE_ROWS for _, _, data in rows.arrays)
            if frame and size > free:
                yield frame
                frame = []
            free = (free if frame else self._frame_bytes) - size
            frame.append(rows)
        if frame:
            yield frame

    def pay(self, num_tokens: int, row_bytes: int, read_s: float) -> bool:
        """Whether so many tokens of a sequence should be copied, if a rank needs `read_s` to read one."""
        room = self.frame_tokens(row_bytes)
        if not room:
            return False
        frame_s = median(self._frames_s) if self._frames_s else 0.0
        return TIMES_FASTER * frame_s * -(-num_tokens // room) <= read_s * num_tokens

    def took(self, seconds: float) -> None:
        """Note one frame."""
        self._frames_s.append(seconds)
        self.num_frames += 1
