from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx.nn import Embedding, Linear, Module
from mlx.utils import tree_flatten

from expertd.checkpoint.config import normalise_config, read_config
from expertd.errors import ConfigError
from expertd.model.classes import build_model
from expertd.quant.budget import total_bytes
from expertd.quant.ewq import Entropy
from expertd.quant.modules import ModuleInfo, describe_modules
from expertd.quant.recipe import Plan, decide, menu_sizes
from expertd.quant.settings import Settings, parse_menu
from tests.quant.shapes import DEEPSEEK_V3, entropy, modules_of, tiny_modules
from tests.tiny import FAMILIES, make_tiny

MENU = Settings(trunk=(4, 8, 16))


def alike(modules: list[ModuleInfo]) -> dict[str, Entropy]:
    return {m.path: entropy(m.num_weights, 0.02) for m in modules if m.kind == "trunk"}


def rising(modules: list[ModuleInfo]) -> dict[str, Entropy]:
    """Layer by layer wider weights: the first scores highest."""
    return {
        m.path: entropy(m.num_weights, 0.02 + (m.layer or 0) / 1000) for m in modules if m.kind == "trunk"
    }


def kinds(modules: list[ModuleInfo], kind: str) -> set[str]:
    return {m.role for m in modules if m.kind == kind}


# What a model is made of.


@pytest.mark.parametrize("family", FAMILIES)
def test_every_parameter_is_described_once(family: str, tmp_path: Path) -> None:
    model = build_model(normalise_config(read_config(make_tiny(tmp_path, family))))
    parameters: dict[str, mx.array] = dict(tree_flatten(model.parameters()))
    modules = describe_modules(model)
    names = [m.path if m.kind == "other" else f"{m.path}.weight" for m in modules]
    assert names == list(parameters)
    assert [m.shape for m in modules] == [a.shape for a in parameters.values()]
    layers = read_config(tmp_path)["num_hidden_layers"]
    assert {m.layer for m in modules} == {None, *range(layers)}
    for m in modules:
        assert m.role == m.path if m.layer is None else m.path.endswith(f"layers.{m.layer}.{m.role}")
    experts = {m.role.rpartition(".")[2] for m in modules if m.kind == "expert"}
    assert experts == {"gate_proj", "up_proj", "down_proj"}


@pytest.mark.parametrize(
    ("family", "kept"),
    [
        ("qwen3_next", {"mlp.gate", "mlp.shared_expert_gate"}),
        ("gpt_oss", {"mlp.router"}),
        ("deepseek_v3", set()),  # its router is a bare parameter
        ("mixtral", {"block_sparse_moe.gate"}),
    ],
)
def test_routers_and_gates_are_kept(family: str, kept: set[str], tmp_path: Path) -> None:
    modules = tiny_modules(tmp_path, family)
    assert kinds(modules, "kept") == kept
    assert kinds(modules, "embedding") == {"model.embed_tokens"} and kinds(modules, "head") == {"lm_head"}


def test_what_every_token_reads(tmp_path: Path) -> None:
    modules = tiny_modules(tmp_path, "gpt_oss")
    of_experts = {m.role: m.num_experts for m in modules if m.num_experts}
    assert set(of_experts.values()) == {8}
    assert {"mlp.experts.down_proj", "mlp.experts.down_proj.bias"} <= of_experts.keys()
    assert "mlp.router.bias" not in of_experts


def test_shared_experts_and_dense_layers_are_trunk(tmp_path: Path) -> None:
    trunk = [m for m in tiny_modules(tmp_path, "deepseek_v3") if m.kind == "trunk"]
    assert {m.layer for m in trunk if m.role == "mlp.gate_proj"} == {0}
    assert {m.layer for m in trunk if m.role == "mlp.shared_experts.gate_proj"} == {1, 2}


def test_deepseek_v3_at_its_real_size() -> None:
    modules = modules_of(DEEPSEEK_V3)
    assert sum(m.num_weights for m in modules) == 671_026_419_200  # 671 B, as published
    assert kinds(modules, "kept") == set()
    assert sum(m.kind == "expert" for m in modules) == 58 * 3


