"""Carries out plans, the same way on every rank: owns the caches and decides nothing.

Caches outlive epochs. A rank takes a step that failed back at once. Ranks may then have come to different ends, and a
rank may be new: at a `Meeting`, before an epoch's first step, rank 0 names what it has, each rank answers how much of
that it has too, and all cut every cache to the longest beginning that everybody has. What some rank lacks altogether
is dropped everywhere, and its sequence is read again. Unless whole sequences may be divided over the ranks: then rank 0
keeps what it has and goes on with it as its home, and the others get the tokens that they lack (`Lacking`).

Under `solo` nobody needs the other ranks, and a group must not be slower than rank 0 alone: on one host they would
take memory bandwidth from it. So rank 0 takes decode steps without a word, and lets the others catch up when it has
nothing to do, before the next step that is told, or when a new leader would have to read for RECOVER_S. They then read
many tokens at once, which is cheap, or decode them where a chunk would leave other bits (Model.one_by_one). Where a
step waits for that, rank 0 sends what its own steps left instead, if that is faster (`_copy_steps`). Of a
sequence that is over and that nobody will begin with, they are told nothing.

Under `sequences` each sequence has a home, the rank that alone computes it. The others get its tokens with the plans
and keep them (SequenceCache.pending), so that a step of any other split only has to read first what is pending. Of a
sequence whose home is rank 0 they need not read it, if rank 0 sends its keys and values (`Rows`), where that is faster
(copies.py).
"""

import functools
import math
import operator
import time
from collections import Counter
from collections.abc import Callable
from collections.abc import Set as AbstractSet
from dataclasses import replace
from itertools import zip_longest
from typing import TypeVar

import mlx.core as mx

from expertd.engine.copies import FRAMES_BESIDE, Copies
from expertd.engine.messages import Load, Stats
from expertd.engine.meter import Meter
from expertd.engine.plan import CatchUp, Lacking, Meeting, Plan, Rows, Told, WindowsPlan, decode_plan
from expertd.errors import RemoteProtocolError, TransportError
from expertd.link.mailbox import Mailbox
from expertd.model.adapter import Taps
from expertd.model.cache_files import CacheFiles
from expertd.model.caches import MERGED, Piece, SequenceCache
from expertd.model.mlx_link import MlxLink
from expertd.model.model import Model, cache_bytes
from expertd.model.rows import pack_rows, put_rows, row_bytes
from expertd.split.cut import StepSplit

T = TypeVar("T")

# Between two looks at its control socket, a rank without work waits this long for a frame. A new epoch does not wait
# for it: its supervisor poisons the old one first, and poison ends any wait within a millisecond.
IDLE_S = 0.5
# A rank's answer for one cache, at a meeting: a bit for each of the lengths that were named.
MASK_BYTES = 8

# A meeting's frame has to fit a slot: of 100 bytes for a cache at most, and a slot has a MiB.
MAX_OFFERED = 4096

# Tokens of one frame at most, and one piece more: as many as surely fit a slot.
MAX_LACKING = 100_000

# When rank 0 dies, what the others have not caught up with is read from the transcripts. By what steps took, that may
# last so long, a tenth of what the death costs anyway (1.5 s until it is noticed); at most a chunk, and never less than
# so many steps: few tokens cost nearly as much to read as 32.
RECOVER_S = 0.1
CATCH_UP_STEPS = 32

SOLO = StepSplit("solo", (1.0,))

Caches = dict[int, SequenceCache]  # by sequence


def _without(step: Plan, sequence_ids: AbstractSet[int]) -> Plan:
    """The step without the tokens of these sequences."""
    kept = [(i, t) for i, t in zip(step.sequence_ids, step.tokens, strict=True) if i not in sequence_ids]
    return replace(step, sequence_ids=[i for i, _ in kept], tokens=[tokens for _, tokens in kept])


