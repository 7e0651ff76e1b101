import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten
from mlx_lm import load
from mlx_lm.utils import load_model

from expertd.checkpoint.config import normalise_config, read_config
from expertd.checkpoint.inspect import check_checkpoint
from expertd.checkpoint.shards import read_header
from expertd.errors import CheckpointError, ConfigError
from expertd.model.classes import model_classes
from expertd.model.model import Model
from expertd.quant import convert, output
from expertd.quant.convert import Quantized
from expertd.quant.settings import Settings
from expertd.split.cut import StepSplit
from tests.tiny import FAMILIES, make_tiny, write_json

TEXT = "the quick brown fox"


def quantize(
    src: Path, dst: Path, progress: Any = lambda what, done, total: None, **settings: Any
) -> Quantized:
    """By plain rounding, the trunk at 4 bits, but for what `settings` say."""
    settings = {"effort": "plain", "trunk": (4,), **settings}
    return convert.quantize_checkpoint(src, dst, Settings(**settings), progress)


@pytest.fixture
def src(tmp_path: Path) -> Path:
    return make_tiny(tmp_path / "src", "qwen3_moe", "bfloat16")


def source_weights(folder: Path) -> dict[str, mx.array]:
    """The source's weights by mlx-lm's names and in its layout."""
    config = normalise_config(read_config(folder))
    return dict(
        tree_flatten(load_model(folder, model_config=config, get_model_classes=model_classes)[0].parameters())
    )


def quantization(folder: Path) -> dict[str, Any]:
    config = json.loads((folder / "config.json").read_text())
    assert config["quantization"] == config["quantization_config"]
    settings: dict[str, Any] = config["quantization"]
    return settings


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("dtype", "generation"), [("bfloat16", 4), ("float32", 5)])
def test_loads_in_stock_mlx_lm(family: str, dtype: str, generation: int, tmp_path: Path) -> None:
    src = make_tiny(tmp_path / "src", family, dtype, generation=generation)
    done = quantize(src, tmp_path / "dst")
    model, tokenizer = load(str(tmp_path / "dst"))
    logits = model(mx.array([tokenizer.encode(TEXT)]))
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT
    assert mx.isfinite(logits).all().item() and 0.1 < logits.astype(mx.float32).std().item() < 10
    info = check_checkpoint(tmp_path / "dst")
    assert (info.total_bytes, info.quantization) == (done.num_bytes, "affine 2/4/8 bits, groups of 64")
    assert 2 < done.bits_per_weight < 6


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "deepseek_v3", "gpt_oss", "qwen3_next"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_weights_are_those_of_mx_quantize(family: str, dtype: str, tmp_path: Path) -> None:
    src = make_tiny(tmp_path / "src", family, dtype)
    quantize(src, tmp_path / "dst", experts_bits=3, trunk=(8,), group_size=32)
    written = mx.load(str(tmp_path / "dst" / "model.safetensors"))
    settings = quantization(tmp_path / "dst")
    for name, weight in source_weights(src).items():
        path = name.removesuffix(".weight")
        expected = [weight]
        if name.endswith(".weight") and path in settings:
            expected = list(mx.quantize(weight, settings[path]["group_size"], settings[path]["bits"]))
        for key, array in zip((name, f"{path}.scales", f"{path}.biases"), expected, strict=False):
            assert mx.array_equal(written.pop(key), array), key
    assert not written


def test_bits_per_module(src: Path, tmp_path: Path) -> None:
    quantize(src, tmp_path / "dst", experts_bits=2, trunk=(6,))
    settings = quantization(tmp_path / "dst")
    bits = {path: part["bits"] for path, part in settings.items() if isinstance(part, dict)}
    assert {bits[path] for path in bits if ".switch_mlp." in path} == {2}
    assert {bits[path] for path in bits if ".self_attn." in path} == {6}
    assert bits["model.embed_tokens"] == bits["lm_head"] == 8
    assert (settings["bits"], settings["group_size"], settings["mode"]) == (2, 64, "affine")
    written = read_header(tmp_path / "dst" / "model.safetensors")
    for name in ("model.layers.0.mlp.gate.weight", "model.norm.weight"):
        assert written[name].dtype == "BF16" and name.removesuffix(".weight") not in bits


@pytest.mark.parametrize(
    ("family", "whole"),
    [
        ("qwen3_next", ["mlp.gate", "mlp.shared_expert_gate"]),
        ("gpt_oss", ["mlp.router"]),
        ("deepseek_v3", ["mlp.gate"]),
        ("minimax", ["block_sparse_moe.gate"]),
    ],
)
def test_routers_stay_whole(family: str, whole: list[str], tmp_path: Path) -> None:
    quantize(make_tiny(tmp_path / "src", family, "bfloat16"), tmp_path / "dst")
    written = read_header(tmp_path / "dst" / "model.safetensors")
    for name in whole:
        assert written[f"model.layers.1.{name}.weight"].dtype == "BF16"
        assert f"model.layers.1.{name}.scales" not in written


