"""When a fresh process takes the place of a dead rank: at once, and later and later if it keeps dying."""

import time
from dataclasses import dataclass

# A rank that lived this long died for a new reason.
GOOD_LIFE_S = 60.0
FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 60.0
# In a row, none of which lived for GOOD_LIFE_S: then this rank stays dead.
MAX_RESTARTS = 6


@dataclass
class _History:
    num_restarts: int = 0
    started_at: float = 0.0


class Restarts:
    """Counts the deaths of each rank. Of the first restart in a row nobody has to wait, of the second a second, then
    twice as long each time."""

    def __init__(self) -> None:
        self._histories: dict[int, _History] = {}

    def pause_s(self, rank_id: int) -> float | None:
        """A rank has died: in how many seconds it is to be started again; None: never."""
        history, now = self._histories.setdefault(rank_id, _History()), time.monotonic()
        if now - history.started_at > GOOD_LIFE_S:
            history.num_restarts = 0
        if history.num_restarts == MAX_RESTARTS:
            return None
        history.num_restarts += 1
        again = history.num_restarts - 1
        return min(FIRST_PAUSE_S * 2 ** (again - 1), LONGEST_PAUSE_S) if again else 0.0

    def started(self, rank_id: int) -> None:
        self._histories.setdefault(rank_id, _History()).started_at = time.monotonic()
