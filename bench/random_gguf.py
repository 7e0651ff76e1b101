"""A GGUF file of a Qwen3-MoE shape with random blocks, for llama.cpp's speed without a model's weights.

Layout: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md; blocks as ggml-common.h has them. Codes, scales and
minima within a block are random bits; the two factors of a block are such that weights have mean 0 and a product
keeps the size of its input, as in random_checkpoint.py. The file has no tokenizer ("no_vocab"): tokens go in as
numbers.
"""

import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from expertd.bench.random_checkpoint import Bits
from expertd.bench.shapes import Shape
from expertd.errors import ConfigError

Array = np.ndarray[Any, np.dtype[Any]]

MAGIC, VERSION, ALIGNMENT = b"GGUF", 3, 32
UINT32, FLOAT32, STRING = 4, 6, 8  # types of metadata
PIECE_BLOCKS = 1 << 16


@dataclass(frozen=True)
class Format:
    """A tensor type of ggml: `block` weights take `num_bytes`. A weight is d * a - dmin * b for random a, b of the
    block: `deviation` is that of a weight where d is 1 and dmin is `dmin`; the two lie at `places`."""

    name: str
    number: int
    block: int
    num_bytes: int
    deviation: float
    dmin: float
    places: tuple[int, ...]

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.num_bytes / self.block


# Q2_K: a = scale (0-15) * code (0-3), b = minimum (0-15). Q4_K: a = scale (0-63) * code (0-15), b = minimum (0-63).
# Q8_0: a = code (-128 to 127).
FORMATS = {
    2: Format("Q2_K", 10, 256, 84, 13.9, 1.5, (80, 82)),
    4: Format("Q4_K", 12, 256, 144, 257.0, 7.5, (0, 2)),
    8: Format("Q8_0", 8, 32, 34, 73.9, 0.0, (0,)),
}
F32 = Format("F32", 0, 1, 4, 1.0, 0.0, ())


@dataclass(frozen=True)
class _Tensor:
    """`shape` is row after row, [.., width]; `size` the standard deviation of its weights; norms are 1."""

    name: str
    shape: tuple[int, ...]
    format: Format
    size: float

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) // self.format.block * self.format.num_bytes


def make_random_gguf(path: Path, shape: Shape, num_layers: int, vocabulary: int, bits: Bits) -> Path:
    """Write it to `path` and return that. Raises ConfigError when a row cannot be cut into blocks."""
    if shape.family != "qwen3_moe":
        raise ConfigError(f"--shape {shape.name}: llama.cpp is compared on Qwen3's shapes alone.")
    tensors = list(_tensors(shape, num_layers, vocabulary, bits))
    for tensor in tensors:
        if tensor.shape[-1] % tensor.format.block:
            raise ConfigError(
                f"{tensor.name}: rows of {tensor.shape[-1]}, wanted a multiple of {tensor.format.block} "
                f"for {tensor.format.name}."
            )
    metadata = _metadata(shape, num_layers, vocabulary)
    random = np.random.default_rng(1)
    with path.open("wb") as file:
        file.write(MAGIC + struct.pack("<IQQ", VERSION, len(tensors), len(metadata)))
        for key, value in metadata.items():
            file.write(_string(key) + _value(value))
        at = 0
        for tensor in tensors:
            file.write(_entry(tensor, at))
            at += tensor.num_bytes + -tensor.num_bytes % ALIGNMENT
        for tensor in tensors:
            file.write(bytes(-file.tell() % ALIGNMENT))
            _fill(file, tensor, random)
        file.write(bytes(-file.tell() % ALIGNMENT))
    return path


def bytes_per_token(shape: Shape, num_layers: int, vocabulary: int, bits: Bits) -> int:
    """What llama.cpp reads of the weights to decode one token, without the row of the embedding."""
    total = 0
    for tensor in _tensors(shape, num_layers, vocabulary, bits):
        if tensor.name == "token_embd.weight":
            continue
        is_experts = "_exps" in tensor.name
        total += tensor.num_bytes * shape.top_k // shape.num_experts if is_experts else tensor.num_bytes
    return total


