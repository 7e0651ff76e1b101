"""Calibrated rounding: the pass over a model is the model's own forward pass, for every family."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.models.switch_layers import SwitchGLU, SwitchMLP

from expertd.checkpoint.inspect import check_checkpoint
from expertd.errors import ConfigError
from expertd.model.classes import PROJECTIONS, MoeBlock, build_model, layers_of
from expertd.quant import calibrate as calibrate_module
from expertd.quant import codes, hessian
from expertd.quant.calibrate import calibrate
from expertd.quant.experts import Experts, Recorder
from expertd.quant.modules import describe_modules
from expertd.quant.rounding import Rounded, round_module
from tests.model.test_exact import FAMILIES
from tests.tiny import make_tiny

Arrays = dict[str, mx.array]
WINDOWS = np.random.RandomState(0).randint(0, 250, (6, 24)).astype(np.int32)


class Weights:
    """A tiny checkpoint's weights by the model's names; each can be taken once."""

    def __init__(self, folder: Path) -> None:
        self.config = check_checkpoint(folder).config
        model = build_model(self.config)
        loaded = mx.load(str(folder / "model.safetensors"))
        self._left: Arrays = model.sanitize(loaded) if hasattr(model, "sanitize") else loaded
        self.names = tuple(name for name, _ in tree_flatten(model.parameters()))
        self.num_parameters = sum(array.size for array in self._left.values())
        self.most_taken = 0

    def take(self, names: Any) -> Arrays:
        taken = {name: self._left.pop(name) for name in names}
        self.most_taken = max(self.most_taken, sum(array.size for array in taken.values()))
        return taken


@dataclass
class Recipe:
    bits: dict[str, int]
    group_sizes: dict[str, int]


@dataclass
class Emitted:
    """What came out; `stop_after` units have come, the next one fails, as a killed run does."""

    stop_after: int | None = None
    arrays: dict[str, Arrays] = field(default_factory=dict)
    notes: dict[str, dict[str, Any]] = field(default_factory=dict)

    def __call__(self, unit: str, arrays: Arrays, note: dict[str, Any]) -> None:
        if len(self.arrays) == self.stop_after:
            raise KeyboardInterrupt
        assert unit not in self.arrays, "a unit was emitted twice"
        self.arrays[unit], self.notes[unit] = arrays, note

    def dequantized(self) -> Arrays:
        return {unit: dequantized(unit, arrays) for unit, arrays in self.arrays.items()}

    def digest(self) -> dict[str, bytes]:
        """The bytes of every tensor."""
        both = {name: array for arrays in self.arrays.values() for name, array in arrays.items()}
        return {name: np.array(mx.view(array, mx.uint8)).tobytes() for name, array in both.items()}


def dequantized(unit: str, arrays: Arrays, group_size: int = 32) -> mx.array:
    if len(arrays) == 1:
        return arrays[unit].astype(mx.float32)
    weight, scales, biases = (arrays[unit.removesuffix("weight") + s] for s in ("weight", "scales", "biases"))
    bits = 32 * weight.shape[-1] // (scales.shape[-1] * group_size)
    return Rounded(weight, scales, biases, bits, group_size).dequantized()


def recipe_of(weights: Weights, trunk_bits: int | None = None, expert_bits: int | None = 2) -> Recipe:
    kinds = {"expert": expert_bits, "trunk": trunk_bits}
    modules = describe_modules(build_model(weights.config))
    bits = {m.path: b for m in modules if (b := kinds.get(m.kind)) and m.shape[-1] % 32 == 0}
    return Recipe(bits, dict.fromkeys(bits, 32))


def run(
    folder: Path,
    state: Path,
    recipe: Callable[[Weights], Recipe] = recipe_of,
    emitted: Emitted | None = None,
    windows: np.ndarray = WINDOWS,
) -> Emitted:
    weights, out = Weights(folder), emitted or Emitted()
    state.mkdir(exist_ok=True)
    calibrate(
        build_model(weights.config), weights, recipe(weights), windows, 2, state, out.arrays.__contains__, out
    )
    return out


def hidden(folder: Path, arrays: Arrays) -> mx.array:
    """What stock mlx-lm gives after its last norm, with these weights."""
    model = build_model(check_checkpoint(folder).config)
    model.update(tree_unflatten(list(arrays.items())))
    states: mx.array = model.model(mx.array(WINDOWS))
    return states


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    root, made = tmp_path_factory.mktemp("tiny"), {}

    def make(family: str, dtype: str = "float32") -> Path:
        if (family, dtype) not in made:
            made[family, dtype] = make_tiny(root / f"{family}-{dtype}", family, dtype)
        return made[family, dtype]

    return make


@pytest.mark.parametrize("family", FAMILIES)
def test_pass_is_the_models_own(family: str, tiny: Callable[..., Path], tmp_path: Path) -> None:
    """Every parameter comes out once, and the last layer's output is that of mlx-lm with what came out."""
    folder = tiny(family)
    out = run(folder, tmp_path / "state", lambda weights: recipe_of(weights, trunk_bits=4))
    weights = Weights(folder)
    assert sorted(out.arrays) == sorted(weights.names)
    full = weights.take(weights.names)
    for unit, array in out.dequantized().items():
        assert array.shape == full[unit].shape
    assert {len(a) for u, a in out.arrays.items() if "switch" in u and u.endswith(".weight")} <= {3}
    (path,) = (tmp_path / "state").glob("layer-*.safetensors")
    state = mx.load(str(path))["leaf."]
    model = build_model(weights.config)
    model.update(tree_unflatten(list(out.dequantized().items())))
    # Float32 in another order of summation, and routers that choose by it.
    assert mx.abs(model.model.norm(state) - model.model(mx.array(WINDOWS))).max().item() < 2e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_probing_finds_the_routing_weights(family: str, tiny: Callable[..., Path]) -> None:
    weights = Weights(tiny(family))
    model = build_model(weights.config)
    model.update(tree_unflatten(list(weights.take(weights.names).items())))
    block = next(block for layer in layers_of(model) for block in layer.blocks)
    x = mx.random.normal((2, 5, 64), key=mx.random.key(1))
    answers: list[Any] = []
    calibrate_module.become(block.switch, calibrate_module._HookedSwitch)
    recorder = Recorder()
    block.switch._answer = recorder.switch
    zero = recorder.block(block.module, x)
    asked = recorder.result()
    y = mx.random.normal((*zero.shape[:-1], asked.ids.shape[-1], 64), key=mx.random.key(2))
    block.switch._answer = lambda x, ids: answers.append(ids) or y
    expected = (y * mx.array(asked.scores).reshape(*y.shape[:-1], 1)).sum(-2)
    assert mx.abs(block.module(x) - zero - expected).max().item() < 1e-4
    assert (np.array(answers[0]).reshape(asked.ids.shape) == asked.ids).all()
    assert asked.scores.max() > 0.05 and asked.scores.std() > 0


