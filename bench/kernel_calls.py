"""The two that `expertd bench kernels` compares: our kernels, called as C, and MLX's own, called as its graph does.

Each is prepared for a case, a number of rows and the calls; `run(n)` then makes call number n and waits for it.
"""

from typing import Any, Protocol

import mlx.core as mx
import numpy as np

from expertd.bench.kernel_cases import GROUP_SIZE, SORT_FROM, Call, Weights, activations

Array = np.ndarray[Any, np.dtype[Any]]
ALIGNMENT = 64
NUM_COMPARED = 64  # outputs
# As kernels.h numbers them.
DTYPES = {mx.float32: 0, mx.float16: 1, mx.bfloat16: 2}


class Caller(Protocol):
    def run(self, number: int) -> None:
        """Make a call and wait until it is done."""

    def result(self) -> Array:
        """What the last call gave, as float32 [pairs, num_out]."""


class Mlx:
    """MLX's own: quantized_matmul, gather_qmm or matmul, with what it takes to send it off and wait."""

    def __init__(self, weights: Weights, num_rows: int, calls: list[Call]) -> None:
        self._weights, self._calls = weights, calls
        self._x, per_row = activations(weights.case, num_rows)
        self._ids = [self._shape_ids(call, per_row) for call in calls]
        if weights.case.num_experts:
            middle = (1, 1) if per_row > 1 else (1,)
            self._x = self._x.reshape(self._x.shape[0], *middle, -1)
            mx.eval(self._x)
        self._last: mx.array | None = None

    def _shape_ids(self, call: Call, per_row: int) -> mx.array | None:
        if call.ids is None:
            return None
        ids = mx.array(call.ids.reshape(-1, per_row) if per_row > 1 else call.ids)
        mx.eval(ids)
        return ids

    def run(self, number: int) -> None:
        call, x = self._calls[number], self._x
        parts: Any = self._weights.parts[call.copy]
        options: dict[str, Any] = {
            "transpose": True, "group_size": GROUP_SIZE, "bits": self._weights.case.bits
        }  # fmt: skip
        if call.ids is not None:
            options |= {"rhs_indices": self._ids[number], "sorted_indices": len(call.ids) >= SORT_FROM}
            y = mx.gather_qmm(x, *parts, **options)
        elif self._weights.case.bits:
            y = mx.quantized_matmul(x, *parts, **options)
        else:
            y = x @ parts[0].T
        mx.eval(y)
        self._last = y

    def result(self) -> Array:
        assert self._last is not None
        return np.array(self._last.astype(mx.float32)).reshape(-1, self._weights.case.matrix.num_out)


def error_of(caller: Caller, weights: Weights, num_rows: int, call: Call) -> float:
    """How far the first outputs of a call's last pair are from the product in float64, relative to its norm."""
    caller.run(0)
    found = caller.result()[-1, :NUM_COMPARED].astype(np.float64)
    expert = int(call.ids[-1]) if call.ids is not None else None
    x, _ = activations(weights.case, num_rows)
    wanted = weights.exact(call.copy, expert, NUM_COMPARED) @ np.array(x[-1].astype(mx.float32)).astype(
        np.float64
    )
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


class NativeCpu:
    """Our kernels with their threads. Raises ImportError where they are not built, OSError when they do not start."""

    def __init__(self, num_threads: int) -> None:
        from expertd.native._kernels import ffi, lib

        self.ffi, self.lib = ffi, lib
        cpu, err = ffi.new("xd_cpu **"), ffi.new("char[200]")
        if lib.xd_cpu_open(cpu, b"", num_threads, err, len(err)):
            raise OSError(ffi.string(err).decode(errors="replace"))
        self.cpu = ffi.gc(cpu[0], lib.xd_cpu_close)
        self.isa: str = ffi.string(lib.xd_cpu_isa(self.cpu)).decode()


class Native:
    """Ours. `activation_bits` is 8 or 16: what a row of x is rounded to before it meets affine weights."""

    def __init__(
        self, native: NativeCpu, weights: Weights, num_rows: int, calls: list[Call], activation_bits: int
    ) -> None:
        self._native, self._weights = native, weights
        self._x, self._per_row = activations(weights.case, num_rows)
        self._kept: list[Any] = []
        num_pairs = self._x.shape[0] * self._per_row
        self._y = mx.zeros((num_pairs, weights.case.matrix.num_out), dtype=self._x.dtype)
        mx.eval(self._y)
        self._products = [self._product(call, activation_bits) for call in calls]
        scratch = self._scratch(int(native.lib.xd_product_scratch(native.cpu, self._products[0])))
        for product in self._products:
            product.scratch = scratch

    def _product(self, call: Call, activation_bits: int) -> Any:
        case, parts = self._weights.case, self._weights.parts[call.copy]
        product = self._native.ffi.new("xd_product *")
        weight = product.weight
        weight.data = self._address(parts[0])
        if case.bits:
            weight.scales, weight.biases = map(self._address, parts[1:])
        weight.dtype = DTYPES[parts[-1].dtype]
        weight.bits, weight.group_size = case.bits, GROUP_SIZE if case.bits else 0
        weight.num_experts = max(1, case.num_experts)
        weight.num_out, weight.width = case.matrix.num_out, case.matrix.width
        product.x, product.y = self._address(self._x), self._address(self._y)
        if call.ids is not None:
            product.ids = self._native.ffi.cast("uint32_t *", call.ids.ctypes.data)
            self._kept.append(call.ids)
        product.num_rows, product.ids_per_row = self._x.shape[0], self._per_row
        product.x_dtype = product.y_dtype = DTYPES[self._x.dtype]
        product.activation_bits = activation_bits
        return product

    def _address(self, array: mx.array) -> Any:
        """Where MLX keeps an array: the same memory for both."""
        seen = np.array(array.view(mx.uint8), copy=False)
        self._kept.append(seen)
        return self._native.ffi.cast("void *", seen.ctypes.data)

    def _scratch(self, num_bytes: int) -> Any:
        memory = np.zeros(num_bytes + ALIGNMENT, dtype=np.uint8)
        self._kept.append(memory)
        start = memory.ctypes.data
        return self._native.ffi.cast("void *", start + -start % ALIGNMENT)

    def run(self, number: int) -> None:
        self._native.lib.xd_product_run(self._native.cpu, self._products[number])

    def result(self) -> Array:
        return np.array(self._y.astype(mx.float32))
