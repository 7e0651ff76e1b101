"""Expert load: what is counted is what the routers chose, and counting changes no bit."""

from collections import Counter
from pathlib import Path

import mlx.core as mx
import pytest

from expertd.checkpoint.inspect import check_checkpoint
from expertd.config import ACTIVATION_BITS
from expertd.model.kernels import open_kernels
from expertd.model.load import SAMPLE_EVERY, ExpertLoad
from expertd.model.model import Model
from expertd.split.cut import StepSplit
from tests.tiny import make_tiny

SOLO = StepSplit("solo", (1.0,))
TOKENS = [(7 * i + 3) % 250 for i in range(3 * SAMPLE_EVERY)]


def decode_all(model: Model) -> list[list[float]]:
    cache = model.new_cache()
    return [model.decode([token], [cache], SOLO)[0].tolist() for token in TOKENS]


def test_loading_tells_how_far_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("expertd.model.adapter.PIECE_BYTES", 10_000)
    info = check_checkpoint(make_tiny(tmp_path / "tiny", "mixtral"))
    told: list[tuple[int, int]] = []
    Model(info.folder, info.config, told=lambda done, total: told.append((done, total)))
    done, totals = zip(*told, strict=True)
    assert len(told) > 2 and sorted(set(done)) == list(done)
    assert set(totals) == {done[-1]}


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_the_load_is_what_the_routers_chose(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = check_checkpoint(make_tiny(tmp_path / family, family))
    model = Model(info.folder, info.config, kernels=open_kernels("native", ACTIVATION_BITS, num_threads=1))
    model.expert_load = ExpertLoad()
    plain = decode_all(model)
    sampled = dict(model.expert_load.take())
    assert {sum(chosen) for chosen in sampled.values()} == {3 * info.top_k}
    assert model.expert_load.take() == []

    monkeypatch.setattr("expertd.model.load.SAMPLE_EVERY", 1)
    assert decode_all(model) == plain
    found = dict(model.expert_load.take())
    _, taps = model.observe(mx.array([TOKENS]), SOLO)
    assert sorted(found) == sorted(taps.experts)
    # A window's rows go through the same kernels as a token's, but in other shapes: a close call may flip.
    for layer, ids in taps.experts.items():
        chosen = Counter({expert: n for expert, n in enumerate(found[layer]) if n})
        wanted = Counter(int(i) for i in ids.flatten().tolist())
        assert (chosen - wanted).total() <= 0.02 * wanted.total()
