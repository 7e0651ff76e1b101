"""Tiny random checkpoints of real families in Hugging Face layout: config, weights, tokenizer, template.

Weights come from numpy's RandomState, whose streams are frozen, so that golden files stay valid for ever.
They are scaled so that logits are about 1 and routers choose clearly but not always the same experts.
"""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

Config = dict[str, Any]
Array = np.ndarray[Any, np.dtype[Any]]
Tensors = dict[str, Array]

HIDDEN, HEADS, KV_HEADS, EXPERTS, INTER = 64, 4, 2, 8, 64
VOCAB = 257  # 256 bytes and the end-of-text token
END, END_ID = "<|endoftext|>", 256
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
# E2M1, the element of MXFP4: the values of codes 0-7; bit 3 is the sign.
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=np.float32)


class Weights:
    """Named random tensors, drawn in the order of the calls."""

    def __init__(self, seed: int) -> None:
        self.random = np.random.RandomState(seed)
        self.tensors: Tensors = {}

    def draw(self, *shape: int, scale: float) -> Array:
        """Normal numbers [*shape] with standard deviation `scale`."""
        return (self.random.standard_normal(shape) * scale).astype(np.float32)

    def linear(self, name: str, out: int, inp: int, gain: float = 1.0, bias: bool = False) -> None:
        self.tensors[f"{name}.weight"] = self.draw(out, inp, scale=gain / math.sqrt(inp))
        if bias:
            self.tensors[f"{name}.bias"] = self.draw(out, scale=0.1)

    def norm(self, name: str, size: int, around: float = 1.0) -> None:
        self.tensors[f"{name}.weight"] = around + self.draw(size, scale=0.1)

    def mlp(self, name: str, inter: int, names: tuple[str, str, str]) -> None:
        gate, up, down = names
        self.linear(f"{name}.{gate}", inter, HIDDEN, gain=1.5)
        self.linear(f"{name}.{up}", inter, HIDDEN, gain=1.5)
        self.linear(f"{name}.{down}", HIDDEN, inter)

    def attention(self, name: str, head_dim: int, bias: bool = False, q_factor: int = 1) -> None:
        self.linear(f"{name}.q_proj", HEADS * head_dim * q_factor, HIDDEN, bias=bias)
        self.linear(f"{name}.k_proj", KV_HEADS * head_dim, HIDDEN, bias=bias)
        self.linear(f"{name}.v_proj", KV_HEADS * head_dim, HIDDEN, bias=bias)
        self.linear(f"{name}.o_proj", HIDDEN, HEADS * head_dim, bias=bias)

    def frame(self, num_layers: int, around: float = 1.0) -> None:
        """Embedding, head, and the norms outside attention and experts."""
        self.tensors["model.embed_tokens.weight"] = self.draw(VOCAB, HIDDEN, scale=1.0)
        self.linear("lm_head", VOCAB, HIDDEN)
        self.norm("model.norm", HIDDEN, around)
        for i in range(num_layers):
            self.norm(f"model.layers.{i}.input_layernorm", HIDDEN, around)
            self.norm(f"model.layers.{i}.post_attention_layernorm", HIDDEN, around)


GATE_UP_DOWN = ("gate_proj", "up_proj", "down_proj")


def common(model_type: str, architecture: str, num_layers: int, **rest: Any) -> Config:
    return {
        "model_type": model_type,
        "architectures": [architecture],
        "hidden_size": HIDDEN,
        "intermediate_size": INTER,
        "num_hidden_layers": num_layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "vocab_size": VOCAB,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "max_position_embeddings": 512,
        "tie_word_embeddings": False,
        "eos_token_id": END_ID,
        "hidden_act": "silu",
        **rest,
    }


