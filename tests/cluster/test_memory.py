"""What is refused for want of memory, and how that is said."""

from pathlib import Path

import pytest

from expertd.checkpoint.inspect import CheckpointInfo
from expertd.cluster import memory
from expertd.cluster.memory import fits, needed_memory, require_memory
from expertd.config import GroupConfig
from expertd.errors import ConfigError

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
    require_memory(INFO, group, freed_bytes=1)
    require_memory(INFO, GroupConfig("/m", 2, ignore_memory=True))
    with pytest.raises(ConfigError) as caught:
        require_memory(INFO, group)
    assert str(caught.value) == (
        "/m: 2 rank(s) with 3.0 GB of weights and 64.0 MB of caches for 16 streams of 1000 tokens each need 6.1 GB, "
        "and 6.1 GB are available (why). Use fewer --ranks or --max-streams, or a smaller checkpoint "
        "(`expertd quantize --fit`), or --ignore-memory."
    )
