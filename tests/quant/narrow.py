"""Checkpoints in narrow formats, made and decoded with NumPy alone, and sources of weights to read them from."""

import json
import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from expertd.checkpoint.config import Config, normalise_config, read_config
from expertd.checkpoint.source import LocalSource
from expertd.model.classes import build_model
from expertd.quant.weights import SourceWeights
from tests.tiny import to_bfloat16, write_json

Array = np.ndarray[Any, np.dtype[Any]]
Tensors = dict[str, tuple[str, Array]]  # name -> safetensors' dtype code, the bytes' array


def _e4m3(code: int) -> float:
    sign, exponent, mantissa = -1 if code >> 7 else 1, (code >> 3) & 15, code & 7
    if code & 0x7F == 0x7F:
        return float("nan")
    return sign * (mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7))


E4M3 = np.array([_e4m3(code) for code in range(256)])


def write_tensors(path: Path, tensors: Tensors) -> None:
    """A safetensors file by hand, as neither NumPy nor safetensors has all these dtypes."""
    header, blobs, end = {}, [], 0
    for name, (code, values) in tensors.items():
        blobs.append(np.ascontiguousarray(values).tobytes())
        begin, end = end, end + len(blobs[-1])
        header[name] = {"dtype": code, "shape": list(values.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(blobs))


def write_sparse(path: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    """bfloat16 zeros that take no room on the disk."""
    header, end = {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    os.truncate(path, 8 + len(text) + end)


def read_tensors(path: Path) -> Tensors:
    """A safetensors file of tests.tiny, bfloat16 as uint16."""
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    kinds = {"F32": "f4", "BF16": "u2", "U8": "u1"}
    tensors: Tensors = {}
    for name, entry in json.loads(data[8:start]).items():
        if name != "__metadata__":
            begin, end = entry["data_offsets"]
            values = np.frombuffer(data[start + begin : start + end], kinds[entry["dtype"]])
            tensors[name] = (entry["dtype"], values.reshape(entry["shape"]).copy())
    return tensors


def wide(code: str, values: Array) -> Array:
    """float32 of a tensor that `read_tensors` gave."""
    return (values.astype(np.uint32) << 16).view(np.float32) if code == "BF16" else values


def bf16_of(values: Array) -> Array:
    """float64 rounded to bfloat16 by way of float32, as uint16."""
    return to_bfloat16(values.astype(np.float32))


def bits_of(array: mx.array) -> Array:
    """The bits of a 16-bit array, as uint16."""
    return np.array(array.view(mx.uint16))


def to_fp8(values: Array, block: tuple[int, int] = (128, 128)) -> tuple[Array, Array]:
    """E4M3 codes [rows, columns] and the float32 scales of their blocks, largest values at 448."""
    rows, columns = values.shape
    grid = (-(-rows // block[0]), -(-columns // block[1]))
    scales = np.empty(grid, np.float32)
    codes = np.empty((rows, columns), np.uint8)
    finite = np.array([c for c in range(256) if c & 0x7F != 0x7F])
    order = finite[np.argsort(E4M3[finite], kind="stable")]
    for i, j in np.ndindex(grid):
        part = np.s_[i * block[0] : (i + 1) * block[0], j * block[1] : (j + 1) * block[1]]
        scales[i, j] = max(float(np.abs(values[part]).max()), 1e-6) / 448
        place = np.searchsorted(E4M3[order], values[part] / scales[i, j]).clip(0, len(order) - 1)
        codes[part] = order[place]
    return codes, scales


def from_fp8(codes: Array, scales: Array, block: tuple[int, int] = (128, 128)) -> Array:
    """float64, element by element."""
    rows, columns = np.indices(codes.shape[-2:])
    return E4M3[codes] * scales.astype(np.float64)[..., rows // block[0], columns // block[1]]


def pack_int4(codes: Array) -> Array:
    """[..., columns] of 0-15 in int32 words [..., columns / 8], low bits first."""
    words = codes.astype(np.uint32).reshape(*codes.shape[:-1], -1, 8) << np.arange(0, 32, 4, dtype=np.uint32)
    return np.bitwise_or.reduce(words, axis=-1).view(np.int32)


def rewrite(folder: Path, tensors: Tensors, **config: Any) -> Path:
    """Give the tiny checkpoint in `folder` other tensors, and more in its config."""
    write_tensors(folder / "model.safetensors", tensors)
    write_json(folder / "config.json", json.loads((folder / "config.json").read_text()) | config)
    return folder


class NearSource(LocalSource):
    """A folder as a source of weights; remembers what was asked for."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder.name, folder)
        self.fetched: list[str] = []
        self.released: list[str] = []

    def fetch(self, names: Iterable[str]) -> None:
        self.fetched += names

    def release(self, names: Iterable[str]) -> None:
        self.released += names


class FarSource(NearSource):
    """A copy of a folder in which a tensor's bytes are zeros but between `fetch` and `release`."""

    is_remote = True

    def __init__(self, origin: Path, folder: Path) -> None:
        folder.mkdir()
        for path in origin.iterdir():
            (folder / path.name).write_bytes(path.read_bytes())
        self.origin = origin
        super().__init__(folder)
        self._put([name for shard in self.shards.values() for name in shard], zeros=True)

    def fetch(self, names: Iterable[str]) -> None:
        wanted = list(names)
        self._put(wanted, zeros=False)
        super().fetch(wanted)

    def release(self, names: Iterable[str]) -> None:
        done = list(names)
        self._put(done, zeros=True)
        super().release(done)

    def _put(self, names: list[str], zeros: bool) -> None:
        for file, shard in self.shards.items():
            original = (self.origin / file).read_bytes()
            with (self.folder / file).open("r+b") as out:
                for entry in (shard[name] for name in names if name in shard):
                    out.seek(entry.begin)
                    out.write(bytes(entry.end - entry.begin) if zeros else original[entry.begin : entry.end])


def config_of(folder: Path) -> Config:
    return normalise_config(read_config(folder))


def open_weights(folder: Path, source: NearSource | None = None) -> SourceWeights:
    config = config_of(folder)
    return SourceWeights(build_model(config), source or NearSource(folder), config)
