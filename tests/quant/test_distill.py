"""Distillation: products and gradients are right, the result is closer to the teacher, and a killed run resumes."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from expertd.checkpoint.inspect import check_checkpoint
from expertd.errors import CheckpointError, ConfigError
from expertd.model.adapter import load
from expertd.model.classes import build_model
from expertd.quant.distill import Distillation, Run, check_memory, distil, divided
from expertd.quant.student import CodedExperts, attention_for_training, build
from expertd.quant.targets import Targets, divergence, log_softmax, with_rest
from tests.tiny import make_tiny

FAMILIES = ["qwen3_moe", "gpt_oss", "deepseek_v3"]
SETTINGS = Distillation(num_steps=6, batch_tokens=32, num_steps_between=2, num_warmup_steps=2)

Weights = dict[str, mx.array]


def source(folder: Path, family: str) -> tuple[dict[str, Any], Weights]:
    """A tiny model's config and its parameters in bfloat16."""
    config = check_checkpoint(make_tiny(folder, family, "bfloat16")).config
    return config, build_model(config).sanitize(dict(mx.load(str(folder / "model.safetensors"))))


def is_expert(name: str) -> bool:
    return ".switch_mlp." in name or ".experts." in name


def rounded(weights: Weights) -> Weights:
    """The experts at 2 bits and the head, where there is one, at 8."""
    result = Weights()
    for name, array in weights.items():
        path = name.removesuffix(".weight")
        bits = 2 if is_expert(name) else 8 if path == "lm_head" else 0
        if path == name or not bits:
            result[name] = array
            continue
        packed, scales, biases = mx.quantize(array, 64, bits)
        result |= {name: packed, f"{path}.scales": scales, f"{path}.biases": biases}
    return result


def windows(num: int = 8, num_tokens: int = 16) -> np.ndarray[Any, np.dtype[np.int32]]:
    return np.random.RandomState(0).randint(0, 256, (num, num_tokens)).astype(np.int32)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Weights]:
    return source(tmp_path_factory.mktemp("tiny"), "qwen3_moe")


@pytest.fixture(params=["numpy", "mlx"])
def either_library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The products as on a CPU, and as on a GPU."""
    if request.param == "mlx":
        monkeypatch.setattr("expertd.quant.student.library", lambda: mx)
        monkeypatch.setattr("expertd.quant.targets.library", lambda: mx)


@pytest.fixture(autouse=True)
def no_compiler() -> Iterator[None]:
    """On a CPU, MLX has the system's C++ compiler fuse what mlx-lm asks it to: seconds for each."""
    mx.disable_compile()
    yield
    mx.enable_compile()


# The model.


@pytest.mark.parametrize("family", FAMILIES)
def test_the_full_precision_model_answers_as_mlx_lms(tmp_path: Path, family: str) -> None:
    config = check_checkpoint(make_tiny(tmp_path, family)).config
    weights = build_model(config).sanitize(dict(mx.load(str(tmp_path / "model.safetensors"))))
    tokens = mx.array(windows(2))
    wanted = load(tmp_path, config)(tokens)
    with attention_for_training():
        found = build(config, weights)(tokens)
    assert np.abs(np.array(found - wanted)).max() < 1e-4 * np.abs(np.array(wanted)).max()
    assert weights == {}


def test_the_quantized_model_answers_as_mlx_lms(
    tiny: tuple[dict[str, Any], Weights], either_library: None
) -> None:
    config, weights = tiny
    arrays = {
        name: a.astype(mx.float32) if a.dtype == mx.bfloat16 else a for name, a in rounded(weights).items()
    }
    stock = build_model(config)
    nn_quantize(stock, arrays)
    stock.load_weights(list(arrays.items()))
    tokens = mx.array(windows(2))
    wanted, found = stock(tokens), build(config, dict(arrays))(tokens)
    assert np.abs(np.array(found - wanted)).max() < 1e-4 * np.abs(np.array(wanted)).max()


def nn_quantize(model: Any, arrays: Weights) -> None:
    import mlx.nn as nn

    def settings(path: str, module: Any) -> bool | dict[str, int]:
        return f"{path}.scales" in arrays and {"group_size": 64, "bits": 8 if path == "lm_head" else 2}

    nn.quantize(model, class_predicate=settings)


def test_a_missing_tensor_is_named(tiny: tuple[dict[str, Any], Weights]) -> None:
    config, weights = tiny
    name = "model.layers.1.mlp.switch_mlp.up_proj.weight"
    with pytest.raises(CheckpointError, match=name):
        build(config, {n: a for n, a in weights.items() if n != name})


