"""The benchmark of the kernels: the roof, its cases, its figures, and what it refuses."""

import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from expertd.bench import kernels, kernels_side
from expertd.bench.kernel_calls import Mlx, error_of
from expertd.bench.kernel_cases import Case, Weights, activations, cases_of, make_calls, min_bytes, work_of
from expertd.bench.roofline import Roofline
from expertd.bench.shapes import SHAPES, Matrix, find_shape
from expertd.errors import ConfigError
from tests.bench.test_shapes import SIZES

TINY: dict[str, Any] = {"name": "tiny", "family": "", **SIZES, "vocabulary": 512}
JOB = kernels_side.Job(
    num_threads=1, cores=[], shapes=[TINY], is_quick=True, rows=[1, 512], ours_s=0.005, mlx_s=0.01,
    weight_bytes=1 << 20, roof_bytes=8 << 20, roof_repeats=1,
)  # fmt: skip
EXPERTS = Case(("tiny",), Matrix("experts gate/up", 128, 64, "experts"), 8, 2, "2 bits")


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    return kernels.measure([JOB])


def test_every_point_has_figures_beside_the_roof(report: dict[str, Any]) -> None:
    (found,) = report["runs"]
    assert found["threads"] == 1
    for unit in ("read_gb_per_s", "int8_gop_per_s", "float_gflop_per_s", "huge_pages_gb_per_s"):
        assert found["roof"][unit] == max(found["roof"]["loops"][unit].values()) > 0.01
    names = {(row["matrix"], row["format"], row["rows"]) for row in found["rows"]}
    assert {
        ("attention q/o", "4 bits", 1),
        ("experts down", "2 bits", 512),
        ("router", "bfloat16", 1),
    } <= names
    assert ("head", "4 bits", 512) not in names  # a prompt's last row alone meets it
    for row in found["rows"]:
        assert row["intensity"] == pytest.approx(row["operations"] / row["bytes"], abs=0.001)
        assert set(row["ways"]) | set(row["skipped"]) >= {"mlx"}
        for way in row["ways"].values():
            assert 0 < way["min_us"] <= way["p50_us"] <= way["max_us"] and way["samples"] >= 1
            wanted = pytest.approx(row["bytes"] / way["p50_us"] / 1e3, rel=0.01, abs=0.001)
            assert way["of_roof"] > 0 and way["gb_per_s"] == wanted
            assert ("of_bandwidth" in way) == (row["rows"] == 1)
        for name in set(row["ways"]) - {"mlx"}:
            assert row["ways"][name]["error"] < kernels_side.MAX_ERROR
    ours = "expertd.native._kernels" in report["missing"].get("native", "expertd.native._kernels")
    assert ours and json.dumps(report)


def test_the_table_and_the_picture(report: dict[str, Any], tmp_path: Path) -> None:
    text = kernels.format_report(report)
    assert "1 thread: reads " in text and "attention q/o 256x256" in text and "tiny" in text
    kernels.draw(report, tmp_path / "roof.svg")
    assert "operations per byte" in (tmp_path / "roof.svg").read_text()


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--threads 0: wanted 1 to \d+, the cores"):
        kernels.run(None, threads=[0])
    with pytest.raises(ConfigError, match="--shape qwen9: unknown"):
        kernels.run(None, shapes=["qwen9"])
    with pytest.raises(ConfigError, match="wanted a name that ends in"):
        kernels.run(None, tmp_path / "roof.jpg")


def test_wrong_results_have_no_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = kernels_side._Bench(JOB)
    bench.native = None
    row = bench._row(Weights(EXPERTS, 1), 1)
    assert "native" not in row["ways"] and row["ways"]["mlx"]["error"] < 0.2
    bench._mlx_s["2 bits"] = 1.0  # a second per operation
    assert bench._row(Weights(EXPERTS, 1), 4)["skipped"] == {"mlx": "would need 131072 s"}


def test_cases_are_distinct_and_shared_ones_name_all_models() -> None:
    cases = cases_of(SHAPES.values())
    keys = [(c.matrix, c.num_experts, c.top_k, c.format) for c in cases]
    assert len(set(keys)) == len(keys) > 80
    shared = next(c for c in cases if (c.matrix.num_out, c.matrix.width) == (8192, 4096))
    assert shared.models == ("qwen3-235b-a22b", "deepseek-v4-flash")
    quick = cases_of([find_shape("qwen3-30b-a3b")], is_quick=True)
    assert {c.format for c in quick} == {"2 bits", "4 bits", "bfloat16"} and len(quick) == 7


