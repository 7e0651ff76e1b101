"""Rank 0's engine: requests in, events out, one step at a time.

`step` is the architecture in four beats: schedule (which sequences), plan (what to compute, and under which
split), run (the MLX graph with the exchanges inside), deliver (sample, detokenize, send).

Sequences join and leave between steps. The first `max_streams` of those that are open, in the order of their arrival,
are served at once: all whose prompts are in their caches take one token each in a decode step. A prompt is read in
chunks, and between two of them comes a decode step, so that a running stream never waits longer than for one chunk.

The engine outlives epochs. `begin` puts it on the new epoch's runner, whose caches are empty: every sequence is
prefilled again from its transcript (the prompt and what was generated) and goes on with the next token. None is
repeated and none is missing, because a token counts only once its whole step has succeeded, and what is sampled
depends on the logits, the seed, the position and the sequence's own tokens alone.
"""

import secrets
import time
from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as Several
from dataclasses import dataclass, field

import mlx.core as mx
import numpy as np

from expertd.engine.messages import (
    Cancel,
    Candidate,
    Done,
    Failed,
    Logprobs,
    Message,
    Observe,
    Rejected,
    Started,
    Submit,
    Token,
)
from expertd.engine.plan import Plan, WindowsPlan
from expertd.engine.runner import Runner
from expertd.engine.sequence import Sequence, check_ids, prompt_ids
from expertd.engine.text import Detokenizer, StopStrings, Tokenizer
from expertd.errors import ConfigError
from expertd.model.sampler import Row, Sampler, logprobs
from expertd.split.cut import choose


