"""What must be known of the weights before anything is written: that all are finite, and the trunk's entropies.

A local checkpoint is checked whole, from its bytes. Of a remote one only the trunk, which the entropies need
anyway: to check the experts as well would mean to transfer them twice, so `SourceWeights.take` checks those as
they arrive.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from expertd.errors import CheckpointError
from expertd.quant.ewq import Entropy, measure
from expertd.quant.finite import check_finite
from expertd.quant.weights import SourceWeights

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Survey:
    """The entropy of every candidate's weight, by module path."""

    entropies: dict[str, Entropy]


class Meter:
    """Bytes done, told to whoever watches."""

    def __init__(self, total_bytes: int, progress: Progress | None) -> None:
        self.done, self._total, self._progress = 0, total_bytes, progress

    def tell(self, num_bytes: int, name: str) -> None:
        self.done += num_bytes
        if self._progress:
            self._progress(self.done, self._total, name)


def survey(
    weights: SourceWeights,
    recipe_candidates: Sequence[str],
    progress: Progress | None = None,
    threads: int | None = None,
) -> Survey:
    """Check that the weights are finite and measure the entropy of the modules `recipe_candidates`.

    Takes these modules' weights (of a remote source, all but the experts), so convert with another SourceWeights.
    `progress(done_bytes, total_bytes, name)`; `threads` None means all cores, and changes nothing but the time.
    Raises CheckpointError, which names the tensor and the place in it, for NaN and infinity.
    """
    candidates = {f"{path}.weight": path for path in recipe_candidates}
    is_remote = weights.source.is_remote
    wanted = [n for n in weights.names if n in candidates or (is_remote and n not in weights.expert_names)]
    spans = [] if is_remote else weights.spans({t for name in weights.names for t in weights.needs(name)})
    total_bytes = sum(s.num_bytes for s in spans if s.is_float) + sum(num_bytes(weights, n) for n in wanted)
    meter = Meter(total_bytes, progress)
    check_finite(spans, threads, meter.tell)
    entropies: dict[str, Entropy] = {}
    for name in wanted:
        array = weights.take([name])[name]
        if name in candidates:
            entropies[candidates[name]] = entropy_of(name, array, threads)
        meter.tell(array.nbytes, name)
    return Survey(entropies)


def entropy_of(name: str, array: mx.array, threads: int | None) -> Entropy:
    """Raises CheckpointError for NaN and infinity, which a scale times a code can still make."""
    try:
        return measure(np.array(array.astype(mx.float32), copy=False), threads or os.cpu_count() or 1)
    except ValueError as error:
        raise CheckpointError(
            f"tensor {name!r} holds NaN or infinity once it is widened, wanted finite numbers. "
            "Download the checkpoint again."
        ) from error


def num_bytes(weights: SourceWeights, name: str) -> int:
    """Of a parameter, widened."""
    return int(np.prod(weights.shape(name))) * weights.dtype(name).size