# Gradients.


@pytest.mark.parametrize("is_sorted", [True, False])
def test_gradients_of_coded_experts_are_autodiffs(is_sorted: bool, either_library: None) -> None:
    mx.random.seed(0)
    packed, scales, biases = mx.quantize(mx.random.normal((4, 8, 64)), 32, 2)
    x = mx.random.normal((2, 5, 1, 1, 64))
    ids = mx.array(
        np.sort(np.random.RandomState(1).randint(0, 3, 20)).reshape(2, 5, 2)
    )  # expert 3 has no rows
    module = CodedExperts(packed, scales, biases, 64)

    def own(x: mx.array, scales: mx.array, biases: mx.array) -> mx.array:
        module.scales, module.biases = scales, biases
        return (module(x, ids, is_sorted) ** 3).sum()

    def plain(x: mx.array, scales: mx.array, biases: mx.array) -> mx.array:
        codes = mx.dequantize(packed, mx.ones_like(scales), mx.zeros_like(biases), 32, 2).reshape(4, 8, 2, 32)
        weight = (codes * scales[..., None] + biases[..., None]).reshape(4, 8, 64)
        return ((x @ weight[ids].swapaxes(-1, -2)) ** 3).sum()

    assert_same_gradients(own, plain, x, scales, biases)