def test_what_is_no_multiple_of_the_group_gets_a_smaller_one(tmp_path: Path) -> None:
    src = make_tiny(tmp_path / "src", "deepseek_v3")
    done = quantize(src, tmp_path / "dst")
    settings = quantization(tmp_path / "dst")
    sizes = {path: part["group_size"] for path, part in settings.items() if isinstance(part, dict)}
    assert {path for path, size in sizes.items() if size == 32} == {
        f"model.layers.{i}.self_attn.embed_q" for i in range(3)
    }
    assert done.indivisible == ()


def test_mxfp4_is_widened_exactly(tmp_path: Path) -> None:
    src = make_tiny(tmp_path / "src", "gpt_oss_mxfp4", "bfloat16")
    quantize(src, tmp_path / "dst", experts_bits=8, group_size=32)
    packed, stored = source_weights(src), mx.load(str(tmp_path / "dst" / "model.safetensors"))
    for name in ("gate_proj", "down_proj"):
        path = f"model.layers.0.mlp.experts.{name}"
        values = mx.dequantize(
            packed[f"{path}.weight"], packed[f"{path}.scales"], group_size=32, bits=4, mode="mxfp4"
        )
        parts = [stored[f"{path}.{leaf}"] for leaf in ("weight", "scales", "biases")]
        error = mx.abs(mx.dequantize(*parts, group_size=32, bits=8) - values).max().item()
        assert error < 0.01 * mx.abs(values).max().item()


