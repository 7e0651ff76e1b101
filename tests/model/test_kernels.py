"""The CPU kernels in MLX's graph: every operation beside MLX's own, and what stays with MLX."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models.activations import precise_swiglu, swiglu, swiglu_oai
from mlx_lm.models.mla import MultiLinear
from mlx_lm.models.switch_layers import SwitchGLU, SwitchLinear, SwitchMLP

from expertd.checkpoint.config import normalise_config, read_config
from expertd.errors import ConfigError
from expertd.model import kernels as module
from expertd.model.kernels import Kernels, isas, open_kernels
from expertd.model.model import Model
from expertd.model.swap import native_functions, replaced, use_native_kernels
from expertd.split.cut import StepSplit
from tests.tiny import make_tiny

Array = np.ndarray[Any, np.dtype[Any]]
SOLO = StepSplit("solo", (1.0,))
FAMILIES = ("qwen3_moe", "mixtral", "deepseek_v3", "glm4_moe", "gpt_oss", "minimax", "qwen3_next")
FLOATS = (mx.float32, mx.float16, mx.bfloat16)
# Of a product, by the bits of the activations (native/kernels/kernels.h).
ERROR = {8: 1.5e-2, 16: 1e-4}
# Of one rounding to a dtype.
ROUNDING = {mx.float32: 1e-6, mx.float16: 1e-3, mx.bfloat16: 5e-3}


@pytest.fixture
def native() -> Kernels:
    return Kernels("", num_threads=2, activation_bits=16)


@pytest.fixture(autouse=True)
def seed() -> None:
    mx.random.seed(7)


def error(got: mx.array, wanted: mx.array | Array) -> float:
    """Relative to `wanted`, in the Euclidean norm."""
    exact = np.array(wanted.astype(mx.float32) if isinstance(wanted, mx.array) else wanted, dtype=np.float64)
    found = np.array(got.astype(mx.float32), dtype=np.float64)
    assert found.shape == exact.shape
    return float(np.linalg.norm(found - exact) / np.linalg.norm(exact))


def same_bits(a: mx.array, b: mx.array) -> bool:
    return a.dtype == b.dtype and bool(mx.array_equal(a, b).item())


# Products.


class GeGLU(nn.Module):
    """Not the activation that one operation of the experts has."""

    def __call__(self, x: mx.array, gate: mx.array) -> mx.array:
        return nn.gelu(gate) * x


class Affine:
    """A packed random weight [num_experts, num_out, width], and what it stands for."""

    def __init__(
        self, shape: tuple[int, ...], bits: int, group_size: int, dtype: mx.Dtype = mx.float32
    ) -> None:
        weight = mx.random.normal(shape).astype(dtype)
        self.arrays = mx.quantize(weight, group_size, bits)
        self.options: dict[str, int] = {"group_size": group_size, "bits": bits}
        scales, biases = (a.astype(mx.float32) for a in self.arrays[1:])
        self.wide = np.array(mx.dequantize(self.arrays[0], scales, biases, **self.options), dtype=np.float64)


@pytest.mark.parametrize("isa", isas())
@pytest.mark.parametrize("activation_bits", [8, 16])
@pytest.mark.parametrize(("bits", "group_size"), [(2, 32), (2, 64), (4, 64), (4, 128), (8, 32)])
def test_affine_products_are_right(isa: str, activation_bits: int, bits: int, group_size: int) -> None:
    native = Kernels(isa, 2, activation_bits)
    assert native.isa == isa
    w = Affine((5, 40, 256), bits, group_size, mx.bfloat16)
    x = mx.random.normal((3, 4, 256)).astype(mx.bfloat16)
    rows, limit = np.array(x.astype(mx.float32), dtype=np.float64), ERROR[activation_bits] + 3e-3
    dense = native.affine_product(x, *(a[2] for a in w.arrays), **w.options)
    assert dense.dtype == mx.bfloat16 and error(dense, rows @ w.wide[2].T) < limit
    ids = mx.random.randint(0, 5, (3, 4, 2)).astype(mx.uint32)
    y = native.affine_product(mx.expand_dims(x, (-2, -3)), *w.arrays, **w.options, ids=ids)
    exact = np.einsum("abw,abkow->abko", rows, w.wide[np.array(ids)])[..., None, :]
    assert error(y, exact) < limit


@pytest.mark.parametrize("x_dtype", FLOATS)
@pytest.mark.parametrize("w_dtype", FLOATS)
def test_plain_products_are_right(native: Kernels, x_dtype: mx.Dtype, w_dtype: mx.Dtype) -> None:
    w, x = mx.random.normal((5, 40, 72)).astype(w_dtype), mx.random.normal((3, 4, 72)).astype(x_dtype)
    wide, rows = (np.array(a.astype(mx.float32), dtype=np.float64) for a in (w, x))
    y = native.plain_product(x, w[2])
    assert y.dtype == (x @ w[2].T).dtype and error(y, rows @ wide[2].T) < ROUNDING[y.dtype]
    ids = mx.random.randint(0, 5, (3, 4, 2)).astype(mx.int32)
    y = native.plain_product(mx.expand_dims(x, (-2, -3)), w, ids)
    exact = np.einsum("abw,abkow->abko", rows, wide[np.array(ids)])[..., None, :]
    assert error(y, exact) < ROUNDING[y.dtype]


@pytest.mark.parametrize(
    ("x_shape", "ids_shape"),
    [
        ((7, 1, 64), (7,)),  # sorted rows of a switch
        ((2, 3, 1, 1, 64), (2, 3, 4)),  # a row for all its experts
        ((2, 3, 4, 1, 64), (2, 3, 4)),  # a row for each
        ((1, 64), (2, 3)),  # one row for everything
        ((2, 1, 5, 64), (3,)),  # heads: several rows, one weight
        ((2, 3, 5, 64), (3,)),
        ((3, 1, 64), (2, 1)),
        ((1, 3, 1, 64), (2, 1, 1)),
        ((1, 3, 1, 64), (3,)),
    ],
)
def test_ids_are_broadcast_as_mlx_does(
    native: Kernels, x_shape: tuple[int, ...], ids_shape: tuple[int, ...]
) -> None:
    w = mx.random.normal((3, 16, 64))
    x, ids = mx.random.normal(x_shape), mx.random.randint(0, 3, ids_shape).astype(mx.uint32)
    wanted = mx.gather_mm(x, w.swapaxes(-1, -2), rhs_indices=ids)
    got = native.plain_product(x, w, ids)
    assert got.shape == wanted.shape and error(got, wanted) < 1e-6


def test_views_are_read_in_their_order(native: Kernels) -> None:
    big = mx.random.normal((6, 5, 130))
    w, ids = Affine((40, 64), 4, 32), mx.array([[0, 9], [1, 9], [2, 9], [1, 9]], dtype=mx.uint32)[:, 0]
    views = [
        big[:, :, :64],
        big[::2, 1:3, 3:67],
        big.swapaxes(0, 1)[..., ::2][..., :64],
        big[::-1, ::-1, 64:0:-1],
    ]
    views.append(mx.broadcast_to(big[:1, :1, :64], (3, 2, 64)))
    for x in views:
        copy = mx.array(np.array(x))
        products = [native.affine_product(a, *w.arrays, **w.options) for a in (x, copy)]
        assert same_bits(*products)
    weight, rows = mx.random.normal((64, 3, 16)).transpose(1, 2, 0), big[:4, :1, :64]
    wanted = mx.gather_mm(rows, weight.swapaxes(-1, -2), rhs_indices=ids)
    assert error(native.plain_product(rows, weight, ids), wanted) < 1e-6


@pytest.mark.parametrize("bits", [0, 2, 8])
def test_a_row_has_its_bits_in_any_company(bits: int) -> None:
    """Alone, among many, gathered or not, by any number of threads and any instruction set."""
    w = Affine((6, 200, 192), bits or 4, 64)
    plain = mx.array(w.wide.astype(np.float32))
    x, ids = (
        mx.random.normal((90, 1, 192)).astype(mx.bfloat16),
        mx.random.randint(0, 6, (90,)).astype(mx.uint32),
    )

    def product(native: Kernels, rows: mx.array, ids: mx.array) -> mx.array:
        if bits == 0:
            return native.plain_product(rows, plain, ids)
        return native.affine_product(rows, *w.arrays, **w.options, ids=ids)

    whole = product(Kernels("", 1, 16), x, ids)
    for native in [Kernels(isa, threads, 16) for isa in isas() for threads in (1, 3)]:
        for rows in (slice(0, 90), slice(40, 41), slice(7, 30)):
            assert same_bits(product(native, x[rows], ids[rows]), whole[rows])
    if bits:
        expert = int(ids[40].item())
        alone = native.affine_product(x[40], *(a[expert] for a in w.arrays), **w.options)
        assert same_bits(alone, whole[40])


def test_no_rows_give_no_rows(native: Kernels) -> None:
    w, none = Affine((3, 40, 64), 2, 32), mx.zeros((0, 1, 64))
    ids = mx.zeros((0,), dtype=mx.uint32)
    assert native.affine_product(none, *w.arrays, **w.options, ids=ids).tolist() == []
    assert native.affine_product(none, *(a[0] for a in w.arrays), **w.options).shape == (0, 1, 40)
    assert native.plain_product(none[:, 0], mx.zeros((40, 64))).tolist() == []
    assert native.rms_norm(none, None, 1e-6).tolist() == []
    assert native.glu(none, none, "silu").tolist() == []
    q = mx.zeros((1, 2, 0, 64))
    assert native.rope(q, 64, traditional=False, base=1e4, scale=1.0, offset=3).shape == q.shape
    assert native.attention(q, mx.zeros((1, 2, 5, 64)), mx.zeros((1, 2, 5, 64)), scale=1.0).tolist() == [
        [[], []]
    ]


def test_an_expert_that_is_not_there_gives_nan_in_its_row_alone(native: Kernels) -> None:
    w, x = Affine((3, 40, 64), 2, 32), mx.random.normal((4, 1, 64))
    ids = mx.array([0, 3, -1, 2], dtype=mx.int32)
    for y in (
        native.affine_product(x, *w.arrays, **w.options, ids=ids),
        native.plain_product(x, mx.array(w.wide.astype(np.float32)), ids),
    ):
        assert np.isnan(np.array(y)).all(axis=(1, 2)).tolist() == [False, True, True, False]


GOOD = Affine((4, 8, 64), 4, 32).arrays
FLAT = tuple(a[0] for a in GOOD)


@pytest.mark.parametrize(
    ("arrays", "options", "words"),
    [
        ((mx.zeros((2, 32)), *FLAT), {}, "x is (2,32), wanted rows of 64"),
        ((mx.zeros((2, 64), dtype=mx.int32), *FLAT), {}, "x is int32"),
        (
            (mx.zeros((2, 64)), FLAT[0].astype(mx.int32), *FLAT[1:]),
            {},
            "packed weight is int32, wanted uint32",
        ),
        ((mx.zeros((2, 64)), *GOOD), {}, "weight is (4,8,8), wanted 2 axes"),
        ((mx.zeros((2, 64)), *FLAT), {"bits": 3}, "3 bits, wanted 2, 4 or 8"),
        ((mx.zeros((2, 64)), *FLAT), {"group_size": 16}, "groups of 16, wanted 32, 64 or 128"),
        ((mx.zeros((2, 64)), *FLAT), {"group_size": 64}, "in groups of 64 with scales (8,2)"),
        ((mx.zeros((2, 64)), *FLAT[:2], FLAT[2].astype(mx.float16)), {}, "biases (8,2) float16"),
        ((mx.zeros((2, 64)), FLAT[0], *(a.astype(mx.int32) for a in FLAT[1:])), {}, "scales is int32"),
        (
            (mx.zeros((2, 1, 64)), *GOOD),
            {"ids": mx.array([0.0, 1.0])},
            "ids are float32, wanted uint32 or int32",
        ),
        ((mx.zeros((64,)), *GOOD), {"ids": mx.array([1])}, "x is (64) with ids (1)"),
    ],
)
def test_wrong_products_are_refused(
    native: Kernels, arrays: Any, options: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValueError, match="product: ") as refusal:
        native.affine_product(*arrays, **{"group_size": 32, "bits": 4, **options})
    assert words in str(refusal.value)


# The float operations.


@pytest.mark.parametrize("dtype", FLOATS)
def test_norms_are_mlxs(native: Kernels, dtype: mx.Dtype) -> None:
    big = mx.random.normal((2, 3, 5, 96)).astype(dtype)
    weight = mx.random.normal((96,)).astype(dtype)
    for x, w in (
        (big, weight),
        (big, None),
        (big[..., 7:50], weight[:43]),
        (big.transpose(0, 2, 1, 3), weight),
        (big[:, 1:2, ::2], weight),
        (big, weight.astype(mx.float32)),
    ):
        wanted, got = mx.fast.rms_norm(x, w, 1e-5), native.rms_norm(x, w, 1e-5)
        assert got.dtype == wanted.dtype and error(got, wanted) < ROUNDING[dtype]
    with pytest.raises(ValueError, match=r"rms_norm: x is \(2,3,5,96\) and weight \(43\)"):
        native.rms_norm(big, weight[:43], 1e-5)


@pytest.mark.parametrize("traditional", [False, True])
@pytest.mark.parametrize("dims", [16, 40])
def test_ropes_are_mlxs(native: Kernels, traditional: bool, dims: int) -> None:
    big = mx.random.normal((2, 3, 5, 40))
    freqs = mx.array([1.5**i for i in range(dims // 2)])
    offsets = [4, mx.array(4), mx.array([3, 9]), 100_000]
    for x in (big, big.transpose(0, 2, 1, 3), big[:, :, 1:4], big[:, 0], big.reshape(2, 1, 3, 5, 40)):
        for offset in offsets:
            for frequencies in ({"base": 1e4, "freqs": None}, {"base": None, "freqs": freqs}):
                options: dict[str, Any] = {
                    "traditional": traditional,
                    "scale": 0.5,
                    "offset": offset,
                    **frequencies,
                }
                wanted, got = mx.fast.rope(x, dims, **options), native.rope(x, dims, **options)
                # MLX multiplies angles in float32, which is coarse at 100000.
                assert error(got, wanted) < (1e-2 if offset is offsets[-1] else 2e-6)


def test_wrong_ropes_are_refused(native: Kernels) -> None:
    x, base = mx.zeros((2, 3, 5, 40)), {"traditional": False, "base": 1e4, "scale": 1.0, "offset": 0}
    for dims, change, words in (
        (41, {}, "41 dims of a width of 40"),
        (48, {}, "48 dims of a width of 40"),
        (40, {"base": None}, "exactly one of base and freqs"),
        (40, {"base": None, "freqs": mx.ones((3,))}, "freqs are (3) for 40 dims"),
        (40, {"offset": mx.array([1, 2, 3])}, "offsets are (3) for a batch of 2"),
    ):
        with pytest.raises(ValueError, match="rope: ") as refusal:
            native.rope(x, dims, **{**base, **change})
        assert words in str(refusal.value)


@pytest.mark.parametrize("dtype", FLOATS)
def test_activations_are_mlxs(native: Kernels, dtype: mx.Dtype) -> None:
    from mlx_lm.models import activations, gemma4_text, step3p5

    both = (4 * mx.random.normal((3, 5, 60))).astype(dtype)
    gate, up = both[..., :30], both[..., 30:]
    calls: list[Callable[[], mx.array]] = [
        lambda: activations.swiglu(gate, up),
        lambda: activations.swiglu(gate, up[:, :1].astype(mx.float32)),
        lambda: activations.swiglu_oai(gate, up),
        lambda: activations.swiglu_oai(gate, up, alpha=1.1, limit=2.0),
        lambda: activations.precise_swiglu(gate, gate, up),
        lambda: step3p5.clamped_swiglu(up, gate, 1.5),
        lambda: gemma4_text.geglu(gate, up),
    ]
    stock = [call() for call in calls]
    with replaced(native_functions(native)):
        ours = [call() for call in calls]
    for got, wanted in zip(ours, stock, strict=True):
        assert got.dtype == wanted.dtype and error(got, wanted) < 2 * ROUNDING[dtype]
    assert activations.swiglu is swiglu and activations.swiglu_oai is swiglu_oai
    assert activations.precise_swiglu is precise_swiglu
    assert error(native.glu(gate, None, "relu2"), nn.relu2(gate)) < ROUNDING[dtype]


def masks(heads: int, queries: int, keys: int) -> Iterator[Any]:
    yield None
    yield "causal"
    seen = mx.random.uniform(shape=(queries, keys)) < 0.7
    seen[:, 0] = True
    yield seen
    yield seen[None, None]
    yield mx.random.normal((1, heads, queries, keys))
    yield mx.random.normal((heads, 1, keys))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("queries", "keys"), [(1, 37), (5, 5), (6, 70)])
def test_attention_is_mlxs(native: Kernels, dtype: mx.Dtype, queries: int, keys: int) -> None:
    q = mx.random.normal((2, queries, 6, 24)).astype(dtype).transpose(0, 2, 1, 3)
    k = mx.random.normal((2, 3, keys + 9, 24)).astype(dtype)[:, :, :keys]
    v = mx.random.normal((2, 3, keys + 9, 40)).astype(dtype)[:, :, :keys, 5:37]
    for mask in masks(6, queries, keys):
        mask = mask.astype(dtype) if isinstance(mask, mx.array) and mask.dtype == mx.float32 else mask
        for sinks in (None, mx.random.normal((6,)).astype(dtype)):
            wide = [a.astype(mx.float32) for a in (q, k, v)]
            wanted = mx.fast.scaled_dot_product_attention(
                *wide, scale=0.3, mask=mask, sinks=None if sinks is None else sinks.astype(mx.float32)
            )
            got = native.attention(q, k, v, scale=0.3, mask=mask, sinks=sinks)
            assert got.dtype == dtype and error(got, wanted) < 2 * ROUNDING[dtype]


def test_attention_gives_what_a_product_reads_without_a_copy(native: Kernels) -> None:
    """Heads side by side: the caller's transpose and reshape are views."""
    q, k = mx.random.normal((1, 4, 6, 16)), mx.random.normal((1, 4, 6, 16))
    y = native.attention(q, k, k, scale=0.25, mask="causal")
    flat = y.transpose(0, 2, 1, 3).reshape(1, 6, -1)
    mx.eval(y, flat)
    assert np.array(flat, copy=False).ctypes.data == np.array(y, copy=False).ctypes.data


