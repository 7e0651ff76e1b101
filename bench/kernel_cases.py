"""What `expertd bench kernels` measures: matrices of real models in the formats they are run in, and their weights.

Weights are as many copies as do not fit the cache, in the memory that MLX gives; calls go through the copies in turn,
and those of experts through the experts as well, so that each call reads its weights from memory.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from expertd.bench.shapes import Matrix, Shape

Array = np.ndarray[Any, np.dtype[Any]]

DECODE_ROWS, PREFILL_ROWS = (1, 4, 8), 512
AFFINE = {"2 bits": 2, "4 bits": 4, "8 bits": 8}
FLOATS = {"bfloat16": mx.bfloat16, "float32": mx.float32}
GROUP_SIZE = 64
MIN_BYTES, CACHES = 256 << 20, 8  # weights in all: at least so much, and so many times the last cache
SORT_FROM = 64  # pairs: mlx-lm sorts them by expert from here on (adapter.SORT_FROM)
BLOCK_BYTES = 8 << 20
CACHE_SIZES = "/sys/devices/system/cpu/cpu0/cache"


@dataclass(frozen=True)
class Case:
    """A matrix in a format, and whose it is. `num_experts` is 0 for a dense one."""

    models: tuple[str, ...]
    matrix: Matrix
    num_experts: int
    top_k: int
    format: str

    @property
    def bits(self) -> int:
        """0 for floats."""
        return AFFINE.get(self.format, 0)

    @property
    def bytes_per_matrix(self) -> int:
        """Of one expert's, or the one there is: codes, scales and biases, or floats."""
        size = self.matrix.num_out * self.matrix.width
        if self.bits:
            return size * self.bits // 8 + size // GROUP_SIZE * 4
        return size * FLOATS[self.format].size

    def rows(self) -> tuple[int, ...]:
        """The numbers of rows that it meets: the head sees one per sequence even when prompts are read."""
        return DECODE_ROWS if self.matrix.name == "head" else (*DECODE_ROWS, PREFILL_ROWS)


def cases_of(shapes: Iterable[Shape], is_quick: bool = False) -> list[Case]:
    """Every distinct matrix of the models in its formats; one that several share is there once."""
    found: dict[tuple[Any, ...], tuple[Matrix, list[str]]] = {}
    for shape in shapes:
        for matrix in shape.matrices():
            is_dense = (
                matrix.kind != "experts"
            )  # of experts' two products, one has a row of x for several pairs
            experts = (0, 1, "") if is_dense else (shape.num_experts, shape.top_k, matrix.name)
            key = (matrix.kind, matrix.num_out, matrix.width, *experts)
            found.setdefault(key, (matrix, []))[1].append(shape.name)
    return [
        Case(tuple(models), matrix, key[3], key[4], name)
        for key, (matrix, models) in found.items()
        for name in _formats(matrix, is_quick)
    ]


def _formats(matrix: Matrix, is_quick: bool) -> tuple[str, ...]:
    if matrix.kind == "float":
        return ("bfloat16",) if is_quick else tuple(FLOATS)
    if is_quick:
        return ("4 bits",) if matrix.kind == "dense" else ("2 bits",)
    return tuple(AFFINE) if matrix.kind == "experts" else (*AFFINE, "bfloat16")


def min_bytes() -> int:
    """What the weights of a case take at least."""
    sizes = []
    for path in Path(CACHE_SIZES).glob("index*/size"):
        text = path.read_text().strip()
        sizes.append(int(text.rstrip("KM")) << (20 if text.endswith("M") else 10))
    return max(MIN_BYTES, CACHES * max(sizes, default=0))


@dataclass(frozen=True)
class Call:
    """One product: which copy of the weights, and the expert of each pair (None: dense)."""

    copy: int
    ids: Array | None


