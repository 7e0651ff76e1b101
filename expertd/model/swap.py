"""mlx-lm by the CPU kernels (expertd/model/kernels.py): modules for good, functions while a model builds its graph."""

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.mla import MultiLinear, QuantizedMultiLinear
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwiGLU, SwitchGLU, SwitchLinear, SwitchMLP

from expertd.model.classes import become, stock_class
from expertd.model.kernels import Kernels, Projection
from expertd.model.kv_bits import widening

BITS = (2, 4, 8)
GATE_UP_DOWN = ("gate_proj", "up_proj", "down_proj")
FLOATS = (mx.float32, mx.float16, mx.bfloat16)


def use_native_kernels(model: nn.Module, kernels: Kernels) -> None:
    """Make every module of an mlx-lm model whose weights the kernels can read compute by them."""
    for _, module in model.named_modules():
        mixin = _SWAPS.get(type(module))
        if mixin and _is_readable(module):
            for name in ("weight", "scales", "biases"):
                if name in module:
                    module[name] = mx.contiguous(module[name])
            become(module, mixin)
            module._kernels = kernels
        elif type(module) in _SWITCHES:
            if is_one_operation(module):
                module._kernels = kernels
            become(module, _SWITCHES[type(module)])


def _is_readable(module: Any) -> bool:
    if "scales" not in module:
        return module["weight"].dtype in FLOATS
    return module.mode == "affine" and module.bits in BITS and module["scales"].dtype in FLOATS


def is_one_operation(switch: Any) -> bool:
    """Can the experts of a switch be computed by one operation of the graph? Affine weights of one number format, no
    biases, and the activation of most families."""
    if stock_class(switch) is not SwitchGLU or type(switch.activation) is not SwiGLU:
        return False
    parts = [switch[name] for name in GATE_UP_DOWN]
    return all(
        stock_class(p) is QuantizedSwitchLinear and _is_readable(p) and "bias" not in p for p in parts
    ) and all(p["scales"].dtype == parts[0]["scales"].dtype for p in parts)


def _product(module: Any, x: mx.array, ids: mx.array | None = None) -> mx.array:
    kernels: Kernels = module._kernels
    if "scales" in module:
        return kernels.affine_product(
            x, module["weight"], module["scales"], module["biases"], module.group_size, module.bits, ids
        )
    return kernels.plain_product(x, module["weight"], ids)


class _NativeLinear:
    def __call__(self, x: mx.array) -> mx.array:
        m: Any = self
        y = _product(m, x)
        return y + m["bias"] if "bias" in m else y


class _NativeEmbedding:
    """An embedding that is the head as well."""

    def as_linear(self, x: mx.array) -> mx.array:
        return _product(self, x)