def test_wrong_attention_is_refused(native: Kernels) -> None:
    q, k = mx.zeros((1, 4, 3, 16)), mx.zeros((1, 2, 5, 16))
    for arrays, options, words in (
        ((q[0], k, k), {}, "q is (4,3,16)"),
        ((q, k[:, :, :, :8], k), {}, "k (1,2,5,8)"),
        ((q[:, :3], k, k), {}, "q is (1,3,3,16)"),
        ((q, k, k[:, :, :4]), {}, "v (1,2,4,16)"),
        ((q, k, k), {"mask": "diagonal"}, 'mask is "diagonal"'),
        ((q, k, k), {"mask": mx.zeros((3, 3, 5))}, "(3,3,5)"),
        ((q, k, k), {"mask": mx.zeros((2, 4, 3, 5))}, "mask is (2,4,3,5) for scores (1,4,3,5)"),
        ((q, k, k), {"sinks": mx.zeros((3,))}, "sinks are (3) for 4 heads"),
    ):
        with pytest.raises(ValueError) as refusal:
            native.attention(*arrays, scale=1.0, **options)
        assert words in str(refusal.value)


# Experts as one operation.


def quantized_glu(bits: tuple[int, int, int] = (2, 4, 8), dtype: mx.Dtype = mx.bfloat16) -> SwitchGLU:
    """Five experts, 128 wide and 192 inside; up, gate and down have each its own bits."""
    glu = SwitchGLU(128, 192, 5, bias=False)
    for name, number in zip(("up_proj", "gate_proj", "down_proj"), bits, strict=True):
        glu[name] = glu[name].to_quantized(group_size=32 if name == "up_proj" else 64, bits=number)
    glu.set_dtype(dtype)
    return glu


