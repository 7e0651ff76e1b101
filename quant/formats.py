"""The narrow formats in which checkpoints are published, widened to floats; and those that are refused.

Theory of operation. A weight stored narrow is several tensors: codes, scales, perhaps zero points. Which format
it is shows in their names and dtypes, so headers are enough to plan by (`find_stored`) and to refuse by, before
anything is read. `widen` then replaces these tensors by one lazy float tensor under the weight's own name,
*before* the family's `sanitize`: so a family gets formats that its `sanitize` knows nothing of. What a family's
`sanitize` itself turns into MLX's MXFP4 or MXFP8 layout is widened after it (`widen_sanitized`).

Products are formed in float32 and rounded once to bfloat16 (float16 where the scales are float16, as the rest
of such a model is), which is what the publishers' own kernels do.

Sources: DeepSeek-V3's inference code for FP8 with [128, 128] blocks; the OCP Microscaling specification 1.0 for
E4M3, E8M0 and MXFP4; the README of compressed-tensors for `pack-quantized`.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from expertd.checkpoint.config import Config, text_config
from expertd.checkpoint.inspect import describe_quantization
from expertd.checkpoint.shards import TensorEntry
from expertd.errors import CheckpointError
from expertd.model.classes import Weights

Block = tuple[int, int]
DEFAULT_BLOCK = (128, 128)
# What config.json may call weights that can be widened; what they are is for the tensors to say.
WIDENED_METHODS = ("fp8", "fbgemm_fp8", "mxfp4", "mxfp8", "compressed-tensors", "modelopt")
REFUSED = {
    ".qweight": "GPTQ or AWQ",
    ".qzeros": "GPTQ or AWQ",
    ".g_idx": "GPTQ",
    "weight_g_idx": "packed integers in activation order",
    ".absmax": "bitsandbytes",
    ".quant_map": "bitsandbytes",
    ".SCB": "bitsandbytes",
    "weight_scale_2": "NVFP4",
    "weight_global_scale": "NVFP4",
}
# Scales of activations and of caches kept in FP8: nothing that the weights need.
IGNORED = ("input_scale", "activation_scale", ".k_scale", ".v_scale", ".weight_shape")
PACKED_MODES = {(4, 32): "mxfp4", (8, 32): "mxfp8"}


@dataclass(frozen=True)
class Stored:
    """The tensors that hold one weight; `format` is "fp8", "int8", "packed" (integers in 32-bit words) or
    "mxfp4"."""

    format: str
    codes: str
    scale: str
    zero_point: str | None = None

    @property
    def tensors(self) -> tuple[str, ...]:
        return tuple(name for name in (self.codes, self.scale, self.zero_point) if name)


def refuse_quantized(folder: Path, config: Config, entries: Mapping[str, TensorEntry]) -> None:
    """Raises CheckpointError, by tensor name where there is one, for weights in a format that is not widened."""
    settings = quantization_settings(config)
    if "quantization" in config or ("bits" in settings and "quant_method" not in settings):
        raise CheckpointError(_too_late(str(folder), describe_quantization(config)))
    width = packed_bits(settings)
    for name, entry in entries.items():
        found = refused_format(name, entries)
        if width != 4 and entry.dtype == "I32" and name.endswith(".weight_packed"):
            found = f"packed integers of {width} bits"
        if found:
            raise CheckpointError(_too_late(f"{folder}: tensor {name!r}", found))
    method = settings.get("quant_method")
    if method is not None and method not in WIDENED_METHODS:
        raise CheckpointError(_too_late(str(folder), str(method)[:40]))


def refused_format(name: str, entries: Mapping[str, TensorEntry]) -> str | None:
    """The format that tensor `name` belongs to, if it is one that is not widened."""
    if suffix := next((suffix for suffix in REFUSED if name.endswith(suffix)), None):
        return REFUSED[suffix]
    dtype = entries[name].dtype
    if dtype == "U32" and name.endswith(".weight") and f"{name.removesuffix('weight')}scales" in entries:
        return "MLX"
    if dtype == "I8" and f"{name}_zero_point" in entries:
        return "int8 with zero points"
    scale = entries.get(f"{name.removesuffix('_packed')}_scale")
    if dtype == "U8" and scale is not None and scale.dtype == "F8_E4M3":
        return "NVFP4"
    return None


def find_stored(folder: Path, entries: Mapping[str, TensorEntry]) -> dict[str, Stored]:
    """Every weight that is stored narrow, by the weight's name.

    Raises CheckpointError for packed codes without their scales.
    """
    found: dict[str, Stored] = {}
    for name, entry in entries.items():
        weight = name.removesuffix("_packed")
        if name.endswith(".weight_packed"):
            if f"{weight}_scale" not in entries:
                raise CheckpointError(
                    f"{folder}: tensor {name!r} has no {weight + '_scale'!r}. Download the checkpoint again."
                )
            zero_point = f"{weight}_zero_point" if f"{weight}_zero_point" in entries else None
            form = "mxfp4" if entry.dtype == "U8" else "packed"
            found[weight] = Stored(form, name, f"{weight}_scale", zero_point)
        elif scale := scale_of(name, entry.dtype, entries):
            found[name] = Stored("int8" if entry.dtype == "I8" else "fp8", name, scale)
    return found


def scale_of(name: str, dtype: str, entries: Mapping[str, TensorEntry]) -> str | None:
    """The tensor that scales the 8-bit codes `name`; None when these are none.

    DeepSeek's own files say `X.scale` for `X.weight`; there I8 is FP4 in pairs, which its family unpacks.
    """
    if dtype not in ("F8_E4M3", "U8", "I8"):
        return None
    candidates = [f"{name}_scale_inv", f"{name}_scale"]
    if dtype == "F8_E4M3" and name.endswith(".weight"):
        candidates.append(f"{name.removesuffix('weight')}scale")
    return next((candidate for candidate in candidates if candidate in entries), None)


def float_formats(entries: Mapping[str, TensorEntry], stored: Iterable[Stored]) -> dict[str, str]:
    """The format of every tensor's values by name, where bytes (U8) are said to be E4M3 or E8M0."""
    formats = {name: entry.dtype for name, entry in entries.items()}
    for weight in stored:
        if weight.format == "fp8":
            formats[weight.codes] = "F8_E4M3"
        if formats[weight.scale] == "U8":
            formats[weight.scale] = "F8_E8M0"
    for name in entries:
        if name.endswith("_scales") and f"{name.removesuffix('scales')}blocks" in entries:
            formats[name] = "F8_E8M0"
    return formats


