"""A group at work, as /status.json would tell of it: two hosts over RDMA, 48 layers of 128 experts, ten minutes."""

import copy
import math
import random
from typing import Any

NOW = 1_790_000_000.0
ROUTE = {
    "p50_us": 6.2,
    "p99_us": 19.0,
    "bandwidth_mb_s": 6100,
    "local": {"interface": "en3", "kind": "thunderbolt", "address": "10.0.0.2"},
}
STATUS: dict[str, Any] = {
    "status": "ok",
    "reason": None,
    "loaded": 1.0,
    "version": "0.1.0",
    "model": "Qwen3-235B-A22B-2bit",
    "host": "studio",
    "at": NOW,
    "uptime_s": 18_400.0,
    "ready": {"num_experts": 128, "top_k": 8},
    "group": {
        "epoch": 4,
        "split": "auto",
        "reason": None,
        "ranks": [{"id": 0, "pid": 7, "rank": 0, "state": "running", "memory_bytes": 82_400_000_000}],
        "planner": {
            "decode of 1": {
                "split": "experts",
                "reason": "1.48 times as fast as solo",
                "costs_ms": {"solo": 23.9, "experts": 16.1, "tokens": 24.4},
            },
            "prefill of 512": {
                "split": "tokens",
                "reason": "1.83 times as fast as solo",
                "costs_ms": {"solo": 911.0, "experts": 540.0, "tokens": 498.0},
            },
        },
        "link": None,
        "shares": [0.6, 0.4],
    },
    "hosts": {
        "role": "leader",
        "epoch": 4,
        "link": "verbs",
        "hosts": [{"name": "laptop", "state": "in the group", "reason": "", "ranks": 1, "route": ROUTE}],
    },
    "engine": {
        "running": 3,
        "waiting": 2,
        "kv_tokens": 48_312,
        "kv_bytes": 9_300_000_000,
        "reading": [{"num_read": 512, "num_tokens": 4096}],
        "splits": {"decode": "experts", "prefill": "tokens"},
        "steps": [],
        "exchange": {"num": 3_100_200, "p50_us": 7.4, "p99_us": 61.0},
    },
    "speed": {"generated_per_s": 61.4, "read_per_s": 212.0},
    "memory": {"total_bytes": 6 << 34, "available_bytes": 1 << 30},
    "history": [],
    "experts": {},
    "events": [
        {"number": 1, "at": NOW - 900, "kind": "begun", "text": "epoch 3 began with 2 rank(s)"},
        {"number": 2, "at": NOW - 268, "kind": "failed", "text": "host laptop: silent for 0.8 s"},
        {"number": 3, "at": NOW - 266, "kind": "begun", "text": "epoch 4 began with 2 rank(s)"},
        {
            "number": 4,
            "at": NOW - 200,
            "kind": "plan",
            "text": "decode of 1: experts, 1.48 times as fast",
        },
    ],
}


def busy_status() -> dict[str, Any]:
    rng, status = random.Random(5), copy.deepcopy(STATUS)
    for i in range(600):
        speed = 0.0 if 330 < i < 334 else 58 + 9 * math.sin(i / 40) + rng.uniform(-4, 4)
        point = {
            "number": i + 1,
            "at": NOW - 599 + i,
            "generated_per_s": speed,
            "read_per_s": 480.0 * (i % 97 < 6),
        }
        status["history"].append(point | {"open": 3, "p50_us": 7.0, "p99_us": 60.0})
    for layer in range(48):
        status["experts"][str(layer)] = [int(rng.lognormvariate(3.0, 0.7)) for _ in range(128)]
    return status
