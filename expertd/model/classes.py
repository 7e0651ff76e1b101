"""Model classes of mlx-lm, with what they get wrong about Hugging Face checkpoints put right."""

import importlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from mlx.nn.layers.base import Module
from mlx_lm.models.switch_layers import SwitchGLU, SwitchLinear, SwitchMLP

from expertd.checkpoint.config import family_of
from expertd.errors import CheckpointError

Weights = dict[str, mx.array]


def model_classes(config: dict[str, Any]) -> tuple[type[Module], Any]:
    """The Model and ModelArgs classes for a normalised config, for mlx-lm's `load_model(get_model_classes=)`.

    Raises CheckpointError when mlx-lm has none.
    """
    family = family_of(config).name
    module = importlib.import_module(f"mlx_lm.models.{family}")
    fix = FIXED.get(family)
    return fix(module.Model) if fix else module.Model, module.ModelArgs


def build_model(config: dict[str, Any]) -> Module:
    """The model of a normalised config with random weights, none of them computed yet.

    Raises CheckpointError when the config's values make no model.
    """
    model_class, args_class = model_classes(config)
    try:
        return model_class(args_class.from_dict(config))
    except Exception as error:  # mlx-lm checks little: a bad value surfaces as any exception
        reason = (str(error).splitlines() or [""])[0]
        raise CheckpointError(
            f"config.json: mlx-lm cannot build this {config['model_type']} "
            f"({type(error).__name__}: {reason[:120]}). Download the checkpoint again."
        ) from error


def is_switch(module: Module) -> bool:
    """Whether `module` holds one weight per expert, stacked [num_experts, out, in]."""
    return isinstance(module, SwitchLinear)


# The projections of each kind of switch: those that read its input, in the order of its activation's arguments,
# and the one that reads what the activation gives.
PROJECTIONS: dict[type, tuple[tuple[str, ...], str]] = {
    SwitchGLU: (("up_proj", "gate_proj"), "down_proj"),
    SwitchMLP: (("fc1",), "fc2"),
}


@dataclass(frozen=True)
class MoeBlock:
    """A switch, which sends rows through experts, and the module around it that chooses and adds them up."""

    path: str  # the switch's
    module: Module
    switch: Module
    inputs: tuple[str, ...]
    output: str


@dataclass(frozen=True)
class Layer:
    """One layer of a model and the MoE blocks in it, by path."""

    path: str
    module: Module
    blocks: tuple[MoeBlock, ...]


def layers_of(model: Module) -> list[Layer]:
    """The layers that the model runs, in that order; none for a family that does not say them."""
    paths = {id(module): path for path, module in model.named_modules()}
    modules = [module for module in getattr(model, "layers", ()) if isinstance(module, Module)]
    return [Layer(paths[id(m)], m, tuple(_moe_blocks(m, paths[id(m)]))) for m in modules]


def _moe_blocks(layer: Module, layer_path: str) -> list[MoeBlock]:
    modules = dict(layer.named_modules())
    return [
        MoeBlock(f"{layer_path}.{path}", modules[path.rpartition(".")[0]], module, *PROJECTIONS[type(module)])
        for path, module in sorted(modules.items())
        if type(module) in PROJECTIONS
    ]


def become(module: Any, mixin: type) -> None:
    """Give an instance a subclass of its own class: its parameters and whatever looks at its type stay valid."""
    cls = type(module)
    attributes = {"_stock_class": stock_class(module)}
    module.__class__ = type(f"{mixin.__name__.strip('_')}{cls.__name__}", (mixin, cls), attributes)


def stock_class(module: Any) -> type:
    """The class that an instance had before it became another."""
    return getattr(type(module), "_stock_class", type(module))


def _fixed_gpt_oss(base: type[Module]) -> type[Module]:
    class GptOss(base):  # type: ignore[misc]
        def __init__(self, args: Any) -> None:
            super().__init__(args)
            scaling = args.rope_scaling or {}
            if scaling.get("rope_type") == "yarn" and scaling.get("truncate", True) is False:
                freqs = yarn_wavelengths(args.head_dim, args.rope_theta, scaling)
                for layer in self.model.layers:
                    layer.self_attn.rope._freqs = freqs

        def sanitize(self, weights: Weights) -> Weights:
            return super().sanitize(dict(map(_stand_expert, weights.keys(), weights.values())))  # type: ignore[no-any-return]

    return GptOss


def _stand_expert(name: str, value: mx.array) -> tuple[str, mx.array]:
    """The bf16 checkpoints of gpt_oss keep experts [num_experts, in, out] with no `.weight`; mlx-lm wants the
    layout of the MXFP4 ones, [num_experts, out, in]."""
    if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
        return f"{name}.weight", mx.contiguous(value.swapaxes(-1, -2))
    return name, value


def yarn_wavelengths(dims: int, base: float, scaling: dict[str, Any]) -> mx.array:
    """YaRN's wavelengths [dims / 2] with unrounded ramp ends: the `truncate: false` that mlx-lm ignores.

    Source: section 3.2 of the YaRN paper (arXiv 2309.00071).
    """
    factor, original = scaling["factor"], scaling["original_max_position_embeddings"]

    def dim_that_turns(num_turns: float) -> float:
        return dims * math.log(original / (num_turns * 2 * math.pi)) / (2 * math.log(base))

    low = max(dim_that_turns(scaling.get("beta_fast", 32)), 0)
    high = max(min(dim_that_turns(scaling.get("beta_slow", 1)), dims - 1), low + 0.001)
    stretch = mx.clip((mx.arange(dims // 2, dtype=mx.float32) - low) / (high - low), 0, 1)
    wavelengths = base ** (mx.arange(0, dims, 2, dtype=mx.float32) / dims)
    scaled: mx.array = wavelengths / (stretch / factor + 1 - stretch)
    return scaled


FIXED: dict[str, Callable[[type[Module]], type[Module]]] = {"gpt_oss": _fixed_gpt_oss}
