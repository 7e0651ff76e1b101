from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from expertd.checkpoint.shards import TensorEntry
from expertd.errors import CheckpointError
from expertd.quant.convert import quantize_checkpoint
from expertd.quant.formats import Stored, find_stored, float_formats, refuse_quantized, widen, widen_sanitized
from expertd.quant.settings import Settings
from expertd.quant.survey import survey
from tests.quant.narrow import (
    E4M3,
    Array,
    Tensors,
    bf16_of,
    bits_of,
    from_fp8,
    open_weights,
    pack_int4,
    read_tensors,
    rewrite,
    to_fp8,
    wide,
    write_tensors,
)
from tests.tiny import E2M1, make_tiny, to_mxfp4, write_json

FP8 = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}
PACKED = {
    "quantization_config": {
        "quant_method": "compressed-tensors",
        "config_groups": {"group_0": {"weights": {"num_bits": 4, "group_size": 32, "symmetric": True}}},
    }
}


def entries_of(tensors: Tensors) -> dict[str, TensorEntry]:
    return {
        name: TensorEntry(code, values.shape, 0, values.nbytes) for name, (code, values) in tensors.items()
    }


def widened(tmp_path: Path, tensors: Tensors, config: dict[str, Any] = FP8) -> dict[str, mx.array]:
    write_tensors(tmp_path / "model.safetensors", tensors)
    weights: dict[str, mx.array] = mx.load(str(tmp_path / "model.safetensors"))  # type: ignore[assignment]
    return widen(tmp_path, weights, find_stored(tmp_path, entries_of(tensors)), config)


def random(*shape: int, seed: int = 0) -> Array:
    return np.random.RandomState(seed).standard_normal(shape)


def codes(*shape: int, seed: int = 0) -> Array:
    """E4M3 codes that are numbers."""
    found = np.random.RandomState(seed).randint(0, 256, shape).astype(np.uint8)
    found[(found & 0x7F) == 0x7F] = 0
    return found


def test_every_fp8_code(tmp_path: Path) -> None:
    every = np.arange(256, dtype=np.uint8)[(np.arange(256) & 0x7F) != 0x7F].reshape(2, 127)
    scale = np.array(1, np.float32)
    wide = widened(tmp_path, {"a.weight": ("F8_E4M3", every), "a.weight_scale": ("F32", scale)})
    assert wide["a.weight"].dtype == mx.bfloat16
    np.testing.assert_array_equal(np.array(wide["a.weight"].astype(mx.float32)), E4M3[every])


@pytest.mark.parametrize("code", ["F8_E4M3", "U8"])
@pytest.mark.parametrize(
    ("shape", "block", "grid"),
    [
        ((256, 384), (128, 128), (2, 3)),
        ((300, 130), (128, 128), (3, 2)),
        ((5, 7), (128, 128), (1, 1)),
        ((96, 80), (64, 32), (2, 3)),
        ((40, 96), (1, 32), (40, 3)),
        ((130, 256), (1, 128), (130, 2)),
    ],
)
def test_fp8_blocks(
    code: str, shape: tuple[int, int], block: tuple[int, int], grid: tuple[int, int], tmp_path: Path
) -> None:
    scale = np.exp(random(*grid, seed=1)).astype(np.float32)
    values = codes(*shape)
    config = {"quantization_config": {"quant_method": "fp8", "weight_block_size": list(block)}}
    tensors: Tensors = {
        "a.weight_scale_inv": ("F32", scale), "a.weight": (code, values), "b.weight": ("F32", scale)
    }  # fmt: skip
    wide = widened(tmp_path, tensors, config)
    assert sorted(wide) == ["a.weight", "b.weight"]
    np.testing.assert_array_equal(bits_of(wide["a.weight"]), bf16_of(from_fp8(values, scale, block)))