def _tensors(shape: Shape, num_layers: int, vocabulary: int, bits: Bits) -> Iterator[_Tensor]:
    hidden, inner, experts = shape.hidden, shape.intermediate, shape.num_experts
    outer, trunk, routed = (FORMATS[b] for b in (bits.outer, bits.trunk, bits.experts))

    def norm(name: str, size: int) -> _Tensor:
        return _Tensor(f"{name}.weight", (size,), F32, 0.0)

    def matrix(name: str, form: Format, *sizes: int, gain: float = 1.0) -> _Tensor:
        return _Tensor(f"{name}.weight", sizes, form, gain / math.sqrt(sizes[-1]))

    yield matrix("token_embd", outer, vocabulary, hidden, gain=math.sqrt(hidden))
    for number in range(num_layers):
        layer = f"blk.{number}"
        yield norm(f"{layer}.attn_norm", hidden)
        for name, (num_out, width) in shape.attention.items():
            ours = {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output"}[name]
            yield matrix(f"{layer}.{ours}", trunk, num_out, width)
        for name in ("attn_q_norm", "attn_k_norm"):
            yield norm(f"{layer}.{name}", shape.head_dim)
        yield norm(f"{layer}.ffn_norm", hidden)
        yield matrix(f"{layer}.ffn_gate_inp", F32, experts, hidden, gain=2.0)
        for name in ("ffn_gate_exps", "ffn_up_exps"):
            yield matrix(f"{layer}.{name}", routed, experts, inner, hidden, gain=1.5)
        yield matrix(f"{layer}.ffn_down_exps", routed, experts, hidden, inner, gain=1.5)
    yield norm("output_norm", hidden)
    yield matrix("output", outer, vocabulary, hidden)


def _metadata(shape: Shape, num_layers: int, vocabulary: int) -> dict[str, str | int | float]:
    own: dict[str, int | float] = {
        "context_length": 4096,
        "embedding_length": shape.hidden,
        "block_count": num_layers,
        "feed_forward_length": 3 * shape.hidden,
        "expert_feed_forward_length": shape.intermediate,
        "expert_count": shape.num_experts,
        "expert_used_count": shape.top_k,
        "attention.head_count": shape.num_heads,
        "attention.head_count_kv": shape.num_kv_heads,
        "attention.key_length": shape.head_dim,
        "attention.value_length": shape.head_dim,
        "attention.layer_norm_rms_epsilon": 1e-6,
        "rope.freq_base": 1e6,
        "vocab_size": vocabulary,
    }
    return {
        "general.architecture": "qwen3moe",
        "general.alignment": ALIGNMENT,
        "tokenizer.ggml.model": "no_vocab",
        **{f"qwen3moe.{key}": value for key, value in own.items()},
    }


def _string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _value(value: str | int | float) -> bytes:
    if isinstance(value, str):
        return struct.pack("<I", STRING) + _string(value)
    if isinstance(value, int):
        return struct.pack("<II", UINT32, value)
    return struct.pack("<If", FLOAT32, value)


def _entry(tensor: _Tensor, at: int) -> bytes:
    """ggml counts dimensions from the innermost."""
    sizes = tensor.shape[::-1]
    text = _string(tensor.name) + struct.pack("<I", len(sizes)) + struct.pack(f"<{len(sizes)}Q", *sizes)
    return text + struct.pack("<IQ", tensor.format.number, at)


def _fill(file: BinaryIO, tensor: _Tensor, random: np.random.Generator) -> None:
    form, count = tensor.format, math.prod(tensor.shape)
    if form is F32:
        values = random.standard_normal(count, dtype=np.float32) * np.float32(tensor.size)
        file.write((values if tensor.size else np.ones(count, np.float32)).astype("<f4").tobytes())
        return
    d = tensor.size / form.deviation
    for start in range(0, count // form.block, PIECE_BLOCKS):
        num_blocks = min(PIECE_BLOCKS, count // form.block - start)
        blocks = np.frombuffer(random.bytes(num_blocks * form.num_bytes), dtype=np.uint8)
        blocks = blocks.reshape(num_blocks, form.num_bytes).copy()
        for place, factor in zip(form.places, (d, d * form.dmin), strict=False):
            blocks[:, place : place + 2] = np.array([factor], dtype="<f2").view(np.uint8)
        file.write(blocks.tobytes())
