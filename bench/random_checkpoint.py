"""Checkpoints of a real model's shape with random weights, quantized already, for measuring speed without its weights.

They are written as MLX's affine format has them, tensor by tensor, straight from random codes: no weight is ever a
float, so 4 layers of Qwen3-30B-A3B take seconds. Scales are such that a product keeps the size of its input, so that
logits are finite and routers choose all experts alike. The same arguments give the same bytes.
"""

import json
import math
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from expertd.bench.shapes import Shape, find_shape
from expertd.bench.synthetic import TEXTS
from expertd.checkpoint.config import Config, write_config
from expertd.checkpoint.locate import demo_folder
from expertd.errors import ConfigError

Array = np.ndarray[Any, np.dtype[Any]]

GROUP_SIZE = 64
PIECE_WORDS = 1 << 21  # random codes are drawn and written 8 MiB at a time
# The real vocabularies are made for 48 layers and more: beside 4, the head would be most of a step.
DEFAULT_LAYERS, DEFAULT_VOCABULARY = 4, 32_768
BITS = (2, 4, 8)


@dataclass(frozen=True)
class Bits:
    """Bits per weight of the routed experts, of the trunk, and outside the layers (embedding and head), as
    `expertd quantize` has them by default at its smallest."""

    experts: int = 2
    trunk: int = 4
    outer: int = 8

    def __post_init__(self) -> None:
        for bits in (self.experts, self.trunk, self.outer):
            if bits not in BITS:
                raise ConfigError(f"{bits} bits: wanted one of {', '.join(map(str, BITS))}.")


DEFAULT_BITS = Bits()


@dataclass(frozen=True)
class _Tensor:
    """What is written: `dtype` as safetensors names it; `fill` writes all of it to a file."""

    dtype: str
    shape: tuple[int, ...]
    fill: Callable[[BinaryIO, np.random.Generator], None]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * (4 if self.dtype == "U32" else 2)


def make_random_checkpoint(
    folder: Path,
    shape: Shape,
    num_layers: int = DEFAULT_LAYERS,
    vocabulary: int = DEFAULT_VOCABULARY,
    bits: Bits = DEFAULT_BITS,
) -> Path:
    """Write it into the new `folder` and return that. The tokenizer is the demo's, whatever the vocabulary.

    Raises ConfigError when mlx-lm has no class for the shape or the sizes cannot be.
    """
    _check(shape, num_layers, vocabulary)
    folder.mkdir(parents=True)
    for name in TEXTS:
        shutil.copyfile(demo_folder() / name, folder / name)
    writer = _Tensors(bits)
    _FAMILIES[shape.family][1](writer, shape, num_layers, vocabulary)
    config = _common(shape, num_layers, vocabulary) | _FAMILIES[shape.family][0](shape, num_layers)
    write_config(folder, config | {"quantization": writer.settings})
    _write(folder / "model.safetensors", writer.tensors)
    return folder


@contextmanager
def temporary_checkpoint(
    name: str, layers: int | None = None, vocabulary: int | None = None, outer_bits: int | None = None
) -> Iterator[tuple[Path, str]]:
    """The folder of a random checkpoint of the shape of this name, gone afterwards, and what to call it.

    None is the default. Raises ConfigError.
    """
    shape, bits = find_shape(name), Bits(outer=outer_bits or DEFAULT_BITS.outer)
    num_layers, words = layers or DEFAULT_LAYERS, vocabulary or DEFAULT_VOCABULARY
    with tempfile.TemporaryDirectory(prefix="expertd-bench-") as scratch:
        folder = make_random_checkpoint(Path(scratch) / "checkpoint", shape, num_layers, words, bits)
        yield folder, describe(shape, num_layers, words, bits)


def describe(shape: Shape, num_layers: int, vocabulary: int, bits: Bits) -> str:
    """One line for reports."""
    return (
        f"{shape.name}, {num_layers} of {shape.num_layers} layers, vocabulary {vocabulary}, random weights "
        f"(bits: experts {bits.experts}, trunk {bits.trunk}, embedding and head {bits.outer})"
    )