class Runner:
    """One rank's part in an epoch, over that epoch's link; `caches` are the rank's, from the epochs before."""

    def __init__(
        self, model: Model, link: Mailbox | MlxLink, caches: Caches, files: CacheFiles | None = None
    ) -> None:
        self._model, self._link, self.caches = model, link, caches
        self._files = files
        self._untold: list[Plan] = []
        self._num_untold = 0  # tokens
        # What it takes to read a token again, as fast as it went at load or since.
        self._read_s = model.read_s
        self.waited_s = 0.0  # for each other, before the last step
        self._copies = Copies(0 if isinstance(link, MlxLink) else link.slot_bytes)
        self._meter = Meter()
        self._waits: tuple[list[int], float] = ([], 0.0)  # those that were told
        if isinstance(link, MlxLink):  # nothing can be swapped outside a graph
            caches.clear()

    def meet(self, apart: bool = False, chunk: int = MERGED) -> dict[int, int]:
        """Rank 0, before an epoch's first step: agree with the others on what all of them have.

        `apart`: what only rank 0 has stays, and rank 0 is its home; prompts were read in chunks of `chunk` tokens.
        Gives the number of tokens in the cache of each sequence that has one.
        """
        offered = [(i, cache.lengths()[: 8 * MASK_BYTES]) for i, cache in self.caches.items()]
        lengths = dict([(i, lengths) for i, lengths in offered if lengths][-MAX_OFFERED:])
        meeting = Meeting(lengths, {i: self.caches[i].digests(ns) for i, ns in lengths.items()}, apart)
        self._tell(meeting)
        held = self._meet(meeting)
        for sequence_id in [i for i, cache in self.caches.items() if cache.num_shared < len(cache)]:
            self._tell_lacking(sequence_id, chunk)
        return held

    def _tell_lacking(self, sequence_id: int, chunk: int) -> None:
        """Rank 0: let the others know what it alone has of a sequence, in the pieces in which it was computed."""
        cache = self.caches[sequence_id]
        cache.home, cache.uneven = 0, True
        cache.pending, cache.num_pending = [], 0
        cache.add_pending(cache.pieces(cache.num_shared, chunk))
        left = list(cache.pending)
        while left:
            pieces = [left.pop(0)]
            while left and sum(len(piece.tokens) for piece in pieces) < MAX_LACKING:
                pieces.append(left.pop(0))
            self._tell(Lacking(sequence_id, [piece.tokens for piece in pieces], [p.decode for p in pieces]))

    def _lack(self, lacking: Lacking) -> None:
        """Other ranks: note it, to be read when it is needed or there is time."""
        if lacking.sequence_id not in self.caches:
            self.caches[lacking.sequence_id] = SequenceCache(self._model.new_cache())
        cache = self.caches[lacking.sequence_id]
        cache.home, cache.uneven = 0, True
        cache.add_pending(map(Piece, lacking.tokens, lacking.decode))

    def num_behind(self, sequence_ids: list[int]) -> int:
        """Rank 0: how many tokens of these sequences only their homes have."""
        known = [self.caches[i] for i in sequence_ids if i in self.caches]
        return sum(cache.num_pending for cache in known)

    def lead(self, plan: Plan, meanwhile: Callable[[], None] = lambda: None) -> mx.array | None:
        """Rank 0: give the plan to the others and carry it out; float32 logits where the plan has some.

        `meanwhile` is what rank 0 has to do besides, while the others compute already.
        Raises TransportError when a rank failed; nothing of that step may be used.
        """
        began = time.monotonic()
        told = not self._is_alone(plan)
        if told:
            self._tell_all(plan)
        else:
            if self._is_far_ahead:  # now, not after the step: a failure would leave its tokens in the caches
                self.rest()
            self._read_known(plan)
        if plan.spare:
            plan = self._copy_spare(plan)
        start = time.monotonic()
        self.waited_s = start - began
        if told and plan.split.name != "solo":
            self._tell(plan)
        meanwhile()
        logits = self._execute(plan)
        if told:
            self._note_told(plan)
        else:
            self._note_untold(plan)
        seconds = time.monotonic() - start
        if plan.decode == self._model.one_by_one:
            self._read_s = min(self._read_s, seconds / plan.num_tokens)
        self._meter.took(plan, seconds)
        return logits

    def rest(self) -> None:
        """Rank 0, when there is nothing to do: let the others catch up."""
        if self._untold:
            self._tell(CatchUp(self._take_untold()))

    @property
    def is_ahead(self) -> bool:
        """Rank 0: whether the others have to catch up."""
        return bool(self._untold)

    def _is_alone(self, plan: Plan) -> bool:
        """Whether rank 0 takes a step without a word."""
        if (
            not plan.decode
            or plan.forks
            or plan.cuts
            or plan.split.name != "solo"
            or self._link.num_ranks == 1
        ):
            return False
        known = [self.caches[i] for i in plan.sequence_ids if i not in plan.started]
        return all(cache.forgets for cache in known)

    def _note_untold(self, plan: Plan) -> None:
        self._untold.append(plan)
        self._num_untold += plan.num_tokens

    @property
    def _is_far_ahead(self) -> bool:
        """Whether a new leader would have to read for RECOVER_S."""
        allowed = min(MERGED, RECOVER_S / self._read_s)
        return len(self._untold) >= CATCH_UP_STEPS and self._num_untold >= allowed

    def _tell_all(self, plan: Plan) -> None:
        """Tell of what rank 0 did alone, and let all read what some did alone, before a step that is told.

        A plan of `solo` goes with it: nobody has to wait. With another split all have it when this returns.
        """
        known = [] if plan.homes else [i for i in plan.sequence_ids if i in self.caches]
        self._copy_pending(known)
        pending = [i for i in known if self.caches[i].pending]
        over = set(plan.released) - {source for _, source, _ in plan.forks}
        untold, is_solo = self._take_untold(over), plan.split.name == "solo"
        if not is_solo and self._copy_steps(untold):
            untold = []
        if not (pending or untold):
            if is_solo:
                self._tell(plan)
            return
        self._tell(CatchUp(untold, pending, [plan] if is_solo else []))
        self._read_pending(pending)
        if not is_solo:
            self._tell(CatchUp([]))  # it is taken when the one before is done

    def _copy_steps(self, steps: list[Plan]) -> bool:
        """Rank 0: send the others what these steps left in the caches, if that pays: else they have to redo them."""
        left = Counter[int]()
        for step in steps:
            left.update({i: len(t) for i, t in zip(step.sequence_ids, step.tokens, strict=True)})
        held = [(i, self.caches[i], num) for i, num in left.items() if i in self.caches]
        if not held or not all(cache.forgets for _, cache, _ in held):
            return False
        copies, size = self._copies, max(row_bytes(cache.layers) for _, cache, _ in held)
        longest, total = max(num for *_, num in held), sum(num for *_, num in held)
        if longest > copies.frame_tokens(size) or not copies.pay(total, size, self._read_s):
            return False
        self._tell(CatchUp(steps, copied=True))
        rows = [
            Rows(i, len(cache) - num, num, pack_rows(cache.layers, len(cache) - num, len(cache)))
            for i, cache, num in held
        ]
        for frame in copies.frames_of(rows):
            if not copies.pay(total, size, self._read_s):  # the link is slow: the others read the rest
                self._tell(CatchUp([], [one.rows_of for one in rows]))
                self._tell(CatchUp([]))  # it is taken when the one before is done
                break
            began = time.monotonic()
            self._tell(CatchUp([], rows=frame))
            copies.took(time.monotonic() - began)
            rows, total = rows[len(frame) :], total - sum(one.num_tokens for one in frame)
        return True

    def _await_rows(self, steps: list[Plan]) -> None:
        """Other ranks: note what rank 0 did alone, of which it sends the rows."""
        self._read_pending([i for i in {i: 0 for s in steps for i in s.sequence_ids} if i in self.caches])
        for step in steps:
            self._prepare(step)
            for sequence_id, tokens in zip(step.sequence_ids, step.tokens, strict=True):
                cache = self.caches[sequence_id]
                if not cache.pending:
                    cache.share()
                cache.home = 0
                cache.add_pending([Piece(tokens, step.decode)])

    def _read_known(self, plan: Plan) -> None:
        """Rank 0, before a step that it takes alone: read what it lacks, which is not the step's work, and send the
        others what only rank 0 has: they will redo the step."""
        known = [i for i in plan.sequence_ids if i in self.caches and self.caches[i].pending]
        self._copy_pending(known)
        self._read_pending(known)

    def _take_untold(self, over: AbstractSet[int] = frozenset()) -> list[Plan]:
        """What the others are to be told, without the tokens of sequences that are `over`, if they know these."""
        steps, self._untold, self._num_untold = self._untold, [], 0
        for step in steps:
            self._note_told(step)
        over = over - {i for step in steps for i in step.started}
        return [_without(step, over) for step in steps] if over else steps

    def _note_told(self, plan: Plan) -> None:
        for sequence_id in [] if plan.homes else plan.sequence_ids:
            if cache := self.caches.get(sequence_id):
                cache.share()

    def _copy_pending(self, sequence_ids: list[int], max_frames: float = math.inf) -> None:
        """Rank 0: send what is pending of these sequences, if this is their home, in `max_frames` in all."""
        last = self._copies.num_frames + max_frames
        for sequence_id in sequence_ids:
            cache = self.caches[sequence_id]
            if cache.pending and cache.home == 0 and cache.forgets:
                start = cache.num_shared
                cache.num_shared = self._copy(sequence_id, start, start + cache.num_pending, last)
                cache.take_tokens(cache.num_shared - start)

    def _copy(self, sequence_id: int, start: int, stop: int, last: float) -> int:
        """Rank 0: send rows of tokens `start` to `stop` to the others, as long as that pays, up to frame `last` of this
        epoch; gives how far it came."""
        layers = self.caches[sequence_id].layers
        size = row_bytes(layers)
        copies = self._copies
        room = copies.frame_tokens(size)
        while start < stop and copies.num_frames < last and copies.pay(stop - start, size, self._read_s):
            began, num = time.monotonic(), min(room, stop - start)
            self._tell(Rows(sequence_id, start, num, pack_rows(layers, start, start + num)))
            copies.took(time.monotonic() - began)
            start += num
        return start

    def _copy_spare(self, plan: Plan) -> Plan:
        """Rank 0: send the others what they would read beside this step, if that pays: then they need not."""
        before = self.num_behind(plan.sequence_ids)
        self._copy_pending(plan.sequence_ids, FRAMES_BESIDE)
        return replace(plan, spare=0) if self.num_behind(plan.sequence_ids) < before else plan

    def _take_rows(self, rows: Rows) -> None:
        """Other ranks: what `_copy` sent. Raises RemoteProtocolError when it does not fit what is here."""
        cache = self.caches.get(rows.rows_of)
        here, pending = (0, 0) if cache is None else (len(cache), cache.num_pending)
        if cache is None or here != rows.start or not 0 < rows.num_tokens <= pending:
            raise RemoteProtocolError(
                f"rank 0 sent {rows.num_tokens} rows from token {rows.start} on, of sequence {rows.rows_of}, "
                f"of which {here} tokens are here and {pending} pending"
            )
        put_rows(cache.layers, rows.start, rows.num_tokens, rows.arrays)
        for piece in cache.take_tokens(rows.num_tokens):
            cache.extend(piece.tokens, piece.decode)
        cache.num_shared = len(cache)
        cache.evaluate()

    def lead_windows(self, plan: WindowsPlan) -> tuple[mx.array, Taps]:
        """Rank 0: as `lead`, for whole windows; Model.observe says what it gives."""
        self._tell(plan)
        return self._observe(plan)

    def report(self) -> Stats:
        """Rank 0: what was done in this epoch since the last report, and the bytes of all caches."""
        (before, before_s), self._waits = self._waits, self._link.waits()
        total, total_s = self._waits
        waits = [a - b for a, b in zip_longest(total, before, fillvalue=0)]
        return Stats(
            kv_bytes=sum(cache_bytes(cache.layers) for cache in self.caches.values()),
            steps=self._meter.take(),
            waits=waits if any(waits) else [],
            waited_s=total_s - before_s,
            loads=[Load(layer, chosen) for layer, chosen in self._model.expert_load.take()],
        )

    def _tell(self, plan: Told) -> None:
        if self._link.num_ranks > 1:
            self._link.send_frame(plan.encode())

    def follow(self) -> None:
        """Other ranks: carry out one plan, if one comes within IDLE_S."""
        frame = self._link.wait_frame(IDLE_S)
        if frame is None:
            return
        plan = decode_plan(frame)
        if isinstance(plan, Meeting):
            self._meet(plan)
        elif isinstance(plan, Lacking):
            self._lack(plan)
        elif isinstance(plan, WindowsPlan):
            self._observe(plan)
        elif isinstance(plan, Rows):
            self._take_rows(plan)
        elif isinstance(plan, CatchUp):
            if plan.copied:
                self._await_rows(plan.steps)
            else:
                self._redo(plan.steps)
            for rows in plan.rows:
                self._take_rows(rows)
            self._read_pending(plan.sequence_ids)
            for following in plan.following:
                self._execute(following)
        else:
            self._execute(plan)

    def _redo(self, steps: list[Plan]) -> None:
        """Append what steps appended to caches that are still in use after all of them."""
        # Few steps of many sequences are fewer calls as they are, which is also the way to the same bits everywhere.
        if self._model.one_by_one or len(steps) <= max((len(s.sequence_ids) for s in steps), default=0):
            for step in steps:
                self._execute(step)
            return
        last: dict[int, Plan] = {}  # all that happens to a sequence, as one step
        for step in steps:
            for sequence_id in step.released:
                last.pop(sequence_id, None)
                self.caches.pop(sequence_id, None)
            for sequence_id, tokens in zip(step.sequence_ids, step.tokens, strict=True):
                started = [sequence_id] if sequence_id in step.started else []
                whole = last.setdefault(
                    sequence_id, Plan([sequence_id], [[]], False, step.split, started, [])
                )
                whole.tokens[0].extend(tokens)
        for whole in last.values():
            self._execute(whole)
        for sequence_id in {i for step in steps for i in step.settled} & self.caches.keys():
            self.caches[sequence_id].settle()

    def _meet(self, meeting: Meeting) -> dict[int, int]:
        common = self._common([self._mask(i, ns, meeting.digests[i]) for i, ns in meeting.lengths.items()])
        for (sequence_id, lengths), mask in zip(meeting.lengths.items(), common, strict=True):
            if not mask and not (meeting.apart and self._link.rank == 0):
                self.caches.pop(sequence_id, None)
                continue
            cache = self.caches[sequence_id]
            length = lengths[(mask & -mask).bit_length() - 1] if mask else 0  # the longest comes first
            if not meeting.apart or self._link.rank != 0:
                cache.cut(length)
            cache.share()
            cache.num_shared, cache.home, cache.uneven = length, None, False
            cache.keep_marks({n for bit, n in enumerate(lengths) if mask >> bit & 1})
        for sequence_id in self.caches.keys() - meeting.lengths.keys():
            del self.caches[sequence_id]
        return {sequence_id: len(cache) for sequence_id, cache in self.caches.items()}

    def _mask(self, sequence_id: int, lengths: list[int], digests: list[int]) -> int:
        """Which of these numbers of tokens this rank has in a sequence's cache, the first one as bit 0."""
        cache = self.caches.get(sequence_id)
        if cache is None:
            return 0
        same = [mine == theirs for mine, theirs in zip(cache.digests(lengths), digests, strict=True)]
        return sum(1 << bit for bit, n in enumerate(lengths) if same[bit] and cache.can_cut(n))

    def _common(self, masks: list[int]) -> list[int]:
        """The bits that are set on every rank."""
        if isinstance(self._link, MlxLink) or self._link.num_ranks == 1 or not masks:
            return masks
        mine = b"".join(mask.to_bytes(MASK_BYTES, "little") for mask in masks)
        everything = self._link.exchange(mine, [len(mine)] * self._link.num_ranks)
        every = [everything[at : at + MASK_BYTES] for at in range(0, len(everything), MASK_BYTES)]
        numbers = [int.from_bytes(mask, "little") for mask in every]
        return [functools.reduce(operator.and_, numbers[i :: len(masks)]) for i in range(len(masks))]

    def _observe(self, plan: WindowsPlan) -> tuple[mx.array, Taps]:
        found = self._guarded(lambda: self._model.observe(mx.array(plan.windows), plan.split))
        self._link.check()
        return found

    def _execute(self, plan: Plan) -> mx.array | None:
        self._prepare(plan)
        if plan.homes:
            mine = self._go_home(plan)
        else:
            mine = plan.sequence_ids
            self._read_pending(mine)
        caches = [self.caches[sequence_id] for sequence_id in mine]
        tokens = [plan.tokens[plan.sequence_ids.index(sequence_id)] for sequence_id in mine]
        lengths = [len(cache) for cache in caches]
        for cache, appended in zip(caches, tokens, strict=True):
            cache.extend(appended, plan.decode)
        if plan.logits:
            caches[0].num_read = -1
        try:
            logits = self._guarded(lambda: self._compute(plan, tokens, caches))
            self._link.check()
        except TransportError:
            for cache, length in zip(caches, lengths, strict=True):
                cache.cut(length)
            raise
        if plan.mark:
            for cache in caches:
                cache.mark()
        return logits

    def _go_home(self, plan: Plan) -> list[int]:
        """Note what every sequence's home will compute in this step; gives those whose home is here.

        When a sequence changes its home, what was pending is read by all others first.
        """
        mine = []
        for sequence_id, home, tokens in zip(plan.sequence_ids, plan.homes, plan.tokens, strict=True):
            cache = self.caches[sequence_id]
            if cache.home != home:
                self._read_pending([sequence_id])
                cache.home = home
            elif plan.spare:
                self._read_pending([sequence_id], plan.spare)
            if not cache.pending:
                cache.share()
            cache.add_pending([Piece(tokens, plan.decode)])
            cache.uneven = True
            if home == self._link.rank:
                mine.append(sequence_id)
        return mine

    def _read_pending(self, sequence_ids: list[int], limit: int | None = None) -> None:
        """Read what is pending of these sequences, `limit` tokens of each; at their home it is there already."""
        self._read_last_tokens([self.caches[i] for i in sequence_ids])
        for sequence_id in sequence_ids:
            cache = self.caches[sequence_id]
            if not cache.pending:
                continue
            for piece in cache.take_pending(limit, merge=not self._model.one_by_one):
                if cache.home == self._link.rank:
                    continue
                cache.extend(piece.tokens, piece.decode)
                if piece.decode:
                    self._model.decode(piece.tokens, [cache.layers], SOLO)
                else:
                    self._model.prefill(piece.tokens, cache.layers, SOLO)
            cache.num_shared = len(cache) - (cache.num_pending if cache.home == self._link.rank else 0)

    def _read_last_tokens(self, caches: list[SequenceCache]) -> None:
        """Of sequences of which one token is pending, read all of these in one step."""
        single = [cache for cache in caches if len(cache.pending) == 1 and cache.pending[0].decode]
        if len(single) < 2:
            return
        tokens = [cache.pending[0].tokens[0] for cache in single if cache.home != self._link.rank]
        mine = [cache for cache in single if cache.home != self._link.rank]
        for cache, token in zip(mine, tokens, strict=True):
            cache.extend([token], True)
        if mine:
            self._model.decode(tokens, [cache.layers for cache in mine], SOLO)
        for cache in single:
            cache.share()

    def cut(self, sequence_id: int, length: int) -> None:
        """Rank 0: take back what a step appended beyond `length`; the next plan has to say so."""
        self.caches[sequence_id].cut(length)

    def can_cut(self, sequence_id: int) -> bool:
        """Rank 0: whether any number of a sequence's last tokens can be taken back."""
        cache = self.caches.get(sequence_id)  # none yet: its first step takes a copy of another's
        return cache is not None and cache.forgets

    def save(self, sequence_id: int) -> None:
        """Let a finished sequence's cache outlive this process, where that is wanted."""
        if self._files:
            self._files.save(self.caches[sequence_id])

    def _prepare(self, plan: Plan) -> None:
        for sequence_id, length in plan.cuts:
            self.caches[sequence_id].cut(length)
        for sequence_id in plan.settled:
            self.caches[sequence_id].settle()
            self.save(sequence_id)
        for sequence_id, source, length in plan.forks:
            self.caches[sequence_id] = self.caches[source].fork(length)
        for sequence_id in plan.released:
            self.caches.pop(sequence_id, None)
        for sequence_id in plan.started:
            self.caches[sequence_id] = SequenceCache(self._model.new_cache())

    def _compute(self, plan: Plan, tokens: list[list[int]], caches: list[SequenceCache]) -> mx.array | None:
        layers = [cache.layers for cache in caches]
        if plan.decode:
            counts = [plan.homes.count(rank) for rank in range(self._link.num_ranks)] if plan.homes else None
            return self._model.decode([token for (token,) in tokens], layers, plan.split, counts)
        if plan.logits:
            return self._model.score(tokens[0], layers[0], plan.split)
        for appended, of_one in zip(tokens, layers, strict=True):
            self._model.prefill(appended, of_one, plan.split)
        return None

    def _guarded(self, compute: Callable[[], T]) -> T:
        """Compute; what MLX's own link raises becomes the link's failure."""
        try:
            return compute()
        except RuntimeError as e:
            if not isinstance(self._link, MlxLink):
                raise
            self.caches.clear()  # MLX may have computed any part of them
            raise self._link.failure(e) from e
