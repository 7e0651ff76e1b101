"""The last ten minutes, second by second: kept by the supervisor, so that a page that was just opened is not empty."""

import asyncio
import time
from collections import deque
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from expertd.cluster.record import quantile_s

if TYPE_CHECKING:
    from expertd.server.service import Service

TICK_S = 1.0
NUM_POINTS = 600


@dataclass(frozen=True)
class Point:
    """One second, `number` counted from 1: tokens per second generated and read for this host's clients, the open
    requests, and the waits of exchanges in the leader's latest report (None: no exchange)."""

    number: int
    at: float
    generated_per_s: float
    read_per_s: float
    open: int
    p50_us: float | None
    p99_us: float | None


class History:
    def __init__(self, service: "Service") -> None:
        self._service = service
        self._number = 0
        self._last, self._last_at = (0, 0), time.monotonic()
        self.points: deque[Point] = deque(maxlen=NUM_POINTS)

    async def run(self) -> None:
        """Tick until cancelled."""
        while True:
            await asyncio.sleep(TICK_S)
            self.tick()

    def tick(self) -> None:
        """Add the point of the time since the last one."""
        metrics, cluster, now = self._service.metrics, self._service.cluster, time.monotonic()
        counts, seconds = (metrics.num_generated, metrics.num_read), max(now - self._last_at, 1e-3)
        generated, read = (new - old for new, old in zip(counts, self._last, strict=True))
        self._last, self._last_at, self._number = counts, now, self._number + 1
        p50, p99 = wait_quantiles_us(cluster.record.latest.waits if cluster and cluster.record.latest else [])
        point = Point(
            self._number,
            round(time.time(), 1),
            round(generated / seconds, 1),
            round(read / seconds, 1),
            metrics.num_open,
            p50,
            p99,
        )
        self.points.append(point)

    def since(self, number: int) -> list[dict[str, Any]]:
        """The points after that of this number, in plain values; a number from before a restart gives all."""
        if number > self._number:
            number = 0
        return [asdict(point) for point in self.points if point.number > number]


def wait_quantiles_us(waits: list[int]) -> tuple[float | None, float | None]:
    """p50 and p99 of waits counted as in Stats, in microseconds."""
    p50, p99 = (
        (q if q is None else round(q * 1e6, 2)) for q in (quantile_s(waits, 0.5), quantile_s(waits, 0.99))
    )
    return p50, p99
