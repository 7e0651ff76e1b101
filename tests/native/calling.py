"""Call the float operations of native/kernels/ with numpy arrays: one function for each, checked by nobody.

An array is float32, float16, or uint16 for bfloat16; `dtype_of` tells them apart. Results are new arrays.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from expertd.native._kernels import ffi, lib

Array = np.ndarray[Any, np.dtype[Any]]
FLOAT32, FLOAT16, BFLOAT16 = lib.XD_FLOAT32, lib.XD_FLOAT16, lib.XD_BFLOAT16
TYPES = {FLOAT32: np.float32, FLOAT16: np.float16, BFLOAT16: np.uint16}
DTYPES = tuple(TYPES)


def dtype_of(x: Array) -> int:
    return next(dtype for dtype, kind in TYPES.items() if x.dtype == kind)


def narrowed(x: Array, dtype: int) -> Array:
    """To the nearest number of a dtype."""
    if dtype != BFLOAT16:
        return x.astype(TYPES[dtype])
    bits = x.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def exact(x: Array) -> Array:
    """As float64."""
    if x.dtype == np.uint16:
        return (x.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return x.astype(np.float64)


def isas() -> list[str]:
    return ffi.string(lib.xd_cpu_isas()).decode().split()  # type: ignore[no-any-return]


@contextmanager
def opened(isa: str = "", num_threads: int = 1) -> Iterator[Any]:
    cpu, err = ffi.new("xd_cpu **"), ffi.new("char[200]")
    code = lib.xd_cpu_open(cpu, isa.encode(), num_threads, err, 200)
    assert code == 0, ffi.string(err).decode()
    try:
        yield cpu[0]
    finally:
        lib.xd_cpu_close(cpu[0])


def _address(x: Array | None, kind: str = "void *") -> Any:
    return ffi.NULL if x is None else ffi.cast(kind, x.ctypes.data)


def _strides(x: Array, names: tuple[str, ...], prefix: str) -> dict[str, int]:
    """In elements, of the leading dimensions."""
    steps = (s // x.itemsize for s in x.strides)
    return {f"{prefix}_{name}_stride": step for name, step in zip(names, steps, strict=False)}


def _scratch(size: int) -> tuple[Array, Any]:
    """Memory aligned to 64 bytes, and where it starts. What it holds is noise: nothing may depend on it."""
    block = np.full(size + 64, 0xFF, np.uint8)
    return block, ffi.cast("void *", block.ctypes.data + -block.ctypes.data % 64)


def product(cpu: Any, w: Array, x: Array, ids: Array | None = None, y_dtype: int = FLOAT32) -> Array:
    """w [experts, out, width], x [rows, width], ids [rows, ids_per_row] or None for expert 0."""
    per_row = 1 if ids is None else ids.shape[1]
    y = np.empty((len(x) * per_row, w.shape[1]), TYPES[y_dtype])
    weight = {"data": _address(w), "dtype": dtype_of(w)}
    weight |= {"num_experts": w.shape[0], "num_out": w.shape[1], "width": w.shape[2]}
    fields = {"weight": weight, "x": _address(x), "y": _address(y), "num_rows": len(x)}
    fields |= {"ids": _address(ids, "uint32_t *"), "ids_per_row": per_row, "activation_bits": 16}
    call = ffi.new("xd_product *", fields | {"x_dtype": dtype_of(x), "y_dtype": y_dtype})
    block, call.scratch = _scratch(lib.xd_product_scratch(cpu, call))
    lib.xd_product_run(cpu, call)
    del block
    return y


def norm(cpu: Any, x: Array, weight: Array | None, eps: float = 1e-6) -> Array:
    """x [rows, width], of any distance between rows."""
    y = np.empty(x.shape, x.dtype)
    fields = {"x": _address(x), "weight": _address(weight), "y": _address(y)}
    fields |= {"num_rows": x.shape[0], "width": x.shape[1], "eps": eps}
    fields |= {"x_stride": x.strides[0] // x.itemsize, "y_stride": x.shape[1]}
    fields |= {"x_dtype": dtype_of(x), "y_dtype": dtype_of(x)}
    fields |= {"weight_dtype": FLOAT32 if weight is None else dtype_of(weight)}
    lib.xd_norm_run(cpu, ffi.new("xd_norm *", fields))
    return y


def glu(
    cpu: Any, activation: int, gate: Array, up: Array | None, alpha: float = 1.702, limit: float = 0
) -> Array:
    """gate and up [rows, width], of any distance between rows."""
    y = np.empty(gate.shape, gate.dtype)
    fields = {"gate": _address(gate), "up": _address(up), "y": _address(y), "num_rows": len(gate)}
    fields |= {"gate_stride": gate.strides[0] // gate.itemsize, "y_stride": gate.shape[1]}
    fields |= {"up_stride": 0 if up is None else up.strides[0] // up.itemsize, "width": gate.shape[1]}
    fields |= {"activation": activation, "dtype": dtype_of(gate), "alpha": alpha, "limit": limit}
    lib.xd_glu_run(cpu, ffi.new("xd_glu *", fields))
    return y


def rope(
    cpu: Any,
    x: Array,
    dims: int,
    offsets: Array,
    *,
    base: float = 0,
    freqs: Array | None = None,
    scale: float = 1,
    traditional: bool = False,
) -> Array:
    """x [batch, heads, tokens, width] with any strides; offsets [batch] or [1]."""
    y = np.empty(x.shape, x.dtype)
    names = ("batch", "head", "token")
    fields = {"x": _address(x), "y": _address(y), **_strides(x, names, "x"), **_strides(y, names, "y")}
    fields |= {"freqs": _address(freqs, "float *"), "offsets": _address(offsets, "int32_t *")}
    fields |= {"offset_stride": int(len(offsets) > 1), "dims": dims, "traditional": traditional}
    fields |= dict(zip(("batch", "heads", "tokens", "width"), x.shape, strict=True))
    call = ffi.new("xd_rope *", fields | {"dtype": dtype_of(x), "base": base, "scale": scale})
    block, call.scratch = _scratch(lib.xd_rope_scratch(cpu, call))
    lib.xd_rope_run(cpu, call)
    del block
    return y


def attention(
    cpu: Any,
    q: Array,
    k: Array,
    v: Array,
    scale: float,
    mask: Array | str | None = None,
    sinks: Array | None = None,
) -> Array:
    """q [batch, heads, queries, dim], k and v [batch, kv_heads, keys, ...] with any strides; the mask None, "causal",
    or an array, boolean or additive, that can be broadcast."""
    batch, heads, queries, dim = q.shape
    y = np.empty((batch, heads, queries, v.shape[3]), q.dtype)
    fields = {"q": _address(q), "k": _address(k), "v": _address(v), "y": _address(y)}
    for name, x in (("q", q), ("k", k), ("v", v), ("y", y)):
        fields |= _strides(x, ("batch", "head", "row"), name)
    fields |= {"batch": batch, "heads": heads, "kv_heads": k.shape[1], "queries": queries, "keys": k.shape[2]}
    fields |= {"dim": dim, "value_dim": v.shape[3], "dtype": dtype_of(q), "scale": scale}
    if isinstance(mask, np.ndarray):
        is_boolean = mask.dtype == np.bool_
        mask = np.broadcast_to(mask, (batch, heads, queries, k.shape[2]))
        fields |= {"mask": _address(mask), "mask_kind": lib.XD_MASK_BOOL if is_boolean else lib.XD_MASK_ADD}
        fields |= {"mask_dtype": FLOAT32 if is_boolean else dtype_of(mask)}
        fields |= _strides(mask, ("batch", "head", "row", "key"), "mask")
    elif mask == "causal":
        fields |= {"mask_kind": lib.XD_MASK_CAUSAL}
    if sinks is not None:
        fields |= {"sinks": _address(sinks), "sinks_dtype": dtype_of(sinks)}
    call = ffi.new("xd_attention *", fields)
    block, call.scratch = _scratch(lib.xd_attention_scratch(cpu, call))
    lib.xd_attention_run(cpu, call)
    del block
    return y
