"""GET /metrics for Prometheus: what passed this server, and what the group and its leader say of themselves.

Names are the field's (vLLM's, which SGLang and others follow), with our prefix: `vllm:time_to_first_token_seconds` is
`expertd_time_to_first_token_seconds` here. docs/metrics.md lists them all.

Requests are counted as they pass (`watch`), tokens in plain numbers: the library's counters and histograms, with a lock
and a label each, took 3 us of a token, 0.3 are left. Everything else is read when a scrape asks for it.
"""

import itertools
import time
from bisect import bisect_left
from collections import Counter as Count
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
)
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

import expertd
from expertd.cluster.record import Record, quantile_s
from expertd.cluster.supervisor import Cluster
from expertd.engine.messages import Done, Started, Token
from expertd.errors import BusyError, ConfigError
from expertd.server.status import resident_bytes

if TYPE_CHECKING:
    from expertd.server.service import Service

Events = AsyncGenerator[Started | Token | Done, None]

# vLLM's, and below them what a small model on a fast machine needs.
FIRST_TOKEN_S = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 10, 20, 40, 80)
BETWEEN_TOKENS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1, 2.5, 5)
WHOLE_ANSWER_S = (0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920)
# Exchanges wait for 1 us (two ranks at one pace) to seconds (a peer about to be given up): powers of two in ns.
WAIT_BUCKETS = range(10, 33)

# A second series beside each counter, with the time of its birth, which no dashboard reads.
disable_created_metrics()  # type: ignore[no-untyped-call]

# By the values of the labels.
Values = dict[Any, float]


class Metrics:
    """The figures of one service, over all clusters that it has in its life."""

    def __init__(self, service: "Service") -> None:
        self._registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        registry.register(_GroupCollector(service))
        self._experts = CollectorRegistry()
        self._experts.register(_ExpertCollector(service))

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(f"expertd_{name}_seconds", text, buckets=buckets, registry=registry)

        self.first_token = histogram("time_to_first_token", "From request to first token.", FIRST_TOKEN_S)
        self.whole = histogram("e2e_request_latency", "From request to the end.", WHOLE_ANSWER_S)
        self.success = Counter(
            "expertd_request_success", "Ended requests.", ["finished_reason"], registry=registry
        )
        self.failure = Counter(
            "expertd_request_failure", "Requests without an answer.", ["reason"], registry=registry
        )
        self.open = Gauge("expertd_open_requests", "Requests of this host's clients.", registry=registry)
        self.between = Intervals(BETWEEN_TOKENS_S)
        self.num_generated = self.num_read = self.num_open = 0
        registry.register(_TokenCollector(self))

    async def watch(self, events: Events) -> Events:
        """Hand on a request's events and count them."""
        meter = _RequestMeter(self)
        try:
            async with aclosing(events):
                async for event in events:
                    meter.saw(event)
                    yield event
        except Exception as e:
            meter.fail(
                "busy" if isinstance(e, BusyError) else "invalid" if isinstance(e, ConfigError) else "error"
            )
            raise
        finally:
            meter.end("abort")  # unless it has ended: the reader left

    def render(self, accept: str, each_expert: bool) -> tuple[bytes, str]:
        """The text of a scrape and its content type; `each_expert` gives only the counts of every expert."""
        encode, content_type = choose_encoder(accept)
        return encode(self._experts if each_expert else self._registry), content_type


class Intervals:
    """A histogram of times, as Prometheus counts: each in the first bucket whose bound is not below it."""

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self._bounds, self._counts = bounds, [0] * (len(bounds) + 1)
        self._seconds = 0.0

    def observe(self, seconds: float) -> None:
        self._counts[bisect_left(self._bounds, seconds)] += 1
        self._seconds += seconds

    def collect(self, name: str, text: str) -> Metric:
        bounds = [*(str(float(bound)) for bound in self._bounds), "+Inf"]
        below = list(zip(bounds, map(float, itertools.accumulate(self._counts)), strict=True))
        return HistogramMetricFamily(name, text, buckets=below, sum_value=self._seconds)


class _TokenCollector(Collector):
    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    def collect(self) -> Iterator[Metric]:
        metrics = self._metrics
        yield CounterMetricFamily("expertd_prompt_tokens", "Tokens of prompts.", metrics.num_read)
        yield CounterMetricFamily("expertd_generation_tokens", "Tokens generated.", metrics.num_generated)
        yield metrics.between.collect(
            "expertd_inter_token_latency_seconds", "Between two tokens of an answer."
        )


