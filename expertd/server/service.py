"""What the endpoints of every API serve, and what they share."""

import logging
import time
import uuid
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field
from typing import Any

from expertd.cluster.supervisor import Cluster
from expertd.config import ServerConfig
from expertd.dialect import Dialect
from expertd.engine.messages import Submit
from expertd.errors import ClusterError
from expertd.server.errors import ApiError
from expertd.server.history import History
from expertd.server.metrics import Metrics
from expertd.server.wire import Event, Json

_log = logging.getLogger(__name__)


@dataclass
class Service:
    """What the endpoints serve. `cluster` is None while its ranks load; `hosts` describes the other hosts, if any."""

    config: ServerConfig
    cluster: Cluster | None = None
    hosts: Callable[[], dict[str, Any]] | None = None
    is_draining: bool = False
    created: int = field(default_factory=lambda: int(time.time()))
    started: float = field(default_factory=time.monotonic)
    loaded: float = 0.0  # of the weights, while the ranks load
    metrics: Metrics = field(init=False)
    history: History = field(init=False)

    def __post_init__(self) -> None:
        self.metrics, self.history = Metrics(self), History(self)

    def alive(self) -> Cluster:
        """Give the cluster. Raises ClusterError while it loads and after its end."""
        if self.is_draining:
            raise ClusterError("expertd is stopping and takes no new requests. Try again later.")
        if self.cluster is None:
            raise ClusterError("the model is still loading. Try again later.")
        if self.cluster.failure:
            raise ClusterError(self.cluster.failure)
        return self.cluster

    @property
    def status(self) -> tuple[str, str]:
        """One of loading, ok, unwell, draining and failed, and why, if it is one of the last three."""
        if self.is_draining:
            return "draining", "expertd is stopping and takes no new requests"
        if self.cluster is None:
            return "loading", ""
        if self.cluster.failure:
            return "failed", self.cluster.failure
        return ("unwell", self.cluster.ailment) if self.cluster.ailment else ("ok", "")

    def generate(self, submit: Submit) -> AsyncGenerator[Event, None]:
        """Cluster.generate, counted. Raises ClusterError as `alive`."""
        return self.metrics.watch(self.alive().generate(submit))

    def loads(self, told: Callable[[int, int], None]) -> Callable[[int, int], None]:
        """What a cluster that loads is to tell: how far it is, for the page, and `told`."""

        def tell(num_bytes: int, total_bytes: int) -> None:
            self.loaded = num_bytes / max(1, total_bytes)
            told(num_bytes, total_bytes)

        return tell

    def check_model(self, name: str) -> None:
        """Raise ApiError (404) unless `name` is the model that is served."""
        if name != self.config.model_id:
            message = f"model: {name!r} is not served here. Use {self.config.model_id!r}."
            raise ApiError(404, message, "model", "model_not_found")

    def head(self, prefix: str) -> Json:
        """What the objects of a new answer begin with."""
        request_id = f"{prefix}-{uuid.uuid4().hex}"
        return {"id": request_id, "created": int(time.time()), "model": self.config.model_id}

    @property
    def dialect(self) -> Dialect:
        return self.alive().ready.dialect


def our_bug(error: Exception) -> ApiError:
    """The error for what we did not expect, and a line in the log."""
    _log.error(
        "bug of expertd: %s: %s", type(error).__name__, error, exc_info=_log.isEnabledFor(logging.DEBUG)
    )
    return ApiError(500, f"{type(error).__name__}: {error}. This is a bug of expertd.")
