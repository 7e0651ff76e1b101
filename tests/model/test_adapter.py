"""The adapter on one rank: the stock model's own bits, the splits of a family, and one-line refusals."""

from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.models.switch_layers import SwitchGLU, SwitchMLP
from mlx_lm.utils import load_model

from expertd.checkpoint.config import normalise_config, read_config
from expertd.errors import CheckpointError, ConfigError
from expertd.model.adapter import StepState, divide
from expertd.model.model import Model
from expertd.split.cut import StepSplit
from tests.tiny import make_tiny

SOLO = StepSplit("solo", (1.0,))
PROMPT = [(5 * i * i + 11) % 250 for i in range(40)]  # with top-k beyond SwitchGLU's sort threshold


def load(folder: Path) -> Model:
    return Model(folder, normalise_config(read_config(folder)))


def same_bits(a: mx.array, b: mx.array) -> bool:
    return a.dtype == b.dtype and bool(mx.array_equal(a, b).item())


@pytest.mark.parametrize(
    "family", ["qwen3_moe", "mixtral", "deepseek_v3", "glm4_moe", "minimax", "qwen3_next"]
)
def test_solo_has_the_bits_of_stock_mlx_lm(family: str, tmp_path: Path) -> None:
    folder = make_tiny(tmp_path, family, dtype="float32")
    stock, _ = load_model(folder)
    ours = load(folder)
    stock_cache, our_cache = make_prompt_cache(stock), ours.new_cache()
    start = 0
    for size in (30, 1, 9):
        chunk = PROMPT[start : start + size]
        start += size
        expected = stock(mx.array([chunk]), cache=stock_cache)[0]
        assert same_bits(ours.forward(chunk, our_cache, SOLO), expected), f"chunk of {size}"
    assert same_bits(ours.decode([7], [our_cache], SOLO)[0], stock(mx.array([[7]]), cache=stock_cache)[0, 0])


def test_prefill_leaves_the_cache_of_forward(tmp_path: Path) -> None:
    model = load(make_tiny(tmp_path, "qwen3_moe"))
    caches = model.new_cache(), model.new_cache()
    model.prefill(PROMPT, caches[0], SOLO)
    mx.eval(model.forward(PROMPT, caches[1], SOLO))
    rows = [model.decode([3], [cache], SOLO)[0] for cache in caches]
    assert same_bits(rows[0], rows[1])


def test_bfloat16_weights_give_bfloat16_logits_and_float32_rows(tmp_path: Path) -> None:
    model = load(make_tiny(tmp_path, "qwen3_moe", dtype="bfloat16"))
    cache = model.new_cache()
    assert model.forward(PROMPT, cache, SOLO).dtype == mx.bfloat16
    row = model.decode([1], [cache], SOLO)[0]
    assert row.dtype == mx.float32
    assert row.shape == (257,)


def test_require_names_the_choices(tmp_path: Path) -> None:
    model = load(make_tiny(tmp_path, "qwen3_moe"))
    assert model.splits == ["solo", "experts", "tokens", "sequences"]
    for split in ("auto", *model.splits):
        model.require(split)
    model.splits = ["solo", "experts"]
    with pytest.raises(ConfigError) as error:
        model.require("tokens")
    assert str(error.value) == (
        "--split tokens: this model's family supports solo, experts. Choose one of these or `auto`."
    )


def test_damaged_weights_are_one_line(tmp_path: Path) -> None:
    folder = make_tiny(tmp_path, "qwen3_moe")
    config = normalise_config(read_config(folder)) | {"hidden_size": 32}
    with pytest.raises(CheckpointError) as error:
        Model(folder, config)
    assert "\n" not in str(error.value)
    assert str(folder) in str(error.value)


# Which splits a family offers.


class Block(nn.Module):
    """The usual block: hidden states in, hidden states out."""

    def __init__(self, switch: nn.Module) -> None:
        super().__init__()
        self.switch = switch

    def __call__(self, x: mx.array) -> mx.array:
        y: mx.array = self.switch(x, mx.zeros((*x.shape[:-1], 2), dtype=mx.uint32)).sum(-2)
        return y


class OptionalBlock(Block):
    def __call__(self, x: mx.array, mask: mx.array | None = None) -> mx.array:
        return super().__call__(x)


class RoutedBlock(Block):
    """A block whose routing comes from outside, so that rows of `x` alone make no sense."""

    def __call__(self, x: mx.array, scores: mx.array) -> mx.array:
        return super().__call__(x) * scores


class FakeModel(nn.Module):
    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.layers = list(blocks)


def divided(*blocks: nn.Module) -> list[str]:
    return divide(FakeModel(*blocks), StepState())


def test_splits_of_a_family() -> None:
    assert divided(nn.Linear(4, 4)) == ["solo"]
    assert divided(Block(SwitchGLU(4, 8, 2)), nn.Linear(4, 4)) == ["solo", "experts", "tokens"]
    assert divided(OptionalBlock(SwitchGLU(4, 8, 2))) == ["solo", "experts", "tokens"]
    assert divided(Block(SwitchMLP(4, 8, 2))) == ["solo", "experts", "tokens"]
    assert divided(RoutedBlock(SwitchGLU(4, 8, 2))) == ["solo", "experts"]
    assert divided(Block(SwitchGLU(4, 8, 2)), RoutedBlock(SwitchGLU(4, 8, 2))) == ["solo", "experts"]


def test_dividing_keeps_types_names_and_values() -> None:
    block = Block(SwitchGLU(4, 8, 2))
    model = FakeModel(block)
    names = list(_flat(model.parameters()))
    x = mx.arange(8, dtype=mx.float32).reshape(2, 4)
    before = block(x)
    divide(model, StepState())
    assert isinstance(block, Block)
    assert isinstance(block.switch, SwitchGLU)
    assert list(_flat(model.parameters())) == names
    assert same_bits(block(x), before)


def _flat(tree: Any, name: str = "") -> list[str]:
    if isinstance(tree, dict):
        return [n for key, value in tree.items() for n in _flat(value, f"{name}.{key}")]
    if isinstance(tree, list):
        return [n for i, value in enumerate(tree) for n in _flat(value, f"{name}.{i}")]
    return [name]