def test_no_weighted_sum_gives_equal_weights() -> None:
    recorder = Recorder()
    x, ids = mx.random.normal((3, 8), key=mx.random.key(0)), mx.array([[0, 1], [1, 2], [2, 0]])
    recorder.block(lambda x: mx.tanh(recorder.switch(x, ids).sum(-2)), x)
    assert (recorder.result().scores == 1).all()


@pytest.mark.parametrize("kind", [SwitchGLU, SwitchMLP])
@pytest.mark.parametrize("bias", [False, True])
def test_experts_give_what_the_switch_gives(kind: type, bias: bool) -> None:
    mx.random.seed(3)
    switch = kind(32, 64, 5, bias=bias)
    block = MoeBlock("mlp", switch, switch, *PROJECTIONS[kind])
    names = (*block.inputs, block.output)
    for name in names:
        if bias:
            switch[name].bias = mx.random.normal(switch[name].bias.shape)
    experts = Experts(
        block,
        {name: switch[name].weight for name in names},
        {name: switch[name].bias for name in names if bias},
    )
    for rows in (1, 40):  # from 64 pairs on the switch sorts
        x, ids = mx.random.normal((rows, 2, 32)), mx.random.randint(0, 4, (rows, 2, 3))
        assert mx.abs(experts(x, ids) - switch(x, ids)).max().item() < 1e-5


def test_errors_are_smaller_than_plain_roundings(tiny: Callable[..., Path], tmp_path: Path) -> None:
    folder = tiny("qwen3_moe", "bfloat16")
    weights = Weights(folder)
    full = {name: array.astype(mx.float32) for name, array in weights.take(weights.names).items()}
    recipe, plain, want = recipe_of(weights), dict(full), hidden(folder, full)
    for path, bits in recipe.bits.items():
        plain[f"{path}.weight"] = round_module(full[f"{path}.weight"], bits, 32, "plain", 1).dequantized()
    out = run(folder, tmp_path / "state")

    def error(arrays: Arrays) -> float:
        return float(((hidden(folder, arrays) - want) ** 2).sum().item())

    assert error(out.dequantized()) < 0.6 * error(plain)
    note = out.notes["model.layers.1.mlp.switch_mlp.down_proj.weight"]
    assert 0 < note["error_mean"] <= note["error_max"] < 0.3
    assert 0 < note["tokens_min"] <= note["tokens_median"] <= WINDOWS.size and note["seconds"] > 0
    scales = out.arrays["model.layers.1.mlp.switch_mlp.down_proj.weight"]
    assert scales["model.layers.1.mlp.switch_mlp.down_proj.scales"].dtype == mx.bfloat16


