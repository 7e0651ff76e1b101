"""Rank 0's engine: requests in, events out, one step at a time.

`step` is the architecture in four beats: schedule (which sequence), plan (what to compute, and under which
split), run (the MLX graph with the exchanges inside), deliver (sample, detokenize, send). Requests are
served one after another, in the order of their arrival.
"""

import queue
import secrets
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import mlx.core as mx

from expertd.config import GroupConfig
from expertd.engine.messages import Cancel, Failed, Message, Rejected, Started, Submit, Token
from expertd.engine.plan import Plan
from expertd.engine.runner import IDLE_S, Runner
from expertd.engine.sequence import Sequence, prompt_ids
from expertd.engine.text import Detokenizer, StopStrings, Tokenizer
from expertd.errors import ConfigError
from expertd.model.sampler import sample
from expertd.split.cut import choose


@dataclass
class Engine:
    """`inbox` brings Submit and Cancel from another thread; `send` gives events to the supervisor."""

    group: GroupConfig
    runner: Runner
    tokenizer: Tokenizer
    context_length: int
    splits: list[str]
    inbox: "queue.SimpleQueue[Message]"
    send: Callable[[Message], None]
    _waiting: deque[Sequence] = field(default_factory=deque)
    _released: list[int] = field(default_factory=list)
    _num_sequences: int = 0
    _logits: list[mx.array] = field(default_factory=list)

    def step(self) -> None:
        """Advance one sequence by one step; waits at most IDLE_S when there is no work.

        Raises TransportError when the group is broken: the engine is then of no further use.
        """
        sequence = self._schedule()
        if sequence is None:
            return
        plan = self._plan(sequence)
        logits = self.runner.lead(plan)
        sequence.num_computed += len(plan.tokens)
        if logits is not None:
            self._deliver(sequence, logits, plan.split.name)

    # Beat 1: schedule.

    def _schedule(self) -> Sequence | None:
        self._take_messages(block=not self._waiting)
        while self._waiting and self._waiting[0].cancelled:
            self._finish(self._waiting[0], "solo")
        return self._waiting[0] if self._waiting else None

    def _take_messages(self, block: bool) -> None:
        try:
            while True:
                message = self.inbox.get(block=block, timeout=IDLE_S)
                block = False
                if isinstance(message, Submit):
                    self._admit(message)
                elif isinstance(message, Cancel):
                    self._cancel(message.request_id)
        except queue.Empty:
            return

    def _admit(self, submit: Submit) -> None:
        try:
            prompt = prompt_ids(submit, self.tokenizer, self.context_length)
        except ConfigError as e:
            self.send(Rejected(submit.request_id, str(e)))
            return
        room = self.context_length - len(prompt)
        self._num_sequences += 1
        self._waiting.append(
            Sequence(
                sequence_id=self._num_sequences,
                submit=submit,
                prompt=prompt,
                end_ids=self.tokenizer.end_ids,
                max_tokens=min(room, submit.max_tokens or room),
                seed=submit.seed if submit.seed is not None else secrets.randbits(32),
                detokenizer=Detokenizer(self.tokenizer),
                stops=StopStrings(submit.stop),
            )
        )
        self.send(Started(submit.request_id, len(prompt)))

    def _cancel(self, request_id: str) -> None:
        for sequence in self._waiting:
            if sequence.submit.request_id == request_id:
                sequence.cancelled = True

    # Beat 2: plan.

    def _plan(self, sequence: Sequence) -> Plan:
        """All but the last known token are prefilled in chunks; the last one is a decode step."""
        if sequence.num_computed == 0:
            sequence.started_at = time.monotonic()
        num_tokens = max(1, min(sequence.num_left - 1, self.group.prefill_chunk))
        at, released = sequence.num_computed, self._released
        self._released = []
        return Plan(
            sequence_id=sequence.sequence_id,
            is_new=at == 0,
            tokens=sequence.tokens[at : at + num_tokens],
            decode=sequence.num_left == 1,
            split=choose(self.group.split, num_tokens, self.splits, self.group.fractions),
            released=released,
        )

    # Beat 3 is Runner.lead. Beat 4: deliver.

    def _deliver(self, sequence: Sequence, logits: mx.array, split: str) -> None:
        submit = sequence.submit
        if submit.logits_file:
            self._logits.append(logits)
        position = len(sequence.generated)
        token_id = sample(logits, submit.temperature, submit.top_p, sequence.seed, position)
        text = sequence.append(token_id)
        self.send(Token(submit.request_id, [token_id], text))
        if sequence.finish_reason:
            self._finish(sequence, split)

    def _finish(self, sequence: Sequence, split: str) -> None:
        self._waiting.remove(sequence)
        if sequence.num_computed:
            self._released.append(sequence.sequence_id)
        done = sequence.done(split, self.group.num_ranks)
        logits, self._logits = self._logits, []
        if sequence.submit.logits_file and logits:
            try:
                with open(sequence.submit.logits_file, "wb") as file:  # given a name, MLX appends a suffix
                    mx.save_safetensors(file, {"logits": mx.stack(logits)})
            except (RuntimeError, OSError) as e:
                reason = f"cannot write --logits {sequence.submit.logits_file}: {e}"
                self.send(Failed(sequence.submit.request_id, reason))
                return
        self.send(done)