class Weights:
    """The copies of a case's weights. `parts[copy]` are codes, scales and biases, or the floats alone."""

    def __init__(self, case: Case, num_bytes: int, seed: int = 1) -> None:
        self.case = case
        self._block = np.random.default_rng(seed).integers(0, 1 << 32, BLOCK_BYTES // 4, dtype=np.uint32)
        all_bytes = case.bytes_per_matrix * max(1, case.num_experts)
        make = self._affine if case.bits else self._floats
        self.parts = [make() for _ in range(math.ceil(num_bytes / all_bytes))]

    def _shape(self, width: int) -> tuple[int, ...]:
        matrix, experts = self.case.matrix, self.case.num_experts
        return (experts, matrix.num_out, width) if experts else (matrix.num_out, width)

    def _affine(self) -> tuple[mx.array, ...]:
        bits, width = self.case.bits, self.case.matrix.width
        codes = mx.array(np.resize(self._block, self._shape(width * bits // 32)))
        scale = (1 + self._block[:4096] / 2**32) / math.sqrt(width * (4**bits - 1) / 12)
        scales = np.resize(scale.astype(np.float32), self._shape(width // GROUP_SIZE))
        parts = codes, *(mx.array(factor * scales).astype(mx.bfloat16) for factor in (1, (1 - 2**bits) / 2))
        mx.eval(parts)
        return parts

    def _floats(self) -> tuple[mx.array, ...]:
        width = self.case.matrix.width
        values = (self._block[: BLOCK_BYTES // 8].view(np.int32) / 2**31).astype(np.float32) / math.sqrt(
            width
        )
        weight = mx.array(np.resize(values, self._shape(width))).astype(FLOATS[self.case.format])
        mx.eval(weight)
        return (weight,)

    def exact(self, copy: int, expert: int | None, num_out: int) -> Array:
        """The first rows of a matrix in float64."""
        own = [part if expert is None else part[expert] for part in self.parts[copy]]
        rows = [part[:num_out] for part in own]
        if not self.case.bits:
            return np.array(rows[0].astype(mx.float32)).astype(np.float64)
        words, bits = np.array(rows[0]), self.case.bits
        codes = (words[..., None] >> np.arange(0, 32, bits, dtype=np.uint32)) & (2**bits - 1)
        groups = codes.reshape(len(words), -1, GROUP_SIZE).astype(np.float64)
        scales, biases = (np.array(part.astype(mx.float32))[..., None] for part in rows[1:])
        exact: Array = (groups * scales + biases).reshape(len(words), -1)
        return exact


def make_calls(weights: Weights, num_rows: int) -> list[Call]:
    """Calls that go through all copies, and through all experts before one comes again, as far as routing lets them.

    One row's calls walk through the experts; several rows choose theirs by lot, each `top_k` different ones, as tokens
    do.
    """
    case, random = weights.case, np.random.default_rng(num_rows)
    copies = range(len(weights.parts))
    if not case.num_experts:
        return [Call(copy, None) for copy in copies]
    if num_rows > 1:
        return [Call(copy, _route(case, num_rows, random)) for copy in copies for _ in range(2)]
    walks = [random.permutation(case.num_experts).astype(np.uint32) for _ in copies]
    starts = range(0, case.num_experts - case.top_k + 1, case.top_k)
    return [Call(copy, walks[copy][start : start + case.top_k]) for start in starts for copy in copies]


def _route(case: Case, num_rows: int, random: np.random.Generator) -> Array:
    chosen = [random.choice(case.num_experts, case.top_k, replace=False) for _ in range(num_rows)]
    ids = np.concatenate(chosen).astype(np.uint32)
    return np.sort(ids) if ids.size >= SORT_FROM else ids


def work_of(case: Case, num_rows: int, calls: list[Call]) -> dict[str, Any]:
    """What one call does in the mean: pairs of row and matrix, bytes of weights read once each, operations."""
    pairs = num_rows * case.top_k if case.num_experts else num_rows
    distinct = [len(np.unique(call.ids)) if call.ids is not None else 1 for call in calls]
    num_bytes = case.bytes_per_matrix * sum(distinct) / len(distinct)
    operations = 2 * pairs * case.matrix.num_out * case.matrix.width
    return {
        "pairs": pairs,
        "bytes": round(num_bytes),
        "operations": operations,
        "intensity": round(operations / num_bytes, 3),
    }


def activations(case: Case, num_rows: int) -> tuple[mx.array, int]:
    """x as mlx-lm lays it out, [num_rows or pairs, width], and how many pairs share a row of it.

    Pairs that are sorted by expert have a row each, and so have those of what the experts themselves made.
    """
    per_row = case.top_k if case.num_experts else 1
    if per_row > 1 and (case.matrix.name != "experts gate/up" or num_rows * per_row >= SORT_FROM):
        num_rows, per_row = num_rows * per_row, 1
    values = np.random.default_rng(2).standard_normal((num_rows, case.matrix.width), dtype=np.float32)
    x = mx.array(values).astype(FLOATS.get(case.format, mx.bfloat16))
    mx.eval(x)
    return x, per_row


def describe(case: Case) -> dict[str, Any]:
    matrix = case.matrix
    return {
        "models": list(case.models),
        "matrix": matrix.name,
        "num_out": matrix.num_out,
        "width": matrix.width,
        "num_experts": case.num_experts,
        "top_k": case.top_k,
        "format": case.format,
    }


def points(cases: Iterable[Case], rows: Iterable[int] | None) -> Iterator[tuple[Case, tuple[int, ...]]]:
    """Each case with the numbers of rows to measure; `rows` limits them."""
    for case in cases:
        chosen = tuple(n for n in case.rows() if rows is None or n in set(rows))
        if chosen:
            yield case, chosen