@pytest.mark.parametrize("mask", ["causal", None])
def test_gradients_of_attention_are_autodiffs(mask: str | None) -> None:
    mx.random.seed(0)
    q, k, v = mx.random.normal((2, 4, 5, 8)), mx.random.normal((2, 2, 7, 8)), mx.random.normal((2, 2, 7, 6))

    def attend(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        y = mx.fast.scaled_dot_product_attention(q, k, v, scale=0.3, mask=mask)
        return (y**3 * mx.arange(6)).sum()

    def ours(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        with attention_for_training():
            return attend(q, k, v)

    original = mx.fast.scaled_dot_product_attention
    assert_same_gradients(ours, attend, q, k, v)
    assert mx.fast.scaled_dot_product_attention is original


def test_gradient_of_the_divergence_is_autodiffs(either_library: None) -> None:
    mx.random.seed(0)
    logits, wanted = mx.random.normal((3, 5, 11)), np.array(mx.random.normal((3, 5, 11)))

    def plain(logits: mx.array) -> mx.array:
        p, q = (x - mx.logsumexp(x, -1, keepdims=True) for x in (mx.array(wanted), logits))
        return (mx.exp(p) * (p - q)).sum(-1).mean()

    assert_same_gradients(lambda logits: divergence(logits, wanted), plain, logits)


def assert_same_gradients(
    found: Callable[..., mx.array], wanted: Callable[..., mx.array], *args: mx.array
) -> None:
    numbers = range(len(args))
    (y, found_grads), (z, wanted_grads) = (
        mx.value_and_grad(f, tuple(numbers))(*args) for f in (found, wanted)
    )
    assert abs(y.item() - z.item()) < 1e-5 * abs(z.item())
    for a, b in zip(found_grads, wanted_grads, strict=True):
        assert np.abs(np.array(a - b)).max() <= 1e-5 * np.abs(np.array(b)).max()


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_rest_of_the_vocabulary_weighs_what_it_does(temperature: float) -> None:
    mx.random.seed(0)
    logits = mx.random.normal((4, 32)) * 3
    ids = mx.argsort(-logits, -1)[:, :10]
    every = np.exp(log_softmax(np.array(logits) / temperature))
    found = np.exp(log_softmax(np.array(with_rest(logits, ids, temperature)) / temperature))
    kept = np.take_along_axis(every, np.array(ids), -1)
    assert np.abs(found[:, :10] - kept).max() < 1e-6
    assert np.abs(found[:, 10] - (1 - kept.sum(-1))).max() < 1e-6


# The training.


@pytest.mark.parametrize("family", FAMILIES)
def test_the_student_comes_closer_and_only_its_experts_change(tmp_path: Path, family: str) -> None:
    config, weights = source(tmp_path / "source", family)
    student, tokens = rounded(weights), windows(16)
    settings = replace(SETTINGS, num_steps=12, batch_tokens=128, learning_rate=0.02, valid_share=0.25)
    found = distil(config, lambda: dict(weights), dict(student), tokens, settings, tmp_path / "state")
    experts = [n.removesuffix(".weight") for n in student if is_expert(n) and n.endswith(".weight")]
    assert sorted(found) == sorted(f"{path}.{leaf}" for path in experts for leaf in ("scales", "biases"))
    for name, array in found.items():
        assert (array.dtype, array.shape) == (student[name].dtype, student[name].shape)
    before, after = (
        distance(config, arrays, weights, windows(8, 24)) for arrays in (student, {**student, **found})
    )
    assert after < 0.95 * before


def distance(config: dict[str, Any], arrays: Weights, wanted: Weights, tokens: Any) -> float:
    a, b = (build(config, dict(w))(mx.array(tokens)) for w in (arrays, wanted))
    return float(divergence(a, np.array(b)).item())


def test_the_start_is_kept_when_training_makes_it_worse(
    tmp_path: Path, tiny: tuple[dict[str, Any], Weights]
) -> None:
    config, weights = tiny
    student = rounded(weights)
    settings = replace(SETTINGS, learning_rate=5.0)
    found = distil(config, lambda: dict(weights), dict(student), windows(), settings, tmp_path)
    assert all(mx.array_equal(array, student[name]) for name, array in found.items())


class Killed(Exception):
    pass


@pytest.mark.parametrize("num_kept, when", [(300, ("KL", 5)), (64, ("full-precision model", 17))])
def test_a_run_that_was_broken_off_ends_in_the_same_bytes(
    tmp_path: Path, tiny: tuple[dict[str, Any], Weights], num_kept: int, when: tuple[str, int]
) -> None:
    config, weights = tiny
    student, tokens = rounded(weights), windows(20, 8)
    settings = replace(SETTINGS, num_kept=num_kept)

    def stop(done: int, total: int, what: str) -> None:
        if what.startswith(when[0]) and done == when[1]:
            raise Killed

    def run(state: Path, progress: Any = None, teacher: Any = lambda: dict(weights)) -> Weights:
        return distil(config, teacher, dict(student), tokens, settings, tmp_path / state, progress)

    wanted = run(Path("whole"))
    with pytest.raises(Killed):
        run(Path("broken"), stop)
    found = run(Path("broken"))
    assert found.keys() == wanted.keys()
    assert all(mx.array_equal(found[name], wanted[name]) for name in wanted)
    again = run(Path("broken"), stop, teacher=None)  # done: nothing is computed
    assert all(mx.array_equal(again[name], wanted[name]) for name in wanted)


def test_a_state_for_other_windows_is_not_used(tmp_path: Path, tiny: tuple[dict[str, Any], Weights]) -> None:
    config, weights = tiny
    results = []
    for state, seed in (("a", 0), ("a", 1), ("b", 1)):
        tokens = (windows() + seed) % 256
        found = distil(config, lambda: dict(weights), rounded(weights), tokens, SETTINGS, tmp_path / state)
        results.append(found)
    first, second, third = results
    assert all(mx.array_equal(second[name], third[name]) for name in second)
    assert any(not mx.array_equal(first[name], second[name]) for name in first)


def test_minibatches_are_a_function_of_the_step(tmp_path: Path, tiny: tuple[dict[str, Any], Weights]) -> None:
    config, weights = tiny
    tokens = windows(21)
    targets = Targets(tmp_path, tokens, 300, 1.0, "mark")
    run = Run(build(config, rounded(weights)), {}, targets, SETTINGS, tmp_path / "x", "mark")
    valid, train = divided(len(tokens), SETTINGS)
    assert sorted([*valid, *train]) == list(range(21))
    epoch = [run.batch(step) for step in range(len(train) // 2)]
    assert len(set(np.concatenate(epoch))) == 2 * len(epoch)  # every window at most once
    assert not set(np.concatenate(epoch)) & set(valid)
    assert np.array_equal(run.batch(3), epoch[3])


# What is refused.


def test_too_little_memory_is_refused_with_the_arithmetic(tiny: tuple[dict[str, Any], Weights]) -> None:
    config, weights = tiny
    student = rounded(weights)
    num_weights = sum(array.size for name, array in weights.items())
    with pytest.raises(ConfigError, match=r"distillation needs .* GB of memory, 0.0 GB are free"):
        check_memory(config, student, windows(), SETTINGS, 4 * num_weights)
    check_memory(config, student, windows(), SETTINGS, 100 * num_weights)


def test_a_single_window_is_refused(tmp_path: Path, tiny: tuple[dict[str, Any], Weights]) -> None:
    config, weights = tiny
    with pytest.raises(ConfigError, match="1 windows"):
        distil(config, lambda: dict(weights), rounded(weights), windows(1), SETTINGS, tmp_path)