class _RequestMeter:
    """One request's times, from now on."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._began = time.monotonic()
        self._last = 0.0
        self._over = False
        metrics.open.inc()
        metrics.num_open += 1

    def saw(self, event: Started | Token | Done) -> None:
        if isinstance(event, Token):
            now, num_tokens = time.monotonic(), len(event.token_ids)
            self._metrics.num_generated += num_tokens
            if self._last:
                self._metrics.between.observe((now - self._last) / max(1, num_tokens))
            else:
                self._metrics.first_token.observe(now - self._began)
            self._last = now
        elif isinstance(event, Started):
            self._metrics.num_read += event.prompt_tokens
        elif event.finish_reason == "cancelled":
            self.end("abort")
        else:
            self.end(event.finish_reason)

    def end(self, reason: str) -> None:
        """The first end counts."""
        if self._close():
            self._metrics.success.labels(reason).inc()
            self._metrics.whole.observe(time.monotonic() - self._began)

    def fail(self, reason: str) -> None:
        if self._close():
            self._metrics.failure.labels(reason).inc()

    def _close(self) -> bool:
        first, self._over = not self._over, True
        if first:
            self._metrics.open.dec()
            self._metrics.num_open -= 1
        return first


class _GroupCollector(Collector):
    """Reads the group's state when it is asked for."""

    def __init__(self, service: "Service") -> None:
        self._service = service

    def describe(self) -> list[Metric]:
        return []  # or the registry would collect at once, before there is a group

    def collect(self) -> Iterator[Metric]:
        cluster, hosts = self._service.cluster, self._service.hosts
        yield _build(self._service.config.model_id, cluster)
        ready = bool(cluster and not cluster.failure)
        yield GaugeMetricFamily("expertd_ready", "Whether requests can be answered.", ready)
        if cluster:
            yield from _of_group(cluster)
            yield from _of_engine(cluster.record)
            yield from _of_exchanges(cluster.record)
            yield _imbalance(cluster.record)
            yield from _of_planner(cluster.describe().get("planner") or {})
        if hosts:
            yield from _of_hosts(hosts())


class _ExpertCollector(_GroupCollector):
    """A series for each expert of each layer: thousands, for who asks for them."""

    def collect(self) -> Iterator[Metric]:
        if cluster := self._service.cluster:
            yield _chosen(cluster.record)


def _gauge(name: str, text: str, values: Values, labels: tuple[str, ...]) -> Metric:
    family = GaugeMetricFamily(f"expertd_{name}", text, labels=labels)
    for key, value in values.items():
        family.add_metric(key, value)
    return family


def _counter(name: str, text: str, values: Values, labels: tuple[str, ...]) -> Metric:
    family = CounterMetricFamily(f"expertd_{name}", text, labels=labels)
    for key, value in values.items():
        family.add_metric(key, value)
    return family


def _build(model_id: str, cluster: Cluster | None) -> Metric:
    values = {"version": expertd.__version__, "model_name": model_id}
    if cluster:
        ready = cluster.ready
        values |= {"family": ready.family, "kernels": ready.kernels, "isa": ready.isa, "device": ready.device}
    return InfoMetricFamily("expertd_build", "What serves, and what.", values)


def _of_group(cluster: Cluster) -> Iterator[Metric]:
    described, num_events = cluster.describe(), cluster.record.num_events
    states = Count(rank["state"] for rank in described["ranks"])
    yield _gauge("ranks", "Ranks of this host.", {(s,): n for s, n in states.items()}, ("state",))
    yield GaugeMetricFamily("expertd_epoch", "Number of the present epoch.", described["epoch"])
    yield CounterMetricFamily("expertd_failovers", "Ranks that died.", num_events["died"])
    yield CounterMetricFamily(
        "expertd_link_errors", "Epochs that a living rank found broken.", num_events["failed"]
    )
    memory = {
        (str(r["id"]),): float(resident_bytes(r["pid"])) for r in described["ranks"] if r["state"] != "dead"
    }
    yield _gauge("rank_memory_bytes", "Resident memory of a rank.", memory, ("rank",))


