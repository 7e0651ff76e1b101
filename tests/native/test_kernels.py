"""Affine products of the CPU kernels as C gives them: beside float64, and the same bits however they are divided."""

import mmap
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest

from expertd.native._kernels import ffi, lib
from tests.native.calling import BFLOAT16, FLOAT32, Array, exact, isas, narrowed, opened

ISAS = isas()
FORMATS = [
    (bits, group, activation) for bits in (2, 4, 8) for group in (32, 64, 128) for activation in (8, 16)
]
# Of a product to its float64 twin, relative, by the bits of the activations. Wanted are 1.5e-2 and 2e-3.
ERROR = {8: 1.5e-2, 16: 1e-4}


def refusal(isa: str, threads: int) -> str:
    cpu, err = ffi.new("xd_cpu **"), ffi.new("char[200]")
    assert lib.xd_cpu_open(cpu, isa.encode(), threads, err, 200) == -1
    assert cpu[0] == ffi.NULL
    return str(ffi.string(err).decode())


@dataclass(frozen=True)
class Weight:
    """Codes [experts, out, width], scales and biases [experts, out, width / group] in bfloat16."""

    bits: int
    group: int
    codes: Array
    scales: Array
    biases: Array

    def packed(self) -> Array:
        """MLX's: the first code of a byte in its lowest bits."""
        shifts = np.arange(8 // self.bits, dtype=np.uint8) * self.bits
        parts = self.codes.reshape(*self.codes.shape[:-1], -1, 8 // self.bits) << shifts
        return np.ascontiguousarray(np.bitwise_or.reduce(parts.astype(np.uint8), axis=-1))

    def unpacked(self) -> Array:
        scales, biases = (np.repeat(exact(a), self.group, axis=-1) for a in (self.scales, self.biases))
        return scales * self.codes + biases

    def from_expert(self, first: int) -> "Weight":
        codes, scales, biases = (a[first:] for a in (self.codes, self.scales, self.biases))
        return replace(self, codes=codes, scales=scales, biases=biases)

    def outs(self, first: int, last: int) -> "Weight":
        codes, scales, biases = (a[:, first:last] for a in (self.codes, self.scales, self.biases))
        return replace(self, codes=codes, scales=scales, biases=biases)


def make_weight(bits: int, group: int, experts: int = 3, out: int = 40, groups: int = 11) -> Weight:
    random = np.random.default_rng(bits * group)
    codes = random.integers(0, 1 << bits, (experts, out, groups * group), dtype=np.uint8)
    scales = random.uniform(0.01, 0.03, (experts, out, groups))
    return Weight(
        bits, group, codes, *(narrowed(a, BFLOAT16) for a in (scales, -scales * ((1 << bits) - 1) / 2))
    )


def make_rows(num: int, width: int, seed: int = 5) -> Array:
    return narrowed(np.random.default_rng(seed).standard_normal((num, width)), BFLOAT16)


def run(
    cpu: Any,
    shape: tuple[int, ...],
    form: tuple[int, int],
    arrays: tuple[Any, ...],
    ids: Array | None,
    activation: int,
) -> Array:
    """[rows, ids per row, out] in float32. `arrays` are codes, scales, biases and x; `form` is bits and group size."""
    rows, per_row = len(arrays[3]), 1 if ids is None else ids.shape[1]
    some = None if ids is None else np.ascontiguousarray(ids, np.uint32)
    y = np.full((rows, per_row, shape[1]), 7, np.float32)
    p = ffi.new("xd_product *")
    p.weight.data, p.weight.scales, p.weight.biases, p.x = (ffi.from_buffer(a) for a in arrays)
    p.weight.dtype, p.x_dtype, p.y_dtype = BFLOAT16, BFLOAT16, FLOAT32
    p.weight.bits, p.weight.group_size = form
    p.weight.num_experts, p.weight.num_out, p.weight.width = shape
    p.ids = ffi.NULL if some is None else ffi.from_buffer("uint32_t[]", some)
    p.num_rows, p.ids_per_row, p.activation_bits = rows, per_row, activation
    room = np.empty(lib.xd_product_scratch(cpu, p) + 64, np.uint8)
    p.y, p.scratch = ffi.from_buffer(y), ffi.from_buffer(room) + (-room.ctypes.data) % 64
    lib.xd_product_run(cpu, p)
    return y


def product(cpu: Any, w: Weight, x: Array, ids: Array | None, activation_bits: int) -> Array:
    arrays = (w.packed(), np.ascontiguousarray(w.scales), np.ascontiguousarray(w.biases), x)
    return run(cpu, w.codes.shape, (w.bits, w.group), arrays, ids, activation_bits)


@pytest.mark.parametrize(("bits", "group", "activation_bits"), FORMATS)
@pytest.mark.parametrize("rows", [1, 40])
def test_products_are_right(bits: int, group: int, activation_bits: int, rows: int) -> None:
    """One row goes one way through the kernels, forty go the other."""
    w = make_weight(bits, group)
    x, ids = make_rows(rows, w.codes.shape[2]), np.arange(rows * 2).reshape(rows, 2) % 3
    wanted = np.einsum("rk,rpok->rpo", exact(x), w.unpacked()[ids])
    for isa in ISAS:
        with opened(isa) as cpu:
            found = product(cpu, w, x, ids, activation_bits)
        assert np.linalg.norm(found - wanted) < ERROR[activation_bits] * np.linalg.norm(wanted), isa


@pytest.mark.parametrize(
    ("bits", "group", "activation_bits", "groups"), [(*form, 11) for form in FORMATS] + [(2, 64, 8, 12)]
)
def test_a_row_has_its_bits_however_it_comes(
    bits: int, group: int, activation_bits: int, groups: int
) -> None:
    """Alone and among others, by any threads, from any slice of the weights, on every instruction set. Of 12 groups
    rows of 2 bits end with half of eight, which they share."""
    w = make_weight(bits, group, groups=groups)
    x = make_rows(64, w.codes.shape[2])
    ids = np.random.default_rng(1).integers(0, 3, (64, 2))
    with opened("portable") as cpu:
        wanted = product(cpu, w, x, ids, activation_bits)
    for isa in ISAS:
        for threads in (1, 2, 3):
            with opened(isa, threads) as cpu:
                for rows in (1, 3, 4, 5, 64):
                    found = product(cpu, w, x[:rows], ids[:rows], activation_bits)
                    assert np.array_equal(found, wanted[:rows]), (isa, threads, rows)
                some = product(cpu, w.from_expert(1), x, (ids - 1) % 2, activation_bits)
                assert np.array_equal(some[ids > 0], wanted[ids > 0]), (isa, threads)
                some = product(cpu, w.outs(9, 37), x, ids, activation_bits)
                assert np.array_equal(some, wanted[:, :, 9:37]), (isa, threads)


@pytest.mark.parametrize(("bits", "group", "activation_bits"), FORMATS)
@pytest.mark.parametrize("sign", [1, -1])
def test_the_largest_sums_fit(bits: int, group: int, activation_bits: int, sign: int) -> None:
    """All codes and all numbers of x as large as they can be; rows that end with half of eight groups."""
    w = make_weight(bits, group, out=15, groups=12)
    w.codes[:, 1:] = (1 << bits) - 1
    x = narrowed(np.full((5, w.codes.shape[2]), sign * 1.5), BFLOAT16)
    with opened("portable") as cpu:
        wanted = product(cpu, w, x, None, activation_bits)
    for isa in ISAS:
        with opened(isa) as cpu:
            for rows in (1, 5):
                assert np.array_equal(product(cpu, w, x[:rows], None, activation_bits), wanted[:rows]), isa


@pytest.mark.parametrize("isa", ISAS)
def test_what_is_not_a_number_stays_in_its_row(isa: str) -> None:
    w = make_weight(4, 64)
    x, ids = make_rows(9, w.codes.shape[2]), np.zeros((9, 1), np.int64)
    with opened(isa, 2) as cpu:
        wanted = product(cpu, w, x, ids, 16)
        x[2, 100], x[5, 0], ids[7] = 0x7FC0, 0xFF80, 3  # a NaN, minus infinity, an expert that is not there
        found = product(cpu, w, x, ids, 16)
    lost = np.isin(np.arange(9), (2, 5, 7))
    assert np.isnan(found[lost]).all()
    assert np.array_equal(found[~lost], wanted[~lost])


def test_weights_of_five_gigabytes_are_found() -> None:
    """Only the last expert's are ever touched: the system gives no memory for the others."""
    w = replace(make_weight(8, 128, 1, 32, 1), biases=np.zeros((1, 32, 1), np.uint16))
    experts, out, width = 5 << 18, 32, 128
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
    codes = mmap.mmap(-1, experts * out * width, flags=flags)
    codes[-out * width :] = w.packed().tobytes()
    scales, biases = (np.zeros(experts * out, np.uint16) for _ in range(2))
    scales[-out:] = w.scales.reshape(-1)
    x, ids = make_rows(5, width), np.full((5, 1), experts - 1, np.uint32)
    with opened() as cpu:
        found = run(cpu, (experts, out, width), (8, 128), (codes, scales, biases, x), ids, 16)
        assert np.array_equal(found, product(cpu, w, x, None, 16))
    codes.close()


def test_refusals_name_what_was_wrong() -> None:
    assert refusal("sse9", 1) == f"instruction set sse9: this processor has {' '.join(ISAS)}"
    assert refusal("", 0) == "0 threads: wanted 1 to 256"
    assert refusal("", 257) == "257 threads: wanted 1 to 256"


def test_threads_end_with_their_cpu() -> None:
    def count() -> int:
        return (
            len(os.listdir("/proc/self/task"))
            if os.path.isdir("/proc/self/task")
            else threading.active_count()
        )

    before = count()
    with opened(num_threads=3) as cpu:
        assert lib.xd_cpu_num_threads(cpu) == 3
        if os.path.isdir("/proc/self/task"):
            assert count() == before + 2
        w = make_weight(2, 64)
        product(cpu, w, make_rows(5, w.codes.shape[2]), None, 8)
    assert count() == before


@pytest.mark.skipif(
    not os.path.isdir("/proc/self/task") or len(os.sched_getaffinity(0)) < 2,
    reason="needs Linux and two processors",
)
def test_threads_wake_on_another_processor() -> None:
    """Where the caller is, a thread would wait for 10 ms while another processor is idle."""
    allowed, before = os.sched_getaffinity(0), set(os.listdir("/proc/self/task"))
    pair = set(sorted(allowed)[:2])
    w = make_weight(2, 64)
    x = make_rows(17, w.codes.shape[2])  # three tasks

    def is_kept_off(here: int, thread: int) -> bool:
        os.sched_setaffinity(0, {here})  # there now, and likely to stay
        os.sched_setaffinity(0, pair)
        end = time.monotonic() + 0.002
        while time.monotonic() < end:  # the thread falls asleep
            pass
        product(cpu, w, x, None, 8)
        return os.sched_getaffinity(thread) == pair - {here}

    try:
        os.sched_setaffinity(0, pair)
        with opened(num_threads=2) as cpu:
            (thread,) = set(os.listdir("/proc/self/task")) - before
            for here in sorted(pair):
                assert any(is_kept_off(here, int(thread)) for _ in range(100)), here
            assert os.sched_getaffinity(0) == pair
    finally:
        os.sched_setaffinity(0, allowed)


def test_pools_beside_each_other() -> None:
    """Each cpu is one caller's; two callers with one each do not meet."""
    w = make_weight(2, 32, groups=3)
    x = make_rows(6, w.codes.shape[2])
    with opened("portable") as cpu:
        wanted = product(cpu, w, x, None, 16)

    def work(_: int) -> bool:
        with opened(num_threads=3) as cpu:
            return all(np.array_equal(product(cpu, w, x, None, 16), wanted) for _ in range(200))

    with ThreadPoolExecutor(2) as pool:
        assert all(pool.map(work, range(2)))
