import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import transformers

from expertd.checkpoint.config import normalise_config, num_experts, read_config, top_k, write_config
from expertd.checkpoint.families import find_family
from expertd.errors import CheckpointError
from tests.tiny import FAMILIES, Weights, as_generation_5, write_json

CLASSES = {
    "qwen3_moe": "Qwen3MoeConfig",
    "mixtral": "MixtralConfig",
    "deepseek_v3": "DeepseekV3Config",
    "glm4_moe": "Glm4MoeConfig",
    "gpt_oss": "GptOssConfig",
    "minimax": "MiniMaxM2Config",
    "qwen3_next": "Qwen3NextConfig",
}


def older(family: str) -> dict[str, Any]:
    """The tiny config of `family` as transformers 4 wrote it."""
    return FAMILIES[family](Weights(0))


def model_args(config: dict[str, Any]) -> dict[str, Any]:
    """Every field of mlx-lm's ModelArgs for a normalised config."""
    module = importlib.import_module(f"mlx_lm.models.{find_family(config['model_type']).name}")
    return vars(module.ModelArgs.from_dict(config))


def essential(args: dict[str, Any]) -> dict[str, Any]:
    """Without what does not matter: the spelling of rope_scaling, and keys that mlx-lm never reads."""
    scaling = dict(args.get("rope_scaling") or {})
    scaling.pop("partial_rotary_factor", None)
    if "type" in scaling:
        scaling["rope_type"] = scaling.pop("type")
    unused = ("rope_scaling", "intermediate_size") if "moe_intermediate_size" in args else ("rope_scaling",)
    return {key: value for key, value in args.items() if key not in unused} | {"rope_scaling": scaling}


@pytest.mark.parametrize("family", CLASSES)
def test_what_transformers_5_writes_gives_the_same_arguments(family: str) -> None:
    written = getattr(transformers, CLASSES[family])(**older(family)).to_dict()
    assert "rope_parameters" in written and "rope_theta" not in written
    assert essential(model_args(normalise_config(written))) == essential(model_args(older(family)))


@pytest.mark.parametrize("family", CLASSES)
def test_our_own_generation_5_matches_transformers(family: str) -> None:
    """tests/tiny.py writes configs without transformers; this keeps it honest."""
    written = getattr(transformers, CLASSES[family])(**older(family)).to_dict()
    ours = as_generation_5(older(family) | {"torch_dtype": "float32"})
    scaled = {"partial_rotary_factor"} if family == "minimax" else set()
    for key in ours["rope_parameters"].keys() - scaled:
        assert ours["rope_parameters"][key] == written["rope_parameters"][key]
    counts = [key for key in ours if "expert" in key or "layer" in key]
    assert {key: ours[key] for key in counts} == {key: written.get(key, ours[key]) for key in counts}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_config_that_mlx_lm_takes_is_unchanged(family: str) -> None:
    config = older(family)
    if family == "mixtral":
        assert "head_dim" not in config
    before = json.dumps(config)
    assert normalise_config(config) == json.loads(before)
    assert json.dumps(config) == before


def test_head_dim_is_filled_in_where_the_family_needs_it() -> None:
    config = older("qwen3_moe")
    del config["head_dim"]
    assert normalise_config(config)["head_dim"] == 16


def test_full_attention_must_come_at_an_interval() -> None:
    config = as_generation_5(older("qwen3_next") | {"torch_dtype": "float32"})
    assert normalise_config(config)["full_attention_interval"] == 2
    config["layer_types"][0] = "full_attention"
    with pytest.raises(CheckpointError, match="no fixed interval"):
        normalise_config(config)


def test_nested_text_config() -> None:
    nested = {"model_type": "qwen3_5_moe_text", "num_experts": 8, "num_experts_per_tok": 2}
    config = {"model_type": "qwen3_5_moe", "text_config": nested}
    normalised = normalise_config(config)
    assert normalised["text_config"] == nested
    assert (num_experts(normalised), top_k(normalised)) == (8, 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_file": "evil.py"}, "model_file 'evil.py' asks to run its own code"),
        ({"model_type": "no_such_family"}, "'no_such_family' is unknown to the installed mlx-lm"),
        ({"model_type": "../../etc/passwd"}, "unknown to the installed mlx-lm"),
        ({"model_type": "switch_layers"}, "unknown to the installed mlx-lm"),
        ({"model_type": None}, "model_type is None"),
        ({"num_experts": None}, "has no experts"),
        ({"num_experts": 1}, "has no experts"),
        ({"model_type": "llama", "num_experts": 0}, "llama has no experts"),
    ],
)
def test_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        normalise_config(older("qwen3_moe") | change)
    assert "\n" not in str(caught.value)


def test_counts_may_be_lists() -> None:
    """Hunyuan gives its top-k per layer."""
    assert top_k({"moe_topk": [8, 8, 4]}) == 8
    assert (top_k({"moe_topk": []}), top_k({"moe_topk": [8, "8"]})) == (0, 0)


def test_missing_key_is_named() -> None:
    config = older("qwen3_moe")
    del config["decoder_sparse_step"], config["hidden_size"]
    with pytest.raises(CheckpointError, match="lacks decoder_sparse_step, hidden_size"):
        normalise_config(config)


@pytest.mark.parametrize("text", ["", "{", "[1]", "[" * 100_000, '{"a": 1' + "0" * 9999 + "}", "\udcff"])
def test_malformed_config(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(CheckpointError, match="Download it again"):
        read_config(tmp_path)


def test_missing_config(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such file"):
        read_config(tmp_path)


def test_generation_config_has_the_last_word_on_eos(tmp_path: Path) -> None:
    write_json(tmp_path / "config.json", {"eos_token_id": 1, "limit": {"__float__": "Infinity"}})
    write_json(tmp_path / "generation_config.json", {"eos_token_id": [2, 3]})
    assert read_config(tmp_path) == {"eos_token_id": [2, 3], "limit": float("inf")}


def test_infinities_survive_writing(tmp_path: Path) -> None:
    write_config(tmp_path, {"a": [float("inf"), -float("inf")], "b": {"c": 1.5}})
    assert "Infinity" in (tmp_path / "config.json").read_text()
    assert read_config(tmp_path) == {"a": [float("inf"), -float("inf")], "b": {"c": 1.5}}


def test_family_names_are_mlx_lms() -> None:
    from mlx_lm.utils import MODEL_REMAPPING

    for model_type, module in MODEL_REMAPPING.items():
        assert find_family(model_type).name == module


def test_no_mlx_is_imported() -> None:
    code = (
        "import sys, expertd.checkpoint.inspect, expertd.checkpoint.locate\n"
        "from expertd.checkpoint.families import find_family\n"
        "find_family('qwen3_moe')\n"
        "assert not {n for n in sys.modules if n.split('.')[0] in ('mlx', 'mlx_lm')}"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
