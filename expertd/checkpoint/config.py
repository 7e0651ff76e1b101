"""config.json: read, and brought into the form that mlx-lm's model classes take.

Two generations of Hugging Face configs are about. Transformers 5 gathers everything on positions in
`rope_parameters` and renames a few keys; mlx-lm's classes mostly want the older form, and what they do not
recognise they ignore in silence. So keys are filled in here, only where they are missing: a config that
mlx-lm already takes comes back unchanged.
"""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from expertd.checkpoint.families import Family, find_family
from expertd.errors import CheckpointError

Config = dict[str, Any]

NUM_EXPERTS_KEYS = (
    "num_experts",
    "num_local_experts",
    "n_routed_experts",
    "moe_num_experts",
    "num_routed_experts",
)
TOP_K_KEYS = (
    "num_experts_per_tok", "num_experts_per_token", "experts_per_token",
    "moe_topk", "moe_top_k", "moe_k", "top_k_experts",
)  # fmt: skip
# Transformers writes floats that JSON lacks as {"__float__": "Infinity"}.
TAGGED_FLOATS = {"Infinity": float("inf"), "-Infinity": float("-inf"), "NaN": float("nan")}


def read_config(folder: Path) -> Config:
    """The folder's config.json as it stands, but that generation_config.json overrides `eos_token_id`.

    Raises CheckpointError when config.json is missing or is not a JSON object.
    """
    config = read_json(folder / "config.json")
    generation = folder / "generation_config.json"
    if generation.is_file() and (eos_token_id := read_json(generation).get("eos_token_id")):
        config["eos_token_id"] = eos_token_id
    return config


def normalise_config(config: Config, needs_experts: bool = True) -> Config:
    """A copy of `config` with every key that mlx-lm's ModelArgs of this family need.

    Raises CheckpointError when the checkpoint wants code of its own, is of a family that mlx-lm does not
    know, has no experts where it `needs_experts`, or lacks a key for which there is no safe default.
    """
    if config.get("model_file") is not None:
        raise CheckpointError(
            f"config.json: model_file {str(config['model_file'])[:80]!r} asks to run its own code, "
            "which expertd never does. Choose a checkpoint without it."
        )
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        raise CheckpointError(
            f"config.json: model_type is {str(model_type)[:80]}, wanted a name. Check the file."
        )
    family = family_of(config)
    if needs_experts:
        _require_experts(config, model_type)
    result = _fill(config, family)
    if missing := sorted(key for key in family.required if key not in result):
        raise CheckpointError(
            f"config.json: lacks {', '.join(missing)}, which {family.name} models need. "
            "Download the checkpoint again."
        )
    return result


def family_of(config: Config) -> Family:
    """The mlx-lm family of `config`, whose `model_type` is a string. Raises CheckpointError if none is."""
    given = config.get("architectures")
    architectures = tuple(a for a in given if isinstance(a, str)) if isinstance(given, list) else ()
    return find_family(config["model_type"], architectures)


def num_experts(config: Config) -> int:
    """How many routed experts each MoE layer has; 0 when the model has none."""
    return _first_count(config, NUM_EXPERTS_KEYS)


def top_k(config: Config) -> int:
    """How many experts serve one token; 0 when the config does not say."""
    return _first_count(config, TOP_K_KEYS)


def text_config(config: Config) -> Config:
    """The part of `config` that describes the language model: multimodal checkpoints nest it."""
    nested = config.get("text_config")
    return nested if isinstance(nested, dict) else config


def read_json(path: Path) -> Config:
    """The JSON object in `path`. Raises CheckpointError when there is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"), object_hook=_untag_float)
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{path}: no such file. Give the folder of a checkpoint, or download it again."
        ) from error
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}). Check its permissions.") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not JSON ({str(error)[:120]}). Download it again.") from error
    if not isinstance(value, dict):
        raise CheckpointError(
            f"{path}: found a JSON {type(value).__name__}, wanted an object. Download it again."
        )
    return value


def write_config(folder: Path, config: Config) -> None:
    """Write `config` as the folder's config.json, with infinities in a form that is still JSON."""
    text = json.dumps(_tag_floats(dict(sorted(config.items()))), indent=2, allow_nan=False)
    (folder / "config.json").write_text(text + "\n", encoding="utf-8")