def qwen3_moe(w: Weights, head_dim: int = 16) -> Config:
    w.frame(2)
    for i in range(2):
        layer = f"model.layers.{i}"
        w.attention(f"{layer}.self_attn", head_dim)
        w.norm(f"{layer}.self_attn.q_norm", head_dim)
        w.norm(f"{layer}.self_attn.k_norm", head_dim)
        w.linear(f"{layer}.mlp.gate", EXPERTS, HIDDEN, gain=2)
        for e in range(EXPERTS):
            w.mlp(f"{layer}.mlp.experts.{e}", INTER, GATE_UP_DOWN)
    return common(
        "qwen3_moe", "Qwen3MoeForCausalLM", 2, head_dim=head_dim, num_experts=EXPERTS, num_experts_per_tok=4,
        moe_intermediate_size=INTER, norm_topk_prob=True, decoder_sparse_step=1, mlp_only_layers=[],
        attention_bias=False, rope_scaling=None,
    )  # fmt: skip


def mixtral(w: Weights) -> Config:
    w.frame(2)
    for i in range(2):
        layer = f"model.layers.{i}"
        w.attention(f"{layer}.self_attn", 16)
        w.linear(f"{layer}.block_sparse_moe.gate", EXPERTS, HIDDEN, gain=2)
        for e in range(EXPERTS):
            w.mlp(f"{layer}.block_sparse_moe.experts.{e}", INTER, ("w1", "w3", "w2"))
    return common(
        "mixtral",
        "MixtralForCausalLM",
        2,
        num_local_experts=EXPERTS,
        num_experts_per_tok=2,
        sliding_window=None,
    )


def deepseek_v3(w: Weights, q_lora_rank: int | None = 64) -> Config:
    kv_lora, rope, nope, value = 64, 16, 32, 32
    w.frame(3)
    for i in range(3):
        attn, mlp = f"model.layers.{i}.self_attn", f"model.layers.{i}.mlp"
        if q_lora_rank is None:
            w.linear(f"{attn}.q_proj", HEADS * (nope + rope), HIDDEN)
        else:
            w.linear(f"{attn}.q_a_proj", q_lora_rank, HIDDEN)
            w.norm(f"{attn}.q_a_layernorm", q_lora_rank)
            w.linear(f"{attn}.q_b_proj", HEADS * (nope + rope), q_lora_rank)
        w.linear(f"{attn}.kv_a_proj_with_mqa", kv_lora + rope, HIDDEN)
        w.norm(f"{attn}.kv_a_layernorm", kv_lora)
        w.linear(f"{attn}.kv_b_proj", HEADS * (nope + value), kv_lora)
        w.linear(f"{attn}.o_proj", HIDDEN, HEADS * value)
        if i == 0:
            w.mlp(mlp, 128, GATE_UP_DOWN)
        else:
            sigmoid_experts(w, mlp)
    yarn = {
        "type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128,
        "beta_fast": 32, "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 1.0,
    }  # fmt: skip
    return common(
        "deepseek_v3", "DeepseekV3ForCausalLM", 3, intermediate_size=128, moe_intermediate_size=INTER,
        num_key_value_heads=HEADS, n_routed_experts=EXPERTS, n_shared_experts=1, num_experts_per_tok=3,
        n_group=4, topk_group=2, routed_scaling_factor=2.5, norm_topk_prob=True, topk_method="noaux_tc",
        scoring_func="sigmoid", first_k_dense_replace=1, moe_layer_freq=1, kv_lora_rank=kv_lora,
        q_lora_rank=q_lora_rank, qk_rope_head_dim=rope, qk_nope_head_dim=nope, v_head_dim=value,
        attention_bias=False, rope_scaling=yarn,
    )  # fmt: skip


def deepseek_v3_plain_q(w: Weights) -> Config:
    return deepseek_v3(w, q_lora_rank=None)


