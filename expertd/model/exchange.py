"""The exchange as an operation of the MLX graph: the Python face of native/exchange.cpp."""

from importlib.metadata import version
from typing import Protocol, runtime_checkable

import mlx.core as mx

import expertd.native._graph as _graph
from expertd.errors import ConfigError

MLX_VERSION = version("mlx")

if _graph.built_for_mlx != MLX_VERSION:
    raise ConfigError(
        f"expertd was compiled for mlx {_graph.built_for_mlx} but mlx {MLX_VERSION} is installed. "
        "Run `pip install --force-reinstall --no-deps expertd`."
    )


class NativeLink(Protocol):
    """A link that the graph calls in C: who we are, and a function with its context, as integers.

    The function is `int (*)(void *address, uint32_t tag, uint64_t digest, const void *mine,
    const size_t *sizes, void *all)`, as xd_mailbox_exchange in native/mailbox.h.
    """

    rank: int
    num_ranks: int
    function: int
    address: int


@runtime_checkable
class RowLink(Protocol):
    """A link that builds its exchanges of MLX's own operations (expertd.model.mlx_link)."""

    rank: int
    num_ranks: int

    def exchange_rows(self, rows: mx.array, num_rows: list[int]) -> mx.array: ...


Link = NativeLink | RowLink


def exchange(
    link: Link, rows: mx.array, num_rows: list[int], tag: int, ids: mx.array | None = None
) -> mx.array:
    """Swap rows with every rank: [num_rows[rank], width] -> [sum(num_rows), width], in rank order.

    `tag` numbers the exchanges of a step; `ids` (uint32), when given, must be the same on every rank;
    a RowLink checks neither.
    Raises ValueError when the shapes do not fit each other.
    """
    if len(num_rows) != link.num_ranks or min(num_rows) < 0:  # C takes one size per rank from this list
        raise ValueError(f"exchange: num_rows is {num_rows}, wanted {link.num_ranks} counts")
    if isinstance(link, RowLink):
        return link.exchange_rows(rows, num_rows)
    result: mx.array = _graph.exchange(rows, num_rows, link.rank, link.function, link.address, tag, ids)
    return result
