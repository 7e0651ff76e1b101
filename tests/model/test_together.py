"""Sequences that decode in one step: each gets the logits that it gets alone, to the last bit, in every family."""

from pathlib import Path

import mlx.core as mx
import pytest

from expertd.checkpoint.inspect import check_checkpoint
from expertd.config import ACTIVATION_BITS
from expertd.model.kernels import open_kernels
from expertd.model.model import Cache, Model
from expertd.model.together import Padded, Together
from expertd.split.cut import StepSplit
from tests.tiny import FAMILIES, make_tiny

SOLO = StepSplit("solo", (1.0,))
PROMPTS = ([1, 2, 3, 4, 5], [7], [9, 8, 7, 6, 5, 4, 3, 2, 1, 11, 12, 13])
NUM_STEPS = 12


def load(folder: Path, kernels: str = "native") -> Model:
    info = check_checkpoint(folder)
    return Model(info.folder, info.config, kernels=open_kernels(kernels, ACTIVATION_BITS, num_threads=2))


def filled(model: Model, prompt: list[int]) -> Cache:
    cache = model.new_cache()
    model.prefill(prompt, cache, SOLO)
    return cache


def token(step: int, sequence: int) -> int:
    return (7 * step + 13 * sequence) % 250


@pytest.mark.parametrize("kernels", ["native", "mlx"])
@pytest.mark.parametrize("family", FAMILIES)
def test_together_is_as_alone(family: str, kernels: str, tmp_path: Path) -> None:
    """The second sequence joins late, the first leaves early."""
    model = load(make_tiny(tmp_path / family, family), kernels)
    assert model._together is (Padded if family.startswith("deepseek") else Together)
    caches = [filled(model, prompt) for prompt in PROMPTS]
    found: dict[int, list[list[float]]] = {0: [], 1: [], 2: []}
    for step in range(NUM_STEPS):
        there = [i for i in range(3) if not (i == 1 and step < 4) and not (i == 0 and step >= 8)]
        logits = model.decode([token(step, i) for i in there], [caches[i] for i in there], SOLO)
        for i, row in zip(there, logits.tolist(), strict=True):
            found[i].append(row)
    for i, prompt in enumerate(PROMPTS):
        steps = range(4, NUM_STEPS) if i == 1 else range(8) if i == 0 else range(NUM_STEPS)
        cache = filled(model, prompt)
        alone = [model.decode([token(step, i)], [cache], SOLO)[0].tolist() for step in steps]
        assert found[i] == alone, f"sequence {i}"
        assert len({tuple(row) for row in alone}) == len(alone)


def test_a_family_that_cannot_decodes_one_after_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*args: object) -> None:
        raise TypeError("no such cache\nand more")

    folder = make_tiny(tmp_path / "tiny", "mixtral")
    monkeypatch.setattr(Together, "update_and_fetch", refuse)
    monkeypatch.setattr(Padded, "make_mask", lambda *_, **__: mx.zeros((2, 1, 1, 4), dtype=mx.bool_))
    model = load(folder)
    assert model._together is None
    assert "one sequence after the other (TypeError: no such cache; " in caplog.text
    caches = [filled(model, prompt) for prompt in PROMPTS]
    assert model.decode([1, 2, 3], caches, SOLO).shape == (3, 257)