def widen(folder: Path, weights: Weights, stored: Mapping[str, Stored], config: Config) -> Weights:
    """`weights` with one lazy float tensor in place of each weight's narrow ones.

    Raises CheckpointError when scales do not fit their codes.
    """
    by_codes = {weight.codes: (name, weight) for name, weight in stored.items()}
    consumed = {part for weight in stored.values() for part in weight.tensors}
    ignored = IGNORED if quantization_settings(config) else ()
    block = block_size(config)
    wide: Weights = {}
    for name, array in weights.items():
        if name in by_codes:
            target, weight = by_codes[name]
            wide[target] = _widen_one(folder, weights, weight, block)
        elif name not in consumed and not name.endswith(ignored):
            wide[name] = array
    return wide


def widen_sanitized(folder: Path, weights: Weights, parameters: Weights) -> Weights:
    """What `sanitize` left in MLX's MXFP4 or MXFP8 layout as bfloat16, which holds these values exactly.

    Raises CheckpointError for another layout with 8-bit scales.
    """
    packed = {
        name.removesuffix("scales") + "weight"
        for name, array in weights.items()
        if name.endswith(".scales") and array.dtype == mx.uint8
    }
    scales = {name.removesuffix("weight") + "scales" for name in packed}
    return {
        name: _dequantize(folder, name, weights, parameters) if name in packed else array
        for name, array in weights.items()
        if name not in scales
    }


def quantization_settings(config: Config) -> Config:
    """config.json's `quantization_config`, which multimodal checkpoints may nest; empty when there is none."""
    found = config.get("quantization_config") or text_config(config).get("quantization_config")
    return found if isinstance(found, dict) else {}


def packed_bits(settings: Config) -> Any:
    """How wide compressed-tensors says its packed integers are; 4 unless a group of modules has others."""
    groups = settings.get("config_groups")
    groups = groups.values() if isinstance(groups, dict) else ()
    parts = (group.get("weights") for group in groups if isinstance(group, dict))
    found = [part.get("num_bits", 4) for part in parts if isinstance(part, dict)]
    return next((bits for bits in found if bits != 4), 4)


def block_size(config: Config) -> Block:
    """Rows and columns of FP8 codes that share a scale: `weight_block_size`, else 128 x 128."""
    given = quantization_settings(config).get("weight_block_size")
    if isinstance(given, list) and len(given) == 2 and all(type(size) is int and size > 0 for size in given):
        return given[0], given[1]
    return DEFAULT_BLOCK


def e8m0(codes: mx.array) -> mx.array:
    """The powers of two, 2^(code - 127) as float32, of E8M0 codes; 255 is NaN there and infinity here."""
    bits = mx.where(codes == 0, mx.array(1 << 22, mx.uint32), codes.astype(mx.uint32) << 23)
    return bits.view(mx.float32)


