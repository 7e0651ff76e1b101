"""The code-choosing kernels against slow twins, against mx.quantize, and on input that is hard on them."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from numpy.typing import NDArray

from expertd.quant import codes as quant
from expertd.quant.codes import BITS, GROUP_SIZES, Codes, dequantize, pack, relative_error
from tests.quant import twins

MX = {"bfloat16": mx.bfloat16, "float16": mx.float16, "float32": mx.float32}
EVERY_FORMAT = [(bits, group) for bits in BITS for group in GROUP_SIZES]


def holds(values: NDArray[np.float32], dtype: str) -> bool:
    """Whether a dtype can hold float32 values as they are."""
    wide = mx.array(values)
    return bool(mx.array_equal(wide.astype(MX[dtype]).astype(mx.float32), wide).item())


def same(a: Codes, b: Codes) -> bool:
    return all(np.array_equal(getattr(a, n), getattr(b, n)) for n in ("codes", "scales", "biases"))


# fit


@pytest.mark.parametrize(
    "draw, group, wanted",
    [
        (twins.gaussian, 64, 0.102),
        (twins.gaussian, 128, 0.110),
        (twins.heavy_tailed, 64, 0.147),
        (twins.heavy_tailed, 128, 0.168),
    ],
)
def test_two_bits_reach_the_least_error(draw: Callable[..., Any], group: int, wanted: float) -> None:
    w = draw(512, 512)
    assert relative_error(w, quant.fit(w, 2, group)) <= wanted


@pytest.mark.parametrize("bits, group", EVERY_FORMAT)
@pytest.mark.parametrize("dtype", MX)
def test_fit_beats_plain_rounding(bits: int, group: int, dtype: str) -> None:
    w = twins.heavy_tailed(64, 256)
    fitted = quant.fit(w, bits, group, dtype)
    assert twins.error(w, dequantize(fitted)) < 0.9 * twins.error(w, twins.plain_rounding(w, bits, group))
    assert fitted.codes.max() < 2**bits
    assert holds(fitted.scales, dtype) and holds(fitted.biases, dtype)


@pytest.mark.parametrize("bits, slack", [(2, 1.02), (3, 1.04), (4, 1.06)])
@pytest.mark.parametrize("weighted", [False, True])
def test_fit_is_near_the_best_of_many_starts(bits: int, slack: float, weighted: bool) -> None:
    w = twins.heavy_tailed(24, 64)
    weight = np.random.default_rng(1).gamma(1, 1, 64) if weighted else np.ones(64)
    fitted = quant.fit(w, bits, 64, "float32", weight.astype(np.float32) if weighted else None)
    found = np.sum(weight * (w - dequantize(fitted).astype(np.float64)) ** 2)
    best = sum(twins.fit_error(row, weight, bits) for row in w.astype(np.float64))
    assert 0.98 * best < found < slack * best


def test_codes_are_the_nearest_to_the_rounded_grid() -> None:
    w = twins.gaussian(40, 128)
    fitted = quant.fit(w, 3, 32)
    scales, biases = (np.repeat(a.astype(np.float64), 32, axis=1) for a in (fitted.scales, fitted.biases))
    assert np.array_equal(fitted.codes, twins.nearest(w.astype(np.float64), scales, biases, 3))


@pytest.mark.parametrize("dtype", MX)
def test_fit_of_odd_groups(dtype: str) -> None:
    """Constant, zero, one outlier, tiny, two-valued, large: exact where the format is, else within its rounding."""
    odd = np.zeros((6, 64), np.float32)
    odd[0], odd[2, 5], odd[3], odd[4, ::2], odd[5] = 0.5, 3, 2.0**-20, -0.25, 30000
    wide = dequantize(quant.fit(odd, 2, 64, dtype))
    assert np.array_equal(wide[:4], odd[:4])
    assert np.all(np.abs(wide - odd) <= np.abs(odd).max(axis=1, keepdims=True) * 2**-8)


def test_weight_of_zero_says_nothing() -> None:
    w = twins.gaussian(8, 128)
    silent = np.concatenate([np.zeros(64), np.ones(64)]).astype(np.float32)
    assert same(quant.fit(w, 2, 64, weight=silent), quant.fit(w, 2, 64))


# Packing


@pytest.mark.parametrize("bits, group", EVERY_FORMAT)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_mlx_reads_what_is_packed(bits: int, group: int, dtype: str) -> None:
    w = twins.gaussian(33, 256)
    fitted = quant.fit(w, bits, group, dtype)
    packed, scales, biases = mx.array(pack(fitted)), mx.array(fitted.scales), mx.array(fitted.biases)
    assert np.array_equal(np.array(mx.dequantize(packed, scales, biases, group, bits)), dequantize(fitted))
    x = mx.random.normal((3, 256), key=mx.random.key(0)).astype(MX[dtype])
    stored = scales.astype(MX[dtype]), biases.astype(MX[dtype])
    product = mx.quantized_matmul(x, packed, *stored, transpose=True, group_size=group, bits=bits)
    wanted = np.array(x.astype(mx.float32)) @ dequantize(fitted).T
    assert np.allclose(np.array(product.astype(mx.float32)), wanted, atol=0.03)


@pytest.mark.parametrize("bits", BITS)
def test_pack_is_a_stream_of_bits(bits: int) -> None:
    drawn = np.random.default_rng(0).integers(0, 2**bits, (5, 96), dtype=np.uint8)
    grid = np.zeros((5, 3), np.float32)
    assert np.array_equal(pack(Codes(drawn, grid, grid, bits, 32)), twins.stream(drawn, bits))


# Gain


@pytest.mark.parametrize("calibrated", [False, True])
def test_gain_undoes_the_shrinking(calibrated: bool) -> None:
    w = twins.gaussian(128, 512)
    hessian = twins.second_moments(512, 2000) if calibrated else np.eye(512)
    fitted = quant.fit(w, 2, 64)
    gained = quant.apply_gain(w, fitted, hessian if calibrated else None)

    def share(codes: Codes) -> Any:
        moments = w.astype(np.float64) @ hessian
        return np.sum(moments * dequantize(codes), axis=1) / np.sum(moments * w, axis=1)

    assert np.mean(share(fitted)) < 0.95
    assert np.allclose(share(gained), 1, atol=0.01) and abs(np.mean(share(gained)) - 1) < 1e-3
    assert holds(gained.scales, "bfloat16") and holds(gained.biases, "bfloat16")


def test_gain_of_nothing() -> None:
    zeros = np.zeros((3, 64), np.float32)
    assert not dequantize(quant.apply_gain(zeros, quant.fit(zeros, 2, 64))).any()


# Calibrated choice


@pytest.mark.parametrize("bits, group", [(2, 64), (2, 128), (3, 32), (4, 64)])
def test_gptq_equals_its_twin(bits: int, group: int) -> None:
    """The twin follows the paper, with the inverse; one code in a thousand may fall on the other side of a tie."""
    w, hessian = twins.gaussian(40, 256), twins.second_moments(256, 1000)
    found = quant.gptq(w, hessian, bits, group)
    assert np.mean(found.codes != twins.gptq(w, hessian, quant.DAMPING, found)) < 1e-3


def test_refine_equals_its_twin() -> None:
    w, hessian = twins.gaussian(6, 128), twins.second_moments(128, 600)
    start = quant.fit(w, 2, 64, "float32")
    found = quant.refine(w, hessian, start, sweeps=3)
    codes, scales, biases = twins.descend(w, hessian, start, 3)
    assert np.mean(found.codes != codes) < 0.01
    assert np.allclose(found.scales, scales, rtol=1e-2) and np.allclose(found.biases, biases, rtol=1e-2)


@pytest.mark.parametrize("bits, group", [(2, 64), (2, 128), (3, 32), (4, 64), (8, 64)])
@pytest.mark.parametrize("start", ["fit", "gptq", "random"])
def test_refine_never_makes_it_worse(bits: int, group: int, start: str) -> None:
    w, hessian = twins.heavy_tailed(50, 256), twins.second_moments(256, 1000)
    codes = quant.gptq(w, hessian, bits, group) if start == "gptq" else quant.fit(w, bits, group)
    if start == "random":
        drawn = np.random.default_rng(0).integers(0, 2**bits, w.shape, dtype=np.uint8)
        codes = Codes(drawn, codes.scales, codes.biases, bits, group)
    errors = [twins.error(w, dequantize(codes), hessian)]
    for _ in range(4):
        codes = quant.refine(w, hessian, codes, sweeps=1)
        errors.append(twins.error(w, dequantize(codes), hessian))
        assert holds(codes.scales, "bfloat16") and holds(codes.biases, "bfloat16")
    assert all(after <= before * (1 + 1e-6) for before, after in pairwise(errors))
    assert errors[1] < errors[0]


@pytest.mark.parametrize("group", [64, 128])
def test_calibrated_choice_is_the_best(group: int) -> None:
    w, hessian = twins.gaussian(128, 512), twins.second_moments(512, 2000)
    plain = twins.error(w, twins.plain_rounding(w, 2, group), hessian)
    fed_back = quant.gptq(w, hessian, 2, group)
    best = relative_error(w, quant.calibrated(w, hessian, 2, group), hessian)
    assert best <= 0.35 * plain
    assert best <= relative_error(w, fed_back, hessian)
    assert relative_error(w, fed_back, hessian) < 0.5 * relative_error(w, quant.fit(w, 2, group), hessian)


def poor(kind: str, cols: int) -> Any:
    full = twins.second_moments(cols, 500).copy()
    if kind == "few inputs":
        return twins.second_moments(cols, 5)
    if kind == "dead columns":
        full[:, 10:40] = full[10:40] = 0
    if kind == "not a sum of squares":
        return full - 0.05 * np.mean(np.diag(full)) * np.eye(cols)
    return full * (1e-30 if kind == "tiny" else 1e30 if kind == "huge" else 1)


@pytest.mark.parametrize("kind", ["few inputs", "dead columns", "not a sum of squares", "tiny", "huge"])
def test_poor_hessians_are_survived(kind: str) -> None:
    w, hessian = twins.gaussian(32, 128), poor(kind, 128)
    found = quant.calibrated(w, hessian, 2, 64)
    assert np.isfinite(dequantize(found)).all()
    plain = twins.plain_rounding(w, 2, 64)
    assert twins.error(w, dequantize(found), hessian) < 0.6 * twins.error(w, plain, hessian)
    assert twins.error(w, dequantize(found)) < 3 * twins.error(w, plain)  # what the inputs do not show


def test_hessian_that_no_damping_saves_leaves_its_diagonal() -> None:
    w = twins.gaussian(32, 128)
    hessian = np.diag(np.where(np.arange(128) % 2, 1.0, -1.2)) + 3 * np.eye(128)
    hessian[0, 1] = hessian[1, 0] = 100
    assert np.isfinite(dequantize(quant.calibrated(w, hessian, 2, 64))).all()


def test_without_information_calibrated_is_fit_and_gain() -> None:
    w = twins.gaussian(16, 128)
    found = quant.calibrated(w, np.zeros((128, 128)), 2, 64)
    assert same(found, quant.apply_gain(w, quant.fit(w, 2, 64)))


# The same bytes


def run_all(w: NDArray[np.float32], hessian: Any, threads: int) -> list[Codes]:
    weight = np.diag(hessian).astype(np.float32)
    fitted = quant.fit(w, 2, 64, threads=threads)
    return [
        fitted,
        quant.fit(w, 4, 32, "float16", weight, threads),
        quant.gptq(w, hessian, 2, 64, threads=threads),
        quant.refine(w, hessian, fitted, threads=threads),
        quant.apply_gain(w, fitted, threads=threads),
        quant.apply_gain(w, fitted, hessian, threads=threads),
        quant.calibrated(w, hessian, 2, 64, threads=threads),
    ]


def test_number_of_threads_does_not_show() -> None:
    w, hessian = twins.gaussian(101, 256), twins.second_moments(256, 1000)
    alone = run_all(w, hessian, 1)
    for threads in (2, 7):
        assert all(same(a, b) for a, b in zip(alone, run_all(w, hessian, threads), strict=True))


@pytest.mark.parametrize("rows", [0, 1, 31, 33])
def test_rows_do_not_depend_on_each_other(rows: int) -> None:
    w, hessian = twins.gaussian(70, 256), twins.second_moments(256, 1000)
    for whole, part in zip(run_all(w, hessian, 2), run_all(w[:rows], hessian, 2), strict=True):
        for name in ("codes", "scales", "biases"):
            assert np.array_equal(getattr(whole, name)[:rows], getattr(part, name))


# Refusals


@pytest.mark.parametrize(
    "call, reason",
    [
        (lambda w, h: quant.fit(w, 7, 64), "bits 7"),
        (lambda w, h: quant.fit(w, 2, 48), "group size 48"),
        (lambda w, h: quant.fit(w[:, :100], 2, 64), "100 columns"),
        (lambda w, h: quant.fit(w[0], 2, 64), "rows, cols"),
        (lambda w, h: quant.fit(w, 2, 64, "int8"), "int8"),
        (lambda w, h: quant.fit(w, 2, 64, weight=h[0, :64]), "wanted"),
        (lambda w, h: quant.fit(w, 2, 64, weight=-np.ones(128, np.float32)), "negative"),
        (lambda w, h: quant.gptq(w, h[:64, :64], 2, 64), "hessian: has shape"),
        (lambda w, h: quant.calibrated(w, h * np.nan, 2, 64), "NaN"),
        (lambda w, h: quant.refine(w[:3], h, quant.fit(w, 2, 64)), "its codes"),
        (lambda w, h: quant.gptq(w, h - 9 * np.eye(128), 2, 64), "positive definite"),
    ],
)
def test_what_cannot_be_is_refused(call: Callable[..., Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        call(twins.gaussian(4, 128), twins.second_moments(128, 200))


# NaN and infinity in raw bytes

RAW = {
    "F32": (np.uint32, 0x3F800000, [0x7F800000, 0xFF800000, 0x7FC00000, 0x7F800001]),
    "BF16": (np.uint16, 0x7F7F, [0x7F80, 0xFF80, 0x7FC0, 0xFF81]),
    "F16": (np.uint16, 0x7BFF, [0x7C00, 0xFC00, 0x7E00]),
    "F8_E4M3": (np.uint8, 0x7E, [0x7F, 0xFF]),
}


@pytest.mark.parametrize("dtype", RAW)
def test_first_not_finite(dtype: str) -> None:
    kind, largest, bad = RAW[dtype]
    numbers = np.full(200_000, largest, kind)
    assert quant.first_not_finite(numbers, dtype) == -1
    for at in (199_999, 131_072, 65_536, 65_535, 255, 0):
        for value in bad:
            numbers[at] = value
            assert quant.first_not_finite(numbers, dtype, threads=3) == at
    assert quant.first_not_finite(numbers[1:].tobytes(), dtype) == 254
    assert quant.first_not_finite(b"", dtype) == -1
