"""What a model takes in memory beside its weights, and sizes for people."""

from typing import Any

from expertd.checkpoint.config import text_config

# mlx-lm's caches grow by so many tokens at once.
GROWTH_TOKENS = 256


def size_in_words(num_bytes: int) -> str:
    """A size for people, in powers of 1000: "16.2 GB"."""
    for power, unit in ((12, "TB"), (9, "GB"), (6, "MB"), (3, "kB")):
        if num_bytes >= 10**power:
            return f"{num_bytes / 10**power:.1f} {unit}"
    return f"{num_bytes} bytes"


def cache_bytes(config: dict[str, Any], num_tokens: int, kv_bits: int = 0) -> int:
    """The key-value cache of one sequence of `num_tokens` tokens (or the model's context), 16 bits per number.

    With `kv_bits`, so many, and a scale and a bias of 16 bits for each 64 numbers (model/kv_bits.py).
    An upper bound: layers with a sliding window or a state instead of a cache keep less.
    """
    part = text_config(config)

    def count(*keys: str) -> int:
        return next((part[key] for key in keys if isinstance(part.get(key), int) and part[key] > 0), 0)

    tokens = min(count("max_position_embeddings") or num_tokens, num_tokens)
    heads = count("num_attention_heads")
    width = 2 * (count("num_key_value_heads") or heads) * (
        count("head_dim") or count("hidden_size") // max(heads, 1)
    )  # fmt: skip
    if count("kv_lora_rank"):  # latent attention keeps one compressed row for all heads
        width = count("kv_lora_rank") + count("qk_rope_head_dim")
    numbers = width * count("num_hidden_layers") * tokens
    return numbers * (64 * kv_bits + 32) // (64 * 8) if kv_bits else 2 * numbers
