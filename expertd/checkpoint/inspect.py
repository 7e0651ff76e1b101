"""Is this folder a checkpoint that can be served? Answered from headers alone, before any weight is read."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from expertd.checkpoint.config import (
    Config,
    family_of,
    normalise_config,
    num_experts,
    read_config,
    read_json,
    text_config,
    top_k,
)
from expertd.checkpoint.shards import TensorEntry, read_header
from expertd.errors import CheckpointError

INDEX = "model.safetensors.index.json"
# Each line is one way to write a tokenizer down; all the files of a line are needed.
TOKENIZERS = (("tokenizer.json",), ("tokenizer.model",), ("vocab.json", "merges.txt"))
CONTEXT_KEYS = ("max_position_embeddings", "n_positions", "max_sequence_length", "seq_length")
UNSTATED_CONTEXT = 4096


@dataclass(frozen=True)
class CheckpointInfo:
    """What a checked checkpoint is. `config` is normalised for mlx-lm, whose module `family` names.

    `context_length` is in tokens (4096 where the config does not say), `total_bytes` is what the weights take
    on disk, `quantization` is one line for people, None for unquantized weights.
    """

    folder: Path
    family: str
    num_experts: int
    top_k: int
    context_length: int
    total_bytes: int
    quantization: str | None
    config: Config = field(repr=False)


def check_checkpoint(folder: Path) -> CheckpointInfo:
    """Check config, tokenizer and every shard's header of `folder`; no tensor is read.

    Raises CheckpointError, in one line that names the file or tensor, for the first fault found.
    """
    if not folder.is_dir():
        raise CheckpointError(
            f"{folder}: no such folder. Give the folder of a checkpoint, 'demo', or a hub id."
        )
    config = normalise_config(read_config(folder))
    experts_per_token = top_k(config)
    if not 1 <= experts_per_token <= num_experts(config):
        raise CheckpointError(
            f"{folder / 'config.json'}: {experts_per_token} experts per token of {num_experts(config)}, "
            "wanted at least 1 and no more than there are. Download it again."
        )
    return _inspect(folder, config)


def check_draft(folder: Path) -> CheckpointInfo:
    """As check_checkpoint, for a draft model (engine/drafts.py), which need not have experts."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder. Give the folder of a small model.")
    return _inspect(folder, normalise_config(read_config(folder), needs_experts=False))


def _inspect(folder: Path, config: Config) -> CheckpointInfo:
    _check_tokenizer(folder)
    shards = check_shards(folder)
    return CheckpointInfo(
        folder=folder,
        family=family_of(config).name,
        num_experts=num_experts(config),
        top_k=top_k(config),
        context_length=_context_length(config),
        total_bytes=sum(entry.end - entry.begin for entries in shards.values() for entry in entries.values()),
        quantization=describe_quantization(config),
        config=config,
    )


def check_shards(folder: Path) -> dict[str, dict[str, TensorEntry]]:
    """The header of every shard of `folder`, by file name, checked against the index where there is one.

    Raises CheckpointError.
    """
    index = read_index(folder)
    # mlx-lm loads every file of this pattern, in the index or not.
    names = sorted({path.name for path in folder.glob("model*.safetensors")} | set(index.values()))
    if not names:
        raise CheckpointError(
            f"{folder}: no model*.safetensors in it, wanted at least one. Download it again."
        )
    for name in names:
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder / name}: named in {INDEX}, but absent. Download it again.")
    shards = {name: read_header(folder / name) for name in names}
    for tensor, name in index.items():
        if tensor not in shards[name]:
            raise CheckpointError(
                f"{folder / name}: lacks tensor {tensor[:200]!r} of {INDEX}. Download it again."
            )
    return shards


def describe_quantization(config: Config) -> str | None:
    """One line on how the weights are quantized, None when they are not."""
    settings = config.get("quantization") or config.get("quantization_config")
    if not isinstance(settings, dict):
        return None
    if "bits" not in settings or "quant_method" in settings:  # GPTQ and others have bits as well
        return repr(settings.get("quant_method"))[:40].strip("'")
    modules = [value for value in settings.values() if isinstance(value, dict)]
    all_bits = sorted({str(part["bits"]) for part in modules if "bits" in part} or {str(settings["bits"])})
    return (
        f"{settings.get('mode', 'affine')} {'/'.join(all_bits)} bits, groups of {settings.get('group_size')}"
    )


def _check_tokenizer(folder: Path) -> None:
    if not any(all((folder / name).is_file() for name in names) for names in TOKENIZERS):
        raise CheckpointError(
            f"{folder}: no tokenizer, wanted tokenizer.json, tokenizer.model, or vocab.json with merges.txt. "
            "Download it again."
        )


def read_index(folder: Path) -> dict[str, str]:
    """Tensor name -> shard name; empty when there is no index."""
    path = folder / INDEX
    if not path.is_file():
        return {}
    weight_map: Any = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict):
        raise CheckpointError(f"{path}: has no weight_map. Download it again.")
    for name in weight_map.values():
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise CheckpointError(
                f"{path}: names {str(name)[:80]!r} as a shard, wanted a .safetensors file beside it. "
                "Download it again."
            )
    return weight_map


def _context_length(config: Config) -> int:
    parts = (text_config(config), config)
    found = (part.get(key) for part in parts for key in CONTEXT_KEYS)
    return next((value for value in found if type(value) is int and value > 0), UNSTATED_CONTEXT)