def sigmoid_experts(w: Weights, mlp: str) -> None:
    """Router with a correction bias, experts and one shared expert, as in DeepSeek-V3 and GLM-4.5."""
    w.linear(f"{mlp}.gate", EXPERTS, HIDDEN, gain=2)
    w.tensors[f"{mlp}.gate.e_score_correction_bias"] = w.draw(EXPERTS, scale=0.05)
    for e in range(EXPERTS):
        w.mlp(f"{mlp}.experts.{e}", INTER, GATE_UP_DOWN)
    w.mlp(f"{mlp}.shared_experts", INTER, GATE_UP_DOWN)


def glm4_moe(w: Weights) -> Config:
    w.frame(2)
    for i in range(2):
        attn, mlp = f"model.layers.{i}.self_attn", f"model.layers.{i}.mlp"
        for proj, heads in (("q_proj", HEADS), ("k_proj", KV_HEADS), ("v_proj", KV_HEADS)):
            w.linear(f"{attn}.{proj}", heads * 16, HIDDEN, bias=True)
        w.linear(f"{attn}.o_proj", HIDDEN, HEADS * 16)
        w.norm(f"{attn}.q_norm", 16)
        w.norm(f"{attn}.k_norm", 16)
        if i == 0:
            w.mlp(mlp, 128, GATE_UP_DOWN)
        else:
            sigmoid_experts(w, mlp)
    return common(
        "glm4_moe", "Glm4MoeForCausalLM", 2, intermediate_size=128, moe_intermediate_size=INTER, head_dim=16,
        n_routed_experts=EXPERTS, n_shared_experts=1, num_experts_per_tok=2, n_group=1, topk_group=1,
        routed_scaling_factor=1.0, norm_topk_prob=True, first_k_dense_replace=1, use_qk_norm=True,
        attention_bias=True, partial_rotary_factor=0.5, rope_scaling=None,
    )  # fmt: skip


def gpt_oss(w: Weights) -> Config:
    """Experts as in the bf16 checkpoints: [expert, in, out], gate and up interleaved along out."""
    w.frame(2)
    for i in range(2):
        attn, mlp = f"model.layers.{i}.self_attn", f"model.layers.{i}.mlp"
        w.attention(attn, 32, bias=True)
        w.tensors[f"{attn}.sinks"] = w.draw(HEADS, scale=1.0)
        w.linear(f"{mlp}.router", EXPERTS, HIDDEN, gain=2, bias=True)
        w.tensors[f"{mlp}.experts.gate_up_proj"] = w.draw(EXPERTS, HIDDEN, 2 * INTER, scale=0.125)
        w.tensors[f"{mlp}.experts.gate_up_proj_bias"] = w.draw(EXPERTS, 2 * INTER, scale=0.1)
        w.tensors[f"{mlp}.experts.down_proj"] = w.draw(EXPERTS, INTER, HIDDEN, scale=0.125)
        w.tensors[f"{mlp}.experts.down_proj_bias"] = w.draw(EXPERTS, HIDDEN, scale=0.1)
    yarn = {
        "rope_type": "yarn", "factor": 4.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
        "original_max_position_embeddings": 128,
    }  # fmt: skip
    return common(
        "gpt_oss", "GptOssForCausalLM", 2, head_dim=32, num_local_experts=EXPERTS, num_experts_per_tok=4,
        sliding_window=16, layer_types=["sliding_attention", "full_attention"], rope_scaling=yarn,
        rope_theta=150000, attention_bias=True, swiglu_limit=7.0,
    )  # fmt: skip


def gpt_oss_mxfp4(w: Weights) -> Config:
    """The published gpt-oss: experts in MXFP4, [expert, out, blocks of 32, 16 bytes] and scales."""
    config = gpt_oss(w)
    for name in [n for n in w.tensors if n.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        values = np.ascontiguousarray(w.tensors.pop(name).swapaxes(-1, -2))
        w.tensors[f"{name}_blocks"], w.tensors[f"{name}_scales"] = to_mxfp4(values)
    config["quantization_config"] = {
        "quant_method": "mxfp4",
        "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router", "lm_head"],
    }
    return config


