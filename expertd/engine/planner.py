"""The split planner: which split a step takes, from what steps have cost.

Theory of operation. Steps of about the same work (decode or prefill, the number of tokens within a factor of two) are
one `Work`, and for each work every split that the family supports is a candidate. The present choice has a pace, the
median of its last WINDOW steps. A step of another candidate is a trial, and what it took is kept as a multiple of the
pace of that moment; the median of its last WINDOW trials is its cost. So only steps that follow each other are
compared: neither a clock that halves for a second nor a text that gets longer makes anything look fast or slow.
(With medians of seconds, bursts of a shared machine in which ten steps took twice as long made a split the choice that
took 1.3 times as long as solo.)

Solo is always a candidate, the first choice of all, and wins ties: another split must be faster than solo by MARGIN,
and than the present choice by as much. So a split that measured slower than solo is never chosen.

The first trial after a step of the choice says nothing: with 16 streams of 1.5 ms it took 3.6 to 4.0 ms where the next
took 1.8, for the other ranks had just been waiting, and then done what they lacked. So it is taken twice, and counts
once.

Something must be measured before it can be chosen, and a trial of a slow split is time lost. Until every candidate has
ENOUGH samples, all that lack some are tried after each step of the choice, one after another: before the first of them
the other ranks have to do what solo's step did, which takes as long as that where it cannot be copied (runner.py). What
was faster in each of FEW trials is preferred meanwhile, by prompts. After that a trial has to be saved for: each step
puts TRIAL_BUDGET of its time aside, and the candidate that was tried longest ago is tried again when its expected
excess is there. So trials cost at most that part of the time however slow a link has become, and one that has become
fast is noticed. But when a split that needs the link gets slower by ALARM, solo is tried at once, ENOUGH times: never
slower than one machine.

Only steps of real requests are measured. Trials of an idle engine were tried: a processor that has just been idle,
with a server starting beside it, took 6 ms for a step that takes 2 ms in a stream, and the choices were wrong.

The planner knows nothing of engines and clocks: `choose` before a step, `took` after it.
"""

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import NamedTuple

from expertd.engine.messages import Choice

WINDOW = 7
ENOUGH = 4
# The first of which only warms up.
STEPS_A_TRIAL = 2
# Trials after which a split may be preferred that is not chosen yet: until each of three has ENOUGH, 16 streams answer
# 20 tokens, and the next prompts would be read by every rank.
FEW = 2
# Two equal splits differ by about 1 % from one median of seven to the next on a quiet machine.
MARGIN = 0.02
TRIAL_BUDGET = 0.005
ALARM = 1.5


class Work(NamedTuple):
    """Steps that are compared with each other: up to `num_tokens` tokens, a power of two, and more than half of it."""

    kind: str  # "decode", "prefill", "prompts" (several short ones) or "check" (of a draft)
    num_tokens: int

    @classmethod
    def of(cls, kind: str, num_tokens: int) -> "Work":
        return cls(kind, 1 << (num_tokens - 1).bit_length())

    def __str__(self) -> str:
        return f"{self.kind} of {self.num_tokens}"


