"""A small model that guesses what a large one will say: tokens in, the likeliest tokens out. Nothing is divided."""

from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import make_prompt_cache

from expertd.errors import ConfigError
from expertd.model.adapter import load
from expertd.model.caches import SequenceCache
from expertd.model.kernels import Kernels
from expertd.model.swap import native_functions, replaced


class DraftModel:
    """Any model of mlx-lm's, with experts or without; `num_tokens` are those that it knows, from id 0 on."""

    def __init__(
        self, folder: Path, config: dict[str, Any], num_tokens: int, kernels: Kernels | None
    ) -> None:
        """`kernels` None: MLX's. Raises ConfigError when it is of a family whose caches cannot be cut."""
        self._model = load(folder, config, kernels=kernels)
        self._functions = native_functions(kernels) if kernels else []
        self.num_tokens = num_tokens
        if not self.new_cache().forgets:
            kinds = ", ".join(sorted({type(layer).__name__ for layer in self.new_cache().layers}))
            raise ConfigError(
                f"--draft-model {folder}: a {config['model_type']} keeps {kinds}, of which wrong guesses cannot be "
                "taken back. Choose a draft whose layers all keep every key (KVCache), such as a qwen3 or a llama."
            )

    def new_cache(self) -> SequenceCache:
        return SequenceCache(make_prompt_cache(self._model))

    def read(self, tokens: list[int], cache: SequenceCache) -> None:
        """Append tokens to the cache."""
        cache.extend(tokens, decode=False)
        with replaced(self._functions):
            self._model(mx.array([tokens]), cache=cache.layers)
        cache.evaluate()

    def guess(self, tokens: list[int], cache: SequenceCache, length: int) -> list[int]:
        """Append tokens, at least one, to the cache; gives the likeliest `length` that follow, one after the other.

        All but the last of these are in the cache then. They are one graph, evaluated at once.
        """
        ids, found = mx.array([tokens]), list[mx.array]()
        cache.extend(tokens, decode=False)
        with replaced(self._functions):
            for _ in range(length):
                logits = self._model(ids, cache=cache.layers)[:, -1, : self.num_tokens]
                ids = mx.argmax(logits, axis=-1, keepdims=True)
                found.append(ids)
        guesses: list[int] = mx.concatenate(found, axis=1)[0].tolist()  # type: ignore[assignment]
        cache.extend(guesses[:-1], decode=False)
        return guesses
