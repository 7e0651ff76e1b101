"""The CPU kernels as operations of the MLX graph: the Python face of native/kernel_ops.cpp.

An xd_cpu (native/kernels/kernels.h) has threads and lives as long as the process: a graph that MLX still computes
may call it at any time.
"""

from collections.abc import Callable
from functools import cache

import mlx.core as mx

import expertd.native._graph as _graph
from expertd.errors import ConfigError
from expertd.native._kernels import ffi, lib

FUNCTIONS = (
    "xd_product_scratch", "xd_product_run", "xd_norm_run", "xd_rope_scratch", "xd_rope_run", "xd_glu_run",
    "xd_attention_scratch", "xd_attention_run",
)  # fmt: skip


ACTIVATIONS = {
    "silu": lib.XD_SILU,
    "swiglu_oai": lib.XD_SWIGLU_OAI,
    "clipped_silu": lib.XD_CLIPPED_SILU,
    "gelu_tanh": lib.XD_GELU_TANH,
    "relu2": lib.XD_RELU2,
}


# An affine weight [num_experts, num_out, packed width], its scales, its biases, its group size and its bits.
Projection = tuple[mx.array, mx.array, mx.array, int, int]


def isas() -> list[str]:
    """The instruction sets that run on this processor, best first."""
    return ffi.string(lib.xd_cpu_isas()).decode().split()  # type: ignore[no-any-return]


class Kernels:
    """An open xd_cpu: what it is, and its operations. Each takes and gives lazy arrays, and raises ValueError when
    shapes or types do not fit.

    `rms_norm`, `rope` and `attention` are mx.fast's, called alike but for `stream`. `append_attention` is that of one
    token of each of several sequences, whose keys and values become part of their caches (native/kernel_ops.h).
    """

    def __init__(self, isa: str, num_threads: int, activation_bits: int) -> None:
        """Raises ConfigError when the threads or the instruction set cannot be had."""
        self._cpu = _open(isa, num_threads)
        self.isa: str = ffi.string(lib.xd_cpu_isa(self._cpu)).decode()
        self.num_threads, self.activation_bits = num_threads, activation_bits
        addresses = {name: int(ffi.cast("uintptr_t", ffi.addressof(lib, name))) for name in FUNCTIONS}
        self._graph = _graph.Kernels(int(ffi.cast("uintptr_t", self._cpu)), addresses)
        self.rms_norm: Callable[..., mx.array] = self._graph.rms_norm
        self.rope: Callable[..., mx.array] = self._graph.rope
        self.attention: Callable[..., mx.array] = self._graph.attention
        self.append_attention: Callable[..., mx.array | None] = self._graph.append_attention

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
        """x [..., width] times a packed weight [num_out, width]: [..., num_out]; with ids, as mx.gather_qmm."""
        y: mx.array = self._graph.affine_product(
            x, weight, scales, biases, ids, group_size, bits, self.activation_bits
        )
        return y

    def plain_product(self, x: mx.array, weight: mx.array, ids: mx.array | None = None) -> mx.array:
        """x [..., width] times a weight [num_out, width]: [..., num_out]; with ids, as mx.gather_mm."""
        y: mx.array = self._graph.plain_product(x, weight, ids)
        return y

    def experts(
        self, x: mx.array, ids: mx.array, up: Projection, gate: Projection, down: Projection, activation: str
    ) -> mx.array:
        """down(activation(gate(x)) * up(x)) over experts: the bits of four operations by one.

        x [..., width] and ids [...], of which each row of x has as many as the others: [*ids.shape, num_out of down].
        """
        y: mx.array = self._graph.experts(
            x, ids, up, gate, down, ACTIVATIONS[activation], self.activation_bits
        )
        return y

    def glu(
        self, gate: mx.array, up: mx.array | None, activation: str, alpha: float = 0.0, limit: float = 0.0
    ) -> mx.array:
        """activation(gate) * up, computed in float32; `activation` is a name of ACTIVATIONS."""
        y: mx.array = self._graph.glu(gate, up, ACTIVATIONS[activation], alpha, limit)
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
        raise ConfigError(
            "--kernels native: this model runs on a GPU, by MLX's kernels. Leave --kernels out."
        )
    return Kernels(isa, num_threads, activation_bits) if on_cpu and choice != "mlx" else None