@dataclass
class _Record:
    """What is known of one work's candidates; `choice` is the best by now, and takes `pace_s` seconds a step.

    `costs` are multiples of the pace, of the choice and of those that have ENOUGH trials; `savings` is one as well. A
    step of the choice is the usual case and does next to nothing: what it costs comes on top of a step of 2 ms.
    """

    candidates: tuple[str, ...]
    choice: str = "solo"
    savings: float = 0.0
    num_steps: int = 0
    num_in_row: int = 0  # trials since the last step of the choice
    num_alarmed: int = 0  # trials of solo that need not be saved for
    announced: str = ""
    costs: dict[str, float] = field(init=False)
    _tried_long_ago: str = ""  # of all but the choice
    _tried_at: dict[str, int] = field(init=False)  # in steps
    _trials: dict[str, deque[float]] = field(init=False)
    _recent_s: deque[float] = field(default_factory=lambda: deque(maxlen=WINDOW))
    _calm_pace_s: float = math.inf  # the least since the last alarm

    def __post_init__(self) -> None:
        self.costs = {self.choice: 1.0}
        self._tried_at = dict.fromkeys(self.candidates, 0)
        self._trials = {name: deque(maxlen=WINDOW) for name in self.candidates}
        self._note_trial(self.choice)

    @property
    def pace_s(self) -> float:
        return median(self._recent_s) if self._recent_s else 0.0

    @property
    def is_paced(self) -> bool:
        return len(self._recent_s) >= ENOUGH

    @property
    def is_measured(self) -> bool:
        return self.is_paced and len(self.costs) == len(self.candidates)

    @property
    def preferred(self) -> str:
        """The choice or, while not all is measured, what was faster in each of two trials or more: the fastest."""
        if self.is_measured:
            return self.choice
        limit = 1 - MARGIN
        fast = {name: median(t) for name, t in self._trials.items() if len(t) >= FEW and max(t) < limit}
        return min(fast, key=fast.__getitem__, default=self.choice)

    def next_trial(self) -> str:
        """The candidate that the next step should try instead of the choice, "" for none."""
        if self.num_alarmed:
            return "solo" if self.num_in_row < STEPS_A_TRIAL else ""
        if len(self.costs) < len(self.candidates):
            num_unknown = len(self.candidates) - len(self.costs)
            return self._least_tried if self._recent_s and self.num_in_row <= num_unknown else ""
        oldest = self._tried_long_ago
        if 0 < self.num_in_row < STEPS_A_TRIAL:
            return oldest
        if not oldest or self.savings < STEPS_A_TRIAL * (self.costs[oldest] - 1):
            return ""
        # A trial that costs nothing waits as well, so that the choice keeps being measured.
        return oldest if self.is_paced and self.num_steps - self._tried_at[oldest] > WINDOW else ""

    @property
    def _least_tried(self) -> str:
        """Of those that have no cost yet."""
        unknown = [name for name in self.candidates if name not in self.costs]
        return min(unknown, key=lambda name: len(self._trials[name]))

    def add(self, name: str, seconds: float, waited_s: float) -> None:
        """Note what a step took. Part of its time is put aside for trials, or pays for the trial that it was."""
        self.num_in_row = 0 if name == self.choice else self.num_in_row + 1
        if name == self.choice:
            if self.is_measured:
                self.savings += TRIAL_BUDGET
            self._recent_s.append(seconds)
            if name != "solo":
                self._watch_link()
        elif pace_s := self.pace_s:
            if self.is_measured and not (name == "solo" and self.num_alarmed):
                dearest = STEPS_A_TRIAL * (max(self.costs.values()) - 1)
                self.savings = min(self.savings, dearest) - max(0.0, (waited_s + seconds) / pace_s - 1)
            if self.num_in_row < STEPS_A_TRIAL:
                return
            if name == "solo" and self.num_alarmed:
                self.num_alarmed -= 1
            trials = self._trials[name]
            trials.append(seconds / pace_s)
            if len(trials) >= ENOUGH:
                # The first of all records the step's graph, and takes half as long again.
                self.costs[name] = median(list(trials)[1:] if len(trials) == ENOUGH else trials)
            self._note_trial(name)

    def _watch_link(self) -> None:
        pace_s = self.pace_s
        self._calm_pace_s = min(self._calm_pace_s, pace_s)
        if pace_s > ALARM * self._calm_pace_s:
            self._calm_pace_s, self.num_alarmed = pace_s, ENOUGH

    def _note_trial(self, name: str) -> None:
        self._tried_at[name] = self.num_steps
        others = [other for other in self.candidates if other != self.choice]
        self._tried_long_ago = min(others, key=self._tried_at.__getitem__, default="")

    def choose(self, name: str) -> None:
        """Let `name` be the choice; what each takes is the same as before."""
        unit, pace_s, before = self.costs[name], self.pace_s * self.costs[name], self.choice
        self._trials[before] = deque((1 / value for value in self._trials[name]), maxlen=WINDOW)
        for other in self.candidates:
            if other not in (name, before):
                self._trials[other] = deque((value / unit for value in self._trials[other]), maxlen=WINDOW)
        self.costs = {other: cost / unit for other, cost in self.costs.items()}
        self.choice, self.savings, self.num_alarmed, self.num_in_row = name, self.savings / unit, 0, 0
        self._recent_s = deque([pace_s] * ENOUGH, maxlen=WINDOW)
        self._calm_pace_s = pace_s
        self._note_trial(before)