def test_fp8_blocks_of_stacked_experts(tmp_path: Path) -> None:
    scale, values = np.exp(random(3, 2, 1, seed=1)).astype(np.float32), codes(3, 200, 100)
    tensors: Tensors = {
        "experts.up_proj": ("F8_E4M3", values), "experts.up_proj_scale_inv": ("F32", scale),
        "experts.up_proj_activation_scale": ("F32", np.ones(3, np.float32)),
    }  # fmt: skip
    wide = widened(tmp_path, tensors)
    assert list(wide) == ["experts.up_proj"]
    np.testing.assert_array_equal(bits_of(wide["experts.up_proj"]), bf16_of(from_fp8(values, scale)))


@pytest.mark.parametrize("shape", [(), (1,), (48,), (48, 1), (1, 1)])
@pytest.mark.parametrize("kind", ["F8_E4M3", "I8"])
def test_scale_per_tensor_and_per_channel(shape: tuple[int, ...], kind: str, tmp_path: Path) -> None:
    scale = np.exp(random(*shape, seed=1)).astype(np.float32)
    scale = np.asarray(scale).reshape(shape)
    values = codes(48, 48) if kind == "F8_E4M3" else codes(48, 48).view(np.int8)
    tensors: Tensors = {
        "a.weight": (kind, values), "a.weight_scale": ("F32", scale),
        "a.input_scale": ("F32", np.ones(1, np.float32)), "a.k_scale": ("F32", np.ones(1, np.float32)),
    }  # fmt: skip
    wide = widened(tmp_path, tensors)
    assert list(wide) == ["a.weight"]
    numbers = E4M3[values] if kind == "F8_E4M3" else values.astype(np.float64)
    expected = numbers * scale.astype(np.float64).reshape(-1, 1)
    np.testing.assert_array_equal(bits_of(wide["a.weight"]), bf16_of(expected))


def test_scales_of_powers_of_two(tmp_path: Path) -> None:
    """E8M0 from its smallest to its largest; also by the name that DeepSeek's own files use."""
    exponents = np.array([[0, 1, 100], [127, 200, 254]], np.uint8)
    values = np.full((256, 384), 0x30, np.uint8)  # 0.5
    for name in ("a.weight_scale_inv", "a.scale"):
        tensors: Tensors = {"a.weight": ("F8_E4M3", values), name: ("F8_E8M0", exponents)}
        wide = widened(tmp_path, tensors)
        scales = np.exp2(exponents.astype(np.float64) - 127)
        np.testing.assert_array_equal(bits_of(wide["a.weight"]), bf16_of(from_fp8(values, scales)))