def minimax(w: Weights) -> Config:
    w.frame(2)
    for i in range(2):
        attn, moe = f"model.layers.{i}.self_attn", f"model.layers.{i}.block_sparse_moe"
        w.attention(attn, 16)
        w.norm(f"{attn}.q_norm", HEADS * 16)
        w.norm(f"{attn}.k_norm", KV_HEADS * 16)
        w.linear(f"{moe}.gate", EXPERTS, HIDDEN, gain=2)
        w.tensors[f"{moe}.e_score_correction_bias"] = w.draw(EXPERTS, scale=0.05)
        for e in range(EXPERTS):
            w.mlp(f"{moe}.experts.{e}", INTER, ("w1", "w3", "w2"))
    return common(
        "minimax_m2", "MiniMaxM2ForCausalLM", 2, head_dim=16, num_local_experts=EXPERTS,
        num_experts_per_tok=3, shared_intermediate_size=0, rotary_dim=8, scoring_func="sigmoid",
        use_qk_norm=True, bos_token_id=END_ID,
    )  # fmt: skip


def qwen3_next(w: Weights) -> Config:
    key_heads, value_heads, head = 2, 4, 16
    w.frame(4, around=0.0)
    for i in range(4):
        layer, mlp = f"model.layers.{i}", f"model.layers.{i}.mlp"
        if (i + 1) % 2:
            delta_net(w, f"{layer}.linear_attn", key_heads, value_heads, head)
        else:
            w.attention(f"{layer}.self_attn", 16, q_factor=2)
            w.norm(f"{layer}.self_attn.q_norm", 16, around=0.0)
            w.norm(f"{layer}.self_attn.k_norm", 16, around=0.0)
        w.linear(f"{mlp}.gate", EXPERTS, HIDDEN, gain=2)
        for e in range(EXPERTS):
            w.mlp(f"{mlp}.experts.{e}", INTER, GATE_UP_DOWN)
        w.mlp(f"{mlp}.shared_expert", INTER, GATE_UP_DOWN)
        w.linear(f"{mlp}.shared_expert_gate", 1, HIDDEN)
    return common(
        "qwen3_next", "Qwen3NextForCausalLM", 4, head_dim=16, num_experts=EXPERTS, num_experts_per_tok=4,
        moe_intermediate_size=INTER, shared_expert_intermediate_size=INTER, norm_topk_prob=True,
        decoder_sparse_step=1, mlp_only_layers=[], full_attention_interval=2, partial_rotary_factor=0.25,
        linear_num_key_heads=key_heads, linear_num_value_heads=value_heads, linear_key_head_dim=head,
        linear_value_head_dim=head, linear_conv_kernel_dim=4, attention_bias=False, rope_scaling=None,
    )  # fmt: skip


def delta_net(w: Weights, name: str, key_heads: int, value_heads: int, head: int) -> None:
    keys, values = key_heads * head, value_heads * head
    w.linear(f"{name}.in_proj_qkvz", 2 * keys + 2 * values, HIDDEN)
    w.linear(f"{name}.in_proj_ba", 2 * value_heads, HIDDEN)
    w.tensors[f"{name}.conv1d.weight"] = w.draw(2 * keys + values, 1, 4, scale=0.5)
    w.tensors[f"{name}.dt_bias"] = 1 + w.draw(value_heads, scale=0.1)
    w.tensors[f"{name}.A_log"] = w.draw(value_heads, scale=1.0)
    w.norm(f"{name}.norm", head)
    w.linear(f"{name}.out_proj", HIDDEN, values)


def qwen3_moe_heads_of_32(w: Weights) -> Config:
    """Heads as wide as a group of quantized keys."""
    return qwen3_moe(w, 32)


def qwen3_moe_heads_of_64(w: Weights) -> Config:
    return qwen3_moe(w, 64)