def to_fp8(folder: Path) -> None:
    """Rewrite a checkpoint as DeepSeek publishes: matrices in FP8, one scale for each 128 x 128 block."""
    path = folder / "model.safetensors"
    weights = mx.load(str(path))
    for name in [name for name, weight in weights.items() if "_proj" in name and weight.ndim == 2]:
        rows, columns = (-(-size // 128) for size in weights[name].shape)
        weights[f"{name}_scale_inv"] = mx.full((rows, columns), 0.5, dtype=mx.float32)
        weights[name] = mx.to_fp8(weights[name].astype(mx.float32) * 2)
    mx.save_safetensors(str(path), weights)
    config = json.loads((folder / "config.json").read_text())
    settings = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}
    write_json(folder / "config.json", config | {"quantization_config": settings})


@pytest.mark.parametrize("family", ["deepseek_v3", "glm4_moe"])  # whose sanitize knows FP8, and does not
def test_fp8_is_widened(family: str, tmp_path: Path) -> None:
    plain = make_tiny(tmp_path / "plain", family, "bfloat16")
    to_fp8(fp8 := make_tiny(tmp_path / "fp8", family, "bfloat16"))
    for src in (plain, fp8):
        quantize(src, src / "dst", experts_bits=8, trunk=(8,), group_size=32)
    ours, exact = (load(str(src / "dst"))[0](mx.arange(24)[None]) for src in (fp8, plain))
    assert mx.abs(ours - exact).mean().item() < 0.3 * exact.astype(mx.float32).std().item()


def test_progress_and_index(src: Path, tmp_path: Path) -> None:
    calls: list[tuple[str, int, int]] = []
    done = quantize(src, tmp_path / "dst", progress=lambda *call: calls.append(call))
    counts = [done for what, done, total in calls if what == "rounding"]
    assert counts == sorted(counts) and counts[-1] == calls[-1][2] == done.num_parameters
    index = json.loads((tmp_path / "dst" / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": done.num_bytes, "total_parameters": done.num_parameters}
    assert done.num_parameters == sum(weight.size for weight in source_weights(src).values())


def test_texts_are_copied_and_code_is_not(src: Path, tmp_path: Path) -> None:
    (src / "modeling_evil.py").touch()
    write_json(src / "hf_quant_config.json", {})
    quantize(src, tmp_path / "dst")
    copied = {path.name for path in (tmp_path / "dst").iterdir()}
    texts = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"}
    ours = {"config.json", "model.safetensors", "model.safetensors.index.json"}
    assert copied == texts | ours | {"quantization_manifest.json", "report.html"}


@pytest.mark.parametrize("effort", ["plain", "normal"])
def test_an_interrupted_run_goes_on_to_the_same_bytes(effort: str, src: Path, tmp_path: Path) -> None:
    settings = {"effort": effort, "num_windows": 4, "window_tokens": 32, "group_size": 32}
    quantize(src, tmp_path / "whole", **settings)
    later: list[int] = []

    def interrupt(what: str, done: int, total: int) -> None:
        if what == "rounding":
            later.append(done)
            assert not (tmp_path / "dst").exists()
            if done > total // 2 and len(later) < 1000:
                later.extend([0] * 1000)
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(src, tmp_path / "dst", interrupt, **settings)
    assert {path.name for path in tmp_path.iterdir()} == {"src", "whole", "dst.partial"}
    with pytest.raises(CheckpointError):
        check_checkpoint(tmp_path / "dst.partial")
    quantize(src, tmp_path / "dst", interrupt, **settings)
    assert {path.name for path in tmp_path.iterdir()} == {"src", "whole", "dst"}
    for path in (tmp_path / "whole").iterdir():
        if path.name != "report.html":  # it has times
            assert (tmp_path / "dst" / path.name).read_bytes() == path.read_bytes(), path.name


def test_other_settings_do_not_go_on(src: Path, tmp_path: Path) -> None:
    def interrupt(what: str, done: int, total: int) -> None:
        if what == "rounding" and done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(src, tmp_path / "dst", interrupt)
    with pytest.raises(ConfigError, match="experts_bits"):
        quantize(src, tmp_path / "dst", experts_bits=3)


def test_stock_mlx_lm_generates_the_same_tokens(tmp_path: Path) -> None:
    """The checkpoint is plain MLX format: greedy tokens of mlx-lm's own loader and of ours are equal."""
    src = make_tiny(tmp_path / "src", "qwen3_moe", "bfloat16")
    quantize(src, tmp_path / "dst", effort="fast", trunk=(4, 16))
    model, tokenizer = load(str(tmp_path / "dst"))
    info = check_checkpoint(tmp_path / "dst")
    ours = Model(info.folder, info.config)
    cache, tokens = ours.new_cache(), tokenizer.encode(TEXT)
    expected, found = list(tokens), list(tokens)
    ours.prefill(tokens[:-1], cache, StepSplit("solo", (1.0,)))
    for _ in range(12):
        expected.append(int(mx.argmax(model(mx.array([expected]))[0, -1]).item()))
        found.append(int(mx.argmax(ours.decode([found[-1]], [cache], StepSplit("solo", (1.0,)))).item()))
    assert found == expected


def test_destination_that_cannot_be_written(src: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="cannot be written"):
        quantize(src, tmp_path / "file" / "dst")


def test_full_destination_is_refused(src: Path, tmp_path: Path) -> None:
    (tmp_path / "dst").mkdir()
    (tmp_path / "dst" / "precious").write_text("data")
    with pytest.raises(ConfigError, match="exists and is not an empty folder"):
        quantize(src, tmp_path / "dst")
    assert (tmp_path / "dst" / "precious").read_text() == "data"
    quantize(src, tmp_path / "new" / "empty")
    (tmp_path / "other").mkdir()
    assert quantize(src, tmp_path / "other").folder == tmp_path / "other"


def test_quantized_source_is_refused(src: Path, tmp_path: Path) -> None:
    quantize(src, tmp_path / "once")
    with pytest.raises(CheckpointError, match=r"quantized already \(affine 2/4/8 bits"):
        quantize(tmp_path / "once", tmp_path / "twice")
    config = json.loads((src / "config.json").read_text())
    write_json(src / "config.json", config | {"quantization_config": {"quant_method": "gptq", "bits": 4}})
    with pytest.raises(CheckpointError, match="quantized already"):
        quantize(src, tmp_path / "twice")
    assert not (tmp_path / "twice").exists()


@pytest.mark.parametrize("settings", [{"experts_bits": 1}, {"trunk": (7,)}, {"group_size": 16}])
def test_impossible_settings(settings: dict[str, Any], src: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="Choose"):
        quantize(src, tmp_path / "dst", **settings)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_experts": 9}, "cannot arrange the weights .KeyError"),
        ({"num_hidden_layers": 1}, "is none of the model's"),
        ({"num_hidden_layers": 3}, "lacks tensor"),
        ({"vocab_size": 300}, r"has shape \[257, 64\], wanted \[300, 64\]"),
        ({"hidden_size": "wide"}, "mlx-lm cannot build this qwen3_moe"),
    ],
)
def test_config_that_does_not_fit(change: dict[str, Any], message: str, src: Path, tmp_path: Path) -> None:
    config = json.loads((src / "config.json").read_text())
    write_json(src / "config.json", config | change)
    with pytest.raises(CheckpointError, match=message) as caught:
        quantize(src, tmp_path / "dst")
    assert len(str(caught.value).splitlines()) == 1


def test_no_room(src: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    with pytest.raises(ConfigError, match="choose another disk"):
        quantize(src, tmp_path / "deep" / "dst")
    assert not (tmp_path / "deep").exists()


def test_peak_memory_is_about_one_tensor(src: Path, tmp_path: Path) -> None:
    weights = source_weights(src)
    largest, total = max(w.nbytes for w in weights.values()), sum(w.nbytes for w in weights.values())
    del weights
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    quantize(src, tmp_path / "dst")
    # The expert tensors one by one, stacked, and rounded, while the next are read and stacked.
    assert mx.get_peak_memory() - before < 5 * largest < total
