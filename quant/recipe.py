"""Which module gets which bits: EWQ's decision, the budget's changes to it, and what config.json says of both."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from expertd.checkpoint.config import Config
from expertd.quant.budget import (
    OUTER_BITS,
    Allocation,
    ErrorOf,
    bytes_per_token,
    fit_to,
    total_bytes,
)
from expertd.quant.ewq import (
    TOLD_BY_SIZE,
    BlockScore,
    Entropy,
    Threshold,
    choose_bits,
    explain,
    find_threshold,
    in_words,
    score_blocks,
    share_told_by_size,
)
from expertd.quant.modules import ModuleInfo, describe_modules
from expertd.quant.settings import WHOLE, EwqForm, Settings

__all__ = [
    "BlockDecision",
    "MenuSize",
    "ModuleInfo",
    "Plan",
    "Recipe",
    "decide",
    "describe_modules",
    "menu_sizes",
]

MENUS = ((4, 16), (4, 8), (4, 8, 16))


@dataclass(frozen=True)
class Recipe:
    """Bits and group size of every module that is quantized, by module path.

    `indivisible` are the modules left whole because their rows cannot be cut into groups.
    """

    bits: dict[str, int]
    group_sizes: dict[str, int]
    indivisible: tuple[str, ...] = ()

    def settings(self, default_bits: int, default_group_size: int) -> Config:
        """The `quantization` entry of config.json: explicit for every module, as older releases of mlx-lm
        need."""
        modules = {path: _entry(bits, self.group_sizes[path]) for path, bits in self.bits.items()}
        return {**_entry(default_bits, default_group_size), **modules}


def _entry(bits: int, group_size: int) -> Config:
    return {"group_size": group_size, "bits": bits, "mode": "affine"}


@dataclass(frozen=True)
class BlockDecision:
    """What one block got and why. `layer` is None for embeddings and head, which EWQ does not judge: they have
    no entropy and no score. `num_weights` counts the matrices that the decision is about, `num_bytes` all that
    is written of the block, its norms and router too, but not its routed experts."""

    name: str
    layer: int | None
    num_weights: int
    entropy: float | None
    entropy_eps: float | None
    deficit: float | None
    score: float | None
    bits: int
    num_bytes: int
    reason: str


@dataclass(frozen=True)
class Plan:
    """All decisions. `num_bytes` are those of all arrays that will be written. `mu`, `sigma` and `threshold` are
    of the blocks' scores; None when no block has a score."""

    recipe: Recipe
    blocks: list[BlockDecision]
    num_bytes: int
    allocation: Allocation
    threshold: Threshold | None = None
    warnings: list[str] = field(default_factory=list)


def decide(
    modules: Sequence[ModuleInfo],
    entropies: Mapping[str, Entropy],
    settings: Settings,
    target: int | None = None,
    error_of: ErrorOf | None = None,
) -> Plan:
    """Bits for every module of `modules` (describe_modules), from the entropies of its trunk modules by path.

    `target` is the most bytes that the arrays may take (budget.target_bytes), None for whatever EWQ decides.
    `error_of(path, bits)`, asked only where there is room left, is the error of rounding a trunk module.
    Raises ConfigError when nothing fits into `target`.
    """
    scores = score_blocks(modules, entropies, settings.ewq)
    threshold = find_threshold(scores, settings.ewq_x) if scores else None
    start = allocate(modules, scores, threshold, settings)
    final = start
    if target is not None:
        # Of equal scores the last block comes first: the later one is lowered first, and raised last.
        ascending = [s.layer for s in sorted(scores, key=lambda s: (s.score, -s.layer))]
        final = fit_to(target, modules, ascending, start, settings, error_of)
    return Plan(
        recipe=make_recipe(modules, final, settings),
        blocks=block_decisions(modules, scores, threshold, start, final, settings),
        num_bytes=total_bytes(modules, final, settings),
        allocation=final,
        threshold=threshold,
        warnings=warn(scores, settings.ewq),
    )