class Planner:
    """Chooses among `solo` and the splits in `supported`, or is told: `wanted` is "auto" or the only split there is."""

    def __init__(self, wanted: str, supported: Sequence[str], num_ranks: int) -> None:
        self._fixed = "solo" if num_ranks == 1 else "" if wanted == "auto" else wanted
        self._supported = tuple(s for s in supported if s != "solo")
        self._records: dict[Work, _Record] = {}
        self._news: list[Choice] = []

    def choose(self, work: Work) -> str:
        """The split of the next step, which is of this work."""
        if self._fixed:
            return self._fixed
        record = self._record(work)
        record.num_steps += 1
        return record.next_trial() or record.choice

    def cost_s(self, work: Work) -> float | None:
        """What a step of this work takes by the present choice; None if that is not known yet."""
        record = self._record(work)
        return record.pace_s if record.is_paced else None

    def preferred(self, work: Work) -> str:
        """What seems the best by now, without a trial."""
        return self._fixed or self._record(work).preferred

    def took(self, work: Work, split: str, num_tokens: int, seconds: float, waited_s: float = 0.0) -> None:
        """Say what the step took, from its start to its end. `num_tokens` is what it really had.

        Before it the ranks waited `waited_s` for each other: no fault of the split, but a trial has to pay for it.
        """
        record = self._record(work)
        if split not in record.candidates:  # nobody's choice: sequences stay at their homes for a while
            return
        if work.kind != "decode":  # bound by arithmetic: twice the tokens, twice the time
            seconds *= work.num_tokens / num_tokens
        record.add(split, seconds, waited_s)
        if record.choice == record.announced == split or self._fixed:
            return  # nothing new is known of the others
        if record.is_measured:
            self._settle(work, record)

    def news(self) -> list[Choice]:
        """The choices that were made or changed since the last call."""
        news, self._news = self._news, []
        return news

    def _record(self, work: Work) -> _Record:
        """What is known of a work; a new one begins with the choice of the nearest work of its kind."""
        if record := self._records.get(work):
            return record
        if self._fixed:
            return self._records.setdefault(work, _Record((self._fixed,), self._fixed))
        # One token cannot be divided by rows: `tokens` would leave it to one rank.
        # And whole sequences are divided where there are several, which prompts decide by themselves (Engine).
        alone, reads = work.num_tokens == 1, work.kind != "decode"
        unfit = {"tokens"} if alone else set()
        unfit |= {"sequences"} if alone or reads else set()
        names = [s for s in self._supported if s not in unfit]
        near = [w for w, r in self._records.items() if w.kind == work.kind and r.is_measured]
        choice = "solo"
        if near:
            closest = min(near, key=lambda w: abs(w.num_tokens.bit_length() - work.num_tokens.bit_length()))
            choice = self._records[closest].choice
        record = _Record(("solo", *names), choice if choice in names else "solo")
        return self._records.setdefault(work, record)

    def _settle(self, work: Work, record: _Record) -> None:
        """Choose anew, now that something was measured."""
        costs = record.costs
        limit = (1 - MARGIN) * costs["solo"]
        fast = [name for name in record.candidates if name != "solo" and costs[name] < limit]
        best = min(fast, key=costs.__getitem__, default="solo")
        stays = record.choice in fast and costs[best] > (1 - MARGIN) * costs[record.choice]
        if best != record.choice and not stays:
            record.choose(best)
        if record.choice != record.announced:
            record.announced = record.choice
            shown = {name: round(1e3 * record.pace_s * record.costs[name], 3) for name in record.candidates}
            self._news.append(Choice(str(work), record.choice, _reason(record.choice, shown), shown))


def _reason(choice: str, costs_ms: dict[str, float]) -> str:
    others = {name: cost for name, cost in costs_ms.items() if name != "solo"}
    if choice != "solo":
        return f"{costs_ms['solo'] / costs_ms[choice]:.2f} times as fast as solo"
    if not others:
        return "this model has no other split"
    best = min(others, key=others.__getitem__)
    return f"{best}, the next best, takes {others[best] / costs_ms['solo']:.2f} times as long"
