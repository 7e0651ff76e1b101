"""A layer's experts outside of mlx-lm: one at a time, at full width or rounded, and what they are asked.

MLX's gather_qmm takes 65 ms per token on a CPU at 2 bits, and gather_mm wants all experts in float32 at once.
Here each expert's rows are gathered and multiplied as one dense matrix, in float32.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from expertd.model.classes import MoeBlock
from expertd.quant.dense import matmul
from expertd.quant.rounding import Rounded

Ids = np.ndarray[Any, np.dtype[np.int64]]
# How far, of the largest score, a block may be from a weighted sum of its experts' rows and still count as one.
LINEAR = 1e-3


class Experts:
    """The experts of one block: weights [num_experts, out, in] and biases [num_experts, out] by projection.

    `rounded` holds, by projection, those of the experts that are rounded so far.
    """

    def __init__(self, block: MoeBlock, weights: dict[str, mx.array], biases: dict[str, mx.array]) -> None:
        self.block = block
        self.weights = weights
        self.biases = biases
        self.rounded: dict[str, list[Rounded]] = {name: [] for name in weights}
        self.num_experts = weights[block.output].shape[0]

    def weight(self, name: str, expert: int) -> mx.array:
        """Float32 [out, in]: what the expert multiplies by at this moment."""
        rounded = self.rounded[name]
        if expert < len(rounded):
            return rounded[expert].dequantized()
        return self.weights[name][expert].astype(mx.float32)

    def project(self, name: str, rows: mx.array, expert: int) -> mx.array:
        y = matmul(rows, self.weight(name, expert))
        return y + self.biases[name][expert].astype(mx.float32) if name in self.biases else y

    def inner(self, rows: mx.array, expert: int) -> mx.array:
        """What the output projection reads, for float32 rows [n, in]."""
        block: Any = self.block
        hidden: mx.array = block.switch.activation(*(self.project(p, rows, expert) for p in block.inputs))
        return hidden

    def __call__(self, x: mx.array, ids: mx.array) -> mx.array:
        """As the switch: x [..., in] and ids [..., k] to [..., k, out]."""
        rows, asked = x.reshape(-1, x.shape[-1]), np.array(ids).reshape(-1, ids.shape[-1])
        order = np.argsort(asked, axis=None, kind="stable")
        parts = [
            self.project(
                self.block.output, self.inner(rows[mx.array(pairs // ids.shape[-1])], expert), expert
            )
            for expert, pairs in enumerate(_split(asked.ravel()[order], order, self.num_experts))
            if len(pairs)
        ]
        mx.eval(parts)
        y: mx.array = mx.concatenate(parts)[mx.array(np.argsort(order, kind="stable"))]
        return y.reshape(*ids.shape, -1)


def _split(sorted_ids: Ids, order: Ids, num_experts: int) -> list[Ids]:
    """The (token, slot) pairs of every expert, each in the tokens' order."""
    return np.split(order, np.searchsorted(sorted_ids, np.arange(1, num_experts)))


@dataclass(frozen=True)
class Asked:
    """What a switch was asked: rows [num_tokens, in] float32, expert ids and routing weights [num_tokens, k]."""

    rows: mx.array
    ids: Ids
    scores: np.ndarray[Any, np.dtype[np.float32]]

    def by_expert(self, num_experts: int) -> list[tuple[mx.array, mx.array]]:
        """Every expert's tokens (indices) and their routing weights, in the tokens' order."""
        k, order = self.ids.shape[-1], np.argsort(self.ids, axis=None, kind="stable")
        pairs = _split(self.ids.ravel()[order], order, num_experts)
        return [(mx.array(own // k), mx.array(self.scores.ravel()[own])) for own in pairs]


class Recorder:
    """Stands in for the experts of a block: keeps what they are asked, and answers zeros.

    The routing weights are inside the block, in every family's own way. But nearly every block's output is a
    weighted sum of the experts' rows (and of what does not depend on them), so two more runs of the block
    show the weights: slot j answers with the j-th unit vector, and output j rises by weight j. Where the rows go
    through anything else, the weights are taken to be equal.
    """

    def __init__(self) -> None:
        self._answer = 0.0
        self._rows: list[mx.array] = []
        self._ids: list[mx.array] = []
        self._scores: list[mx.array] = []

    def switch(self, x: mx.array, ids: mx.array) -> mx.array:
        """As the switch."""
        if self._answer == 0:
            self._rows.append(x.reshape(-1, x.shape[-1]).astype(mx.float32))
            self._ids.append(ids.reshape(-1, ids.shape[-1]))
        units = mx.eye(ids.shape[-1], x.shape[-1]) * self._answer
        return mx.broadcast_to(units, (*ids.shape, x.shape[-1]))

    def block(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """As the block, whose own function is `call`."""
        answers = []
        for self._answer in (2.0, 1.0, 0.0):
            answers.append(call(*args, **kwargs))
        twice, once, zero = answers
        self._scores.append(_scores(twice, once, zero, self._ids[-1].shape))
        mx.eval(self._rows[-1], self._ids[-1], self._scores[-1])
        return zero

    def result(self) -> Asked:
        scores = np.array(mx.concatenate(self._scores))
        return Asked(mx.concatenate(self._rows), np.array(mx.concatenate(self._ids)).astype(np.int64), scores)


def _scores(twice: Any, once: Any, zero: Any, shape: tuple[int, ...]) -> mx.array:
    """Routing weights [num_tokens, k] of three answers of a block; ones when it is no weighted sum."""
    equal = mx.ones(shape)
    if not isinstance(zero, mx.array) or zero.size // zero.shape[-1] != shape[0] or zero.shape[-1] < shape[1]:
        return equal
    one, two = ((y - zero).astype(mx.float32).reshape(shape[0], -1) for y in (once, twice))
    scores, rest = one[:, : shape[1]], one[:, shape[1] :]
    wrong = mx.max(mx.abs(two - 2 * one)) + (mx.max(mx.abs(rest)) if rest.size else 0)
    largest = mx.max(mx.abs(scores))
    is_sum = mx.logical_and(wrong <= LINEAR * largest, largest > 0)
    return scores if is_sum.item() else equal
