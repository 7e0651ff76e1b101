"""Several requests at once: who gets a token when, and that nobody changes anybody else's answer."""

from typing import Any

from expertd.engine.engine import PROMPTS_A_STEP
from expertd.engine.messages import Cancel, Rejected, Started
from tests.engine.scripted import END, Bench, break_off


def test_streams_take_their_tokens_together() -> None:
    bench = Bench(prefill_chunk=4)
    bench.ask("a", "ten tokens", "abcdefghij")
    for _ in range(5):
        bench.engine.step()
    bench.ask("b", "another ten", "xy")
    bench.ask("c", "z", "pq")
    bench.finish()
    assert [bench.text(name) for name in "abc"] == ["abcdefghij", "xy", "pq"]
    assert [(p.sequence_ids, p.num_tokens, p.decode) for p in bench.runner.plans[5:]] == [
        ([2], 4, False),  # a chunk of the next prompt, and in between a token for who runs already
        ([1], 1, True),
        ([2], 4, False),
        ([1], 1, True),
        ([2], 2, False),
        ([1, 2], 2, True),
        ([3], 1, True),  # a prompt of one token needs no prefill, but a cache
        ([1, 2, 3], 3, True),
        ([1, 2, 3], 3, True),
        *[([1], 1, True)] * 4,
    ]
    assert sorted(i for p in bench.runner.plans for i in p.released) == [2, 3]


def test_short_prompts_share_a_chunk() -> None:
    bench = Bench(prefill_chunk=20, prefix_tokens=1000)
    prompts = ("five 5", "3333b", "3333+", "eight...8", "this one is too long")
    for prompt in prompts:
        bench.ask(prompt, prompt, prompt.upper())
    bench.finish()
    assert [bench.text(prompt) for prompt in prompts] == [prompt.upper() for prompt in prompts]
    reads = [[len(tokens) for tokens in p.tokens] for p in bench.runner.plans if not p.decode]
    assert reads == [
        [5, 4, 8],
        [19],
    ]  # the third waits for the second one's cache, and has then nothing to read
    assert bench.done("3333+").cached_tokens == 4


def test_first_tokens_do_not_wait_for_all_prompts() -> None:
    bench = Bench()
    for number in range(PROMPTS_A_STEP + 2):
        bench.ask(str(number), f"{number} is asked", "xy")
    bench.finish()
    steps = [(p.decode, len(p.tokens)) for p in bench.runner.plans]
    assert steps[:4] == [
        (False, PROMPTS_A_STEP),
        (True, PROMPTS_A_STEP),
        (False, 2),
        (True, PROMPTS_A_STEP + 2),
    ]


def test_a_prompt_that_is_known_already_is_decoded_beside_others() -> None:
    """Its beginning is in a cache, and the prompts that came with it wait for the next step."""
    bench = Bench(prefix_tokens=1000)
    bench.ask("first", "prompt", "xy")
    bench.finish()
    for name, prompt in (("again", "prompt"), ("new", "another"), ("once more", "prompt")):
        bench.ask(name, prompt, "xy")
    bench.finish()
    assert [bench.text(name) for name in ("again", "new", "once more")] == ["xy"] * 3
    assert bench.done("again").cached_tokens == 5 and bench.done("new").cached_tokens == 0


def test_more_streams_than_are_served_at_once_wait() -> None:
    bench = Bench(max_streams=2, max_waiting=1)
    for name in "abcd":
        bench.ask(name, f"prompt {name}", name * 3)
    bench.finish()
    assert [bench.text(name) for name in "abc"] == ["aaa", "bbb", "ccc"]
    (refused,) = bench.of("d")
    assert isinstance(refused, Rejected) and refused.busy and refused.message.startswith("3 requests are")
    assert max(len(p.sequence_ids) for p in bench.runner.plans) == 2
    bench.ask("e", "prompt e", "e")
    bench.finish()
    assert bench.text("e") == "e"


def test_a_stream_depends_on_nobody_beside_it() -> None:
    options: dict[str, Any] = {"temperature": 1.0, "max_tokens": 9, "ignore_end": True, "seed": 5}
    alone, crowded = Bench(), Bench(prefill_chunk=3)
    alone.ask("r", "prompt", **options)
    alone.finish()
    for i in range(4):
        crowded.ask(f"noise {i}", f"noise {i}", temperature=1.0, max_tokens=2 + 3 * i, ignore_end=True)
        crowded.engine.step()
    crowded.ask("r", "prompt", **options)
    crowded.finish()
    assert crowded.ids("r") == alone.ids("r")


def test_next_epoch_goes_on_with_all_streams() -> None:
    bench = Bench(shares=(0.5, 0.5), prefill_chunk=4)
    for name in "abc":
        bench.ask(name, f"the prompt {name}", name * 12)
    break_off(bench, 14)
    assert all(0 < len(bench.ids(name)) < 12 for name in "ab")
    bench.begin()
    bench.finish()
    for name in "abc":
        assert bench.ids(name) == [*(name * 12).encode(), END]
        assert [type(e) for e in bench.of(name)].count(Started) == 1


def test_next_epoch_reads_only_what_some_rank_lacks() -> None:
    """The first stream goes on at once; the second, with half of its cache, is read while the first one runs."""
    bench = Bench(shares=(0.5, 0.5), prefill_chunk=4)
    for name in "ab":
        bench.ask(name, f"the prompt {name}", name * 12)
    break_off(bench, 11)
    first, second = (12 + len(bench.ids(name)) - 1 for name in "ab")
    assert second == 13
    bench.begin(held={1: first, 2: 8})
    bench.finish()
    assert [(p.sequence_ids, p.num_tokens, p.started) for p in bench.runner.plans[:5]] == [
        ([1], 1, []),
        ([2], 4, []),
        ([1], 1, []),
        ([2], 1, []),
        ([1, 2], 2, []),
    ]
    assert [bench.ids(name) for name in "ab"] == [[*(name * 12).encode(), END] for name in "ab"]


def test_answers_are_decoded_again_where_chunks_change_bits() -> None:
    """The prompt is read in chunks; each generated token is a decode step of its own, beside who goes on."""
    bench = Bench(shares=(0.5, 0.5), prefill_chunk=4, one_by_one=True)
    for name in "ab":
        bench.ask(name, f"the prompt {name}", name * 12)
    break_off(bench, 12)
    first, second = (len(bench.ids(name)) for name in "ab")
    assert 0 < second < first
    bench.begin(held={1: 12 + first - 1})
    bench.finish()
    again = [p for p in bench.runner.plans if 2 in p.sequence_ids]
    assert [(p.num_tokens, p.decode) for p in again if not p.decode] == [(4, False), (4, False), (3, False)]
    assert all(p.sequence_ids == [1, 2] for p in again[3 : 3 + second])
    assert [bench.ids(name) for name in "ab"] == [[*(name * 12).encode(), END] for name in "ab"]


def test_nothing_held_is_left_when_its_request_is_gone() -> None:
    bench = Bench()
    bench.ask("a", "prompt a", "x" * 9)
    break_off(bench, 4)
    bench.engine.take(Cancel("a"))
    bench.begin(held={1: 9})
    bench.ask("b", "prompt b", "y")
    bench.finish()
    assert bench.runner.plans[0].released == [1]
    assert bench.text("b") == "y"