def _widen_one(folder: Path, weights: Weights, weight: Stored, block: Block) -> mx.array:
    codes, scale = weights[weight.codes], weights[weight.scale]
    dtype = mx.float16 if scale.dtype == mx.float16 else mx.bfloat16
    try:
        if weight.format == "mxfp4":
            return mx.dequantize(
                codes.view(mx.uint32), scale, group_size=32, bits=4, mode="mxfp4", dtype=mx.bfloat16
            )
        scale = e8m0(scale) if scale.dtype == mx.uint8 else scale.astype(mx.float32)
        if weight.format == "packed":
            zero_point = weights[weight.zero_point] if weight.zero_point else None
            return _unpack(codes, scale, zero_point).astype(dtype)
        return _scale_blocks(codes, scale, block).astype(dtype)
    except ValueError as error:
        raise CheckpointError(
            f"{folder}: tensor {weight.scale!r} has shape {list(weights[weight.scale].shape)}, which does not fit "
            f"the {list(codes.shape)} of {weight.codes!r}. Download the checkpoint again."
        ) from error


def _unpack(codes: mx.array, scale: mx.array, zero_point: mx.array | None) -> mx.array:
    """float32 [rows, columns] of 4-bit codes in 32-bit words [rows, columns / 8], low bits first.

    `scale` is [rows, groups]; zero points are packed along the rows, and are 8 where there are none.
    """
    values = _nibbles(codes).reshape(*codes.shape[:-1], codes.shape[-1] * 8)
    *rows, columns = values.shape
    if scale.ndim != codes.ndim or columns % scale.shape[-1]:
        raise ValueError(scale.shape)
    zero: mx.array | int = 8
    if zero_point is not None:
        nibbles = _nibbles(zero_point).swapaxes(-1, -2)  # [rows / 8, 8, groups]
        zero = nibbles.reshape(-1, zero_point.shape[-1])[: rows[-1], :, None]
    grouped = values.reshape(*rows, scale.shape[-1], -1)
    return ((grouped - zero) * scale[..., None]).reshape(values.shape)


def _nibbles(words: mx.array) -> mx.array:
    """float32 [..., 8]: the 4-bit parts of each 32-bit word, low first."""
    shifts = mx.arange(0, 32, 4, dtype=mx.uint32)
    return ((words.view(mx.uint32)[..., None] >> shifts) & 15).astype(mx.float32)


def _scale_blocks(codes: mx.array, scale: mx.array, block: Block) -> mx.array:
    """float32 of 8-bit codes [..., rows, columns] times the scale of their tensor, row, expert or block."""
    if scale.size == 1:
        return _decode(codes) * scale.reshape(())
    if scale.ndim == 1 and scale.size == codes.shape[0]:
        return _decode(codes) * scale.reshape(-1, *(1,) * (codes.ndim - 1))
    if scale.ndim != codes.ndim:
        raise ValueError(scale.shape)
    if all(found in (1, wanted) for found, wanted in zip(scale.shape, codes.shape, strict=True)):
        return _decode(codes) * scale
    *outer, rows, columns = codes.shape
    height, width = _fitting_block((rows, columns), (scale.shape[-2], scale.shape[-1]), block)
    below, beside = -rows % height, -columns % width
    if below or beside:
        codes = mx.pad(codes, [(0, 0)] * len(outer) + [(0, below), (0, beside)])
    tiles = codes.reshape(*outer, scale.shape[-2], height, scale.shape[-1], width)
    wide = _decode(tiles) * scale[..., :, None, :, None]
    return wide.reshape(*outer, rows + below, columns + beside)[..., :rows, :columns]


def _fitting_block(shape: Block, scale_shape: Block, block: Block) -> Block:
    """The size of the blocks, of which `scale_shape` cover `shape`: as given, or else such as divide it."""
    for height, width in (block, DEFAULT_BLOCK):
        if (-(-shape[0] // height), -(-shape[1] // width)) == scale_shape:
            return height, width
    if shape[0] % scale_shape[0] or shape[1] % scale_shape[1]:
        raise ValueError(scale_shape)
    return shape[0] // scale_shape[0], shape[1] // scale_shape[1]


def _decode(codes: mx.array) -> mx.array:
    return codes.astype(mx.float32) if codes.dtype == mx.int8 else mx.from_fp8(codes, mx.float32)


def _dequantize(folder: Path, name: str, weights: Weights, parameters: Weights) -> mx.array:
    codes, scales = weights[name], weights[name.removesuffix("weight") + "scales"]
    columns = parameters[name].shape[-1] if name in parameters else 0
    layout = (codes.shape[-1] * 32 // max(columns, 1), columns // max(scales.shape[-1], 1))
    if codes.dtype != mx.uint32 or layout not in PACKED_MODES:
        raise CheckpointError(
            f"{folder}: tensor {name!r} has {layout[0]} bits in groups of {layout[1]}, wanted MXFP4 or MXFP8 "
            "(4 or 8 bits in groups of 32). Give the full-precision checkpoint instead."
        )
    return mx.dequantize(
        codes, scales, group_size=32, bits=layout[0], mode=PACKED_MODES[layout], dtype=mx.bfloat16
    )


def _too_late(where: str, found: str | None) -> str:
    return (
        f"{where}: quantized already ({found}), and rounding again loses more. "
        "Give the full-precision checkpoint (bf16, f16 or f32) instead."
    )