def _first_count(config: Config, keys: tuple[str, ...]) -> int:
    """The first of `keys` that holds a positive count, or a list of one count per layer; 0 when none does."""
    found = (part.get(key) for part in (config, text_config(config)) for key in keys)
    lists = (value if isinstance(value, list) else [value] for value in found)
    return next((max(v) for v in lists if v and all(type(n) is int and n > 0 for n in v)), 0)


def _require_experts(config: Config, model_type: str) -> None:
    if num_experts(config) < 2:
        raise CheckpointError(
            f"config.json: {model_type} has no experts, and expertd serves mixture-of-experts models only. "
            "Choose one, or serve this model with mlx_lm.server."
        )


def _untag_float(value: Config) -> Any:
    tag = value.get("__float__") if len(value) == 1 else None
    return TAGGED_FLOATS.get(tag, value) if isinstance(tag, str) else value


def _tag_floats(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _tag_floats(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_tag_floats(part) for part in value]
    if isinstance(value, float) and not math.isfinite(value):
        return {"__float__": "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"}
    return value


def _fill(config: Config, family: Family) -> Config:
    result = dict(config)
    if isinstance(nested := config.get("text_config"), dict):
        result["text_config"] = _fill_text(nested)
    _fill_common(result, family)
    if special := SPECIAL.get(family.name):
        special(result)
    return result


def _fill_text(nested: Config) -> Config:
    """The nested language model's config, untouched if mlx-lm has no module for its type."""
    model_type = nested.get("model_type")
    try:
        family = find_family(model_type if isinstance(model_type, str) else "")
    except CheckpointError:
        return nested
    return _fill(nested, family)


def _fill_common(config: Config, family: Family) -> None:
    _fill_rope(config, family)
    for keys in (NUM_EXPERTS_KEYS, TOP_K_KEYS):
        _fill_alias(config, family, keys)
    if "head_dim" in family.required and config.get("head_dim") is None and (head_dim := _head_dim(config)):
        config["head_dim"] = head_dim
    if "mlp_only_layers" in family.required and config.get("mlp_only_layers") is None:
        config["mlp_only_layers"] = []
    if config.get("dtype") and "torch_dtype" not in config:
        config["torch_dtype"] = config["dtype"]


def _head_dim(config: Config) -> int:
    """The size of an attention head; 0 when the config does not say."""
    if given := _first_count(config, ("head_dim",)):
        return given
    return _first_count(config, ("hidden_size",)) // max(_first_count(config, ("num_attention_heads",)), 1)


def _fill_rope(config: Config, family: Family) -> None:
    """Spread transformers 5's `rope_parameters` over the older keys, unless the family reads it itself."""
    rope = config.get("rope_parameters")
    if isinstance(rope, dict) and "rope_theta" in rope and "rope_parameters" not in family.accepted:
        config.setdefault("rope_theta", rope["rope_theta"])
        if "partial_rotary_factor" in rope:
            config.setdefault("partial_rotary_factor", rope["partial_rotary_factor"])
        if rope.get("rope_type", "default") != "default" and config.get("rope_scaling") is None:
            config["rope_scaling"] = {key: rope[key] for key in rope if key != "rope_theta"}
    if "rope_scaling" in family.required:
        config.setdefault("rope_scaling", None)


def _fill_alias(config: Config, family: Family, keys: tuple[str, ...]) -> None:
    """Copy a count that goes by another name to the name that the family reads."""
    wanted = [key for key in keys if key in family.accepted]
    if wanted and not any(key in config for key in wanted) and (count := _first_count(config, keys)):
        config[wanted[0]] = count


def _fill_minimax(config: Config) -> None:
    factor = config.get("partial_rotary_factor", 1.0)
    if isinstance(factor, float | int):
        config.setdefault("rotary_dim", int(_head_dim(config) * factor))
    config.setdefault("shared_intermediate_size", 0)


def _fill_qwen3_next(config: Config) -> None:
    kinds = config.get("layer_types")
    if "full_attention_interval" in config or not isinstance(kinds, list) or "full_attention" not in kinds:
        return
    interval = kinds.index("full_attention") + 1
    if any((kind == "full_attention") != ((i + 1) % interval == 0) for i, kind in enumerate(kinds)):
        raise CheckpointError(
            f"config.json: layer_types have full attention at no fixed interval, wanted at every "
            f"{interval}th layer, which is all that mlx-lm builds. Choose another checkpoint."
        )
    config["full_attention_interval"] = interval


SPECIAL: dict[str, Callable[[Config], None]] = {"minimax": _fill_minimax, "qwen3_next": _fill_qwen3_next}
