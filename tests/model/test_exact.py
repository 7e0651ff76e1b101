"""Promise 1: splitting never changes a bit, for every family, share, chunking and number of ranks; with native kernels
not even the chunking does, nor the number of threads, of which the ranks here have unlike ones."""

from pathlib import Path

import pytest

from tests.ranks import run_ranks
from tests.tiny import make_tiny

FAMILIES = ("qwen3_moe", "mixtral", "deepseek_v3", "glm4_moe", "gpt_oss", "minimax", "qwen3_next")
JOBS = Path(__file__).with_name("exact_jobs.py")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Each family in float32, and quantized to 2-bit experts from bfloat16; the demo model quantized and not."""
    from expertd.checkpoint.locate import find_checkpoint
    from expertd.quant.convert import quantize_checkpoint
    from expertd.quant.settings import Settings

    root, made = tmp_path_factory.mktemp("tiny"), []
    for family in FAMILIES:
        full = make_tiny(root / f"{family}-f32", family)
        half = make_tiny(root / f"{family}-bf16", family, dtype="bfloat16")
        quantize_checkpoint(
            half, root / f"{family}-2bit", Settings(effort="plain", group_size=32, trunk=(4,))
        )
        made += [full, root / f"{family}-2bit"]
    demo = find_checkpoint("demo")
    quantize_checkpoint(demo, root / "demo-2bit", Settings(effort="fast"))
    return [str(folder) for folder in [*made, demo, root / "demo-2bit"]]


@pytest.fixture(scope="module")
def solo(checkpoints: list[str]) -> dict[str, dict[str, str]]:
    return run_ranks(JOBS, "run", 1, {"checkpoints": checkpoints})[0]


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_split_gives_the_bits_of_one_rank(
    checkpoints: list[str], solo: dict[str, dict[str, str]], num_ranks: int
) -> None:
    ranks = run_ranks(JOBS, "run", num_ranks, {"checkpoints": checkpoints})
    check(ranks, solo)


def test_split_gives_the_bits_of_one_rank_by_mlx_kernels(checkpoints: list[str]) -> None:
    """One family in float32 and one with 2-bit experts: MLX's kernels are slow."""
    chosen = [c for c in checkpoints if Path(c).name == "glm4_moe-2bit" or "qwen3_moe-f32" in c]
    assert len(chosen) == 2
    args = {"checkpoints": chosen, "kernels": "mlx"}
    check(run_ranks(JOBS, "run", 2, dict(args)), run_ranks(JOBS, "run", 1, dict(args))[0])


def test_chunks_change_no_bit(solo: dict[str, dict[str, str]]) -> None:
    """But in two families: deepseek_v3 takes other products for a single token, and the cache of gpt_oss's sliding
    windows keeps the keys of single tokens in another order."""
    for folder, digests in solo.items():
        if not any(family in folder for family in ("deepseek_v3", "gpt_oss")):
            assert len(digests) == 2 and len(set(digests.values())) == 1, Path(folder).name


def check(ranks: list[dict[str, dict[str, str]]], solo: dict[str, dict[str, str]]) -> None:
    """All ranks have the digests of one."""
    assert all(rank == ranks[0] for rank in ranks)
    for folder, digests in ranks[0].items():
        assert {d.split(" ")[0] for d in digests} == {"solo", "experts", "tokens"}
        for case, digest in digests.items():
            chunks = "one chunk" if case.endswith("one chunk") else "several"
            assert digest == solo[folder][f"solo (1.0,) {chunks}"], f"{Path(folder).name}: {case}"