@pytest.mark.parametrize("dtype", FLOATS)
def test_experts_in_one_operation_are_the_bits_of_four(native: Kernels, dtype: mx.Dtype) -> None:
    glu = quantized_glu(dtype=dtype)
    use_native_kernels(glu, native)
    for num_tokens in (1, 3, 40):
        x = mx.random.normal((2, num_tokens, 128)).astype(dtype)
        ids = mx.random.randint(0, 5, (2, num_tokens, 3)).astype(mx.uint32)
        with replaced(native_functions(native)):
            up, gate = (glu[name](x[..., None, None, :], ids) for name in ("up_proj", "gate_proj"))
            wanted = glu.down_proj(glu.activation(up, gate), ids).squeeze(-2)
            one, narrow = glu(x, ids), glu(x[1:, 1:], ids[1:, 1:])
        assert same_bits(one, wanted)
        assert same_bits(narrow, wanted[1:, 1:])  # also of views, and of no rows at all


def test_experts_that_do_not_fit_one_operation_stay_four(native: Kernels) -> None:
    def is_one(glu: Any) -> bool:
        use_native_kernels(glu, native)
        return hasattr(glu, "_kernels")

    assert is_one(quantized_glu())
    biased, other, mixed = SwitchGLU(64, 64, 2, bias=True), quantized_glu(), quantized_glu()
    nn.quantize(biased, group_size=32, bits=4)
    other.activation = GeGLU()
    mixed.down_proj.set_dtype(mx.float32)
    assert not any(is_one(glu) for glu in (biased, other, mixed, SwitchGLU(64, 64, 2)))


