"""Counts what a leader's steps do, for its reports to the supervisor."""

from expertd.engine.messages import Steps
from expertd.engine.plan import Plan


class Meter:
    """`took` after each step; `take` gives what came since the last time, by split and kind of step."""

    def __init__(self) -> None:
        self._steps: dict[tuple[str, bool], Steps] = {}

    def took(self, plan: Plan, seconds: float) -> None:
        kind = (plan.split.name, plan.decode)
        old = self._steps.get(kind, Steps(*kind, 0, 0, 0.0))
        tokens = old.num_tokens + plan.num_tokens
        self._steps[kind] = Steps(*kind, old.num_steps + 1, tokens, old.seconds + seconds)

    def take(self) -> list[Steps]:
        steps, self._steps = list(self._steps.values()), {}
        return steps