class Attention(Module):
    def __init__(self, predicate_says: Any) -> None:
        super().__init__()
        self.embed = Embedding(10, 64)
        self.layers = [Module()]
        self.layers[0].wide = Linear(64, 64)
        self.layers[0].narrow = Linear(4096, 128)
        self.layers[0].less_narrow = Linear(4096, 129)
        self.layers[0].special = Linear(64, 64)
        self.layers[0].odd = Linear(100, 64, bias=False)
        self.layers[0].indexer = Module()
        self.layers[0].indexer.q = Linear(64, 640)
        self.out = Linear(64, 10)
        self._says = predicate_says

    @property
    def quant_predicate(self) -> Any:
        return lambda path, module: self._says if path.endswith(("special", "out")) else True


def test_rules_for_modules_that_stay_whole() -> None:
    def kinds_of(says: Any) -> dict[str, str]:
        return {m.path: m.kind for m in describe_modules(Attention(says)) if m.kind != "other"}

    found = kinds_of(True)
    assert found == {
        "embed": "embedding", "layers.0.wide": "trunk", "layers.0.narrow": "kept",
        "layers.0.less_narrow": "trunk", "layers.0.special": "trunk", "layers.0.odd": "kept",
        "layers.0.indexer.q": "kept", "out": "head",
    }  # fmt: skip
    assert kinds_of(False) == found | {"layers.0.special": "kept", "out": "kept"}
    assert kinds_of({"bits": 8}) == found | {"layers.0.special": "kept"}
    reasons = {m.path: m.reason for m in describe_modules(Attention(False)) if m.kind == "kept"}
    assert all(reasons.values()) and "32" in reasons["layers.0.odd"]


# Recipes.


def test_group_sizes_fall_back() -> None:
    def expert(inputs: int) -> ModuleInfo:
        return ModuleInfo("e", "expert", 0, "e", (4, 8, inputs), num_experts=4)

    assert [expert(n).group_size(128) for n in (256, 192, 96, 100)] == [128, 64, 32, None]
    assert [expert(n).group_size(64) for n in (256, 96)] == [64, 32]
    assert replace(expert(256), kind="trunk").group_size(128) == 64


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("dtype", "group_size"), [("bfloat16", 64), ("float32", 32)])
def test_bytes_are_those_of_mx_quantize(family: str, dtype: str, group_size: int, tmp_path: Path) -> None:
    model = build_model(normalise_config(read_config(make_tiny(tmp_path, family))))
    kind = getattr(mx, dtype)
    parameters: dict[str, mx.array] = dict(tree_flatten(model.parameters()))
    parameters = {name: array.astype(kind) for name, array in parameters.items()}
    modules = describe_modules(model, lambda name: parameters[name].dtype.size)
    settings = Settings(trunk=(4, 8, 16), experts_bits=3, group_size=group_size)
    plan = decide(modules, rising(modules), settings)
    written = 0
    for name, array in parameters.items():
        path = name.removesuffix(".weight")
        if name.endswith(".weight") and path in plan.recipe.bits:
            parts = mx.quantize(array, plan.recipe.group_sizes[path], plan.recipe.bits[path])
            written += sum(part.nbytes for part in parts)
        else:
            written += array.nbytes
    assert plan.num_bytes == written == total_bytes(modules, plan.allocation, settings)


def decided(folder: Path, family: str, settings: Settings = MENU) -> tuple[list[ModuleInfo], Plan]:
    modules = tiny_modules(folder, family)
    return modules, decide(modules, rising(modules), settings)


def test_recipe_names_every_quantized_module(tmp_path: Path) -> None:
    modules, plan = decided(tmp_path, "deepseek_v3")
    bits = plan.recipe.bits
    assert {bits[m.path] for m in modules if m.kind == "expert"} == {2}
    assert bits["model.embed_tokens"] == bits["lm_head"] == 8
    assert len(set(plan.allocation.blocks.values())) > 1
    for m in modules:
        if m.kind == "trunk":
            assert m.layer is not None
            assert bits.get(m.path, 16) == plan.allocation.blocks[m.layer]
        elif m.kind in ("kept", "other"):
            assert m.path not in bits
    entry = plan.recipe.settings(2, 128)
    assert (entry["bits"], entry["group_size"], entry["mode"]) == (2, 128, "affine")
    assert entry["lm_head"] == {"bits": 8, "group_size": 64, "mode": "affine"}
    assert entry.keys() - {"bits", "group_size", "mode"} == bits.keys()
    embed_q = "model.layers.2.self_attn.embed_q"
    assert plan.recipe.group_sizes[embed_q] == 32  # its rows have 32 numbers
    assert list(bits) == sorted(bits)


def test_indivisible_modules_are_named() -> None:
    modules = describe_modules(Attention(True))
    assert decide(modules, alike(modules), MENU).recipe.indivisible == ("layers.0.odd",)


