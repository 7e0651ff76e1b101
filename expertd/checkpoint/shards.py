"""Headers of safetensors files, read without the tensors and without trust.

A safetensors file is an 8-byte little-endian length, that many bytes of JSON (name -> dtype, shape, and
[begin, end) counted from the end of the JSON), and the tensors' bytes: https://huggingface.co/docs/safetensors.
The header comes from a stranger, so each number in it is checked before anything uses it.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from expertd.errors import CheckpointError

# DeepSeek-V3's 91,000 tensors in one file would need 13 MB; and JSON can grow 25-fold as Python objects.
MAX_HEADER_BYTES = 1 << 24
MAX_DIM = 1 << 48
MAX_NUM_DIMS = 16
DTYPE_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E8M0": 1,
    "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4,
    "U64": 8, "I64": 8, "C64": 8,
}  # fmt: skip
DAMAGED = "The file is damaged: download it again."


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a shard; `begin` and `end` are byte offsets from the start of the file."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def read_header(path: Path) -> dict[str, TensorEntry]:
    """The tensors of one safetensors file by name. Reads the header only.

    Raises CheckpointError when the file is missing, truncated or not safetensors, or when an entry has an
    unknown dtype, an impossible shape, or bytes outside the file or shared with another entry.
    """
    try:
        file_bytes = path.stat().st_size
        with path.open("rb") as file:
            first = file.read(8)
            header = first + file.read(header_bytes(str(path), first, file_bytes) - 8)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}). Download it again.") from error
    return parse_header(str(path), header, file_bytes)


def header_bytes(where: str, first: bytes, file_bytes: int) -> int:
    """How many of the file's bytes come before its tensors, by its `first` 8 or more. Raises CheckpointError."""
    length = int.from_bytes(first[:8], "little")
    if min(len(first), file_bytes) < 8:
        raise CheckpointError(f"{where}: has {file_bytes} bytes, wanted a safetensors file. {DAMAGED}")
    if length > MAX_HEADER_BYTES:
        raise CheckpointError(
            f"{where}: header length {length}, wanted at most {MAX_HEADER_BYTES} bytes. {DAMAGED}"
        )
    if 8 + length > file_bytes:
        raise CheckpointError(
            f"{where}: truncated: the header ends at byte {8 + length}, the file has {file_bytes}. {DAMAGED}"
        )
    return 8 + length


def parse_header(where: str, header: bytes, file_bytes: int) -> dict[str, TensorEntry]:
    """The tensors in a file's first `header_bytes` bytes, which are `header`; `where` names the file in errors.

    Raises CheckpointError as read_header does.
    """
    entries = {
        name: _read_entry(f"{where}: tensor {name[:200]!r}", entry, len(header))
        for name, entry in _parse(where, header[8:]).items()
        if name != "__metadata__"
    }
    _check_offsets(where, entries, file_bytes)
    return entries


def _parse(where: str, text: bytes) -> dict[str, Any]:
    try:
        header = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{where}: the header is not JSON ({type(error).__name__}). {DAMAGED}"
        ) from error
    if not isinstance(header, dict):
        raise CheckpointError(
            f"{where}: the header is a JSON {type(header).__name__}, wanted an object. {DAMAGED}"
        )
    return header


def _read_entry(where: str, entry: Any, start: int) -> TensorEntry:
    if not isinstance(entry, dict):
        raise CheckpointError(f"{where}: entry is no object. {DAMAGED}")
    dtype: Any = entry.get("dtype")
    shape: Any = entry.get("shape")
    span: Any = entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        raise CheckpointError(
            f"{where}: unknown dtype {str(dtype)[:40]!r}, wanted one of {', '.join(DTYPE_BYTES)}. "
            "Use a checkpoint in one of these dtypes."
        )
    if not _are_counts(shape) or len(shape) > MAX_NUM_DIMS:
        raise CheckpointError(
            f"{where}: shape {repr(shape)[:80]}, wanted up to {MAX_NUM_DIMS} sizes. {DAMAGED}"
        )
    if not _are_counts(span) or len(span) != 2:
        raise CheckpointError(f"{where}: offsets {repr(span)[:80]}, wanted two byte counts. {DAMAGED}")
    wanted, found = math.prod(shape) * DTYPE_BYTES[dtype], span[1] - span[0]
    if found != wanted:
        raise CheckpointError(f"{where}: {found} bytes, but {dtype} {shape} needs {wanted}. {DAMAGED}")
    return TensorEntry(dtype, tuple(shape), start + span[0], start + span[1])


def _are_counts(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < MAX_DIM for value in values)


def _check_offsets(where: str, entries: dict[str, TensorEntry], file_bytes: int) -> None:
    previous_end, previous_name = 0, ""
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.end > file_bytes:
            raise CheckpointError(
                f"{where}: truncated: tensor {name[:200]!r} ends at byte {entry.end}, "
                f"the file has {file_bytes}. {DAMAGED}"
            )
        if entry.begin < previous_end:
            raise CheckpointError(
                f"{where}: tensors {previous_name[:200]!r} and {name[:200]!r} overlap. {DAMAGED}"
            )
        previous_end, previous_name = entry.end, name
