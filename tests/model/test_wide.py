"""A model as evaluation loads it: float32, and on a CPU its products in tiles of NumPy's BLAS."""

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from expertd.checkpoint.config import normalise_config, read_config
from expertd.model.model import Model
from expertd.model.tiles import multiply, multiply_experts
from expertd.quant.convert import quantize_checkpoint
from expertd.quant.settings import Settings
from expertd.split.cut import StepSplit
from tests.ranks import run_ranks
from tests.tiny import make_tiny

FAMILIES = ("qwen3_moe", "deepseek_v3", "gpt_oss", "qwen3_next")
JOBS = Path(__file__).with_name("wide_jobs.py")
SOLO = StepSplit("solo", (1.0,))
TOKENS = mx.array(np.random.RandomState(5).randint(0, 250, (2, 33)))


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("wide")
    made = {}
    for family in FAMILIES:
        full = made[family] = Path(make_tiny(root / family, family))
        made[f"{family}-2bit"] = root / f"{family}-2bit"
        quantize_checkpoint(full, made[f"{family}-2bit"], Settings(effort="plain", group_size=32, trunk=(4,)))
    return made


def model_of(folder: Path, wide: bool) -> Model:
    return Model(folder, normalise_config(read_config(folder)), wide=wide)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["", "-2bit"])
def test_gives_what_the_stock_kernels_give(checkpoints: dict[str, Path], family: str, kind: str) -> None:
    """Both in float32 here, so that only the order of additions differs."""
    folder = checkpoints[f"{family}{kind}"]
    wide, taps = model_of(folder, wide=True).observe(TOKENS, SOLO)
    stock, others = model_of(folder, wide=False).observe(TOKENS, SOLO)
    np.testing.assert_allclose(np.array(wide), np.array(stock), atol=2e-4)
    assert taps.hidden.keys() == others.hidden.keys() == set(range(len(taps.hidden)))
    assert taps.experts.keys() == others.experts.keys() != set()
    for layer, ids in taps.experts.items():
        assert np.array_equal(np.sort(np.array(ids)), np.sort(np.array(others.experts[layer])))


def test_splits_give_the_bits_of_one_rank(checkpoints: dict[str, Path]) -> None:
    folders = [str(checkpoints[name]) for name in ("qwen3_moe", "deepseek_v3-2bit")]
    (solo,) = run_ranks(JOBS, "run", 1, {"checkpoints": folders})
    ranks = run_ranks(JOBS, "run", 2, {"checkpoints": folders})
    assert ranks[0] == ranks[1]
    for folder, digests in ranks[0].items():
        assert {d.split(" ")[0] for d in digests} == {"solo", "experts", "tokens"}
        for case, digest in digests.items():
            assert digest == solo[folder]["solo (1.0,)"], f"{Path(folder).name}: {case}"


@pytest.mark.parametrize(
    "num_experts, out, width", [(4, 64, 64), (12, 256, 256), (3, 200, 72), (5, 257, 640)]
)
def test_the_bits_of_a_row_are_its_own(num_experts: int, out: int, width: int) -> None:
    """Whatever else is multiplied beside it: the promise that the splits of an evaluation rest on."""
    random = np.random.RandomState(1)
    weight = random.standard_normal((num_experts, out, width)).astype(np.float32)
    rows = random.standard_normal((150, width)).astype(np.float32)
    ids = random.randint(0, num_experts, 150)
    whole, dense = multiply_experts(rows, weight, ids), multiply(rows, weight[0])
    for count in (1, 2, 7, 64, 149):
        some = random.permutation(150)[:count]
        assert np.array_equal(multiply_experts(rows[some], weight, ids[some]), whole[some])
        assert np.array_equal(multiply(rows[some], weight[0]), dense[some])
    wanted = np.einsum("nd,nod->no", rows.astype(np.float64), weight[ids].astype(np.float64))
    np.testing.assert_allclose(whole, wanted, atol=1e-4)