class _NativeExperts:
    """One weight per expert. The rows may come in any order."""

    def __call__(self, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:
        m: Any = self
        y = _product(m, x, indices)
        return y + mx.expand_dims(m["bias"][indices], -2) if "bias" in m else y


class _NativeHeads:
    """One weight per head: x [batch, num_heads or 1, num_tokens, width]."""

    def __call__(self, x: mx.array, transpose: bool = True) -> mx.array:
        m: Any = self
        heads = mx.arange(m["weight"].shape[0], dtype=mx.uint32)
        if transpose:
            product = functools.partial(_product, m)
        else:
            product = functools.partial(m._kernels.plain_product, weight=_other_side(m))
        if x.ndim != 4 or x.shape[1] != 1:
            return product(x, ids=heads)
        # One x for all heads: a row is rounded once, not for each of them.
        rows = mx.expand_dims(x.swapaxes(1, 2), -2)
        return product(rows, ids=heads).squeeze(-2).swapaxes(1, 2)


def _other_side(module: Any) -> mx.array:
    """The weights [num_heads, in, out] for products from the other side; kept, unpacked, from the first call on."""
    if "_other" not in module:
        weight = module["weight"]
        if "scales" in module:
            weight = mx.dequantize(
                weight, module["scales"], module["biases"], group_size=module.group_size, bits=module.bits
            )
        module._other = mx.contiguous(weight.swapaxes(-1, -2))
        mx.eval(module._other)
    return module["_other"]  # type: ignore[no-any-return]


class _NativeGLU:
    """mlx-lm sorts the rows of many tokens by expert, which copies them top-k times; the kernels do without."""

    def __call__(self, x: mx.array, indices: mx.array) -> mx.array:
        m: Any = self
        if hasattr(m, "_kernels"):
            return experts_of(m, x, indices)
        x = mx.expand_dims(x, (-2, -3))
        y: mx.array = m.activation(m.up_proj(x, indices), m.gate_proj(x, indices))
        return m.down_proj(y, indices).squeeze(-2)  # type: ignore[no-any-return]


def experts_of(switch: Any, x: mx.array, ids: mx.array) -> mx.array:
    """A switch whose experts are one operation: x [..., width] and ids [...] as Kernels.experts takes them."""
    kernels: Kernels = switch._kernels
    gate, up, down = (_projection(switch[name]) for name in GATE_UP_DOWN)
    return kernels.experts(x, ids, up, gate, down, "silu")


def _projection(module: Any) -> Projection:
    return module["weight"], module["scales"], module["biases"], module.group_size, module.bits


class _NativeMLP:
    def __call__(self, x: mx.array, indices: mx.array) -> mx.array:
        m: Any = self
        y: mx.array = m.activation(m.fc1(mx.expand_dims(x, (-2, -3)), indices))
        return m.fc2(y, indices).squeeze(-2)  # type: ignore[no-any-return]


_SWAPS: dict[type, type] = {
    nn.Linear: _NativeLinear,
    nn.QuantizedLinear: _NativeLinear,
    nn.Embedding: _NativeEmbedding,
    nn.QuantizedEmbedding: _NativeEmbedding,
    SwitchLinear: _NativeExperts,
    QuantizedSwitchLinear: _NativeExperts,
    MultiLinear: _NativeHeads,
    QuantizedMultiLinear: _NativeHeads,
}
_SWITCHES: dict[type, type] = {SwitchGLU: _NativeGLU, SwitchMLP: _NativeMLP}


# Functions.

Function = Callable[..., mx.array]


def native_functions(kernels: Kernels) -> list[tuple[Any, str, Function]]:
    """What `replaced` needs to send mx.fast and the activations of the loaded families to the kernels."""
    found: list[tuple[Any, str, Function]] = [
        (mx.fast, "rms_norm", kernels.rms_norm),
        (mx.fast, "rope", kernels.rope),
        (mx.fast, "scaled_dot_product_attention", kernels.attention),
        widening(kernels.attention),
    ]
    replacements = _activations(kernels)
    for module in [m for name, m in sys.modules.items() if name.startswith("mlx_lm.models.")]:
        found += [(module, name, f) for name, f in replacements.items() if hasattr(module, name)]
    return found


def _activations(kernels: Kernels) -> dict[str, Function]:
    """By the names under which mlx-lm's families know them, with its arguments."""

    def swiglu(gate: mx.array, x: mx.array) -> mx.array:
        return kernels.glu(gate, x, "silu")

    def precise_swiglu(h: mx.array, gate: mx.array, x: mx.array) -> mx.array:
        return kernels.glu(gate, x, "silu").astype(h.dtype)

    def swiglu_oai(gate: mx.array, x: mx.array, alpha: float = 1.702, limit: float = 7.0) -> mx.array:
        return kernels.glu(gate, x, "swiglu_oai", alpha, limit)

    def clamped_swiglu(x: mx.array, gate: mx.array, limit: float) -> mx.array:
        return kernels.glu(gate, x, "clipped_silu", 0.0, limit)

    def geglu(gate: mx.array, x: mx.array) -> mx.array:
        return kernels.glu(gate, x, "gelu_tanh")

    return {f.__name__: f for f in (swiglu, precise_swiglu, swiglu_oai, clamped_swiglu, geglu)}


@contextmanager
def replaced(functions: list[tuple[Any, str, Function]]) -> Iterator[None]:
    """Have these functions in the place of stock ones meanwhile."""
    stock = [(owner, name, getattr(owner, name)) for owner, name, _ in functions]
    for owner, name, function in functions:
        setattr(owner, name, function)
    try:
        yield
    finally:
        for owner, name, function in stock:
            setattr(owner, name, function)
