"""Which experts the routers choose: a sample of decode steps, counted."""

from collections.abc import Mapping

import mlx.core as mx
import numpy as np
import numpy.typing as npt

# Python builds such a step, 0.2 ms a layer where a tape takes 0.02 (replay.py): one of 16 were 2 % of the time of all.
SAMPLE_EVERY = 128


class ExpertLoad:
    """Counts by layer and expert id; `due` says, once per decode step, whether to look at that one."""

    def __init__(self) -> None:
        self._num_steps = 0
        self._counts: dict[int, npt.NDArray[np.int64]] = {}

    def due(self) -> bool:
        self._num_steps += 1
        return self._num_steps % SAMPLE_EVERY == 0

    def add(self, choices: Mapping[int, mx.array]) -> None:
        """Count evaluated expert ids, of any shape."""
        for layer, ids in choices.items():
            old = self._counts.get(layer, np.zeros(0, np.int64))
            new = np.bincount(np.asarray(ids).ravel(), minlength=len(old))
            new[: len(old)] += old
            self._counts[layer] = new

    def take(self) -> list[tuple[int, list[int]]]:
        """Every layer's counts by expert id since the last time; ids beyond the last one were never chosen."""
        counts, self._counts = self._counts, {}
        return [(layer, found.tolist()) for layer, found in sorted(counts.items())]
