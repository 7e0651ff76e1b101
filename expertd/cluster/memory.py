"""Whether ranks fit in this machine's memory, before they are loaded: the system would end something else for them."""

from dataclasses import replace
from pathlib import Path

import psutil

from expertd.checkpoint.inspect import CheckpointInfo, check_draft
from expertd.checkpoint.sizes import GROWTH_TOKENS, cache_bytes, size_in_words
from expertd.config import GroupConfig
from expertd.errors import ConfigError
from expertd.topology.memory import available_memory

# Tokens of each stream whose caches must fit. Longer ones take what is left, as far as it goes (engine/kv_budget.py).
GUARD_TOKENS = 2048
# Of the memory that is left beside weights and kept prefixes: activations take some as well.
CACHES_OF_THE_REST = 0.8
# What finished requests' caches may take, of the machine's memory.
PREFIX_PART_OF_MEMORY = 0.1


def needed_memory(info: CheckpointInfo, group: GroupConfig) -> int:
    """Bytes for all ranks: each holds the whole model, the caches of every stream, and the draft model."""
    return group.num_ranks * (info.total_bytes + _least_caches(info, group) + _draft_bytes(group))


def fits(info: CheckpointInfo, group: GroupConfig) -> bool:
    return group.ignore_memory or needed_memory(info, group) <= available_memory()[0]


def with_memory(info: CheckpointInfo, group: GroupConfig, freed_bytes: int = 0) -> GroupConfig:
    """The group, with as many `kv_cache_bytes` as there are, unless it says how many.

    `freed_bytes` will be there as well. Raises ConfigError, with the arithmetic, when the ranks cannot fit.
    """
    available, why = available_memory()
    available += freed_bytes
    least, weights = _least_caches(info, group), info.total_bytes + _draft_bytes(group)
    if group.kv_cache_bytes and group.kv_cache_bytes < (
        block := cache_bytes(info.config, GROWTH_TOKENS, group.kv_bits)
    ):
        raise ConfigError(
            f"--kv-cache {size_in_words(group.kv_cache_bytes)}: {GROWTH_TOKENS} tokens of this model take "
            f"{size_in_words(block)} already. Give at least that."
        )
    if not group.ignore_memory and needed_memory(info, group) > available:
        raise ConfigError(_too_much(info, group, f"{size_in_words(available)} are available ({why})"))
    if group.kv_cache_bytes is not None or group.ignore_memory:
        return group
    left = available - group.num_ranks * weights - prefix_cache_bytes(group)
    return replace(group, kv_cache_bytes=max(least, int(CACHES_OF_THE_REST * left) // group.num_ranks))


def prefix_cache_bytes(group: GroupConfig) -> int:
    """What all ranks of a host keep for later requests."""
    if group.prefix_cache_bytes is not None:
        return group.prefix_cache_bytes
    return int(PREFIX_PART_OF_MEMORY * psutil.virtual_memory().total)


def _too_much(info: CheckpointInfo, group: GroupConfig, available: str) -> str:
    caches = f"caches for {group.max_streams} streams of {_num_tokens(info)} tokens"
    if group.kv_cache_bytes:
        caches = "caches (--kv-cache)"
    draft = f", {size_in_words(_draft_bytes(group))} of a draft model" if group.draft_model else ""
    return (
        f"{info.folder}: {group.num_ranks} rank(s) with {size_in_words(info.total_bytes)} of weights{draft} and "
        f"{size_in_words(_least_caches(info, group))} of {caches} each need "
        f"{size_in_words(needed_memory(info, group))}, and {available}. "
        "Use fewer --ranks or --max-streams, or a smaller checkpoint (`expertd quantize --fit`), or --ignore-memory."
    )


def _least_caches(info: CheckpointInfo, group: GroupConfig) -> int:
    """Bytes of one rank's caches without which it is not loaded."""
    return group.kv_cache_bytes or group.max_streams * _stream_bytes(info, group.kv_bits)


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
