"""Whether ranks fit in this machine's memory, before they are loaded: the system would end something else for them."""

from pathlib import Path

from expertd.checkpoint.inspect import CheckpointInfo, check_draft
from expertd.checkpoint.sizes import cache_bytes, size_in_words
from expertd.config import GroupConfig
from expertd.errors import ConfigError
from expertd.topology.memory import available_memory

# Tokens of each stream whose caches must fit; longer ones may, and the prefix cache gives up its memory first.
GUARD_TOKENS = 2048


def needed_memory(info: CheckpointInfo, group: GroupConfig) -> int:
    """Bytes for all ranks: each holds the whole model, the caches of every stream, and the draft model."""
    caches = group.max_streams * _stream_bytes(info, group.kv_bits)
    return group.num_ranks * (info.total_bytes + caches + _draft_bytes(group))


def fits(info: CheckpointInfo, group: GroupConfig) -> bool:
    return group.ignore_memory or needed_memory(info, group) <= available_memory()[0]


def require_memory(info: CheckpointInfo, group: GroupConfig, freed_bytes: int = 0) -> None:
    """Raise ConfigError, with the arithmetic, when the ranks of `group` cannot fit, `freed_bytes` included."""
    available, why = available_memory()
    available += freed_bytes
    if group.ignore_memory or needed_memory(info, group) <= available:
        return
    caches = f"caches for {group.max_streams} streams of {_num_tokens(info)} tokens"
    draft = f", {size_in_words(_draft_bytes(group))} of a draft model" if group.draft_model else ""
    raise ConfigError(
        f"{info.folder}: {group.num_ranks} rank(s) with {size_in_words(info.total_bytes)} of weights{draft} and "
        f"{size_in_words(group.max_streams * _stream_bytes(info, group.kv_bits))} of {caches} each need "
        f"{size_in_words(needed_memory(info, group))}, and {size_in_words(available)} are available ({why}). "
        "Use fewer --ranks or --max-streams, or a smaller checkpoint (`expertd quantize --fit`), or --ignore-memory."
    )


def _num_tokens(info: CheckpointInfo) -> int:
    return min(GUARD_TOKENS, info.context_length)


def _stream_bytes(info: CheckpointInfo, kv_bits: int = 0) -> int:
    return cache_bytes(info.config, _num_tokens(info), kv_bits)


def _draft_bytes(group: GroupConfig) -> int:
    """The draft's weights, and its cache of the one stream for which it guesses. Raises CheckpointError."""
    if not group.draft_model:
        return 0
    draft = check_draft(Path(group.draft_model))
    return draft.total_bytes + _stream_bytes(draft)
