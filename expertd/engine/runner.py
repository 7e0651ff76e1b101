"""Carries out plans, the same way on every rank: owns an epoch's caches and decides nothing."""

from collections.abc import Callable
from typing import TypeVar

import mlx.core as mx

from expertd.engine.plan import Plan, WindowsPlan, decode_plan
from expertd.link.mailbox import Mailbox
from expertd.model.adapter import Taps
from expertd.model.mlx_link import MlxLink
from expertd.model.model import Cache, Model

T = TypeVar("T")

# Between two looks at its control socket, a rank without work waits this long for a frame. A new epoch does not wait
# for it: its supervisor poisons the old one first, and poison ends any wait within a millisecond.
IDLE_S = 0.5


class Runner:
    """One epoch's caches, all empty at its begin, over that epoch's link."""

    def __init__(self, model: Model, link: Mailbox | MlxLink) -> None:
        self._model, self._link = model, link
        self._caches: dict[int, Cache] = {}

    def lead(self, plan: Plan) -> mx.array | None:
        """Rank 0: give the plan to the others and carry it out; float32 logits [num_sequences, vocab] of a decode step.

        Raises TransportError when a rank failed; nothing of that step may be used.
        """
        self._tell(plan)
        return self._execute(plan)

    def lead_windows(self, plan: WindowsPlan) -> tuple[mx.array, Taps]:
        """Rank 0: as `lead`, for whole windows; Model.observe says what it gives."""
        self._tell(plan)
        return self._observe(plan)

    def _tell(self, plan: Plan | WindowsPlan) -> None:
        if self._link.num_ranks > 1:
            self._link.send_frame(plan.encode())

    def follow(self) -> None:
        """Other ranks: carry out one plan, if one comes within IDLE_S."""
        frame = self._link.wait_frame(IDLE_S)
        if frame is None:
            return
        plan = decode_plan(frame)
        if isinstance(plan, WindowsPlan):
            self._observe(plan)
        else:
            self._execute(plan)

    def _observe(self, plan: WindowsPlan) -> tuple[mx.array, Taps]:
        found = self._guarded(lambda: self._model.observe(mx.array(plan.windows), plan.split))
        self._link.check()
        return found

    def _execute(self, plan: Plan) -> mx.array | None:
        for sequence_id in plan.released:
            self._caches.pop(sequence_id, None)
        for sequence_id in plan.started:
            self._caches[sequence_id] = self._model.new_cache()
        caches = [self._caches[sequence_id] for sequence_id in plan.sequence_ids]
        logits = self._guarded(lambda: self._compute(plan, caches))
        self._link.check()
        return logits

    def _compute(self, plan: Plan, caches: list[Cache]) -> mx.array | None:
        if plan.decode:
            return self._model.decode([token for (token,) in plan.tokens], caches, plan.split)
        self._model.prefill(plan.tokens[0], caches[0], plan.split)
        return None

    def _guarded(self, compute: Callable[[], T]) -> T:
        """Compute; what MLX's own link raises becomes the link's failure."""
        try:
            return compute()
        except RuntimeError as e:
            if not isinstance(self._link, MlxLink):
                raise
            raise self._link.failure(e) from e
