"""The one file that touches mlx-lm's internals: loading its models and dividing their MoE blocks.

Theory of operation. mlx-lm sends every family's routed experts through SwitchGLU or SwitchMLP,
`(x[..., width], ids[..., k]) -> y[..., k, width]`, and the caller applies the routing weights. So two
places are enough for every family, and the model code stays as it is:

    experts  the switch module: the (token, expert) pairs, sorted by expert, are cut at fixed positions;
             each rank computes its pairs, the rows are exchanged and put back in the caller's order.
             (One token's pairs are not sorted: its experts differ.)
             Static shapes: no masks, no host sync, each expert's weights read by one rank (but for the
             one at a cut).
    tokens   the block around it (router, experts, shared expert), a function of each token by itself:
             each rank computes its rows.

Both exchange finished rows, never partial sums, so the caller adds the same numbers in the same order as
one machine does and the logits are bit-identical. An instance is changed by giving it a subclass of its own
class: the module tree, the parameter names and everything that looks at the type stay valid.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.models.mla import MultiLinear, QuantizedMultiLinear
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchGLU, SwitchLinear, SwitchMLP
from mlx_lm.utils import load_model

from expertd.errors import CheckpointError
from expertd.model.classes import become, model_classes, stock_class
from expertd.model.exchange import Link, exchange
from expertd.model.kernels import Kernels
from expertd.model.swap import experts_of, use_native_kernels
from expertd.model.tiles import attend, multiply, multiply_experts
from expertd.split.cut import StepSplit, cut

# SwitchGLU sorts its rows from this many on (mlx-lm 0.32.2), which on a GPU means another kernel; a slice
# must take the kernel that the whole call would take.
SORT_FROM = 64


# What is read between two words of it. A fast disk gives that in 40 ms; a single tensor may be larger.
PIECE_BYTES = 256 << 20

Told = Callable[[int, int], None]


class StepState:
    """What the divided modules read while a step's graph is built: the split, the link, the exchange's number.

    The link is replaced at every epoch; the modules only ever ask for the present one.
    """

    def __init__(self) -> None:
        self.link: Link | None = None
        self.split = StepSplit("solo", (1.0,))
        self.choices: dict[int, mx.array] | None = None  # by layer, while somebody wants to know them
        self._num_exchanges = 0

    def begin(self, split: StepSplit) -> None:
        self.split, self._num_exchanges = split, 0

    def cut(self, count: int) -> tuple[list[int], slice]:
        """Every rank's number of rows, and this rank's slice of `count`."""
        assert self.link is not None
        counts = cut(count, self.split.fractions)
        start = sum(counts[: self.link.rank])
        return counts, slice(start, start + counts[self.link.rank])

    def exchange(self, rows: mx.array, counts: list[int], ids: mx.array | None = None) -> mx.array:
        assert self.link is not None
        self._num_exchanges += 1
        return exchange(self.link, rows, counts, self._num_exchanges, ids)


def _no_rows(like: mx.array, after: mx.array) -> mx.array:
    """An empty [0, width] of `like`'s kind, for a rank without rows; `like` itself is never computed.

    It depends on `after`: nothing else would keep an idle rank from reaching a later layer's exchange first.
    """
    empty: mx.array = mx.depends([mx.zeros((0, like.shape[-1]), dtype=like.dtype)], [after])[0]
    return empty


class _SplitSwitch:
    """`experts`, for a switch module."""

    _step: StepState
    _number: int

    def __call__(self, x: mx.array, ids: mx.array) -> mx.array:
        if self._step.choices is not None:
            self._step.choices[self._number] = ids
        if self._step.split.name != "experts":
            return super().__call__(x, ids)  # type: ignore[misc, no-any-return]
        pairs, rows = ids.flatten(), x.reshape(-1, x.shape[-1])
        counts, own = self._step.cut(pairs.size)
        is_one = len(rows) == 1 and pairs.size < SORT_FROM
        y, back = self._of_token(rows, pairs, own) if is_one else self._of_many(rows, pairs, own)
        if own.stop == own.start:
            y = _no_rows(y, after=x)
        y = self._step.exchange(y, counts, ids=pairs)
        return (y if back is None else y[back]).reshape(*ids.shape, -1)

    def _of_token(self, row: mx.array, pairs: mx.array, own: slice) -> tuple[mx.array, None]:
        """A token's experts differ, so any cut reads each once. Sorting, and back, took 5 % of a layer."""
        return self._experts(row, pairs[own] if own.stop > own.start else pairs[:1], False), None

    def _of_many(self, rows: mx.array, pairs: mx.array, own: slice) -> tuple[mx.array, mx.array]:
        """This rank's rows, and where the rows of all ranks belong."""
        order = mx.argsort(pairs)
        mine = order[own] if own.stop > own.start else order[:1]
        y = self._experts(rows[mine // (pairs.size // len(rows))], pairs[mine], pairs.size >= SORT_FROM)
        return y, mx.argsort(order)

    def _experts(self, x: mx.array, ids: mx.array, is_sorted: bool) -> mx.array:
        """Rows [n, width], or one for all, through expert ids [n]: [n, width]."""
        raise NotImplementedError


class _SplitGLU(_SplitSwitch):
    def _experts(self, x: mx.array, ids: mx.array, is_sorted: bool) -> mx.array:
        m: Any = self
        if hasattr(m, "_kernels"):
            return experts_of(m, x, ids)
        x = x[:, None]
        up = m.up_proj(x, ids, sorted_indices=is_sorted)
        gate = m.gate_proj(x, ids, sorted_indices=is_sorted)
        y: mx.array = m.down_proj(m.activation(up, gate), ids, sorted_indices=is_sorted)
        return y[:, 0]


class _SplitMLP(_SplitSwitch):
    def _experts(self, x: mx.array, ids: mx.array, is_sorted: bool) -> mx.array:
        m: Any = self
        y: mx.array = m.activation(m.fc1(x[:, None], ids, sorted_indices=is_sorted))
        y = m.fc2(y, ids, sorted_indices=is_sorted)
        return y[:, 0]


class _SplitBlock:
    """`tokens`, for the block around a switch module: hidden states in, hidden states out."""

    _step: StepState

    def __call__(self, x: mx.array) -> mx.array:
        if self._step.split.name != "tokens":
            return super().__call__(x)  # type: ignore[misc, no-any-return]
        rows = x.reshape(-1, x.shape[-1])
        counts, own = self._step.cut(rows.shape[0])
        mine = rows[own] if own.stop > own.start else rows[:1]
        y: mx.array = super().__call__(mine[None])[0]  # type: ignore[misc]
        if own.stop == own.start:
            y = _no_rows(y, after=x)
        return self._step.exchange(y, counts).reshape(*x.shape[:-1], -1)


class _Float32Switch:
    """Unquantized experts on the CPU, where MLX's gather_mm takes float32 alone: the caller's dtype returns."""

    def __call__(self, x: mx.array, ids: mx.array, sorted_indices: bool = False) -> mx.array:
        y: mx.array = super().__call__(x.astype(mx.float32), ids, sorted_indices=sorted_indices)  # type: ignore[misc]
        return y.astype(x.dtype)


class _TiledSwitch:
    """Float32 experts on a CPU, for evaluation (expertd/model/tiles.py)."""

    def __call__(self, x: mx.array, ids: mx.array, sorted_indices: bool = False) -> mx.array:
        m: Any = self
        rows = mx.broadcast_to(
            x, (*ids.shape, *x.shape[-2:])
        )  # x has one row per id, or one for all ids of a token
        flat = ids.flatten()
        y = mx.array(multiply_experts(_rows(rows), np.array(m.weight, copy=False), np.array(flat)))
        if "bias" in m:
            y = y + m.bias[flat]
        return y.reshape(*rows.shape[:-1], -1)


class _TiledLinear:
    """A float32 linear layer on a CPU, for evaluation."""

    def __call__(self, x: mx.array) -> mx.array:
        m: Any = self
        y = mx.array(multiply(_rows(x), np.array(m.weight, copy=False))).reshape(*x.shape[:-1], -1)
        return y + m.bias if "bias" in m else y


class _TiledEmbedding:
    """An embedding that is the head as well."""

    def as_linear(self, x: mx.array) -> mx.array:
        m: Any = self
        return mx.array(multiply(_rows(x), np.array(m.weight, copy=False))).reshape(*x.shape[:-1], -1)


@contextmanager
def fast_attention() -> Iterator[None]:
    """Models attend by tiles.py meanwhile, where they would by MLX's CPU kernel, which takes ten times as long."""
    stock = mx.fast.scaled_dot_product_attention

    def attend_fast(q: mx.array, k: mx.array, v: mx.array, **options: Any) -> mx.array:
        mask = options.get("mask")
        if q.dtype != mx.float32 or options.get("sinks") is not None:
            return stock(q, k, v, **options)
        seen = np.array(mask) if isinstance(mask, mx.array) else mask
        queries, keys, values = (np.array(a, copy=False) for a in (q, k, v))
        return mx.array(attend(queries, keys, values, options["scale"], seen))

    if mx.default_device() == mx.cpu:
        mx.fast.scaled_dot_product_attention = attend_fast
    try:
        yield
    finally:
        mx.fast.scaled_dot_product_attention = stock


def _rows(x: mx.array) -> Any:
    return np.array(x.astype(mx.float32).reshape(-1, x.shape[-1]), copy=False)


def _children(module: nn.Module) -> Iterator[nn.Module]:
    """The modules that are direct attributes (or elements of list attributes) of a module."""
    for child in module.children().values():
        if isinstance(child, nn.Module):
            yield child
        elif isinstance(child, list):
            yield from (c for c in child if isinstance(c, nn.Module))


def _takes_hidden_states_alone(block: nn.Module) -> bool:
    """Is the block called as block(x)? Some families pass routing in from outside; these have no `tokens` split."""
    parameters = list(inspect.signature(type(block).__call__).parameters.values())[1:]
    return [p.default for p in parameters].count(inspect.Parameter.empty) == 1


def divide(model: nn.Module, step: StepState) -> list[str]:
    """Make every MoE block of an mlx-lm model follow `step`; give the splits that the family supports."""
    kinds = {SwitchGLU: _SplitGLU, SwitchMLP: _SplitMLP}
    numbers = {id(m): number for number, layer in enumerate(model.layers) for _, m in layer.named_modules()}
    blocks: list[nn.Module] = []
    for _, parent in model.named_modules():
        for child in _children(parent):
            if mixin := kinds.get(stock_class(child)):
                if all(parent is not block for block in blocks):  # modules are dicts: `in` compares arrays
                    blocks.append(parent)
                become(child, mixin)
                child._step, child._number = step, numbers.get(id(child), len(model.layers))
    if not blocks:
        return ["solo"]
    if not all(_takes_hidden_states_alone(block) for block in blocks):
        return ["solo", "experts"]
    for block in blocks:
        become(block, _SplitBlock)
        block._step = step
    return ["solo", "experts", "tokens"]


def load(
    folder: Path,
    config: dict[str, Any],
    wide: bool = False,
    kernels: Kernels | None = None,
    told: Told | None = None,
) -> nn.Module:
    """Load an mlx-lm model from a checked folder, with `config` (normalised) over its config.json.

    Weights are read into memory before this returns, and `told` is given the bytes that are there, of how many; `wide`
    makes all of them float32 (see `_widen`), which `kernels` do not compute.
    Raises CheckpointError when they do not fit the model.
    """
    try:
        model, _ = load_model(
            folder, lazy=True, strict=True, model_config=config, get_model_classes=model_classes
        )
        if wide:
            _widen(model)
        elif kernels:
            use_native_kernels(model, kernels)
        else:
            _use_float32_experts_on_cpu(model)
        _read(model, told)
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError, FileNotFoundError) as e:
        reason = " ".join(str(e).split())[:300]
        raise CheckpointError(
            f"checkpoint {folder}: its weights do not fit a {config.get('model_type')} model of this config: {reason}. "
            "Download it again or convert it with `expertd quantize`."
        ) from e
    return model


def _read(model: nn.Module, told: Told | None) -> None:
    """Evaluate all parameters, in pieces large enough to keep a disk busy."""
    leaves: Any = tree_flatten(model.parameters())
    arrays: list[mx.array] = [array for _, array in leaves]
    total, done, piece, size = sum(a.nbytes for a in arrays), 0, list[mx.array](), 0
    for i, array in enumerate(arrays, 1):
        piece.append(array)
        size += array.nbytes
        if size >= PIECE_BYTES or i == len(arrays):
            mx.eval(piece)
            done, piece, size = done + size, [], 0
            if told:
                told(done, total)


def _use_float32_experts_on_cpu(model: nn.Module) -> None:
    if mx.default_device() != mx.cpu:
        return
    for _, module in model.named_modules():
        if type(module) is SwitchLinear and module.weight.dtype != mx.float32:
            module.weight = module.weight.astype(mx.float32)
            become(module, _Float32Switch)


def _widen(model: nn.Module) -> None:
    """Every weight to float32, quantized ones by their own format; on a CPU, the products go to tiles.py.

    For evaluation: the rounding of bfloat16 activations would be measured along with that of the weights.
    """
    found = [
        (path, _WIDE[type(module)](module)) for path, module in model.named_modules() if type(module) in _WIDE
    ]
    model.update_modules(tree_unflatten(found))
    model.set_dtype(mx.float32)
    for _, module in model.named_modules():
        mx.eval([value for value in module.values() if isinstance(value, mx.array)])  # the narrow form can go
        if mx.default_device() == mx.cpu and type(module) in _TILED:
            become(module, _TILED[type(module)])


_TILED = {SwitchLinear: _TiledSwitch, nn.Linear: _TiledLinear, nn.Embedding: _TiledEmbedding}


def _wide_weight(module: Any) -> mx.array:
    """The float32 weight that a quantized module stands for."""
    affine = module.mode == "affine"
    scales = module.scales.astype(mx.float32) if affine else module.scales
    biases = module.biases.astype(mx.float32) if affine else None
    weight: mx.array = mx.dequantize(
        module.weight,
        scales,
        biases,
        group_size=module.group_size,
        bits=module.bits,
        mode=module.mode,
        dtype=mx.float32,
    )
    return weight


def _wide(make: Callable[..., nn.Module]) -> Callable[[nn.Module], nn.Module]:
    """A function from a quantized module to the plain one, which `make` builds from the weight's shape."""

    def widen(module: nn.Module) -> nn.Module:
        weight = _wide_weight(module)
        wide = make(*weight.shape)
        wide.weight = weight
        if "bias" in module:
            wide.bias = module.bias
        return wide

    return widen


_WIDE = {
    nn.QuantizedLinear: _wide(lambda out, width: nn.Linear(width, out, bias=False)),
    nn.QuantizedEmbedding: _wide(nn.Embedding),
    QuantizedSwitchLinear: _wide(lambda n, out, width: SwitchLinear(width, out, n, bias=False)),
    QuantizedMultiLinear: _wide(lambda n, out, width: MultiLinear(width, out, n)),
}


class Taps:
    """What passes through a model's layers in one forward pass: hidden[layer] [..., width], the layer's output;
    experts[layer] [..., top_k], the router's choice (no entry for a layer without experts)."""

    def __init__(self) -> None:
        self.hidden: dict[int, mx.array] = {}
        self.experts: dict[int, mx.array] = {}


class _TappedLayer:
    _taps: Taps
    _number: int

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        y = super().__call__(*args, **kwargs)  # type: ignore[misc]
        self._taps.hidden[self._number] = y[0] if isinstance(y, tuple) else y
        return y


class _TappedSwitch:
    _taps: Taps
    _number: int

    def __call__(self, x: mx.array, ids: mx.array) -> mx.array:
        self._taps.experts[self._number] = ids
        return super().__call__(x, ids)  # type: ignore[misc, no-any-return]


def tap(model: nn.Module) -> Taps:
    """Make every layer and switch module of an mlx-lm model leave what it gives in the returned Taps."""
    taps, switches = Taps(), (SwitchLinear, QuantizedSwitchLinear)
    for number, layer in enumerate(model.layers):
        found = [m for _, m in layer.named_modules() if any(isinstance(c, switches) for c in _children(m))]
        for module, mixin in [(layer, _TappedLayer), *((m, _TappedSwitch) for m in found)]:
            become(module, mixin)
            module._taps, module._number = taps, number
    return taps
