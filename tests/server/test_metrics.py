"""/metrics: what is counted when requests end in every way, what the leader says, and the dashboard that reads it."""

import asyncio
import json
import os
import re
import signal
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client import CollectorRegistry, Histogram
from prometheus_client.parser import text_string_to_metric_families
from stub_group import LIMIT_S, group_of, until

from expertd.cluster.supervisor import Cluster
from expertd.config import ServerConfig
from expertd.server.app import make_app
from expertd.server.metrics import BETWEEN_TOKENS_S, Intervals
from expertd.server.service import Service

DASHBOARD = Path(__file__).parents[2] / "docs/grafana.json"
HOSTS = {
    "hosts": [
        {"name": "studio", "state": "in the group", "route": {"p50_us": 12.0, "p99_us": 50.0}},
        {"name": "gone", "state": "gone", "route": None},
    ]
}
Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


def with_service(folder: Path, test: Callable[[httpx.AsyncClient, Service], Awaitable[None]]) -> None:
    async def main() -> None:
        group = group_of(folder, 2)
        async with asyncio.timeout(LIMIT_S), Cluster.open(group) as cluster:
            service = Service(ServerConfig(model_id="demo", group=group), cluster, lambda: HOSTS)
            transport = httpx.ASGITransport(app=make_app(service))
            async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
                await test(client, service)

    asyncio.run(main())


async def scrape(client: httpx.AsyncClient, query: str = "") -> Samples:
    response = await client.get(f"/metrics{query}")
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/plain; version=")
    families = list(text_string_to_metric_families(response.text))
    return {(s.name, frozenset(s.labels.items())): s.value for f in families for s in f.samples}


def value(samples: Samples, name: str, **labels: str) -> float | None:
    return samples.get((f"expertd_{name}", frozenset(labels.items())))


def ask(prompt: str, **more: Any) -> dict[str, Any]:
    return {"model": "demo", "prompt": prompt, **more}


def test_requests_are_counted_as_they_end(tmp_path: Path) -> None:
    async def test(client: httpx.AsyncClient, service: Service) -> None:
        await client.post("/v1/completions", json=ask("one two three"))
        await client.post("/v1/completions", json=ask("one two three", max_tokens=2, stream=True))
        await client.post("/v1/completions", json=ask("@reject:long x"))
        await client.post("/v1/completions", json=ask("so fail"))
        leaving = asyncio.create_task(
            client.post("/v1/completions", json=ask("@slow:0.01 @repeat:900 x", max_tokens=900))
        )
        await until(lambda: service.metrics.num_generated > 6)
        assert value(await scrape(client), "open_requests") == 1
        leaving.cancel()
        await asyncio.gather(leaving, return_exceptions=True)
        found = await scrape(client)
        for reason in ("stop", "length", "abort"):
            assert value(found, "request_success_total", finished_reason=reason) == 1, reason
        assert value(found, "request_failure_total", reason="invalid") == 1
        assert value(found, "request_failure_total", reason="error") == 1
        assert value(found, "open_requests") == 0
        assert value(found, "prompt_tokens_total") == 3 + 3 + 2 + 1
        generated, between = (
            value(found, "generation_tokens_total"),
            value(found, "inter_token_latency_seconds_count"),
        )
        assert value(found, "time_to_first_token_seconds_count") == 4
        assert generated and between == generated - 4 and generated >= 3 + 2 + 1 + 1
        assert value(found, "e2e_request_latency_seconds_count") == 3

    with_service(tmp_path, test)


