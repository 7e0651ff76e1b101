"""A model in float32 that can be run and trained on any machine: its experts at full precision or from codes.

Theory of operation. On a CPU, MLX's pieces are slow where training needs them: its Linux wheels bring the reference
BLAS (2 GFLOP/s on one core of a 2.5 GHz Xeon, where NumPy's OpenBLAS makes 85), gather_mm makes one row at a time,
dequantize takes 30 ns a weight, and no kernel gives gradients of an expert's scales. So every linear module
of mlx-lm's model is given one of three products, each a node of MLX's graph with a gradient of its own:

    linear modules, and an embedding used as the head    rows times one constant matrix
    experts at full precision (the teacher's)            rows sorted by expert, one product per expert
    experts as codes (the student's)                     the same; one expert at a time becomes float32, in the
                                                         backward pass again, so that never all of them are held

Inside a product the arrays are NumPy's on a CPU and MLX's on a GPU; the code is the same for both. On a CPU plain
attention is NumPy's too (`attention_for_training`). The rest of the model (norms, positions, routers' choice,
activations) is MLX's own, so any family of mlx-lm will do.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.nn.layers.base import Module
from mlx.utils import tree_flatten, tree_unflatten

from expertd.errors import CheckpointError
from expertd.model.classes import Weights, build_model, is_switch

Array = Any  # NumPy's on a CPU, MLX's on a GPU


def library() -> Any:
    """The module whose arrays the products work on."""
    return np if mx.default_device() == mx.cpu else mx


def inner(array: mx.array) -> Array:
    """`array` for the inside of a product; float32 and integers only. Computes it on a CPU."""
    return np.asarray(array) if library() is np else array


def outer(array: Array) -> mx.array:
    return mx.array(array) if library() is np else array


def node(forward: Callable[..., mx.array], backward: Callable[..., Any], *inputs: mx.array) -> mx.array:
    """`forward(*inputs)` in MLX's graph; `backward(*inputs, d_y)` gives the gradients of the inputs."""
    function: Any = mx.custom_function(forward)
    function.vjp(lambda given, d_y, _: backward(*(given if isinstance(given, tuple) else (given,)), d_y))
    y: mx.array = function(*inputs)
    return y


def rows_times(x: mx.array, weight: Array) -> mx.array:
    """x [..., in] times the constant `weight` [out, in], transposed."""

    def forward(x: mx.array) -> mx.array:
        return outer((inner(x).reshape(-1, x.shape[-1]) @ weight.T).reshape(*x.shape[:-1], -1))

    def backward(x: mx.array, d_y: mx.array) -> mx.array:
        return outer((inner(d_y).reshape(-1, d_y.shape[-1]) @ weight).reshape(x.shape))

    return node(forward, backward, x)


class FixedLinear(Module):
    """Stands in for an nn.Linear."""

    def __init__(self, weight: mx.array) -> None:
        super().__init__()
        self.weight = weight

    def __call__(self, x: mx.array) -> mx.array:
        y = rows_times(x, inner(self.weight))
        return y + self.bias if "bias" in self else y


class FixedEmbedding(nn.Embedding):
    """Stands in for an nn.Embedding, which may be the head as well."""

    def __init__(self, weight: mx.array) -> None:
        Module.__init__(self)
        self.weight = weight

    def as_linear(self, x: mx.array) -> mx.array:
        return rows_times(x, inner(self.weight))


