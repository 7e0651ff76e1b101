"""Steps whose graph is built from a tape: the bits, the caches and the memory of those that Python builds."""

import threading
import weakref
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models import mixtral
from mlx_lm.models.cache import KVCache

from expertd.link.mailbox import Mailbox
from expertd.model import replay
from expertd.model.caches import SequenceCache
from expertd.model.model import Model
from expertd.model.replay import Recorder, Tape, Tapes
from expertd.model.together import Together, ragged_attention
from expertd.native import _graph
from expertd.native._graph import placeholder
from expertd.split.cut import StepSplit
from tests.engine.test_recovery import load
from tests.ranks import run_ranks
from tests.tiny import FAMILIES, make_tiny

SOLO = StepSplit("solo", (1.0,))
# How many of the sequences a step has: they join and leave, and one is alone in between.
COMPANY = (1, 2, 5, 2, 1, 5, 1)
LENGTHS = (254, 1, 9, 3, 40)


def decoded(model: Model, cuts: bool = True) -> list[Any]:
    """Logits of steps of unlike many sequences, and what their caches hold at the end. The first cache needs more room
    on the way; every third step is taken back and done again with other tokens."""
    caches = [SequenceCache(model.new_cache()) for _ in LENGTHS]
    for length, cache in zip(LENGTHS, caches, strict=True):
        prompt = [(3 * i + length) % 250 for i in range(length)]
        cache.extend(prompt, decode=False)
        model.prefill(prompt, cache.layers, SOLO)
    logits = []
    for step, num in enumerate(COMPANY):
        for attempt in range(2 if cuts and step % 3 == 0 else 1):
            if attempt:
                for cache in caches[:num]:
                    cache.cut(len(cache) - 1)
            tokens = [(7 * step + 13 * i + attempt) % 250 for i in range(num)]
            for token, cache in zip(tokens, caches, strict=False):
                cache.extend([token], decode=True)
            logits.append(model._decode(tokens, [cache.layers for cache in caches[:num]], SOLO, None))
    states: Any = tree_flatten([[layer.state for layer in cache.layers] for cache in caches])
    return [*logits, *(state for _, state in states)]


def in_python(model: Model, function: Any, *args: Any) -> Any:
    """The same without tapes."""
    kept, model._replayed = model._replayed, set()
    try:
        return function(model, *args)
    finally:
        model._replayed = kept


def same(found: list[Any], wanted: list[Any]) -> bool:
    return len(found) == len(wanted) and all(
        bool(mx.array_equal(a, b).item()) if isinstance(a, mx.array) else a == b
        for a, b in zip(found, wanted, strict=True)
    )


CASES = [(family, kernels, 0) for family in FAMILIES for kernels in ("native", "mlx")]
CASES += [("qwen3_moe_heads_of_64", "native", 4), ("qwen3_moe_heads_of_32", "mlx", 8)]
CASES += [("longcat_flash", "native", 0)]  # a layer with two caches


@pytest.mark.parametrize(("family", "kernels", "kv_bits"), CASES)
def test_a_replayed_step_is_the_step(family: str, kernels: str, kv_bits: int, tmp_path: Path) -> None:
    model = load(make_tiny(tmp_path / family, family), kernels, kv_bits)
    before = model._tapes.num_built
    found = decoded(model)
    num_steps = len(COMPANY) + len(COMPANY[::3])
    assert model._tapes.num_built - before == num_steps
    assert same(found, in_python(model, decoded))


# What a tape depends on.


class Counting:
    """A link of one rank, which counts its exchanges."""

    rank, num_ranks = 0, 1

    def __init__(self) -> None:
        self.num_calls = 0

    def exchange_rows(self, rows: mx.array, num_rows: list[int]) -> mx.array:
        assert rows.shape[0] == num_rows[0]
        self.num_calls += 1
        return rows


def filled(model: Model, num_sequences: int) -> list[Any]:
    caches = [model.new_cache() for _ in range(num_sequences)]
    for cache in caches:
        model.prefill([1, 2, 3], cache, SOLO)
    return caches


@pytest.fixture
def model(tmp_path: Path) -> Model:
    return load(make_tiny(tmp_path / "tiny", "mixtral"), "native")


