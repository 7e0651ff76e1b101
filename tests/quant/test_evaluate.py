"""Perplexity, divergence and error per layer."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from expertd.errors import CheckpointError, ConfigError
from expertd.quant.convert import quantize_checkpoint
from expertd.quant.evaluate import (
    LocalReader,
    Observed,
    ReferenceRun,
    cut_windows,
    evaluate,
)
from expertd.quant.metrics import Agreement, Comparison, RelativeError, TextScore
from expertd.quant.settings import Settings
from tests.tiny import make_tiny

RANDOM = np.random.RandomState(3)
WINDOWS = RANDOM.randint(0, 250, (11, 18)).astype(np.int32)


class Letters:
    """A tokenizer that gives a token for every letter."""

    def encode(self, text: str) -> list[int]:
        return [ord(letter) for letter in text]


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(make_tiny(tmp_path_factory.mktemp("evaluate") / "full", "deepseek_v3", dtype="bfloat16"))


@pytest.fixture(scope="module")
def small(full: Path) -> Path:
    return quantize_checkpoint(
        full, full.with_name("small"), Settings(effort="plain", group_size=32, trunk=(4,))
    ).folder


# Metrics.


def logits(*shape: int, scale: float = 2.0) -> np.ndarray[Any, np.dtype[np.float32]]:
    return (RANDOM.standard_normal(shape) * scale).astype(np.float32)


def test_divergence_is_that_of_the_definition() -> None:
    comparison, wanted, reference = Comparison(), [], [logits(70, 9), logits(70, 9)]
    for before in reference:
        after, targets = before + logits(70, 9, scale=0.3), RANDOM.randint(0, 9, 70)
        comparison.add(before, after, targets)
        for a, b, target in zip(before.astype(float), after.astype(float), targets, strict=True):
            p, q = np.exp(a) / np.exp(a).sum(), np.exp(b) / np.exp(b).sum()
            kl = sum(x * math.log(x / y) for x, y in zip(p, q, strict=True))
            wanted.append((kl, p.argmax() == q.argmax(), -math.log(p[target]), -math.log(q[target])))
    kl, same, surprise_before, surprise = np.array(wanted).T
    found = comparison.divergence()
    assert comparison.num_tokens == 140
    assert found.mean_kl == pytest.approx(kl.mean(), rel=1e-12)
    assert found.kl_error == pytest.approx(abs(kl[:70].mean() - kl[70:].mean()) / 2, rel=1e-9)
    assert (found.median_kl, found.p95_kl, found.p99_kl) == pytest.approx(np.quantile(kl, (0.5, 0.95, 0.99)))
    assert found.top1_agreement == pytest.approx(same.mean())
    assert comparison.perplexity == pytest.approx(math.exp(surprise.mean()))
    assert found.reference_perplexity == pytest.approx(math.exp(surprise_before.mean()))
    assert found.ppl_ratio == pytest.approx(math.exp((surprise - surprise_before).mean()))
    assert 0 < found.ppl_ratio_error < 1


def test_no_digit_depends_on_the_pieces() -> None:
    """One window or the same tokens as two: the slices are cut elsewhere."""
    before, after, targets = logits(200, 33), logits(200, 33), RANDOM.randint(0, 33, 200)
    whole, parts = Comparison(), Comparison()
    whole.add(before, after, targets)
    parts.add(before[:90], after[:90], targets[:90])
    parts.add(before[90:], after[90:], targets[90:])
    assert whole.divergence().mean_kl == parts.divergence().mean_kl
    assert whole.divergence().ppl_ratio == parts.divergence().ppl_ratio
    assert whole.perplexity == parts.perplexity


def test_large_logits_do_not_overflow() -> None:
    comparison, score = Comparison(), TextScore()
    values = logits(4, 5, scale=1000.0)
    comparison.add(values, values, np.zeros(4, int))
    score.add(values, np.zeros(4, int))
    assert comparison.divergence().mean_kl == 0
    assert math.isfinite(math.log(score.perplexity))


def test_logits_that_are_not_finite_are_refused() -> None:
    broken = logits(4, 5)
    broken[2, 3] = np.nan
    with pytest.raises(CheckpointError, match="not finite"):
        TextScore().add(broken, np.zeros(4, int))


def test_error_and_agreement() -> None:
    error, agreement = RelativeError(), Agreement()
    error.add(np.array([3.0, 0.0]), np.array([0.0, 0.0]))
    error.add(np.array([1.0, 1.0]), np.array([5.0, 1.0]))
    assert error.value == pytest.approx(5 / math.sqrt(26))
    agreement.add(np.array([[1, 2], [3, 4], [5, 6]]), np.array([[2, 1], [3, 5], [6, 5]]))
    assert agreement.value == pytest.approx(2 / 3)


# Windows.


def test_windows_reach_from_the_first_token_to_the_last() -> None:
    text = "".join(map(chr, range(100)))
    windows = cut_windows(text, Letters(), num_windows=4, window_tokens=9)  # type: ignore[arg-type]
    assert windows.tolist() == [list(range(start, start + 10)) for start in (0, 30, 60, 90)]
    tight = cut_windows(text, Letters(), num_windows=10, window_tokens=9)  # type: ignore[arg-type]
    assert tight.flatten().tolist() == list(range(100))


@pytest.mark.parametrize("num_windows, window_tokens", [(11, 9), (1, 100), (0, 5), (3, 0)])
def test_windows_that_cannot_be_cut_are_refused(num_windows: int, window_tokens: int) -> None:
    with pytest.raises(ConfigError):
        cut_windows("x" * 100, Letters(), num_windows, window_tokens)  # type: ignore[arg-type]


# Checkpoints.


def test_a_checkpoint_beside_itself(full: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    with ReferenceRun(LocalReader(full), WINDOWS, tmp_path) as reference:
        assert len(list(tmp_path.iterdir())) == 1
        quality = evaluate(full, WINDOWS, reference, progress=lambda *p: seen.append(p))
    assert list(tmp_path.iterdir()) == []
    assert seen == [(8, 11), (11, 11)]
    divergence = quality.divergence
    assert divergence is not None
    assert (divergence.mean_kl, divergence.p99_kl, divergence.top1_agreement) == (0, 0, 1)
    assert (divergence.ppl_ratio, divergence.ppl_ratio_error) == (1, 0)
    assert [layer.relative_error for layer in quality.layers] == [0, 0, 0]
    assert [layer.router_agreement for layer in quality.layers] == [None, 1, 1]  # the first layer is dense
    assert quality.num_tokens == 11 * 17
    assert quality.kernels == "float32"


def test_a_rounded_checkpoint_beside_its_source(full: Path, small: Path) -> None:
    with ReferenceRun(LocalReader(full), WINDOWS) as reference:
        quality, again = (evaluate(small, WINDOWS, reference) for _ in range(2))
    divergence = quality.divergence
    assert divergence is not None
    assert divergence == again.divergence
    assert quality.layers == again.layers
    assert 0 < divergence.median_kl < divergence.p95_kl < divergence.p99_kl
    assert 0 < divergence.top1_agreement < 1
    assert all(0 < (layer.relative_error or 0) < 1 for layer in quality.layers)
    assert 0 < (quality.layers[1].router_agreement or 0) < 1
    stated = evaluate(small, WINDOWS)
    assert stated.divergence is None
    assert stated.perplexity == quality.perplexity
    assert stated.num_parameters == evaluate(full, WINDOWS[:1]).num_parameters


def test_bits_per_weight(full: Path, small: Path) -> None:
    whole, rounded = evaluate(full, WINDOWS[:1]), evaluate(small, WINDOWS[:1])
    assert whole.bits_per_weight == pytest.approx(16, abs=0.1)
    assert [round(layer.bits_per_weight) for layer in whole.layers] == [16, 16, 16]
    assert rounded.layers[0].bits_per_weight > rounded.layers[1].bits_per_weight > 3
    assert sum(layer.num_bytes for layer in rounded.layers) < rounded.num_bytes


def test_a_reference_of_another_kind_is_refused(small: Path, tmp_path: Path) -> None:
    other = Path(make_tiny(tmp_path / "other", "mixtral"))
    with (
        ReferenceRun(LocalReader(other), WINDOWS) as reference,
        pytest.raises(ConfigError, match="--reference"),
    ):
        evaluate(small, WINDOWS, reference)


def test_other_windows_than_the_reference_read_are_refused(full: Path) -> None:
    with ReferenceRun(LocalReader(full), WINDOWS) as reference, pytest.raises(ConfigError, match="windows"):
        evaluate(full, WINDOWS[:, 1:], reference)


def test_a_reader_that_fails_leaves_no_files(tmp_path: Path) -> None:
    class Broken:
        def observe(self, tokens: Any) -> Observed:
            raise CheckpointError("no")

    with pytest.raises(CheckpointError):
        ReferenceRun(Broken(), WINDOWS, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_without_room_is_refused(full: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Full:
        free = 1000

    monkeypatch.setattr("expertd.quant.evaluate.shutil.disk_usage", lambda _: Full)
    with pytest.raises(ConfigError, match="disk has"):
        ReferenceRun(LocalReader(full), WINDOWS, tmp_path)
    assert list(tmp_path.iterdir()) == []
