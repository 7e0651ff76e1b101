"""The comparison with llama.cpp: the file it reads, the report; and all of it, where llama-cpp-python is installed."""

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from expertd.bench import rival_speed
from expertd.bench.random_checkpoint import Bits, make_random_checkpoint
from expertd.bench.random_gguf import F32, FORMATS, bytes_per_token, make_random_gguf
from expertd.checkpoint.shards import read_header
from expertd.errors import ConfigError
from tests.bench.test_shapes import TINY, TINY_OSS, VOCABULARY

TYPES = {form.number: form for form in (*FORMATS.values(), F32)}


def read_gguf(data: bytes) -> tuple[dict[str, Any], dict[str, Any]]:
    """Metadata, and tensors as name -> (shape, format, bytes)."""
    at = 0

    def take(form: str) -> Any:
        nonlocal at
        values = struct.unpack_from(f"<{form}", data, at)
        at += struct.calcsize(f"<{form}")
        return values if len(values) > 1 else values[0]

    def text() -> str:
        nonlocal at
        size = take("Q")
        at += size
        return data[at - size : at].decode()

    assert (take("4s"), take("I")) == (b"GGUF", 3)
    num_tensors, num_values = take("QQ")
    metadata = {
        text(): {4: lambda: take("I"), 6: lambda: take("f"), 8: text}[take("I")]() for _ in range(num_values)
    }
    entries = []
    for _ in range(num_tensors):
        name, dims = text(), take("I")
        sizes = [take("Q") for _ in range(dims)]
        entries.append((name, tuple(reversed(sizes)), TYPES[take("I")], take("Q")))
    start, tensors = at + -at % 32, {}
    for name, shape, form, offset in entries:
        size = int(np.prod(shape)) // form.block * form.num_bytes
        assert offset % 32 == 0 and start + offset + size <= len(data)
        tensors[name] = (shape, form, data[start + offset : start + offset + size])
    return metadata, tensors


def test_gguf_has_what_the_architecture_wants(tmp_path: Path) -> None:
    data = make_random_gguf(tmp_path / "m.gguf", TINY, 2, VOCABULARY, Bits()).read_bytes()
    metadata, tensors = read_gguf(data)
    assert metadata["general.architecture"] == "qwen3moe" and metadata["qwen3moe.expert_used_count"] == 2
    assert metadata["qwen3moe.vocab_size"] == VOCABULARY and metadata["qwen3moe.block_count"] == 2
    shapes = {name: (shape, form.name) for name, (shape, form, _) in tensors.items()}
    assert shapes["blk.1.ffn_down_exps.weight"] == ((8, 256, 256), "Q2_K")
    assert shapes["blk.0.attn_k.weight"] == ((128, 256), "Q4_K")
    assert shapes["output.weight"] == ((VOCABULARY, 256), "Q8_0") == shapes["token_embd.weight"]
    assert shapes["blk.0.ffn_gate_inp.weight"] == ((8, 256), "F32")
    assert len(tensors) == 3 + 2 * 12


@pytest.mark.parametrize(("bits", "at", "zero"), [(2, 80, 1.5), (4, 0, 7.5)])
def test_block_factors_are_sane(tmp_path: Path, bits: int, at: int, zero: float) -> None:
    """Weights of mean 0 and of the size wanted, by the formats' own arithmetic in the mean."""
    name = "blk.0.ffn_up_exps.weight"
    data = make_random_gguf(tmp_path / "m.gguf", TINY, 1, VOCABULARY, Bits(experts=bits)).read_bytes()
    _, form, raw = read_gguf(data)[1][name]
    blocks = np.frombuffer(raw, dtype=np.uint8).reshape(-1, form.num_bytes)
    d, dmin = (blocks[:, p : p + 2].copy().view("<f2").astype(float) for p in (at, at + 2))
    assert np.allclose(d * form.deviation, 1.5 / 16, rtol=0.01) and np.allclose(dmin, zero * d, rtol=0.01)


def test_both_files_hold_the_same_weights(tmp_path: Path) -> None:
    """As many in each part; and both read about as much for a token."""
    gguf = read_gguf(make_random_gguf(tmp_path / "m.gguf", TINY, 2, VOCABULARY, Bits()).read_bytes())[1]
    folder = make_random_checkpoint(tmp_path / "c", TINY, 2, VOCABULARY, Bits())
    header = read_header(folder / "model.safetensors")
    theirs = sum(int(np.prod(shape)) for name, (shape, _, _) in gguf.items() if "_exps" in name)
    ours = sum(
        16 * int(np.prod(entry.shape))
        for name, entry in header.items()
        if name.endswith("_proj.weight") and "switch" in name
    )
    assert ours == theirs
    sizes = (
        rival_speed._bytes_per_token(TINY, 2, VOCABULARY, Bits()),
        bytes_per_token(TINY, 2, VOCABULARY, Bits()),
    )
    assert sizes[0] == pytest.approx(sizes[1], rel=0.05)


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="compared on Qwen3's shapes alone"):
        make_random_gguf(tmp_path / "m.gguf", TINY_OSS, 2, VOCABULARY, Bits())
    narrow = type(TINY)(**{**vars(TINY), "intermediate": 192, "attention": {}})
    with pytest.raises(ConfigError, match="rows of 192, wanted a multiple of 256 for Q2_K"):
        make_random_gguf(tmp_path / "m.gguf", narrow, 2, VOCABULARY, Bits())
    with pytest.raises(ConfigError, match="cannot be installed: no such package"):
        rival_speed._run(["sh", "-c", "echo no such package >&2; exit 1"])


def test_report() -> None:
    speeds = {"decode": {"expertd": [30.0, 33.0, 27.0], "llama.cpp": [20.0, 20.0, 10.0]}}
    rows = rival_speed._rows(speeds, {"expertd": 10**8, "llama.cpp": 10**8})
    assert [(row["name"], row["ratio_to_llama_cpp"], row["gb_per_s"]) for row in rows] == [
        ("expertd", 1.5, 3.0),
        ("llama.cpp", 1.0, 2.0),
    ]
    report = {
        "machine": rival_speed.describe_machine(), "model": "m", "formats": {"experts": "Q2_K"}, "cores": [0],
        "llama.cpp": {"version": "1"}, "tokens": {"decode": 4}, "mb_per_token": {"expertd": 1.0}, "rows": rows,
    }  # fmt: skip
    assert "1.50x" in rival_speed.format_report(report)


def test_llama_cpp_runs_beside_ours() -> None:
    if not rival_speed.has_llama_cpp(rival_speed.FOLDER):
        pytest.skip("llama-cpp-python is not installed; `python -m expertd.bench.rival_speed` does that")
    python = rival_speed.interpreter(rival_speed.FOLDER)
    tokens = {"decode": 4, "prefill": 20}
    report = rival_speed.measure(TINY, 1, VOCABULARY, Bits(), tokens, 1, ["auto"], 8, python)
    assert {(row["kind"], row["name"]) for row in report["rows"]} == {
        (kind, name) for kind in tokens for name in ("expertd", "llama.cpp")
    }
    assert all(row["tokens_per_s"] > 0 for row in report["rows"]) and report["llama.cpp"]["version"]