def test_weights_do_not_fit_the_cache() -> None:
    assert min_bytes() >= 256 << 20
    weights = Weights(EXPERTS, 100_000)
    one = 128 * 64 // 4 + 128 * 4
    assert EXPERTS.bytes_per_matrix == one and len(weights.parts) == -(-100_000 // (8 * one))
    assert sum(part.nbytes for part in weights.parts[0]) == 8 * one


def test_calls_walk_through_all_experts_and_copies() -> None:
    weights = Weights(EXPERTS, 100_000)
    calls = make_calls(weights, 1)
    seen = {(call.copy, int(e)) for call in calls for e in call.ids if call.ids is not None}  # type: ignore[union-attr]
    assert len(seen) == 8 * len(weights.parts) == 2 * len(calls)
    many = make_calls(weights, 64)
    assert all(call.ids is not None and (np.diff(call.ids.astype(int)) >= 0).all() for call in many)
    work = work_of(EXPERTS, 64, many)
    assert work["pairs"] == 128 and work["bytes"] == 8 * EXPERTS.bytes_per_matrix
    assert work["operations"] == 2 * 128 * 128 * 64
    assert work_of(EXPERTS, 1, calls)["bytes"] == 2 * EXPERTS.bytes_per_matrix


@pytest.mark.parametrize("form", ["2 bits", "4 bits", "8 bits", "bfloat16", "float32"])
@pytest.mark.parametrize("num_rows", [1, 3, 40])
def test_errors_are_those_beside_float64(form: str, num_rows: int) -> None:
    """By MLX's product in float32, which must be right in every layout of x and ids."""
    case = replace(EXPERTS, format=form)
    if not case.bits:
        case = replace(case, matrix=Matrix("router", 128, 64, "float"), num_experts=0, top_k=1)
    weights = Weights(case, 1)
    calls = make_calls(weights, num_rows)
    caller = Mlx(weights, num_rows, calls)
    if case.bits:  # its products in bfloat16 are off by percents
        weights.parts = [(codes, *(p.astype(mx.float32) for p in parts)) for codes, *parts in weights.parts]
        caller._x = caller._x.astype(mx.float32)
    limit = 0.02 if form == "bfloat16" else 1e-5
    assert error_of(caller, weights, num_rows, calls[0]) < limit
    x, per_row = activations(case, num_rows)
    assert x.shape[0] * per_row == work_of(case, num_rows, calls)["pairs"]


def test_all_take_turns_within_their_budgets() -> None:
    called: list[str] = []
    runs = {name: lambda number, name=name: called.append(name) for name in ("native", "mlx")}  # type: ignore[misc]
    times, reads = kernels_side._alternate(
        runs, {"native": 0.1, "mlx": 0.0}, 7, lambda: called.append("read") or 1.0
    )  # type: ignore[func-returns-value]
    num_rounds, num_calls = kernels_side.ROUNDS, kernels_side.MAX_CALLS // kernels_side.ROUNDS
    assert [len(calls) for calls in times["native"]] == [num_calls] * num_rounds and len(times["mlx"]) == 1
    rounds = [name for name, _ in itertools.groupby(called[3:])]  # after the first calls
    assert rounds[:4] == ["read", "native", "read", "native"] and reads == [1.0] * num_rounds


def test_figures_stand_beside_the_reading_of_their_round() -> None:
    work = {"bytes": 4_000_000, "operations": 8_000_000}
    figures = kernels_side.figures([[3e-3, 1e-3], [2e-3]], work, [])
    assert figures["p50_us"] == 2000 and figures["gb_per_s"] == 2.0 and figures["gflop_per_s"] == 4.0
    assert "of_bandwidth" not in figures
    slow_third = kernels_side.figures([[1e-3, 1e-3, 9e-3], [1e-3], [4e-3]], work, [8e9, 4e9, 2e9])
    assert slow_third["of_bandwidth"] == 0.5  # of 0.5, 1 and 0.5


def test_goal() -> None:
    def row(share: float, form: str = "2 bits") -> dict[str, Any]:
        return {"format": form, "rows": 1, "ways": {"native": {"of_bandwidth": share}}}

    found = {"rows": [row(0.5), row(0.8), row(0.9, "4 bits"), row(0.1, "8 bits")]}
    assert kernels.goal_of(found) == {"points": 3, "met": 2, "lowest": 0.5, "median": 0.8}
    assert kernels.goal_of({"rows": []}) is None


def test_roof_of_two_threads(tmp_path: Path) -> None:
    roof = Roofline(tmp_path, [], 2, 8 << 20)
    roof.measure(1)
    found = roof.report()
    assert found["threads"] == 2 and len(found["loops"]["read_gb_per_s"]) >= 4
    code = roof._lib.xr_run(
        0, b"no such loop", roof._cpus, 1, roof._ffi.NULL, 0, 0.01, roof._ffi.new("double *")
    )
    assert code == roof._lib.XR_NO_LOOP
