"""What keys and values at 8 and 4 bits cost: `python -m expertd.bench.kv_bits [MODEL] [--windows 24]`.

Held-out text is read as a server reads it, through caches, by the kernels that would serve: bytes for a token,
divergence from the same model with caches as they are computed, perplexity, what a token takes after so many others.
"""

import argparse
import time
from statistics import median

import numpy as np

from expertd.checkpoint.inspect import check_checkpoint
from expertd.checkpoint.locate import find_checkpoint
from expertd.config import ACTIVATION_BITS, KV_BITS
from expertd.engine.runner import SOLO
from expertd.engine.text import Tokenizer
from expertd.model.kernels import open_kernels
from expertd.model.model import Model, cache_bytes
from expertd.quant.evaluate import cut_windows
from expertd.quant.metrics import Array, Comparison

WINDOW, CHUNK = 512, 64
CONTEXTS = (128, 512, 960)
ROUNDS, STEPS = 7, 8


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", nargs="?", default="demo")
    parser.add_argument("--windows", type=int, default=24)
    asked = parser.parse_args()
    info = check_checkpoint(find_checkpoint(asked.model))
    kernels = open_kernels("auto", ACTIVATION_BITS, num_threads=1)
    models = {bits: Model(info.folder, info.config, kernels=kernels, kv_bits=bits) for bits in KV_BITS}
    text = (find_checkpoint("demo") / "valid.txt").read_text(encoding="utf-8")
    windows = cut_windows(text, Tokenizer(info.folder, info.config), asked.windows, WINDOW)
    for bits, model in models.items():
        print(f"{bits or 'as computed'}: {_quality(models[0], model, windows)}")
    for length in CONTEXTS:
        print(f"after {length} tokens, ms for one: {_speeds(models, windows.flatten()[:length].tolist())}")


def _quality(reference: Model, model: Model, windows: Array) -> str:
    comparison = Comparison()
    for window in windows:
        comparison.add(_read(reference, window[:-1]), _read(model, window[:-1]), window[1:])
    found, cache = comparison.divergence(), model.new_cache()
    model.prefill(windows[0, :256].tolist(), cache, SOLO)
    size = cache_bytes(cache) // 256
    return f"{size} bytes a token, mean KL {found.mean_kl:.2e}, perplexity {comparison.perplexity:.3f}"


def _read(model: Model, window: Array) -> Array:
    cache, rows = model.new_cache(), []
    for at in range(0, len(window), CHUNK):
        rows.append(np.array(model.score(window[at : at + CHUNK].tolist(), cache, SOLO)))
    return np.concatenate(rows)


def _speeds(models: dict[int, Model], tokens: list[int]) -> str:
    """Medians of rounds that alternate."""
    caches = {bits: model.new_cache() for bits, model in models.items()}
    for bits, model in models.items():
        model.prefill(tokens, caches[bits], SOLO)
    times_s: dict[int, list[float]] = {bits: [] for bits in models}
    for _ in range(ROUNDS):
        for bits, model in models.items():
            began = time.perf_counter()
            for _ in range(STEPS):
                model.decode([tokens[0]], [caches[bits]], SOLO)
            times_s[bits].append((time.perf_counter() - began) / STEPS)
    return ", ".join(f"{bits or 'as computed'} {1e3 * median(found):.2f}" for bits, found in times_s.items())


if __name__ == "__main__":
    main()
