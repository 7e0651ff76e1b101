"""Rank 0's engine: requests in, events out, one step at a time.

`step` is the architecture in four beats: schedule (which sequences), plan (what to compute, and under which
split), run (the MLX graph with the exchanges inside), deliver (choose the next tokens; delivery.py tells of them).

Sequences join and leave between steps. The first `max_streams` of those that are open, in the order of their arrival,
are served at once, as far as their caches fit in memory (kv_budget.py): all whose prompts are in their caches take one
token each in a decode step. A prompt is read in
chunks (short ones share one), and between two of them comes a decode step, so that a running stream never waits longer
than for one chunk.

The engine outlives epochs. `begin` puts it on the new epoch's runner, and before the next step the ranks agree on what
all of them still have in their caches (runner.py). The rest of each sequence is read again from its transcript (the
prompt and what was generated) like a new prompt, and it goes on with the next token. None is repeated and none is
missing, because a token counts only once its whole step has succeeded, and what is sampled depends on the logits, the
seed, the position and the sequence's own tokens alone. Where a token's logits depend on how many were computed with
it (`Prefixes.one_by_one`), generated tokens are decoded again, one in each step, as they were the first time.
"""

import secrets
import time
from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as Several
from dataclasses import dataclass, field, replace

import mlx.core as mx
import numpy as np

from expertd.engine.delivery import Delivery
from expertd.engine.drafts import Drafts
from expertd.engine.echo import CHUNK, Echo
from expertd.engine.grammar import Grammars
from expertd.engine.homes import MAX_BEHIND, SPARE, by_home, give_homes, home_of
from expertd.engine.kv_budget import KvBudget
from expertd.engine.messages import (
    Cancel,
    Done,
    Failed,
    Message,
    Observe,
    Reading,
    Rejected,
    Started,
    Stats,
    Submit,
)
from expertd.engine.plan import Plan, WindowsPlan
from expertd.engine.planner import Planner, Work
from expertd.engine.prefix import Prefixes, num_common
from expertd.engine.reasoning import budget_of
from expertd.engine.runner import Runner
from expertd.engine.sequence import Sequence, check_ids, prompt_ids
from expertd.engine.speculate import Guesses
from expertd.engine.text import Detokenizer, StopStrings, Tokenizer
from expertd.errors import BusyError, ConfigError, TransportError
from expertd.model.sampler import Row, Sampler
from expertd.split.cut import StepSplit, choose

# Short prompts that one rank reads in a step. They share no work in it, and their first tokens come after it: with 16
# prompts the median one waited 1.8 s in place of 3.3 (MLX's kernels on a core), and all answers took as long as before.
PROMPTS_A_STEP = 8
# About what the last 16 steps show decides which home a sequence gets, and it stays there.
BESIDES_WEIGHT = 1 / 16


