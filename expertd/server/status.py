"""GET /status.json: everything that the page and `expertd status` show, as one JSON object."""

import socket
import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import psutil

import expertd
from expertd.cluster.record import Record
from expertd.cluster.supervisor import Cluster
from expertd.engine.messages import Ready
from expertd.server.history import wait_quantiles_us

if TYPE_CHECKING:
    from expertd.server.service import Service

# A speed of now: of so many of the last points, or a token every two seconds would flicker.
NOW_POINTS = 3


def status(service: "Service", since: int = 0, experts: bool = True) -> dict[str, Any]:
    """The state of all that is served here; points of the history after number `since`, and the expert load if asked.

    `engine` is null where no rank of this host leads, or has said nothing yet.
    """
    cluster = service.cluster
    record = cluster.record if cluster else Record()
    failure = cluster.failure if cluster else None
    return {
        "status": "failed" if failure else "ok" if cluster else "loading",
        "reason": failure,
        "loaded": 1.0 if cluster else round(service.loaded, 3),
        "version": expertd.__version__,
        "model": service.config.model_id,
        "host": socket.gethostname(),
        "at": round(time.time(), 1),
        "uptime_s": round(time.monotonic() - service.started, 1),
        "ready": _ready(cluster.ready) if cluster else None,
        "group": _group(cluster) if cluster else None,
        "hosts": service.hosts() if service.hosts else None,
        "engine": _engine(record),
        "speed": _speed(service),
        "memory": {"total_bytes": (ram := psutil.virtual_memory()).total, "available_bytes": ram.available},
        "history": service.history.since(since),
        "events": [asdict(event) for event in record.events],
        "experts": {str(k): v for k, v in sorted(record.loads.items())} if experts else None,
    }


def _ready(ready: Ready) -> dict[str, Any]:
    names = (
        "family",
        "context_length",
        "num_experts",
        "top_k",
        "splits",
        "device",
        "architecture",
        "kernels",
        "isa",
    )
    return {name: getattr(ready, name) for name in names}


def _group(cluster: Cluster) -> dict[str, Any]:
    """Cluster.describe, with each rank's memory and what the group was asked to be."""
    described = cluster.describe()
    ranks = [
        {**r, "memory_bytes": resident_bytes(r["pid"]) if r["state"] != "dead" else 0}
        for r in described["ranks"]
    ]
    group = cluster.group
    return {**described, "ranks": ranks, "link": cluster.mlx_link or None, "shares": list(group.fractions)}


def resident_bytes(pid: int) -> int:
    """The resident memory of a process, 0 when it is gone."""
    try:
        return int(psutil.Process(pid).memory_info().rss)
    except psutil.Error:
        return 0


def _engine(record: Record) -> dict[str, Any] | None:
    """The leader's latest report, with what its steps did in that second."""
    if not (latest := record.latest):
        return None
    p50, p99 = wait_quantiles_us(latest.waits)
    return {
        "running": latest.num_running,
        "waiting": latest.num_waiting,
        "kv_tokens": latest.kv_tokens,
        "kv_bytes": latest.kv_bytes,
        # Without the ids: whoever knows a request's may read its answer.
        "reading": [{"num_read": r.num_read, "num_tokens": r.num_tokens} for r in latest.reading],
        "splits": {"decode": record.split_of(decode=True), "prefill": record.split_of(decode=False)},
        "steps": [asdict(s) for s in record.steps.values()],
        "exchange": {"num": sum(record.waits), "p50_us": p50, "p99_us": p99},
    }


def _speed(service: "Service") -> dict[str, float]:
    points = list(service.history.points)[-NOW_POINTS:]
    count = max(1, len(points))
    return {
        "generated_per_s": round(sum(p.generated_per_s for p in points) / count, 1),
        "read_per_s": round(sum(p.read_per_s for p in points) / count, 1),
    }