def test_experts_that_cannot_be_are_refused(native: Kernels) -> None:
    glu = quantized_glu()
    up, gate, down = (
        (m["weight"], m["scales"], m["biases"], m.group_size, m.bits)
        for m in (glu.up_proj, glu.gate_proj, glu.down_proj)
    )
    x, ids = mx.zeros((2, 128), mx.bfloat16), mx.zeros((2, 3), mx.uint32)
    for arguments, words in (
        ((x, ids.astype(mx.float32), up, gate, down), "ids are float32"),
        ((x[:, :64], ids, up, gate, down), "x is (2,64)"),
        ((x, ids.reshape(6)[:5], up, gate, down), "with ids (5)"),
        ((x, ids, up, gate, up), "and down"),
        ((x, ids, up, tuple(part[:4] for part in gate[:3]) + gate[3:], down), "gate"),
        ((x, ids, (*up[:4], 3), gate, down), "3 bits"),
    ):
        with pytest.raises(ValueError) as refusal:
            native.experts(*arguments, activation="silu")
        assert words in str(refusal.value)


# Modules and models.


class Everything(nn.Module):
    """One of each module that is swapped; None of them has a bias but those called so."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.linear_bias = nn.Linear(64, 96, bias=False), nn.Linear(64, 32)
        self.embedding = nn.Embedding(50, 64)
        self.experts, self.experts_bias = SwitchLinear(64, 32, 5, bias=False), SwitchLinear(64, 32, 5)
        self.heads = MultiLinear(64, 32, 3)
        self.glu, self.mlp = SwitchGLU(64, 96, 5, bias=True), SwitchMLP(64, 96, 5)
        self.experts_bias.bias = mx.random.normal((5, 32))

    def outputs(self, dtype: mx.Dtype) -> dict[str, mx.array]:
        x = mx.sin(mx.arange(40 * 64)).reshape(1, 40, 64).astype(dtype)
        ids = (mx.arange(120) * 7 % 5).reshape(1, 40, 3).astype(mx.uint32)
        each = x[0, :, None]
        return {
            "linear": self.linear(x),
            "linear_bias": self.linear_bias(x),
            "as_linear": self.embedding.as_linear(x),
            "embedding": self.embedding(mx.array([[3, 4]])),
            "experts": self.experts(each, ids[0, :, 0]),
            "experts_bias": self.experts_bias(each, ids[0, :, 0], sorted_indices=False),
            "heads": self.heads(x[None].reshape(1, 4, 10, 64)[:, :3]),
            "latent": self.heads(x[:, None]),
            "other side": self.heads(x[:, None, :, :32], transpose=False),
            "few": self.glu(x[:, :5], ids[:, :5]),
            "many": self.glu(x, ids),
            "mlp": self.mlp(x, ids),
        }


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
@pytest.mark.parametrize("bits", [0, 4])
def test_swapped_modules_give_mlxs_results_and_stay_what_they_are(
    native: Kernels, bits: int, dtype: mx.Dtype
) -> None:
    model = Everything()
    if bits:
        nn.quantize(model, group_size=32, bits=bits)
    wide = model.outputs(mx.float32)
    model.set_dtype(dtype)
    names = [name for name, _ in tree_flatten(model.parameters())]
    types = [type(m) for _, m in model.named_modules()]
    use_native_kernels(model, native)
    ours = model.outputs(dtype)
    assert [name for name, _ in tree_flatten(model.parameters())] == names
    assert all(isinstance(m, t) for (_, m), t in zip(model.named_modules(), types, strict=True))
    for name, wanted in wide.items():
        assert ours[name].dtype == dtype, name
        assert error(ours[name], wanted) < (1e-4 if dtype == mx.float32 else 1.5e-2), name


@pytest.mark.parametrize(
    "options", [{"bits": 3}, {"bits": 6}, {"mode": "mxfp4", "bits": 4, "group_size": 32}, {"bits": 5}]
)
def test_other_formats_stay_with_mlx(native: Kernels, options: dict[str, Any]) -> None:
    model = nn.Sequential(nn.Linear(64, 64, bias=False), SwitchLinear(64, 64, 2, bias=False))
    nn.quantize(model, **{"group_size": 32, **options})
    types = [type(m) for _, m in model.named_modules()]
    use_native_kernels(model, native)
    assert [type(m) for _, m in model.named_modules()] == types


def load(folder: Path, native: Kernels | None) -> Model:
    return Model(folder, normalise_config(read_config(folder)), kernels=native)


def logits(model: Model) -> mx.array:
    """Of a prompt in two chunks, and of two single tokens after it."""
    cache, rows = model.new_cache(), []
    for start, size in ((0, 30), (30, 7), (37, 1), (38, 1)):
        tokens = [(7 * i * i + 3 * i + 11) % 250 for i in range(start, start + size)]
        rows.append(model.forward(tokens, cache, SOLO))
    return mx.concatenate(rows)


@pytest.mark.parametrize("family", FAMILIES)
def test_families_give_mlxs_logits(family: str, native: Kernels, tmp_path: Path) -> None:
    """Unquantized to the last digits; 2-bit experts and a 4-bit trunk as well as activations of 16 bits allow."""
    from expertd.quant.convert import quantize_checkpoint
    from expertd.quant.settings import Settings

    full = make_tiny(tmp_path / "full", family)
    assert error(logits(load(full, native)), logits(load(full, None))) < 1e-5
    quantize_checkpoint(full, tmp_path / "2bit", Settings(effort="plain", group_size=32, trunk=(4,)))
    assert error(logits(load(tmp_path / "2bit", native)), logits(load(tmp_path / "2bit", None))) < 1e-3


def test_models_with_and_without_share_a_process(native: Kernels, tmp_path: Path) -> None:
    folder = make_tiny(tmp_path, "qwen3_moe", dtype="bfloat16")
    stock, ours = load(folder, None), load(folder, native)
    before = logits(stock)
    first = logits(ours)
    assert same_bits(logits(stock), before) and same_bits(logits(ours), first)
    assert not same_bits(first, before) and first.dtype == before.dtype


# Which kernels.


def test_choice_of_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    assert open_kernels("mlx", 16, 1) is None
    for choice in ("native", "auto"):
        native = open_kernels(choice, 8, 2, "portable")
        assert native and (native.isa, native.num_threads, native.activation_bits) == ("portable", 2, 8)
    monkeypatch.setattr(module.mx, "default_device", lambda: mx.Device(mx.gpu))
    assert open_kernels("auto", 16, 1) is None and open_kernels("mlx", 16, 1) is None
    with pytest.raises(ConfigError, match="--kernels native: this model runs on a GPU"):
        open_kernels("native", 16, 1)


def test_a_processor_that_is_not_this_one_is_named() -> None:
    with pytest.raises(ConfigError, match=r"the CPU kernels cannot be opened: .*z80"):
        Kernels("z80", 1, 16)
