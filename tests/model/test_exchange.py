"""The exchange inside an MLX graph: its values, its refusals, and that a failed one ends nothing."""

import importlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import pytest

from expertd.errors import ConfigError
from expertd.model import exchange as module
from tests.ranks import run_ranks

JOBS = Path(__file__).with_name("exchange_jobs.py")


def test_hundred_exchanges_in_one_graph() -> None:
    ranks = run_ranks(JOBS, "chained", 3, {"num_exchanges": 100})
    rows = [rank + 1.0 for rank in range(3)]
    for _ in range(100):
        rows = [sum(rows) / 3 + rank for rank in range(3)]
    for rank in range(3):
        assert ranks[rank][0] == pytest.approx([rows[rank]] * 3, rel=1e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "uint8"])
def test_dtypes_and_a_rank_without_rows(dtype: str) -> None:
    step = 0.5 if dtype != "uint8" else None
    one = [float(r + int(i / 2) if step is None else r + i / 2) for r in (1,) for i in range(5)]
    assert run_ranks(JOBS, "of_dtype", 2, {"dtype": dtype}) == [[one], [one]]


def test_views_are_sent_in_row_order() -> None:
    squares = [mx.arange(16).reshape(4, 4) + 100 * rank for rank in range(2)]
    views = [[s.T, s[::2, ::2], s[::-1]] for s in squares]
    expected = [mx.concatenate(list(pair)).flatten().tolist() for pair in zip(*views, strict=True)]
    assert run_ranks(JOBS, "not_contiguous", 2, {}) == [expected, expected]


@pytest.mark.parametrize("divergent", [True, False])
def test_failed_exchange_gives_zeros_and_a_reason(divergent: bool) -> None:
    for rank, result in enumerate(run_ranks(JOBS, "failing", 2, {"divergent": divergent})):
        assert result["good"] == [[1, 1], [1, 1]]
        assert result["bad"] == result["after"] == [[0, 0], [0, 0]]
        assert result["kind"] == "RemoteProtocolError"
        wanted = "router chose other experts" if divergent else "wanted exchange"
        assert result["text"].startswith(f"rank {rank}, exchange ")
        assert wanted in result["text"]
        assert result["alive"] == 10


@pytest.mark.parametrize(
    "shape, num_rows",
    [
        ((2, 3), [1, 2]),  # another number of rows than announced
        ((2,), [2, 2]),
        ((2, 3, 4), [2, 2]),
        ((2, 3), [2]),  # not one count per rank
        ((2, 3), [2, 2, 2]),
        ((2, 3), [2, -1]),
    ],
)
def test_wrong_shapes_are_refused(shape: tuple[int, ...], num_rows: list[int]) -> None:
    with pytest.raises(ValueError, match="exchange"):
        module.exchange(_link(), mx.zeros(shape), num_rows, 1)


def test_ids_of_another_kind_are_refused() -> None:
    with pytest.raises(ValueError, match="uint32"):
        module.exchange(_link(), mx.zeros((1, 1)), [1, 1], 1, ids=mx.array([1, 2], dtype=mx.int32))


def _link() -> Any:
    """A link that nothing may call."""
    return SimpleNamespace(rank=0, num_ranks=2, function=0, address=0)


def test_another_mlx_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(module._graph, "built_for_mlx", "0.1.2")
        with pytest.raises(ConfigError, match=r"compiled for mlx 0\.1\.2 but mlx .* is installed\. Run `pip"):
            importlib.reload(module)
    importlib.reload(module)