@dataclass
class Engine:
    """`send` gives events to the supervisor; `begin` comes before the first `step`."""

    tokenizer: Tokenizer
    context_length: int
    splits: list[str]
    prefill_chunk: int
    send: Callable[[Message], None]
    vocab_size: int
    max_streams: int = 16
    max_waiting: int = 256
    _runner: Runner | None = None
    _split: str = "solo"
    _fractions: tuple[float, ...] = (1.0,)
    _open: list[Sequence] = field(default_factory=list)
    _to_observe: deque[Observe] = field(default_factory=deque)
    _released: list[int] = field(default_factory=list)
    _num_sequences: int = 0
    _has_decoded: bool = False  # since the last chunk of a prompt

    @property
    def idle(self) -> bool:
        """Whether `step` would find nothing to do."""
        return not self._open and not self._to_observe

    def begin(self, runner: Runner, split: str, fractions: tuple[float, ...]) -> None:
        """Go on in a new epoch: no sequence has a cache in `runner`, and steps are divided by `split`."""
        self._runner, self._split, self._fractions = runner, split, fractions
        self._released = []
        for sequence in self._open:
            sequence.num_computed = 0

    def abandon(self, reason: str) -> None:
        """Give every open request back: another rank leads now, and the supervisor resumes them there."""
        ids = [s.submit.request_id for s in self._open] + [o.request_id for o in self._to_observe]
        for request_id in ids:
            self.send(Failed(request_id, reason, lost=True))
        self._open.clear()
        self._to_observe.clear()
        self._runner = None

    def take(self, message: Submit | Observe | Cancel) -> None:
        """Queue a request, or mark one as cancelled."""
        if isinstance(message, Submit):
            self._admit(message)
            return
        if isinstance(message, Observe):
            self._admit_windows(message)
            return
        self._to_observe = deque(o for o in self._to_observe if o.request_id != message.request_id)
        for sequence in self._open:
            if sequence.submit.request_id == message.request_id:
                sequence.cancelled = True

    def step(self) -> None:
        """Advance by one step, if there is anything to do.

        Raises TransportError when the epoch is over; the step then has not happened, and `begin` comes next.
        """
        assert self._runner is not None
        if self._to_observe:
            self._observe(self._runner, self._to_observe[0])
            return
        sequences = self._schedule()
        if not sequences:
            return
        plan = self._plan(sequences)
        logits = self._runner.lead(plan)
        self._released = []
        for sequence, tokens in zip(sequences, plan.tokens, strict=True):
            sequence.num_computed += len(tokens)
        if logits is not None:
            self._deliver(sequences, logits, plan.split.name)

    # Beat 1: schedule.

    def _schedule(self) -> list[Sequence]:
        """One sequence that has a prompt to read, or all that are ready for their next token."""
        for sequence in [s for s in self._open if s.cancelled]:
            self._finish(sequence, "solo")
        served = self._open[: self.max_streams]
        ready = [s for s in served if s.num_left == 1 and s.num_computed]
        new = next((s for s in served if s not in ready), None)
        if new is None or (ready and not self._has_decoded):
            self._has_decoded = True
            return ready
        self._has_decoded = False
        return [new]

    def _admit(self, submit: Submit) -> None:
        try:
            check_ids(submit, self.vocab_size)
            prompt = prompt_ids(submit, self.tokenizer, self.context_length)
        except ConfigError as e:
            self.send(Rejected(submit.request_id, str(e)))
            return
        if not submit.resumed and len(self._open) >= self.max_streams + self.max_waiting:
            message = f"{len(self._open)} requests are being served or wait already. Ask again later."
            self.send(Rejected(submit.request_id, message, busy=True))
            return
        self._num_sequences += 1
        sequence = self._new_sequence(submit, prompt)
        self._open.append(sequence)
        self.send(Started(submit.request_id, len(prompt)))
        sequence.replay(submit.generated)
        if sequence.finish_reason:  # nothing but its Done was lost
            self._finish(sequence, "solo")

    def _new_sequence(self, submit: Submit, prompt: list[int]) -> Sequence:
        room = self.context_length - len(prompt)
        seed = submit.sampling.seed
        end_ids = frozenset(submit.stop_ids) | (set() if submit.ignore_end else self.tokenizer.end_ids)
        return Sequence(
            sequence_id=self._num_sequences,
            submit=submit,
            prompt=prompt,
            end_ids=end_ids,
            max_tokens=min(room, submit.max_tokens or room),
            sampler=Sampler(submit.sampling, secrets.randbits(32) if seed is None else seed, prompt, end_ids),
            detokenizer=Detokenizer(self.tokenizer),
            stops=StopStrings(submit.stop),
        )

    # Beat 2: plan.

    def _plan(self, sequences: list[Sequence]) -> Plan:
        """All but the last known token are prefilled in chunks; the last one is a decode step."""
        tokens = [self._next_tokens(sequence) for sequence in sequences]
        return Plan(
            sequence_ids=[s.sequence_id for s in sequences],
            tokens=tokens,
            decode=sequences[0].num_left == 1,
            split=choose(self._split, sum(map(len, tokens)), self.splits, self._fractions),
            started=[s.sequence_id for s in sequences if s.num_computed == 0],
            released=list(self._released),
        )

    def _next_tokens(self, sequence: Sequence) -> list[int]:
        # After an interruption the generated tokens are prefilled as well: no measure of the prompt's speed.
        if sequence.num_computed == 0 and not sequence.generated:
            sequence.started_at = time.monotonic()
        at = sequence.num_computed
        return sequence.tokens[at : at + max(1, min(sequence.num_left - 1, self.prefill_chunk))]

    # Beat 3 is Runner.lead. Beat 4: deliver.

    def _deliver(self, sequences: Several[Sequence], logits: mx.array, split: str) -> None:
        rows = np.asarray(logits)  # no copy
        for i, sequence in enumerate(sequences):
            submit, row = sequence.submit, rows[i]
            if submit.logits_file:
                sequence.logits.append(logits[i])
            token_id = sequence.choose(row)
            text, offset = sequence.append(token_id)
            found = (
                [] if submit.logprobs is None else [self._logprobs(row, token_id, submit.logprobs, offset)]
            )
            self.send(Token(submit.request_id, [token_id], text, found))
            if sequence.finish_reason:
                self._finish(sequence, split)

    def _logprobs(self, row: Row, token_id: int, num_top: int, offset: int) -> Logprobs:
        logprob, top = logprobs(row, token_id, num_top)
        data = self.tokenizer.token_bytes
        return Logprobs(
            Candidate(token_id, data(token_id), logprob), [Candidate(i, data(i), p) for i, p in top], offset
        )

    def _finish(self, sequence: Sequence, split: str) -> None:
        self._open.remove(sequence)
        if sequence.num_computed:
            self._released.append(sequence.sequence_id)
        if sequence.submit.logits_file and sequence.logits:
            try:
                with open(sequence.submit.logits_file, "wb") as file:  # given a name, MLX appends a suffix
                    mx.save_safetensors(file, {"logits": mx.stack(sequence.logits)})
            except (RuntimeError, OSError) as e:
                reason = f"cannot write --logits {sequence.submit.logits_file}: {e}"
                self.send(Failed(sequence.submit.request_id, reason))
                return
        self.send(sequence.done(split, len(self._fractions)))

    # Whole windows, for evaluation: one step each, which an interruption repeats.

    def _admit_windows(self, observe: Observe) -> None:
        lengths = {len(window) for window in observe.windows}
        if len(lengths) != 1 or not 1 <= max(lengths) <= self.context_length:
            self.send(
                Rejected(
                    observe.request_id,
                    f"windows of {sorted(lengths)} tokens: wanted one length, at most {self.context_length}.",
                )
            )
            return
        self._to_observe.append(observe)
        self.send(Started(observe.request_id, len(observe.windows) * max(lengths)))

    def _observe(self, runner: Runner, observe: Observe) -> None:
        num_tokens = len(observe.windows) * len(observe.windows[0])
        split = choose(self._split, num_tokens, self.splits, self._fractions)
        start = time.monotonic()
        logits, taps = runner.lead_windows(WindowsPlan(observe.windows, split))
        speed = num_tokens / max(time.monotonic() - start, 1e-9)
        self._to_observe.popleft()
        arrays = {"logits": logits}
        arrays |= {f"hidden.{layer}": hidden.astype(mx.float32) for layer, hidden in taps.hidden.items()}
        arrays |= {f"experts.{layer}": ids for layer, ids in taps.experts.items()}
        try:
            with open(observe.file, "wb") as file:
                mx.save_safetensors(file, arrays)
        except (RuntimeError, OSError) as e:
            self.send(Failed(observe.request_id, f"cannot write {observe.file}: {e}"))
            return
        ranks = len(self._fractions)
        self.send(Done(observe.request_id, "stop", num_tokens, 0, speed, 0.0, split.name, ranks))
