"""A checkpoint that several ranks of this machine read together, for `expertd quality --ranks`.

Theory of operation. The ranks are those that serve (expertd/cluster); rank 0 leaves what it saw of each pass in a
file of a temporary folder. A group lives in an event loop, which watches its ranks all the time, while evaluation is
plain code: so the loop has a thread of its own, and `observe` waits for it. When a rank dies the others go on
with the same pass, and the digits stay the same.
"""

import asyncio
import tempfile
import threading
from concurrent.futures import Future
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import mlx.core as mx
import numpy as np

from expertd.cluster.supervisor import Cluster
from expertd.config import GroupConfig
from expertd.engine.messages import Observe
from expertd.quant.evaluate import Observed
from expertd.quant.metrics import Array

# A pass has thousands of tokens, and one rank may have the machine's slower half; the ranks' pulses say who lives.
EXCHANGE_TIMEOUT_S = 600.0


class GroupReader:
    """A Reader over `num_ranks` ranks under `split`; a context manager, at whose end every process is gone.

    `wide` is as in LocalReader, for every rank. Entering raises what a rank names when it cannot start
    (CheckpointError, ConfigError, ClusterError); `observe` raises ClusterError when the whole group has died.
    """

    def __init__(
        self, folder: Path, num_ranks: int, split: str, wide: bool, scratch: Path | None = None
    ) -> None:
        self.wide = wide
        self._group = GroupConfig(
            str(folder), num_ranks, split, exchange_timeout_s=EXCHANGE_TIMEOUT_S, kernels="mlx", wide=wide
        )
        self._scratch = tempfile.TemporaryDirectory(prefix="expertd-ranks-", dir=scratch)
        self._loop = asyncio.new_event_loop()
        self._opened: Future[Cluster] = Future()
        self._life: asyncio.Task[None] | None = None
        self._thread = threading.Thread(target=self._run, name="ranks", daemon=True)
        self._ids = count()

    def __enter__(self) -> Self:
        self._thread.start()
        try:
            self._opened.result()
        except BaseException:  # Ctrl-C as well
            self._close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None
    ) -> None:
        self._close()

    def observe(self, tokens: Array) -> Observed:
        """What rank 0 saw of windows [num_windows, num_tokens]."""
        file = Path(self._scratch.name) / "observed.safetensors"
        request = Observe(f"windows-{next(self._ids)}", tokens.tolist(), str(file))
        asyncio.run_coroutine_threadsafe(self._opened.result().observe(request), self._loop).result()
        arrays: Any = mx.load(str(file))
        found = {name: np.array(array) for name, array in arrays.items()}
        file.unlink()
        taps: dict[str, dict[int, Array]] = {"hidden": {}, "experts": {}}
        for name, array in found.items():
            kind, _, layer = name.partition(".")
            if layer:
                taps[kind][int(layer)] = array if kind == "hidden" else array.astype(np.int32)
        return Observed(found["logits"], **taps)

    def _close(self) -> None:
        self._loop.call_soon_threadsafe(self._stop)
        self._thread.join()
        self._loop.close()
        self._scratch.cleanup()

    def _stop(self) -> None:
        if self._life:
            self._life.cancel()

    # In the loop's thread.

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._life = self._loop.create_task(self._live())
        try:
            self._loop.run_until_complete(self._life)
        except asyncio.CancelledError:
            pass
        except BaseException as e:
            if not self._opened.done():
                self._opened.set_exception(e)
        finally:
            self._loop.run_until_complete(self._loop.shutdown_asyncgens())

    async def _live(self) -> None:
        async with Cluster.open(self._group) as cluster:
            self._opened.set_result(cluster)
            await asyncio.Event().wait()
