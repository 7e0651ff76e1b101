"""The planner against costs that a function gives: what it settles on, what that costs, when it changes its mind."""

import random
from collections import Counter
from collections.abc import Callable

import pytest

from expertd.engine.planner import ENOUGH, FEW, Planner, Work

SPLITS = ("solo", "experts", "tokens")
ONE, CHUNK = Work("decode", 1), Work("prefill", 512)
Cost = Callable[[int, str], float]  # (step, split) -> seconds


def drive(planner: Planner, work: Work, cost: Cost, num_steps: int) -> tuple[Counter[str], float]:
    """How often each split was taken, and the seconds of all steps."""
    taken, total = Counter[str](), 0.0
    for step in range(num_steps):
        split = planner.choose(work)
        seconds = cost(step, split)
        planner.took(work, split, work.num_tokens, seconds)
        taken[split] += 1
        total += seconds
    return taken, total


def noisy(costs: dict[str, float], seed: int = 1) -> Cost:
    """Within 5 % of `costs`, and one step in twenty takes five times as long."""
    rng = random.Random(seed)
    return lambda step, split: costs[split] * rng.uniform(0.95, 1.05) * (5 if rng.random() < 0.05 else 1)


@pytest.mark.parametrize(
    ("work", "costs", "best"),
    [
        (ONE, {"solo": 3.0, "experts": 2.0}, "experts"),
        (ONE, {"solo": 2.0, "experts": 3.0}, "solo"),
        (CHUNK, {"solo": 3.0, "experts": 2.5, "tokens": 1.6}, "tokens"),
        (CHUNK, {"solo": 1.0, "experts": 1.7, "tokens": 40.0}, "solo"),
    ],
)
def test_the_fastest_split_is_taken_and_trials_cost_little(
    work: Work, costs: dict[str, float], best: str
) -> None:
    planner = Planner("auto", SPLITS, 2)
    drive(planner, work, noisy(costs), 4 * ENOUGH * len(costs))
    taken, seconds = drive(planner, work, noisy(costs, 2), 2000)
    _, alone = drive(Planner(best, SPLITS, 2), work, noisy(costs, 2), 2000)
    assert taken[best] > 1700
    assert seconds < 1.03 * alone


def test_solo_wins_ties() -> None:
    planner = Planner("auto", SPLITS, 2)
    drive(planner, ONE, lambda step, split: 0.99 if split == "experts" else 1.0, 500)
    assert [c.split for c in planner.news()] == ["solo"]


def test_a_split_that_became_slow_is_left_and_taken_again_when_it_is_fast() -> None:
    planner = Planner("auto", SPLITS, 2)

    def cost(step: int, split: str) -> float:
        return 0.01 if split == "solo" else 0.05 if 300 <= step < 600 else 0.005

    drive(planner, ONE, cost, 4000)
    assert [c.split for c in planner.news()] == ["experts", "solo", "experts"]


def test_the_first_step_after_solo_does_not_count() -> None:
    """The other ranks had just been waiting: what divides the work well takes longer than solo, once."""
    before, costs = "solo", {"solo": 1.0, "experts": 1.3, "tokens": 1.2, "sequences": 0.6}

    def cost(step: int, split: str) -> float:
        nonlocal before
        is_cold, before = split != before == "solo", split
        return costs[split] + is_cold

    planner = Planner("auto", tuple(costs), 2)
    taken, _ = drive(planner, Work("decode", 16), cost, 1000)
    assert [c.split for c in planner.news()] == ["sequences"] and taken["sequences"] > 950


def test_a_link_that_breaks_down_is_left_within_twenty_steps() -> None:
    planner = Planner("auto", SPLITS, 2)
    drive(planner, ONE, lambda step, split: {"solo": 1.0, "experts": 0.5}[split], 300)
    taken, _ = drive(planner, ONE, lambda step, split: {"solo": 1.0, "experts": 5.0}[split], 40)
    assert taken["experts"] < 20


def test_longer_texts_do_not_make_an_old_trial_look_fast() -> None:
    """Both take ever longer, `experts` twice as long as solo: it never seems to be the faster one."""
    planner = Planner("auto", SPLITS, 2)
    drive(planner, ONE, lambda step, split: (1 + step / 100) * (1 if split == "solo" else 2), 3000)
    assert [c.split for c in planner.news()] == ["solo"]


def test_bursts_of_a_shared_machine_change_nothing() -> None:
    """Half of the time, some steps at once take twice as long, whichever split they have."""
    rng, planner, slow = random.Random(3), Planner("auto", SPLITS, 2), [1.0] * 40
    while len(slow) < 6000:
        slow += [rng.choice((1.0, 2.0))] * rng.randint(2, 20)
    cost = {"solo": 1.0, "experts": 1.3}
    taken, _ = drive(planner, ONE, lambda step, split: slow[step] * cost[split], 6000)
    assert [c.split for c in planner.news()] == ["solo"]
    assert taken["solo"] > 5900