def allocate(
    modules: Sequence[ModuleInfo],
    scores: Sequence[BlockScore],
    threshold: Threshold | None,
    settings: Settings,
) -> Allocation:
    """What EWQ decides, and 8 bits for embeddings and head."""
    blocks = {s.layer: choose_bits(s.score, threshold, settings.trunk) for s in scores if threshold}
    return Allocation(blocks, {m.path: OUTER_BITS for m in modules if m.kind in ("embedding", "head")})


def make_recipe(modules: Sequence[ModuleInfo], allocation: Allocation, settings: Settings) -> Recipe:
    """The entries of config.json, in the order of the paths."""
    bits, group_sizes = {}, {}
    for m in sorted(modules, key=lambda m: m.path):
        group_size = m.group_size(settings.group_size)
        if group_size and (chosen := allocation.bits(m, settings.experts_bits)) != WHOLE:
            bits[m.path], group_sizes[m.path] = chosen, group_size
    indivisible = sorted(m.path for m in modules if m.is_indivisible)
    return Recipe(bits, group_sizes, tuple(indivisible))


def block_decisions(
    modules: Sequence[ModuleInfo],
    scores: Sequence[BlockScore],
    threshold: Threshold | None,
    start: Allocation,
    final: Allocation,
    settings: Settings,
) -> list[BlockDecision]:
    """One row per block in execution order, then one for each module outside the layers."""
    sizes: dict[int, int] = {}
    for m in modules:
        if m.layer is not None and not m.num_experts:
            size = m.num_bytes(final.bits(m, settings.experts_bits), settings.group_size)
            sizes[m.layer] = sizes.get(m.layer, 0) + size
    return [
        BlockDecision(
            f"layer {s.layer}", s.layer, s.num_weights, s.entropy, s.entropy_eps, s.deficit, s.score,
            final.blocks[s.layer], sizes[s.layer],
            explain(s, threshold, start.blocks[s.layer]) + _moved(start.blocks[s.layer], final.blocks[s.layer]),
        )
        for s in scores if threshold
    ] + [_outer_decision(m, start, final, settings) for m in modules if m.path in final.outer]  # fmt: skip


def _outer_decision(m: ModuleInfo, start: Allocation, final: Allocation, settings: Settings) -> BlockDecision:
    bits = final.outer[m.path]
    reason = f"outside the layers: {in_words(OUTER_BITS)}" + _moved(start.outer[m.path], bits)
    size = m.num_bytes(bits, settings.group_size)
    return BlockDecision(m.path, None, m.num_weights, None, None, None, None, bits, size, reason)


def _moved(before: int, after: int) -> str:
    if before == after:
        return ""
    what = "lowered" if after < before else "raised"
    why = "for the size" if after < before else "as there is room"
    return f"; {what} to {in_words(after) if after != WHOLE else '16 bits'} {why}"


def warn(scores: Sequence[BlockScore], form: EwqForm) -> list[str]:
    """What the user should know of the decision."""
    if form != "paper" or (share := share_told_by_size(scores)) <= TOLD_BY_SIZE:
        return []
    return [
        f"ewq paper: {share:.1%} of the variance of the blocks' entropies is ln n, the size of their matrices, so "
        "the decision says little about the weights. The default, --ewq normalized, compares like with like."
    ]


@dataclass(frozen=True)
class MenuSize:
    """What a menu of the trunk costs: `num_bytes` written, bits per weight, and bytes that one token reads."""

    menu: tuple[int, ...]
    num_bytes: int
    bits_per_weight: float
    bytes_per_token: int


def menu_sizes(
    modules: Sequence[ModuleInfo],
    entropies: Mapping[str, Entropy],
    settings: Settings,
    top_k: int,
    menus: Sequence[tuple[int, ...]] = MENUS,
) -> list[MenuSize]:
    """Each menu's cost on one model, without a budget. `top_k` experts serve one token."""
    scores = score_blocks(modules, entropies, settings.ewq)
    threshold = find_threshold(scores, settings.ewq_x) if scores else None
    num_weights = sum(m.num_weights for m in modules)
    found = []
    for menu in menus:
        allocation = allocate(modules, scores, threshold, replace(settings, trunk=menu))
        size = total_bytes(modules, allocation, settings)
        per_token = bytes_per_token(modules, allocation, settings, top_k)
        found.append(MenuSize(menu, size, 8 * size / num_weights, per_token))
    return found
