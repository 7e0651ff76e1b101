"""What is refused for want of memory, and how that is said."""

from dataclasses import replace
from pathlib import Path

import pytest

from expertd.checkpoint.inspect import CheckpointInfo
from expertd.cluster import memory
from expertd.cluster.memory import fits, needed_memory, with_memory
from expertd.config import GroupConfig
from expertd.errors import ConfigError
from tests.tiny import make_tiny

CONFIG = {
    "num_hidden_layers": 10,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 50,
    "max_position_embeddings": 1000,
}
INFO = CheckpointInfo(Path("/m"), "x", 8, 2, 1000, 3_000_000_000, None, CONFIG)
# Two bytes for each of 10 layers, keys and values of 2 heads of 50, 1000 tokens, 16 streams.
CACHES = 2 * 10 * 2 * 2 * 50 * 1000 * 16


def test_weights_and_caches_of_every_rank_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    group = GroupConfig("/m", 2)
    assert needed_memory(INFO, group) == 2 * (3_000_000_000 + CACHES)
    for more, is_enough in ((0, True), (-1, False)):
        monkeypatch.setattr(
            memory, "available_memory", lambda m=more: (needed_memory(INFO, group) + m, "why")
        )
        assert fits(INFO, group) == is_enough
    with_memory(INFO, group, freed_bytes=1)
    with_memory(INFO, GroupConfig("/m", 2, ignore_memory=True))
    with pytest.raises(ConfigError) as caught:
        with_memory(INFO, group)
    assert str(caught.value) == (
        "/m: 2 rank(s) with 3.0 GB of weights and 64.0 MB of caches for 16 streams of 1000 tokens each need 6.1 GB, "
        "and 6.1 GB are available (why). Use fewer --ranks or --max-streams, or a smaller checkpoint "
        "(`expertd quantize --fit`), or --ignore-memory."
    )


def test_a_draft_counts_and_narrow_caches_take_less(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draft = make_tiny(tmp_path / "draft", "qwen3")
    group = GroupConfig("/m", 2, draft_model=str(draft))
    # One layer of 2 heads of 16, a stream of the 512 tokens that its context holds.
    cache = 2 * 1 * 2 * 2 * 16 * 512
    weights = sum(p.stat().st_size for p in draft.glob("*.safetensors"))
    extra = needed_memory(INFO, group) - needed_memory(INFO, GroupConfig("/m", 2))
    assert 2 * (weights + cache - 3000) < extra <= 2 * (weights + cache)
    for bits, per_number in ((8, 8.5), (4, 4.5)):
        narrow = needed_memory(INFO, GroupConfig("/m", 2, kv_bits=bits))
        assert narrow == 2 * (3_000_000_000 + CACHES * per_number / 16)
    monkeypatch.setattr(memory, "available_memory", lambda: (0, "why"))
    with pytest.raises(ConfigError, match=r"3.0 GB of weights, 296.3 kB of a draft model and 64.0 MB"):
        with_memory(INFO, group)


def test_requests_may_have_what_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available_memory", lambda: (20 * 10**9, "why"))
    asked = GroupConfig("/m", 2, prefix_cache_bytes=10**9)
    # 20 GB less two ranks' weights and what is kept: 13; four fifths of it for two ranks.
    assert with_memory(INFO, asked).kv_cache_bytes == 5_200_000_000
    assert with_memory(INFO, asked, freed_bytes=10**9).kv_cache_bytes == 5_600_000_000
    assert with_memory(INFO, replace(asked, prefix_cache_bytes=14_000_000_000)).kv_cache_bytes == CACHES
    assert with_memory(INFO, replace(asked, kv_cache_bytes=7_000_000_000)).kv_cache_bytes == 7_000_000_000
    assert with_memory(INFO, replace(asked, ignore_memory=True)).kv_cache_bytes is None
    with pytest.raises(
        ConfigError, match=r"3.0 GB of weights and 7.1 GB of caches \(--kv-cache\) each need 20.2 GB"
    ):
        with_memory(INFO, replace(asked, kv_cache_bytes=7_100_000_000))
    with pytest.raises(ConfigError, match=r"--kv-cache 1.0 MB: 256 tokens of this model take 1.0 MB already"):
        with_memory(INFO, replace(asked, kv_cache_bytes=1_023_999))
