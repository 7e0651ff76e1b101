"""The sizes of four real models, and the matrices that a token is multiplied by in each.

Sources: the models' config.json; of DeepSeek-V4-Flash the sizes in ds4's source (its output projection is cut into 8
groups, each of which reads 8 heads).
"""

from dataclasses import dataclass, field
from typing import Literal

from expertd.errors import ConfigError

Kind = Literal["dense", "experts", "float"]


@dataclass(frozen=True)
class Matrix:
    """A weight [num_out, width], or one per expert. `name` says what it is for: like matrices of a model share one.

    `kind` is "dense" or "experts" for quantized ones, "float" for those that stay in floating point.
    """

    name: str
    num_out: int
    width: int
    kind: Kind = "dense"


@dataclass(frozen=True)
class Shape:
    """One model's sizes. `family` is mlx-lm's module that runs it, "" where this release has none.

    `attention` are its projections, each (num_out, width); `shared` is the width inside the shared expert, 0 without.
    """

    name: str
    family: str
    num_layers: int
    hidden: int
    num_experts: int
    top_k: int
    intermediate: int
    vocabulary: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    attention: dict[str, tuple[int, int]] = field(default_factory=dict)
    shared: int = 0
    min_layers: int = 1

    def __post_init__(self) -> None:
        if not self.attention:
            object.__setattr__(self, "attention", self._plain_attention())

    def _plain_attention(self) -> dict[str, tuple[int, int]]:
        queries, keys = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        h = self.hidden
        return {"q_proj": (queries, h), "k_proj": (keys, h), "v_proj": (keys, h), "o_proj": (h, queries)}

    def matrices(self) -> list[Matrix]:
        """The distinct ones: two of a size, such as `k_proj` and `v_proj`, are one here."""
        found: dict[tuple[int, int], list[str]] = {}
        for name, size in self.attention.items():
            found.setdefault(size, []).append(name.removesuffix("_proj"))
        dense = [Matrix(f"attention {'/'.join(names)}", *size) for size, names in found.items()]
        if self.shared:
            dense += [
                Matrix("shared gate/up", self.shared, self.hidden),
                Matrix("shared down", self.hidden, self.shared),
            ]
        return [
            *dense,
            Matrix("experts gate/up", self.intermediate, self.hidden, "experts"),
            Matrix("experts down", self.hidden, self.intermediate, "experts"),
            Matrix("router", self.num_experts, self.hidden, "float"),
            Matrix("head", self.vocabulary, self.hidden),
        ]


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("qwen3-30b-a3b", "qwen3_moe", 48, 2048, 128, 8, 768, 151_936, 32, 4, 128),
        Shape("qwen3-235b-a22b", "qwen3_moe", 94, 4096, 128, 8, 1536, 151_936, 64, 4, 128),
        # Every other layer sees a window only, and mlx-lm's class wants both kinds.
        Shape("gpt-oss-120b", "gpt_oss", 36, 2880, 128, 4, 2880, 201_088, 64, 8, 64, min_layers=2),
        Shape(
            "deepseek-v4-flash", "", 43, 4096, 256, 6, 2048, 129_280, 64, 1, 512, shared=2048,
            attention={
                "q_a": (1024, 4096), "q_b": (32_768, 1024), "kv": (512, 4096), "o_a": (8192, 4096), "o_b": (4096, 8192)
            },
        ),
    )
}  # fmt: skip


def find_shape(name: str) -> Shape:
    """Raises ConfigError that lists the known ones."""
    if name not in SHAPES:
        raise ConfigError(f"--shape {name[:80]}: unknown. Choose one of {', '.join(SHAPES)}.")
    return SHAPES[name]
