"""Any split may follow any other, in any step, with any streams: the answers are those of one rank, to the last bit."""

from pathlib import Path

import pytest

from tests.ranks import run_ranks
from tests.tiny import make_tiny

JOBS = Path(__file__).with_name("wild_jobs.py")
FAMILIES = ("qwen3_moe", "mixtral", "deepseek_v3", "glm4_moe", "gpt_oss", "minimax", "qwen3_next")
UNLIKE = ("deepseek_v3", "gpt_oss")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    root = tmp_path_factory.mktemp("tiny")
    narrow = make_tiny(root / "kv8", "qwen3_moe_heads_of_32")  # keys and values at 8 bits
    return [*(str(make_tiny(root / family, family)) for family in FAMILIES), str(narrow)]


@pytest.mark.parametrize("kernels", ["native", "mlx"])
def test_splits_may_change_with_every_step(checkpoints: list[str], kernels: str) -> None:
    """MLX's kernels with the families that they compute in another way one by one."""
    chosen = checkpoints if kernels == "native" else [c for c in checkpoints if Path(c).name in UNLIKE]
    args = {"checkpoints": chosen, "kernels": kernels}
    (alone,) = run_ranks(JOBS, "serve", 1, {**args, "seed": 0})
    assert len(alone) == len(chosen) > 1
    for num_ranks, seed in ((2, 3), (3, 3)) if kernels == "native" else ((3, 3),):
        together = run_ranks(JOBS, "serve", num_ranks, {**args, "seed": seed})[0]
        for family, answers in together.items():
            assert answers == alone[family], (family, num_ranks)
