"""The one file that touches mlx-lm's internals: loading its models and dividing their MoE blocks.

Theory of operation. mlx-lm sends every family's routed experts through SwitchGLU or SwitchMLP,
`(x[..., width], ids[..., k]) -> y[..., k, width]`, and the caller applies the routing weights. So two
places are enough for every family, and the model code stays as it is:

    experts  the switch module: the (token, expert) pairs, sorted by expert, are cut at fixed positions;
             each rank computes its pairs, the rows are exchanged and put back in the caller's order.
             Static shapes: no masks, no host sync, each expert's weights read by one rank (but for the
             one at a cut).
    tokens   the block around it (router, experts, shared expert), a function of each token by itself:
             each rank computes its rows.

Both exchange finished rows, never partial sums, so the caller adds the same numbers in the same order as
one machine does and the logits are bit-identical. An instance is changed by giving it a subclass of its own
class: the module tree, the parameter names and everything that looks at the type stay valid.
"""

import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.switch_layers import SwitchGLU, SwitchLinear, SwitchMLP
from mlx_lm.utils import load_model

from expertd.errors import CheckpointError
from expertd.model.classes import become, model_classes
from expertd.model.exchange import Link, exchange
from expertd.split.cut import StepSplit, cut

# SwitchGLU sorts its rows from this many on (mlx-lm 0.32.2), which on a GPU means another kernel; a slice
# must take the kernel that the whole call would take.
SORT_FROM = 64


class StepState:
    """What the divided modules read while a step's graph is built: the split, the link, the exchange's number.

    The link is replaced at every epoch; the modules only ever ask for the present one.
    """

    def __init__(self) -> None:
        self.link: Link | None = None
        self.split = StepSplit("solo", (1.0,))
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

    def __call__(self, x: mx.array, ids: mx.array) -> mx.array:
        if self._step.split.name != "experts":
            return super().__call__(x, ids)  # type: ignore[misc, no-any-return]
        pairs, top_k, rows = ids.flatten(), ids.shape[-1], x.reshape(-1, x.shape[-1])
        order = mx.argsort(pairs)
        counts, own = self._step.cut(pairs.size)
        mine = order[own] if own.stop > own.start else order[:1]
        y = self._experts(rows[mine // top_k][:, None], pairs[mine], pairs.size >= SORT_FROM)[:, 0]
        if own.stop == own.start:
            y = _no_rows(y, after=x)
        y = self._step.exchange(y, counts, ids=pairs)
        return y[mx.argsort(order)].reshape(*ids.shape, -1)

    def _experts(self, x: mx.array, ids: mx.array, is_sorted: bool) -> mx.array:
        """Rows [n, 1, width] through expert ids [n]."""
        raise NotImplementedError


class _SplitGLU(_SplitSwitch):
    def _experts(self, x: mx.array, ids: mx.array, is_sorted: bool) -> mx.array:
        m: Any = self
        up = m.up_proj(x, ids, sorted_indices=is_sorted)
        gate = m.gate_proj(x, ids, sorted_indices=is_sorted)
        y: mx.array = m.down_proj(m.activation(up, gate), ids, sorted_indices=is_sorted)
        return y


class _SplitMLP(_SplitSwitch):
    def _experts(self, x: mx.array, ids: mx.array, is_sorted: bool) -> mx.array:
        m: Any = self
        y: mx.array = m.activation(m.fc1(x, ids, sorted_indices=is_sorted))
        y = m.fc2(y, ids, sorted_indices=is_sorted)
        return y


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
    blocks: list[nn.Module] = []
    for _, parent in model.named_modules():
        for child in _children(parent):
            if type(child) in kinds:
                if all(parent is not block for block in blocks):  # modules are dicts: `in` compares arrays
                    blocks.append(parent)
                become(child, kinds[type(child)])
                child._step = step
    if not blocks:
        return ["solo"]
    if not all(_takes_hidden_states_alone(block) for block in blocks):
        return ["solo", "experts"]
    for block in blocks:
        become(block, _SplitBlock)
        block._step = step
    return ["solo", "experts", "tokens"]


def load(folder: Path, config: dict[str, Any]) -> nn.Module:
    """Load an mlx-lm model from a checked folder, with `config` (normalised) over its config.json.

    Weights are read into memory before this returns. Raises CheckpointError when they do not fit the model.
    """
    try:
        model, _ = load_model(
            folder, lazy=True, strict=True, model_config=config, get_model_classes=model_classes
        )
        _use_float32_experts_on_cpu(model)
        mx.eval(model.parameters())
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError, FileNotFoundError) as e:
        reason = " ".join(str(e).split())[:300]
        raise CheckpointError(
            f"checkpoint {folder}: its weights do not fit a {config.get('model_type')} model of this config: {reason}. "
            "Download it again or convert it with `expertd quantize`."
        ) from e
    return model


def _use_float32_experts_on_cpu(model: nn.Module) -> None:
    if mx.default_device() != mx.cpu:
        return
    for _, module in model.named_modules():
        if type(module) is SwitchLinear and module.weight.dtype != mx.float32:
            module.weight = module.weight.astype(mx.float32)
            become(module, _Float32Switch)