@dataclass
class Engine:
    """`send` gives events to the supervisor, at the latest with `flush`; `begin` comes before the first `step`."""

    tokenizer: Tokenizer
    context_length: int
    splits: list[str]
    prefill_chunk: int
    send: Callable[[Message], None]
    vocab_size: int
    flush: Callable[[], None] = lambda: None
    max_streams: int = 16
    max_waiting: int = 256
    kv: KvBudget = field(default_factory=KvBudget)
    prefixes: Prefixes = field(default_factory=Prefixes)
    speculates: bool = False  # only where a token's bits do not depend on how many were computed with it
    drafts: Drafts = field(default_factory=Drafts)
    first_id: int = 0  # of its sequences: no two leaders may give the same, for caches outlive them
    _runner: Runner | None = None
    _split: str = "solo"
    _planner: Planner = field(default_factory=lambda: Planner("solo", (), 1))
    _fractions: tuple[float, ...] = (1.0,)
    _open: list[Sequence] = field(default_factory=list)
    _to_observe: deque[Observe] = field(default_factory=deque)
    _released: list[int] = field(default_factory=list)
    _cuts: list[tuple[int, int]] = field(default_factory=list)
    _settled: list[int] = field(default_factory=list)
    _num_sequences: int = 0
    _num_preempted: int = 0  # not told yet
    _besides: float = 0.0  # the part of a step's time, under `sequences`, in which this rank tells of tokens
    _is_alone: bool = True  # the last step took no other rank
    _has_decoded: bool = False  # since the last chunk of a prompt
    _has_met: bool = False  # in this epoch

    def __post_init__(self) -> None:
        self._grammars = Grammars(self.tokenizer, self.vocab_size)
        self._delivery = Delivery(self.tokenizer, self.send, self.flush)

    @property
    def idle(self) -> bool:
        """Whether `step` would find nothing to do."""
        return not self._open and not self._to_observe

    @property
    def is_ahead(self) -> bool:
        """Whether the other ranks lack what this one computed alone."""
        return self._runner is not None and self._runner.is_ahead

    def rest(self) -> None:
        """When there was nothing to do for a while: let the others catch up. Raises TransportError as `step` does."""
        if self._runner:
            self._runner.rest()

    @property
    def most_tokens(self) -> int:
        """Of a prompt and its answer."""
        return self.kv.most_tokens(self.context_length)

    def begin(self, runner: Runner, split: str, fractions: tuple[float, ...]) -> None:
        """Go on in a new epoch, with the caches that `runner` has; steps are divided by `split`."""
        self._delivery.tell()
        self._runner, self._split, self._fractions = runner, split, fractions
        self._planner = Planner(split, self.splits, len(fractions))
        self._has_met = self._has_decoded = False

    def abandon(self, reason: str) -> None:
        """Give every open request back: another rank leads now, and the supervisor resumes them there."""
        self._delivery.tell()
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
        try:
            self._advance()
        except TransportError:
            self._delivery.tell()
            raise
        if self.idle or self._is_alone:  # else while the others compute the next step
            self._delivery.tell()

    def _advance(self) -> None:
        assert self._runner is not None
        if self.idle:
            return
        if not self._has_met:
            self._meet(self._runner)
        if self._to_observe:
            self._delivery.tell()
            self._observe(self._runner, self._to_observe[0])
            return
        sequences = self._schedule()
        if not sequences:
            return
        plan, work = self._plan(sequences)
        logits = self._run(plan, work)
        for sequence, tokens in zip(sequences, plan.tokens, strict=True):
            sequence.num_computed += len(tokens)
        if logits is not None and work.kind == "check":
            self._check(sequences[0], plan.tokens[0][1:], logits, plan.split.name)
        elif plan.logits and logits is not None:
            self._read(sequences[0], logits)
        elif logits is not None:
            self._deliver(sequences, logits, plan.split.name)

    def stats(self) -> Stats:
        """What is open now, and what was done since this was last asked."""
        assert self._runner is not None
        served, (preempted, self._num_preempted) = self._served, (self._num_preempted, 0)
        return replace(
            self._runner.report(),
            num_running=len(served),
            num_waiting=len(self._open) - len(served),
            num_preempted=preempted,
            kv_budget_bytes=self.kv.num_bytes,
            kv_tokens=sum(s.num_computed for s in self._open),
            reading=[
                Reading(s.submit.request_id, s.num_computed, len(s.tokens))
                for s in served
                if self._num_to_read(s)
            ],
            drafts=self.drafts.take(),
        )

    def _meet(self, runner: Runner) -> None:
        apart = "sequences" in self.splits and len(self._fractions) > 1
        held = runner.meet(apart, self.prefill_chunk)
        for sequence in self._open:
            sequence.num_computed, sequence.home = held.pop(sequence.sequence_id, 0), None
            if sequence.num_computed and (cache := runner.caches[sequence.sequence_id]).pending:
                # What is asked of a prompt is read with all ranks: again, here.
                sequence.num_computed = 0 if sequence.wants_logits else sequence.num_computed
                sequence.home = cache.home
        self._settled, self._released = [], []
        self.prefixes.meet(held, runner.caches)
        self._has_met = True
        for sequence in self._open:
            self._adopt(sequence)

    def _adopt(self, sequence: Sequence) -> None:
        """Let a request that lost its leader go on with the cache that is left of it."""
        if not (sequence.submit.resumed and self._has_met) or sequence.num_computed or sequence.wants_logits:
            return
        assert self._runner is not None
        caches, prompt_tokens = self._runner.caches, len(sequence.prompt)
        found, length = self.prefixes.adopt(prompt_tokens, sequence.tokens, caches)
        if length:
            sequence.sequence_id, sequence.num_computed = found, length
            sequence.home = caches[found].home if caches[found].pending else None
            if not sequence.generated:
                sequence.started_at, sequence.num_cached = time.monotonic(), length

    # Beat 1: schedule.

    def _schedule(self) -> list[Sequence]:
        """Those whose prompts a chunk can hold (a chunk for each rank), or all that are ready for their next token."""
        for sequence in [s for s in self._open if s.cancelled]:
            self._finish(sequence, "solo")
        served = self._served
        for sequence in self._open[len(served) : self.max_streams]:
            self._preempt(sequence)
        ready = [s for s in served if s.num_computed and not self._num_to_read(s)]
        new = [s for s in served if s not in ready]
        if not new or (ready and not self._has_decoded):
            self._has_decoded = True
            return ready
        self._has_decoded = False
        apart = [s for s in new if self._reads_apart(s, len(served))]
        if new[0] not in apart:
            return self._fill_chunk([s for s in new if s not in apart])
        give_homes(apart, served, self._homes)
        return [s for of_one in by_home(apart) for s in self._fill_chunk(of_one)]

    @property
    def _served(self) -> list[Sequence]:
        """The first of those that are open; the others wait."""
        return self.kv.fitting(self._open[: self.max_streams])

    def _preempt(self, sequence: Sequence) -> None:
        """Take a sequence's cache from it, if it has one: those before it need the memory."""
        if not sequence.num_computed:
            return
        self._released.append(sequence.sequence_id)
        self._num_sequences += 1
        sequence.sequence_id = self.first_id + self._num_sequences  # as plans know it, it has ended
        sequence.num_computed, sequence.home = 0, None
        self._num_preempted += 1

    def _fill_chunk(self, new: list[Sequence]) -> list[Sequence]:
        """The first of these and those next to it, PROMPTS_A_STEP in all, as long as a chunk holds what is to be read.

        Who begins like one of them waits: the next step finds that beginning in its cache (_fork).
        """
        taken, room = new[:1], self.prefill_chunk - self._num_to_read(new[0])
        for sequence in [] if new[0].wants_logits else new[1:]:
            number = self._num_to_read(sequence)
            if number > room or sequence.wants_logits or len(taken) == PROMPTS_A_STEP:
                break
            if sequence.num_computed or not self._begins_like(sequence, taken):
                taken.append(sequence)
                room -= number
        return taken

    def _begins_like(self, sequence: Sequence, others: list[Sequence]) -> bool:
        """Whether one of these begins with half of the sequence's prompt, which can then be had from its cache."""
        prompt, half = sequence.prompt, len(sequence.prompt) // 2 + 1
        return self.prefixes.budget_bytes > 0 and any(num_common(prompt, s.prompt, half) for s in others)

    def _reads_apart(self, sequence: Sequence, num_served: int) -> bool:
        """Whether only its home should read a prompt: where streams will be divided, so are the prompts."""
        if sequence.wants_logits or not self._num_to_read(sequence):
            return False
        return (
            sequence.home is not None or self._planner.preferred(Work.of("decode", num_served)) == "sequences"
        )

    def _admit(self, submit: Submit) -> None:
        try:
            check_ids(submit, self.vocab_size)
            # Another leader, with more memory maybe, has taken a resumed one: here it goes on, if only for a token.
            most_tokens = self.context_length if submit.resumed else self.most_tokens
            prompt = prompt_ids(submit, self.tokenizer, self.context_length, most_tokens)
            if not submit.resumed and len(self._open) >= self.max_streams + self.max_waiting:
                raise BusyError(
                    f"{len(self._open)} requests are being served or wait already. Ask again later."
                )
            sequence = self._new_sequence(submit, prompt)
        except (ConfigError, BusyError) as e:
            self.send(Rejected(submit.request_id, str(e), busy=isinstance(e, BusyError)))
            return
        self._open.append(sequence)
        sequence.replay(submit.generated)
        self._adopt(sequence)
        self._start(sequence)

    def _start(self, sequence: Sequence) -> None:
        """Say that the answer begins, once what is asked of its prompt is known; that may be all."""
        if sequence.wants_logits:
            return
        self.send(sequence.started)
        if sequence.max_tokens == 0:
            sequence.finish_reason = "length"
        if sequence.finish_reason:  # or nothing but its Done was lost
            self._finish(sequence, "solo")

    def _new_sequence(self, submit: Submit, prompt: list[int]) -> Sequence:
        """Raises ConfigError when the request's grammar, or how much it asks of its prompt, is too much."""
        self._num_sequences += 1
        tokenizer, chat = self.tokenizer, submit.messages is not None
        thinking = chat and tokenizer.opens_reasoning(prompt)
        room = max(self.most_tokens - len(prompt), len(submit.generated) + 1)
        seed = submit.sampling.seed
        end_ids = frozenset(submit.stop_ids) | (set() if submit.ignore_end else self.tokenizer.end_ids)
        return Sequence(
            sequence_id=self.first_id + self._num_sequences,
            submit=submit,
            prompt=prompt,
            end_ids=end_ids,
            max_tokens=room if submit.max_tokens is None else min(room, submit.max_tokens),
            sampler=Sampler(submit.sampling, secrets.randbits(32) if seed is None else seed, prompt, end_ids),
            detokenizer=Detokenizer(tokenizer, marks=chat),
            stops=StopStrings(submit.stop),
            guesses=Guesses(prompt) if self.speculates and not self.prefixes.one_by_one else None,
            echo=Echo(tokenizer, prompt, submit.prompt_logprobs)
            if submit.echo and not submit.generated
            else None,
            matcher=self._grammars.compile(submit.grammar) if submit.grammar else None,
            grammar_after=tokenizer.grammar_after(prompt) if chat else [],
            budget=budget_of(submit, tokenizer, thinking) if chat else None,
            opening=tokenizer.dialect.think_start if thinking else "",
        )

    def _num_to_read(self, sequence: Sequence) -> int:
        """Tokens to prefill: all but the last known one, or all but the prompt's last where chunks matter."""
        num_known = len(sequence.prompt) + (0 if self.prefixes.one_by_one else len(sequence.generated))
        return max(0, num_known - 1 - sequence.num_computed)

    # Beat 2: plan.

    def _plan(self, sequences: list[Sequence]) -> tuple[Plan, Work]:
        """Prompts are prefilled in chunks; the last known token is a decode step.

        May change the order of the sequences, and leave some for the next step.
        """
        forks = [self._fork(sequence) for sequence in sequences if not sequence.num_computed]
        decode = not self._num_to_read(sequences[0])
        sequences[:] = [s for s in sequences if decode == (not self._num_to_read(s))]
        behind = self._num_behind(sequences)
        tokens = [self._next_tokens(sequence) for sequence in sequences]
        draft = self._draft(sequences[0]) if decode and len(sequences) == 1 and not behind else []
        tokens[0] += draft
        kind = "check" if draft else "decode" if decode else "prefill" if len(sequences) == 1 else "prompts"
        work = Work.of(kind, sum(map(len, tokens)))
        split = self._choose_split(sequences, work, behind)
        if split.name == "sequences":
            self._spread(sequences)
            give_homes(sequences, self._served, self._homes)
            sequences.sort(key=home_of)
            tokens = [self._next_tokens(sequence) for sequence in sequences]
        homes = [home_of(s) for s in sequences] if split.name == "sequences" else []
        plan = Plan(
            sequence_ids=[s.sequence_id for s in sequences],
            tokens=tokens,
            decode=kind == "decode",
            split=split,
            started=[s.sequence_id for s in sequences if s.num_computed == 0],
            released=list(self._released),
            settled=list(self._settled),
            forks=[fork for fork in forks if fork[2]],
            mark=not decode and self.prefixes.budget_bytes > 0,
            cuts=list(self._cuts),
            logits=kind == "check" or (not decode and sequences[0].wants_logits),
            homes=homes,
            spare=SPARE if decode and len(set(homes)) == 1 and behind else 0,
        )
        return plan, work

    def _fork(self, sequence: Sequence) -> tuple[int, int, int]:
        """Begin a sequence: with what another one has in its cache, if one begins alike."""
        assert self._runner is not None
        source, length = 0, 0
        if not sequence.wants_logits:
            caches, prompt_tokens = self._runner.caches, len(sequence.prompt)
            source, length = self.prefixes.find(prompt_tokens, sequence.tokens, caches, sequence.home)
            if length and caches[source].pending and length > caches[source].num_shared:
                sequence.home = caches[source].home
        # After an interruption the generated tokens are read as well: no measure of the prompt's speed.
        if not sequence.generated:
            sequence.started_at, sequence.num_cached = time.monotonic(), length
        sequence.num_computed = length
        return sequence.sequence_id, source, length

    def _draft(self, sequence: Sequence) -> list[int]:
        """Tokens that may follow the last one, if to check them is expected to pay."""
        assert self._runner is not None
        if not sequence.num_computed or sequence.num_left > 1:
            return []
        if self.prefixes.one_by_one or not self._runner.can_cut(sequence.sequence_id):
            return []
        return self.drafts.draft(sequence, self._cost_s)

    def _cost_s(self, num_tokens: int) -> float | None:
        return self._planner.cost_s(Work.of("check" if num_tokens > 1 else "decode", num_tokens))

    @property
    def _homes(self) -> tuple[float, ...]:
        """The ranks' fractions of the sequences; this one has other work, too. Where another split is wanted, all
        wait here until every rank has what it lacks of them."""
        if self._split not in ("auto", "sequences"):
            return (1.0,)
        return self._fractions[0] * (1 - self._besides), *self._fractions[1:]

    def _spread(self, sequences: list[Sequence]) -> None:
        """Let streams that are all at one home leave it, if the others have nearly caught up with them."""
        if len({s.home for s in sequences}) == 1 < len(sequences):
            for sequence in sequences:
                if self._num_behind([sequence]) <= SPARE:
                    sequence.home = None

    def _num_behind(self, sequences: list[Sequence]) -> int:
        assert self._runner is not None
        return self._runner.num_behind([s.sequence_id for s in sequences])

    def _choose_split(self, sequences: list[Sequence], work: Work, behind: int) -> StepSplit:
        read_apart = work.kind in ("prefill", "prompts") and self._reads_apart(
            sequences[0], len(self._served)
        )
        if read_apart or (behind > MAX_BEHIND and self._split != "solo"):
            return StepSplit("sequences", self._fractions)
        split = StepSplit(self._planner.choose(work), self._fractions)
        if split.name != "sequences":
            for sequence in sequences:
                sequence.home = None
        return split

    def _next_tokens(self, sequence: Sequence) -> list[int]:
        """Chunks end at multiples of their length, so that prompts that begin alike have the same ones."""
        at = sequence.num_computed
        chunk = min(self.prefill_chunk, CHUNK) if sequence.wants_logits else self.prefill_chunk
        chunk -= at % chunk
        return sequence.tokens_at(at, max(1, min(self._num_to_read(sequence), chunk)))

    # Beat 3: run.

    def _run(self, plan: Plan, work: Work) -> mx.array | None:
        """Carry out a plan, on every rank; the planner learns what it took."""
        assert self._runner is not None
        start = time.monotonic()
        logits = self._runner.lead(plan, meanwhile=self._delivery.tell)
        waited_s = self._runner.waited_s
        seconds = time.monotonic() - start - waited_s
        self._is_alone = plan.split.name == "solo"
        if plan.homes and plan.decode:
            self._besides += BESIDES_WEIGHT * (self._delivery.told_s / seconds - self._besides)
        self._planner.took(work, plan.split.name, plan.num_tokens, seconds, waited_s)
        for choice in self._planner.news():
            self.send(choice)
        self._released, self._settled, self._cuts = [], [], []
        return logits

    # Beat 4: deliver.

    def _read(self, sequence: Sequence, logits: mx.array) -> None:
        """Take what a chunk of a prompt tells of the tokens that follow."""
        assert sequence.echo is not None
        sequence.echo.take(sequence.num_computed - logits.shape[0], logits)
        self._start(sequence)

    def _deliver(self, sequences: Several[Sequence], logits: mx.array, split: str) -> None:
        rows = np.asarray(logits)  # no copy
        for i, sequence in enumerate(sequences):
            if not sequence.num_left:  # else it is decoded again: what comes next is known
                self._answer(sequence, rows[i], split)

    def _answer(self, sequence: Sequence, row: Row, split: str) -> int | None:
        """Choose the next token by its logits [vocab]; None when the answer is at its end."""
        if sequence.submit.logits_file:
            sequence.logits.append(mx.array(row))
        token_id = sequence.choose(row)
        if sequence.failure:
            self._finish(sequence, split)
            return None
        sequence.take(token_id)
        self._delivery.add(sequence, token_id, row)
        if not sequence.finish_reason:
            return token_id
        self._finish(sequence, split)
        return None

    def _check(self, sequence: Sequence, draft: list[int], logits: mx.array, split: str) -> None:
        """Take tokens as long as they are the draft's, and one more; take back the rest of the step."""
        assert self._runner is not None
        rows, sequence_id, num_known = np.asarray(logits), sequence.sequence_id, len(sequence.generated)
        for i, guess in enumerate([*draft, None]):
            token_id = self._answer(sequence, rows[i], split)
            if token_id is None or token_id != guess:
                break
            sequence.num_guessed += 1
        self.drafts.checked(draft, sequence.generated[num_known:])
        if token_id is None:
            return
        if wrong := len(draft) - i:
            sequence.num_computed -= wrong
            self._runner.cut(sequence_id, sequence.num_computed)
            self._cuts.append((sequence_id, sequence.num_computed))

    def _finish(self, sequence: Sequence, split: str) -> None:
        self._open.remove(sequence)
        if sequence.num_computed and self._runner:
            self._settled.append(sequence.sequence_id)
            useless = self.prefixes.keep(sequence.sequence_id, self._runner.caches)
            self._released += useless
            if sequence.sequence_id not in useless:
                self._runner.save(sequence.sequence_id)
        self._delivery.close(sequence, split, len(self._fractions))

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
