"""The split planner: which split a step takes, from what steps have cost.

Theory of operation. Steps of about the same work (decode or prefill, the number of tokens within a factor of two) are
one `Work`, and for each work every split that the family supports is a candidate. What the last WINDOW steps of a
candidate took is kept, and medians are compared: one number that an interrupt or a slow clock hardly moves.

Solo is always a candidate, the first choice of all, and wins ties: another split must be faster than solo by MARGIN,
and than the present choice by as much. So a split that measured slower than solo is never chosen.

Something must be measured before it can be chosen, and a trial of a slow split is time lost. Until every candidate has
ENOUGH samples, every other step is a trial. After that a trial has to be saved for: each step puts TRIAL_BUDGET of its
time aside, and the candidate that was tried longest ago is tried again when its expected excess is there. So trials
cost at most that part of the time however slow a link has become, and one that has become fast is noticed.

Only steps of real requests are measured. Trials of an idle engine were tried: a processor that has just been idle,
with a server starting beside it, took 6 ms for a step that takes 2 ms in a stream, and the choices were wrong.

Steps get slower as texts get longer, and a trial made long ago must not look fast for that. So a sample is kept as a
multiple of the pace of its time, which is what the present choice takes (see _Record).

The planner knows nothing of engines and clocks: `choose` before a step, `took` after it.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median

from expertd.engine.messages import Choice

WINDOW = 7
ENOUGH = 4
# Two equal splits differ by about 1 % from one median of seven to the next on a quiet machine.
MARGIN = 0.02
TRIAL_BUDGET = 0.01


@dataclass(frozen=True, order=True)
class Work:
    """Steps that are compared with each other: up to `num_tokens` tokens, a power of two, and more than half of it."""

    kind: str  # "decode", "prefill" or "check" (of a draft)
    num_tokens: int

    @classmethod
    def of(cls, kind: str, num_tokens: int) -> "Work":
        return cls(kind, 1 << (num_tokens - 1).bit_length())

    def __str__(self) -> str:
        return f"{self.kind} of {self.num_tokens}"


@dataclass
class _Record:
    """What is known of one work's candidates; `choice` is the best by now.

    `samples[name]` are step times as multiples of the pace. The pace is 1 s until all candidates have ENOUGH samples,
    then the median of what the choice took lately, in seconds.
    """

    candidates: tuple[str, ...]
    choice: str = "solo"
    savings_s: float = 0.0
    num_steps: int = 0
    announced: str = ""
    samples: dict[str, deque[float]] = field(init=False)
    tried_at: dict[str, int] = field(init=False)  # in steps
    _paces_s: deque[float] = field(default_factory=lambda: deque([1.0], maxlen=WINDOW))

    def __post_init__(self) -> None:
        self.samples = {name: deque(maxlen=WINDOW) for name in self.candidates}
        self.tried_at = dict.fromkeys(self.candidates, 0)

    @property
    def is_measured(self) -> bool:
        return all(len(samples) >= ENOUGH for samples in self.samples.values())

    @property
    def pace_s(self) -> float:
        return median(self._paces_s)

    def costs_s(self) -> dict[str, float]:
        """What a step would take by now under each candidate that was measured."""
        pace_s = self.pace_s
        return {name: pace_s * median(found) for name, found in self.samples.items() if len(found) >= ENOUGH}

    def add(self, name: str, seconds: float) -> None:
        was_measured = self.is_measured
        self.samples[name].append(seconds / self.pace_s)
        self.tried_at[name] = self.num_steps
        if was_measured and name == self.choice:
            self._paces_s.append(seconds)
        elif self.is_measured and not was_measured:
            self.pace_by(self.choice)

    def pace_by(self, name: str) -> None:
        """Let the pace be what `name` takes; no cost changes."""
        unit = median(self.samples[name])
        self._paces_s = deque([unit * self.pace_s], maxlen=WINDOW)
        for other, found in self.samples.items():
            self.samples[other] = deque((value / unit for value in found), maxlen=WINDOW)


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
        return record.costs_s().get(record.choice)

    def preferred(self, work: Work) -> str:
        """The choice by now, without a trial."""
        return self._fixed or self._record(work).choice

    def took(self, work: Work, split: str, num_tokens: int, seconds: float, waited_s: float = 0.0) -> None:
        """Say what the step took, from its start to its end. `num_tokens` is what it really had.

        Before it the ranks waited `waited_s` for each other: no fault of the split, but a trial has to pay for it.
        """
        record = self._record(work)
        if split not in record.samples:  # nobody's choice: sequences stay at their homes for a while
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
        record = self._records[work] = _Record(("solo", *names))
        near = [w for w, r in self._records.items() if w.kind == work.kind and r.is_measured]
        if near:
            closest = min(near, key=lambda w: abs(w.num_tokens.bit_length() - work.num_tokens.bit_length()))
            choice = self._records[closest].choice
            record.choice = choice if choice in record.candidates else "solo"
        return record

    def _settle(self, work: Work, record: _Record) -> None:
        """Choose anew, now that something was measured."""
        costs = record.costs_s()
        limit = (1 - MARGIN) * costs["solo"]
        fast = [name for name in record.candidates if name != "solo" and costs[name] < limit]
        best = min(fast, key=costs.__getitem__, default="solo")
        stays = record.choice in fast and costs[best] > (1 - MARGIN) * costs[record.choice]
        if best != record.choice and not stays:
            record.choice = best
            record.pace_by(best)
        if record.choice != record.announced:
            record.announced = record.choice
            shown = {name: round(1e3 * cost, 3) for name, cost in costs.items()}
            self._news.append(Choice(str(work), record.choice, _reason(record.choice, costs), shown))


def _next_trial(record: _Record) -> str:
    """The candidate that the next step should try instead of the choice, "" for none."""
    if not record.is_measured:
        poorest = min(record.candidates, key=lambda name: len(record.samples[name]))
        return poorest if record.num_steps % 2 else ""
    others = [name for name in record.candidates if name != record.choice]
    if not others:
        return ""
    oldest = min(others, key=lambda name: record.tried_at[name])
    costs = record.costs_s()
    # A trial that costs nothing waits as well, so that the choice keeps being measured.
    waited = record.num_steps - record.tried_at[oldest] > WINDOW
    return oldest if waited and record.savings_s >= costs[oldest] - costs[record.choice] else ""


def _save(record: _Record, split: str, seconds: float, waited_s: float) -> None:
    """Put a part of this step's time aside for trials, or pay for the trial that it was."""
    if split == record.choice:
        dearest = max(record.costs_s().values()) - record.pace_s
        record.savings_s = min(record.savings_s + TRIAL_BUDGET * seconds, dearest)
    else:
        record.savings_s -= max(0.0, waited_s + seconds - record.pace_s)


def _reason(choice: str, costs: dict[str, float]) -> str:
    others = {name: cost for name, cost in costs.items() if name != "solo"}
    if choice != "solo":
        return f"{costs['solo'] / costs[choice]:.2f} times as fast as solo"
    if not others:
        return "this model has no other split"
    best = min(others, key=others.__getitem__)
    return f"{best}, the next best, takes {others[best] / costs['solo']:.2f} times as long"