def test_reasons_are_for_people() -> None:
    planner = Planner("auto", SPLITS, 2)
    drive(planner, CHUNK, lambda step, split: {"solo": 0.3, "experts": 0.2, "tokens": 0.15}[split], 40)
    (choice,) = planner.news()
    assert (choice.work, choice.split, choice.reason) == (
        "prefill of 512",
        "tokens",
        "2.00 times as fast as solo",
    )
    assert choice.costs_ms == pytest.approx({"solo": 300, "experts": 200, "tokens": 150})
    planner = Planner("auto", SPLITS, 2)
    drive(planner, ONE, lambda step, split: {"solo": 0.2, "experts": 0.3}[split], 40)
    assert planner.news()[0].reason == "experts, the next best, takes 1.50 times as long"
    assert planner.news() == []


def test_chunks_that_are_cut_short_count_by_their_tokens() -> None:
    """257 and 512 tokens are the same work; `tokens` would seem twice as fast because it got the short ones."""
    planner = Planner("auto", SPLITS, 2)
    for _ in range(100):
        split = planner.choose(CHUNK)
        num_tokens = 257 if split == "tokens" else 512
        planner.took(CHUNK, split, num_tokens, num_tokens / 512)
    assert [c.split for c in planner.news()] == ["solo"]


def test_work_is_compared_with_its_like_and_begins_with_its_neighbours_choice() -> None:
    planner = Planner("auto", SPLITS, 2)
    works = [Work.of("decode", n) for n in (1, 2, 3, 4, 5, 16)]
    assert [w.num_tokens for w in works] == [1, 2, 4, 4, 8, 16]
    fast_tokens = {"solo": 3.0, "experts": 2.5, "tokens": 1.0}
    drive(planner, Work("decode", 8), lambda step, split: fast_tokens[split], 40)
    first_two = []
    for _ in range(2):
        first_two.append(planner.choose(Work("decode", 16)))
        planner.took(Work("decode", 16), first_two[-1], 16, 1.0)
    assert first_two == ["tokens", "solo"]  # what is best for eight, and a trial
    assert "tokens" not in {planner.choose(ONE) for _ in range(20)}  # one row cannot be divided


def test_what_was_faster_in_two_trials_is_preferred_while_others_are_measured() -> None:
    """Short answers: prompts that come meanwhile need not be read by every rank."""
    work, costs = Work("decode", 16), {"solo": 1.0, "experts": 1.0, "tokens": 1.0, "sequences": 0.6}
    planner, taken, preferred = Planner("auto", tuple(costs), 2), Counter[str](), []
    for _ in range(12):
        split = planner.choose(work)
        planner.took(work, split, 16, costs[split])
        taken[split] += 1
        preferred.append((taken["sequences"] >= FEW, planner.preferred(work)))
    assert not planner.news()  # not all is measured
    assert set(preferred) == {(False, "solo"), (True, "sequences")}


def test_one_slow_trial_and_nothing_is_preferred() -> None:
    work, trials = Work("decode", 16), iter([0.6, 1.1, 0.6])
    planner = Planner("auto", ("solo", "sequences"), 2)
    for _ in range(5):
        split = planner.choose(work)
        planner.took(work, split, 16, 1.0 if split == "solo" else next(trials))
        assert planner.preferred(work) == "solo"
    assert next(trials, None) is None


def test_an_alarm_before_all_is_measured_keeps_nothing_from_being_measured() -> None:
    """Work that begins with its neighbour's choice, which becomes slow at once."""
    planner = Planner("auto", SPLITS, 2)
    drive(
        planner,
        Work("decode", 8),
        lambda step, split: {"solo": 3.0, "experts": 2.5, "tokens": 1.0}[split],
        40,
    )
    taken, _ = drive(planner, Work("decode", 16), lambda step, split: 1.0 if step < 4 else 9.0, 60)
    assert all(taken[split] >= ENOUGH for split in SPLITS)
    assert planner.news()[-1].work == "decode of 16"


@pytest.mark.parametrize(("wanted", "num_ranks", "split"), [("auto", 1, "solo"), ("experts", 2, "experts")])
def test_what_was_told_is_done(wanted: str, num_ranks: int, split: str) -> None:
    planner = Planner(wanted, SPLITS, num_ranks)
    taken, _ = drive(planner, CHUNK, lambda step, split: 1.0, 50)
    assert taken == {split: 50} and planner.news() == []


def test_a_family_without_splits_stays_alone() -> None:
    planner = Planner("auto", ("solo",), 3)
    assert drive(planner, ONE, lambda step, split: 1.0, 50)[0] == {"solo": 50}
