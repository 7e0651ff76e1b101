import json
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from expertd.checkpoint.shards import TensorEntry
from expertd.errors import CheckpointError
from expertd.quant import finite
from expertd.quant.convert import quantize_checkpoint
from expertd.quant.ewq import measure
from expertd.quant.finite import Span, check_finite
from expertd.quant.settings import Settings
from expertd.quant.survey import survey
from tests.quant.narrow import (
    Array,
    FarSource,
    Tensors,
    open_weights,
    read_tensors,
    rewrite,
    write_tensors,
)
from tests.tiny import make_tiny, write_json

EXPERT = "model.layers.1.mlp.experts.3.up_proj.weight"
STACKED = "model.layers.1.mlp.switch_mlp.up_proj.weight"
TRUNK = [f"model.layers.{i}.self_attn.{p}_proj" for i in range(2) for p in "qkvo"]
# Bits of the largest finite numbers, and of the smallest that are not: infinities and NaNs.
EDGES = {
    "F32": ("u4", [0x7F7FFFFF, 0xFF7FFFFF, 0x80000000, 0], [0x7F800000, 0xFF800000, 0x7FC00001, 0xFFFFFFFF]),
    "BF16": ("u2", [0x7F7F, 0xFF7F, 0x8000, 0], [0x7F80, 0xFF80, 0x7FC1, 0xFFFF]),
    "F16": ("u2", [0x7BFF, 0xFBFF, 0x8000, 0], [0x7C00, 0xFC00, 0x7E01, 0xFFFF]),
    "F8_E4M3": ("u1", [0x7E, 0xFE, 0x80, 0], [0x7F, 0xFF]),
    "F8_E8M0": ("u1", [0xFE, 0x7F, 0x80, 0], [0xFF]),
}


@pytest.fixture
def src(tmp_path: Path) -> Path:
    return make_tiny(tmp_path / "src", "qwen3_moe", "bfloat16")


def span(tmp_path: Path, code: str, values: Array, name: str = "t") -> Span:
    path = tmp_path / f"{name}.bin"
    path.write_bytes(b"abc" + values.tobytes())  # not aligned
    return Span(path, name, code, TensorEntry(code, values.shape, 3, 3 + values.nbytes))