def test_what_the_leader_and_the_group_say(tmp_path: Path) -> None:
    async def test(client: httpx.AsyncClient, service: Service) -> None:
        assert service.cluster
        assert value(await scrape(client), "num_requests_running") is None  # nothing was said yet
        for _ in range(2):
            await client.post("/v1/completions", json=ask("@stats x"))
        cluster = service.cluster
        await until(lambda: all(rank["state"] == "running" for rank in cluster.describe()["ranks"]))
        found = await scrape(client)
        wanted: list[tuple[str, dict[str, str], float]] = [
            ("num_requests_running", {}, 2),
            ("num_requests_waiting", {}, 1),
            ("kv_cache_tokens", {}, 300),
            ("kv_cache_bytes", {}, 1 << 20),
            ("steps_total", {"split": "experts", "kind": "decode"}, 20),
            ("step_tokens_total", {"split": "tokens", "kind": "prefill"}, 1024),
            ("step_seconds_total", {"split": "experts", "kind": "decode"}, 1.0),
            ("split_in_use", {"split": "experts", "kind": "decode"}, 1),
            ("spec_decode_num_draft_tokens_total", {"source": "model"}, 18),
            ("spec_decode_num_accepted_tokens_total", {"source": "model"}, 12),
            ("exchange_wait_seconds_count", {}, 20),
            ("exchange_wait_seconds_sum", {}, 4e-5),
            ("exchange_wait_seconds_bucket", {"le": "2.048e-06"}, 10),
            ("exchange_latency_seconds", {"quantile": "0.5"}, 0),
            ("exchange_latency_seconds", {"quantile": "0.99"}, 7782.4e-9),
            ("expert_load_imbalance", {"layer": "1"}, 2.5),
            ("ranks", {"state": "running"}, 2),
            ("epoch", {}, 1),
            ("failovers_total", {}, 0),
            ("hosts", {"state": "in the group"}, 1),
            ("route_latency_seconds", {"host": "studio", "quantile": "0.99"}, 5e-5),
            ("ready", {}, 1),
        ]
        for name, labels, number in wanted:
            found_value = value(found, name, **labels)
            assert found_value is not None and abs(found_value - number) <= 1e-9 + 1e-6 * number, (
                name,
                labels,
            )
        assert value(found, "rank_memory_bytes", rank="1")
        each = await scrape(client, "?experts=each")
        assert value(each, "expert_chosen_total", layer="1", expert="3") == 10 and len(each) == 7

    with_service(tmp_path, test)


@pytest.mark.fault
def test_metrics_while_loading_and_after_a_death(tmp_path: Path) -> None:
    told: list[tuple[int, ...]] = []

    async def test(client: httpx.AsyncClient, service: Service) -> None:
        cluster, service.cluster = service.cluster, None
        assert cluster and value(await scrape(client), "ready") == 0
        service.loads(lambda *sizes: told.append(sizes))(5, 20)
        status = (await client.get("/status.json")).json()
        assert (status["status"], status["loaded"], status["group"]) == ("loading", 0.25, None)
        assert told == [(5, 20)]
        service.cluster = cluster
        os.kill(cluster.living[0].pid, signal.SIGKILL)
        await until(lambda: cluster.epoch == 2)
        found = await scrape(client)
        assert value(found, "failovers_total") == 1 and value(found, "epoch") == 2
        assert value(found, "ranks", state="dead") == 1 and value(found, "ready") == 1

    with_service(tmp_path, test)


def test_every_metric_of_the_dashboard_exists(tmp_path: Path) -> None:
    panels = [p for p in json.loads(DASHBOARD.read_text())["panels"] if p["type"] != "row"]
    queries = [target["expr"] for panel in panels for target in panel["targets"]]
    assert len(queries) >= 15 and all("$__" in q or "rate" not in q for q in queries)

    async def test(client: httpx.AsyncClient, service: Service) -> None:
        await client.post("/v1/completions", json=ask("@stats one two"))
        await client.post("/v1/completions", json=ask("so fail"))
        names = {name for name, _ in await scrape(client)}
        used = {name for query in queries for name in re.findall(r"expertd_\w+", query)}
        assert used - names == set() and len(used) > 15

    with_service(tmp_path, test)


def test_intervals_are_counted_as_the_library_counts() -> None:
    """Bounds, names and numbers of a histogram; a time that is a bound belongs to its bucket."""
    registry, ours = CollectorRegistry(), Intervals(BETWEEN_TOKENS_S)
    theirs = Histogram("x_seconds", "A text.", buckets=BETWEEN_TOKENS_S, registry=registry)
    for seconds in (0.0, 0.001, 0.0011, 0.5, 5.0, 6.0):
        ours.observe(seconds)
        theirs.observe(seconds)
    (wanted,) = registry.collect()
    assert ours.collect("x_seconds", "A text.").samples == wanted.samples
