"""What each rank does for test_exchange.py: exchanges inside MLX graphs."""

from typing import Any

import mlx.core as mx

from expertd.errors import ExpertdError
from expertd.link.mailbox import Mailbox
from expertd.model.exchange import exchange


def chained(box: Mailbox, num_exchanges: int) -> list[list[float]]:
    """Each exchange sends what the one before it brought: own rows, plus one, of [num_ranks, 3]."""
    ones = [1] * box.num_ranks
    rows = mx.full((1, 3), box.rank + 1.0)
    for i in range(num_exchanges):
        everybody = exchange(box, rows, ones, i + 1)
        rows = everybody.sum(0, keepdims=True) / box.num_ranks + box.rank
    mx.eval(rows)
    box.check()
    assert box.statistics()["num_exchanges"] == num_exchanges
    return rows.tolist()


def of_dtype(box: Mailbox, dtype: str) -> list[list[float]]:
    """Rank r sends r rows (rank 0 none at all) of r, r + 0.5, ..."""
    kind = getattr(mx, dtype)
    rows = mx.broadcast_to(mx.arange(5, dtype=mx.float32) / 2 + box.rank, (box.rank, 5)).astype(kind)
    everybody = exchange(box, rows, list(range(box.num_ranks)), 1)
    assert everybody.dtype == kind
    values = everybody.astype(mx.float32).tolist()
    box.check()
    return values


def not_contiguous(box: Mailbox) -> list[list[int]]:
    """A transposed, a strided and a reversed view, and ids that are no contiguous array either."""
    square = mx.arange(16).reshape(4, 4) + 100 * box.rank
    ids = mx.arange(24, dtype=mx.uint32)[::2]
    views = [square.T, square[::2, ::2], square[::-1]]
    results = [
        exchange(box, view, [view.shape[0]] * box.num_ranks, i + 1, ids) for i, view in enumerate(views)
    ]
    mx.eval(results)
    box.check()
    return [r.flatten().tolist() for r in results]


def failing(box: Mailbox, divergent: bool) -> dict[str, Any]:
    """The second of three exchanges fails: other ids on rank 1, or another number."""
    ids = mx.array([1, 2, 3 + box.rank], dtype=mx.uint32) if divergent else None
    tag = 2 if divergent else 2 + box.rank
    good = exchange(box, mx.ones((1, 2)), [1] * box.num_ranks, 1)
    bad = exchange(box, good[:1], [1] * box.num_ranks, tag, ids)
    after = exchange(box, bad[:1] + 5, [1] * box.num_ranks, 9)
    mx.eval(good, bad, after)
    result = {"good": good.tolist(), "bad": bad.tolist(), "after": after.tolist()}
    try:
        box.check()
    except ExpertdError as e:
        result |= {"kind": type(e).__name__, "text": str(e)}
    return result | {"alive": mx.sum(mx.ones(10)).item()}
