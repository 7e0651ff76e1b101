"""Checkpoints of any size for benchmarks: Qwen3-MoE's tensors as on the hub, with made-up weights.

They are files with holes, so that 20 GB take as little disk as is planted in them: a run of normal numbers at
the start of each tensor, zeros after it. The same arguments give the same bytes.
"""

import json
import math
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from expertd.checkpoint.locate import demo_folder

SHARD_BYTES = 4 << 30
BLOCK_BYTES = 8 << 20
STEP_BYTES = 9_973 * 8  # from one tensor's start in the block to the next one's, so that no two are alike
WEIGHT_STD = 0.02
TEXTS = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


@dataclass(frozen=True)
class Sizes:
    """A model's sizes; attention has 16 query and 4 key heads of 128, as has Qwen3-30B-A3B, nearly."""

    num_layers: int
    num_experts: int
    hidden: int = 2048
    intermediate: int = 768
    vocabulary: int = 32_768

    def layer(self, number: int) -> dict[str, tuple[int, ...]]:
        """The shapes of one layer's tensors, by name."""
        path, h, i = f"model.layers.{number}", self.hidden, self.intermediate
        heads = {"q_proj": (2048, h), "k_proj": (512, h), "v_proj": (512, h), "o_proj": (h, 2048)}
        experts = {"gate_proj": (i, h), "up_proj": (i, h), "down_proj": (h, i)}
        return {
            f"{path}.input_layernorm.weight": (h,),
            **{f"{path}.self_attn.{name}.weight": shape for name, shape in heads.items()},
            **{f"{path}.self_attn.{name}.weight": (128,) for name in ("q_norm", "k_norm")},
            f"{path}.post_attention_layernorm.weight": (h,),
            f"{path}.mlp.gate.weight": (self.num_experts, h),
            **{
                f"{path}.mlp.experts.{expert}.{name}.weight": shape
                for expert in range(self.num_experts)
                for name, shape in experts.items()
            },
        }

    def tensors(self) -> dict[str, tuple[int, ...]]:
        table = (self.vocabulary, self.hidden)
        layers = {n: s for number in range(self.num_layers) for n, s in self.layer(number).items()}
        ends = {"model.norm.weight": (self.hidden,), "lm_head.weight": table}
        return {"model.embed_tokens.weight": table, **layers, **ends}

    @property
    def layer_bytes(self) -> int:
        """What one layer takes in bfloat16."""
        return sum(map(_num_bytes, self.layer(0).values()))

    @property
    def num_bytes(self) -> int:
        return sum(map(_num_bytes, self.tensors().values()))


def make_checkpoint(folder: Path, sizes: Sizes, planted_bytes: int) -> Path:
    """Write the checkpoint, with at most `planted_bytes` of numbers in each tensor, and return its folder."""
    folder.mkdir(parents=True)
    demo = demo_folder()
    for name in TEXTS:
        shutil.copyfile(demo / name, folder / name)
    config = json.loads((demo / "config.json").read_text(encoding="utf-8"))
    changed = {
        "num_hidden_layers": sizes.num_layers,
        "num_experts": sizes.num_experts,
        "num_experts_per_tok": 8,
        "hidden_size": sizes.hidden,
        "intermediate_size": 3 * sizes.hidden,
        "moe_intermediate_size": sizes.intermediate,
        "vocab_size": sizes.vocabulary,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "tie_word_embeddings": False,
    }
    (folder / "config.json").write_text(json.dumps(config | changed, indent=2) + "\n", encoding="utf-8")
    block = _block()
    shards = list(_divide(sizes.tensors()))
    for number, tensors in enumerate(shards, 1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        _write_shard(folder / name, tensors, block, planted_bytes, number)
    return folder


def _num_bytes(shape: tuple[int, ...]) -> int:
    return 2 * math.prod(shape)


def _divide(tensors: dict[str, tuple[int, ...]]) -> Iterator[dict[str, tuple[int, ...]]]:
    shard: dict[str, tuple[int, ...]] = {}
    room = SHARD_BYTES
    for name, shape in tensors.items():
        if shard and _num_bytes(shape) > room:
            yield shard
            shard, room = {}, SHARD_BYTES
        shard[name] = shape
        room -= _num_bytes(shape)
    yield shard


def _block() -> bytes:
    """Normal numbers, cut to bfloat16."""
    values = np.random.default_rng(1).standard_normal(BLOCK_BYTES // 2, dtype=np.float32) * WEIGHT_STD
    return (values.view(np.uint32) >> 16).astype("<u2").tobytes()


def _write_shard(
    path: Path, tensors: dict[str, tuple[int, ...]], block: bytes, planted_bytes: int, seed: int
) -> None:
    entries, end = {}, 0
    for name, shape in tensors.items():
        begin, end = end, end + _num_bytes(shape)
        entries[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.flush()
        os.truncate(file.fileno(), 8 + len(text) + end)
        at = 8 + len(text)
        for number, shape in enumerate(tensors.values()):
            size = min(_num_bytes(shape), planted_bytes)
            start = (seed * 7 + number) * STEP_BYTES % BLOCK_BYTES
            _plant(file.fileno(), block, start, at, size)
            at += _num_bytes(shape)


def _plant(fd: int, block: bytes, start: int, at: int, size: int) -> None:
    """`size` bytes of the block, which repeats, from `start` in it."""
    view = memoryview(block)
    while size:
        piece = view[start : start + size]
        written = os.pwrite(fd, piece, at)
        at, size, start = at + written, size - written, (start + written) % len(view)
