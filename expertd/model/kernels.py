"""The CPU kernels as operations of the MLX graph: the Python face of native/kernel_ops.cpp.

An xd_cpu (native/kernels/kernels.h) has threads and lives as long as the process: a graph that MLX still computes
may call it at any time.
"""

from functools import cache

import mlx.core as mx

import expertd.native._graph as _graph
from expertd.errors import ConfigError
from expertd.native._kernels import ffi, lib

FUNCTIONS = ("xd_product_scratch", "xd_product_run")


def isas() -> list[str]:
    """The instruction sets that run on this processor, best first."""
    return ffi.string(lib.xd_cpu_isas()).decode().split()  # type: ignore[no-any-return]


class Kernels:
    """An open xd_cpu: what it is, and its operations. Each takes and gives lazy arrays."""

    def __init__(self, isa: str, num_threads: int, activation_bits: int) -> None:
        """Raises ConfigError when the threads or the instruction set cannot be had."""
        self._cpu = _open(isa, num_threads)
        self.isa: str = ffi.string(lib.xd_cpu_isa(self._cpu)).decode()
        self.num_threads, self.activation_bits = num_threads, activation_bits
        addresses = {name: int(ffi.cast("uintptr_t", ffi.addressof(lib, name))) for name in FUNCTIONS}
        self._graph = _graph.Kernels(int(ffi.cast("uintptr_t", self._cpu)), addresses)

    def affine_product(
        self,
        x: mx.array,
        weight: mx.array,
        scales: mx.array,
        biases: mx.array,
        group_size: int,
        bits: int,
        ids: mx.array | None = None,
    ) -> mx.array:
        """x [..., width] times a packed weight [num_out, width]: [..., num_out]; with ids, as mx.gather_qmm.

        Raises ValueError when shapes or types do not fit.
        """
        y: mx.array = self._graph.affine_product(
            x, weight, scales, biases, ids, group_size, bits, self.activation_bits
        )
        return y

    def plain_product(self, x: mx.array, weight: mx.array, ids: mx.array | None = None) -> mx.array:
        """x [..., width] times a weight [num_out, width]: [..., num_out]; with ids, as mx.gather_mm.

        Raises ValueError when shapes or types do not fit.
        """
        y: mx.array = self._graph.plain_product(x, weight, ids)
        return y


@cache
def _open(isa: str, num_threads: int) -> object:
    cpu, reason = ffi.new("xd_cpu **"), ffi.new("char[256]")
    if lib.xd_cpu_open(cpu, isa.encode(), num_threads, reason, len(reason)) != 0:
        raise ConfigError(f"the CPU kernels cannot be opened: {ffi.string(reason).decode()}")
    return cpu[0]


def open_kernels(choice: str, activation_bits: int, num_threads: int, isa: str = "") -> Kernels | None:
    """What `--kernels` means on MLX's default device; None is MLX's own kernels. Raises ConfigError."""
    on_cpu = mx.default_device() == mx.cpu
    if choice == "native" and not on_cpu:
        raise ConfigError("--kernels native: this model runs on a GPU, by MLX's kernels. Leave --kernels out.")
    return Kernels(isa, num_threads, activation_bits) if on_cpu and choice != "mlx" else None
