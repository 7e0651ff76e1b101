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

Something must be measured before it can be chosen, and a trial of a slow split is time lost. Until every candidate has
ENOUGH samples, every other step is a trial. After that a trial has to be saved for: each step puts TRIAL_BUDGET of its
time aside, and the candidate that was tried longest ago is tried again when its expected excess is there. So trials
cost at most that part of the time however slow a link has become, and one that has become fast is noticed. But when a
split that needs the link gets slower by ALARM, solo is tried at once, ENOUGH times: never slower than one machine.

Only steps of real requests are measured. Trials of an idle engine were tried: a processor that has just been idle,
with a server starting beside it, took 6 ms for a step that takes 2 ms in a stream, and the choices were wrong.

The planner knows nothing of engines and clocks: `choose` before a step, `took` after it.
"""

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median

from expertd.engine.messages import Choice

WINDOW = 7
ENOUGH = 4
# Two equal splits differ by about 1 % from one median of seven to the next on a quiet machine.
MARGIN = 0.02
TRIAL_BUDGET = 0.005
ALARM = 1.5


@dataclass(frozen=True, order=True)
class Work:
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

    `costs` are multiples of the pace, of the choice and of those that have ENOUGH trials.
    """

    candidates: tuple[str, ...]
    choice: str = "solo"
    pace_s: float = 0.0
    savings_s: float = 0.0
    num_steps: int = 0
    num_alarmed: int = 0  # trials of solo that need not be saved for
    announced: str = ""
    costs: dict[str, float] = field(init=False)
    tried_at: dict[str, int] = field(init=False)  # in steps
    _trials: dict[str, deque[float]] = field(init=False)
    _recent_s: deque[float] = field(default_factory=lambda: deque(maxlen=WINDOW))
    _calm_pace_s: float = math.inf  # the least since the last alarm

    def __post_init__(self) -> None:
        self.costs = {self.choice: 1.0}
        self.tried_at = dict.fromkeys(self.candidates, 0)
        self._trials = {name: deque(maxlen=WINDOW) for name in self.candidates}

    @property
    def is_paced(self) -> bool:
        return len(self._recent_s) >= ENOUGH

    @property
    def is_measured(self) -> bool:
        return self.is_paced and len(self.costs) == len(self.candidates)

    @property
    def least_tried(self) -> str:
        """Of those that have no cost yet, "" if all have."""
        unknown = [name for name in self.candidates if name not in self.costs]
        return min(unknown, key=lambda name: len(self._trials[name]), default="")

    @property
    def tried_long_ago(self) -> str:
        """Of all but the choice, "" if there is no other."""
        others = [name for name in self.candidates if name != self.choice]
        return min(others, key=self.tried_at.__getitem__, default="")

    def add(self, name: str, seconds: float) -> None:
        self.tried_at[name] = self.num_steps
        if name == self.choice:
            self._recent_s.append(seconds)
            self.pace_s = median(self._recent_s)
            self._calm_pace_s = min(self._calm_pace_s, self.pace_s)
            if name != "solo" and self.pace_s > ALARM * self._calm_pace_s:
                self._calm_pace_s, self.num_alarmed = self.pace_s, ENOUGH
        elif self.pace_s:
            if name == "solo" and self.num_alarmed:
                self.num_alarmed -= 1
            trials = self._trials[name]
            trials.append(seconds / self.pace_s)
            if len(trials) >= ENOUGH:
                self.costs[name] = median(trials)

    def choose(self, name: str) -> None:
        """Let `name` be the choice; what each takes is the same as before."""
        unit = self.costs[name]
        self._trials[self.choice] = deque((1 / value for value in self._trials[name]), maxlen=WINDOW)
        for other in self.candidates:
            if other not in (name, self.choice):
                self._trials[other] = deque((value / unit for value in self._trials[other]), maxlen=WINDOW)
        self.costs = {other: cost / unit for other, cost in self.costs.items()}
        self.choice, self.pace_s, self.num_alarmed = name, self.pace_s * unit, 0
        self._recent_s = deque([self.pace_s] * ENOUGH, maxlen=WINDOW)
        self._calm_pace_s = self.pace_s


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
        return _next_trial(record) or record.choice

    def cost_s(self, work: Work) -> float | None:
        """What a step of this work takes by the present choice; None if that is not known yet."""
        record = self._record(work)
        return record.pace_s if record.is_paced else None

    def preferred(self, work: Work) -> str:
        """The choice by now, without a trial."""
        return self._fixed or self._record(work).choice

    def took(self, work: Work, split: str, num_tokens: int, seconds: float, waited_s: float = 0.0) -> None:
        """Say what the step took, from its start to its end. `num_tokens` is what it really had.

        Before it the ranks waited `waited_s` for each other: no fault of the split, but a trial has to pay for it.
        """
        record = self._record(work)
        if split not in record.candidates:  # nobody's choice: sequences stay at their homes for a while
            return
        if work.kind != "decode":  # bound by arithmetic: twice the tokens, twice the time
            seconds *= work.num_tokens / num_tokens
        if record.is_measured:
            _save(record, split, seconds, waited_s)
        record.add(split, seconds)
        if record.is_measured and not self._fixed:
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


def _next_trial(record: _Record) -> str:
    """The candidate that the next step should try instead of the choice, "" for none."""
    if record.num_steps % 2 == 0 and (record.num_alarmed or record.least_tried):
        return "solo" if record.num_alarmed else record.least_tried
    oldest = record.tried_long_ago
    if not oldest or not record.is_measured:
        return ""
    # A trial that costs nothing waits as well, so that the choice keeps being measured.
    waited = record.num_steps - record.tried_at[oldest] > WINDOW
    return oldest if waited and record.savings_s >= record.pace_s * (record.costs[oldest] - 1) else ""


def _save(record: _Record, split: str, seconds: float, waited_s: float) -> None:
    """Put a part of this step's time aside for trials, or pay for the trial that it was."""
    if split == record.choice:
        dearest_s = record.pace_s * (max(record.costs.values()) - 1)
        record.savings_s = min(record.savings_s + TRIAL_BUDGET * seconds, dearest_s)
    elif split != "solo" or not record.num_alarmed:
        record.savings_s -= max(0.0, waited_s + seconds - record.pace_s)


def _reason(choice: str, costs_ms: dict[str, float]) -> str:
    others = {name: cost for name, cost in costs_ms.items() if name != "solo"}
    if choice != "solo":
        return f"{costs_ms['solo'] / costs_ms[choice]:.2f} times as fast as solo"
    if not others:
        return "this model has no other split"
    best = min(others, key=others.__getitem__)
    return f"{best}, the next best, takes {others[best] / costs_ms['solo']:.2f} times as long"
