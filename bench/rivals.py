"""What others make of the demo model's experts, as checkpoints: the rivals in bench/quality.py.

Only the routed experts differ between rows: the trunk keeps its 16 bits. Formats that MLX cannot hold (llama.cpp's)
are written as what they decode to, in float32, and so are the others, so that every row is evaluated by the same
kernels; a row's bits per weight are those of its own format.
"""

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from expertd.bench.ggml import Ggml
from expertd.checkpoint.config import write_config
from expertd.checkpoint.inspect import CheckpointInfo, check_checkpoint
from expertd.checkpoint.source import open_source
from expertd.model.adapter import fast_attention, load
from expertd.model.classes import build_model, is_switch
from expertd.model.tiles import multiply_experts
from expertd.quant.convert import quantize_checkpoint
from expertd.quant.output import copy_texts
from expertd.quant.settings import Settings
from expertd.quant.weights import arrange
from expertd.quant.weights import load as load_tensors

Array = np.ndarray[Any, np.dtype[Any]]
Rounded = Callable[[str, mx.array], mx.array]  # parameter name, [num_experts, out, in] -> the same, rounded
GPTQ_BATCH = 8  # windows per forward pass, as `mlx_lm.gptq` has it


class Original:
    """The full-precision checkpoint: its weights by the model's names, and which of them are experts."""

    def __init__(self, folder: Path) -> None:
        self.info: CheckpointInfo = check_checkpoint(folder)
        model = build_model(self.info.config)
        source = open_source(str(folder), folder, None)  # a folder needs no cache
        self.weights = arrange(model, folder, load_tensors(source))
        self.experts = [f"{path}.weight" for path, module in model.named_modules() if is_switch(module)]
        self.num_expert_weights = sum(self.weights[name].size for name in self.experts)

    def write(self, folder: Path, rounded: Rounded) -> None:
        """A checkpoint in the new folder with every expert tensor replaced by what `rounded` gives, in float32."""
        folder.mkdir()
        arrays = dict(self.weights)
        for name in self.experts:
            arrays[name] = rounded(name, arrays[name]).astype(mx.float32)
        mx.save_safetensors(str(folder / "model.safetensors"), arrays, {"format": "mlx"})
        write_config(folder, self.info.config)
        copy_texts(self.info.folder, folder)


def plain(original: Original, folder: Path, bits: int, group_size: int) -> None:
    """What `mlx_lm.convert -q` does: mx.quantize."""

    def rounded(_: str, weight: mx.array) -> mx.array:
        packed, scales, biases = mx.quantize(weight, group_size, bits)
        return _decoded(packed, scales, biases, bits, group_size)

    original.write(folder, rounded)


def ours(original: Original, folder: Path, settings: Settings) -> None:
    """What `expertd quantize` makes of the experts. The embedding keeps 16 bits like the rest of the trunk, though the
    experts were made beside one of 8."""
    made = folder.with_name("ours")
    quantize_checkpoint(original.info.folder, made, settings)
    found: dict[str, Any] = {}
    for shard in sorted(made.glob("model*.safetensors")):
        found.update(mx.load(str(shard)))  # type: ignore[arg-type]

    def rounded(name: str, _: mx.array) -> mx.array:
        path = name.removesuffix(".weight")
        parts = found[name], found[f"{path}.scales"], found[f"{path}.biases"]
        return _decoded(*parts, settings.experts_bits, settings.group_size)

    original.write(folder, rounded)


def gptq(original: Original, folder: Path, bits: int, group_size: int, windows: Array) -> None:
    """mlx_lm.gptq by its own code, with our calibration windows [num_windows, num_tokens], experts alone.

    It quantizes what is exactly an nn.Linear or a SwitchLinear, and whatever else has `to_quantized` by plain
    rounding; so the trunk's modules get classes of their own that have none. It computes in float32 here, in its
    favour, with products and attention by NumPy, which is all that is not its own code; scales and biases are
    rounded to the source's dtype, as its own main() has them.
    """
    model = load(original.info.folder, original.info.config, wide=True)
    for _, module in model.named_modules():
        if is_switch(module):
            module.__class__ = _stock("mlx_lm.models.switch_layers").SwitchLinear
        elif hasattr(module, "to_quantized"):
            module.__class__ = type(f"Kept{type(module).__name__}", (_Kept, type(module)), {})
    with _fast_products(), fast_attention():
        quantize = _stock("mlx_lm.quant.gptq").gptq_quantize
        model, _ = quantize(model, mx.array(windows), bits, group_size, 8, group_size, GPTQ_BATCH)
    found = dict(tree_flatten(model.parameters()))

    def rounded(name: str, weight: mx.array) -> mx.array:
        path = name.removesuffix(".weight")
        scales, biases = (found[f"{path}.{leaf}"].astype(weight.dtype) for leaf in ("scales", "biases"))
        return _decoded(found[name], scales, biases, bits, group_size)

    original.write(folder, rounded)