def qwen3(w: Weights) -> Config:
    """Without experts: a draft."""
    w.frame(1)
    w.attention("model.layers.0.self_attn", 16)
    w.norm("model.layers.0.self_attn.q_norm", 16)
    w.norm("model.layers.0.self_attn.k_norm", 16)
    w.mlp("model.layers.0.mlp", INTER, GATE_UP_DOWN)
    return common("qwen3", "Qwen3ForCausalLM", 1, head_dim=16, attention_bias=False, rope_scaling=None)


def longcat_flash(w: Weights) -> Config:
    """Two attentions a layer, with a cache each."""
    kv_lora, rope, nope, value = 32, 16, 16, 16
    w.tensors["model.embed_tokens.weight"] = w.draw(VOCAB, HIDDEN, scale=1.0)
    w.linear("lm_head", VOCAB, HIDDEN)
    w.norm("model.norm", HIDDEN)
    layer = "model.layers.0"
    for i in range(2):
        attn = f"{layer}.self_attn.{i}"
        w.linear(f"{attn}.q_a_proj", 32, HIDDEN)
        w.norm(f"{attn}.q_a_layernorm", 32)
        w.linear(f"{attn}.q_b_proj", HEADS * (nope + rope), 32)
        w.linear(f"{attn}.kv_a_proj_with_mqa", kv_lora + rope, HIDDEN)
        w.norm(f"{attn}.kv_a_layernorm", kv_lora)
        w.linear(f"{attn}.kv_b_proj", HEADS * (nope + value), kv_lora)
        w.linear(f"{attn}.o_proj", HIDDEN, HEADS * value)
        w.norm(f"{layer}.input_layernorm.{i}", HIDDEN)
        w.norm(f"{layer}.post_attention_layernorm.{i}", HIDDEN)
        w.mlp(f"{layer}.mlps.{i}", 128, GATE_UP_DOWN)
    w.linear(f"{layer}.mlp.router.classifier", EXPERTS + 2, HIDDEN, gain=2)
    w.tensors[f"{layer}.mlp.router.e_score_correction_bias"] = w.draw(EXPERTS + 2, scale=0.05)
    for e in range(EXPERTS):
        w.mlp(f"{layer}.mlp.experts.{e}", INTER, GATE_UP_DOWN)
    config = common(
        "longcat_flash", "LongcatFlashForCausalLM", 1, attention_method="MLA", ffn_hidden_size=128,
        expert_ffn_hidden_size=INTER, moe_topk=3, n_routed_experts=EXPERTS, zero_expert_num=2,
        zero_expert_type="identity", kv_lora_rank=kv_lora, q_lora_rank=32, qk_rope_head_dim=rope,
        qk_nope_head_dim=nope, v_head_dim=value, routed_scaling_factor=1.5, mla_scale_q_lora=True,
        mla_scale_kv_lora=True, attention_bias=False,
    )  # fmt: skip
    return {**config, "num_layers": 1}


FAMILIES: dict[str, Callable[[Weights], Config]] = {
    "qwen3_moe": qwen3_moe,
    "mixtral": mixtral,
    "deepseek_v3": deepseek_v3,
    "deepseek_v3_plain_q": deepseek_v3_plain_q,
    "glm4_moe": glm4_moe,
    "gpt_oss": gpt_oss,
    "gpt_oss_mxfp4": gpt_oss_mxfp4,
    "minimax": minimax,
    "qwen3_next": qwen3_next,
}
SPECIAL: dict[str, Callable[[Weights], Config]] = {
    "qwen3_moe_heads_of_32": qwen3_moe_heads_of_32,
    "qwen3_moe_heads_of_64": qwen3_moe_heads_of_64,
    "qwen3": qwen3,
    "longcat_flash": longcat_flash,
}