def _check(shape: Shape, num_layers: int, vocabulary: int) -> None:
    if shape.family not in _FAMILIES:
        known = "the installed mlx-lm cannot run this model; its matrices alone: `expertd bench kernels`"
        raise ConfigError(f"--shape {shape.name}: {known}.")
    if num_layers < shape.min_layers:
        raise ConfigError(f"--layers {num_layers}: {shape.name} needs at least {shape.min_layers}.")
    smallest = json.loads((demo_folder() / "config.json").read_text(encoding="utf-8"))["vocab_size"]
    if vocabulary < smallest:
        raise ConfigError(f"--vocabulary {vocabulary}: wanted at least the tokenizer's, {smallest}.")


class _Tensors:
    """Collects what a checkpoint holds: `tensors` by name, and `settings`, config.json's entry on quantization."""

    def __init__(self, bits: Bits) -> None:
        self.bits = bits
        self.tensors: dict[str, _Tensor] = {}
        self.settings: Config = {"group_size": GROUP_SIZE, "bits": bits.trunk, "mode": "affine"}

    def affine(self, path: str, bits: int, *shape: int, gain: float = 1.0) -> None:
        """A quantized weight [*shape]: a product of `gain` times its input's size."""
        *rows, width = shape
        if width % GROUP_SIZE:
            raise ConfigError(f"{path}: rows of {width}, wanted a multiple of {GROUP_SIZE}.")
        middle = (2**bits - 1) / 2
        std = gain / math.sqrt(width)
        step = std / math.sqrt((4**bits - 1) / 12)  # of codes that are all as likely
        groups = (*rows, width // GROUP_SIZE)
        seed = len(self.tensors)  # the same scales are drawn twice: for themselves and for the biases
        self.tensors[f"{path}.weight"] = _Tensor("U32", (*rows, width * bits // 32), _codes(shape, bits))
        self.tensors[f"{path}.scales"] = _Tensor("BF16", groups, _scales(groups, step, seed))
        self.tensors[f"{path}.biases"] = _Tensor("BF16", groups, _scales(groups, -step * middle, seed))
        self.settings[path] = {"group_size": GROUP_SIZE, "bits": bits, "mode": "affine"}

    def plain(self, name: str, *shape: int, around: float = 0.0, std: float = 0.1) -> None:
        """A bfloat16 tensor of normal numbers."""

        def fill(file: BinaryIO, random: np.random.Generator) -> None:
            values = around + std * random.standard_normal(shape, dtype=np.float32)
            file.write(_to_bfloat16(values).tobytes())

        self.tensors[name] = _Tensor("BF16", shape, fill)


def _codes(shape: tuple[int, ...], bits: int) -> Callable[[BinaryIO, np.random.Generator], None]:
    def fill(file: BinaryIO, random: np.random.Generator) -> None:
        words = math.prod(shape) * bits // 32
        for start in range(0, words, PIECE_WORDS):
            file.write(random.bytes(4 * min(PIECE_WORDS, words - start)))

    return fill


def _scales(
    shape: tuple[int, ...], step: float, seed: int
) -> Callable[[BinaryIO, np.random.Generator], None]:
    """Half to one and a half times `step`."""

    def fill(file: BinaryIO, _: np.random.Generator) -> None:
        factors = np.random.default_rng(seed).random(math.prod(shape), dtype=np.float32) + 0.5
        file.write(_to_bfloat16(factors * np.float32(step)).tobytes())

    return fill


def _to_bfloat16(values: Array) -> Array:
    """The upper half of each float32, rounded to nearest but for exact ties."""
    raised: Array = values.astype(np.float32).view(np.uint32) + np.uint32(0x8000)
    return (raised >> 16).astype("<u2")


def _write(path: Path, tensors: dict[str, _Tensor]) -> None:
    entries, end = {}, 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.num_bytes
        entries[name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps({"__metadata__": {"format": "mlx"}, **entries}).encode()
    text += b" " * (-len(text) % 8)
    random = np.random.default_rng(1)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            tensor.fill(file, random)
        assert file.tell() == 8 + len(text) + end, path


# The families.


def _common(shape: Shape, num_layers: int, vocabulary: int) -> Config:
    return {
        "vocab_size": vocabulary,
        "num_hidden_layers": num_layers,
        "hidden_size": shape.hidden,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "head_dim": shape.head_dim,
        "num_experts_per_tok": shape.top_k,
        "eos_token_id": 0,
        "torch_dtype": "bfloat16",
        "tie_word_embeddings": False,
    }


def _qwen3_config(shape: Shape, num_layers: int) -> Config:
    return {
        "model_type": "qwen3_moe",
        "architectures": ["Qwen3MoeForCausalLM"],
        "num_experts": shape.num_experts,
        "moe_intermediate_size": shape.intermediate,
        "intermediate_size": 3 * shape.hidden,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "norm_topk_prob": True,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "max_position_embeddings": 40_960,
    }


def _qwen3_tensors(to: _Tensors, shape: Shape, num_layers: int, vocabulary: int) -> None:
    for layer in _frame(to, shape, num_layers, vocabulary):
        _attention(to, shape, f"{layer}.self_attn")
        for name in ("q_norm", "k_norm"):
            to.plain(f"{layer}.self_attn.{name}.weight", shape.head_dim, around=1)
        _router(to, shape, f"{layer}.mlp.gate")
        _experts(to, shape, f"{layer}.mlp.switch_mlp")


def _gpt_oss_config(shape: Shape, num_layers: int) -> Config:
    kinds = ("sliding_attention", "full_attention")
    return {
        "model_type": "gpt_oss",
        "architectures": ["GptOssForCausalLM"],
        "num_local_experts": shape.num_experts,
        "intermediate_size": shape.intermediate,
        "sliding_window": 128,
        "layer_types": [kinds[number % 2] for number in range(num_layers)],
        "rms_norm_eps": 1e-5,
        "rope_theta": 150_000,
        "rope_scaling": {
            "rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
            "original_max_position_embeddings": 4096,
        },
        "max_position_embeddings": 131_072,
    }  # fmt: skip


def _gpt_oss_tensors(to: _Tensors, shape: Shape, num_layers: int, vocabulary: int) -> None:
    for layer in _frame(to, shape, num_layers, vocabulary):
        _attention(to, shape, f"{layer}.self_attn")
        for name, (num_out, _) in shape.attention.items():
            to.plain(f"{layer}.self_attn.{name}.bias", num_out)
        to.plain(f"{layer}.self_attn.sinks", shape.num_heads, std=1)
        _router(to, shape, f"{layer}.mlp.router")
        to.plain(f"{layer}.mlp.router.bias", shape.num_experts)
        _experts(to, shape, f"{layer}.mlp.experts")
        for name, size in _projections(shape).items():
            to.plain(f"{layer}.mlp.experts.{name}.bias", shape.num_experts, size[0])


def _frame(to: _Tensors, shape: Shape, num_layers: int, vocabulary: int) -> Iterator[str]:
    """Add embedding, head and the norms of every family; give the path of each layer."""
    to.affine("model.embed_tokens", to.bits.outer, vocabulary, shape.hidden, gain=math.sqrt(shape.hidden))
    for number in range(num_layers):
        layer = f"model.layers.{number}"
        for name in ("input_layernorm", "post_attention_layernorm"):
            to.plain(f"{layer}.{name}.weight", shape.hidden, around=1)
        yield layer
    to.plain("model.norm.weight", shape.hidden, around=1)
    to.affine("lm_head", to.bits.outer, vocabulary, shape.hidden)


def _attention(to: _Tensors, shape: Shape, path: str) -> None:
    for name, size in shape.attention.items():
        to.affine(f"{path}.{name}", to.bits.trunk, *size)


def _router(to: _Tensors, shape: Shape, path: str) -> None:
    to.plain(f"{path}.weight", shape.num_experts, shape.hidden, std=2 / math.sqrt(shape.hidden))


def _projections(shape: Shape) -> dict[str, tuple[int, int]]:
    inward = (shape.intermediate, shape.hidden)
    return {"gate_proj": inward, "up_proj": inward, "down_proj": inward[::-1]}


def _experts(to: _Tensors, shape: Shape, path: str) -> None:
    for name, size in _projections(shape).items():
        to.affine(f"{path}.{name}", to.bits.experts, shape.num_experts, *size, gain=1.5)


_FAMILIES: dict[str, tuple[Callable[[Shape, int], Config], Callable[[_Tensors, Shape, int, int], None]]] = {
    "qwen3_moe": (_qwen3_config, _qwen3_tensors),
    "gpt_oss": (_gpt_oss_config, _gpt_oss_tensors),
}