def test_block_table(tmp_path: Path) -> None:
    modules, plan = decided(tmp_path, "qwen3_next")
    assert [b.name for b in plan.blocks] == [
        *(f"layer {i}" for i in range(4)),
        "model.embed_tokens",
        "lm_head",
    ]
    by_hand = sum(m.num_bytes(2, 64) for m in modules if m.kind == "expert")
    norm = sum(m.num_bytes(16, 64) for m in modules if m.layer is None and m.kind == "other")
    assert sum(b.num_bytes for b in plan.blocks) + by_hand + norm == plan.num_bytes
    first, last = plan.blocks[0], plan.blocks[-1]
    assert first.score is not None and first.score > 0 and "above the mean" in first.reason
    assert (last.score, last.entropy, last.bits) == (None, None, 8)
    sizes = {m.layer: 0 for m in modules}
    for m in modules:
        sizes[m.layer] += m.num_weights if m.kind == "trunk" else 0
    assert [b.num_weights for b in plan.blocks[:4]] == [sizes[i] for i in range(4)]


def test_tied_embeddings_are_one_module(tmp_path: Path) -> None:
    config = read_config(make_tiny(tmp_path, "qwen3_moe")) | {"tie_word_embeddings": True}
    modules = modules_of(config)
    assert kinds(modules, "head") == set()
    tied, untied = (
        menu_sizes(found, alike(found), Settings(), 4, [(4, 16)])[0]
        for found in (modules, tiny_modules(tmp_path, "qwen3_moe"))
    )
    row = 64 + 2 * 2  # 64 codes of 8 bits, a scale and a bias
    assert untied.num_bytes - tied.num_bytes == 257 * row
    assert untied.bytes_per_token - tied.bytes_per_token == row


def test_menus_on_one_model(tmp_path: Path) -> None:
    modules = tiny_modules(tmp_path, "qwen3_moe")
    found = {size.menu: size for size in menu_sizes(modules, rising(modules), Settings(), top_k=4)}
    # Two blocks: the first gets the highest level, the second, one sigma below the mean, the lowest.
    block = (64 * 64 + 32 * 64) * 2
    experts = 3 * 8 * 64 * 64
    outer = 2 * 257 * (64 + 4)
    others = 2 * (2 * 8 * 64 + 2 * (2 * 64 + 2 * 16) + 64)  # routers, norms
    low, high = block // 2 + block // 16, 2 * block
    assert found[4, 16].num_bytes == low + high + 2 * (experts // 4 + experts // 16) + outer + others
    assert found[4, 16].num_bytes - found[4, 8].num_bytes == high - (block + block // 16)
    assert found[4, 8, 16].num_bytes == found[4, 16].num_bytes
    per_token = low + high + (experts // 4 + experts // 16) + 258 * (64 + 4) + others
    assert found[4, 16].bytes_per_token == per_token
    weights = 2 * (block + experts) + 2 * 257 * 64 + others // 2
    assert found[4, 16].bits_per_weight == 8 * found[4, 16].num_bytes / weights


def test_no_trunk_at_all() -> None:
    modules = [ModuleInfo("e", "expert", 0, "e", (4, 64, 64), num_experts=4)]
    plan = decide(modules, {}, Settings())
    assert (plan.recipe.bits, plan.blocks, plan.threshold) == ({"e": 2}, [], None)


# Settings.


def test_menus_are_read() -> None:
    assert [parse_menu(text) for text in ("4,16", "4, 8,16", "6")] == [(4, 16), (4, 8, 16), (6,)]


@pytest.mark.parametrize("text", ["", "4,", "four", "16,4", "4,4", "7", "2,3,4,5", "4;16", "-4", "²", "4,32"])
def test_menus_that_are_none(text: str) -> None:
    with pytest.raises(ConfigError, match="trunk"):
        parse_menu(text)


@pytest.mark.parametrize(
    "change",
    [
        {"experts_bits": 7}, {"group_size": 16}, {"trunk": ()}, {"ewq_x": -1}, {"ewq_x": float("nan")},
        {"effort": "more"}, {"ewq": "other"}, {"num_windows": 0}, {"threads": -1},
        {"target_bytes": 1, "fit_bytes": 1}, {"target_bytes": 0}, {"fit_bytes": -5},
    ],
)  # fmt: skip
def test_settings_that_cannot_be(change: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        Settings(**change)