def _of_engine(record: Record) -> Iterator[Metric]:
    """The queue and the caches, if a rank of this host leads; what its steps did so far."""
    if now := record.latest:
        yield GaugeMetricFamily("expertd_num_requests_running", "Requests being answered.", now.num_running)
        yield GaugeMetricFamily("expertd_num_requests_waiting", "Requests that wait.", now.num_waiting)
        yield GaugeMetricFamily("expertd_kv_cache_tokens", "Tokens in the caches.", now.kv_tokens)
        yield GaugeMetricFamily("expertd_kv_cache_bytes", "The leader's caches.", now.kv_bytes)
        yield GaugeMetricFamily("expertd_kv_cache_budget_bytes", "What they may take.", now.kv_budget_bytes)
        used = {(k, s): 1.0 for k, d in KINDS.items() if (s := record.split_of(d))}
        yield _gauge("split_in_use", "1 for the split of the latest steps.", used, ("kind", "split"))
    yield _counter(
        "preemptions", "Requests that gave up their caches.", {(): float(record.num_preempted)}, ()
    )
    steps = {(s.split, "decode" if s.decode else "prefill"): s for s in record.steps.values()}
    for name, text, field in (
        ("steps", "Steps of the model.", "num_steps"),
        ("step_tokens", "Tokens that went through steps.", "num_tokens"),
        ("step_seconds", "Time that steps took.", "seconds"),
    ):
        yield _counter(name, text, {k: getattr(s, field) for k, s in steps.items()}, ("split", "kind"))
    for name, text, counts in (
        ("draft", "Tokens of drafts that were checked.", record.proposed),
        ("accepted", "Those of them that were right.", record.accepted),
    ):
        found = {(source,): float(n) for source, n in counts.items()}
        yield _counter(f"spec_decode_num_{name}_tokens", text, found, ("source",))


KINDS = {"decode": True, "prefill": False}


def _of_exchanges(record: Record) -> Iterator[Metric]:
    text = "What exchanges waited for a peer."
    histogram = HistogramMetricFamily("expertd_exchange_wait_seconds", text)
    if record.waits:
        below = [(str(2.0**i * 1e-9), sum(record.waits[: i + 1])) for i in WAIT_BUCKETS]
        histogram.add_metric([], [*below, ("+Inf", sum(record.waits))], record.waited_s)
    yield histogram
    waits = record.latest.waits if record.latest else []
    found = {(str(q),): v for q in (0.5, 0.99) if (v := quantile_s(waits, q)) is not None}
    yield _gauge("exchange_latency_seconds", "The same, of the latest second of work.", found, ("quantile",))


def _imbalance(record: Record) -> Metric:
    ratios = {(str(layer),): max(n) * len(n) / sum(n) for layer, n in sorted(record.loads.items()) if sum(n)}
    text = "The busiest expert of a layer over the mean, in a sample of decode steps."
    return _gauge("expert_load_imbalance", text, ratios, ("layer",))


def _chosen(record: Record) -> Metric:
    counts = {
        (str(layer), str(expert)): float(n)
        for layer, chosen in sorted(record.loads.items())
        for expert, n in enumerate(chosen)
    }
    text = "How often an expert was chosen, in a sample of decode steps."
    return _counter("expert_chosen", text, counts, ("layer", "expert"))


def _of_planner(planner: dict[str, Any]) -> Iterator[Metric]:
    chosen = {(work, choice["split"]): 1.0 for work, choice in planner.items()}
    yield _gauge("planner_choice", "1 for the split that is chosen for this work.", chosen, ("work", "split"))
    costs = {(w, s): ms / 1e3 for w, c in planner.items() for s, ms in c["costs_ms"].items()}
    yield _gauge("planner_cost_seconds", "What a step takes, as measured.", costs, ("work", "split"))


def _of_hosts(hosts: dict[str, Any]) -> Iterator[Metric]:
    states = Count(host.get("state", "") for host in hosts["hosts"])
    yield _gauge("hosts", "Other hosts.", {(s,): n for s, n in states.items()}, ("state",))
    routes = {host["name"]: host["route"] for host in hosts["hosts"] if host.get("route")}
    latency = {
        (name, q): route[key] / 1e6
        for name, route in routes.items()
        for q, key in (("0.5", "p50_us"), ("0.99", "p99_us"))
    }
    text = "What the way to a host took when it was measured."
    yield _gauge("route_latency_seconds", text, latency, ("host", "quantile"))