class Experts(Module):
    """Stands in for a SwitchLinear: rows [..., 1, in] and expert ids [...] to rows [..., 1, out]."""

    num_experts: int

    def __call__(self, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:
        rows = mx.broadcast_to(x, (*indices.shape, *x.shape[-2:])).reshape(-1, x.shape[-1])
        ids = indices.flatten()
        if not sorted_indices:
            order = mx.argsort(ids)
            rows, ids = rows[order], ids[order]
        y = self.multiply(rows, spans(ids, self.num_experts))
        if "bias" in self:
            y = y + self.bias[ids]
        if not sorted_indices:
            y = y[mx.argsort(order)]
        return y.reshape(*indices.shape, 1, -1)

    def multiply(self, rows: mx.array, owns: list[slice]) -> mx.array:
        """Rows [n, in], of which expert e owns `owns[e]`, times each one's matrix: [n, out]."""
        raise NotImplementedError


class PlainExperts(Experts):
    """Experts at full precision, [num_experts, out, in]; no gradient."""

    def __init__(self, weight: mx.array) -> None:
        super().__init__()
        self.num_experts = weight.shape[0]
        self.weight = weight

    def multiply(self, rows: mx.array, owns: list[slice]) -> mx.array:
        x, weight = inner(rows), inner(self.weight)
        return outer(library().concatenate([x[own] @ weight[e].T for e, own in enumerate(owns)]))


class CodedExperts(Experts):
    """Experts as codes; `scales` and `biases`, float32 [num_experts, out, in / group], take gradients."""

    def __init__(self, weight: mx.array, scales: mx.array, biases: mx.array, num_inputs: int) -> None:
        super().__init__()
        self.num_experts = weight.shape[0]
        self.scales, self.biases = scales, biases
        bits, group_size = weight.shape[-1] * 32 // num_inputs, num_inputs // scales.shape[-1]
        self._codes = [unpack(weight[e], scales.shape[1:], group_size, bits) for e in range(self.num_experts)]

    def multiply(self, rows: mx.array, owns: list[slice]) -> mx.array:
        return node(
            lambda *inputs: outer(self._products(owns, *map(inner, inputs))),
            lambda *inputs: tuple(map(outer, self._gradients(owns, *map(inner, inputs)))),
            rows, self.scales, self.biases,
        )  # fmt: skip

    def codes(self, e: int) -> Array:
        """Expert `e`'s codes, float32 [out, in / group, group]."""
        return self._codes[e].astype(library().float32)

    def _products(self, owns: list[slice], x: Array, scales: Array, biases: Array) -> Array:
        return library().concatenate(
            [x[own] @ dequantized(self.codes(e), scales[e], biases[e]).T for e, own in enumerate(owns)]
        )

    def _gradients(
        self, owns: list[slice], x: Array, scales: Array, biases: Array, d_y: Array
    ) -> tuple[Array, Array, Array]:
        d_x, d_scales, d_biases = [], [], []
        for e, own in enumerate(owns):
            codes = self.codes(e)
            d_x.append(d_y[own] @ dequantized(codes, scales[e], biases[e]))
            d_weight = (d_y[own].T @ x[own]).reshape(codes.shape)
            d_scales.append((d_weight * codes).sum(-1))
            d_biases.append(d_weight.sum(-1))
        xp = library()
        return xp.concatenate(d_x), xp.stack(d_scales), xp.stack(d_biases)

    def mean_codes(self) -> mx.array:
        """The mean code of every group, float32 [num_experts, out, in / group]."""
        return outer(library().stack([self.codes(e).mean(-1) for e in range(self.num_experts)]))


def dequantized(codes: Array, scales: Array, biases: Array) -> Array:
    """The matrix [out, in] of codes [out, in / group, group], scales and biases [out, in / group]."""
    return (codes * scales[..., None] + biases[..., None]).reshape(codes.shape[0], -1)


def unpack(weight: mx.array, shape: tuple[int, ...], group_size: int, bits: int) -> Array:
    """The codes of packed `weight` [out, in * bits / 32], whose scales have `shape`: uint8 [*shape, group]."""
    values = mx.dequantize(weight, mx.ones(shape), mx.zeros(shape), group_size, bits)
    codes = values.astype(mx.uint8).reshape(*shape, group_size)
    mx.eval(codes)
    return inner(codes)


def spans(ids: mx.array, num_experts: int) -> list[slice]:
    """Where each expert's rows lie among those of `ids` [n], which are sorted. Computes `ids`."""
    ends = np.searchsorted(np.asarray(ids), np.arange(num_experts), side="right").tolist()
    return [slice(start, end) for start, end in zip([0, *ends], ends, strict=False)]


KINDS = {nn.Linear: FixedLinear, nn.Embedding: FixedEmbedding}


def build(config: dict[str, Any], weights: Weights) -> Module:
    """The model of a normalised config in float32, with `weights` by name, quantized (MLX's affine) or not.

    `weights` is emptied, so that each source array goes when its float32 copy is there. Raises CheckpointError
    when one is missing.
    """
    model = build_model(config)
    names = [name for name, _ in cast(list[tuple[str, mx.array]], tree_flatten(model.parameters()))]
    for name in names:
        if name not in weights:
            raise CheckpointError(f"tensor {name!r} of the model is missing. Convert the checkpoint again.")
    modules: list[tuple[str, Any]] = model.named_modules()
    for path, module in modules:
        if f"{path}.weight" in weights:
            replace(model, path, module, weights)
    model.load_weights([(name, wide(weights.pop(name))) for name in list(weights)], strict=False)
    model.train()  # some families have kernels without gradients for inference
    return model


def replace(model: Module, path: str, module: Module, weights: Weights) -> None:
    """Put the weight of one module, and what belongs to it, into the model."""
    weight, num_inputs = weights.pop(f"{path}.weight"), module.weight.shape[-1]
    if f"{path}.scales" in weights:
        scales, biases = wide(weights.pop(f"{path}.scales")), wide(weights.pop(f"{path}.biases"))
        if is_switch(module):
            put(model, path, module, CodedExperts(weight, scales, biases, num_inputs), weights)
            return
        bits, group_size = weight.shape[-1] * 32 // num_inputs, num_inputs // scales.shape[-1]
        weight = mx.dequantize(weight, scales, biases, group_size, bits)
    if is_switch(module):
        put(model, path, module, PlainExperts(wide(weight)), weights)
    elif type(module) in KINDS:
        put(model, path, module, KINDS[type(module)](wide(weight)), weights)
    else:
        module.weight = wide(weight)


def put(model: Module, path: str, module: Module, new: Module, weights: Weights) -> None:
    """Let `new` stand in for the `module` at `path`."""
    if "bias" in module:
        new.bias = wide(weights.pop(f"{path}.bias"))
    model.update_modules(tree_unflatten([(path, new)]))


def wide(array: mx.array) -> mx.array:
    """In float32 and computed; integers as they are."""
    result = array.astype(mx.float32) if mx.issubdtype(array.dtype, mx.floating) else array
    mx.eval(result)
    return result


@contextmanager
def attention_for_training() -> Iterator[None]:
    """On a CPU, attention with no mask or the causal one is NumPy's inside this block.

    mlx-lm's families all call MLX's function, and most of them through names of their own: so it is
    replaced where they look it up, for this process and as long as the block lasts. Half of a step's time was there.
    """
    own = mx.fast.scaled_dot_product_attention
    if library() is np:
        mx.fast.scaled_dot_product_attention = lambda *args, **kwargs: _attention(own, *args, **kwargs)
    try:
        yield
    finally:
        mx.fast.scaled_dot_product_attention = own


def _attention(own: Any, q: mx.array, k: mx.array, v: mx.array, **kwargs: Any) -> mx.array:
    """As mx.fast.scaled_dot_product_attention, here `own`, which does what is out of the ordinary."""
    scale, mask, sinks = kwargs["scale"], kwargs.get("mask"), kwargs.get("sinks")
    if sinks is not None or not (mask is None or isinstance(mask, str)) or q.dtype != mx.float32:
        y: mx.array = own(q, k, v, **kwargs)
        return y
    return node(
        lambda *inputs: outer(_attend(scale, mask, *map(inner, inputs))),
        lambda *inputs: tuple(map(outer, _attend_back(scale, mask, *map(inner, inputs)))),
        q, k, v,
    )  # fmt: skip


def _shares(q: Array, k: Array, scale: float, mask: str | None) -> tuple[Array, Array]:
    """Queries by key head [batch, key heads, queries per key, tokens, dims], and what each attends to."""
    grouped = q.reshape(q.shape[0], k.shape[1], -1, *q.shape[2:])
    scores = (grouped * np.float32(scale)) @ k[:, :, None].swapaxes(-1, -2)
    if mask:
        later = np.triu(np.ones(scores.shape[-2:], bool), 1 + scores.shape[-1] - scores.shape[-2])
        scores = np.where(later, np.float32(-math.inf), scores)
    scores = np.exp(scores - scores.max(-1, keepdims=True))
    return grouped, scores / scores.sum(-1, keepdims=True)


def _attend(scale: float, mask: str | None, q: Array, k: Array, v: Array) -> Array:
    _, shares = _shares(q, k, scale, mask)
    return (shares @ v[:, :, None]).reshape(*q.shape[:-1], v.shape[-1])


def _attend_back(
    scale: float, mask: str | None, q: Array, k: Array, v: Array, d_y: Array
) -> tuple[Array, Array, Array]:
    grouped, shares = _shares(q, k, scale, mask)
    d_y = d_y.reshape(*grouped.shape[:-1], v.shape[-1])
    d_v = (shares.swapaxes(-1, -2) @ d_y).sum(2)
    d_shares = d_y @ v[:, :, None].swapaxes(-1, -2)
    d_scores = shares * (d_shares - (d_shares * shares).sum(-1, keepdims=True)) * np.float32(scale)
    d_q = (d_scores @ k[:, :, None]).reshape(q.shape)
    return d_q, (d_scores.swapaxes(-1, -2) @ grouped).sum(2), d_v