@pytest.mark.parametrize("group_size", [16, 32, 128])
@pytest.mark.parametrize("has_zero_points", [False, True])
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_packed_int4(group_size: int, has_zero_points: bool, dtype: Any, tmp_path: Path) -> None:
    rows, columns = 20, 256
    draw = np.random.RandomState(0)
    values, zero = draw.randint(0, 16, (rows, columns)), np.full((rows, columns // group_size), 8)
    scale = np.exp(random(*zero.shape, seed=1)).astype(dtype)
    code = "F16" if dtype is np.float16 else "F32"
    tensors: Tensors = {
        "a.weight_packed": ("I32", pack_int4(values)), "a.weight_scale": (code, scale),
        "a.weight_shape": ("I64", np.array([rows, columns])),
    }  # fmt: skip
    if has_zero_points:
        zero = draw.randint(0, 16, zero.shape)
        padded = np.concatenate([zero, np.zeros((-rows % 8, zero.shape[1]), zero.dtype)])
        tensors["a.weight_zero_point"] = ("I32", np.ascontiguousarray(pack_int4(padded.T).T))
    wide = widened(tmp_path, tensors, PACKED)
    assert list(wide) == ["a.weight"]
    expected = (values - zero.repeat(group_size, axis=1)) * scale.repeat(group_size, axis=1).astype(
        np.float64
    )
    if dtype is np.float16:
        np.testing.assert_array_equal(np.array(wide["a.weight"]), expected.astype(np.float16))
    else:
        np.testing.assert_array_equal(bits_of(wide["a.weight"]), bf16_of(expected))


def test_packed_mxfp4(tmp_path: Path) -> None:
    packed, exponents = to_mxfp4(random(6, 96).astype(np.float32))
    nibbles = np.stack([packed & 15, packed >> 4], axis=-1).reshape(6, 96)
    values = E2M1[nibbles & 7].astype(np.float64) * np.where(nibbles & 8, -1, 1)
    expected = values * np.exp2(exponents.astype(np.float64) - 127).repeat(32, axis=1)
    tensors: Tensors = {
        "a.weight_packed": ("U8", packed.reshape(6, 48)), "a.weight_scale": ("U8", exponents),
    }  # fmt: skip
    np.testing.assert_array_equal(bits_of(widened(tmp_path, tensors, PACKED)["a.weight"]), bf16_of(expected))


def words(*shape: int) -> Array:
    return np.zeros(shape, np.int32)


def small(*shape: int) -> Array:
    return np.zeros(shape, np.uint8)


@pytest.mark.parametrize(
    ("tensors", "named", "found"),
    [
        ({"a.qweight": ("I32", words(8, 8)), "a.g_idx": ("I32", words(8))}, "a.qweight", "GPTQ or AWQ"),
        ({"a.weight": ("U8", small(8, 1)), "a.weight.absmax": ("F32", words(1))}, "a.weight.absmax", "bitsandb"),
        ({"a.weight": ("I8", small(8, 8)), "a.SCB": ("F32", words(8))}, "a.SCB", "bitsandbytes"),
        (
            {"a.weight_packed": ("U8", small(8, 8)), "a.weight_scale": ("F8_E4M3", small(8, 1))},
            "a.weight_packed", "NVFP4",
        ),
        ({"a.weight": ("U8", small(8, 8)), "a.weight_scale": ("F8_E4M3", small(8, 1))}, "a.weight", "NVFP4"),
        ({"a.weight": ("BF16", small(2)), "a.weight_scale_2": ("F32", words(1))}, "a.weight_scale_2", "NVFP4"),
        (
            {"a.weight": ("I8", small(8, 8)), "a.weight_scale": ("F32", words(8)),
             "a.weight_zero_point": ("I8", small(8))},
            "a.weight", "int8 with zero points",
        ),
        ({"a.weight_packed": ("I32", words(8, 1)), "a.weight_g_idx": ("I32", words(8))}, "a.weight_g_idx", "packed"),
        ({"a.weight": ("U32", words(8, 1)), "a.scales": ("BF16", small(8, 1))}, "a.weight", "MLX"),
    ],
)  # fmt: skip
def test_formats_that_are_refused_by_name(tensors: Tensors, named: str, found: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        refuse_quantized(Path("folder"), {}, entries_of(tensors))
    message = str(caught.value)
    assert f"tensor {named!r}: quantized already ({found}" in message
    assert "Give the full-precision checkpoint" in message and "\n" not in message


@pytest.mark.parametrize(
    ("config", "found"),
    [
        ({"quantization": {"bits": 4, "group_size": 64}}, "affine 4 bits, groups of 64"),
        ({"quantization_config": {"bits": 2, "group_size": 64}}, "affine 2 bits, groups of 64"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "gptq"),
        ({"text_config": {"quantization_config": {"quant_method": "bitnet"}}}, "bitnet"),
    ],
)
def test_formats_that_are_refused_by_config(config: dict[str, Any], found: str) -> None:
    with pytest.raises(CheckpointError, match="quantized already") as caught:
        refuse_quantized(Path("folder"), config, {})
    assert f"({found})" in str(caught.value)


def test_packed_integers_of_another_width_are_refused() -> None:
    settings = {"quant_method": "compressed-tensors", "config_groups": {"g": {"weights": {"num_bits": 8}}}}
    tensors: Tensors = {"a.weight_packed": ("I32", words(8, 2)), "a.weight_scale": ("F32", words(8, 1))}
    with pytest.raises(CheckpointError, match=r"tensor 'a.weight_packed'.*packed integers of 8 bits"):
        refuse_quantized(Path("folder"), {"quantization_config": settings}, entries_of(tensors))


@pytest.mark.parametrize("config", [{}, FP8, PACKED, {"quantization_config": {"quant_method": "mxfp4"}}])
def test_formats_that_are_accepted(config: dict[str, Any]) -> None:
    refuse_quantized(Path("folder"), config, {"a.weight": TensorEntry("F8_E4M3", (2, 2), 0, 4)})


@pytest.mark.parametrize(
    "tensors",
    [
        {"a.weight": ("F8_E4M3", codes(256, 256)), "a.weight_scale_inv": ("F32", np.ones((3, 2), "f4"))},
        {"a.weight": ("F8_E4M3", codes(256, 256)), "a.weight_scale_inv": ("F32", np.ones((2, 2, 2), "f4"))},
        {"a.weight_packed": ("I32", words(8, 4)), "a.weight_scale": ("F32", np.ones((8, 5), "f4"))},
        {"a.weight_packed": ("I32", words(8, 4)), "a.weight_scale": ("F32", np.ones((4, 4), "f4"))},
        {"a.weight_packed": ("U8", small(8, 64)), "a.weight_scale": ("U8", small(8, 3))},
    ],
)  # fmt: skip
def test_scales_that_do_not_fit(tensors: Tensors, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"tensor 'a.weight_scale\w*' has shape .* does not fit"):
        widened(tmp_path, tensors, FP8)


def test_codes_without_scales(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"tensor 'a\.weight_packed' has no 'a.weight_scale'"):
        widened(tmp_path, {"a.weight_packed": ("I32", words(8, 4))})


@pytest.mark.parametrize(("mode", "bits"), [("mxfp4", 4), ("mxfp8", 8)])
def test_what_a_family_leaves_packed(mode: str, bits: int, tmp_path: Path) -> None:
    values = mx.array(random(3, 4, 64).astype(np.float32))
    packed, scales = mx.quantize(values, group_size=32, bits=bits, mode=mode)
    parameters = {"a.weight": values, "b.weight": values}
    weights = {"a.weight": packed, "a.scales": scales, "b.weight": values}
    wide = widen_sanitized(tmp_path, weights, parameters)
    assert list(wide) == ["a.weight", "b.weight"] and wide["a.weight"].dtype == mx.bfloat16
    exact = 2.0 ** (np.array(scales).astype(np.float64) - 127).repeat(32, axis=-1)
    bytes_ = np.array(packed.view(mx.uint8))
    if bits == 8:
        exact *= E4M3[bytes_]
    else:
        nibbles = np.stack([bytes_ & 15, bytes_ >> 4], axis=-1).reshape(3, 4, 64)
        exact *= E2M1[nibbles & 7] * np.where(nibbles & 8, -1, 1)
    np.testing.assert_array_equal(bits_of(wide["a.weight"]), bf16_of(exact))


def test_what_a_family_leaves_packed_otherwise(tmp_path: Path) -> None:
    values = mx.array(random(4, 64).astype(np.float32))
    packed, scales = mx.quantize(values, group_size=16, bits=4, mode="nvfp4")
    with pytest.raises(CheckpointError, match=r"tensor 'a\.weight' has 4 bits in groups of 16, wanted MXFP4"):
        widen_sanitized(tmp_path, {"a.weight": packed, "a.scales": scales}, {"a.weight": values})


def test_formats_of_bytes() -> None:
    tensors: Tensors = {
        "a.weight": ("U8", small(8, 8)), "a.weight_scale_inv": ("U8", small(1, 1)),
        "b_blocks": ("U8", small(8, 8)), "b_scales": ("U8", small(8)), "c": ("U8", small(8)),
    }  # fmt: skip
    stored = [Stored("fp8", "a.weight", "a.weight_scale_inv")]
    found = float_formats(entries_of(tensors), stored)
    assert list(found.values()) == ["F8_E4M3", "F8_E8M0", "U8", "F8_E8M0", "U8"]


def narrowed(tensors: Tensors, form: str) -> tuple[Tensors, dict[str, Array]]:
    """A checkpoint's projections in a narrow format, and their exact values as bfloat16 bits."""
    new: Tensors = {}
    exact: dict[str, Array] = {}
    for name, (code, values) in tensors.items():
        if not name.endswith("_proj.weight"):
            new[name] = (code, values)
        elif form == "fp8":
            packed, scale = to_fp8(wide(code, values))
            new |= {name: ("F8_E4M3", packed), f"{name}_scale_inv": ("F32", scale)}
            exact[name] = bf16_of(from_fp8(packed, scale))
        else:
            groups = wide(code, values).reshape(values.shape[0], -1, 32)
            scale = np.abs(groups).max(-1) / 7
            bits = bf16_of(scale)
            scale = wide("BF16", bits).astype(np.float64)
            numbers = np.rint(groups / scale[..., None]).clip(-8, 7)
            exact[name] = bf16_of((numbers * scale[..., None]).reshape(values.shape))
            packed = pack_int4((numbers.reshape(values.shape) + 8).astype(int))
            new |= {f"{name}_packed": ("I32", packed), f"{name}_scale": ("BF16", bits)}
            new[f"{name}_shape"] = ("I64", np.array(values.shape))
    return new, exact


@pytest.mark.parametrize("form", ["fp8", "packed"])
@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "glm4_moe"])
def test_families_get_what_they_would_of_the_wide_checkpoint(family: str, form: str, tmp_path: Path) -> None:
    """Those whose sanitize knows the format, and those whose does not."""
    folder = make_tiny(tmp_path / "wide", family, "bfloat16")
    tensors, exact = narrowed(read_tensors(folder / "model.safetensors"), form)
    narrow = make_tiny(tmp_path / "narrow", family, "bfloat16")
    rewrite(narrow, tensors, **(FP8 if form == "fp8" else PACKED))
    plain = {name: ("BF16", exact[name]) if name in exact else found for name, found in
             read_tensors(folder / "model.safetensors").items()}  # fmt: skip
    rewrite(folder, plain)
    found, expected = open_weights(narrow), open_weights(folder)
    assert found.names == expected.names and found.num_parameters == expected.num_parameters
    values, wanted = found.take(found.names), expected.take(expected.names)
    for name in found.names:
        assert values[name].dtype == wanted[name].dtype and mx.array_equal(values[name], wanted[name]), name


def test_packed_int4_converts_and_loads(tmp_path: Path) -> None:
    folder = make_tiny(tmp_path / "src", "qwen3_moe", "bfloat16")
    tensors, _ = narrowed(read_tensors(folder / "model.safetensors"), "packed")
    rewrite(folder, tensors, **PACKED)
    assert quantize_checkpoint(folder, tmp_path / "dst", Settings(effort="plain")).num_parameters > 0


V41 = {
    "model_type": "deepseek_v41", "architectures": ["DeepseekV41ForCausalLM"], "vocab_size": 64, "hidden_size": 128,
    "num_hidden_layers": 1, "num_attention_heads": 4, "head_dim": 64, "q_lora_rank": 64, "qk_rope_head_dim": 16,
    "o_groups": 2, "o_lora_rank": 32, "moe_intermediate_size": 64, "n_routed_experts": 4, "num_experts_per_tok": 2,
    "compress_ratios": [0], "quantization_config": {
        "quant_method": "fp8", "scale_fmt": "ue8m0", "weight_block_size": [32, 32]
    },
}  # fmt: skip


def native_v41() -> tuple[Tensors, dict[str, Array]]:
    """As DeepSeek publishes it: FP8 in tiles of 32 x 32, experts in FP4, all scales powers of two. And the exact
    values of the parameters made of these, as bfloat16 bits."""
    tensors: Tensors = {"embed.weight": ("BF16", small(64, 256).view(np.uint16))}
    exact: dict[str, Array] = {}
    linears = {
        "attn.wq_a": (64, 128), "attn.wq_b": (256, 64), "attn.wkv": (64, 128), "attn.wo_a": (64, 128),
        "attn.wo_b": (128, 64), "ffn.shared_experts.w1": (64, 128), "ffn.shared_experts.w2": (128, 64),
        "ffn.shared_experts.w3": (64, 128),
    }  # fmt: skip
    for name, (rows, columns) in linears.items():
        values, powers = (
            codes(rows, columns),
            random(rows // 32, columns // 32).astype(np.int8).view(np.uint8),
        )
        powers = (powers + 120).astype(np.uint8)
        tensors |= {
            f"layers.0.{name}.weight": ("F8_E4M3", values),
            f"layers.0.{name}.scale": ("F8_E8M0", powers),
        }
        exact[name] = bf16_of(from_fp8(values, np.exp2(powers.astype(np.float64) - 127), (32, 32)))
    for expert in range(4):
        for name, shape in {"w1": (64, 128), "w2": (128, 64), "w3": (64, 128)}.items():
            packed, powers = to_mxfp4(random(*shape, seed=expert).astype(np.float32))
            path = f"layers.0.ffn.experts.{expert}.{name}"
            tensors |= {
                f"{path}.weight": ("I8", packed.reshape(shape[0], -1)),
                f"{path}.scale": ("F8_E8M0", powers),
            }
            nibbles = np.stack([packed & 15, packed >> 4], axis=-1).reshape(shape)
            values = E2M1[nibbles & 7] * np.where(nibbles & 8, -1, 1)
            exact[f"{name}.{expert}"] = bf16_of(
                values * np.exp2(powers.astype(np.float64) - 127).repeat(32, axis=1)
            )
    floats = {
        "norm.weight": (128,), "head.weight": (64, 128), "layers.0.attn.q_norm.weight": (64,),
        "layers.0.attn.kv_norm.weight": (64,), "layers.0.attn.attn_sink": (4,), "layers.0.ffn.gate.weight": (4, 128),
        "layers.0.ffn.gate.bias": (4,), "layers.0.attn_norm.weight": (128,), "layers.0.ffn_norm.weight": (128,),
    }  # fmt: skip
    for part in ("attn", "ffn"):
        floats |= {
            f"layers.0.hc_{part}_{n}": s for n, s in (("fn", (24, 512)), ("base", (24,)), ("scale", (3,)))
        }
    return tensors | {name: ("F32", np.ones(shape, np.float32)) for name, shape in floats.items()}, exact


def test_deepseeks_own_files(tmp_path: Path) -> None:
    """FP8 is widened before this family's sanitize, which would keep it; FP4 is what it leaves packed."""
    tensors, exact = native_v41()
    folder = make_tiny(tmp_path / "src", "deepseek_v3")
    write_json(folder / "config.json", V41)
    write_tensors(folder / "model.safetensors", tensors)
    weights = open_weights(folder)
    survey(weights, [])
    found = weights.take(weights.names)
    layer = "model.layers.0"
    for ours, theirs in (
        ("self_attn.q_b_proj", "attn.wq_b"),
        ("mlp.shared_experts.down_proj", "ffn.shared_experts.w2"),
    ):
        np.testing.assert_array_equal(bits_of(found[f"{layer}.{ours}.weight"]), exact[theirs])
    o_a_proj = bits_of(found[f"{layer}.self_attn.o_a_proj.weight"])
    np.testing.assert_array_equal(o_a_proj, exact["attn.wo_a"].reshape(2, 32, 128))
    for ours, theirs in (("gate_proj", "w1"), ("down_proj", "w2"), ("up_proj", "w3")):
        stacked = bits_of(found[f"{layer}.mlp.experts.switch_mlp.{ours}.weight"])
        np.testing.assert_array_equal(stacked, np.stack([exact[f"{theirs}.{e}"] for e in range(4)]))
