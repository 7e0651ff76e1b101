"""Models for the quantizer's decisions: mlx-lm's real classes, built at any size and never computed."""

from pathlib import Path
from typing import Any

from expertd.checkpoint.config import normalise_config, read_config
from expertd.model.classes import build_model
from expertd.quant.ewq import Entropy
from expertd.quant.modules import ModuleInfo, describe_modules
from tests.tiny import make_tiny

# config.json of deepseek-ai/DeepSeek-V3, as far as it gives shapes.
DEEPSEEK_V3: dict[str, Any] = {
    "model_type": "deepseek_v3", "architectures": ["DeepseekV3ForCausalLM"], "vocab_size": 129280,
    "hidden_size": 7168, "intermediate_size": 18432, "moe_intermediate_size": 2048, "num_hidden_layers": 61,
    "num_attention_heads": 128, "num_key_value_heads": 128, "n_shared_experts": 1, "n_routed_experts": 256,
    "routed_scaling_factor": 2.5, "kv_lora_rank": 512, "q_lora_rank": 1536, "qk_rope_head_dim": 64,
    "v_head_dim": 128, "qk_nope_head_dim": 128, "n_group": 8, "topk_group": 4, "num_experts_per_tok": 8,
    "first_k_dense_replace": 3, "moe_layer_freq": 1, "norm_topk_prob": True, "max_position_embeddings": 163840,
    "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "rope_scaling": None, "attention_bias": False,
    "topk_method": "noaux_tc", "scoring_func": "sigmoid",
}  # fmt: skip


def modules_of(config: dict[str, Any]) -> list[ModuleInfo]:
    return describe_modules(build_model(normalise_config(config)))


def tiny_modules(folder: Path, family: str) -> list[ModuleInfo]:
    return modules_of(read_config(make_tiny(folder, family)))


def entropy(num_weights: int, deviation: float) -> Entropy:
    """What normal weights of a small standard deviation have, without drawing them."""
    return Entropy(num_weights, deviation**2 / 2, 1 / num_weights)
