"""A rank whose experts give zeros at once: what everything else costs (bench/bound.py). Only for one rank."""

from typing import Any

import mlx.core as mx

from expertd.cluster.rank import main
from expertd.model import swap


def _zeros(self: Any, x: mx.array, ids: mx.array) -> mx.array:
    return mx.zeros((*ids.shape, x.shape[-1]), dtype=x.dtype)


if __name__ == "__main__":
    for stock, native in swap._SWITCHES.items():
        stock.__call__ = native.__call__ = _zeros  # type: ignore[method-assign]
    main()