def llama_cpp(original: Original, folder: Path, ggml: Ggml, types: dict[str, str], windows: Array) -> None:
    """llama.cpp's formats by its own code; `types` gives that of `gate_proj`, `up_proj` and `down_proj`.

    The importance matrix is sum(x^2) per expert and input column over the calibration windows, for gate and up of
    the normed input of the block, for down of the activation after route weighting (as ds4 collects it).
    """
    importance = collect_importance(original, windows)

    def rounded(name: str, weight: mx.array) -> mx.array:
        kind = name.split(".")[-2]
        source, seen = np.array(weight.astype(mx.float32)), importance[name]
        experts = [ggml.round(types[kind], w, x) for w, x in zip(source, seen, strict=True)]
        return mx.array(np.stack(experts))

    original.write(folder, rounded)


def collect_importance(original: Original, windows: Array) -> dict[str, Array]:
    """sum(x^2) by expert tensor: float32 [num_experts, in]. For blocks of qwen3_moe's kind, as the demo's."""
    model = load(original.info.folder, original.info.config, wide=True)
    seen: dict[str, mx.array] = {}
    for path, block in model.named_modules():
        if "switch_mlp" in block and "gate" in block:
            block.__class__ = type("Watched", (_Watched, type(block)), {})
            block.path, block.note = f"{path}.switch_mlp", _Adder(seen)
    for start in range(0, len(windows), GPTQ_BATCH):
        with fast_attention():
            mx.eval(model(mx.array(windows[start : start + GPTQ_BATCH])), seen)
    return {name: np.array(total) for name, total in seen.items()}


class _Adder:
    """Adds squares [num_rows, in] to the row of each one's expert."""

    def __init__(self, totals: dict[str, mx.array]) -> None:
        self._totals = totals

    def __call__(self, name: str, rows: mx.array, ids: mx.array, num_experts: int) -> None:
        one_hot = (mx.arange(num_experts)[:, None] == ids).astype(mx.float32)
        squares = one_hot @ (rows * rows)
        self._totals[name] = self._totals[name] + squares if name in self._totals else squares


class _Watched:
    """A block that works out its experts' inputs beside what it does anyway."""

    path: str
    note: _Adder

    def __call__(self, x: mx.array) -> mx.array:
        block: Any = self
        switch, scores = block.switch_mlp, mx.softmax(block.gate(x), axis=-1, precise=True)
        ids = mx.argpartition(scores, kth=-block.top_k, axis=-1)[..., -block.top_k :]
        weights = mx.take_along_axis(scores, ids, axis=-1)
        if block.norm_topk_prob:
            weights = weights / weights.sum(axis=-1, keepdims=True)
        rows = mx.broadcast_to(x[..., None, :], (*ids.shape, x.shape[-1])).reshape(-1, x.shape[-1])
        flat, num_experts = ids.flatten(), scores.shape[-1]
        up, gate = (switch[p](rows[:, None], flat)[:, 0] for p in ("up_proj", "gate_proj"))
        inner = switch.activation(up, gate) * weights.reshape(-1, 1)
        for name, seen in (("gate_proj", rows), ("up_proj", rows), ("down_proj", inner)):
            self.note(f"{self.path}.{name}.weight", seen, flat, num_experts)
        return super().__call__(x)  # type: ignore[misc, no-any-return]


class _Kept:
    """Hides a module from mlx_lm.gptq, which asks for `to_quantized`."""

    @property
    def to_quantized(self) -> Any:
        raise AttributeError("to_quantized")


def _stock(name: str) -> Any:
    return importlib.import_module(name)


@contextmanager
def _fast_products() -> Iterator[None]:
    """Stock SwitchLinears and the Hessians of mlx_lm.gptq are multiplied by NumPy meanwhile: MLX's CPU build would take
    an hour for what takes a minute so."""
    switch, catcher = _stock("mlx_lm.models.switch_layers").SwitchLinear, _stock("mlx_lm.quant.gptq").Catcher
    kept = switch.__call__, catcher.__call__

    def multiply(self: Any, x: mx.array, ids: mx.array, sorted_indices: bool = False) -> mx.array:
        rows = mx.broadcast_to(x, (*ids.shape, *x.shape[-2:]))
        flat = np.array(rows.reshape(-1, x.shape[-1])), np.array(self.weight), np.array(ids.flatten())
        return mx.array(multiply_experts(*flat)).reshape(*rows.shape[:-1], -1)

    def catch(self: Any, x: mx.array, *args: Any, **kwargs: Any) -> mx.array:
        rows = np.array(x.reshape(-1, x.shape[-1]))
        self.H = self.H + mx.array(rows.T @ rows)
        y: mx.array = self.module(x, *args, **kwargs)
        return y

    switch.__call__, catcher.__call__ = multiply, catch
    try:
        yield
    finally:
        switch.__call__, catcher.__call__ = kept


def _decoded(packed: mx.array, scales: mx.array, biases: mx.array, bits: int, group_size: int) -> mx.array:
    scales, biases = scales.astype(mx.float32), biases.astype(mx.float32)
    weight: mx.array = mx.dequantize(
        packed, scales, biases, group_size=group_size, bits=bits, dtype=mx.float32
    )
    return weight