@pytest.mark.parametrize("family", ["deepseek_v3", "gpt_oss"])
def test_killed_run_goes_on_with_the_same_bytes(
    family: str, tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny(family, "bfloat16")
    whole = run(folder, tmp_path / "whole", lambda w: recipe_of(w, trunk_bits=4))
    state, out = tmp_path / "state", Emitted()
    num_units, calls = len(whole.arrays), []
    calibrated = codes.calibrated
    monkeypatch.setattr(codes, "calibrated", lambda *a, **k: calls.append(1) or calibrated(*a, **k))
    for stop_after in (3, num_units // 2, num_units - 3, num_units - 1):
        out.stop_after = stop_after
        with pytest.raises(KeyboardInterrupt):
            run(folder, state, lambda w: recipe_of(w, trunk_bits=4), out)
        assert len(out.arrays) == stop_after
    calls.clear()
    out.stop_after = None
    run(folder, state, lambda w: recipe_of(w, trunk_bits=4), out)
    assert len(calls) <= 2 * 8, "layers that were finished have been rounded again"
    assert out.digest() == whole.digest()


def test_state_ahead_of_the_units_is_not_used(tiny: Callable[..., Path], tmp_path: Path) -> None:
    whole = run(tiny("mixtral"), tmp_path / "state")
    again = run(tiny("mixtral"), tmp_path / "state", emitted=Emitted())
    assert again.digest() == whole.digest()


def test_experts_without_tokens(tiny: Callable[..., Path], tmp_path: Path) -> None:
    out = run(tiny("mixtral"), tmp_path / "state", windows=WINDOWS[:1, :2])
    assert min(note["tokens_min"] for note in out.notes.values() if note) == 0
    assert all(mx.isfinite(array).all().item() for array in out.dequantized().values())


def test_kept_experts_come_out_as_they_are(tiny: Callable[..., Path], tmp_path: Path) -> None:
    folder = tiny("gpt_oss", "bfloat16")
    out = run(folder, tmp_path / "state", lambda w: recipe_of(w, expert_bits=None))
    weights = Weights(folder)
    for name, array in weights.take(weights.names).items():
        assert (out.arrays[name][name] == array).all().item() and len(out.arrays[name]) == 1


def test_one_layers_experts_at_a_time(tiny: Callable[..., Path], tmp_path: Path) -> None:
    weights = Weights(tiny("qwen3_moe"))
    calibrate(
        build_model(weights.config),
        weights,
        recipe_of(weights),
        WINDOWS,
        1,
        tmp_path,
        lambda _: False,
        Emitted(),
    )
    assert weights.most_taken == 3 * 8 * 64 * 64


def test_progress_counts_every_weight(tiny: Callable[..., Path], tmp_path: Path) -> None:
    weights, seen = Weights(tiny("gpt_oss")), []
    calibrate(
        build_model(weights.config), weights, recipe_of(weights), WINDOWS, 1, tmp_path, lambda _: False, Emitted(),
        lambda done, total, what: seen.append((done, total, what)),
    )  # fmt: skip
    assert [done for done, _, _ in seen] == sorted(done for done, _, _ in seen)
    assert seen[-1][:2] == (weights.num_parameters, weights.num_parameters)
    assert any("expert 7" in what for _, _, what in seen)


def test_model_without_layers_is_refused(tmp_path: Path) -> None:
    class Bare(nn.Module):
        pass

    weights: Any = type("Weights", (), {"names": (), "num_parameters": 0})()
    with pytest.raises(ConfigError, match="Use --effort fast"):
        calibrate(Bare(), weights, Recipe({}, {}), WINDOWS, 1, tmp_path, lambda _: False, Emitted())


# Hessians.


def test_gram_is_the_weighted_sum_of_squares() -> None:
    random = np.random.RandomState(0)
    rows, importance = random.randn(100, 8).astype(np.float32), random.rand(100).astype(np.float32)
    want = np.einsum("n,ni,nj->ij", importance.astype(np.float64) ** 2, rows, rows)
    found = hessian.gram(mx.array(rows), mx.array(importance))
    assert np.allclose(found, want, atol=1e-4)
    assert not hessian.gram(mx.zeros((0, 8)), mx.zeros((0,))).any()


def test_few_tokens_lean_on_the_layer() -> None:
    random = np.random.RandomState(0)
    mean = np.cov(random.randn(8, 200)).astype(np.float32)
    rows = random.randn(5000, 8).astype(np.float32) * np.arange(1, 9, dtype=np.float32)
    many = hessian.shrunk(rows.T @ rows, 5000, mean)
    own = rows.T @ rows / 5000
    assert np.allclose(many / many.trace(), own / own.trace(), atol=0.03)
    few = hessian.shrunk(rows[:1].T @ rows[:1], 1, mean)
    off = ~np.eye(8, dtype=bool)
    assert np.allclose(
        few[off] / few.trace(), (256 * mean / (256 * mean + np.diag(rows[0] ** 2)).trace())[off]
    )
    assert np.allclose([many.trace(), few.trace()], 8, rtol=1e-5)
    assert (hessian.shrunk(np.zeros((4, 4), np.float32), 0, np.zeros((4, 4), np.float32)) == np.eye(4)).all()
