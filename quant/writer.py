"""Writing a checkpoint's weights one tensor at a time: a model may be larger than the memory.

mx.save_safetensors computes every array of a file before it writes the first. Shapes and dtypes of arrays
that are not computed yet are known, though, so the header can be written first and each tensor computed,
written and dropped.
"""

import json
import os
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import mlx.core as mx

SHARD_BYTES = 5 << 30
CODES = {
    mx.bool_: "BOOL",
    mx.uint8: "U8",
    mx.uint16: "U16",
    mx.uint32: "U32",
    mx.int32: "I32",
    mx.int64: "I64",
    mx.float16: "F16",
    mx.bfloat16: "BF16",
    mx.float32: "F32",
}

Progress = Callable[[int, int, str], None]


@dataclass
class Group:
    """Arrays by name that are computed in one go and lie in one shard, such as a quantized weight's three."""

    name: str
    arrays: dict[str, mx.array]

    @property
    def num_bytes(self) -> int:
        return sum(array.nbytes for array in self.arrays.values())


def write_shards(
    folder: Path,
    groups: deque[Group],
    num_parameters: int,
    progress: Progress | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> int:
    """Write `groups` as model*.safetensors with an index; empties the deque and returns the bytes written.

    The caller keeps no other reference to the arrays, or they stay in memory. A shard exceeds `shard_bytes`
    only for a single group that does. `progress(done_bytes, total_bytes, name)` is called after each group.
    """
    total = sum(group.num_bytes for group in groups)
    shards = divide(groups, shard_bytes)
    groups.clear()
    weight_map: dict[str, str] = {}
    done = 0
    for number in range(1, (num_shards := len(shards)) + 1):
        shard = shards.popleft()
        name = "model.safetensors" if num_shards == 1 else f"model-{number:05}-of-{num_shards:05}.safetensors"
        weight_map |= {key: name for group in shard for key in group.arrays}
        with (folder / name).open("wb") as file:
            file.write(header(shard))
            while shard:
                group = shard.popleft()
                done += write_group(file, group)
                if progress:
                    progress(done, total, group.name)
            sync(file)
    index = {
        "metadata": {"total_size": total, "total_parameters": num_parameters},
        "weight_map": dict(sorted(weight_map.items())),
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return total


def divide(groups: deque[Group], shard_bytes: int) -> deque[deque[Group]]:
    """The groups in order, in as few shards of up to `shard_bytes` as that order allows."""
    shards: deque[deque[Group]] = deque()
    room = 0
    for group in groups:
        if not shards or group.num_bytes > room:
            shards.append(deque())
            room = shard_bytes
        shards[-1].append(group)
        room -= group.num_bytes
    return shards


def header(shard: deque[Group]) -> bytes:
    """The length and JSON that begin a safetensors file; computes no array."""
    entries: dict[str, Any] = {"__metadata__": {"format": "mlx"}}
    end = 0
    for group in shard:
        for name, array in group.arrays.items():
            begin, end = end, end + array.nbytes
            entries[name] = {
                "dtype": CODES[array.dtype],
                "shape": list(array.shape),
                "data_offsets": [begin, end],
            }
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)  # the format wants the tensors aligned
    return len(text).to_bytes(8, "little") + text


def write_group(file: BinaryIO, group: Group) -> int:
    """Compute and write the group's arrays; returns the bytes written."""
    num_bytes = group.num_bytes
    mx.eval(list(group.arrays.values()))
    for array in group.arrays.values():
        file.write(memoryview(mx.contiguous(array)))  # type: ignore[arg-type]
    mx.clear_cache()
    return num_bytes


def sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())