@pytest.mark.parametrize("split", ["experts", "tokens"])
def test_a_new_link_is_met_and_the_old_one_is_not(split: str, model: Model) -> None:
    caches, links, step = filled(model, 2), [Counting(), Counting()], StepSplit(split, (1.0,))
    for link in links:
        model.attach(link)
        for _ in range(3):
            model._decode([5, 6], caches, step, None)
        assert link.num_calls == 2, "one for each layer, while the step is recorded"
    assert links[0].num_calls == 2


def test_there_are_not_too_many_tapes(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """The one that was used last stays."""
    monkeypatch.setattr(replay, "MAX_TAPES", 2)
    caches, recorded = filled(model, 3), []
    record = model._tapes._record
    model._tapes._record = lambda recorder, split: (recorded.append(recorder), record(recorder, split))[1]
    for num in (1, 2, 1, 3, 1, 2):
        model._decode([5] * num, caches[:num], SOLO, None)
    assert [recorder.tokens.shape[0] for recorder in recorded] == [1, 2, 3, 2]
    assert len(model._tapes._tapes) == 2


def test_another_thread_has_tapes_of_its_own(model: Model) -> None:
    """An operation of MLX's belongs to a stream of one thread."""
    found: list[Any] = []
    wanted = [model._decode([5], filled(model, 1)[0:1], SOLO, None) for _ in range(2)]
    caches = filled(model, 1)
    mx.eval([layer.state for layer in caches[0]])
    before = model._tapes.num_built
    thread = threading.Thread(target=lambda: found.append(model._decode([5], caches, SOLO, None)))
    thread.start()
    thread.join()
    assert model._tapes.num_built == before + 1 and same(found, wanted[:1])


def test_layers_of_unlike_lengths_are_left_to_python(model: Model) -> None:
    caches = filled(model, 2)
    others = filled(model, 2)
    for each in (caches, others):
        each[1][0].trim(1)
    before = model._tapes.num_built
    found = model._decode([5, 6], caches, SOLO, None)
    assert model._tapes.num_built == before
    assert same([found], [in_python(model, Model._decode, [5, 6], others, SOLO, None)])


def test_a_step_with_a_mask_is_left_to_python(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    caches, others = filled(model, 2), filled(model, 2)
    model._decode([5, 6], caches, SOLO, None)
    in_python(model, Model._decode, [5, 6], others, SOLO, None)
    first_key = mx.array([[[[False, True, True, True, True]]]])
    monkeypatch.setattr(KVCache, "make_mask", lambda *_, **__: first_key)
    before = model._tapes.num_built
    found = model._decode([5, 6], caches, SOLO, None)
    assert model._tapes.num_built == before
    assert same([found], [in_python(model, Model._decode, [5, 6], others, SOLO, None)])


def test_a_recurrent_layer_without_a_state_is_left_to_python(tmp_path: Path) -> None:
    """A prompt of one token; the next step is replayed again."""
    model = load(make_tiny(tmp_path / "tiny", "qwen3_next"), "native")
    found, wanted = ([model.new_cache()] for _ in range(2))
    before = model._tapes.num_built
    for token in (5, 6, 7):
        logits = model._decode([token], found, SOLO, None)
        assert same([logits], [in_python(model, Model._decode, [token], wanted, SOLO, None)])
    assert model._tapes.num_built == before + 2


def test_a_sampled_step_is_left_to_python(model: Model) -> None:
    """It tells of the experts that were chosen, which are inside the graph."""
    caches = filled(model, 2)
    model._state.choices = {}
    before = model._tapes.num_built
    model._decode([5, 6], caches, SOLO, None)
    assert model._tapes.num_built == before and sorted(model._state.choices) == [0, 1]


# What looks at a value is not recorded.


@pytest.mark.parametrize(
    "look",
    [
        lambda x, cache: x.sum().item(),
        lambda x, cache: bool(x.max() > 0),
        lambda x, cache: x.tolist(),
        lambda x, cache: np.array(x),
        lambda x, cache: mx.eval(x),
        lambda x, cache: mx.async_eval(x),
        lambda x, cache: np.array(cache.offset),
        lambda x, cache: cache.keys,
        lambda x, cache: cache.size(),
        lambda x, cache: cache.state,
        lambda x, cache: mx.random.normal(x.shape) + x,
    ],
    ids=lambda look: "",
)
def test_a_family_that_looks_is_not_recorded(
    look: Any, model: Model, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    layer = mixtral.MixtralDecoderLayer.__call__

    def looking(self: Any, x: mx.array, mask: Any = None, cache: Any = None) -> mx.array:
        seen = look(x, cache)
        y: mx.array = layer(self, x, mask, cache)
        return y + 0 * seen if isinstance(seen, mx.array) and seen.shape == x.shape else y

    caplog.set_level("INFO")
    wanted = in_python(model, decoded, False)
    monkeypatch.setattr(mixtral.MixtralDecoderLayer, "__call__", looking)
    for kind in (
        "keys",
        "size",
        "state",
    ):  # what Together lacks, and a family would find in a cache of its own
        monkeypatch.setattr(Together, kind, lambda self: 0, raising=False)
    before = model._tapes.num_built
    assert same(decoded(model, False), wanted)
    assert model._tapes.num_built == before
    assert "steps of 2 under solo are built in Python (" in caplog.text


LATENT = {
    "a product": lambda rows, keys, values: (keys, keys, rows @ values.swapaxes(-1, -2)),
    "keys and values": lambda rows, keys, values: (keys, values, None),
}
STRANGE = {
    "values first": lambda rows, keys, values: (values, keys, None),
    "keys as values, no product": lambda rows, keys, values: (keys, keys, None),
    "values, and a product": lambda rows, keys, values: (keys, values, rows @ values.swapaxes(-1, -2)),
    "a product with keys": lambda rows, keys, values: (keys, keys, rows @ keys.swapaxes(-1, -2)),
    "no swap": lambda rows, keys, values: (keys, keys, rows @ values),
    "from the left": lambda rows, keys, values: (keys, keys, values.swapaxes(-1, -2) @ rows),
    "a sum": lambda rows, keys, values: (keys, keys, rows @ values.swapaxes(-1, -2) + 1),
    "another type": lambda rows, keys, values: (
        keys,
        keys,
        rows.astype(mx.float16) @ values.swapaxes(-1, -2),
    ),
    "a function": lambda rows, keys, values: (mx.take(keys, mx.array([0]), axis=2), values, None),
    "a length": lambda rows, keys, values: (keys, values, mx.zeros(keys.shape[2])),
}


def attend_recorded(use: Any, number: int = 0) -> Tape:
    """A tape of one layer's attention (of two layers'; `number` is whose keys come first) to what `use` makes."""
    recorder = Recorder([Together([KVCache()]), Together([KVCache()])], 1)
    rows, owner = mx.ones((1, 2, 1, 16)), SimpleNamespace(attend=None)
    fetched = [layer.update_and_fetch(rows, rows) for layer in recorder.layers[: number + 1]]
    with ragged_attention((owner, "attend")), recorder.attention((owner, "attend")):
        queries, values, mask = use(rows, fetched[number][0], fetched[0][1])
        y = owner.attend(rows, queries, values, mask=mask, scale=0.25)
    return Tape(recorder, y)


@pytest.mark.parametrize("use", LATENT.values(), ids=LATENT.keys())
def test_what_attention_may_be_given(use: Any) -> None:
    attend_recorded(use)
    with pytest.raises(TypeError, match="unlike layers"):
        attend_recorded(use, number=1)


@pytest.mark.parametrize("use", STRANGE.values(), ids=STRANGE.keys())
def test_what_was_fetched_is_for_nothing_else(use: Any) -> None:
    with pytest.raises((TypeError, AttributeError, ValueError)):
        attend_recorded(use)


@pytest.mark.parametrize("num_attentions", [0, 2])
def test_each_layer_attends_once(num_attentions: int) -> None:
    recorder = Recorder([Together([KVCache()])], 1)
    rows, owner = mx.ones((1, 2, 1, 16)), SimpleNamespace(attend=None)
    keys, values = recorder.layers[0].update_and_fetch(rows, rows)
    with recorder.attention((owner, "attend")):
        for _ in range(num_attentions):
            rows = owner.attend(rows, keys, values)
    with pytest.raises(ValueError, match="not one attention"):
        Tape(recorder, rows)


def test_a_step_that_gives_other_logits_is_not_replayed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    build = Tapes.build

    def wrong(self: Tapes, tokens: list[int], *args: Any) -> mx.array | None:
        logits = build(self, tokens, *args)
        return logits + 1e-3 if logits is not None and len(tokens) > 1 else logits

    caplog.set_level("INFO")
    monkeypatch.setattr(Tapes, "build", wrong)
    model = load(make_tiny(tmp_path / "tiny", "mixtral"), "native")
    assert model._replayed == {False}
    assert "steps built from tapes give other logits: of one True, of two False" in caplog.text


# Memory.


def address(array: mx.array) -> int:
    return int(np.array(array, copy=False).ctypes.data)


def test_a_step_writes_its_keys_where_they_are(model: Model) -> None:
    caches = filled(model, 2)

    def addresses() -> list[int]:
        return [address(array) for cache in caches for layer in cache for array in layer.state[:2]]

    model._decode([5, 6], caches, SOLO, None)
    before = addresses()
    model._decode([5, 6], caches, SOLO, None)
    assert addresses() == before and model._tapes.num_built >= 2


def test_nobody_holds_the_graph_that_is_evaluated(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """MLX would keep the memory of all that is computed until the end of the step."""
    caches, evaluate, made, held = filled(model, 2), mx.eval, [], []

    class Watched:
        def __init__(self, tape: Any) -> None:
            self.next = _graph.Replay(tape).next
            made.append(weakref.ref(self))

    def watching(*args: Any) -> None:
        held.append([each() for each in made])
        evaluate(*args)

    monkeypatch.setattr(
        replay, "_graph", SimpleNamespace(Replay=Watched, Tape=_graph.Tape, placeholder=placeholder)
    )
    monkeypatch.setattr(mx, "eval", watching)
    model._decode([5, 6], caches, SOLO, None)
    assert held[-1] == [None]


def test_operations_write_where_their_input_was() -> None:
    """Ten of them on a MiB, one after the other, take one more."""
    x = placeholder([1 << 18], mx.float32)
    y = x
    for number in range(10):
        y = y + number
    tape, given = _graph.Tape([([x], [y])]), mx.ones(1 << 18)
    mx.eval(given)
    (found,) = _graph.Replay(tape).next([given])
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    mx.eval(found)
    assert mx.get_peak_memory() - before < 3 << 20


def test_a_layer_is_one_node(model: Model) -> None:
    model._decode([5], filled(model, 1), SOLO, None)
    (step,) = model._tapes._tapes.values()
    assert step and step._graph.num_nodes == 1 + len(model._model.layers)


# Ranks.


def decode_on_ranks(mailbox: Mailbox, folders: list[str]) -> list[str]:
    """The steps, under every split, whose logits are not those that Python builds."""
    return [wrong for folder in folders for wrong in wrong_steps(mailbox, load(Path(folder), "native"))]


def wrong_steps(mailbox: Mailbox, model: Model) -> Iterator[str]:
    model.attach(mailbox)
    before, num_steps = model._tapes.num_built, 0
    for name, share in (
        ("experts", 0.7),
        ("experts", 0.0),
        ("tokens", 0.7),
        ("tokens", 0.0),
        ("sequences", 0.5),
    ):
        split = StepSplit(name, (share, 1 - share))
        ours, others = filled(model, 5), filled(model, 5)
        for num in (1, 2, 5, 2):
            counts = [num, 2] if name == "sequences" else None
            own = counts[mailbox.rank] if counts else num
            tokens, num_steps = [7 + num] * own, num_steps + 1
            found = model._decode(tokens, ours[:own], split, counts)
            if not same([found], [in_python(model, Model._decode, tokens, others[:own], split, counts)]):
                yield f"{split} {num}"
    mailbox.check()
    assert model._tapes.num_built - before == num_steps


def test_splits_are_replayed(tmp_path: Path) -> None:
    folders = [
        str(make_tiny(tmp_path / family, family, "bfloat16"))
        for family in ("qwen3_moe", "qwen3_next", "deepseek_v3")
    ]
    assert run_ranks(Path(__file__), "decode_on_ranks", 2, {"folders": folders}) == [[], []]
