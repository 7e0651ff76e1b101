import json
import random
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from expertd.checkpoint.shards import DTYPE_BYTES, MAX_HEADER_BYTES, read_header
from expertd.errors import CheckpointError


def pack(header: Any, data: bytes = bytes(16), length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(begin: int = 0, end: int = 16, shape: Any = (4,), dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def test_good(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(pack({"__metadata__": {"format": "pt"}, "w": entry(), "none": entry(16, 16, [0])}))
    header = read_header(path)
    assert set(header) == {"w", "none"}
    assert (header["w"].shape, header["w"].end) == ((4,), path.stat().st_size)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "has 0 bytes"),
        (b"1234567", "has 7 bytes"),
        (b"version https://git-lfs.github.com/spec/v1\n", "header length"),
        (pack({}, length=1000), "truncated: the header ends at byte 1008, the file has 26"),
        (pack({}, length=MAX_HEADER_BYTES + 1), f"header length {MAX_HEADER_BYTES + 1}"),
        (pack({}, length=(1 << 64) - 1), "header length 18446744073709551615"),
        (pack(b"not json"), "header is not JSON"),
        (pack(b"\xff\xfe"), "header is not JSON"),
        (pack(b"[" * 100_000), "header is not JSON"),
        (pack([1]), "JSON list, wanted an object"),
        (pack({"w": 1}), "tensor 'w': entry is no object"),
        (pack({"w": entry(end=12)}), "tensor 'w': 12 bytes, but F32 \\[4\\] needs 16"),
        (pack({"w": entry(end=1600, shape=[400])}), "truncated: tensor 'w' ends at byte .*, the file has"),
        (pack({"w": entry(dtype="F8_E5M2")}), "unknown dtype 'F8_E5M2'"),
        (pack({"w": entry(dtype=None)}), "unknown dtype"),
        (pack({"w": entry(dtype=["F32"])}), "unknown dtype"),
        (pack({"w": entry(shape=[-4])}), "shape \\[-4\\]"),
        (pack({"w": entry(shape=[True])}), "shape \\[True\\]"),
        (pack({"w": entry(shape=[1 << 62, 1 << 62])}), "shape"),
        (pack({"w": entry(shape=[1] * 1000)}), "wanted up to 16 sizes"),
        (pack({"w": entry(shape="4\n")}), "shape '4"),
        (pack({"w": entry(begin=-16, end=0)}), "offsets"),
        (pack({"w": entry(begin=16, end=0)}), "-16 bytes"),
        (pack({"w": {"dtype": "F32", "shape": [4]}}), "offsets None"),
        (pack({"a": entry(), "b": entry(8, 24)}, bytes(24)), "tensors 'a' and 'b' overlap"),
    ],
)
def test_bad(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_header(path)
    assert "\n" not in str(caught.value) and "bad.safetensors" in str(caught.value)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_header(tmp_path / "none.safetensors")


def mutate(content: bytes, chance: random.Random) -> bytes:
    """A few bytes changed, inserted, removed or repeated, mostly in the header."""
    result = bytearray(content)
    for _ in range(chance.randint(1, 4)):
        at = chance.randrange(len(result)) if result else 0
        kind = chance.randrange(5)
        if kind == 0 and result:
            result[at] = chance.randrange(256)
        elif kind == 1:
            result[at:at] = chance.choice([b"9" * 30, b"[", b"{", b'"', b"-1", b"1e999", b"null", b"\x00"])
        elif kind == 2:
            del result[at : at + chance.randint(1, 20)]
        elif kind == 3:
            result[at:at] = result[at : at + chance.randint(1, 40)]
        else:
            result[: chance.randrange(8)] = chance.randbytes(8)[: chance.randrange(8)]
    return bytes(result)


def test_mutated_headers_end_in_one_line_or_pass(tmp_path: Path) -> None:
    names = [f"model.layers.{i}.mlp.weight" for i in range(4)]
    good = pack({name: entry(16 * i, 16 * i + 16) for i, name in enumerate(names)}, bytes(64))
    path, chance, num_refused = tmp_path / "fuzz.safetensors", random.Random(7), 0
    for _ in range(2000):
        content = mutate(good, chance)
        path.write_bytes(content)
        try:
            header = read_header(path)
        except CheckpointError as error:
            assert len(str(error).splitlines()) == 1 and len(str(error)) < 1000
            num_refused += 1
        else:
            for found in header.values():
                assert found.begin <= found.end <= len(content) and found.dtype in DTYPE_BYTES
    assert 1000 < num_refused < 2000


def test_largest_header_stays_far_below_a_gigabyte(tmp_path: Path) -> None:
    """The worst JSON is many small containers; a sixteenth of the limit is tried, as tracing is slow."""
    path = tmp_path / "big.safetensors"
    path.write_bytes(pack(b'{"w":[' + b"{}," * (MAX_HEADER_BYTES // 16 // 3) + b"1]}"))
    tracemalloc.start()
    with pytest.raises(CheckpointError):
        read_header(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < (1 << 30) // 16
