"""A loaded model as the engine sees it: tokens and a cache in, logits out, under the split of the step."""

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import make_prompt_cache

from expertd.errors import ConfigError
from expertd.model.adapter import StepState, Taps, divide, fast_attention, load, tap
from expertd.model.exchange import Link
from expertd.model.tiles import one_thread_a_product
from expertd.split.cut import StepSplit

Cache = list[Any]


class Model:
    """One rank's copy of the whole model; it is alone until `attach` gives it a link to others."""

    def __init__(self, folder: Path, config: dict[str, Any], wide: bool = False) -> None:
        """`wide` is for evaluation: float32 weights, and experts in tiles (adapter.load)."""
        start = time.monotonic()
        self._state = StepState()
        self._model = load(folder, config, wide)
        self.splits = divide(self._model, self._state)
        self._taps: Taps | None = None
        self.load_s = time.monotonic() - start

    def require(self, split: str) -> None:
        """Raise ConfigError when the family cannot do a split."""
        if split not in ("auto", *self.splits):
            raise ConfigError(
                f"--split {split}: this model's family supports {', '.join(self.splits)}. "
                "Choose one of these or `auto`."
            )

    def attach(self, link: Link | None) -> None:
        """Meet the other ranks over `link` from now on, or nobody (None).

        Caches that an earlier link filled must be dropped first: what MLX has not evaluated of them may call it.
        """
        self._state.link = link

    def new_cache(self) -> Cache:
        """An empty cache for one sequence, of the kinds that the family's layers need."""
        cache: Cache = make_prompt_cache(self._model)
        return cache

    def forward(self, tokens: list[int], cache: Cache, split: StepSplit) -> mx.array:
        """Build the graph of one step: logits [num_tokens, vocab] for tokens appended to the cache's."""
        self._state.begin(split)
        logits: mx.array = self._model(mx.array([tokens]), cache=cache)[0]
        return logits

    def prefill(self, tokens: list[int], cache: Cache, split: StepSplit) -> None:
        """Append tokens to the cache; the logits are never computed."""
        self.forward(tokens, cache, split)
        mx.eval([layer.state for layer in cache])

    def decode(self, token: int, cache: Cache, split: StepSplit) -> mx.array:
        """Append one token; gives the evaluated float32 logits [vocab] of the position after it."""
        logits = self.forward([token], cache, split)[0].astype(mx.float32)
        mx.eval(logits)
        return logits

    def observe(self, tokens: mx.array, split: StepSplit) -> tuple[mx.array, Taps]:
        """One pass over whole windows [num_windows, num_tokens] without a cache, for evaluation.

        Gives float32 logits [num_windows, num_tokens, vocab] and what passed through the layers, the same on every
        rank; all evaluated.
        """
        if self._taps is None:
            self._taps = tap(self._model)
        self._state.begin(split)
        with fast_attention(), one_thread_a_product():
            logits = self._model(tokens).astype(mx.float32)
        mx.eval(logits, self._taps.hidden, self._taps.experts)
        if split.name == "tokens":
            self._gather_choices(self._taps, tokens.shape)
        return logits, self._taps

    def _gather_choices(self, taps: Taps, shape: Sequence[int]) -> None:
        """Under `tokens` a rank's routers see its own tokens alone: swap what they chose, layer by layer."""
        counts, own = self._state.cut(math.prod(shape))
        for layer, ids in sorted(taps.experts.items()):
            mine = ids.reshape(-1, ids.shape[-1])[
                : own.stop - own.start
            ]  # a rank without tokens computed one
            every = self._state.exchange(mine, counts)
            mx.eval(every)  # the next exchange may not overtake it
            taps.experts[layer] = every.reshape(*shape, -1)
