"""Reasoning ends when its budget is used up, and whatever is chosen then is the end's mark."""

import pytest

from expertd.engine.reasoning import ReasoningBudget

START, END = [1], [8, 9]


def forced_in(budget: ReasoningBudget, chosen: list[int], num: int) -> list[int]:
    """The first `num` tokens when the model would choose `chosen`, and then 5 again and again."""
    generated: list[int] = []
    for i in range(num):
        forced = budget.forced(generated)
        generated.append(forced if forced is not None else chosen[i] if i < len(chosen) else 5)
        budget.take(generated)
    return generated


@pytest.mark.parametrize(
    "is_open, chosen, wanted",
    [
        (True, [], [5, 5, 5, 8, 9, 5, 5]),
        (False, [1], [1, 5, 5, 5, 8, 9, 5]),
        (False, [2], [2, 5, 5, 5, 5, 5, 5]),  # no reasoning
        (True, [5, 8, 9], [5, 8, 9, 5, 5, 5, 5]),  # it ends by itself
        (True, [5, 5, 8], [5, 5, 8, 9, 5, 5, 5]),  # it was about to
    ],
)
def test_a_budget_of_three(is_open: bool, chosen: list[int], wanted: list[int]) -> None:
    assert forced_in(ReasoningBudget(3, START, END, is_open), chosen, 7) == wanted


def test_a_resumed_answer_is_bounded_alike() -> None:
    """The tokens of an earlier leader are taken one by one."""
    for num in range(7):
        first = forced_in(ReasoningBudget(3, START, END, True), [], num)
        again = ReasoningBudget(3, START, END, True)
        for i in range(num):
            again.take(first[: i + 1])
        wanted = {3: 8, 4: 9}.get(num)
        assert again.forced(first) == wanted
