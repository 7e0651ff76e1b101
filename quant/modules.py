"""What a checkpoint is made of, as far as bits and bytes go: its modules, their kinds and their sizes.

Everything is taken from mlx-lm's model class, built but never computed. Names are looked at only to tell a
router from a projection: both are plain matrices, and their families call them `gate`, `router` or `indexer`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from mlx.nn.layers.base import Module
from mlx.nn.layers.embedding import Embedding
from mlx.utils import tree_flatten

from expertd.model.classes import Weights, is_switch
from expertd.quant.settings import GROUP_SIZES, TRUNK_GROUP_SIZE, WHOLE

Kind = Literal["expert", "trunk", "embedding", "head", "kept", "other"]

# They choose: experts, or (an indexer) the positions that attention sees. A wrong choice costs more than the
# bytes of all of them.
ROUTERS = {"gate", "router", "indexer"}
# A matrix with so few outputs per input makes gates, scores or mixing weights, a few numbers that steer the
# rest, and is at most 3 % of a square one, so 16 bits cost next to nothing. Qwen3-Next's in_proj_ba has 1/32,
# an indexer's weights 1/112; the narrowest that carries values is DeepSeek-V3's latent with 1/12.
NARROW = 32
INDIVISIBLE = f"its rows are no multiple of {min(GROUP_SIZES)}, the smallest group"


@dataclass(frozen=True)
class ModuleInfo:
    """One array of the checkpoint: a module's weight, or (kind "other") any other parameter.

    `path` is the module's path, for "other" the parameter's full name. Kinds: "expert" one weight per routed
    expert, stacked; "trunk" a matrix of a layer that EWQ decides on; "embedding" and "head" (whatever MLX can
    quantize outside the layers); "kept" could be quantized but stays whole, for `reason`; "other" cannot be
    quantized. `role` is the same for the same module of every layer. `dtype_bytes` is the size of one weight of
    the source, and so that of a scale. `num_experts` is 0 for what every token reads.
    """

    path: str
    kind: Kind
    layer: int | None
    role: str
    shape: tuple[int, ...]
    dtype_bytes: int = 2
    num_experts: int = 0
    reason: str = ""

    @property
    def num_weights(self) -> int:
        return math.prod(self.shape)

    @property
    def is_indivisible(self) -> bool:
        return self.reason == INDIVISIBLE

    def group_size(self, experts_group_size: int) -> int | None:
        """The largest group size up to the wanted one that divides the rows; None when there is none."""
        wanted = experts_group_size if self.kind == "expert" else TRUNK_GROUP_SIZE
        sizes = (size for size in reversed(GROUP_SIZES) if size <= wanted and self.shape[-1] % size == 0)
        return next(sizes, None)

    def num_bytes(self, bits: int, experts_group_size: int) -> int:
        """What is written at `bits`: codes, scales and biases, or the array as it is."""
        group_size = self.group_size(experts_group_size) if bits != WHOLE else None
        if group_size is None:
            return self.num_weights * self.dtype_bytes
        return self.num_weights * bits // 8 + 2 * (self.num_weights // group_size) * self.dtype_bytes


def describe_modules(model: Module, dtype_bytes: Callable[[str], int] | None = None) -> list[ModuleInfo]:
    """Every array of `model`, in the model's own order; computes nothing.

    `dtype_bytes(parameter name)` says how many bytes one weight of the source has; 2 when it is not given.
    """
    layers = layer_paths(model)
    modules = dict(model.named_modules())
    allows = quant_predicate(model)
    parameters: Weights = dict(tree_flatten(model.parameters()))
    found = []
    for name, array in parameters.items():
        size = dtype_bytes(name) if dtype_bytes else 2
        path, _, leaf = name.rpartition(".")
        module = modules.get(path)
        quantizable = module is not None and leaf == "weight" and hasattr(module, "to_quantized")
        path = path if quantizable else name
        layer, role = place(path, layers)
        num_experts = array.shape[0] if module is not None and is_switch(module) else 0
        kind: Kind = "other"
        reason = ""
        if quantizable:
            kind, reason = classify(path, module, layer, allows)
            if kind != "kept" and array.shape[-1] % min(GROUP_SIZES):
                kind, reason = "kept", INDIVISIBLE
        found.append(ModuleInfo(path, kind, layer, role, tuple(array.shape), size, num_experts, reason))
    return found


def layer_paths(model: Module) -> dict[str, int]:
    """The path of every layer with its execution index."""
    paths = {id(module): path for path, module in model.named_modules()}
    return {paths[id(layer)]: i for i, layer in enumerate(getattr(model, "layers", ())) if id(layer) in paths}


def place(path: str, layers: dict[str, int]) -> tuple[int | None, str]:
    """The layer that `path` lies in, and its path inside that layer; None and the whole path outside."""
    parts = path.split(".")
    for end in range(1, len(parts)):
        if (layer := layers.get(".".join(parts[:end]))) is not None:
            return layer, ".".join(parts[end:])
    return None, path


def quant_predicate(model: Module) -> Callable[[str, Module], Any]:
    """What mlx-lm's class says about quantizing a module: False, True, or settings with more bits."""
    predicate: Callable[[str, Module], Any] | None = getattr(model, "quant_predicate", None)
    return predicate or (lambda path, module: True)


def classify(
    path: str, module: Any, layer: int | None, allows: Callable[[str, Module], Any]
) -> tuple[Kind, str]:
    """The kind of a module that MLX can quantize, and for "kept" why it is kept."""
    allowed = allows(path, module)
    if allowed is False:
        return "kept", "its class in mlx-lm does not let it be quantized"
    if is_switch(module):
        return "expert", ""
    if isinstance(module, Embedding):
        return "embedding", ""
    outputs, inputs = module.weight.shape[-2:]
    if ROUTERS & set(path.split(".")):
        return "kept", "a router: it chooses"
    if outputs * NARROW <= inputs:
        return "kept", f"few outputs for its inputs ({outputs} x {inputs}): it steers the rest"
    if layer is None:
        return "head", ""
    if isinstance(allowed, dict):
        return "kept", "its class in mlx-lm asks for more bits than the rest"
    return "trunk", ""