def make_tiny(folder: Path, family: str, dtype: str = "float32", seed: int = 0, generation: int = 4) -> Path:
    """Write a tiny checkpoint of `family` (a key of FAMILIES or SPECIAL) into `folder` and return `folder`.

    `dtype` is that of the weights, float32 or bfloat16; correction biases and MXFP4 blocks keep their own.
    `generation` is that of the config: 4 or 5, the release of transformers that would have written it.
    """
    weights = Weights(seed)
    config = (FAMILIES | SPECIAL)[family](weights)
    config["torch_dtype"] = dtype
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", as_generation_5(config) if generation == 5 else config)
    write_safetensors(folder / "model.safetensors", weights.tensors, dtype)
    write_tokenizer(folder)
    return folder


def as_generation_5(config: Config) -> Config:
    """What transformers 5 would write for this config."""
    new = dict(config)
    rope = {
        "rope_type": "default",
        **(new.pop("rope_scaling", None) or {}),
        "rope_theta": new.pop("rope_theta"),
    }
    if "type" in rope:
        rope["rope_type"] = rope.pop("type")
    if "rotary_dim" in new:
        rope["partial_rotary_factor"] = new.pop("rotary_dim") / new["head_dim"]
    if "partial_rotary_factor" in new:
        rope["partial_rotary_factor"] = new.pop("partial_rotary_factor")
    new["rope_parameters"] = rope
    new["dtype"] = new.pop("torch_dtype")
    if config["model_type"] == "qwen3_moe":
        new["num_local_experts"] = new.pop("num_experts")
    if interval := new.pop("full_attention_interval", None):
        kinds = ["linear_attention"] * (interval - 1) + ["full_attention"]
        new["layer_types"] = kinds * (config["num_hidden_layers"] // interval)
    for key in ("shared_intermediate_size", "scoring_func", "topk_method", "moe_layer_freq"):
        new.pop(key, None)
    return new


def to_bfloat16(values: Array) -> Array:
    """The upper halves of float32, rounded to nearest even, as uint16 of the same shape."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def to_mxfp4(values: Array) -> tuple[Array, Array]:
    """[..., n] as blocks [..., n/32, 16] of two 4-bit codes a byte, low first, and scales [..., n/32] in
    E8M0."""
    groups = values.reshape(*values.shape[:-1], -1, 32)
    largest = np.abs(groups).max(-1)
    exponent = np.floor(np.log2(np.maximum(largest, 1e-30))).astype(np.int32) - 2
    scaled = groups / np.exp2(exponent)[..., None].astype(np.float32)
    codes = (
        np.abs(np.abs(scaled)[..., None] - E2M1).argmin(-1).astype(np.uint8)
        | (scaled < 0).astype(np.uint8) << 3
    )
    return codes[..., ::2] | (codes[..., 1::2] << 4), (exponent + 127).astype(np.uint8)


def write_safetensors(path: Path, tensors: Tensors, dtype: str = "float32") -> None:
    """Write float32 tensors as `dtype`, and integers as they are; by hand, as numpy has no bfloat16."""
    header: Config = {"__metadata__": {"format": "pt"}}
    blobs, end = [], 0
    for name, values in tensors.items():
        code = {"float32": "F32", "uint8": "U8"}[values.dtype.name]
        if dtype == "bfloat16" and code == "F32" and "e_score_correction_bias" not in name:
            code, values = "BF16", to_bfloat16(values)
        blobs.append(np.ascontiguousarray(values).tobytes())
        begin, end = end, end + len(blobs[-1])
        header[name] = {"dtype": code, "shape": list(values.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(blobs))


def write_tokenizer(folder: Path) -> None:
    """A tokenizer with one token per byte, so that every text works, and a plain chat template."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    vocab = {char: i for i, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(END, special=True)])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END, "model_max_length": 512}
    write_json(folder / "tokenizer_config.json", settings | {"chat_template": CHAT_TEMPLATE})
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    write_json(folder / "generation_config.json", {"eos_token_id": END_ID})


def write_json(path: Path, value: Config) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
