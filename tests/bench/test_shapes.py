"""Random checkpoints of real models' shapes: the product loads them, and their numbers are sane."""

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from click.testing import CliRunner

from expertd.bench.random_checkpoint import Bits, describe, make_random_checkpoint, temporary_checkpoint
from expertd.bench.shapes import SHAPES, Matrix, Shape, find_shape
from expertd.checkpoint.inspect import check_checkpoint
from expertd.cli import cli
from expertd.errors import ConfigError
from expertd.model.model import Model
from expertd.split.cut import StepSplit

VOCABULARY = 4096  # the demo tokenizer's
SIZES: dict[str, Any] = {
    "num_layers": 48, "hidden": 256, "num_experts": 8, "top_k": 2, "intermediate": 256, "vocabulary": VOCABULARY,
    "num_heads": 4, "num_kv_heads": 2, "head_dim": 64,
}  # fmt: skip
TINY = Shape("tiny", "qwen3_moe", **SIZES)
TINY_OSS = Shape("tiny-oss", "gpt_oss", **SIZES, min_layers=2)


@pytest.mark.parametrize("shape", [TINY, TINY_OSS], ids=lambda shape: shape.family)
@pytest.mark.parametrize("bits", [Bits(), Bits(experts=4, trunk=8, outer=2)], ids=str)
def test_the_product_loads_it_and_logits_are_sane(tmp_path: Path, shape: Shape, bits: Bits) -> None:
    info = check_checkpoint(make_random_checkpoint(tmp_path / "made", shape, 2, VOCABULARY, bits))
    assert (info.family, info.num_experts, info.top_k) == (shape.family, 8, 2)
    model = Model(info.folder, info.config)
    logits = model.forward([5, 6, 7], model.new_cache(), StepSplit("solo", (1.0,))).astype(mx.float32)
    assert logits.shape == (3, VOCABULARY) and mx.isfinite(logits).all().item()
    assert 0.5 < logits.std().item() < 2


def test_bits_are_where_they_should_be(tmp_path: Path) -> None:
    bits = Bits(outer=4)
    folder = make_random_checkpoint(tmp_path / "a", TINY, 2, VOCABULARY, bits)
    settings = json.loads((folder / "config.json").read_text())["quantization"]
    layer = "model.layers.1"
    assert settings[f"{layer}.mlp.switch_mlp.down_proj"]["bits"] == 2
    assert settings[f"{layer}.self_attn.o_proj"]["bits"] == settings["lm_head"]["bits"] == 4
    weights: Any = mx.load(str(folder / "model.safetensors"))
    assert weights[f"{layer}.mlp.gate.weight"].dtype == mx.bfloat16 and f"{layer}.mlp.gate" not in settings
    for path, wanted in ((f"{layer}.mlp.switch_mlp.up_proj", 1.5 / 16), ("model.embed_tokens", 1.0)):
        parts = (weights[f"{path}.{leaf}"] for leaf in ("weight", "scales", "biases"))
        dense = mx.dequantize(*parts, group_size=64, bits=settings[path]["bits"]).astype(mx.float32)
        assert dense.std().item() == pytest.approx(wanted, rel=0.1)
        assert abs(dense.mean().item()) < 0.02 * wanted
    again = make_random_checkpoint(tmp_path / "b", TINY, 2, VOCABULARY, bits)
    assert all((again / path.name).read_bytes() == path.read_bytes() for path in folder.iterdir())


def test_a_temporary_one_goes_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SHAPES, "tiny", TINY)
    with temporary_checkpoint("tiny", layers=1, vocabulary=VOCABULARY) as (folder, name):
        assert check_checkpoint(folder).family == "qwen3_moe"
    assert not folder.exists() and name == describe(TINY, 1, VOCABULARY, Bits())
    assert "1 of 48 layers" in name and "vocabulary 4096" in name


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ([], "neither is given"),
        (["demo", "--shape", "qwen3-30b-a3b"], "found both 'demo' and --shape qwen3-30b-a3b"),
        (["demo", "--layers", "2"], "--layers: belongs to --shape"),
        (["demo", "--outer-bits", "4"], "--outer-bits: belongs to --shape"),
        (["--shape", "qwen9"], "--shape qwen9: unknown. Choose one of qwen3-30b-a3b"),
        (["--shape", "deepseek-v4-flash"], "the installed mlx-lm cannot run this model"),
        (["--shape", "gpt-oss-120b", "--layers", "1"], "gpt-oss-120b needs at least 2"),
        (["--shape", "qwen3-30b-a3b", "--vocabulary", "99"], "wanted at least the tokenizer's, 4096"),
        (["--shape", "qwen3-30b-a3b", "--outer-bits", "5"], "5 bits: wanted one of 2, 4, 8"),
        (["demo", "--kernels", "fast"], "--kernels fast: unknown. Choose from auto, native, mlx"),
        (["demo", "--kernels", "mlx,mlx"], "--kernels mlx,mlx: names one twice"),
    ],
)
def test_wrong_arguments_are_named(args: list[str], words: str) -> None:
    for kind in ("decode", "prefill"):
        result = CliRunner().invoke(cli, ["bench", kind, *args])
        assert isinstance(result.exception, ConfigError) and words in str(result.exception)


def test_matrices() -> None:
    """Like ones are one; the sizes are those of the models."""
    assert TINY.matrices()[:2] == [Matrix("attention q/o", 256, 256), Matrix("attention k/v", 128, 256)]
    found = {m.name: (m.num_out, m.width, m.kind) for m in find_shape("qwen3-30b-a3b").matrices()}
    assert found["attention o"] == (2048, 4096, "dense") and found["attention k/v"] == (512, 2048, "dense")
    assert found["experts gate/up"] == (768, 2048, "experts") and found["router"] == (128, 2048, "float")
    # The authors' counts of active weights, less the embedding's table, which a token reads one row of.
    active = {
        "qwen3-30b-a3b": 3.3 - 0.31, "qwen3-235b-a22b": 22 - 0.62, "gpt-oss-120b": 5.1, "deepseek-v4-flash": 13 - 0.53
    }  # fmt: skip
    for name, billions in active.items():
        assert _active(find_shape(name)) / 1e9 == pytest.approx(billions, rel=0.05), name


def _active(shape: Shape) -> int:
    attention = sum(out * width for out, width in shape.attention.values())
    ffn = 3 * shape.hidden * (shape.top_k * shape.intermediate + shape.shared)
    return shape.num_layers * (attention + ffn) + shape.vocabulary * shape.hidden
