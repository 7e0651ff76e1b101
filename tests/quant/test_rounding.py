"""One module's weight, rounded without calibration."""

import mlx.core as mx
import numpy as np
import pytest

from expertd.quant.rounding import round_module


@pytest.mark.parametrize("shape", [(5, 16, 128), (7, 128)])
@pytest.mark.parametrize("effort", ["plain", "fast"])
def test_threads_change_no_byte(shape: tuple[int, ...], effort: str) -> None:
    weight = mx.array(np.random.RandomState(0).standard_normal(shape)).astype(mx.bfloat16)
    expected = round_module(weight, 2, 64, effort, 1).arrays("x")
    for threads in (2, 3, 16):
        found = round_module(weight, 2, 64, effort, threads).arrays("x")
        assert all(mx.array_equal(found[name], expected[name]) for name in expected)


def test_plain_is_what_mlx_does_and_fast_is_nearer() -> None:
    weight = mx.array(np.random.RandomState(1).standard_normal((4, 32, 256))).astype(mx.bfloat16)
    plain = round_module(weight, 2, 64, "plain", 2)
    for found, expected in zip(plain.arrays("x").values(), mx.quantize(weight, 64, 2), strict=True):
        assert mx.array_equal(found, expected)
    fast = round_module(weight, 2, 64, "fast", 2)
    errors = [mx.square(r.dequantized() - weight.astype(mx.float32)).sum().item() for r in (fast, plain)]
    assert errors[0] < 0.75 * errors[1]  # type: ignore[operator]
