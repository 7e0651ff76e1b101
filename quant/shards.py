"""Where every byte of a checkpoint's shards will lie, known from shapes alone, and the files that take them."""

import hashlib
import json
import math
import os
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from expertd.checkpoint.shards import DTYPE_BYTES
from expertd.errors import CheckpointError

SHARD_BYTES = 5 << 30
PIECE_BYTES = 4 << 20
# safetensors code -> how NumPy holds it; what NumPy lacks (bfloat16, 8-bit floats) is given as its bits.
NUMPY = {"BOOL": "?", "I8": "i1", "U8": "u1", "I16": "<i2", "U16": "<u2", "F16": "<f2", "BF16": "<u2",
         "I32": "<i4", "U32": "<u4", "F32": "<f4", "I64": "<i8", "U64": "<u8", "C64": "<c8",
         "F8_E4M3": "u1", "F8_E8M0": "u1"}  # fmt: skip

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class TensorPlan:
    """A tensor that will be written; `dtype` is safetensors' code ("U32", "BF16", ...)."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True)
class Unit:
    """Tensors that are computed in one go and lie side by side in one shard, such as a weight's three."""

    name: str
    tensors: tuple[TensorPlan, ...]

    @property
    def num_bytes(self) -> int:
        return sum(tensor.num_bytes for tensor in self.tensors)


@dataclass(frozen=True)
class ShardPlan:
    """One safetensors file: its header and, by unit, the bytes [begin, end) from the start of the file."""

    name: str
    header: bytes
    units: tuple[Unit, ...]
    spans: dict[str, tuple[int, int]]
    num_bytes: int


def plan_shards(units: Sequence[Unit], shard_bytes: int = SHARD_BYTES) -> tuple[ShardPlan, ...]:
    """The units in order, in as few shards of up to `shard_bytes` as that order allows.

    Only a shard of a single unit may be larger. Raises CheckpointError for a tensor that is named twice or
    like safetensors' own entry, ValueError for a unit that is named twice.
    """
    _check_names(units)
    cuts: list[list[Unit]] = []
    room = 0
    for unit in units:
        if not cuts or unit.num_bytes > room:
            cuts.append([])
            room = shard_bytes
        cuts[-1].append(unit)
        room -= unit.num_bytes
    names = (
        f"model-{n:05}-of-{len(cuts):05}.safetensors" if len(cuts) > 1 else "model.safetensors"
        for n in range(1, len(cuts) + 1)
    )
    return tuple(_plan_shard(name, tuple(cut)) for name, cut in zip(names, cuts, strict=True))


def _check_names(units: Sequence[Unit]) -> None:
    if len({unit.name for unit in units}) != len(units):
        raise ValueError("a unit is planned twice")
    seen = {"__metadata__"}
    for tensor in (tensor for unit in units for tensor in unit.tensors):
        if tensor.name in seen:
            raise CheckpointError(
                f"tensor {tensor.name[:200]!r}: its name is taken, so that safetensors cannot hold it. "
                "Rename it in the source."
            )
        seen.add(tensor.name)


def _plan_shard(name: str, units: tuple[Unit, ...]) -> ShardPlan:
    entries: dict[str, Any] = {"__metadata__": {"format": "mlx"}}
    end = 0
    for tensor in (tensor for unit in units for tensor in unit.tensors):
        begin, end = end, end + tensor.num_bytes
        entries[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)  # the format wants the tensors aligned
    header = len(text).to_bytes(8, "little") + text
    spans: dict[str, tuple[int, int]] = {}
    at = len(header)
    for unit in units:
        spans[unit.name] = (at, at + unit.num_bytes)
        at += unit.num_bytes
    return ShardPlan(name, header, units, spans, at)


def bytes_of(tensor: TensorPlan, buffer: Any) -> Array:
    """The buffer's bytes, uncopied. Raises ValueError when they are not as many as planned."""
    # MLX's buffers say formats that a memoryview cannot cast; NumPy asks for plain bytes.
    found = np.frombuffer(buffer, dtype=np.uint8) if tensor.num_bytes else np.empty(0, np.uint8)
    if found.size != tensor.num_bytes:
        raise ValueError(f"tensor {tensor.name!r}: {found.size} bytes, planned {tensor.num_bytes}")
    return found


def array_of(tensor: TensorPlan, data: bytes) -> Array:
    return np.frombuffer(data, dtype=NUMPY[tensor.dtype]).reshape(tensor.shape)


class ShardFile:
    """One shard on the disk, of full size from the start, and its SHA-256, which follows the writing.

    `folder`/`name`.part until `publish`: no loader takes such a name. Raises OSError.
    """

    def __init__(self, plan: ShardPlan, folder: Path) -> None:
        self.plan = plan
        self.path = folder / plan.name
        self._part = self.path.with_name(plan.name + ".part")
        self._fd = -1
        self._lock = threading.Lock()
        self._sha256, self._hashed, self._is_rewritten = hashlib.sha256(), 0, False

    def open(self) -> None:
        """Take over what an earlier run left, or begin."""
        if self.path.exists():  # that run was killed while it finished
            self.path.replace(self._part)
        self._fd = os.open(self._part, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        os.ftruncate(self._fd, self.plan.num_bytes)
        self._put(0, self.plan.header)

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def write(self, unit: str, parts: Iterable[Array]) -> None:
        """Write a unit's bytes at their place; from any thread, as long as no other writes the same unit."""
        at = begin = self.plan.spans[unit][0]
        for part in parts:
            self._put(at, part)
            at += part.size
        with self._lock:
            if self._hashed > begin:  # other units will be rewritten, too: wait for the last
                self._sha256, self._hashed, self._is_rewritten = hashlib.sha256(), 0, True

    def read(self, begin: int, end: int) -> Iterable[bytes]:
        """The bytes [begin, end) in pieces."""
        while begin < end:
            piece = os.pread(self._fd, min(PIECE_BYTES, end - begin), begin)
            if not piece:
                raise OSError(f"{self._part.name} is shorter than it was")
            yield piece
            begin += len(piece)

    def sync(self) -> None:
        os.fsync(self._fd)

    @property
    def fd(self) -> int:
        return self._fd

    def hash_up_to(self, end: int, is_stopped: Callable[[], bool] = lambda: False) -> None:
        """Let the hash follow the bytes [0, end), which are written; no byte is read twice."""
        while True:
            with self._lock:  # a piece at a time, so that `write` need not wait long
                if self._hashed >= end or self._is_rewritten or is_stopped():
                    return
                self._hash_piece(end)

    def finish_hash(self) -> str:
        """The SHA-256 of the whole file as hex digits; reads what is not hashed yet."""
        with self._lock:
            while self._hashed < self.plan.num_bytes:
                self._hash_piece(self.plan.num_bytes)
            return self._sha256.hexdigest()

    def publish(self) -> None:
        """Give the file its name."""
        self._part.replace(self.path)

    def _hash_piece(self, end: int) -> None:
        for piece in self.read(self._hashed, min(end, self._hashed + PIECE_BYTES)):
            self._sha256.update(piece)
            self._hashed += len(piece)

    def _put(self, at: int, data: Any) -> None:
        view = memoryview(data)
        while view:
            written = os.pwrite(self._fd, view, at)  # at most 2 GiB a call
            view, at = view[written:], at + written
