"""The decoder of every conversation: whatever bytes come, messages or RemoteProtocolError, and little memory."""

import random
import tracemalloc
from dataclasses import dataclass, field
from typing import Any

import msgpack
import pytest

from expertd.errors import RemoteProtocolError
from expertd.wire import Codec
from tests.fuzz_wire import LIMIT, MESSAGES, Inner, Many, One, codec, decode


def frame_of(values: Any) -> bytes:
    body = msgpack.packb(values)
    return len(body).to_bytes(4, "big") + body


def test_messages_come_back_as_they_were() -> None:
    data = b"".join(map(codec.encode, MESSAGES))
    assert list(codec.decoder().feed(data)) == MESSAGES


@pytest.mark.parametrize("seed", range(10))
def test_any_pieces(seed: int) -> None:
    rng, data = random.Random(seed), b"".join(map(codec.encode, MESSAGES))
    cuts = sorted(rng.randrange(len(data) + 1) for _ in range(rng.choice([0, 3, 50, 500])))
    decoder, found = codec.decoder(), []
    for a, b in zip([0, *cuts], [*cuts, len(data)], strict=True):
        found += decoder.feed(data[a:b])
    assert found == MESSAGES


def mutate(frame: bytes, rng: random.Random) -> bytes:
    data = bytearray(frame)
    for _ in range(rng.randint(1, 4)):
        kind, at = rng.randrange(5), rng.randrange(len(data))
        if kind == 0:
            data[at] ^= 1 << rng.randrange(8)
        elif (
            kind == 1
        ):  # a type byte of msgpack: fixmap, fixarray, nil, bin, ext, float, int, str, array, map
            data[at] = rng.choice(
                b"\x80\x90\xc0\xc1\xc4\xc7\xc9\xca\xcb\xcf\xd3\xd4\xd6\xd9\xdb\xdc\xdd\xde\xdf\xff"
            )
        elif kind == 2:
            data.insert(at, rng.randrange(256))
        elif kind == 3:
            data[at:at] = data[: rng.randrange(len(data))]
        elif len(data) > 5:
            del data[at]
    if rng.random() < 0.7:  # with a right length the damage reaches the parser
        data[:4] = max(0, len(data) - 4).to_bytes(4, "big")
    return bytes(data)


def test_mutated_frames_parse_or_are_refused() -> None:
    rng, frames, refused = random.Random(4), [codec.encode(m) for m in MESSAGES], 0
    for _ in range(8000):
        refused += decode(mutate(rng.choice(frames), rng))
    assert 2000 < refused < 8000


def test_random_bodies_are_refused() -> None:
    rng = random.Random(5)
    for _ in range(4000):
        body = rng.randbytes(rng.choice([0, 1, 2, 5, 40, 300]))
        assert decode(len(body).to_bytes(4, "big") + body)


def nested(depth: int) -> bytes:
    body = b"\x91" * depth + b"\xc0"
    return len(body).to_bytes(4, "big") + body


@pytest.mark.parametrize(
    "frame",
    [
        b"\x00\x00\x00\x00",
        nested(3),
        nested(600),
        nested(LIMIT - 1),
        *map(frame_of, (None, 7, [], {}, {"op": "unknown"}, {"op": ["one"]}, {"op": "one"}, {7: 1})),
        frame_of({"op": "one", "number": "7", "text": ""}),
        frame_of({"op": "one", "number": 1.5, "text": ""}),
        frame_of({"op": "one", "number": True, "text": ""}),
        frame_of({"op": "one", "number": 7, "text": b"bytes"}),
        frame_of({"op": "one", "number": 7, "text": "", "more": 1}),
        frame_of({"op": "one", "number": 7, "text": "", b"more": 1, "also": 2}),
        frame_of({"op": "many", "inner": [{"a": 1}], "table": {}}),
        frame_of({"op": "many", "inner": [], "table": {"x": None}}),
        frame_of({"op": "many", "inner": [], "table": {}, "pair": [1, 2, 3]}),
        frame_of({"op": "one", "number": 7, "text": msgpack.ExtType(5, b"x")}),
        frame_of({"op": "one", "number": 7, "text": msgpack.Timestamp(1)}),
    ],
)
def test_other_values_are_refused_in_one_line(frame: bytes) -> None:
    with pytest.raises(RemoteProtocolError, match="not a message of ours") as e:
        list(codec.decoder().feed(frame))
    assert "\n" not in str(e.value) and len(str(e.value)) < 300


def test_the_largest_frame_passes_and_the_next_does_not() -> None:
    room = LIMIT - (len(codec.encode(One(1, "x" * 60_000))) - 4 - 60_000)
    assert list(codec.decoder().feed(codec.encode(One(1, "x" * room)))) == [One(1, "x" * room)]
    with pytest.raises(RemoteProtocolError, match=f"frame of {LIMIT + 1} bytes, at most {LIMIT} are allowed"):
        list(codec.decoder().feed(codec.encode(One(1, "x" * (room + 1)))))


def test_a_length_alone_allocates_nothing() -> None:
    tracemalloc.start()
    try:
        for size in (LIMIT + 1, 2**31, 2**32 - 1):
            with pytest.raises(RemoteProtocolError, match=f"frame of {size} bytes"):
                list(codec.decoder().feed(size.to_bytes(4, "big") + b"x"))
        for head in (b"\xdd", b"\xdf", b"\xc6", b"\xdb", b"\xc9"):  # lengths inside the body
            assert decode((6).to_bytes(4, "big") + head + (2**31).to_bytes(4, "big") + b"\x00")
        assert tracemalloc.get_traced_memory()[1] < 1 << 19
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("element", [b"\x80", b"\x90", b"\xc0", b"\xa0", b"\xcb" + bytes(8)])
def test_memory_is_bounded_by_the_frame(element: bytes) -> None:
    """An empty map is one byte on the wire and 64 in memory; nothing may cost more than that order."""
    number = (LIMIT - 5) // len(element)
    body = b"\xdd" + number.to_bytes(4, "big") + element * number
    tracemalloc.start()
    try:
        assert decode(len(body).to_bytes(4, "big") + body)
        assert tracemalloc.get_traced_memory()[1] < 100 * LIMIT
    finally:
        tracemalloc.stop()


def test_a_decoder_keeps_at_most_one_unfinished_frame() -> None:
    decoder = codec.decoder()
    for _ in range(200):
        assert list(decoder.feed(codec.encode(MESSAGES[0]) * 50)) == [MESSAGES[0]] * 50
    assert len(decoder._buffer) == 0


def test_message_of_another_conversation_is_our_mistake() -> None:
    with pytest.raises(KeyError):
        codec.encode(Inner(1, []))


@dataclass(frozen=True)
class Extra:
    values: list[int] = field(default_factory=list)


def test_extended_knows_both() -> None:
    more = codec.extended(Extra)
    sent = [Extra([1]), MESSAGES[0], Many([], {})]
    assert list(more.decoder().feed(b"".join(map(more.encode, sent)))) == sent
    assert more.max_frame_bytes == codec.max_frame_bytes
    with pytest.raises(RemoteProtocolError):
        list(codec.decoder().feed(more.encode(Extra())))
    alone = Codec(One, 100).extended(Extra)
    assert list(alone.decoder().feed(alone.encode(Extra()))) == [Extra()]