@pytest.mark.parametrize("code", EDGES)
def test_every_number_that_is_not_finite_is_found(
    code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(finite, "READ_BYTES", 64)
    monkeypatch.setattr(finite, "TASK_BYTES", 256)
    kind, good, bad = EDGES[code]
    values = np.resize(np.array(good, kind), (7, 50))
    check_finite([span(tmp_path, code, values)])
    for index, bits in enumerate(bad * 9):
        place = (index % 7, index * 17 % 50)
        holed = values.copy()
        holed[place] = bits
        holed[6, 49] = bad[-1]
        with pytest.raises(
            CheckpointError, match=rf"tensor 't' holds NaN or infinity at \[{place[0]}, {place[1]}\]"
        ):
            check_finite([span(tmp_path, code, holed)])


def test_integers_are_always_finite(tmp_path: Path) -> None:
    check_finite(
        [span(tmp_path, "I32", np.full(9, -1, np.int32)), span(tmp_path, "F32", np.zeros(0, "f4"), "no")]
    )


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_the_first_fault_is_told_whatever_the_threads(
    threads: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(finite, "TASK_BYTES", 512)
    values = np.zeros(5000, np.float32)
    spans = [span(tmp_path, "F32", values, "a")]
    values[[777, 4000]] = np.nan
    spans += [span(tmp_path, "F32", values, "b"), span(tmp_path, "F32", values, "c")]
    with pytest.raises(CheckpointError, match=r"tensor 'b' holds NaN or infinity at \[777\]"):
        check_finite(spans, threads)


def test_file_that_shrank(tmp_path: Path) -> None:
    found = span(tmp_path, "F32", np.zeros(1000, np.float32))
    found.path.write_bytes(found.path.read_bytes()[:3500])
    with pytest.raises(CheckpointError, match="truncated: tensor 't' ends at byte 4003, the file has 3500"):
        check_finite([found])
    found.path.unlink()
    with pytest.raises(CheckpointError, match="cannot be read"):
        check_finite([found])


@pytest.mark.parametrize("threads", [1, 3])
def test_entropies_are_those_of_the_weights(src: Path, threads: int) -> None:
    expected = open_weights(src).take([f"{path}.weight" for path in TRUNK])
    found = survey(open_weights(src), TRUNK, threads=threads).entropies
    assert list(found) == TRUNK
    for path, entropy in found.items():
        values = np.array(expected[f"{path}.weight"].astype(mx.float32)).astype(np.float64)
        assert entropy == measure(values)


def test_progress_counts_all_bytes(src: Path) -> None:
    calls: list[tuple[int, int, str]] = []
    survey(open_weights(src), TRUNK, lambda *call: calls.append(call))
    counts = [done for done, _, _ in calls]
    assert counts == sorted(counts) and counts[-1] == calls[0][1] == calls[-1][1]
    assert counts[-1] > (src / "model.safetensors").stat().st_size - 20000


def damage(folder: Path, name: str, bits: int) -> None:
    tensors = read_tensors(folder / "model.safetensors")
    tensors[name][1][1, 2] = bits
    rewrite(folder, tensors)


@pytest.mark.parametrize("name", [EXPERT, "model.layers.0.mlp.gate.weight", "model.embed_tokens.weight"])
def test_infinity_anywhere_is_refused(name: str, src: Path) -> None:
    damage(src, name, 0xFF80)
    with pytest.raises(CheckpointError, match=rf"tensor '{name}' holds NaN or infinity at \[1, 2\]"):
        survey(open_weights(src), TRUNK)


def test_tensors_that_the_model_drops_are_not_looked_at(tmp_path: Path) -> None:
    """Such as a mask of infinities, or the layers of multi-token prediction."""
    folder = make_tiny(tmp_path / "src", "deepseek_v3", "bfloat16")
    tensors = read_tensors(folder / "model.safetensors")
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    tensors[name] = ("F32", np.full(4, np.inf, np.float32))
    survey(open_weights(rewrite(folder, tensors)), [])


def test_scale_that_is_no_number(tmp_path: Path) -> None:
    folder = make_tiny(tmp_path / "src", "gpt_oss_mxfp4", "bfloat16")
    tensors = read_tensors(folder / "model.safetensors")
    name = "model.layers.1.mlp.experts.down_proj_scales"
    tensors[name][1][5, 4, 1] = 255
    with pytest.raises(CheckpointError, match=rf"tensor '{name}' holds NaN or infinity at \[5, 4, 1\]"):
        survey(open_weights(rewrite(folder, tensors)), [])


def test_overflow_by_a_scale(src: Path) -> None:
    tensors = read_tensors(src / "model.safetensors")
    name = f"{TRUNK[0]}.weight"
    tensors[name] = ("F8_E4M3", np.full(tensors[name][1].shape, 0x7E, np.uint8))
    tensors[f"{name}_scale_inv"] = ("F32", np.full((1, 1), 1e38, np.float32))
    with pytest.raises(CheckpointError, match=rf"tensor '{name}' holds NaN or infinity once it is widened"):
        survey(open_weights(rewrite(src, tensors)), TRUNK)


def test_remote_experts_are_checked_as_they_arrive(src: Path, tmp_path: Path) -> None:
    damage(src, EXPERT, 0x7F80)
    source = FarSource(src, tmp_path / "far")
    found = survey(open_weights(source.folder, source), TRUNK)
    assert found == survey(open_weights(src.parent / "far", source), TRUNK)
    assert not any("experts" in name for name in source.fetched) and "model.norm.weight" in source.fetched
    with pytest.raises(CheckpointError, match=rf"tensor '{EXPERT}' holds NaN or infinity at \[1, 2\]"):
        open_weights(source.folder, source).take([STACKED])


def test_remote_trunk_is_checked_by_the_survey(src: Path, tmp_path: Path) -> None:
    damage(src, "model.layers.0.mlp.gate.weight", 0x7F80)
    source = FarSource(src, tmp_path / "far")
    with pytest.raises(CheckpointError, match=r"'model\.layers\.0\.mlp\.gate\.weight' holds NaN or infinity"):
        survey(open_weights(source.folder, source), TRUNK)


# Nothing is written for a damaged source.


def truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def reshape(folder: Path) -> None:
    tensors = read_tensors(folder / "model.safetensors")
    tensors[EXPERT] = (tensors[EXPERT][0], tensors[EXPERT][1][:60])
    write_tensors(folder / "model.safetensors", tensors)


def retype(folder: Path) -> None:
    tensors: Tensors = read_tensors(folder / "model.safetensors")
    tensors[EXPERT] = ("F8_E5M2", np.zeros((64, 64), np.uint8))
    write_tensors(folder / "model.safetensors", tensors)


def repack(folder: Path) -> None:
    tensors: Tensors = read_tensors(folder / "model.safetensors")
    tensors[EXPERT.replace("weight", "qweight")] = ("I32", np.zeros((8, 64), np.int32))
    config = json.loads((folder / "config.json").read_text())
    write_json(folder / "config.json", config | {"quantization_config": {"quant_method": "gptq", "bits": 4}})
    write_tensors(folder / "model.safetensors", tensors)


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (truncate, "truncated: tensor 'model.layers.1.mlp.experts.7.down_proj.weight' ends at byte"),
        (lambda folder: damage(folder, EXPERT, 0x7F80), f"tensor {EXPERT!r} holds NaN or infinity at [1, 2]"),
        (reshape, f"tensor {EXPERT!r} has shape [60, 64], wanted [64, 64]"),
        (retype, f"tensor {EXPERT!r}: unknown dtype 'F8_E5M2'"),
        (repack, f"tensor {EXPERT.replace('weight', 'qweight')!r}: quantized already (GPTQ or AWQ)"),
    ],
)
def test_damaged_source_is_refused_before_anything_is_written(
    harm: Callable[[Path], None], message: str, src: Path, tmp_path: Path
) -> None:
    harm(src)
    with pytest.raises(CheckpointError) as caught:
        quantize_checkpoint(src, tmp_path / "dst", Settings(effort="plain"))
    assert message in str(caught.value) and len(str(caught.value).splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["src"]
