"""What choosing tokens costs: `python -m expertd.bench.sampling`. Processor time, so that a busy machine tells as well.

Beside it stands what it replaced, a graph of MLX, which sorts the whole vocabulary twice for top-p.
"""

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import mlx.core as mx
import numpy as np

from expertd.model.sampler import Sampler, logprobs
from expertd.sampling import Sampling

VOCAB = 152_064
ROWS = (1, 16)
REPEATS = 9
REQUESTS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "temperature": {"temperature": 0.7},
    "top-p 0.95": {"temperature": 0.7, "top_p": 0.95},
    "top-k 50": {"temperature": 0.7, "top_k": 50},
    "min-p 0.05": {"temperature": 0.7, "min_p": 0.05},
    "greedy, repetition 1.1": {"repetition_penalty": 1.1},
    "top-k 20, top-p 0.8, presence 1.5": {
        "temperature": 0.7,
        "top_k": 20,
        "top_p": 0.8,
        "presence_penalty": 1.5,
    },
}


def main() -> None:
    logits = _logits(max(ROWS))
    rows = np.asarray(logits)
    print(
        f"vocabulary {VOCAB}, ms of processor time for {' and '.join(map(str, ROWS))} rows, median of {REPEATS}"
    )
    for name, options in REQUESTS.items():
        samplers = [_sampler(Sampling(**options), seed) for seed in range(max(ROWS))]
        _print(name, lambda n, s=samplers: [s[i].choose(rows[i], 5) for i in range(n)])  # type: ignore[misc]
    for num_top in (0, 5, 20):
        _print(f"logprobs, top {num_top}", lambda n, k=num_top: [logprobs(row, 5, k) for row in rows[:n]])  # type: ignore[misc]
    _print("MLX: greedy", lambda n: mx.eval(mx.argmax(logits[:n], axis=1)))
    _print("MLX: temperature", lambda n: mx.eval([_draw(row / 0.7) for row in logits[:n]]))
    _print("MLX: top-p 0.95", lambda n: mx.eval([_draw(_nucleus(row / 0.7, 0.95)) for row in logits[:n]]))


def _logits(num_rows: int) -> mx.array:
    """Like a language model's: 40 likely tokens and a long tail."""
    random = np.random.default_rng(0)
    rows = random.standard_normal((num_rows, VOCAB)).astype(np.float32) * 2.2
    for row in rows:
        row[random.integers(0, VOCAB, 40)] += random.uniform(4, 12, 40)
    logits = mx.array(rows)
    mx.eval(logits)
    return logits


def _sampler(sampling: Sampling, seed: int) -> Sampler:
    """With a prompt of 4000 tokens and an answer of 1000."""
    random = np.random.default_rng(seed)
    sampler = Sampler(sampling, seed, random.integers(0, VOCAB, 4000).tolist())
    for token_id in random.integers(0, VOCAB, 1000).tolist():
        sampler.add(token_id)
    return sampler


def _draw(logits: mx.array) -> mx.array:
    return mx.random.categorical(logits, key=mx.random.key(1))


def _nucleus(logits: mx.array, top_p: float) -> mx.array:
    order = mx.argsort(-logits)
    probs = mx.softmax(logits)[order]
    kept = mx.where(mx.cumsum(probs) - probs < top_p, logits[order], -mx.inf)
    return kept[mx.argsort(order)]


def _print(name: str, work: Callable[[int], object]) -> None:
    print(f"{name:36}" + "".join(f"{_cpu_ms(work, n):10.3f}" for n in ROWS), flush=True)


def _cpu_ms(work: Callable[[int], object], num_rows: int) -> float:
    taken = []
    for _ in range(REPEATS + 1):  # the first one warms up
        start = time.process_time()
        work(num_rows)
        taken.append((time.process_time() - start) * 1000)
    return median(taken[1:])


if __name__ == "__main__":
    main()
